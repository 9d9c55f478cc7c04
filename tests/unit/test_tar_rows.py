"""Tar shards of every layout read as the rows that they hold, and rows written as shards come back unchanged."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pickle
import re
import sqlite3
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.config import DataConfig, DataSource
from omniloom.data.formats import describe_format, parse_row
from omniloom.data.plain_pickle import read_plain_pickle
from omniloom.data.sources import open_sources
from omniloom.data.speech import with_codes
from omniloom.data.tar_rows import sample_row
from omniloom.tools.convert import convert_file
from omniloom.tools.score import score_rows
from omniloom.tools.tiny import make_tiny
from omniloom.types import Conversation, SampleError, Speech
from tests.media_rows import write_media_rows

JPEG, MP3 = b"\xff\xd8\xff picture", b"ID3 sound"
ASKED = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a cat"}]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def conversations(path: str | Path, part: str | None = None, **options: Any) -> list[Conversation]:
    data = DataConfig(**options)
    rows = open_sources((DataSource(path=str(path), part=part),), data)
    rows = pickle.loads(pickle.dumps(rows))
    assert len(pickle.dumps(rows)) < 1000
    return [
        parse_row(row, file=file, line=line, options=data)
        for row, file, line in (rows.read_row(row) for row in range(len(rows)))
    ]


def media_of(conversation: Conversation) -> list[tuple[str, Any]]:
    found = []
    for part in (part for turn in conversation.turns for part in turn.parts):
        if part.media is not None:
            found.append((part.kind, part.media.data or part.media.frames))
    return found


def test_samples_of_pai_megatron_patch_and_data_juicer(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "<image><video>and<audio>"}, {"role": "assistant", "content": "yes"}]
    media = [
        ("jpgs", pickle.dumps([JPEG])),
        ("mp4s", pickle.dumps([[JPEG, JPEG + b"2", JPEG + b"3", JPEG + b"4"]])),
        ("mp3s", pickle.dumps((MP3,))),
    ]
    rows = {"patch": {"conversations": said, "second_per_grid_ts": [0.5]}, "juicer": said}
    members = [(f"{key}.json", json.dumps(row).encode()) for key, row in rows.items()]
    members = [each for one in members for each in [one, *((f"{one[0][:-5]}.{name}", data) for name, data in media)]]
    path = write_tar(tmp_path / "pretrain-0.tar", members)
    patch, juicer = conversations(path)
    assert [one.id for one in (patch, juicer)] == ["patch", "juicer"]
    for one in (patch, juicer):
        (image, video, audio) = media_of(one)
        assert (image, audio) == (("image", JPEG), ("audio", MP3))
        assert len(video[1]) == 4
    rates = [part.media.options.fps for one in (patch, juicer) for part in one.turns[0].parts if part.kind == "video"]
    assert rates == [4.0, 2.0]  # two frames in half a second; the run's own
    assert juicer.source == f"{path}:2"
    assert "PARTS" not in describe_format(open_sources((path,)).read_row(0)[0], DataConfig()).upper()


def test_plain_parts_captions_and_names_that_a_row_calls_its_files(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("sub/0.jpg", JPEG), ("sub/0.txt", b"a cat"), ("sub/0.json", b'{"width": 3}'),
            ("sub/1.json", json.dumps({"messages": ASKED, "id": "own"}).encode()), ("sub/1.png", b"\x89PNG"),
            ("sub/2.wav", b"RIFF"), ("sub/2.mp3", MP3), ("sub/2.json", json.dumps({"response": "two"}).encode()),
            ("__meta__/x.json", b"{}"), ("nothing", b""),
            ("sub/3.b.jpg", b"B"), ("sub/3.a.jpg", b"A"),
            ("sub/3.json", json.dumps({"messages": ASKED, "images": ["a.jpg"]}).encode()),
            ("sub/4.0.jpg", b"0"), ("sub/4.1.jpg", b"1"),
            ("sub/4.json", json.dumps({"query": "<image><image>?", "response": "4"}).encode()),
        ],
    )  # fmt: skip
    found = conversations(path)
    assert [one.id for one in found] == ["sub/0", "own", "sub/2", "sub/3", "sub/4"]
    assert media_of(found[0]) == [("image", JPEG)]
    assert [part.text for part in found[0].turns[1].parts] == ["a cat"]
    assert media_of(found[2]) == [("audio", b"RIFF"), ("audio", MP3)]
    assert media_of(found[3]) == [("image", b"A")]
    assert media_of(found[4]) == [("image", b"0"), ("image", b"1")]


def test_what_a_row_names_is_not_taken_twice(tmp_path: Path) -> None:
    asked = {"role": "user", "content": [{"type": "image", "image": "a.jpg"}]}
    row = {"messages": [asked, ASKED[1]]}
    path = write_tar(tmp_path / "a.tar", [("0.a.jpg", b"A"), ("0.JSON", json.dumps(row).encode())])
    assert media_of(conversations(path)[0]) == [("image", b"A")]


@pytest.mark.parametrize("called", ["{}.png", "7.{}.png", "sub/7.{}.png"])
def test_what_content_calls_is_not_taken_twice_however_it_is_called(tmp_path: Path, called: str) -> None:
    blocks = [{"type": "image", "image": called.format(number)} for number in (1, 0)]
    row = [{"role": "user", "content": [*blocks, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "r"}]
    members = [("sub/7.0.png", b"\x890"), ("sub/7.1.png", b"\x891"), ("sub/7.json", json.dumps(row).encode())]
    (found,) = conversations(write_tar(tmp_path / "a.tar", members))
    assert media_of(found) == [("image", b"\x891"), ("image", b"\x890")]


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({"images": ["1.png", "0.jpg"]}, [b"\x891", b"\xff0"]),  # in another order than the tar's
        ({"images": ["sub/7.1.png"]}, [b"\x891"]),
        ({"image": "7.1.png"}, [b"\x891"]),
        ({"image": "train2017/7.jpg"}, [b"\xff0", b"\x891"]),  # of the data set before it was packed
        ({"images": ["train2017/7.jpg", "b.png"]}, [b"\xff0", b"\x891"]),
        ({"file_name": "7.0.jpg"}, [b"\xff0", b"\x891"]),
    ],
)
def test_a_list_of_the_row_says_which_files_of_its_sample(tmp_path: Path, listed, expected) -> None:
    row = {"query": "<image>" * len(expected), "response": "r", **listed}
    members = [("sub/7.0.jpg", b"\xff0"), ("sub/7.1.png", b"\x891"), ("sub/7.json", json.dumps(row).encode())]
    (found,) = conversations(write_tar(tmp_path / "a.tar", members))
    assert media_of(found) == [("image", data) for data in expected]


@pytest.mark.parametrize("members", [[("0.json", b"{")], [("0.json", b"7")], [("0.jpgs", pickle.dumps({"a": 1}))]])
def test_a_broken_sample_costs_only_itself(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    rows = open_sources((write_tar(tmp_path / "a.tar", [*members, ("1.json", b'{"a": 1}')]),))
    with pytest.raises(SampleError):
        rows.read_row(0)
    assert rows.read_row(1)[0]["a"] == 1


def test_links_and_files_that_are_there_twice_are_told(tmp_path: Path) -> None:
    """Left out in silence, a link's picture would be missed as if the row had none."""
    row = json.dumps({"messages": ASKED}).encode()
    write_tar(tmp_path / "a.tar", [("0.jpg", JPEG), ("0.json", row), ("1.jpg", JPEG), ("1.jpg", b"other")])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, kind in (("2.jpg", tarfile.LNKTYPE), ("3.jpg", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "0.jpg"
            tar.addfile(link)
            member = tarfile.TarInfo(name.replace("jpg", "json"))
            member.size = len(row)
            tar.addfile(member, io.BytesIO(row))
    rows = open_sources((str(tmp_path / "a.tar"),))
    assert rows.read_row(0)[0]["images"] == [JPEG]
    faults = ["", "jpg: is there twice in the sample 1", "jpg: is a link to 0.jpg; pack the files themselves"]
    for number, fault in ((1, faults[1]), (2, faults[2]), (3, faults[2])):
        with pytest.raises(SampleError, match=re.escape(fault)):
            rows.read_row(number)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_of_any_name_belong_to_their_samples(tmp_path: Path, form: int) -> None:
    keys = ["d/" * 60 + "k" * 120, "ключ", "/data/a", "./b", "../c"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in [
            (f"{key}.{part}", data) for key in keys for part, data in (("jpg", JPEG), ("txt", b"a cat"))
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = conversations(tmp_path / "a.tar")
    assert [one.id for one in found] == keys
    assert all(media_of(one) == [("image", JPEG)] for one in found)


# ---------------------------------------------------------------------------------------- Energon's folders


def write_energon(folder: Path, *, dataset: dict[str, Any], split: dict[str, Any]) -> Path:
    (folder / ".nv-meta").mkdir(parents=True)
    names = [f"d{number}.tar" for number in range(4)]
    for name in names:
        write_tar(
            folder / name,
            [(f"{name[1]}{n}.{part}", data) for n in range(2) for part, data in
             (("jpg", JPEG), ("json", b'{"ask": {"q": "<image>?"}, "say": ["one", "two"]}'))],
        )  # fmt: skip
    (folder / ".nv-meta" / ".info.json").write_text(json.dumps({"shard_counts": dict.fromkeys(names, 2)}))
    (folder / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump(split))
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(dataset))
    return folder


def test_an_energon_folder_gives_the_part_and_the_fields_that_it_declares(tmp_path: Path) -> None:
    split = {"split_parts": {"train": ["d{1..2}.tar"], "val": ["d{0,3}.tar"]}, "exclude": ["d3.tar", "d2.tar/20"]}
    fields = {"image": "png,jpg", "context": "json[ask][q]", "answers": "json[say]"}
    dataset = {"__module__": "megatron.energon", "__class__": "VQASample", "field_map": fields}
    folder = write_energon(tmp_path / "d", dataset=dataset, split=split)
    found = conversations(folder)
    assert [one.id for one in found] == ["10", "11", "21"]
    assert [part.text for part in found[0].turns[1].parts] == ["one"]
    assert media_of(found[0]) == [("image", JPEG)]
    assert [one.id for one in conversations(folder, part="val")] == ["00", "01"]
    with pytest.raises(ValueError, match="has the parts train, val, not test"):
        conversations(folder, part="test")
    with pytest.raises(ValueError, match="has the parts train, val, expected one"):
        open_sources((str(folder),), part=None)


def test_an_index_beside_a_shard_is_read_and_one_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.json", json.dumps({"n": n}).encode()) for n in range(3)])
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
    np.array([*offsets[1:], 3 * 1024], dtype="<i8").tofile(f"{path}.idx")  # without the first sample
    assert [row["n"] for row, _, _ in map(open_sources((path,)).read_row, range(2))] == [1, 2]
    np.array([*offsets, 1 << 20], dtype="<i8").tofile(f"{path}.idx")
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match=r"a.tar.idx does not fit .*a.tar of 10240 bytes; remove it"):
        open_sources((path,))


@pytest.mark.parametrize("num_samples", [2, 4])
def test_an_index_of_a_shard_that_has_since_lost_or_gained_samples_is_refused(tmp_path: Path, num_samples: int) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.json", b"{}") for n in range(num_samples)])
    np.arange(0, 4 * 1024, 1024, dtype="<i8").tofile(f"{path}.idx")  # of three samples
    with pytest.raises(ValueError, match=r"a.tar.idx does not fit"):
        open_sources((path,))


def test_a_folder_that_energon_prepared_is_read_by_its_parts(tmp_path: Path) -> None:
    from click.testing import CliRunner
    from megatron.energon.tools.prepare import command

    folder = tmp_path / "größer als"
    (folder / "sub").mkdir(parents=True)
    for n in range(10):
        members = [(f"{n}_{i}.json", json.dumps({"n": n}).encode()) for i in range(2)]
        write_tar(folder / ("sub" if n > 4 else "") / f"s{n:02}.tar", members)
    given = "--non-interactive --split-ratio 8,1,1 --sample-type CrudeWebdataset --num-workers 1 --no-progress"
    done = CliRunner().invoke(command, [*given.split(), str(folder)])
    assert done.exit_code == 0, done.output
    for part, shards in (("train", range(8)), ("val", [8]), ("test", [9])):
        rows = open_sources((DataSource(path=str(folder), part=part),), DataConfig(scratch=str(tmp_path / "scratch")))
        assert [rows.read_row(row)[0]["n"] for row in range(len(rows))] == [n for n in shards for _ in range(2)]


def test_a_compressed_or_broken_tar_is_one_clear_error(tmp_path: Path) -> None:
    import gzip

    plain = Path(write_tar(tmp_path / "a.tar", [("0.json", b"{}")]))
    (tmp_path / "z.tar").write_bytes(gzip.compress(plain.read_bytes()))
    for content, words in ((gzip.compress(plain.read_bytes()), "must not be compressed"), (b"x" * 2000, "not a tar")):
        (tmp_path / "z.tar").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            open_sources((str(tmp_path / "z.tar"),))
    write_tar(tmp_path / "empty.tar", [("README", b"")])
    with pytest.raises(ValueError, match="has no samples"):
        open_sources((str(tmp_path / "empty.tar"),))


# ---------------------------------------------------------------------------------------- pickles


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/omniloom-was-here",))


def test_a_pickle_gives_plain_lists_and_nothing_else() -> None:
    for value in ([b"a", [b"b", b"b"]], (1, 2.5, "text", None, True), [[b"x" * 70_000] * 3], -(1 << 80)):
        for protocol in (4, 5):
            assert read_plain_pickle(pickle.dumps(value, protocol)) == value
    bombs = [pickle.dumps(value) for value in (Evil(), {"a": 1}, {1}, np.zeros(3), Path("a"), slice(1), os.system)]
    bombs += [
        b"r\xff\xff\xff\x7f.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"]r\xff\xff\xff\x0fa.",
        b"",
        b"\x80\x04",
        b"\x82\x01.",
        b"K\x01Na.",  # appends to a number
    ]
    for bomb in bombs:
        with pytest.raises(ValueError):
            read_plain_pickle(bomb)


def fuzz_samples(num_cases: int) -> int:
    """Read so many damaged samples and pickles. Returns how many were read."""
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w") as tar:
        for name, data in (
            ("a.json", json.dumps(ASKED).encode()),
            ("a.jpgs", pickle.dumps([JPEG, JPEG])),
            ("a.txt", b"t"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    whole = good.getvalue()

    cases: list[int] = []

    @settings(deadline=None, max_examples=num_cases, database=None)
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=9)), max_size=5),
           st.integers(0, len(whole)), st.none() | st.binary(max_size=200))  # fmt: skip
    def check(edits: list[tuple[int, bytes]], length: int, pickled: bytes | None) -> None:
        cases.append(length)
        data = bytearray(whole)
        for start, new in edits:
            data[start : start + len(new)] = new
        with contextlib.suppress(SampleError):
            read = parse_row(sample_row(bytes(data[:length])), file="a.tar", line=1, options=DataConfig())
            assert read.turns
        if pickled is not None:
            with contextlib.suppress(ValueError):
                value = read_plain_pickle(pickled)
                assert value is None or isinstance(value, list | tuple | bytes | bytearray | str | bool | int | float)

    check()
    return len(cases)


def test_damaged_samples_and_pickles_are_bad_rows_and_nothing_else() -> None:
    assert fuzz_samples(100) >= 100


@pytest.mark.full
def test_damaged_samples_and_pickles_at_length() -> None:
    assert fuzz_samples(100_000) >= 100_000


# ---------------------------------------------------------------------------------------- written shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("shards")
    rows = write_media_rows(folder, hears=True)
    lines = json.loads(rows.read_text())
    asked = {"role": "user", "content": [{"type": "text", "text": "Is <image> a tag?"}]}
    lines.append({"messages": [asked, {"role": "assistant", "content": "No."}], "id": "words", "weight": 0.5})
    lines.append({"query": "<video>", "response": "Frames.", "videos": [["0.png"] * 4]})
    rows.write_text(json.dumps(lines))
    convert_file("webdataset", rows, folder / "written")
    return rows, folder / "written"


def test_written_shards_score_as_their_source(shards: tuple[Path, Path], tmp_path: Path) -> None:
    model = make_tiny("qwen2_5_omni", tmp_path / "model")
    words = ("model.dtype=float32", "data.workers=0", "data.pack_tokens=2048")
    scores, bad = score_rows(model, shards[0], words)
    assert len(scores) == 8
    assert not bad
    assert score_rows(model, shards[1], words) == (scores, [])


def test_speech_stays_with_its_answer_in_written_shards(tmp_path: Path) -> None:
    codes = np.array([[1, 2, 3], [4, 5, 6]])
    np.save(tmp_path / "b.npy", codes)
    lines = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A.", "speech": speech}]}
        for speech in (codes.tolist(), "b.npy")
    ]
    (tmp_path / "rows.json").write_text(json.dumps(lines))
    convert_file("webdataset", tmp_path / "rows.json", tmp_path / "written")
    shards = open_sources((str(tmp_path / "written"),))
    for number in range(2):
        row, file, line = shards.read_row(number)
        answer = with_codes(parse_row(row, file=file, line=line, options=DataConfig()), "").turns[1]
        assert answer.speech == Speech(codes=((1, 2, 3), (4, 5, 6)))


def test_the_same_rows_are_the_same_samples_whatever_they_are_stored_in(tmp_path: Path) -> None:
    import gzip

    import pyarrow
    import pyarrow.parquet

    png = base64.b64encode(b"\x89PNG " + bytes(90)).decode()
    rows = [{"id": str(n), "messages": ASKED, "images": [f"data:image/png;base64,{png}"]} for n in range(7)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "rows.jsonl").write_bytes(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=3)
    convert_file("webdataset", tmp_path / "rows.parquet", tmp_path / "shards")
    plain = [replace(one, source="") for one in conversations(tmp_path / "rows.json")]
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet", "shards", "shards/*.tar"):
        assert [replace(one, source="") for one in conversations(tmp_path / name)] == plain, name


def test_media_are_stored_unchanged_and_the_index_says_where(shards: tuple[Path, Path]) -> None:
    rows, written = shards
    tar = (written / "000000.tar").read_bytes()
    index = sqlite3.connect(written / ".nv-meta" / "index.sqlite")
    parts = index.execute("SELECT part_name, content_byte_offset, content_byte_size FROM sample_parts").fetchall()
    stored = {tar[start : start + size] for name, start, size in parts if name != "json"}
    assert stored == {file.read_bytes() for file in rows.parent.iterdir() if file.suffix in (".png", ".mp4", ".wav")}
    samples = index.execute("SELECT byte_offset, byte_size FROM samples ORDER BY sample_index").fetchall()
    offsets = np.fromfile(written / "000000.tar.idx", dtype="<i8").tolist()
    assert offsets == [start for start, _ in samples] + [sum(samples[-1])]
    index.close()
    (written / "000000.tar.idx").rename(written / "aside")
    scanned = [sample["id"] for sample, _, _ in map(open_sources((str(written / "000000.tar"),)).read_row, range(8))]
    (written / "aside").rename(written / "000000.tar.idx")
    assert scanned == [sample["id"] for sample, _, _ in map(open_sources((str(written),)).read_row, range(8))]


def test_a_row_without_its_media_is_left_out_and_nothing_is_left_of_nothing(tmp_path: Path) -> None:
    rows = [{"messages": ASKED, "images": ["gone.png"]}, {"query": "q", "response": "r"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    num_written, problems, _ = convert_file("webdataset", tmp_path / "rows.json", tmp_path / "out")
    assert (num_written, len(problems)) == (1, 1)
    assert "gone.png" in problems[0]
    (tmp_path / "rows.json").write_text(json.dumps(rows[:1]))
    assert convert_file("webdataset", tmp_path / "rows.json", tmp_path / "none")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.json"]


def dict_of(sample: Any) -> dict[str, Any]:
    return dict(sample)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # its loader's, where there is no accelerator
def test_megatron_energon_reads_what_is_written(shards: tuple[Path, Path]) -> None:
    import megatron.energon as energon

    dataset = energon.get_train_dataset(
        str(shards[1]), worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0), batch_size=None,
        shuffle_buffer_size=None, max_samples_per_sequence=None, repeat=False,
        task_encoder=type("Plain", (energon.DefaultTaskEncoder,), {
            "decoder": None, "cookers": [energon.Cooker(energon.stateless(dict_of))],
        })(),
    )  # fmt: skip
    read = {sample["__key__"]: sample for sample in energon.get_loader(dataset)}
    rows = open_sources((str(shards[1]),))
    assert len(read) == len(rows)
    for row in range(len(rows)):
        ours = rows.read_row(row)[0]
        theirs = read[f"{row:09d}"]
        assert json.loads(theirs["json"])["id"] == ours["id"]
        plain = {name: data for name, data in ours["__parts__"].items() if not name.startswith(f"{row:09d}.")}
        assert plain == {name: theirs[name] for name in theirs if not name.startswith("__")}
