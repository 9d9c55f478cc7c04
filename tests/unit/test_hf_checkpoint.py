"""Published directories: what is read, what is refused from headers alone, what an export keeps bit for bit."""

import errno
import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from omniloom.checkpoint.export import MARKER_NAME, export
from omniloom.checkpoint.hf import check_dtypes, check_twins, gather_full, load_model, refuse_quantised
from omniloom.checkpoint.tensor_files import INDEX_NAME, open_checkpoint
from omniloom.keymap import KeyMap, Rule, Tied

HIDDEN, INNER, NUM_EXPERTS = 6, 4, 3
KEY_MAP = KeyMap(
    rules=(
        Rule(published="thinker.embed.weight", ours="embed.weight"),
        Tied(published="thinker.lm_head.weight", ours="head.weight", same_as="embed.weight"),
        Rule(published="thinker.layers.{i}.norm.weight", ours="layers.{i}.norm.weight"),
        Rule(published="thinker.layers.{i}.scale", ours="layers.{i}.scale"),
        Rule(reshape="transpose", published="thinker.layers.{i}.turned", ours="layers.{i}.turned"),
        Rule(
            index="e",
            published=("thinker.layers.{i}.experts.{e}.gate.weight", "thinker.layers.{i}.experts.{e}.up.weight"),
            ours="layers.{i}.gate_up",
        ),
        Rule(reshape="flatten", published="thinker.visual.patch.weight", ours="vision.patch.weight"),
    ),
    carried=("talker.",),
)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, bias=False)
        self.scale = nn.Parameter(torch.zeros(()))
        self.turned = nn.Parameter(torch.zeros(2, INNER, HIDDEN))
        self.gate_up = nn.Parameter(torch.zeros(NUM_EXPERTS, 2 * INNER, HIDDEN))


class Model(nn.Module):
    def __init__(self, num_layers=2, vision=True, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, HIDDEN)
        self.layers = nn.ModuleDict({str(i): Layer() for i in range(num_layers)})
        if vision:
            self.vision = nn.ModuleDict({"patch": nn.Linear(3 * 2 * 2 * 2, 5, bias=False)})
        if tied:
            self.head = nn.Linear(HIDDEN, 11, bias=False)
            self.head.weight = self.embed.weight


def published_tensors():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"thinker.embed.weight": draw(11, HIDDEN), "thinker.visual.patch.weight": draw(5, 3, 2, 2, 2)}
    for layer in range(2):
        prefix = f"thinker.layers.{layer}."
        tensors |= {prefix + "norm.weight": draw(HIDDEN), prefix + "scale": draw(dtype=torch.float32)}
        tensors[prefix + "turned"] = draw(2, HIDDEN, INNER)
        for expert in range(NUM_EXPERTS):
            tensors |= {f"{prefix}experts.{expert}.{name}.weight": draw(INNER, HIDDEN) for name in ("gate", "up")}
    return tensors | {"talker.codec.weight": draw(7, 3), "talker.steps": torch.arange(5)}


@pytest.fixture
def published(tmp_path):
    return write_published(tmp_path / "model")


def write_published(directory, tensors=None, num_files=3):
    tensors = tensors or published_tensors()
    directory.mkdir()
    weight_map = {}
    for number in range(num_files):
        name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::num_files]}
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index))
    (directory / "config.json").write_text('{"num_layers": 2}')
    (directory / "tokenizer.json").write_text("tokens")
    (directory / "pytorch_model.bin").write_text("the same weights in another format, soon stale")
    (directory / "extra").mkdir()
    (directory / "extra" / "chat_template.jinja").write_text("template")
    return directory


def read_all(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(got, expected):
    assert got.dtype == expected.dtype
    assert torch.equal(got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


# ---------------------------------------------------------------------------------------- reading


@given(
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_box_of_any_tensor_is_what_safetensors_itself_reads(tmp_path_factory, shape, dtype, data):
    directory = tmp_path_factory.mktemp("box")
    tensor = torch.arange(int(torch.tensor(shape).prod()) if shape else 1).reshape(shape).to(dtype)
    save_file({"other": torch.zeros(3), "x": tensor, "y": torch.ones(2)}, directory / "model.safetensors")
    box = tuple(tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape)
    got = open_checkpoint(directory).read_slice("x", box)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        expected = file.get_tensor("x")[tuple(slice(a, b) for a, b in box)]
    assert got.shape == expected.shape
    assert torch.equal(got, expected)


def test_a_slice_of_long_rows_is_read_without_the_rest(tmp_path):
    rows = torch.randn(3, 600, 1000)  # rows of 2.4 MB: taken one by one
    save_file({"x": rows}, tmp_path / "model.safetensors")
    got = open_checkpoint(tmp_path).read_slice("x", ((1, 3), (5, 7), (10, 990)))
    assert torch.equal(got, rows[1:3, 5:7, 10:990])


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_gets_the_published_values_in_its_own_dtype(published, tied):
    model = Model(tied=tied)
    load_model(model, open_checkpoint(published), KEY_MAP)
    tensors = published_tensors()
    assert model.embed.weight.dtype == torch.float32
    assert torch.equal(model.embed.weight, tensors["thinker.embed.weight"].float())
    assert torch.equal(model.layers["1"].turned, tensors["thinker.layers.1.turned"].float().transpose(-1, -2))
    assert model.layers["0"].scale == tensors["thinker.layers.0.scale"]
    expert = torch.cat([tensors[f"thinker.layers.1.experts.2.{name}.weight"] for name in ("gate", "up")])
    assert torch.equal(model.layers["1"].gate_up[2], expert.float())
    assert torch.equal(model.vision["patch"].weight, tensors["thinker.visual.patch.weight"].flatten(1).float())
    if tied:
        assert model.head.weight is model.embed.weight


def test_unbuilt_parts_are_left_alone_only_when_named(published):
    checkpoint = open_checkpoint(published)
    small = Model(num_layers=1, vision=False)
    with pytest.raises(ValueError, match=r"extra thinker\.layers\.1\.experts\.0\.gate\.weight: by config\.json"):
        load_model(small, checkpoint, KEY_MAP)
    unbuilt = {name for name in Model().state_dict() if name not in small.state_dict()}
    load_model(small, checkpoint, KEY_MAP, unbuilt=unbuilt)
    assert torch.equal(small.embed.weight, published_tensors()["thinker.embed.weight"].float())


def test_no_read_is_larger_than_a_chunk(published, monkeypatch):
    checkpoint = open_checkpoint(published)
    sizes = []
    whole_read = type(checkpoint).read_slice

    def measured(self, name, box=None):
        tensor = whole_read(self, name, box)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(type(checkpoint), "read_slice", measured)
    monkeypatch.setattr("omniloom.checkpoint.hf.CHUNK_BYTES", 2 * HIDDEN * 4)
    model = Model()
    load_model(model, checkpoint, KEY_MAP)
    assert torch.equal(model.embed.weight, published_tensors()["thinker.embed.weight"].float())
    largest_row = 5 * 3 * 8 * 4  # a whole [INNER, HIDDEN] expert or turned matrix is one row of ours
    assert max(sizes) <= largest_row


# ---------------------------------------------------------------------------------------- refusals


def broken(published, fault):
    shards = sorted(published.glob("*.safetensors"))
    index = json.loads((published / INDEX_NAME).read_text())
    if fault == "missing shard":
        shards[1].unlink()
    elif fault == "truncated":
        shards[1].write_bytes(shards[1].read_bytes()[:-3])
    elif fault == "garbage":
        shards[1].write_bytes(os.urandom(64))
    elif fault == "garbage header":
        shards[1].write_bytes(b"\x08" + bytes(7) + b"not json")
    elif fault == "empty":
        shards[1].write_bytes(b"")
    elif fault == "index":
        (published / INDEX_NAME).write_text("{")
        return
    elif fault == "missing tensor":
        index["weight_map"]["thinker.gone"] = shards[0].name
    elif fault == "extra tensor":
        del index["weight_map"]["talker.steps"]
    elif fault == "escaping shard":
        index["weight_map"]["talker.steps"] = "../secret.safetensors"
    (published / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing shard", r"missing shard model-00002-of-00003\.safetensors"),
        ("truncated", r"model-00002-of-00003\.safetensors is truncated: its header promises \d+ bytes, the file has"),
        ("garbage", r"model-00002-of-00003\.safetensors is no safetensors file or cut short"),
        ("garbage header", r"model-00002-of-00003\.safetensors has a garbage header"),
        ("empty", r"model-00002-of-00003\.safetensors is no safetensors file or cut short \(0 bytes\)"),
        ("index", r"index\.json: not readable as JSON"),
        ("missing tensor", r"missing tensor thinker\.gone: the index places it in model-00001"),
        ("extra tensor", r"extra tensor talker\.steps in model-0000\d-of-00003\.safetensors: not in the index"),
        ("escaping shard", r"must lie in a file of the same directory"),
    ],
)
def test_a_broken_directory_is_refused_from_its_headers(published, fault, message):
    broken(published, fault)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(published)


def test_a_missing_directory_names_the_nearest(published):
    with pytest.raises(ValueError, match=r"no such model directory: .*modle; did you mean .*/model\?"):
        open_checkpoint(published.parent / "modle")


def test_a_directory_without_weights_says_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"expected model\.safetensors\.index\.json or model\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", r"weights are pickles \(pytorch_model\.bin\).*save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "weights are pickles"),
        ("qwen.gguf", "llama.cpp's format"),
        ("model-00001-of-00002.safetensors", "no index that lists its files"),
    ],
)
def test_weights_in_another_format_are_named(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=words):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "extra", "words"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, None, r"\(awq: config\.json has quantization_config\)"),
        (
            {"thinker_config": {"text_config": {"quantization_config": {"quant_method": "fp8"}}}},
            None,
            r"\(fp8: config\.json has thinker_config\.text_config\.quantization_config\)",
        ),
        ({"quantization_config": {"load_in_4bit": True}}, None, "load_in_4bit"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, None, "compressed-tensors"),
        ({}, "weight_scale_inv", r"\(fp8 in blocks: it has thinker\.x\.weight_scale_inv\)"),
        ({}, "qweight", "gptq or awq"),
        ({}, "absmax", "bitsandbytes 4 bit"),
        ({}, "weight_packed", "compressed-tensors"),
    ],
)
def test_quantised_weights_are_refused_by_their_method(tmp_path, config, extra, words):
    tensors = published_tensors() | ({f"thinker.x.{extra}": torch.zeros(2)} if extra else {})
    checkpoint = open_checkpoint(write_published(tmp_path / "model", tensors))
    with pytest.raises(ValueError, match=words):
        refuse_quantised(checkpoint, config)
    refuse_quantised(open_checkpoint(write_published(tmp_path / "plain")), {"quantization_config": None, "x": [1]})


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32])
def test_weights_that_are_no_numbers_to_train_are_refused(tmp_path, dtype):
    tensors = published_tensors() | {"thinker.embed.weight": torch.ones(11, HIDDEN).to(dtype)}
    checkpoint = open_checkpoint(write_published(tmp_path / "model", tensors))
    with pytest.raises(ValueError, match=r"thinker\.embed\.weight is stored as (I8|F8_E4M3|I32) \(1 of \d+ weights"):
        check_dtypes(checkpoint, KEY_MAP.assemblies(checkpoint.shapes))
    checkpoint = open_checkpoint(write_published(tmp_path / "plain"))  # whose talker has integers
    check_dtypes(checkpoint, KEY_MAP.assemblies(checkpoint.shapes))


def test_missing_and_misshapen_tensors_are_all_listed_before_anything_is_read(tmp_path, monkeypatch):
    tensors = published_tensors()
    del tensors["thinker.layers.0.norm.weight"]
    tensors["thinker.embed.weight"] = torch.zeros(12, HIDDEN)
    checkpoint = open_checkpoint(write_published(tmp_path / "model", tensors))
    monkeypatch.setattr(type(checkpoint), "read_slice", lambda *_: pytest.fail("read before the check"))
    with pytest.raises(ValueError, match=r"missing thinker\.layers\.0\.norm\.weight for layers\.0") as error:
        load_model(Model(), checkpoint, KEY_MAP)
    assert "embed.weight: expected [11, 6] by config.json, got [12, 6] from thinker.embed.weight" in str(error.value)


# ---------------------------------------------------------------------------------------- export


def export_model(published, out_dir, names=None, change=0.0, **options):
    model = Model()
    load_model(model, open_checkpoint(published), KEY_MAP)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += change
    state = model.state_dict()
    names = list(state) if names is None else names
    return export(out_dir, open_checkpoint(published), KEY_MAP, names, gather_full(state), **options)


def test_exporting_what_was_loaded_gives_the_source_back_bit_for_bit(published, tmp_path):
    export_model(published, tmp_path / "hf")
    expected, got = read_all(published), read_all(tmp_path / "hf")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(got[name], tensor)
    assert json.loads((tmp_path / "hf" / MARKER_NAME).read_text())["trained_tensors"] == len(expected) - 2
    for name in ("config.json", "tokenizer.json", "extra/chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (published / name).read_bytes()
    assert not (tmp_path / "hf" / "pytorch_model.bin").exists()
    weight_map = json.loads((tmp_path / "hf" / INDEX_NAME).read_text())["weight_map"]
    assert weight_map == json.loads((published / INDEX_NAME).read_text())["weight_map"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "model"]  # nothing temporary stays


def test_states_of_a_trainer_and_folders_of_other_weights_stay_behind(published, tmp_path):
    """A trainer's own checkpoint has its optimizer beside the model, and a run may lie in its model's directory."""
    others = ("optimizer.pt", "rng_state.pth", "global_step2/mp_rank_00_model_states.pt", "global_step2/latest")
    others += ("run/config.yaml", "run/checkpoints/step_00000001/__0_0.distcp", "checkpoint-2/model.safetensors")
    for name in (*others, "checkpoint-2/config.json", "spk_dict.pt", "assets/a/picture.png"):
        (published / name).parent.mkdir(parents=True, exist_ok=True)
        (published / name).write_text("x")
    out = export_model(published, published / "run" / "hf")
    beside = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.suffix != ".safetensors"}
    own = {"config.json", "tokenizer.json", "extra/chat_template.jinja", MARKER_NAME, INDEX_NAME}
    assert beside == own | {"spk_dict.pt", "assets/a/picture.png"}


def test_trained_tensors_are_written_in_the_published_dtype_and_the_others_kept(published, tmp_path):
    export_model(published, tmp_path / "hf", names=["embed.weight", "layers.1.gate_up"], change=0.5)
    expected, got = read_all(published), read_all(tmp_path / "hf")
    for name, tensor in expected.items():
        if name == "thinker.embed.weight" or name.startswith("thinker.layers.1.experts"):
            assert_same_bits(got[name], (tensor.float() + 0.5).bfloat16())
        else:
            assert_same_bits(got[name], tensor)


def test_a_published_second_copy_of_a_tied_tensor_is_trained_along(tmp_path):
    tensors = published_tensors()
    tensors["thinker.lm_head.weight"] = tensors["thinker.embed.weight"].clone()
    published = write_published(tmp_path / "model", tensors)
    export_model(published, tmp_path / "hf", change=1.0)
    got = read_all(tmp_path / "hf")
    assert_same_bits(got["thinker.lm_head.weight"], (tensors["thinker.embed.weight"].float() + 1).bfloat16())


def test_a_tied_head_that_stands_alone_is_read_and_written_under_its_name(tmp_path):
    tensors = published_tensors()
    tensors["thinker.lm_head.weight"] = tensors.pop("thinker.embed.weight")
    published = write_published(tmp_path / "model", tensors)
    model = Model(tied=True)
    load_model(model, open_checkpoint(published), KEY_MAP)
    assert torch.equal(model.embed.weight, tensors["thinker.lm_head.weight"].float())
    export_model(published, tmp_path / "hf", change=1.0)
    got = read_all(tmp_path / "hf")
    assert got.keys() == tensors.keys()
    assert_same_bits(got["thinker.lm_head.weight"], (tensors["thinker.lm_head.weight"].float() + 1).bfloat16())


def test_a_second_copy_of_a_tied_tensor_with_values_of_its_own_is_refused(tmp_path):
    tensors = published_tensors()
    tensors["thinker.lm_head.weight"] = tensors["thinker.embed.weight"].clone()
    same = open_checkpoint(write_published(tmp_path / "same", tensors))
    check_twins(same, KEY_MAP, KEY_MAP.assemblies(same.shapes))
    tensors["thinker.lm_head.weight"][3, 1] += 1
    other = open_checkpoint(write_published(tmp_path / "other", tensors))
    with pytest.raises(ValueError, match=r"ties thinker\.lm_head\.weight to thinker\.embed\.weight, but .* different"):
        check_twins(other, KEY_MAP, KEY_MAP.assemblies(other.shapes))


def test_cut_layers_are_dropped_and_the_config_replaced(published, tmp_path):
    dropped = [name for name in Model().state_dict() if name.startswith("layers.1.")]
    export_model(
        published, tmp_path / "hf", names=["embed.weight"], dropped=dropped, files={"config.json": {"num_layers": 1}}
    )
    got = read_all(tmp_path / "hf")
    assert got.keys() == {name for name in published_tensors() if not name.startswith("thinker.layers.1.")}
    index = json.loads((tmp_path / "hf" / INDEX_NAME).read_text())
    assert index["weight_map"].keys() == got.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in got.values())
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == {"num_layers": 1}
    assert open_checkpoint(tmp_path / "hf").entries.keys() == got.keys()


def test_a_single_file_checkpoint_stays_a_single_file(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(published_tensors(), directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    export_model(directory, tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "model.safetensors",
        "omniloom_export.json",
    ]
    for name, tensor in read_all(tmp_path / "hf").items():
        assert_same_bits(tensor, published_tensors()[name])


def test_a_single_file_stands_over_an_index_as_in_transformers(published, tmp_path):
    """save_pretrained into the folder of a larger model removes its shards, not the index."""
    for shard in published.glob("model-*.safetensors"):
        shard.unlink()
    save_file(published_tensors(), published / "model.safetensors")
    export_model(published, tmp_path / "hf")
    assert read_all(tmp_path / "hf").keys() == published_tensors().keys()
    assert not (tmp_path / "hf" / INDEX_NAME).exists()


def test_an_export_never_replaces_what_is_no_export(published, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.txt").write_text("three years of work")
    with pytest.raises(ValueError, match="is not empty and no earlier export"):
        export_model(published, tmp_path / "hf")
    assert (tmp_path / "hf" / "thesis.txt").exists()
    with pytest.raises(ValueError, match="is the source of this model"):
        export_model(published, published)
    export_model(published, tmp_path / "other")
    export_model(published, tmp_path / "other")  # an earlier export may be replaced


@pytest.mark.parametrize("place", ["posix_fallocate", "fsync"])
def test_a_full_disk_leaves_the_earlier_export_as_it_was(published, tmp_path, monkeypatch, place):
    export_model(published, tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir() if path.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, place, full)
    with pytest.raises(ValueError, match=r"could not write the export .*No space left on device; nothing there was"):
        export_model(published, tmp_path / "hf", change=1.0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir() if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model"]


def test_too_little_room_is_said_before_anything_is_written(published, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(ValueError, match=r"the export takes \d+ bytes, the disk has 10 free"):
        export_model(published, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_names_that_the_source_lacks_are_refused(published, tmp_path):
    with pytest.raises(ValueError, match=r"has no tensors for layers\.7\.gate_up"):
        export_model(published, tmp_path / "hf", names=["layers.7.gate_up"])
