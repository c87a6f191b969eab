"""Pictures of masked pretraining: clips, what was seen of them, and what was made of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import WandbLogger

from vidtrain.callbacks.pictures import log_pictures, name_of
from vidtrain.tasks.masked_pretraining import MaskedPretraining
from vidtrain.types import UserError
from vidtrain.visualize.reconstruction import Block, reconstruction_sheet


class Reconstructions(L.Callback):
    """Draw `reconstructions_val.png` after each validation and `reconstructions_test.png` after a test.

    The first view of some videos, the same ones every time; in the run's folder, and in W&B as
    `val/reconstructions`. Other tasks have none.

    Args:
        num_videos: how many, spread over the split; 0: none.
    """

    def __init__(self, num_videos: int = 4) -> None:
        if not isinstance(num_videos, int) or isinstance(num_videos, bool) or num_videos < 0:
            raise UserError(
                f"callbacks.reconstructions.num_videos is {num_videos!r}; it counts videos, 0 for none"
            )
        self.num_videos = num_videos
        self.blocks: list[Block] = []
        self.wanted: set[int] = set()  # numbers of batches, of each the first video

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._begin(trainer, pl_module, trainer.num_val_batches)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._begin(trainer, pl_module, trainer.num_test_batches)

    def _begin(self, trainer: L.Trainer, module: L.LightningModule, batches: list[Any]) -> None:
        self.blocks, self.wanted = [], set()
        if isinstance(module, MaskedPretraining) and trainer.is_global_zero and batches:
            count = min(self.num_videos, batches[0])
            # Where there are fewer batches than videos, one of each must do.
            self.wanted = {int(i * batches[0] / count) for i in range(int(count))}

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Ask for a batch's pictures."""
        self._ask(pl_module, batch_idx)

    def on_test_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Ask for a batch's pictures."""
        self._ask(pl_module, batch_idx)

    def _ask(self, module: L.LightningModule, batch_idx: int) -> None:
        if isinstance(module, MaskedPretraining):
            module.to_show = (0,) if batch_idx in self.wanted else ()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take a batch's pictures."""
        self._take(trainer, pl_module, outputs, batch)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take a batch's pictures."""
        self._take(trainer, pl_module, outputs, batch)

    def _take(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any
    ) -> None:
        if not isinstance(module, MaskedPretraining) or not outputs:
            return
        for place, shown in module.shown.items():
            loss = outputs["clip_scores"][place, 0].item()
            name = name_of(trainer, int(batch["index"][place]))
            caption = f"{name}, mean squared error {loss:.3f}"
            self.blocks.append(Block(caption, [clip.float().cpu() for clip in shown]))
        module.shown = {}

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
        self._draw(trainer, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
        self._draw(trainer, "test")

    def _draw(self, trainer: L.Trainer, stage: str) -> None:
        if not self.blocks or trainer.sanity_checking:
            return
        path = Path(str(trainer.default_root_dir)) / f"reconstructions_{stage}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        reconstruction_sheet(self.blocks, path)
        if any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            import wandb

            log_pictures(trainer, stage, {"reconstructions": wandb.Image(str(path))})
        self.blocks = []
