"""Every row of every kind of file comes back as written, by row number, in any process."""

import csv
import io
import json
import os
import pickle
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.config import DataConfig, DataSource
from omniloom.data import columnar, text_rows
from omniloom.data.formats import describe_format, parse_row
from omniloom.data.sources import open_sources
from omniloom.options import FieldNames
from omniloom.types import SampleError

ROWS = [{"id": str(index), "text": text} for index, text in enumerate(["a", "äöü", "中文\n二", "😀", "]},{"])]


def write_kinds(folder, rows):
    import pyarrow
    import pyarrow.parquet

    paths = {}
    for name, text in {
        "compact.json": json.dumps(rows),
        "pretty.json": json.dumps(rows, indent=2, ensure_ascii=False),
        "rows.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "spaced.jsonl": "\n\n".join(json.dumps(row) for row in rows) + "\r\n\n",
    }.items():
        paths[name] = folder / name
        paths[name].write_bytes(text.encode())
        paths["bom_" + name] = folder / ("bom_" + name)
        paths["bom_" + name].write_bytes(b"\xef\xbb\xbf" + text.encode())
    table = pyarrow.Table.from_pylist(rows)
    paths["parquet"] = folder / "rows.parquet"
    pyarrow.parquet.write_table(table, paths["parquet"], row_group_size=2)
    paths["arrow"] = folder / "rows.arrow"
    with pyarrow.OSFile(str(paths["arrow"]), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    paths["stream"] = folder / "stream.arrow"
    with pyarrow.OSFile(str(paths["stream"]), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return {name: str(path) for name, path in paths.items()}


def test_every_kind_of_file_gives_the_same_rows_in_any_order_and_process(tmp_path):
    for name, path in write_kinds(tmp_path, ROWS).items():
        source = open_sources((path,))
        source.read_row(0)  # opened before it is pickled
        source = pickle.loads(pickle.dumps(source))
        assert len(source) == len(ROWS), name
        for index in (3, 0, 4, 1, 2):
            row, file, line = source.read_row(index)
            assert row == ROWS[index], name
            assert file == path
            assert (file, line) == source.locate(index)


def test_a_pickled_source_does_not_carry_the_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "x" * 10_000} for _ in range(100)]))
    assert len(pickle.dumps(open_sources((str(path),)))) < 10_000


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.none()), min_size=1, max_size=6),
    indent=st.none() | st.integers(0, 3),
    ascii_only=st.booleans(),
)
def test_json_arrays_round_trip_with_true_line_numbers(tmp_path_factory, rows, indent, ascii_only):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", errors="replace"))
    source = open_sources((str(path),))
    assert len(source) == len(rows)
    lines = path.read_bytes().split(b"\n")
    for index in range(len(rows)):
        row, _, line = source.read_row(index)
        written = json.loads(json.dumps(rows[index], ensure_ascii=False).encode("utf-8", errors="replace"))
        assert row == written
        assert lines[line - 1].lstrip().startswith(b"{") or b"{" in lines[line - 1]


def test_rows_that_share_a_line_are_told_apart_by_their_location(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": 2}, {"a": 3},\n{"a": 4}]')
    source = open_sources((str(path),))
    places = ["{}:{}".format(*pickle.loads(pickle.dumps(source.locate(row)))) for row in range(4)]
    assert places == [f"{path}:1 (row 1)", f"{path}:1 (row 2)", f"{path}:1 (row 3)", f"{path}:2"]
    assert json.dumps([source.read_row(row)[2] for row in range(4)]) == "[1, 1, 1, 2]"
    assert "{}:{}".format(*open_sources((str(path),), DataConfig(max_samples=1)).locate(0)) == f"{path}:1"


def test_lines_are_counted_from_one_and_blank_lines_count(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n\n{"a": 2}\n')
    source = open_sources((str(path),))
    assert [source.read_row(row)[2] for row in range(len(source))] == [1, 4]
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1},\n\n {"a": \n2}, {"a": 3}\n]\n')
    source = open_sources((str(path),))
    assert [source.read_row(row)[2] for row in range(len(source))] == [2, 4, 5]


def test_a_line_that_a_crash_left_empty_costs_itself_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n' + b"\x00" * 64 + b'\n{"n": 2}\n')
    rows = open_sources((str(tmp_path / "a.jsonl"),))
    assert (rows.read_row(0)[0], rows.read_row(2)[0]) == ({"n": 1}, {"n": 2})
    with pytest.raises(SampleError, match="row: not UTF-8"):
        rows.read_row(1)


def test_files_chain_and_max_samples_counts_per_file(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"file": "{name}", "n": {n}}}\n' for n in range(5)))
    paths = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    source = open_sources(paths, DataConfig(max_samples=2))
    assert [source.read_row(row)[0] for row in range(len(source))] == [
        {"file": name, "n": n} for name in ("a.jsonl", "b.jsonl") for n in range(2)
    ]
    assert len(open_sources(paths)) == 10


def test_max_samples_applies_to_every_kind_of_file(tmp_path):
    for name, path in write_kinds(tmp_path, ROWS).items():
        source = open_sources((path,), DataConfig(max_samples=3))
        assert len(source) == 3, name
        assert [source.read_row(row)[0] for row in range(3)] == ROWS[:3], name


def test_a_split_holds_out_the_same_rows_in_every_process(tmp_path):
    for name, count in (("a.jsonl", 30), ("b.jsonl", 10)):
        (tmp_path / name).write_text("".join(f'{{"n": "{name[0]}{n}"}}\n' for n in range(count)))
    paths = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    sides = open_sources(paths).split((0.2, 0.2), seed=1)
    again = [pickle.loads(pickle.dumps(side)) for side in open_sources(paths).split((0.2, 0.2), seed=1)]
    rows = [[side.read_row(row)[0]["n"] for row in range(len(side))] for side in sides]
    assert rows == [[side.read_row(row)[0]["n"] for row in range(len(side))] for side in again]
    assert (len(rows[0]), len(rows[1])) == (32, 8)
    assert sorted(rows[0] + rows[1]) == sorted([f"a{n}" for n in range(30)] + [f"b{n}" for n in range(10)])
    assert sides[0].sizes == (30 - sides[1].sizes[0], 10 - sides[1].sizes[1])
    assert sides[0].locate(0)[0] == paths[0]
    assert sides[0].fingerprint == again[0].fingerprint != open_sources(paths).split((0.2, 0.2), seed=2)[0].fingerprint


def test_no_source_travels_by_value_however_many_rows_it_has(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n' * 50_000)
    for rows in (open_sources((str(path),)), *open_sources((str(path),)).split((0.02,), seed=0)):
        rows.read_row(7)
        assert len(pickle.dumps(rows)) < 1000


def test_an_index_is_made_once_and_anew_where_the_file_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    os.utime(path, (1, 1))  # long ago
    made = []
    whole = text_rows._index_lines
    monkeypatch.setattr(text_rows, "_index_lines", lambda *asked: made.append(asked) or whole(*asked))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prints = [open_sources((str(path),)).fingerprint for _ in range(3)]
    assert (len(made), len(set(prints))) == (1, 1)
    assert len(open_sources((str(path),), DataConfig(max_samples=1))) == 1
    path.write_text('{"n": 1}\n{"n": 3}\n')  # of the same size
    os.utime(path, (2, 2))
    source = open_sources((str(path),))
    assert source.fingerprint != prints[0]
    assert source.read_row(1)[0] == {"n": 3}
    path.write_text('{"n": 1}\n{"n": 4}\n')  # just now: a second change could have the same time stamp
    assert len({open_sources((str(path),)).fingerprint for _ in range(2)}) == 1
    assert len(made) == 5


def test_a_broken_line_costs_only_its_row(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'{"n": 0}', b'{"n": 1', b'{"n": "\xff"}', b"[1, 2]", b"7", b"[" * 100_000, b'{"n": 6}']
    path.write_bytes(b"\n".join(lines))
    source = open_sources((str(path),))
    assert len(source) == 7
    assert source.read_row(0)[0] == {"n": 0}
    assert source.read_row(6)[0] == {"n": 6}
    for row, words in {1: "not JSON", 2: "UTF-8", 3: "object", 4: "object", 5: "nested|not JSON"}.items():
        assert source.locate(row) == (str(path), row + 1)
        with pytest.raises(SampleError, match=words):
            source.read_row(row)


@pytest.mark.parametrize("first", [b"null", b'"text"', b'er", "id": 0}', b"# a comment", b"\xfd\xfe\xff"])
def test_a_broken_first_line_costs_only_its_row_too(tmp_path, first):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(first + b'\n{"id": 1}\n{"id": 2}\n')
    rows = open_sources((str(path),))
    assert [rows.read_row(row)[0]["id"] for row in (1, 2)] == [1, 2]
    with pytest.raises(SampleError):
        rows.read_row(0)


def test_json_lines_of_bare_message_lists_are_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "a"}]
    path.write_text("".join(json.dumps(messages) + "\n" for _ in range(3)))
    source = open_sources((str(path),))
    assert [source.read_row(row)[0] for row in range(len(source))] == [{"messages": messages}] * 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"a": 1},\n {"a": 2]', "line 2, column 9"),
        (b'[{"a": 1}\n{"a": 2}]', "line 2, column 1.*1 good rows"),
        (b'[{"a": 1}, ]', "column 12"),
        (b'[{"a": 1}] x', "after the array"),
        (b'[{"a": 1}', "expected ',' or ']'"),
        (b"[]", "empty array"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "neither JSON"),
        (b"id,text\n1,a\n", "neither JSON"),
        (b'{\n "data": [\n  {"a": 1}\n ]\n}', "spread over lines"),
        ('[{"a": "ü"}]'.encode("latin-1"), "not UTF-8"),
        ('[{"a": 1}]'.encode("utf-16"), "is UTF-16 text, expected UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS.*run git lfs pull"),
        (b"PAR1 but not really", "Parquet"),
        (b"ARROW1 but not really", "Arrow"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path, content, words):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        open_sources((str(path),))
    assert str(path) in str(caught.value)


def test_packed_files_and_tables_give_the_rows_of_plain_ones(tmp_path):
    import gzip

    import pyarrow

    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    half = len(text) // 2
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text[:half]) + gzip.compress(text[half:]))  # two members
    with pyarrow.output_stream(str(tmp_path / "rows.jsonl.zst"), compression="zstd") as file:
        file.write(text)
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    for name in ("rows.jsonl.gz", "rows.jsonl.zst", "rows.json.gz"):
        source = pickle.loads(
            pickle.dumps(open_sources((str(tmp_path / name),), DataConfig(scratch=str(tmp_path / "s"))))
        )
        assert [source.read_row(row)[0] for row in range(len(source))] == ROWS, name
        assert source.locate(0)[0] == str(tmp_path / name)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text)[:40])
    with pytest.raises(ValueError, match=r"cannot unpack .*cut\.jsonl\.gz"):
        open_sources((str(tmp_path / "cut.jsonl.gz"),))


def test_a_table_of_recordings_and_their_words_is_a_data_set(tmp_path):
    cells = 'path,words,"a, b"\r\na.wav,"He said ""yes"",\nthen no",1\n\nb.wav,two,\n"c.wav",three\n'
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbf" + cells.encode())
    (tmp_path / "rows.tsv").write_text("path\twords\na.wav\tone, two\n")
    source = open_sources((str(tmp_path / "rows.csv"), str(tmp_path / "rows.tsv")))
    assert [source.locate(row)[1] for row in range(4)] == [2, 5, 6, 2]
    assert source.read_row(0)[0] == {"path": "a.wav", "words": 'He said "yes",\nthen no', "a, b": "1"}
    assert source.read_row(1)[0] == {"path": "b.wav", "words": "two"}
    with pytest.raises(SampleError, match="has 2 cells, expected 3"):
        source.read_row(2)
    row, file, line = source.read_row(3)
    options = DataConfig(attr=FieldNames(audios="path", response="words"))
    question, answer = parse_row(row, file=file, line=line, options=options).turns
    assert [part.media.path for part in question.parts] == [str(tmp_path / "a.wav")]
    assert answer.parts[0].text == "one, two"
    assert "read from path, words" in describe_format(row, options)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_tables_are_read_as_csv_reads_them_whatever_divides_their_cells(tmp_path, delimiter):
    cells = [
        ["query", "response"],
        ['5" tall', 'say "hi"'],
        ['x "y" z', "l1\nl2, l3; l4"],
        ['a""b', "c"],
        ['""', '","'],
    ]
    quoted = io.StringIO()
    csv.writer(quoted, delimiter=delimiter).writerows(cells)
    plain = "".join(delimiter.join(row) + "\n" for row in [cells[0], cells[1], cells[3]])  # quotes inside of cells
    for name, text in (("quoted.csv", quoted.getvalue()), ("plain.csv", plain)):
        (tmp_path / name).write_bytes(text.encode())
        source = open_sources((str(tmp_path / name),))
        found = [list(source.read_row(row)[0].values()) for row in range(len(source))]
        assert found == list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))[1:]


def test_a_quote_that_nothing_closes_and_a_column_named_twice_are_told(tmp_path):
    (tmp_path / "open.csv").write_text('query,response\na,b\n"c,d\ne,f\n')
    source = open_sources((str(tmp_path / "open.csv"),))
    assert source.read_row(0)[0] == {"query": "a", "response": "b"}
    with pytest.raises(SampleError, match="has"):
        source.read_row(1)
    (tmp_path / "twice.csv").write_text("query,query,response\na,b,c\n")
    with pytest.raises(ValueError, match=r"twice\.csv: two columns are named query; rename one"):
        open_sources((str(tmp_path / "twice.csv"),))


def test_a_table_says_lists_and_numbers_in_its_text(tmp_path):
    cells = ["messages,images,weight,use_audio_in_video"]
    turns = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "b"}]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([cells[0].split(","), [json.dumps(turns), '["a.png", "b.png"]', "0.5", "true"]])
    row, file, line = open_sources((str(tmp_path / "rows.csv"),)).read_row(0)
    conversation = parse_row(row, file=file, line=line, options=DataConfig())
    assert conversation.weight == 0.5
    assert [part.media.path[-5:] for part in conversation.turns[0].parts if part.media] == ["a.png", "b.png"]
    with pytest.raises(SampleError, match=r"weight: expected true, false or a number .* got half"):
        parse_row({**row, "weight": "half"}, file=file, line=line, options=DataConfig())


def test_of_a_plain_folder_with_parts_one_is_read(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "deep/dev"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / f"{name}.jsonl").write_text(f'{{"n": "{name}"}}\n')
    for part, count in ((None, 2), ("test", 1), ("validation", 1), ("val", 1)):
        assert len(open_sources((DataSource(path=str(tmp_path / "d"), part=part),))) == count, part
    with pytest.raises(ValueError, match="has the parts validation, test, train, expected one"):
        open_sources((str(tmp_path / "d"),), part=None)
    (tmp_path / "d" / "more.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"has the parts .* and more\.jsonl; name files by a pattern"):
        open_sources((str(tmp_path / "d"),))
    assert len(open_sources((str(tmp_path / "d" / "deep"),))) == 1  # a word alone names no parts


def test_folders_and_patterns_are_one_data_set(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    for number in (0, 1):
        (tmp_path / "p" / "deep").mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist([{"n": 3 * number + n} for n in range(3)])
        pyarrow.parquet.write_table(table, tmp_path / "p" / "deep" / f"{number}.parquet", row_group_size=2)
        (tmp_path / f"{number}.jsonl").write_text("".join(f'{{"n": {3 * number + n}}}\n' for n in range(3)))
    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_list([{"n": n} for n in range(6)])
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    both = datasets.DatasetDict({"train": saved, "test": saved.select(range(1))})
    both.save_to_disk(tmp_path / "both")
    for name in ("p", "p/*/*.parquet", "[01].jsonl", "saved", "both"):
        source = pickle.loads(pickle.dumps(open_sources((str(tmp_path / name),))))
        assert [source.read_row(row)[0]["n"] for row in range(len(source))] == list(range(6)), name
        assert len(open_sources((str(tmp_path / name),), DataConfig(max_samples=4))) == 4
    assert open_sources((str(tmp_path / "p"),)).locate(4) == (str(tmp_path / "p" / "deep" / "1.parquet"), 2)
    assert len(open_sources((DataSource(path=str(tmp_path / "both"), part="test"),))) == 1
    with pytest.raises(ValueError, match=r"has the parts train, test, expected one; name one: \{path: .*both, part: "):
        open_sources((str(tmp_path / "both"),), part=None)
    with pytest.raises(ValueError, match="no data file matches"):
        open_sources((str(tmp_path / "*.arrow"),))
    (tmp_path / "p" / "more.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="files of several kinds"):
        open_sources((str(tmp_path / "p"),))


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"no such data file: .*train.json; did you mean .*train\.jsonl"):
        open_sources((str(tmp_path / "train.json"),))
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "rows.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"is a directory.*it holds rows\.json; name a data file"):
        open_sources((str(tmp_path / "media"),))
    with pytest.raises(ValueError, match="does not exist"):
        open_sources((str(tmp_path / "no" / "train.json"),))
    with pytest.raises(ValueError, match="no data files"):
        open_sources(())


def test_the_fingerprint_follows_the_content_not_the_path(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        rows = ROWS if folder != "c" else [*ROWS[:-1], {"id": "4", "text": "other"}]
        write_kinds(tmp_path / folder, rows)
    for file in (tmp_path / "a").iterdir():
        prints = [open_sources((str(tmp_path / folder / file.name),)).fingerprint for folder in ("a", "b", "c")]
        assert prints[0] == prints[1], file.name
        assert prints[0] != prints[2], file.name
    both = [str(tmp_path / "a" / name) for name in ("compact.json", "rows.jsonl")]
    assert open_sources(tuple(both)).fingerprint != open_sources(tuple(both[::-1])).fingerprint


def test_rows_of_large_row_groups_are_read_in_small_batches(tmp_path, monkeypatch):
    """By its default pandas writes a million rows to a group, of which one row would cost the reading of all."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(columnar, "_LARGEST_GROUP", 50)
    monkeypatch.setattr(columnar, "_BATCH_ROWS", 8)
    words = pyarrow.array([f"text {n % 7}" for n in range(120)]).dictionary_encode()
    table = pyarrow.table({"n": list(range(120)), "words": words, "one": [{"a": n} for n in range(120)]})
    pyarrow.parquet.write_table(table, tmp_path / "large.parquet", row_group_size=60)
    pyarrow.parquet.write_table(table.slice(0, 40), tmp_path / "small.parquet")
    options = DataConfig(scratch=str(tmp_path / "scratch"))
    source = pickle.loads(pickle.dumps(open_sources((str(tmp_path / "*.parquet"),), options)))
    assert len(source) == 160
    for row in (0, 119, 61, 7, 8, 120, 159):
        found, file, line = source.read_row(row)
        number = row % 120
        assert found == {"n": number, "words": f"text {number % 7}", "one": {"a": number}}
        assert (file, line) == (str(tmp_path / ("large.parquet" if row < 120 else "small.parquet")), number + 1)
    assert source.parts[0]._group[1].num_rows == 40
    source.read_row(3)
    assert source.parts[0]._group[1].num_rows == 8


def test_a_parquet_row_keeps_bytes_and_drops_absent_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"images": [{"bytes": b"\x00\xff", "path": None}]}, {"text": "a"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=None), tmp_path / "a.parquet")
    table = pyarrow.table(
        {"images": [[{"bytes": b"\x00\xff", "path": None}], None], "text": pyarrow.array([None, "a"])}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = open_sources((str(tmp_path / "a.parquet"),))
    assert source.read_row(0)[0] == {"images": [{"bytes": b"\x00\xff"}]}
    assert source.read_row(1)[0] == {"text": "a"}


UNLIKE_TOOLS = [
    {
        "messages": [
            {"role": "user", "content": "w?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
        ],
        "tools": [{"name": name, "parameters": {"properties": {key: {"type": "string"} for key in arguments}}}],
        "images": images,
    }
    for name, arguments, images in (
        ("weather", {"city": "Paris", "days": [1, None]}, [{"path": "a.png", "max_pixels": 900}]),
        ("add", {"x": 1, "y": 2.5}, [{"path": "b.png"}]),
        ("now", {}, []),
    )
]


def test_columns_invent_no_keys_at_any_depth(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(UNLIKE_TOOLS), tmp_path / "rows.parquet")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(UNLIKE_TOOLS).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_list(UNLIKE_TOOLS, on_mixed_types="use_json").to_parquet(tmp_path / "json.parquet")
    for name in ("rows.parquet", "saved/data-00000-of-00001.arrow", "json.parquet"):
        source = open_sources((str(tmp_path / name),))
        assert [source.read_row(row)[0] for row in range(3)] == UNLIKE_TOOLS, name


def test_nulls_that_a_row_itself_has_are_kept(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    text = '{"name": "f", "arguments": {"x": null}}'
    table = pa.table(
        {
            "text": [text],
            "object": pa.ExtensionArray.from_storage(pa.json_(), pa.array([text])),
            "map": pa.array([[("k", None)]], pa.map_(pa.string(), pa.int8())),
            "list": pa.array([[1, None]], pa.large_list(pa.int8())),
            "nothing": pa.array([None], pa.string()),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text(text)
    row = open_sources((str(tmp_path / "rows.parquet"),)).read_row(0)[0]
    assert row == {"text": text, "object": json.loads(text), "map": {"k": None}, "list": [1, None]}
    assert open_sources((str(tmp_path / "rows.jsonl"),)).read_row(0)[0] == json.loads(text)


def test_every_type_of_column_becomes_json(tmp_path):
    import datetime
    import decimal
    import uuid

    import pyarrow as pa

    moment = datetime.datetime(2026, 1, 2, 3, 4, 5)
    columns = {
        "decimal": (pa.array([decimal.Decimal("2.50")], pa.decimal128(6, 2)), 2.5),
        "whole": (pa.array([decimal.Decimal(7)], pa.decimal256(6, 0)), 7),
        "moment": (pa.array([moment], pa.timestamp("ns")), "2026-01-02T03:04:05"),
        "day": (pa.array([moment.date()]), "2026-01-02"),
        "hour": (pa.array([moment.time()], pa.time64("us")), "03:04:05"),
        "span": (pa.array([datetime.timedelta(seconds=90)], pa.duration("ns")), 90.0),
        "encoded": (pa.array(["a"]).dictionary_encode(), "a"),
        "views": (pa.array([["a"]], pa.list_view(pa.string_view())), ["a"]),
        "fixed": (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), [1, 2]),
        "uuid": (pa.array([uuid.UUID(int=1)], pa.uuid()), str(uuid.UUID(int=1))),
        "half": (pa.array([1.5], pa.float16()), 1.5),
        "nested": (pa.array([[{"a": None, "b": {"c": None}}]]), [{"b": {}}]),
    }
    table = pa.table({name: array for name, (array, _) in columns.items()})
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    row = open_sources((str(tmp_path / "rows.arrow"),)).read_row(0)[0]
    assert row == {name: value for name, (_, value) in columns.items()}
    json.dumps(row)
