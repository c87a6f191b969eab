"""From a row to a sample: which frames come out, read from the frames themselves."""

import gc
import pickle

import numpy as np
import pytest
import torch
from make_video import read_numbers, write_video

from vidtrain.data.cache import FrameCache
from vidtrain.data.collate import collate
from vidtrain.data.dataset import VideoDataset
from vidtrain.data.decode import open_video
from vidtrain.data.indices import IndexStore
from vidtrain.data.manifest import Row
from vidtrain.data.sources import Sources
from vidtrain.data.spill import Spill, here
from vidtrain.data.transforms import sample as geometry
from vidtrain.data.transforms.device import DeviceTransform, gather_views
from vidtrain.data.transforms.sample import Augment
from vidtrain.types import Clip, DecodeError, Failure, UserError

CLIP = Clip(num_frames=4, stride=3, size=96, mean=[0.5] * 3, std=[0.5] * 3)


class Rows:
    """Rows of files, as a split of a manifest gives them."""

    def __init__(self, *rows: Row) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        return self.rows[index]

    def location(self, row: Row) -> str:
        return row.path


def row(path, labels=(1,), start=None, end=None):
    return Row(str(path), labels, start, end, "train", None)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "wide.mp4", num_frames=40, fps=20, size=(160, 96))
    write_video(folder / "square.mp4", num_frames=40, fps=20, size=(96, 96))
    (folder / "empty.mp4").write_bytes(b"")
    return folder


def test_testing_views_are_the_uniform_clips_and_each_frame_comes_once(videos):
    dataset = VideoDataset(Rows(row(videos / "wide.mp4")), CLIP, clips=3, crops=3)
    sample = dataset[0, 0]
    clips = [[0, 3, 6, 9], [15, 18, 21, 24], [30, 33, 36, 39]]
    assert read_numbers(sample["frames"]) == [number for clip in clips for number in clip]
    assert sample["frames"].shape == (12, 3, 96, 160)
    assert sample["view_frames"].shape == (9, 4) and sample["view_crops"].shape == (9, 3)
    assert sample["view_crops"][:3].tolist() == [[0, 0, 96], [0, 32, 96], [0, 64, 96]]
    views = gather_views(sample["frames"], sample["view_frames"], sample["view_crops"])
    assert views.shape == (9, 4, 3, 96, 96)
    assert torch.equal(views[4], sample["frames"][4:8, :, :, 32:128])  # clip 1, middle crop
    assert sample["fps"] == pytest.approx(20 / 3)
    assert sample["label"].item() == 1


def test_overlapping_clips_share_their_frames(videos):
    dataset = VideoDataset(Rows(row(videos / "wide.mp4")), CLIP, clips=40, crops=1)
    assert len(dataset[0, 0]["frames"]) == 40


def test_training_clips_are_strided_and_follow_from_the_seed(videos):
    dataset = VideoDataset(Rows(row(videos / "square.mp4")), CLIP, augment=Augment())
    starts = set()
    for seed in range(30):
        numbers = read_numbers(dataset[0, seed]["video"][0])
        assert np.diff(numbers).tolist() == [3, 3, 3]
        starts.add(numbers[0])
    assert len(starts) > 10
    first, again = dataset[0, 7]["video"], dataset[0, 7]["video"]
    assert torch.equal(first, again) and first.shape == (1, 4, 3, 96, 96)


def test_several_clips_of_one_decode_are_each_drawn_anew(videos):
    augment = Augment(area=[0.2, 0.6], hflip=0.5, repeats=3)
    rows = Rows(row(videos / "wide.mp4"))
    dataset = VideoDataset(rows, CLIP, augment=augment)
    opened = []
    dataset.watch = lambda *which: opened.append(which)
    video = dataset[0, 5]["video"]
    assert video.shape == (3, 4, 3, 96, 96)
    assert opened == [(0, str(videos / "wide.mp4"))]
    assert not torch.equal(video[0], video[1]) and not torch.equal(video[1], video[2])
    # What comes back is what cropping whole frames gives.
    rng = np.random.default_rng([5, 0])
    indices = dataset.choose(40, 20.0, 3, rng)
    boxes = [geometry.random_geometry(96, 160, 96, augment, rng) for _ in range(3)]
    with open_video(videos / "wide.mp4") as reader:
        for view, wanted, box in zip(video, indices, boxes, strict=True):
            assert torch.equal(view, geometry.crop(reader.frames(wanted.tolist()), box, 96))


def test_a_clip_longer_than_its_video_repeats_the_frames_that_there_are(videos):
    clip = Clip(num_frames=8, stride=9, size=96, mean=[0.5] * 3, std=[0.5] * 3)
    for past_end, numbers in (("hold", [0, 9, 18, 27, 36, 39, 39, 39]), ("loop", None)):
        dataset = VideoDataset(
            Rows(row(videos / "square.mp4")), clip, augment=Augment(), past_end=past_end
        )
        seen = read_numbers(dataset[0, 0]["video"][0])
        assert seen == (numbers or [0, 9, 18, 27, 36, 5, 14, 23])


@pytest.mark.parametrize("how", ["file", "memory"])
def test_views_are_the_same_whether_frames_fit_in_memory_or_not(videos, how, tmp_path, monkeypatch):
    monkeypatch.setattr("vidtrain.data.readers.pieces.PIECE", 5 * 160 * 96 * 3)  # five at a time
    rows = Rows(row(videos / "wide.mp4"))
    whole = VideoDataset(rows, CLIP, clips=3, crops=3, short_side=64, size=64)[0, 0]
    spill = {"spill": tmp_path, "spill_above": 1000} if how == "file" else {}
    dataset = VideoDataset(rows, CLIP, clips=3, crops=3, short_side=64, size=64, **spill)
    sample = dataset[0, 0]
    assert isinstance(sample["frames"], Spill if how == "file" else torch.Tensor)
    transform = DeviceTransform([0.5] * 3, [0.5] * 3, lazily_above=3 * 4 * 4 * 3 * 64 * 64)
    views = transform.eval()(collate([pickle.loads(pickle.dumps(sample))]))["video"]
    pieces = list(views.pieces(None))
    assert [len(piece) for piece in pieces] == [3, 3, 3]
    expected = DeviceTransform([0.5] * 3, [0.5] * 3).eval()(collate([whole]))["video"]
    assert torch.equal(torch.cat(pieces), expected[0])
    assert torch.equal(views[0, 4], expected[0, 4])
    assert views.shape == expected.shape
    del sample, views
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_cleared_away(tmp_path):
    dead = 2**22 + 1  # above the largest process id
    (tmp_path / f"frames-{here()}-{dead}-abc").write_bytes(b"left")
    (tmp_path / f"frames-elsewhere-{dead}-abc").write_bytes(b"another machine's, on a shared disk")
    spill = Spill((2, 4, 4, 3), tmp_path)
    names = {spill.path.name, f"frames-elsewhere-{dead}-abc"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_row_that_a_worker_died_of_counts_as_unreadable(videos):
    rows = Rows(*[row(videos / "square.mp4", (k,)) for k in range(6)])
    dataset = VideoDataset(rows, CLIP, augment=Augment())
    dataset.lost[2] = "the decoder crashed (signal 11)"
    sample = dataset[2, 0]
    assert sample["index"] != 2
    assert sample["failures"] == [
        Failure(2, str(videos / "square.mp4"), "the decoder crashed (signal 11)")
    ]


def test_an_index_once_read_is_kept_for_the_next_run(videos, tmp_path, monkeypatch):
    rows = Rows(row(videos / "square.mp4"))
    kept = IndexStore(tmp_path / "a.frames", 1)
    first = VideoDataset(rows, CLIP, sources=Sources(indices=kept))[0, 0]["frames"]
    monkeypatch.setattr("vidtrain.data.readers.pyav.read_index", None)
    store = IndexStore(tmp_path / "a.frames", 1)
    again = VideoDataset(rows, CLIP, sources=Sources(indices=store))[0, 0]["frames"]
    assert torch.equal(first, again)


def test_cached_frames_are_not_decoded_again(videos, tmp_path, monkeypatch):
    rows = Rows(row(videos / "square.mp4"))
    sources = Sources(cache=FrameCache(tmp_path, 10**8, 96))
    dataset = VideoDataset(rows, CLIP, augment=Augment(), sources=sources)
    first = dataset[0, 1]["video"]
    monkeypatch.setattr("vidtrain.data.sources.open_video", None)
    assert torch.equal(dataset[0, 1]["video"], first)
    assert read_numbers(VideoDataset(rows, CLIP, sources=sources)[0, 0]["frames"]) == [
        15,
        18,
        21,
        24,
    ]


def test_a_rate_of_ones_own(videos):
    clip = Clip(num_frames=4, stride=1, size=96, mean=[0.5] * 3, std=[0.5] * 3, fps=5)
    sample = VideoDataset(Rows(row(videos / "square.mp4")), clip)[0, 0]
    assert np.diff(read_numbers(sample["frames"])).tolist() == [4, 4, 4]  # 20 fps seen at 5
    assert sample["fps"] == 5


def test_segments_cover_the_video(videos):
    sample = VideoDataset(Rows(row(videos / "square.mp4")), CLIP, how="segments")[0, 0]
    assert read_numbers(sample["frames"]) == [5, 15, 25, 35]


def test_a_piece_of_a_video(videos):
    piece = row(videos / "square.mp4", start=0.5, end=1.0)  # frames 10 to 19
    sample = VideoDataset(Rows(piece), CLIP)[0, 0]
    assert read_numbers(sample["frames"]) == [10, 13, 16, 19]
    late = VideoDataset(Rows(row(videos / "square.mp4", start=5.0, end=6.0)), CLIP)[0, 0]
    assert "frames" not in late and "it has 2.00 s" in late["failures"][0].reason


def test_a_span_of_every_video(videos):
    rows = Rows(row(videos / "square.mp4"), row(videos / "square.mp4", start=0.0, end=0.5))
    dataset = VideoDataset(rows, CLIP, span=[0.5, 1.0])
    assert read_numbers(dataset[0, 0]["frames"]) == [10, 13, 16, 19]
    assert read_numbers(dataset[1, 0]["frames"]) == [0, 3, 6, 9]  # the row's own goes before


def test_the_region_is_cut_out_first(videos):
    whole = VideoDataset(Rows(row(videos / "wide.mp4")), CLIP)[0, 0]["frames"]
    part = VideoDataset(
        Rows(row(videos / "wide.mp4")), CLIP, region=[0.25, 0.5, 0.3, 0.5], short_side=48, size=48
    )
    frames = part[0, 0]["frames"]
    assert torch.equal(frames, whole[..., 48:96, 40:88])


def test_training_replaces_a_bad_video_by_the_samples_own_seed(videos):
    rows = Rows(
        row(videos / "empty.mp4", (0,)), *[row(videos / "square.mp4", (k,)) for k in range(1, 9)]
    )
    dataset = VideoDataset(rows, CLIP, augment=Augment())
    sample = dataset[0, 3]
    assert sample["failures"][0].path.endswith("empty.mp4")
    assert sample["index"] != 0 and sample["label"].item() == sample["index"]
    assert dataset[0, 3]["index"] == sample["index"]  # the same stand-in each time
    assert len({dataset[0, seed]["index"] for seed in range(12)}) > 3


def test_testing_never_replaces(videos):
    rows = Rows(row(videos / "empty.mp4"), row(videos / "square.mp4"))
    dataset = VideoDataset(rows, CLIP)
    bad, good = dataset[0, 0], dataset[1, 1]
    assert "frames" not in bad and bad["index"] == 0
    batch = collate([bad, good])
    assert batch["index"].tolist() == [1] and len(batch["frames"]) == 1
    assert [failure.row for failure in batch["failures"]] == [0]
    assert collate([bad])["index"].tolist() == []
    with pytest.raises(UserError, match=r"empty\.mp4.*data\.on_error"):
        VideoDataset(rows, CLIP, on_error="raise")[0, 0]


def test_a_set_of_bad_videos_ends_with_their_names(videos):
    dataset = VideoDataset(Rows(row(videos / "empty.mp4")), CLIP, augment=Augment())
    with pytest.raises(UserError, match=r"empty\.mp4.*action=check"):
        dataset[0, 0]


def test_many_labels_are_zeros_and_ones(videos):
    dataset = VideoDataset(Rows(row(videos / "square.mp4", (0, 3))), CLIP, num_classes=5)
    assert dataset[0, 0]["label"].tolist() == [1, 0, 0, 1, 0]
    unlabelled = Rows(row(videos / "square.mp4", ()))
    assert VideoDataset(unlabelled, CLIP, num_classes=5)[0, 0]["label"].tolist() == [0] * 5
    assert VideoDataset(unlabelled, CLIP)[0, 0]["label"].item() == -1


def test_wrong_settings_are_named(videos):
    rows = Rows(row(videos / "square.mp4"))
    for settings, said in (
        ({"how": "sometimes"}, "data.sampling"),
        ({"on_error": "cry"}, "data.on_error"),
        ({"size": 200, "short_side": 100}, "views.size"),
        ({"region": [0, 0, 2, 1]}, "data.region"),
        ({"span": [2, 1]}, "data.span"),
        ({"region": [0, 0, 1]}, "data.region"),
        ({"clips": 0}, "views.clips"),
        ({"short_side": {"a": 1}}, "views.short_side"),
    ):
        with pytest.raises(UserError, match=said):
            VideoDataset(rows, CLIP, **settings)


def test_a_decode_error_survives_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(DecodeError("a.mp4", "it is empty")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "it is empty", "a.mp4: it is empty")
