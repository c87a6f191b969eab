"""Losses over class scores."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of `(B, K)` logits with classes `(B,)` or distributions `(B, K)`.

    Videos of class -1 (unknown) do not count. With `(K,)` `class_weights` the mean is a weighted one,
    of classes and of distributions alike.
    """
    if target.ndim == 1:
        known = target >= 0
        if not known.all():
            logits, target = logits[known], target[known]
        if not len(target):
            return logits.sum() * 0
    if class_weights is None or target.ndim == 1:
        return F.cross_entropy(logits, target, class_weights, label_smoothing=label_smoothing)
    # Torch divides by the number of distributions, not by what they weigh.
    total = F.cross_entropy(
        logits, target, class_weights, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (target @ class_weights).sum()


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over videos and classes of the binary cross-entropy with `(B, K)` zeros and ones."""
    return F.binary_cross_entropy_with_logits(logits, target)
