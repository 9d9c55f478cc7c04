"""A conversation reads as its chat template writes it, whatever the template, and exactly the answers are trained."""

# ruff: noqa: RUF001, E501 -- the angle marks are the specification's, the lines those of templates
import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.options import ProcessorOptions
from omniloom.processors.chat_template import (
    TEMPLATE_DIR,
    ChatTemplate,
    TemplateSource,
    find_source,
    messages_of,
    named_source,
    open_template,
)
from omniloom.processors.rendering import Renderer, _plain_extents, split_reasoning
from omniloom.types import Conversation, MediaSource, Part, SampleError, Turn

PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>", "audio": "<|audio_pad|>"}
WORDS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "audio": "<|audio_start|><|audio_pad|><|audio_end|>",
}

# ------------------------------------------------------------------------------------ random conversations

markers = st.sampled_from(
    ("<|im_end|>", "<|im_start|>assistant\n", "<think>", "</think>", "<tool_call>", "assistant", "<tool_response>", "9")
)
letters = st.text(alphabet=st.sampled_from("ab .,?\n{}\"'<>|/狗你好😀é\u0301\t0"), max_size=12)
words = st.one_of(letters, st.lists(st.one_of(letters, markers), max_size=4).map("".join))
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


def _message(turn, typed=True):
    message = {"role": turn.role, "content": [] if typed else ""}
    for part in turn.parts:
        if part.kind == "reasoning":
            message["reasoning_content"] = part.text
        elif part.kind == "tool_call":
            call = json.loads(part.text)
            message.setdefault("tool_calls", []).append({"type": "function", "function": call})
        elif part.kind == "text":
            message["content"] += [{"type": "text", "text": part.text}] if typed else part.text
        else:
            message["content"] += [{"type": part.kind, part.kind: "x"}] if typed else WORDS[part.kind]
    return message


def oracle(jinja, conversation, *, typed=True, generation_prompt=False, mask=False, **variables):
    """The text that transformers writes; with `mask` what it finds in generation blocks as well."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[[_message(turn, typed) for turn in conversation.turns]],
        tools=[json.loads(tool) for tool in conversation.tools] or None,
        chat_template=jinja,
        add_generation_prompt=generation_prompt,
        return_assistant_tokens_mask=mask,
        **variables,
    )
    return (texts[0], spans[0]) if mask else texts[0]


@functools.cache
def renderer(jinja, end="<|im_end|>", pads=("image", "video", "audio"), variables=(), **options):
    source = TemplateSource(texts={"default": jinja}, where="chat_template.jinja")
    template = ChatTemplate(source, dict(variables), {kind: PADS[kind] for kind in pads}, WORDS)
    return Renderer(template, ProcessorOptions(**options), end)


def show(rendered):
    """The text with what is trained between angle marks; weights other than 1 before the text that has them."""
    shown, done = "", 0
    for weight, runs in itertools.groupby(rendered.weights, key=lambda run: run[1]):
        text, done = rendered.text[done : (end := list(runs)[-1][0])], end
        shown += text if not weight or not text else f"‹{text}›" if weight == 1 else f"‹{weight:g}:{text}›"
    assert done == len(rendered.text)
    return shown


def trained(jinja, conversation, end="<|im_end|>", **options):
    return show(renderer(jinja, end, **options).render(conversation))


def without_sound(conversation):
    turns = (
        replace(turn, parts=tuple(part for part in turn.parts if part.kind != "audio")) for turn in conversation.turns
    )
    return replace(conversation, turns=tuple(turns))


def chatml(name):
    return (TEMPLATE_DIR / f"{name}.jinja").read_text(encoding="utf-8")


def swap(text, *pairs):
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


NOTHINK = chatml("qwen3_omni")
# the thinking checkpoints' templates differ in this condition
CONDITION = "if reasoning and loop.index0 > ns.last_query_index"
THINKING = swap(NOTHINK, (CONDITION, "if loop.index0 > ns.last_query_index and (loop.last or reasoning)"))
VL = chatml("qwen3_vl")
QWEN3_5 = chatml("qwen3_5")
SIMPLE = chatml("qwen2_5_omni").replace("<|vision_bos|><|IMAGE|><|vision_eos|>", WORDS["image"])
SIMPLE = SIMPLE.replace("<|vision_bos|><|VIDEO|><|vision_eos|>", WORDS["video"])
SIMPLE = SIMPLE.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", WORDS["audio"])


def tagged(jinja):
    """A template of ours with generation blocks around what an answer is."""
    return swap(
        jinja,
        (
            "{{- '<|im_start|>assistant\\n' }}\n        {%- if",
            "{{- '<|im_start|>assistant\\n' }}{% generation %}\n        {%- if",
        ),
        (
            "{%- endfor %}\n        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == 'tool' %}",
            "{%- endfor %}\n        {{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}\n    {%- elif message.role == 'tool' %}",
        ),
    )


# ------------------------------------------------------------------------------------ twenty altered templates

LLAMA = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
INST = """{%- for message in messages %}
    {%- if message.role == 'system' %}{% set system = '<<SYS>>\n' + message.content + '\n<</SYS>>\n\n' %}
    {%- elif message.role == 'user' %}{{- '<s>[INST] ' + message.content.strip() + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}{{- ' ' + message.content.strip() + ' </s>' }}
    {%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{%- endif %}
{%- endfor %}"""
PLAIN = """{%- for message in messages -%}
{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: ', 'system': '', 'tool': 'RESULT: '}[message['role']] }}{{ message['content'] }}
{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"""
CALLS = (  # another layout of tool calls
    '{{- \'<tool_call>\\n{"name": "\' + function.name + \'", "arguments": \' }}\n'
    "            {{- function.arguments if function.arguments is string else function.arguments | tojson }}\n"
    "            {{- '}\\n</tool_call>' }}"
)
XML_CALLS = """{{- '<function=' + function.name + '>' }}
            {%- for name, value in function.arguments | items %}{{ '\n<parameter=' + name + '>\n' + value | string + '\n</parameter>' }}{% endfor %}
            {{- '\n</function>' }}"""
OPENING = "{{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
ONLY_TEXT = "{%- macro flat(content) -%}{{ content + '' }}{%- endmacro -%}"
ALTERED = {
    "published": (NOTHINK, "<|im_end|>"),
    "thinking": (THINKING, "<|im_end|>"),
    "no reasoning": (VL, "<|im_end|>"),
    "other markers": (swap(NOTHINK, ("<|im_end|>", "<|im_stop|>"), ("<|im_start|>", "<|turn|>")), "<|im_end|>"),
    "markers of no token": (swap(NOTHINK, ("<|im_end|>", " END"), ("<|im_start|>", "### ")), None),
    "other tool layout": (swap(NOTHINK, (CALLS, XML_CALLS)), "<|im_end|>"),
    "indented tools": (
        swap(NOTHINK, ("tool | tojson", "tool | tojson(indent=2)"), ("# Tools", "# Functions")),
        "<|im_end|>",
    ),
    "escaped calls": (
        swap(NOTHINK, ("else function.arguments | tojson", "else function.arguments | tojson(ensure_ascii=True)")),
        "<|im_end|>",
    ),
    "default system": (SIMPLE, "<|im_end|>"),
    "another default system": (swap(SIMPLE, ("You are a helpful assistant.", "Be brief: {{ 1 }}")), "<|im_end|>"),
    "trimmed": (
        swap(
            NOTHINK, ("{%- set content = flat(message.content) %}", "{%- set content = flat(message.content) | trim %}")
        ),
        "<|im_end|>",
    ),
    "left trimmed": (
        swap(VL, ("'<|im_start|>assistant\\n' + content", "'<|im_start|>assistant\\n' + content.lstrip()")),
        "<|im_end|>",
    ),
    "reasoning kept": (swap(NOTHINK, (CONDITION, "if reasoning")), "<|im_end|>"),
    "reasoning of the last dropped": (swap(NOTHINK, (CONDITION, "if false")), "<|im_end|>"),
    "opens thinking": (
        swap(THINKING, (OPENING, OPENING.replace("assistant\\n", "assistant\\n<think>\\n"))),
        "<|im_end|>",
    ),
    "no generation prompt": (swap(NOTHINK, ("{%- if add_generation_prompt %}\n    " + OPENING, "")), "<|im_end|>"),
    "generation blocks": (tagged(NOTHINK), "<|im_end|>"),
    "qwen3.5": (QWEN3_5, "<|im_end|>"),
    "qwen3.5, earlier thinking kept": ("{%- set preserve_thinking = true %}" + QWEN3_5, "<|im_end|>"),
    "qwen3.5, with an effort": ("{%- set reasoning_effort = 'high' %}" + QWEN3_5, "<|im_end|>"),
    "a date": ("{{- strftime_now('%Y') }}" + NOTHINK, "<|im_end|>"),
    "ends in a token more": (NOTHINK + "{{ '<|endoftext|>' if not add_generation_prompt }}", "<|im_end|>"),
    "asks after tool responses": (
        swap(
            NOTHINK,
            (
                "message.role == 'user' %}\n        {%- set ns.searching",
                "message.role == 'user' and not (flat(message.content).startswith('<tool_response>')) %}\n        {%- set ns.searching",
            ),
        ),
        "<|im_end|>",
    ),
}
# templates that take only strings, by what ends a turn in them
STRINGS = {
    "strings": (swap(NOTHINK, (NOTHINK[: NOTHINK.index("{%- endmacro -%}") + 16], ONLY_TEXT)), "<|im_end|>"),
    "llama": (LLAMA, "<|eot_id|>"),
    "inst": (INST, "</s>"),
    "plain": (PLAIN, None),
}


@pytest.mark.parametrize("name", ALTERED)
@settings(deadline=None, max_examples=25)
@given(conversation=conversations, generation_prompt=st.booleans())
def test_text_is_what_the_chat_template_writes(name, conversation, generation_prompt):
    jinja, end = ALTERED[name]
    made = renderer(jinja, end)
    if made.template.typed_media != PADS.keys():  # a family that hears nothing
        conversation = without_sound(conversation)
    expected = oracle(jinja, conversation, generation_prompt=generation_prompt)
    if generation_prompt:
        assert made.prompt(conversation) == expected
    else:
        try:
            assert made.render(conversation).text == expected
        except SampleError as error:
            assert "leaves out this answer" in error.reason or "not found" in error.reason  # noqa: PT017


@pytest.mark.parametrize("jinja", [NOTHINK, THINKING])
@settings(deadline=None, max_examples=150)
@given(conversation=conversations)
def test_answers_are_found_where_transformers_finds_them_by_generation_blocks(jinja, conversation):
    text, spans = oracle(tagged(jinja), conversation, mask=True)
    rendered = renderer(jinja).render(conversation)
    assert rendered.text == text
    found, done = [], 0
    for end, weight in rendered.weights:
        found += [(done, end)] if weight else []
        done = end
    assert found == [tuple(span) for span in spans]


@pytest.mark.parametrize("name", ALTERED | STRINGS)
def test_words_found_without_marks_are_where_marks_find_them(name):
    jinja, end = (ALTERED | STRINGS)[name]
    made, found = renderer(jinja, end), 0
    for told in (
        "a cat",
        "<think>\nhm\n</think>\n\na cat",
        " 9 ",
        "assistant",
        "",
        "a cat\n\n",
        "twice, twice",
        "end.",
    ):
        for asked in (" see the picture\n", "a", "end", "<tool_call>"):
            turns = made._turns(say(("user", asked), ("assistant", told), ("user", "again?"), ("assistant", "told so")))
            messages, leaves = messages_of(turns, made.template)
            text = made.template.write(messages)
            if (plain := _plain_extents(turns, text, leaves)) is not None:
                marks, found = made._finder._mark(turns, (), text, leaves), found + 1
                assert plain == [marks.extent(leaf, text) for leaf in leaves]
    assert found >= 4


def test_reasoning_and_words_that_stand_twice_are_left_to_marks():
    def plain(*turns):
        messages, leaves = messages_of(say(*turns).turns, (made := renderer(NOTHINK)).template)
        return _plain_extents(say(*turns).turns, made.template.write(messages), leaves)

    thought = (Part(kind="reasoning", text="weigh"), Part(kind="text", text="a cat"))
    assert plain(("user", "what?"), ("assistant", "a cat")) == [(17, 22), (55, 60)]
    assert plain(("user", "what?"), ("assistant", thought)) is None
    assert plain(("user", "what?"), ("assistant", "what")) is None
    assert plain(("user", "what?"), ("assistant", "assistant")) is None


plain_turns = st.lists(st.tuples(words.filter(str.strip), words.filter(str.strip)), min_size=1, max_size=3)


@pytest.mark.parametrize("name", STRINGS)
@settings(deadline=None, max_examples=25)
@given(pairs=plain_turns, with_image=st.booleans(), system=st.one_of(st.none(), words.filter(str.strip)))
def test_templates_that_take_strings_get_the_words_for_media_in_them(name, pairs, with_image, system):
    jinja, end = STRINGS[name]
    turns = [turn for asked, told in pairs for turn in (("user", asked), ("assistant", told))]
    conversation = say(*([("system", system)] if system and name != "inst" else []), *turns)
    if with_image:
        image = Part(kind="image", media=MediaSource(path="x"))
        first = next(i for i, turn in enumerate(conversation.turns) if turn.role == "user")
        of_user = replace(conversation.turns[first], parts=(image, *conversation.turns[first].parts))
        conversation = replace(
            conversation, turns=(*conversation.turns[:first], of_user, *conversation.turns[first + 1 :])
        )
    made = renderer(jinja, end, variables=(("bos_token", "<|begin|>"),))
    rendered = made.render(conversation)
    assert rendered.text == oracle(jinja, conversation, typed=False, bos_token="<|begin|>")
    assert set(made.template.forms.values()) <= {"string", "typed"}
    assert made.template.forms["user"] == made.template.forms["assistant"] == "string"
    assert rendered.text.count(WORDS["image"]) == with_image


HELLO = say(("user", " q "), ("assistant", "a"), ("user", "r"), ("assistant", " b"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "strings",
            "<|im_start|>user\n q <|im_end|>\n<|im_start|>assistant\n‹a<|im_end|>›\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n‹ b<|im_end|>›\n",
        ),
        (
            "llama",
            "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
            "‹a<|eot_id|>›<|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n‹b<|eot_id|>›",
        ),
        ("inst", "<s>[INST] q [/INST] ‹a </s>›<s>[INST] r [/INST] ‹b </s>›"),
        ("plain", "USER:  q \nASSISTANT: ‹a›\nUSER: r\nASSISTANT: ‹ b›\n"),
    ],
)
def test_answers_and_what_ends_them_are_trained_in_templates_of_other_makes(name, expected):
    assert trained(STRINGS[name][0], HELLO, STRINGS[name][1]) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("other markers", "‹a<|im_stop|>›\n"),
        ("markers of no token", "‹a END›\n"),
        ("no generation prompt", "<|im_start|>assistant\n‹a<|im_end|>›\n"),
        ("opens thinking", "<|im_start|>assistant\n<think>\n‹\n</think>\n\na<|im_end|>›\n"),
        ("ends in a token more", "‹a<|im_end|>›\n<|endoftext|>"),
        ("generation blocks", "<|im_start|>assistant\n‹a<|im_end|>›\n"),
    ],
)
def test_the_end_of_an_altered_template_is_trained(name, expected):
    assert trained(ALTERED[name][0], say(("user", "q"), ("assistant", "a")), ALTERED[name][1]).endswith(expected)


def test_generation_blocks_say_what_trains_and_the_end_of_turn_trains_in_any_case():
    short = swap(
        SIMPLE,
        (
            "{{- '<|im_start|>' + message.role + '\\n' }}",
            "{{- '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}{% generation %}{{ 'Well: ' + message.content[0].text }}{% endgeneration %}{% else %}",
        ),
        ("    {{- '<|im_end|>\\n' }}", "    {%- endif %}\n    {{- '<|im_end|>\\n' }}"),
    )
    assert trained(short, say(("user", "q"), ("assistant", "a"))).endswith(
        "<|im_start|>assistant\n‹Well: a<|im_end|>›\n"
    )
    first = short.replace(
        "message.role == 'assistant' %}{% gen", "message.role == 'assistant' and not loop.last %}{% gen"
    )
    assert trained(first, say(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))).count("‹") == 1


def test_a_generated_answer_is_told_from_its_reasoning():
    assert split_reasoning("<think>\nhm\n</think>\n\nyes ") == ("hm", "yes")
    assert split_reasoning("hm\n</think>\n\nyes") == ("hm", "yes")  # where the prompt had opened the block
    assert split_reasoning(" yes") == ("", "yes")
    assert split_reasoning("<think>\nnever ends") == ("", "<think>\nnever ends")


def test_templates_without_reasoning_leave_it_out_and_take_inline_blocks_as_text():
    reasoned = say(("user", "q"), ("assistant", [Part(kind="reasoning", text="hm"), Part(kind="text", text="a")]))
    assert "hm" not in trained(VL, reasoned)
    assert renderer(VL).template.leaves_out == ("reasoning",)
    assert renderer(SIMPLE).template.leaves_out == ("tools", "tool calls", "reasoning")
    assert renderer(NOTHINK).template.leaves_out == ()
    inline = say(("user", "q"), ("assistant", "<think>\nr\n</think>\n\na"), ("user", "s"), ("assistant", "b"))
    assert "‹<think>\nr\n</think>\n\na<|im_end|>›" in trained(VL, inline)


def test_a_part_of_its_own_weight_has_it_and_the_last_one_ends_the_turn():
    call = Part(kind="tool_call", text='{"name": "f", "arguments": {}}', weight=0.5)
    turns = (
        Turn(role="user", parts=(Part(kind="text", text="q"),)),
        Turn(role="assistant", parts=(Part(kind="text", text="a"), call, replace(call, weight=None))),
    )
    conversation = Conversation(id="c", source="f:1", turns=turns)
    block = '\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert trained(NOTHINK, conversation).endswith(f"‹a›‹0.5:{block}›‹{block}<|im_end|>›\n")
    later = replace(conversation, turns=(*turns, Turn(role="assistant", parts=(Part(kind="text", text="z"),))))
    assert trained(NOTHINK, later, last_turn_only=True).count("‹") == 1


def test_a_default_system_prompt_is_used_only_where_there_is_none():
    without, with_own = (
        say(("user", "hi"), ("assistant", "a")),
        say(("system", "own"), ("user", "hi"), ("assistant", "a")),
    )
    assert trained(NOTHINK, without, system="S").startswith("<|im_start|>system\nS<|im_end|>\n")
    assert renderer(NOTHINK, system="S").render(with_own).text == oracle(NOTHINK, with_own)
    assert trained(NOTHINK, without).startswith("<|im_start|>user\nhi<|im_end|>\n")
    assert "You are a helpful assistant." in trained(SIMPLE, without)


def test_text_between_tool_calls_stays_in_its_place():
    call = Part(kind="tool_call", text='{"name": "a", "arguments": {}}')
    conversation = say(("user", "q"), ("assistant", [call, Part(kind="text", text="then"), call]))
    block = '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>'
    assert f"‹{block}\nthen\n{block}<|im_end|>›" in trained(NOTHINK, conversation)


def test_arguments_keep_their_spelling_where_the_template_writes_strings_as_they_are():
    spaced = say(("user", "q"), ("assistant", [Part(kind="tool_call", text='{"name": "a", "arguments": {"x":  1}}')]))
    assert '"arguments": {"x":  1}}' in trained(NOTHINK, spaced)
    assert "<parameter=x>\n1\n" in trained(ALTERED["other tool layout"][0], spaced)


def test_the_thinking_template_opens_the_last_answer_with_a_think_block():
    text = trained(THINKING, say(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")))
    assert "<|im_start|>assistant\n‹a<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n‹<think>\n\n</think>\n\nb<|im_end|>›\n")


# ------------------------------------------------------------------------------------ weights


def test_the_assistants_words_and_their_end_are_trained_and_nothing_else():
    call = Part(kind="tool_call", text='{"name": "get_weather", "arguments": {"city": "Paris"}}')
    conversation = say(
        ("user", [Part(kind="audio", media=MediaSource(path="x")), Part(kind="text", text="What's the weather?")]),
        ("assistant", [call]),
        ("tool", '{"temp_c": 21}'),
        ("assistant", "It is 21C in Paris."),
    )
    assert trained(NOTHINK, conversation) == (
        f"<|im_start|>user\n{WORDS['audio']}What's the weather?<|im_end|>\n<|im_start|>assistant\n"
        '‹<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>›\n'
        '<|im_start|>user\n<tool_response>\n{"temp_c": 21}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
        "‹It is 21C in Paris.<|im_end|>›\n"
    )


def test_last_turn_only_leaves_the_last_answer():
    conversation = say(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"), ("user", "s"))
    text = trained(NOTHINK, conversation, last_turn_only=True)
    assert "‹b<|im_end|>›" in text
    assert text.count("‹") == 1


def test_train_on_prompt_trains_everything():
    conversation = say(("system", "s"), ("user", "q"), ("assistant", "a"))
    shown = trained(NOTHINK, conversation, train_on_prompt=True)
    assert shown.count("‹") == 1
    assert shown[0] == "‹"
    assert shown[-1] == "›"


def test_turn_weights_replace_the_roles():
    turns = (
        Turn(role="user", parts=(Part(kind="text", text="q"),), weight=0.5),
        Turn(role="assistant", parts=(Part(kind="text", text="a"),), weight=0.0),
        Turn(role="user", parts=(Part(kind="text", text="r"),)),
        Turn(role="assistant", parts=(Part(kind="text", text="b"),), weight=2.0),
    )
    text = trained(NOTHINK, Conversation(id="c", source="f:1", turns=turns))
    assert [part.partition("›")[0] for part in text.split("‹")[1:]] == ["0.5:q<|im_end|>", "2:b<|im_end|>"]


def test_an_empty_think_block_is_context_where_thinking_is_off():
    conversation = say(("user", "q"), ("assistant", "a"))
    assert "‹<think>\n\n</think>\n\na<|im_end|>›" in trained(THINKING, conversation)
    off = trained(THINKING, conversation, enable_thinking=False)
    assert "<think>\n\n</think>\n\n‹a<|im_end|>›" in off
    reasoned = say(("user", "q"), ("assistant", [Part(kind="reasoning", text="r"), Part(kind="text", text="a")]))
    both = trained(THINKING, reasoned, enable_thinking=False)
    assert "‹<think>\nr\n</think>\n\na<|im_end|>›" in both  # reasoning that a row gives is trained either way


def open_with(folder, jinja, variables):
    """The renderer of a checkpoint with this template, under the variables of the config."""
    (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    options, media = ProcessorOptions(template_variables=variables), SimpleNamespace(pads=PADS, words=WORDS)
    template = open_template(folder, options, SimpleNamespace(special_tokens_map={}), media)
    return Renderer(template, options, "<|im_end|>")


def test_variables_of_the_config_reach_the_template_as_transformers_hands_them_over(tmp_path):
    reasoned = [Part(kind="reasoning", text="r"), Part(kind="text", text="a")]
    conversation = say(("system", "s"), ("user", "q"), ("assistant", reasoned), ("user", "p"), ("assistant", "b"))
    for variables in ({}, {"preserve_thinking": True}, {"reasoning_effort": "high"}):
        made = open_with(tmp_path, QWEN3_5, variables)
        assert made.render(conversation).text == oracle(QWEN3_5, conversation, **variables)
        assert ("<think>\n‹r\n</think>\n\na<|im_end|>›" in show(made.render(conversation))) == (
            "preserve_thinking" in variables
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "preserve_thinkin",
            r"data\.template_variables\.preserve_thinkin: .*does not ask for it; did you mean preserve_th",
        ),
        (
            "effort",
            r"data\.template_variables\.effort: .*does not ask for it; it asks for preserve_thinking, .*reasoning_effort",
        ),
        ("enable_thinking", r"not to be given here; data\.enable_thinking says it"),
        ("messages", r"data\.template_variables\.messages: not to be given here"),
    ],
)
def test_variables_that_a_template_does_not_ask_for_are_refused(tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        open_with(tmp_path, QWEN3_5, {name: "x"})


# ------------------------------------------------------------------------------------ templates and refusals


def test_a_list_of_named_templates_has_one_for_rows_with_tools(tmp_path: Path):
    named = [{"name": "default", "template": SIMPLE}, {"name": "tool_use", "template": NOTHINK}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    made = Renderer(ChatTemplate(find_source(tmp_path), {}, PADS, WORDS), ProcessorOptions(), "<|im_end|>")
    tool = json.dumps({"type": "function", "function": {"name": "f", "parameters": {}}})
    for conversation, jinja in ((HELLO, SIMPLE), (replace(HELLO, tools=(tool,)), NOTHINK)):
        assert made.render(conversation).text == oracle(jinja, conversation)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": VL}))
    assert find_source(tmp_path).texts == {"default": VL}
    (tmp_path / "chat_template.jinja").write_text(THINKING)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(NOTHINK)
    assert find_source(tmp_path).texts == {"default": THINKING, "tool_use": NOTHINK}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"no chat template in .*name one with data\.template, among qwen2_vl"),
        ([{"name": "rag", "template": "x"}], "no chat template is called default, only rag"),
        ([{"template": "x"}], "neither a text nor a list of named texts"),
        (7, "neither a text nor a list of named texts"),
    ],
)
def test_a_checkpoint_without_a_usable_template_is_refused(tmp_path: Path, given, message):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
    with pytest.raises(ValueError, match=message):
        find_source(tmp_path)


def test_a_template_that_cannot_be_run_or_split_is_refused_with_the_place():
    with pytest.raises(ValueError, match=r"cannot be parsed: .*line 2: '\{% if %\}'"):
        renderer("ok\n{% if %}")
    with pytest.raises(ValueError, match="neither as typed content nor as strings: it writes 'nothing of it'"):
        renderer("nothing of it")
    with pytest.raises(
        ValueError, match=r"nor as strings: the chat template refuses the conversation: 'no' is undefined \(line 1"
    ):
        renderer("{{ no.thing }}")


def test_a_row_that_the_template_refuses_is_bad_with_its_words():
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}" + NOTHINK
    with pytest.raises(SampleError, match=r"the user must begin \(line 1 of chat_template\.jinja\)"):
        renderer(strict).render(say(("system", "s"), ("user", "q"), ("assistant", "a")))
    first = "{%- for message in messages[:2] %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    with pytest.raises(SampleError, match="leaves out this answer"):
        renderer(first, None).render(HELLO)
    with pytest.raises(SampleError, match="assistant's turn"):
        renderer(NOTHINK).render(say(("user", [Part(kind="tool_call", text="{}")])))


def test_templates_cannot_leave_their_sandbox():
    with pytest.raises(ValueError, match="unsafe"):
        renderer("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="the chat template refuses"):
        renderer("{{ messages.append(1) }}")


def test_built_in_templates_are_named_and_those_of_other_families_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="did you mean qwen3_omni_nothink"):
        named_source("qwen3-omni-nothink", (), tmp_path)
    with pytest.raises(ValueError, match=r"qwen2_omni is of another family; .* takes qwen3_vl_nothink or qwen3_vl"):
        named_source("qwen2_omni", ("qwen3_vl_nothink", "qwen3_vl"), tmp_path)
    source, variables = named_source("qwen2_omni", ("qwen2_omni",), tmp_path)
    made = Renderer(ChatTemplate(source, variables, {}, WORDS), ProcessorOptions(), "<|im_end|>")
    image = Part(kind="image", media=MediaSource(path="x"))
    assert show(made.render(say(("user", [image]), ("assistant", "a")))) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{WORDS['image']}<|im_end|>\n<|im_start|>assistant\n‹a<|im_end|>›\n"
    )
    source, variables = named_source("qwen3_omni", ("qwen3_omni",), tmp_path)
    made = Renderer(ChatTemplate(source, variables, {}, WORDS), ProcessorOptions(), "<|im_end|>")
    assert made.render(HELLO).text == oracle(THINKING, HELLO)


IMAGE_ALONE = ("user", [Part(kind="image", media=MediaSource(path="x"))])


@pytest.mark.parametrize("between", [(), (("user", ""),), (IMAGE_ALONE,)], ids=["nothing", "no words", "an image"])
def test_an_answer_without_words_is_not_taken_for_a_later_one_that_opens_thinking(between):
    text = trained(ALTERED["opens thinking"][0], say(("user", "q"), ("assistant", ""), *between, ("assistant", "b")))
    opening = "<|im_start|>assistant\n"
    assert f"q<|im_end|>\n{opening}‹<|im_end|>›\n" in text
    assert text.endswith(f"{opening}<think>\n‹\n</think>\n\nb<|im_end|>›\n")
    assert text.count("‹") == 2


def test_a_turn_that_shows_no_marks_hides_no_other():
    call = Part(kind="tool_call", text='{"name": "f", "arguments": {}}')
    answers = (("assistant", "<|im_end|>"), ("assistant", [Part(kind="text", text="x<think>b</think>"), call]))
    text = trained(THINKING, say(*answers))
    assert text.startswith("<|im_start|>assistant\n‹<|im_end|><|im_end|>›\n<|im_start|>assistant\n‹")
    assert text.count("‹") == 2


def test_a_tool_call_that_the_template_does_not_write_makes_a_bad_row_and_no_answer_without_it():
    call = Part(kind="tool_call", text='{"name": "look", "arguments": {}}')
    for said in ([call], [Part(kind="text", text="wait"), call]):
        asked = say(("user", "q"), ("assistant", said))
        assert "look" in trained(NOTHINK, asked)
        with pytest.raises(SampleError, match=r"messages\[1\]: .* leaves out this answer's tool call; data\.template"):
            trained(SIMPLE, asked)
