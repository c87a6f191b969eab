"""The encoder of VideoMAE, which its classifiers and its masked autoencoders share.

Tong et al. "VideoMAE." NeurIPS 2022. https://arxiv.org/abs/2203.12602
"""

from __future__ import annotations

from torch import Tensor, nn

from vidtrain.layers.attention import Block
from vidtrain.layers.drop_path import path_rates
from vidtrain.layers.masking import pick
from vidtrain.layers.patch import PatchEmbed, grid_of, resize_table, sincos_table


class TubeletEncoder(nn.Module):
    """Blocks of attention over the tubelets of a clip, numbered by sines and cosines.

    Args:
        num_frames: T of the clip whose tubelets the positions number.
        size: Its H and W.
        patch: Pixels of a tubelet's side.
        tubelet: Frames of a tubelet.
        dim: D.
        depth: Blocks.
        heads: Of each attention.
        hidden: Width of the MLPs; None for 4 D.
        drop_path: Share of clips that skip a branch of the last block in training; of earlier ones fewer.

    Raises:
        UserError: tubelets do not fill the clip, heads do not divide D, or `drop_path` is no share.
    """

    inputs = ("video",)
    positions: Tensor

    def __init__(
        self,
        num_frames: int,
        size: int,
        patch: int,
        tubelet: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_features = dim
        box = (tubelet, patch, patch)
        self.grid = grid_of((num_frames, size, size), box)
        self.patch_embed = PatchEmbed(dim, box)
        table = sincos_table(self.grid[0] * self.grid[1] * self.grid[2], dim)
        self.register_buffer("positions", table, persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, heads, hidden or 4 * dim, key_bias=False, drop=rate)
            for rate in path_rates(drop_path, depth)
        )

    def tokens(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Make tokens and pass them through the blocks: (B, 3, T, H, W) -> (B, N, D).

        Args:
            x: Clips.
            visible: (B, n), the numbers of those that take part; the others are dropped, and N is n.
        """
        x = self.patch_embed(x)
        grid = x.shape[1:4]
        x = x.flatten(1, 3) + resize_table(self.positions, self.grid, grid, "trilinear")
        if visible is not None:
            x = pick(x, visible)
        for block in self.blocks:
            x = block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, t, h, w): the tokens behind the last block."""
        grid = grid_of(x.shape[2:], self.patch_embed.box)
        return self.tokens(x).unflatten(1, grid).permute(0, 4, 1, 2, 3)
