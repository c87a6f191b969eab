"""The learning rate that a step's size calls for."""

import pytest

from vidtrain.optim.batch import Batch, scaled
from vidtrain.types import UserError


def test_rates_by_hand():
    batch = Batch(videos=8, repeats=2, ranks=4, accumulated=2)
    assert batch.clips == 128
    rate, line = scaled(0.1, batch, {"reference_batch": 64, "scaling": "linear"})
    assert rate == pytest.approx(0.2)
    assert line == (
        "128 clips a step (8 videos x 2 clips x 4 ranks x 2 accumulated);"
        " rate 0.2: optim.lr=0.1 is for 64, as the batch"
    )
    rate, _ = scaled(0.1, batch, {"reference_batch": 32, "scaling": "sqrt"})
    assert rate == pytest.approx(0.2)
    rate, line = scaled(0.1, Batch(64), {"reference_batch": 64})
    assert rate == 0.1 and line == "64 clips a step; rate 0.1: optim.lr=0.1 is for 64"
    rate, line = scaled(0.1, Batch(4), {"reference_batch": None})
    assert rate == 0.1 and "whatever the batch" in line


def test_mistakes_are_named():
    for wrong in ("abc", 0, -0.1, None, True):
        with pytest.raises(UserError, match=r"optim\.lr is"):
            scaled(wrong, Batch(4), {})
    with pytest.raises(UserError, match=r"optim\.scaling is 'cubic'; it is one of linear, sqrt"):
        scaled(0.1, Batch(4), {"reference_batch": 4, "scaling": "cubic"})
    for wrong in (0, 2.5, True):
        with pytest.raises(UserError, match=r"optim\.reference_batch is"):
            scaled(0.1, Batch(4), {"reference_batch": wrong})


def test_a_run_says_its_rate_and_takes_it(vidtrain, tiny_dataset, tmp_path):
    done = vidtrain(
        "train", "model=toy_3d_cnn", "clip.size=16", "clip.num_frames=4", "data=folder",
        f"data.root={tiny_dataset}", "data.workers=0", "data.batch_size=6", "trainer=cpu",
        "trainer.max_epochs=1", "trainer.accumulate_grad_batches=2", "logger=csv",
        "trainer.log_every_n_steps=1", "optim=sgd_cosine", "optim.schedule=constant",
        "optim.warmup=0", "optim.lr=0.1", "optim.reference_batch=48",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (
        "12 clips a step (6 videos x 2 accumulated); rate 0.025: optim.lr=0.1 is for 48" in done.out
    )
    (metrics,) = tmp_path.glob("runs/*/*/metrics.csv")
    assert "0.025" in metrics.read_text()
    wrong = vidtrain("train", "model=toy_3d_cnn", "optim.scaling=cubic", "data=folder")
    assert wrong.code == 2 and "optim.scaling is 'cubic'" in wrong.err
