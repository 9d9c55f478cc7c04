"""Processor files that ask for something else than is done here are refused by the name of what they ask."""

import json

import pytest

from omniloom.processors.tower_inputs import read_media_settings
from omniloom.types import ProcessorOptions

PUBLISHED = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 3136, "longest_edge": 12845056},
    "do_resize": True,
    "rescale_factor": 0.00392156862745098,
    "resample": 3,
    "sampling_rate": 16000,
    "hop_length": 160,
    "n_fft": 400,
}


def settings_of(folder, video=None, **changes):
    settings = {key: value for key, value in {**PUBLISHED, **changes}.items() if value != "absent"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video or {}))
    return read_media_settings(folder, ProcessorOptions())


def test_published_settings_are_read(tmp_path):
    settings = settings_of(tmp_path, video={"do_resize": True, "image_mean": [0.5] * 3})
    assert (settings.image_pixels, settings.image_mean) == ((3136, 12845056), (0.5, 0.5, 0.5))
    assert (settings.sampling_rate, settings.hop_length, settings.n_fft) == (16000, 160, 400)
    assert settings_of(tmp_path, size="absent", min_pixels=4, max_pixels=9).image_pixels == (4, 9)
    assert settings_of(tmp_path, hop_length="absent").sampling_rate == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "image processor.*do_resize is False, only True is done here"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"resample": 2}, "resample is 2, only 3"),
        ({"video": {"do_rescale": False}}, "video processor.*do_rescale is False"),
        ({"video": {"image_std": [1, 1, 1]}}, r"video processor.*image_std is \[1, 1, 1\]"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, **changes)
