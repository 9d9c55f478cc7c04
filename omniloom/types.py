"""What flows between the parts: conversations, sizes, examples, packed batches. No logic lives here but errors' words.

A row of a data file becomes a `Conversation`; its sizes are an `Extent`; the planner puts extents into
`PackPlan`s; a worker turns one `PackPlan` into a `LoadedPack`, whose `PackedBatch` is all that a model ever sees.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

if TYPE_CHECKING:  # the config and the command line import this file before it is known that torch is needed
    from numpy import float32, uint8
    from numpy.typing import NDArray
    from torch import Tensor

IGNORE_LABEL = -100  # the field's value for "no label here" (torch.nn.CrossEntropyLoss.ignore_index)

MediaKind = Literal["image", "video", "audio"]
BoxUnit = Literal["pixels", "one", "thousand"]  # of the file's image as displayed; or shares of its sides
PartKind = Literal["text", "reasoning", "tool_call", "image", "video", "audio"]
Role = Literal["system", "user", "assistant", "tool"]


class SampleError(ValueError):
    """A row that cannot be read, decoded or fitted. `field` names the part of the row, `reason` says why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)  # by which it crosses a process boundary
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


class MissingFile(SampleError):
    """A file that is not there, which may be the fault of this machine alone."""

    def __init__(self, field: str, path: str, hint: str = "") -> None:
        hint = "; write its folders with /" if "\\" in path else hint
        super().__init__(field, f"{path if len(path) < 300 else path[:60] + '...'} does not exist{hint}")
        self.path, self.args = path, (field, path, hint)


def suggest(name: str, known: Iterable[str], *, among: str = "known:", before: str = "") -> str:
    """What to say behind a wrong name: the nearest of the known ones if any is near, else all of them after `among`."""
    known = list(known)
    if near := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {before}{near[0]}?"
    return f"; {among} {', '.join(known)}" if among and known else ""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that is no fault of its input; the message tells its user what to do."""

    exit_code = 1


Kernel = Literal["auto", "eager", "sdpa", "flash", "flash3"]
RuleKernel = Literal["chunked", "fla"]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Attention kernels by component."""

    text: Annotated[Kernel, "attention kernel of the decoder"] = "auto"
    vision: Annotated[Kernel, "attention kernel of the vision tower"] = "auto"
    audio: Annotated[Kernel, "attention kernel of the audio tower"] = "auto"
    delta_rule: Annotated[RuleKernel, "chunked, or fla: flash-linear-attention, installed apart"] = "chunked"


# ---------------------------------------------------------------------------------------- what a row says

Row = dict[str, Any]  # a row of a data file as JSON has it; media may also be bytes


class Source(Protocol):
    """Rows that can be read in any order, by any process."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content, whatever the path, to tell on resume whether the data are still the same."""

    def __len__(self) -> int: ...

    def read_row(self, row: int) -> tuple[Row, str, int]:
        """The row, the file it comes from and the line (from 1) where it begins. Raises: SampleError."""

    def locate(self, row: int) -> tuple[str, int]:
        """File and line of a row without reading it, to name a row that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """What a row asks of one clip, by the names and rules of qwen-vl-utils and qwen-omni-utils. None: not asked.

    Pixels are those of an image or of each frame, but for `total_pixels`, which all frames of a video share.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    fps: float | None = None  # of a list of frames: the rate at which it was sampled
    num_frames: int | None = None  # `nframes`; even, as the next two
    min_frames: int | None = None
    max_frames: int | None = None
    start_seconds: float | None = None  # the span of the file that is used, counted from its first frame or sample
    end_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class MediaSource:
    """Where one clip lies, and what is asked of it. Exactly one of `path`, `frames`, `data` is set.

    `use_audio` and `sound` concern videos only: with `use_audio` the clip's sound is interleaved with its frames,
    taken from `sound` if given, else from the video file itself.
    """

    path: str | None = None
    frames: tuple[str, ...] | None = None  # a video given as a list of image paths
    data: bytes | None = None  # the encoded file itself (data URI, {"bytes"}, tar member)
    use_audio: bool = False
    sound: MediaSource | None = None
    options: ClipOptions = ClipOptions()


@dataclass(frozen=True, kw_only=True)
class Box:
    """A point of an image or of a video's frames, or the two corners of a box, as the row gives it."""

    points: tuple[float, ...]  # x, y of each, from the left and top
    unit: BoxUnit
    kind: Literal["image", "video"] | None = None  # None: of an image, or of a video where the row has no image
    clip: int = 0  # which of the row's clips of that kind


@dataclass(frozen=True, kw_only=True)
class Part:
    """One piece of a turn. `text` is the words (text, reasoning) or the JSON of a tool call; media have `media`."""

    kind: PartKind
    text: str = ""
    media: MediaSource | None = None
    weight: float | None = None  # None: that of its turn
    boxes: tuple[Box, ...] = ()  # what each `<bbox>` of the text stands for


@dataclass(frozen=True, kw_only=True)
class Speech:
    """How an answer sounds: a file of codes or a recording, or the codes themselves."""

    source: MediaSource | None = None
    codes: tuple[tuple[int, ...], ...] = ()  # of each code group, a code a frame
    recording: str = ""  # from which the codes were made, as a path from the rows' folder; "" where it is not known
    speaker: str = ""  # a voice of the checkpoint; empty: its usual one


@dataclass(frozen=True, kw_only=True)
class Turn:
    role: Role
    parts: tuple[Part, ...]
    weight: float | None = None  # None: the default of the role (assistant 1, others 0)
    speech: Speech | None = None


@dataclass(frozen=True, kw_only=True)
class Conversation:
    id: str
    source: str  # "file:line", for messages
    turns: tuple[Turn, ...]
    tools: tuple[str, ...] = ()  # one JSON object each
    weight: float = 1.0


# ---------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True, kw_only=True)
class MediaHeader:
    """What is known of one clip before it is decoded: read from its header, or counted where headers lie.

    `width` and `height` are those after the image's orientation is applied; `num_audio_samples` counts at the
    feature extractor's rate. Fields that do not concern the kind are zero.
    """

    kind: MediaKind
    width: int = 0
    height: int = 0
    first_frame: int = 0  # of the span that is used, which the following describe
    num_frames: int = 0
    fps: float = 0.0
    duration_seconds: float = 0.0
    num_audio_samples: int = 0
    has_audio: bool = False


@dataclass(frozen=True, kw_only=True)
class ClipGeometry:
    """The planned size of one clip: a contract with the decoder.

    Image: `grid_thw`. Video: `grid_thw`, `frame_indices`, `duration_seconds`. Audio: `num_mel_frames`.
    A video with its sound carries both. `num_tokens` counts the clip's token rows, wrappers not included.
    """

    kind: MediaKind
    num_tokens: int
    grid_thw: tuple[int, int, int] | None = None
    frame_indices: tuple[int, ...] = ()  # the file's frames that are shown, not decreasing
    source_fps: float = 0.0
    duration_seconds: float = 0.0
    seconds_per_grid: float = 0.0
    num_mel_frames: int = 0  # 0: no sound
    num_audio_samples: int = 0  # at the feature extractor's rate
    sound_seconds: float = 0.0
    asked: ClipOptions = ClipOptions()  # what the row set in place of the run's options
    source_size: tuple[int, int] = (0, 0)  # width and height of the file as displayed


@dataclass(frozen=True, kw_only=True)
class Extent:
    """What a sample will cost, known from text and media headers alone."""

    num_tokens: int
    num_loss_tokens: int  # labels with nonzero turn weight
    weight_sum: float  # sum of turn weight x row weight over the labels, before the loss mode
    num_patches: int = 0
    num_audio_frames: int = 0
    cost: int = 0  # estimated FLOPs / 1e6, decoder and encoders, forward only
    tower_cost: int = 0  # the encoders' part of it
    speech_cost: int = 0  # the talker's
    num_code_labels: int = 0  # of spoken turns: frames, and the end of each turn
    num_code_frames: int = 0
    clips: tuple[ClipGeometry, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BadSample:
    file: str
    line: int
    field: str
    reason: str
    epoch: int = 0
    row: int = -1  # index into the concatenated sources: several rows of an array may share a line
    num_tokens: int = 0  # of a sample that is too long for a pack
    missing: str = ""  # the file that is not there, where that is why


@dataclass(frozen=True, kw_only=True)
class DecodedClip:
    """What a decoder made of one clip: the planned number of frames and samples, pictures of any size."""

    pixels: NDArray[uint8] | None = None  # [height, width, 3] of an image, [N, height, width, 3] of a video's N frames
    waveform: NDArray[float32] | None = None  # [num_audio_samples], mono, at the feature extractor's rate


# ---------------------------------------------------------------------------------------- plans


@dataclass(frozen=True, kw_only=True)
class PlannedSample:
    row: int  # index into the concatenated sources
    epoch: int
    extent: Extent
    weight_scale: float  # multiplies every loss weight of the sample; how the loss mode is expressed
    speech_scale: float = 1.0  # the same of its frames of speech


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    index: int  # counts packs from the start of the run
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Rows that are judged together: those of a window, or where it is too small those of its epoch up to its end."""

    number: int = 0
    epoch: int = 0
    num_rows: int = 0
    num_bad: int = 0  # as far as planning saw
    is_small: bool = False


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One optimizer step: exactly `packs_per_step` packs, the same on every rank."""

    step: int
    packs: tuple[PackPlan, ...]
    rows_planned: int  # rows consumed since the start of the run, for schedules under `epochs`
    bad_rows: tuple[BadSample, ...] = ()  # found while planning this step's window
    window: Window = Window()


# ---------------------------------------------------------------------------------------- tensors of a sample


@dataclass(frozen=True, kw_only=True)
class VisionClip:
    # [num_patches, channels * temporal_patch * patch * patch], merge-block order; uint8, or float32 if normalised
    patches: Tensor
    grid_thw: tuple[int, int, int]
    token_index: Tensor  # int64 [M]: rows of the sample's sequence that the merged patches fill, in order


@dataclass(frozen=True, kw_only=True)
class AudioClip:
    features: Tensor  # float32 [num_mel_bins, num_mel_frames]
    token_index: Tensor  # int64 [M]
    # mel frames of the longest clip of the sample: a reference that pads to it lets it show in shorter clips' edges
    longest_frames: int | None = None  # None: this clip's own


@dataclass(frozen=True, kw_only=True)
class SpeechRows:
    """What a talker reads: a segment for each spoken turn, of one of them or of all that a pack holds.

    Row i of a sample's talker shares the pack's row with row i of its text.
    """

    text_ids: Tensor  # int64 [t]: the token whose embedding each row takes
    position_ids: Tensor  # int64 [3, t]
    media_index: Tensor  # int64 [m]: rows of media, which take no embedding
    state_index: Tensor  # int64 [s]: rows that take a hidden state
    hidden_index: Tensor  # int64 [s]: whose, as rows of the text (of the whole pack's, where ranks share it)
    codec_index: Tensor  # int64 [c]: rows to which the embedding of a token of the codec is added
    codec_ids: Tensor  # int64 [c]
    frame_index: Tensor  # int64 [f]: rows to which the embeddings of a frame are added, those after what predicts it
    frames: Tensor  # int64 [f, groups]


@dataclass(frozen=True, kw_only=True)
class SpeechExample:
    """A spoken turn of a sample. Rows and targets count from its first row, `hidden_index` from the sample's."""

    rows: SpeechRows
    targets: Mapping[str, Targets]  # CODE0, and CODES where a frame has several codes


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sample as tensors, not yet packed."""

    id: str
    input_ids: Tensor  # int64 [t]
    labels: Tensor  # int64 [t], shifted: labels[i] is what position i predicts; IGNORE_LABEL where nothing is
    loss_weights: Tensor  # float32 [t], zero exactly where labels is IGNORE_LABEL
    position_ids: Tensor  # int64 [3, t]
    vision: tuple[VisionClip, ...] = ()
    audio: tuple[AudioClip, ...] = ()
    # tokens of each of its segments, which do not see one another (answers that are compared, say); empty: it is one
    segment_lengths: tuple[int, ...] = ()
    speech: tuple[SpeechExample, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Rows of a pack that it takes: those of its text, or of its speech if they are more."""
        return max(len(self.input_ids), sum(len(turn.rows.text_ids) for turn in self.speech))


class Processor(Protocol):
    """What loading uses of a family's processor; `processors.chat.ChatProcessor` is the one there is."""

    tokenizer: Any  # of the tokenizers library: what makes words of a model's answers

    def measure(
        self,
        conversation: Conversation,
        headers: tuple[MediaHeader, ...],
        clips: tuple[ClipGeometry, ...] | None = None,
    ) -> Extent:
        """Exact sizes from text and headers; `clips` where they were shrunk. Raises: SampleError."""

    def shrink(
        self, conversation: Conversation, headers: tuple[MediaHeader, ...], max_tokens: int
    ) -> tuple[ClipGeometry, ...] | None:
        """The largest clips with which the sample has at most `max_tokens`, or None."""

    def resized(self, clip: ClipGeometry, decoded: DecodedClip) -> DecodedClip:
        """The clip with pictures in their planned size, from which `encode` makes the same."""

    def encode(
        self,
        conversation: Conversation,
        clips: tuple[ClipGeometry, ...],
        decoded: tuple[DecodedClip | None, ...],
    ) -> Example:
        """The sample as tensors; None in `decoded` for a clip that another rank decodes. Raises: SampleError."""

    @property
    def num_code_groups(self) -> int:
        """Codes of a frame of speech; 0 for a run that makes none."""

    def collate_vision(self, clips: Sequence[VisionClip]) -> VisionBatch | None: ...

    def collate_audio(self, clips: Sequence[AudioClip]) -> AudioBatch | None: ...


# ---------------------------------------------------------------------------------------- what a model sees


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Bounds of the independent stretches of a packed dimension, on the device and, for who cannot wait for it, here.

    `cu_seqlens` may be longer than the number of segments: its tail repeats the last bound (empty segments).
    """

    cu_seqlens: Tensor  # int32 [S + 1], from 0 to the packed length
    bounds: tuple[int, ...]  # the same on the host, without empty segments: rising from 0 to the packed length
    max_length: int
    # cu_seqlens on the host, whatever the device, of segments that layers are called with: a layer that is compiled
    # hands it to operations that read bounds, where numbers would have it compiled anew for each pack
    host: Tensor | None = None

    def with_host(self) -> Segments:
        """The same with `host`."""
        import torch  # whoever has segments has it

        filling = [self.bounds[-1]] * (self.cu_seqlens.shape[0] - len(self.bounds))
        host = torch.tensor([*self.bounds, *filling], dtype=torch.int32, device="cpu")
        return replace(self, host=host)

    @staticmethod
    def from_lengths(lengths: Iterable[int], *, num_bounds: int = 0) -> Segments:
        """Segments of these lengths, empty ones left out; `num_bounds` is the least length of `cu_seqlens`."""
        import torch  # whoever has segments has it

        kept = [length for length in lengths if length]
        bounds = tuple(accumulate(kept, initial=0))
        filling = [bounds[-1]] * (num_bounds - len(bounds))
        cu_seqlens = torch.tensor([*bounds, *filling], dtype=torch.int32)
        return Segments(cu_seqlens=cu_seqlens, bounds=bounds, max_length=max(kept, default=0))


@dataclass(frozen=True, kw_only=True)
class VisionBatch:
    """All images and videos of a pack (and at least one null segment), in one tower call."""

    patches: Tensor  # [P, patch_dim]: uint8 pixels, or normalised ones where there are no `pixel_rules`
    segments: Segments  # one per frame
    rotary_index: Tensor  # int64 [P, 2]: row and column of each patch
    interpolation_index: Tensor  # int64 [P, 4] into the learned position table; [P, 0] where a family has none
    interpolation_weights: Tensor  # float32 [P, 4]
    token_index: Tensor  # int64 [M]: rows of the pack that tower rows 0..M-1 fill; later tower rows fill nothing
    # families with window attention; patches (and so token_index) then come window by window within each frame
    window_segments: Segments | None = None
    # float32 [3, patch_dim]: what pixels are divided by, their mean after that, and the standard deviation
    pixel_rules: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class AudioBatch:
    """All audio of a pack (and at least one null segment), cut into convolution chunks."""

    features: Tensor  # float32 [num_chunks, num_mel_bins, frames], zero-padded at the right
    chunk_frames: Tensor  # int64 [num_chunks]: where each chunk ends for the convolutions, padding included
    valid_index: Tensor  # int64 [A]: rows of the flattened [num_chunks * chunk_rows] that are real, in order
    segments: Segments  # attention windows over the A rows
    token_index: Tensor  # int64 [M], as in VisionBatch
    pool_index: Tensor | None = None  # int64 [B, 2]: rows averaged after the layers, families that pool


@dataclass(frozen=True, kw_only=True)
class TowerRoute:
    """What one rank of an encoder pool sends and gets for one tower: host numbers, and index tensors of its own media.

    Units (patches, or chunks) go by rank of the pool to where they are encoded. Rows of embeddings come back to the
    owners of their tokens, which are counted by data rank, then context rank.
    """

    segments: Segments | None  # of what is encoded here; None: what was loaded here, as it is
    valid_index: Tensor | None  # int64, audio: as AudioBatch's, of what is encoded here
    num_null_units: int  # of this rank's own null segment, at the end
    moves: bool  # whether any rank of the pool sends units to another
    unit_order: Tensor  # int64, own units to encode here or send, by destination
    unit_send: tuple[int, ...]
    unit_receive: tuple[int, ...]
    row_order: Tensor  # int64, tower rows to send, by owner of their token
    row_send: tuple[int, ...]  # to each owner
    row_receive: tuple[int, ...]  # from each rank of the pool
    landing: Tensor | None  # int64, received rows sorted by pack, where there are several
    token_index: tuple[Tensor, ...]  # int64 of each pack: own token row of each row received


@dataclass(frozen=True, kw_only=True)
class MediaRoute:
    """Where the media of one pack or several travel, planned ahead of the step."""

    vision: TowerRoute | None
    audio: TowerRoute | None


TEXT, ROUTER = "text", "router"  # names of losses: of the next token, and of the balance between experts
# of speech: of a frame's first code or the end, values int64 [n]; of its other codes, values int64 [n, groups], all of
# the frame that a row predicts
CODE0, CODES = "code0", "codes"


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a loss beside text's is computed from. What `values` mean is known to the model that has the loss."""

    token_index: Tensor  # int64 [n]: rows of the pack
    weights: Tensor  # float32 [n]
    values: Tensor  # [n, ...]


@dataclass(frozen=True, kw_only=True)
class SpeechBatch:
    """The speech of a pack, in rows beside those of its text."""

    rows: SpeechRows  # of T rows
    segments: Segments
    is_padding: Tensor  # bool [T]
    reads_hidden: bool = True  # whether any rank's part of the step reads a hidden state of the text


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """A pack of exactly T tokens (or a context rank's slice of it). The only argument of a model."""

    input_ids: Tensor  # int64 [T]
    labels: Tensor  # int64 [T]
    loss_weights: Tensor  # float32 [T]
    loss_index: Tensor  # int64 [L]: rows with nonzero weight
    position_ids: Tensor  # int64 [3, T]
    is_padding: Tensor  # bool [T]
    segments: Segments  # of the whole pack, the padding tail being the last one
    vision: VisionBatch | None  # None only where the model has no such tower
    audio: AudioBatch | None
    speech: SpeechBatch | None = None  # None only where the model has no talker
    sample_ids: tuple[str, ...] = ()
    # on the host: where each sample begins, and the end of the last; a sample may have several segments
    sample_bounds: tuple[int, ...] = ()
    targets: Mapping[str, Targets] = field(default_factory=dict)  # of losses beside text's, by name
    # of losses whose gradient is attached within the model: what the step's objective multiplies them by
    loss_scales: Mapping[str, float] = field(default_factory=dict)
    draw_key: int | None = None  # from which, with a layer and a weight, all random draws of this pack follow
    media_route: MediaRoute | None = None  # of these media, where ranks share the towers' work


@dataclass(frozen=True, kw_only=True)
class TowerRows:
    """Tower outputs in tower-row order, not yet scattered. None where the model has no such tower."""

    vision: Tensor | None  # [M_v + null rows, hidden]
    deepstack: tuple[Tensor, ...]  # one per level, each like `vision`
    audio: Tensor | None  # [M_a + null rows, hidden]


@dataclass(frozen=True, kw_only=True)
class SpeechInputs:
    """What a talker takes from the decoder of text."""

    text: Tensor  # [T, C]: embeddings of `SpeechRows.text_ids`
    hidden: Tensor  # [s, C]: hidden states of `SpeechRows.hidden_index`


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What the part of a model that is here made of a pack, or of several."""

    # float32 scalars by the loss's name, over the rows and layers that are here. TEXT: sum of weight x cross entropy;
    # ROUTER: mean over MoE layers of the load-balancing loss, without gradient, which rides on the hidden rows. Outside
    # of training other sums may stand beside them; the loss whose weights they are made of is named before a dot
    sums: Mapping[str, Tensor]
    expert_counts: Tensor  # int64 [num MoE layers, E]: valid tokens sent to each expert; [0, 0] if dense
    hidden: Tensor | None = None  # [T, C]: rows for the next part of the model, where the loss head is not here
    speech: SpeechInputs | None = None


# ---------------------------------------------------------------------------------------- what a loader yields


@dataclass(frozen=True, kw_only=True)
class PackStats:
    """Counts of what was really loaded, for the metrics line."""

    num_tokens: int = 0  # without padding
    num_loss_tokens: int = 0
    num_samples: int = 0
    num_images: int = 0
    video_frames: int = 0
    audio_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LoadedPack:
    index: int
    batch: PackedBatch
    stats: PackStats
    bad: tuple[BadSample, ...] = field(default=())  # samples whose slots became padding


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A low-rank addition to one weight, by parameter names: base + scaling x lora_b lora_a.

    Of a linear `[out, in]`: `lora_a [rank, in]`, `lora_b [out, rank]`, `magnitude [out]` with DoRA. Of stacked experts
    `[E, out, in]`: `lora_a [E, rank, in]`, `lora_b [E, out, rank]`.
    """

    base: str
    lora_a: str
    lora_b: str
    magnitude: str | None
    rank: int
    alpha: float
    dropout: float
    rslora: bool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.lora_a, self.lora_b, self.magnitude) if name is not None)

    @property
    def scaling(self) -> float:
        """Source: Hu et al. 2021 (arXiv 2106.09685); with `rslora` Kalajdzievski 2023 (arXiv 2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
