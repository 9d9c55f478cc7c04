"""Loads a model from a published directory, each rank reading only the slices that it holds.

Owns the way from published tensors through a `KeyMap` into a module's parameters. Knows neither families nor meshes: a
DTensor says itself which slice is local. Errors come from headers, before any tensor is read. No collectives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from omniloom.checkpoint.tensor_files import DTYPES, HFCheckpoint
from omniloom.keymap import Assembly, Box, KeyMap, Read, Tied, listed, whole
from omniloom.ops import nf4

CHUNK_BYTES = 64 << 20  # of a parameter, read at a time
# ends of names of tensors that only quantised weights have beside them, most telling first
_COMPANIONS = (
    (r"weight_scale_inv", "fp8 in blocks"),
    (r"weight_packed|weight_zero_point", "compressed-tensors"),
    (r"weight_scale_2", "nvfp4"),
    (r"weight_scale|input_scale|scale_weight", "fp8 or int8 with a scale"),
    (r"qweight|qzeros|scales|g_idx", "gptq or awq"),
    (r"SCB", "bitsandbytes int8"),
    (r"absmax|quant_map|nested_absmax|bitsandbytes__\w+", "bitsandbytes 4 bit"),
    (r"codebooks", "aqlm"),
)
_QUANTISED_SECTIONS = ("quantization_config", "compression_config", "quantization")


def load_model(
    model: nn.Module,
    checkpoint: HFCheckpoint,
    key_map: KeyMap,
    *,
    fresh: Collection[str] = (),
    packed: Collection[str] = (),
    unbuilt: Collection[str] = (),
) -> None:
    """Fill all parameters and persistent buffers of `model`, plain or DTensor, in their own dtype.

    What no checkpoint holds (non-persistent buffers, `fresh` parameters) is the caller's to fill. `fresh` names
    parameters that the checkpoint does not have (adapters), `packed` those that are held as 4-bit codes, `unbuilt`
    tensors that it may have and this module does not (other stages, unused towers, cut layers).

    Raises: ValueError listing all tensors that are missing, extra or of another shape, before anything is read.
    """
    assemblies = key_map.assemblies(checkpoint.shapes)
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in fresh}
    shapes = {name: nf4.shape_of(own) if name in packed else tuple(own.shape) for name, own in tensors.items()}
    check_names(shapes, assemblies, key_map, unbuilt=unbuilt)
    for name, tensor in tensors.items():
        _load_tensor(tensor, assemblies[name], checkpoint, packed=name in packed)


def check_names(
    shapes: Mapping[str, tuple[int, ...]],
    assemblies: Mapping[str, Assembly],
    key_map: KeyMap,
    *,
    unbuilt: Collection[str] = (),
) -> None:
    """Compare the (global) shapes a model wants with what a checkpoint gives. Raises: ValueError listing all faults."""
    faults = []
    for name, shape in shapes.items():
        if name not in assemblies:
            published = key_map.published_names(name)
            faults.append(f"missing {', '.join(published) if published else 'a rule'} for {name} {list(shape)}")
        elif assemblies[name].shape != tuple(shape):
            names = ", ".join(dict.fromkeys(piece.published for piece in assemblies[name].pieces[:2]))
            more = ", ..." if len(assemblies[name].pieces) > 2 else ""
            faults.append(
                f"{name}: expected {list(shape)} by config.json, got {list(assemblies[name].shape)} from {names}{more}"
            )
    second = {rule.ours for rule in key_map.rules if isinstance(rule, Tied)}
    for name, assembly in assemblies.items():
        if name not in shapes and name not in unbuilt and name not in second:
            faults.append(f"extra {assembly.pieces[0].published}: by config.json the model has no {name}")
    if faults:
        raise ValueError("checkpoint and model do not fit:\n  " + listed(faults, "\n  "))


def refuse_quantised(checkpoint: HFCheckpoint, config_json: Mapping[str, Any]) -> None:
    """Raises: ValueError naming the method, where config.json or the names of tensors say that weights are codes."""
    if (told := _find_quantisation(config_json, "")) is not None:
        section, method = told
        where = f"config.json has {section}"
    elif (file := checkpoint.directory / "hf_quant_config.json").is_file():
        where, method = f"it has {file.name}", "modelopt"
    else:
        ends = {name.rpartition(".")[2]: name for name in checkpoint.shapes}
        found = ((ends[end], method) for pattern, method in _COMPANIONS for end in ends if re.fullmatch(pattern, end))
        name, method = next(found, ("", ""))
        where = f"it has {name}"
    if method:
        raise ValueError(
            f"{checkpoint.directory}: its weights are quantised ({method}: {where}), and codes cannot be trained as "
            "numbers; start from the checkpoint that was quantised, in bfloat16"
        )


def _find_quantisation(section: Any, path: str) -> tuple[str, str] | None:
    """Where in a config.json a quantisation stands, and its method."""
    if not isinstance(section, Mapping):
        return None
    for key, value in section.items():
        if key in _QUANTISED_SECTIONS and value:
            words = value if isinstance(value, Mapping) else {}
            bits = next((name for name in ("load_in_4bit", "load_in_8bit") if words.get(name)), "no quant_method given")
            return f"{path}{key}", str(words.get("quant_method") or words.get("quant_algo") or bits)
        if (found := _find_quantisation(value, f"{path}{key}.")) is not None:
            return found
    return None


def check_dtypes(checkpoint: HFCheckpoint, assemblies: Mapping[str, Assembly]) -> None:
    """Raises: ValueError for weights that are stored as integers or in 8 bits, which no config.json announced."""
    names = dict.fromkeys(piece.published for assembly in assemblies.values() for piece in assembly.pieces)
    kinds = {name: checkpoint.entries[name].dtype for name in names}
    odd = [name for name, kind in kinds.items() if not (DTYPES[kind].is_floating_point and DTYPES[kind].itemsize > 1)]
    if odd:
        raise ValueError(
            f"{checkpoint.directory}: {odd[0]} is stored as {kinds[odd[0]]} ({len(odd)} of {len(kinds)} weights are of "
            "integers or 8 bits): quantised weights cannot be trained as numbers; start from the checkpoint in bfloat16"
        )


def check_twins(checkpoint: HFCheckpoint, key_map: KeyMap, assemblies: Mapping[str, Assembly]) -> None:
    """Raises: ValueError where a tensor that config.json ties to another is stored with values of its own.

    Reads both: transformers computes with such a tensor, vLLM without it.
    """
    for published, same_as in key_map.second_names(checkpoint.shapes).items():
        origin = assemblies[same_as].pieces[0].published
        if not torch.equal(checkpoint.read_slice(published), checkpoint.read_slice(origin)):
            raise ValueError(
                f"{checkpoint.directory}: config.json ties {published} to {origin}, but they are stored with different "
                f"values; set tie_word_embeddings to false there, or leave {published} out of the weights"
            )


def local_region(tensor: Tensor) -> Box | None:
    """The region of the global tensor that this rank holds; None for a rank outside of the tensor's mesh.

    Raises: ValueError where it is no single box (unevenly divided by two mesh axes along one dim).
    """
    if not isinstance(tensor, DTensor):
        return whole(tuple(tensor.shape))
    mesh, placements = tensor.device_mesh, tensor.placements
    for dim in range(tensor.ndim):
        cuts = [mesh.size(axis) for axis, placement in enumerate(placements) if getattr(placement, "dim", None) == dim]
        plain = all(type(placement) is Shard for placement in placements if getattr(placement, "dim", None) == dim)
        if not plain and tensor.shape[dim] % prod(cuts):
            raise ValueError(
                f"dim {dim} of a parameter {list(tensor.shape)} does not divide by the {prod(cuts)} ranks over which "
                f"{placements} cuts it; choose degrees whose product divides {tensor.shape[dim]}"
            )
    if mesh.get_coordinate() is None:
        return None
    (chunk,) = tensor.__create_chunk_list__()  # as torch's own checkpoints ask it
    return tuple((offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))


def read_tensor(assembly: Assembly, checkpoint: HFCheckpoint, out: Tensor, region: Box | None = None) -> None:
    """Copy `region` (None: all) of one of our tensors into `out`, which has the region's shape and any dtype."""
    region = whole(assembly.shape) if region is None else region
    for item in assembly.reads(region):
        part = _lay_out(checkpoint.read_slice(item.published, item.box), item)
        out[_slices(item.target)].copy_(part)


def gather_full(state: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """A `gather` for `export`: a name's full tensor on the CPU. A collective over its mesh if it is sharded."""

    def gather(name: str) -> Tensor:
        tensor = state[name].detach()
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()

    return gather


@torch.no_grad()
def _load_tensor(tensor: Tensor, assembly: Assembly, checkpoint: HFCheckpoint, *, packed: bool) -> None:
    region = local_region(tensor)
    if region is None:
        return
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    read, width = (_read_packed, 8) if packed else (read_tensor, local.element_size())
    for chunk in _row_chunks(region, width):
        start, stop = (chunk[0][0] - region[0][0], chunk[0][1] - region[0][0]) if chunk else (0, 0)
        read(assembly, checkpoint, local[start:stop] if chunk else local, chunk)


def _read_packed(assembly: Assembly, checkpoint: HFCheckpoint, out: Tensor, region: Box) -> None:
    """Fill `out` with `region` of the bytes of one of our tensors, packed: whole blocks are read and cut."""
    *rows, (start, stop) = region
    first, last = start // nf4.BLOCK_BYTES, -(-stop // nf4.BLOCK_BYTES)
    numbers = torch.empty(*(high - low for low, high in rows), (last - first) * nf4.BLOCK)
    read_tensor(assembly, checkpoint, numbers, (*rows, (first * nf4.BLOCK, last * nf4.BLOCK)))
    before = start - first * nf4.BLOCK_BYTES
    out.copy_(nf4.pack(numbers)[..., before : before + stop - start])


def _row_chunks(region: Box, itemsize: int) -> Iterator[Box]:
    if not region:
        yield region
        return
    row_bytes = itemsize * prod(stop - start for start, stop in region[1:])
    num_rows = max(1, CHUNK_BYTES // max(row_bytes, 1))
    for start in range(*region[0], num_rows):
        yield ((start, min(start + num_rows, region[0][1])), *region[1:])


def _lay_out(tensor: Tensor, item: Read) -> Tensor:
    if item.reshape == "transpose":
        return tensor.transpose(-1, -2)
    if item.reshape == "flatten":
        return tensor.flatten(1)[_slices(item.crop)]
    return tensor


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
