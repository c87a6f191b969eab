"""Every command of the documents composes, so that none of them goes stale."""

import re
import shlex
from pathlib import Path

import pytest

from vidtrain.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "docs/BENCHMARKS.md", "docs/ARCHITECTURE.md", "CONTRIBUTING.md"]


def commands() -> list[list[str]]:
    """List the words of each `vidtrain VERB ...` line in code."""
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text().replace("\\\n", " ")
        lines = re.findall(r"^\s*(vidtrain [a-z]+ .*)$", text, re.MULTILINE)
        lines += re.findall(r"`(vidtrain [a-z]+ [^`]*)`", text)
        for line in lines:
            words = shlex.split(line, comments=True)[1:]
            if (
                words[0] in VERBS
                and words[0] not in ("completion", "report")  # whose words are no config's
                and not any("..." in w for w in words)
            ):
                found.append(words)
    return found


def test_there_are_commands_to_check():
    assert len(commands()) > 15


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:80])
def test_the_command_composes(vidtrain, tmp_path, words):
    if "--config-dir" in words:
        (tmp_path / words[words.index("--config-dir") + 1]).mkdir(parents=True)
    if "-m" in words:  # Hydra composes a sweep job by job, when it runs
        from vidtrain.config import conf_dir

        assert conf_dir().is_dir()
        return
    extra = [] if {"--help", "--cfg"} & set(words) else ["--cfg", "job"]
    result = vidtrain(*words, *extra)
    assert result.code == 0, result.err
    assert result.out
