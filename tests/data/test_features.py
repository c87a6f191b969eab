"""`data=features`: which features a sample holds, how tables are read, and that a network learns."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vidtrain import build
from vidtrain.data.collate import collate
from vidtrain.data.dataset import Files
from vidtrain.data.features import FeatureDataset, FeatureFile
from vidtrain.data.manifest import Manifest
from vidtrain.data.prepare.features import prepare
from vidtrain.data.transforms.sample import Augment
from vidtrain.types import Clip, DecodeError, UserError


def clip_of(num_frames: int, stride: int = 1, fps: float | None = None) -> Clip:
    return Clip(num_frames, stride, 1, (0, 0, 0), (1, 1, 1), fps)


def counting(path: Path, count: int, dim: int = 3, dtype: str = "float16") -> Path:
    """Write features of which number i is i everywhere."""
    np.save(path, np.repeat(np.arange(count)[:, None], dim, 1).astype(dtype))
    return path


def write_set(root: Path, rows: list[dict[str, object]], classes: list[str] | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with (root / "features.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if classes is not None:
        (root / "classes.json").write_text(json.dumps(classes))
    return root


@pytest.fixture
def small_set(tmp_path):
    """Six files of three classes whose order is not the alphabet's."""
    root = tmp_path / "set"
    root.mkdir()
    rows = []
    for number, label in enumerate(["zebra", "ant", "mule"] * 2):
        counting(root / f"{number}.npy", 10 + number)
        split = "train" if number < 3 else "test"
        rows.append({"path": f"{number}.npy", "label": label, "split": split, "rate": 2.5})
    return write_set(root, rows, ["zebra", "ant", "mule"])


# which features


def test_a_training_stretch_is_contiguous_and_anywhere(tmp_path):
    path = counting(tmp_path / "a.npy", 40)
    dataset = FeatureDataset(Files([path]), clip_of(8), augment=Augment())
    starts = set()
    for seed in range(300):
        sample = dataset[0, seed]
        features = sample["features"]
        assert features.shape == (1, 3, 8) and features.dtype == torch.float32
        numbers = features[0, 0].long().tolist()
        assert numbers == list(range(numbers[0], numbers[0] + 8))
        starts.add(numbers[0])
    assert min(starts) == 0 and max(starts) == 32 and len(starts) == 33
    assert torch.equal(dataset[0, 7]["features"], dataset[0, 7]["features"])


def test_stride_and_repeats_count_as_they_do_for_frames(tmp_path):
    path = counting(tmp_path / "a.npy", 40)
    dataset = FeatureDataset(Files([path]), clip_of(4, stride=5), augment=Augment(repeats=3))
    features = dataset[0, 1]["features"]
    assert features.shape == (3, 3, 4)
    assert (features[:, 0].diff() == 5).all()


def test_under_test_stretches_are_spread_evenly(tmp_path):
    path = counting(tmp_path / "a.npy", 20)
    dataset = FeatureDataset(Files([path]), clip_of(4), clips=3)
    assert dataset[0, 0]["features"][:, 0, 0].tolist() == [0, 8, 16]


def test_segments_cover_a_long_video(tmp_path):
    path = counting(tmp_path / "a.npy", 1000)
    evenly = FeatureDataset(Files([path]), clip_of(10), how="segments")
    assert evenly[0, 0]["features"][0, 0].tolist() == [50 + 100 * k for k in range(10)]
    drawn = FeatureDataset(Files([path]), clip_of(10), how="segments", augment=Augment())
    numbers = drawn[0, 5]["features"][0, 0]
    assert (numbers // 100).tolist() == list(range(10))
    assert not torch.equal(numbers, drawn[0, 6]["features"][0, 0])


@pytest.mark.parametrize(
    ("past_end", "numbers"), [("hold", [0, 1, 2, 2, 2]), ("loop", [0, 1, 2, 0, 1])]
)
def test_a_short_video_holds_or_loops(tmp_path, past_end, numbers):
    path = counting(tmp_path / "a.npy", 3)
    dataset = FeatureDataset(Files([path]), clip_of(5), past_end=past_end)
    assert dataset[0, 0]["features"][0, 0].tolist() == numbers


def test_samples_become_a_batch(small_set, compose):
    data = module(compose, small_set, "clip.num_frames=4")
    dataset = data.dataset("train", training=True)
    batch = data.transform(collate([dataset[row, row] for row in range(3)]))
    assert batch["features"].shape == (3, 1, 3, 4)
    assert batch["label"].tolist() == [0, 1, 2]
    assert batch["fps"] == [2.5, 2.5, 2.5]


# tables


def module(compose, root, *overrides):
    words = ("model=cnn_lstm", "data=features", f"data.root={root}", *overrides)
    cfg = compose("train", *words, f"paths.cache={root.parent / 'cache'}", "data.workers=0")
    return build.data(cfg)


def test_classes_keep_the_numbers_of_the_videos(small_set):
    made = prepare(small_set)
    assert made.label_names == ["zebra", "ant", "mule"]
    assert made.rows["labels"].to_pylist() == [[0], [1], [2]] * 2
    (small_set / "classes.json").unlink()
    assert prepare(small_set).label_names == ["ant", "mule", "zebra"]


def test_a_class_of_which_there_is_no_file_keeps_its_place(small_set):
    (small_set / "classes.json").write_text('["zebra", "none of it", "mule", "ant"]')
    made = prepare(small_set)
    assert made.label_names == ["zebra", "none of it", "mule", "ant"]
    assert made.rows["labels"].to_pylist()[:3] == [[0], [3], [2]]


def test_many_labels_a_file(tmp_path):
    root = tmp_path / "many"
    root.mkdir()
    counting(root / "0.npy", 5)
    rows = [{"path": "0.npy", "label": "b|c", "split": "train"}]
    write_set(root, rows, ["a", "b", "c"])
    assert prepare(root, multi_label=True).rows["labels"].to_pylist() == [[1, 2]]


def test_the_manifest_knows_splits_and_rates(small_set, compose):
    data = module(compose, small_set)
    assert data.manifest.splits == {"train": 3, "test": 3}
    assert isinstance(data.manifest, Manifest)
    assert data.manifest.row(0).rate == 2.5 and data.label_names == ["zebra", "ant", "mule"]
    assert data.views["crops"] == 1


def test_span_and_fps_are_counted_by_the_rate(small_set, compose):
    data = module(compose, small_set, "clip.num_frames=2", "data.span=[2,3.6]")
    features = data.dataset("test")[0, 0]["features"]  # 2.5 a second: 5 to 8
    assert features[0, 0].tolist() == [6, 7]
    data = module(compose, small_set, "clip.num_frames=3", "clip.fps=0.5")
    features = data.dataset("test", test_views=True)[2, 0]["features"]
    assert (features[0, 0].diff() == 5).all()


def test_what_is_wrong_with_a_set_is_said(small_set, compose, tmp_path):
    with pytest.raises(UserError, match=r"there is no features\.csv in data\.root="):
        prepare(tmp_path)
    with pytest.raises(UserError, match=r"is not a folder; it should hold what `vidtrain extract`"):
        prepare(tmp_path / "nowhere")
    (small_set / "classes.json").write_text('["zebra", "ant"]')
    with pytest.raises(UserError, match=r"classes\.json does not name all classes"):
        prepare(small_set)
    (small_set / "classes.json").unlink()
    with pytest.raises(UserError, match=r"mixup and augment\.cutmix are for frames"):
        module(compose, small_set, "augment.mixup=0.2")
    with pytest.raises(UserError, match="the model takes video, and features has features"):
        module(compose, small_set).feed(("video",))
    with pytest.raises(UserError, match=r"the column 'rate'.*clip\.fps=null"):
        FeatureDataset(Files([small_set / "0.npy"]), clip_of(2, fps=5))[0, 0]


def test_a_model_of_features_on_videos_is_refused(compose):
    data = build.data(compose("train", "model=c3d", "data=demo"))
    with pytest.raises(UserError, match="the model takes features, and demo has videos"):
        data.feed(("features",))


# files that are no features


def test_a_file_that_is_none_is_a_failure(tmp_path):
    good = counting(tmp_path / "good.npy", 9)
    (tmp_path / "text.npy").write_text("hello")
    np.save(tmp_path / "maps.npy", np.zeros((4, 3, 2, 7, 7), "f4"))
    np.save(tmp_path / "nan.npy", np.full((9, 3), np.nan, "f4"))
    np.save(tmp_path / "wide.npy", np.zeros((9, 5), "f4"))
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "empty.npy", np.zeros((0, 3), "f4"))
    reasons = {
        "text": "", "maps": "it holds (4, 3, 2, 7, 7)", "nan": "not finite",
        "wide": "a feature of it has 5 numbers, of the others 3", "gone": "No such file",
        "objects": "Python objects", "empty": "it has no frames",
    }  # fmt: skip
    for name, reason in reasons.items():
        files = Files([good, tmp_path / f"{name}.npy"])
        (failure,) = FeatureDataset(files, clip_of(4))[1, 0]["failures"]
        assert failure.row == 1 and reason in failure.reason, (name, failure)
        sample = FeatureDataset(files, clip_of(4), augment=Augment())[1, 0]
        assert sample["index"] == 0 and len(sample["failures"]) >= 1  # another stands in for it
    with pytest.raises(UserError, match="on_error=skip"):
        FeatureDataset(files, clip_of(4), on_error="raise")[1, 0]


def test_only_what_is_asked_for_is_read(tmp_path):
    file = FeatureFile(str(counting(tmp_path / "a.npy", 100_000, 3, "float32")))
    assert isinstance(file.rows, np.memmap) and len(file) == 100_000
    with pytest.raises(DecodeError, match=r"none\.npy"):
        FeatureFile(str(tmp_path / "none.npy"))


def test_a_network_learns_the_order_of_features(vidtrain, tmp_path):
    """Two classes with the same features in opposite orders, on the command line."""
    rng = np.random.default_rng(0)
    root, rows = tmp_path / "order", []
    root.mkdir()
    for number in range(72):
        label = number % 2
        values = np.linspace(-2, 2, 24)[:, None] * np.ones(6) + rng.normal(0, 0.3, (24, 6))
        np.save(root / f"{number}.npy", (values[::-1] if label else values).astype("f4"))
        split = "train" if number < 48 else "test"
        rows.append({"path": f"{number}.npy", "label": ["up", "down"][label], "split": split})
    write_set(root, rows)
    result = vidtrain(
        "train", "model=cnn_lstm", "data=features", f"data.root={root}", "model.features=6",
        "model.hidden=16", "model.dropout_features=0", "model.dropout=0", "clip.num_frames=12",
        "optim=adamw_cosine", "optim.lr=0.03", "data.batch_size=16", "data.workers=0",
        "trainer=cpu", "trainer.max_epochs=12", "logger=none", "test=true",
    )  # fmt: skip
    assert result.code == 0, result.err
    (report,) = tmp_path.glob("runs/*/*/report.json")
    found = json.loads(report.read_text())
    assert found["metrics"]["test/top1"] > 0.9
    assert found["protocol"]["crops"] == 1 and found["videos"]["scored"] == 24
    assert found["label_names"] == ["down", "up"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "action=check"], "action=check is for videos, and data=features has features"),
        (["bench", "model=cnn_lstm"], "bench times videos, and data=features has features"),
    ],
)
def test_what_is_only_for_videos_says_so(vidtrain, small_set, words, message):
    result = vidtrain(*words, "data=features", f"data.root={small_set}")
    assert result.code == 2 and message in result.err
