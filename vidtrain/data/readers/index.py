"""Which packet of a file is which frame on the screen: found by reading packets, without decoding.

A packet's place in the file ("position", counted from 0 in decoding order) is what identifies a
frame everywhere in the reader: timestamps repeat, are missing or lie, positions do not. The reader
writes the position over the packet's timestamp before it decodes, so every frame leaves libav with
the position it was made from.

Where the packets alone cannot say what will be shown, the index says so (`certain` is False), and
the reader decodes the file once from its beginning to find out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vidtrain.data.readers import bitstream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from av.container import InputContainer
    from av.video.stream import VideoStream

NO_TIME = np.iinfo(np.int64).min


@dataclass
class FrameIndex:
    """The frames of one video stream: P packets in decoding order, N frames in showing order.

    Plain arrays only, so that an index can be kept beside the file's row and given back to
    `open_video(..., index=...)`.

    Attributes:
        pos: `(P,)` int64 byte offsets of the packets, -1 where the container has none.
        seek: `(P,)` int64 the time to seek to in order to land on a packet, or `NO_TIME`.
        skippable: `(P,)` bool, no other picture refers to this one: it may be left undecoded.
        order: `(N,)` int32 the packet that each shown frame comes out of; -1 where it is lost.
        keys: `(K,)` int32 packets that decoding may start from.
        key_ranks: `(K,)` int32 the first frame that is right when decoding starts there.
        groups: of pictures: "closed", "open" where frames look across a keyframe, or "refresh"
            where pictures are marked as keyframes and are none (intra refresh).
        changes: the size may change on the way (known of H.264 only).
        edited: an edit list hides some of the stored frames.
        certain: `order` is sure without decoding.
        missing: what the packets show to be wrong with the file.
        turn: how frames are turned to be shown: rows and columns swapped, then mirrored left to
            right, then flipped upside down; None until a frame has been seen.
        damaged: packets whose data is not what an encoder writes.
        container: libav's name of the file's format.
        fps: frames per second, on average.
        size: width and height of the stored frames; 0 until a frame has been seen.
    """

    pos: np.ndarray
    seek: np.ndarray
    skippable: np.ndarray
    order: np.ndarray
    keys: np.ndarray
    key_ranks: np.ndarray
    groups: str
    changes: bool
    edited: bool
    certain: bool
    missing: str | None
    damaged: list[int]
    turn: tuple[bool, bool, bool] | None = None
    container: str = ""
    fps: float = 25.0
    size: tuple[int, int] = (0, 0)
    ranks: np.ndarray = field(init=False)  # (P,) int32: `order` turned round; -1: not shown
    lacks: bool = field(init=False)  # some frames are lost

    def __post_init__(self) -> None:
        """Turn the order round."""
        self.ranks = np.full(len(self.pos), -1, np.int32)
        there = np.flatnonzero(self.order >= 0)
        self.lacks = len(there) < len(self.order)
        # three times as fast with these types, and a stored index is little else than this
        self.ranks[self.order[there].astype(np.intp)] = there.astype(np.int32)

    def start_for(self, rank: int) -> tuple[int, int]:
        """Return the packet to decode frame `rank` from, and the first good frame from there on."""
        return self.starts_for([rank])[0]

    def starts_for(self, ranks: Sequence[int]) -> list[tuple[int, int]]:
        """Return `start_for` of each."""
        at = np.searchsorted(self.key_ranks, ranks, side="right") - 1
        keys, firsts = self.keys[at], self.key_ranks[at]
        whole = (at < 0) | (keys > self.order[list(ranks)])
        keys, firsts = np.where(whole, 0, keys), np.where(whole, 0, firsts)
        return list(zip(keys.tolist(), firsts.tolist(), strict=True))

    def as_played(self, order: np.ndarray, intra: set[int]) -> FrameIndex:
        """Return the index as decoding the whole file found it to be.

        Args:
            order: the packet of each frame that was shown.
            intra: packets whose frames are coded without reference to others. A packet may be
                marked as a keyframe and not be one (intra refresh).
        """
        keep = np.array([key in intra or self.ranks[key] < 0 for key in self.keys], bool)
        played = replace(self, order=order, keys=self.keys[keep], certain=True)
        if np.array_equal(order, self.order):
            played.key_ranks = self.key_ranks[keep]
        else:
            played.key_ranks = played.ranks[played.keys]
        ranks = played.key_ranks
        if len(ranks) == 0 or ranks[0] < 0 or (np.diff(ranks) < 0).any():
            played.keys, played.key_ranks = np.zeros(1, np.int32), np.zeros(1, np.int32)
        return played


class Packets(NamedTuple):
    """The packets of one stream in decoding order, one column each."""

    pts: np.ndarray
    dts: np.ndarray
    pos: np.ndarray
    size: np.ndarray
    key: np.ndarray
    discard: np.ndarray
    looks: list  # into the bitstream: H264Look, hevc_look, MPEG-4 kinds, whether VP8 shows it


def read_index(container: InputContainer, stream: VideoStream, head: bytes = b"") -> FrameIndex:
    """Read every packet of a freshly opened container and number the frames it will show.

    Args:
        container: just opened, so that its own index is asked before anything is read.
        stream: the video stream.
        head: the first bytes of the file (AVI and Matroska say there how long it is).
    """
    codec = stream.codec_context.name
    formats = container.format.name.split(",")
    is_avi, is_mov = "avi" in formats, "mov" in formats
    delayed = stream.codec_context.reorder_depth > 0
    promised = [entry.pos for entry in stream.index_entries if entry.size]
    packets, fault = _read_packets(container, stream)
    length = _stated_length(head)

    keep = total = len(packets.pts)
    if is_avi:
        keep, total = _kept_of_avi(packets, promised, stream.frames, container.size >= length)
    elif is_mov:  # other containers list keyframes at most
        total = max(keep, len(promised))
    missing = None
    if keep < total:
        missing = f"cut off or damaged: {keep} of its {total} frames can be found"
        packets = Packets(*(column[:keep] for column in packets))
    elif fault:
        missing = f"cut off or damaged: it cannot be read beyond {keep} frames"
    elif container.size < length and not is_avi:
        missing = f"cut off: {container.size} of its {length} bytes are there"

    if is_avi:
        order, keys, certain = _order_of_avi(packets, codec, delayed)
        if missing and delayed:
            order = order[:-1]  # frames shown before the last one may be among the lost
    else:
        order, keys, certain = _order_by_time(packets, codec, bool(missing))
        # where a container keeps no presentation times, or whoever wrote it did not know them,
        # they are the decoding times
        rising = delayed and bool((np.diff(packets.pts) > 0).all())
        certain &= not (rising and (not is_mov or _skippable(packets, codec).any()))
    key_ranks = _first_good_ranks(packets, order, keys, by_time=not is_avi)
    by_pts = is_mov or "matroska" in formats
    first, second = (packets.pts, packets.dts) if by_pts else (packets.dts, packets.pts)
    seek = np.where(first == NO_TIME, second, first)
    # mov and avi have a list of their packets; elsewhere one may be lost and leave only a gap
    gap = not (is_mov or is_avi) and _has_gap(seek)
    if not (by_pts or is_avi or "flv" in formats):
        certain = False  # these do not keep to one picture a packet
    if gap and not by_pts:  # the others are made to be sent, and gaps have no other cause
        certain, keys, key_ranks = False, keys[:1], key_ranks[:1]
    # whatever does not begin with a keyframe, and show it first, begins in the middle of something
    certain &= keep > 0 and bool(packets.key[0]) and bool((packets.size > 0).all())
    if len(keys) == 0 or key_ranks[0] > 0 or (np.diff(key_ranks) < 0).any():
        certain, keys, key_ranks = False, np.zeros(1, np.int32), np.zeros(1, np.int32)

    hidden = int(packets.discard.sum())
    lost = np.full(max(0, total - hidden - len(order)), -1)
    return FrameIndex(
        pos=packets.pos,
        seek=seek,
        # what a decoder makes up for a lost reference hangs on all that it has decoded
        skippable=_skippable(packets, codec) & (not gap),
        order=np.concatenate([order, lost]).astype(np.int32),
        keys=keys.astype(np.int32),
        key_ranks=key_ranks.astype(np.int32),
        groups=_groups(packets, order, keys, key_ranks),
        changes=_changes(packets, codec),
        edited=hidden > 0,
        certain=bool(certain),
        missing=missing,
        damaged=_damaged(packets, codec),
        turn=(False, False, False) if is_avi else None,  # AVI cannot say so
        container=container.format.name,
        fps=_frame_rate(stream, np.sort(seek[order])),
        size=(stream.codec_context.width, stream.codec_context.height),
    )


def _frame_rate(stream: VideoStream, times: np.ndarray) -> float:
    """Return what the headers say, unless frames come at steady intervals of another length."""
    rates = stream.average_rate, stream.guessed_rate
    # 25 is what libav assumes of streams without times
    stated = next((float(rate) for rate in rates if rate and rate > 0), 25.0)
    if len(times) < 8 or times[0] == NO_TIME:
        return stated
    gaps = np.diff(times)
    mean = float(gaps.mean())
    if mean <= 0 or abs(float(np.median(gaps)) / mean - 1) > 0.1:
        return stated
    # a true header is more exact than times, which may be rounded to milliseconds
    steady = 1 / (mean * float(stream.time_base))
    return steady if abs(steady / stated - 1) > 0.1 else stated


def _read_packets(container: InputContainer, stream: VideoStream) -> tuple[Packets, bool]:
    """Return the packets, and whether an error ended them before the file did."""
    from av.error import FFmpegError  # here: who only holds an index needs no libav

    codec = stream.codec_context.name
    length_size = bitstream.h264_length_size(stream.codec_context.extradata)
    hevc_length_size = bitstream.hevc_length_size(stream.codec_context.extradata)
    rows = []
    fault = False
    demuxed = container.demux(stream)
    while True:
        try:
            packet = next(demuxed, None)
        except (FFmpegError, OSError, ValueError):
            fault = True
            break
        except IndexError:  # PyAV's, at the end, where streams have turned up on the way
            break
        if packet is None:
            break
        pts, dts, pos = packet.pts, packet.dts, packet.pos
        if packet.size == 0 and pts is None and dts is None:
            continue  # PyAV's mark for the end of the stream
        look: object = None
        if codec == "h264":
            look = bitstream.h264_look(memoryview(packet), length_size, packet.is_keyframe)
        elif codec == "hevc":
            look = bitstream.hevc_look(memoryview(packet), hevc_length_size)
        elif codec == "mpeg4":
            look = bitstream.mpeg4_kinds(memoryview(packet))
        elif codec == "vp8":
            look = packet.size > 0 and bool(memoryview(packet)[0] & 0x10)  # RFC 6386, 9.1
        rows.append(
            (
                NO_TIME if pts is None else pts,
                NO_TIME if dts is None else dts,
                -1 if pos is None else pos,
                packet.size,
                packet.is_keyframe,
                packet.is_discard,
                look,
            )
        )
    columns = list(zip(*rows, strict=True)) if rows else [()] * 7
    numbers = [np.array(column, np.int64) for column in columns[:4]]
    flags = [np.array(column, bool) for column in columns[4:6]]
    return Packets(*numbers, *flags, list(columns[6])), fault


def _stated_length(head: bytes) -> int:
    """Return how many bytes a file says it has, where its format says that; else 0."""
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8
    segment = head.find(b"\x18\x53\x80\x67") + 4  # of Matroska; its length follows (RFC 8794, 4)
    if segment < 4 or segment >= len(head) or not head.startswith(b"\x1a\x45\xdf\xa3"):
        return 0
    size = 9 - head[segment].bit_length()
    unknown = (1 << 7 * size) - 1
    length = int.from_bytes(head[segment : segment + size], "big") & unknown
    return 0 if length == unknown else segment + size + length


def _kept_of_avi(
    packets: Packets, promised: list[int], header_frames: int, whole: bool
) -> tuple[int, int]:
    """Return how many packets are sure to be the file's first, and how many it should have.

    Over a damaged stretch libav looks for the next chunk that it knows, and says nothing.
    """
    found = len(packets.pts)
    if len(promised) >= found:
        # the index names a chunk, a packet names the data behind the chunk's 8 bytes of header
        lost = np.setdiff1d(np.array(promised, np.int64) + 8, packets.pos)
        return int((packets.pos < lost.min()).sum()) if len(lost) else found, len(promised)
    if found >= header_frames:
        return found, found
    return 0 if whole else found, header_frames  # damaged somewhere, or cut off at its end


def _order_of_avi(
    packets: Packets, codec: str, delayed: bool
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return the showing order, where decoding can start, and whether that is certain.

    AVI holds no presentation times: only without B pictures is decoding order showing order.
    """
    decoding_order, keys = np.arange(len(packets.pts)), np.flatnonzero(packets.key)
    if codec != "mpeg4":
        return decoding_order, keys, not delayed
    found = bitstream.mpeg4_order(packets.looks, packets.size.tolist(), delayed)
    if found is None:
        return decoding_order, keys, False
    order, starts = (np.array(places, np.int64) for places in found)
    return order, np.intersect1d(keys, starts), True


def _order_by_time(
    packets: Packets, codec: str, incomplete: bool
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return the showing order, the keyframes, and whether that is certain."""
    shown = ~packets.discard
    if codec == "vp8":
        shown &= np.array(packets.looks, bool)
    there = np.flatnonzero(shown)
    times = packets.pts[there]
    certain = bool((times != NO_TIME).all()) and len(np.unique(times)) == len(times)
    if codec == "mpeg4":  # one picture in each packet, and a coded one
        certain &= all(len(kinds) == 1 for kinds in packets.looks)
        certain &= bool((packets.size > bitstream.NOT_CODED_SIZE).all())
    if incomplete and len(there):
        # a frame that was lost is decoded after all that were found, so it is shown after, too
        there = there[times <= packets.dts.max()]
    order = there[np.argsort(packets.pts[there], kind="stable")]
    keys = np.flatnonzero(packets.key)
    if codec == "h264":  # intra refresh marks pictures as keyframes that are none
        keys = keys[[packets.looks[key].intra for key in keys]]
    return order, keys, certain


def _first_good_ranks(
    packets: Packets, order: np.ndarray, keys: np.ndarray, by_time: bool
) -> np.ndarray:
    """Return for each keyframe the first frame that is right when decoding starts there.

    Frames shown before a keyframe and decoded after it look behind it (open GOP).
    """
    if by_time:
        return np.searchsorted(packets.pts[order], packets.pts[keys])
    ranks = np.full(len(packets.pts), len(order))
    ranks[order] = np.arange(len(order))
    return ranks[keys]


def _has_gap(times: np.ndarray) -> bool:
    """Tell whether somewhere more time passes than mostly does."""
    gaps = np.diff(np.sort(times))
    return len(gaps) > 0 and bool(gaps.max() > 1.5 * np.median(gaps))


def _skippable(packets: Packets, codec: str) -> np.ndarray:
    if codec == "h264":
        return np.array([look.disposable for look in packets.looks], bool)
    if codec == "hevc" and packets.looks:
        highest = max(layer for _, layer in packets.looks)
        return np.array([free and layer == highest for free, layer in packets.looks], bool)
    if codec == "mpeg4" and all(len(kinds) == 1 for kinds in packets.looks):
        # not where pictures share packets: one left out would take another with it
        return np.array([kinds == "B" for kinds in packets.looks], bool)
    return np.zeros(len(packets.pts), bool)


def _damaged(packets: Packets, codec: str) -> list[int]:
    if codec != "h264":
        return []
    return [place for place, look in enumerate(packets.looks) if look.damaged]


def _groups(packets: Packets, order: np.ndarray, keys: np.ndarray, ranks: np.ndarray) -> str:
    if len(keys) < packets.key.sum():
        return "refresh"
    latest = np.maximum.accumulate(order) if len(order) else order
    closed = (rank == 0 or latest[rank - 1] < key for key, rank in zip(keys, ranks, strict=True))
    return "closed" if all(closed) else "open"


def _changes(packets: Packets, codec: str) -> bool:
    if codec != "h264":
        return False
    return len({look.parameters for look in packets.looks if look.parameters}) > 1
