"""LoRA against peft on transformers' models: logits, gradients, adapters that travel both ways."""

from __future__ import annotations

import json
import random
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from omniloom.checkpoint.adapters import CONFIG_NAME, NOTE_NAME, TENSORS_NAME, adapter_targets, write_adapter
from omniloom.checkpoint.hf import gather_full
from omniloom.config import Config, LoraConfig, ModelConfig, PolicyRule
from omniloom.keymap import canonical_name
from omniloom.models.fusion import OmniModel
from omniloom.ops.linear_map import keyed_seed
from omniloom.run.opening import Workshop, load_weights, open_workshop
from omniloom.run.results import export_adapter, export_model
from omniloom.run.trained_media import TrainedMedia
from omniloom.tools.tiny import make_tiny
from tests.parity import builders
from tests.parity.builders import Sample

peft = pytest.importorskip("peft")

TOLERANCE = 1e-5  # relative to the largest: float32 rounding through a few layers
GRADIENT_TOLERANCE = 1e-4  # of each parameter's norm


@dataclass(frozen=True, kw_only=True)
class Published:
    """A random model in a directory, transformers' copy of it, and rows of all media."""

    directory: Path
    config_json: dict[str, Any]
    samples: tuple[Sample, ...]

    def reference(self) -> Any:
        return builders.reference_model(self.config_json, seed=3)

    def open(self, policy: dict[str, PolicyRule], *, adapter: Path | None = None) -> Workshop:
        path = None if adapter is None else str(adapter)
        return open_workshop(
            Config(model=ModelConfig(path=str(self.directory), dtype="float32", adapter=path), policy=policy)
        )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(tmp_path_factory.mktemp("lora") / "base")


def publish(directory: Path, **changes: Any) -> Published:
    """`changes`: of the decoder's section of config.json."""
    rng = random.Random(5)
    config_json = {**builders.random_config(rng, num_layers=2, dense=False), "model_type": "qwen3_omni_moe"}
    config_json["architectures"] = ["Qwen3OmniMoeForConditionalGeneration"]
    config_json["thinker_config"]["text_config"] |= changes
    reference = builders.reference_model(config_json, seed=3)
    directory.mkdir()
    tensors = builders.published(reference, reference.state_dict())
    safetensors.torch.save_file(
        {name: value.contiguous().clone() for name, value in tensors.items()}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text(json.dumps(config_json))
    samples = tuple(
        builders.random_sample(rng, reference, media, audio_frames=frames, seed=number)
        for number, (media, frames) in enumerate([(("image", "audio"), (120,)), (("video",), ())])
    )
    return Published(directory=directory, config_json=config_json, samples=samples)


def build(workshop: Workshop, *, spread: float = 0.0) -> OmniModel:
    """Our model with its adapters; with `spread` random values in every adapter, so that it does something."""
    model = workshop.build()
    load_weights(workshop, model)
    policies = workshop.policies([name for name, _ in model.named_parameters()])
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(policies[name].trainable)
        if parameter.requires_grad and spread:
            noise = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                parameter.copy_(parameter * (1 + spread * noise) if "magnitude" in name else spread * noise)
    return model


def our_logits(model: OmniModel, published: Published, draw_key: int | None = None) -> list[Tensor]:
    packs = [builders.pack([sample], published.config_json) for sample in published.samples]
    return [model.logits(replace(pack, draw_key=draw_key)) for pack in packs]


def their_logits(reference: Any, published: Published) -> list[Tensor]:
    return [builders.reference_logits(reference, sample).logits[0] for sample in published.samples]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def load_peft(reference: Any, directory: Path, *, is_trainable: bool = False) -> Any:
    """The adapter on transformers' model, every tensor of it found a place."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(reference, directory, is_trainable=is_trainable)
    assert not [str(word.message) for word in said if "adapter keys" in str(word.message)]
    held = {_key(name) for name in safetensors.torch.load_file(directory / TENSORS_NAME)}
    assert {_key(name) for name, _ in model.named_parameters() if ".lora_" in name} == {
        name for name in held if ".lora_" in name
    }
    return model.eval()


def _key(name: str) -> str:
    name = canonical_name(name.removeprefix("base_model.model."))
    return name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")


EVERYWHERE = {"rank": 4, "alpha": 6.0}
POLICIES = {
    "everywhere": {name: PolicyRule(lora=LoraConfig(**EVERYWHERE)) for name in ("vision", "audio", "text")},
    "text": {
        "text": PolicyRule(lora=LoraConfig(rank=3, alpha=16)),
        "vision": PolicyRule(freeze=True),
        "audio": PolicyRule(freeze=True),
    },
    "rslora": {
        "text": PolicyRule(lora=LoraConfig(rank=4, alpha=3, rslora=True)),
        "audio": PolicyRule(lora=LoraConfig(rank=2, alpha=3, rslora=True)),
        "vision": PolicyRule(freeze=True),
    },
    "dora": {
        "text": PolicyRule(lora=LoraConfig(rank=4, alpha=6, dora=True)),
        "text.experts": PolicyRule(freeze=True),
        "vision": PolicyRule(lora=LoraConfig(rank=4, alpha=6, dora=True)),
        "audio": PolicyRule(lora=LoraConfig(rank=4, alpha=6, dora=True)),
    },
    "unlike_ranks_and_one_rslora": {
        "text": PolicyRule(lora=LoraConfig(rank=4, alpha=6)),
        "text.experts": PolicyRule(lora=LoraConfig(rank=6, alpha=5, rslora=True)),
        "vision": PolicyRule(lora=LoraConfig(rank=2, alpha=6)),
        "audio": PolicyRule(freeze=True),
    },
    "head": {
        "text": PolicyRule(lora=LoraConfig(rank=4, alpha=6)),
        "lm_head": PolicyRule(lora=LoraConfig(rank=3, alpha=6)),
        "vision": PolicyRule(freeze=True),
        "audio": PolicyRule(freeze=True),
    },
    "one_product_of_experts": {
        "text": PolicyRule(lora=LoraConfig(rank=4, modules=("q_proj", "experts.down_proj"))),
        "vision": PolicyRule(freeze=True),
        "audio": PolicyRule(freeze=True),
    },
}
FROZEN_HEAD = {"lm_head": PolicyRule(freeze=True)}


@pytest.mark.parametrize("name", POLICIES)
def test_peft_loads_our_adapter_and_gives_our_logits_and_gradients(
    published: Published, tmp_path: Path, name: str
) -> None:
    workshop = published.open({**FROZEN_HEAD, **POLICIES[name]})
    model = build(workshop, spread=0.1)
    parameters = dict(model.named_parameters())
    export_adapter(workshop, tmp_path / "adapter", [], gather_full(parameters))
    reference = load_peft(published.reference(), tmp_path / "adapter", is_trainable=True)
    ours, theirs = our_logits(model, published), their_logits(reference, published)
    assert_close(ours, theirs)
    for logits in (ours, theirs):
        sum(part.log_softmax(dim=-1)[:, ::7].sum() for part in logits).backward()  # any smooth function of them
    expected = {_key(key): p.grad for key, p in reference.named_parameters() if p.requires_grad}
    gradients = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in parameters.items()}
    found = _as_peft(workshop, gradients, tmp_path)
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for key, gradient in found.items():
        # those of key biases' kin cancel but for rounding, which is measured against the largest
        assert (gradient - expected[key]).norm() <= GRADIENT_TOLERANCE * max(expected[key].norm(), 1e-3 * largest), key


def _as_peft(workshop: Workshop, values: dict[str, Tensor], scratch: Path) -> dict[str, Tensor]:
    write_adapter(
        scratch / "values",
        workshop.checkpoint,
        workshop.config_json,
        workshop.assemblies,
        workshop.adapters,
        lambda name: values[name],
        tied=workshop.key_map.tied,
        base_name="tiny",
    )
    return {_key(name): value for name, value in safetensors.torch.load_file(scratch / "values" / TENSORS_NAME).items()}


def test_the_loss_and_its_gradients_see_the_adapter_of_the_head(published: Published) -> None:
    model = build(published.open({**FROZEN_HEAD, **POLICIES["head"]}), spread=0.1)
    batch = builders.pack([published.samples[0]], published.config_json)
    of_head = {name: p for name, p in model.named_parameters() if name.startswith("text.loss_head.head.lora_")}
    (logits,) = our_logits(model, published)[:1]
    index = batch.loss_index
    by_token = torch.nn.functional.cross_entropy(logits[index], batch.labels[index], reduction="none")
    expected = (by_token * batch.loss_weights[index]).sum()
    loss = model(batch).sums["text"]
    assert_close([loss], [expected])
    assert torch.equal(model.best_tokens(batch, model.encode(batch)), logits[index].argmax(dim=-1))
    found, wanted = (torch.autograd.grad(of, list(of_head.values())) for of in (loss, expected))
    assert_close(list(found), list(wanted))


@pytest.mark.parametrize("name", ["everywhere", "rslora"])
def test_fresh_adapters_leave_the_logits_as_they_were(published: Published, name: str) -> None:
    plain = build(published.open({})).requires_grad_(False)  # torch multiplies otherwise by weights that train
    adapted = build(published.open({**FROZEN_HEAD, **POLICIES[name]}))
    with torch.no_grad():
        for ours, theirs in zip(our_logits(adapted, published), our_logits(plain, published), strict=True):
            assert torch.equal(ours, theirs)


def test_fresh_dora_leaves_the_logits_as_they_were(published: Published) -> None:
    plain = build(published.open({}))
    adapted = build(published.open({**POLICIES["dora"], **FROZEN_HEAD}))
    with torch.no_grad():  # the bias is added after the scaling by one, so not to the last bit
        assert_close(our_logits(adapted, published), our_logits(plain, published))


@pytest.mark.parametrize("name", ["everywhere", "dora", "head", "unlike_ranks_and_one_rslora"])
def test_merged_export_gives_the_adapted_logits(published: Published, tmp_path: Path, name: str) -> None:
    workshop = published.open({**FROZEN_HEAD, **POLICIES[name]})
    model = build(workshop, spread=0.1)
    gather = gather_full(dict(model.named_parameters()))
    export_model(workshop, tmp_path / "hf", [], gather, media=TrainedMedia(), say=print)
    merged = open_workshop(Config(model=ModelConfig(path=str(tmp_path / "hf"), dtype="float32")))
    with torch.no_grad():
        assert_close(our_logits(build(merged), published), our_logits(model, published))


def save_by_peft(published: Published, directory: Path, **settings: Any) -> Any:
    """An adapter of random values, and the model that it is on."""
    adapted = peft.get_peft_model(published.reference(), peft.LoraConfig(init_lora_weights=False, **settings)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(directory)
    return adapted


@pytest.mark.parametrize("dora", [False, True])
def test_training_goes_on_from_an_adapter_made_by_peft(published: Published, tmp_path: Path, dora: bool) -> None:
    linears = r".*language_model.*\.(q_proj|v_proj)|.*visual\.blocks.*\.qkv"
    stacked = None if dora else ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    names = [name for name, _ in published.reference().named_modules() if re.fullmatch(linears, name)]
    adapted = save_by_peft(
        published,
        tmp_path / "adapter",
        r=4,
        lora_alpha=10,
        target_modules=names,
        target_parameters=stacked,
        use_dora=dora,
        rank_pattern={"layers.0.self_attn.q_proj": 2, r".*blocks\.0\.attn\.qkv": 3},
        alpha_pattern={"layers.1.self_attn.v_proj": 7, "^model.visual.blocks.0.attn.qkv": 5},
    )
    rewritten = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
    rewritten["base_model_name_or_path"] = str(published.directory)
    (tmp_path / "adapter" / CONFIG_NAME).write_text(json.dumps(rewritten))
    of_text = LoraConfig(rank=4, alpha=10, dora=dora, modules=("q_proj", "v_proj", "gate_up_proj", "down_proj"))
    of_vision = LoraConfig(rank=4, alpha=10, dora=dora, modules=(r".*visual\.blocks.*\.qkv",))
    policy = {"text": PolicyRule(lora=of_text), "vision": PolicyRule(lora=of_vision), "audio": PolicyRule(freeze=True)}
    if dora:
        policy["text.experts"] = PolicyRule(freeze=True)
    model = build(published.open({**policy, **FROZEN_HEAD}, adapter=tmp_path / "adapter"))
    with torch.no_grad():
        assert_close(our_logits(model, published), their_logits(adapted, published))


def test_training_goes_on_from_an_adapter_of_the_head_made_by_peft(published: Published, tmp_path: Path) -> None:
    """Beside an adapter of the head, peft saves the head itself."""
    adapted = save_by_peft(published, tmp_path / "adapter", r=4, lora_alpha=10, target_modules=["q_proj", "lm_head"])
    of_queries, of_head = (LoraConfig(rank=4, alpha=10, modules=(module,)) for module in ("q_proj", "lm_head"))
    policy = {name: PolicyRule(lora=of_queries) for name in ("text", "audio")}
    policy |= {"lm_head": PolicyRule(lora=of_head), "vision": PolicyRule(freeze=True)}
    model = build(published.open(policy, adapter=tmp_path / "adapter"))
    with torch.no_grad():
        assert_close(our_logits(model, published), their_logits(adapted, published))
    tensors = safetensors.torch.load_file(tmp_path / "adapter" / TENSORS_NAME)
    (copy,) = (name for name in tensors if ".lora_" not in name)
    tensors[copy] += 1
    safetensors.torch.save_file(tensors, tmp_path / "adapter" / TENSORS_NAME)
    with pytest.raises(ValueError, match=r"has a lm_head\.weight of its own"):
        published.open(policy, adapter=tmp_path / "adapter")


def test_an_adapter_of_a_router_is_refused_where_it_alone_decides(published: Published, tmp_path: Path) -> None:
    save_by_peft(published, tmp_path / "adapter", target_modules=["mlp.gate"])
    model = ModelConfig(path=str(published.directory), dtype="float32", adapter=str(tmp_path / "adapter"))
    workshop = open_workshop(Config(model=model), adapter_decides=True)
    with pytest.raises(ValueError, match=r"it has \S*mlp\.gate\.lora_A\.weight, which the policy does not adapt"):
        load_weights(workshop, workshop.build())


def test_our_adapter_comes_back_with_what_trained_beside_it(published: Published, tmp_path: Path) -> None:
    policy = {
        "text": PolicyRule(lora=LoraConfig(rank=4)),
        "text.router": PolicyRule(freeze=False),
        "vision": PolicyRule(freeze=True),
        "vision.merger": PolicyRule(freeze=False),
        "audio": PolicyRule(freeze=True),
        "text.embed": PolicyRule(freeze=False),
        **FROZEN_HEAD,
    }
    workshop = published.open(policy)
    model = build(workshop, spread=0.1)
    parameters = dict(model.named_parameters())
    changed = [name for name, parameter in parameters.items() if parameter.requires_grad]
    export_adapter(workshop, tmp_path / "adapter", changed, gather_full(parameters))
    again = build(published.open(policy, adapter=tmp_path / "adapter"))
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


@pytest.mark.parametrize("rank", [3, 4])
def test_an_adapter_of_dense_layers_between_experts_comes_back(tmp_path: Path, rank: int) -> None:
    """PEFT takes them for parameters, whose names in rank_pattern and alpha_pattern go on to the weight."""
    published = publish(tmp_path / "base", mlp_only_layers=[0])
    policy = {name: PolicyRule(lora=LoraConfig(rank=4, alpha=6)) for name in ("vision", "audio")}
    policy |= {"text": PolicyRule(lora=LoraConfig(rank=rank, alpha=16)), **FROZEN_HEAD}
    workshop = published.open(policy)
    model = build(workshop, spread=0.1)
    export_adapter(workshop, tmp_path / "adapter", (), gather_full(dict(model.named_parameters())))
    deciding = ModelConfig(path=str(published.directory), dtype="float32", adapter=str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = our_logits(model, published)
        assert_close(their_logits(load_peft(published.reference(), tmp_path / "adapter"), published), expected)
        assert_close(our_logits(build(published.open(policy, adapter=tmp_path / "adapter")), published), expected)
        alone = open_workshop(Config(model=deciding), adapter_decides=True)
        assert_close(our_logits(build(alone), published), expected)


def test_peft_loads_what_trained_beside_the_adapter_onto_the_published_class(tmp_path: Path) -> None:
    make_tiny("qwen3_omni", tmp_path / "tiny", size="tiny", seed=1)
    policy = {
        "text": PolicyRule(lora=LoraConfig(rank=4)),
        "vision": PolicyRule(freeze=True),
        "vision.merger": PolicyRule(freeze=False),
        "audio": PolicyRule(freeze=True),
        "text.router": PolicyRule(freeze=False),
        **FROZEN_HEAD,
    }
    workshop = open_workshop(Config(model=ModelConfig(path=str(tmp_path / "tiny"), dtype="float32"), policy=policy))
    model = build(workshop, spread=0.1)
    parameters = dict(model.named_parameters())
    changed = [name for name, parameter in parameters.items() if parameter.requires_grad]
    export_adapter(workshop, tmp_path / "adapter", changed, gather_full(parameters))
    from transformers import Qwen3OmniMoeForConditionalGeneration

    whole = Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    loaded = dict(load_peft(whole, tmp_path / "adapter").named_parameters())
    place = "base_model.model.thinker.model.{}.modules_to_save.default.weight"
    for theirs, ours in {
        "visual.merger.mlp.0": "vision.merger.fc1.weight",
        "language_model.layers.1.mlp.gate": "text.layers.1.moe.router.weight",
    }.items():
        expected = parameters[ours].to(torch.bfloat16).float()  # the published dtype
        assert torch.equal(loaded[place.format(theirs)], expected)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_tied_embedding_trained_beside_the_adapter_is_the_head_in_peft_too(tmp_path: Path, family: str) -> None:
    import transformers

    make_tiny(family, tmp_path / "tiny", size="tiny", seed=1)
    policy = {"text": PolicyRule(lora=LoraConfig(rank=4)), "text.embed": PolicyRule(freeze=False)}
    config = Config(model=ModelConfig(path=str(tmp_path / "tiny"), dtype="float32"), policy=policy)
    workshop = open_workshop(config)
    parameters = dict(build(workshop, spread=0.1).named_parameters())
    changed = [name for name, parameter in parameters.items() if parameter.requires_grad]
    export_adapter(workshop, tmp_path / "adapter", changed, gather_full(parameters))

    model_class = getattr(transformers, CLASSES[family][0])
    loaded = load_peft(model_class.from_pretrained(tmp_path / "tiny", dtype=torch.float32), tmp_path / "adapter")
    embedding = parameters["text.embed.weight"].to(torch.bfloat16).float()  # the published dtype
    for merged in (loaded.base_model.model, loaded.merge_and_unload()):
        assert torch.equal(merged.get_input_embeddings().weight, embedding)
        assert torch.equal(merged.get_output_embeddings().weight, embedding)

    goes_on = replace(config, model=replace(config.model, adapter=str(tmp_path / "adapter")))
    assert torch.equal(dict(build(open_workshop(goes_on)).named_parameters())["text.embed.weight"], embedding)
    tensors = safetensors.torch.load_file(tmp_path / "adapter" / TENSORS_NAME)
    tensors["base_model.model.lm_head.weight"][0] += 1
    safetensors.torch.save_file(tensors, tmp_path / "adapter" / TENSORS_NAME)
    with pytest.raises(ValueError, match=r"two values for text\.embed\.weight, one of them as lm_head\.weight"):
        build(open_workshop(goes_on))
    del tensors["base_model.model.lm_head.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "adapter" / TENSORS_NAME)
    build(open_workshop(goes_on))  # as it was written once
    (tmp_path / "adapter" / NOTE_NAME).unlink()
    with pytest.raises(
        ValueError, match=r"text\.embed\.weight without lm_head\.weight, which peft leaves as published"
    ):
        build(open_workshop(goes_on))


CLASSES = {
    "qwen3_omni": ("Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration"),
    "qwen2_5_omni": ("Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniForConditionalGeneration"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration",),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration",),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration",),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration",),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration",),
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in CLASSES.items() for name in names])
def test_peft_merges_every_family_as_we_do(tmp_path: Path, family: str, name: str) -> None:
    import transformers

    make_tiny(family, tmp_path / "tiny", size="tiny", seed=1)
    lora = PolicyRule(lora=LoraConfig(rank=4, alpha=6))
    also = {"qwen3_omni": ("audio", "lm_head"), "qwen2_5_omni": ("audio", "lm_head"), "qwen3_vl_moe": ("lm_head",)}
    policy = dict.fromkeys(("text", "vision", *also.get(family, ())), lora)
    workshop = open_workshop(Config(model=ModelConfig(path=str(tmp_path / "tiny"), dtype="float32"), policy=policy))
    parameters = dict(build(workshop, spread=0.1).named_parameters())
    export_adapter(workshop, tmp_path / "adapter", [], gather_full(parameters))
    export_model(workshop, tmp_path / "hf", [], gather_full(parameters), media=TrainedMedia(), say=print)
    load = getattr(transformers, name).from_pretrained
    published, exported = (load(tmp_path / part, dtype=torch.float32).state_dict() for part in ("tiny", "hf"))
    merged = load_peft(load(tmp_path / "tiny", dtype=torch.float32), tmp_path / "adapter").merge_and_unload()
    changed = set()
    for key, value in merged.state_dict().items():
        expected = value.to(torch.bfloat16).float() if value.is_floating_point() else value  # the published dtype
        # a rounding away from the middle of two neighbours falls to either
        torch.testing.assert_close(exported[key], expected, rtol=2**-7, atol=1e-6, msg=key)
        if not torch.equal(value, published[key]):
            changed.add(key)
    linears = {target.name for target in adapter_targets(workshop.assemblies).values()}
    assert len(changed) == len(workshop.adapters)
    assert {canonical_name(key).removesuffix(".weight") for key in changed} <= linears


def test_dropout_follows_from_its_key_alone(published: Published) -> None:
    policy = {"text": PolicyRule(lora=LoraConfig(rank=4, dropout=0.5)), "vision": PolicyRule(freeze=True)}
    model = build(published.open({**policy, "audio": PolicyRule(freeze=True), **FROZEN_HEAD}), spread=0.1)

    def run(*key: int) -> Tensor:
        with torch.no_grad():
            return our_logits(model, published, keyed_seed(*key))[0]

    first = run(0, 1, 2)
    torch.rand(3)  # the global generator has no part in it
    assert torch.equal(run(0, 1, 2), first)
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(run(*other), first)
    model.eval()
    quiet = run(0, 1, 2)
    assert torch.equal(run(5, 5, 5), quiet)
    assert not torch.equal(quiet, first)
