"""Where a run's numbers go: a CSV file, and Weights & Biases for those who use it.

W&B never asks a question, never makes a run wait for a server that does not answer, and never
makes one fail: what cannot go online is kept in the run folder, from where `wandb sync` sends it.
"""

from __future__ import annotations

import configparser
import http.client
import netrc
import os
import shutil
import ssl
import sys
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vidtrain import sweep
from vidtrain.types import UserError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

FINISH_TIMEOUT = 300  # seconds that the end of a run may wait for uploads; the rest stays on disk


def build(
    run_dir: Path | str,
    resolved: Mapping[str, Any] | None = None,
    *,
    csv: bool = True,
    wandb: str = "auto",
    mode: str = "auto",
    project: str | None = None,
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    init_timeout: float = 20,
) -> list[Logger]:
    """Make the loggers of one run; the `_target_` of `conf/logger/*.yaml`.

    Give the list to `closing`, which ends the W&B run in every case.

    Args:
        run_dir: the run's folder.
        resolved: the resolved config, stored with the W&B run. (`config` is a word of Hydra's
            `instantiate`.)
        csv: write `metrics.csv`.
        wandb: `always`, `never`, or `auto`: for whoever is logged in, or set a mode other than
            `auto`, here or as WANDB_MODE.
        mode: `online`, `offline`, `disabled`, or `auto`: online for whoever is logged in.
            WANDB_MODE wins over it. Online falls back to offline with one line on stderr.
        project: WANDB_PROJECT, else "vidtrain", where null.
        entity: user or team; W&B's own default where null.
        name: of the run; WANDB_NAME, else from the run's folder, where null.
        group: of runs; WANDB_RUN_GROUP, else the sweep: W&B's own (WANDB_SWEEP_ID) or the folder of
            ours, else the folder around the run's, where null.
        tags: of the run.
        init_timeout: seconds that a server has for its first answer.

    Raises:
        UserError: an unknown word for `wandb` or a mode.
    """
    if wandb not in ("auto", "always", "never"):
        raise UserError(f"logger.wandb is {wandb!r}; it must be auto, always or never")
    run_dir = Path(run_dir)
    mode = _mode(mode)
    wanted = wandb == "always" or (wandb == "auto" and (mode != "auto" or logged_in()))
    loggers: list[Logger] = [csv_logger(run_dir)] if csv else []
    if wanted and mode != "disabled":
        logger = wandb_logger(
            run_dir,
            resolved,
            mode=mode,
            project=project or os.environ.get("WANDB_PROJECT") or "vidtrain",
            entity=entity,
            name=name or os.environ.get("WANDB_NAME") or "/".join(run_dir.resolve().parts[-2:]),
            group=group or _group(run_dir),
            tags=tags,
            init_timeout=init_timeout,
        )
        loggers += [logger] if logger else []
    return loggers


def _group(run_dir: Path) -> str:
    """Name what a run belongs to: what the environment says, its sweep, or the folder around it."""
    words = (os.environ.get("WANDB_RUN_GROUP"), os.environ.get("WANDB_SWEEP_ID"))
    return next(filter(None, words), None) or (sweep.folder() or run_dir.resolve().parent).name


@contextmanager
def closing(loggers: list[Logger]) -> Iterator[list[Logger]]:
    """End the W&B run of these loggers, as failed when the block raises.

    Without it a second run in the same process (a sweep) would go on in the first one's.
    """
    exit_code = 1
    try:
        yield loggers
        exit_code = 0
    finally:
        for logger in loggers:
            run = getattr(logger, "_experiment", None)
            if run is not None and hasattr(run, "finish"):
                run.finish(exit_code=exit_code)


def csv_logger(run_dir: Path) -> CSVLogger:
    """Log to `metrics.csv` in the run's folder; an older one becomes `metrics.<n>.csv`.

    Lightning's logger deletes the file it finds there, which after a resume holds the first part
    of the curves.
    """
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.utilities import rank_zero_only

    metrics = run_dir / "metrics.csv"
    if rank_zero_only.rank == 0 and metrics.exists():
        used = [int(p.stem[8:]) for p in run_dir.glob("metrics.*.csv") if p.stem[8:].isdigit()]
        metrics.rename(run_dir / f"metrics.{max(used, default=0) + 1}.csv")
    logger = CSVLogger(run_dir, name="", version="")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exists and is not empty")
        _ = logger.experiment  # made now, while its warning about the folder's files is unheard
    return logger


def wandb_logger(
    run_dir: Path,
    resolved: Mapping[str, Any] | None,
    *,
    mode: str,
    project: str,
    entity: str | None,
    name: str,
    group: str,
    tags: Sequence[str],
    init_timeout: float,
) -> WandbLogger | None:
    """Start a W&B run and wrap it for Lightning; none when W&B itself does not work.

    Only rank 0 has a run: on the others the logger does nothing.
    """
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.utilities import rank_zero_only

    if rank_zero_only.rank != 0:
        return WandbLogger(project=project, save_dir=run_dir)
    try:
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # it tells in ten lines what one says
        if wandb.run is not None:
            wandb.finish()
        run, line = _start(
            mode,
            run_dir,
            init_timeout,
            config=dict(resolved or {}),
            project=project,
            entity=entity,
            name=name,
            group=group,
            tags=list(tags) or None,
        )
    except Exception as error:  # a run never fails for want of a logger
        print(f"W&B is off: {_reason(error)}", file=sys.stderr)
        return None
    print(line, file=sys.stderr, flush=True)
    # One axis for all: W&B's own step also counts what is logged between two steps of training.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run, project=project, save_dir=run_dir)


def logged_in() -> bool:
    """Tell whether W&B would find a key without asking: in the environment or the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path("~").expanduser()
    paths = [os.environ.get("NETRC"), home / ".netrc", home / "_netrc"]
    path = next((Path(p).expanduser() for p in paths if p and Path(p).expanduser().is_file()), None)
    if path is None:
        return False
    try:
        return bool(netrc.netrc(str(path)).authenticators(urlsplit(_base_url()).netloc))
    except (netrc.NetrcParseError, OSError):
        return False


def _base_url() -> str:
    """Find the server: environment, then the user's settings file, then W&B's default."""
    if os.environ.get("WANDB_BASE_URL"):
        return os.environ["WANDB_BASE_URL"]
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read(folder / "settings", encoding="utf-8")
    if settings.get("default", "base_url", fallback=""):
        return settings.get("default", "base_url")
    import wandb

    return str(wandb.Settings().base_url)


def _mode(mode: str) -> str:
    """Let the environment win, and know W&B's older words."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return "disabled"
    where = "WANDB_MODE" if os.environ.get("WANDB_MODE") else "logger.mode"
    chosen = (os.environ.get("WANDB_MODE") or mode).lower()
    chosen = {"dryrun": "offline", "run": "online", "shared": "online"}.get(chosen, chosen)
    if chosen not in ("auto", "online", "offline", "disabled"):
        raise UserError(f"{where} is {chosen!r}; it must be auto, online, offline or disabled")
    return chosen


def _start(mode: str, run_dir: Path, init_timeout: float, **kwargs: Any) -> tuple[Any, str]:
    """Start a run, online if it can be, and say in one line where it is."""
    import wandb

    kwargs["dir"] = str(run_dir)
    why = "as asked"
    if mode != "offline" and not logged_in():
        why = "no key; `wandb login` stores one"
    elif mode != "offline" and (silence := _silence(_base_url(), init_timeout)):
        why = silence
    elif mode != "offline":
        # After a resume the curves go on in the same run.
        known = run_dir / "wandb" / "online_id"
        if "WANDB_RUN_ID" not in os.environ:  # which a sweep sets
            kwargs["id"] = known.read_text().strip() if known.is_file() else uuid.uuid4().hex[:8]
        before = set(run_dir.glob("wandb/run-*"))
        try:
            with _no_terminal():
                resume = "allow" if known.is_file() else None
                run = wandb.init(
                    mode="online",
                    resume=resume,
                    settings=_settings(init_timeout=init_timeout),
                    **kwargs,
                )
        except Exception as error:
            why = f"{_base_url()}: {_reason(error)}"
            kwargs.pop("id", None)
            for stump in set(run_dir.glob("wandb/run-*")) - before:
                shutil.rmtree(stump, ignore_errors=True)
        else:
            known.write_text(run.id)
            return run, f"W&B: {run.url}"
    run = wandb.init(mode="offline", settings=_settings(), **kwargs)
    return run, f"W&B is offline ({why}); later: wandb sync {Path(run.dir).parent}"


def _silence(url: str, timeout: float) -> str:
    """Say why a server does not answer, or nothing when it does, whatever the answer.

    W&B itself keeps on trying, and before version 0.30 no offline run could start meanwhile.
    """
    try:
        urllib.request.urlopen(url, timeout=timeout).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        # Certificates are W&B's affair: it knows settings that we do not.
        return "" if isinstance(reason, ssl.SSLError) else f"{url}: {reason}"
    return ""


def _settings(**settings: Any) -> Any:
    """Make W&B's settings anew for each attempt, for `wandb.init` writes into them."""
    import wandb

    if "finish_timeout" in wandb.Settings.model_fields:  # newer than our oldest W&B
        settings["finish_timeout"] = FINISH_TIMEOUT
    return wandb.Settings(silent=True, **settings)


@contextmanager
def _no_terminal() -> Iterator[None]:
    """Keep W&B from asking for a key, should it not see the one that we saw."""
    stdin = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin


def _reason(error: Exception) -> str:
    """Put an error on one line, and not a long one."""
    text = str(error).split("\nConsider increasing")[0]  # W&B's advice: ours is not to wait
    line = " ".join(text.split()) or type(error).__name__
    return line if len(line) <= 160 else line[:157] + "..."
