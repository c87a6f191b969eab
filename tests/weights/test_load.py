"""Filling a network: nothing left over in silence, classes in the data's order, colours as trained."""

import named_net
import pytest
import torch
from torch import nn

from vidtrain.layers.head import head_names
from vidtrain.models.c3d import c3d
from vidtrain.models.cnn_lstm import cnn_lstm
from vidtrain.models.fusion import late_fusion_pool, single_frame
from vidtrain.models.gru_rcn import gru_rcn
from vidtrain.models.mae_st import mae_st_base, mae_st_base_pretrain
from vidtrain.models.resnet3d import r3d_18
from vidtrain.models.slow import slow_r50_4x16
from vidtrain.models.two_stream import two_stream
from vidtrain.models.videomae import videomae_small
from vidtrain.models.videomae_pretrain import videomae_small_pretrain
from vidtrain.types import UserError
from vidtrain.weights.layout import Facts, File
from vidtrain.weights.load import LAYOUTS, Part, colours, fill, layout_of, open_parts

K = 4
NAMES = ["abseiling", "air drumming", "massaging person's head", "golf (putting)"]


def small(classes=K):
    return r3d_18(classes, width=8)


def source(network=None, labels=None, **changes):
    """A file of a network's own tensors; `None` among the changes takes one out."""
    network = network or small()
    named_net.randomise(network, seed=5)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    file = File("w.pth", state)
    return Part("", "w.pth", file, LAYOUTS["torchvision"], Facts(labels=labels))


def same(ours, part, skip=()):
    return all(
        torch.equal(tensor, part.file.tensors[name])
        for name, tensor in ours.state_dict().items()
        if not name.endswith("num_batches_tracked") and not name.startswith(tuple(skip))
    )


def test_every_tensor_lands():
    part, ours = source(), small()
    assert fill(ours, part).startswith("weights of w.pth: ")
    assert same(ours, part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer5__weight": torch.ones(3)}, "no place for 'layer5.weight'; is it the right model"),
        ({"stem__0__bias": torch.ones(8)}, "no place for 'stem.0.bias'"),
        ({"layer1__0__conv1__0__weight": None}, "nothing for 'layer1.0.conv1.0.weight'"),
        ({"layer2__1__conv2__1__running_var": None}, "nothing for 'layer2.1.conv2.1.running_var'"),
        ({"stem__0__weight": torch.ones(9, 3, 3, 7, 7)}, "9 x 3 x 3 x 7 x 7 there and 8 x 3"),
        ({"fc__bias": None}, "nothing for 'fc.bias'"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_filled(changes, message):
    ours = small()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(UserError, match=message.replace("'", ".")) as error:
        fill(ours, source(**changes))
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_many_are_counted():
    extra = {f"extra__{i}": torch.ones(1) for i in range(12)}
    with pytest.raises(UserError, match=r"'extra\.0', 'extra\.1', 'extra\.2' and 9 more"):
        fill(small(), source(**extra))


def test_a_missing_counter_of_batches_is_none(tmp_path):
    part = source()
    for name in list(part.file.tensors):
        if name.endswith("num_batches_tracked"):
            del part.file.tensors[name]
    fill(small(), part)


def test_a_classifier_of_other_classes_stays_new():
    part, ours = source(small(7)), small()
    before = ours.fc.weight.clone()
    line = fill(ours, part)
    assert "its classifier has 7 classes, the data 4" in line and "new here: fc" in line
    assert torch.equal(ours.fc.weight, before) and same(ours, part, skip=["fc."])
    without = small(0)
    assert "not used: its classifier (2)" in fill(without, part)
    backbone = source(fc__weight=None, fc__bias=None)
    assert "new here: fc" in fill(small(), backbone)


def test_rows_go_where_the_datas_classes_are():
    part, ours = source(labels=NAMES), small()
    data = ["Golf putting", "massaging_persons_head", "abseiling", "air_drumming"]
    line = fill(ours, part, data)
    assert "in the order of the data's classes" in line
    for row, number in enumerate((3, 2, 0, 1)):
        assert torch.equal(ours.fc.weight[row], part.file.tensors["fc.weight"][number])
        assert torch.equal(ours.fc.bias[row], part.file.tensors["fc.bias"][number])
    line = fill(ours, part, NAMES)
    assert "order" not in line and torch.equal(ours.fc.weight, part.file.tensors["fc.weight"])


def test_classes_by_other_names():
    part, ours = source(labels=NAMES), small()
    with pytest.raises(UserError, match="3 of the data's 4 classes, but not 'golf'"):
        fill(ours, part, ["abseiling", "golf", "air drumming", "massaging person's head"])
    before = ours.fc.weight.clone()
    line = fill(ours, part, ["apple", "pear", "zebra", "abseiling"])
    assert "others than the data's" in line and "new here: fc" in line
    assert torch.equal(ours.fc.weight, before)
    assert "the file does not name them" in fill(small(), source(), NAMES)


def test_blue_first_is_turned_round():
    part = source(c3d(K, size=32))
    part = part._replace(layout=LAYOUTS["caffe_c3d"], facts=LAYOUTS["caffe_c3d"].facts(part.file))
    assert part.facts.mean == pytest.approx((0.3977, 0.3830, 0.3539), abs=1e-4) and part.facts.bgr
    assert layout_of(part.file).name == "caffe_c3d"
    theirs, ours = c3d(K, size=32).eval(), c3d(K, size=32).eval()
    theirs.load_state_dict(part.file.tensors)
    assert "from BGR to RGB" in fill(ours, part)
    clip = torch.randn(1, 3, 16, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), theirs(clip.flip(1)))
    with pytest.raises(UserError, match="is none of them"):
        fill(small(), part)


def test_colours_of_several_files_agree_or_it_is_said():
    grey, half = ((0.4,) * 3, (0.2,) * 3), ((0.5,) * 3, (0.5,) * 3)
    part = source()
    one = part._replace(at="spatial", facts=Facts(*grey))
    assert colours([one]) == grey and colours([part]) is None
    assert colours([one, part._replace(at="temporal", facts=Facts(*half))]) == grey
    with pytest.raises(UserError, match="in two ways"):
        colours([one, part._replace(at="other", facts=Facts(*half))])


def test_layouts_are_told_apart_or_named(tmp_path):
    torch.save({"odd": torch.ones(1)}, tmp_path / "w.pth")
    node = {"weights": str(tmp_path / "w.pth")}
    with pytest.raises(UserError, match=r"no known layout \('odd'\).*model\.weights_from="):
        open_parts(node, tmp_path, print)
    with pytest.raises(UserError, match=r"weights_from is 'tourchvision'.*torchvision"):
        open_parts({**node, "weights_from": "tourchvision"}, tmp_path, print)
    (part,) = open_parts({**node, "weights_from": "torchvision"}, tmp_path, print)
    with pytest.raises(UserError, match="no place for 'odd'"):
        fill(small(), part)
    # a bare state dict of ours, too
    torch.save(small().state_dict(), tmp_path / "w.pth")
    (part,) = open_parts({**node, "weights_from": "vidtrain"}, tmp_path, print)
    assert fill(small(), part).endswith("tensors")


def test_a_wrong_name_lists_the_names_there_are(tmp_path):
    node = {"_target_": "vidtrain.models.resnet3d.r3d_18", "weights": "kinetics"}
    with pytest.raises(
        UserError, match="no file, and no weights of r3d_18; did you mean 'kinetics400'"
    ):
        open_parts(node, tmp_path, print)
    with pytest.raises(UserError, match="its names: kinetics400_v1, kinetics400, "):
        open_parts({**node, "weights": "xyz"}, tmp_path, print)
    node = {"_target_": "vidtrain.models.slowfast.slowfast_r50_4x16", "weights": "kinetics400"}
    with pytest.raises(UserError, match="slowfast_r50_4x16 has no weights by name"):
        open_parts(node, tmp_path, print)
    with pytest.raises(UserError, match="is a folder"):
        open_parts({**node, "weights": str(tmp_path)}, tmp_path, print)


def test_a_part_that_is_not_there():
    with pytest.raises(UserError, match="has no part 'slow'; at the top there are stem, layer1"):
        fill(small(), source()._replace(at="slow"))


def test_the_classifiers_tensors_are_known_without_touching_the_network():
    torch.manual_seed(0)
    net = two_stream(K, size=64, backbone="resnet18", fusion="svm", num_frames=4)
    before = torch.get_rng_state()
    assert head_names(net) == {
        "spatial.net.fc.weight", "spatial.net.fc.bias", "temporal.net.fc.weight",
        "temporal.net.fc.bias", "svm.weight", "svm.bias", "svm.fitted",
    }  # fmt: skip
    assert torch.equal(before, torch.get_rng_state())
    assert net.spatial.net.fc.weight.device.type == "cpu" and net.num_classes == K
    assert head_names(small(0)) == {"fc.weight", "fc.bias"}
    assert head_names(nn.Linear(2, 2)) == set()


# -- vidtrain's own


def checkpoint(network, labels=NAMES, mean=(0.1, 0.2, 0.3)):
    named_net.randomise(network, seed=3)
    about = {"label_names": labels, "config": {"clip": {"mean": list(mean), "std": [0.5] * 3}}}
    state = {f"model.{name}": tensor.clone() for name, tensor in network.state_dict().items()}
    file = File("last.ckpt", state, {"vidtrain": about, "epoch": 1})
    assert layout_of(file).name == "vidtrain"
    return Part("", "last.ckpt", file, LAYOUTS["vidtrain"], LAYOUTS["vidtrain"].facts(file))


def test_a_checkpoint_of_ours_tells_colours_and_classes():
    net = small()
    part = checkpoint(net)
    assert part.facts == Facts((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), labels=NAMES)
    ours = small()
    fill(ours, part, NAMES[::-1])
    assert torch.equal(ours.fc.weight, net.fc.weight.flip(0))
    assert torch.equal(ours.layer4[1].conv2[0].weight, net.layer4[1].conv2[0].weight)


def test_an_image_network_inside_is_used_again():
    net = single_frame(K, size=32, backbone="resnet18")
    part = checkpoint(net)
    ours = late_fusion_pool(7, size=32, backbone="resnet18")
    line = fill(ours, part)
    assert "new here: classifier" in line and "not used: its classifier (2)" in line
    assert torch.equal(ours.backbone.net.conv1.weight, net.backbone.net.conv1.weight)

    streams = two_stream(K, size=64, backbone="resnet18", num_frames=4)
    fill(streams, part._replace(at="spatial"))
    assert torch.equal(streams.spatial.net.layer3[0].bn1.bias, net.backbone.net.layer3[0].bn1.bias)
    with pytest.raises(UserError, match="does not fit"):
        fill(slow_r50_4x16(K, width=8), part)
    with pytest.raises(UserError, match="does not fit"):  # a part of a deeper one would fit
        fill(late_fusion_pool(7, size=32, backbone="resnet34"), part)
    deep = checkpoint(single_frame(K, size=32, backbone="resnet34"))
    with pytest.raises(UserError, match=r"no place for 'model\.backbone\.net\.layer1\.2"):
        fill(late_fusion_pool(7, size=32, backbone="resnet18"), deep)
    with pytest.raises(UserError, match=r"no place for 'model\.backbone\.net\.layer1\.2"):
        fill(gru_rcn(K, size=64, backbone="resnet18"), deep)
    plain = checkpoint(single_frame(K, size=32, backbone="small"))
    line = fill(late_fusion_pool(7, size=32, backbone="small"), plain)
    assert "not used: its classifier (2)" in line
    recurrent = gru_rcn(K, size=64, backbone="resnet18")
    line = fill(recurrent, part)
    assert "new here: units, classifiers" in line
    assert torch.equal(recurrent.backbone.net.net.conv1.weight, net.backbone.net.conv1.weight)


def test_a_whole_network_goes_into_one_that_holds_it():
    net = small()
    part = checkpoint(net)
    ours = cnn_lstm(7, num_frames=8, size=32, backbone3d=small(), hidden=8)
    line = fill(ours, part)
    assert "new here: lstm, classifier" in line and "not used: its classifier (2)" in line
    assert torch.equal(ours.backbone.net.stem[0].weight, net.stem[0].weight)


def test_a_part_more_or_less_is_an_error():
    part = checkpoint(slow_r50_4x16(K, width=8, non_local="gaussian"))
    with pytest.raises(UserError, match=r"no place for 'model\.res3\.after1"):
        fill(slow_r50_4x16(K, width=8), part)
    part = checkpoint(slow_r50_4x16(K, width=8))
    with pytest.raises(UserError, match=r"nothing for 'res3\.after1"):
        fill(slow_r50_4x16(K, width=8, non_local="gaussian"), part)


def test_a_fitted_svm_does_not_outlive_another_order_of_classes():
    net = two_stream(K, size=64, backbone="resnet18", fusion="svm", num_frames=4)
    part = checkpoint(net)
    part.file.tensors["model.svm.fitted"] = torch.tensor(True)
    ours = two_stream(K, size=64, backbone="resnet18", fusion="svm", num_frames=4)
    fill(ours, part, NAMES)
    assert ours.svm.fitted and torch.equal(ours.svm.weight, net.svm.weight)
    other = two_stream(K, size=64, backbone="resnet18", fusion="svm", num_frames=4)
    assert "new here: svm" in fill(other, part, NAMES[::-1])
    assert not other.svm.fitted
    assert torch.equal(other.temporal.net.fc.bias, net.temporal.net.fc.bias.flip(0))


TINY = {"num_frames": 4, "size": 32, "patch": 8, "dim": 24, "depth": 2, "heads": 3}
DECODER = {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 3}


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_of_a_probe_only_what_has_a_row_for_each_class_is_put_in_order(probe):
    net = videomae_small(K, **TINY, probe=probe)
    ours = videomae_small(K, **TINY, probe=probe)
    assert "order of the data's classes" in fill(ours, checkpoint(net), NAMES[::-1])
    for name, tensor in net.state_dict().items():
        found = ours.state_dict()[name]
        turned = name in ("head.linear.weight", "head.linear.bias")
        assert torch.equal(found, tensor.flip(0) if turned else tensor), name
    two = videomae_small(2, **TINY, probe=probe)
    assert f"its classifier has {K} classes, the data 2" in fill(two, checkpoint(net), None)


@pytest.mark.parametrize(
    ("pretrain", "classifier", "new", "unused"),
    [
        (
            videomae_small_pretrain,
            videomae_small,
            "fc_norm, head",
            "the norm behind its encoder (2)",
        ),
        (mae_st_base_pretrain, mae_st_base, "head", "its decoder"),
    ],
)
def test_a_masked_autoencoder_fills_the_classifier_with_its_encoder(
    pretrain, classifier, new, unused
):
    net = pretrain(**TINY, **DECODER)
    part = checkpoint(net, labels=[])
    ours = classifier(K, **TINY)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    line = fill(ours, part, NAMES)
    assert unused in line and "its decoder" in line and line.split("new here: ")[1].startswith(new)
    taken, filled = dict(net.encoder.state_dict()), ours.state_dict()
    for name, tensor in filled.items():
        if name.startswith(("fc_norm.", "head.")):
            assert torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, taken[name]) and not torch.equal(tensor, before[name])
    again = pretrain(**TINY, **DECODER)
    assert fill(again, part).endswith(f"{len(net.state_dict())} tensors")
    for other, message in (
        (classifier(K, **TINY | {"dim": 12}), "is .* there and .*12.* here"),
        (classifier(K, **TINY | {"depth": 3}), r"nothing for 'blocks\.2\."),
        (classifier(K, **TINY | {"depth": 1}), r"no place for 'model\.encoder\.blocks\.1\."),
        (small(), "no place for 'model.encoder"),
        (pretrain(**TINY, **DECODER | {"decoder_depth": 2}), r"nothing for 'decoder\.blocks\.1"),
    ):
        with pytest.raises(UserError, match=message) as error:
            fill(other, part)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not fit"):
        fill(again, checkpoint(classifier(K, **TINY)))
