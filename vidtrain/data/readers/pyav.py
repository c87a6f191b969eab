"""Read frames with PyAV: the frames that a player shows, each decoded once, the rest not at all.

The fast way decodes from the keyframe before a wanted frame and leaves out pictures that nobody
wants and no other picture refers to. It believes the index and checks it as it goes: frames must
come in the order expected, none missing, none marked as corrupt. At the first oddity the file is
decoded once from its beginning, as a player would, and from then on that decides.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import operator
import re
from typing import TYPE_CHECKING, NamedTuple

import av
import numpy as np
from av.stream import Discard, Disposition
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from vidtrain.data.readers.files import why_not_video
from vidtrain.data.readers.index import NO_TIME, FrameIndex, read_index
from vidtrain.types import DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

av.logging.set_level(None)  # nothing on stderr: what is wrong is in the exceptions

LIBAV_ERRORS = (av.error.FFmpegError, OSError, ValueError)


class _Odd(Exception):
    """Not what the index led to expect."""


class Check(NamedTuple):
    """What decoding a whole file brought to light."""

    sound: int  # frames that can be had
    reason: str | None  # the first thing that is wrong


class PyAVReader:
    """A video file, or one in memory. See `vidtrain.types.VideoReader`.

    `len()` is the count of frames that the file's index gives, also where the file is damaged.
    `frames` raises for those that cannot be decoded, that libav marks as corrupt, or that come
    after damage and before the next sound keyframe, since they are made from it.
    """

    def __init__(
        self, source: str | bytes, name: str | None = None, index: FrameIndex | None = None
    ) -> None:
        """Open the file and read its index, unless one is given.

        Args:
            source: a path, or the bytes of a file.
            name: what messages call it; the path, if left out.
            index: what an earlier reader of the same file had as `reader.index`.

        Raises:
            DecodeError: no video can be read from it.
        """
        self.path = name or (source if isinstance(source, str) else "<bytes>")
        self._source = source
        self._reformatter = VideoReformatter()
        self._played = False  # decoded from end to end
        self._plain = False  # read from the beginning each time, since the index did not hold
        self._open()
        try:
            self.fps = self._frame_rate()
            self.container = self._container.format.name
            self._stored_size = self._codec.width, self._codec.height
            if index is None:
                index = read_index(self._container, self._stream, self._head())
                self._fresh = False
            self.index = index
            self._faults = list(index.damaged)  # packets that are damaged, as far as is known
            # without byte offsets there is no telling where a seek has led
            self._seekable = bool((index.pos >= 0).all())
            if len(index.pos) and not index.certain:
                self._play_through()
            if not (self.index.order >= 0).any():
                raise DecodeError(self.path, index.missing or "not one frame can be decoded")
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.index.order)

    def __enter__(self) -> PyAVReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the file."""
        # container and streams refer to each other: let go of one side, or only the garbage
        # collector frees them
        self._stream = self._codec = None
        if self._container is not None:
            self._container.close()
            self._container = None

    @property
    def width(self) -> int:
        """Width in pixels, as shown."""
        return self._shown_size()[0]

    @property
    def height(self) -> int:
        """Height in pixels, as shown."""
        return self._shown_size()[1]

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Decode frames by number, in any order, repeats allowed; each is decoded once.

        Returns:
            `(N, C, H, W)` uint8 RGB, whose memory is `N H W C` (channels last).

        Raises:
            DecodeError: a frame that cannot be had, and why.
            IndexError: an index outside `0 <= i < len(self)`.
        """
        import torch  # here, because checking files needs no torch, and importing it is slow

        indices = [operator.index(index) for index in indices]
        rows: dict[int, list[int]] = {}
        for row, rank in enumerate(indices):
            if not 0 <= rank < len(self):
                raise IndexError(f"{self.path}: frame {rank} asked of {len(self)}")
            rows.setdefault(rank, []).append(row)
        pictures: np.ndarray | None = None

        def keep(rank: int, frame: av.VideoFrame) -> None:
            nonlocal pictures
            picture = self._to_rgb(frame)
            if pictures is None:  # one block of memory for all, once the size is known
                pictures = np.empty((len(indices), *picture.shape), np.uint8)
            pictures[rows[rank][0]] = picture

        wanted = sorted(rows)
        self._refuse_damaged(wanted)
        if not self._plain and not self._decode_by_index(wanted, keep):
            self._plain = True
            if not self._played:
                self._play_through()
            self._refuse_damaged(wanted)
        if self._plain:
            self._decode_plainly(wanted, keep)
        if pictures is None:
            pictures = np.empty((0, self.height, self.width, 3), np.uint8)
        for first, *others in rows.values():
            for other in others:
                pictures[other] = pictures[first]
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)

    def check(self) -> Check:
        """Decode every frame, in order, without converting or keeping any."""
        if not self._played:
            self._play_through()
        reasons = [self._fault_of(rank) for rank in range(len(self))]
        sound = reasons.count(None)
        first = next((rank for rank, reason in enumerate(reasons) if reason), None)
        if first is None or self.index.missing:
            return Check(sound, self.index.missing or self._missing_time())
        return Check(
            sound,
            f"{len(self) - sound} of {len(self)} frames do not decode: "
            f"frame {first}: {reasons[first]}",
        )

    def _missing_time(self) -> str | None:
        """Look for time without frames, where a container has no list of them to compare with."""
        if self.container.startswith(("mov", "avi", "gif")) or len(self) < 3:
            return None
        if (self.index.seek == NO_TIME).any():
            return None
        times = np.sort(self.index.seek[self.index.order]) * float(self._stream.time_base)
        gaps = np.diff(times)
        widest = int(gaps.argmax())
        if gaps[widest] > max(1.0, 10 * float(np.median(gaps))):
            start, end = times[widest], times[widest + 1]
            return f"damaged: no frame between {start:.1f} and {end:.1f} seconds"
        promised = (self._container.duration or 0) / av.time_base
        stated = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", self._stream.metadata.get("DURATION", ""))
        if stated:  # of the picture alone
            hours, minutes, seconds = map(float, stated.groups())
            promised = hours * 3600 + minutes * 60 + seconds
        end = times[-1] + 1 / self.fps
        # sound may go on a little longer than the picture
        if self.container.startswith(("matroska", "flv")) and promised - end > max(
            0.5, 0.02 * promised
        ):
            return f"cut off or damaged: it ends after {end:.1f} of {promised:.1f} seconds"
        return None

    def _open(self) -> None:
        self._container = self._stream = self._codec = None
        source = self._source
        try:
            self._container = av.open(
                # "file:" keeps libav from taking a name such as "a:b.mp4" for an address; nor
                # may a file name others to be fetched from anywhere else
                io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}",
                metadata_errors="ignore",
                container_options={"protocol_whitelist": "file"},
            )
        except LIBAV_ERRORS as error:
            raise DecodeError(self.path, why_not_video(source, error)) from None
        try:
            self._stream = self._choose_stream()
        except BaseException:
            self.close()
            raise
        for other in self._container.streams:
            if other is not self._stream:
                other.discard = Discard.all  # a quarter of the reading, where there is sound
        self._codec = self._stream.codec_context
        self._codec.thread_type = "NONE"  # workers fill the cores; threads in each only cost
        self._codec.thread_count = 1
        self._fresh = True

    def _choose_stream(self) -> av.VideoStream:
        streams = self._container.streams
        stream = streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            if streams.audio:
                raise DecodeError(self.path, "no video stream (sound only)")
            reason = why_not_video(self._source, ValueError("no video stream"))
            raise DecodeError(self.path, reason)
        if stream.codec_context is None:
            raise DecodeError(self.path, "no decoder for its video codec")
        return stream

    def _head(self) -> bytes:
        if isinstance(self._source, bytes):
            return self._source[:16]
        with open(self._source, "rb") as file:
            return file.read(16)

    def _frame_rate(self) -> float:
        for rate in (self._stream.average_rate, self._stream.guessed_rate):
            if rate and rate > 0:
                return float(rate)
        return 25.0  # what libav assumes of streams without times

    def _shown_size(self) -> tuple[int, int]:
        if self.index.turn is None:
            try:
                self.frames([0])
            except DecodeError:
                self.index.turn = (False, False, False)
        return self._stored_size[:: -1 if self.index.turn[0] else 1]

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Return the (H, W, 3) picture as shown; frames of another size are scaled to the first."""
        if self.index.turn is None:
            self.index.turn = _read_turn(frame)
        if 0 in self._stored_size:
            self._stored_size = frame.width, frame.height
        width, height = self._stored_size
        try:
            # one thread: waking others takes longer than converting
            rgb = self._reformatter.reformat(frame, width, height, "rgb24", threads=1)
        except LIBAV_ERRORS:
            reason = f"its pixels ({frame.format.name}) cannot be converted to RGB"
            raise DecodeError(self.path, reason) from None
        plane = rgb.planes[0]
        pixels = np.frombuffer(plane, np.uint8)[: plane.line_size * height]
        pixels = pixels.reshape(height, plane.line_size)[:, : width * 3].reshape(height, width, 3)
        transposed, mirrored, flipped = self.index.turn
        if transposed:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if flipped else 1, :: -1 if mirrored else 1]

    def _decode_by_index(
        self, wanted: Sequence[int], keep: Callable[[int, av.VideoFrame], None]
    ) -> bool:
        """Decode what the index says; return whether it held."""
        done = 0
        while done < len(wanted):
            start, first = self.index.start_for(wanted[done])
            stop = int(self.index.order[wanted[done]])
            group = []
            # one run serves all frames whose keyframe lies within what is decoded anyway
            for rank in wanted[done:]:
                if self.index.start_for(rank)[0] > stop:
                    break
                group.append(rank)
                stop = max(stop, int(self.index.order[rank]))
            done += len(group)
            try:
                self._decode_run(start, stop, first, set(group), keep)
            except _Odd:
                return False
        return True

    def _decode_run(
        self,
        start: int,
        stop: int,
        first: int,
        left: set[int],
        keep: Callable[[int, av.VideoFrame], None],
    ) -> None:
        fed: set[int] = set()
        expected = first
        for frame in self._feed(start, stop, frozenset(left), fed):
            rank = self._rank_of(frame)
            if rank < first:
                continue  # it looks behind the keyframe that decoding began with
            while expected < rank and expected not in fed:
                expected += 1
            if rank != expected or frame.is_corrupt:
                raise _Odd
            expected += 1
            if rank in left:
                keep(rank, frame)
                left.remove(rank)
                if not left:
                    return
        raise _Odd

    def _feed(
        self, start: int, stop: int, wanted: frozenset[int], fed: set[int]
    ) -> Iterator[av.VideoFrame]:
        """Decode the packets from `start` to `stop`, but for those that can be left out."""
        ranks = self.index.ranks[start : stop + 1].tolist()
        skippable = self.index.skippable[start : stop + 1].tolist()
        try:
            for place, packet in self._packets(start, stop):
                rank = ranks[place - start]
                if skippable[place - start] and rank not in wanted:
                    continue
                if packet.is_corrupt:
                    raise _Odd
                fed.add(rank)
                packet.pts = packet.dts = place
                yield from self._codec.decode(packet)
            yield from self._codec.decode(None)
        except LIBAV_ERRORS:
            raise _Odd from None

    def _packets(self, start: int, stop: int) -> Iterator[tuple[int, av.Packet]]:
        """Read the packets from `start` to `stop`; each is checked to be the one the index means."""
        place, packets = self._go_to(start)
        offsets = self.index.pos[place : stop + 1].tolist()
        for at, packet in zip(range(place, stop + 1), packets, strict=False):
            if offsets[at - place] != (-1 if packet.pos is None else packet.pos):
                raise _Odd
            if at >= start:
                yield at, packet

    def _go_to(self, start: int) -> tuple[int, Iterator[av.Packet]]:
        """Return packets from `start` or some place before it, and that place."""
        if self._seekable and not (start == 0 and self._fresh):
            try:
                self._container.seek(int(self.index.seek[start]), stream=self._stream)
                packets = self._container.demux(self._stream)
                packet = next(packets)
                places = np.flatnonzero(self.index.pos == packet.pos)
            except (StopIteration, TypeError, *LIBAV_ERRORS):
                places = ()
            if len(places) == 1 and places[0] <= start:
                return int(places[0]), itertools.chain((packet,), packets)
            self._seekable = False  # then from the beginning, here and from now on
        if not self._fresh:
            self.close()
            self._open()
        self._fresh = False
        return 0, self._container.demux(self._stream)

    def _rank_of(self, frame: av.VideoFrame) -> int:
        place = frame.pts
        if place is None or not 0 <= place < len(self.index.ranks):
            raise _Odd
        return int(self.index.ranks[place])

    def _play_through(self) -> None:
        """Decode everything as a player would; note what does not decode, mend the index by it."""
        index = self.index
        faults = list(index.damaged)
        shown: dict[int, None] = {}  # in order, each once
        intra = set()
        for frame in self._play(faults):
            place = frame.pts
            if place is None or not 0 <= place < len(index.ranks):
                continue
            if self.index.turn is None:
                self.index.turn = _read_turn(frame)
            if frame.is_corrupt:
                faults.append(place)
            if frame.pict_type == PictureType.I:
                intra.add(place)
            shown[place] = None
        lost = set(index.order[index.order >= 0].tolist()) - shown.keys()
        # here a packet is a whole picture, so one that gives no frame has lost it; elsewhere it may
        # be half a picture
        whole = self.container.startswith(("mov", "matroska"))
        order = index.order
        if index.certain and lost and (faults or index.missing or whole):
            faults += lost
        elif not (index.certain and (faults or index.missing)):
            order = np.array([*shown], np.int32)
        self.index = index.as_played(order, intra)
        self._faults = sorted(set(faults))
        self._plain |= bool(faults)
        self._played = True

    def _play(self, faults: list[int], stop: int | None = None) -> Iterator[av.VideoFrame]:
        """Decode from the beginning, up to packet `stop`; what does not decode goes to `faults`."""
        self.close()
        self._open()
        self._fresh = False
        packets = self._container.demux(self._stream)
        place = 0
        while stop is None or place <= stop:
            try:
                packet = next(packets, None)
            except LIBAV_ERRORS:
                break
            if packet is None or (packet.size == 0 and packet.pts is None and packet.dts is None):
                break
            if packet.is_corrupt:
                faults.append(place)
            packet.pts = packet.dts = place
            try:
                yield from self._codec.decode(packet)
            except LIBAV_ERRORS:
                faults.append(place)
            place += 1
        with contextlib.suppress(*LIBAV_ERRORS):
            yield from self._codec.decode(None)

    def _decode_plainly(
        self, wanted: Sequence[int], keep: Callable[[int, av.VideoFrame], None]
    ) -> None:
        left = set(wanted)
        stop = max((int(self.index.order[rank]) for rank in wanted), default=-1)
        for frame in self._play([], stop):
            place = frame.pts
            if place is None or not 0 <= place < len(self.index.ranks):
                continue
            rank = int(self.index.ranks[place])
            if rank in left:
                keep(rank, frame)
                left.remove(rank)
                if not left:
                    return
        if left:
            raise DecodeError(self.path, f"cannot decode frame {min(left)} of {len(self)}")

    def _refuse_damaged(self, wanted: Sequence[int]) -> None:
        if wanted and wanted[-1] >= len(self):
            reason = f"shows {len(self)} frames, fewer than its index promises"
            raise DecodeError(self.path, reason)
        for rank in wanted:
            reason = self._fault_of(rank)
            if reason:
                reason = f"cannot decode frame {rank} of {len(self)}: {reason}"
                raise DecodeError(self.path, reason)

    def _fault_of(self, rank: int) -> str | None:
        place = int(self.index.order[rank])
        if place < 0:
            return self.index.missing
        start = self.index.start_for(rank)[0]
        for fault in self._faults[bisect.bisect_left(self._faults, start) :]:
            if fault == place:
                return "its data is damaged"
            if fault > place:
                break
            if not self.index.skippable[fault]:
                return "it is made from frames that are damaged"
        return None


def _read_turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Return how a player must turn the frame, as in `FrameIndex.turn`.

    Read from the display matrix (ISO 14496-12, 6.2.2): x' = a x + c y, y' = b x + d y.
    """
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know every kind of side data, and then tells of none
        quarters = round(-frame.rotation / 90) % 4  # clockwise
        return quarters % 2 == 1, quarters in (1, 2), quarters in (2, 3)
    if data is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32)
    if abs(b) > abs(a):
        return True, bool(c < 0), bool(b < 0)
    return False, bool(a < 0), bool(d < 0)
