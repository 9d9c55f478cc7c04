"""Converted rows are the same conversations as their sources, and nothing is lost in silence."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.config import DataConfig
from omniloom.data.formats import FORMATS, parse_row
from omniloom.options import VideoConfig
from omniloom.tools.convert import InFolder, convert_file, convert_row
from omniloom.types import Conversation, SampleError

ANYWHERE = DataConfig(allow_urls=True, allow_outside_media_dir=True)
CONFIGS = (DataConfig(), DataConfig(video=VideoConfig(use_audio=True, fps=5.0)))  # what rows may leave open
TEXTS = st.sampled_from(
    ["a", "Is <image> a tag?", "<video>", " <audio>\n", "<think>\nx\n</think>\n\ny", "<tool_call>", "天气\n", "{}", " "]
)
WORDS = TEXTS.filter(lambda text: not {"<image>", "<video>", "<audio>"} & {text.strip(), text[3:10]})
WEIGHTS = st.none() | st.sampled_from([0, 0.5, 1, True, False, 2])
ARGUMENTS = st.sampled_from([{"city": "Paris", "n": 1.0}, {}, '{"a":   1}', "[1,2]", {"天": None}])
CALLS = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", '"g"']), "arguments": ARGUMENTS}, optional={"why": st.just({"because": [1]})}
)
SPAN = {"start": st.just(0.5), "end": st.just(2.5)}
IMAGE_OPTIONS = {"min_pixels": st.just(64), "max_pixels": st.just(4096)}
VIDEO_OPTIONS = {
    "fps": st.sampled_from([1, 2.0, 5.0]), "max_frames": st.just(8), "total_pixels": st.just(9999),
    "use_audio_in_video": st.booleans(), **IMAGE_OPTIONS, **{f"video_{key}": value for key, value in SPAN.items()},
}  # fmt: skip
BYTES = "data:image/png;base64," + base64.b64encode(b"\x89PNG and more").decode()


def clips(kind: str, names: list[str], options: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    plain = st.sampled_from([f"media/{name}" for name in names])
    return plain | st.fixed_dictionaries({kind: plain | st.just(BYTES)}, optional=options)


IMAGES = clips("image", ["a.png", "b #1.png"], IMAGE_OPTIONS)
AUDIOS = clips("audio", ["a.wav"], SPAN)
VIDEOS = clips("video", ["a.mp4"], VIDEO_OPTIONS) | st.lists(st.sampled_from(["media/a.png", BYTES]), min_size=2)


@st.composite
def rows_with_placeholders(draw: st.DrawFn, name: str) -> dict:
    """A row of a format that marks the places of clips in its text."""
    counts = {kind: draw(st.integers(0, 2)) for kind in ("image", "video", "audio")}
    tags = draw(st.permutations([f"<{kind}>" for kind, count in counts.items() for _ in range(count)]))
    question = draw(WORDS) + "".join(tags) + draw(WORDS)
    answers = [draw(WORDS), draw(WORDS)]
    row = {f"{kind}s": draw(st.lists(clip, min_size=counts[kind], max_size=counts[kind]))
           for kind, clip in (("image", IMAGES), ("video", VIDEOS), ("audio", AUDIOS)) if counts[kind]}  # fmt: skip
    if name == "alpaca":
        row |= {"instruction": question, "input": "", "output": answers[0], "history": [["q", answers[1]]]}
    elif name == "query_response":
        row |= {"query": question, "response": answers[0]}
    elif name in ("sharegpt", "llava"):
        call = json.dumps(draw(CALLS))
        turns = [("human", question), ("gpt", answers[0]), ("function_call", call), ("observation", "1"), ("gpt", "b")]
        row["conversations"] = [{"from": role, "value": text} for role, text in turns]
        if name == "llava" and counts["image"] == 1 and draw(st.booleans()):
            row["image"] = row.pop("images")[0]
    else:
        calls = [json.dumps(draw(CALLS)) for _ in range(draw(st.integers(0, 2)))]
        if calls and draw(st.booleans()):
            calls = ["first" + "then".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls) + "last"]
        row["messages"] = [
            {"role": "user", "content": question, "loss": draw(WEIGHTS)},
            {"role": "assistant", "content": answers[0], "loss_scale": draw(WEIGHTS)},
            *({"role": "tool_call", "content": call, "loss_scale": draw(WEIGHTS)} for call in calls),
            {"role": "tool_response", "content": answers[1]},
            {"role": "assistant", "content": "done", "loss": draw(WEIGHTS), **draw(SPEECH)},
        ]
    return row


SPEECH = st.just({}) | st.fixed_dictionaries(
    {"speech": st.sampled_from([[[1, 2, 3], [4, 5, 6]], "media/a.wav", "data:;base64,k05VTVBZ"])},
    optional={"speaker": st.just("Ethan")},
)


@st.composite
def typed_rows(draw: st.DrawFn, name: str) -> dict:
    """A row whose content is typed blocks, OpenAI's or Anthropic's."""
    text = TEXTS.map(lambda words: {"type": "text", "text": words})
    media = st.one_of(
        *(clip.map(lambda item, kind=kind: {"type": kind, kind: item})
          for kind, clip in (("image", IMAGES), ("video", VIDEOS), ("audio", AUDIOS)))
    )  # fmt: skip
    asked = draw(st.lists(text | media, min_size=1, max_size=4))
    if name == "anthropic":
        uses = CALLS.map(lambda call: {"type": "tool_use", "name": call["name"], "input": call["arguments"]})
        thoughts = TEXTS.map(lambda words: {"type": "thinking", "thinking": words})
        said = draw(st.lists(text | uses | thoughts, min_size=1, max_size=4))
        results = [{"type": "tool_result", "content": [draw(text)]}, *asked]
        turns = [("user", asked), ("assistant", said), ("user", results), ("assistant", "yes")]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    answer = {"role": "assistant", "content": draw(st.none() | TEXTS | st.lists(text, max_size=2))}
    if draw(st.booleans()):
        answer["reasoning_content"] = draw(TEXTS | st.just(""))
    if draw(st.booleans()):
        answer["tool_calls"] = [{"id": "1", "type": "function", "function": call} for call in draw(st.lists(CALLS))]
    return {"messages": [{"role": "user", "content": asked, "loss": draw(WEIGHTS)}, answer,
                         {"role": "tool", "tool_call_id": "1", "content": {"temp": 21}},
                         {"role": "assistant", "content": draw(TEXTS), "loss": draw(WEIGHTS)}]}  # fmt: skip


@st.composite
def rows_of(draw: st.DrawFn, name: str) -> dict:
    row = draw(typed_rows(name) if name in ("openai", "anthropic") else rows_with_placeholders(name))
    common = {"id": draw(st.none() | st.sampled_from(["x", 7])), "weight": draw(st.none() | st.just(0.5))}
    common["tools"] = draw(
        st.none() | st.lists(st.fixed_dictionaries({"name": st.just("f")}, optional={"x": ARGUMENTS}))
    )
    common["system"] = draw(st.none() | WORDS)
    if name != "alpaca" and draw(st.booleans()):
        common["use_audio_in_video"] = draw(st.booleans())
    return {**row, **{key: value for key, value in common.items() if value is not None}}


def read(row: dict, file: Path, config: DataConfig) -> Conversation:
    return replace(parse_row(row, file=str(file), line=1, options=config), source="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    (folder / "media").mkdir()
    for name in ("a.png", "b #1.png", "a.wav", "a.mp4"):
        (folder / "media" / name).write_bytes(b"x")
    (folder / "below").mkdir()
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_a_converted_row_reads_back_as_its_source(folder: Path, name: str) -> None:
    num_compared = 0

    @settings(deadline=None, max_examples=40)
    @given(rows_of(name), st.sampled_from(["", "below"]))
    def check(row: dict, target: str) -> None:
        nonlocal num_compared
        source = folder / "rows.json"
        try:
            sources = [read(row, source, replace(config, format=name)) for config in CONFIGS]
        except SampleError:
            return
        written = json.loads(
            json.dumps(convert_row(row, str(source), 1, replace(ANYWHERE, format=name), InFolder(folder / target)))
        )
        wide = {"media_dir": None if not target else str(folder / target), "allow_outside_media_dir": True}
        for config, before in zip(CONFIGS, sources, strict=True):
            assert read(written, folder / target / "new.jsonl", replace(config, **wide)) == before
        num_compared += 1

    check()
    assert num_compared > 20


def test_media_are_found_from_the_new_file_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A."}]}
    (folder / "rows.json").write_text(json.dumps([row, {**row, "image": "gone.png"}]))
    for target, path in ((folder, "media/a.png"), (tmp_path, str(folder / "media" / "a.png"))):
        num_written, problems, num_outside = convert_file(
            "llava", folder / "rows.json", target / "new.jsonl", [f"data.media_dir={folder / 'media'}"]
        )
        assert (num_written, len(problems), num_outside) == (1, 1, target == tmp_path)
        assert "rows.json:1" in problems[0]
        assert "gone.png does not exist" in problems[0]
        (block, _) = json.loads((target / "new.jsonl").read_text())["messages"][0]["content"]
        assert block == {"type": "image", "image": path}


def test_the_recording_of_codes_is_found_from_the_new_file(folder: Path, tmp_path: Path) -> None:
    """Or its name is, where it is not there: only `check` looks for it."""
    for name in ("media/a.wav", "media/gone.wav"):
        spoken = {"role": "assistant", "content": "A.", "speech": [[1, 2]], "recording": name}
        row = {"messages": [{"role": "user", "content": "?"}, spoken]}
        for target, path in ((folder, name), (tmp_path, str(folder / name))):
            place = InFolder(target)
            written = convert_row(row, str(folder / "rows.json"), 1, ANYWHERE, place)
            assert written["messages"][1] == {**spoken, "recording": path}
            assert not place.outside  # of media, which training reads


def test_plain_words_stay_plain(folder: Path) -> None:
    row = {"query": "Where?", "response": "There.", "system": "Be brief."}
    written = convert_row(row, "rows.json", 3, ANYWHERE, InFolder(folder))
    said = [("system", "Be brief."), ("user", "Where?"), ("assistant", "There.")]
    assert written == {"id": "rows.json:3", "messages": [{"role": role, "content": words} for role, words in said]}


def test_nothing_is_overwritten_and_formats_are_named(folder: Path) -> None:
    (folder / "here.json").write_text("[]")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        convert_file("llava", folder / "here.json", folder / "here.json")
    with pytest.raises(ValueError, match=r"unknown format 'lava'; did you mean llava\?"):
        convert_file("lava", folder / "here.json", folder / "out.jsonl")


def test_rows_of_another_format_leave_no_file_behind(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"query": "q", "response": "r"}\n')
    out = tmp_path / "new" / "out.jsonl"
    with pytest.raises(ValueError, match=r"none of the 1 rows can be written: .*rows\.jsonl:1: conversations: "):
        convert_file("llava", tmp_path / "rows.jsonl", out)
    assert convert_file("query_response", tmp_path / "rows.jsonl", out)[0] == 1
