"""Try every file of the corpus with every decoder, each in a process that may hang or crash.

python tests/corpus_outcomes.py            print a table in Markdown
python tests/corpus_outcomes.py --folder FOLDER "8K.mkv" ...      only these, in this folder
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from corpus import AS_PLAYED, CASES, make_corpus
from make_video import read_numbers

from vidtrain.data import crew, sampling
from vidtrain.data.check import probe
from vidtrain.data.dataset import Files, VideoDataset
from vidtrain.data.decode import open_video
from vidtrain.data.indices import IndexStore
from vidtrain.data.sources import Sources
from vidtrain.data.transforms.sample import Augment
from vidtrain.types import Clip, DecodeError, Sample, UserError, VideoReader

DECODERS = ("pyav", "decord", "torchcodec")
NOBODY = 65534  # a user who may read only what everybody may
CLIP = Clip(num_frames=4, stride=2, size=48, mean=[0, 0, 0], std=[1, 1, 1])


class Outcome(NamedTuple):
    """What came of one file with one decoder."""

    name: str
    decoder: str
    right: int = 0  # frames
    refused: int = 0
    wrong: int = 0  # handed out without a word
    reason: str = ""  # of a refusal, or what `check` found
    faults: tuple[str, ...] = ()  # what should not have happened

    def __str__(self) -> str:
        """Say it in one cell of the table."""
        counts = {"right": self.right, "refused": self.refused, "wrong": self.wrong}
        said = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "refused"
        reason = self.reason.replace(f"{self.decoder} may show wrong frames of", "of").split(
            "; use"
        )[0]
        reason = reason if len(reason) < 80 else reason[:80].rsplit(" ", 1)[0] + " ..."
        said += f": {reason}" if reason else ""
        return said + "".join(f" **{fault}**" for fault in self.faults[:3])


def try_file(job: tuple[str, str]) -> Outcome:
    """Read one file with one decoder in every way; runs in a worker process."""
    torch.set_num_threads(1)
    trial = _Trial(*job)
    with _nobody() if "no permission" in trial.name else contextlib.nullcontext():
        before = len(os.listdir("/proc/self/fd"))
        trial.run()
        if len(os.listdir("/proc/self/fd")) > before:
            trial.faults.append("a file was left open")
    return trial.outcome()


class _Trial:
    def __init__(self, path: str, decoder: str) -> None:
        self.path, self.decoder, self.name = path, decoder, Path(path).name
        self.case = CASES[self.name]
        as_played = self.case.numbers == AS_PLAYED
        self.numbers = played_numbers(path) if as_played else self.case.numbers
        self.damaged = self.numbers is not None and self.case.reason is not None
        self.right = self.refused = self.wrong = 0
        self.reason = ""
        self.size: tuple[int, ...] | None = None
        self.faults: list[str] = []

    def run(self) -> None:
        try:
            with open_video(self.path, self.decoder) as reader:
                self.read(reader)
        except DecodeError as error:
            self.note(error)
        self.through_dataset()
        if self.decoder == "pyav":
            self.check()

    def outcome(self) -> Outcome:
        counts = self.right, self.refused, self.wrong
        return Outcome(self.name, self.decoder, *counts, self.reason, tuple(self.faults))

    def read(self, reader: VideoReader) -> None:
        """Ask for the frames in many ways."""
        if self.numbers is None:
            self.faults.append("was opened")
            return
        count = len(reader)
        if not self.damaged and count != len(self.numbers):
            self.faults.append(f"has {len(self.numbers)} frames, not {count}")
        if self.case.fps and abs(reader.fps - self.case.fps) > 0.01:
            self.faults.append(f"has {self.case.fps:g} frames per second, not {reader.fps:g}")
        for index in range(count):
            verdict = self.ask(reader, [index])
            self.right += verdict is True
            self.wrong += verdict is False
            self.refused += verdict is None
        if count == 1:  # nothing that has not been asked, and one has 8K
            return
        chance = random.Random(0)
        for _ in range(4):
            self.ask(reader, chance.choices(range(count), k=5))
        once_read = getattr(reader, "index", None)
        for index in {0, count - 1, *chance.choices(range(count), k=4)}:
            for known in {id(None): None, id(once_read): once_read}.values():
                with open_video(self.path, self.decoder, index=known) as fresh:
                    self.ask(fresh, [index])
        with open_video(self.path, self.decoder) as fresh:
            self.ask(fresh, list(range(count)))

    def ask(self, reader: VideoReader, indices: list[int]) -> bool | None:
        """Compare frames with what was drawn: right, wrong or (None) refused."""
        try:
            frames = reader.frames(indices)
        except DecodeError as error:
            self.note(error)
            return None
        size = tuple(frames.shape[2:])
        if self.size not in (None, size):
            self.faults.append(f"frames of {self.size}, then of {size}")
        self.size = size
        shrink = max(1, frames.shape[2] // 270)  # 8K is not looked at pixel by pixel
        found = read_numbers(frames[..., ::shrink, ::shrink])
        expected = [dict(enumerate(self.numbers)).get(index) for index in indices]
        # what other decoders make of damaged data they hand out without a word
        if found != expected and not (self.damaged and self.decoder != "pyav"):
            self.faults.append(f"frames {expected} came as {found}")
        return found == expected

    def note(self, error: DecodeError) -> None:
        """Judge a refusal."""
        self.reason = self.reason or error.reason
        if error.path != self.path:
            self.faults.append(f"the error names {error.path}")
        named = self.case.reason and re.search(self.case.reason, error.reason)
        # which frames are lost of a damaged file is judged by what the others show
        if not named and not self.damaged and f"{self.decoder} " not in error.reason:
            self.faults.append(f"refused: {error.reason}")

    def through_dataset(self) -> None:
        """Load it as a row for testing and as one for training, where another may stand in."""
        rows = Files([self.path, Path(self.path).with_name("sound.mp4")])
        with tempfile.TemporaryDirectory() as folder:
            kept = IndexStore(Path(folder, "a.frames"), len(rows))
            testing, training = (
                VideoDataset(
                    rows, CLIP, augment=augment, clips=2, sources=Sources(self.decoder, kept)
                )
                for augment in (None, Augment())
            )
            for _ in "first", "by the index that was kept":
                self.judge_testing(testing[0, 0])
                self.judge_training(training[0, 0])

    def judge_testing(self, sample: Sample) -> None:
        for failure in sample["failures"]:
            self.note(DecodeError(failure.path, failure.reason))
        if "frames" in sample and self.numbers is not None and not self.damaged:
            wanted = sampling.uniform_clips(len(self.numbers), CLIP.num_frames, CLIP.stride, 2)
            expected = [self.numbers[index] for index in np.unique(wanted)]
            found = read_numbers(sample["frames"])
            if found != expected:
                self.faults.append(f"test frames {expected} came as {found}")
        if ("frames" in sample) == bool(sample["failures"]):
            self.faults.append("lost in testing without a word")

    def judge_training(self, sample: Sample) -> None:
        for failure in sample["failures"]:
            self.note(DecodeError(failure.path, failure.reason))
        if sample["video"].shape != (1, CLIP.num_frames, 3, CLIP.size, CLIP.size):
            self.faults.append(f"a training clip of shape {tuple(sample['video'].shape)}")
        if self.numbers is None and not sample["failures"]:
            self.faults.append("replaced in training without a word")

    def check(self) -> None:
        """Let `vidtrain data action=check` judge it."""
        found = probe(self.path)
        self.reason = found.error or self.reason
        if self.case.reason is None and not found.ok:
            self.faults.append(f"check says: {found.error}")
        elif self.case.reason and not re.search(self.case.reason, found.error or ""):
            self.faults.append(f"check says: {found.error}, not {self.case.reason}")


def played_numbers(path: str) -> list[int]:
    """Decode a file without B frames packet by packet; -1 for those that give no frame."""
    numbers: list[int] = []
    with av.open(path) as container:
        packets = container.demux(video=0)
        while True:
            try:
                for frame in next(packets).decode():
                    picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                    numbers += read_numbers(picture.permute(2, 0, 1)[None])
            except StopIteration:
                return numbers
            except av.error.FFmpegError:
                numbers.append(-1)


@contextlib.contextmanager
def _nobody() -> Iterator[None]:
    """Be a user who may not read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def outcomes(
    paths: Iterable[Path], decoders: Iterable[str] = DECODERS, time_limit: float = 20.0
) -> Iterator[Outcome]:
    """Try files with decoders; what kills or holds up its process is a fault like others."""
    jobs = [(str(path), decoder) for decoder in decoders for path in paths]
    for result in crew.run(try_file, jobs, workers=2, time_limit=time_limit, culprit="the decoder"):
        if isinstance(result, crew.Lost):
            path, decoder = result.job
            result = Outcome(Path(path).name, decoder, faults=(result.reason,))
        yield result


def installed(decoder: str, video: Path) -> bool:
    """Tell whether a decoder can be used here."""
    try:
        open_video(video, decoder).close()
    except UserError:
        return False
    return True


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of files; all of them, if left out")
    parser.add_argument("--folder", type=Path, help="where the files are made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
        made = make_corpus(folder)
        paths = [made[name] for name in args.names] or list(made.values())
        table: dict[str, list[str]] = {}
        for outcome in outcomes(paths):
            table.setdefault(outcome.name, []).append(str(outcome))
    print("| file | " + " | ".join(DECODERS) + " |\n|---|---|---|---|")
    for name, cells in table.items():
        print(f"| {name} | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")


if __name__ == "__main__":
    main()
