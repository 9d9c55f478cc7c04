"""Every known way to write a row gives the conversation that it means, and nothing in it is lost."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.config import DataConfig, load_config
from omniloom.data.formats import (
    FORMATS,
    describe_format,
    detect_format,
    parse_row,
)
from omniloom.data.media_decode import decode_audio
from omniloom.data.media_files import MediaLimits
from omniloom.data.sources import open_sources
from omniloom.options import FieldNames, ProcessorOptions, VideoConfig
from omniloom.processors.chat_template import ChatTemplate, named_source
from omniloom.processors.rendering import Renderer
from omniloom.types import Part, SampleError

REAL = Path(__file__).parents[2] / ".." / "shared" / "real"
CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CALL_2 = '{"name": "get_time", "arguments": {"zone": "CET"}}'
TOOL = {"name": "get_weather", "description": "天气", "parameters": {"type": "object", "properties": {}}}
WRAPPED = json.dumps({"type": "function", "function": TOOL}, ensure_ascii=False)
ANSWER = {"role": "assistant", "content": "yes"}


def parse(row, **options):
    needs_answer = options.pop("needs_answer", True)
    return parse_row(row, file="data/rows.json", line=7, options=DataConfig(**options), needs_answer=needs_answer)


def words(conversation):
    """Turns as (role, [(kind, text or file name)]) to compare with."""
    return [
        (turn.role, [(part.kind, part.text or name_of(part)) for part in turn.parts]) for turn in conversation.turns
    ]


def name_of(part):
    return "" if part.media is None or part.media.path is None else Path(part.media.path).name


def failure(row, **options):
    with pytest.raises(SampleError) as caught:
        parse(row, **options)
    return f"{caught.value.field}: {caught.value.reason}"


ROWS = {
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "<image>What?"},
            {"from": "function_call", "value": CALL},
            {"from": "observation", "value": '{"t": 21}'},
            {"from": "gpt", "value": "It is 21."},
        ],
        "images": ["a.jpg"],
        "tools": json.dumps([TOOL]),
        "system": "Be kind.",
    },
    "multimodal_tool": {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "<image>What?"},
            {"role": "tool_call", "content": f"<tool_call>\n{CALL}\n</tool_call>"},
            {"role": "tool_response", "content": '{"t": 21}'},
            {"role": "assistant", "content": "It is 21."},
        ],
        "images": "a.jpg",
        "tools": [json.dumps(TOOL)],
    },
    "openai": {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "text", "text": "What?"}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": '{"t": 21}'},
            {"role": "assistant", "content": "It is 21."},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
    "anthropic": {
        "system": "Be kind.",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": {"type": "url", "url": "a.jpg"}},
                    {"type": "text", "text": "What?"},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "1", "name": "get_weather", "input": {"city": "Paris"}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": '{"t": 21}'}]},
            {"role": "assistant", "content": "It is 21."},
        ],
        "tools": [{"name": "get_weather", "description": "天气", "input_schema": TOOL["parameters"]}],
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_one_dialogue_with_tools_is_the_same_in_every_format(name):
    assert detect_format(ROWS[name]) == name
    for chosen in ("auto", name):
        conversation = parse(ROWS[name], format=chosen)
        assert words(conversation) == [
            ("system", [("text", "Be kind.")]),
            ("user", [("image", "a.jpg"), ("text", "What?")]),
            ("assistant", [("tool_call", CALL)]),
            ("tool", [("text", '{"t": 21}')]),
            ("assistant", [("text", "It is 21.")]),
        ]
        assert conversation.tools == (WRAPPED,)
        assert (conversation.id, conversation.source) == ("data/rows.json:7", "data/rows.json:7")


def test_plain_formats_are_detected_and_read():
    rows = {
        "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "alpaca": {"instruction": "q", "input": "", "output": "a"},
        "query_response": {"query": "q", "response": "a", "history": None},
        "llava": {
            "id": "000000033471",
            "image": "x.jpg",
            "conversations": [{"from": "human", "value": "q<image>"}, {"from": "gpt", "value": "a"}],
        },
        "sharegpt": {"id": 3, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    }
    for name, row in rows.items():
        assert detect_format(row) == name
        conversation = parse(row)
        assert [turn.role for turn in conversation.turns] == ["user", "assistant"]
        assert [turn.parts[0] for turn in conversation.turns] == [Part(kind="text", text=text) for text in "qa"]
        assert conversation.id == str(row.get("id", "data/rows.json:7"))
    assert parse(rows["llava"]).turns[0].parts[1].media.path.endswith("/data/x.jpg")
    assert set(rows) | set(ROWS) == set(FORMATS)


def test_the_detected_mapping_reads_as_one_line():
    row = {"id": 1, "image": "a.jpg", "conversations": [{"from": "gpt", "value": "a"}], "source": "x", "tools": None}
    assert describe_format(row, DataConfig()) == (
        "format llava (detected), read from id, image, conversations; not read: source"
    )
    options = DataConfig(format="messages", attr=FieldNames(messages="talk"))
    assert describe_format({"talk": []}, options) == "format messages (set by data.format), read from talk"


def test_what_turns_hold_and_nothing_reads_is_said_too():
    turns = [{"from": "human", "value": "q", "mask": 1, "id": None}, {"from": "gpt", "value": "a", "loss_mask": 0}]
    line = describe_format({"id": 1, "conversations": turns, "src": "x"}, DataConfig())
    assert line.endswith("read from id, conversations; not read: src, and of turns loss_mask, mask")
    attr = FieldNames(role_tag="who", content_tag="said")
    assert "not read" not in describe_format({"messages": [{"who": "user", "said": "q"}]}, DataConfig(attr=attr))


@pytest.mark.parametrize(
    ("row", "read", "unread"),
    [
        ({"query": "q", "input": "more", "response": "r"}, "query, response", "input"),
        ({"instruction": "i", "output": "o", "query": "q", "response": "r"}, "instruction, output", "query, response"),
        ({"messages": [ANSWER], "history": [["a", "b"]], "output": "o"}, "messages", "history, output"),
        ({"messages": [ANSWER], "conversations": [ANSWER]}, "messages", "conversations"),
    ],
)
def test_what_another_format_would_read_is_not_said_to_be_read(row, read, unread):
    assert describe_format(row, DataConfig()).endswith(f"read from {read}; not read: {unread}")


def test_pairs_of_what_roles_say_are_turns():
    row = {"system": "s", "conversation": [{"human": "q1", "assistant": "a1"}, {"user": "q2", "assistant": "a2"}]}
    assert [(role, parts[0][1]) for role, parts in words(parse(row))] == [
        ("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"),
    ]  # fmt: skip
    assert describe_format(row, DataConfig()).endswith("read from system, conversation")


def test_alpaca_and_query_put_history_and_input_where_they_belong():
    row = {"instruction": "i", "input": "more", "output": "o", "history": [["q1", "a1"], ["q2", "a2"]], "system": "s"}
    assert [(role, parts[0][1]) for role, parts in words(parse(row))] == [
        ("system", "s"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "i\nmore"),
        ("assistant", "o"),
    ]
    assert "history[0]: expected a pair" in failure({"query": "q", "response": "a", "history": [["only"]]})
    assert "response: expected text, got int" in failure({"query": "q", "response": 3})


def test_renamed_fields_and_roles_are_found():
    row = {
        "talk": [{"who": "Q", "said": "<image>a"}, {"who": "A", "said": "b"}],
        "pictures": ["1.png"],
        "functions": [TOOL],
    }
    attr = {
        "messages": "talk",
        "role_tag": "who",
        "content_tag": "said",
        "user_tag": "Q",
        "assistant_tag": "A",
        "images": "pictures",
        "tools": "functions",
        "system": None,
        "videos": None,
    }
    options = load_config({"data": {"attr": attr}}).data
    conversation = parse_row(row, file="f.json", line=1, options=options)
    assert words(conversation) == [("user", [("image", "1.png"), ("text", "a")]), ("assistant", [("text", "b")])]
    assert conversation.tools == (WRAPPED,)
    for section, fault in (
        ({"attr": {"role_tga": "who"}}, r"data\.attr\.role_tga: unknown key; did you mean data\.attr\.role_tag\?"),
        ({"format": "sharegtp"}, r"data\.format: expected auto or .* got 'sharegtp'; did you mean sharegpt\?"),
        ({"attr": {"formatting": "sharegtp"}}, r"data\.attr\.formatting: .*did you mean sharegpt\?"),
        ({"attr": {"images": False}}, r"data\.attr\.images: expected text, got False"),
        ({"attr": {"ranking": True}}, r"data\.attr\.ranking: preference data are not trained here"),
        ({"train": [{"path": "x", "attr": {"chosen": "y"}}]}, r"data\.train\.0\.attr\.chosen: preference data"),
    ):
        with pytest.raises(ValueError, match=fault):
            load_config({"data": section})


@pytest.mark.parametrize(("prompt", "response"), [("input", "target"), ("input", "output"), ("output", "input")])
def test_a_renamed_question_is_asked_once_and_no_answer_before_it(prompt, response):
    conversation = parse({prompt: "ask", response: "say"}, attr=FieldNames(prompt=prompt, response=response))
    assert [part.text for turn in conversation.turns for part in turn.parts] == ["ask", "say"]


def test_who_speaks_may_be_called_speaker():
    talk = [{"speaker": "A", "said": "ask"}, {"speaker": "B", "said": "say"}]
    names = FieldNames(role_tag="speaker", content_tag="said", user_tag="A", assistant_tag="B")
    conversation = parse({"messages": talk}, attr=names)
    assert [(turn.role, turn.speech) for turn in conversation.turns] == [("user", None), ("assistant", None)]


def test_every_key_of_the_guides_attr_is_taken():
    plain = dict.fromkeys(("system", "images", "videos", "chosen", "rejected", "kto_tag", "formatting"))
    config = load_config(None, [f"data.attr={json.dumps({**plain, 'ranking': False, 'audios': 'audios'})}"])
    assert config.data.attr == FieldNames(audios="audios", ranking=False)
    row = {"messages": [{"role": "user", "content": "q"}, ANSWER]}
    named = DataConfig(attr=FieldNames(formatting="multimodal_tool"))
    assert "format multimodal_tool (set by data.format)" in describe_format(row, named)


@pytest.mark.parametrize(
    "row", [{"query": "hi"}, {"instruction": "hi"}, {"prompt": "hi"}, {"prompt": "hi", "input": ""}]
)
def test_a_question_without_an_answer_can_be_asked_but_not_trained_on(row):
    history = {"history": [["a", "b"]]}
    assert words(parse(row, needs_answer=False)) == [("user", [("text", "hi")])]
    asked = parse({**row, **history, "images": ["1.png"], "system": "<image>"}, needs_answer=False)
    assert [turn.role for turn in asked.turns] == ["system", "user", "assistant", "user"]
    assert "no answer to train on" in failure(row)
    assert "no answer to train on" in failure({**row, **history})
    answer = "response" if "query" in row else "output"
    assert words(parse({**row, answer: "ho"}))[-1] == ("assistant", [("text", "ho")])


# ---------------------------------------------------------------------------------------- tools


def test_text_beside_tool_calls_and_the_order_of_parallel_calls_are_kept():
    calls = [{"function": json.loads(CALL)}, {"function": json.loads(CALL_2)}]
    expected = ("assistant", [("text", "Let me see."), ("tool_call", CALL), ("tool_call", CALL_2)])
    for messages in (
        [{"role": "assistant", "content": "Let me see.", "tool_calls": calls}],
        [
            {"role": "assistant", "content": "Let me see."},
            *({"role": "tool_call", "content": c} for c in (CALL, CALL_2)),
        ],
        [{"role": "assistant", "content": "Let me see."}, {"role": "tool_call", "content": f"[{CALL}, {CALL_2}]"}],
        [
            {
                "role": "tool_call",
                "content": f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL_2}\n</tool_call>",
            }
        ],
        [
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}},
                    {"type": "tool_use", "name": "get_time", "input": {"zone": "CET"}},
                ],
            }
        ],
    ):
        assert words(parse({"messages": [{"role": "user", "content": "q"}, *messages]}))[1:] == [expected]


def test_inline_calls_in_an_answer_stay_word_for_word():
    text = f"First.\n<tool_call>\n{CALL}\n</tool_call>\nthen <tool_call>{CALL_2}</tool_call> done"
    assert words(parse({"messages": [{"role": "assistant", "content": text}]})) == [("assistant", [("text", text)])]


def test_calls_join_the_answer_before_them_and_keep_their_own_weight():
    messages = [
        {"role": "assistant", "content": "a", "loss_scale": 0.5},
        {"role": "tool_call", "content": CALL, "loss": False},
        {"role": "tool_call", "content": CALL_2, "loss_scale": 0.5},
        {"role": "tool_call", "content": CALL},
    ]
    (turn,) = parse({"messages": messages}).turns
    assert turn.weight == 0.5
    assert [part.weight for part in turn.parts] == [None, 0.0, None, 1.0]


@settings(deadline=None)
@given(st.lists(st.sampled_from([None, 0, 1, True, False, 0.25, 3]), min_size=8, max_size=8))
def test_weights_of_turns_change_no_word(losses):
    roles = ("user", "assistant", "tool_call", "tool_call", "tool_response", "assistant", "tool_call", "assistant")
    content = {"tool_call": CALL, "user": "q", "assistant": "a", "tool_response": "r"}
    plain = [{"role": role, "content": content[role]} for role in roles]
    weighted = [turn | ({} if loss is None else {"loss": loss}) for turn, loss in zip(plain, losses, strict=True)]
    source, variables = named_source("qwen3_omni_nothink", ("qwen3_omni_nothink",), Path())
    renderer = Renderer(ChatTemplate(source, variables, {}, {}), ProcessorOptions(), "<|im_end|>")
    expected, got = (renderer.render(parse({"messages": turns})) for turns in (plain, weighted))
    assert got.text == expected.text
    starts = [0, *(end for end, _ in got.weights)]
    spans = [(got.text[start:end], weight) for start, (end, weight) in zip(starts, got.weights, strict=False)]
    calls = [weight for text, weight in spans if CALL in text]
    of_calls = [
        1.0 if loss is None else float(loss) for role, loss in zip(roles, losses, strict=True) if role == "tool_call"
    ]
    assert sorted(set(calls)) == sorted(set(of_calls))


def test_arguments_given_as_text_keep_their_spacing():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1,  "ü":"\\u00fc"}'}}
    turn = parse({"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}).turns[0]
    assert turn.parts == (Part(kind="tool_call", text='{"name": "f", "arguments": {"a":1,  "ü":"\\u00fc"}}'),)


@pytest.mark.parametrize("spelling", [str, list, "strings", "one", "wrapped"])
def test_tools_are_read_in_every_spelling(spelling):
    tools = {
        str: json.dumps([TOOL, TOOL]),
        list: [TOOL, TOOL],
        "strings": [json.dumps(TOOL), json.dumps(TOOL)],
        "one": TOOL,
        "wrapped": [{"type": "function", "function": TOOL}, json.loads(WRAPPED)],
    }[spelling]
    assert parse({"messages": [ANSWER], "tools": tools}).tools == (WRAPPED,) * (1 if spelling == "one" else 2)


def test_results_under_the_name_of_openais_first_calls_are_those_of_tools():
    call = {"role": "assistant", "content": None, "function_call": json.loads(CALL)}
    turns = parse({"messages": [call, {"role": "function", "name": "get_weather", "content": "21"}, ANSWER]}).turns
    assert [turn.role for turn in turns] == ["assistant", "tool", "assistant"]


@pytest.mark.parametrize("tools", [None, "", "[]", [], "  ", {}, "{}"])
def test_no_tools_means_none_and_brings_no_system_turn(tools):
    conversation = parse({"messages": [ANSWER], "tools": tools})
    assert conversation.tools == ()
    assert [turn.role for turn in conversation.turns] == ["assistant"]


def test_broken_tools_and_calls_are_named():
    assert "tools: not JSON" in failure({"messages": [ANSWER], "tools": "[{"})
    assert "tools[1]: not JSON" in failure({"messages": [ANSWER], "tools": [json.dumps(TOOL), "{'name': 'a'}"]})
    assert "tools[0]: expected a tool with a name" in failure({"messages": [ANSWER], "tools": [{"a": 1}]})
    assert "tools: expected a list" in failure({"messages": [ANSWER], "tools": 5})
    assert "messages[0]: not JSON" in failure({"messages": [{"role": "tool_call", "content": "get_weather(Paris)"}]})
    assert "without its </tool_call>" in failure({"messages": [{"role": "tool_call", "content": f"<tool_call>{CALL}"}]})
    assert "expected a tool call" in failure({"messages": [{"role": "tool_call", "content": '{"a": 1}'}]})
    assert "at least one tool call" in failure({"messages": [{"role": "tool_call", "content": "[]"}]})
    bad = {"function": {"name": "f", "arguments": "city=Paris"}}
    assert "arguments: not JSON" in failure({"messages": [{"role": "assistant", "content": "", "tool_calls": [bad]}]})


def test_anthropic_results_become_tool_turns_in_order_beside_what_the_user_says():
    content = [
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "21"}]},
        {"type": "tool_result", "tool_use_id": "2", "content": {"t": 5}},
        {"type": "text", "text": "And now?"},
    ]
    assert words(parse({"messages": [{"role": "user", "content": content}, ANSWER]}))[:-1] == [
        ("tool", [("text", "21")]),
        ("tool", [("text", '{"t": 5}')]),
        ("user", [("text", "And now?")]),
    ]


# ---------------------------------------------------------------------------------------- reasoning, weights, system


@pytest.mark.parametrize(
    "message",
    [
        {"content": "yes", "reasoning_content": "hm\nhm"},
        {"content": "yes", "thinking": "hm\nhm"},
        {"content": [{"type": "thinking", "thinking": "hm\nhm"}, {"type": "text", "text": "yes"}]},
    ],
)
def test_reasoning_is_a_part_of_its_own(message):
    turn = parse({"messages": [{"role": "assistant", **message}]}).turns[0]
    assert turn.parts == (Part(kind="reasoning", text="hm\nhm"), Part(kind="text", text="yes"))


def test_think_tags_are_text_which_the_chat_template_may_take_for_reasoning():
    for role, text in (
        ("assistant", "<think>\nhm\n</think>\n\nyes"),
        ("assistant", "I write <think>x</think>."),
        ("user", "<think>x</think>y"),
    ):
        turns = parse({"messages": [{"role": role, "content": text}, ANSWER]}).turns
        assert turns[0].parts == (Part(kind="text", text=text),)


def test_loss_loss_scale_and_weight_weigh_turns_of_every_role():
    messages = [
        {"role": "system", "content": "s", "loss": True},
        {"role": "user", "content": "u", "loss": 1},
        {"role": "assistant", "content": "a", "loss": False},
        {"role": "tool", "content": "t", "loss_scale": 0.5},
        {"role": "assistant", "content": "a", "loss": True, "loss_scale": 2.0},
        {"role": "assistant", "content": "a", "loss": None, "weight": None},
        {"role": "assistant", "content": "a", "weight": 0},
    ]
    conversation = parse({"messages": messages, "weight": 0.25})
    assert [turn.weight for turn in conversation.turns] == [1.0, 1.0, 0.0, 0.5, 2.0, None, 0.0]
    assert conversation.weight == 0.25
    for bad in (-1, "yes", float("nan"), float("inf")):
        assert "messages[0].loss: expected" in failure({"messages": [{**ANSWER, "loss": bad}]})
    assert "weight: expected" in failure({"messages": [ANSWER], "weight": -2})


def test_a_system_prompt_comes_from_a_turn_or_a_field_but_not_from_both():
    turn = [{"role": "system", "content": "turn"}, ANSWER]
    assert words(parse({"messages": turn, "system": ""}))[0] == ("system", [("text", "turn")])
    assert words(parse({"messages": [ANSWER], "system": "field"}))[0] == ("system", [("text", "field")])
    assert words(parse({"messages": [ANSWER], "system": ""}))[0][0] == "assistant"
    assert "both a system field and a system turn" in failure({"messages": turn, "system": "field"})


# ---------------------------------------------------------------------------------------- media


def media_of(row, **options):
    return [part.media for turn in parse(row, **options).turns for part in turn.parts if part.media is not None]


def user_row(text, **more):
    return {"messages": [{"role": "user", "content": text}, ANSWER], **more}


def test_placeholders_take_clips_of_their_kind_in_order_across_turns():
    messages = [
        {"role": "user", "content": "<image>one<video><image>"},
        {"role": "assistant", "content": "see <image>"},
        {"role": "tool", "content": "<audio>"},
    ]
    row = {"messages": messages, "images": ["1.png", "2.png", "3.png"], "videos": ["v.mp4"], "audios": "a.wav"}
    assert words(parse(row)) == [
        ("user", [("image", "1.png"), ("text", "one"), ("video", "v.mp4"), ("image", "2.png")]),
        ("assistant", [("text", "see "), ("image", "3.png")]),
        ("tool", [("audio", "a.wav")]),
    ]


def test_unbalanced_placeholders_name_both_counts():
    assert failure(user_row("<image><image>", images=["a"])).startswith(
        "images: 2 <image> placeholders in the text but 1 image in the row"
    )
    assert "videos: 0 <video> placeholders in the text but 2 videos" in failure(user_row("q", videos=["a", "b"]))
    reason = failure(user_row("<audio>"))
    assert "audios: 1 <audio> placeholder in the text but 0 audios" in reason
    assert """, or where it is only a word, give contents as blocks: [{"type": "text", "text": ...}]""" in reason


def test_clips_without_a_placeholder_go_before_the_first_question_where_asked_for():
    front = DataConfig(unplaced_media="front")
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "<image>q"}]
    row = {"messages": [*turns, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]}
    row |= {"images": ["i"], "audios": "a.wav", "videos": ["v", "w"]}
    conversation = parse_row(row, file="/d/f.json", line=1, options=front)
    assert [part.kind for part in conversation.turns[1].parts] == ["video", "video", "audio", "image", "text"]
    assert [part.media.path for part in conversation.turns[1].parts[:3]] == ["/d/v", "/d/w", "/d/a.wav"]
    assert "data.unplaced_media=front" in failure(row)
    row["images"] = ["i", "j"]  # placed, but not as many: still wrong
    with pytest.raises(SampleError, match="1 <image> placeholder in the text but 2 images"):
        parse_row(row, file="/d/f.json", line=1, options=front)


def test_a_placeholder_is_only_a_word_where_clips_stand_in_the_content():
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what does <image> mean?"}]
    assert words(parse(user_row(content)))[0] == ("user", [("image", "a.png"), ("text", "what does <image> mean?")])


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_a_placeholder_in_typed_content_is_a_word_unless_a_list_stands_beside_it(kind):
    row = user_row([{"type": "image", "image": "a.png"}, {"type": "text", "text": f"<{kind}>"}])
    assert words(parse(row))[0][1] == [("image", "a.png"), ("text", f"<{kind}>")]
    row["messages"][1] = {
        "role": "assistant",
        "content": f"write <{kind}>",
    }  # an answer that is a plain string belongs to the same dialogue
    assert words(parse(row))[1][1] == [("text", f"write <{kind}>")]
    row = user_row([{"type": "text", "text": f"<{kind}>"}], **{f"{kind}s": ["b.mp4"]})
    assert words(parse(row))[0][1] == [(kind, "b.mp4")]


def test_an_empty_key_hides_no_other_of_the_same_meaning():
    assert words(parse(user_row("<image>", images=[], image="a.png")))[0][1] == [("image", "a.png")]
    assert words(parse(user_row("<image>", image="", images=["a.png"])))[0][1] == [("image", "a.png")]
    both = user_row("<image><image><image>", image="a.png", images=["b.png", "c.png"])
    assert words(parse(both))[0][1] == [("image", f"{name}.png") for name in "abc"]
    assert "1 <image> placeholder in the text but 2" in failure(user_row("<image>", image="a.png", images=["b.png"]))
    assert words(parse({"conversations": [], **user_row("hi")}))[0][1] == [("text", "hi")]
    assert media_of(user_row("<image>", images=[{"bytes": b"", "path": "a.png"}]))[0].path.endswith("a.png")
    call = {"name": "f", "arguments": {}}
    row = user_row("hi")
    row["messages"][1] = ANSWER | {"tool_calls": [], "function_call": call, "reasoning_content": "", "reasoning": "so"}
    assert [part.kind for part in parse(row).turns[1].parts] == ["reasoning", "text", "tool_call"]


def test_file_uris_are_paths(tmp_path):
    (tmp_path / "a b#1.png").write_bytes(b"x")
    for uri in (
        "file://{}/a%20b%231.png",
        "file:{}/a%20b%231.png",
        "FILE://localhost{}/a%20b#1.png",
        "file://a%20b#1.png",
    ):
        (source,) = media_of(user_row("<image>", images=[uri.format(tmp_path)]), media_dir=str(tmp_path))
        assert Path(source.path).is_file(), uri
    outside = user_row("<image>", images=["file:///etc/%70asswd"])
    assert "outside the media folder" in failure(outside, media_dir=str(tmp_path))


BEGINNINGS = (
    b"\xff\xd8\xff\xe0",
    b"\x89PNG\r\n",
    b"GIF89a",
    b"RIFF____WEBP",
    b"\0\0\0\x18ftypmp42",
    b"ID3\x04",
    b"OggS",
    b"fLaC",
)


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_bare_base64_of_a_media_file_is_the_file_itself(beginning, tmp_path):
    data = beginning + bytes(range(200, 256)) * 3
    plain, url_safe = base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode().rstrip("=")
    for text in (plain, url_safe, "\n".join(re.findall(".{1,60}", plain))):
        assert media_of(user_row("<image>", images=[text]))[0].data == data
    (frames,) = media_of(user_row("<video>", videos=[[plain]]))
    assert frames.frames == (f"data:;base64,{plain}",)
    assert "not base64" in failure(user_row("<image>", images=[plain[:-9] + "@@" + plain[-9:]]))


def test_a_file_that_exists_is_no_base64(tmp_path):
    name = base64.b64encode(b"\x89PNG not really").decode()
    assert media_of(user_row("<image>", images=[name]), media_dir=str(tmp_path))[0].data is not None
    (tmp_path / name).write_bytes(b"x")
    assert media_of(user_row("<image>", images=[name]), media_dir=str(tmp_path))[0].path is not None


def test_a_typed_block_without_a_payload_marks_a_place():
    content = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}]
    row = user_row(content, images=["1.png", "2.png"])
    assert words(parse(row))[0][1] == [("image", "1.png"), ("text", "a"), ("image", "2.png")]


def test_bytes_data_uris_and_base64_are_the_file_itself():
    data = b"\x89PNG not really"
    text = base64.b64encode(data).decode()
    for item in (data, {"bytes": data, "path": "a.png"}, {"bytes": text}, f"data:image/png;base64,{text}"):
        (source,) = media_of(user_row("<image>", images=[item]))
        assert (source.data, source.path) == (data, None)
    for block in (
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": text}},
        {"type": "image", "base64": text},
        {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}},
        {"type": "audio_url", "audio_url": f"data:audio/wav;base64,{text}"},
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{text}"}},
    ):
        (source,) = media_of(user_row([block]))
        assert (source.data, source.path) == (data, None)
    assert "not base64" in failure(user_row("<image>", images=["data:image/png;base64,@@"]))
    assert "expected data:" in failure(user_row("<image>", images=["data:image/png,raw"]))
    assert "got none under bytes" in failure(user_row("<image>", images=[{"bytes": b""}]))


def test_a_block_of_two_things_is_refused_and_empty_keys_beside_it_are_not():
    for block in ({"type": "text", "text": "a", "image": "1.jpg"}, {"type": "image", "image": "1.jpg", "text": "a"}):
        assert "beside it; give each a block of its own" in failure(user_row([block]))
    nothing = {"image": None, "video": "", "audio": {"bytes": None, "path": None}}
    assert not media_of(user_row([{"type": "text", "text": "a", **nothing}]))
    assert len(media_of(user_row([{"type": "image", "image": "1.jpg", "text": ""}]))) == 1


def test_sound_that_datasets_decoded_is_a_file_of_these_samples():
    samples = [0.0, 0.5, -0.25] * 1000
    decoded = {"path": "a.wav", "array": samples, "sampling_rate": 8000}
    for row in (user_row("<audio>", audio=decoded), user_row([{"type": "audio", "audio": decoded}])):
        (sound,) = media_of(row)
        assert np.array_equal(decode_audio(sound, MediaLimits(sampling_rate=8000)), np.array(samples, np.float32))
    for changes, words in (
        ({"sampling_rate": None}, "rate of the array in Hz"),
        ({"array": [[0.0], [1.0]]}, "of one channel"),
        ({"array": [1e300]}, "of one channel"),
        ({"array": 3}, "of one channel"),
    ):
        assert words in failure(user_row("<audio>", audio={**decoded, **changes}))
    (sound,) = media_of(user_row("<audio>", audio={**decoded, "array": None}))
    assert str(sound.path).endswith("a.wav")


def test_a_list_of_frames_is_one_video_at_the_sampling_rate():
    rules = {"video": VideoConfig(fps=3.0)}
    (video,) = media_of(user_row("<video>", videos=[["1.jpg", "2.jpg"]]), **rules)
    assert [Path(frame).name for frame in video.frames] == ["1.jpg", "2.jpg"]
    assert (video.path, video.options.fps) == (None, 3.0)
    (video,) = media_of(user_row([{"type": "video", "video": ["1.jpg", b"raw"], "fps": 1}]), **rules)
    assert video.options.fps == 1
    assert video.frames[1] == "data:;base64," + base64.b64encode(b"raw").decode()
    assert "only a video may be a list" in failure(user_row("<image>", images=[["1.jpg"]]))
    assert "empty list" in failure(user_row("<video>", videos=[[]]))


def test_options_beside_a_clip_travel_with_it():
    options = {"fps": 0.5, "min_pixels": 100, "max_pixels": 200, "max_frames": 8}
    for row in (
        user_row("<video>", videos=[{"video": "a.mp4", **options}]),
        user_row("<video>", videos=[{"path": "a.mp4", **options}]),
        user_row([{"type": "video", "video": "a.mp4", **options}]),
        user_row([{"type": "video_url", "video_url": {"url": "a.mp4"}, **options}]),
    ):
        (source,) = media_of(row)
        assert {key: getattr(source.options, key) for key in options} == options
    assert "fps: expected a number, more than 0" in failure(user_row("<video>", videos=[{"path": "a", "fps": 0}]))
    assert "min_pixels 9 is more than" in failure(
        user_row("<image>", images=[{"path": "a", "min_pixels": 9, "max_pixels": 4}])
    )


def test_sound_is_joined_to_its_video_only_where_interleaving_is_asked_for():
    row = user_row("<video><audio>q", videos=["v.mp4"], audios=["a.mp3"])
    assert words(parse(row))[0][1] == [("video", "v.mp4"), ("audio", "a.mp3"), ("text", "q")]
    for joined in (
        parse({**row, "use_audio_in_video": True}),
        parse(row, video=VideoConfig(use_audio=True)),
        parse_row(row, file="f", line=1, options=DataConfig(video=VideoConfig(use_audio=True))),
    ):
        video, text = joined.turns[0].parts
        assert (video.media.use_audio, Path(video.media.sound.path).name, text.text) == (True, "a.mp3", "q")
    assert len(parse({**row, "use_audio_in_video": False}, video=VideoConfig(use_audio=True)).turns[0].parts) == 3


def test_sound_that_does_not_follow_directly_stays_a_clip_of_its_own():
    row = user_row("<video> <audio>", videos=["v.mp4"], audios=["a.mp3"], use_audio_in_video=True)
    video, _, audio = parse(row).turns[0].parts
    assert (video.media.use_audio, video.media.sound, audio.kind) == (True, None, "audio")
    row = user_row("<video><audio><audio>", videos=["v.mp4"], audios=["a.mp3", "b.mp3"], use_audio_in_video=True)
    assert [name_of(part) for part in parse(row).turns[0].parts] == ["v.mp4", "b.mp3"]
    row = user_row("<video><audio>", videos=["v.mp4"], audios=[b"RIFF"], use_audio_in_video=True)
    assert parse(row).turns[0].parts[0].media.sound.data == b"RIFF"


def test_use_of_sound_can_be_said_per_clip():
    row = user_row("<video><video>", videos=[{"path": "1.mp4", "use_audio_in_video": True}, "2.mp4"])
    assert [source.use_audio for source in media_of(row)] == [True, False]


def test_paths_stay_under_the_media_folder_unless_allowed(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"x")
    (inside / "link.png").symlink_to(outside / "secret.png")
    (inside / "folder").symlink_to(outside)
    (tmp_path / "alias").symlink_to(inside)
    (tmp_path / "inside.png").write_bytes(b"x")
    rules = {"media_dir": str(tmp_path / "alias")}  # the folder itself may be a link
    for good in ("a.png", "./b/../a.png", str(inside / "a.png"), f"file://{inside}/a.png"):
        assert media_of(user_row("<image>", images=[good]), **rules)
    for bad in ("../out/secret.png", str(outside / "secret.png"), "link.png", "folder/secret.png", "../inside.png"):
        row = user_row("<image>", images=[bad])
        assert "outside the media folder" in failure(row, **rules)
        (source,) = media_of(row, **rules, allow_outside_media_dir=True)
        assert Path(source.path).is_file()
    assert "NUL" in failure(user_row("<image>", images=["a\0b"]), **rules)
    row = user_row("<video>", videos=[["a.png", "../out/secret.png"]])
    assert "videos[0][1]" in failure(row, **rules)


def test_what_columns_have_of_rows_without_clips_is_none():
    for empty in (None, [], "", {}, {"bytes": None, "path": None}):
        assert media_of(user_row("hi", images=empty)) == []


def test_urls_are_refused_unless_allowed():
    for url in ("http://example.com/a.png", "HTTPS://example.com/a.png", "s3://bucket/a.png"):
        assert "data.allow_urls" in failure(user_row("<image>", images=[url]))
    (source,) = media_of(user_row("<image>", images=["https://example.com/a.png"]), allow_urls=True)
    assert source.path == "https://example.com/a.png"
    assert "expected an http" in failure(user_row("<image>", images=["ftp://a/b"]), allow_urls=True)


# ---------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, "no known format has the keys text"),
        ({}, "(none)"),
        ({"messages": []}, "expected a list of turns"),
        ({"messages": "hi"}, "expected a list of turns"),
        ({"messages": ["hi"]}, "messages[0]: expected an object"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "messages[0].role: unknown role 'narrator'; known"),
        ({"messages": [{"role": "User", "content": "a"}]}, "data.attr.user_tag, assistant_tag and so on name others"),
        ({"messages": [{"role": "user", "text": "a", "content": None}, ANSWER]}, "messages[0].content: nothing there"),
        ({"messages": [ANSWER, {"role": "tool", "output": "a"}]}, "but under output; data.attr.content_tag names"),
        ({"messages": [{"content": "a"}]}, "unknown role None"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant answer"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "no assistant answer"),
        ({"messages": [{"role": "assistant", "content": 5}]}, "expected text or a list of blocks, got int"),
        ({"messages": [{"role": "user", "content": [{"type": "pdf"}]}, ANSWER]}, "unknown block type 'pdf'"),
        ({"messages": [{"role": "user", "content": [5]}, ANSWER]}, "expected a block with a type"),
        ({"messages": [{"role": "user", "content": "\ud83d"}, ANSWER]}, "surrogate"),
        ({"messages": [ANSWER], "images": 5}, "images: expected a list of images"),
        ({"messages": [{"role": "user", "content": "<image>"}, ANSWER], "images": [5]}, "images[0]: expected a path"),
        ({"messages": [{"role": "user", "content": "<image>"}, ANSWER], "images": [{"a": 1}]}, "got none under a"),
        ({"messages": [ANSWER], "use_audio_in_video": "yes"}, "expected true or false"),
    ],
)
def test_a_bad_row_is_refused_with_field_and_reason(row, reason):
    assert reason in failure(row)


def test_a_format_set_by_hand_that_the_row_lacks_is_named():
    assert "the sharegpt format needs it" in failure({"query": "q", "response": "a"}, format="sharegpt")
    assert "instruction: expected text" in failure({"messages": [ANSWER]}, format="alpaca")


def test_a_row_without_what_attr_names_is_told_the_names():
    attr = FieldNames(audios="path", response="sentence")
    assert "data.attr says response=sentence, of which this row has nothing" in failure({"path": "a.wav"}, attr=attr)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.sampled_from(["", "a", "<image>", CALL, "a/b"]),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.sampled_from(["name", "arguments", "url"]), children)
    ),
    max_leaves=4,
)


def odd(**usual):
    """Dicts whose values are mostly of the usual kind, sometimes anything; keys may be missing."""
    return st.fixed_dictionaries({}, optional={key: VALUES | value | value for key, value in usual.items()})


BLOCK_TYPES = ["text", "image", "image_url", "video", "tool_use", "tool_result", "thinking", "input_audio"]
BLOCKS = st.lists(odd(type=st.sampled_from(BLOCK_TYPES), text=st.just("t"), image=VALUES, content=VALUES, data=VALUES))
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "tool_call", "tool_response"])
MESSAGES = odd(role=ROLES, content=st.just("a") | BLOCKS, tool_calls=VALUES, loss=VALUES, reasoning_content=VALUES)
ODD_ROWS = odd(
    messages=st.lists(MESSAGES, max_size=4), images=VALUES, videos=VALUES, tools=VALUES, system=VALUES
) | odd(conversations=st.lists(odd(**{"from": ROLES, "value": st.just("a")})), image=VALUES, id=VALUES, weight=VALUES)
PAIRS = odd(query=st.just("q"), response=st.just("r"), history=VALUES, instruction=VALUES, output=VALUES, input=VALUES)


@settings(deadline=None, max_examples=300)
@given(row=ODD_ROWS | ODD_ROWS | PAIRS)
def test_no_row_however_odd_raises_anything_but_sample_error(row):
    try:
        conversation = parse(row)
    except SampleError:
        return
    assert any(turn.role == "assistant" for turn in conversation.turns)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.text(min_size=1).filter(lambda text: "<" not in text), min_size=2, max_size=6))
def test_plain_text_passes_unchanged(texts):
    messages = [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)]
    assert [turn.parts[0].text for turn in parse({"messages": messages}).turns] == texts


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real demo data is absent")
def test_the_real_demo_rows_parse():
    counts = {}
    for path in sorted(REAL.glob("*.json")):
        source = open_sources((str(path),))
        for index in range(len(source)):
            row, file, line = source.read_row(index)
            conversation = parse_row(row, file=file, line=line, options=DataConfig())
            for turn in conversation.turns:
                for part in turn.parts:
                    assert part.media is None or Path(part.media.path).is_file()
                    counts[part.kind] = counts.get(part.kind, 0) + 1
        assert index + 1 == len(source)
    assert counts["tool_call"] == 77
    assert (counts["video"], counts["audio"]) == (6, 6)
