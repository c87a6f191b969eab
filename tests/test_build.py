"""What a checkpoint's config may construct."""

import pytest

from vidtrain.build import check_targets, instantiate
from vidtrain.types import Clip, UserError


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.hub.load",
        "vidtrain.models.c3d.nn.Sequential",  # another module, reached through ours
        "vidtrain.data.module.os.system",
        "vidtrain.commands.train.main",
        "vidtrain.build.instantiate",
        "vidtrain.models.c3d.torch",
        "vidtrain.models.nothing.here",
        "vidtrainx.models.c3d.c3d",
        "",
    ],
)
def test_what_is_not_shipped_is_refused(target):
    with pytest.raises(UserError, match="does not ship"):
        check_targets({"deep": [{"_target_": target}]}, "x.ckpt")


def test_what_is_shipped_or_allowed_passes():
    check_targets({"_target_": "vidtrain.models.c3d.c3d"}, "x.ckpt")
    check_targets({"_target_": "vidtrain.types.Clip"}, "x.ckpt")
    check_targets({"_target_": "mine.net"}, "x.ckpt", allow=["mine.net"])


def test_wrong_arguments_are_one_line_and_bugs_are_not_hidden():
    with pytest.raises(UserError, match="unexpected keyword argument 'framez'"):
        instantiate({"_target_": "vidtrain.types.Clip", "framez": 3})
    with pytest.raises(UserError, match="nowhere"):
        instantiate({"_target_": "nowhere.at_all"})
    good = {"num_frames": 1, "stride": 1, "size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}
    assert isinstance(instantiate({"_target_": "vidtrain.types.Clip", **good}), Clip)
    with pytest.raises(UserError, match=r"clip\.size is 0"):
        instantiate({"_target_": "vidtrain.types.Clip", **good, "size": 0})
