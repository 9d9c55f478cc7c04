"""Settings of a run that no other test sets, each seen in what the run leaves behind; and that none is forgotten."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omniloom.checkpoint.stored import open_stored, read_stored_tensor
from omniloom.config import keys_of, load_config
from omniloom.data.formats import parse_row
from omniloom.parallel.device import choose_device, collect_on_call, only_deterministic
from omniloom.run.opening import open_workshop
from omniloom.run.stopping import StopRequest
from omniloom.run.trainer import run
from omniloom.tools.tiny import make_tiny
from omniloom.training.metrics import StepMetrics
from omniloom.training.profile import Profile

RATE, BETAS = 1e-3, (0.9, 0.95)
Train = Callable[..., list[StepMetrics]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_vl_moe", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def train(model: Path, tmp_path: Path) -> Train:
    """A run of one step into `tmp_path / "run"`, and what was measured."""
    rows = "".join(json.dumps({"query": f"{n}?", "response": f"It is {n}."}) + "\n" for n in range(20))
    (tmp_path / "rows.jsonl").write_text(rows)

    def train(*words: str, on_step: Callable[[StepMetrics], None] = lambda _: None) -> list[StepMetrics]:
        usual = {
            "model.path": model,
            "model.modalities": "text",
            "model.dtype": "float32",
            "data.train": tmp_path / "rows.jsonl",
            "data.pack_tokens": 128,
            "data.workers": 0,
            "train.run_dir": tmp_path / "run",
            "train.steps": 1,
            "train.packs_per_step": 1,
            "train.schedule": "constant",
            "train.learning_rate": RATE,
            "checkpoint.export": "false",
            "log.tensorboard": "false",
        }
        seen: list[StepMetrics] = []

        def step(metrics: StepMetrics) -> None:
            torch.rand(3)  # so that generators move, which nothing in a run of text does
            seen.append(metrics)
            on_step(metrics)

        assert run(load_config(None, [*(f"{key}={value}" for key, value in usual.items()), *words]), step) == 0
        return seen

    return train


def stored(run_dir: Path, step: int) -> dict[str, Tensor]:
    checkpoint = open_stored(run_dir / f"checkpoints/step_{step:08d}")
    return {name: read_stored_tensor(checkpoint, name) for name in checkpoint.shapes}


def states(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """One state of the optimizer, by parameter."""
    prefix, suffix = "optimizer.", f".{key}"
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix) and name.endswith(suffix)}
    return {name.removeprefix(prefix).removesuffix(suffix): tensor for name, tensor in found.items()}


def test_a_small_clip_norm_is_what_reaches_the_optimizer(train: Train, tmp_path: Path) -> None:
    (metrics,) = train("train.clip_norm=0.01")
    assert metrics.grad_norm > 0.1
    moments = torch.cat([state.flatten() for state in states(stored(tmp_path / "run", 1), "exp_avg").values()])
    assert moments.norm().item() / (1 - BETAS[0]) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "ours", "published"),
    [
        ("adamw", "layers.0.attention.o_proj.weight", "layers.0.self_attn.o_proj.weight"),
        ("muon", "embed.weight", "embed_tokens.weight"),  # which is no matrix to it
    ],
)
def test_epsilon_is_what_small_gradients_are_divided_by(
    train: Train, model: Path, tmp_path: Path, optimizer: str, ours: str, published: str
) -> None:
    train("train.epsilon=0.5", f"train.optimizer={optimizer}")
    tensors = stored(tmp_path / "run", 1)
    weights = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    before, name = weights[f"model.language_model.{published}"].float(), f"text.{ours}"
    gradient = states(tensors, "exp_avg")[name] / (1 - BETAS[0])
    root = (states(tensors, "exp_avg_sq")[name] / (1 - BETAS[1])).sqrt()
    torch.testing.assert_close(before - tensors[f"model.{name}"], RATE * gradient / (root + 0.5), rtol=1e-3, atol=1e-7)


def test_a_deterministic_run_asks_torch_for_it_and_leaves_no_trace(train: Train) -> None:
    asked: list[bool] = []
    train("train.deterministic=true", on_step=lambda _: asked.append(torch.are_deterministic_algorithms_enabled()))
    assert asked == [True]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("device", "name"), [("cuda", "CUBLAS_WORKSPACE_CONFIG"), ("cpu", None)])
def test_the_libraries_of_a_device_are_told_too(device: str, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr("omniloom.parallel.device.os.environ", environment)
    with only_deterministic(torch.device(device)):
        pass
    assert list(environment) == ([name] if name else [])


@pytest.mark.parametrize(
    ("device", "given", "found"),
    [
        ("cuda", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("cuda", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, {}),
        ("cuda", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, {}),
        ("npu", {}, {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}),
        ("npu", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, {}),
    ],
)
def test_a_devices_allocator_grows_its_segments_unless_the_environment_says_otherwise(
    device: str, given: dict[str, str], found: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dict(given)
    monkeypatch.setattr("omniloom.parallel.device.os.environ", environment)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_accelerator": SimpleNamespace(type=device),
        "set_device_index": None,
    }.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch, "device", lambda kind, index: (kind, index))  # of which torch knows not all
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert choose_device(0) == (device, 0)
    assert environment == {**given, **found}
    assert not torch.backends.cudnn.allow_tf32, "float32 is what was asked for"


def test_garbage_is_collected_between_steps_alone_and_as_ever_after_a_run(train: Train) -> None:
    seen: list[bool] = []
    train(on_step=lambda _: seen.append(gc.isenabled()))
    assert seen == [False]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    with collect_on_call() as collect:
        gone = weakref.ref(Cyclic())
        assert gone() is not None
        collect()
        assert gone() is None


class Cyclic:
    """Only the collector ends it."""

    def __init__(self) -> None:
        self.own = self


class MostLogits(TorchDispatchMode):
    """The most rows of a result that is as wide as the vocabulary; the head and its gradient aside."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.width, self.other, self.rows = vocab_size, hidden_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == self.width and out.shape[0] != self.other:
            self.rows = max(self.rows, out.shape[0])
        return out


@pytest.mark.parametrize("chunk", [8, 24])
def test_logits_are_held_for_as_many_tokens_as_the_chunk_says(train: Train, model: Path, chunk: int) -> None:
    sizes = json.loads((model / "config.json").read_text())["text_config"]
    with MostLogits(sizes["vocab_size"], sizes["hidden_size"]) as most:
        train(f"memory.loss_chunk_tokens={chunk}")
    assert most.rows == chunk


def test_a_checkpoint_without_the_optimizer_is_gone_on_from_with_fresh_moments(train: Train, tmp_path: Path) -> None:
    train("checkpoint.save_optimizer=false")
    assert not states(stored(tmp_path / "run", 1), "step")
    with pytest.raises(ValueError, match=r"checkpoint\.load_optimizer=false starts with fresh moments"):
        train("train.steps=2")
    train("train.steps=2", "checkpoint.load_optimizer=false")
    assert {step.item() for step in states(stored(tmp_path / "run", 2), "step").values()} == {1.0}


@pytest.mark.parametrize("loads", [True, False])
def test_moments_and_generators_are_taken_over_where_the_config_says_so(
    train: Train, tmp_path: Path, loads: bool
) -> None:
    train()
    first = stored(tmp_path / "run", 1)
    word = str(loads).lower()
    train("train.steps=2", f"checkpoint.load_optimizer={word}", f"checkpoint.load_rng={word}")
    second = stored(tmp_path / "run", 2)
    assert {step.item() for step in states(second, "step").values()} == {2.0 if loads else 1.0}
    # a step draws three numbers: of generators that begin anew those of the first step again
    assert torch.equal(first["rng.0.cpu"], second["rng.0.cpu"]) == (not loads)


def test_a_run_goes_on_with_states_of_its_own_optimizer_alone(train: Train, tmp_path: Path) -> None:
    words = ("train.optimizer=muon", "train.optimizer_states=8bit")
    train(*words)
    tensors = stored(tmp_path / "run", 1)
    name = "text.layers.0.moe.experts.down"
    assert tensors[f"optimizer.{name}.momentum_buffer"].dtype == torch.int8
    assert tensors[f"optimizer.{name}.momentum_buffer_scale"].shape == (*tensors[f"model.{name}"].shape[:-1], 1)
    assert tensors["optimizer.text.embed.weight.exp_avg_sq"].dtype == torch.uint8
    with pytest.raises(ValueError, match=r"train\.optimizer is muon there and adamw here.*load_optimizer=false"):
        train("train.steps=2")
    train("train.steps=2", *words)
    assert {step.item() for step in states(stored(tmp_path / "run", 2), "step").values()} == {2.0}


@pytest.mark.parametrize("steps", ["2,2", "2,9"])
def test_the_steps_of_a_profile_are_in_a_trace(train: Train, tmp_path: Path, steps: str) -> None:
    train(f"log.profile={steps}", "train.steps=2")
    events = json.loads((tmp_path / "run/trace_rank0.json").read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step#") for event in events) == 1


def test_a_profiler_that_cannot_end_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "profile", lambda: SimpleNamespace(start=list, stop=lambda: 1 // 0))
    stop = StopRequest(None, print)
    profile = Profile((1, 9), tmp_path, 0, stop.attempt)
    with pytest.raises(OSError, match="of the step"), closing(profile), profile.step(0):
        raise OSError("of the step")
    assert isinstance(stop.fault, ZeroDivisionError)


def test_names_of_roles_and_of_the_system_prompt_are_those_of_the_config() -> None:
    names = "{function_tag: does, observation_tag: sees, system_tag: rule, user_tag: asks, assistant_tag: says}"
    options = load_config(None, [f"data.attr={names}", "data.attr.system=role_play"]).data
    call = json.dumps({"name": "look", "arguments": {}})
    turns = [("rule", "be kind"), ("asks", "q"), ("does", call), ("sees", "a cat"), ("says", "a cat")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    roles = [turn.role for turn in parse_row(row, file="f", line=1, options=options).turns]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    alone = {"query": "q", "response": "a", "role_play": "be kind"}
    assert parse_row(alone, file="f", line=1, options=options).turns[0].role == "system"


@pytest.mark.parametrize("word", ["data.attr.rejected=worse", "data.attr.kto_tag=worse"])
def test_names_of_preference_data_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=rf"{word.partition('=')[0]}: preference data are not trained here"):
        load_config(None, [word])


def test_each_component_has_the_layers_and_the_kernel_that_the_config_gives_it(tmp_path: Path) -> None:
    words = ["model.attention.vision=sdpa", "model.attention.audio=eager", "model.num_layers.audio=1"]
    words += ["policy.text.lora.rank=2", "policy.text.lora.dtype=bf16"]
    path = make_tiny("qwen3_omni", tmp_path / "model")
    with torch.device("meta"):
        built = open_workshop(load_config(None, [f"model.path={path}", "model.attention.text=eager", *words])).build()
    kernels = {name.split(".")[0]: part.kernel for name, part in built.named_modules() if name.endswith(".core")}
    assert kernels == {"text": "eager", "vision": "sdpa", "audio": "eager"}
    assert built.audio is not None
    assert len(built.audio.layers) == 1
    assert built.get_parameter("text.layers.0.attention.q_proj.lora_a").dtype == torch.bfloat16


def test_every_key_is_set_in_some_test() -> None:
    """As `section.key=`, `section__key=` or `section, key=`; where no other key has its name, by that alone."""
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("*.py"))
    assigned = {
        re.sub(r"^policy\.[\w.]+?\.(?=(lora\.)?\w+$)", "policy.*.", words)
        for words in re.findall(r"[\w.]*\w(?==)", text)
    }
    assigned |= {f"data.{section}.{name}" for section, name in re.findall(r"data\.(\w+), (\w+)=", text)}
    alone = {words.rpartition(".")[2] for words in assigned} | set(re.findall(r"(\w+)\"?: ", text))
    paths = [path for path, *_ in keys_of()]
    names = Counter(path.rpartition(".")[2] for path in paths)
    never = []
    for path in paths:
        name = path.rpartition(".")[2]
        is_set = {path, path.replace(".", "__")} & assigned
        is_section = any(other.startswith(f"{path}.") for other in paths)
        if not (is_section or is_set or (names[name] == 1 and name in alone)):
            never.append(path)
    assert not never
