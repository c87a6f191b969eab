"""Re-encode real videos into the sets that the other benchmarks are run on.

    python scripts/bench/sets.py OUT VIDEO [VIDEO ...]

Writes one file per video and set, each played on from its beginning until it is long enough:
`k250` 340x256, 10 s, 30 fps, H.264, a keyframe every 250 frames (as Kinetics is passed around), `k12` the
same with a keyframe every 12, `ucf` 320x240, 7 s, 25 fps, MPEG-4 with B frames in AVI (as UCF-101).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av

# No keyframe at a cut: these videos are cut where they begin anew, and few real ones so often.
X264 = {"preset": "medium", "crf": "23", "sc_threshold": "0", "threads": "1"}
SETS = {
    "k250": (".mp4", "libx264", (340, 256), 30, 10, {**X264, "g": "250"}),
    "k12": (".mp4", "libx264", (340, 256), 30, 10, {**X264, "g": "12"}),
    "ucf": (
        ".avi",
        "mpeg4",
        (320, 240),
        25,
        7,
        {"bf": "2", "g": "12", "sc_threshold": "1000000000", "b": "400k"},
    ),
}


def pictures(video: str) -> Iterator[av.VideoFrame]:
    """Play a video over and over."""
    while True:
        with av.open(video) as container:
            yield from container.decode(video=0)


def encode(video: str, path: Path, name: str) -> None:
    _, codec, (width, height), rate, seconds, options = SETS[name]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, picture in enumerate(itertools.islice(pictures(video), rate * seconds)):
            frame = picture.reformat(width, height, "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            frame.pict_type = 0  # the encoder's choice, not what the picture was
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("videos", nargs="+")
    args = parser.parse_args()
    for name, (ending, *_) in SETS.items():
        (args.out / name).mkdir(parents=True, exist_ok=True)
        for video in args.videos:
            encode(video, args.out / name / f"{Path(video).stem}{ending}", name)
        print(f"{args.out / name}: {len(args.videos)} files", flush=True)


if __name__ == "__main__":
    main()
