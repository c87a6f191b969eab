"""C3D as it was released for Caffe, in PyTorch: the layout of https://github.com/DavideA/c3d-pytorch.

The port is MIT-licensed. Its layers have the names of our C3D. Caffe reads frames as OpenCV does, blue
first; the mean of Sports-1M (facebookarchive/C3D, sport1m_train16_128_mean) is taken off values from 0 to
255, and nothing is divided by. The port itself does neither, which its issue 1 is about.
"""

from __future__ import annotations

from torch import nn

from vidtrain.weights.layout import Facts, File, Layout, Renamed, family, refuse, rename_by

MEAN = (101.41 / 255, 97.66 / 255, 90.25 / 255)
STD = (1 / 255, 1 / 255, 1 / 255)


def matches(file: File) -> bool:
    """Tell it by first and last convolution, whose letters are Caffe's."""
    return {"conv1.weight", "conv5b.weight", "fc6.weight"} <= file.tensors.keys()


def facts(file: File) -> Facts:
    """Sports-1M's colours, blue first; the order of its 487 classes is not in the file."""
    return Facts(MEAN, STD, bgr=True)


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Leave the names as they are."""
    if family(network) != "c3d":
        raise refuse("caffe_c3d", network, ("c3d",))
    return rename_by((), file)


LAYOUT = Layout("caffe_c3d", matches, facts, rename)
