"""CNN + LSTM (LRCN): an image network on each frame, an LSTM over the frames.

Donahue, Hendricks, Guadarrama, Rohrbach, Venugopalan, Saenko, Darrell. "Long-term Recurrent
Convolutional Networks for Visual Recognition and Description." CVPR 2015.
https://arxiv.org/abs/1411.4389

    backbone    (B, 3, T, H, W) -> (B, D, t, h, w), and its mean over space
    LSTM        (t, B, D) -> (t, B, hidden)
    classifier  of every step (the paper): (B, t, K), or of the last one: (B, K)

The backbone is a 2D network of torchvision by name (or `small`, for small frames and CPUs), of which a
step gets, of alexnet and the vggs, fc6 with its ReLU, as in the paper, and of others the mean of the last
map. That mean does not say where things are, so that what moves as a whole looks the same at every
step: `fc6=256` puts a fully connected layer in its place, which sees the whole map, for one frame size.
With `backbone3d` it is any of our 3D networks (Baccouche et al. 2011 were the first). Or there is none:
with `features=D` the network takes what `vidtrain extract` has written of a frozen one, (B, D, T).

`answers="every"` trains each step; `score="last"` then tests with the last one's softmax alone, as
Carreira and Zisserman (CVPR 2017) did, in place of the mean over the steps. `answers="last"` trains
only the last step. `stream` takes a long video in pieces and carries the state over.

Departs from the paper: its CaffeNet hybrid is not in torchvision, the default is alexnet, whose fc6
is 4096 wide as well; frames are those of torchvision's weights (RGB in 0 to 1, ImageNet's mean and
deviation), not mean-subtracted BGR; flow, with `modality="flow"`, has its two channels and no third
for their magnitude.

Parameters of the LSTM 4,458,496 (4096 to 256, RGB), 20,979,712 (to 1024, flow); with 101 classes in
all 44,706,981; multiply-adds of a clip of 16 x 227 x 227 11.206 G, as tests/models/test_cnn_lstm.py
asserts.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vidtrain.layers.frames import fold_time, unfold_time
from vidtrain.layers.image import image_net, run_stages, stage_shapes
from vidtrain.layers.recurrent import LSTM, State
from vidtrain.types import UserError

CHANNELS = {"video": 3, "flow": 2}


class _Frames(nn.Module):
    """An image network on each frame: fc6 where it has one or is given one, else its last map."""

    def __init__(self, name: str, size: int, in_channels: int, fc6: int | None) -> None:
        super().__init__()
        plain = name == "alexnet" or name.startswith("vgg")
        self.image: Any = image_net(name, 0 if plain else None, size, in_channels)
        self.num_features = self.image.num_features
        if plain:  # its classifier up to the first ReLU, without the dropout before it
            layers = self.image.net.classifier
            first = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear))
            self.image.net.classifier = layers[first : first + 2]
            self.num_features = layers[first].out_features
        self.has_fc6 = plain
        self.fc6: nn.Sequential | None = None
        if fc6 is not None:
            if plain:
                raise UserError(f"model.fc6 is {fc6}, but {name} has its own; leave it out")
            if fc6 < 1:
                raise UserError(f"model.fc6 is {fc6}; it must be at least 1, or null")
            self.size = size
            places = math.prod(stage_shapes(self.image, size, in_channels)[-1][1:])
            self.fc6 = nn.Sequential(nn.Flatten(), nn.Linear(places, fc6), nn.ReLU())
            self.num_features = fc6

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T, h, w), of fc6 h = w = 1."""
        if self.fc6 is not None and x.shape[3:] != (self.size, self.size):
            raise UserError(
                f"the model was built for frames of {self.size} pixels and got"
                f" {x.shape[3]} x {x.shape[4]}: model.fc6 takes one size"
            )
        frames = run_stages(self.image, fold_time(x))
        if self.has_fc6:
            maps = self.image.net.classifier(self.image.net.avgpool(frames).flatten(1))[
                ..., None, None
            ]
        else:
            maps = self.image.to_map(frames)
            if self.fc6 is not None:
                maps = self.fc6(maps)[..., None, None]
        return unfold_time(maps, x.shape[2])


class _Clips(nn.Module):
    """A 3D network on each of the equal parts of a clip, without the layers after its map."""

    def __init__(self, net: nn.Module, segments: int, clip: tuple[int, int, int, int]) -> None:
        super().__init__()
        if not hasattr(net, "forward_features") or len(getattr(net, "inputs", ())) != 1:
            raise UserError(
                "model.backbone3d must be one of vidtrain's networks of one input:"
                " {_target_: vidtrain.models.c3d.c3d, num_classes: 0}"
            )
        self.net, self.segments = net, segments
        self.num_features: int = net.num_features
        _drop_unused(net, clip)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, S·T, H, W) -> (B, D, S·t, h, w)."""
        parts = rearrange(x, "b c (s t) h w -> (b s) c t h w", s=self.segments)
        maps = self.net.forward_features(parts)
        return rearrange(maps, "(b s) d t h w -> b d (s t) h w", s=self.segments)


class _Probe(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_features(x)


def _drop_unused(net: nn.Module, clip: tuple[int, int, int, int]) -> None:
    """Take away what `forward_features` does not use: C3D's fully connected layers are most of it.

    A backward pass tells, on the meta device, where nothing is computed.

    Raises:
        UserError: the network does not take such clips.
    """
    probe = _Probe(copy.deepcopy(net).to("meta").eval())
    names, parameters = zip(*probe.net.named_parameters(), strict=True)
    try:
        with torch.enable_grad():
            output = probe(torch.empty(2, *clip, device="meta"))
            gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model.backbone3d does not take {clip[1]} frames of {clip[2]} pixels: {reason}"
        ) from None
    used = [name for name, g in zip(names, gradients, strict=True) if g is not None]
    for name, child in list(net.named_children()):
        if any(True for _ in child.parameters()) and not any(
            u.startswith(f"{name}.") for u in used
        ):
            setattr(net, name, nn.Identity())


class CNNLSTM(nn.Module):
    """A backbone, an LSTM over its steps, and a classifier.

    Args:
        num_classes: K; 0 for the last step's state.
        backbone: What comes before the LSTM: `forward_features` and `num_features`; None where
            features come in.
        features: D of them.
        inputs: The batch key of what comes in.
        hidden: Width of the LSTM.
        layers: Of the LSTM.
        dropout_features: Before it.
        dropout: After it, and between its layers.
        answers: last: one, (B, K); every: one a step, (B, S, K).
        score: Which of the answers make a video's score: mean or last.
        init: First weights of LSTM and classifier, see `cnn_lstm`.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: nn.Module | None,
        features: int | None,
        inputs: tuple[str, ...],
        hidden: int,
        layers: int,
        dropout_features: float,
        dropout: float,
        answers: str,
        score: str,
        init: float | None,
    ) -> None:
        super().__init__()
        self.inputs, self.answers, self.score = inputs, answers, score
        self.backbone = backbone
        self.num_features: int = features if backbone is None else backbone.num_features  # type: ignore
        self.dropout_features = nn.Dropout(dropout_features)
        self.lstm = LSTM(self.num_features, hidden, layers, dropout)
        self.dropout = nn.Dropout(dropout)
        self.reset_classifier(num_classes)
        self._init_weights(init)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W), or (B, D, T), -> (B, D, t, h, w), before the LSTM."""
        if self.backbone is None:
            if x.shape[1] != self.num_features:
                raise UserError(
                    f"the model was built for features of {self.num_features} numbers and got"
                    f" {x.shape[1]}; set model.features={x.shape[1]}"
                )
            return x[..., None, None]
        return self.backbone.forward_features(x)

    def steps(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(B, C, T, H, W), or (B, D, T), -> (S, B, hidden) of every step, and the state after it."""
        means = self.forward_features(x).mean((3, 4)).permute(2, 0, 1)
        return self.lstm(self.dropout_features(means), state)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W), or (B, D, T), -> (B, K), or (B, S, K) where every step answers."""
        steps, _ = self.steps(x)
        every = self.answers == "every" and isinstance(self.classifier, nn.Linear)
        return self.classifier(self.dropout(steps.transpose(0, 1) if every else steps[-1]))

    def stream(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Take a long video in pieces: (B, S, K) of a piece's steps, and the state for the next.

        Args:
            x: The next (B, C, T, H, W), or (B, D, T).
            state: What came with the piece before; None for the first.
        """
        steps, state = self.steps(x, state)
        return self.classifier(self.dropout(steps.transpose(0, 1))), state

    def fuse(self, scores: Tensor) -> Tensor:
        """(B, S, K) of all answers -> (B, K)."""
        return scores.mean(1) if self.score == "mean" else scores[:, -1]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        hidden = self.lstm.hidden_size
        self.classifier = nn.Linear(hidden, num_classes) if num_classes else nn.Identity()

    def _init_weights(self, init: float | None) -> None:
        bound = self.lstm.hidden_size**-0.5 if init is None else init
        for name, parameter in self.lstm.named_parameters():
            if not name.startswith("bias"):
                nn.init.uniform_(parameter, -bound, bound)
                continue
            nn.init.zeros_(parameter)
            if init is None and name.startswith("bias_ih"):  # input, forget, cell, output
                nn.init.ones_(parameter.data.chunk(4)[1])
        if init is not None and isinstance(self.classifier, nn.Linear):
            nn.init.normal_(self.classifier.weight, std=init)
            nn.init.zeros_(self.classifier.bias)


def cnn_lstm(
    num_classes: int,
    num_frames: int = 16,
    size: int = 227,
    backbone: str = "alexnet",
    backbone3d: nn.Module | None = None,
    segments: int = 1,
    features: int | None = None,
    fc6: int | None = None,
    modality: str = "video",
    hidden: int = 256,
    layers: int = 1,
    dropout_features: float = 0.9,
    dropout: float = 0.5,
    answers: str = "every",
    score: str = "mean",
    init: float | None = 0.01,
) -> CNNLSTM:
    """Build LRCN; `hidden=1024` with `modality="flow"` is the paper's other network.

    Args:
        num_classes: K.
        num_frames: T of the clips; only a 3D backbone needs to know.
        size: Height and width of the frames.
        backbone: A 2D network of torchvision (alexnet, vgg16, resnet18, ...) or small.
        backbone3d: A 3D network in its place.
        segments: Into how many equal parts a clip is cut, which go through it one by one.
        features: D, to train on extracted features instead; there is no backbone then.
        fc6: Width of a fully connected layer on each frame's last map, for 2D networks without one;
            None for the map's mean.
        modality: video or flow.
        hidden: See `CNNLSTM`, as the rest.
        layers: Of the LSTM.
        dropout_features: Before it.
        dropout: After it.
        answers: last or every.
        score: mean or last.
        init: The LSTM's first weights are uniform from -init to init, its biases 0, the classifier's
            weights a Gaussian of so much: the paper's, for a network that starts from a trained CNN.
            None, for one that starts from nothing: uniform within 1 / sqrt(hidden) with a forget bias
            of 1 (Jozefowicz et al. 2015), so that a state outlives a few frames.

    Raises:
        UserError: naming the key that is wrong.
    """
    if answers not in ("last", "every"):
        raise UserError(f"model.answers is '{answers}'; it is last or every")
    if score not in ("mean", "last"):
        raise UserError(f"model.score is '{score}'; it is mean or last")
    net: nn.Module | None = None
    inputs: tuple[str, ...] = ("features",)
    if fc6 is not None and (features is not None or backbone3d is not None):
        raise UserError(f"model.fc6 is {fc6}, but only a 2D backbone takes one; leave it out")
    if features is None:
        if modality not in CHANNELS:
            raise UserError(f"model.modality is '{modality}'; it is video or flow")
        inputs = (modality,)
        if backbone3d is None:
            net = _Frames(backbone, size, CHANNELS[modality], fc6)
        else:
            if segments < 1 or num_frames % segments:
                raise UserError(
                    f"model.segments is {segments}; it must divide clip.num_frames, {num_frames}"
                )
            inputs = tuple(getattr(backbone3d, "inputs", inputs))
            clip = (CHANNELS[inputs[0]], num_frames // segments, size, size)
            net = _Clips(backbone3d, segments, clip)
    return CNNLSTM(
        num_classes,
        net,
        features,
        inputs,
        hidden,
        layers,
        dropout_features,
        dropout,
        answers,
        score,
        init,
    )
