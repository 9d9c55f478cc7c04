"""Key rules: what is stacked, turned and flattened on the way in comes back bit for bit on the way out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniloom.keymap import KeyMap, Rule, Tied, canonical_name

RULES = KeyMap(
    rules=(
        Rule(published="thinker.layers.{i}.norm.weight", ours="text.layers.{i}.norm.weight"),
        Rule(published="thinker.layers.{i}.mlp.0.bias", ours="text.layers.{i}.mlp.first.bias"),
        Rule(reshape="transpose", published="thinker.layers.{i}.turned", ours="text.layers.{i}.turned"),
        Rule(reshape="flatten", published="thinker.patch.weight", ours="vision.patch.weight"),
        Rule(
            index="e",
            published=("thinker.layers.{i}.experts.{e}.gate.weight", "thinker.layers.{i}.experts.{e}.up.weight"),
            ours="text.layers.{i}.experts.gate_up",
        ),
        Rule(index="e", published="thinker.layers.{i}.experts.{e}.down.weight", ours="text.layers.{i}.experts.down"),
        Rule(published="thinker.embed.weight", ours="text.embed.weight"),
        Tied(published="thinker.head.weight", ours="text.head.weight", same_as="text.embed.weight"),
    ),
    carried=("talker.", "code2wav."),
)


def slices(box):
    return tuple(slice(start, stop) for start, stop in box)


def lay_out(array, layout):
    if layout == "transpose":
        return array.swapaxes(-1, -2)
    return array.reshape(array.shape[0], -1) if layout == "flatten" else array


def assemble(assembly, published, region=None):
    region = region or tuple((0, size) for size in assembly.shape)
    out = np.full([stop - start for start, stop in region], -1, dtype=np.int64)
    filled = np.zeros(out.shape, dtype=np.int64)
    for read in assembly.reads(region):
        part = lay_out(published[read.published][slices(read.box)], read.reshape)[slices(read.crop)]
        out[slices(read.target)] = part
        filled[slices(read.target)] += 1
    assert (filled == 1).all(), "every element must be read exactly once"
    return out


def take_apart(assembly, ours):
    for piece in assembly.pieces:
        part = ours[slices(piece.box)]
        part = part[0] if piece.stacked else part
        yield piece.published, (part.swapaxes(-1, -2) if piece.reshape == "transpose" else part).reshape(piece.shape)


@st.composite
def checkpoints(draw):
    size = st.integers(1, 5)
    hidden, inner, num_experts = draw(size), draw(size), draw(size)
    shapes = {"thinker.patch.weight": (draw(size), 3, 2, draw(size), 2)}
    for layer in range(draw(st.integers(1, 2))):
        prefix = f"thinker.layers.{layer}."
        shapes |= {prefix + "norm.weight": (hidden,), prefix + "mlp.0.bias": ()}
        shapes[prefix + "turned"] = (num_experts, hidden, inner)
        for expert in range(num_experts):
            shapes |= {f"{prefix}experts.{expert}.{name}.weight": (inner, hidden) for name in ("gate", "up")}
            shapes[f"{prefix}experts.{expert}.down.weight"] = (hidden, inner)
    names = draw(st.permutations(sorted(shapes)))
    counter = np.arange(sum(int(np.prod(shape)) for shape in shapes.values()))
    published, offset = {}, 0
    for name in names:
        count = int(np.prod(shapes[name]))
        published[name] = counter[offset : offset + count].reshape(shapes[name])
        offset += count
    return published


@given(checkpoints(), st.data())
@settings(max_examples=40, deadline=None)
def test_published_tensors_survive_the_way_to_ours_and_back(published, data):
    assemblies = RULES.assemblies({name: array.shape for name, array in published.items()})
    back = {}
    for assembly in assemblies.values():
        whole = assemble(assembly, published)
        back |= dict(take_apart(assembly, whole))
        cuts = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in assembly.shape]
        region = tuple((low, high) for low, high in cuts)
        np.testing.assert_array_equal(assemble(assembly, published, region), whole[slices(region)])
    assert back.keys() == published.keys()
    for name, array in published.items():
        np.testing.assert_array_equal(back[name], array)


def expert_shapes(num_experts=4, layer=0):
    prefix = f"thinker.layers.{layer}.experts."
    return {f"{prefix}{e}.{name}.weight": (3, 5) for e in range(num_experts) for name in ("gate", "up")}


def test_stack_of_concatenated_experts_has_gate_before_up():
    assembly = RULES.assemblies(expert_shapes())["text.layers.0.experts.gate_up"]
    assert assembly.shape == (4, 6, 5)
    places = {piece.published: piece.box for piece in assembly.pieces}
    assert places["thinker.layers.0.experts.2.up.weight"] == ((2, 3), (3, 6), (0, 5))


def test_a_slice_of_experts_reads_no_other_expert():
    assembly = RULES.assemblies(expert_shapes())["text.layers.0.experts.gate_up"]
    names = {read.published for read in assembly.reads(((1, 3), (0, 6), (0, 5)))}
    assert names == {f"thinker.layers.0.experts.{e}.{part}.weight" for e in (1, 2) for part in ("gate", "up")}


def test_a_slice_of_rows_reads_only_those_rows():
    assembly = RULES.assemblies({"thinker.patch.weight": (8, 3, 2, 2, 2)})["vision.patch.weight"]
    (read,) = assembly.reads(((2, 5), (0, 24)))
    assert read.box == ((2, 5), (0, 3), (0, 2), (0, 2), (0, 2))


def test_names_beyond_the_rules_are_an_error_that_lists_them():
    with pytest.raises(ValueError, match=r"no rule for thinker\.surprise, thinker\.layers\.x\.norm\.weight"):
        RULES.assemblies({"thinker.surprise": (1,), "thinker.layers.x.norm.weight": (1,), "talker.fine": (1,)})


def test_buffers_that_follow_from_the_config_are_passed_over():
    extras = ("thinker.layers.0.self_attn.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq")
    assert list(RULES.assemblies(expert_shapes() | dict.fromkeys(extras, (4,)))) == list(
        RULES.assemblies(expert_shapes())
    )


def test_every_spelling_of_a_name_is_found_and_two_at_once_are_refused():
    spellings = ("thinker.visual.{}", "visual.{}", "model.visual.{}", "thinker.model.visual.{}")
    assert canonical_name("language_model.norm.weight") == canonical_name("thinker.model.norm.weight")  # saved headless
    rules = KeyMap(
        rules=(
            Rule(published="thinker.visual.norm.weight", ours="vision.norm.weight"),
            Rule(index="e", published="thinker.visual.{e}.down.weight", ours="vision.down"),
            Rule(published="thinker.visual.down", ours="vision.down"),
        ),
        carried=("thinker.visual.unused.",),
    )
    for spelling in spellings:
        assemblies = rules.assemblies({spelling.format("norm.weight"): (3,), spelling.format("unused.x"): (2,)})
        assert assemblies["vision.norm.weight"].pieces[0].published == spelling.format("norm.weight")
    with pytest.raises(ValueError, match=r"visual\.norm\.weight and model\.visual\.norm\.weight are the same tensor"):
        rules.assemblies({"visual.norm.weight": (3,), "model.visual.norm.weight": (3,)})
    with pytest.raises(ValueError, match=r"visual\.down and visual\.0\.down\.weight are the same weights"):
        rules.assemblies({"visual.0.down.weight": (3,), "visual.down": (1, 3)})


def test_a_leading_zero_in_an_index_is_not_taken_for_the_number():
    with pytest.raises(ValueError, match=r"no rule for thinker\.layers\.00\.norm\.weight"):
        RULES.assemblies({"thinker.layers.00.norm.weight": (1,)})


def test_a_hole_in_a_stack_names_the_missing_tensors():
    shapes = expert_shapes()
    del shapes["thinker.layers.0.experts.1.up.weight"]
    with pytest.raises(ValueError, match=r"1 of its tensors are missing: thinker\.layers\.0\.experts\.1\.up\.weight"):
        RULES.assemblies(shapes)


def test_an_absurd_expert_number_is_refused_without_counting_up_to_it():
    with pytest.raises(ValueError, match="of its tensors are missing"):
        RULES.assemblies(expert_shapes() | {"thinker.layers.0.experts.99999999999.up.weight": (3, 5)})


def test_experts_of_unlike_shape_are_refused():
    shapes = expert_shapes() | {f"thinker.layers.0.experts.1.{name}.weight": (4, 5) for name in ("gate", "up")}
    with pytest.raises(ValueError, match=r"experts\.1\.gate\.weight: expected \[3, 5\] .*, got \[4, 5\]"):
        RULES.assemblies(shapes)


def test_parts_of_an_expert_differ_in_dim_0_at_most():
    shapes = {f"thinker.layers.0.experts.{e}.up.weight": (2, 5) for e in range(4)}
    assembly = RULES.assemblies(expert_shapes() | shapes)["text.layers.0.experts.gate_up"]
    assert assembly.shape == (4, 5, 5)
    with pytest.raises(ValueError, match=r"experts\.0\.up\.weight: expected \[3, 5\] .*, got \[3, 4\]"):
        RULES.assemblies(expert_shapes() | dict.fromkeys(shapes, (3, 4)))


def test_too_few_dims_for_a_rule_are_refused():
    with pytest.raises(ValueError, match=r"thinker\.patch\.weight: expected at least 2 dims, got shape \[7\]"):
        RULES.assemblies({"thinker.patch.weight": (7,)})


def test_a_tied_head_is_read_from_the_embedding_and_may_be_published_or_not():
    shapes = {"thinker.embed.weight": (7, 3)}
    for extra in ({}, {"thinker.head.weight": (7, 3)}):
        assemblies = RULES.assemblies(shapes | extra)
        assert [piece.published for piece in assemblies["text.head.weight"].pieces] == ["thinker.embed.weight"]
        assert RULES.second_names(shapes | extra) == dict.fromkeys(extra, "text.embed.weight")


def test_a_tied_head_that_stands_alone_is_the_embedding():
    """safetensors.torch.save_model keeps the first of two names of one tensor by the alphabet."""
    shapes = {"thinker.head.weight": (7, 3)}
    assemblies = RULES.assemblies(shapes)
    for ours in ("text.embed.weight", "text.head.weight"):
        assert [piece.published for piece in assemblies[ours].pieces] == ["thinker.head.weight"]
    assert RULES.second_names(shapes) == {}


def test_published_names_of_ours_are_found_without_a_checkpoint():
    assert RULES.published_names("text.layers.3.norm.weight") == ("thinker.layers.3.norm.weight",)
    assert RULES.published_names("text.layers.3.experts.down") == ("thinker.layers.3.experts.*.down.weight",)
    assert RULES.published_names("text.head.weight") == ("thinker.embed.weight",)
    assert RULES.published_names("text.nothing") == ()
