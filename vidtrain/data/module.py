"""VideoDataModule: from a dataset's own files to batches on the device."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing as mp
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from rich.console import Console

from vidtrain.data import manifest
from vidtrain.data.cache import FrameCache
from vidtrain.data.collate import collate
from vidtrain.data.crew import cores
from vidtrain.data.dataset import VideoDataset
from vidtrain.data.decode import check_decoder
from vidtrain.data.features import FeatureDataset
from vidtrain.data.fields import STORED, Flow
from vidtrain.data.flow import BOUND, DIRECTIONS, METHODS, default_root
from vidtrain.data.indices import IndexStore
from vidtrain.data.loader import Loader, start_worker
from vidtrain.data.manifest import Annotations, Manifest, Row, is_url
from vidtrain.data.multigrid import Multigrid
from vidtrain.data.order import EvaluationOrder, TrainingOrder
from vidtrain.data.prepare.packed import stamp
from vidtrain.data.prepare.splits import carve_validation
from vidtrain.data.shards import Shards
from vidtrain.data.sources import Sources
from vidtrain.data.transforms.device import DeviceTransform
from vidtrain.data.transforms.sample import Augment, is_number
from vidtrain.types import Clip, UserError


class Split:
    """The rows of one split of a manifest."""

    def __init__(self, source: Manifest, name: str) -> None:
        self.source, self.name = source, name
        self.numbers = source.split(name)

    def __getstate__(self) -> dict[str, Any]:
        """Travel to a spawned worker as a path and a name; row numbers of a large set are megabytes."""
        return {"source": self.source, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, index: int) -> Row:
        """Give row `index` of the split."""
        return self.source.row(int(self.numbers[index]))

    def location(self, row: Row) -> str:
        """Say what messages call the row's video: its file, where it has one of its own."""
        return self.source.location(row)


class VideoDataModule(L.LightningDataModule):
    """The data of one run: manifest, loaders, device transform.

    Args:
        name: of the dataset, for reports.
        root: the folder of the videos, or, of a packed dataset, a URL.
        prepare: called as `prepare()`, reads the dataset's annotation files; runs when there is no
            manifest of these settings yet.
        num_classes: None where only the data can tell (`data=folder`).
        clip, augment, views: as in conf/.
        sampling: `random` or `segments`.
        region: `[left, top, width, height]`, relative, cut out before everything else.
        span: `[from, to]`, seconds of each video that count; a row's own start and end go before.
        hflip: False where left and right are classes: no flip, whatever `augment` says.
        multi_label: labels are sets.
        val_fraction: of the training rows (whole groups of them) that becomes the validation split
            where the dataset has none; 0 leaves it without.
        on_error: what a video does that cannot be read: `skip` or `raise`.
        max_failures: share of an epoch (read by a callback).
        shuffle: False repeats the first epoch's order and clips.
        batch_size: videos of a training batch on each device; `auto`: as many as fit a GPU's memory.
        drop_last: every training batch has `batch_size` clips; what is left over waits.
        balance: 0: an epoch has every training video once; 1: as many of each class, drawn by chance; between
            them, classes in proportion to their size to the power of `1 - balance`.
        prefetch: batches that each worker makes ahead.
        time_limit: seconds that one video may take before its worker is replaced.
        start_method: of the workers: fork, spawn or forkserver; None: the platform's.
        cache: decoded frames are kept: `none`, `ram` or `disk`.
        cache_gb: how much of them.
        shard_cache_gb: how much of a remote dataset is kept on disk.
        cache_dir: the folder of manifests, frame indices and caches.
        compile: the device transform, in one kernel; None: on a GPU.
        seed: of orders and random draws.
        split_seed: of splits that are made by chance.
        flow: optical flow beside the frames: `stored`, or a method to compute it as training goes;
            None: none.
        flow_method: what `data action=flow` computes with, and stored flow was made by.
        flow_root: the folder of stored flow; None: beside `root`.
        flow_bound: pixels that become 1.
        flow_direction: `forward`, or `both`, see `fields.wanted_fields`.
        flow_mean: subtract each field's own mean vector.
        flow_weights: RAFT's file.
        contents: of the dataset's files: `videos` or `features`.

    Attributes:
        multigrid: the shapes of training batches; None: all are of `batch_size` and `clip`.
    """

    multigrid: Multigrid | None = None

    def __init__(
        self,
        name: str,
        root: str,
        prepare: Callable[[], Annotations],
        num_classes: int | None,
        clip: Clip,
        augment: dict[str, Any],
        views: dict[str, Any],
        sampling: str = "random",
        past_end: str = "hold",
        region: Sequence[float] | None = None,
        span: Sequence[float] | None = None,
        hflip: bool = True,
        multi_label: bool = False,
        val_fraction: float = 0.0,
        batch_size: int | str = 8,
        eval_batch_size: int | None = None,
        workers: int | str = "auto",
        decoder: str = "auto",
        on_error: str = "skip",
        max_failures: float = 0.1,
        shuffle: bool = True,
        drop_last: bool = False,
        balance: float = 0.0,
        prefetch: int = 2,
        time_limit: float = 300.0,
        start_method: str | None = None,
        cache: str = "none",
        cache_gb: float = 16.0,
        shard_cache_gb: float = 50.0,
        cache_dir: str = "~/.cache/vidtrain",
        compile: bool | None = None,
        seed: int = 0,
        split_seed: int = 0,
        flow: str | None = None,
        flow_method: str = "dis",
        flow_root: str | None = None,
        flow_bound: float = BOUND,
        flow_direction: str = "forward",
        flow_mean: bool = False,
        flow_weights: str | None = None,
        contents: str = "videos",
    ) -> None:
        super().__init__()
        check_numbers(
            ("batch_size", 1 if batch_size == "auto" else batch_size, 1),
            ("eval_batch_size", 1 if eval_batch_size is None else eval_batch_size, 1),
            ("workers", 0 if workers == "auto" else workers, 0),
            ("prefetch", prefetch, 1),
        )
        memory = views["memory"]
        if not isinstance(memory, int) or isinstance(memory, bool) or memory < 0:
            raise UserError(f"views.memory is {memory!r}; it must be a whole number of MiB")
        check_views(views)
        check_decoder(decoder)
        check_choice("cache", cache, ("none", "ram", "disk"))
        check_choice("shuffle", shuffle, (True, False))
        check_choice("drop_last", drop_last, (True, False))
        check_choice("compile", compile, (None, True, False))
        check_choice("flow", flow, (None, STORED, *METHODS))
        check_choice("flow_method", flow_method, METHODS)
        check_choice("flow_direction", flow_direction, DIRECTIONS)
        check_choice("flow_mean", flow_mean, (True, False))
        check_choice("start_method", start_method, (None, *mp.get_all_start_methods()))
        for key, value in (
            ("time_limit", time_limit),
            ("cache_gb", cache_gb),
            ("shard_cache_gb", shard_cache_gb),
            ("flow_bound", flow_bound),
        ):
            if not is_number(value) or not value > 0:
                raise UserError(f"data.{key} is {value!r}; it must be a number above 0")
        if not is_number(max_failures) or not 0 <= max_failures <= 1:
            raise UserError(f"data.max_failures is {max_failures!r}; it is a share, from 0 to 1")
        self.name = name
        self.root: Path | str = root if is_url(root) else Path(root).expanduser()
        self.prepare, self.num_classes, self.clip = prepare, num_classes, clip
        self.augment = Augment(**{**augment, **({} if hflip else {"hflip": 0.0})})
        self.contents = contents
        self.views = {**views, "crops": 1} if self.has_features else views
        self.sampling, self.past_end = sampling, past_end
        self.region, self.span = region, span
        self.multi_label, self.val_fraction = multi_label, val_fraction
        self.wanted_batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.wanted_workers = workers
        self.decoder, self.on_error, self.max_failures = decoder, on_error, max_failures
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        if not is_number(balance) or not 0 <= balance <= 1:
            raise UserError(f"data.balance is {balance!r}; it must be a number from 0 to 1")
        if balance and multi_label:
            raise UserError("data.balance is for one label a video; set it to 0")
        self.balance = balance
        self.prefetch, self.time_limit, self.start_method = prefetch, time_limit, start_method
        self.cache, self.cache_gb, self.shard_cache_gb = cache, cache_gb, shard_cache_gb
        self.cache_dir = Path(cache_dir).expanduser()
        self.compile = compile
        if multi_label and (self.augment.mixup or self.augment.cutmix):
            raise UserError(
                "augment.mixup and augment.cutmix are for one label a video; set both to 0"
            )
        if self.has_features and (self.augment.mixup or self.augment.cutmix):
            raise UserError("augment.mixup and augment.cutmix are for frames; set both to 0")
        self.start_at = (0, 0)  # epoch and batch; a resumed run sets it
        self.split_seed = split_seed
        self.flow_source, self.flow_method, self.flow_mean = flow, flow_method, flow_mean
        self.flow_bound, self.flow_direction = flow_bound, flow_direction
        self.flow_weights, self.wanted_flow_root = flow_weights, flow_root
        # What batches hold, until a model says what it takes: `feed`.
        self.inputs: tuple[str, ...] = ("video",) if flow is None else ("video", "flow")
        if self.has_features:
            self.inputs = ("features",)
        self._flow: Flow | None = None
        self._manifest: Manifest | None = None
        self._sources: Sources | None = None
        self._transform: DeviceTransform | None = None
        self._loaders: list[Loader] = []
        self._reused: dict[str, Loader] = {}

    @property
    def workers(self) -> int:
        """Decoding processes of this device."""
        if self.wanted_workers != "auto":
            return int(self.wanted_workers)
        return default_workers(self.trainer.num_devices if self.trainer else 1)

    @property
    def batch_size(self) -> int:
        """Videos of a training batch, on each device.

        Raises:
            UserError: it is `auto`, and nobody has looked what fits (`callbacks/largest_batch.py`).
        """
        if self.wanted_batch_size == "auto":
            raise UserError(
                "data.batch_size=auto is found when training begins; set data.batch_size=N"
            )
        return int(self.wanted_batch_size)

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.wanted_batch_size = size

    @property
    def has_features(self) -> bool:
        """Say whether the rows are files of features, and not videos."""
        return self.contents == "features"

    def feed(self, inputs: Sequence[str]) -> None:
        """Say which batch keys the model takes: what it does not take is not decoded.

        Raises:
            UserError: it takes flow, and `data.flow` does not say where from, or there is none there.
        """
        if self.has_features != ("features" in inputs):
            raise UserError(
                f"the model takes {' and '.join(inputs)}, and {self.name} has {self.contents};"
                " `vidtrain extract` makes features of videos, for data=features"
            )
        if "flow" in inputs and self.flow_source is None:
            raise UserError(
                "the model takes optical flow; add data.flow=stored (`vidtrain data action=flow` computes"
                f" it once), or data.flow={'|'.join(METHODS)} to compute it as it goes"
            )
        self.inputs = tuple(inputs)
        for key in ("rand_augment", "erase"):
            if getattr(self.augment, key) and ("video" not in inputs or "flow" in inputs):
                raise UserError(f"augment.{key} is for networks of frames alone; set it to 0")
        _ = self.flow  # refused here, before a run has its folder

    @property
    def flow_root(self) -> Path | None:
        """The folder of stored flow; None where a packed dataset does not say it."""
        if self.wanted_flow_root is not None:
            return Path(self.wanted_flow_root).expanduser()
        return None if isinstance(self.root, str) else default_root(self.root.absolute())

    @property
    def flow(self) -> Flow | None:
        """How samples come by their flow; None where nobody takes any.

        Raises:
            UserError: it cannot be computed here, or has not been.
        """
        if self.flow_source is None or "flow" not in self.inputs:
            return None
        if self._flow is None:
            store = None
            if self.flow_source == STORED:
                found = self.manifest
                sides = 2 if self.flow_direction == "both" else 1
                store = IndexStore(found.path.with_suffix(".flow"), sides * len(found))
            self._flow = Flow(
                self.flow_source,
                self.flow_bound,
                self.flow_direction,
                self.flow_root,
                self.flow_method,
                self.flow_weights,
                store,
            )
        return self._flow

    def manifest_path(self) -> Path:
        """Name the manifest by everything that decides what is in it."""
        options = getattr(self.prepare, "keywords", {})
        root = self.root if isinstance(self.root, str) else str(self.root.resolve())
        facts: list[Any] = [root, options, self.val_fraction, self.multi_label, self.split_seed]
        files = annotation_files(self.root, options) if isinstance(self.root, Path) else stamp(root)
        facts.append(files)
        digest = hashlib.blake2b(
            json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=8
        ).hexdigest()
        return self.cache_dir / f"{self.name}-{digest}.arrow"

    def write_manifest(self) -> Manifest:
        """Read the annotations anew and write the manifest."""
        annotations = self.prepare()
        annotations = carve_validation(annotations, self.val_fraction, self.split_seed)
        path = self.manifest_path()
        manifest.save(annotations, path, self.name, self.root)
        self._manifest = Manifest(path)
        return self._manifest

    @property
    def manifest(self) -> Manifest:
        """The dataset's manifest, prepared on first use.

        Raises:
            UserError: the dataset is not there or not as its settings say.
        """
        if self._manifest is None:
            path = self.manifest_path()
            found = Manifest(path) if path.is_file() else self.write_manifest()
            if self.num_classes is None:
                self.num_classes = len(found.label_names)
            self.check(found)
            self._manifest = found
        return self._manifest

    def check(self, found: Manifest) -> None:
        """Refuse a manifest that the model could not be trained on."""
        names = len(found.label_names)
        if names > (self.num_classes or 0):
            raise UserError(
                f"data.num_classes is {self.num_classes}, but {self.name} under {self.root}"
                f" has {names} classes; set data.num_classes={names}"
            )

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers; a number where there is no name."""
        names = list(self.manifest.label_names)
        return names + [f"class {k}" for k in range(len(names), self.num_classes or 0)]

    def prepare_data(self) -> None:
        """Make the manifest on one rank, before the others look for it."""
        _ = self.manifest

    def dataset(
        self, split: str, *, training: bool = False, test_views: bool = False
    ) -> VideoDataset:
        """Make the dataset of a split: random clips for training, else one view or the test views."""
        views = self.views if test_views else {"clips": 1, "crops": 1}
        clip, how = self.as_tested() if test_views else (self.clip, self.sampling)
        kind = FeatureDataset if self.has_features else VideoDataset
        return kind(
            Split(self.manifest, split),
            clip,
            augment=self.augment if training else None,
            clips=views["clips"],
            crops=views["crops"],
            short_side=None if training else self.views["short_side"],
            size=None if training else self.views["size"],
            how=how,
            past_end=self.past_end,  # type: ignore[arg-type]
            region=self.region,
            span=self.span,
            num_classes=self.num_classes if self.multi_label else None,
            on_error=self.on_error,
            # Each test video is read once, and scores must not hang on a cache's second resizing.
            sources=self.sources.uncached() if test_views else self.sources,
            flow=self.flow,
            inputs=self.inputs,
            spill=self.cache_dir / "spill",
            spill_above=self.views["memory"] << 20,
        )

    def as_tested(self) -> tuple[Clip, str]:
        """Give the clip and the sampling of a test: training's, but for what `views` says otherwise."""
        return tested_clip(self.clip, self.views), self.views.get("sampling") or self.sampling

    def shapes(self, *, training: bool, testing: bool) -> list[tuple[int, int]]:
        """List the frames and the side of clips: of training and validation, and of a test."""
        frames, size = self.clip.num_frames, self.views["size"] or self.clip.size
        trained = [(frames, self.clip.size), (frames, size)] if training else []
        return [*trained, *([(self.as_tested()[0].num_frames, size)] if testing else [])]

    @property
    def sources(self) -> Sources:
        """What opens the videos: decoder, kept indices, cache of frames, shards.

        Raises:
            UserError: a cache that cannot be had.
        """
        if self._sources is None:
            found, root = self.manifest, str(self.root)
            store = IndexStore(found.path.with_suffix(".frames"), len(found))
            shards = None
            if found.is_packed:
                shards = Shards(
                    root,
                    self.cache_dir / "shards",
                    self.shard_cache_gb,
                    found.packed_version,
                )
            self._sources = Sources(self.decoder, store, self._frame_cache(), shards)
        return self._sources

    def _frame_cache(self) -> FrameCache | None:
        if self.cache == "none":
            return None
        budget, side = int(self.cache_gb * 1e9), self.cached_short_side()
        if self.cache == "ram":
            many = self.trainer is not None and self.trainer.world_size > 1
            run = str(self.trainer.default_root_dir) if self.trainer and many else None
            cache = FrameCache.in_ram(budget, side, self.region, run)
        else:
            root = hashlib.blake2b(self.manifest.root.encode(), digest_size=4).hexdigest()
            name = f"{self.name}-{root}"  # all of data=folder has one name
            cache = FrameCache.on_disk(
                self.cache_dir, name, budget, side, self.region, self.decoder
            )
        if cache.note:
            self._say(cache.note)
        return cache

    def cached_short_side(self) -> int:
        """Say how large cached frames must be: as large as the largest crop is taken from.

        Crops of a random area or of random sides are taken from 8/7 of the crop's size, 256 for 224, as
        is the custom.
        """
        drawn = self.augment.area is not None or self.augment.sides is not None
        widest = 8 / 7 if drawn else (self.augment.scale or (1, 1))[1]
        side = max(self.clip.size * widest, self.views["short_side"] or self.views["size"] or 0)
        return math.ceil(side / min(self.region[2:]) if self.region is not None else side)

    @property
    def transform(self) -> DeviceTransform:
        """Step 7 of the data's way."""
        if self._transform is None:
            self._transform = DeviceTransform(
                self.clip.mean,
                self.clip.std,
                self.augment,
                self.num_classes,
                self.compile,
                lazily_above=4 * self.views["memory"] << 20,  # four bytes a pixel, not one
                flow_mean=self.flow_mean,
            )
        return self._transform

    def has_split(self, name: str) -> bool:
        """Say whether the dataset has rows of this split."""
        return self.manifest.splits.get(name, 0) > 0

    def split_of(self, name: str) -> str:
        """Check a split's name.

        Raises:
            UserError: naming the splits there are.
        """
        if not self.has_split(name):
            there = ", ".join(f"{key} ({count})" for key, count in self.manifest.splits.items())
            raise UserError(f"{self.name} has no '{name}' split; it has {there}")
        return name

    def split_for(self, name: str, labels: bool) -> str:
        """Check a split's name and, where labels are needed, that its videos have them.

        Raises:
            UserError: there is no such split, or nothing to learn from or to compare with.
        """
        return self.labelled(name) if labels else self.split_of(name)

    def labelled(self, name: str) -> str:
        """Check a split's name and that its videos have labels.

        Raises:
            UserError: there is no such split, or nothing to learn from or to compare with.
        """
        counts = self.manifest.label_counts(self.split_of(name))
        if not counts.sum():
            to_do = "add split=val" if name == "test" else "only models named *_pretrain need none"
            raise UserError(f"the '{name}' split of {self.name} has no labels; {to_do}")
        missing = self.manifest.splits[name] - int(counts.sum())
        if name == "train" and missing > 0 and not self.multi_label:
            raise UserError(f"{missing} training videos of {self.name} have no label")
        return name

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, dataset: VideoDataset, order: Any, reused_as: str | None = None) -> Loader:
        loader = Loader(
            dataset,
            order,
            collate,
            workers=self.workers,
            pin=torch.cuda.is_available(),
            prefetch=self.prefetch,
            time_limit=self.time_limit,
            start_method=self.start_method,
            worker_init=start_worker,
        )
        self._loaders.append(loader)
        if reused_as is not None and self.multigrid is not None:  # asked for anew each epoch
            self._reused[reused_as] = loader
        return loader

    def teardown(self, stage: str) -> None:
        """End the workers; say where the cache was too small."""
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()
        self._reused.clear()
        cache = self._sources.cache if self._sources else None
        if stage == "fit" and cache is not None and cache.report().left_out:
            self._say(
                f"data.cache={self.cache}: {cache.report()}; data.cache_gb sets how much it is"
            )

    def _say(self, note: str) -> None:
        if self._rank()[0] == 0:
            Console(stderr=True).print(f"note: {note}", style="yellow", markup=False)

    def train_dataloader(self) -> Loader:
        """Random clips of the training split, an order of its own each epoch."""
        loader = self._reused.get("train")
        if loader is None:
            dataset = self.dataset(self.split_of("train"), training=True)
            order = self.training_order(*self._rank())
            order.epoch, order.start = self.start_at
            loader = self._loader(dataset, order, reused_as="train")
        if self.multigrid is not None and self.trainer is not None:
            loader.order.set_epoch(self.trainer.current_epoch)  # Lightning asks how long it is
        return loader

    def training_order(self, rank: int, world: int) -> TrainingOrder:
        """Give the order of the training rows."""
        return TrainingOrder(
            self.manifest.splits["train"],
            self.batch_size,
            self.seed,
            rank,
            world,
            self.shuffle,
            self.drop_last,
            self._row_weights(),
            self.multigrid.cycle if self.multigrid is not None else None,
        )

    def _row_weights(self) -> np.ndarray | None:
        """Weigh the training rows so that classes come in the proportions that `balance` asks for."""
        if not self.balance:
            return None
        rows = self.manifest.split("train")
        labels = self.manifest.first_labels()[rows]
        counts = self.manifest.label_counts("train").astype(float)
        weights: np.ndarray = counts[labels] ** -self.balance
        return weights

    def extra_batches(self, count: int, epoch: int) -> Iterator[dict[str, Any]]:
        """Give training batches beside an epoch's own, of another order: as many, or all there are."""
        dataset = self.dataset(self.split_of("train"), training=True)
        order = TrainingOrder(len(dataset), self.batch_size, self.seed + 1, *self._rank())
        order.set_epoch(epoch)
        loader = self._loader(dataset, order)
        try:
            yield from islice(loader, count)
        finally:
            loader.close()
            self._loaders.remove(loader)

    def val_dataloader(self) -> Loader | list[Any]:
        """The middle clip of each validation video; nothing where there are none."""
        if not self.has_split("val"):
            return []
        if "val" in self._reused:
            return self._reused["val"]
        dataset = self.dataset("val")
        size = self.eval_batch_size or self.batch_size
        order = EvaluationOrder(len(dataset), size, *self._rank())
        return self._loader(dataset, order, reused_as="val")

    def test_dataloader(self) -> Loader:
        """All views of each test video."""
        dataset = self.dataset(self.split_of(self.test_split), test_views=True)
        size = self.eval_batch_size or 1
        return self._loader(dataset, EvaluationOrder(len(dataset), size, *self._rank()))

    test_split = "test"
    allow_zero_length_dataloader_with_multiple_devices = True  # more ranks than videos

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Step 7 of the data's way: views gathered, float, normalised, C before T."""
        self.transform.train(bool(self.trainer and self.trainer.training))
        transformed: dict[str, Any] = self.transform(batch)
        return transformed


def check_numbers(*settings: tuple[str, Any, int]) -> None:
    """Refuse settings that are not whole numbers of at least so many: (key, value, least)."""
    for key, value, least in settings:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"data.{key} is {value!r}; it must be a whole number, at least {least}")


def tested_clip(clip: Clip, views: Mapping[str, Any]) -> Clip:
    """Give the clip of a test, which may have another number of frames."""
    frames = views.get("num_frames")  # checkpoints of earlier versions do not have it
    return clip if frames is None else replace(clip, num_frames=frames)


def check_views(views: Mapping[str, Any]) -> None:
    """Refuse frames of a test that nobody could choose."""
    frames, how = views.get("num_frames"), views.get("sampling")
    if frames is not None and (
        not isinstance(frames, int) or isinstance(frames, bool) or frames < 1
    ):
        raise UserError(
            f"views.num_frames is {frames!r}; it must be a whole number, at least 1, or null"
        )
    if how not in (None, "random", "segments"):
        raise UserError(f"views.sampling is {how!r}; it is random, segments or null")


def check_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a setting that is none of these."""
    if value not in choices:
        there = ", ".join("null" if choice is None else str(choice) for choice in choices)
        raise UserError(f"data.{key} is {value!r}; it is one of {there}")


def default_workers(devices: int = 1) -> int:
    """Say how many decoding processes a device gets: its share of the cores that we may use.

    Of eight cores one is left over: when all decode, the process that feeds the device waits for a
    core before each kernel that it launches (measured on 16 cores and one GPU, docs/BENCHMARKS.md).
    """
    share = cores() // devices
    return max(1, min(32, share - share // 8))


def annotation_files(root: Path, options: dict[str, Any]) -> list[tuple[str, int, int]]:
    """List what the manifest was made from, so that a change of it makes another manifest.

    Annotation files by size and time; the folders of the first two levels by time, since a folder's
    time changes when a file comes or goes.
    """
    seen: dict[str, os.stat_result] = {}
    named = options.get("annotations")
    for start in filter(None, (root, named and Path(named), named and root / named)):
        _note(start, seen, depth=2)
    return [
        (path, 0 if Path(path).is_dir() else stat.st_size, stat.st_mtime_ns)
        for path, stat in sorted(seen.items())
    ]


def _note(path: Path, seen: dict[str, os.stat_result], depth: int) -> None:
    """Take a file or folder, and what may be annotations `depth` levels below it."""
    if not path.exists():
        return
    seen[str(path)] = path.stat()
    if depth and path.is_dir():
        with os.scandir(
            path
        ) as entries:  # knows folders without a stat each: 240,000 files a folder
            inside = [Path(e.path) for e in entries if e.is_dir() or is_list(e.name)]
        for one in inside:
            _note(one, seen, depth - 1)


def is_list(name: str) -> bool:
    """Say whether a file may hold annotations, by its name."""
    return name.lower().endswith((".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".gz"))
