"""Frames of a video by their numbers, passing over what lies between: from the key frame before each one on.

The times of all frames are read from the packets, without decoding; a frame is known again by its time. Where times do
not tell frames apart, or a decoder does not give what they promise, whoever asks has to decode the whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from omniloom.data.packets import decode_packets, demux
from omniloom.types import SampleError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

_CONTAINERS = {"mov", "matroska"}  # whose packets are frames with times
_LEAST_GAP = 48  # frames between two wanted ones: with less there is seldom a key frame to go on from
_REORDERED = 64  # packets by which a frame may come before or after its place; codecs allow 16


class CannotSeek(Exception):
    """The frames that are still wanted have to be decoded from the beginning."""


def worth_seeking(container: InputContainer, wanted: Sequence[int]) -> bool:
    """Whether the wanted frames, in order, leave room to pass over anything."""
    gaps = (after - before for before, after in zip([0, *wanted], wanted, strict=False))
    return container.format.name.split(",")[0] in _CONTAINERS and max(gaps, default=0) >= _LEAST_GAP


def sought_frames(
    container: InputContainer, stream: Any, wanted: Sequence[int], file: str | bytes
) -> Iterator[VideoFrame]:
    """A frame for each of the wanted numbers, which do not decrease. Raises: CannotSeek."""
    times, keys = _read_times(container, stream, wanted[-1])
    frames: Iterator[VideoFrame] = iter(())
    frame: VideoFrame | None = None
    for number in wanted:
        time = times[number]
        place = bisect_right(keys, time) - 1
        if place < 0:
            raise CannotSeek
        if frame is None or (frame.pts or 0) < keys[place]:
            container.seek(keys[place], stream=stream)
            frames, frame = decode_packets(demux(container, stream), stream, "video", file), None
        try:
            while frame is None or frame.pts is None or frame.pts < time:
                frame = next(frames)
        except (StopIteration, SampleError):
            raise CannotSeek from None
        if frame.pts != time:
            raise CannotSeek
        yield frame


def _read_times(container: InputContainer, stream: Any, last: int) -> tuple[list[int], list[int]]:
    """Times of the frames in the order shown, up to number `last`, and those of key frames."""
    times: list[int] = []
    keys: list[int] = []
    for packet in demux(container, stream):
        if not packet.size:
            continue
        if packet.pts is None:
            raise CannotSeek
        if packet.is_keyframe:
            keys.append(packet.pts)
        if not packet.is_discard:
            times.append(packet.pts)
        if len(times) > last + _REORDERED:
            break
    if len(times) <= last or len(set(times)) < len(times):
        raise CannotSeek
    return sorted(times), sorted(keys)
