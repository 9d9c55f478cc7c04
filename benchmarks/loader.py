"""Process time from media file to features and tokens, against transformers' own processors, on one core.

    OMP_NUM_THREADS=1 python benchmarks/loader.py [RESULT.md]

A row is a question about one clip and a short answer. XX are header, planned size, decoding and what the tower reads
(theirs: decoding, then the image processor or the feature extractor); a *row* adds its tokens (theirs: chat template,
placeholders, tokenizer; ours twice, since a row is measured for the plan before it is encoded, and with labels, weights
and positions); *again* is our row without being measured, as from the second epoch on. *Libraries* is what both leave
to the same ones: decoding, resizing, resampling, Fourier transforms, and nothing around them. transformers' video
processors need torchvision, which is not asked for here, so that videos have no figure of theirs. With megatron-energon
installed, its loader's time to read and decode these clips from shards, without features and tokens.
"""

from __future__ import annotations

import io
import json
import math
import sys
import tempfile
import time
import wave
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import soxr
import torch
from PIL import Image
from transformers import Qwen2Tokenizer, WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: media files are made among the tests

from omniloom.data.media_decode import decode_clip
from omniloom.data.media_files import MediaLimits
from omniloom.data.media_headers import read_header
from omniloom.families.registry import find_spec
from omniloom.options import ProcessorOptions
from omniloom.processors.chat import ChatProcessor
from omniloom.tools.tiny import make_tiny
from omniloom.types import ClipGeometry, Conversation, Extent, MediaKind, MediaSource, Part, Turn
from tests.unit.media_files import tone, write_audio, write_video

ROUNDS = 15
ROWS = 6  # of one kind in a turn
LIMITS = MediaLimits()
QUESTION, ANSWER = "What is this?", "An answer of a few words."


@dataclass(frozen=True)
class Case:
    name: str
    kind: MediaKind
    path: Path
    amount: float  # megapixels decoded, or seconds of sound
    num_frames: int = 0


class Ours:
    """omniloom on one row."""

    def __init__(self, processor: ChatProcessor) -> None:
        self.processor = processor
        self._extents: dict[Case, Extent] = {}

    def row_of(self, case: Case) -> Conversation:
        clip = Part(kind=case.kind, media=MediaSource(path=str(case.path)))
        asked, answer = (Part(kind="text", text=text) for text in (QUESTION, ANSWER))
        turns = (Turn(role="user", parts=(clip, asked)), Turn(role="assistant", parts=(answer,)))
        return Conversation(id="i", source="s", turns=turns)

    def plan(self, case: Case) -> ClipGeometry:
        header = read_header(MediaSource(path=str(case.path)), case.kind, LIMITS)
        (clip,) = self.processor.geometry(self.row_of(case), (header,))
        return clip

    def size(self, case: Case) -> tuple[int, int]:
        """Planned width and height of a picture."""
        _, height, width = self.plan(case).grid_thw or (0, 0, 0)
        patch = self.processor.towers.vision.patch_size
        return width * patch, height * patch

    def features(self, case: Case) -> Any:
        clip, source = self.plan(case), MediaSource(path=str(case.path))
        return self.processor.towers.features(clip, decode_clip(source, clip, LIMITS))

    def row(self, case: Case) -> Any:
        row, source = self.row_of(case), MediaSource(path=str(case.path))
        extent = self.processor.measure(row, (read_header(source, case.kind, LIMITS),))
        return self.processor.encode(row, extent.clips, (decode_clip(source, extent.clips[0], LIMITS),))

    def row_again(self, case: Case) -> Any:
        """A row whose extent is known, as from a run's second epoch on."""
        row, source = self.row_of(case), MediaSource(path=str(case.path))
        if case not in self._extents:
            self._extents[case] = self.processor.measure(row, (read_header(source, case.kind, LIMITS),))
        clips = self._extents[case].clips
        return self.processor.encode(row, clips, (decode_clip(source, clips[0], LIMITS),))


class Theirs:
    """transformers on one row, of a picture or a sound."""

    def __init__(self, model: Path, ours: ChatProcessor) -> None:
        vision, (low, high) = ours.towers.vision, ours.towers.settings.image_pixels
        self.merge = vision.spatial_merge_size
        self.pictures = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size, merge_size=self.merge, size={"shortest_edge": low, "longest_edge": high}
        )
        self.sounds = WhisperFeatureExtractor(feature_size=ours.towers.audio.num_mel_bins)
        self.tokenizer = Qwen2Tokenizer.from_pretrained(model)
        self.pads, self.audio_tokens = ours.media.pads, ours.towers.num_audio_tokens

    def features(self, case: Case) -> Any:
        if case.kind == "image":
            return self.pictures(Image.open(case.path).convert("RGB"), return_tensors="pt")
        mono = load_sound(case.path)
        return self.sounds(mono, sampling_rate=16000, return_tensors="pt", padding="longest", truncation=False)

    def row(self, case: Case) -> Any:
        found = self.features(case)
        said = [{"type": case.kind, case.kind: "clip"}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": ANSWER}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        if case.kind == "image":
            count = int(found["image_grid_thw"].prod()) // self.merge**2
        else:
            count = self.audio_tokens(found["input_features"].shape[-1])
        pad = self.pads[case.kind]
        return found, self.tokenizer(text.replace(pad, pad * count))


def call_libraries(sizes: dict[Path, tuple[int, int]], case: Case) -> None:
    """What no way from file to features of these libraries goes without; `sizes` are those planned for pictures."""
    if case.kind == "image":
        picture = Image.open(case.path)
        picture.load()
        if picture.size != sizes[case.path]:
            picture.resize(sizes[case.path], resample=Image.Resampling.BICUBIC)
        return
    num_samples, rate = int(case.amount * 16000), 16000
    if case.path.suffix == ".wav":
        with wave.open(str(case.path)) as file:
            num_samples, rate = file.getnframes(), file.getframerate()
            file.readframes(num_samples)
    else:
        with av.open(str(case.path)) as container:
            num_samples = sum(frame.samples for frame in container.decode(audio=0))
            rate = container.streams.audio[0].sample_rate
    mono = np.zeros(num_samples, np.float32)
    mono = mono if rate == 16000 else soxr.resample(mono, rate, 16000, quality="HQ")
    torch.stft(torch.from_numpy(mono), 400, 160, window=torch.hann_window(400), return_complex=True)


def load_sound(path: Path) -> np.ndarray:
    """float32 [n] mono at 16 kHz: wav by Python's own reader at once, the rest by av frame by frame; soxr resamples."""
    if path.suffix == ".wav":
        with wave.open(str(path)) as file:
            rate, channels = file.getframerate(), file.getnchannels()
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, channels)
        mono = samples.astype(np.float32).mean(axis=1) / 32768
        return mono if rate == 16000 else soxr.resample(mono, rate, 16000, quality="HQ")
    with av.open(str(path)) as container:
        parts = []
        for frame in container.decode(audio=0):
            raw = frame.to_ndarray()
            raw = raw if frame.format.is_planar else raw.reshape(-1, frame.layout.nb_channels).T
            scale = 1.0 if raw.dtype.kind == "f" else 2.0 ** (8 * raw.dtype.itemsize - 1)
            parts.append(raw.astype(np.float32).mean(axis=0) / scale)
            rate = frame.sample_rate
    mono = np.concatenate(parts)
    return mono if rate == 16000 else soxr.resample(mono, rate, 16000, quality="HQ")


def write_cases(folder: Path) -> list[Case]:
    rng, cases = np.random.default_rng(0), []
    for width, height in ((300, 170), (640, 480), (1280, 720)):
        path = folder / f"{width}.jpg"
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(path, quality=90)
        cases.append(Case(f"JPEG {width}x{height}", "image", path, width * height / 1e6))
    for name, codec, rate, channels in (
        ("a.wav", "pcm_s16le", 16000, 1),
        ("b.wav", "pcm_s16le", 48000, 2),
        ("a.flac", "flac", 16000, 1),
        ("a.mp3", "libmp3lame", 44100, 2),
    ):
        sound = tone(5 * rate, rate, channels) + rng.normal(0, 0.05, (channels, 5 * rate)).astype(np.float32)
        write_audio(folder / name, codec, rate, sound)
        cases.append(Case(f"{name[2:]} 5 s, {rate} Hz, {channels} ch", "audio", folder / name, 5.0))
    video = write_video(folder / "a.mp4", num_frames=200, fps=25, size=(640, 360))
    cases.append(Case("h264 640x360 8 s", "video", video, 16 * 0.2304, 16))
    return cases


def measure(works: dict[str, Callable[[Case], object]], cases: list[Case]) -> dict[str, float]:
    """Milliseconds of process time a row, medians over rounds in which each work has its turn with the same rows."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(ROUNDS + 2):
        for name, work in works.items():
            start = time.process_time()
            for case in cases:
                work(case)
            if number >= 2:
                times[name].append(1000 * (time.process_time() - start) / len(cases))
    return {name: median(spent) for name, spent in times.items()}


def of_energon(folder: Path, cases: list[Case]) -> float | None:
    """Milliseconds a sample that its loader takes for pictures and sounds, decoded."""
    try:
        from megatron import energon
    except ImportError:
        return None
    from omniloom.tools.convert import convert_file

    rows = [{"query": f"<{case.kind}>{QUESTION}", "response": ANSWER, f"{case.kind}s": [case.path.name]}
            for case in cases if case.kind != "video"] * 40  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows))
    convert_file("webdataset", folder / "rows.json", folder / "shards")

    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return dict(sample)

    encoder = type("Plain", (energon.DefaultTaskEncoder,), {
        "decoder": energon.SampleDecoder(image_decode="torchrgb8", av_decode="torch"),
        "cookers": [energon.Cooker(energon.stateless(cook))],
    })()  # fmt: skip
    dataset = energon.get_train_dataset(
        str(folder / "shards"), worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None, shuffle_buffer_size=None, max_samples_per_sequence=None, repeat=False, task_encoder=encoder,
    )  # fmt: skip
    start = time.process_time()
    list(energon.get_loader(dataset))
    return 1000 * (time.process_time() - start) / len(rows)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny("qwen3_omni", folder / "model")
        config_json = json.loads((model / "config.json").read_text())
        spec = find_spec(config_json)
        processor = spec.make_processor(model, spec.read_config(config_json), ProcessorOptions())
        ours, theirs, cases = Ours(processor), Theirs(model, processor), write_cases(folder)
        own = {"ours": ours.features, "our row": ours.row, "again": ours.row_again}
        compared = [case for case in cases if case.kind != "video"]
        libraries = partial(call_libraries, {case.path: ours.size(case) for case in compared})
        both = own | {"theirs": theirs.features, "their row": theirs.row, "libraries": libraries}
        rows = {case.name: (both, [case] * ROWS) for case in compared}
        rows |= {"mixed": (both, compared)}
        rows |= {case.name: (own, [case] * ROWS) for case in cases if case.kind == "video"}
        found = []
        for name, (works, turn) in rows.items():
            tokens = sum(len(ours.row(case).input_ids) for case in turn) / len(turn)
            found.append({"case": name, "tokens": tokens, "amount": turn[0].amount, **measure(works, turn)})
        energon = of_energon(folder, cases)
    print(report(found, energon))
    if sys.argv[1:]:
        Path(sys.argv[1]).with_suffix(".json").write_text(json.dumps({"rows": found, "energon": energon}, indent=1))


def report(found: list[dict[str, Any]], energon: float | None) -> str:
    out = io.StringIO()
    head = ("media", "features, ms", "theirs", "ratio", "libraries", "row, ms", "theirs", "ratio")
    head += ("again, ms", "ratio", "tokens/s", "MP or s of sound/s")
    line = f"|{' {} |' * len(head)}\n".format
    out.write(line(*head))
    out.write(line(*["---"] * len(head)))
    for row in found:
        cells = []
        for mine, other in (("ours", "theirs"), ("our row", "their row"), ("again", "their row")):
            ratio = row.get(other, math.nan) / row[mine]
            cells += [f"{row[mine]:.2f}", f"{row.get(other, math.nan):.2f}", f"{ratio:.2f}"]
        cells[3:3], cells[-2:-1] = [f"{row.get('libraries', math.nan):.2f}"], []
        amount = f"{1000 * row['amount'] / row['our row']:.1f}" if row["case"] != "mixed" else ""
        out.write(line(row["case"], *cells, f"{1000 * row['tokens'] / row['our row']:,.0f}", amount).replace("nan", ""))
    if energon is not None:
        out.write(f"\nmegatron-energon reads and decodes a sample of the mix in {energon:.2f} ms\n")
    return out.getvalue()


if __name__ == "__main__":
    main()
