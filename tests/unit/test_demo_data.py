"""The demo's files show what their answers say, and the controls show nothing of it."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from omniloom.tools import demo_data
from omniloom.tools.demo_data import MODALITIES, DemoData, write_demo_data

NUM_HELD_OUT = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return write_demo_data(tmp_path_factory.mktemp("demo"), num_train=84, num_held_out=NUM_HELD_OUT, seed=3)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def media_path(path: Path, row: dict) -> Path:
    (field,) = {"images", "audios", "videos"} & row.keys()
    return path.parent / row[field][0]


def answer(row: dict) -> str:
    return row["messages"][-1]["content"]


def decode_frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


def decode_sound(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=16_000)
        chunks = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        return np.concatenate([chunk.to_ndarray()[0] for chunk in chunks]), 16_000


def loudest_hertz(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.fft.rfftfreq(len(samples), 1 / rate)[spectrum.argmax()])


def bright_centre(frame: np.ndarray) -> np.ndarray:
    bright = np.clip(frame.sum(-1) - 150, 0, None)
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    return np.array([(bright * x).sum(), (bright * y).sum()]) / bright.sum()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    def digest(directory: Path, seed: int) -> dict[str, str]:
        write_demo_data(directory, num_train=14, num_held_out=2, seed=seed)
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    first, again, other = digest(tmp_path / "a", 1), digest(tmp_path / "b", 1), digest(tmp_path / "c", 2)
    assert first == again
    assert first != other


def test_no_held_out_file_repeats_a_training_file(data: DemoData) -> None:
    rows = [(data.train, row) for row in read_rows(data.train)]
    rows += [(path, row) for path in data.held_out.values() for row in read_rows(path)]
    contents = [hashlib.sha256(media_path(path, row).read_bytes()).hexdigest() for path, row in rows]
    assert len(set(contents)) == len(contents)
    containers = {media_path(path, row).suffix for path, row in rows}
    assert containers == {".png", ".jpg", ".wav", ".mp3", ".flac", ".mp4"}


def test_modalities_are_mixed_two_two_two_one(data: DemoData) -> None:
    counts = Counter(row["id"].split("_")[1] for row in read_rows(data.train))
    assert counts == {"image": 24, "audio": 24, "video": 24, "joint": 12}


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_answer_of_a_question_is_equally_frequent(modality: str, tmp_path: Path) -> None:
    # 36 rows per question hold each of 3, 4 or 12 answers equally often
    scenes = demo_data._draw_scenes(np.random.default_rng(0), modality, "held_out", 108)
    by_question: dict[str, Counter] = {}
    for scene in scenes:
        by_question.setdefault(scene.question.text, Counter())[scene.answer] += 1
    blind = sum(max(counts.values()) for counts in by_question.values()) / len(scenes)
    assert blind == pytest.approx(demo_data.chance_levels()[modality])


def test_pictures_show_the_colour_that_the_answer_names(data: DemoData) -> None:
    path = data.held_out["image"]
    checked = 0
    for row in read_rows(path):
        named = [word for word in answer(row).split() if word in demo_data.COLOURS]
        if named:
            with Image.open(media_path(path, row)) as image:
                middle = np.asarray(image.convert("RGB")).astype(float)[28:36, 28:36].mean((0, 1))
            distances = {name: np.abs(middle - colour).sum() for name, colour in demo_data.COLOURS.items()}
            assert min(distances, key=distances.get) == named[0]
            checked += 1
    assert checked == 8


def test_shapes_fill_like_areas_so_that_brightness_tells_none() -> None:
    areas = {
        shape: (demo_data._draw(shape, (255, 255, 255), (32, 32), 18).sum(-1) > 400).sum() for shape in demo_data.SHAPES
    }
    # radii vary by more than this, so that the number of bright pixels tells the shapes apart at best weakly
    assert max(areas.values()) / min(areas.values()) < 1.15


def test_tones_sound_at_the_pitch_and_bend_that_the_answer_names(data: DemoData) -> None:
    path = data.held_out["audio"]
    for row in read_rows(path):
        samples, rate = decode_sound(media_path(path, row))
        if answer(row) in demo_data.PITCHES_HERTZ:
            low, high = demo_data.PITCHES_HERTZ[answer(row)]
            assert low / 1.4 < loudest_hertz(samples, rate) < high * 1.4
        else:
            third = len(samples) // 3
            bend = loudest_hertz(samples[-third:], rate) / loudest_hertz(samples[:third], rate)
            assert answer(row) == ("rising" if bend > 1.15 else "falling" if bend < 0.87 else "steady")


@pytest.mark.parametrize("modality", ["video", "joint"])
def test_clips_move_the_way_and_sound_the_pitch_that_the_answer_names(data: DemoData, modality: str) -> None:
    path = data.held_out[modality]
    for row in read_rows(path):
        frames = decode_frames(media_path(path, row))
        moved = bright_centre(frames[-1]) - bright_centre(frames[0])
        way = demo_data.DIRECTIONS[answer(row).split()[0]]
        assert np.dot(moved, way) > 14  # 20 pixels, less where the square leaves the picture by half
        assert abs(np.dot(moved, way[::-1])) < 1
        if modality == "joint":
            low, high = demo_data.PITCHES_HERTZ[answer(row).split()[1]]
            assert low * 0.95 < loudest_hertz(*decode_sound(media_path(path, row))) < high * 1.05


def test_where_a_square_starts_says_nothing_about_its_way() -> None:
    scenes = demo_data._draw_scenes(np.random.default_rng(0), "video", "train", 2000)
    for axis in (0, 1):
        means = [np.mean([s.centre[axis] for s in scenes if s.answer == way]) for way in demo_data.DIRECTIONS]
        # 500 draws of a uniform of half-width 10 have a mean within 4 sigma = 4 x 5.8 / sqrt(500) = 1.03
        assert np.ptp(means) < 2.06
    turned = [demo_data._draw_scenes(np.random.default_rng(5), "video", "train", 8)[index] for index in range(8)]
    for scene in turned:
        np.testing.assert_array_equal(scene._frames("real")[0], scene._frames("frozen")[0])


def test_blank_media_are_one_constant_picture_and_silence(data: DemoData) -> None:
    for modality, path in data.controls["blank"].items():
        for row in read_rows(path):
            media = media_path(path, row)
            if modality == "image":
                with Image.open(media) as image:
                    assert np.ptp(np.asarray(image.convert("RGB")), axis=(0, 1)).max() == 0
            if modality == "audio":
                assert np.abs(decode_sound(media)[0]).max() < 1e-3
            if modality in ("video", "joint"):
                assert np.ptp(decode_frames(media), axis=(0, 1, 2)).max() <= 3  # codec rounding
                assert np.abs(decode_sound(media)[0]).max() < 1e-3


def test_controls_ask_the_same_questions_of_other_media(data: DemoData) -> None:
    assert {name: set(files) for name, files in data.controls.items()} == {
        "blank": set(MODALITIES),
        "frozen": {"video", "joint"},
        "muted": {"joint"},
    }
    for files in data.controls.values():
        for modality, path in files.items():
            real = read_rows(data.held_out[modality])
            control = read_rows(path)
            assert [row["messages"] for row in control] == [row["messages"] for row in real]
            assert all(media_path(path, a) != media_path(path, b) for a, b in zip(control, real, strict=True))


def test_a_frozen_clip_stands_still_and_a_muted_one_is_silent(data: DemoData) -> None:
    for modality, path in data.controls["frozen"].items():
        for row, real in zip(read_rows(path), read_rows(data.held_out[modality]), strict=True):
            frames = decode_frames(media_path(path, row))
            assert np.abs(bright_centre(frames[-1]) - bright_centre(frames[0])).max() < 0.5
            first = decode_frames(media_path(path, real))[0]
            assert np.abs(bright_centre(frames[0]) - bright_centre(first)).max() < 0.5
            assert np.abs(decode_sound(media_path(path, row))[0]).max() > 0.1
    muted = data.controls["muted"]["joint"]
    for row in read_rows(muted):
        assert np.abs(decode_sound(media_path(muted, row))[0]).max() < 1e-3
        assert np.ptp([bright_centre(frame) for frame in decode_frames(media_path(muted, row))], axis=0).max() > 15
