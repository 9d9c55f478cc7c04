"""Our renderer writes what the checkpoint's own chat template writes, and trains exactly the assistant's words."""

# ruff: noqa: RUF001 -- the angle marks are the specification's
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import omniloom.tools
from omniloom.processors.rendering import TEMPLATES, find_template, render, split_reasoning
from omniloom.types import Conversation, MediaSource, Part, SampleError, Turn

NOTHINK = TEMPLATES["qwen3_omni_nothink"]
THINKING = TEMPLATES["qwen3_omni"]
WRAPPED = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "audio": "<|audio_start|><|audio_pad|><|audio_end|>",
}

# ------------------------------------------------------------------------------------ random conversations

words = st.text(alphabet=st.sampled_from("ab .,?\n{}\"'<>|/狗你好😀é\u0301\t0"), max_size=12)
texts = words.map(lambda text: Part(kind="text", text=text))
clips = st.sampled_from(("image", "video", "audio")).map(lambda kind: Part(kind=kind, media=MediaSource(path="x")))
arguments = st.dictionaries(
    st.sampled_from(("city", "单位", "n")), st.one_of(words, st.integers(), st.none()), max_size=2
)
calls = st.builds(
    lambda name, values: Part(
        kind="tool_call", text=f'{{"name": "{name}", "arguments": {json.dumps(values, ensure_ascii=False)}}}'
    ),
    st.sampled_from(("get_weather", "搜索")),
    arguments,
)
tools = st.builds(
    lambda name: json.dumps(
        {"type": "function", "function": {"name": name, "description": "用 <b> & 'q'", "parameters": {}}},
        ensure_ascii=False,
    ),
    st.sampled_from(("get_weather", "搜索")),
)
content = st.lists(st.one_of(texts, clips), min_size=1, max_size=3)
reasoning = st.lists(words.filter(bool).map(lambda text: Part(kind="reasoning", text=text)), max_size=1)
inline = st.sampled_from(("<think>\nhm\n</think>\n\nyes", "</think>a", "x<think>b</think>", "<think>c"))
answer = st.one_of(
    st.tuples(reasoning, content).map(lambda pair: pair[0] + pair[1]),
    inline.map(lambda text: [Part(kind="text", text=text)]),
)
assistant = st.tuples(answer, st.lists(calls, max_size=2)).map(
    lambda pair: Turn(role="assistant", parts=tuple(pair[0] + pair[1]))
)
user = content.map(lambda parts: Turn(role="user", parts=tuple(parts)))
tool = content.map(lambda parts: Turn(role="tool", parts=tuple(parts)))
system = content.map(lambda parts: Turn(role="system", parts=tuple(parts)))
conversations = st.builds(
    lambda first, rest, some_tools: Conversation(
        id="c", source="f:1", turns=tuple(first + rest), tools=tuple(some_tools)
    ),
    st.lists(system, max_size=1),
    st.lists(st.one_of(user, assistant, tool), min_size=1, max_size=6),
    st.lists(tools, max_size=2),
)


def say(*turns, **fields):
    """Conversation of (role, text or parts) pairs."""
    made = []
    for role, parts in turns:
        parts = (Part(kind="text", text=parts),) if isinstance(parts, str) else tuple(parts)
        made.append(Turn(role=role, parts=parts))
    return Conversation(id="c", source="f:1", turns=tuple(made), **fields)


# ------------------------------------------------------------------------------------ the oracle


def _message(turn):
    message = {"role": turn.role, "content": []}
    for part in turn.parts:
        if part.kind == "reasoning":
            message["reasoning_content"] = part.text
        elif part.kind == "tool_call":
            call = json.loads(part.text)
            message.setdefault("tool_calls", []).append({"type": "function", "function": call})
        elif part.kind == "text":
            message["content"].append({"type": "text", "text": part.text})
        else:
            message["content"].append({"type": part.kind, part.kind: "x"})
    return message


NOTHINK_JINJA = (Path(omniloom.tools.__file__).parent / "qwen3_omni.jinja").read_text(encoding="utf-8")
# the thinking checkpoints' templates differ in this condition
CONDITION = "if reasoning and loop.index0 > ns.last_query_index"
THINKING_JINJA = NOTHINK_JINJA.replace(CONDITION, "if loop.index0 > ns.last_query_index and (loop.last or reasoning)")
assert THINKING_JINJA != NOTHINK_JINJA
VL = TEMPLATES["qwen3_vl_nothink"]
VL_JINJA = (Path(omniloom.tools.__file__).parent / "qwen3_vl.jinja").read_text(encoding="utf-8")


def template_text(conversation, generation_prompt=False, jinja=NOTHINK_JINJA):
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        conversations=[[_message(turn) for turn in conversation.turns]],
        tools=[json.loads(tool) for tool in conversation.tools] or None,
        chat_template=jinja,
        add_generation_prompt=generation_prompt,
    )
    return texts[0]


def joined(conversation, spans):
    kinds = [part.kind for turn in conversation.turns for part in turn.parts if part.media is not None]
    assert [span.clip for span in spans if span.clip is not None] == list(range(len(kinds)))
    return "".join(span.text if span.clip is None else WRAPPED[kinds[span.clip]] for span in spans)


def trained(spans):
    return "".join(f"‹{span.text}›" if span.weight else span.text for span in spans)


# ------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(("style", "jinja"), [(NOTHINK, NOTHINK_JINJA), (THINKING, THINKING_JINJA), (VL, VL_JINJA)])
@settings(deadline=None, max_examples=200)
@given(conversation=conversations, generation_prompt=st.booleans())
def test_text_is_what_the_chat_template_writes(style, jinja, conversation, generation_prompt):
    assume(jinja != VL_JINJA or not any(part.kind == "audio" for turn in conversation.turns for part in turn.parts))
    spans = render(conversation, style, generation_prompt=generation_prompt)
    assert joined(conversation, spans) == template_text(conversation, generation_prompt, jinja)


def test_a_generated_answer_is_told_from_its_reasoning():
    assert split_reasoning("<think>\nhm\n</think>\n\nyes ") == ("hm", "yes")
    assert split_reasoning("hm\n</think>\n\nyes") == ("hm", "yes")  # where the prompt had opened the block
    assert split_reasoning(" yes") == ("", "yes")
    assert split_reasoning("<think>\nnever ends") == ("", "<think>\nnever ends")


def test_templates_without_reasoning_leave_it_out_and_take_inline_blocks_as_text():
    reasoned = say(("user", "q"), ("assistant", [Part(kind="reasoning", text="hm"), Part(kind="text", text="a")]))
    assert "hm" not in joined(reasoned, render(reasoned, VL))
    inline = say(("user", "q"), ("assistant", "<think>\nr\n</think>\n\na"), ("user", "s"), ("assistant", "b"))
    assert "‹<think>\nr\n</think>\n\na<|im_end|>›" in trained(render(inline, VL))


def test_a_part_of_its_own_weight_has_it_and_the_last_one_ends_the_turn():
    call = Part(kind="tool_call", text="{}", weight=0.5)
    turns = (Turn(role="assistant", parts=(Part(kind="text", text="a"), call, replace(call, weight=None))),)
    conversation = Conversation(id="c", source="f:1", turns=turns)
    weights = {span.text: span.weight for span in render(conversation, NOTHINK)}
    assert weights["\n<tool_call>\n{}\n</tool_call>"] == 0.5
    assert weights["\n<tool_call>\n{}\n</tool_call><|im_end|>"] == 1.0
    assert {span.weight for span in render(conversation, NOTHINK, last_turn_only=True)} == {0.0, 0.5, 1.0}
    later = replace(conversation, turns=(*turns, Turn(role="assistant", parts=(Part(kind="text", text="z"),))))
    assert all(span.weight == 0 or "z" in span.text for span in render(later, NOTHINK, last_turn_only=True))


def test_a_default_system_prompt_is_used_only_where_there_is_none():
    without, with_own = say(("user", "hi")), say(("system", "own"), ("user", "hi"))
    assert joined(without, render(without, NOTHINK, system="S")).startswith("<|im_start|>system\nS<|im_end|>\n")
    assert joined(with_own, render(with_own, NOTHINK, system="S")) == template_text(with_own)
    assert joined(without, render(without, NOTHINK)) == "<|im_start|>user\nhi<|im_end|>\n"
    assert "You are a helpful assistant." in joined(without, render(without, TEMPLATES["qwen2_omni"]))


def test_text_between_tool_calls_stays_in_its_place():
    call = Part(kind="tool_call", text='{"name": "a", "arguments": {}}')
    conversation = say(("user", "q"), ("assistant", [call, Part(kind="text", text="then"), call]))
    block = '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>'
    assert f"{block}\nthen\n{block}<|im_end|>" in joined(conversation, render(conversation, NOTHINK))


def test_the_thinking_template_opens_the_last_answer_with_a_think_block():
    conversation = say(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    text = joined(conversation, render(conversation, THINKING))
    assert "<|im_start|>assistant\na<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n")
    assert "<think>" not in joined(conversation, render(conversation, NOTHINK))


# ------------------------------------------------------------------------------------ weights


def test_the_assistants_words_and_their_end_are_trained_and_nothing_else():
    call = Part(kind="tool_call", text='{"name": "get_weather", "arguments": {"city": "Paris"}}')
    conversation = say(
        ("user", [Part(kind="audio", media=MediaSource(path="x")), Part(kind="text", text="What's the weather?")]),
        ("assistant", [call]),
        ("tool", '{"temp_c": 21}'),
        ("assistant", "It is 21C in Paris."),
    )
    assert trained(render(conversation, NOTHINK)) == (
        "<|im_start|>user\nWhat's the weather?<|im_end|>\n<|im_start|>assistant\n"
        '‹<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>›\n'
        '<|im_start|>user\n<tool_response>\n{"temp_c": 21}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
        "‹It is 21C in Paris.<|im_end|>›\n"
    )


def test_last_turn_only_leaves_the_last_answer():
    conversation = say(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"), ("user", "s"))
    text = trained(render(conversation, NOTHINK, last_turn_only=True))
    assert "‹b<|im_end|>›" in text
    assert text.count("‹") == 1


def test_train_on_prompt_trains_everything():
    conversation = say(("system", "s"), ("user", "q"), ("assistant", "a"))
    assert {span.weight for span in render(conversation, NOTHINK, train_on_prompt=True)} == {1.0}


def test_turn_weights_replace_the_roles():
    turns = (
        Turn(role="user", parts=(Part(kind="text", text="q"),), weight=0.5),
        Turn(role="assistant", parts=(Part(kind="text", text="a"),), weight=0.0),
        Turn(role="user", parts=(Part(kind="text", text="r"),)),
        Turn(role="assistant", parts=(Part(kind="text", text="b"),), weight=2.0),
    )
    spans = render(Conversation(id="c", source="f:1", turns=turns), NOTHINK)
    assert [(span.text, span.weight) for span in spans if span.weight] == [("q<|im_end|>", 0.5), ("b<|im_end|>", 2.0)]


def test_an_empty_think_block_is_context_where_thinking_is_off():
    conversation = say(("user", "q"), ("assistant", "a"))
    assert "‹<think>\n\n</think>\n\na<|im_end|>›" in trained(render(conversation, THINKING))
    off = trained(render(conversation, THINKING, enable_thinking=False))
    assert "<think>\n\n</think>\n\n‹a<|im_end|>›" in off
    reasoned = say(("user", "q"), ("assistant", [Part(kind="reasoning", text="r"), Part(kind="text", text="a")]))
    both = trained(render(reasoned, THINKING, enable_thinking=False))
    assert "‹<think>\nr\n</think>\n\na<|im_end|>›" in both  # reasoning that a row gives is trained either way


# ------------------------------------------------------------------------------------ refusals


def test_wrong_template_names_and_misplaced_parts_are_refused():
    with pytest.raises(ValueError, match="did you mean qwen3_omni_nothink"):
        find_template("qwen3-omni-nothink")
    with pytest.raises(SampleError, match="assistant's turn"):
        render(say(("user", [Part(kind="tool_call", text="{}")])), NOTHINK)
    image = Part(kind="image", media=MediaSource(path="x"))
    with pytest.raises(SampleError, match="media inside"):
        render(
            say(("assistant", [Part(kind="text", text="<think>"), image, Part(kind="text", text="</think>")])), NOTHINK
        )
