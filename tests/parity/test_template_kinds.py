"""Every family reads templates that take only strings and those that take only typed parts; the answers are trained."""

import json
import re

import pytest
import torch

from omniloom.families.registry import find_spec
from omniloom.options import ImageConfig, ProcessorOptions, VideoConfig
from omniloom.tools.tiny import FAMILIES, make_tiny
from omniloom.types import (
    IGNORE_LABEL,
    Conversation,
    MediaHeader,
    MediaSource,
    Part,
    Turn,
)

AS_IT_IS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRIMMED = AS_IT_IS.replace("m['content']", "m['content'].strip()")
TYPED = AS_IT_IS.replace(
    " + m['content'] + '<|im_end|>\\n' }}",
    " }}{% for part in m['content'] %}{{ part['text'] if part['type'] == 'text' else WORDS[part['type']] }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}",
)
OPTIONS = ProcessorOptions(image=ImageConfig(max_pixels=64 * 64), video=VideoConfig(max_pixels=64 * 64))
HEADERS = {
    "image": MediaHeader(kind="image", width=90, height=60),
    "video": MediaHeader(kind="video", width=64, height=64, num_frames=20, fps=10.0, duration_seconds=2.0),
    "audio": MediaHeader(kind="audio", num_audio_samples=16_000, duration_seconds=1.0),
}
WORDS = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")} | {
    "audio": "<|audio_start|><|audio_pad|><|audio_end|>"
}
OLDER_WORDS = {
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return make_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param, num_words=400)


def use_template(checkpoint, jinja):
    """The template in the tokenizer's settings, as transformers reads it where there is no file of its own."""
    for name in ("chat_template.jinja", "chat_template.json"):
        (checkpoint / name).unlink(missing_ok=True)
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": jinja}))


@pytest.mark.parametrize("jinja", [AS_IT_IS, TRIMMED, TYPED], ids=["strings", "trimmed strings", "typed parts"])
def test_a_template_writes_what_transformers_writes_and_the_answers_are_trained(checkpoint, jinja):
    from transformers import AutoTokenizer

    config = json.loads((checkpoint / "config.json").read_text())
    spec = find_spec(config)
    hears, words = "omni" in spec.name, OLDER_WORDS if spec.name == "qwen2_5_omni" else WORDS
    use_template(checkpoint, jinja.replace("WORDS", str(words)))
    processor = spec.make_processor(checkpoint, spec.read_config(config), OPTIONS)
    assert set(processor.renderer.template.forms.values()) == {"typed" if jinja == TYPED else "string"}
    kinds = ("image", "video", "audio") if hears else ("image", "video")

    def text_of(value):
        return Part(kind="text", text=value)

    media = [Part(kind=kind, media=MediaSource(path="x")) for kind in kinds]
    asked = [part for one in media for part in (text_of(f" see {one.kind}: "), one)]
    turns = (
        Turn(role="system", parts=(text_of("be brief "),)),
        Turn(role="user", parts=(*asked, text_of("\n"))),
        Turn(role="assistant", parts=(text_of(" a cat "),)),
        Turn(role="user", parts=(text_of("and now?"),)),
        Turn(role="assistant", parts=(text_of("yes"),)),
    )
    conversation = Conversation(id="c", source="f:1", turns=turns)
    clips = processor.geometry(conversation, tuple(HEADERS[kind] for kind in kinds))
    example = processor.encode(conversation, clips, [None] * len(clips))

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [
        {
            "role": turn.role,
            "content": [{"type": part.kind, "text": part.text} for part in turn.parts]
            if jinja == TYPED
            else "".join(words[part.kind] if part.media else part.text for part in turn.parts),
        }
        for turn in turns
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    for kind, clip in zip(kinds, clips, strict=True):
        pad, times = words[kind].split("><")[1].join("<>"), processor.media.placeholder(clip)
        counts = [len(layout.ids) for layout in processor.media.tokens_of(clip)]
        assert sum(counts) == clip.num_tokens > 1
        pieces = iter(counts)
        text = text.replace(pad, re.sub(re.escape(pad), lambda _, pad=pad, left=pieces: pad * next(left), times), 1)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert example.input_ids.tolist() == ids

    trained = torch.where(example.labels == IGNORE_LABEL, -1, example.labels).tolist()
    runs = [part.split() for part in " ".join(map(str, trained)).split("-1") if part.strip()]
    answers = [tokenizer.decode([int(token) for token in run]) for run in runs]
    first = "a cat" if jinja == TRIMMED else " a cat "
    assert answers == [f"{first}<|im_end|>", "yes<|im_end|>"]
    assert processor.measure(conversation, tuple(HEADERS[kind] for kind in kinds)).num_tokens == len(ids)
