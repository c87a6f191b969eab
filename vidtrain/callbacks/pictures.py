"""Pictures of a run for Weights & Biases: what the model sees, says, confuses and gets most wrong."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassConfusionMatrix,
    MultilabelAveragePrecision,
)

from vidtrain.visualize.clips import write_mp4

LARGEST_MATRIX = 50  # classes; beyond, a table of the most confused pairs says more
PAIRS = 100


class _Error(NamedTuple):
    """A video that was got wrong."""

    score: float  # of its label, the best of several; the lower, the higher is the loss
    row: int
    frames: Tensor  # (T, C, H, W) uint8
    caption: str


class Pictures(L.Callback):
    """Log a table of classes, a confusion matrix and two galleries after each validation and test.

    With many labels a video the table holds the average precision of each class, and there is no
    confusion matrix. Without a W&B logger nothing happens and nothing is kept.

    Args:
        num_videos: videos shown as `videos`, spread over the split; the same ones every time.
        num_errors: videos shown as `worst_errors`: of those whose best answer is wrong, of all ranks, the
            ones whose label has the lowest score (of several labels the best), which for one label
            is the highest loss. So many clips are kept at a time, no more.
    """

    def __init__(self, num_videos: int = 4, num_errors: int = 8) -> None:
        self.num_videos, self.num_errors = num_videos, num_errors
        self.metric: Metric | None = None
        self.positives = torch.zeros(0)  # (K,) videos with each label, where there are many
        self.videos: list[tuple[Tensor, str]] = []  # (T, C, H, W) uint8, and what it says below
        self.errors: list[_Error] = []  # of this rank, the worst first
        self.wanted: Counter[int] = Counter()  # batch -> how many of its videos
        self.on = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look whether there is a W&B run; rank 0 has it and decides for all."""
        ours = any(isinstance(logger, WandbLogger) for logger in trainer.loggers)
        named = hasattr(trainer.datamodule, "label_names")  # type: ignore[attr-defined]
        classes = getattr(pl_module, "uses_labels", True)
        self.on = bool(trainer.strategy.broadcast(ours and named and classes))

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._begin(trainer.num_val_batches)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._begin(trainer.num_test_batches)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        self._take(trainer, outputs, batch, batch_idx)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        self._take(trainer, outputs, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was counted."""
        self._log(trainer, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was counted."""
        self._log(trainer, "test")

    def _begin(self, batches: list[int | float]) -> None:
        count = batches[0] if batches else 0
        # Datasets are often sorted by class: the first few videos would all be of one.
        spread = [
            int(i * count / self.num_videos) if count != float("inf") else i
            for i in range(self.num_videos)
        ]
        self.metric, self.videos, self.errors, self.wanted = None, [], [], Counter(spread)

    def _take(self, trainer: L.Trainer, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.on or trainer.sanity_checking or not outputs:
            return
        scores, target = outputs["scores"].detach(), outputs["target"]
        if self.metric is None:
            # On the scores' device, where it adds up over ranks by itself.
            kind = MulticlassConfusionMatrix if target.ndim == 1 else MultilabelAveragePrecision
            options = {"ignore_index": -1} if target.ndim == 1 else {"average": None}
            self.metric = kind(scores.shape[1], validate_args=False, **options).to(scores.device)
            self.positives = torch.zeros(scores.shape[1], device=scores.device)
        self.metric.update(scores.float(), target.long())
        if target.ndim == 2:
            self.positives += target.sum(0)
        if "video" not in batch:  # flow or features alone are not shown
            return
        if trainer.is_global_zero:
            count = min(self.wanted[batch_idx], len(scores))
            for i in torch.linspace(0, len(scores) - 1, count).round().long().tolist():
                self.videos.append(self._video(trainer, batch, scores, target, i))
        self._take_errors(trainer, batch, scores, target)

    def _take_errors(self, trainer: L.Trainer, batch: Any, scores: Tensor, target: Tensor) -> None:
        """Keep a batch's errors that are worse than the best one kept."""
        if not self.num_errors:
            return
        if target.ndim == 1:  # -1, of a video without a label, is no class
            truth = target[:, None] == torch.arange(scores.shape[1], device=target.device)
        else:
            truth = target.bool()
        of_truth = scores.float().masked_fill(~truth, -1.0).amax(1)
        wrong = truth.any(1) & ~truth.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
        found = [
            (score, i)
            for i, (score, is_wrong) in enumerate(torch.stack([of_truth, wrong], 1).tolist())
            if is_wrong
        ]
        for score, i in sorted(found):
            if len(self.errors) == self.num_errors and score >= self.errors[-1].score:
                break
            frames, caption = self._video(trainer, batch, scores, target, i)
            kept = [*self.errors, _Error(score, int(batch["index"][i]), frames, caption)]
            self.errors = sorted(kept, key=lambda e: (e.score, e.row))[: self.num_errors]

    def _video(
        self, trainer: L.Trainer, batch: Any, scores: Tensor, target: Tensor, i: int
    ) -> tuple[Tensor, str]:
        """Make one video visible again: its first view, and a line with truth and answers."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        clip, names = data.clip, data.label_names
        video = batch["video"][i, 0].detach().float()  # (C, T, H, W)
        mean = torch.tensor(list(clip.mean), device=video.device).view(3, 1, 1, 1)
        std = torch.tensor(list(clip.std), device=video.device).view(3, 1, 1, 1)
        frames = ((video * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 0, 2, 3)
        best = scores[i].topk(min(3, scores.shape[1]))
        answers = ", ".join(
            f"{names[k]} {score:.2f}"
            for score, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        true = [target[i].item()] if target.ndim == 1 else target[i].nonzero().flatten().tolist()
        truth = ", ".join(f"{names[k]} {scores[i, k]:.2f}" for k in map(int, true) if k >= 0)
        name = name_of(trainer, int(batch["index"][i]))
        return frames.cpu(), f"{name} | is {truth or 'none'} | said {answers}"

    def _log(self, trainer: L.Trainer, stage: str) -> None:
        # On every rank: adding up the metric is a meeting of all. A rank none of whose videos
        # could be read would be missing there, so first all say whether they come.
        if not self.on or trainer.sanity_checking:
            return
        here = torch.tensor(float(self.metric is not None), device=trainer.strategy.root_device)
        if int(trainer.strategy.reduce(here, reduce_op="sum")) < trainer.world_size:
            return
        assert self.metric is not None
        with warnings.catch_warnings():  # of labels that no video has: we leave them out
            warnings.filterwarnings("ignore", message="No positive samples")
            result = self.metric.compute().cpu()
        positives = trainer.strategy.reduce(self.positives, reduce_op="sum").cpu()
        data = trainer.datamodule  # type: ignore[attr-defined]
        rate = max(1.0, (data.clip.fps or 30) / data.clip.stride)
        errors = self._worst(trainer.world_size, rate)
        if not trainer.is_global_zero:
            return
        import wandb

        names = list(data.label_names)
        names += [str(k) for k in range(len(names), len(result))]
        if result.ndim == 1:
            pictures = _precision(result, positives, names)
        else:
            pictures = _confusion(result, names)
        spread = [(_mp4(frames, rate), caption) for frames, caption in self.videos]
        with tempfile.TemporaryDirectory() as folder:
            for kind, clips in (("videos", spread), ("worst_errors", errors)):
                shown = []
                for i, (content, caption) in enumerate(clips):
                    path = Path(folder) / f"{stage}_{kind}_{i}.mp4"
                    path.write_bytes(content)
                    shown.append(wandb.Video(str(path), caption=caption, format="mp4"))
                if shown:
                    pictures[kind] = shown
            log_pictures(trainer, stage, pictures)
        self.metric, self.videos, self.errors = None, [], []

    def _worst(self, world_size: int, rate: float) -> list[tuple[bytes, str]]:
        """Encode the worst errors of this rank, and choose the worst of all ranks: mp4 and caption."""
        found = [(e.score, e.row, _mp4(e.frames, rate), e.caption) for e in self.errors]
        if world_size > 1:  # encoded they are small
            parts: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(parts, found)
            found = [error for part in parts for error in part]
        rows = {row: (score, row, content, caption) for score, row, content, caption in found}
        return [(content, caption) for *_, content, caption in sorted(rows.values())][
            : self.num_errors
        ]


def log_pictures(trainer: L.Trainer, stage: str, pictures: Mapping[str, Any]) -> None:
    """Hand W&B pictures by name, as `val/NAME`, where Lightning puts the scores."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    named = {f"{stage}/{name}": picture for name, picture in pictures.items()}
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.log({**named, "trainer/global_step": step})


def name_of(trainer: L.Trainer, row: int) -> str:
    """Name a video as `predictions.csv` does; a piece of one with its seconds."""
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    rows = getattr(getattr(loaders, "dataset", None), "rows", None)
    if rows is None:
        return f"row {row}"
    found = rows.row(row)
    if found.start is None and found.end is None:
        return str(found.path)
    end = "" if found.end is None else f"{found.end:g}"
    return f"{found.path} ({found.start or 0:g}-{end} s)"


def _mp4(frames: Tensor, rate: float) -> bytes:
    """Encode `(T, C, H, W)` uint8 frames."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(frames, rate, path)
        return path.read_bytes()


def _confusion(counts: Tensor, names: list[str]) -> dict[str, Any]:
    """Make the table of classes and the confusion matrix from `(K, K)` counts, rows true."""
    import wandb

    videos = counts.sum(1)
    table = wandb.Table(columns=["class", "accuracy", "videos", "mostly taken for"])
    wrong = counts.clone().fill_diagonal_(0)
    for k, name in enumerate(names[: len(counts)]):
        if videos[k]:
            accuracy = counts[k, k].item() / videos[k].item()
            taken = names[int(wrong[k].argmax())] if wrong[k].any() else ""
            table.add_data(name, accuracy, int(videos[k]), taken)
    if len(counts) <= LARGEST_MATRIX:
        true, said = (torch.repeat_interleave(at, counts.flatten()) for at in _cells(len(counts)))
        matrix = wandb.plot.confusion_matrix(
            y_true=true.tolist(), preds=said.tolist(), class_names=names, title="Confusion matrix"
        )
        return {"classes": table, "confusion_matrix": matrix}
    pairs = wandb.Table(columns=["true", "predicted", "videos", "share"])
    for at in wrong.flatten().argsort(descending=True)[:PAIRS].tolist():
        i, j = divmod(at, len(counts))
        if wrong[i, j]:
            share = wrong[i, j].item() / videos[i].item()
            pairs.add_data(names[i], names[j], int(wrong[i, j]), share)
    return {"classes": table, "confused_pairs": pairs}


def _cells(size: int) -> tuple[Tensor, Tensor]:
    """Number the rows and the columns of a square matrix, cell by cell."""
    cells = torch.arange(size * size)
    return cells // size, cells % size


def _precision(values: Tensor, positives: Tensor, names: list[str]) -> dict[str, Any]:
    """Make the table of classes from `(K,)` average precisions; without a video it has none."""
    import wandb

    table = wandb.Table(columns=["class", "average precision", "videos"])
    for name, value, videos in zip(names, values.tolist(), positives.tolist(), strict=False):
        if videos:
            table.add_data(name, value, int(videos))
    return {"classes": table}
