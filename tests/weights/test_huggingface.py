"""Files of Hugging Face's transformers: by the names of its versions 4 and 5, and its own networks."""

import json

import named_vit as nv
import pytest
import torch
from named_net import Net, randomise
from safetensors.torch import save_file

from vidtrain.layers.masking import Mask
from vidtrain.models.resnet3d import r3d_18
from vidtrain.models.timesformer import timesformer_base
from vidtrain.models.videomae import videomae_small
from vidtrain.models.videomae_pretrain import videomae_small_pretrain
from vidtrain.models.vivit import vivit_b_factorised_encoder, vivit_b_joint
from vidtrain.types import UserError
from vidtrain.weights.load import fill, open_parts

K, DIM, DEPTH, HEADS = 5, 24, 2, 3
FRAMES, SIZE, PATCH = 4, 32, 8
SMALL = {
    "num_frames": FRAMES,
    "size": SIZE,
    "patch": PATCH,
    "dim": DIM,
    "depth": DEPTH,
    "heads": HEADS,
}
DECODER = {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": HEADS}
BLOCK = {
    "norm1": "layernorm_before",
    "proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
HIDDEN = torch.tensor([True] * 4 + [False, True, True, False] * 3).repeat(2)


def clip():
    return torch.rand(2, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def mask():
    asked, seen = (which.nonzero()[:, 0].expand(2, -1) for which in (HIDDEN, ~HIDDEN))
    return Mask(seen, asked, torch.ones_like(asked, dtype=torch.bool))


def opened(folder, state, config=None):
    """A folder as `save_pretrained` leaves it."""
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (part,) = open_parts({"weights": str(folder / "model.safetensors")}, folder, print)
    assert part.layout.name == "huggingface"
    return part


# -- VideoMAE


def separate(net, name, version):
    """Queries, keys and values of a layer each, of which keys have no bias."""

    def qkv(x):
        dim = x.shape[-1]
        names = ("query", "key", "value")
        q, k, v = (nv.dense(net, x, f"{name}.{part}", dim, bias=False) for part in names)
        biases = ("q_bias", "v_bias") if version == 4 else ("query.bias", "value.bias")
        q, v = (
            q + net.tensor(f"{name}.{biases[0]}", dim),
            v + net.tensor(f"{name}.{biases[1]}", dim),
        )
        if version == "5 with biases of keys":
            k = k + net.tensor(f"{name}.key.bias", dim)
        return q, k, v

    return qkv


def videomae_blocks(net, x, place, version, depth=DEPTH):
    for i in range(depth):
        name = f"{place}{i}."
        x = nv.block(
            net, x, name, separate(net, f"{name}attention.attention", version), HEADS, BLOCK
        )
    return x


def videomae(net, x, version, seen=slice(None), top="videomae."):
    name = f"{top}embeddings.patch_embeddings.projection"
    x = nv.tubelets(net, x, name, DIM, (2, PATCH, PATCH))
    x = (x + nv.sincos(x.shape[1], DIM))[:, seen]
    return videomae_blocks(net, x, f"{top}encoder.layer.", version)


def videomae_logits(net, x, version):
    x = nv.norm(net, videomae(net, x, version).mean(1), "fc_norm")
    return nv.dense(net, x, "classifier", K)


def videomae_pixels(net, x, version):
    x = nv.norm(net, videomae(net, x, version, ~HIDDEN), "videomae.layernorm")
    x = nv.dense(net, x, "encoder_to_decoder", 12, bias=False)
    table = nv.sincos(32, 12)
    asked = (net.tensor("mask_token", 1, 1, 12) + table[HIDDEN]).expand(2, -1, -1)
    x = torch.cat([x + table[~HIDDEN], asked], 1)
    x = videomae_blocks(net, x, "decoder.decoder_layers.", version, 1)[:, -asked.shape[1] :]
    return nv.dense(net, nv.norm(net, x, "decoder.norm"), "decoder.head", 3 * 2 * PATCH**2)


VERSIONS = [4, 5, "5 with biases of keys"]


@pytest.mark.parametrize("version", VERSIONS)
def test_videomaes_classifier(version, tmp_path):
    net = Net()
    with torch.no_grad():
        expected = videomae_logits(net, clip(), version)
        part = opened(tmp_path, net.state)
        ours = videomae_small(K, **SMALL).eval()
        line = fill(ours, part)
        assert f"{len(ours.state_dict())} tensors" in line and "new here" not in line
        assert ("biases of keys, which change nothing (2)" in line) == (version == VERSIONS[2])
        torch.testing.assert_close(ours(clip()), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
    assert part.facts.mean == (0.485, 0.456, 0.406) and part.facts.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("version", VERSIONS)
def test_videomaes_pretraining_network(version, tmp_path):
    net = Net()
    with torch.no_grad():
        expected = videomae_pixels(net, clip(), version)
        part = opened(tmp_path, net.state)
        ours = videomae_small_pretrain(**SMALL, **DECODER).eval()
        line = fill(ours, part)
        assert f"{len(ours.state_dict())} tensors" in line and "new here" not in line
        torch.testing.assert_close(ours(clip(), mask()), expected, rtol=1e-4, atol=1e-4)
        classifier = videomae_small(K, **SMALL).eval()
        line = fill(classifier, part)
        assert "its decoder" in line and "the norm behind its encoder (2)" in line
        assert "new here: fc_norm, head" in line
        features = classifier.forward_features(clip()).flatten(2).transpose(1, 2)
        torch.testing.assert_close(features, videomae(net, clip(), version), rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_a_bare_encoder_has_no_name_in_its_keys(tmp_path):
    net = Net()
    with torch.no_grad():
        expected = videomae(net, clip(), 5, top="")
        nv.norm(net, expected, "layernorm")
        ours = videomae_small(K, **SMALL).eval()
        line = fill(ours, part := opened(tmp_path, net.state))
        assert "the norm behind its encoder (2)" in line and "new here: fc_norm, head" in line
        features = ours.forward_features(clip()).flatten(2).transpose(1, 2)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="nothing for 'mask_token'"):
        fill(videomae_small_pretrain(**SMALL, **DECODER), part)


# -- ViViT


def vivit(net, x, version):
    name = "vivit.embeddings.patch_embeddings.projection"
    x = nv.tubelets(net, x, name, DIM, (2, PATCH, PATCH))
    cls = net.tensor("vivit.embeddings.cls_token", 1, 1, DIM).expand(len(x), -1, -1)
    x = torch.cat([cls, x], 1)
    x = x + net.tensor("vivit.embeddings.position_embeddings", 1, 33, DIM)
    new = {"proj": "attention.o_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    parts = BLOCK | {"gelu": "tanh"} | (new if version == 5 else {})
    for i in range(DEPTH):
        name = f"vivit.layers.{i}." if version == 5 else f"vivit.encoder.layer.{i}."
        inner = "attention" if version == 5 else "attention.attention"
        letters = ("q_proj", "k_proj", "v_proj") if version == 5 else ("query", "key", "value")
        qkv = nv.three(net, *(f"{name}{inner}.{letter}" for letter in letters))
        x = nv.block(net, x, name, qkv, HEADS, parts)
    return nv.dense(net, nv.norm(net, x, "vivit.layernorm")[:, 0], "classifier", K)


@pytest.mark.parametrize("version", [4, 5])
def test_vivits_first_model(version, tmp_path):
    net = Net()
    with torch.no_grad():
        expected = vivit(net, clip(), version)
        state = {**net.state, "vivit.pooler.dense.weight": torch.ones(DIM, DIM)}
        part = opened(tmp_path, state)
        ours = vivit_b_joint(K, **SMALL).eval()
        line = fill(ours, part)
        assert f"{len(ours.state_dict())} tensors; not used: its pooler (1)" in line
        torch.testing.assert_close(ours(clip()), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
    assert part.facts.mean == part.facts.std == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="does not fit FactorisedEncoder"):
        fill(vivit_b_factorised_encoder(K, **SMALL), part)


# -- TimeSformer

# What `model.` of the authors' checkpoints is called there.
TIMESFORMER = {
    "cls_token": "timesformer.embeddings.cls_token",
    "pos_embed": "timesformer.embeddings.position_embeddings",
    "time_embed": "timesformer.embeddings.time_embeddings",
    "patch_embed.proj": "timesformer.embeddings.patch_embeddings.projection",
    "norm": "timesformer.layernorm",
    "head": "classifier",
}
LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "temporal_norm1": "temporal_layernorm",
    "temporal_fc": "temporal_dense",
    "attn.qkv": "attention.attention.qkv",
    "attn.proj": "attention.output.dense",
    "temporal_attn.qkv": "temporal_attention.attention.qkv",
    "temporal_attn.proj": "temporal_attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def timesformer():
    """A state dict, and what its tensors are called in the authors' checkpoints."""
    sizes = {
        "cls_token": (1, 1, DIM), "pos_embed": (1, 17, DIM), "time_embed": (1, FRAMES, DIM),
        "patch_embed.proj.weight": (DIM, 3, PATCH, PATCH), "patch_embed.proj.bias": (DIM,),
        "norm.weight": (DIM,), "norm.bias": (DIM,), "head.weight": (K, DIM), "head.bias": (K,),
    }  # fmt: skip
    state, pairs = {}, {}
    for name, size in sizes.items():
        module, dot, leaf = name.rpartition(".") if "." in name else (name, "", "")
        pairs[TIMESFORMER[module] + dot + leaf] = name, size
    widths = {"attn.qkv": (3 * DIM, DIM), "mlp.fc1": (4 * DIM, DIM), "mlp.fc2": (DIM, 4 * DIM)}
    for i in range(DEPTH):
        for module, theirs in LAYER.items():
            size = widths.get(module.removeprefix("temporal_"), (DIM, DIM))
            size = (DIM,) if "norm" in module else size
            for leaf, shape in (("weight", size), ("bias", size[:1])):
                key = f"timesformer.encoder.layer.{i}.{theirs}.{leaf}"
                pairs[key] = f"blocks.{i}.{module}.{leaf}", shape
    for seed, (key, (_, size)) in enumerate(pairs.items()):
        state[key] = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return state, {key: name for key, (name, _) in pairs.items()}


def test_timesformers_tensors_land_where_the_paper_has_them(tmp_path):
    state, names = timesformer()
    part = opened(tmp_path, state)
    ours = timesformer_base(K, **SMALL)
    assert fill(ours, part).endswith(f"{len(state)} tensors")
    own = ours.state_dict()
    assert set(names.values()) == set(own)
    for key, name in names.items():
        here = own[name].squeeze(2) if name == "patch_embed.proj.weight" else own[name]
        assert torch.equal(here, state[key]), key
    assert part.facts.mean == (0.45,) * 3 and part.facts.std == (0.225,) * 3
    state["timesformer.encoder.layer.0.temporal_dense.scale"] = torch.ones(1)
    with pytest.raises(
        UserError, match=r"no place for 'timesformer\.encoder\.layer\.0\.temporal_dense\.scale'"
    ):
        fill(ours, opened(tmp_path, state))
    del state["timesformer.encoder.layer.0.temporal_dense.scale"], state["classifier.bias"]
    with pytest.raises(UserError, match=r"nothing for 'head\.bias'"):
        fill(ours, opened(tmp_path, state))


# -- what lies beside the file, and what does not fit


def test_class_names_come_from_the_config(tmp_path):
    state, _ = timesformer()
    names = ["run", "jump", "sit", "fall", "fly"]
    config = {"id2label": {str(number): name for number, name in enumerate(names)}}
    part = opened(tmp_path, state, config)
    assert part.facts.labels == names
    ours = timesformer_base(K, **SMALL)
    assert "in the order of the data's classes" in fill(ours, part, names[::-1])
    assert torch.equal(ours.head.weight, state["classifier.weight"].flip(0))
    nameless = {str(number): f"LABEL_{number}" for number in range(K)}
    few = {"0": "run", "1": "jump"}
    for broken in ({"id2label": nameless}, {"id2label": few}, {"id2label": ["run"]}, {}, []):
        assert opened(tmp_path, state, broken).facts.labels is None
    (tmp_path / "config.json").write_text("{")
    assert opened(tmp_path, state).facts.labels is None
    state["classifier.weight"], state["classifier.bias"] = torch.ones(400, DIM), torch.ones(400)
    assert opened(tmp_path, state).facts.labels[0] == "abseiling"


def test_other_networks_are_refused(tmp_path):
    state, _ = timesformer()
    part = opened(tmp_path, state)
    with pytest.raises(UserError, match="is a timesformer, and VideoMAE is not"):
        fill(videomae_small(K, **SMALL), part)
    with pytest.raises(
        UserError, match="Hugging Face's weights are read for timesformer, videomae"
    ):
        fill(r3d_18(K, width=8), part)
    with pytest.raises(
        UserError, match=r"position_embeddings' is 1 x 17 x 24 there and 1 x 26 x 24"
    ):
        fill(timesformer_base(K, **SMALL | {"size": 40}), part)


# -- its own networks


def settings(**more):
    return {
        "image_size": SIZE, "patch_size": PATCH, "num_frames": FRAMES, "hidden_size": DIM,
        "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 4 * DIM,
        "num_labels": K, "layer_norm_eps": 1e-6, **more,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timesformer", "videomae", "videomae_pretrain", "vivit"])
def test_its_own_networks_give_the_same(name, tmp_path):
    hf = pytest.importorskip("transformers")
    hidden = HIDDEN.expand(2, -1)
    if name == "timesformer":
        theirs = hf.TimesformerForVideoClassification(hf.TimesformerConfig(**settings()))
        ours = timesformer_base(K, **SMALL)
    elif name == "videomae":
        theirs = hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**settings()))
        ours = videomae_small(K, **SMALL)
    elif name == "videomae_pretrain":
        config = hf.VideoMAEConfig(
            **settings(
                use_mean_pooling=False, decoder_hidden_size=12, decoder_num_hidden_layers=1,
                decoder_num_attention_heads=HEADS, decoder_intermediate_size=48,
            )
        )  # fmt: skip
        theirs = hf.VideoMAEForPreTraining(config)
        ours = videomae_small_pretrain(**SMALL, **DECODER)
    else:
        config = hf.VivitConfig(**settings(tubelet_size=[2, PATCH, PATCH]))
        theirs = hf.VivitForVideoClassification(config)
        ours = vivit_b_joint(K, **SMALL)
    theirs, ours = theirs.eval(), ours.eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    (part,) = open_parts({"weights": str(tmp_path / "model.safetensors")}, tmp_path, print)
    assert "new here" not in fill(ours, part)
    pixels = clip().transpose(1, 2)
    with torch.no_grad():
        if name == "videomae_pretrain":
            expected, found = theirs(pixels, hidden).logits, ours(clip(), mask())
        else:
            expected, found = theirs(pixels).logits, ours(clip())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
