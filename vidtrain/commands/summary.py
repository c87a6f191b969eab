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
from vidtrain.types import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

FORMATS = ("table", "json")


def main(cfg: DictConfig) -> dict[str, Any]:
    """Print the layers of `cfg.model` for one clip of `cfg.clip`.

    Returns:
        What `format=json` prints: `model`, `input`, `params`, `macs` and `layers`.

    Raises:
        UserError: `format` is neither table nor json.
    """
    if cfg.format not in FORMATS:
        raise UserError(f"format is '{cfg.format}'; it must be one of {', '.join(FORMATS)}")
    shape = [3, cfg.clip.num_frames, cfg.clip.size, cfg.clip.size]
    with torch.device("meta"):
        model = build.model(cfg)
    layers = layer_table(model, shape)
    report = {
        "model": cfg.model._target_.rpartition(".")[2],
        "input": shape,
        "params": sum(layer.params for layer in layers),
        "macs": sum(layer.macs for layer in layers),
        "layers": [dataclasses.asdict(layer) for layer in layers],
    }
    if cfg.format == "json":
        print(json.dumps(report))
    else:
        _print_table(report, layers)
    return report


def _print_table(report: dict[str, Any], layers: Sequence[Layer]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # in a file or a pipe nothing is cut
    table = Table(title=f"{report['model']}, input {_times(report['input'])}", show_footer=True)
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
