"""Inflation: the weights of a network on images, for the same network on clips.

Carreira, Zisserman. "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset." CVPR 2017,
section 2.4. https://arxiv.org/abs/1705.07750

A kernel of k x k becomes one of K_t x k x k, in one of two ways:

    average   K_t copies, each divided by K_t (the paper's)
    centre    the copy on tap K_t // 2, zeros on the others (Girdhar et al. 2018, Arnab et al. 2021), so
              that the network begins by seeing each frame by itself

On a video of one frame repeated, the inflated network gives what the 2D network gives on that frame,
if each map repeats too: with zeros padded in time, "average" loses part of its taps at both ends of
the clip, and the logits differ; "centre" holds. `tests/weights/test_inflate.py` shows both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from vidtrain.types import UserError

HOW = ("average", "centre")


def inflate_kernel(kernel: Tensor, extent: int, how: str = "average") -> Tensor:
    """Give a 2D kernel a time axis: (D, C, h, w) -> (D, C, extent, h, w).

    Raises:
        UserError: `how` is neither average nor centre.
    """
    if how not in HOW:
        raise UserError(f"inflate: how is '{how}'; it must be average or centre")
    if how == "average":
        return (kernel / extent).unsqueeze(2).repeat(1, 1, extent, 1, 1)
    return central_frame(kernel, extent)


def central_frame(kernel: Tensor, frames: int) -> Tensor:
    """Put a 2D kernel on the frame `frames // 2` of a 3D one: (D, C, h, w) -> (D, C, frames, h, w).

    The others are zeros: of two frames the second is seen (Arnab et al. 2021, section 3.4).
    """
    inflated = kernel.new_zeros(*kernel.shape[:2], frames, *kernel.shape[2:])
    inflated[:, :, frames // 2] = kernel
    return inflated


def inflate(
    state_2d: Mapping[str, Tensor],
    network_3d: nn.Module | Mapping[str, Sequence[int]],
    how: str = "average",
    leave: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Inflate the weights of a 2D network for a 3D network whose submodules have the same names.

    Kernels get a time axis; a linear layer may become a convolution of 1 x 1 x 1; all else (biases,
    batch norm and its statistics, linear layers) is copied.

    Args:
        state_2d: State dict of the 2D network, its keys already the 3D network's.
        network_3d: The 3D network, on any device, or the sizes of its tensors by name.
        how: What becomes of a kernel: average or centre.
        leave: Names, or patterns with `*`, of tensors that are left out, in either network: a
            classifier of other classes ("fc.*"). Every other tensor must find its partner.

    Returns:
        The state dict of the 3D network, without what is left out.

    Raises:
        UserError: a tensor has no partner, or one of a size that it cannot become; or a pattern of
            `leave` fits no tensor.
    """
    if isinstance(network_3d, nn.Module):
        network_3d = {name: tensor.shape for name, tensor in network_3d.state_dict().items()}
    if how not in HOW:
        raise UserError(f"inflate: how is '{how}'; it must be average or centre")
    for pattern in leave:
        if not any(fnmatchcase(name, pattern) for name in (*state_2d, *network_3d)):
            raise UserError(
                f"inflate: '{pattern}' is to be left out, and no tensor has such a name"
            )
    wanted, given = _kept(network_3d, leave), _kept(state_2d, leave)
    if unused := [name for name in given if name not in wanted]:
        raise UserError(
            f"inflate: the 3D network has no {_some(unused)}; rename what the 2D network calls"
            " otherwise, or leave it out by name"
        )
    if unfilled := [name for name in wanted if name not in given]:
        raise UserError(
            f"inflate: the 2D network has no {_some(unfilled)}; rename what it calls otherwise, or"
            " leave it out by name"
        )
    return {name: _fit(name, state_2d[name], network_3d[name], how) for name in wanted}


def _kept(names: Mapping[str, object], leave: Sequence[str]) -> dict[str, None]:
    """Drop the names that are left out; the rest, in order."""
    return {n: None for n in names if not any(fnmatchcase(n, pattern) for pattern in leave)}


def _fit(name: str, tensor: Tensor, size: Sequence[int], how: str) -> Tensor:
    """Make a tensor of the 2D network the 3D network's."""
    old, new = tuple(tensor.shape), tuple(size)
    if old == new:
        return tensor.detach().clone()
    if len(old) == 4 and len(new) == 5 and old == (*new[:2], *new[3:]):
        return inflate_kernel(tensor.detach(), new[2], how)
    if len(old) == 2 and len(new) > 2 and new == (*old, *(1 for _ in new[2:])):
        return tensor.detach().clone().reshape(new)
    raise UserError(
        f"inflate: '{name}' is {_times(old)} in the 2D network and {_times(new)} in the 3D one;"
        " only a time axis may be new, third of five"
    )


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size)) or "a single number"


def _some(names: Sequence[str]) -> str:
    """Name a few of many."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + rest
