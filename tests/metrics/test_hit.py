import torch

from vidtrain.metrics.hit import Hit


def test_hit_by_hand():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.3, 0.8], [0.1, 0.6, 0.5]])
    target = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1]])
    first, second = Hit(1), Hit(2)
    for metric in (first, second):
        metric.update(scores[:2], target[:2])
        metric.update(scores[2:], target[2:])
    assert first.compute().item() == torch.tensor(1 / 3).item()  # only the first video
    assert second.compute().item() == 1.0  # 1 and 2 come second
