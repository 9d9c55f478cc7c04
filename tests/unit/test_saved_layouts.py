"""Every layout in which transformers saves a family is read, and an export keeps it."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from omniloom.checkpoint.export import export
from omniloom.checkpoint.hf import load_model
from omniloom.checkpoint.tensor_files import SINGLE_NAME
from omniloom.config import load_config
from omniloom.families.registry import find_spec
from omniloom.options import ProcessorOptions
from omniloom.run.opening import open_workshop
from omniloom.tools.tiny import FAMILIES, make_tiny

WHOLE = {
    "qwen3_omni": "Qwen3OmniMoeForConditionalGeneration",
    "qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}
THINKERS = {
    "qwen3_omni": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
}


def tensors_of(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def open_path(directory, *overrides):
    return open_workshop(load_config(None, [f"model.path={directory}", *overrides]))


def parameters_of(workshop):
    model = workshop.build()
    load_model(model, workshop.checkpoint, workshop.key_map, unbuilt=workshop.unbuilt)
    return dict(model.named_parameters())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {family: make_tiny(family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(("family", "architecture"), [*WHOLE.items(), *THINKERS.items()])
def test_what_transformers_saves_is_the_same_model_and_exports_in_its_own_layout(
    published, tmp_path, family, architecture, original
):
    """`original`: in the published names, else in those in memory, experts stacked."""
    reference = getattr(transformers, architecture).from_pretrained(published[family], dtype="auto")
    reference.save_pretrained(tmp_path / "saved", save_original_format=original)
    workshop, before = open_path(tmp_path / "saved"), parameters_of(open_path(published[family]))
    parameters = parameters_of(workshop)
    assert parameters.keys() == before.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name]), name
    names = list(parameters)
    export(tmp_path / "out", workshop.checkpoint, workshop.key_map, names, lambda name: parameters[name].detach())
    there, here = tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "out")
    assert there.keys() == here.keys()
    for name, tensor in there.items():
        assert torch.equal(tensor, here[name]), name


@pytest.mark.parametrize("family", ["qwen3_omni", "qwen2_5_omni", "qwen3_vl", "qwen3_vl_moe"])
def test_what_the_converters_of_the_guides_write_back_is_the_same_model(published, tmp_path, family):
    """`dcp_to_hf` and `mm_to_hf`: published names, files cut in another way, no sizes, no header words."""
    source, directory = published[family], tmp_path / "converted"
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = list(tensors_of(source).items())
    parts = {f"model-{part + 1:05}-of-00003.safetensors": dict(tensors[part::3]) for part in range(3)}
    for name, part in parts.items():
        save_file(part, directory / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before, after = (parameters_of(open_path(path)) for path in (source, directory))
    assert before.keys() == after.keys()
    for name, parameter in before.items():
        assert torch.equal(parameter, after[name]), name


def test_a_thinker_without_its_prefix_trains_on_fewer_layers(published, tmp_path):
    """As older versions of transformers saved it: names of the published thinker, less `thinker.`."""
    source, directory = published["qwen3_omni"], tmp_path / "thinker"
    config_json = json.loads((source / "config.json").read_text())["thinker_config"]
    architectures = {"architectures": [THINKERS["qwen3_omni"]], "model_type": "qwen3_omni_moe_thinker"}
    tensors = {name: tensor for name, tensor in tensors_of(source).items() if name.startswith("thinker.")}
    directory.mkdir()
    save_file({name.removeprefix("thinker."): tensor for name, tensor in tensors.items()}, directory / SINGLE_NAME)
    (directory / "config.json").write_text(json.dumps(config_json | architectures))
    workshop = open_path(directory, "model.num_layers.text=1")
    assert workshop.config_json["text_config"]["num_hidden_layers"] == 1
    assert torch.equal(parameters_of(workshop)["text.embed.weight"], tensors["thinker.model.embed_tokens.weight"])


def test_levels_of_deepstack_past_the_layers_are_not_built_and_yet_exported(tmp_path):
    """transformers holds them and adds them to nothing."""
    levels = {"text_config.num_hidden_layers": 1, "vision_config.deepstack_visual_indexes": [0, 1]}
    workshop = open_path(make_tiny("qwen3_vl", tmp_path / "model", overrides=levels))
    assert [name for name in workshop.unbuilt if name.startswith("vision.deepstack.1.")]
    assert not [name for name in parameters_of(workshop) if name.startswith("vision.deepstack.1.")]
    assert workshop.cut == ()
    assert open_path(tmp_path / "model", "model.num_layers.vision=1").cut


def test_a_model_that_is_published_without_its_head_says_how_it_can_have_one(published, tmp_path):
    """Qwen3-VL-Embedding-8B is: its config.json ties nothing, and there is no lm_head."""
    source, directory = published["qwen3_vl_moe"], tmp_path / "model"
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = tensors_of(source)
    del tensors["lm_head.weight"]
    save_file(tensors, directory / SINGLE_NAME)
    with pytest.raises(ValueError, match=r"missing lm_head\.weight .*; it has no head, .* tie_word_embeddings to true"):
        open_path(directory)
    config_json = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config_json | {"tie_word_embeddings": True}))
    open_path(directory)


def test_quantised_weights_are_refused_before_anything_is_built(published, tmp_path):
    tensors = tensors_of(published["qwen3_vl"])
    config_json = json.loads((published["qwen3_vl"] / "config.json").read_text())
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, tmp_path / SINGLE_NAME)
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(ValueError, match=r"down_proj\.weight is stored as I8 \(1 of"):
        open_path(tmp_path)
    config_json["text_config"]["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(ValueError, match=r"quantised \(gptq: config\.json has text_config\.quantization_config\)"):
        open_path(tmp_path)


def test_numbers_that_stand_as_text_are_named(published, tmp_path):
    config_json = json.loads((published["qwen2_5_omni"] / "config.json").read_text())
    thinker = config_json["thinker_config"]
    thinker["text_config"] |= {"hidden_size": "64", "transformers_version": "4.57"}
    thinker["vision_config"]["fullatt_block_indexes"] = ["1"]
    with pytest.raises(ValueError, match=r"block_indexes is .*text_config\.hidden_size is '64'"):
        find_spec(config_json).read_config(config_json)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"image_mean": None},
            r"preprocessor_config\.json: image_mean: expected three numbers, one for each colour, got None",
        ),
        ({"image_std": [0.5]}, r"image_std: expected three numbers, one for each colour, got \[0\.5\]"),
        ({"n_fft": "400"}, r"n_fft: expected a number, got '400'"),
        ({"max_pixels": None}, r"longest_edge: expected a number, got None"),
    ],
)
def test_a_processor_file_that_lacks_a_number_is_refused(published, tmp_path, change, words):
    directory = shutil.copytree(published["qwen3_omni"], tmp_path / "model")
    path = directory / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    config_json = json.loads((directory / "config.json").read_text())
    spec = find_spec(config_json)
    with pytest.raises(ValueError, match=words):
        spec.make_processor(directory, spec.read_config(config_json), ProcessorOptions())
