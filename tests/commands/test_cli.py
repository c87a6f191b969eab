"""The command line, as a user meets it."""

import subprocess
import sys

import pytest

from vidtrain import cli


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from vidtrain import cli; sys.argv = ['vidtrain', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'lightning', 'numpy', 'av', 'rich', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vidtrain VERB key=value" in done.stdout
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.stdout


def test_the_installed_command_and_python_m_are_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "vidtrain", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("vidtrain 0.")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trian"], "no verb 'trian'; did you mean 'train'?"),
        (["train", "model=c3dd"], "no model 'c3dd'; did you mean 'c3d'?"),
        (["train", "data=ucf11"], "no data 'ucf11'; did you mean 'ucf101'?"),
        (["train", "optim.lrr=0.1"], "no setting 'optim.lrr'; did you mean 'optim.lr'?"),
        (["train", "modle=c3d"], "no setting 'modle'; did you mean 'model'?"),
        (["train", "batch_size=4"], "no setting 'batch_size'; did you mean 'data.batch_size'?"),
        (["train", "clip.nm_frames=3"], "did you mean 'clip.num_frames'?"),
        (["train", "data.rooot=x"], "did you mean 'data.root'?"),
        (["train", "-m", "model=c3d,slow_fusionn"], "did you mean 'slow_fusion'?"),
        (["train", "experiment=dem"], "no experiment 'dem'; did you mean 'demo'?"),
        (["train", "model"], "cannot read 'model': write key=value"),
        (["train", "model=[c3d"], "cannot read 'model=[c3d'"),
        (["train", "clip.num_frames=0"], "clip.num_frames is 0"),
        (["train", "optim.schedule=cosin", "data.num_classes=8"], "optim.schedule is 'cosin'"),
        (["train", "data=folder", "data.root=/nowhere"], "/nowhere"),
        (["train", "data.batch_size=many"], "data.batch_size"),
        (["train", "data=folder"], "data.root is not set; add data.root=..."),
        (["train", "data.decoder=pyva"], "did you mean 'pyav'"),
        (["train", "ckpt=nothing.ckpt"], "no checkpoint nothing.ckpt"),
        (["train", "--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder"),
        (["test"], "ckpt is not set; add ckpt=..."),
        (["test", "ckpt=nothing.ckpt"], "no checkpoint nothing.ckpt"),
        (["predict", "ckpt=x.ckpt"], "input is not set"),
        (["data", "action=chekc"], "no action 'chekc'; did you mean 'check'?"),
        (["data"], "action is not set"),
        (["summary", "data=folder"], "data.num_classes=N"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(vidtrain, args, said):
    result = vidtrain(*args)
    assert result.code == 2, result.err
    assert said in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert "Traceback" not in result.err


def test_cfg_job_prints_the_config(vidtrain):
    result = vidtrain("train", "model=c3d", "optim.lr=0.5", "--cfg", "job")
    assert result.code == 0
    assert "_target_: vidtrain.models.c3d.c3d" in result.out
    assert "lr: 0.5" in result.out


def test_help_of_a_verb_lists_its_groups(vidtrain):
    result = vidtrain("train", "--help")
    assert result.code == 0
    assert "model: " in result.out and "c3d" in result.out and "ucf101" in result.out


def test_a_users_own_conf_goes_over_ours(vidtrain, tmp_path):
    own = tmp_path / "mine"
    (own / "model").mkdir(parents=True)
    (own / "optim").mkdir()
    (own / "model" / "tiny.yaml").write_text(
        "# @package _global_\ndefaults: [/optim: sgd_cosine, _self_]\n"
        "model: {_target_: mine.net, num_classes: '${data.num_classes}'}\n"
        "clip: {num_frames: 3, stride: 1, size: 8}\n"
    )
    (own / "optim" / "sgd_cosine.yaml").write_text("_target_: mine.sgd\nlr: 7\n")
    result = vidtrain("train", "--config-dir", str(own), "model=tiny", "--cfg", "job")
    assert result.code == 0, result.err
    assert "mine.net" in result.out and "lr: 7" in result.out and "num_frames: 3" in result.out


@pytest.mark.parametrize(
    "name",
    [
        "my video (1).mp4",
        "epoch=3-step=10.ckpt",
        "a,b.mp4",
        "it's.mp4",
        "[x].mp4",
        "back\\slash.mp4",
    ],
)
def test_file_names_need_no_quoting(vidtrain, name):
    result = vidtrain("predict", "ckpt=x.ckpt", f"input={name}", "--cfg", "job")
    assert result.code == 0, result.err
    from omegaconf import OmegaConf

    assert OmegaConf.create(result.out).input == name
