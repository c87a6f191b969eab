"""Take a recipe apart: what each of its parts adds to the score of a small 3D CNN that reads lips.

    python scripts/bench/recipe.py ../shared/datasets/grid
    python scripts/bench/recipe.py ../shared/datasets/grid --seeds 2 --only plain "augmented, cosine"

GRID's `command`, one of four words, from scratch on a CPU. Network, clips, epochs and base rate stay. Each run
is a command that is printed, and can be given by hand. The table at the end has the video top-1 of the best
validation epoch, the mean over the seeds and each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from families import score

COMMON = (
    "model=small_3d_cnn data=folder data.label=command data.region=[0.32,0.63,0.2,0.2]"
    " data.span=[0.12,1.32] clip.num_frames=28 clip.stride=1 clip.size=56 views.clips=1 views.crops=1"
    " optim=adamw_cosine optim.lr=0.0015 trainer=cpu data.cache=disk logger=csv test=true"
)
AUGMENTED = "augment=basic augment.scale=[1.0,1.15]"
CONSTANT, COSINE = "optim.schedule=constant", "optim.schedule=cosine"
AVERAGE = "callbacks.ema.decay=0.998"
ROWS = {
    "plain": f"augment=none {CONSTANT}",
    "augmented": f"{AUGMENTED} {CONSTANT}",
    "augmented, cosine": f"{AUGMENTED} {COSINE}",
    "augmented, moving average": f"{AUGMENTED} {CONSTANT} {AVERAGE}",
    "augmented, cosine, moving average": f"{AUGMENTED} {COSINE} {AVERAGE}",
}


def command(row: str, seed: int, root: str, epochs: int, out: Path) -> list[str]:
    words = [*COMMON.split(), *ROWS[row].split(), f"data.root={root}", f"seed={seed}"]
    return ["train", *words, f"trainer.max_epochs={epochs}", f"hydra.run.dir={out}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="the folder of the GRID videos")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"))
    args = parser.parse_args()
    scores: dict[str, list[float]] = {row: [] for row in args.only}
    for seed in args.seeds:
        for row, found in scores.items():
            out = (args.out / f"{row.replace(', ', '_').replace(' ', '_')}-{seed}").resolve()
            words = command(row, seed, args.root, args.epochs, out)
            top1 = score(words, out)
            if top1 is None:
                sys.exit(1)
            found.append(100 * top1)
            print(f"  {found[-1]:.1f} %", flush=True)
    print(f"\n| | video top-1, mean of {len(args.seeds)} | each |\n|---|---|---|")
    for row, found in scores.items():
        each = ", ".join(f"{score:.1f}" for score in found)
        print(f"| {row} | {statistics.mean(found):.1f} % | {each} |")


if __name__ == "__main__":
    main()
