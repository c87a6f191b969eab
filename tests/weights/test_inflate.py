"""Inflation: a video of one frame repeated gives what the frame gives, and where it does not."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from vidtrain.layers.same import SameConv3d, SameMaxPool3d
from vidtrain.models.i3d import i3d
from vidtrain.types import UserError
from vidtrain.weights.inflate import central_frame, inflate, inflate_kernel


class TimeConv(nn.Conv3d):
    """A convolution whose clip is padded in time by zeros or by its first and last frame."""

    mode = "replicate"

    def forward(self, x: Tensor) -> Tensor:
        t = self.kernel_size[0] // 2
        mode = {"mode": "replicate"} if self.mode == "replicate" else {"value": 0.0}
        return super().forward(F.pad(x, (0, 0, 0, 0, t, t), **mode))


def in_3d(net: nn.Module, mode: str) -> nn.Module:
    """Give every kernel and pool of a 2D network, and every norm, a time axis; new weights."""
    for name, child in list(net.named_children()):
        if isinstance(child, nn.Conv2d):
            extent = {7: 5, 3: 3, 1: 1}[child.kernel_size[0]]
            new: nn.Module = TimeConv(
                child.in_channels,
                child.out_channels,
                (extent, *child.kernel_size),
                (1, *child.stride),
                (0, *child.padding),
                bias=child.bias is not None,
            )
            new.mode = mode
        elif isinstance(child, nn.BatchNorm2d):
            new = nn.BatchNorm3d(child.num_features)
        elif isinstance(child, nn.MaxPool2d):
            new = nn.MaxPool3d(3, (1, child.stride, child.stride), 1)
        elif isinstance(child, nn.AdaptiveAvgPool2d):
            new = nn.AdaptiveAvgPool3d(1)
        else:
            in_3d(child, mode)
            continue
        setattr(net, name, new)
    return net


def shake(net: nn.Module) -> nn.Module:
    """Give batch norms statistics and affine parameters that hide nothing."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return net.eval()


def resnets(how: str, mode: str) -> tuple[nn.Module, nn.Module]:
    """Make a 2D ResNet-18, and the same inflated."""
    torch.manual_seed(0)
    flat = shake(torchvision.models.resnet18(num_classes=10))
    inflated = in_3d(torchvision.models.resnet18(num_classes=10), mode).eval()
    inflated.load_state_dict(inflate(flat.state_dict(), inflated, how))
    return flat, inflated


def repeat(frame: Tensor, times: int) -> Tensor:
    return frame.unsqueeze(2).repeat(1, 1, times, 1, 1)


@pytest.mark.parametrize(
    ("how", "mode", "holds"),
    [
        ("average", "replicate", True),
        ("centre", "replicate", True),
        ("centre", "zeros", True),
        ("average", "zeros", False),  # frames at both ends lose taps
    ],
)
@torch.no_grad()
def test_a_video_of_one_frame_gives_what_the_frame_gives(how, mode, holds):
    flat, inflated = resnets(how, mode)
    frame = torch.randn(2, 3, 64, 64)
    expected = flat(frame)
    difference = (inflated(repeat(frame, 8)) - expected).abs().max() / expected.abs().max()
    assert expected.std() > 0.5
    assert difference < 1e-5 if holds else difference > 0.05


@torch.no_grad()
def test_frames_far_from_both_ends_hold_with_zeros_too():
    flat, inflated = resnets("average", "zeros")
    frame = torch.randn(1, 3, 32, 32)

    def features(net: nn.Module, x: Tensor) -> Tensor:
        return nn.Sequential(*list(net.children())[:-2])(x)

    expected = features(flat, frame)
    reach = 2 + 1 + 16  # frames on each side: the stem of 5, the pool of 3, 16 convolutions of 3
    over_time = features(inflated, repeat(frame, 2 * reach + 3))
    off = (over_time - expected.unsqueeze(2)).abs().amax((0, 1, 3, 4)) / expected.abs().max()
    assert len(off) == 2 * reach + 3 and off[reach:-reach].max() < 1e-5
    assert off[0] > 0.05 and off[-1] > 0.05


def flatten_i3d(net: nn.Module) -> nn.Module:
    """Make I3D's 2D network, of the same names: TensorFlow's padding, no time."""

    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, ends(x, self.kernel_size[0], self.stride[0])))

    class Pool(nn.Module):
        def __init__(self, kernel: int, stride: int) -> None:
            super().__init__()
            self.kernel, self.stride = kernel, stride

        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(x, ends(x, self.kernel, self.stride), value=-torch.inf)
            return F.max_pool2d(x, self.kernel, self.stride)

    def ends(x: Tensor, kernel: int, stride: int) -> list[int]:
        totals = [
            max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[3], x.shape[2])
        ]
        return [end for total in totals for end in (total // 2, total - total // 2)]

    for path, module in list(net.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, SameConv3d):
            new: nn.Module = Conv(
                module.in_channels,
                module.out_channels,
                module.kernel_size[1],
                module.stride[1],
                bias=False,
            )
        elif isinstance(module, nn.BatchNorm3d):
            new = nn.BatchNorm2d(module.num_features, eps=module.eps)
        elif isinstance(module, SameMaxPool3d):
            new = Pool(module.kernel[1], module.stride[1])
        else:
            continue
        setattr(net.get_submodule(parent), name, new)
    return net


@torch.no_grad()
def test_i3d_begins_as_inception_on_each_frame():
    torch.manual_seed(0)
    flat = shake(flatten_i3d(i3d(num_classes=0)))
    net = i3d(num_classes=0).eval()
    net.load_state_dict(inflate(flat.state_dict(), net, "centre"))
    frame = torch.randn(1, 3, 96, 81)
    expected = flat.forward_features(frame)
    assert expected.ndim == 4 and expected.std() > 1e-4
    for frames in (13, 16):  # SAME padding is even in time, and is not
        over_time = net.forward_features(repeat(frame, frames))
        off = (over_time - expected.unsqueeze(2)).abs().max() / expected.abs().max()
        assert over_time.shape[2] == 2 and off < 1e-5


@torch.no_grad()
def test_i3ds_first_convolution_loses_taps_at_the_ends_alone():
    torch.manual_seed(0)
    flat = flatten_i3d(i3d(num_classes=0)).Conv3d_1a_7x7.conv3d
    conv = i3d(num_classes=0).Conv3d_1a_7x7.conv3d
    conv.load_state_dict(inflate(flat.state_dict(), conv))
    frame = torch.randn(1, 3, 32, 32)
    off = (conv(repeat(frame, 16)) - flat(frame).unsqueeze(2)).abs().amax((0, 1, 3, 4))
    assert len(off) == 8 and off[1:-2].max() < 1e-5  # 2 frames are padded in front, 3 behind
    assert off[0] > 0.05 and off[-1] > 0.05 and off[-2] > 0.05


@torch.no_grad()
def test_pools_with_a_time_axis():
    frame = torch.randn(2, 4, 12, 9) - 3  # below 0: a padded 0 would be the maximum
    for t in (1, 2, 3):
        inflated = nn.MaxPool3d((t, 3, 3), (1, 2, 2), (t // 2, 1, 1))(repeat(frame, 7))
        flat = nn.MaxPool2d(3, 2, 1)(frame)
        assert torch.equal(inflated, flat.unsqueeze(2).expand_as(inflated))
        same = SameMaxPool3d((t, 3, 3), (t, 2, 2))(repeat(frame, 7))
        assert torch.equal(same, same[:, :, :1].expand_as(same))
    zeros = F.max_pool3d(F.pad(repeat(frame, 7), (0, 0, 0, 0, 1, 1)), (3, 1, 1), 1)
    assert not torch.equal(zeros[:, :, 0], frame) and torch.equal(zeros[:, :, 1], frame)


@pytest.mark.parametrize("extent", [1, 2, 3, 4, 5, 7])
def test_taps(extent):
    kernel = torch.randn(6, 3, 5, 5)
    average = inflate_kernel(kernel, extent, "average")
    assert average.shape == (6, 3, extent, 5, 5)
    assert all(torch.equal(average[:, :, i], kernel / extent) for i in range(extent))
    torch.testing.assert_close(average.mean(2) * extent, kernel)
    centre = inflate_kernel(kernel, extent, "centre")
    assert torch.equal(centre[:, :, extent // 2], kernel) and torch.equal(centre.sum(2), kernel)
    assert centre.count_nonzero() == kernel.count_nonzero()


@pytest.mark.parametrize(("frames", "seen"), [(1, 0), (2, 1), (3, 1), (4, 2)])
@torch.no_grad()
def test_central_frame_sees_one_frame_of_each_tubelet(frames, seen):
    kernel, video = torch.randn(6, 3, 4, 4), torch.randn(2, 3, 3 * frames, 8, 8)
    tubelets = F.conv3d(video, central_frame(kernel, frames), stride=(frames, 4, 4))
    for number, tubelet in enumerate(tubelets.unbind(2)):
        frame = F.conv2d(video[:, :, number * frames + seen], kernel, stride=4)
        torch.testing.assert_close(tubelet, frame, rtol=1e-5, atol=1e-5)
    half = central_frame(kernel.half(), frames)
    assert half.shape == (6, 3, frames, 4, 4) and half.dtype == torch.float16


def test_all_else_is_copied_and_a_linear_layer_may_become_a_convolution():
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5))
    deep = nn.Sequential(nn.Conv3d(3, 4, (2, 3, 3)), nn.BatchNorm3d(4), nn.Conv3d(4, 5, 1))
    shake(flat)
    flat[1].num_batches_tracked += 7
    state = inflate(flat.state_dict(), deep)
    deep.load_state_dict(state)
    for key in ("0.bias", "2.bias", *(f"1.{name}" for name in flat[1].state_dict())):
        assert torch.equal(deep.state_dict()[key], flat.state_dict()[key]), key
    assert torch.equal(deep[2].weight.flatten(1), flat[2].weight)
    deep[0].weight.data.zero_()
    state["0.bias"].zero_()
    assert flat[0].weight.any() and flat[0].bias.any()  # nothing is shared


def test_sizes_will_do_in_place_of_a_network():
    flat = nn.Conv2d(3, 4, 3).half()
    with torch.device("meta"):
        deep = nn.Conv3d(3, 4, 3)
    by_network = inflate(flat.state_dict(), deep)
    by_sizes = inflate(flat.state_dict(), {"weight": (4, 3, 3, 3, 3), "bias": [4]})
    assert by_network.keys() == by_sizes.keys() == {"weight", "bias"}
    for key, tensor in by_network.items():
        assert torch.equal(tensor, by_sizes[key]) and tensor.dtype == torch.float16


FLAT = {
    "a.weight": torch.ones(4, 3, 3, 3),
    "fc.weight": torch.ones(10, 4),
    "fc.bias": torch.ones(10),
}
DEEP = {"a.weight": (4, 3, 3, 3, 3), "fc.weight": (7, 4), "fc.bias": (7,)}


def test_what_is_left_out_is_named():
    assert inflate(FLAT, DEEP, leave=["fc.*"]).keys() == {"a.weight"}
    with pytest.raises(UserError, match=r"'fc.weight' is 10 x 4 .* and 7 x 4 "):
        inflate(FLAT, DEEP)
    with pytest.raises(UserError, match=r"'head\.\*' is to be left out, and no tensor"):
        inflate(FLAT, DEEP, leave=["fc.*", "head.*"])


@pytest.mark.parametrize(
    ("flat", "deep", "message"),
    [
        ({"b.weight": torch.ones(1)}, {}, r"3D network has no 'b\.weight'"),
        ({}, {"b.weight": (1,)}, r"2D network has no 'b\.weight'"),
        ({c: torch.ones(1) for c in "wxyz"}, {}, "'w', 'x', 'y' and 1 more"),
        (
            {"w": torch.ones(4, 3, 5, 5)},
            {"w": (4, 3, 3, 3, 3)},
            "'w' is 4 x 3 x 5 x 5 .* 4 x 3 x 3 x 3 x 3",
        ),
        ({"w": torch.ones(4, 3, 3, 3)}, {"w": (4, 2, 3, 3, 3)}, "only a time axis"),
        ({"w": torch.ones(4, 3)}, {"w": (4, 3, 1, 1, 2)}, "only a time axis"),
        ({"w": torch.ones(())}, {"w": (1,)}, "a single number .* and 1 in"),
    ],
)
def test_a_tensor_without_a_partner_is_named(flat, deep, message):
    with pytest.raises(UserError, match=message):
        inflate(flat, deep)


def test_how_is_checked():
    with pytest.raises(UserError, match="how is 'mean'; it must be average or centre"):
        inflate({}, {}, how="mean")
    with pytest.raises(UserError, match="how is 'mean'"):
        inflate_kernel(torch.ones(1, 1, 1, 1), 3, how="mean")
