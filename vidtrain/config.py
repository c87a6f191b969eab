"""From a command line to a config and back: find conf/, check it, run a verb under Hydra, save it.

Hydra composes; this file adds what it lacks: values with spaces in file names, the user's own files
going over ours, and one line that names the nearest right word when a word is wrong.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidtrain.types import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

# Values that are names of files, or patterns: Hydra's grammar would trip over their spaces, commas, '='
# and brackets.
FILE_KEYS = (
    "ckpt", "run", "input", "output", "resume", "data.root", "data.annotations", "model.weights", "freeze",
)  # fmt: skip
LISTS = {
    "model.weights": "{",
    "freeze": "[",
}  # how a file for each part, and several patterns, begin

# Plugins of Hydra's that are extras, by the name that chooses them.
EXTRAS = {
    "joblib": "sweep",
    "submitit_slurm": "slurm",
    "submitit_local": "slurm",
    "optuna": "optuna",
}

# What a verb cannot do without.
REQUIRED = {
    "test": ("ckpt",),
    "predict": ("ckpt", "input"),
    "extract": ("output",),
    "data": ("action",),
}


def conf_dir() -> Path:
    """Find conf/: beside the package in a checkout, inside it when installed from a wheel.

    The checkout comes first: an editable install leaves a stale copy inside site-packages.
    """
    here = Path(__file__).resolve().parent
    for candidate in (here.parent / "conf", here / "conf"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise UserError(f"no conf/ beside or in {here}: install vidtrain again")


def user_conf_dirs(args: list[str]) -> tuple[list[Path], list[str]]:
    """Take `--config-dir DIR` out of the arguments; ./conf counts by itself.

    Returns:
        The user's folders, the one that wins first, and the arguments that are left.
    """
    dirs: list[Path] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        flag, _, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            folder = Path(value or next(words, ""))
            if not folder.is_dir():
                raise UserError(f"--config-dir {folder}: there is no such folder")
            dirs.append(folder.resolve())
        else:
            rest.append(word)
    own = Path("conf").resolve()
    if own.is_dir() and own != conf_dir() and own not in dirs:
        dirs.append(own)
    return dirs, rest


def quote(arg: str, sweep: bool = False) -> str:
    """Quote a file name for Hydra's grammar: `ckpt=epoch=3.ckpt`, `input=my video (1).mp4`.

    Interpolations, quoted values, `null` and, in a sweep, words between commas stay as they are.
    """
    key, equals, value = arg.partition("=")
    plain = r"[\w./~:@%+-]*" + (r"(,[\w./~:@%+-]+)*" if sweep else "")
    if not equals or key.lstrip("+") not in FILE_KEYS or re.fullmatch(plain, value):
        return arg
    if value.startswith("${") or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return arg
    if value.startswith(LISTS.get(key.lstrip("+"), "${")):
        return arg
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"{key}='{escaped}'"


def nearest(word: str, words: Sequence[str]) -> str:
    """Say `; did you mean 'c3d'?` when something is near, else list what there is when it is short."""
    near = get_close_matches(word, words, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; one of: {', '.join(words)}" if 0 < len(words) <= 40 else ""


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Walk every dotted key of a config."""
    from omegaconf import OmegaConf

    if OmegaConf.is_dict(node) and not node._is_none() and not node._is_missing():
        for key in node:
            yield f"{prefix}{key}"
            yield from _keys(node._get_node(key), f"{prefix}{key}.")


def _first_value(override: Override) -> str:
    """`model=c3d,i3d` as `model=c3d`: what a check of the other keys composes with."""
    value = override.value()
    if override.is_sweep_override():
        choices = getattr(value, "list", None) or [None]
        value = choices[0]
    return f"{override.get_key_element()}={value}"


def check_overrides(verb: str, overrides: Sequence[str]) -> None:
    """Refuse a wrong key or name before Hydra does.

    Raises:
        UserError: naming the nearest right one.
    """
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.object_type import ObjectType
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep
    from hydra.errors import HydraException, OverrideParseException

    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[Override] = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise UserError(f"cannot read '{text}': write key=value")
        try:
            parsed += parser.parse_overrides([text])
        except OverrideParseException as error:
            raise UserError(f"cannot read '{text}': {str(error).splitlines()[0]}") from None

    def is_group(name: str) -> bool:
        return "." not in name and bool(loader.get_group_options(name, ObjectType.CONFIG))

    for override in parsed:
        group = override.key_or_group
        if not is_group(group) or override.is_delete():
            continue
        given: Any = override.value()
        for value in given.list if isinstance(given, ChoiceSweep) else [given]:
            for name in map(str, value if isinstance(value, list) else [value]):
                folder, _, stem = f"{group}/{name}".rpartition("/")
                known = [
                    option
                    for option in loader.get_group_options(folder, ObjectType.CONFIG)
                    if not option.startswith("_")
                ]
                if stem not in known:
                    if folder == group and group == "experiment":
                        known = _experiments(loader, group)
                    if group.startswith("hydra/") and stem in EXTRAS:
                        what = f"vidtrain[{EXTRAS[stem]}]"
                        raise UserError(f"{group}={stem} is not installed: pip install '{what}'")
                    raise UserError(f"no {group} '{name}'{nearest(name, known)}")
    choices = [o for o in parsed if is_group(o.key_or_group)]
    try:
        config = compose(verb, [_first_value(o) for o in choices if not o.is_delete()])
    except HydraException as error:
        raise UserError(one_line(error)) from None
    known_keys = list(_keys(config))
    groups = [g for g in loader.get_group_options("", ObjectType.GROUP) if g != "hydra"]
    for override in parsed:
        key = override.key_or_group
        if is_group(key) or override.is_add() or key.split(".")[0] == "hydra":
            continue
        if key not in known_keys:
            word = nearest(key, known_keys + groups)
            if not word.startswith("; did"):  # the last part may say more than the whole
                tail = key.rpartition(".")[2]
                near = [k for k in known_keys if k.rpartition(".")[2] == tail]
                word = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(
                f"no setting '{key}'{word or f' (vidtrain {verb} --cfg job lists them)'}"
            )


def one_line(error: BaseException) -> str:
    """Put an error of Hydra or OmegaConf into one line; some say nothing themselves."""
    while not str(error).strip() and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _experiments(loader: Any, group: str) -> list[str]:
    """List experiments by `<data>/<name>`."""
    from hydra.core.object_type import ObjectType

    names = list(loader.get_group_options(group, ObjectType.CONFIG))
    for folder in loader.get_group_options(group, ObjectType.GROUP):
        inner = loader.get_group_options(f"{group}/{folder}", ObjectType.CONFIG)
        names += [f"{folder}/{name}" for name in inner]
    return names


USER_DIRS: list[Path] = []  # the user's conf folders in this process, the one that wins first


def put_on_search_path(dirs: Sequence[Path]) -> None:
    """Put the user's folders before ours, so that a file of the same name is theirs."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class UserConf(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for folder in reversed(USER_DIRS):
                search_path.prepend("user", f"file://{folder}")

    known = Plugins.instance().discover(SearchPathPlugin)
    if not any(plugin.__name__ == UserConf.__name__ for plugin in known):
        Plugins.instance().register(UserConf)
    USER_DIRS[:] = dirs


def run(verb: str, args: list[str]) -> None:
    """Run a verb under Hydra: compose its config, check it, call `vidtrain.commands.VERB.main`.

    Exits with 2 after a user's mistake, with what the verb returns otherwise (None: 0).
    """
    try:
        sweep = "-m" in args or "--multirun" in args
        dirs, args = user_conf_dirs([quote(arg, sweep) for arg in args])
        import hydra
        from hydra import initialize_config_dir
        from hydra._internal.utils import get_args_parser

        if dirs or USER_DIRS:
            put_on_search_path(dirs)
        parsed = get_args_parser().parse_args(args)
        if not (parsed.help or parsed.hydra_help or parsed.info or parsed.shell_completion):
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                check_overrides(verb, parsed.overrides)
    except UserError as error:
        fail(verb, error)

    sys.argv = [sys.argv[0], *args]
    os.environ.setdefault(
        "HYDRA_FULL_ERROR", "1"
    )  # a bug is shown whole; a mistake never gets there
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    task = _task(verb, [sys.argv[0], verb, *(f"--config-dir={folder}" for folder in dirs)])
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=verb)(task)()
    except (OmegaConfBaseException, HydraException) as error:
        if isinstance(error, InstantiationException):
            raise
        fail(verb, UserError(one_line(error)))


def _task(verb: str, start: list[str]) -> Callable[[DictConfig], Any]:
    """Wrap a verb's main: a mistake becomes one line and exit code 2.

    Args:
        verb: its name.
        start: how this job's command line begins. Lightning starts other ranks by running
            `sys.argv` again: the verb must be in it, and of a sweep this job's own overrides.
    """

    def task(cfg: DictConfig) -> Any:
        from vidtrain import sweep

        sys.argv = [*start, *task_overrides()]
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # `model._target_=mine.net` of a file beside the user
        if sweep.is_job():
            return sweep.attempt(lambda: _call(verb, cfg), cfg)
        try:
            code = _call(verb, cfg)
        except UserError as error:
            forget_empty_run()
            fail(verb, error)
        except KeyboardInterrupt:
            forget_empty_run()
            print(f"\nvidtrain {verb}: interrupted", file=sys.stderr)
            sys.exit(130)
        if isinstance(code, int) and not isinstance(code, bool) and code:
            sys.exit(code)
        return code

    return task


def _call(verb: str, cfg: DictConfig) -> Any:
    """Call a verb's main.

    Raises:
        UserError: for every mistake of the user's, a missing value among them.
    """
    from importlib import import_module

    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        if not isinstance(cfg.seed, int) or cfg.seed < 0:
            raise UserError(f"seed is {cfg.seed!r}; it must be a whole number from 0")
        for key in REQUIRED.get(verb, ()):
            if OmegaConf.is_missing(cfg, key) or cfg[key] is None:
                raise UserError(f"{key} is not set; add {key}=...")
        return import_module(f"vidtrain.commands.{verb}").main(cfg)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is not set; add {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from None
    except RuntimeError as error:
        mistake = of_the_device(error)
        if mistake is None:
            raise
        raise mistake from None


def of_the_device(error: RuntimeError) -> UserError | None:
    """Say what to do about what a device cannot do; None for any other error."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError" or "ALLOC_FAILED" in text:  # torch, cuDNN, cuBLAS
        return UserError(
            f"the device's memory is full ({text.partition('. ')[0]}); set a smaller data.batch_size (auto"
            " finds the largest), checkpointing=true or trainer.precision=bf16-mixed, and in tests"
            " data.eval_batch_size=1 views.per_forward=1"
        )
    operation, found, _ = text.partition(" does not have a deterministic implementation")
    if found:
        return UserError(
            f"{operation} has no deterministic form on this device; trainer.deterministic=warn takes it"
            " where there is one, and names what has none"
        )
    return None


def forget_empty_run() -> None:
    """Remove the folder that Hydra made for this job, and those above it, as far as they are empty."""
    here = Path.cwd()
    folder = output_dir().absolute()
    with contextlib.suppress(OSError):
        while here in folder.parents:  # never one that the user stands in
            folder.rmdir()
            folder = folder.parent


def fail(verb: str, error: UserError) -> None:
    """Print one line and stop with exit code 2."""
    # One raised in a loader's worker arrives with the worker's traceback around it.
    text = str(error).split("vidtrain.types.UserError: ")[-1]
    print(f"vidtrain {verb}: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(2)


def task_overrides() -> list[str]:
    """List the `key=value` words of this job, as the user wrote them."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def output_dir() -> Path:
    """Where Hydra made this job's folder."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else ".")


def choices() -> dict[str, str]:
    """Name the file chosen for each group: `{"model": "c3d", "data": "demo", ...}`."""
    from hydra.core.hydra_config import HydraConfig

    return dict(HydraConfig.get().runtime.choices) if HydraConfig.initialized() else {}


def model_defaults() -> DictConfig | None:
    """Compose what this job's model would train with if nothing else were said; None outside a job."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra

    model = choices().get("model")
    if model is None or not GlobalHydra.instance().is_initialized():
        return None
    return compose("train", [f"model={model}"])


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Turn a config into plain values, every interpolation followed."""
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def overlay(saved: DictConfig, given: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Lay what the user wrote on the command line over a config that came out of a checkpoint.

    Args:
        saved: the checkpoint's config, interpolations alive.
        given: the config that this command line composed.
        overrides: its `key=value` words. A group (`data=ucf101`) replaces the whole group; a key
            replaces one value. Nothing else of `given` is taken.
    """
    from omegaconf import OmegaConf, open_dict

    merged = copy.deepcopy(saved)
    with open_dict(merged):
        for word in overrides:
            key = word.partition("=")[0].lstrip("+~").partition("@")[0]
            if key not in given and "." not in key:
                continue  # a group like debug, which sets keys of others: those are the verb's own
            value = OmegaConf.select(given, key)
            node = given._get_node(key) if "." not in key else None
            if node is not None and OmegaConf.is_dict(node):
                merged[key] = copy.deepcopy(node)
            else:
                OmegaConf.update(merged, key, value, force_add=True)
    return merged
