"""`vidtrain bench`: what it advises from numbers, how it measures, and what it prints."""

import dataclasses
import itertools
import json
import shutil
import time

import numpy as np
import pytest
import torch

from vidtrain.commands.bench import Measured, advise
from vidtrain.data.timing import (
    Endless,
    Watched,
    consume,
    decoded_frames,
    decoded_frames_at,
    time_samples,
)
from vidtrain.types import Failure

# Four workers on sixteen cores feed a GPU that takes 2 ms a clip: 20 / 4 = 5 ms, 2.5 times too long.
SLOW = Measured(
    decode_ms=16, storage_ms=0, worker_ms=20, auto_worker_ms=None, loader_ms=5,
    transfer_ms=0.1, device_ms=0.1, model_ms=1.8, together_ms=5.1, data_wait=0.6, batch_clips=8,
    workers=4, cores=16, repeats=1, decoder="auto", cache="none", samples=100, index_known=1,
    from_cache=0, short_side=256, frames_wanted=16, frames_decoded=70, frames_decoded_resized=70,
    needed_side=256, set_gb=5000, cache_gb=16, ram_gb=40, disk_gb=200, failures=[],
)  # fmt: skip


def changes(**other):
    """What is advised when some of the numbers are others, with the gains."""
    return {one.change: one.gain for one in advise(dataclasses.replace(SLOW, **other))}


def test_idle_cores_get_workers_up_to_what_the_device_takes():
    assert SLOW.limits == "data" and SLOW.step_ms == pytest.approx(2) and SLOW.efficiency == 1
    assert changes() == {"data.workers=10": 2.5}  # 10 x 2 ms = 20 ms of work


def test_no_more_workers_than_cores():
    few = changes(cores=6)
    assert few["data.workers=6"] == 1.5
    assert few["augment.repeats=2"] == 1.67  # 20 ms -> 12 ms: half of decoding serves another clip
    assert not any("workers" in change for change in changes(cores=4))


def test_who_waits_for_files_leaves_the_core_to_others():
    slow_files = changes(storage_ms=30, loader_ms=12.5, cores=4)
    assert slow_files["data.workers=10"] == 2.5  # four cores' worth of work: 10 x 20 / 50
    local = next(change for change in slow_files if "action=pack" in change)
    assert slow_files[local] == 2.5  # 12.5 ms -> 5 ms


def test_where_the_model_limits_nothing_is_to_be_gained():
    busy = dataclasses.replace(SLOW, model_ms=20, frames_decoded=250, set_gb=1, storage_ms=15)
    assert busy.limits == "model" and advise(busy) == []


def test_without_workers_loading_comes_on_top_of_the_step():
    alone = {"workers": 0, "loader_ms": 20}
    assert changes(**alone)["data.workers=10"] == 11  # (20 + 2) / 2
    assert changes(**alone, model_ms=40) == {"data.workers=1": 1.5}  # (20 + 40.2) / 40.2


def test_far_keyframes_and_large_frames_ask_for_a_resize():
    far = changes(frames_decoded=280)
    assert far["vidtrain data action=resize"] == 2.5  # 16 -> 4 ms of 20: as fast as the device
    assert changes(frames_decoded=280, decode_ms=10)["vidtrain data action=resize"] == 1.6
    assert "vidtrain data action=resize" in changes(short_side=1080)
    assert "vidtrain data action=resize" not in changes(short_side=280, frames_decoded=80)
    assert "vidtrain data action=resize" not in changes(frames_decoded=0, frames_decoded_resized=0)


def test_a_set_that_fits_is_cached_where_it_fits():
    assert changes(set_gb=8)["data.cache=ram"] == 2.5
    assert changes(set_gb=30)["data.cache=ram data.cache_gb=33"] == 2.5
    assert changes(set_gb=95)["data.cache=disk data.cache_gb=105"] == 2.5
    assert not any("cache" in change for change in changes(set_gb=300))
    full = changes(set_gb=30, cache="ram", from_cache=1)
    assert full["raise data.cache_gb, 16 now"] is None


def test_a_slower_decoder_is_named_with_what_was_measured():
    assert changes(decoder="decord", auto_worker_ms=10)["data.decoder=auto"] == 2
    assert "data.decoder=auto" not in changes(decoder="torchcodec", auto_worker_ms=19.8)


def test_failures_come_first_and_gains_in_order():
    found = dataclasses.replace(
        SLOW, cores=6, set_gb=8, failures=[Failure(3, "/videos/bad.mp4", "empty file")]
    )
    first, *others = advise(found)
    assert first.change == "vidtrain data action=check" and "/videos/bad.mp4" in first.why
    gains = [one.gain for one in others]
    assert len(gains) == 3 and gains == sorted(gains, reverse=True)


def test_batches_go_on_past_an_epoch_and_are_full():
    batches = list(itertools.islice(iter(Endless([5, 6, 7], 4, seed=0)), 3))
    assert [len(batch) for batch in batches] == [4, 4, 4]
    rows = [row for batch in batches for row, _ in batch]
    assert all(sorted(rows[i : i + 3]) == [5, 6, 7] for i in range(0, 12, 3))
    assert len({seed for batch in batches for _, seed in batch}) == 12


def test_bursts_are_measured_whole_and_waiting_is_told_from_work():
    def bursts():  # two workers, two batches every 40 ms
        for number in itertools.count():
            if number % 2 == 0:
                time.sleep(0.04)
            yield {"failures": [number], "video": torch.zeros(3, 2, 1)}

    idle = consume(bursts(), lambda batch: None, 0.05, crew=2)
    assert idle.ms == pytest.approx(40 / 12, rel=0.3)  # 2 batches x 3 videos x 2 clips
    assert idle.wait > 0.9 and len(idle.failures) % 2 == 0
    busy = consume(bursts(), lambda batch: time.sleep(0.06), 0.1, crew=2)
    assert busy.ms == pytest.approx(160 / 12, rel=0.3)
    assert busy.wait == pytest.approx(0.25, abs=0.1)


@pytest.fixture
def dataset(compose, tiny_dataset, tmp_path):
    from vidtrain import build

    words = ("model=toy_3d_cnn", "data=folder", f"data.root={tiny_dataset}", "data.num_classes=3")
    data = build.data(compose("bench", *words, f"paths.cache={tmp_path}"))
    made = data.dataset("train", training=True)
    return made, data.sources


def test_decoding_is_a_part_of_the_samples_time(dataset):
    made, sources = dataset
    plain = [made[row, 7]["video"] for row in range(len(made))]
    first = time_samples(made, sources, ((row, 7) for row in itertools.count() if row < 24), 1e-9)
    assert isinstance(first, Watched) and first.clips == len(first.read) == 1
    keys = itertools.cycle((row, 7) for row in range(len(made)))
    found = time_samples(made, sources, keys, 0.2)
    assert found.clips == len(found.read) > 1
    for less, more in ((0, found.decode), (found.decode, found.total)):
        assert (np.array(less) < more).all()
    assert not found.new and all(one.cached is False for one in found.read)
    assert {(one.height, one.width) for one in found.read} == {(48, 64)}
    again = [made[row, 7]["video"] for row in range(len(made))]  # watched, it is the same sample
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_what_is_decoded_is_counted(tmp_path):
    from make_video import write_video

    from vidtrain.data.decode import open_video

    path = tmp_path / "long.mp4"
    write_video(path, num_frames=100, size=(64, 48), gop=40, b_frames=0)
    with open_video(path) as reader:
        assert decoded_frames(reader.index, [50, 54]) == 15  # 40 to 54
        assert decoded_frames(reader.index, [10, 50]) == 11 + 11
        assert decoded_frames(reader.index, [39]) == 40
    assert decoded_frames_at(40, [50, 54]) == 15 and decoded_frames_at(40, [10, 50]) == 22
    assert decoded_frames_at(10, [50, 54]) == 5


def run(vidtrain, root, *words):
    return vidtrain(
        "bench", "model=toy_3d_cnn", "data=folder", f"data.root={root}", "trainer=cpu",
        "clip.num_frames=4", "clip.size=32", "seconds=0.1", *words,
    )  # fmt: skip


def test_json_is_one_object_with_every_time(vidtrain, tiny_dataset, tmp_path):
    result = run(vidtrain, tiny_dataset, "data.workers=2", "format=json")
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    report = json.loads(result.out)
    times = ["decode_ms", "worker_ms", "loader_ms", "device_ms", "model_ms", "together_ms"]
    assert all(report[key] > 0 for key in times) and report["transfer_ms"] is None
    assert report["decode_ms"] < report["worker_ms"]
    assert report["limits"] in ("data", "model") and 0 <= report["data_wait"] <= 1
    assert report["batch_clips"] == 8 and report["workers"] == 2 and report["failures"] == []
    assert all(set(one) == {"change", "why", "gain"} for one in report["advice"])
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # no run


def test_table_shows_every_part_and_what_limits(vidtrain, tiny_dataset):
    result = run(vidtrain, tiny_dataset, "data.workers=0", "data.batch_size=100")
    assert result.code == 0, result.err
    parts = ("decode", "worker", "loader", "transfer", "device", "model", "together")
    lines = result.out.splitlines()
    for part in parts:
        assert any(line.startswith(f"│ {part} ") for line in lines), part
    assert "24 clips a batch" in result.out and "data.workers is 0" in result.out
    assert "limits: " in result.out and "…" not in result.out


def test_with_a_cache_it_is_the_cached_frames_that_are_timed(vidtrain, tiny_dataset):
    result = run(
        vidtrain, tiny_dataset, "data.workers=1", "data.cache=ram", "augment.repeats=2",
        "data.decoder=pyav", "seconds=0.5", "format=json",
    )  # fmt: skip
    report = json.loads(result.out)
    assert report["from_cache"] == 1 and report["frames_decoded"] == 0
    assert report["auto_worker_ms"] > 0 and report["repeats"] == 2
    assert "measuring: cache" in result.err


def test_files_that_cannot_be_read_are_named(vidtrain, tiny_dataset, tmp_path):
    root = tmp_path / "some"
    shutil.copytree(tiny_dataset, root)
    for number in range(5):
        (root / "train" / "apple" / f"{number}.mp4").write_bytes(b"no video")
    result = run(vidtrain, root, "data.workers=0", "seconds=0.3")
    assert result.code == 0, result.err
    assert "vidtrain data action=check" in result.out
    assert f"cannot be read: {root / 'train' / 'apple'}" in result.out


@pytest.mark.gpu
def test_on_a_gpu_moving_is_timed_as_well(vidtrain, tiny_dataset):
    for precision in ("bf16-mixed", "16-mixed", "32-true"):
        words = ("trainer=gpu", f"trainer.precision={precision}", "format=json")
        report = json.loads(run(vidtrain, tiny_dataset, *words).out)
        assert report["transfer_ms"] > 0 and report["precision"] == precision


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seconds=0", "seconds is 0; it must be a number, more than 0"),
        ("seconds=soon", "seconds is 'soon'; it must be a number, more than 0"),
        ("format=yaml", "format is 'yaml'; it must be one of table, json"),
        ("second=3", "no setting 'second'; did you mean 'seconds'?"),
    ],
)
def test_a_mistake_is_one_line(vidtrain, tiny_dataset, word, message):
    result = run(vidtrain, tiny_dataset, word)
    assert result.code == 2 and message in result.err
    assert result.err.count("\n") == 1 and not result.out


def test_without_training_videos_there_is_nothing_to_measure(vidtrain, tiny_dataset, tmp_path):
    root = tmp_path / "tests only"
    shutil.copytree(tiny_dataset / "test", root / "test")
    result = run(vidtrain, root)
    assert result.code == 2 and "has no 'train' split; it has test (6)" in result.err
