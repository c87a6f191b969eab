"""Damage real videos in many ways and see that nothing worse than a named error comes of it.

    python scripts/fuzz.py VIDEO [VIDEO ...] --count 2000 --seed 0

Two seconds of each video, in its own container and in Matroska, or all of a small one, are damaged
`count` times: bits flipped, blocks zeroed, doubled, swapped, removed, put in, ends cut off, numbers
in headers changed. Each goes through `check_files`, then through the training loader. What is looked for:

- this process crashes, or anything hangs: never;
- a file that kills its worker, or takes too long, is named;
- frames that the fast way hands out without a word, although decoding the file once from its
  beginning, which meets no error either, gives others: never. `--compare` says for how many files.

Exit code 1 if any of this is not so. Which mutation a file is depends on `--seed` and its number
alone: `--only NUMBER --keep FOLDER` makes one again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import av
import numpy as np

from vidtrain.data.check import Probe, check_files, probe
from vidtrain.data.decode import open_video
from vidtrain.data.readers.pyav import ANY_TEXT
from vidtrain.types import Clip, DecodeError

SECONDS = 2.0  # of each video that is not
SMALL = 256 << 10  # bytes
TIME_LIMIT = 30.0  # seconds for one file
WRONG = "WRONG: "  # begins the error of a file that is misread without a word
CLIP = Clip(num_frames=8, stride=2, size=64, mean=[0, 0, 0], std=[1, 1, 1])
BOXES = (
    b"ftyp moov mvhd trak tkhd edts elst mdia mdhd hdlr minf vmhd dinf dref stbl stsd avc1".split()
)
BOXES += (
    b"avcC stts ctts stsc stsz stco stss mdat free udta RIFF hdrl avih strh strf movi idx1".split()
)
NUMBERS = (0, 1, 7, 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF)


def shorten(video: Path, target: Path) -> None:
    """Copy the first SECONDS of the pictures, without decoding them."""
    with av.open(str(video)) as source, av.open(str(target), "w") as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size and (packet.dts or 0) * stream.time_base < SECONDS:
                packet.stream = copy
                container.mux(packet)


def damage(data: bytes, chance: random.Random) -> bytes:
    """Return a damaged copy: one to three wounds of some kind."""
    wounded = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        chance.choice(WOUNDS)(wounded, chance)
    return bytes(wounded)


def flip_bits(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 4, 16, 64))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def zero(data: bytearray, chance: random.Random) -> None:
    start, end = _block(data, chance)
    data[start:end] = bytes(end - start)


def double(data: bytearray, chance: random.Random) -> None:
    start, end = _block(data, chance)
    data[end:end] = data[start:end]


def swap(data: bytearray, chance: random.Random) -> None:
    start, end = _block(data, chance)
    other = chance.randrange(max(1, len(data) - (end - start)))
    block, data[start:end] = data[start:end], data[other : other + end - start]
    data[other : other + len(block)] = block


def remove(data: bytearray, chance: random.Random) -> None:
    start, end = _block(data, chance)
    del data[start:end]


def insert(data: bytearray, chance: random.Random) -> None:
    start, end = _block(data, chance)
    data[start:start] = chance.randbytes(end - start)


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(1, len(data)) :]


def change_number(data: bytearray, chance: random.Random) -> None:
    """Overwrite the size of a box or chunk, or a number in the first bytes within it."""
    places = [place for name in BOXES if (place := data.find(name)) >= 4]
    if not places:  # Matroska: anywhere near the beginning
        return _overwrite(data, chance.randrange(min(600, len(data))), chance)
    place = chance.choice(places)
    _overwrite(data, place + chance.choice((-4, -4, 4, 8, 12, 4 * chance.randrange(1, 40))), chance)


def _overwrite(data: bytearray, place: int, chance: random.Random) -> None:
    number = chance.choice((*NUMBERS, len(data), chance.getrandbits(32), chance.getrandbits(10)))
    coded = struct.pack(chance.choice("<>") + "I", number)
    data[place : place + 4] = coded[: max(0, len(data) - place)]


def _block(data: bytearray, chance: random.Random) -> tuple[int, int]:
    start = chance.randrange(max(1, len(data)))
    return start, min(len(data), start + chance.choice((1, 4, 64, 512, 4096)))


# what hits a header matters more often than where the bytes lie would have it
WOUNDS = (flip_bits, flip_bits, zero, double, swap, remove, insert, cut, *(change_number,) * 4)


def look(path: str, decoder: str, compare: int = 1) -> Probe:
    """Check a file; every `compare`-th is compared with a plain decode as well."""
    found = probe(path, decoder)
    number = int(Path(path).stem)
    if not compare or number % compare:
        return found
    wrong = misread(path, random.Random(number))
    return found._replace(ok=False, error=WRONG + wrong) if wrong else found


def misread(path: str, chance: random.Random) -> str | None:
    """Say which frames come out other than a plain decode of the whole file has them."""
    asked: list[tuple[int, int, np.ndarray]] = []  # frame, its packet, its picture
    try:
        with open_video(path) as reader:
            index = reader.index  # type: ignore[attr-defined]
            count = len(reader)
            for rank in [0, count - 1, *(chance.randrange(count) for _ in range(6))]:
                with open_video(path) as fresh, contextlib.suppress(DecodeError):
                    picture = fresh.frames([rank])[0].permute(1, 2, 0).numpy()
                    index = fresh.index  # type: ignore[attr-defined]
                    asked.append((rank, int(index.order[rank]), picture))
            damaged = reader.check().reason  # type: ignore[attr-defined]
            count = len(reader)  # now that it has seen them
    except DecodeError:
        return None
    played, fault, orderly = play(path)
    shown = sorted(played, key=lambda place: played[place][0])
    sound = fault is None and orderly and not damaged
    if sound and count != len(shown):
        return f"{count} frames, of which a plain decode has {len(shown)}"
    for rank, place, picture in asked:
        if place not in played:
            continue
        _, corrupt, frame = played[place]
        if sound and shown.index(place) != rank:
            return f"frame {rank} is number {shown.index(place)} of a plain decode"
        if corrupt:
            return f"frame {rank} is corrupt"
        seen = _seen(frame, index.turn)
        alike = seen.shape != picture.shape or np.array_equal(seen, picture)  # scaled to the first
        if not alike and (fault is None or place < fault):
            return f"frame {rank} is not that of a plain decode"
    return None


def play(path: str) -> tuple[dict[int, tuple[int, bool, av.VideoFrame]], int | None, bool]:
    """Decode a file once: for each packet that is shown its turn, whether it is corrupt, the frame.

    Also the first packet at which an error was met, and whether frames come in the order of their
    timestamps: where they contradict the pictures, both orders are right.
    """
    times: dict[int, int | None] = {}
    played: dict[int, tuple[int, bool, av.VideoFrame]] = {}
    fault = None
    with av.open(path, **ANY_TEXT) as container:
        stream = container.streams.best("video")
        stream.thread_type = "NONE"  # threads do not tell of all damage
        packets = container.demux(stream)
        for place in itertools.count():
            try:
                packet = next(packets)
                times[place] = packet.pts
                packet.pts = packet.dts = place
                if packet.is_corrupt and fault is None:
                    fault = place
                for frame in packet.decode():
                    played.setdefault(frame.pts, (len(played), frame.is_corrupt, frame))
                    if frame.is_corrupt and fault is None:
                        fault = frame.pts
            except (StopIteration, IndexError):  # PyAV's, where streams turned up on the way
                order = [times[place] for place in played]
                rising = [a is not None and b is not None and a < b for a, b in pairwise(order)]
                return played, fault, all(rising)
            except (av.error.FFmpegError, OSError, ValueError):
                fault = place if fault is None else fault
    raise AssertionError("unreachable")


def _seen(frame: av.VideoFrame, turn: tuple[bool, bool, bool]) -> np.ndarray:
    picture = frame.to_ndarray(format="rgb24")
    transposed, mirrored, flipped = turn
    picture = picture.swapaxes(0, 1) if transposed else picture
    return picture[:: -1 if flipped else 1, :: -1 if mirrored else 1]


def train_on(damaged: list[Path], sound: list[Path], seed: int) -> tuple[int, Counter[str]]:
    """Load each damaged file once as a training row; return clips, and reasons of failures."""
    from vidtrain.data.collate import collate
    from vidtrain.data.dataset import Files, VideoDataset
    from vidtrain.data.loader import Loader
    from vidtrain.data.transforms.sample import Augment

    copies = -(-4 * len(damaged) // len(sound))  # ten bad ones in a row end the training
    rows = Files([*damaged, *sound * copies])
    dataset = VideoDataset(rows, CLIP, augment=Augment())
    rows = range(len(damaged))
    order = [[(row, seed + row) for row in rows[first : first + 8]] for first in rows[::8]]
    loader = Loader(dataset, order, collate, workers=2, time_limit=TIME_LIMIT)
    clips = 0
    reasons: Counter[str] = Counter()
    try:
        for keys, batch in zip(order, loader, strict=True):
            clips += len(batch["video"])
            named = {failure.row for failure in batch["failures"]}
            if len(batch["video"]) != len(keys) or not all(
                failure.path and failure.reason for failure in batch["failures"]
            ):
                raise AssertionError(f"{len(batch['video'])} clips of rows {keys}, {named} failed")
            reasons.update(failure.reason for failure in batch["failures"])
    finally:
        loader.close()
    return clips, reasons


def mutations(
    sources: list[Path], numbers: Iterable[int], seed: int, folder: Path
) -> Iterator[Path]:
    """Write the damaged files."""
    for number in numbers:
        source = sources[number % len(sources)]
        path = folder / f"{number:05}{source.suffix}"
        path.write_bytes(damage(source.read_bytes(), random.Random(f"{seed} {number}")))
        yield path


def kind_of(reason: str) -> str:
    """Take numbers out of a reason, so that equal ones can be counted."""
    words = reason.split(" (")[0].split()
    return " ".join("N" if any(c.isdigit() for c in word) else word for word in words)[:76]


def main() -> int:
    """Make the files, try them, print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=int, default=1, help="every n-th file; 0: none")
    parser.add_argument("--only", type=int, help="the number of one file")
    parser.add_argument("--keep", type=Path, help="a folder for the files, which are then kept")
    args = parser.parse_args()
    numbers = range(args.count) if args.only is None else [args.only]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sources = []
        for video in args.videos:
            if video.stat().st_size < SMALL:
                sources.append(video)
                continue
            for suffix in (video.suffix, ".mkv"):
                sources.append(folder / f"{video.stem}{suffix}")
                shorten(video, sources[-1])
        files = list(mutations(sources, numbers, args.seed, folder))

        began = time.monotonic()
        looks = functools.partial(look, compare=args.compare)
        probes = list(check_files(files, workers=2, time_limit=TIME_LIMIT, look=looks))
        seconds = time.monotonic() - began
        assert [found.path for found in probes] == [str(file) for file in files]
        print(f"check_files: {len(probes)} files in {seconds:.0f} s")
        print(f"{sum(found.ok for found in probes):6} sound")
        kinds = Counter(kind_of(found.error) for found in probes if found.error)
        for kind, count in kinds.most_common():
            print(f"{count:6} {kind}")
        killed = [
            found for found in probes if found.error and found.error.startswith(("the ", "took"))
        ]
        wrong = [found for found in probes if found.error and found.error.startswith(WRONG)]
        for found in killed + wrong:
            print(f"       {Path(found.path).name}: {found.error}")

        began = time.monotonic()
        clips, reasons = train_on(files, sources, args.seed)
        seconds = time.monotonic() - began
        print(f"training: {clips} clips, {sum(reasons.values())} stand-ins in {seconds:.0f} s")
        for reason, count in reasons.items():
            if reason.startswith(("the ", "took")):
                print(f"{count:6} {reason}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
