from __future__ import annotations

import csv
import http.server
import os
import pty
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from vidtrain import loggers
from vidtrain.types import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"
KEY = "a" * 40
REFUSED = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A user without key, settings or netrc file, and W&B as if freshly imported."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("NETRC", raising=False)
    (tmp_path / "home").mkdir()
    yield
    if "wandb" in sys.modules:
        import wandb

        wandb.teardown()


def kinds(made) -> list[str]:
    return [type(logger).__name__ for logger in made]


def test_csv_logger_writes_into_the_run_folder_without_a_warning(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")  # a folder in use
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger = loggers.csv_logger(tmp_path)
    logger.log_metrics({"train/loss": 1.5}, step=3)
    logger.save()
    with (tmp_path / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"step": "3", "train/loss": "1.5"}]


def test_csv_logger_keeps_what_was_logged_before_a_resume(tmp_path):
    for step in range(3):
        logger = loggers.csv_logger(tmp_path)
        logger.log_metrics({"train/loss": float(step)}, step=step)
        logger.save()
    first, second, last = (
        (tmp_path / name).read_text() for name in ("metrics.1.csv", "metrics.2.csv", "metrics.csv")
    )
    assert [text.split()[-1] for text in (first, second, last)] == ["0,0.0", "1,1.0", "2,2.0"]


@pytest.mark.parametrize(
    ("overrides", "made"),
    [
        (["+logger=auto"], ["CSVLogger"]),
        (["+logger=csv"], ["CSVLogger"]),
        (["+logger=none"], []),
        (["+logger=wandb", "logger.mode=disabled"], ["CSVLogger"]),
        (["+logger=wandb", "logger.mode=offline", "logger.project=mine", "logger.name=one"], None),
    ],
)
def test_every_choice_of_the_config_makes_its_loggers(tmp_path, overrides, made):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(overrides=overrides)
    # The config to be stored names targets of its own; they must not be built.
    config = {"model": {"_target_": "no.such.thing", "sizes": [1, 2]}}
    with loggers.closing(
        hydra.utils.instantiate(cfg.logger, run_dir=str(tmp_path), resolved=config)
    ) as found:
        if made is not None:
            assert kinds(found) == made
        else:
            assert kinds(found) == ["CSVLogger", "WandbLogger"]
            run = found[1].experiment
            assert (run.project, run.name, run.settings.mode) == ("mine", "one", "offline")
            assert run.config.as_dict()["model"] == config["model"]


@pytest.mark.parametrize("choice", ["auto", "csv", "none", "wandb"])
def test_a_config_says_all_that_build_takes(choice):
    import inspect

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        node = OmegaConf.to_container(hydra.compose(overrides=[f"+logger={choice}"]).logger)
    keys = {key for key in node if not key.startswith("_")}
    assert keys | {"run_dir", "resolved"} == set(inspect.signature(loggers.build).parameters)


def test_unknown_words_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"logger\.wandb is 'yes'"):
        loggers.build(tmp_path, wandb="yes")
    with pytest.raises(UserError, match=r"logger\.mode is 'on'"):
        loggers.build(tmp_path, mode="on")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE is 'sometimes'"):
        loggers.build(tmp_path)


def test_auto_is_silent_for_whoever_is_not_logged_in(tmp_path, capfd):
    assert kinds(loggers.build(tmp_path, wandb="auto")) == ["CSVLogger"]
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "wandb").exists()


def test_without_a_key_the_run_is_offline_and_one_line_says_so(tmp_path, capfd):
    with loggers.closing(loggers.build(tmp_path, wandb="always")) as made:
        assert made[1].experiment.settings.mode == "offline"
    out, err = capfd.readouterr()
    assert out == ""
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert err.splitlines() == [
        f"W&B is offline (no key; `wandb login` stores one); later: wandb sync {folder}"
    ]


@pytest.fixture
def failing():
    """A server that answers everything with an error."""

    class Fails(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(500)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fails) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=["refuses", "is silent", "fails"])
def useless(request, failing):
    """A server that no run can go to, and what is said of it."""
    if request.param == "refuses":
        yield REFUSED, "refused"
    elif request.param == "fails":
        yield failing, "500"
    else:
        with socket.socket() as ear:
            ear.bind(("127.0.0.1", 0))
            ear.listen(50)
            yield f"http://127.0.0.1:{ear.getsockname()[1]}", "timed out"


@pytest.mark.parametrize(("source", "wanted"), [("key", "always"), ("netrc", "auto")])
def test_a_server_that_does_not_answer_leaves_the_run_offline(
    tmp_path, monkeypatch, capfd, useless, source, wanted
):
    url, reason = useless
    monkeypatch.setenv("WANDB_BASE_URL", url)
    if source == "key":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        netrc = tmp_path / "home" / ".netrc"
        netrc.write_text(f"machine {url[7:]}\n  login user\n  password {KEY}\n")
        netrc.chmod(0o600)
    began = time.monotonic()
    with loggers.closing(loggers.build(tmp_path, wandb=wanted, init_timeout=1)) as made:
        assert time.monotonic() - began < 15
        assert made[1].experiment.settings.mode == "offline"
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("W&B is offline (") and url in line and reason in line
    # Nothing of the attempt is left that `wandb sync` could take for a run.
    assert [path.name[:8] for path in tmp_path.glob("wandb/*run-*") if not path.is_symlink()] == [
        "offline-"
    ]


def test_a_malformed_key_leaves_the_run_offline(tmp_path, monkeypatch, capfd, failing):
    monkeypatch.setenv("WANDB_BASE_URL", failing)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with loggers.closing(loggers.build(tmp_path, wandb="always")) as made:
        assert made[1].experiment.settings.mode == "offline"
    (line,) = capfd.readouterr().err.splitlines()
    assert "key" in line.lower()


@pytest.mark.parametrize(
    ("variable", "made"),
    [("disabled", ["CSVLogger"]), ("offline", ["CSVLogger", "WandbLogger"])],
)
def test_wandb_mode_wins_over_the_config(tmp_path, monkeypatch, variable, made):
    monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", REFUSED)
    with loggers.closing(loggers.build(tmp_path, wandb="auto", mode="online")) as found:
        assert kinds(found) == made


def test_only_a_key_for_the_right_server_counts(tmp_path, monkeypatch):
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text(f"machine other.example\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    assert not loggers.logged_in()
    settings = tmp_path / "home" / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://other.example\n")
    assert loggers.logged_in()
    netrc.write_text("machine\n")  # broken
    assert not loggers.logged_in()


def test_a_run_is_closed_as_failed_when_the_block_raises(tmp_path):
    import wandb

    codes = []
    for error in (None, KeyboardInterrupt):
        made = loggers.build(tmp_path, wandb="always", mode="offline")
        run = made[1].experiment
        finish = run.finish
        run.finish = lambda exit_code, finish=finish: (codes.append(exit_code), finish(exit_code))
        try:
            with loggers.closing(made):
                assert wandb.run is run
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        assert wandb.run is None
    assert codes == [0, 1]


def test_only_rank_0_has_a_run(tmp_path, monkeypatch, capfd):
    from lightning.pytorch.utilities import rank_zero_only

    (tmp_path / "metrics.csv").write_text("step\n")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    made = loggers.build(tmp_path, wandb="always", mode="offline")
    assert kinds(made) == ["CSVLogger", "WandbLogger"]  # as many as rank 0 has
    made[1].log_metrics({"x": 1.0})
    assert capfd.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "metrics.csv"]


def test_wandb_sees_no_terminal_when_it_looks_for_a_key(tmp_path, monkeypatch, capfd, failing):
    """Older versions would ask at one, where they find no key or not the one that we found."""
    import wandb

    seen = []
    init = wandb.init

    def watched(**kwargs):
        seen.append((kwargs["mode"], sys.stdin.isatty()))
        return init(**kwargs)

    monkeypatch.setattr(wandb, "init", watched)
    monkeypatch.setenv("WANDB_BASE_URL", failing)
    monkeypatch.setattr(loggers, "logged_in", lambda: True)  # though there is no key
    ours, theirs = pty.openpty()
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with loggers.closing(loggers.build(tmp_path, wandb="always")) as made:
            assert made[1].experiment.settings.mode == "offline"
        assert sys.stdin is terminal
    os.close(ours)
    assert seen == [("online", False), ("offline", True)]
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_nobody_is_asked_at_a_terminal(tmp_path, failing):
    """Neither without a key, nor should W&B not see the key that we saw."""
    script = """
import sys
from vidtrain import loggers
for seen in (False, True):
    loggers.logged_in = lambda: seen
    with loggers.closing(loggers.build(sys.argv[1], csv=False, wandb="always")) as made:
        print("mode", made[0].experiment.settings.mode)
"""
    ours, theirs = pty.openpty()
    root = str(CONF.parent)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": root, "WANDB_BASE_URL": failing},
        start_new_session=True,
    ) as process:
        os.close(theirs)
        timer = threading.Timer(60, process.kill)
        timer.start()
        told = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                part = b""
            if not part:
                break
            told += part
        process.wait()
        timer.cancel()
    os.close(ours)
    lines = told.decode().splitlines()
    assert process.returncode == 0, lines
    assert [line for line in lines if line.startswith("mode")] == ["mode offline"] * 2
    assert sum(line.startswith("W&B is offline (") for line in lines) == 2
    assert not any("Enter your choice" in line or "API key:" in line for line in lines)
