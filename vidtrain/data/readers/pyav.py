"""Read frames with PyAV: the frames that a player shows, each decoded once, the rest not at all.

The fast way decodes from the keyframe before a wanted frame and leaves out pictures that nobody
wants and no other picture refers to. It believes the index and checks it as it goes: frames must
come in the order expected, none missing, none marked as corrupt. At the first oddity the file is
decoded once from its beginning, as a player would, and from then on that decides.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import io
import itertools
import operator
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
from av.stream import Discard, Disposition
from av.video.frame import PictureType

from vidtrain.data.readers.files import FORMATS, why_not_video
from vidtrain.data.readers.index import NO_TIME, FrameIndex, read_index
from vidtrain.data.readers.pieces import room
from vidtrain.data.readers.sheet import UNTURNED, Sheet, to_rgb
from vidtrain.types import DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from torch import Tensor

    from vidtrain.data.readers.pieces import ChooseBox
    from vidtrain.types import Box

av.logging.set_level(None)  # nothing on stderr: what is wrong is in the exceptions

# IndexError: at the end of a file where streams turn up on the way
LIBAV_ERRORS = (av.error.FFmpegError, OSError, ValueError, IndexError)
# Playlists, scripts and numbered pictures make libav read other files, or fetch them from anywhere
# Titles and the like may be in any encoding; from version 19 on PyAV does not stumble over them by itself.
ANY_TEXT: dict[str, Any] = (
    {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
)
OWN_DATA_ONLY = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
MAX_PIXELS = 1 << 27  # of a frame (16K has 133 million): a few bytes may claim any size
BOUNDED = {"max_pixels": str(MAX_PIXELS)}
# What libav finds out by decoding at the beginning of a file is in the index already: a quarter of
# the time that opening takes.
NO_PROBING = {
    **BOUNDED,
    "skip_frame": "all",
    "probesize": "32",
    "analyzeduration": "0",
    "fpsprobesize": "0",
}


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
        self._reading: Generator[av.Packet, None, None] | None = None
        self._played = False  # decoded from end to end
        self._plain = False  # read from the beginning each time, since the index did not hold
        self._known = (
            index.container.split(",")[0] if index is not None else ""
        )  # as long as it holds
        self._open()
        try:
            self.container = self._container.format.name
            if index is None:
                index = read_index(self._container, self._stream, self._head())
                self._fresh = False
            self.index = index
            # of these an mp4 file says less before its first packet, and not always the truth
            self.fps, self._stored_size = index.fps, (index.size[0], index.size[1])
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
        self._stop_reading()
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
        wanted = sorted(set(indices))
        pictures, done = np.empty((0, 0, 0, 3), np.uint8), 0
        for piece in self._collect(wanted):
            if not done:
                pictures = np.empty((len(wanted), *piece.shape[1:]), np.uint8)
            pictures[done : done + len(piece)] = piece
            done += len(piece)
        if not done:
            pictures = np.empty((0, self.height, self.width, 3), np.uint8)
        if indices != wanted:
            row = {rank: row for row, rank in enumerate(wanted)}
            pictures = pictures[[row[index] for index in indices]]
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)

    def pieces(self, indices: Sequence[int], choose: ChooseBox | None = None) -> Iterator[Tensor]:
        """Decode frames in one pass and hand them over a piece at a time.

        Args:
            indices: ascending, each once.
            choose: told height and width once a frame is there, it says which part of the frames
                is wanted: top, left, height, width. The rest is not even converted.

        Yields:
            `(n, C, h, w)` uint8 RGB with C innermost in memory, as many frames as fit in 4 MiB.

        Raises:
            DecodeError: a frame that cannot be had, and why.
            IndexError: an index outside `0 <= i < len(self)`.
        """
        import torch

        wanted = [operator.index(index) for index in indices]
        if any(a >= b for a, b in itertools.pairwise(wanted)):
            raise ValueError("pieces come in ascending order, each frame once")
        for pictures in self._collect(wanted, choose):
            yield torch.from_numpy(pictures).permute(0, 3, 1, 2)

    def _collect(self, wanted: list[int], choose: ChooseBox | None = None) -> Iterator[np.ndarray]:
        """Convert frames to `(n, h, w, 3)`, a piece at a time."""
        for rank in wanted[:1] + wanted[-1:]:
            if not 0 <= rank < len(self):
                raise IndexError(f"{self.path}: frame {rank} asked of {len(self)}")
        box: Box | None = None
        sheet: Sheet | None = None
        for done, frame in enumerate(self._in_order(wanted)):
            self._note_frame(frame)
            if box is None:
                width, height = self._shown_size()
                box = choose(height, width) if choose else (0, 0, height, width)
            if sheet is None:
                count = min(room(*box[2:]), len(wanted) - done)
                plain = self.index.turn == UNTURNED
                plain &= (frame.width, frame.height) == self._stored_size
                sheet = Sheet(count, box, frame if plain else None)
            if not sheet.take(frame):
                sheet.take_picture(self._to_rgb(frame))
            if sheet.is_full():
                yield self._convert(sheet.pictures)
                sheet = None

    def _note_frame(self, frame: av.VideoFrame) -> None:
        """Learn from a frame what may not be known before: how it is turned, how large it is."""
        if self.index.turn is None:
            self.index.turn = _read_turn(frame)
        if 0 in self._stored_size:
            self._stored_size = self.index.size = frame.width, frame.height

    def _in_order(self, wanted: list[int]) -> Iterator[av.VideoFrame]:
        """Decode the wanted frames, ascending; what the fast way has given stands."""
        self._refuse_damaged(wanted)
        done = 0
        if not self._plain:
            try:
                for frame in self._decode_by_index(wanted):
                    yield frame
                    done += 1
                return
            except _Odd:
                self._plain, self._known = True, ""
            if not self._played:
                self._play_through()
            self._refuse_damaged(wanted)
        yield from self._decode_plainly(wanted[done:])

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
        # an mp4 file says all that is needed before its first packet
        options = NO_PROBING if self._known == "mov" else BOUNDED
        try:
            self._container = av.open(
                # "file:" keeps libav from taking a name such as "a:b.mp4" for an address
                io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}",
                format=self._known or None,
                **ANY_TEXT,
                container_options=OWN_DATA_ONLY,
                options=options,
            )
        except LIBAV_ERRORS as error:
            if self._known:  # it is another file by now
                self._known = ""
                self._open()
                return
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
        # mpeg and h264 mark frames that they made up in part; mjpeg has to be told to fail
        strict = {"err_detect": "explode"} if self._codec.name == "mjpeg" else {}
        self._codec.options = BOUNDED | strict
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
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS and not self._known:
            raise DecodeError(self.path, f"its frames claim to be {width} x {height} pixels")
        return stream

    def _head(self) -> bytes:
        if isinstance(self._source, bytes):
            return self._source[:128]
        with open(self._source, "rb") as file:
            return file.read(128)

    def _shown_size(self) -> tuple[int, int]:
        if self.index.turn is None:
            try:
                self.frames([0])
            except DecodeError:
                self.index.turn = (False, False, False)
        return self._stored_size[:: -1 if self.index.turn[0] else 1]

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Return the (H, W, 3) picture as shown; frames of another size are scaled to the first."""
        width, height = self._stored_size
        pixels = self._convert(functools.partial(to_rgb, frame, width, height))
        transposed, mirrored, flipped = self.index.turn
        if transposed:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if flipped else 1, :: -1 if mirrored else 1]

    def _convert(self, convert: Callable[[], np.ndarray]) -> np.ndarray:
        try:
            return convert()
        except LIBAV_ERRORS:
            raise DecodeError(self.path, "its pixels cannot be converted to RGB") from None

    def _decode_by_index(self, wanted: Sequence[int]) -> Iterator[av.VideoFrame]:
        """Decode what the index says.

        Raises:
            _Odd: it did not hold.
        """
        places = self.index.order[wanted].tolist()
        starts = self.index.starts_for(wanted)
        skippable = self.index.skippable
        done = 0
        while done < len(wanted):
            (start, first), stop, run = starts[done], places[done], done
            # one run serves all frames whose keyframe lies within what is decoded anyway, or comes
            # next: to go on costs less than to begin anew
            while done < len(wanted) and (
                starts[done][0] <= stop + 1 or skippable[stop + 1 : starts[done][0]].all()
            ):
                stop = max(stop, places[done])
                done += 1
            yield from self._decode_run(start, stop, first, wanted[run:done])

    def _decode_run(
        self, start: int, stop: int, first: int, wanted: list[int]
    ) -> Iterator[av.VideoFrame]:
        left, fed = set(wanted), set[int]()
        ranks = self.index.ranks[start : stop + 1].tolist()
        expected = first
        for frame in self._feed(start, stop, wanted, fed):
            place = frame.pts
            if place is None or not start <= place <= stop:
                raise _Odd
            rank = ranks[place - start]
            if rank < first:
                continue  # it looks behind the keyframe that decoding began with
            while expected < rank and expected not in fed:
                expected += 1
            # what is shown after the last wanted frame may be what that is made from
            if frame.is_corrupt or (rank != expected and left):
                raise _Odd
            expected += 1
            if rank in left:
                yield frame
                left.remove(rank)
        if left:
            raise _Odd

    def _feed(
        self, start: int, stop: int, wanted: list[int], fed: set[int]
    ) -> Iterator[av.VideoFrame]:
        """Decode the packets from `start` to `stop`, but for those that can be left out."""
        index = self.index
        place, packets = self._go_to(start)
        needed = ~index.skippable[place : stop + 1]
        needed[: start - place] = False
        needed[index.order[wanted] - place] = True
        offsets = index.pos[place : stop + 1].tolist()
        ranks = index.ranks[place : stop + 1].tolist()
        decode = self._codec.decode
        expected = zip(offsets, ranks, needed.tolist(), strict=True)
        try:
            for at, (offset, rank, is_needed) in enumerate(expected, place):
                packet = next(packets, None)
                if packet is None:
                    break
                if offset != packet.pos and (offset >= 0 or packet.pos is not None):
                    raise _Odd  # not the packet that the index means
                if not is_needed:
                    continue
                if packet.is_corrupt:
                    raise _Odd
                fed.add(rank)
                packet.pts = packet.dts = at
                yield from decode(packet)
            yield from decode(None)
        except LIBAV_ERRORS:
            raise _Odd from None

    def _go_to(self, start: int) -> tuple[int, Iterator[av.Packet]]:
        """Return packets from `start` or some place before it, and that place."""
        if self._seekable and not (start == 0 and self._fresh):
            try:
                self._container.seek(int(self.index.seek[start]), stream=self._stream)
                packets = self._demux()
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
        return 0, self._demux()

    def _demux(self) -> Iterator[av.Packet]:
        """Begin to read packets where the file is at; whoever read before is done."""
        self._stop_reading()
        self._reading = self._container.demux(self._stream)
        return self._reading

    def _stop_reading(self) -> None:
        # PyAV's generators lose some 200 bytes for good where they are let go of half way unclosed
        if self._reading is not None:
            self._reading.close()
            self._reading = None

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
        packets = self._demux()
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

    def _decode_plainly(self, wanted: Sequence[int]) -> Iterator[av.VideoFrame]:
        left = set(wanted)
        stop = max((int(self.index.order[rank]) for rank in wanted), default=-1)
        for frame in self._play([], stop):
            place = frame.pts
            if place is None or not 0 <= place < len(self.index.ranks):
                continue
            rank = int(self.index.ranks[place])
            if rank in left:
                yield frame
                left.remove(rank)
                if not left:
                    return
        if left:
            raise DecodeError(self.path, f"cannot decode frame {min(left)} of {len(self)}")

    def _refuse_damaged(self, wanted: Sequence[int]) -> None:
        if wanted and wanted[-1] >= len(self):
            reason = f"shows {len(self)} frames, fewer than its index promises"
            raise DecodeError(self.path, reason)
        if not self._faults and not self.index.lacks:
            return
        for rank in wanted:
            reason = self._fault_of(rank)
            if reason:
                reason = f"cannot decode frame {rank} of {len(self)}: {reason}"
                raise DecodeError(self.path, reason)

    def _fault_of(self, rank: int) -> str | None:
        place = int(self.index.order[rank])
        if place < 0:
            return self.index.missing
        if not self._faults:
            return None
        start, first = self.index.start_for(rank)
        for fault in self._faults[bisect.bisect_left(self._faults, start) :]:
            if fault == place:
                return "its data is damaged"
            if fault > place:
                break
            # nor do later frames look at what looks behind the keyframe
            leading = 0 <= self.index.ranks[fault] < first
            if not self.index.skippable[fault] and not leading:
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
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
    if abs(b) > abs(a):
        return True, bool(c < 0), bool(b < 0)
    return False, bool(a < 0), bool(d < 0)
