"""Time a training step of every network beside the same architecture from another library.

    python scripts/bench/models.py                          # all that have a counterpart, and those that have none
    python scripts/bench/models.py r3d_18 slowfast_r50_8x8 --batch 8

Each network of conf/model/ is built at its paper's clip and trained on noise in bf16. Weights and clips
lie in memory as training hands them over, channels first; a network lays them out as it likes.
`--order last`: both come in channels-last memory; several orders may be given. `--compile` compiles both,
`--guess` lets cuDNN go by its rules instead of trying kernels, which for a long list saves minutes.

Counterparts come from torchvision and, where it is installed, PyTorchVideo, and get channels first. All
take turns, round by round, in one process. Printed is the median time of a step, the ratio ours / theirs,
and the memory that a step takes besides what the others hold. On a CPU the same, in float32 with
`--frames` and `--size` to make it bearable.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from vidtrain import build
from vidtrain.config import conf_dir

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


COUNTERPARTS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda name=name: torchvision_net(name)
        for name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
    },
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
            logits = self.net(*self.inputs)
        if logits.ndim == 3:  # several answers
            logits = logits.flatten(0, 1)
        target = self.target.repeat_interleave(len(logits) // len(self.target))
        nn.functional.cross_entropy(logits.float(), target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
            self.memory = max(self.memory, torch.cuda.max_memory_allocated() - before)
        self.times.append(time.perf_counter() - began)

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
    print(
        f"{'':<24}{'clip':>14}{'batch':>6}{'order':>7}{'ours ms':>10}{'theirs ms':>11}{'ratio':>7}{'ours GB':>9}{'theirs GB':>10}"
    )
    for name in names:
        try:
            print(measure(name, args, device), flush=True)
        except (RuntimeError, ImportError) as error:
            print(f"{name:<24}  not run: {str(error).splitlines()[0][:90]}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch.compiler.reset()


def measure(name: str, args: argparse.Namespace, device: torch.device) -> str:
    """Let ours, in each order, and theirs take turns."""
    overrides = [f"model={name}", "data=kinetics400"]
    overrides += [f"clip.num_frames={args.frames}"] if args.frames else []
    overrides += [f"clip.size={args.size}"] if args.size else []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides)
    ours = build.model(cfg)
    frames, size = cfg.clip.num_frames, cfg.clip.size
    shapes = {"video": (3, frames, size, size), "flow": (2, frames, size, size)}
    inputs = [torch.randn(args.batch, *shapes[key], device=device) for key in ours.inputs]
    contenders = [
        Contender(copy.deepcopy(ours), inputs, device, order, args.compile) for order in args.order
    ]
    theirs = None
    if name in COUNTERPARTS and not args.alone:
        theirs = Contender(COUNTERPARTS[name](), inputs, device, "plain", args.compile)
        contenders.append(theirs)
    for contender in contenders:
        for _ in range(3):  # compiles, chooses kernels
            contender.step()
        contender.times.clear()
    for _ in range(args.rounds):
        for contender in contenders:
            contender.step()
    rows = []
    for order, mine in zip(args.order, contenders, strict=False):
        row = f"{name:<24}{f'{frames}x{size}x{size}':>14}{args.batch:>6}{order:>7}{mine.ms:10.1f}"
        row += f"{theirs.ms:11.1f}{mine.ms / theirs.ms:7.2f}" if theirs else f"{'-':>11}{'-':>7}"
        row += f"{mine.memory / 1e9:9.2f}"
        rows.append(row + (f"{theirs.memory / 1e9:10.2f}" if theirs else f"{'-':>10}"))
    return "\n".join(rows)


if __name__ == "__main__":
    main()
