"""What a checkpoint's small files ask for is obeyed as transformers obeys it, or refused by file and field."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from omniloom.families.registry import SPECS, find_spec
from omniloom.processors.settings import load_tokenizer, read_processor_config
from omniloom.tools.tiny import make_tiny
from omniloom.types import Conversation, DecodedClip, MediaHeader, MediaSource, Part, Turn

PICTURE = Conversation(
    id="c",
    source="f:1",
    turns=(
        Turn(role="user", parts=(Part(kind="image", media=MediaSource(path="x")),)),
        Turn(role="assistant", parts=(Part(kind="text", text="a"),)),
    ),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny("qwen3_omni", tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def changed(checkpoint, tmp_path):
    """Opens the checkpoint's processor after a change to one of its files."""

    def change(file="preprocessor_config.json", **values):
        directory = tmp_path / "changed"
        directory.mkdir(exist_ok=True)
        for path in checkpoint.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, directory)
        content = json.loads((directory / file).read_text())
        for path, value in values.items():
            *parents, last = path.split("__")
            section = content
            for parent in parents:
                section = section[parent]
            section[last] = value
            if value is ...:
                del section[last]
        (directory / file).write_text(json.dumps(content))
        config_json = json.loads((directory / "config.json").read_text())
        spec = find_spec(config_json)
        return spec.make_processor(directory, spec.read_config(config_json), None)

    return change


@pytest.mark.parametrize(
    "settings",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False, "image_mean": None},
        {"rescale_factor": 1 / 127.5},
        {"resample": 2},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"min_pixels": 20_000, "max_pixels": 30_000, "size": {"shortest_edge": 1, "longest_edge": 2}},
    ],
)
def test_settings_of_the_image_processor_are_obeyed_as_transformers_obeys_them(changed, settings):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    usual = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_pixels": 3136, "max_pixels": 12845056}
    theirs = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, temporal_patch_size=2, **usual | settings)
    pixels = np.random.default_rng(0).integers(0, 256, (77, 130, 3), dtype=np.uint8)
    expected = theirs(images=[pixels], return_tensors="pt")
    processor = changed(**settings)
    clips = processor.geometry(PICTURE, (MediaHeader(kind="image", width=130, height=77),))
    assert [list(clips[0].grid_thw)] == expected["image_grid_thw"].tolist()
    patches, _ = processor.towers.normalised(processor.towers.features(clips[0], DecodedClip(pixels=pixels)))
    assert np.allclose(patches, expected["pixel_values"], rtol=1e-6, atol=1e-6)


def test_pixels_travel_as_bytes_unless_images_and_videos_are_normalised_unlike(changed):
    same = changed()
    assert same.collate_vision([]).patches.dtype == torch.uint8
    other = changed(image_mean=[0.1, 0.2, 0.3])
    other.towers.settings = replace(other.towers.settings, frames=same.towers.settings.frames)
    assert other.towers.pixel_rules is None
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (clip,) = other.geometry(PICTURE, (MediaHeader(kind="image", width=64, height=64),))
    patches, _ = other.towers.features(clip, DecodedClip(pixels=pixels))
    alone = changed(image_mean=[0.1, 0.2, 0.3]).towers
    assert torch.equal(patches, alone.normalised(alone.features(clip, DecodedClip(pixels=pixels)))[0])
    assert other.collate_vision([]).patches.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "do_resize is false; only true is computed here"),
        ({"do_convert_rgb": False}, "do_convert_rgb is false; only true"),
        ({"patch_size": 14}, "patch_size is 14; only 16"),
        ({"merge_size": 1}, "merge_size is 1; only 2"),
        ({"feature_size": 80}, "feature_size is 80; only 128"),
        ({"dither": 0.1}, r"dither is 0\.1; only 0"),
        ({"resample": 9}, "resample: expected the number of one of PIL's filters, 0 to 5, got 9"),
        ({"image_mean": ...}, "image_mean: expected three numbers, one for each colour, got None"),
        ({"image_std": "0.5"}, "image_std: expected three numbers, one for each colour, got '0.5'"),
        ({"image_std": [0.5]}, "image_std: expected three numbers"),
        ({"min_pixels": "3136"}, "min_pixels: expected a number, got '3136'"),
        ({"max_pixels": ...}, "longest_edge: expected a number, got None"),
        ({"size": 3}, "size: expected a JSON object, got 3"),
        ({"rescale_factor": "1/255"}, "rescale_factor: expected a number"),
        ({"sampling_rate": "16000"}, "sampling_rate: expected a number, got '16000'"),
        ({"hop_length": ...}, "hop_length: expected a number, got None"),
        ({"n_fft": 400.5}, r"n_fft: expected a whole number above 0, got 400\.5"),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused_by_file_and_field(changed, settings, message):
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json.*{message}"):
        changed(**settings)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text_config__hidden_size", "64", "text_config.hidden_size is '64', expected a number"),
        ("text_config__head_dim", "16", "text_config.head_dim is '16', expected a number"),
        ("text_config__rope_theta", "1e6", "text_config.rope_theta is '1e6', expected a number"),
        ("text_config__hidden_act", 3, "text_config.hidden_act is 3, expected a text"),
        ("text_config__num_hidden_layers", [3], r"text_config.num_hidden_layers is \[3\], expected a number"),
        ("text_config__rms_norm_eps", True, "text_config.rms_norm_eps is True, expected a number"),
        (
            "vision_config__deepstack_visual_indexes",
            ["0", 1],
            r"indexes is \['0', 1\], expected a list of numbers",
        ),
        ("vision_config__depth", {}, "vision_config.depth is {}, expected a number"),
        ("audio_config__n_window", "50", "audio_config.n_window is '50', expected a number"),
        ("image_token_id", "5", "image_token_id is '5', expected a number"),
        (
            "text_config__rope_scaling",
            {"mrope_section": 4, "rope_type": "default"},
            "rope_scaling.mrope_section is 4, expected a list",
        ),
    ],
)
def test_values_of_another_kind_in_config_json_are_named(changed, field, value, message):
    with pytest.raises(ValueError, match=rf"^config\.json: .*{message}"):
        changed("config.json", **{f"thinker_config__{field}": value})


@pytest.mark.parametrize("field", ["image_token_id", "audio_token_id", "vision_start_token_id", "audio_start_token_id"])
def test_a_media_token_that_is_another_to_the_tokenizer_is_refused(changed, field):
    with pytest.raises(ValueError, match=rf"{field} of config\.json is 7, expected the token <\|"):
        changed("config.json", **{f"thinker_config__{field}": 7})


def test_tokens_beyond_the_embedding_are_named_at_start(changed, checkpoint, tmp_path):
    from transformers import Qwen2Tokenizer

    vocab_size = json.loads((checkpoint / "config.json").read_text())["thinker_config"]["text_config"]["vocab_size"]
    changed()
    tokenizer = Qwen2Tokenizer.from_pretrained(checkpoint)
    room = vocab_size - len(tokenizer)
    tokenizer.add_tokens([f"<new_{i}>" for i in range(room)])
    tokenizer.save_pretrained(tmp_path / "changed")
    config_json = json.loads((checkpoint / "config.json").read_text())
    spec = find_spec(config_json)
    spec.make_processor(tmp_path / "changed", spec.read_config(config_json), None)  # as many as there are rows
    tokenizer.add_tokens(["<one_more>", "<and_another>"])
    tokenizer.save_pretrained(tmp_path / "changed")
    message = rf"2 tokens beyond the {vocab_size} rows of the model's embedding: <one_more> \(id {vocab_size}\), <and_"
    with pytest.raises(ValueError, match=message):
        spec.make_processor(tmp_path / "changed", spec.read_config(config_json), None)
    with pytest.raises(ValueError, match=r"beyond the 900 rows of the model's embedding: \S+ \(id 900\), "):
        changed("config.json", thinker_config__text_config__vocab_size=900)


@pytest.mark.parametrize(
    "kind", [None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "Qwen3_5Tokenizer", "TokenizersBackend"]
)
def test_words_are_split_as_by_the_tokenizer_that_transformers_takes(checkpoint, tmp_path, kind):
    """Qwen3.5's splits none before a mark, whatever its files call it; a class of no family has the file's own rule."""
    from transformers import AutoTokenizer

    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    rule = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer["pre_tokenizer"] = rule
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text()) | {"tokenizer_class": kind}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({n: v for n, v in settings.items() if v is not None}))
    words = "हिन्दी สวัสดี it's 12345 ... e\u0323\n\n"
    for spec in SPECS:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": spec.model_type}))
        theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path, 10**6, spec.tokenizer)
        splits = [each.backend_tokenizer.pre_tokenizer.pre_tokenize_str(words) for each in (theirs, ours)]
        assert splits[0] == splits[1], (spec.name, kind)


@pytest.mark.parametrize("nested", [(), ("image_processor",), ("feature_extractor", "video_processor")])
def test_each_section_that_transformers_5_wrote_stands_over_the_file_of_its_own(checkpoint, tmp_path, nested):
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.image_processing_base import ImageProcessingMixin

    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "video_preprocessor_config.json").write_text('{"fps": 1}')
    (tmp_path / "processor_config.json").write_text(json.dumps({part: {**settings, "fps": 3} for part in nested}))
    image, sound, video = read_processor_config(tmp_path)
    assert image.values == ImageProcessingMixin.get_image_processor_dict(tmp_path)[0]
    assert sound.values == FeatureExtractionMixin.get_feature_extractor_dict(tmp_path)[0]
    assert video.values["fps"] == (3 if nested[1:] else 1)
