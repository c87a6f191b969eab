"""What a test found, as one HTML page that needs nothing beside itself.

Styles, script, charts and thumbnails lie in the page, and its own content policy would refuse
anything from a network. Every text that comes from outside goes through `escape`.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidtrain.types import VideoReader
from vidtrain.visualize.charts import Point, as_json, heat_map, line_chart
from vidtrain.visualize.clips import animation, stills

Opener = Callable[[str], AbstractContextManager[VideoReader]]

LARGEST_MATRIX = 40  # classes that a confusion matrix shows cell by cell
EXTREMES = 15  # best and worst classes shown, where there are more than that matrix holds
PAIRS = 12  # most confused pairs, likewise
FINE = 300  # classes from which a map has more cells than the page has pixels for
WORST = 12  # errors with a thumbnail
SECONDS, RATE, PIXELS = 3.0, 8.0, 240  # of a thumbnail: length, frames per second, longer side

SCORES = {  # names of the metrics that are shares of one, in the order of their weight
    "top1": "top-1 accuracy",
    "map": "mean average precision",
    "hit1": "best answer is a true label",
    "top5": "top-5 accuracy",
    "hit5": "a true label among the best 5",
    "mean_class": "top-1, mean over classes",
    "clip_top1": "top-1 of a single view",
    "clip_top5": "top-5 of a single view",
    "clip_hit1": "best answer of a single view",
    "clip_hit5": "best 5 of a single view",
}


class Prediction(NamedTuple):
    """One video and what was said of it."""

    path: str
    labels: tuple[str, ...]  # the truth: one, several (multi-label), or none where it is not known
    top: tuple[tuple[str, float], ...]  # label and score, best first

    @property
    def right(self) -> bool:
        """Whether the best answer is a true one."""
        return self.top[0][0] in self.labels


def report_page(
    report: Mapping[str, Any],
    predictions: Sequence[Prediction],
    curves: Mapping[str, Sequence[Point]],
    config: str,
    open_path: Opener | None = None,
    reconstructions: bytes | None = None,
) -> str:
    """Lay out the whole page.

    Args:
        report: what `report.json` holds; a key that is missing costs only its own line.
        predictions: one for each scored video.
        curves: the points of each metric logged in training, in order of step.
        config: the resolved config, as YAML.
        open_path: opens a prediction's video; None: from its file.
        reconstructions: a PNG of what a masked autoencoder made of some videos.
    """
    known = [p for p in predictions if p.labels]
    names = _class_names(report, known)
    if report.get("multi_label"):
        classes = [_average_precision(report, known)]
    else:
        counts = confusion(known, names)
        classes = [_per_class(counts, names), _confusion(counts, names)] if known else []
    sections = [
        _failed(report),
        _protocol(report),
        reconstruction_section(reconstructions),
        _curves(curves),
        *classes,
        _worst(report, known, open_path),
        _config(report, config),
    ]
    title = f"{report.get('model') or 'model'} on {report.get('data') or 'data'}"
    head = f"{_header(report, title)}\n{_headline(report, known)}\n"
    return document(title, head + "".join(sections))


def document(title: str, body: str) -> str:
    """Put HTML into a page with our style and script that may load nothing from anywhere."""
    here = Path(__file__).with_name("page.css")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{here.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{body}
</main>
<script>
{here.with_suffix(".js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def confusion(predictions: Iterable[Prediction], names: Sequence[str]) -> np.ndarray:
    """Count answers: `(K, K)`, rows true and columns predicted, one true label a video."""
    at = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for prediction in predictions:
        counts[at[prediction.labels[0]], at[prediction.top[0][0]]] += 1
    return counts


def interval(share: float, count: int) -> tuple[float, float]:
    """Bound the true share with 95 % confidence, after `share` of `count` independent trials.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / count / 2) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def _class_names(report: Mapping[str, Any], predictions: Iterable[Prediction]) -> list[str]:
    """List the classes in the model's order; a label that it does not know goes to the end."""
    names = [str(name) for name in report.get("label_names") or ()]
    met = {name for p in predictions for name in (*p.labels, p.top[0][0])}
    return names + sorted(met.difference(names))


def _header(report: Mapping[str, Any], title: str) -> str:
    facts = [f"{report['split']} split" if report.get("split") else ""]
    if isinstance(report.get("params"), int):
        facts.append(f"{_millions(report['params'])} parameters")
    facts.append(f"vidtrain {report['vidtrain']}" if report.get("vidtrain") else "")
    facts.append(str(report.get("created") or ""))
    command = report.get("command")
    return (
        f"<header><h1>{escape(title)}</h1>"
        f"<p class='facts'>{' '.join(f'<span>{escape(fact)}</span>' for fact in facts if fact)}</p>"
        + (f"<pre class='command'><code>{escape(str(command))}</code></pre>" if command else "")
        + "</header>"
    )


def _headline(report: Mapping[str, Any], predictions: Sequence[Prediction]) -> str:
    """The score, on how many videos, how sure it is, and what knowing nothing would score."""
    metrics = {
        name: float(value)
        for name, value in (report.get("metrics") or {}).items()
        if isinstance(value, int | float)
    }
    if not metrics:
        return "<section class='headline'><p>No score was logged.</p></section>"
    if 0 < len(report.get("label_names") or ()) <= 5:  # one of five is no achievement then
        metrics = {name: value for name, value in metrics.items() if not name.endswith("top5")}
    ranked = sorted(metrics, key=_rank)
    first, value = ranked[0], metrics[ranked[0]]
    videos = report.get("videos") or {}
    scored, asked = videos.get("scored"), videos.get("asked")
    lines = []
    if scored is not None and asked is not None:
        lines.append(f"<strong>on {scored:,} of {asked:,} videos</strong>")
    if _stem(first) == "top1" and scored and 0 <= value <= 1:
        low, high = interval(value, scored)
        lines.append(f"95% interval {_percent(low)} to {_percent(high)}")
    if _stem(first) == "top1" and predictions:
        label, count = Counter(p.labels[0] for p in predictions).most_common(1)[0]
        lines.append(
            f"Always answering <q>{escape(label)}</q>, the most frequent class, would score "
            f"{_percent(count / len(predictions))}."
        )
    others = "".join(
        f"<div><dt>{escape(_score_name(name))}</dt><dd>{_score(name, metrics[name])}</dd></div>"
        for name in ranked[1:]
    )
    return (
        f"<section class='headline'><div class='score'><p class='number'>{_score(first, value)}</p>"
        f"<p class='what'>{escape(_score_name(first))}</p></div>"
        f"<div class='basis'>{''.join(f'<p>{line}</p>' for line in lines)}</div>"
        + (f"<dl class='others'>{others}</dl>" if others else "")
        + "</section>"
    )


def _failed(report: Mapping[str, Any]) -> str:
    failed = (report.get("videos") or {}).get("failed") or []
    if not failed:
        return ""
    rows = "".join(
        f"<tr><td class='path'>{escape(str(f.get('path')))}</td>"
        f"<td>{escape(str(f.get('reason')))}</td></tr>"
        for f in failed
    )
    table = (
        "<div class='scroll'><table><thead><tr><th scope='col'>File</th><th scope='col'>Reason</th>"
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    if len(failed) > 10:
        table = f"<details><summary>All {len(failed):,} files</summary>{table}</details>"
    were = "One video was" if len(failed) == 1 else f"{len(failed):,} videos were"
    return _section(
        "Not scored", f"{were} left out of every number on this page.", table, kind="failed"
    )


def _protocol(report: Mapping[str, Any]) -> str:
    protocol = report.get("protocol") or {}
    if not protocol:
        return ""
    p = {key: protocol.get(key) for key in ("frames", "stride", "clips", "crops", "size")}
    size = p["size"]
    side = protocol.get("short_side") or size
    rows = [
        (
            "Clip",
            f"{_many(p['frames'], _unit(protocol))}, {_spread(protocol) or _ordinal(p['stride'])}",
        ),
        ("Effective rate", _rate(protocol.get("fps")) or "each video's own"),
        ("Clips per video", p["clips"]),
        ("Crops per clip", p["crops"]),
        ("Crop", size and f"{size} × {size} pixels"),
        ("Short side before cropping", side and f"{side} pixels"),
        ("Region, relative", protocol.get("region")),
        ("Seconds that count", protocol.get("span")),
        ("Videos asked for", _whole((report.get("videos") or {}).get("asked"))),
    ]
    cells = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in rows
        if value is not None
    )
    return _section(
        "Protocol", _in_words(protocol), f"<table class='facts'>{cells}</table>", kind="protocol"
    )


def _unit(protocol: Mapping[str, Any]) -> str:
    return "feature" if protocol.get("contents") == "features" else "frame"


def _in_words(protocol: Mapping[str, Any]) -> str:
    """Say how a video was looked at."""
    clips, crops = protocol.get("clips"), protocol.get("crops")
    frames, stride, size = (protocol.get(key) for key in ("frames", "stride", "size"))
    if clips == crops == 1:
        seen = "Each video is seen once: one clip, one crop."
    elif size is None:  # features, which are not cropped
        seen = f"Each video is seen in {_many(clips, 'clip')} spread over its length."
    else:
        views = clips * crops if isinstance(clips, int) and isinstance(crops, int) else "?"
        seen = (
            f"Each video is seen {'twice' if views == 2 else f'{views} times'}: {_many(clips, 'clip')} spread over its length, "
            f"{_many(crops, 'crop')} of each; the scores of these views are averaged."
        )
    rate = _rate(protocol.get("fps"))
    apart = _spread(protocol) or ("consecutive" if stride == 1 else f"{stride} apart")
    clip = f"A clip is {_many(frames, _unit(protocol))}" + (f", {apart}" if frames != 1 else "")
    clip += f" ({rate})" if rate and frames != 1 else ""
    if size is None:
        return f"{seen} {clip}."
    side = protocol.get("short_side")
    scaled = f"scaled to {side} pixels on the shorter side and " if side else ""
    return f"{seen} {clip}, {scaled}cropped to {size} × {size} pixels."


def _curves(curves: Mapping[str, Sequence[Point]]) -> str:
    """Loss, accuracy and learning rate over the steps of training."""
    charts = "".join(
        line_chart(title, {name: curves[name] for name in _order(curves, kind)}, percent=percent)
        for title, kind, percent in (
            ("Loss", "loss", False),
            ("Accuracy", "score", True),
            ("Learning rate", "lr", False),
        )
    )
    if not charts:
        return ""
    strays = {
        name: sum(not math.isfinite(point.value) for point in points)
        for name, points in curves.items()
    }
    notes = [
        f"{escape(name)} was not finite at {n:,} of its points." for name, n in strays.items() if n
    ]
    return _section(
        "Training", " ".join(notes), f"<div class='charts'>{charts}</div>", lead_is_html=True
    )


def _order(curves: Mapping[str, Sequence[Point]], kind: str) -> list[str]:
    """Pick the curves of one chart; validation first, so that it has the same colour everywhere."""

    def belongs(name: str) -> bool:
        last = name.rsplit("/", 1)[-1].lower()
        if name.startswith("lr-") or last == "lr":
            return kind == "lr"
        if last.startswith("loss"):
            return kind == "loss"
        return kind == "score" and last.removesuffix("_step").removesuffix("_epoch") in (
            "top1",
            "map",
        )

    names = sorted(filter(belongs, curves), key=lambda name: (not name.startswith("val/"), name))
    if kind != "lr":
        return names
    # Groups of parameters mostly share one rate: each different one is drawn once.
    return list({tuple(curves[name]): name for name in reversed(names)}.values())[::-1]


def _per_class(counts: np.ndarray, names: Sequence[str]) -> str:
    """Accuracy of each class, worst first, and what it is mostly taken for."""
    videos = counts.sum(axis=1)
    seen = [i for i in range(len(names)) if videos[i]]
    accuracy = counts.diagonal() / np.maximum(videos, 1)
    order = sorted(seen, key=lambda i: (accuracy[i], -videos[i], names[i]))
    mistakes = counts.copy()
    np.fill_diagonal(mistakes, 0)

    def row(i: int) -> str:
        worst = int(mistakes[i].argmax())
        taken = f"{escape(names[worst])} ({mistakes[i, worst]})" if mistakes[i, worst] else ""
        return (
            f"<tr><th scope='row'>{escape(names[i])}</th>"
            f"<td class='bar'><i style='width:{100 * accuracy[i]:.1f}%'></i></td>"
            f"<td class='n'>{_percent(accuracy[i])}</td><td class='n'>{videos[i]:,}</td>"
            f"<td class='taken'>{taken}</td></tr>"
        )

    def table(rows: Sequence[int], caption: str) -> str:
        return (
            f"<table class='classes'><caption>{caption}</caption><thead><tr>"
            "<th scope='col'>Class</th><th scope='col' colspan='2'>Accuracy</th>"
            "<th scope='col' class='n'>Videos</th><th scope='col' class='taken'>Mostly taken for</th>"
            f"</tr></thead><tbody>{''.join(map(row, rows))}</tbody></table>"
        )

    mean = float(accuracy[seen].mean())
    perfect = sum(counts[i, i] == videos[i] for i in seen)
    lead = f"Mean over {_many(len(seen), 'class')}: {_percent(mean)}. "
    lead += f"Always right: {perfect} of them. " if perfect else ""
    absent = len(names) - len(seen)
    lead += f"No video was scored of {_many(absent, 'further class')}." if absent else ""
    if len(seen) <= LARGEST_MATRIX:
        body = table(order, "Lowest accuracy first")
    else:
        bars = "".join(
            f"<i style='height:{max(1.0, 100 * accuracy[i]):.0f}%' "
            f"title='{escape(names[i])}: {_percent(accuracy[i])} of {videos[i]}'></i>"
            for i in order
        )
        body = (
            f"<div class='profile' role='img' aria-label='Accuracy of {len(seen)} classes in rising "
            f"order, median {_percent(float(np.median(accuracy[seen])))}'>{bars}</div>"
            "<p class='at'>A bar for each class; lines at 25, 50, 75 and 100%</p>"
            "<div class='pair'>"
            f"{table(order[:EXTREMES], f'The {EXTREMES} lowest')}"
            f"{table(order[: -EXTREMES - 1 : -1], f'The {EXTREMES} highest')}</div>"
            f"<details><summary>All {len(seen)} classes</summary>"
            f"{table(order, 'Lowest accuracy first')}</details>"
        )
    return _section("Accuracy per class", lead, body)


def _confusion(counts: np.ndarray, names: Sequence[str]) -> str:
    if len(names) <= LARGEST_MATRIX:
        return _section(
            "Confusion matrix",
            "Rows are the true classes, columns the predicted ones; a cell counts videos, its "
            "strength is their share of the row.",
            _matrix(counts, names),
        )
    videos = counts.sum(axis=1)
    rows, columns = np.nonzero(counts - np.diag(counts.diagonal()))
    pairs = sorted(
        zip(rows.tolist(), columns.tolist(), strict=True),
        key=lambda at: (-counts[at], -counts[at] / videos[at[0]], at),
    )
    table = "".join(
        f"<tr><td>{escape(names[i])}</td><td>{escape(names[j])}</td>"
        f"<td class='n'>{counts[i, j]:,}</td><td class='n'>{_percent(counts[i, j] / videos[i])}</td></tr>"
        for i, j in pairs[:PAIRS]
    )
    i, j = np.nonzero(counts)
    cells = np.stack([i, j, counts[i, j]], axis=1).ravel().tolist()
    size = len(names)
    return _section(
        "Confusion",
        "Rows of the map are the true classes, columns the predicted ones, in the order of the "
        "labels. Point at it to read a cell.",
        "<div class='confusion'><figure class='heat'>"
        f"<img src='{_data_uri(heat_map(counts), 'image/png')}' width='{size}' height='{size}' "
        f"class='{'fine' if size > FINE else 'coarse'}' "
        f"alt='Heat map of {size} classes; the table of pairs tells its largest mistakes'>"
        "<figcaption class='at'>&nbsp;</figcaption>"
        f"<script type='application/json'>{as_json([list(names), cells])}</script></figure>"
        "<div class='scroll'><table><caption>Most confused pairs</caption><thead><tr>"
        "<th scope='col'>True</th><th scope='col'>Predicted</th><th scope='col' class='n'>Videos</th>"
        f"<th scope='col' class='n'>Share</th></tr></thead><tbody>{table}</tbody></table></div></div>",
    )


def _matrix(counts: np.ndarray, names: Sequence[str]) -> str:
    """A confusion matrix as a table; right answers in one colour, mistakes in another."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    head = "".join(f"<th scope='col'><span>{escape(name)}</span></th>" for name in names)
    body = ""
    for i, name in enumerate(names):
        cells = ""
        for j in range(len(names)):
            kind = "hit" if i == j else "miss"
            cells += (
                f"<td class='{kind}' style='--s:{share[i, j]:.3f}' "
                f"title='{escape(names[i])} → {escape(names[j])}: {_percent(share[i, j])}'>"
                f"{counts[i, j]:,}</td>"
                if counts[i, j]
                else "<td></td>"
            )
        body += f"<tr><th scope='row'>{escape(name)}</th>{cells}</tr>"
    size = "small" if len(names) > 12 else "large"
    return (
        f"<div class='scroll'><table class='matrix {size}'><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _average_precision(report: Mapping[str, Any], predictions: Sequence[Prediction]) -> str:
    """Average precision of each class, where the report holds it."""
    precision = report.get("class_ap") or {}
    if not precision:
        return _section(
            "Per class",
            "A video may carry several labels, so there is no confusion matrix; the five best "
            "scores of each video are not enough for the average precision of a class.",
            "",
        )
    videos = Counter(label for p in predictions for label in p.labels)
    known = {n: float(v) for n, v in precision.items() if v is not None and math.isfinite(v)}
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>"
        f"<td class='bar'><i style='width:{100 * value:.1f}%'></i></td>"
        f"<td class='n'>{_percent(value)}</td><td class='n'>{videos[name]:,}</td></tr>"
        for name, value in sorted(known.items(), key=lambda item: item[1])
    )
    table = (
        "<table class='classes'><caption>Lowest first</caption><thead><tr><th scope='col'>Class</th>"
        "<th scope='col' colspan='2'>Average precision</th><th scope='col' class='n'>Videos</th></tr>"
        f"</thead><tbody>{rows}</tbody></table>"
    )
    if len(known) > LARGEST_MATRIX:
        table = f"<details><summary>All {len(known)} classes</summary>{table}</details>"
    mean = sum(known.values()) / len(known) if known else 0.0
    return _section(
        "Average precision per class",
        f"Mean over {_many(len(known), 'class')}: {_percent(mean)}.",
        table,
    )


def _worst(
    report: Mapping[str, Any], predictions: Sequence[Prediction], open_path: Opener | None
) -> str:
    """The errors that the model was surest of, moving."""
    if not predictions:
        return ""
    wrong = sorted((p for p in predictions if not p.right), key=lambda p: -p.top[0][1])
    if not wrong:
        return _section("Worst errors", "There is none: every first answer was right.", "")
    cards = "".join(_card(report, p, open_path) for p in wrong[:WORST])
    lead = f"{len(wrong):,} of {len(predictions):,} first answers were wrong."
    if len(wrong) > 1:
        lead += " These are the ones the model was surest of; each shows up to three seconds from the middle."
    return _section(
        "Worst errors",
        lead,
        f"<button type='button' class='pause' hidden>Pause</button><div class='cards'>{cards}</div>",
    )


def reconstruction_section(picture: bytes | None) -> str:
    """Show what a masked autoencoder made of hidden parts; nothing where there is no picture."""
    if picture is None:
        return ""
    lead = (
        "Of each video: the clip; what the network saw of it; what it predicted of the rest, in the mean and contrast"
        " that each hidden box had; and that mean alone, which the network has no part in."
    )
    image = (
        f"<img src='{_data_uri(picture, 'image/png')}' alt='original, seen and predicted frames'"
        " style='max-width: 100%; height: auto'>"
    )
    return _section("Reconstructions", lead, image)


def _card(report: Mapping[str, Any], p: Prediction, open_path: Opener | None) -> str:
    from vidtrain.data.decode import open_video

    said, score = p.top[0]
    scores = dict(p.top)
    truth = ", ".join(
        f"{escape(label)} <span class='n'>{_percent(scores[label])}</span>"
        if label in scores
        else escape(label)
        for label in p.labels
    )
    try:
        if open_path is None:
            opened: AbstractContextManager[VideoReader] = open_video(
                _located(p.path, report.get("data_root"))
            )
        else:
            opened = open_path(p.path)
        with opened as reader:
            moving, still = _thumbnail(reader)
        alt = escape(f"{p.path}: said {said}, is {', '.join(p.labels)}")
        picture = (
            f"<picture><source srcset='{_data_uri(still, 'image/jpeg')}' "
            "media='print, (prefers-reduced-motion: reduce)'>"
            f"<img src='{_data_uri(moving)}' alt='{alt}'></picture>"
        )
    except Exception as error:  # a report never fails for want of a picture
        reason = str(error) or type(error).__name__
        picture = f"<p class='missing'>No picture: {escape(reason)}</p>"
    return (
        f"<article class='card'><div class='frame'>{picture}</div><dl>"
        f"<div><dt>said</dt><dd>{escape(said)} <span class='n'>{_percent(score)}</span></dd></div>"
        f"<div><dt>is</dt><dd>{truth}</dd></div></dl>"
        f"<p class='path'>{escape(p.path)}</p></article>"
    )


def _thumbnail(reader: VideoReader) -> tuple[bytes, bytes]:
    """Take the middle of a video: an animation at its own speed, and one still as JPEG."""
    step = max(1, round(reader.fps / RATE))
    count = max(1, min(round(SECONDS * reader.fps), len(reader)) // step)
    start = (len(reader) - (count - 1) * step) // 2 if count > 1 else len(reader) // 2
    frames = reader.frames([start + i * step for i in range(count)])
    still = io.BytesIO()
    stills(frames[count // 2 : count // 2 + 1], size=PIXELS)[0].save(still, "JPEG", quality=75)
    return animation(frames, reader.fps / step, size=PIXELS, quality=50), still.getvalue()


def _located(path: str, root: str | None) -> str:
    """Find the file: as it is written, or below the data's root."""
    if root and not Path(path).is_absolute() and (Path(root) / path).exists():
        return str(Path(root) / path)
    return path


def code_in_words(code: Mapping[str, Any]) -> str:
    """Say which versions a run was made by: `vidtrain 0.1.0; commit 6ca37be70d02, changed since; ...`."""

    def commit(of: str, prefix: str = "") -> str:
        changed = ", changed since" if code.get(f"{prefix}dirty") else ""
        return f"{of} {str(code[f'{prefix}commit'])[:12]}{changed}"

    words = [f"vidtrain {code.get('vidtrain')}"]
    if code.get("vidtrain_commit") and code["vidtrain_commit"] != code.get("commit"):
        words.append(commit("its commit", "vidtrain_"))
    if code.get("commit"):
        words.append(commit("commit"))
    libraries = {"python": "Python", "torch": "PyTorch", "lightning": "Lightning", "cuda": "CUDA"}
    words += [f"{name} {code[key]}" for key, name in libraries.items() if code.get(key)]
    return "; ".join(words)


def _config(report: Mapping[str, Any], config: str) -> str:
    made = {
        "Checkpoint": report.get("ckpt"),
        "Trained with": code_in_words(report.get("code") or {}) if report.get("code") else None,
        "Data": report.get("data_root"),
        "Fingerprint of the data": report.get("fingerprint"),
    }
    facts = "".join(
        f"<tr><th scope='row'>{name}</th><td class='path'>{escape(str(value))}</td></tr>"
        for name, value in made.items()
        if value
    )
    whole = (
        f"<details><summary>The whole config</summary><pre><code>{escape(config)}</code></pre></details>"
        if config
        else ""
    )
    if not facts and not whole:
        return ""
    return _section(
        "Made from", "", (f"<table class='facts'>{facts}</table>" if facts else "") + whole
    )


def _section(
    title: str, lead: str, body: str, *, kind: str = "", lead_is_html: bool = False
) -> str:
    text = lead if lead_is_html else escape(lead)
    return (
        f"<section{f' class={kind!r}' if kind else ''}><h2>{escape(title)}</h2>"
        + (f"<p class='lead'>{text}</p>" if text else "")
        + f"{body}</section>\n"
    )


def _data_uri(data: bytes, kind: str = "") -> str:
    kind = kind or ("image/webp" if data[:4] == b"RIFF" else "image/gif")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _stem(name: str) -> str:
    """Strip the stage from a metric's name: test/top1 -> top1, test/mAP -> map."""
    return name.rsplit("/", 1)[-1].lower()


def _rank(name: str) -> tuple[int, str]:
    """Order metrics: the ones we know in the order of `SCORES`, then the others."""
    known = list(SCORES)
    return (known.index(_stem(name)) if _stem(name) in SCORES else len(known), name)


def _score_name(name: str) -> str:
    return SCORES.get(_stem(name), name)


def _score(name: str, value: float) -> str:
    return _percent(value) if _stem(name) in SCORES else f"{value:.4g}"


def _percent(share: float) -> str:
    """Write a share in hundredths; only what is whole reads 100%."""
    if not math.isfinite(share):
        return "n/a"
    return f"{100 * share:.1f}%" if share < 1 else "100%"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _many(count: Any, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count} {noun if count == 1 else plural}"


def _ordinal(stride: Any) -> str:
    """Write which frames are taken: consecutive, every 2nd, every 3rd, every 4th."""
    return {1: "consecutive", 2: "every 2nd", 3: "every 3rd"}.get(stride, f"every {stride}th")


def _spread(protocol: Mapping[str, Any]) -> str:
    """Say that frames come from all stretches of a video, whatever the stride; else nothing."""
    return "spread over the whole video" if protocol.get("sampling") == "segments" else ""


def _rate(fps: Any) -> str:
    """Write frames per second: a number, [lowest, highest], or a range that is text already."""
    if isinstance(fps, list | tuple):
        fps = " to ".join(f"{value:.4g}" for value in dict.fromkeys(fps))
    if fps is None or fps == "":
        return ""
    return f"{fps if isinstance(fps, str) else format(fps, '.4g')} frames per second"


def _whole(count: Any) -> str:
    return f"{count:,}" if isinstance(count, int) else "?"
