"""Does masked pretraining help where labels are few? A small VideoMAE on GRID, on a CPU.

    python scripts/bench/pretraining.py ../shared/datasets/grid

One network is pretrained on the lips of the training videos, without labels. Then `command`, one of four words, is
learned from 100 labelled training videos, as many of each word: from scratch, from what was pretrained, and by a linear
and an attentive probe of it, which leave it as it is. Each seed has its own 100 videos, the same for all; of a labelled
or tested video the 0.6 s around the word are looked at. There are no validation videos: the last epoch is tested, on
videos whose letters nothing was trained on. Each run is a command that is printed, and can be given by hand.

    python scripts/bench/pretraining.py ../shared/datasets/grid --faces

pretrains on whole faces instead, and says where the picture is of what was hidden and what was made of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import sys
import time
from pathlib import Path

from families import run, score

COMMON = (
    "data=folder data.cache=disk clip.num_frames=14 clip.stride=1 views.clips=1 views.crops=1 trainer=cpu"
    " logger=csv augment=basic augment.scale=[1.0,1.15] optim=adamw_cosine test=true"
    " +model.patch=8 +model.dim=128 +model.depth=4 +model.heads=4"
)
LIPS = "data.region=[0.32,0.63,0.2,0.2] clip.size=32"
FACES = "data.region=[0.28,0.46,0.32,0.4] clip.size=56"
PRETRAINING = (
    "model=videomae_small_pretrain data.label=null data.batch_size=16 optim.lr=0.002 optim.betas=[0.9,0.95]"
    " model.mask_ratio=0.75 +model.decoder_dim=64 +model.decoder_depth=2 +model.decoder_heads=2"
    " trainer.check_val_every_n_epoch=5"
)
LEARNING = "model=videomae_small data.label=command data.val_fraction=0 data.batch_size=10 model.drop_path=0"
AROUND = 0.3  # seconds before and after the middle of the word
ROWS = {  # from the pretrained network, or not; the words
    "from scratch": (False, "optim.lr=0.001"),
    "pretrained": (True, "optim.lr=0.001"),
    "linear probe": (True, "optim.lr=0.01 freeze=backbone model.probe=linear"),
    "attentive probe": (True, "optim.lr=0.001 freeze=backbone model.probe=attentive"),
}


def choose(root: Path, labels: int, seed: int, path: Path) -> None:
    """Write a table with so many labelled training videos, as many of each word, and all test videos."""
    with (root / "videos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    train = [row for row in rows if row["split"] == "train"]
    random.Random(seed).shuffle(train)
    words = sorted({row["command"] for row in rows})
    chosen = []
    for word in words:
        chosen += [row for row in train if row["command"] == word][: labels // len(words)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "command", "split", "start", "end"])
        for row in chosen + [row for row in rows if row["split"] == "test"]:
            times = row["words"].partition(":")[0]  # the first word is the command: 0.950-1.180:bin
            start = max(0.0, statistics.mean(map(float, times.split("-"))) - AROUND)
            piece = (f"{start:.3f}", f"{start + 2 * AROUND:.3f}")
            writer.writerow([row["path"], row["command"], row["split"], *piece])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="the folder of the GRID videos")
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain-epochs", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--faces", action="store_true", help="pretrain on whole faces, and no more")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument(
        "--pretrained", type=Path, help="a run of an earlier call, in place of a new one"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/pretraining"))
    args = parser.parse_args()
    root, out = args.root.resolve(), args.out.resolve()
    region = FACES if args.faces else LIPS
    common = [*COMMON.split(), *region.split(), f"data.root={root}"]
    start = args.pretrained or out / ("faces" if args.faces else "pretrained")
    if args.pretrained is None:
        began = time.monotonic()
        words = ["train", *common, *PRETRAINING.split(), f"hydra.run.dir={start}"]
        if not run([*words, f"trainer.max_epochs={args.pretrain_epochs}"]):
            sys.exit(1)
        loss = json.loads((start / "report.json").read_text())["metrics"]["test/loss"]
        minutes = (time.monotonic() - began) / 60
        print(f"  mean squared error {loss:.3f}  {minutes:.1f} min", flush=True)
    if args.faces:
        print(start / "reconstructions_test.png")
        return
    scores: dict[str, list[float]] = {row: [] for row in args.only}
    minutes_of: dict[str, list[float]] = {row: [] for row in args.only}
    for seed in args.seeds:
        table = out / f"labelled-{seed}.csv"
        choose(root, args.labels, seed, table)
        for row, found in scores.items():
            pretrained, recipe = ROWS[row]
            folder = out / f"{row.replace(' ', '_')}-{seed}"
            words = ["train", *common, *LEARNING.split(), *recipe.split(), f"seed={seed}"]
            words += [f"data.annotations={table}", f"trainer.max_epochs={args.epochs}"]
            words += [f"ckpt={start}"] if pretrained else []
            began = time.monotonic()
            top1 = score([*words, f"hydra.run.dir={folder}"], folder)
            if top1 is None:
                sys.exit(1)
            found.append(100 * top1)
            minutes_of[row].append((time.monotonic() - began) / 60)
            print(f"  {found[-1]:.1f} %", flush=True)
    print(
        f"\n| {args.labels} labelled videos | video top-1, mean of {len(args.seeds)} | each | minutes |"
    )
    print("|---|---|---|---|")
    for row, found in scores.items():
        each = ", ".join(f"{score:.1f}" for score in found)
        minutes = statistics.mean(minutes_of[row])
        print(f"| {row} | {statistics.mean(found):.1f} % | {each} | {minutes:.1f} |")


if __name__ == "__main__":
    main()
