"""An export's processor files say what training did to media, as transformers and our own processors read them."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from omniloom.checkpoint.files import read_json
from omniloom.config import DataConfig
from omniloom.families.registry import find_spec
from omniloom.options import ImageConfig, ProcessorOptions, VideoConfig
from omniloom.run.trained_media import PREPROCESSOR, PROCESSOR, VIDEO, TrainedMedia, processor_files
from omniloom.tools.tiny import FAMILIES, make_tiny
from omniloom.types import (
    ClipGeometry,
    ClipOptions,
    Extent,
    MediaHeader,
    MediaSource,
    PackPlan,
    PlannedSample,
    StepPlan,
)

HEADER = MediaHeader(kind="video", width=640, height=352, num_frames=300, fps=30.0, duration_seconds=10.0)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    return {family: make_tiny(family, root / family) for family in FAMILIES}


def trained_on(*clips, data=DataConfig()):  # noqa: B008 - frozen
    """`clips`: kinds, or a kind with what its row asks."""
    pairs = [(clip, ClipOptions()) if isinstance(clip, str) else clip for clip in clips]
    geometries = tuple(ClipGeometry(kind=kind, num_tokens=1, asked=asked) for kind, asked in pairs)
    extent = Extent(num_tokens=1, num_loss_tokens=1, weight_sum=1.0, clips=geometries)
    sample = PlannedSample(row=0, epoch=0, extent=extent, weight_scale=1.0)
    media = TrainedMedia()
    media.add(StepPlan(step=0, packs=(PackPlan(index=0, samples=(sample,)),), rows_planned=1), lambda row: data)
    return TrainedMedia(**json.loads(json.dumps(asdict(media))))  # as from a checkpoint


def exported(source, directory, media, data):
    shutil.copytree(source, directory)
    files, words = processor_files(source, media, data)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return files, words


def processor_of(directory, **options):
    config_json = read_json(directory / "config.json")
    spec = find_spec(config_json)
    return spec.make_processor(directory, spec.read_config(config_json), ProcessorOptions(**options))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_resizes_images_as_training_did(published, tmp_path, family):
    data = DataConfig(image=ImageConfig(min_pixels=32 * 32, max_pixels=200 * 150))
    exported(published[family], tmp_path / "hf", trained_on("image", data=data), data)
    theirs, ours = AutoImageProcessor.from_pretrained(tmp_path / "hf"), processor_of(tmp_path / "hf")
    trained = processor_of(published[family], image=data.image)
    for height, width in ((640, 480), (30, 40), (100, 900), (150, 150)):
        header = MediaHeader(kind="image", width=width, height=height)
        grid = trained.towers.image_geometry(MediaSource(), header, 1.0).grid_thw
        picture = Image.fromarray(np.zeros((height, width, 3), np.uint8))
        assert tuple(theirs(picture, return_tensors="np")["image_grid_thw"][0]) == grid
        assert ours.towers.image_geometry(MediaSource(), header, 1.0).grid_thw == grid


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_omni", "qwen2_5_omni"])
@pytest.mark.parametrize("pixels", [(None, None), (None, 64 * 96), (32 * 32, 128 * 128), (64 * 64, 96 * 96)])
def test_videos_keep_their_limits(published, tmp_path, family, pixels):
    low, high = pixels
    data = DataConfig(video=VideoConfig(min_pixels=low, max_pixels=high, fps=3.0, max_frames=24))
    files, _ = exported(published[family], tmp_path / "hf", trained_on("video", data=data), data)
    assert (files[VIDEO]["fps"], files[VIDEO]["max_frames"]) == (3.0, 24)
    trained = processor_of(published[family], video=data.video)
    again = processor_of(tmp_path / "hf", video=VideoConfig(fps=3.0, max_frames=24))
    for header in (HEADER, MediaHeader(kind="video", width=64, height=64, num_frames=20, fps=5.0)):
        expected = trained.media.video_geometry(MediaSource(), header, 1.0).grid_thw
        assert again.media.video_geometry(MediaSource(), header, 1.0).grid_thw == expected


def test_the_widest_limit_of_rows_and_run_is_written_and_told(published, tmp_path):
    media = trained_on("image", ("image", ClipOptions(max_pixels=90_000)), ("image", ClipOptions(min_pixels=9)))
    files, words = exported(
        published["qwen3_omni"], tmp_path / "hf", media, DataConfig(image=ImageConfig(max_pixels=50_000))
    )
    assert files[PREPROCESSOR]["size"] == {"shortest_edge": 9, "longest_edge": 90_000}
    assert (files[PREPROCESSOR]["min_pixels"], files[PREPROCESSOR]["max_pixels"]) == (9, 90_000)
    assert words == ("images of 9 to 90000 pixels",)
    only_rows = trained_on(("image", ClipOptions(max_pixels=40_000)))
    files, _ = exported(
        published["qwen3_omni"], tmp_path / "rows", only_rows, DataConfig(image=ImageConfig(max_pixels=50_000))
    )
    assert files[PREPROCESSOR]["max_pixels"] == 40_000


def test_sections_of_a_single_file_are_written_too(published, tmp_path):
    source = shutil.copytree(published["qwen3_vl"], tmp_path / "source")
    image, video = (json.loads((source / name).read_text()) for name in (PREPROCESSOR, VIDEO))
    for name in (PREPROCESSOR, VIDEO):
        (source / name).unlink()
    (source / PROCESSOR).write_text(json.dumps({"image_processor": image, "video_processor": video}))
    data = DataConfig(image=ImageConfig(max_pixels=70_000), video=VideoConfig(fps=1.0, max_frames=8))
    files, _ = exported(source, tmp_path / "hf", trained_on("image", "video", data=data), data)
    assert files.keys() == {PROCESSOR}
    assert files[PROCESSOR]["image_processor"]["size"]["longest_edge"] == 70_000
    assert files[PROCESSOR]["video_processor"]["max_frames"] == 8
    assert AutoImageProcessor.from_pretrained(tmp_path / "hf").size["longest_edge"] == 70_000


def test_limits_of_a_data_set_are_written_where_the_run_has_others(published):
    own, run = DataConfig(image=ImageConfig(max_pixels=40_000)), DataConfig(image=ImageConfig(max_pixels=70_000))
    files, _ = processor_files(published["qwen3_vl"], trained_on("image", data=own), run)
    assert files[PREPROCESSOR]["max_pixels"] == 40_000


def test_what_was_not_trained_stays_and_videos_do_not_follow_images(published):
    source, data = published["qwen2_5_vl"], DataConfig(image=ImageConfig(max_pixels=70_000))
    assert processor_files(source, trained_on("audio"), data) == ({}, ())
    files, _ = processor_files(source, trained_on("image", data=data), data)
    assert files[VIDEO] == read_json(source / PREPROCESSOR)  # which transformers reads for both, until there are two


def test_sound_longer_than_the_extractor_takes_raises_its_length(published):
    media = TrainedMedia(longest_sound=16_000 * 400 + 1)
    files, words = processor_files(published["qwen3_omni"], media, DataConfig())
    settings = files[PREPROCESSOR]
    assert (settings["chunk_length"], settings["n_samples"], settings["nb_max_frames"]) == (401, 6_416_000, 40_100)
    assert words == ("sound of up to 401 s",)
