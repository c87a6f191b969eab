"""`vidtrain summary`: every layer's size, receptive field, parameters and multiply-adds.

The network is built and run on the meta device: no file is read, no weight is made.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from vidtrain import build
from vidtrain.trace.table import Layer, layer_table
from vidtrain.types import UserError, VideoModel

if TYPE_CHECKING:
    from omegaconf import DictConfig

FORMATS = ("table", "json")


def main(cfg: DictConfig) -> dict[str, Any]:
    """Print the layers of `cfg.model` for one clip of `cfg.clip`.

    Returns:
        What `format=json` prints: `model`, `input`, `params`, `macs` and `layers`. `input` is a
        size, or where a network has several inputs an object of their sizes by name.

    Raises:
        UserError: `format` is neither table nor json.
    """
    if cfg.format not in FORMATS:
        raise UserError(f"format is '{cfg.format}'; it must be one of {', '.join(FORMATS)}")
    with torch.device("meta"):
        model: Any = build.model(cfg)
    shapes = input_shapes(model, cfg.clip)
    layers = layer_table(model, *shapes.values())
    report = {
        "model": cfg.model._target_.rpartition(".")[2],
        "input": shapes if len(shapes) > 1 else next(iter(shapes.values())),
        "params": sum(layer.params for layer in layers),
        "macs": sum(layer.macs for layer in layers),
        "layers": [dataclasses.asdict(layer) for layer in layers],
    }
    if cfg.format == "json":
        print(json.dumps(report))
    else:
        _print_table(report, shapes, layers)
    return report


def input_shapes(model: VideoModel, clip: DictConfig) -> dict[str, list[int]]:
    """Give the size of each of a network's inputs for one clip, without the batch."""
    frames, size = clip.num_frames, clip.size
    known = {
        "video": [3, frames, size, size],
        "flow": [2, frames, size, size],
        "features": [model.num_features, frames],
    }
    return {key: known[key] for key in model.inputs}


def _print_table(
    report: dict[str, Any], shapes: dict[str, list[int]], layers: Sequence[Layer]
) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # in a file or a pipe nothing is cut
    sizes = ", ".join(f"{key} {_times(shape)}" for key, shape in shapes.items())
    table = Table(title=f"{report['model']}, {sizes}", show_footer=True)
    table.add_column("layer", footer=f"{len(layers)} layers", overflow="fold")
    table.add_column("type", overflow="fold")
    table.add_column("output", justify="right")
    table.add_column("receptive field", justify="right")
    table.add_column("parameters", footer=f"{report['params']:,}", justify="right")
    table.add_column("multiply-adds", footer=_amount(report["macs"]), justify="right")
    for layer in layers:
        table.add_row(
            layer.name,
            layer.type,
            _times(layer.output),
            _times(layer.receptive_field) if any(layer.receptive_field) else "-",
            f"{layer.params:,}" if layer.params else "-",
            _amount(layer.macs) if layer.macs else "-",
        )
    console.print(table)
    console.print("output: C x T x H x W; receptive field: T x H x W of the input", style="dim")


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _amount(count: int) -> str:
    """Write 1040449536 as `1.040 G`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3f} {unit}"
    return str(count)
