"""Mixup and CutMix, by what becomes of batches whose clips are of one value each."""

import numpy as np
import pytest
import torch

from vidtrain.data.transforms import mixing
from vidtrain.data.transforms.device import DeviceTransform
from vidtrain.data.transforms.sample import Augment


def batch(values, labels, seed=0, size=32):
    video = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1, 1, 1)
    return {
        "video": video.expand(len(values), 1, 2, 3, size, size),
        "label": torch.tensor(labels),
        "seed": seed,
    }


def test_mixup_blends_pixels_and_labels_by_the_same_share():
    transform = DeviceTransform(
        [0] * 3, [1 / 255] * 3, augment=Augment(mixup=1.0), num_classes=4
    ).train()
    shares = set()
    for seed in range(8):
        out = transform(batch([0, 100, 200], [0, 1, 2], seed))
        share = float(out["label"][0, 0])
        shares.add(share)
        mixed = out["video"].flatten(1)
        torch.testing.assert_close(mixed.std(1), torch.zeros(3), atol=1e-3, rtol=0)
        torch.testing.assert_close(mixed[:, 0], torch.tensor([200 * (1 - share), 100, 200 * share]))
        assert out["label"][1].tolist() == [0, 1, 0, 0]  # the middle one is mixed with itself
        torch.testing.assert_close(out["label"].sum(1), torch.ones(3))
    assert len(shares) == 8


def test_cutmix_takes_a_box_and_its_share_of_the_label():
    transform = DeviceTransform(
        [0] * 3, [1 / 255] * 3, augment=Augment(cutmix=1.0), num_classes=2
    ).train()
    seen = []
    for seed in range(20):
        out = transform(batch([0, 200], [0, 1], seed))
        pixels = out["video"][0, 0, 0]  # (T, H, W)
        assert set(pixels.unique().tolist()) <= {0.0, 200.0}
        assert torch.equal(pixels[0], pixels[1])  # the box stays where it is
        kept = float((pixels == 0).float().mean())
        assert float(out["label"][0, 0]) == pytest.approx(kept)
        rows, columns = (pixels[0] == 200).any(1).sum(), (pixels[0] == 200).any(0).sum()
        assert int((pixels[0] == 200).sum()) == int(rows * columns)  # it is a box
        seen.append(kept)
    assert min(seen) < 0.4 and max(seen) > 0.6


def test_testing_is_not_mixed_and_none_is_the_default():
    both = DeviceTransform([0] * 3, [1] * 3, augment=Augment(mixup=1.0, cutmix=1.0), num_classes=2)
    assert both.eval()(batch([0, 200], [0, 1]))["label"].tolist() == [0, 1]
    assert mixing.draw(8, 8, 0.0, 0.0, np.random.default_rng(0)) is None
    drawn = [mixing.draw(64, 64, 0.8, 1.0, np.random.default_rng(seed)) for seed in range(60)]
    boxes = [bool((mix.weight == 0).any()) for mix in drawn]
    assert 15 < sum(boxes) < 45  # one or the other, half the time


@pytest.mark.slow  # compiling takes a minute
def test_the_compiled_pass_gives_the_same_pixels():
    settings = {"augment": Augment(color=0.3, mixup=0.8), "num_classes": 3}
    plain = DeviceTransform([0.4] * 3, [0.2] * 3, **settings).train()
    fused = DeviceTransform([0.4] * 3, [0.2] * 3, **settings, compile=True).train()
    for count in (3, 2):
        ours = {**batch([10, 120, 250][:count], [0, 1, 2][:count], size=16)}
        torch.testing.assert_close(fused(dict(ours))["video"], plain(dict(ours))["video"])


def test_where_it_cannot_be_compiled_it_runs_as_it_is(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    transform = DeviceTransform([0] * 3, [1] * 3)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    transform.compile_on = None
    monkeypatch.setattr(transform, "wants_compiling", lambda device: transform.compile_on is None)
    out = transform.eval()(batch([255, 0], [0, 1]))["video"]
    assert out.max() == 1 and transform.compile_on is False


def test_several_labels_are_not_mixed(vidtrain):
    out = vidtrain(
        "data", "action=stats", "data=demo", "data.multi_label=true", "augment.mixup=0.5"
    )
    assert out.code == 2 and "augment.mixup" in out.err
