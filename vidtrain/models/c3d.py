"""C3D: 3 x 3 x 3 convolutions all the way.

Tran, Bourdev, Fergus, Torresani, Paluri. "Learning Spatiotemporal Features with 3D Convolutional
Networks." ICCV 2015. https://arxiv.org/abs/1412.0767

    conv1 P conv2 P conv3a conv3b P conv4a conv4b P conv5a conv5b P fc6 fc7 fc8

ReLU after each, dropout of 0.5 on fc6 and fc7, no batch norm. P1 halves space only, the others time
as well: a clip of 3 x 16 x 112 x 112 is 512 x 2 x 7 x 7 at conv5b. Caffe, with which C3D was made,
pools that with a last window over the rest (`pool5="ceil"`): 512 x 1 x 4 x 4 = 8192 values go into
fc6. Slide 41 of CS231n's lecture on video understanding (Gao, 2025) has 512 x 1 x 3 x 3 = 4608
(`pool5="floor"`). Ports that pad instead also come to 4 x 4, but their windows lie one pixel off
(`pool5="pad"`, for MMAction2's weights).

Departs from the paper: nowhere.

Parameters with 487 classes: 79,991,015, with floor 65,310,951; multiply-adds 38.549 and 38.534 G,
as tests/models/test_c3d.py asserts. The slide comes to 39.5: its "MFLOPs" are giga, and its three
fully connected rows (0.51, 0.45, 0.05) are 27 times too large, as if each weight were a 3 x 3 x 3
kernel; they are 0.0189 (from 4608 values), 0.0168 and 0.0020. So its "2.9 x VGG-16" is wrong as
well: it is 2.5 x.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.layers.flat import dense_order
from vidtrain.layers.frames import check_clip
from vidtrain.types import UserError


class C3D(nn.Module):
    """Eight 3D convolutions, five pools, three fully connected layers.

    Args:
        num_classes: K; 0 for fc7.
        num_frames: T.
        size: Height and width of the frames.
        pool5: Whether the last pool covers the rest of an odd map: ceil (Caffe), floor, or pad, which
            puts a row and a column before and behind it.
        dropout: On fc6 and fc7.
    """

    inputs = ("video",)
    num_features = 512

    def __init__(
        self, num_classes: int, num_frames: int, size: int, pool5: str, dropout: float
    ) -> None:
        super().__init__()
        if pool5 not in ("ceil", "floor", "pad"):
            raise UserError(
                f"model.pool5 is '{pool5}'; it must be ceil (as in Caffe), floor or pad"
            )
        self.num_frames, self.size = num_frames, size
        self.conv1 = nn.Conv3d(3, 64, 3, padding=1)
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.conv2 = nn.Conv3d(64, 128, 3, padding=1)
        self.pool2 = nn.MaxPool3d(2)
        self.conv3a = nn.Conv3d(128, 256, 3, padding=1)
        self.conv3b = nn.Conv3d(256, 256, 3, padding=1)
        self.pool3 = nn.MaxPool3d(2)
        self.conv4a = nn.Conv3d(256, 512, 3, padding=1)
        self.conv4b = nn.Conv3d(512, 512, 3, padding=1)
        self.pool4 = nn.MaxPool3d(2)
        self.conv5a = nn.Conv3d(512, 512, 3, padding=1)
        self.conv5b = nn.Conv3d(512, 512, 3, padding=1)
        padding = (0, 1, 1) if pool5 == "pad" else 0
        self.pool5 = nn.MaxPool3d(2, padding=padding, ceil_mode=pool5 == "ceil")
        rest = 1 if pool5 == "ceil" else 0
        t, side = (num_frames // 8 + rest) // 2, (size // 16 + rest) // 2
        if pool5 == "pad":
            side = size // 16 // 2 + 1
        if num_frames < 8 or size < 16 or not t * side:
            raise UserError(
                f"c3d halves time four times and space five times: {num_frames} frames of {size}"
                " pixels leave nothing; clip.num_frames=16 clip.size=112 is the paper's"
            )
        self.fc6 = nn.Linear(512 * t * side * side, 4096)
        self.drop6 = nn.Dropout(dropout)
        self.fc7 = nn.Linear(4096, 4096)
        self.drop7 = nn.Dropout(dropout)
        self.reset_classifier(num_classes)
        self._init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 512, t, h, w), conv5b."""
        x = self.pool1(F.relu(self.conv1(dense_order(x))))
        x = self.pool2(F.relu(self.conv2(x)))
        x = F.relu(self.conv3a(x))
        x = self.pool3(F.relu(self.conv3b(x)))
        x = F.relu(self.conv4a(x))
        x = self.pool4(F.relu(self.conv4b(x)))
        x = F.relu(self.conv5a(x))
        return F.relu(self.conv5b(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        check_clip(x, self.num_frames, self.size)
        x = self.pool5(self.forward_features(x)).flatten(1)
        x = self.drop6(F.relu(self.fc6(x)))
        x = self.drop7(F.relu(self.fc7(x)))
        return self.fc8(x)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace fc8; 0 takes it away."""
        self.fc8 = nn.Linear(4096, num_classes) if num_classes else nn.Identity()

    def _init_weights(self) -> None:
        """Gaussians, 0.01 for convolutions and 0.005 for fc; biases 1, but 0 in conv1 and fc8."""
        for name, module in self.named_children():
            if isinstance(module, (nn.Conv3d, nn.Linear)):
                nn.init.normal_(module.weight, std=0.01 if isinstance(module, nn.Conv3d) else 0.005)
                nn.init.constant_(module.bias, 0.0 if name in ("conv1", "fc8") else 1.0)


def c3d(
    num_classes: int,
    num_frames: int = 16,
    size: int = 112,
    pool5: str = "ceil",
    dropout: float = 0.5,
) -> C3D:
    """Build C3D as it was released; `pool5="floor"` is the lecture's, `"pad"` that of some ports."""
    return C3D(num_classes, num_frames, size, pool5, dropout)
