from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vidtrain.cli import VERBS
from vidtrain.commands import completion

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a `vidtrain` of this checkout, the scripts, and two files."""
    folder = tmp_path_factory.mktemp("completion")
    command = folder / "bin" / "vidtrain"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m vidtrain "$@"\n')
    command.chmod(0o755)
    for shell in completion.SHELLS:
        (folder / shell).write_text(completion.script(shell))
    (folder / "my clip.mp4").touch()
    (folder / "clips").mkdir()
    return folder


def typed(argv: list[str], place: Path, ready: str, keys: str) -> str:
    """Type into a real interactive shell and return what it makes of the line's arguments."""
    ours, theirs = pty.openpty()
    env = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "HOME": str(place),
        "TERM": "dumb",
        "PS1": "$ ",
    }
    shell = subprocess.Popen(
        argv, stdin=theirs, stdout=theirs, stderr=theirs, cwd=place, env=env, start_new_session=True
    )
    os.close(theirs)
    timer = threading.Timer(60, shell.kill)
    timer.start()

    def until(pattern: str) -> str:
        """Read until the shell has written something, or has been silent for long."""
        screen = ""
        deadline = time.monotonic() + 30
        while not re.search(pattern, screen) and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    screen += os.read(ours, 4096).decode()
                except OSError:
                    break
        assert re.search(pattern, screen), screen
        return screen

    try:
        show = "show() { printf '<%s>' \"$@\"; }"
        os.write(ours, f"{ready}; {show}; echo rea''dy\n".encode())
        until("ready")
        os.write(ours, f"{keys}\t".encode())
        # The shell answers keys in turn: what comes after the tab waits for the completion.
        # Ctrl-A goes to the line's start, so that its words are shown and nothing is run.
        os.write(ours, b"END\x01show \n")
        screen = until("END>")
    finally:
        shell.kill()
        shell.wait()
        timer.cancel()
        os.close(ours)
    return "".join(re.findall(r"<[^<>]*>", screen))


BASH = (["bash", "--norc", "--noprofile", "-i"], "source ./bash")
ZSH = (["zsh", "-f", "-i"], "autoload -Uz compinit; compinit -u; source ./zsh; bindkey -e")


@pytest.mark.parametrize("shell", [BASH, ZSH], ids=["bash", "zsh"])
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        # END is typed right after the completion: it shows whether a space was put there.
        ("vidtrain summ", "<vidtrain><summary><END>"),
        ("vidtrain train data=kinetics4", "<vidtrain><train><data=kinetics400><END>"),
        (
            "vidtrain train -m data=ucf101 clip.num",
            "<vidtrain><train><-m><data=ucf101><clip.num_frames=END>",
        ),
        ("vidtrain completion ba", "<vidtrain><completion><bash><END>"),
        ("vidtrain predict input=my", "<vidtrain><predict><input=my clip.mp4><END>"),
        ("vidtrain predict input=cl", "<vidtrain><predict><input=clips/END>"),
        ("vidtrain report cl", "<vidtrain><report><clips/END>"),
    ],
)
def test_a_tab_completes(place, shell, keys, words):
    argv, ready = shell
    if not shutil.which(argv[0]):
        pytest.skip(f"no {argv[0]} on this machine")
    assert typed(argv, place, ready, keys) == words


def reply(place: Path, line: str, word: str) -> list[str]:
    """Ask the function as bash would, with several answers."""
    script = f"""
        source ./bash
        compopt() {{ :; }}  # works only within a completion
        COMP_LINE='{line}' COMP_POINT={len(line)} _vidtrain vidtrain '{word}' ''
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    env = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=place, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout.split("\n")[:-1]


def test_bash_offers_all_verbs_and_all_files_of_a_group(place):
    assert reply(place, "vidtrain ", "") == list(VERBS)
    stems = {path.stem for path in (ROOT / "conf" / "data").glob("*.yaml")}
    # What stands before the = is not repeated: bash replaces only what follows it.
    offered = {name for name in reply(place, "vidtrain train data=", "") if name}
    assert offered >= {stem for stem in stems if not stem.startswith("_")}
    assert all("=" not in name for name in offered)
    # Where the user took = out of COMP_WORDBREAKS, bash hands over the whole word.
    assert reply(place, "vidtrain train data=kinetics4", "data=kinetics4") == ["data=kinetics400"]


def test_bash_is_not_misled_by_a_path_to_the_command(place):
    line = f"{place}/bin/vidtrain test data=ssv"
    assert reply(place, line, "ssv") == ["ssv2"]


def test_fish_completes(place):
    if not shutil.which("fish"):
        pytest.skip("no fish on this machine")

    def offers(line: str) -> list[str]:
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source ./fish; complete -C '{line}'"],
            cwd=place,
            env={**os.environ, "HOME": str(place), "PATH": f"{place / 'bin'}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        return done.stdout.splitlines()

    assert offers("vidtrain summ") == [f"summary\t{VERBS['summary']}"]
    assert {line.split("\t")[0] for line in offers("vidtrain ")} == set(VERBS)
    assert offers("vidtrain train -m data=kinetics4") == ["data=kinetics400"]
    assert offers("vidtrain completion z") == ["zsh"]
    assert offers("vidtrain predict input=cl") == ["input=clips/"]


def test_another_shell_is_told_which_there_are(capsys):
    assert completion.main(["powershell"]) == 2
    assert "bash|zsh|fish" in capsys.readouterr().err
    assert completion.main([]) == 2
    assert completion.main(["--help"]) == 0
    capsys.readouterr()
    assert completion.main(["bash"]) == 0
    assert capsys.readouterr().out == completion.script("bash")


def test_help_with_quotes_does_not_break_a_script(monkeypatch):
    monkeypatch.setitem(VERBS, "odd", 'it\'s \\ "odd": $HOME')
    for shell in completion.SHELLS:
        if shutil.which(shell):
            text = completion.script(shell)
            checked = subprocess.run([shell, "-n"], input=text, text=True, capture_output=True)
            assert (checked.returncode, checked.stderr) == (0, ""), shell
