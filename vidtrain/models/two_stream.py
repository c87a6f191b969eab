"""Two-stream: one network for what is seen in a frame, one for how it moves.

Simonyan, Zisserman. "Two-Stream Convolutional Networks for Action Recognition in Videos." NIPS 2014.
https://arxiv.org/abs/1406.2199

    spatial    one frame of the clip, the middle one (T // 2)      (B, 3, H, W)  -> (B, K)
    temporal   L flow fields, stacked as channels                  (B, 2L, H, W) -> (B, K)

The channels are dx of field 1, dy of field 1, dx of field 2, and so on, in pixels. `fields="L"` takes
one field for every frame of the clip, as in the paper; `fields="T-1"` leaves out the last one, which
leads out of the clip, as in CS231n's lecture on video understanding (Gao, 2025): 2 (T - 1) channels.
`stacking="trajectory"` takes each field where the ones before it have led, `stacking="flow"` where the
pixel is. Bi-directional flow and the subtraction of each field's mean are made where flow is read:
`data.flow_direction`, `data.flow_mean`.

Both streams are CNN-M-2048 (Chatfield et al. 2014, https://arxiv.org/abs/1405.3531):

    conv1 N P conv2 N P conv3 conv4 conv5 P full6 full7 classifier

ReLU after each, N local response normalisation (the temporal stream has no second one), P max pooling
of 3 x 3, stride 2, with a last window over the rest; 512 x 6 x 6 values go into full6. `backbone` and
`temporal_backbone` put a 2D network of torchvision in its place, or `small`, for small clips and CPUs.
From the weights of an image network (`model.weights`) the temporal stream's first convolution gets the
mean over R, G and B for each of its channels (Wang et al., ECCV 2016).

A network of both answers twice. `fusion="average"` is the mean of the streams' softmax scores;
`fusion="svm"` a linear SVM on both, each of unit length, fitted to the training videos once training
is over (`vidtrain.callbacks.fit_fusion`) and kept in the checkpoint. `streams` trains one alone; two that
were trained so meet in `model.weights={spatial: a.ckpt, temporal: b.ckpt}`, and `trainer.max_epochs=0`
then does nothing but fit the SVM.

Departs from the paper: both streams learn at once, where they are not trained alone, and as the loss is
the mean of theirs each then sees half the gradient; weights start as in He et al. 2015, where it is
silent; no multi-task learning.

Parameters with 101 classes: spatial 90,627,813, temporal (L = 10) 90,707,781; multiply-adds 1.664 and
2.614 G, as tests/models/test_two_stream.py asserts.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidtrain.layers.frames import check_clip
from vidtrain.layers.image import ImageNet, PlainNet, image_net, run_stages
from vidtrain.types import UserError

STREAMS = {"both": ("spatial", "temporal"), "spatial": ("spatial",), "temporal": ("temporal",)}
INPUT = {"spatial": "video", "temporal": "flow"}


def _cnn_m_2048(
    num_classes: int, size: int, in_channels: int, norm2: bool, dropout: float
) -> PlainNet:
    """Build CNN-M-2048.

    Args:
        num_classes: K; 0 for full7.
        size: Height and width of the images.
        in_channels: Of conv1.
        norm2: Whether conv2 is followed by local response normalisation.
        dropout: On full6 and full7.

    Raises:
        UserError: the images are too small for it.
    """
    if size < 41:
        raise UserError(f"cnn_m_2048 needs frames of at least 41 pixels, not {size}")
    norm = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
    pool = {"kernel_size": 3, "stride": 2, "ceil_mode": True}
    body = OrderedDict(
        conv1=nn.Conv2d(in_channels, 96, 7, stride=2),
        relu1=nn.ReLU(),
        norm1=nn.LocalResponseNorm(**norm),
        pool1=nn.MaxPool2d(**pool),
        conv2=nn.Conv2d(96, 256, 5, stride=2, padding=1),
        relu2=nn.ReLU(),
        norm2=nn.LocalResponseNorm(**norm) if norm2 else nn.Identity(),
        pool2=nn.MaxPool2d(**pool),
        conv3=nn.Conv2d(256, 512, 3, padding=1),
        relu3=nn.ReLU(),
        conv4=nn.Conv2d(512, 512, 3, padding=1),
        relu4=nn.ReLU(),
        conv5=nn.Conv2d(512, 512, 3, padding=1),
        relu5=nn.ReLU(),
    )
    side = _pooled((size - 7) // 2 + 1)
    side = _pooled(_pooled((side + 2 - 5) // 2 + 1))
    neck = OrderedDict(
        pool5=nn.MaxPool2d(**pool),
        flatten=nn.Flatten(),
        full6=nn.Linear(512 * side * side, 4096),
        relu6=nn.ReLU(),
        drop6=nn.Dropout(dropout),
        full7=nn.Linear(4096, 2048),
        relu7=nn.ReLU(),
        drop7=nn.Dropout(dropout),
    )
    return PlainNet(nn.Sequential(body), nn.Sequential(neck), 512, 2048, num_classes, size)


def _pooled(side: int) -> int:
    """Give the side of a map after a pool of 3 x 3, stride 2, whose last window covers the rest."""
    return -((3 - side) // 2) + 1


class SVM(nn.Module):
    """Linear SVMs, one for each class against the rest, on the scores of all streams.

    Its numbers are buffers, so that a checkpoint holds them; `vidtrain.callbacks.fit_fusion` finds
    them.

    Attributes:
        fitted: () bool.
        pending: training is under way, after which it will be fitted.
    """

    weight: Tensor
    bias: Tensor
    fitted: Tensor

    def __init__(self, num_streams: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_classes, num_streams * num_classes))
        self.register_buffer("bias", torch.zeros(num_classes))
        self.register_buffer("fitted", torch.tensor(False))
        self.pending = False

    def features(self, scores: Tensor) -> Tensor:
        """(N, S, K) scores -> (N, S·K), the K of each stream of unit length."""
        return F.normalize(scores, dim=-1).flatten(1)

    def set(self, weight: Tensor, bias: Tensor) -> None:
        """Take (K, S·K) weights and (K,) biases."""
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.fitted.fill_(True)

    def forward(self, scores: Tensor) -> Tensor:
        """(N, S, K) scores -> (N, K): softmax of the distances from the K planes.

        These are no probabilities: their order is what the SVM says.
        """
        features = self.features(scores).to(self.weight.dtype)
        return F.linear(features, self.weight, self.bias).softmax(-1)


def _along_trajectories(flow: Tensor) -> Tensor:
    """Take field k at p_k, where p_1 is the pixel and p_k = p_(k-1) + field k-1 at p_(k-1).

    Between pixels it is interpolated; outside of the frame the nearest pixel counts. Every field must
    lead to the frame of the next one (`clip.stride=1`), in pixels of the clip.

    Args:
        flow: (B, 2, L, H, W) in pixels, dx first.

    Returns:
        The same, of which [:, :, k, y, x] belongs to the point that began at (x, y).
    """
    height, width = flow.shape[3:]
    ys = torch.arange(height, device=flow.device, dtype=flow.dtype)
    xs = torch.arange(width, device=flow.device, dtype=flow.dtype)
    place = torch.stack(torch.meshgrid(xs, ys, indexing="xy"))[None]  # (1, 2, H, W), x first
    half = flow.new_tensor([max(width - 1, 1) / 2, max(height - 1, 1) / 2]).view(1, 2, 1, 1)
    steps = [flow[:, :, 0]]
    for field in flow.unbind(2)[1:]:
        place = place + steps[-1]
        grid = (place / half - 1).permute(0, 2, 3, 1)  # -1 and 1 are the outermost pixels
        steps.append(F.grid_sample(field, grid, padding_mode="border", align_corners=True))
    return torch.stack(steps, 2)


class TwoStream(nn.Module):
    """An image network on a frame, and one on stacked flow.

    Args:
        spatial: Image network on a frame, or None.
        temporal: Image network on stacked flow, or None.
        num_classes: K; 0 for the embeddings of both, one after the other.
        num_frames: T of the clips.
        fields: How many of their T fields are stacked.
        stacking: Where each is taken: flow, at the pixel; trajectory, where those before it lead.
        fusion: What makes one score of the streams' two: average or svm.
        flow_bound: Pixels of displacement that come in as 1.
    """

    def __init__(
        self,
        spatial: ImageNet | None,
        temporal: ImageNet | None,
        num_classes: int,
        num_frames: int,
        fields: int,
        stacking: str,
        fusion: str,
        flow_bound: float,
    ) -> None:
        super().__init__()
        if spatial is not None:
            self.spatial = spatial
        if temporal is not None:
            self.temporal = temporal
        self.streams = [name for name, _ in self.named_children()]
        self.inputs = tuple(INPUT[name] for name in self.streams)
        self.num_features = sum(net.num_features for net in self.children())  # type: ignore[misc]
        self.num_frames, self.fields = num_frames, fields
        self.stacking, self.fusion, self.flow_bound = stacking, fusion, flow_bound
        self.num_classes = num_classes
        self.svm = self._new_svm()

    def _new_svm(self) -> SVM | None:
        return SVM(2, self.num_classes) if self.fusion == "svm" and self.num_classes else None

    def frame(self, video: Tensor) -> Tensor:
        """Take the middle frame: (B, 3, T, H, W) -> (B, 3, H, W)."""
        return video[:, :, video.shape[2] // 2]

    def stack(self, flow: Tensor) -> Tensor:
        """Stack the fields, in pixels: (B, 2, T, H, W) -> (B, 2L, H, W)."""
        check_clip(flow, self.num_frames)
        flow = flow[:, :, : self.fields] * self.flow_bound
        if self.stacking == "trajectory":
            flow = _along_trajectories(flow.float()).to(flow.dtype)  # bf16 cannot tell pixels apart
        return rearrange(flow, "b c t h w -> b (t c) h w")

    def _images(self, inputs: tuple[Tensor, ...]) -> list[tuple[ImageNet, Tensor]]:
        """Pair each stream's network with the image that it takes."""
        take = {"spatial": self.frame, "temporal": self.stack}
        return [
            (getattr(self, name), take[name](x))
            for name, x in zip(self.streams, inputs, strict=True)
        ]

    def forward_features(self, *inputs: Tensor) -> Tensor:
        """Video, flow or both, (B, C, T, H, W) -> (B, D, 1, h, w), the streams' maps together.

        Where the streams differ, larger maps are averaged to the size of the smallest.
        """
        maps = [net.to_map(run_stages(net, x)) for net, x in self._images(inputs)]
        size = min(tuple(one.shape[2:]) for one in maps)
        maps = [
            one if tuple(one.shape[2:]) == size else F.adaptive_avg_pool2d(one, size)
            for one in maps
        ]
        return torch.cat(maps, 1).unsqueeze(2)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Video, flow or both, (B, C, T, H, W) -> (B, K) of one stream, (B, 2, K) of both."""
        answers = []
        for net, x in self._images(inputs):
            check_clip(x.unsqueeze(2), size=net.fixed_size)
            answers.append(net(x))
        if len(answers) == 1:
            return answers[0]
        return torch.stack(answers, 1) if self.num_classes else torch.cat(answers, 1)

    def fuse(self, scores: Tensor) -> Tensor:
        """(B, 2, K) scores of spatial and temporal stream -> (B, K).

        Their mean, or what the SVM says; as long as that is to be fitted, their mean.

        Raises:
            UserError: the SVM has never been fitted.
        """
        if self.svm is None or self.svm.pending or self.training:
            return scores.mean(1)
        if not self.svm.fitted:
            raise UserError(
                "model.fusion=svm: the SVM is fitted when training ends, by callbacks.fusion, and"
                " this checkpoint is from before; test the best one of a finished run (ckpt=its folder)"
            )
        return self.svm(scores)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifiers, and forget a fitted SVM; 0 takes them away."""
        for name in self.streams:
            getattr(self, name).reset_classifier(num_classes)
        self.num_classes = num_classes
        self.svm = self._new_svm()


def two_stream(
    num_classes: int,
    num_frames: int = 10,
    size: int = 224,
    streams: str = "both",
    fields: str = "L",
    stacking: str = "flow",
    fusion: str = "average",
    backbone: str = "cnn_m_2048",
    temporal_backbone: str | None = None,
    dropout: float = 0.9,
    stride: int = 1,
    flow_bound: float = 20.0,
) -> TwoStream:
    """Build both streams, or one.

    Args:
        num_classes: K.
        num_frames: T of the clips.
        size: Height and width of the frames.
        streams: both, spatial or temporal.
        fields: How many flow fields of the clip are stacked: `L`, one a frame, or `T-1`.
        stacking: flow or trajectory.
        fusion: average or svm.
        backbone: cnn_m_2048, small, or a 2D network of torchvision.
        temporal_backbone: That of the temporal stream; None: the same.
        dropout: Of cnn_m_2048; torchvision's networks keep theirs.
        stride: Of the clips' frames. Trajectories need 1: a field leads to the next frame.
        flow_bound: Pixels of displacement that come in as 1.

    Raises:
        UserError: naming the key that is wrong.
    """
    for key, value, known in (
        ("streams", streams, tuple(STREAMS)),
        ("fields", fields, ("L", "T-1")),
        ("stacking", stacking, ("flow", "trajectory")),
        ("fusion", fusion, ("average", "svm")),
    ):
        if value not in known:
            raise UserError(f"model.{key} is '{value}'; it must be one of {', '.join(known)}")
    if fusion == "svm" and streams != "both":
        raise UserError(f"model.fusion=svm needs two streams; model.streams is '{streams}'")
    if stacking == "trajectory" and stride != 1:
        raise UserError(
            f"model.stacking=trajectory follows each field to the next frame; clip.stride is {stride},"
            " set it to 1"
        )
    stacked = num_frames - (fields == "T-1")
    if stacked < 1:
        raise UserError("model.fields=T-1 leaves out the last flow field; set clip.num_frames to 2")
    channels = {"spatial": 3, "temporal": 2 * stacked}
    names = {"spatial": backbone, "temporal": temporal_backbone or backbone}
    nets: dict[str, ImageNet] = {}
    for stream in STREAMS[streams]:
        if names[stream] == "cnn_m_2048":
            norm2 = stream == "spatial"
            nets[stream] = _cnn_m_2048(num_classes, size, channels[stream], norm2, dropout)
        else:
            others = ["cnn_m_2048"]
            nets[stream] = image_net(names[stream], num_classes, size, channels[stream], others)
    both = nets.get("spatial"), nets.get("temporal")
    return TwoStream(*both, num_classes, num_frames, stacked, stacking, fusion, flow_bound)
