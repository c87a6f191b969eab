"""RandAugment and erasing: of whole clips, in training alone, the same again for the same seed."""

import numpy as np
import pytest
import torch

from vidtrain.data.transforms import strong
from vidtrain.data.transforms.device import DeviceTransform
from vidtrain.data.transforms.sample import Augment
from vidtrain.types import UserError


def clips(count: int = 3, frames: int = 4, size: int = 32) -> torch.Tensor:
    """Clips whose frames are all alike: (B, 1, T, C, H, W) uint8."""
    rng = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (count, 1, 1, 3, size, size), generator=rng, dtype=torch.uint8)
    return frame.expand(-1, -1, frames, -1, -1, -1).contiguous()


def run(augment: Augment, seed: int = 0, train: bool = True) -> torch.Tensor:
    transform = DeviceTransform([0.5] * 3, [0.25] * 3, augment).train(train)
    return transform({"video": clips(), "seed": seed})["video"]


def test_all_frames_of_a_clip_change_alike_and_clips_apart():
    plain, made = run(Augment()), run(Augment(rand_augment=2, rand_magnitude=15))
    assert made.shape == plain.shape and made.dtype == torch.float32
    assert torch.equal(made, made[:, :, :, :1].expand_as(made))
    changed = [not torch.equal(a, b) for a, b in zip(made, plain, strict=True)]
    assert sum(changed) >= 2
    assert torch.equal(made, run(Augment(rand_augment=2, rand_magnitude=15)))
    assert not torch.equal(made, run(Augment(rand_augment=2, rand_magnitude=15), seed=1))
    assert torch.equal(run(Augment(rand_augment=2, erase=1.0), train=False), plain)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    run(Augment(rand_augment=2, erase=1.0))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_what_comes_in_at_the_edges_is_the_mean(monkeypatch):
    change = strong.v2.RandAugment
    monkeypatch.setattr(
        change, "_AUGMENTATION_SPACE", {"TranslateX": (lambda *_: torch.full((31,), 8.0), False)}
    )
    made = run(Augment(rand_augment=1))
    empty = (made.abs() < 0.01).all(1).all(1).all(1)  # (B, H, W)
    assert empty[:, :, :8].all() and not empty[:, :, 8:].all(2).any()


def test_a_box_of_noise_through_all_frames():
    plain = run(Augment())
    made = run(Augment(erase=1.0, erase_area=[0.1, 0.1]))
    for before, after in zip(plain[:, 0], made[:, 0], strict=True):
        changed = (before != after).all(0).all(0)  # (H, W), all frames and channels
        assert torch.equal(changed, (before != after).any(0).any(0))
        rows, columns = changed.any(1).sum(), changed.any(0).sum()
        assert changed.sum() == rows * columns and 0.05 < changed.float().mean() < 0.15
        noise = after[:, :, changed]
        assert abs(noise.mean()) < 0.2 and 0.8 < noise.std() < 1.2
        assert not torch.equal(noise[:, 0], noise[:, 1])  # each frame its own
    boxes = [torch.equal(run(Augment(erase=0.25), seed=s), plain) for s in range(30)]
    assert 5 < sum(boxes) < 25  # 0.42 of the batches of three have none


def test_mistakes_are_named():
    for knobs, message in (
        ({"rand_augment": -1}, r"augment.rand_augment is -1"),
        ({"rand_magnitude": 31}, r"augment.rand_magnitude is 31; .* at most 30"),
        ({"erase": 2}, r"augment.erase is 2"),
        ({"erase_area": [0.5, 0.2]}, r"augment.erase_area is"),
    ):
        with pytest.raises(UserError, match=message):
            Augment(**knobs)
    rng = np.random.default_rng(0)
    assert strong.erase(torch.zeros(1, 1, 3, 2, 8, 8), 0.0, [0.1, 0.2], rng).abs().sum() == 0
