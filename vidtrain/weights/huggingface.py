"""transformers of Hugging Face: TimeSformer, VideoMAE (pretraining and classifier), ViViT (model 1).

https://github.com/huggingface/transformers: the code is Apache-2.0; weights have the licence that their own
page names, several of them CC BY-NC 4.0. A model is a folder: give its `model.safetensors` or
`pytorch_model.bin`; class names come from the `config.json` beside it. The names of version 4 and those of
version 5 are read.

VideoMAE's norms there divide by sqrt(variance + 1e-12), those before a classifier and in the decoder by
sqrt(variance + 1e-5), where ours and the paper's code have 1e-6: logits differ in their last digits. A
classifier that reads the first token in place of the mean (`use_mean_pooling: false`) is not one of ours, and
does not fit.
"""

from __future__ import annotations

import json

from torch import nn

from vidtrain.types import UserError
from vidtrain.weights import image
from vidtrain.weights.layout import (
    KINETICS_MEAN,
    KINETICS_STD,
    Colour,
    Facts,
    File,
    Layout,
    Renamed,
    Rules,
    encoder_alone,
    family,
    join_qkv,
    kinetics_labels,
    nested,
    refuse,
    rename_by,
    rows,
)
from vidtrain.weights.timesformer import one_frame

HALF = (0.5, 0.5, 0.5)
COLOURS: dict[str, tuple[Colour, Colour]] = {
    "timesformer": (KINETICS_MEAN, KINETICS_STD),
    "videomae": (image.MEAN, image.STD),
    "vivit": (HALF, HALF),
}
FAMILIES = {
    "timesformer": "timesformer",
    "videomae": "videomae",
    "videomae_pretrain": "videomae",
    "vivit": "vivit",
}
BLOCK: Rules = (
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.attention\.qkv", "attn.qkv"),
    (r"attention\.(?:attention\.)?(q)uery", r"attn.\1"),
    (r"attention\.(?:attention\.)?(k)ey", r"attn.\1"),
    (r"attention\.(?:attention\.)?(v)alue", r"attn.\1"),
    (r"attention\.attention\.([qv]_bias)", r"attn.\1"),
    (r"attention\.([qkv])_proj", r"attn.\1"),
    (r"attention\.(?:output\.dense|o_proj)", "attn.proj"),
    (r"(?:intermediate\.dense|mlp\.fc1)", "mlp.fc1"),
    (r"(?:output\.dense|mlp\.fc2)", "mlp.fc2"),
    (r"temporal_layernorm", "temporal_norm1"),
    (r"temporal_dense", "temporal_fc"),
    (r"temporal_attention\.attention\.qkv", "temporal_attn.qkv"),
    (r"temporal_attention\.output\.dense", "temporal_attn.proj"),
)


def matches(file: File) -> bool:
    """Tell it by what it calls its patches."""
    return kind(file) is not None


def kind(file: File) -> str | None:
    """Say which network a file is of; of a bare encoder, which its keys do not name, an empty string."""
    for name in (*COLOURS, ""):
        place = f"{name}." if name else ""
        if f"{place}embeddings.patch_embeddings.projection.weight" in file.tensors:
            return name
    return None


def facts(file: File) -> Facts:
    """The colours that the network was published with, and its classes."""
    mean, std = COLOURS.get(kind(file) or "", (None, None))
    classes = rows(file, "classifier")
    return Facts(mean, std, labels=_labels(file, classes) or kinetics_labels(classes))


def _labels(file: File, classes: int | None) -> list[str] | None:
    """Read the class names beside the file, where they are names and as many as the classes."""
    try:
        names = json.loads((file.path.parent / "config.json").read_text())["id2label"]
        labels = [str(names[str(number)]) for number in range(len(names))]
    except (OSError, ValueError, KeyError, TypeError):  # another program's file; it may be missing
        return None
    if len(labels) != classes or labels[0] == "LABEL_0":
        return None
    return labels


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Rename for one of our networks."""
    ours, theirs = FAMILIES.get(family(network)), kind(file)
    if ours is None:
        raise refuse("Hugging Face", network, tuple(FAMILIES))
    if theirs and theirs != ours:
        raise UserError(
            f"model.weights={file.path} is a {theirs}, and {type(network).__name__} is not"
        )
    pretrained = ours == "videomae" and "classifier.weight" not in file.tensors
    renamed = rename_by(_rules(ours, "encoder." if pretrained else ""), file)
    if ours == "timesformer":
        one_frame(renamed)
    else:
        join_qkv(renamed, key_bias=ours != "videomae")
    for name in [name for name in renamed.tensors if name.startswith("pooler.")]:
        renamed.drop(name, "its pooler")
    if pretrained:
        encoder_alone(renamed, network)
    return renamed


def _rules(ours: str, to: str) -> Rules:
    """List the names of one network, whose encoder goes to `to`."""
    top = rf"(?:{ours}\.)?"
    return [
        *nested(rf"{top}(?:encoder\.layer|layers)\.(\d+)\.", rf"{to}blocks.\1.", BLOCK),
        *nested(r"decoder\.decoder_layers\.(\d+)\.", r"decoder.blocks.\1.", BLOCK),
        (rf"{top}embeddings\.patch_embeddings\.projection", f"{to}patch_embed.proj"),
        (rf"{top}embeddings\.cls_token", f"{to}cls_token"),
        (rf"{top}embeddings\.position_embeddings", f"{to}pos_embed"),
        (rf"{top}embeddings\.time_embeddings", f"{to}time_embed"),
        (rf"{top}layernorm", f"{to}norm"),
        (rf"{top}pooler\.dense", "pooler.dense"),
        (r"classifier", "head"),
    ]


LAYOUT = Layout("huggingface", matches, facts, rename)
