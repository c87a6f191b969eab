"""From a config to objects: the only place that instantiates.

A `_target_` is code that a config names. A config that the user wrote may name anything; one that
came out of a checkpoint only what vidtrain ships, or what the user allows by name (`allow=[...]`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from vidtrain.config import model_defaults
from vidtrain.types import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import Logger
    from torch import nn

    from vidtrain.data.module import VideoDataModule
    from vidtrain.data.multigrid import Multigrid
    from vidtrain.tasks.base import VideoTask
    from vidtrain.weights.load import Part

# Keys of `cfg.model` that say what fills the network, not how it is built.
FILL_KEYS = ("weights", "weights_from")

# The parts of vidtrain that a checkpoint's config may build: constructors, no verbs and no tools.
SHIPPED = (
    "vidtrain.types",
    "vidtrain.models.",
    "vidtrain.tasks.",
    "vidtrain.optim.",
    "vidtrain.data.module",
    "vidtrain.data.prepare.",
)


def instantiate(node: Any, **kwargs: Any) -> Any:
    """Call a node's `_target_`; lists are lists and dictionaries are dictionaries.

    Raises:
        UserError: the target does not exist or does not take these arguments, or it raised one.
    """
    import hydra
    from hydra.errors import InstantiationException

    try:
        return hydra.utils.instantiate(node, _convert_="all", **kwargs)
    except InstantiationException as error:
        chain = list(_chain(error))
        for cause in chain:
            if isinstance(cause, UserError):
                raise cause from None
        first, last = chain[0], chain[-1]
        if str(first).startswith("Error locating target"):
            name = OmegaConf.create(node)._get_node("_target_")
            raise UserError(f"cannot find '{name}': {' '.join(str(last).split())}") from None
        if isinstance(last, TypeError) and _at_the_door(last):
            raise UserError(" ".join(str(first).split())) from None
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Walk from an error to what caused it."""
    while error is not None:
        yield error
        error = error.__cause__


def _at_the_door(error: BaseException) -> bool:
    """Tell a call with wrong arguments from a bug inside the callee."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or "hydra" in Path(trace.tb_frame.f_code.co_filename).parts


def targets(node: Any) -> Iterator[str]:
    """Walk every `_target_` below a config node."""
    if isinstance(node, (dict, DictConfig)):
        for key in node:
            value = node._get_node(key) if isinstance(node, DictConfig) else node[key]
            if key == "_target_":
                yield str(node[key])
            else:
                yield from targets(value)
    elif isinstance(node, (list, tuple, ListConfig)):
        for value in node:
            yield from targets(value)


def check_targets(node: Any, source: str, allow: Sequence[str] = ()) -> None:
    """Refuse a config that would build what vidtrain does not ship.

    A shipped target names a class or function *defined* in the module that it names, so that
    nothing another module imports can be reached through ours.

    Raises:
        UserError: naming the target and how to allow it.
    """
    for target in targets(node):
        if target in allow:
            continue
        module = target.rpartition(".")[0]
        shipped = any(
            module == part or (part[-1] == "." and module.startswith(part)) for part in SHIPPED
        )
        found = locate(target) if shipped else None
        if not callable(found) or getattr(found, "__module__", None) != module:
            raise UserError(
                f"{source} wants to build '{target}', which vidtrain does not ship;"
                f" if you trust it, add allow=[{target}]"
            )


def locate(target: str) -> Any:
    """Import what a `_target_` names: its file, then its name. None where there is no such thing."""
    from importlib import import_module

    module, _, name = target.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def data(cfg: DictConfig) -> VideoDataModule:
    """Build the data module of `cfg.data`.

    Keys that are arguments of the dataset's prepare function go there, the rest to the module.
    """
    from vidtrain.data.module import VideoDataModule

    node = OmegaConf.to_container(cfg.data, resolve=True)
    assert isinstance(node, dict)
    prepare = node.pop("prepare")
    if not isinstance(prepare, dict) or "_target_" not in prepare:
        raise UserError("data.prepare needs a _target_: the function that reads the annotations")
    function = locate(prepare["_target_"])
    if not callable(function):
        raise UserError(f"data.prepare: there is no '{prepare['_target_']}'")
    wanted = inspect.signature(function).parameters
    own = inspect.signature(VideoDataModule.__init__).parameters
    for key in [key for key in node if key in wanted]:
        prepare[key] = node[key] if key in own else node.pop(key)
    prepare["_partial_"] = True
    node["prepare"] = prepare
    module: VideoDataModule = instantiate(node)
    return module


def model(cfg: DictConfig) -> nn.Module:
    """Build the network of `cfg.model`."""
    if OmegaConf.is_missing(cfg.data, "num_classes") or cfg.data.num_classes is None:
        raise UserError(
            f"data={cfg.data.get('name')} does not say how many classes it has before it is read;"
            " add data.num_classes=N"
        )
    network: nn.Module = instantiate(
        {key: value for key, value in _plain(cfg.model).items() if key not in FILL_KEYS}
    )
    return network


def _plain(node: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def weights(cfg: DictConfig, earlier: Path | None, say: Callable[[str], None]) -> list[Part]:
    """Open what `model.weights` names, or a checkpoint, and make its normalisation the clip's.

    Args:
        cfg: its `clip.mean` and `clip.std` are changed.
        earlier: a checkpoint of vidtrain's in place of `model.weights`.
        say: told in a line what was changed.

    Returns:
        What `vidtrain.weights.load.fill` puts into the network.

    Raises:
        UserError: the weights cannot be had, the checkpoint is not one of vidtrain's, or the user
            wants frames normalised in another way.
    """
    from vidtrain.weights import load, own

    node = _plain(cfg.model)
    if node.get("weights") is None and earlier is None:
        return []
    if earlier is not None:
        node |= {"weights": str(earlier), "weights_from": None}
    parts = load.open_parts(node, Path(cfg.paths.cache).expanduser() / "weights", say)
    asked = load.colours(parts)
    if earlier is not None and parts[0].layout is not own.LAYOUT:
        raise UserError(
            f"{earlier} is not a checkpoint of vidtrain's; weights of others: model.weights={earlier}"
        )
    if asked is None:
        return parts
    given = (list(cfg.clip.mean), list(cfg.clip.std))
    if not (load.same(given[0], asked[0]) and load.same(given[1], asked[1])):
        usual = model_defaults()
        if usual is not None and not (
            load.same(given[0], usual.clip.mean) and load.same(given[1], usual.clip.std)
        ):
            raise UserError(
                f"clip.mean={_numbers(given[0])} clip.std={_numbers(given[1])} is not how the frames"
                f" were normalised that {parts[0].title} was trained on: leave both out, or set"
                f" clip.mean={_numbers(asked[0])} clip.std={_numbers(asked[1])}"
            )
        with open_dict(cfg):
            cfg.clip.mean, cfg.clip.std = list(asked[0]), list(asked[1])
        say(
            f"frames are normalised as for the weights: clip.mean={_numbers(asked[0])}"
            f" clip.std={_numbers(asked[1])}"
        )
    return parts


def _numbers(values: Sequence[float]) -> str:
    return f"[{','.join(f'{value:.6g}' for value in values)}]"


def task(cfg: DictConfig, network: nn.Module) -> VideoTask:
    """Build what is learned: loss, metrics and optimizer around a network."""
    from vidtrain.optim.groups import freeze

    module: VideoTask = instantiate(cfg.task)
    module.model = network
    module.check_model()
    module.optimizer = recipe(cfg)
    module.frozen = freeze(network, cfg.get("freeze"))
    module.train()  # all but what is frozen
    module.views_per_forward = cfg.views.per_forward
    if module.views_per_forward is not None and module.views_per_forward < 1:
        raise UserError(
            f"views.per_forward is {module.views_per_forward}; at least 1, or null for all"
        )
    return module


def check_shapes(network: nn.Module, shapes: Iterable[tuple[int, int]]) -> None:
    """Refuse clips that a network does not take, before a run has its folder.

    It runs on the meta device, where nothing is computed. Other errors than our own are left to the run.

    Args:
        network: it.
        shapes: frames and side in pixels of each clip.

    Raises:
        UserError: the network's own.
    """
    import torch

    from vidtrain.data.multigrid import CHANNELS, run_on_meta

    kinds: Any = network.inputs
    if not set(kinds) <= set(CHANNELS):  # features
        return
    for shape in sorted(set(shapes)):
        try:
            with torch.random.fork_rng(devices=[]):
                run_on_meta(network, *shape)
        except UserError:
            raise
        except Exception:
            continue


def recipe(cfg: DictConfig) -> Callable[..., Any]:
    """Build what makes the optimizer of `cfg.optim` for a network and a number of steps."""
    from vidtrain.optim.batch import KEYS

    made: Callable[..., Any] = instantiate(
        {key: value for key, value in _plain(cfg.optim).items() if key not in KEYS}
    )
    return made


def scale_rate(cfg: DictConfig, task: VideoTask, data: VideoDataModule, trainer: Trainer) -> str:
    """Give the task the learning rate that its steps' size calls for; say in a line what came out."""
    from functools import partial

    from vidtrain.optim.batch import Batch, scaled

    batch = Batch(
        data.batch_size, data.augment.repeats, trainer.world_size, trainer.accumulate_grad_batches
    )
    rate, line = scaled(cfg.optim.lr, batch, _plain(cfg.optim))
    task.optimizer = partial(task.optimizer, lr=rate)
    return line


def multigrid_plan(cfg: DictConfig, network: nn.Module, data: VideoDataModule) -> Multigrid | None:
    """Plan the shapes of training batches by `cfg.multigrid`; None where they are all alike.

    Raises:
        UserError: settings that do not go together, or a network that does not take clips of all shapes.
    """
    from vidtrain.data.multigrid import Multigrid, refuse_shapes

    if cfg.get("multigrid") is None:
        return None
    if data.has_features:
        raise UserError("multigrid changes the clips of videos, and these data are features")
    if cfg.data.batch_size == "auto":
        raise UserError("multigrid's batches have several sizes; set data.batch_size=N")
    settings = _plain(cfg.multigrid)
    known = [key for key in inspect.signature(Multigrid).parameters if key in settings]
    if unknown := sorted(set(settings) - set(known)):
        raise UserError(
            f"multigrid.{unknown[0]}: there is no such key; there are {', '.join(known)}"
        )
    if not isinstance(cfg.trainer.val_check_interval, float):
        raise UserError(
            f"trainer.val_check_interval={cfg.trainer.val_check_interval} counts batches, of which multigrid's"
            " epochs have more and less; set a share of an epoch, such as 0.5"
        )
    counted = cfg.trainer.max_steps == -1 and cfg.trainer.max_epochs != -1
    plan = Multigrid(
        data.clip,
        data.batch_size,
        cfg.trainer.max_epochs if counted else None,
        accumulate=cfg.trainer.accumulate_grad_batches,
        **settings,
    )
    refuse_shapes(network, plan)
    if settings["long"] is not None and cfg.optim.get("schedule") == "one_cycle":
        raise UserError(
            "optim.schedule=one_cycle does not go with multigrid's long cycle, which changes the rate as well;"
            " set cosine, step or constant, or multigrid=short"
        )
    if _most_splits(plan, data) > 1 and cfg.trainer.get("sync_batchnorm"):
        raise UserError(
            "trainer.sync_batchnorm=true takes statistics over all ranks: set multigrid.norm_clips=null"
        )
    return plan


def _most_splits(plan: Multigrid, data: VideoDataModule) -> int:
    """Say in how many parts batch norm takes the largest batches."""
    return max(plan.splits(section.first, data.augment.repeats) for section in plan.sections)


def multigrid(
    cfg: DictConfig, plan: Multigrid, task: VideoTask, data: VideoDataModule, trainer: Trainer
) -> str:
    """Have the shape of training batches go by a plan; say in a line what comes out."""
    from functools import partial

    from vidtrain.callbacks.multigrid import SplitNorms
    from vidtrain.data.multigrid import Pace

    data.multigrid = plan
    order = data.training_order(0, trainer.world_size)
    limit = trainer.limit_train_batches

    def batches(epoch: int) -> int:
        """Count the batches of an epoch as Lightning does."""
        order.set_epoch(epoch)
        return min(limit, len(order)) if isinstance(limit, int) else int(len(order) * limit)

    trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
    if _most_splits(plan, data) > 1:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, SplitNorms(plan, data.augment.repeats))
    each = "videos x frames x size² a step and device"
    pace = Pace(plan, batches, cfg.optim.get("scaling", "linear"))
    if cfg.multigrid.long is None:
        if plan.epochs is not None:  # Lightning counts the first epoch's steps for all
            made, total = task.optimizer, pace.total
            task.optimizer = lambda network, steps: made(network, total)
        return f"multigrid, {each}, in turn: {', '.join(map(str, plan.shapes()))}"
    task.optimizer = partial(task.optimizer, pace=pace)
    steps = ", ".join(f"{shape}: {count:,}" for shape, count in plan.steps(batches))
    return f"multigrid, {pace.total:,} steps in {trainer.max_epochs} epochs; {each}: {steps}"


def check_optim(cfg: DictConfig) -> None:
    """Build the recipe's optimizer for a toy, so that a mistake shows before data are prepared."""
    from torch import nn

    from vidtrain.optim.batch import Batch, scaled

    scaled(cfg.optim.lr, Batch(1), _plain(cfg.optim))
    made = recipe(cfg)
    real = {"groups": DictConfig, "no_decay": ListConfig}  # patterns of the real network
    without = {key: None for key, kind in real.items() if isinstance(cfg.optim.get(key), kind)}
    try:
        made(nn.Linear(1, 1), 10, **without)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim: {' '.join(str(error).split())}") from None


def callbacks(cfg: DictConfig, run_dir: Path) -> list[Callback]:
    """Build the callbacks of `cfg.callbacks`, in their order; a null one is left out."""
    from lightning.pytorch.callbacks import WeightAveraging

    from vidtrain.callbacks.checkpoint import Checkpoint

    built: list[Callback] = []
    for node in cfg.callbacks.values():
        if node is None:
            continue
        callback = instantiate(node)
        if callback is None:  # switched off
            continue
        if isinstance(callback, Checkpoint):
            callback.dirpath = str(run_dir / "checkpoints")
        built.append(callback)
    # Averages before those that may refuse a step, and last what saves what all others have seen.
    first = [callback for callback in built if isinstance(callback, WeightAveraging)]
    rest = [callback for callback in built if callback not in first]
    return [*first, *sorted(rest, key=lambda callback: isinstance(callback, Checkpoint))]


def loggers(cfg: DictConfig, run_dir: Path, facts: Mapping[str, Any] | None = None) -> list[Logger]:
    """Build the loggers of `cfg.logger`; they write into the run's folder.

    W&B keeps the config, and beside its keys the facts: which code, which data.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True)  # a verb's own may lack data.root
    config |= facts or {}
    built: list[Logger] = instantiate(cfg.logger, run_dir=str(run_dir), resolved=config)
    return built


def trainer(
    cfg: DictConfig, run_dir: Path, callbacks: list[Callback], loggers: list[Logger]
) -> Trainer:
    """Build Lightning's Trainer around our callbacks and loggers."""
    built: Trainer = instantiate(
        cfg.trainer,
        default_root_dir=str(run_dir),
        use_distributed_sampler=False,  # the data module deals out the rows itself
        enable_model_summary=False,
        enable_progress_bar=False,  # ours is a callback
        enable_checkpointing=False,  # so is this
        logger=False,
    )
    from lightning.pytorch.callbacks import LearningRateMonitor

    if not loggers:  # it refuses to run for nobody
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    if built.strategy.root_device.type == "cpu":
        share_cores()
    # Set after the fact: Hydra would turn callbacks and loggers into configs.
    built.callbacks = [*built.callbacks, *callbacks]  # type: ignore[attr-defined]
    built.loggers = loggers
    return built


def checkpointing(cfg: DictConfig, network: nn.Module) -> int:
    """Turn on what `cfg.checkpointing` asks for.

    Returns:
        How many parts are computed again in the backward pass.

    Raises:
        UserError: the network has no such parts.
    """
    from vidtrain.recompute import recompute

    parts = cfg.checkpointing
    if parts is None or parts is False:
        return 0
    return recompute(network, list(parts) if isinstance(parts, ListConfig) else parts)


def speed_up(cfg: DictConfig, network: nn.Module, trainer: Trainer, parts: int = 0) -> str:
    """Turn on what makes steps faster; say in a line what is on.

    `parts` of the network are computed again in the backward pass.

    Raises:
        UserError: settings that do not go together.
    """
    import torch

    from vidtrain.parallel import Sharded

    device = trainer.strategy.root_device
    where, more = "CPU", []
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
        torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = bool(cfg.tf32)
        more += ["tf32"] if cfg.tf32 and str(trainer.precision).startswith("32") else []
    if parts:
        more.append(f"{parts} parts computed again in the backward pass")
    if cfg.compile:
        if isinstance(trainer.strategy, Sharded):
            raise UserError("compile=true does not go with trainer=fsdp; leave one of them out")
        network.compile()
        more.append("compiled: the first steps take a minute")
    ranks = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    return ", ".join([f"on {ranks}{where}", f"precision {trainer.precision}", *more])


def share_cores() -> None:
    """Leave a core to the decoding workers when the network runs on the CPU too.

    OpenMP's threads wait for each other by spinning: as many of them as cores, with workers beside
    them, made a training step four to six times slower on two cores. OMP_NUM_THREADS has the last word.
    """
    import os

    import torch

    from vidtrain.data.crew import cores

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() - 1))
