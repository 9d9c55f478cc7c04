"""Opens what every verb needs from a config: checkpoint, family, model, policy. Trainer and tools start here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omniloom.checkpoint.adapters import (
    StoredAdapter,
    adapted_weights,
    adapter_targets,
    check_base,
    fill,
    fill_magnitudes,
    load_adapter,
    open_adapter,
    saved_weights,
)
from omniloom.checkpoint.files import read_json
from omniloom.checkpoint.hf import check_dtypes, check_names, check_twins, load_model, read_tensor, refuse_quantised
from omniloom.checkpoint.hub import resolve_model_path
from omniloom.checkpoint.tensor_files import HFCheckpoint, open_checkpoint
from omniloom.config import Config
from omniloom.families.registry import find_spec
from omniloom.families.spec import TALKER_COMPONENTS, ModelSpec
from omniloom.keymap import Assembly, KeyMap, Tied
from omniloom.models.fusion import OmniModel
from omniloom.ops.attention import use_flash3
from omniloom.parallel.apply import apply_parallelism, materialize
from omniloom.parallel.mesh import Layout
from omniloom.parallel.optimizer import make_optimizer
from omniloom.run.directory import finished_step
from omniloom.training.lora import adapter_policies, choose_adapted, initial_lora_a, install_lora, is_linear
from omniloom.training.optimizer import parameter_groups
from omniloom.training.packed import choose_packed, install_packed
from omniloom.training.policy import ParameterPolicy, check_rates, resolve_policy
from omniloom.types import Adapter

VOICES = "talker.codec_embed.weight"  # whose rows are voices, too
HEAD = "text.loss_head.head.weight"


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """A config and the checkpoint it names, opened and compared; no weights read yet."""

    config: Config
    checkpoint: HFCheckpoint
    config_json: Mapping[str, Any]  # of the model that is trained: `model.num_layers` applied
    spec: ModelSpec
    family: Any  # the family's own config, of the model that is trained
    key_map: KeyMap
    modalities: tuple[str, ...]
    cut: tuple[str, ...]  # tensors of ours in layers that `model.num_layers` leaves out: not exported
    unbuilt: tuple[str, ...]  # tensors of ours that the checkpoint has and the built model has not, `cut` included
    adapter: StoredAdapter | None  # with which LoRA starts
    # rank and alpha of single weights of ours, where they are not the policy's
    adapter_sizes: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    computes_bf16: bool = True  # of the device that is used: what `model.dtype: auto` asks

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype = self.config.model.dtype
        return torch.bfloat16 if dtype == "bf16" or (dtype == "auto" and self.computes_bf16) else torch.float32

    @property
    def base_name(self) -> str:
        """The published model as others find it: the hub's id where `model.path` is one, else the directory."""
        return re.sub(r"^(modelscope|hf):", "", model_of_run(self.config.model.path))

    @property
    def new_voices(self) -> dict[int, int]:
        """Ids of voices that the checkpoint does not have, with those of the voices that they start from."""
        known = {} if self.family.talker is None else self.family.talker.tokens.speakers
        return {known[name.lower()]: known[origin.lower()] for name, origin in self.config.model.new_speakers.items()}

    @cached_property
    def assemblies(self) -> dict[str, Assembly]:
        return self.key_map.assemblies(self.checkpoint.shapes)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """What the policy adapts by LoRA. Raises: ValueError for rules that match nothing."""
        return self._installed[0]

    @property
    def packed(self) -> tuple[str, ...]:
        """The frozen weights that are held as 4-bit codes, and computed with as these say."""
        return self._installed[1]

    @cached_property
    def _installed(self) -> tuple[tuple[Adapter, ...], tuple[str, ...]]:
        with torch.device("meta"):
            return self._install(self._build(self.family, self.modalities))

    @cached_property
    def adapter_names(self) -> frozenset[str]:
        """The parameters of all adapters."""
        return frozenset(name for adapter in self.adapters for name in adapter.names)

    @cached_property
    def replaced(self) -> frozenset[str]:
        """The weights that the adapter with which LoRA starts has in place of the published ones, trained or not."""
        if self.adapter is None:
            return frozenset()
        saved = saved_weights(self.adapter, self.assemblies, self.key_map.tied)
        return frozenset(part.parameter for part in saved.values())

    def build(self) -> OmniModel:
        """The model with its adapters, not parallel, on the current default device, weights undefined."""
        model = self._build(self.family, self.modalities)
        self._install(model)
        return model

    def policies(self, names: Sequence[str]) -> dict[str, ParameterPolicy]:
        """The policy of each of our parameters. Raises: ValueError for rules that match nothing."""
        policies = self._base_policies([name for name in names if name not in self.adapter_names])
        policies |= adapter_policies(self.adapters, policies)
        check_rates(self.config.policy, policies)
        return policies

    def _base_policies(self, names: Sequence[str]) -> dict[str, ParameterPolicy]:
        component_of = self.spec.component_of
        return resolve_policy(
            self.config.policy,
            {name: component_of(name) for name in names},
            learning_rate=self.config.train.learning_rate,
            weight_decay=self.config.train.weight_decay,
            roots=self.spec.sharding(self.family).roots,
            known=(
                *{component_of(name) for name in self.unbuilt},
                *(TALKER_COMPONENTS if self.spec.make_talker and self.family.talker is None else ()),
            ),
            tied={
                component_of(rule.ours): component_of(rule.same_as)
                for rule in self.key_map.rules
                if isinstance(rule, Tied)
            },
        )

    def _install(self, model: OmniModel) -> tuple[tuple[Adapter, ...], tuple[str, ...]]:
        """Put in the adapters, and packed weights beside them, both of which it returns."""
        rules = self.config.policy
        if all(rule.lora is None for rule in rules.values()):
            found = {} if self.adapter is None else adapted_weights(self.adapter, self.assemblies)
            return install_lora(model, {name: lora for name, lora in found.items() if is_linear(model, name)}), ()
        policies = self._base_policies([name for name, _ in model.named_parameters()])
        adaptable = {name: target.name for name, target in adapter_targets(self.assemblies).items() if name in policies}
        sizes = dict(self.adapter_sizes)
        if (stored := self.adapter) is not None:
            followed = ((name, lora) for name in adaptable if (lora := policies[name].lora) is not None)
            sizes |= {name: stored.size(adaptable[name]) for name, lora in followed if stored.follows(lora)}
        chosen = choose_adapted(model, policies, adaptable, rules, sizes)
        packed = choose_packed(model, policies, adaptable, chosen) if self.config.model.quantize else ()
        adapters = install_lora(model, chosen)
        install_packed(model, packed)
        return adapters, packed

    def _build(self, family: Any, modalities: tuple[str, ...]) -> OmniModel:
        chunk = self.config.memory.loss_chunk_tokens
        return self.spec.build(
            family,
            modalities=modalities,
            kernels=self.config.model.attention,
            loss_chunk_tokens=None if chunk == "auto" else chunk,
        )


def open_workshop(
    config: Config,
    *,
    adapter_decides: bool = False,
    adapter_sizes: Mapping[str, tuple[int, float]] | None = None,
    speaks: bool | None = None,
) -> Workshop:
    """Read headers and config.json, choose the family, compare names and shapes; no weights.

    With `adapter_decides`, `model.adapter` itself says what is adapted and how, and no policy has to.
    `adapter_sizes`: rank and alpha by our names of weights, where a run's adapters do not follow its policy.
    `speaks`: whether the talker is read too; True leaves it out where there is none, None asks the policy.
    Raises: ValueError for whatever does not fit.
    """
    checkpoint, whole_json, spec = _open_published(config)
    speaks = _speaks(config, spec, checkpoint) if speaks is None else speaks and _has_talker(spec, checkpoint)
    whole_json = _add_speakers(whole_json, config.model.new_speakers, spec, speaks=speaks)
    config_json = spec.reduce_config(whole_json, **vars(config.model.num_layers))
    modalities = _wanted_modalities(config, spec)
    family, whole_family = (spec.read_config(found, speaks=speaks) for found in (config_json, whole_json))
    key_map = spec.key_map(whole_family)
    whole = _check_tensors(spec, checkpoint, key_map, whole_family)
    uncut, built = (_shapes(spec, family, kept) for kept in (spec.modalities, modalities))
    workshop = Workshop(
        config=config,
        checkpoint=checkpoint,
        config_json=config_json,
        spec=spec,
        family=family,
        key_map=key_map,
        modalities=modalities,
        cut=tuple(name for name in whole if name not in uncut) if any(vars(config.model.num_layers).values()) else (),
        unbuilt=tuple(name for name in whole if name not in built),
        adapter=None if config.model.adapter is None else open_adapter(config.model.adapter),
        adapter_sizes=adapter_sizes or {},
    )
    if workshop.new_voices and not workshop.policies(list(built))[VOICES].trainable:
        raise ValueError("model.new_speakers: voices are rows of talker.codec_embed; set its freeze: false in policy")
    _check_adapter(workshop, adapter_decides=adapter_decides)
    return _without_unbuilt(workshop) if adapter_decides else workshop


def _check_adapter(workshop: Workshop, *, adapter_decides: bool) -> None:
    """Raises: ValueError where it is of another model, or nothing asks for adapters."""
    if (adapter := workshop.adapter) is not None:
        check_base(adapter, workshop.checkpoint, workshop.base_name)
        if not adapter_decides and not any(rule.lora for rule in workshop.config.policy.values()):
            raise ValueError(f"model.adapter is set, but no rule of policy has lora; what it needs: {adapter.needs}")


def _add_speakers(
    config_json: dict[str, Any], new: Mapping[str, str], spec: ModelSpec, *, speaks: bool
) -> dict[str, Any]:
    """The published config.json with the voices that the run adds. Raises: ValueError where they cannot be learnt."""
    if not new:
        return config_json
    if speaks and spec.add_speakers is None:
        raise ValueError(f"model.new_speakers: voices of {spec.name} are not among its talker's weights; remove it")
    if not speaks or spec.add_speakers is None:
        raise ValueError("model.new_speakers: no talker trains that could learn them; set policy.talker.freeze=false")
    return spec.add_speakers(config_json, new)


def _open_published(config: Config) -> tuple[HFCheckpoint, dict[str, Any], ModelSpec]:
    """The checkpoint, its config.json and its family."""
    path = resolve_model_path(model_of_run(config.model.path))
    checkpoint, config_json = open_checkpoint(path), read_json(path / "config.json")
    refuse_quantised(checkpoint, config_json)
    return checkpoint, config_json, find_spec(config_json, where=str(path / "config.json"))


def model_of_run(path: str) -> str:
    """The model that a finished run has left in its directory, `path` where it names no such run."""
    is_run = finished_step(Path(path)) is not None and (Path(path) / "hf" / "config.json").is_file()
    return str(Path(path) / "hf") if is_run else path


def without_talker(workshop: Workshop) -> Workshop:
    """The same, but for a talker that nothing needs, which then is not built."""
    talker = tuple(name for name in workshop.assemblies if name.startswith("talker."))
    return _without_unbuilt(
        replace(workshop, family=replace(workshop.family, talker=None), unbuilt=(*workshop.unbuilt, *talker))
    )


def _without_unbuilt(workshop: Workshop) -> Workshop:
    """The same, less what its adapter has for what is not built: nothing asks for it, where the adapter decides."""
    unbuilt = [workshop.assemblies[name] for name in workshop.unbuilt if name in workshop.assemblies]
    others = ("talker.",) if workshop.family.talker is None else ()
    return replace(workshop, adapter=workshop.adapter and workshop.adapter.without(unbuilt, others))


def _has_talker(spec: ModelSpec, checkpoint: HFCheckpoint) -> bool:
    return spec.make_talker is not None and any(name.startswith("talker.") for name in checkpoint.shapes)


def _speaks(config: Config, spec: ModelSpec, checkpoint: HFCheckpoint) -> bool:
    """Whether the policy trains the talker. Raises: ValueError where there is none that can be trained."""
    rules = {name: rule for name, rule in config.policy.items() if name.split(".")[0] == "talker"}
    wanting = [name for name, rule in rules.items() if rule.freeze is False or rule.lora is not None]
    if wanting and not _has_talker(spec, checkpoint):
        raise ValueError(
            f"policy.{wanting[0]}: there is no talker to train, the checkpoint holds none; remove the rule"
        )
    return bool(wanting)


def _check_tensors(
    spec: ModelSpec, checkpoint: HFCheckpoint, key_map: KeyMap, family: Any
) -> Mapping[str, tuple[int, ...]]:
    """The shapes of the whole model by our names. Raises: ValueError where the checkpoint has others, or odd dtypes."""
    shapes = _shapes(spec, family, spec.modalities)
    assemblies = key_map.assemblies(checkpoint.shapes)
    try:
        check_names(shapes, assemblies, key_map)
    except ValueError as error:
        advice = "download it again, or start from the checkpoint of this model"
        if shapes.keys() - assemblies.keys() == {HEAD}:
            advice = (
                "it has no head, as models that embed; take one that answers, or set tie_word_embeddings to true in "
                "config.json to begin with the embedding as its head"
            )
        raise ValueError(f"{checkpoint.directory}: {error}; {advice}") from None
    check_dtypes(checkpoint, assemblies)
    check_twins(checkpoint, key_map, assemblies)
    return shapes


def _shapes(spec: ModelSpec, family: Any, modalities: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = spec.build(family, modalities=modalities)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _wanted_modalities(config: Config, spec: ModelSpec) -> tuple[str, ...]:
    wanted = spec.modalities if config.model.modalities is None else config.model.modalities
    if lacking := [name for name in wanted if name not in spec.modalities]:
        raise ValueError(
            f"model.modalities: {spec.name} knows {', '.join(spec.modalities)}; remove {', '.join(lacking)}"
        )
    return tuple(name for name in spec.modalities if name == "text" or name in wanted)


def build_model(workshop: Workshop, layout: Layout) -> tuple[OmniModel, dict[str, ParameterPolicy]]:
    """The model in its layout, policy applied, memory allocated, weights undefined. Collective over all ranks."""
    config = workshop.config
    asked = config.model.attention
    if "flash3" in (kernels := {asked.text, asked.vision, asked.audio}) and layout.device.type == "cuda":
        if not kernels <= {"flash3", "auto", "eager"}:
            raise ValueError("model.attention: flash3 takes the place of flash in all of a process; use one of the two")
        use_flash3()
    plan = workshop.spec.sharding(workshop.family)
    with torch.device("meta"):
        model = workshop.build()
    policies = apply_policy(workshop, model)
    training = (name for name, own in policies.items() if own.trainable)
    model.trains_speech_alone = model.talker is not None and all(name.startswith("talker.") for name in training)
    apply_parallelism(
        model,
        layout,
        plan,
        parallel=config.parallel,
        memory=config.memory,
        compute_dtype=workshop.compute_dtype,
        recompute={root: rule.recompute for root, rule in config.policy.items() if rule.recompute is not None},
    )
    materialize(model, "cpu" if config.parallel.cpu_offload else layout.device)
    return model, policies


def apply_policy(workshop: Workshop, model: OmniModel) -> dict[str, ParameterPolicy]:
    """Freeze what does not train, in the dtype of compute. Returns the policy of each parameter."""
    policies = workshop.policies([name for name, _ in model.named_parameters()])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(policies[name].trainable)
        # no optimizer will need more precision than compute does; vectors are small, and some computed with in float32
        if not parameter.requires_grad and parameter.ndim > 1 and parameter.is_floating_point():
            parameter.data = parameter.data.to(workshop.compute_dtype)
    return policies


def all_parameters(workshop: Workshop, model: OmniModel, layout: Layout) -> dict[str, nn.Parameter]:
    """The parameters of the whole model by name; those of other stages of a pipeline are on meta.

    A head that is the embedding has the embedding's name, on whatever rank.
    """
    own = dict(model.named_parameters())
    if layout.degrees.pipeline == 1:
        return own
    with torch.device("meta"):
        whole = workshop.build()
    apply_policy(workshop, whole)
    found, first = dict[str, nn.Parameter](), dict[int, str]()
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        found[known] = own.get(name, found.get(known, parameter))
    return found


def build_optimizer(
    workshop: Workshop,
    parameters: Mapping[str, nn.Parameter],
    policies: Mapping[str, ParameterPolicy],
    device: torch.device,
) -> torch.optim.Optimizer:
    """What steps the parameters that train, as the config and the policy say; those on meta are other ranks'."""
    config = workshop.config
    here = [(name, parameter) for name, parameter in parameters.items() if not parameter.is_meta]
    return make_optimizer(
        parameter_groups(here, policies, muon=config.train.optimizer == "muon"),
        config.train,
        offload=config.memory.offload_optimizer,
        device=device,
        compute_dtype=workshop.compute_dtype,
    )


def load_weights(workshop: Workshop, model: OmniModel, parameters: Mapping[str, nn.Parameter] | None = None) -> None:
    """Fill the model from the published checkpoint, and its adapters; each rank reads its slices only.

    `parameters` as `all_parameters`; None is the model's own. Raises: ValueError for an adapter that does not fit model
    and policy.
    """
    adapters, seed = workshop.adapters, workshop.config.train.seed
    parameters = dict(model.named_parameters()) if parameters is None else parameters
    unbuilt = [*workshop.unbuilt, *parameters]  # what is not here is another stage's
    fresh, packed = workshop.adapter_names, frozenset(workshop.packed)
    load_model(model, workshop.checkpoint, workshop.key_map, fresh=fresh, packed=packed, unbuilt=unbuilt)
    with torch.no_grad():
        if workshop.new_voices:
            table = torch.empty(workshop.assemblies[VOICES].shape)
            read_tensor(workshop.assemblies[VOICES], workshop.checkpoint, table)
            for new, origin in workshop.new_voices.items():
                table[new] = table[origin]
            fill(parameters[VOICES], table)
        for adapter in adapters:
            lora_a = parameters[adapter.lora_a]
            fill(lora_a, initial_lora_a(adapter, tuple(lora_a.shape), seed))
            parameters[adapter.lora_b].zero_()
    fill_magnitudes(parameters, adapters)
    if workshop.adapter is not None:
        load_adapter(workshop.adapter, parameters, workshop.assemblies, adapters, workshop.key_map.tied)
