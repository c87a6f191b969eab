"""Train, test and predict through the command line, on small real videos."""

import csv
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from make_video import write_audio, write_video
from tiny import TINY_RUN

TINY = [*TINY_RUN, "views.clips=3", "views.crops=2"]


def only(pattern: str, folder: Path) -> Path:
    (found,) = folder.glob(pattern)
    return found


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory):
    """A run of four epochs, tested, by the command itself; do not write into it."""
    folder = tmp_path_factory.mktemp("trained")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "vidtrain",
            "train",
            *TINY,
            f"data.root={tiny_dataset}",
            "trainer.max_epochs=4",
            "test=true",
            f"paths.cache={folder}",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return only("runs/late_fusion_pool-folder/*", folder), done.stdout


def test_train_ends_in_a_tested_checkpoint_and_a_report(trained):
    run, out = trained
    report = json.loads((run / "report.json").read_text())
    assert report["metrics"]["test/top1"] == 1.0  # three colours
    assert {"test/top5", "test/mean_class", "test/clip_top1"} <= set(report["metrics"])
    assert report["protocol"]["frames"] == 2 and report["protocol"]["clips"] == 3
    assert report["protocol"]["crops"] == 2 and report["protocol"]["size"] == 32
    assert report["protocol"]["fps"] == 12.0  # 24 frames per second, every second one
    assert report["videos"] == {"asked": 6, "scored": 6, "failed": []}
    assert Path(report["ckpt"]) == only("checkpoints/epoch_*.ckpt", run)
    assert report["model"] == "late_fusion_pool" and report["label_names"][1] == "it's (a) pear"
    rows = read_csv(run / "predictions.csv")
    assert len(rows) == 6
    assert all(
        row["label"] == row["top1"] and row["path"].split("/")[1] == row["label"] for row in rows
    )
    assert all(
        sum(float(row[f"top{k}_score"]) for k in (1, 2, 3)) == pytest.approx(1, abs=1e-4)
        for row in rows
    )
    page = (run / "report.html").read_text()
    assert "it&#x27;s (a) pear" in page or "it&#39;s (a) pear" in page
    assert (run / "config.yaml").is_file() and (run / "metrics.csv").is_file()
    steps = read_csv(run / "metrics.csv")
    assert any(row.get("val/top1") for row in steps)
    assert "100.00 %" in out and "6 of 6 videos" in out


def test_test_and_predict_need_nothing_but_the_checkpoint(
    trained, vidtrain, tiny_dataset, tmp_path
):
    run, _ = trained
    before = json.loads((run / "report.json").read_text())
    result = vidtrain("test", f"ckpt={run}", "output=again", "trainer=cpu")
    assert result.code == 0, result.err
    after = json.loads((tmp_path / "again" / "report.json").read_text())
    assert after["metrics"] == pytest.approx(before["metrics"])
    assert after["protocol"] == before["protocol"]

    result = vidtrain(
        "test", f"ckpt={run}", "output=val", "split=val", "views.clips=1", "trainer=cpu"
    )
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "val" / "report.json").read_text())["protocol"]["clips"] == 1
    refused = vidtrain("test", f"ckpt={run}", "model.size=64", "trainer=cpu")
    assert refused.code == 2 and "model= cannot be changed in a test" in refused.err

    mixed = tmp_path / "my videos (1)"
    mixed.mkdir()
    for name in ("a,b.mp4", "-x.mp4"):
        write_video(mixed / name, num_frames=12, size=(64, 48), numbers=[56] * 12, pattern="flat")
    (mixed / "empty.mp4").write_bytes(b"")
    (mixed / "notes.mp4").write_text("not a video")
    write_audio(mixed / "sound.mp4")
    result = vidtrain("predict", f"ckpt={run}", f"input={mixed}", "workers=0")
    assert result.code == 1
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    by_name = {Path(line["path"]).name: line for line in lines}
    assert len(by_name) == 5
    assert by_name["a,b.mp4"]["predictions"][0]["label"] == "it's (a) pear"
    assert by_name["-x.mp4"]["predictions"][0]["score"] > 0.5
    for name in ("empty.mp4", "notes.mp4", "sound.mp4"):
        assert by_name[name]["error"]
    assert "2 of 5 videos" in result.out
    one = vidtrain(
        "predict", f"ckpt={run}", f"input={mixed / 'a,b.mp4'}", "workers=1", "output=o.jsonl"
    )
    assert one.code == 0, one.err


def test_a_checkpoint_describes_itself_in_plain_values(trained):
    run, _ = trained
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["vidtrain"]
    assert saved["version"] and saved["fingerprint"]
    assert saved["label_names"] == ["apple", "it's (a) pear", "zebra"]
    assert saved["config"]["model"]["num_classes"] == 3
    assert saved["template"]["model"]["num_classes"] == "${data.num_classes}"


EVIL = {"_target_": "builtins.open", "_args_": ["owned", "w"]}


def model_is(target):
    def change(config, template):
        for one in (config, template):
            one["model"] = {"_target_": target, "command": "touch owned"}

    return change


def hidden_in_the_model(how):
    def change(config, template):
        for one in (config, template):
            one["evil"], one["model"]["backbone"] = EVIL, how

    return change


def hidden_in_the_views(config, template):
    for one in (config, template):
        one["views"]["short_side"] = EVIL


@pytest.mark.parametrize(
    "change",
    [
        model_is("os.system"),
        model_is("vidtrain.commands.train.main"),
        model_is("vidtrain.data.module.os.system"),
        model_is("torch.hub.load"),
        hidden_in_the_model("${evil}"),
        hidden_in_the_model("\\${evil}"),
        hidden_in_the_views,
    ],
)
def test_a_foreign_checkpoint_constructs_nothing(trained, vidtrain, tmp_path, change):
    run, _ = trained
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    change(saved["vidtrain"]["config"], saved["vidtrain"]["template"])
    torch.save(saved, tmp_path / "evil.ckpt")
    write_video(tmp_path / "x.mp4", num_frames=12)
    results = [
        vidtrain("predict", "input=x.mp4", "ckpt=evil.ckpt", "workers=0"),
        vidtrain("test", "ckpt=evil.ckpt", "trainer=cpu"),
    ]
    assert any(result.code == 2 for result in results)
    for result in results:
        assert result.code == 0 or "does not ship" in result.err or "interpolation" in result.err
    assert not list(tmp_path.rglob("owned"))


def test_code_in_a_checkpoint_is_not_run_and_torn_files_are_named(trained, vidtrain, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"vidtrain": Evil()}, tmp_path / "evil.ckpt")
    result = vidtrain("test", "ckpt=evil.ckpt")
    assert result.code == 2 and "never code" in result.err
    assert not (tmp_path / "owned").exists()
    whole = (trained[0] / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "torn.ckpt").write_bytes(whole[: len(whole) // 2])
    assert "is it complete" in vidtrain("test", "ckpt=torn.ckpt").err
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "does not describe itself" in vidtrain("test", "ckpt=other.ckpt").err


def test_bad_videos_are_counted_in_training_and_named_in_testing(vidtrain, tiny_dataset, tmp_path):
    import shutil

    root = tmp_path / "videos"
    shutil.copytree(tiny_dataset, root)
    (root / "train" / "zebra" / "0.mp4").write_bytes(b"")
    (root / "test" / "apple" / "1.mp4").write_text("not a video")
    result = vidtrain(
        "train",
        *TINY,
        f"data.root={root}",
        "trainer.max_epochs=1",
        "test=true",
        "data.max_failures=0.5",
    )
    assert result.code == 0, result.err
    assert "zebra/0.mp4" in result.err
    run = only("runs/*/*", tmp_path)
    steps = read_csv(run / "metrics.csv")
    assert [float(row["data/failures"]) for row in steps if row.get("data/failures")] == [1.0]
    report = json.loads((run / "report.json").read_text())
    assert report["videos"]["asked"] == 6 and report["videos"]["scored"] == 5
    assert report["videos"]["failed"][0]["path"].endswith("apple/1.mp4")
    assert "5 of 6 videos" in result.out

    strict = vidtrain(
        "train",
        *TINY,
        f"data.root={root}",
        "trainer.max_epochs=1",
        "data.on_error=raise",
        "data.workers=1",
    )
    assert strict.code == 2 and "zebra/0.mp4" in strict.err
    strict = vidtrain(
        "train", *TINY, f"data.root={root}", "trainer.max_epochs=1", "data.max_failures=0.01"
    )
    assert strict.code == 2 and "data.max_failures" in strict.err


def test_weights_can_start_another_run_with_other_classes(
    trained, vidtrain, tiny_dataset, tmp_path
):
    import shutil

    two = tmp_path / "two"
    shutil.copytree(tiny_dataset, two, ignore=shutil.ignore_patterns("zebra"))
    result = vidtrain(
        "train", *TINY, f"data.root={two}", "trainer.max_epochs=1", f"ckpt={trained[0]}"
    )
    assert result.code == 0, result.err
    assert "has 3 classes, the data 2" in result.out and "new here: " in result.out
    other = vidtrain("train", *TINY, f"data.root={two}", "model=single_frame", f"ckpt={trained[0]}")
    assert other.code == 2 and "does not fit" in other.err and "is it the right model" in other.err


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_after", [2, 6, 9])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    vidtrain, tiny_dataset, tmp_path, monkeypatch, stop_after, workers
):
    """Six steps an epoch: stopped inside the first, at its end, and inside the second."""
    from vidtrain.callbacks import checkpoint

    line = [
        *TINY,
        f"data.root={tiny_dataset}",
        "trainer.max_epochs=3",
        f"data.workers={workers}",
        "augment=resized",
    ]
    assert vidtrain("train", *line, "paths.runs=whole").code == 0

    check = checkpoint.Checkpoint._stop_if_asked

    def stop(self, trainer):
        if trainer.global_step == stop_after and trainer.training:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        check(self, trainer)

    monkeypatch.setattr(checkpoint.Checkpoint, "_stop_if_asked", stop)
    stopped = vidtrain("train", *line, "paths.runs=parts")
    assert stopped.code == 130, stopped.err
    assert f"after step {stop_after}" in stopped.out
    monkeypatch.setattr(checkpoint.Checkpoint, "_stop_if_asked", check)
    again = vidtrain("train", *line, "paths.runs=parts", "resume=auto")
    assert again.code == 0, again.err
    assert "going on with" in again.out
    whole, parts = only("whole/*/*", tmp_path), only("parts/*/*", tmp_path)
    ours, theirs = weights(whole), weights(parts)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("validated", [True, False])
def test_a_finished_run_can_be_given_more_epochs(vidtrain, tiny_dataset, tmp_path, validated):
    line = [*TINY, f"data.root={tiny_dataset}", "optim.schedule=constant", "optim.warmup=0"]
    line += [] if validated else ["trainer.limit_val_batches=0"]
    assert vidtrain("train", *line, "paths.runs=whole", "trainer.max_epochs=3").code == 0
    assert vidtrain("train", *line, "paths.runs=parts", "trainer.max_epochs=1").code == 0
    run = only("parts/*/*", tmp_path)
    more = vidtrain("train", *line, "paths.runs=parts", "trainer.max_epochs=3", f"resume={run}")
    assert more.code == 0, more.err
    ours, theirs = weights(only("whole/*/*", tmp_path)), weights(only("parts/*/*", tmp_path))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(list((run / "checkpoints").glob("epoch_*.ckpt"))) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_a_checkpoint_and_give_the_right_exit_code(
    tiny_dataset, tmp_path, number, code
):
    env = {**os.environ, "VIDTRAIN_CACHE": str(tmp_path / "cache")}
    line = [*TINY, f"data.root={tiny_dataset}", "trainer.max_epochs=1000", "data.workers=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vidtrain", "train", *line],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith("epoch 2/"):
            break
    os.killpg(process.pid, number)  # the whole group, as a terminal does
    out = process.communicate(timeout=60)[0]
    assert process.returncode == code, out
    assert "Traceback" not in out and "resume=" in out
    assert (only("runs/*/*", tmp_path) / "checkpoints" / "last.ckpt").is_file()


def test_resume_auto_takes_only_an_unfinished_run_like_this_one(vidtrain, tiny_dataset, tmp_path):
    line = [
        *TINY,
        f"data.root={tiny_dataset}",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=1",
    ]
    assert vidtrain("train", *line).code == 0
    done = vidtrain("train", *line, "resume=auto")
    assert done.code == 0 and "starting anew" in done.out  # the run there is has finished
    more = vidtrain("train", *line[:-2], "trainer.max_epochs=2", "optim.lr=0.02", "resume=auto")
    assert more.code == 0 and "starting anew" in more.out  # another recipe is another run
    missing = vidtrain("train", *line, "resume=nowhere")
    assert missing.code == 2 and "nowhere" in missing.err
    run = sorted(tmp_path.glob("runs/*/*"))[0]
    other = vidtrain("train", *line, f"resume={run}", "clip.size=40")
    assert other.code == 2 and "another" in other.err


def test_several_labels(vidtrain, tiny_dataset, tmp_path):
    table = tmp_path / "videos.csv"
    with table.open("w") as file:
        file.write("path,label,split\n")
        for path in sorted(tiny_dataset.rglob("*.mp4")):
            split, label = path.relative_to(tiny_dataset).parts[:2]
            labels = {"apple": "red|warm", "zebra": "blue"}.get(label, "green|warm")
            file.write(f"{path.relative_to(tiny_dataset)},{labels},{split}\n")
    result = vidtrain(
        "train", *TINY, f"data.root={tiny_dataset}", f"data.annotations={table}", "data.multi_label=true",
        "trainer.max_epochs=4", "test=true",
    )  # fmt: skip
    assert result.code == 0, result.err
    report = json.loads((only("runs/*/*", tmp_path) / "report.json").read_text())
    assert report["metrics"]["test/mAP"] > 0.9 and report["metrics"]["test/hit1"] == 1.0
    assert report["label_names"] == ["blue", "green", "red", "warm"]


def test_a_sweep_runs_every_job(vidtrain, tiny_dataset, tmp_path):
    result = vidtrain(
        "train",
        "-m",
        *TINY,
        f"data.root={tiny_dataset}",
        "trainer.max_epochs=1",
        "optim.lr=0.01,0.001",
    )
    assert result.code == 0, result.err
    assert len(list(tmp_path.glob("runs/sweep/*/*/checkpoints/last.ckpt"))) == 2


@pytest.mark.parametrize("model", ["early_fusion", "late_fusion", "slow_fusion", "single_frame"])
def test_every_fusion_trains(vidtrain, tiny_dataset, tmp_path, model):
    line = [word for word in TINY if not word.startswith(("model", "clip"))]
    clip = ["clip.num_frames=1", "clip.stride=1"] if model == "single_frame" else ["clip.stride=1"]
    result = vidtrain(
        "train", *line, f"model={model}", "model.backbone=small", *clip, "clip.size=32",
        f"data.root={tiny_dataset}", "debug=fast",
    )  # fmt: skip
    assert result.code == 0, result.err


@pytest.mark.slow
def test_two_ranks_train_and_score_every_video_once(tiny_dataset, tmp_path):
    line = [*TINY, f"data.root={tiny_dataset}", "trainer.max_epochs=2", "test=true"]
    line += ["trainer.devices=2", "trainer.strategy=ddp", f"paths.cache={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "vidtrain", "train", *line],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1  # one rank speaks
    run = only("runs/*/*", tmp_path)
    report = json.loads((run / "report.json").read_text())
    assert report["videos"] == {"asked": 6, "scored": 6, "failed": []}
    rows = read_csv(run / "predictions.csv")
    assert len({row["path"] for row in rows}) == len(rows) == 6


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_the_second_epoch_of_a_cached_set_decodes_nothing(
    vidtrain, tiny_dataset, tmp_path, monkeypatch, kind
):
    from vidtrain.data import sources

    opened, opener = [], sources.open_video
    monkeypatch.setattr(
        sources,
        "open_video",
        lambda path, *a, **k: opened.append(str(path)) or opener(path, *a, **k),
    )
    data = [*TINY, f"data.root={tiny_dataset}", f"data.cache={kind}", f"paths.cache={tmp_path}/c"]
    out = vidtrain("train", *data, "trainer.max_epochs=3")
    assert out.code == 0, out.err
    assert len(opened) == len(set(opened)) == 24 + 6  # training and validation, each once
    opened.clear()
    again = vidtrain("train", *data, "trainer.max_epochs=1", "test=true")
    assert "on 6 of 6 videos" in again.out
    assert len(opened) == (6 if kind == "disk" else 24 + 6 + 6)  # kept from run to run, or not


def test_scores_do_not_depend_on_whether_frames_fit_in_memory(trained, vidtrain, tmp_path):
    scores = []
    run, _ = trained
    for memory in (512, 0):
        out = vidtrain(
            "test", f"ckpt={run}", f"views.memory={memory}", "views.clips=7",
            f"output={tmp_path / str(memory)}", f"paths.cache={tmp_path}/c", "data.workers=1",
        )  # fmt: skip
        assert out.code == 0, out.err
        scores.append((tmp_path / str(memory) / "predictions.csv").read_text())
    assert scores[0] == scores[1]


def test_an_epoch_cut_short_by_max_steps_is_no_mistake(vidtrain, tiny_dataset):
    done = vidtrain("train", *TINY, f"data.root={tiny_dataset}", "trainer.max_steps=2", "test=true")
    assert done.code == 0, done.err
    assert "test/top1" in done.out


@pytest.mark.slow  # compiling takes a minute
def test_a_compiled_network_learns_the_same_and_is_saved_as_any(vidtrain, tiny_dataset, tmp_path):
    words = [*TINY, f"data.root={tiny_dataset}", "trainer.max_epochs=1", "data.drop_last=true"]
    words += ["optim=sgd_cosine", "optim.lr=0.05"]  # AdamW's first steps make much of rounding
    states = []
    for folder, compiled in (("plain", False), ("fused", True)):
        more = (f"compile={compiled}", f"paths.runs={folder}", "test=true")
        done = vidtrain("train", *words, *more)
        assert done.code == 0, done.err
        (line,) = [line for line in done.out.splitlines() if line.startswith("on CPU, precision")]
        assert (", compiled:" in line) == compiled
        states.append(weights(only(f"{folder}/*/*", tmp_path)))
    assert list(states[0]) == list(states[1])
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux")
def test_a_run_leaves_nothing_behind_in_its_process(vidtrain, tiny_dataset):
    """The next job of a sweep would have less memory."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    gc.collect()  # of the tests before
    before = Path("/proc/self/maps").read_text().count("memfd:vidtrain")
    done = vidtrain(
        "train", *TINY, f"data.root={tiny_dataset}", "trainer.max_epochs=1", "data.workers=1"
    )
    assert done.code == 0, done.err
    gc.collect()
    assert Path("/proc/self/maps").read_text().count("memfd:vidtrain") == before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
