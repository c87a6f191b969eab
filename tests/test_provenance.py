import subprocess

import pytest

import vidtrain
from vidtrain import provenance
from vidtrain.visualize.page import code_in_words


def git(folder, *words):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    done = subprocess.run(
        ["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "mine.py").write_text("a = 1\n")
    git(tmp_path, "add", "mine.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    return tmp_path


def test_the_commit_is_that_of_the_working_folder(repository):
    head = git(repository, "rev-parse", "HEAD")
    (repository / "runs").write_text("what git does not know does not count")
    found = provenance.code()
    assert (found["commit"], found["dirty"]) == (head, False)
    assert found["vidtrain"] == vidtrain.__version__ and found["torch"]
    (repository / "mine.py").write_text("a = 2\n")
    assert provenance.code()["dirty"] is True
    assert f"commit {head[:12]}, changed since;" in code_in_words(provenance.code())


def test_vidtrain_in_an_environment_inside_a_repository_is_no_part_of_it(repository, monkeypatch):
    package = repository / "venv" / "vidtrain"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert provenance.code()["vidtrain_commit"] is None
    git(repository, "add", "venv")
    git(repository, "commit", "-q", "-m", "a clone")
    assert provenance.code()["vidtrain_commit"] == git(repository, "rev-parse", "HEAD")


@pytest.mark.parametrize("why", ["no git", "no repository", "no commit"])
def test_without_git_there_is_no_commit_and_no_error(tmp_path, monkeypatch, why):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if why == "no commit":
        git(tmp_path, "init", "-q")
    if why == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = provenance.code()
    assert found["commit"] is None and found["dirty"] is None
    assert code_in_words({**found, "vidtrain_commit": None}).startswith("vidtrain ")
    assert "commit" not in code_in_words({**found, "vidtrain_commit": None})
