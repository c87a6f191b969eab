"""How far predicted pixels are from those that were hidden."""

from __future__ import annotations

from torch import Tensor


def masked_mse(predicted: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Average the squared error over the tokens that count, for each clip.

    Args:
        predicted: (B, m, P).
        target: (B, m, P).
        counted: (B, m) bool.

    Returns:
        (B,); the mean of a clip's counted tokens. A clip of which none counts has 0.
    """
    each = (predicted.float() - target.float()).square().mean(-1) * counted
    return each.sum(1) / counted.sum(1).clamp(min=1)
