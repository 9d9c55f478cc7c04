"""AdamW and Muon over sharded weights, with states in fewer bits or in host memory.

Where states as wide as the weights lie beside them, `torch.optim.AdamW` does AdamW's part. The layout changes nothing
here either: rounding draws its numbers by column, weight and step, and Muon sees whole matrices. Knows no model.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from omniloom.config import OptimizerStates, TrainConfig
from omniloom.parallel.device import HostCopies

SCALE = "_scale"  # ends the key of what the codes of a row are multiplied by
STEPS_PER_OCTAVE = 8  # of 8-bit codes: neighbours are 9 % apart, 127 of them reach over 16 octaves
# Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, as torch.optim.Muon has them
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5
MATCHING_RMS = 0.2  # makes Muon's updates as large as AdamW's. Source: Liu et al. 2025 (arXiv 2502.16982), section 2.2


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the matrices of a weight are divided: along `dim` (-2 or -1) into pieces of these sizes, one a rank."""

    group: dist.ProcessGroup
    dim: int
    sizes: tuple[int, ...]


Batch = tuple[Mapping[str, Any], list[tuple[str, Tensor]]]  # a group, and those of its weights that step together


def make_optimizer(
    groups: Iterable[dict[str, Any]],
    train: TrainConfig,
    *,
    offload: bool,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> torch.optim.Optimizer:
    """The optimizer that the config asks for, its states in host memory with `offload`. Groups: `parameter_groups`'."""
    offload = offload and device.type != "cpu"
    if train.optimizer == "adamw" and train.optimizer_states == "float32" and not offload:
        return torch.optim.AdamW(list(groups), betas=train.betas, eps=train.epsilon, fused=True)
    return ShardedOptimizer(
        groups,
        betas=train.betas,
        epsilon=train.epsilon,
        states=train.optimizer_states,
        copies=HostCopies(device) if offload else None,
        compute_dtype=compute_dtype,
    )


class ShardedOptimizer(torch.optim.Optimizer):
    """AdamW, and Muon for groups that are marked `orthogonal`; groups have `names` beside `params`.

    States of a weight: `step`, and `exp_avg` and `exp_avg_sq`, or `momentum_buffer`; of 8 bits these are codes as large
    as the weight, with a float32 scale for each row. Vectors keep float32.
    Sources: Loshchilov & Hutter 2019 (arXiv 1711.05101); Dettmers et al. 2022 (arXiv 2110.02861) for 8-bit states; Muon
    as above, with Nesterov momentum.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        epsilon: float,
        states: OptimizerStates,
        copies: HostCopies | None,
        compute_dtype: torch.dtype,
    ) -> None:
        """`copies` brings states from and to host memory; None leaves them on the device. `compute_dtype` is that of
        Muon's products. Raises: ValueError for a matrix that is cut along two axes."""
        super().__init__(groups, {"lr": 0.0})
        self._betas, self._epsilon, self._states = betas, epsilon, states
        self._copies, self._compute_dtype = copies, compute_dtype
        self.grad_scale: Tensor | None = None  # what gradients are divided by
        self._cuts = {p: _find_cut(p) for group in self.param_groups if group["orthogonal"] for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient. Collective where matrices are cut."""
        assert closure is None, "losses are computed before the step"
        batches = self._batches()
        ahead = self._fetch(batches[0]) if batches else []
        for number, batch in enumerate(batches):
            states = [{key: self._arrived(value) for key, value in state.items()} for state in ahead]
            self._let_go()
            ahead = self._fetch(batches[number + 1]) if number + 1 < len(batches) else []
            (self._step_muon if batch[0]["orthogonal"] else self._step_adamw)(batch, states)
        self._let_go()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over `state` of weights by their number; groups stay as they are."""
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, given in state_dict["state"].items():
            for key, value in self._state(order[number]).items():
                _local(value).copy_(_local(given[key]))

    # ------------------------------------------------------------------------------------ the two updates

    def _step_adamw(self, batch: Batch, states: list[dict[str, Tensor]]) -> None:
        group, ((name, parameter),) = batch
        first, second = self._read(states[0], "exp_avg"), self._read(states[0], "exp_avg_sq")
        weight, gradient = _local(parameter), self._gradient(parameter, first.dtype)
        beta1, beta2 = self._betas
        number = self._count(parameter)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = second.sqrt().div_(math.sqrt(1 - beta2**number)).add_(self._epsilon)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(first, root, value=-group["lr"] / (1 - beta1**number))
        self._write(name, parameter, "exp_avg", first)
        self._write(name, parameter, "exp_avg_sq", second)

    def _step_muon(self, batch: Batch, states: list[dict[str, Tensor]]) -> None:
        group, members = batch
        updates = []
        for (name, parameter), state in zip(members, states, strict=True):
            momentum = self._read(state, "momentum_buffer")
            gradient = self._gradient(parameter, momentum.dtype)
            momentum.lerp_(gradient, 1 - self._betas[0])
            updates.append(gradient.lerp(momentum, self._betas[0]).to(self._compute_dtype))
            self._count(parameter)
            self._write(name, parameter, "momentum_buffer", momentum)
        whole = orthogonalise(torch.stack(updates), self._cuts[members[0][1]])
        scale = MATCHING_RMS * math.sqrt(max(members[0][1].shape[-2:]))
        for (_, parameter), update in zip(members, whole, strict=True):
            weight = _local(parameter)
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _batches(self) -> list[Batch]:
        """AdamW takes weights one by one; Muon as many of one shape as ranks share, so that each has a whole matrix."""
        batches: list[Batch] = []
        for group in self.param_groups:
            alike: dict[tuple[object, ...], list[tuple[str, Tensor]]] = defaultdict(list)
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    is_cut = group["orthogonal"] and self._cuts[parameter] is not None
                    alike[(tuple(parameter.shape), parameter.dtype) if is_cut else (name,)].append((name, parameter))
            for members in alike.values():
                cut = self._cuts.get(members[0][1])
                size = 1 if cut is None else len(cut.sizes)
                batches += [(group, members[start : start + size]) for start in range(0, len(members), size)]
        return batches

    # ------------------------------------------------------------------------------------ states

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The weight's states, zeros at first, as they are kept."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for key in _keys(orthogonal=parameter in self._cuts):
                dtype = _kept_dtype(self._states, parameter.ndim, parameter.dtype, key)
                place: dict[str, Any] = (
                    {} if self._copies is None else {"device": "cpu", "pin_memory": self._copies.pins}
                )
                state[key] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False, **place)
                if not dtype.is_floating_point:
                    state[key + SCALE] = torch.zeros_like(parameter[..., :1], dtype=torch.float32, requires_grad=False)
        return state

    def _fetch(self, batch: Batch) -> list[dict[str, Any]]:
        """The states of a batch's weights on this rank, those in host memory on their way to the device."""
        states = []
        for _, parameter in batch[1]:
            local = {key: _local(value) for key, value in self._state(parameter).items() if key != "step"}
            copies = self._copies
            states.append(local if copies is None else {key: copies.fetch(value) for key, value in local.items()})
        return states

    def _gradient(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        gradient = _local(parameter.grad).to(dtype)
        return gradient if self.grad_scale is None else gradient / self.grad_scale

    def _arrived(self, value: Any) -> Tensor:
        return value if self._copies is None else self._copies.wait(value)

    def _let_go(self) -> None:
        """Of states that were moved to the host."""
        if self._copies is not None:
            self._copies.settle()

    def _read(self, state: Mapping[str, Tensor], key: str) -> Tensor:
        """A state to compute with: as wide as the weight's, else float32."""
        if key + SCALE in state:
            return decode(state[key], state[key + SCALE])
        return state[key] if self._states == "float32" else state[key].float()

    def _write(self, name: str, parameter: Tensor, key: str, value: Tensor) -> None:
        state = self.state[parameter]
        kept = _local(state[key])
        if kept.dtype == value.dtype:
            new = value
        else:
            salt = zlib.crc32(f"{name}.{key}".encode()) + int(state["step"])
            noise = column_noise(parameter, salt, value.device)
            if kept.dtype == torch.bfloat16:
                new = round_to_bf16(value, noise)
            else:
                new, scale = encode(value, noise, kept.dtype, _largest_of_rows(value, parameter))
                _local(state[key + SCALE]).copy_(scale)
        if self._copies is not None:
            self._copies.put(new, kept)
        elif new is not kept:
            kept.copy_(new)

    def _count(self, parameter: Tensor) -> int:
        """Which step of the weight this is, from 1."""
        return int(self.state[parameter]["step"].add_(1))


def state_bytes(shape: Sequence[int], dtype: torch.dtype, states: OptimizerStates, *, orthogonal: bool) -> int:
    """What the states of a weight, or of a rank's part of it, take; its count of steps aside."""
    num_bytes = 0
    for key in _keys(orthogonal=orthogonal):
        kept = _kept_dtype(states, len(shape), dtype, key)
        num_bytes += math.prod(shape) * kept.itemsize
        num_bytes += 0 if kept.is_floating_point else 4 * math.prod(shape[:-1])
    return num_bytes


def _keys(*, orthogonal: bool) -> tuple[str, ...]:
    return ("momentum_buffer",) if orthogonal else ("exp_avg", "exp_avg_sq")


def _kept_dtype(states: OptimizerStates, num_dims: int, dtype: torch.dtype, key: str) -> torch.dtype:
    if states == "float32" or num_dims < 2:
        return dtype
    if states == "bf16":
        return torch.bfloat16
    return torch.uint8 if key == "exp_avg_sq" else torch.int8


# ---------------------------------------------------------------------------------------- states in fewer bits


def round_to_bf16(value: Tensor, noise: Tensor) -> Tensor:
    """float32 to one of its two neighbours in bfloat16, each as probable as it is near: steps too small for 8 bits of
    mantissa add up all the same, where rounding to nearest would lose every one of them.

    noise: float32 in [0, 1), of the last dim.
    """
    bits = value.view(torch.int32) + (noise * 2**16).to(torch.int32)
    return (bits & -(2**16)).view(torch.float32).to(torch.bfloat16)


def encode(value: Tensor, noise: Tensor, dtype: torch.dtype, largest: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as signs and logarithms relative to each row's largest: codes int8 or uint8, and scales float32 [..., 1].

    Rounded like `round_to_bf16`. Without a sign nothing but 0 becomes 0: it is a divisor's square.
    """
    top = torch.iinfo(dtype).max
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny)
    ratio = value.abs() / scale
    exponent = (ratio.log2() * STEPS_PER_OCTAVE).floor().clamp_(min=1 - top)
    low = (exponent / STEPS_PER_OCTAVE).exp2()
    is_upper = (ratio / low - 1) > noise * (2 ** (1 / STEPS_PER_OCTAVE) - 1)
    codes = (exponent + is_upper + top).clamp_(max=top)
    below = ratio < 2 ** ((1 - top) / STEPS_PER_OCTAVE)  # the lowest code, or zero
    codes = torch.where(below, (ratio > noise * low).float() if dtype == torch.int8 else (ratio > 0).float(), codes)
    return (codes * value.sign()).to(dtype), scale


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """What `encode` made codes of, float32."""
    wide, top = codes.float(), torch.iinfo(codes.dtype).max
    return ((wide.abs() - top) / STEPS_PER_OCTAVE).exp2_().mul_(wide.sign()).mul_(scale)


def column_noise(parameter: Tensor, salt: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), float32, one for each column of the weight that is here, the same in every layout."""
    start, count = 0, _local(parameter).shape[-1]
    if (axis := _axis_of(parameter, -1)) is not None:
        sizes = _piece_sizes(parameter.shape[-1], cast(DTensor, parameter).device_mesh.size(axis))
        start = sum(sizes[: cast(DTensor, parameter).device_mesh.get_local_rank(axis)])
    x = torch.arange(start, start + count, dtype=torch.int32, device=device)
    for factor, shift in ((0x2C1B3C6D, 15), (0x297A2D39, 14)):  # a hash of 32 bits; products wrap around
        x = (x + (salt & 0x3FFFFFFF)) * factor
        x = x ^ (x >> shift)
    return (x & 0xFFFFFF).float() / 2**24


def _largest_of_rows(value: Tensor, parameter: Tensor) -> Tensor:
    """The largest magnitude of each row, float32 [..., 1]; of whole rows, where columns are cut."""
    empty = value.new_zeros((*value.shape[:-1], 1))
    largest = value.abs().amax(dim=-1, keepdim=True) if value.shape[-1] else empty
    if (axis := _axis_of(parameter, -1)) is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=cast(DTensor, parameter).device_mesh.get_group(axis))
    return largest


# ---------------------------------------------------------------------------------------- whole matrices


def orthogonalise(updates: Tensor, cut: Cut | None) -> Tensor:
    """The nearest orthogonal matrix, up to scale, of each of `updates` [..., rows, columns], or of this rank's pieces.

    Each rank of the group puts some of the matrices together, and gives the pieces back. Collective over it: two
    all-to-alls of about what a rank holds.
    """
    matrices = updates.flatten(0, -3)
    if cut is None:
        return newton_schulz(matrices).reshape(updates.shape)
    rank, num_ranks = dist.get_rank(cut.group), len(cut.sizes)
    shares = _piece_sizes(len(matrices), num_ranks)
    other = matrices.shape[-3 - cut.dim]  # the dim that is whole
    send = [share * cut.sizes[rank] * other for share in shares]
    receive = [shares[rank] * size * other for size in cut.sizes]
    received = matrices.new_empty(sum(receive))
    dist.all_to_all_single(received, matrices.flatten(), receive, send, group=cut.group)
    shapes = [(shares[rank], size, other) if cut.dim == -2 else (shares[rank], other, size) for size in cut.sizes]
    pieces = [piece.view(shape) for piece, shape in zip(received.split(receive), shapes, strict=True)]
    whole = newton_schulz(torch.cat(pieces, dim=cut.dim))
    back = torch.cat([piece.flatten() for piece in whole.split(cut.sizes, dim=cut.dim)])
    returned = torch.empty_like(matrices).flatten()
    dist.all_to_all_single(returned, back, send, receive, group=cut.group)
    return returned.view(updates.shape)


def newton_schulz(matrices: Tensor) -> Tensor:
    """[N, rows, columns] with singular values near 1, in the dtype given. Source: see `NEWTON_SCHULZ`."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def _find_cut(parameter: Tensor) -> Cut | None:
    axes = [(axis, dim) for dim in (-2, -1) if (axis := _axis_of(parameter, dim)) is not None]
    if not axes:
        return None
    if len(axes) > 1:
        raise ValueError("train.optimizer: muon takes no matrix that is cut along both dims; use adamw")
    axis, dim = axes[0]
    mesh = cast(DTensor, parameter).device_mesh
    return Cut(group=mesh.get_group(axis), dim=dim, sizes=_piece_sizes(parameter.shape[dim], mesh.size(axis)))


def _axis_of(tensor: Tensor, dim: int) -> int | None:
    """The mesh's axis over which a dim, counted from the last, is cut into pieces; None of a whole one."""
    if not isinstance(tensor, DTensor):
        return None
    placements = enumerate(tensor.placements)
    cut = [axis for axis, p in placements if p.is_shard(tensor.ndim + dim) and tensor.device_mesh.size(axis) > 1]
    if len(cut) > 1:
        raise ValueError(f"train.optimizer: a weight cut by {len(cut)} axes along one dim is taken by adamw alone")
    return cut[0] if cut else None


def _piece_sizes(size: int, num_pieces: int) -> tuple[int, ...]:
    """Of a dim of this size, cut as `torch.chunk` does, with zeros for ranks that get nothing."""
    full = -(-size // num_pieces)
    return tuple(max(0, min(full, size - number * full)) for number in range(num_pieces))


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
