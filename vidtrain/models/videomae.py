"""VideoMAE's encoder as a classifier: a plain vision transformer over tubelets.

Tong, Song, Wang, Wang. "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised
Video Pre-Training." NeurIPS 2022. https://arxiv.org/abs/2203.12602
Wang et al. "VideoMAE V2: Scaling Video Masked Autoencoders with Dual Masking." CVPR 2023.
https://arxiv.org/abs/2303.16727 (the giant one)

A clip is cut into tubelets of 2 frames x 16 x 16 pixels, each of which is a token; 16 x 224 x 224 gives
8 x 14 x 14 of them. To it come sines and cosines of the tubelet's number, which are not learned. All tokens
look at all others in every block. There is no class token: the tokens' mean goes through a norm and a
linear layer. Of the attention's biases the keys have none.

              blocks      D   heads    MLP   patch
    small         12    384       6   1536      16
    base          12    768      12   3072      16
    large         24   1024      16   4096      16
    huge          32   1280      16   5120      16
    giant         40   1408      16   6144      14

With `probe` another classifier takes the linear layer's place, to measure what pretraining gave (see
layers/attentive.py): `linear` puts a batch norm before it, `attentive` a learned query that looks at all
tokens, each normed by `fc_norm`.

Submodules: `patch_embed.proj`; `blocks.N` with `norm1` `attn.qkv` `attn.q_bias` `attn.v_bias` `attn.proj`
`norm2` `mlp.fc1` `mlp.fc2`; `fc_norm`; `head`.

Departs from the paper: for other numbers of frames and sizes than the network was built for, the table of
positions is spread over the new grid in straight lines, so that a trained network finds the ones it knows
(the code that the paper released numbers the tubelets anew).

Parameters with 400 classes, and multiply-adds of 16 x 224 x 224, as tests/models/test_videomae.py asserts:
small 22,033,936, 56.878 G; base 86,534,800, 180.345; large 304,270,736, 596.833; huge 632,119,440, 1190.994;
giant 1,012,174,352, 2542.791.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidtrain.layers.attention import EPS, init_linear
from vidtrain.layers.attentive import check_probe, make_probe, pooled
from vidtrain.layers.tubelets import TubeletEncoder

HEAD_SCALE = 0.001  # of the classifier's first weights, as in the paper's recipes


class VideoMAE(TubeletEncoder):
    """A transformer over the tubelets of a clip.

    Args:
        num_classes: K; 0 for the normed mean of the tokens.
        num_frames: T of the clip whose tubelets the positions number.
        size: Its H and W.
        patch: Pixels of a tubelet's side.
        tubelet: Frames of a tubelet.
        dim: D.
        depth: Blocks.
        heads: Of each attention.
        hidden: Width of the MLPs; None for 4 D.
        dropout: Before the classifier.
        drop_path: Share of clips that skip a branch of the last block in training; of earlier ones fewer.
        probe: `linear` or `attentive`, see layers/attentive.py; None for the paper's classifier.

    Raises:
        UserError: tubelets do not fill the clip, heads do not divide D, `drop_path` is no share, or there
            is no such probe.
    """

    readout = ("fc_norm",)  # new with the classifier: pretraining does not fill it

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        size: int,
        patch: int,
        tubelet: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        probe: str | None = None,
    ) -> None:
        check_probe(probe)
        super().__init__(num_frames, size, patch, tubelet, dim, depth, heads, hidden, drop_path)
        self.probe, self.heads = probe, heads
        self.fc_norm = nn.LayerNorm(dim, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        init_linear(self)
        self.reset_classifier(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        return self.head(self.dropout(self.fc_norm(pooled(self.tokens(x), self.head))))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear layer, or the probe; 0 takes it away."""
        if self.probe is not None:
            self.head = make_probe(self.probe, self.num_features, self.heads, num_classes)
            return
        made = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_linear(made)
        if isinstance(made, nn.Linear):
            with torch.no_grad():
                made.weight *= HEAD_SCALE
        self.head = made


def videomae_small(
    num_classes: int,
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 384,
    depth: int = 12,
    heads: int = 6,
    dropout: float = 0.0,
    drop_path: float = 0.1,
    probe: str | None = None,
) -> VideoMAE:
    """Build the ViT-S encoder."""
    return VideoMAE(
        num_classes,
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        dropout=dropout,
        drop_path=drop_path,
        probe=probe,
    )


def videomae_base(
    num_classes: int,
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    dropout: float = 0.0,
    drop_path: float = 0.1,
    probe: str | None = None,
) -> VideoMAE:
    """Build the ViT-B encoder."""
    return videomae_small(
        num_classes,
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        dropout,
        drop_path,
        probe,
    )


def videomae_large(
    num_classes: int,
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 1024,
    depth: int = 24,
    heads: int = 16,
    dropout: float = 0.0,
    drop_path: float = 0.1,
    probe: str | None = None,
) -> VideoMAE:
    """Build the ViT-L encoder."""
    return videomae_small(
        num_classes,
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        dropout,
        drop_path,
        probe,
    )


def videomae_huge(
    num_classes: int,
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 1280,
    depth: int = 32,
    heads: int = 16,
    dropout: float = 0.5,
    drop_path: float = 0.2,
    probe: str | None = None,
) -> VideoMAE:
    """Build the ViT-H encoder."""
    return videomae_small(
        num_classes,
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        dropout,
        drop_path,
        probe,
    )


def videomae_giant(
    num_classes: int,
    num_frames: int = 16,
    size: int = 224,
    patch: int = 14,
    tubelet: int = 2,
    dim: int = 1408,
    depth: int = 40,
    heads: int = 16,
    hidden: int = 6144,
    dropout: float = 0.0,
    drop_path: float = 0.2,
    probe: str | None = None,
) -> VideoMAE:
    """Build the ViT-g encoder of VideoMAE V2, whose patches have 14 pixels and whose MLPs 48 / 11 D."""
    return VideoMAE(
        num_classes,
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        hidden,
        dropout=dropout,
        drop_path=drop_path,
        probe=probe,
    )
