"""Packets of a stream, and the frames that they decode to: what is counted without decoding, and what is broken.

`media_headers` counts with it, `media_decode` decodes with it, so that both see the same frames and refuse the same
files.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from omniloom.data.media_files import name_of
from omniloom.types import MediaKind, SampleError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet as AnyPacket
    from av.stream import Stream

    Packet = AnyPacket[Stream]

_log = logging.getLogger(__name__)
EDGE_PACKETS = 4
MAX_BROKEN_ENDS = 3  # packets; one at either end is common in files cut from longer ones
# Containers that write how long the file is, rather than have it estimated. In avi and asf a stream that begins late
# counts twice or not at all; their headers state how many bytes there are.
_CLAIMS_DURATION = {"mov", "matroska", "flv"}
_FIXED_FRAME = {"aac", "mp3", "mp3float", "mp2", "mp2float", "mp1", "mp1float"}
_AC3_SAMPLES = 1536  # six blocks of 256. Source: ATSC A/52
_OPUS_RATE = 48000  # whatever went in. Source: RFC 6716
_OPUS_SAMPLES = (480, 960, 1920, 2880) * 3 + (480, 960) * 2 + (120, 240, 480, 960) * 4  # of a frame, by configuration


def demux(container: InputContainer, *streams: Any) -> Iterator[Packet]:
    """Packets of the given streams, or of all that the file began with.

    A stream that only begins further on (captions, sound that was switched on) is passed over: av has no place for it.
    """
    is_over = False
    while not is_over:
        try:
            for packet in container.demux(*streams):
                is_over = not packet.size  # the last of each stream has nothing in it
                yield packet
            return
        except IndexError:  # that packet is lost, the next one is read
            continue


def packets_to_end(
    container: InputContainer,
    stream: Any,
    kind: MediaKind,
    file: str | bytes,
    add: Callable[[Packet], None],
    *,
    indexed: bool,
) -> Iterator[Packet]:
    """Packets of one stream up to the end of the file, each one handed to `add` as well.

    Unless a table has told what the file holds, the end that its header claims is compared with what there is.
    Raises: SampleError where the file ends well before.
    """
    if indexed:
        _read_only(container, stream)
    claims = container.format.name.split(",")[0] in _CLAIMS_DURATION and container.duration is not None
    for packet in demux(container, stream) if indexed or not claims else _to_claimed_end(container, stream, kind, file):
        if packet.size:
            add(packet)
        yield packet


def _to_claimed_end(container: InputContainer, stream: Any, kind: MediaKind, file: str | bytes) -> Iterator[Packet]:
    """Packets of one stream, of a file whose header says when the last packet of all its streams ends."""
    ends: dict[Any, int] = {}
    for packet in demux(container):
        time = packet.pts if packet.pts is not None else packet.dts
        if packet.size and time is not None:
            end = time + (packet.duration or 0)
            ends[packet.stream] = max(end, ends.get(packet.stream, end))
        if packet.stream.index == stream.index:
            yield packet
    found = max((float(end * other.time_base) for other, end in ends.items() if other.time_base), default=0.0)
    claimed = (container.duration or 0) / 1e6
    if found < claimed - max(1.0, 0.05 * claimed):
        raise SampleError(
            kind, f"{name_of(file)} is truncated: its header claims {claimed:.1f} s, its packets end at {found:.1f} s"
        )


def full_table(container: InputContainer, stream: Any, kind: MediaKind, file: str | bytes) -> list[int | None] | None:
    """Times of the packets in the table of an mp4 or mov, without those that its edit list hides; None without table.

    Raises: SampleError where the table leads beyond the end of the file.
    """
    if not container.format.name.startswith("mov") or not stream.frames:
        return None  # a fragmented file has no full table
    entries = list(stream.index_entries)
    if len(entries) != stream.frames:
        return None
    end, size_bytes = max(entry.pos + entry.size for entry in entries), container.size
    if end > size_bytes:
        raise SampleError(
            kind, f"{name_of(file)} is truncated: its {stream.type} needs {end} bytes, the file has {size_bytes}"
        )
    return [entry.timestamp for entry in entries if not entry.is_discard]


def _read_only(container: InputContainer, stream: Any) -> None:
    """Have the container pass over the bytes of all other streams."""
    from av.stream import Discard

    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all


def decode_packets(packets: Iterable[Packet], stream: Any, kind: MediaKind, file: str | bytes) -> Iterator[Any]:
    """Frames of the packets of one stream.

    A few packets at either end that cannot be decoded are left out, with a warning: files cut from longer ones have
    them. Raises: SampleError for a broken packet with good ones around it, and for a frame that the decoder says it
    has made up in part.
    """
    import av

    if not stream.codec_context.is_open:
        stream.codec_context.thread_count = 1  # workers are the parallelism
    broken: list[int] = []
    num_good = 0
    for number, packet in enumerate(packets):
        try:
            frames: list[Any] = list(packet.decode())
        except av.error.FFmpegError:
            broken.append(number)
            if len(broken) > MAX_BROKEN_ENDS:
                raise SampleError(kind, f"{name_of(file)}: {len(broken)} packets in a row are broken") from None
            continue
        if packet.size and broken:
            if num_good:
                raise SampleError(kind, f"{name_of(file)}: packet {broken[0]} of its {stream.type} is broken")
            _log.warning("%s: its first %d packets are broken and left out", name_of(file), len(broken))
            broken = []
        num_good += bool(packet.size)
        for frame in frames:
            if frame.is_corrupt:
                raise SampleError(kind, f"{name_of(file)}: the {stream.type} at {frame.time or 0:.2f} s is damaged")
            yield frame
    if broken:
        _log.warning("%s: its last %d packets are broken and left out", name_of(file), len(broken))


class SampleCounter:
    """Samples of a stream by its packets, as the decoder will give them.

    Encoders begin with silence of their own and fill up the last packet. What is to be skipped of both (by edit lists,
    Xing headers, codec delays) stands in the packets' side data. The tests hold every codec named here to its decoder.
    Source: libavcodec, decode.c, discard_samples.
    """

    def __init__(self, container: InputContainer, stream: AudioStream) -> None:
        self._samples_of = _samples_of(container, stream)
        self._skip = self._num_samples = self._num_packets = 0
        self._last: deque[Packet] = deque()

    @property
    def exact(self) -> bool:
        """Whether this codec's packets say how many samples they hold."""
        return self._samples_of is not None

    @property
    def num_samples(self) -> int:
        """Of all packets, the last one given."""
        while self._last:
            self._count(self._last.popleft(), may_skip=True)
        return self._num_samples

    def add(self, packet: Packet) -> None:
        """Take one more packet; side data, slow to ask for, is looked for in the first and the last few only."""
        if self._samples_of is None:
            return
        self._num_packets += 1
        self._last.append(packet)
        if self._num_packets <= EDGE_PACKETS:
            self._count(self._last.popleft(), may_skip=True)
        elif len(self._last) > EDGE_PACKETS:
            self._count(self._last.popleft(), may_skip=False)

    def _count(self, packet: Packet, *, may_skip: bool) -> None:
        assert self._samples_of is not None
        num_samples, at_end = self._samples_of(packet), 0
        if may_skip and packet.has_sidedata("skip_samples"):  # two uint32: from here on, and at the end
            side = bytes(packet.get_sidedata("skip_samples"))
            self._skip, at_end = int.from_bytes(side[:4], "little"), int.from_bytes(side[4:8], "little")
        if not packet.is_discard:
            self._num_samples += max(0, num_samples - self._skip - at_end)
        self._skip = max(0, self._skip - num_samples)


def _samples_of(container: InputContainer, stream: AudioStream) -> Callable[[Packet], int] | None:
    """How many samples a packet holds before any are skipped; None where only decoding tells."""
    context = stream.codec_context
    codec, rate, size = context.name, context.sample_rate, context.frame_size
    if codec in _FIXED_FRAME and size and (codec != "aac" or context.profile == "LC"):
        return lambda packet: size
    if codec == "ac3":
        return lambda packet: _AC3_SAMPLES
    if codec in ("opus", "libopus") and rate == _OPUS_RATE:
        return lambda packet: _opus_samples(bytes(packet))
    if bytes_each := pcm_frame_bytes(stream):
        return lambda packet: packet.size // bytes_each
    if codec == "flac":
        return lambda packet: _flac_samples(bytes(packet))
    by_sample = stream.time_base == Fraction(1, rate) if rate > 0 else False
    if codec == "alac" and by_sample and container.format.name.startswith("mov"):
        return lambda packet: packet.duration or 0
    return None


def pcm_frame_bytes(stream: AudioStream) -> int:
    """Bytes of one sample of all channels; 0 for what is not PCM."""
    codec, context = stream.codec_context.name, stream.codec_context
    if codec in ("pcm_alaw", "pcm_mulaw"):
        return context.channels
    bits = codec.removeprefix("pcm_")[1:].rstrip("lebp") if codec.startswith(("pcm_s", "pcm_u", "pcm_f")) else ""
    return int(bits) // 8 * context.channels if bits.isdecimal() else 0


def _flac_samples(packet: bytes) -> int:
    """Samples of one frame. Source: RFC 9639, section 9.1: sync, sizes, a number coded like UTF-8, the odd size."""
    if len(packet) < 7:
        return 0
    code = packet[2] >> 4
    if code >= 8:
        return 256 << (code - 8)
    if code < 6:
        return 192 if code == 1 else 576 << (code - 2)
    coded = 8 - (packet[4] ^ 0xFF).bit_length()  # bytes of the number: leading ones, none meaning one
    place = 4 + max(coded, 1)
    return int.from_bytes(packet[place : place + code - 5], "big") + 1


def _opus_samples(packet: bytes) -> int:
    """Samples at 48 kHz of one packet. Source: RFC 6716, section 3."""
    if not packet:
        return 0
    per_frame, code = _OPUS_SAMPLES[packet[0] >> 3], packet[0] & 3
    num_frames = packet[1] & 63 if code == 3 and len(packet) > 1 else (1, 2, 2, 0)[code]
    return per_frame * num_frames
