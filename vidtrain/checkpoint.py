"""Read a checkpoint, and build again what it describes.

A checkpoint of ours carries, beside Lightning's own keys, `vidtrain`: version, the code's commits and
libraries, resolved config, the config before its interpolations were followed (command-line overrides go over that one), label
names and the data's fingerprint. Files are loaded with `weights_only=True`: tensors and plain
values, never code.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vidtrain import __version__, build, provenance
from vidtrain.config import resolved
from vidtrain.tasks.base import VideoTask
from vidtrain.types import UserError


def describe(
    cfg: DictConfig, model: str, label_names: list[str], fingerprint: str, command: str
) -> dict[str, Any]:
    """Make the `vidtrain` entry of a checkpoint."""
    return {
        "version": __version__,
        "code": provenance.code(),
        "command": command,
        "model": model,
        "config": resolved(cfg),
        "template": OmegaConf.to_container(cfg, resolve=False),
        "label_names": list(label_names),
        "fingerprint": fingerprint,
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def find(path: str | Path) -> Path:
    """Turn a checkpoint or a run's folder into the checkpoint: the best one, else the last.

    Raises:
        UserError: there is none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        best = sorted(folder.glob("epoch_*.ckpt"), key=lambda file: file.stat().st_mtime)
        last = folder / "last.ckpt"
        if best:
            return best[-1]
        if last.is_file():
            return last
        raise UserError(f"{path} holds no checkpoint; name a .ckpt file or a run's folder")
    if not path.is_file():
        raise UserError(f"no checkpoint {path}; runs keep theirs in runs/.../checkpoints/")
    return path


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint's tensors and plain values to the CPU.

    Raises:
        UserError: it is not a checkpoint, is torn, holds code, or is not one of vidtrain's.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a plain checkpoint (only tensors and plain values are loaded,"
            f" never code): {str(error).splitlines()[0]}"
        ) from None
    except Exception as error:  # torch raises anything over bytes that are no file of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason}); is it complete?"
        ) from None
    if not isinstance(checkpoint, dict) or "vidtrain" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint of vidtrain: it does not describe itself")
    return checkpoint


def config_of(checkpoint: dict[str, Any]) -> DictConfig:
    """Give the checkpoint's config with its interpolations alive."""
    cfg = OmegaConf.create(checkpoint["vidtrain"]["template"])
    assert isinstance(cfg, DictConfig)
    return cfg


def plain(cfg: DictConfig, source: Path) -> DictConfig:
    """Follow a checkpoint's interpolations, so that what is checked is what is built.

    Raises:
        UserError: one is left, as an escaped one would be: Hydra would follow it after the check.
    """
    values = resolved(cfg)
    if "${" in json.dumps(values, default=str):
        raise UserError(f"{source} has an interpolation hidden in its config; it is not loaded")
    return DictConfig(values)


def build_task(checkpoint: dict[str, Any], source: Path, allow: Sequence[str]) -> VideoTask:
    """Build the network and task of a checkpoint as they were trained, and fill in the weights.

    Raises:
        UserError: its config names what vidtrain does not ship, or the weights do not fit it.
    """
    cfg = plain(OmegaConf.create(checkpoint["vidtrain"]["config"]), source)
    for part in ("model", "task", "optim"):
        build.check_targets(cfg[part], str(source), allow)
    task = build.task(cfg, build.model(cfg))
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(
            f"{source} does not fit its own config: {lines[0] if lines else error}"
        ) from None
    task.description = checkpoint["vidtrain"]
    return task
