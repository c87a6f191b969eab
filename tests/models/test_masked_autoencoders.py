"""VideoMAE, VideoMAE V2 and MAE-ST in pretraining: sizes, what is seen, what is asked, and what is learned."""

import pytest
import torch
from nets import counts
from torch import nn

from vidtrain.layers import masking, pixels
from vidtrain.losses.reconstruction import masked_mse
from vidtrain.models import mae_st, videomae_pretrain
from vidtrain.models.mae_st import mae_st_base, mae_st_base_pretrain
from vidtrain.models.videomae import videomae_base
from vidtrain.models.videomae_pretrain import videomae_base_pretrain, videomae_v2_base_pretrain

# Of models.md, appendix A; where that lacks the encoder's last norm, with it (its section 0.4).
SIZES = {
    "videomae_small_pretrain": (24_029_376, 11.5362),
    "videomae_base_pretrain": (94_210_944, 35.4398),
    "videomae_large_pretrain": (342_996_992, 142.6357),
    "videomae_huge_pretrain": (672_795_776, 194.1910),
    "videomae_giant_pretrain": (1_026_306_560, 263.9571),
    "videomae_v2_base_pretrain": (94_210_944, 25.8398),
    "videomae_v2_giant_pretrain": (1_026_306_560, 241.6135),
    "mae_st_base_pretrain": (99_898_880, 46.143),
    "mae_st_large_pretrain": (317_731_584, 81.6149),
    "mae_st_huge_pretrain": (645_232_460, 179.2299),
}
NARROW = dict(num_frames=4, size=64, dim=48, depth=2, heads=3)
NARROW |= dict(decoder_dim=24, decoder_depth=2, decoder_heads=3)
MAKERS = [videomae_base_pretrain, videomae_v2_base_pretrain, mae_st_base_pretrain]


def make(maker, **changes) -> nn.Module:
    torch.manual_seed(0)
    settings = {**NARROW, "mask_ratio": 0.75, **changes}
    net = maker(**settings).eval()
    for parameter in net.parameters():  # nothing stays at zero
        nn.init.normal_(parameter, std=0.1)
    return net


def clips(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 4, 64, 64)


def drawn(net: nn.Module, batch: int = 2, seed: int = 0):
    return net.draw(batch, (4, 64, 64), torch.Generator().manual_seed(seed))


def loss(net: nn.Module, video: torch.Tensor, mask) -> torch.Tensor:
    boxes = net.boxes(video)
    numbers = mask.predicted[..., None, None].expand(-1, -1, *boxes.shape[2:])
    target = net.standardise(boxes.gather(1, numbers)).values
    return masked_mse(net(video, mask), target, mask.counted)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds(name):
    maker = getattr(videomae_pretrain, name, None) or getattr(mae_st, name)
    with torch.device("meta"):
        params, macs = counts(maker(), 16, 224)
    assert params == SIZES[name][0]
    assert macs == pytest.approx(SIZES[name][1], rel=1e-4)


@pytest.mark.parametrize(
    "name, params, macs",
    [
        ("mae_st_base", 86_702_224, 180.4876),
        ("mae_st_large", 304_506_256, 597.2893),
        ("mae_st_huge", 632_424_080, 1191.8802),
    ],
)
def test_parameters_and_multiply_adds_of_the_classifiers(name, params, macs):
    with torch.device("meta"):
        net = getattr(mae_st, name)(400, patch=16)
        assert counts(net, 16, 224) == (params, pytest.approx(macs, rel=1e-4))


@pytest.mark.parametrize(
    "maker, shape",
    [
        (videomae_base_pretrain, (1408, 1536)),
        (videomae_v2_base_pretrain, (784, 1536)),
        (mae_st_base_pretrain, (1412, 768)),
        (mae_st.mae_st_huge_pretrain, (1844, 588)),
    ],
)
def test_what_is_predicted_of_a_whole_clip(maker, shape):
    with torch.device("meta"):
        assert maker()(torch.empty(2, 3, 16, 224, 224)).shape == (2, *shape)


@pytest.mark.parametrize("maker", MAKERS)
def test_hidden_pixels_change_the_loss_and_not_the_predictions(maker):
    net, video = make(maker), clips()
    mask = drawn(net)
    before, scored = net(video, mask), loss(net, video, mask)
    hidden = torch.ones(2, 32, dtype=torch.bool).scatter(1, mask.visible, False)
    noise = torch.rand(2, 32, 2 * 16 * 16, 3)

    def perturbed(which: torch.Tensor) -> torch.Tensor:
        box = (2, 16, 16)
        boxes = pixels.cut(video, box)
        return pixels.join(boxes.where(~which[..., None, None], noise), (2, 4, 4), box)

    assert torch.equal(net(perturbed(hidden), mask), before)
    assert (loss(net, perturbed(hidden), mask) != scored).all()
    assert not torch.equal(net(perturbed(~hidden), mask), before)


@pytest.mark.parametrize("maker", MAKERS)
def test_the_encoder_is_given_visible_tokens_alone(maker):
    net, mask = make(maker), None
    seen = []
    net.encoder.blocks[0].register_forward_hook(lambda block, x, y: seen.append(x[0].shape[1]))
    mask = drawn(net)
    net(clips(), mask)
    classes = 1 if maker is mae_st_base_pretrain else 0
    assert seen == [mask.visible.shape[1] + classes] and mask.visible.shape[1] == 8


@pytest.mark.parametrize("maker", MAKERS)
def test_a_seen_clip_is_what_the_classifier_of_the_same_weights_sees(maker):
    """With all tokens visible the encoder is the classifier's."""
    net = make(maker)
    classifier = {mae_st_base_pretrain: mae_st_base}.get(maker, videomae_base)
    settings = {k: v for k, v in NARROW.items() if not k.startswith("decoder")}
    other = classifier(0, **settings).eval()
    fits = {k.removeprefix("encoder."): v for k, v in net.state_dict().items()}
    missing = other.load_state_dict(
        {k: v for k, v in fits.items() if k in other.state_dict()}, False
    )
    assert all(key.startswith(("fc_norm", "head")) for key in missing.missing_keys)
    video, every = clips(), torch.arange(32).expand(2, -1)
    torch.testing.assert_close(
        net.encoder(video, every), net.encoder.norm(other.tokens(video)), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(net.forward_features(video), other.forward_features(video))


def test_the_loss_counts_nothing_that_the_encoder_has_seen():
    net, video = make(videomae_v2_base_pretrain), clips()
    mask = drawn(net)
    assert 0 < mask.counted.sum() < mask.counted.numel()
    predicted = net(video, mask).detach().requires_grad_()
    boxes = net.boxes(video)
    numbers = mask.predicted[..., None, None].expand(-1, -1, *boxes.shape[2:])
    target = net.standardise(boxes.gather(1, numbers)).values
    masked_mse(predicted, target, mask.counted).sum().backward()
    assert torch.equal(predicted.grad.abs().sum(-1) > 0, mask.counted)


def test_videomae_scales_each_colour_of_each_tubelet():
    net = make(videomae_base_pretrain)
    values = net.standardise(net.boxes(clips())).values.unflatten(2, (512, 3))
    torch.testing.assert_close(values.mean(2), torch.zeros(2, 32, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(values.std(2), torch.ones(2, 32, 3), rtol=0, atol=1e-3)
    plain = net.standardise(net.boxes(torch.full((1, 3, 4, 64, 64), 0.5))).values
    assert not plain.any()  # of one colour: 0, and no division by 0


def test_videomae_asks_for_pixels_in_the_order_of_frame_row_column_colour():
    video = torch.arange(3 * 4 * 64 * 64.0).view(1, 3, 4, 64, 64)
    boxes = make(videomae_base_pretrain).boxes(video)
    # Token 5 of a grid of 2 x 4 x 4 is slot 0, row 1, column 1; its pixel 300 is frame 1, row 2, column 12.
    assert torch.equal(boxes[0, 5, 300], video[0, :, 1, 16 + 2, 16 + 12])
    assert torch.equal(boxes[0, 16 + 7, 0], video[0, :, 2, 16, 48])


def test_mae_st_predicts_one_frame_of_two_and_scales_all_colours_together():
    net = make(mae_st_base_pretrain, num_frames=16)
    frames = torch.arange(16.0).view(1, 1, 16, 1, 1).expand(1, 3, 16, 64, 64)
    chosen = net.boxes(frames)[0, :, 0, 0].view(8, 16)
    assert chosen[:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 15]
    video = torch.rand(2, 3, 4, 64, 64) * torch.tensor([0.1, 1, 0.5]).view(3, 1, 1, 1)
    values = net.standardise(net.boxes(video)).values
    torch.testing.assert_close(values.mean(-1), torch.zeros(2, 32), rtol=0, atol=1e-5)
    torch.testing.assert_close(values.std(-1), torch.ones(2, 32), rtol=0, atol=1e-3)
    assert values.unflatten(2, (-1, 3)).std(2)[..., 0].max() < 0.7  # the weak colour stays weak


@pytest.mark.parametrize("maker", MAKERS)
def test_a_picture_is_put_together_from_its_boxes(maker):
    net, video = make(maker), clips()
    picture = net.picture(net.boxes(video), (4, 64, 64))
    shown = video[:, :, [0, 3]] if maker is mae_st_base_pretrain else video
    torch.testing.assert_close(picture, shown)


def test_mae_st_begins_fine_tuning_with_a_classifier_that_says_next_to_nothing():
    narrow = {k: v for k, v in NARROW.items() if not k.startswith("decoder")}
    assert mae_st_base(400, **narrow).head.weight.std().item() == pytest.approx(2e-5, rel=0.05)


def test_mae_st_restores_the_order_of_tokens_for_its_decoder():
    """A token's place is told by the table alone: what is put where it lay counts, not the order seen in."""
    net, video = make(mae_st_base_pretrain), clips()
    mask = drawn(net)
    turned = mask._replace(visible=mask.visible.flip(1))
    torch.testing.assert_close(net(video, turned), net(video, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("maker", MAKERS)
def test_positions_are_not_trained_where_they_are_sines(maker):
    names = {name.rpartition(".")[2] for name, _ in make(maker).named_parameters()}
    learned = {"pos_embed_class", "pos_embed_spatial", "pos_embed_temporal"} & names
    assert bool(learned) == (maker is mae_st_base_pretrain)
    assert "positions" not in names


def test_keys_have_no_bias_in_videomae():
    net = videomae_base_pretrain(**NARROW)
    assert net.encoder.blocks[0].attn.qkv.bias is None
    assert net.decoder.blocks[0].attn.qkv.bias is None and net.encoder_to_decoder.bias is None
    assert mae_st_base_pretrain(**NARROW).encoder.blocks[0].attn.qkv.bias.shape == (144,)


def test_without_a_mask_one_is_drawn_anew_each_time():
    net, video = make(videomae_base_pretrain), clips()
    with torch.no_grad():
        assert not torch.equal(net(video), net(video))


@pytest.mark.parametrize("maker", MAKERS)
def test_some_steps_on_a_clip_lower_the_loss(maker):
    torch.manual_seed(0)
    net, video = maker(**NARROW, mask_ratio=0.75), clips()
    mask = drawn(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    first = loss(net, video, mask).mean()
    for _ in range(30):
        optimizer.zero_grad()
        now = loss(net, video, mask).mean()
        now.backward()
        optimizer.step()
    assert now < first - 0.05


@pytest.mark.slow
def test_logits_and_loss_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=64, patch_size=16, num_frames=4, tubelet_size=2, hidden_size=48,
        num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, layer_norm_eps=1e-6,
        use_mean_pooling=False, decoder_num_attention_heads=3, decoder_hidden_size=24,
        decoder_num_hidden_layers=2, decoder_intermediate_size=96, norm_pix_loss=True,
    )  # fmt: skip
    theirs = transformers.VideoMAEForPreTraining(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = make(videomae_base_pretrain)
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    mean, std = (
        torch.tensor(v).view(3, 1, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    video = clips()
    normal = (video - mean) / std
    mask = drawn(ours)
    flags = torch.ones(2, 32, dtype=torch.bool).scatter(1, mask.visible, False)
    with torch.no_grad():
        answer = theirs(normal.transpose(1, 2), bool_masked_pos=flags)
        torch.testing.assert_close(ours(normal, mask), answer.logits, rtol=1e-4, atol=1e-4)
        boxes = ours.boxes(video)
        numbers = mask.predicted[..., None, None].expand(-1, -1, *boxes.shape[2:])
        target = ours.standardise(boxes.gather(1, numbers)).values
        own = masked_mse(ours(normal, mask), target, mask.counted).mean()
        torch.testing.assert_close(own, answer.loss, rtol=1e-5, atol=1e-5)


def from_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename by hand, in the test: the importer has a map of its own."""
    made, qkv = {}, {}
    renames = [
        ("videomae.embeddings.patch_embeddings.projection", "encoder.patch_embed.proj"),
        ("videomae.encoder.layer", "encoder.blocks"), ("videomae.layernorm", "encoder.norm"),
        ("decoder.decoder_layers", "decoder.blocks"), ("attention.output.dense", "attn.proj"),
        ("attention.attention.", "attn."), ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
    ]  # fmt: skip
    for key, tensor in state.items():
        for old, new in renames:
            key = key.replace(old, new)
        stem, _, last = key.rpartition("attn.")
        if last in ("query.weight", "key.weight", "value.weight"):
            qkv.setdefault(stem, {})[last[0]] = tensor
        elif last.removesuffix("bias") in ("query.", "q_"):
            made[f"{stem}attn.q_bias"] = tensor
        elif last.removesuffix("bias") in ("value.", "v_"):
            made[f"{stem}attn.v_bias"] = tensor
        elif last == "key.bias":  # zero and not trained
            continue
        elif "position_embeddings" not in key:
            made[key] = tensor
    for stem, parts in qkv.items():
        made[f"{stem}attn.qkv.weight"] = torch.cat([parts[letter] for letter in "qkv"])
    return made


def test_masks_are_those_of_the_papers():
    clip = (16, 224, 224)
    for maker, seen in ((videomae_base_pretrain, 160), (mae_st_base_pretrain, 156)):
        with torch.device("meta"):
            net = maker()
        mask = net.draw(2, clip)
        assert mask.visible.shape == (2, seen) and isinstance(mask, masking.Mask)
