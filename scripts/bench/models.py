"""Time a training step of every network beside the same architecture from another library.

    python scripts/bench/models.py                          # all that have a counterpart, and those that have none
    python scripts/bench/models.py r3d_18 slowfast_r50_8x8 --batch 8

Each network of conf/model/ is built at its paper's clip and trained on noise in bf16. Weights and clips
lie in memory as training hands them over, channels first; a network lays them out as it likes.
`--order last`: both come in channels-last memory; several orders may be given. `--compile` compiles both,
`--guess` lets cuDNN go by its rules instead of trying kernels, which for a long list saves minutes.

Counterparts come from torchvision and, where they are installed, PyTorchVideo and transformers, and get
channels first. All take turns, round by round, in one process. Printed is the median time of a step, the
ratio ours / theirs, the memory that a step takes besides what the others hold, clips a second, and the
share of the device's rate of matrix products that the network's arithmetic comes to: three forward passes
(see vidtrain/callbacks/mfu.py), counted of ours for both, over what a large square product reaches here,
best of several rounds. On a CPU the same, in float32 with `--frames` and `--size` to make it bearable.

Masked autoencoders are timed with their loss, and both hide the same. transformers has no drop path, so
that ours does without beside it; its VideoMAE attends by `scaled_dot_product_attention`, its TimeSformer
by products and a softmax, having no other.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from vidtrain import build
from vidtrain.callbacks.mfu import OPERATIONS, MultiplyAdds
from vidtrain.config import conf_dir
from vidtrain.layers.masking import Mask
from vidtrain.losses.reconstruction import masked_mse

CLASSES = 400
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def torchvision_net(name: str) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=CLASSES)


def pytorchvideo_net(name: str) -> nn.Module:
    from pytorchvideo.models import hub

    return getattr(hub, name)(pretrained=False)


class Pathways(nn.Module):
    """PyTorchVideo's SlowFast, which is given both pathways."""

    def __init__(self, net: nn.Module, alpha: int) -> None:
        super().__init__()
        self.net, self.alpha = net, alpha

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return self.net([video[:, :, :: self.alpha], video])


class Pretraining(nn.Module):
    """A masked autoencoder and its loss, as task=masked_pretraining has it, with a mask that stays."""

    def __init__(self, net: nn.Module, mask: Mask, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.net, self.mask = net, mask
        self.register_buffer("mean", torch.tensor(list(mean)).view(3, 1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(3, 1, 1, 1))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        predicted = self.net(video, self.mask)
        boxes = self.net.boxes(video * self.std + self.mean)
        numbers = self.mask.predicted[..., None, None].expand(-1, -1, *boxes.shape[2:])
        target = self.net.standardise(boxes.gather(1, numbers)).values
        return masked_mse(predicted, target, self.mask.counted).mean()


class Transformers(nn.Module):
    """A network of transformers, which wants frames first. With a mask it gives its loss, else logits.

    Args:
        name: Of the class.
        frames: Of a clip.
        size: Of a frame.
        mask: Of the clips of a batch.
        kwargs: Of the configuration.
    """

    def __init__(self, name: str, frames: int, size: int, mask: Mask | None, **kwargs: Any):
        import transformers

        super().__init__()
        family = name.partition("For")[0]
        config = getattr(transformers, f"{family}Config")(
            image_size=size, num_frames=frames, num_labels=CLASSES, **kwargs
        )
        self.net = getattr(transformers, name)(config)
        self.hidden = None
        if mask is not None:
            count = mask.visible.shape[1] + mask.predicted.shape[1]
            flags = torch.ones(len(mask.visible), count, dtype=torch.bool)
            self.hidden = flags.to(mask.visible.device).scatter(1, mask.visible, False)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        video = video.transpose(1, 2)
        if self.hidden is not None:
            return self.net(video, bool_masked_pos=self.hidden).loss
        return self.net(video).logits


# Names of classes, and what their configurations get besides the clip.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "videomae_base": ("VideoMAEForVideoClassification", {"attn_implementation": "sdpa"}),
    "videomae_base_pretrain": (
        "VideoMAEForPreTraining",
        {"attn_implementation": "sdpa", "use_mean_pooling": False},
    ),
    "timesformer_base": ("TimesformerForVideoClassification", {}),
}

COUNTERPARTS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda name=name: torchvision_net(name)
        for name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
    },
    "mvit_v1_b_16x4": lambda: torchvision_net("mvit_v1_b"),
    "mvit_v2_s_16x4": lambda: torchvision_net("mvit_v2_s"),
    "c2d_r50_8x8": lambda: pytorchvideo_net("c2d_r50"),
    "i3d_r50_8x8": lambda: pytorchvideo_net("i3d_r50"),
    "slow_r50_8x8": lambda: pytorchvideo_net("slow_r50"),
    "slowfast_r50_8x8": lambda: Pathways(pytorchvideo_net("slowfast_r50"), 4),
    "slowfast_r101_16x8": lambda: Pathways(pytorchvideo_net("slowfast_16x8_r101_50_50"), 4),
    **{
        name: lambda name=name: pytorchvideo_net(name)
        for name in ("x3d_xs", "x3d_s", "x3d_m", "x3d_l")
    },
}


class Contender:
    """A network, its optimizer and a batch of noise."""

    def __init__(
        self,
        net: nn.Module,
        inputs: list[torch.Tensor],
        device: torch.device,
        order: str,
        compile: bool,
    ) -> None:
        self.device = device
        net = net.to(device)
        if order == "last":
            for parameter in net.parameters():
                if parameter.ndim in FORMATS:
                    parameter.data = parameter.data.to(memory_format=FORMATS[parameter.ndim])
            inputs = [x.contiguous(memory_format=torch.channels_last_3d) for x in inputs]
        self.inputs = inputs
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
        self.net = torch.compile(net) if compile else net
        self.target = torch.randint(CLASSES, (len(inputs[0]),), device=device)
        self.times: list[float] = []
        self.memory = 0

    def step(self) -> None:
        """Take one step and note how long it took."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=cuda):
            out = self.net(*self.inputs)
        if out.ndim == 0:
            loss = out
        else:
            logits = out.flatten(0, -2)  # of several answers, maybe
            target = self.target.repeat_interleave(len(logits) // len(self.target))
            loss = nn.functional.cross_entropy(logits.float(), target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
            self.memory = max(self.memory, torch.cuda.max_memory_allocated() - before)
        self.times.append(time.perf_counter() - began)

    def warm_up(self) -> None:
        """Take steps that do not count: they compile and choose kernels."""
        for _ in range(3):
            self.step()
        self.times.clear()

    @property
    def ms(self) -> float:
        """The median time of a step, in milliseconds."""
        return 1000 * statistics.median(self.times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names of conf/model/; all, if left out")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--guess", action="store_true", help="cuDNN does not try kernels")
    parser.add_argument("--order", nargs="+", choices=("plain", "last"), default=["plain"])
    parser.add_argument("--alone", action="store_true", help="without the counterparts")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = not args.guess
    names = args.models or sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}"
    )
    rate = matrix_rate(device)
    print(
        f"matrix products: {rate / 1e12:.3g} T/s in {'bf16' if device.type == 'cuda' else 'float32'}"
    )
    print(
        f"{'':<24}{'clip':>14}{'batch':>6}{'order':>7}{'ours ms':>10}{'theirs ms':>11}{'ratio':>7}{'ours GB':>9}{'theirs GB':>10}"
        f"{'clips/s':>9}{'theirs':>8}{'share':>8}{'theirs':>8}"
    )
    for name in names:
        try:
            print(measure(name, args, device, rate), flush=True)
        except (RuntimeError, ImportError) as error:
            print(f"{name:<24}  not run: {str(error).splitlines()[0][:90]}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch.compiler.reset()


def matrix_rate(device: torch.device) -> float:
    """Multiply two large square matrices of noise, and give the operations a second of the best round."""
    cuda = device.type == "cuda"
    size, dtype, times = (8192, torch.bfloat16, 20) if cuda else (1024, torch.float32, 2)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rounds = []
    for _ in range(6):  # the first chooses a kernel
        began = time.perf_counter()
        for _ in range(times):
            a @ b
        if cuda:
            torch.cuda.synchronize()
        rounds.append(time.perf_counter() - began)
    return 2 * size**3 * times / min(rounds)


def measure(name: str, args: argparse.Namespace, device: torch.device, rate: float) -> str:
    """Let ours, in each order, and theirs take turns."""
    overrides = [f"model={name}", "data=kinetics400"]
    overrides += [f"clip.num_frames={args.frames}"] if args.frames else []
    overrides += [f"clip.size={args.size}"] if args.size else []
    overrides += ["model.drop_path=0"] if name in TRANSFORMERS else []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides)
    ours = build.model(cfg)
    frames, size = cfg.clip.num_frames, cfg.clip.size
    shapes = {"video": (3, frames, size, size), "flow": (2, frames, size, size)}
    inputs = [torch.randn(args.batch, *shapes[key], device=device) for key in ours.inputs]
    macs = MultiplyAdds(ours)(*(x.shape[1:] for x in inputs))
    mask = None
    if hasattr(ours, "draw"):
        mask = ours.draw(args.batch, (frames, size, size)).to(device)
        ours = Pretraining(ours, mask, cfg.clip.mean, cfg.clip.std)
    contenders = []
    for order in args.order:
        contenders.append(Contender(copy.deepcopy(ours), inputs, device, order, args.compile))
        contenders[-1].warm_up()
    theirs = None
    if (name in COUNTERPARTS or name in TRANSFORMERS) and not args.alone:
        try:
            net = counterpart(name, frames, size, mask)
            theirs = Contender(net, inputs, device, "plain", args.compile)
            theirs.warm_up()
            contenders.append(theirs)
        except (RuntimeError, ImportError) as error:
            theirs = None
            print(f"{name:<24}  theirs not run: {str(error).splitlines()[0][:90]}", flush=True)
    for _ in range(args.rounds):
        for contender in contenders:
            contender.step()

    share = OPERATIONS * macs * args.batch / rate  # seconds of matrix products in a step
    rows = []
    for order, mine in zip(args.order, contenders, strict=False):
        pair = [mine, theirs]
        row = f"{name:<24}{f'{frames}x{size}x{size}':>14}{args.batch:>6}{order:>7}"
        row += cells([one and one.ms for one in pair], (10, 11), ".1f")
        row += cells([theirs and mine.ms / theirs.ms], (7,), ".2f")
        row += cells([one and one.memory / 1e9 for one in pair], (9, 10), ".2f")
        row += cells([one and 1000 * args.batch / one.ms for one in pair], (9, 8), ".1f")
        row += cells([one and 1000 * share / one.ms for one in pair], (8, 8), ".1%")
        rows.append(row)
    return "\n".join(rows)


def cells(values: list[float | None], widths: tuple[int, ...], form: str) -> str:
    """Write numbers in columns, a dash for one that there is not."""
    return "".join(
        f"{'-':>{width}}" if value is None else f"{value:{width}{form}}"
        for value, width in zip(values, widths, strict=True)
    )


def counterpart(name: str, frames: int, size: int, mask: Mask | None) -> nn.Module:
    """Build the same network from another library."""
    if name not in TRANSFORMERS:
        return COUNTERPARTS[name]()
    kind, kwargs = TRANSFORMERS[name]
    return Transformers(kind, frames, size, mask, **kwargs)


if __name__ == "__main__":
    main()
