"""Boxes and points of `objects` come to each family's own coordinates, where the row's text asks for them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from omniloom.config import DataConfig
from omniloom.data.formats import describe_format, parse_row
from omniloom.families.registry import find_spec
from omniloom.options import ProcessorOptions
from omniloom.processors.grounding import write_boxes
from omniloom.tools.convert import convert_file
from omniloom.tools.tiny import make_tiny
from omniloom.types import Box, ClipGeometry, DecodedClip, MediaHeader, SampleError
from tests.unit.media_files import write_video

BOXES = [[100, 50, 300, 150], [200, 100]]
ANSWER = '[{"bbox_2d": <bbox>, "label": "<ref-object>"}, {"point_2d": <bbox>, "label": "<ref-object>"}]'


def row_of(objects, answer=ANSWER, images=("a.png",)):
    asked = "<ref-object>" if "<ref-object>" in answer else "cat"
    turns = [{"role": "user", "content": "<image>" * len(images) + f"Find the {asked}."}]
    return {"messages": [*turns, {"role": "assistant", "content": answer}], "images": list(images), "objects": objects}


def parse(row):
    return parse_row(row, file="/data/rows.json", line=1, options=DataConfig())


LISTS = {"ref": ["cat", "cat", "its nose"], "bbox": BOXES}
RECORDS = [
    {"ref": "cat"},
    {"caption": "cat", "bbox": BOXES[0], "bbox_type": "real"},
    {"label": "its nose", "point": BOXES[1]},
]


@pytest.mark.parametrize("objects", [LISTS, RECORDS, json.dumps(LISTS), json.dumps(RECORDS)])
def test_every_spelling_of_objects_says_the_same(objects) -> None:
    question, answer = parse(row_of(objects)).turns
    assert question.parts[-1].text == "Find the cat."
    (part,) = answer.parts
    assert part.text == '[{"bbox_2d": <bbox>, "label": "cat"}, {"point_2d": <bbox>, "label": "its nose"}]'
    assert part.boxes == tuple(Box(points=tuple(box), unit="pixels") for box in BOXES)


def test_objects_stand_in_tool_calls_as_json() -> None:
    call = {"name": "crop", "arguments": {"box": "<bbox>", "what": "the <ref-object>", "at": ["<point>"]}}
    turns = [{"role": "user", "content": "<image>?"}, {"role": "tool_call", "content": json.dumps(call)}]
    row = {"messages": turns, "images": ["a.png"], "objects": {"ref": ['"cat"'], "bbox": BOXES}}
    conversation = parse(row)
    geometry = ClipGeometry(kind="image", num_tokens=1, grid_thw=(1, 20, 40), source_size=(400, 200))
    (part,) = write_boxes(conversation, [geometry], 16, relative=True).turns[1].parts
    said = json.loads(part.text)["arguments"]
    assert said == {"box": [250, 250, 750, 750], "what": 'the "cat"', "at": [[500, 500]]}
    turns[1:] = [{"role": "assistant", "content": "", "tool_calls": [{"function": call}]}]
    assert parse(row).turns[1].parts == conversation.turns[1].parts
    assert parse({**row, "objects": None}).turns[1].parts[0].boxes == ()


def test_placeholders_without_objects_and_objects_without_placeholders_are_left_alone() -> None:
    assert parse(row_of(None)).turns[1].parts[0].text == ANSWER
    assert parse(row_of({"bbox": BOXES}, answer="It is at [1, 2].")).turns[1].parts[0].boxes == ()
    assert "not read" not in describe_format(row_of(LISTS), DataConfig())


@pytest.mark.parametrize(
    ("objects", "fault"),
    [
        ({"ref": ["a"] * 3, "bbox": BOXES[:1]}, r"2 <bbox> and 3 <ref-object> in the text but 1 boxes and 3 names"),
        ({"ref": ["a"], "bbox": BOXES}, r"3 <ref-object> in the text but 2 boxes and 1 names"),
        ({**LISTS, "bbox": [[1, 2, 3], [1, 2]]}, r"objects\.bbox\[0\]: expected \[x, y\] or .*got \[1, 2, 3\]"),
        (
            {**LISTS, "bbox": [[30, 2, 20, 9], [1, 2]]},
            r"objects\.bbox\[0\]: expected the left top and the right bottom",
        ),
        ({**LISTS, "bbox_type": "norm"}, r"bbox_type: unknown kind 'norm'; did you mean norm1"),
        ({**LISTS, "image_id": [0, 1]}, r"a box is of image 1 \(from 0\), the row has 1 images"),
        ({**LISTS, "image_id": ["a"]}, r"which image it is of: expected a number, from 0, got 'a'"),
        ({**LISTS, "video_id": [0]}, r"a box is of video 0 \(from 0\), the row has 0 videos"),
        ({**LISTS, "image_id": [0], "video_id": [0]}, r"a box is of one image or one video, got image and video"),
        ([*RECORDS[:1], 3], r"objects\[1\]: expected a record with ref"),
        ("[", "objects: not JSON"),
        (7, "objects: expected lists under ref and bbox"),
    ],
)
def test_objects_that_do_not_fit_are_refused(objects, fault) -> None:
    with pytest.raises(SampleError, match=fault):
        parse(row_of(objects))


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl", "qwen3_omni", "qwen2_5_omni"])
def family(request, tmp_path_factory):
    model = make_tiny(request.param, tmp_path_factory.mktemp("grounding") / request.param)
    config_json = json.loads((model / "config.json").read_text())
    spec = find_spec(config_json)
    return spec.name, spec.make_processor(model, spec.read_config(config_json), ProcessorOptions())


@pytest.mark.parametrize(("kind", "size"), [("real", (400, 200)), ("norm1000", (1000, 1000)), ("norm1", (1, 1))])
def test_coordinates_are_the_familys_own_after_resizing(family, kind, size) -> None:
    name, processor = family
    boxes = [[number * size[place % 2] / (400, 200)[place % 2] for place, number in enumerate(box)] for box in BOXES]
    conversation = parse(row_of({**LISTS, "bbox": boxes, "bbox_type": kind}))
    headers = (MediaHeader(kind="image", width=400, height=200),)
    clips = processor.geometry(conversation, headers)
    _, rows, columns = clips[0].grid_thw
    seen = (1000, 1000)
    if name.startswith("qwen2_5"):
        seen = columns * processor.towers.vision.patch_size, rows * processor.towers.vision.patch_size
        assert seen != (400, 200), "the image is resized"
    extent = processor.measure(conversation, headers)
    example = processor.encode(conversation, clips, (None,))
    assert len(example.input_ids) == extent.num_tokens
    text = processor.tokenizer.decode(example.input_ids.tolist())
    right, bottom = seen
    box = [round(right / 4), round(bottom / 4), round(right * 3 / 4), round(bottom * 3 / 4)]
    assert f'{{"bbox_2d": {box}, "label": "cat"}}' in text
    assert f'{{"point_2d": {[round(right / 2), round(bottom / 2)]}, "label": "its nose"}}' in text
    turns = [{"role": "user", "content": "<image><bbox><bbox>?"}, {"role": "assistant", "content": "a"}]
    asked = parse({**row_of(LISTS), "messages": turns})
    pixels = np.zeros((200, 400, 3), np.uint8)
    prompt = processor.prompt(asked, headers, (DecodedClip(pixels=pixels),))
    assert str(box) in processor.tokenizer.decode(prompt["input_ids"][0].tolist())


def test_a_box_is_of_the_image_that_it_names() -> None:
    row = row_of({"ref": ["a", "b", "c"], "bbox": BOXES, "image_id": [1, 0]}, images=("a.png", "b.png"))
    assert [box.clip for box in parse(row).turns[1].parts[0].boxes] == [1, 0]


@pytest.mark.parametrize("beside", [False, True])
def test_boxes_of_a_video_are_of_its_frames_after_resizing(family, beside) -> None:
    """Named by `video_id` beside images; without a word where the video is all that there is to see."""
    name, processor = family
    turns = [
        {"role": "user", "content": "<image>" * beside + "<video>Where?"},
        {"role": "assistant", "content": ANSWER},
    ]
    objects = {"ref": ["cat", "its nose"], "bbox": BOXES} | ({"video_id": [0, 0]} if beside else {})
    row = {"messages": turns, "images": ["a.png"] * beside, "videos": ["a.mp4"], "objects": objects}
    headers = [MediaHeader(kind="image", width=700, height=700)] * beside
    headers += [MediaHeader(kind="video", width=400, height=200, num_frames=8, fps=4.0, duration_seconds=2.0)]
    conversation = parse(row)
    clips = processor.geometry(conversation, headers)
    _, rows, columns = clips[-1].grid_thw
    right, bottom = 1000, 1000
    if name.startswith("qwen2_5"):
        right, bottom = (side * processor.towers.vision.patch_size for side in (columns, rows))
    example = processor.encode(conversation, clips, (None,) * len(clips))
    box = [round(right / 4), round(bottom / 4), round(right * 3 / 4), round(bottom * 3 / 4)]
    assert f'{{"bbox_2d": {box}, "label": "cat"}}' in processor.tokenizer.decode(example.input_ids.tolist())


def test_converted_rows_keep_their_boxes(tmp_path) -> None:
    Image.new("RGB", (400, 200)).save(tmp_path / "a.png")
    write_video(tmp_path / "a.mp4", "mpeg4", 4)
    of_video = row_of([{"bbox": BOXES[0], "video": 0}, {"bbox": BOXES[0]}], answer="<bbox><bbox>")
    of_video["messages"][0]["content"] += "<video>"
    of_video["videos"] = ["a.mp4"]
    rows = [row_of(RECORDS), of_video]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert convert_file("messages", tmp_path / "rows.json", tmp_path / "out.json")[1] == []
    options = DataConfig(media_dir=str(tmp_path))
    written = map(json.loads, (tmp_path / "out.json").read_text().splitlines())
    for before, after in zip(rows, written, strict=True):
        before, after = (parse_row(row, file="rows.json", line=1, options=options) for row in (before, after))
        assert [turn.parts[-1].boxes for turn in after.turns] == [turn.parts[-1].boxes for turn in before.turns]
        assert before is not rows[0] or after.turns == before.turns
