"""`vidtrain verify`: score a checkpoint as a recipe does, and compare with what was published."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.errors import HydraException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table

from vidtrain import checkpoint, config
from vidtrain.commands.test import output_folder, score, write_json
from vidtrain.commands.train import quieten
from vidtrain.types import UserError

TOLERANCE = 0.5  # points, where a recipe names none

# What a score depends on besides the weights. Mean and deviation of the frames are left out: they
# belong to the weights that a training began from.
CLIP = ("num_frames", "stride", "size", "fps")
VIEWS = ("clips", "crops", "num_frames", "sampling", "short_side", "size")
DATA = (
    "name", "fold", "sampling", "past_end", "region", "span", "multi_label", "split_seed",
    "test_fraction", "flow", "flow_method", "flow_bound", "flow_direction", "flow_mean",
)  # fmt: skip
NOT_BUILT = ("num_classes", "weights", "weights_from")  # keys of `model` that are no architecture


def main(cfg: DictConfig) -> int:
    """Test under the recipe's protocol; 1 when the protocol differs or the score is out of tolerance."""
    quieten()
    first = rank_zero_only.rank == 0
    console = Console(quiet=not first)
    if (cfg.ckpt is None) == (cfg.run is None):
        raise UserError("name what is verified: ckpt=... or run=..., one of them")
    path = checkpoint.find(cfg.ckpt or cfg.run)
    saved = checkpoint.load(path)
    name, cfg, recipe = recipe_of(cfg, saved, path)
    if recipe.published is None:
        raise UserError(
            f"experiment={name} names no published score; give its file a line"
            " published: {top1: 74.8, source: where, tolerance: 0.5}"
        )
    merged = tested_config(cfg, saved, name, path)
    run_dir = output_folder(cfg, path, "verify")
    report = score(cfg, merged, saved, path, run_dir, console)

    rows = protocol(recipe, saved["vidtrain"]["config"], config.resolved(merged), cfg, report)
    scores = compare(OmegaConf.to_container(recipe.published), report["metrics"])
    passed = not rows and all(row["within"] for row in scores)
    result = {
        "experiment": name,
        "ckpt": str(path),
        "source": recipe.published.source,
        "protocol": rows,
        "scores": scores,
        "passed": passed,
    }
    if first:
        write_json(run_dir / "verify.json", result)
        tell(console, result)
        console.print(f"verify {run_dir / 'verify.json'}", highlight=False, soft_wrap=True)
    return 0 if passed else 1


def recipe_of(
    cfg: DictConfig, saved: dict[str, Any], path: Path
) -> tuple[str, DictConfig, DictConfig]:
    """Find the recipe: `experiment=`, else the one that the checkpoint was trained by.

    Returns:
        Its name; the config of this command under it; and the recipe's own, without what else this
        command line says.

    Raises:
        UserError: neither names one, it is not there any more, or it is of another network.
    """
    name = config.choices().get("experiment", "none")
    if name == "none":
        words = shlex.split(saved["vidtrain"]["command"])
        trained = [word.partition("=")[2] for word in words if word.startswith("experiment=")]
        if not trained:
            raise UserError(f"{path} was not trained by a recipe; add experiment=...")
        name = trained[-1]
        try:
            cfg = compose("verify", [f"experiment={name}", *config.task_overrides()])
        except HydraException as error:
            raise UserError(f"experiment={name}: {config.one_line(error)}") from None
    recipe = compose("verify", [f"experiment={name}"])
    theirs, ours = recipe.model._target_, saved["vidtrain"]["config"]["model"]["_target_"]
    if theirs != ours:
        raise UserError(f"{path} holds a {ours}, experiment={name} is a recipe for {theirs}")
    return name, cfg, recipe


def tested_config(cfg: DictConfig, saved: dict[str, Any], name: str, path: Path) -> DictConfig:
    """Put the recipe's clip, views and data into the checkpoint's config.

    Where the checkpoint was trained on the same dataset, its files are where they were then.
    """
    words = config.task_overrides()
    trained = checkpoint.config_of(saved)
    keys = ["views", *(f"clip.{key}" for key in CLIP)]
    same = OmegaConf.select(trained, "data.name") == cfg.data.name
    if same and not any(word.startswith("data=") for word in words):
        keys += [f"data.{key}" for key in DATA if key in cfg.data]
    else:
        keys.append("data")
    keys += [
        key for word in words if (key := word.partition("=")[0].lstrip("+~")).startswith("data.")
    ]
    return config.overlay(trained, cfg, [f"{key}=" for key in keys])


def protocol(
    recipe: DictConfig,
    trained: dict[str, Any],
    tested: dict[str, Any],
    cfg: DictConfig,
    report: dict[str, Any],
) -> list[dict[str, Any]]:
    """List every point in which training or test were not as the recipe says.

    Returns:
        `what`, `recipe`, `trained`, `tested`; null where one of them has nothing to say.
    """
    wanted = config.resolved(_without_missing(recipe))
    rows: list[dict[str, Any]] = []

    def row(what: str, asked: Any, *, trained: Any = None, tested: Any = None) -> None:
        rows.append({"what": what, "recipe": asked, "trained": trained, "tested": tested})

    for key in sorted({*wanted["model"], *trained["model"]} - {*NOT_BUILT}):
        before, asked = trained["model"].get(key), wanted["model"].get(key)
        if before != asked:
            row(f"model.{key}", asked, trained=before)
    for group, keys in (("clip", CLIP), ("data", DATA)):
        for key in keys:
            asked = wanted[group].get(key)
            values = [part[group].get(key) for part in (trained, tested)]
            if key in wanted[group] and values != [asked, asked]:
                row(f"{group}.{key}", asked, trained=values[0], tested=values[1])
    for key in VIEWS:
        if tested["views"][key] != wanted["views"][key]:
            row(f"views.{key}", wanted["views"][key], tested=tested["views"][key])
    if cfg.split != recipe.split:
        row("split", recipe.split, tested=cfg.split)
    classes = [wanted["data"].get("num_classes"), trained["data"]["num_classes"]]
    if classes[0] is not None and classes != [len(report["label_names"])] * 2:
        row("classes", classes[0], trained=classes[1], tested=len(report["label_names"]))
    videos = report["videos"]
    if videos["scored"] != videos["asked"]:
        row("videos scored", videos["asked"], tested=videos["scored"])
    return rows


def _without_missing(recipe: DictConfig) -> DictConfig:
    """A recipe for the user's own folder does not know where that is."""
    recipe = recipe.copy()
    with open_dict(recipe):
        for key in [key for key in recipe.data if OmegaConf.is_missing(recipe.data, key)]:
            recipe.data[key] = None
    return recipe


def compare(published: Any, metrics: dict[str, float]) -> list[dict[str, Any]]:
    """Compare scores, in hundredths: a score that is too high is no reproduction either."""
    tolerance = published.get("tolerance")
    tolerance = TOLERANCE if tolerance is None else float(tolerance)
    rows = []
    for name, theirs in published.items():
        if name in ("source", "tolerance"):
            continue
        value = metrics.get(f"test/{name}")
        ours = None if value is None else round(100 * value, 2)
        gap = None if ours is None else round(ours - theirs, 2)
        rows.append(
            {
                "metric": name,
                "ours": ours,
                "published": theirs,
                "difference": gap,
                "tolerance": tolerance,
                "within": gap is not None and abs(gap) <= tolerance,
            }
        )
    return rows


def tell(console: Console, result: dict[str, Any]) -> None:
    """Print what differs, and the verdict."""
    if result["protocol"]:
        table = Table(title="the protocol differs", title_justify="left")
        for head in ("what", "recipe", "trained", "tested"):
            table.add_column(head, overflow="fold")
        for row in result["protocol"]:
            cells = (row["recipe"], row["trained"], row["tested"])
            table.add_row(row["what"], *("" if cell is None else str(cell) for cell in cells))
        console.print(table)
    else:
        console.print("the protocol is the recipe's", highlight=False)
    table = Table()
    for head in ("metric", "ours", "published", "difference", "tolerance"):
        table.add_column(head, justify="left" if head == "metric" else "right")
    for row in result["scores"]:
        ours = "" if row["ours"] is None else f"{row['ours']:.2f}"
        gap = "" if row["difference"] is None else f"{row['difference']:+.2f}"
        style = "green" if row["within"] else "red"
        theirs, most = f"{row['published']:.2f}", f"{row['tolerance']:.2f}"
        table.add_row(row["metric"], ours, theirs, gap, most, style=style)
    if result["scores"]:
        console.print(table)
    else:
        console.print("no score was published for this recipe", highlight=False)
    why = "" if result["scores"] else " in protocol"
    verdict = f"reproduced{why}" if result["passed"] else "not reproduced"
    said = f"{verdict}: {result['experiment']} ({result['source']})"
    console.print(said, style="bold", markup=False, highlight=False, soft_wrap=True)
