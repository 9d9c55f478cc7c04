"""Invertible rules between the published names of a checkpoint's tensors and ours.

Owns how names, and with them shapes, translate: one tensor of ours is assembled from pieces, each piece being one whole
published tensor. Knows no file, no tensor and no torch: it deals in names, shapes and boxes, so the same assembly tells
`checkpoint/` which bytes a rank has to read for its slice and where a trained tensor's parts go in an export.

Families write their rules in `spec.py`, in the published names; `canonical_name` tells which other spellings mean
the same. `{i}` in a name stands for a whole dot-separated part that is a number:

    KeyMap(
        rules=(
            Rule(published="thinker.model.layers.{i}.mlp.gate.weight", ours="text.layers.{i}.moe.router.weight"),
            Rule(
                published=("thinker.model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
                           "thinker.model.layers.{i}.mlp.experts.{e}.up_proj.weight"),
                ours="text.layers.{i}.moe.experts.gate_up",
                index="e",
            ),
        ),
        carried=("talker.", "code2wav."),
    )
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import Literal

Reshape = Literal["same", "transpose", "flatten"]
Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]  # (start, stop) along each dim
_Members = dict[tuple[int, int], str]  # published names by row of a stack and part of a row

MAX_LISTED = 8  # names of one kind of fault that a message spells out
# buffers that follow from config.json, which older versions of transformers saved
_COMPUTED = re.compile(r"(.*\.)?(original_inv_freq|inv_freq|position_ids|positional_embedding|masked_bias)")


# ---------------------------------------------------------------------------------------- rules


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One tensor of ours (for each `{i}`) from a published one, or from as many as `{index}` counts.

    `reshape` says how the published dims become ours: "transpose" lets the last two change places (published
    `[..., in, out]`, ours `[..., out, in]`), unless the tensor has the shape `unless`, since transformers 5 saves
    experts the other way round; "flatten" makes one of all dims after the first, of a convolution's kernel
    `[C, c, t, h, w]` a matrix `[C, c*t*h*w]`.

    With `index`, published tensors are stacked along a new dim 0. With several names, those of one number are first
    concatenated along their own dim 0: expert `e`'s gate `[I, H]` and up `[I, H]` give row `e` of ours `[E, 2I, H]`.
    """

    published: str | tuple[str, ...]
    ours: str
    reshape: Reshape = "same"
    unless: Shape | None = None
    index: str | None = None

    @property
    def templates(self) -> tuple[str, ...]:
        return (self.published,) if isinstance(self.published, str) else self.published

    def reshape_of(self, shape: Shape) -> Reshape:
        return "same" if shape == self.unless else self.reshape


@dataclass(frozen=True, kw_only=True)
class Tied:
    """A second name of the tensor that we call `same_as`: a head that shares the embedding.

    `published` may be absent from a checkpoint; where both are present it is not read, and an export writes the trained
    `same_as` there; where it stands alone, `same_as` is read from it. A model (or pipeline stage) that holds `ours` as
    a parameter of its own gets `same_as`'s values.
    """

    published: str
    ours: str
    same_as: str


# ---------------------------------------------------------------------------------------- assemblies


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Where one published tensor lies in the tensor of ours that it is part of."""

    published: str
    shape: Shape  # as published
    reshape: Reshape
    box: Box  # region of our tensor; one dim more than the reshaped piece if `stacked`
    stacked: bool


@dataclass(frozen=True, kw_only=True)
class Read:
    """One slice to read: `published[box]`, reshaped, cropped to `crop`, is `region[target]`.

    `target` is relative to the region asked for and has a leading dim of 1 where the piece is stacked.
    """

    published: str
    box: Box
    reshape: Reshape
    crop: Box
    target: Box


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """How one tensor of ours is assembled. `pieces` cover it exactly once."""

    ours: str
    shape: Shape
    pieces: tuple[Piece, ...]

    def reads(self, region: Box | None = None) -> Iterator[Read]:
        """What to read for `region` of our tensor (None: all of it); nothing outside of it is touched.

        Only "flatten" reads whole rows where `region` cuts its flattened dim.
        """
        region = whole(self.shape) if region is None else region
        assert len(region) == len(self.shape), f"{self.ours}: region {region} for shape {self.shape}"
        for piece in self.pieces:
            common = tuple(
                (max(low, start), min(high, stop)) for (low, high), (start, stop) in zip(piece.box, region, strict=True)
            )
            if all(low < high for low, high in common):
                yield _read(piece, common, region)


def whole(shape: Shape) -> Box:
    """The box that covers all of `shape`."""
    return tuple((0, size) for size in shape)


def _read(piece: Piece, common: Box, region: Box) -> Read:
    inner = tuple(
        (low - origin, high - origin) for (low, high), (origin, _) in zip(common, piece.box, strict=True)
    )  # relative to the piece
    if piece.stacked:
        inner = inner[1:]
    crop = tuple((0, high - low) for low, high in inner)
    if piece.reshape == "transpose":
        box = (*inner[:-2], inner[-1], inner[-2])
    elif piece.reshape == "flatten":
        box = (inner[0], *whole(piece.shape[1:]))
        crop = (crop[0], inner[1])
    else:
        box = inner
    target = tuple((low - start, high - start) for (low, high), (start, _) in zip(common, region, strict=True))
    return Read(published=piece.published, box=box, reshape=piece.reshape, crop=crop, target=target)


def _reshaped(shape: Shape, reshape: Reshape) -> Shape:
    if reshape == "transpose":
        return (*shape[:-2], shape[-1], shape[-2])
    if reshape == "flatten":
        return (shape[0], prod(shape[1:]))
    return shape


# ---------------------------------------------------------------------------------------- the map


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """All rules of a family. `carried` are prefixes of published names that no model of ours holds.

    Rules find every spelling of a name that `canonical_name` knows.
    """

    rules: tuple[Rule | Tied, ...]
    carried: tuple[str, ...] = ()

    def assemblies(self, shapes: Mapping[str, Shape]) -> dict[str, Assembly]:
        """Our tensors by name, in the order in which their first piece appears in `shapes`.

        `shapes` are those of all published tensors of a checkpoint. Whether they are all that a model needs is
        for the caller to compare; here every name must be consumed by a rule or carried.

        Buffers that follow from config.json (`inv_freq`) are passed over: an export keeps them as they are.

        Raises: ValueError listing names that no rule knows, stacks with holes, unlike shapes, and tensors that are
            there twice.
        """
        groups, faults = self._group(shapes)
        assemblies: dict[str, Assembly] = {}
        for (rule, ours), members in groups.items():
            if ours in assemblies:
                names = next(iter(members.values())), assemblies[ours].pieces[0].published
                faults.append(f"{' and '.join(names)} are the same weights")
                continue
            try:
                assemblies[ours] = _assemble(rule, ours, members, shapes)
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise ValueError("tensors do not fit the model family: " + listed(faults, "; "))
        for second in self.tied.values():
            if second.same_as in assemblies and second.ours not in assemblies:
                source = assemblies[second.same_as]
                assemblies[second.ours] = replace(source, ours=second.ours)
        return assemblies

    @property
    def tied(self) -> dict[str, Tied]:
        """Second names of tensors, as `canonical_name` has them."""
        return {canonical_name(rule.published): rule for rule in self.rules if isinstance(rule, Tied)}

    def _group(self, shapes: Iterable[str]) -> tuple[dict[tuple[Rule, str], _Members], list[str]]:
        """Published names by the rule that they fit and the tensor of ours that it makes of them, and faults."""
        # by signature, so that 36,000 names of experts take no time
        templates: dict[str, list[tuple[str, Rule, int]]] = {}
        alone = (Rule(published=second.published, ours=second.same_as) for second in self.tied.values())
        for rule in (*(rule for rule in self.rules if isinstance(rule, Rule)), *alone):
            for part, template in enumerate(map(canonical_name, rule.templates)):
                templates.setdefault(_signature(template), []).append((template, rule, part))
        groups: dict[tuple[Rule, str], _Members] = {}
        unknown, faults = [], []
        carried, seconds = tuple(map(canonical_name, self.carried)), self.second_names(shapes)
        for name in (name for name in shapes if name not in seconds):
            canonical = canonical_name(name)
            fitting = [
                (rule, part, values)
                for template, rule, part in templates.get(_signature(canonical), ())
                if (values := _match(template, canonical)) is not None
            ]
            assert len(fitting) < 2, f"{name} fits two rules: {fitting}"
            for rule, part, values in fitting:
                row = 0 if rule.index is None else values.pop(rule.index)
                members = groups.setdefault((rule, _fill(rule.ours, values)), {})
                if (other := members.setdefault((row, part), name)) != name:
                    faults.append(f"{other} and {name} are the same tensor")
            passed_over = canonical.startswith(carried) or _COMPUTED.fullmatch(name)
            if not fitting and not passed_over:
                unknown.append(name)
        if unknown:
            faults.append(f"no rule for {listed(unknown)}")
        return groups, faults

    def second_names(self, shapes: Iterable[str]) -> dict[str, str]:
        """Published names in `shapes` that repeat another tensor there, each with the name of ours that it repeats."""
        found = {canonical_name(name): name for name in shapes}
        seconds = {name: rule.same_as for canonical, rule in self.tied.items() if (name := found.get(canonical))}
        return {
            name: ours
            for name, ours in seconds.items()
            if not found.keys().isdisjoint(map(canonical_name, self.published_names(ours)))
        }

    def published_names(self, ours: str) -> tuple[str, ...]:
        """The published names that `ours` is made of, for messages; `*` for a stacked index.

        Empty if no rule makes `ours`.
        """
        for rule in self.rules:
            if isinstance(rule, Tied):
                if rule.ours == ours:
                    return self.published_names(rule.same_as)
                continue
            values = _match(rule.ours, ours)
            if values is not None:
                row = {} if rule.index is None else {rule.index: "*"}
                return tuple(_fill(template, {**values, **row}) for template in rule.templates)
        return ()


def _assemble(rule: Rule, ours: str, members: _Members, shapes: Mapping[str, Shape]) -> Assembly:
    num_rows = 1 + max(row for row, _ in members)
    if num_rows * len(rule.templates) != len(members):
        places = ((row, part) for row in range(num_rows) for part in range(len(rule.templates)))
        absent = list(islice((place for place in places if place not in members), MAX_LISTED))
        some = next(iter(members))
        values = _match(canonical_name(rule.templates[some[1]]), canonical_name(members[some]))
        assert values is not None
        names = [
            _fill(rule.templates[part], values | ({rule.index: row} if rule.index else {})) for row, part in absent
        ]
        raise ValueError(
            f"{ours}: {num_rows * len(rule.templates) - len(members)} of its tensors are missing: {', '.join(names)}"
        )
    pieces = []
    for row in range(num_rows):
        offset = 0
        for part in range(len(rule.templates)):
            name = members[row, part]
            shape, reshape = shapes[name], rule.reshape_of(shapes[name])
            if len(shape) < (least := 1 if rule.index is not None else 0 if reshape == "same" else 2):
                raise ValueError(f"{name}: expected at least {least} dims, got shape {_dims(shape)}")
            # parts of a row differ in dim 0 at most, rows not at all
            expected = (*shapes[members[0, part]][:1], *shapes[members[0, 0]][1:])
            if shape != expected:
                raise ValueError(f"{name}: expected {_dims(expected)} like its neighbours, got {_dims(shape)}")
            box, stacked = whole(_reshaped(shape, reshape)), rule.index is not None
            if stacked:
                box = ((row, row + 1), (offset, offset + shape[0]), *box[1:])
                offset += shape[0]
            pieces.append(Piece(published=name, shape=shape, reshape=reshape, box=box, stacked=stacked))
    return Assembly(ours=ours, shape=tuple(stop for _, stop in box), pieces=tuple(pieces))


# ---------------------------------------------------------------------------------------- names


def canonical_name(name: str) -> str:
    """A published name of module or tensor as transformers 5 has it in memory, without `thinker.`. Idempotent.

    Checkpoints have either, and omni models are saved with their thinker alone, too.
    Source: transformers.conversion_mapping, Qwen2_5OmniThinkerForConditionalGeneration and, the same but for sound,
    Qwen2VLForConditionalGeneration; Qwen3-VL is published so.
    """
    name = name.removeprefix("thinker.")
    if name.startswith(("visual.", "audio_tower.", "language_model.")):  # the last: saved without its head
        return f"model.{name}"
    return re.sub(r"^model\.(?!(language_model|visual|audio_tower)\.)", "model.language_model.", name)


def _signature(name: str) -> str:
    return ".".join("#" if part[:1] == "{" or _is_number(part) else part for part in name.split("."))


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _match(template: str, name: str) -> dict[str, int] | None:
    wanted, got = template.split("."), name.split(".")
    if len(wanted) != len(got):
        return None
    values: dict[str, int] = {}
    for pattern, part in zip(wanted, got, strict=True):
        if pattern[:1] == "{":
            if not _is_number(part) or str(int(part)) != part:
                return None
            values[pattern[1:-1]] = int(part)
        elif pattern != part:
            return None
    return values


def _fill(template: str, values: Mapping[str, int | str]) -> str:
    return ".".join(str(values[part[1:-1]]) if part[:1] == "{" else part for part in template.split("."))


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """The first items, and how many there are beyond them: for messages."""
    more = f"{separator.replace(',', '')}and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return separator.join(items[:MAX_LISTED]) + more


def _dims(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
