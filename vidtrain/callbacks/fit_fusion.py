"""Fit what fuses a network's answers, once training is over: the linear SVM of two streams.

Simonyan & Zisserman 2014, section 5: a multi-class linear SVM on the stacked, L2-normalised softmax
scores. A network that wants one has it as its attribute `svm` (see `vidtrain.models.two_stream.SVM`).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vidtrain.callbacks.checkpoint import Checkpoint, Stopped
from vidtrain.callbacks.saving import WholeFiles
from vidtrain.types import UserError

NEVER = -1e4  # a distance that no video has: features are of unit length


class Scored(NamedTuple):
    """What a network says of a training video."""

    row: int
    scores: Tensor  # (S, K), averaged over the views
    label: int


class FitFusion(L.Callback):
    """Fit a network's SVM to the training videos, with the weights of the best epoch.

    Each training video is looked at as `test` looks at its videos, with all views. The SVM goes into
    the best epoch's checkpoint; without an epoch (`trainer.max_epochs=0`, streams that are trained
    already) it is fitted to the weights that there are, and `last.ckpt` has it. Where
    `trainer.limit_train_batches` shortens the epochs, as many videos are taken, spread over all of
    them. Networks without an SVM are left alone.

    Args:
        cost: of errors against a wide margin, the C of scikit-learn's LinearSVC.
    """

    def __init__(self, cost: float = 1.0) -> None:
        if not cost > 0:
            raise UserError(f"callbacks.fusion.cost is {cost}; it must be more than 0")
        self.cost = cost

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse before training what could not be fitted after it."""
        if stage != "fit" or _svm(pl_module) is None:
            return
        if find_spec("sklearn") is None:
            raise UserError("model.fusion=svm needs scikit-learn: pip install 'vidtrain[svm]'")
        if trainer.datamodule.multi_label:  # type: ignore[attr-defined]
            raise UserError("model.fusion=svm is for one label a video; take fusion=average")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an SVM of other weights; until there is one, validation averages the streams."""
        svm = _svm(pl_module)
        if svm is not None:
            svm.fitted.fill_(False)
            svm.pending = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the best epoch's weights, fit, and write the SVM into their checkpoint.

        Raises:
            UserError: the training videos are all of one class, or cannot be read.
            Stopped: Ctrl-C; a run that goes on fits it anew.
        """
        svm = _svm(pl_module)
        if svm is None:
            return
        saver = next((c for c in trainer.callbacks if isinstance(c, Checkpoint)), None)  # type: ignore[attr-defined]
        best = Path(saver.best_model_path) if saver and saver.best_model_path else None
        saved = torch.load(best, map_location="cpu", weights_only=True) if best else None
        if saved is not None:
            pl_module.load_state_dict(saved["state_dict"])
        self.lost = 0
        try:
            scored = list(self._score(trainer, pl_module))
        except KeyboardInterrupt:  # nothing is lost: a run that goes on comes here again
            raise Stopped("stopped by SIGINT while the SVM was fitted", 130) from None
        videos = everyones(scored, trainer.world_size)
        if not videos:
            raise UserError("model.fusion=svm: not one training video can be read to fit it to")
        scores = torch.stack([video.scores for video in videos])
        labels = torch.tensor([video.label for video in videos])
        features = svm.features(scores).double()
        svm.set(*fit_svm(features, labels, scores.shape[-1], self.cost))
        svm.pending = False
        if trainer.is_global_zero:
            found = svm(scores.to(svm.weight)).argmax(1).cpu()
            right = (found == labels).float().mean()
            Console(stderr=True).print(
                f"SVM fitted to {len(videos)} training videos, {right:.1%} of them right"
                + (f"; {self.lost} cannot be read" if self.lost else ""),
                highlight=False,
            )
            if saved is not None and best is not None:
                ours = {k: v.cpu() for k, v in pl_module.state_dict().items() if ".svm." in k}
                saved["state_dict"].update(ours)
                WholeFiles().save_checkpoint(saved, best)
        if saver is not None and best is None:  # nothing was trained, only fitted
            trainer.save_checkpoint(Path(str(saver.dirpath)) / "last.ckpt")
        trainer.strategy.barrier()

    def _score(self, trainer: L.Trainer, pl_module: Any) -> Iterator[Scored]:
        """Run the network over this rank's share of the training videos."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        split, data.test_split = data.test_split, "train"
        try:
            loader = data.test_dataloader()
        finally:
            data.test_split = split
        count = len(loader.dataset)
        wanted = count
        if trainer.limit_train_batches != 1.0 or isinstance(trainer.limit_train_batches, int):
            wanted = int(trainer.num_training_batches) * data.batch_size * trainer.world_size
        rows = np.linspace(0, count - 1, min(count, wanted)).round().astype(int)
        share = rows[trainer.global_rank :: trainer.world_size].tolist()
        size = data.eval_batch_size or 1
        loader.order = [
            [(row, row) for row in share[first : first + size]]
            for first in range(0, len(share), size)
        ]
        device = trainer.strategy.root_device
        training = pl_module.training
        pl_module.to(device).eval()
        transform = data.transform.eval()
        bar = Progress(console=Console(stderr=True), disable=not trainer.is_global_zero)
        with bar, torch.inference_mode(), trainer.precision_plugin.val_step_context():
            for batch in bar.track(loader, len(loader.order), description="SVM"):
                self.lost += len(batch["failures"])
                if not len(batch["index"]):
                    continue
                batch = transform(move_data_to_device(batch, device))
                logits = pl_module.logits(trainer.precision_plugin.convert_input(batch)).float()
                scores = pl_module.activate(logits).mean(1).cpu()
                facts = zip(batch["index"].tolist(), scores, batch["label"].tolist(), strict=True)
                yield from (Scored(*fact) for fact in facts)
        pl_module.train(training)


def _svm(task: Any) -> Any:
    """Find the SVM of a task's network; None where it has none."""
    return getattr(task.model, "svm", None)


def everyones(videos: list[Scored], world: int) -> list[Scored]:
    """Bring all ranks' videos together, in the order of their rows."""
    if world > 1:
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, videos)
        videos = [video for part in parts for video in part]
    return sorted(videos, key=lambda video: video.row)


def fit_svm(
    features: Tensor, labels: Tensor, num_classes: int, cost: float
) -> tuple[Tensor, Tensor]:
    """Fit linear SVMs, each of one class against the rest.

    Args:
        features: `(N, S·K)`, S streams' scores of K classes.
        labels: `(N,)`, 0 to K - 1.
        num_classes: K.
        cost: the C of scikit-learn's LinearSVC.

    Returns:
        `(K, S·K)` weights and `(K,)` biases. A class without a video is never the best.

    Raises:
        UserError: all labels are the same.
    """
    from sklearn.svm import LinearSVC

    if len(labels.unique()) < 2:
        raise UserError("model.fusion=svm: the training videos are all of one class")
    svm = LinearSVC(C=cost, dual="auto", random_state=0, max_iter=10_000)
    svm.fit(features.numpy(), labels.numpy())
    planes, offsets = torch.from_numpy(svm.coef_), torch.from_numpy(svm.intercept_)
    if len(planes) == 1:  # of two classes the second alone
        planes, offsets = torch.cat([-planes, planes]), torch.cat([-offsets, offsets])
    weight = planes.new_zeros(num_classes, planes.shape[1])
    bias = offsets.new_full((num_classes,), NEVER)
    weight[svm.classes_], bias[svm.classes_] = planes, offsets
    return weight, bias
