"""What vLLM's loaders expect of a checkpoint directory, as data: names, stacks, shapes and files of vLLM 0.33.

Facts from `vllm/model_executor/models/` (`hf_to_vllm_mapper` of each class and its modules), `registry.py` there, and
`model_loader/weight_utils.py`. vLLM itself needs its accelerator and is not run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

Shape = tuple[int, ...]
Prefixes = Mapping[str, str | None]  # of names; None: skipped

OMNI: Prefixes = {
    "thinker.lm_head.": "language_model.lm_head.",
    "thinker.model.": "language_model.model.",
    "thinker.": "",
    "talker.": None,
    "code2wav.": None,
    "token2wav.": None,
}
QWEN3_VL: Prefixes = {
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
}
QWEN2_5_VL: Prefixes = QWEN3_VL | {"model.": "language_model.model."}
# the architectures that registry.py knows
ARCHITECTURES: Mapping[str, Prefixes] = {
    "Qwen3OmniMoeForConditionalGeneration": OMNI,
    "Qwen2_5OmniModel": OMNI,
    "Qwen2_5OmniForConditionalGeneration": OMNI,
    "Qwen3VLForConditionalGeneration": QWEN3_VL,
    "Qwen3VLMoeForConditionalGeneration": QWEN3_VL,
    "Qwen2_5_VLForConditionalGeneration": QWEN2_5_VL,
}
STACKED = {  # part of a name: where it goes and which shard of it, in the order in which shards lie
    ".self_attn.q_proj.": (".self_attn.qkv_proj.", 0),
    ".self_attn.k_proj.": (".self_attn.qkv_proj.", 1),
    ".self_attn.v_proj.": (".self_attn.qkv_proj.", 2),
    ".attn.q.": (".attn.qkv.", 0),
    ".attn.k.": (".attn.qkv.", 1),
    ".attn.v.": (".attn.qkv.", 2),
    ".mlp.gate_proj.": (".mlp.gate_up_proj.", 0),
    ".mlp.up_proj.": (".mlp.gate_up_proj.", 1),
}
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
EXPERT_STACK = re.compile(r"(.*\.mlp\.experts)\.(gate_up|down)_proj")


def check_vllm_layout(directory: Path) -> None:
    """Asserts that vLLM finds every parameter of its model in `directory`, in its shape, and nothing that it has not.

    Files first: the index names shards that exist, each tensor lies where it says and once.
    """
    config = json.loads((directory / "config.json").read_text())
    shapes = _read_shapes(directory)
    (architecture,) = config["architectures"]
    found: dict[str, dict[int, Shape]] = {}
    for name, shape in shapes.items():
        target = _map_name(name, ARCHITECTURES[architecture])
        if target is None:
            continue
        # Qwen2.5-Omni's audio tower is transformers' own module there, with its names
        plain = architecture.startswith("Qwen2_5Omni") and target.startswith("audio_tower.")
        parameter, shard = (target, 0) if plain else _stack(target)
        shards = found.setdefault(parameter, {})
        assert shard not in shards, f"{name}: a second tensor for {parameter}"
        shards[shard] = _inputs_last(name, shape)
    expected = dict(parameters(config, architecture))
    unknown, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    assert not unknown, f"vLLM has no {unknown[:5]}"
    assert not missing, f"vLLM would not find {missing[:5]}"
    for name, shape in expected.items():
        shards = [found[name][index] for index in sorted(found[name])]
        assert sorted(found[name]) == list(range(len(shards))), name
        assert all(shard[1:] == shards[0][1:] for shard in shards), name
        assert sum(map(math.prod, shards)) == math.prod(shape), (name, shards, shape)
        assert len(shape) == 1 or shards[0][-1] == shape[-1], (name, shards, shape)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (directory / file).is_file(), file
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(directory).model_type == config["model_type"]
    assert AutoTokenizer.from_pretrained(directory).chat_template or (directory / "chat_template.json").is_file()


def _read_shapes(directory: Path) -> dict[str, Shape]:
    files = {path.name for path in directory.glob("*.safetensors")}
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        assert set(weight_map.values()) == files, "files beside those of the index are left out, missing ones an error"
    shapes: dict[str, Shape] = {}
    for file in sorted(files):
        with safe_open(directory / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert name not in shapes, name
                assert not index.is_file() or weight_map[name] == file, name
                shapes[name] = tuple(opened.get_slice(name).get_shape())
                assert opened.get_slice(name).get_dtype() in ("BF16", "F16", "F32"), name
    return shapes


def _map_name(name: str, prefixes: Prefixes) -> str | None:
    for prefix, new in prefixes.items():
        if name.startswith(prefix):
            return None if new is None else new + name.removeprefix(prefix)
    return name


def _stack(target: str) -> tuple[str, int]:
    if match := EXPERT.fullmatch(target):
        kind = {"gate": 0, "up": 1, "down": 0}[match[3]]
        width = 1 if match[3] == "down" else 2
        return f"{match[1]}.{'w2' if match[3] == 'down' else 'w13'}_weight", int(match[2]) * width + kind
    if match := EXPERT_STACK.fullmatch(target):
        return f"{match[1]}.{'w2' if match[2] == 'down' else 'w13'}_weight", 0
    for part, (new, shard) in STACKED.items():
        if part in target:
            return target.replace(part, new), shard
    return target, 0


def _inputs_last(name: str, shape: Shape) -> Shape:
    """Stacked experts lie inputs first as published, and vLLM turns them (`is_fused_checkpoint_transposed`)."""
    return (shape[0], shape[2], shape[1]) if EXPERT_STACK.search(name) else shape


# ---------------------------------------------------------------------------------------- vLLM's modules


def parameters(config: Mapping[str, Any], architecture: str) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of vLLM's model on one rank."""
    thinker = config.get("thinker_config", config)
    tied = config.get("tie_word_embeddings", thinker.get("tie_word_embeddings", False))
    text = thinker.get("text_config", thinker)
    yield from _decoder(text, tied=bool(tied), new=architecture.startswith("Qwen3"))
    if architecture.startswith("Qwen3"):
        yield from _vision_3(thinker["vision_config"], omni="Omni" in architecture)
    else:
        yield from _vision_2_5(thinker["vision_config"])
    if "Omni" in architecture:
        yield from (_audio_3 if architecture.startswith("Qwen3") else _audio_2_5)(thinker["audio_config"])


def _linear(name: str, out: int, into: int, *, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _norm(name: str, size: int, *, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (size,)
    if bias:
        yield f"{name}.bias", (size,)


def _decoder(text: Mapping[str, Any], *, tied: bool, new: bool) -> Iterator[tuple[str, Shape]]:
    width, heads, key_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    head = text.get("head_dim") or width // heads
    root = "language_model.model"
    yield f"{root}.embed_tokens.weight", (text["vocab_size"], width)
    yield f"{root}.norm.weight", (width,)
    if not tied:
        yield "language_model.lm_head.weight", (text["vocab_size"], width)
    for layer in range(text["num_hidden_layers"]):
        at = f"{root}.layers.{layer}"
        yield from _linear(f"{at}.self_attn.qkv_proj", (heads + 2 * key_heads) * head, width, bias=not new)
        yield from _linear(f"{at}.self_attn.o_proj", width, heads * head, bias=False)
        if new:
            yield f"{at}.self_attn.q_norm.weight", (head,)
            yield f"{at}.self_attn.k_norm.weight", (head,)
        yield f"{at}.input_layernorm.weight", (width,)
        yield f"{at}.post_attention_layernorm.weight", (width,)
        if text.get("num_experts") and layer not in text.get("mlp_only_layers", ()):
            experts, inner = text["num_experts"], text["moe_intermediate_size"]
            yield f"{at}.mlp.gate.weight", (experts, width)
            yield f"{at}.mlp.experts.w13_weight", (experts, 2 * inner, width)
            yield f"{at}.mlp.experts.w2_weight", (experts, width, inner)
        else:
            yield f"{at}.mlp.gate_up_proj.weight", (2 * text["intermediate_size"], width)
            yield f"{at}.mlp.down_proj.weight", (width, text["intermediate_size"])


def _vision_3(vision: Mapping[str, Any], *, omni: bool) -> Iterator[tuple[str, Shape]]:
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged, out = width * vision["spatial_merge_size"] ** 2, vision["out_hidden_size"]
    yield "visual.patch_embed.proj.weight", (width, 3, vision["temporal_patch_size"], patch, patch)
    yield "visual.patch_embed.proj.bias", (width,)
    yield "visual.pos_embed.weight", (vision["num_position_embeddings"], width)
    for block in range(vision["depth"]):
        at = f"visual.blocks.{block}"
        for norm in ("norm1", "norm2"):
            yield from _norm(f"{at}.{norm}", width)
        yield from _linear(f"{at}.attn.qkv", 3 * width, width)
        yield from _linear(f"{at}.attn.proj", width, width)
        yield from _linear(f"{at}.mlp.linear_fc1", inner, width)
        yield from _linear(f"{at}.mlp.linear_fc2", width, inner)
    mergers = "merger_list" if omni else "deepstack_merger_list"
    norm, first, second = ("ln_q", "mlp.0", "mlp.2") if omni else ("norm", "linear_fc1", "linear_fc2")
    levels = [f"visual.{mergers}.{level}" for level in range(len(vision["deepstack_visual_indexes"]))]
    for at in ("visual.merger", *levels):
        yield from _norm(f"{at}.{norm}", width if at == "visual.merger" else merged)
        yield from _linear(f"{at}.{first}", merged, merged)
        yield from _linear(f"{at}.{second}", out, merged)


def _vision_2_5(vision: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = width * vision["spatial_merge_size"] ** 2
    yield "visual.patch_embed.proj.weight", (width, 3, vision["temporal_patch_size"], patch, patch)
    for block in range(vision["depth"]):
        at = f"visual.blocks.{block}"
        for norm in ("norm1", "norm2"):
            yield from _norm(f"{at}.{norm}", width, bias=False)
        yield from _linear(f"{at}.attn.qkv", 3 * width, width)
        yield from _linear(f"{at}.attn.proj", width, width)
        yield from _linear(f"{at}.mlp.gate_up_proj", 2 * inner, width)
        yield from _linear(f"{at}.mlp.down_proj", width, inner)
    yield from _norm("visual.merger.ln_q", width, bias=False)
    yield from _linear("visual.merger.mlp.0", merged, merged)
    yield from _linear("visual.merger.mlp.2", vision["out_hidden_size"], merged)


def _audio_3(audio: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    width, channels = audio["d_model"], audio["downsample_hidden_size"]
    for number in (1, 2, 3):
        yield f"audio_tower.conv2d{number}.weight", (channels, 1 if number == 1 else channels, 3, 3)
        yield f"audio_tower.conv2d{number}.bias", (channels,)
    bins = audio["num_mel_bins"]
    for _ in range(3):
        bins = (bins + 1) // 2
    yield "audio_tower.conv_out.weight", (width, channels * bins)
    for layer in range(audio["encoder_layers"]):
        at = f"audio_tower.layers.{layer}"
        yield from _linear(f"{at}.self_attn.qkv_proj", 3 * width, width)
        yield from _linear(f"{at}.self_attn.out_proj", width, width)
        yield from _audio_rest(at, audio)
    yield from _norm("audio_tower.ln_post", width)
    yield from _linear("audio_tower.proj1", width, width)
    yield from _linear("audio_tower.proj2", audio["output_dim"], width)


def _audio_2_5(audio: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    width = audio["d_model"]
    yield "audio_tower.conv1.weight", (width, audio["num_mel_bins"], 3)
    yield "audio_tower.conv2.weight", (width, width, 3)
    yield from (("audio_tower.conv1.bias", (width,)), ("audio_tower.conv2.bias", (width,)))
    yield "audio_tower.audio_bos_eos_token.weight", (2, audio["output_dim"])
    for layer in range(audio["encoder_layers"]):
        at = f"audio_tower.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{at}.self_attn.{name}", width, width, bias=name != "k_proj")
        yield from _audio_rest(at, audio)
    yield from _norm("audio_tower.ln_post", width)
    yield from _linear("audio_tower.proj", audio["output_dim"], width)


def _audio_rest(at: str, audio: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    width, inner = audio["d_model"], audio["encoder_ffn_dim"]
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        yield from _norm(f"{at}.{name}", width)
    yield from _linear(f"{at}.fc1", inner, width)
    yield from _linear(f"{at}.fc2", width, inner)
