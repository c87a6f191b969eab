"""Train the lecture's families from scratch on a CPU and compare what they learn.

    python scripts/bench/families.py demo
    python scripts/bench/families.py grid --root ../shared/datasets/grid
    python scripts/bench/families.py demo --only "slow fusion" slowfast

`demo` are the built-in videos, whose classes differ only in motion; `grid` is the GRID corpus, of which
the command, one of four words, is read from the lips. Every network sees the same clips, is as small as a
CPU asks for, and is trained by one recipe for as many epochs; image networks are `small`, four
convolutions. Each run is a command that is printed, and can be given by hand. The table at the end has the
video top-1 of the best validation epoch, and minutes, from the run's report.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

SMALL = "model.backbone=small"
# Name -> the network, and how it departs from what the others are given.
FAMILIES = {
    "single frame": f"model=single_frame {SMALL} clip.num_frames=1",
    "late fusion, pooled": f"model=late_fusion_pool {SMALL}",
    "early fusion": f"model=early_fusion {SMALL}",
    "slow fusion": f"model=slow_fusion {SMALL}",
    "cnn + lstm": f"model=cnn_lstm {SMALL} model.fc6=256 model.init=null model.dropout_features=0.2",
    "3d cnn + lstm": "model=cnn_lstm model.segments=4 model.init=null model.dropout_features=0.2"
    " model.backbone3d={_target_:vidtrain.models.small_3d_cnn.small_3d_cnn,num_classes:0}",
    "gru-rcn": f"model=gru_rcn {SMALL} +model.dims=[16,32,64,64,64] model.dropout=0.5",
    "r2plus1d": "model=r2plus1d_18 model.width=8",
    "slowfast": "model=slowfast_r50_4x16 +model.width=16",
    "two-stream, spatial": f"model=two_stream {SMALL} model.streams=spatial",
    "two-stream, temporal": f"model=two_stream {SMALL} model.streams=temporal data.flow=farneback",
    "two-stream, average": f"model=two_stream {SMALL} data.flow=farneback",
    "two-stream, svm": f"model=two_stream {SMALL} data.flow=farneback model.fusion=svm",
}
RECIPE = "optim=adamw_cosine optim.lr=0.002 trainer=cpu augment.scale=[1.0,1.15] data.batch_size=16 test=true logger=csv"
MEAN = "clip.mean=[0.45,0.45,0.45] clip.std=[0.25,0.25,0.25]"
SETS = {
    "demo": "data=demo clip.num_frames=16 clip.stride=2 clip.size=56 views.clips=3 views.crops=3",
    "grid": "data=folder data.label=command data.region=[0.32,0.63,0.2,0.2] data.span=[0.12,1.32]"
    " clip.num_frames=16 clip.stride=2 clip.size=56 views.clips=1 views.crops=1 data.cache=ram",
}
# A single frame is tested on as many frames as the others see.
FRAMES = {"demo": "views.clips=10", "grid": "views.clips=16"}
EPOCHS = {"demo": 20, "grid": 15}


def command(data: str, family: str, root: str | None, epochs: int | None, out: Path) -> list[str]:
    words = f"{SETS[data]} {RECIPE} {MEAN} {FAMILIES[family]}".split()
    if family == "single frame":
        words += FRAMES[data].split()
    if root is not None:
        words.append(f"data.root={root}")
    words += [f"trainer.max_epochs={epochs or EPOCHS[data]}", f"hydra.run.dir={out}"]
    last = {word.partition("=")[0]: word for word in words}  # a key's later word wins
    return ["train", *last.values()]


def run(words: list[str]) -> bool:
    """Run `vidtrain` with these words; whether it went well."""
    print("vidtrain", shlex.join(words), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "vidtrain", *words], capture_output=True, text=True
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    return not done.returncode


def score(words: list[str], out: Path) -> float | None:
    """Run `vidtrain` with these words, and give the video top-1 of its report; None where it failed."""
    if not run(words):
        return None
    top1: float = json.loads((out / "report.json").read_text())["metrics"]["test/top1"]
    return top1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=SETS)
    parser.add_argument("--root", help="the folder of the GRID videos")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=Path("runs/families"))
    args = parser.parse_args()
    rows = []
    for family in args.only:
        out = (args.out / args.data / family.replace(" ", "_").replace(",", "")).resolve()
        words = command(args.data, family, args.root, args.epochs, out)
        began = time.monotonic()
        top1 = score(words, out)
        minutes = (time.monotonic() - began) / 60
        rows.append((family, top1, minutes))
        if top1 is not None:
            print(f"  {100 * top1:.1f} %  {minutes:.1f} min", flush=True)
    print(f"\n| on {args.data} | video top-1 | minutes |\n|---|---|---|")
    for family, top1, minutes in rows:
        shown = "failed" if top1 is None else f"{100 * top1:.1f} %"
        print(f"| {family} | {shown} | {minutes:.1f} |")


if __name__ == "__main__":
    main()
