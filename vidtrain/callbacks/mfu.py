"""Model FLOPs utilisation: the share of a GPU's arithmetic that the network's own comes to.

Chowdhery et al., "PaLM", 2022, section 4.1: what forward and backward need by the network's definition,
over the device's dense peak. What is computed twice to save memory is not counted.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from vidtrain.trace.table import layer_table

# A multiply-add is two operations. Backward costs twice what forward does: the gradients by the
# inputs and those by the weights (PaLM, appendix B).
OPERATIONS = 2 * 3


class Peak(NamedTuple):
    """Dense rates of a device in 10^12 operations a second; None: it has no such unit.

    Those of 16 bits are with sums in 32 bits, as PyTorch takes them. That halves them on GeForce.
    """

    fp16: float
    bf16: float | None
    tf32: float | None
    fp32: float


# NVIDIA's datasheets: "H100 Tensor Core GPU", "H200 Tensor Core GPU", "GH200", "A100 Tensor Core GPU",
# "A10", "A30", "A40", "RTX A6000", "V100", "V100S", "T4", "L4", "L40", "L40S". What they give with
# sparsity alone is halved. GeForce and RTX 6000 Ada: the tables of peaks in the architectures' white
# papers, "NVIDIA Ampere GA102", "NVIDIA Ada" and "NVIDIA RTX Blackwell". A pattern is of the whole name.
PEAKS = {
    r"H200|H100 80GB HBM3|H100 SXM5.*|GH200 .*": Peak(989.4, 989.4, 494.7, 66.9),
    r"H[12]00 NVL": Peak(835.5, 835.5, 417.5, 60.0),
    r"H100 PCIe": Peak(756.0, 756.0, 378.0, 51.0),
    r"A100[- ].*": Peak(312.0, 312.0, 156.0, 19.5),
    r"A40": Peak(149.7, 149.7, 74.8, 37.4),
    r"A30": Peak(165.0, 165.0, 82.0, 10.3),
    r"A10": Peak(125.0, 125.0, 62.5, 31.2),
    r"RTX A6000": Peak(154.8, 154.8, 77.4, 38.7),
    r"V100-SXM.*": Peak(125.0, None, None, 15.7),
    r"V100S-PCIE.*": Peak(130.0, None, None, 16.4),
    r"V100-PCIE.*": Peak(112.0, None, None, 14.0),
    r"T4": Peak(65.0, None, None, 8.1),
    r"L4": Peak(121.0, 121.0, 60.0, 30.3),
    r"L40": Peak(181.0, 181.0, 90.5, 90.5),
    r"L40S": Peak(362.0, 362.0, 183.0, 91.6),
    r"RTX 6000 Ada Generation": Peak(364.2, 364.2, 182.1, 91.1),
    r"RTX 3090": Peak(71.0, 71.0, 35.6, 35.6),
    r"RTX 4090": Peak(165.2, 165.2, 82.6, 82.6),
    r"RTX 5090": Peak(209.5, 209.5, 104.8, 104.8),
}


def peak(name: str, precision: str, tf32: bool) -> float | None:
    """Give a device's peak in operations a second; None where it is not known.

    Args:
        name: as `torch.cuda.get_device_name` gives it. A part of a device (MIG) is not known.
        precision: one of Lightning's: `16-mixed`, `bf16-true`, `32-true`.
        tf32: whether products of 32-bit numbers may be rounded, on devices that have the units.
    """
    bare = re.sub(r"\b(NVIDIA|Tesla|GeForce) ", "", name)
    found = next((rates for pattern, rates in PEAKS.items() if re.fullmatch(pattern, bare)), None)
    if found is None or " MIG " in name:
        return None
    if precision.startswith("32"):
        rate = found.tf32 if tf32 and found.tf32 else found.fp32
    else:
        rates = {"16-mixed": found.fp16, "16-true": found.fp16}
        rates |= {"bf16-mixed": found.bf16, "bf16-true": found.bf16}
        rate = rates.get(precision)
    return rate and rate * 1e12


def peak_here(device: torch.device, precision: str) -> float | None:
    """Give the peak of a device of this machine, as it is set up; None where it is not known."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak(torch.cuda.get_device_name(device), precision, tf32)


class MultiplyAdds:
    """Counts the multiply-adds of a network's forward pass for one clip, once for each size it meets.

    A copy without weights is counted, so that neither a compiled network nor one that is split over
    ranks is touched.
    """

    def __init__(self, network: nn.Module) -> None:
        self._known: dict[tuple[torch.Size, ...], float] = {}
        self._copy: nn.Module | None
        try:
            self._copy = _without_weights(network)
        except Exception:  # whatever a network of the user's own may hold
            self._copy = None

    def __call__(self, *sizes: torch.Size) -> float:
        """Count for one clip with inputs of these sizes, `(C, T, H, W)` each; NaN where it cannot be."""
        if sizes not in self._known:
            self._known[sizes] = self._count(sizes)
        return self._known[sizes]

    def _count(self, sizes: Sequence[torch.Size]) -> float:
        if self._copy is None:
            return float("nan")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return float(sum(layer.macs for layer in layer_table(self._copy, *sizes)))
        except Exception:  # a way through it that hangs on values, which there are none of
            return float("nan")


def _without_weights(network: nn.Module) -> nn.Module:
    """Copy a network to the meta device, without ever having its weights twice."""
    memo: dict[int, torch.Tensor] = {}
    for weight in network.parameters():
        empty = torch.empty_like(weight, device="meta")
        memo[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(network, memo)
