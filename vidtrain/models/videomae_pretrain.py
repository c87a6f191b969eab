"""VideoMAE: a masked autoencoder that learns from videos without labels.

Tong, Song, Wang, Wang. "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised
Video Pre-Training." NeurIPS 2022. https://arxiv.org/abs/2203.12602
Wang et al. "VideoMAE V2: Scaling Video Masked Autoencoders with Dual Masking." CVPR 2023.
https://arxiv.org/abs/2303.16727

A clip is cut into tubelets of 2 frames x 16 x 16 pixels. The same nine tenths of places are hidden in all
frames (tubes), and the encoder gets the other tubelets alone. A narrow decoder gets what the encoder made
of them, and for each hidden one a learned token with its position; it predicts the hidden tubelets' pixels,
each colour of each tubelet brought to mean 0 and deviation 1. V2 masks the decoder too: it predicts half
of the tubelets (running cells), and the loss counts those of them that the encoder has not seen. Afterwards
the decoder is thrown away.

              encoder                    decoder                   patch
              blocks      D   heads      blocks      D   heads
    small         12    384       6           4    192       3        16
    base          12    768      12           4    384       6        16
    large         24   1024      16          12    512       8        16
    huge          32   1280      16           8    640       8        16
    giant         40   1408      16           4    512       8        14

Submodules: `encoder` with `patch_embed.proj`, `blocks.N` and `norm`; `encoder_to_decoder`; `mask_token`;
`decoder` with `blocks.N`, `norm` and `head`. The encoder's but for `norm` are those of the classifiers
(videomae.py), so that a checkpoint of this network fills them: `vidtrain train model=videomae_base
ckpt=RUN`.

Departs from the paper: for other numbers of frames and sizes than the network was built for, the tables of
positions are spread over the new grid in straight lines. Huge has the decoder of 8 blocks that the network
has by default; the script that it was trained with gives it 12, as its recipe does (`model.decoder_depth`).

Parameters, and multiply-adds of 16 x 224 x 224, as tests/models/test_masked_autoencoders.py asserts: small
24,029,376, 11.536 G; base 94,210,944, 35.440; large 342,996,992, 142.636; huge 672,795,776, 194.191; giant
1,026,306,560, 263.957; with the decoder masked base 25.840 and giant 241.614.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidtrain.layers import masking, pixels
from vidtrain.layers.attention import EPS, Block
from vidtrain.layers.patch import grid_of, resize_table, sincos_table
from vidtrain.layers.tubelets import TubeletEncoder

DEVIATION = 1e-6  # added to a tubelet's, so that one of a single colour becomes 0


class Encoder(TubeletEncoder):
    """The encoder of the classifiers, with a norm behind it. Arguments: as of `TubeletEncoder`."""

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
        super().__init__(num_frames, size, patch, tubelet, dim, depth, heads, hidden, drop_path)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """(B, 3, T, H, W), (B, n) -> (B, n, D): what is made of the visible tubelets."""
        return self.norm(self.tokens(x, visible))


class Decoder(nn.Module):
    """Blocks of attention over all tokens; the last ones become pixels.

    Args:
        dim: D.
        depth: Blocks.
        heads: Of each attention.
        outputs: P, numbers of a prediction.
        hidden: Width of the MLPs.
    """

    def __init__(self, dim: int, depth: int, heads: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, key_bias=False) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, outputs)

    def forward(self, x: Tensor, count: int) -> Tensor:
        """(B, N, D) -> (B, count, P)."""
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -count:]))


class VideoMAEPretraining(nn.Module):
    """Encoder, decoder and what they are asked.

    Args:
        num_frames: T of the clip whose tubelets the positions number.
        size: Its H and W.
        patch: Pixels of a tubelet's side.
        tubelet: Frames of a tubelet.
        dim: D of the encoder.
        depth: Its blocks.
        heads: Of each of its attentions.
        decoder_dim: D of the decoder.
        decoder_depth: Its blocks.
        decoder_heads: Of each of its attentions.
        mask_ratio: Share of places that is hidden from the encoder.
        decoder_mask_ratio: Share of tubelets that the decoder is not asked for; None: it is asked for
            all that are hidden, and for no other.
        hidden: Width of the encoder's MLPs; None for 4 D. The decoder's is as many times as wide as it.
        drop_path: Share of clips that skip a branch of the encoder's last block; of earlier ones fewer.

    Raises:
        UserError: tubelets do not fill the clip, heads do not divide a width, a share is none, or it leaves
            nothing to see or to predict.
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
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        mask_ratio: float = 0.9,
        decoder_mask_ratio: float | None = None,
        hidden: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.mask_ratio = masking.check_share(mask_ratio)
        if decoder_mask_ratio is not None:
            masking.check_share(decoder_mask_ratio, "model.decoder_mask_ratio")
        self.decoder_mask_ratio = decoder_mask_ratio
        self.num_features = dim
        self.encoder = Encoder(
            num_frames, size, patch, tubelet, dim, depth, heads, hidden, drop_path
        )
        self.box, self.grid = self.encoder.patch_embed.box, self.encoder.grid
        self.encoder_to_decoder = nn.Linear(dim, decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        wide = 4 * decoder_dim if hidden is None else int(decoder_dim * hidden / dim)
        outputs = 3 * tubelet * patch**2
        self.decoder = Decoder(decoder_dim, decoder_depth, decoder_heads, outputs, wide)
        table = sincos_table(self.grid[0] * self.grid[1] * self.grid[2], decoder_dim)
        self.register_buffer("positions", table, persistent=False)
        self._init_weights()
        # A share that leaves nothing to see or to predict is refused here, before any training.
        self.draw(1, (num_frames, size, size), torch.Generator())

    def draw(
        self, batch: int, clip: tuple[int, int, int], generator: torch.Generator | None = None
    ) -> masking.Mask:
        """Draw what is hidden of B clips of T, H, W; on the CPU.

        Raises:
            UserError: tubelets do not fill the clip, or nothing is left to see or to predict.
        """
        grid = grid_of(clip, self.box)
        hidden = masking.tube(batch, grid, self.mask_ratio, generator)
        left_out = None
        if self.decoder_mask_ratio is not None:
            left_out = masking.running_cells(batch, grid, self.decoder_mask_ratio, generator)
        return masking.make_mask(hidden, left_out)

    def forward(self, x: Tensor, mask: masking.Mask | None = None) -> Tensor:
        """Predict the pixels of `mask.predicted`, as `standardise` has them.

        Args:
            x: (B, 3, T, H, W).
            mask: None: one is drawn.

        Returns:
            (B, m, P) with P = 3 · tubelet · patch².
        """
        if mask is None:
            mask = self.draw(len(x), tuple(x.shape[2:])).to(x.device)
        seen = self.encoder_to_decoder(self.encoder(x, mask.visible))
        grid = grid_of(x.shape[2:], self.box)
        places = resize_table(self.positions, self.grid, grid, "trilinear")
        asked = self.mask_token + masking.pick(places, mask.predicted)
        tokens = torch.cat([seen + masking.pick(places, mask.visible), asked], 1)
        return self.decoder(tokens, asked.shape[1])

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, t, h, w): the encoder's tokens of whole clips."""
        return self.encoder.forward_features(x)

    def boxes(self, video: Tensor) -> Tensor:
        """Cut clips, not normalised, into tubelets: (B, 3, T, H, W) -> (B, N, pixels, 3)."""
        return pixels.cut(video, self.box)

    def standardise(self, boxes: Tensor) -> pixels.Target:
        """Bring each colour of each tubelet to one scale: what is to be predicted."""
        return pixels.standardise(boxes, (-2,), 0.0, DEVIATION)

    def picture(self, boxes: Tensor, clip: tuple[int, int, int]) -> Tensor:
        """Put all tubelets of clips of T, H, W together: (B, N, pixels, 3) -> (B, 3, T, H, W)."""
        return pixels.join(boxes, grid_of(clip, self.box), self.box)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.encoder_to_decoder:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)


def videomae_small_pretrain(
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 384,
    depth: int = 12,
    heads: int = 6,
    decoder_dim: int = 192,
    decoder_depth: int = 4,
    decoder_heads: int = 3,
    mask_ratio: float = 0.9,
    drop_path: float = 0.0,
) -> VideoMAEPretraining:
    """Build VideoMAE with the ViT-S encoder."""
    return VideoMAEPretraining(
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        decoder_dim,
        decoder_depth,
        decoder_heads,
        mask_ratio,
        None,
        None,
        drop_path,
    )


def videomae_base_pretrain(
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    decoder_dim: int = 384,
    decoder_depth: int = 4,
    decoder_heads: int = 6,
    mask_ratio: float = 0.9,
    drop_path: float = 0.0,
) -> VideoMAEPretraining:
    """Build VideoMAE with the ViT-B encoder."""
    return VideoMAEPretraining(
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        decoder_dim,
        decoder_depth,
        decoder_heads,
        mask_ratio,
        None,
        None,
        drop_path,
    )


def videomae_large_pretrain(
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 1024,
    depth: int = 24,
    heads: int = 16,
    decoder_dim: int = 512,
    decoder_depth: int = 12,
    decoder_heads: int = 8,
    mask_ratio: float = 0.9,
    drop_path: float = 0.0,
) -> VideoMAEPretraining:
    """Build VideoMAE with the ViT-L encoder."""
    return VideoMAEPretraining(
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        decoder_dim,
        decoder_depth,
        decoder_heads,
        mask_ratio,
        None,
        None,
        drop_path,
    )


def videomae_huge_pretrain(
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 1280,
    depth: int = 32,
    heads: int = 16,
    decoder_dim: int = 640,
    decoder_depth: int = 8,
    decoder_heads: int = 8,
    mask_ratio: float = 0.9,
    drop_path: float = 0.0,
) -> VideoMAEPretraining:
    """Build VideoMAE with the ViT-H encoder."""
    return VideoMAEPretraining(
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        decoder_dim,
        decoder_depth,
        decoder_heads,
        mask_ratio,
        None,
        None,
        drop_path,
    )


def videomae_giant_pretrain(
    num_frames: int = 16,
    size: int = 224,
    patch: int = 14,
    tubelet: int = 2,
    dim: int = 1408,
    depth: int = 40,
    heads: int = 16,
    decoder_dim: int = 512,
    decoder_depth: int = 4,
    decoder_heads: int = 8,
    mask_ratio: float = 0.9,
    hidden: int = 6144,
    drop_path: float = 0.0,
) -> VideoMAEPretraining:
    """Build VideoMAE with V2's ViT-g encoder, its decoder unmasked."""
    return VideoMAEPretraining(
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        decoder_dim,
        decoder_depth,
        decoder_heads,
        mask_ratio,
        None,
        hidden,
        drop_path,
    )


def videomae_v2_base_pretrain(
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    decoder_dim: int = 384,
    decoder_depth: int = 4,
    decoder_heads: int = 6,
    mask_ratio: float = 0.9,
    decoder_mask_ratio: float | None = 0.5,
    drop_path: float = 0.0,
) -> VideoMAEPretraining:
    """Build VideoMAE V2 with the ViT-B encoder."""
    return VideoMAEPretraining(
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        decoder_dim,
        decoder_depth,
        decoder_heads,
        mask_ratio,
        decoder_mask_ratio,
        None,
        drop_path,
    )


def videomae_v2_giant_pretrain(
    num_frames: int = 16,
    size: int = 224,
    patch: int = 14,
    tubelet: int = 2,
    dim: int = 1408,
    depth: int = 40,
    heads: int = 16,
    decoder_dim: int = 512,
    decoder_depth: int = 4,
    decoder_heads: int = 8,
    mask_ratio: float = 0.9,
    decoder_mask_ratio: float | None = 0.5,
    hidden: int = 6144,
    drop_path: float = 0.0,
) -> VideoMAEPretraining:
    """Build VideoMAE V2 with the ViT-g encoder."""
    return VideoMAEPretraining(
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        decoder_dim,
        decoder_depth,
        decoder_heads,
        mask_ratio,
        decoder_mask_ratio,
        hidden,
        drop_path,
    )
