"""MAE-ST: a masked autoencoder that hides tokens wherever they lie in space and time; and its classifiers.

Feichtenhofer, Fan, Li, He. "Masked Autoencoders As Spatiotemporal Learners." NeurIPS 2022.
https://arxiv.org/abs/2205.09113

A clip is cut into tubelets of 2 frames x 16 x 16 pixels. To each comes a learned position in the frame and
one in time, and a class token is put in front. In pretraining nine tenths of the tubelets are hidden at
random, and the encoder gets the others alone. The decoder gets all in their order, a learned token in place
of each hidden one, and predicts the pixels of one of a tubelet's two frames, brought to mean 0 and
deviation 1 over all colours together. The classifier reads the mean of the tubelets behind a norm.

              blocks      D   heads      pretraining's patch
    base          12    768      12                       16
    large         24   1024      16                       16
    huge          32   1280      16                       14

The decoder has 4 blocks of 512 channels and 16 heads.

Submodules: `patch_embed.proj`; `blocks.N` with `norm1` `attn.qkv` `attn.proj` `norm2` `mlp.fc1` `mlp.fc2`;
`norm`; `head`; beside them `cls_token`, `pos_embed_class`, `pos_embed_spatial`, `pos_embed_temporal`. In
pretraining those of the encoder lie under `encoder`, and under `decoder` there are `embed`, `mask_token`,
`cls_token`, the three tables, `blocks.N`, `norm` and `head`. A checkpoint of pretraining fills a
classifier's: `vidtrain train model=mae_st_large ckpt=RUN`.

Departs from the paper: for other numbers of frames and sizes than the network was built for, the tables of
positions are spread over the new grid in straight lines. The huge classifier has patches of 14 pixels, as
it is pretrained; the released class for it has 16 (`model.patch=16`).

Parameters, and multiply-adds of 16 x 224 x 224, as tests/models/test_masked_autoencoders.py asserts:
pretraining base 99,898,880, 46.143 G; large 317,731,584, 81.615; huge 645,232,460, 179.230. Classifiers of
400 classes: base 86,702,224, 180.488; large 304,506,256, 597.289; huge with patches of 16 632,424,080,
1191.880.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidtrain.layers import masking, pixels
from vidtrain.layers.attention import EPS, Block
from vidtrain.layers.attentive import check_probe, make_probe, pooled
from vidtrain.layers.drop_path import path_rates
from vidtrain.layers.patch import PatchEmbed, grid_of, resize_table

# The paper's code adds 1e-6 to the variance of frames that are normalised by a deviation of 0.225.
VARIANCE = 1e-6 * 0.225**2
HEAD_STD = 2e-5  # of the classifier's first weights, as in the paper's fine-tuning


class Positions(nn.Module):
    """Learned positions: a place's and a slot's are added. A class token has one of its own.

    Args:
        grid: t, h, w.
        dim: D.
    """

    def __init__(self, grid: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed_class = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, grid[1] * grid[2], dim))
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, grid[0], dim))

    def table(self, grid: tuple[int, int, int]) -> Tensor:
        """Give the positions of the tokens of a grid: (1, t · h · w, D)."""
        place = resize_table(self.pos_embed_spatial, self.grid[1:], grid[1:], "bilinear")
        slot = resize_table(self.pos_embed_temporal, self.grid[:1], grid[:1], "linear")
        return (slot.unsqueeze(2) + place.unsqueeze(1)).flatten(1, 2)

    def with_class(self, x: Tensor) -> Tensor:
        """Put the class token in front: (B, N, D) -> (B, 1 + N, D)."""
        return torch.cat([(self.cls_token + self.pos_embed_class).expand(len(x), -1, -1), x], 1)

    def _init_weights(self) -> None:
        tables = (self.pos_embed_class, self.pos_embed_spatial, self.pos_embed_temporal)
        for table in (self.cls_token, *tables):
            nn.init.trunc_normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, PatchEmbed):
                nn.init.xavier_uniform_(module.proj.weight.flatten(1))


class Encoder(Positions):
    """Blocks of attention over the tubelets of a clip and a class token, and a norm.

    Args:
        num_frames: T of the clip that positions are learned for.
        size: Its H and W.
        patch: Pixels of a tubelet's side.
        tubelet: Frames of a tubelet.
        dim: D.
        depth: Blocks.
        heads: Of each attention.
        drop_path: Share of clips that skip a branch of the last block in training; of earlier ones fewer.

    Raises:
        UserError: tubelets do not fill the clip, heads do not divide D, or `drop_path` is no share.
    """

    inputs = ("video",)

    def __init__(
        self,
        num_frames: int,
        size: int,
        patch: int,
        tubelet: int,
        dim: int,
        depth: int,
        heads: int,
        drop_path: float = 0.0,
    ) -> None:
        box = (tubelet, patch, patch)
        super().__init__(grid_of((num_frames, size, size), box), dim)
        self.num_features = dim
        self.patch_embed = PatchEmbed(dim, box)
        self.blocks = nn.ModuleList(
            Block(dim, heads, 4 * dim, drop=rate) for rate in path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self._init_weights()

    def tokens(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Make tokens and pass them through the blocks: (B, 3, T, H, W) -> (B, N, D), without the class.

        Args:
            x: Clips.
            visible: (B, n), the numbers of those that take part; the others are dropped, and N is n.
        """
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2], x.shape[3])
        x = x.flatten(1, 3) + self.table(grid)
        if visible is not None:
            x = masking.pick(x, visible)
        x = self.with_class(x)
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, t, h, w): the tokens behind the last block."""
        grid = grid_of(x.shape[2:], self.patch_embed.box)
        return self.tokens(x).unflatten(1, grid).permute(0, 4, 1, 2, 3)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """(B, 3, T, H, W), (B, n) -> (B, n, D): what is made of the visible tubelets."""
        return self.norm(self.tokens(x, visible))


class Decoder(Positions):
    """Blocks of attention over all tokens in their order, each of which becomes pixels.

    Args:
        grid: t, h, w that positions are learned for.
        dim_in: D of the encoder.
        dim: Its own.
        depth: Blocks.
        heads: Of each attention.
        outputs: P, numbers of a prediction.
    """

    def __init__(
        self,
        grid: tuple[int, int, int],
        dim_in: int,
        dim: int,
        depth: int,
        heads: int,
        outputs: int,
    ) -> None:
        super().__init__(grid, dim)
        self.embed = nn.Linear(dim_in, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, 4 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, outputs)
        self._init_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, seen: Tensor, visible: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, n, D of the encoder), (B, n) -> (B, t · h · w, P)."""
        table = self.table(grid)
        seen = self.embed(seen)
        x = self.mask_token.to(seen.dtype).expand(len(seen), table.shape[1], -1)
        x = x.scatter(1, visible.unsqueeze(-1).expand(-1, -1, seen.shape[-1]), seen)
        x = self.with_class(x + table)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 1:]))


class MAEST(Encoder):
    """The encoder with a classifier. Arguments: as of `Encoder`.

    Args:
        num_classes: K; 0 for the normed mean of the tokens.
        dropout: Before the classifier.
        probe: `linear` or `attentive`, see layers/attentive.py; None for the paper's classifier.

    Raises:
        UserError: as of `Encoder`, or there is no such probe.
    """

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
        dropout: float = 0.0,
        drop_path: float = 0.0,
        probe: str | None = None,
    ) -> None:
        check_probe(probe)
        super().__init__(num_frames, size, patch, tubelet, dim, depth, heads, drop_path)
        self.probe, self.heads = probe, heads
        self.dropout = nn.Dropout(dropout)
        self.reset_classifier(num_classes)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, 3, T, H, W) -> (B, K)."""
        return self.head(self.dropout(self.norm(pooled(self.tokens(x), self.head))))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear layer, or the probe; 0 takes it away."""
        if self.probe is not None:
            self.head = make_probe(self.probe, self.num_features, self.heads, num_classes)
            return
        made = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(made, nn.Linear):
            nn.init.trunc_normal_(made.weight, std=HEAD_STD)
            nn.init.zeros_(made.bias)
        self.head = made


class MAESTPretraining(nn.Module):
    """Encoder, decoder and what they are asked.

    Args:
        num_frames: T of the clip that positions are learned for.
        size: Its H and W.
        patch: Pixels of a tubelet's side.
        tubelet: Frames of a tubelet, of which the first is predicted; of the clip's last one the last.
        dim: D of the encoder.
        depth: Its blocks.
        heads: Of each of its attentions.
        decoder_dim: D of the decoder.
        decoder_depth: Its blocks.
        decoder_heads: Of each of its attentions.
        mask_ratio: Share of tubelets that is hidden from the encoder.
        drop_path: Share of clips that skip a branch of the encoder's last block; of earlier ones fewer.

    Raises:
        UserError: tubelets do not fill the clip, heads do not divide a width, or a share is none.
    """

    inputs = ("video",)

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
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.mask_ratio = masking.check_share(mask_ratio)
        self.num_features = dim
        self.encoder = Encoder(num_frames, size, patch, tubelet, dim, depth, heads, drop_path)
        self.box, grid = self.encoder.patch_embed.box, self.encoder.grid
        outputs = 3 * patch**2
        self.decoder = Decoder(grid, dim, decoder_dim, decoder_depth, decoder_heads, outputs)
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
        return masking.make_mask(masking.random(batch, grid, self.mask_ratio, generator))

    def forward(self, x: Tensor, mask: masking.Mask | None = None) -> Tensor:
        """Predict the pixels of `mask.predicted`, as `standardise` has them.

        Args:
            x: (B, 3, T, H, W).
            mask: None: one is drawn.

        Returns:
            (B, m, P) with P = 3 · patch².
        """
        if mask is None:
            mask = self.draw(len(x), tuple(x.shape[2:])).to(x.device)
        grid = grid_of(x.shape[2:], self.box)
        made = self.decoder(self.encoder(x, mask.visible), mask.visible, grid)
        return masking.pick(made, mask.predicted)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, t, h, w): the encoder's tokens of whole clips."""
        return self.encoder.forward_features(x)

    def boxes(self, video: Tensor) -> Tensor:
        """Cut one frame of each tubelet, not normalised, into boxes: (B, 3, T, H, W) -> (B, N, pixels, 3)."""
        slots = video.shape[2] // self.box[0]
        # Spread over the whole clip and rounded down, in whole numbers: 0, 2, 4, 6, 8, 10, 12, 15 of 16.
        last = video.shape[2] - 1
        chosen = [slot * last // max(1, slots - 1) for slot in range(slots)]
        return pixels.cut(video[:, :, chosen], (1, *self.box[1:]))

    def standardise(self, boxes: Tensor) -> pixels.Target:
        """Bring each box, all colours together, to one scale: what is to be predicted."""
        return pixels.standardise(boxes, (-2, -1), VARIANCE, 0.0)

    def picture(self, boxes: Tensor, clip: tuple[int, int, int]) -> Tensor:
        """Put the predicted frames of clips of T, H, W together: (B, N, pixels, 3) -> (B, 3, t, H, W)."""
        return pixels.join(boxes, grid_of(clip, self.box), (1, *self.box[1:]))


def mae_st_base(
    num_classes: int,
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    dropout: float = 0.3,
    drop_path: float = 0.2,
    probe: str | None = None,
) -> MAEST:
    """Build the classifier with the ViT-B encoder."""
    return MAEST(
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


def mae_st_large(
    num_classes: int,
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 1024,
    depth: int = 24,
    heads: int = 16,
    dropout: float = 0.3,
    drop_path: float = 0.2,
    probe: str | None = None,
) -> MAEST:
    """Build the classifier with the ViT-L encoder."""
    return MAEST(
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


def mae_st_huge(
    num_classes: int,
    num_frames: int = 16,
    size: int = 224,
    patch: int = 14,
    tubelet: int = 2,
    dim: int = 1280,
    depth: int = 32,
    heads: int = 16,
    dropout: float = 0.3,
    drop_path: float = 0.2,
    probe: str | None = None,
) -> MAEST:
    """Build the classifier with the ViT-H encoder."""
    return MAEST(
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


def mae_st_base_pretrain(
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    decoder_dim: int = 512,
    decoder_depth: int = 4,
    decoder_heads: int = 16,
    mask_ratio: float = 0.9,
    drop_path: float = 0.0,
) -> MAESTPretraining:
    """Build the masked autoencoder with the ViT-B encoder."""
    return MAESTPretraining(
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
        drop_path,
    )


def mae_st_large_pretrain(
    num_frames: int = 16,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 1024,
    depth: int = 24,
    heads: int = 16,
    decoder_dim: int = 512,
    decoder_depth: int = 4,
    decoder_heads: int = 16,
    mask_ratio: float = 0.9,
    drop_path: float = 0.0,
) -> MAESTPretraining:
    """Build the masked autoencoder with the ViT-L encoder."""
    return MAESTPretraining(
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
        drop_path,
    )


def mae_st_huge_pretrain(
    num_frames: int = 16,
    size: int = 224,
    patch: int = 14,
    tubelet: int = 2,
    dim: int = 1280,
    depth: int = 32,
    heads: int = 16,
    decoder_dim: int = 512,
    decoder_depth: int = 4,
    decoder_heads: int = 16,
    mask_ratio: float = 0.9,
    drop_path: float = 0.0,
) -> MAESTPretraining:
    """Build the masked autoencoder with the ViT-H encoder."""
    return MAESTPretraining(
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
        drop_path,
    )
