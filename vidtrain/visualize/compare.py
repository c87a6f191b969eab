"""Several runs on one page, side by side; like `page.py`'s, it needs nothing beside itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from vidtrain.visualize.charts import Point, key, line_chart
from vidtrain.visualize.page import (
    SCORES,
    Prediction,
    _in_words,
    _many,
    _millions,
    _percent,
    _rank,
    _score,
    _score_name,
    _section,
    _stem,
    code_in_words,
    document,
    interval,
    reconstruction_section,
)

FEW_CLASSES = 15  # shown before the fold, those in which the runs differ most
FEW_SETTINGS = 4  # that become columns of the table of runs

# What a score depends on besides the model, and what to call it.
VIDEOS = {"data": "data", "split": "split", "region": "region", "span": "seconds that count"}
VIEWS = {"clips": "clips per video", "crops": "crops per clip", "sampling": "sampling"}
CLIP = {"contents": "input", "frames": "frames", "stride": "stride", "fps": "frames per second"}
CLIP |= {"size": "crop in pixels", "short_side": "short side in pixels"}


class Run(NamedTuple):
    """What one run left behind; what it lacks is empty."""

    name: str
    folder: str
    model: str
    data: str
    report: Mapping[str, Any]  # its test's report.json
    predictions: Sequence[Prediction]
    curves: Mapping[str, Sequence[Point]]
    settings: Mapping[str, Any]  # its config, one dotted key a value
    metric: str  # what its best epoch was chosen by: val/top1
    minutes: float | None
    code: Mapping[str, Any]  # that it was trained with
    fingerprint: str  # of the rows that it was trained on
    reconstructions: bytes | None = None  # a PNG, of a masked autoencoder

    @property
    def best(self) -> float | None:
        """The best value of `metric` that was logged."""
        values = [p.value for p in self.curves.get(self.metric, ()) if math.isfinite(p.value)]
        return (min if "loss" in self.metric else max)(values) if values else None

    @property
    def protocol(self) -> dict[str, Any]:
        """How it was tested: the report's protocol, with the data's name and split."""
        shape = dict(self.report.get("protocol") or {})
        return {**shape, "data": self.report.get("data"), "split": self.report.get("split")}


def compare_page(runs: Sequence[Run], notes: Sequence[str] = ()) -> str:
    """Lay out the page.

    Args:
        runs: in the order in which they are shown; each keeps its colour throughout.
        notes: lines about what is not shown, below the table of runs.
    """
    differing = differing_settings(runs)
    sections = [
        _results(runs, differing, notes),
        _protocols(runs),
        reconstruction_section(runs[0].reconstructions if len(runs) == 1 else None),
        _curves(runs),
        _classes(runs),
        _settings(runs, differing),
        _sources(runs),
    ]
    title = f"{_many(len(runs), 'run')} side by side" if len(runs) > 1 else runs[0].name
    header = f"<header><h1>{escape(title)}</h1></header>"
    return document(title, header + "".join(sections))


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """List the settings in which the runs are not all the same."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [name for name in keys if len({str(run.settings.get(name)) for run in runs}) > 1]


def differences(runs: Sequence[Run]) -> list[str]:
    """Say in sentences in what the tests of the runs differ."""
    tested = [run for run in runs if run.report]
    lines = []
    if untested := [run.name for run in runs if not run.report]:
        lines.append(f"Not tested: {_named(untested, runs)}.")
    if len(tested) < 2:
        return lines
    videos = _unlike(tested, VIDEOS)
    prints = {run.report.get("fingerprint") for run in tested}
    if videos or len(prints) > 1:
        what = f" ({'; '.join(videos)})" if videos else ""
        lines.append(
            f"Not tested on the same videos{what}: these scores cannot be compared with one another."
            if videos
            else "The rows of the data are not the same in all runs: some videos came, went or changed"
            " their split, so the scores rest on different videos."
        )
    if len({tuple(run.report.get("label_names") or ()) for run in tested}) > 1:
        lines.append("The classes differ, and with them how hard the task is.")
    counts = {_counted(run) for run in tested}
    if len(counts) > 1:
        each = "; ".join(f"{_counted(run)} in {run.name}" for run in tested)
        lines.append(f"Not all videos were scored everywhere: {each}.")
    if views := _unlike(tested, VIEWS):
        lines.append(
            f"Not seen in the same number of views ({'; '.join(views)}): more views mostly score higher."
        )
    if clip := [line.partition(":")[0] for line in _unlike(tested, CLIP)]:
        what = clip[0] if len(clip) == 1 else f"{', '.join(clip[:-1])} and {clip[-1]}"
        lines.append(f"The clips are not the same: they differ in {what}.")
    if not lines:
        lines.append("All runs were tested alike.")
    return lines


def _unlike(runs: Sequence[Run], names: Mapping[str, str]) -> list[str]:
    """Say what is not the same: `crops per clip: 1 in A, 3 in B and C`."""
    lines = []
    for name, title in names.items():
        groups: dict[str, list[str]] = {}
        for run in runs:
            groups.setdefault(_plain(run.protocol.get(name)), []).append(run.name)
        if len(groups) > 1:
            each = ", ".join(f"{value} in {_named(who, runs)}" for value, who in groups.items())
            lines.append(f"{title}: {each}")
    return lines


def _named(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Name some of the runs; many are counted."""
    if len(names) > 3:
        return f"{len(names)} of {len(runs)} runs"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " to ".join(map(_plain, value)) if len(value) == 2 else ", ".join(map(_plain, value))
    return "-" if value is None else str(value)


def _counted(run: Run) -> str:
    videos = run.report.get("videos") or {}
    return f"{videos.get('scored', '?')} of {videos.get('asked', '?')}"


def _results(runs: Sequence[Run], differing: Sequence[str], notes: Sequence[str]) -> str:
    """The table of runs: what they are, what they scored, what that rests on."""
    seen = ("model._target_", "data.name", "clip.", "views.")  # here already, or in the next table
    named = [name for name in differing if not name.startswith(seen)]
    shown = named if len(named) <= FEW_SETTINGS else []
    bests = list(dict.fromkeys(run.metric for run in runs if run.best is not None))
    scores = sorted({name for run in runs for name in _scores(run)}, key=_rank)
    columns = {"Model": [run.model for run in runs], "Data": [run.data for run in runs]}
    same = {head: cells[0] for head, cells in columns.items() if len(set(cells)) == 1 and runs[1:]}
    if columns["Model"] == [run.name for run in runs]:
        del columns["Model"]
    columns = {head: cells for head, cells in columns.items() if head not in same}
    heads = ["Run", *columns, *shown, "Parameters"]
    numbers = [*(f"best {name}" for name in bests), *map(_score_name, scores)]
    numbers += ["videos", "minutes"]
    best_of = {
        **{name: _extreme(name, [r.best for r in runs if r.metric == name]) for name in bests},
        **{name: _extreme(name, [_scores(run).get(name) for run in runs]) for name in scores},
    }
    body = ""
    for i, run in enumerate(runs):
        params = run.report.get("params")
        cells = [column[i] for column in columns.values()]
        cells += [_plain(run.settings.get(name)) for name in shown]
        row = f"<th scope='row'>{key(i)}{escape(run.name)}</th>"
        row += "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        row += f"<td class='n'>{_millions(params) if isinstance(params, int) else '-'}</td>"
        values = [(name, run.best if run.metric == name else None) for name in bests]
        values += [(name, _scores(run).get(name)) for name in scores]
        for name, value in values:
            best = " best" if value is not None and value == best_of[name] else ""
            text = "-" if value is None else _score(name, value)
            row += f"<td class='n{best}'>{text}{_spread(run, name, value)}</td>"
        row += f"<td class='n'>{_counted(run) if run.report else '-'}</td>"
        row += f"<td class='n'>{'-' if run.minutes is None else format(run.minutes, '.1f')}</td>"
        body += f"<tr>{row}</tr>"
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in heads[:-1])
    head += "".join(f"<th scope='col' class='n'>{escape(n)}</th>" for n in [heads[-1], *numbers])
    alike = " on ".join(same[head] for head in ("Model", "Data") if head in same)
    lead = " ".join([*([f"All: {alike}."] if alike else []), *notes])
    table = (
        f"<div class='scroll'><table class='runs'><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
    if any(_spread(run, name, _scores(run).get(name)) for run in runs for name in scores):
        table += "<p class='at'>In small type: the 95% interval of the score.</p>"
    return _section("Runs", lead, table)


def _scores(run: Run) -> dict[str, float]:
    """A run's test scores that the page knows the names of; top-5 only of more than five classes."""
    few = 0 < len(run.report.get("label_names") or ()) <= 5
    return {
        name: float(value)
        for name, value in (run.report.get("metrics") or {}).items()
        if _stem(name) in SCORES
        and not _stem(name).startswith("clip_")
        and not (few and name.endswith("5"))
    }


def _extreme(name: str, values: Iterable[float | None]) -> float | None:
    """Find the best value; None where all are the same."""
    known = [value for value in values if value is not None]
    return (min if "loss" in name else max)(known) if len(set(known)) > 1 else None


def _spread(run: Run, name: str, value: float | None) -> str:
    """How sure a top-1 score is."""
    scored = (run.report.get("videos") or {}).get("scored")
    if value is None or not name.startswith("test/") or _stem(name) != "top1" or not scored:
        return ""
    low, high = interval(value, scored)
    return f"<small>{_percent(low)} to {_percent(high)}</small>"


def _protocols(runs: Sequence[Run]) -> str:
    """How each run was tested; what is not the same in all of them stands out."""
    tested = [run for run in runs if run.report]
    lines = differences(runs)
    alike = len(tested) > 1 and lines == ["All runs were tested alike."]
    if not tested or alike or len(tested) == 1:
        lines += [_in_words(tested[0].report.get("protocol") or {})] if tested else []
        return _section("How they were tested", " ".join(lines), "")
    rows = ""
    for name, title in {**VIDEOS, **VIEWS, **CLIP}.items():
        values = [_plain(run.protocol.get(name)) for run in tested]
        if set(values) == {"-"}:
            continue
        mark = " class='differs'" if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        rows += f"<tr{mark}><th scope='row'>{title}</th>{cells}</tr>"
    said = "".join(f"<li>{escape(line)}</li>" for line in lines)
    table = _matrix(tested, rows, runs)
    return _section("How they were tested", "", f"<ul class='said'>{said}</ul>{table}")


def _matrix(some: Sequence[Run], rows: str, runs: Sequence[Run]) -> str:
    """A table with a column for each of some runs."""
    heads = "".join(
        f"<th scope='col'>{key(runs.index(run))}{escape(run.name)}</th>" for run in some
    )
    return (
        f"<div class='scroll'><table class='settings'><thead><tr><td></td>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _curves(runs: Sequence[Run]) -> str:
    """One chart for each metric, with a line for each run."""
    names = dict.fromkeys(name for run in runs for name in run.curves)

    def order(name: str) -> tuple[bool, tuple[int, str]]:
        return not name.startswith("val/"), _rank(name)

    wanted = ("loss", "top1", "map", "hit1", "mean_class")
    charts = ""
    for name in sorted(names, key=order):
        stem = _stem(name).removesuffix("_step").removesuffix("_epoch")
        if stem in wanted:
            series = {run.name: run.curves.get(name, ()) for run in runs}
            charts += line_chart(name, series, percent=stem in SCORES)
    return _section("Training", "", f"<div class='charts wide'>{charts}</div>") if charts else ""


def _classes(runs: Sequence[Run]) -> str:
    """Accuracy of each class in each run, those first in which the runs differ most."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        report = run.report
        names = tuple(report.get("label_names") or ())
        if names and (report.get("class_ap") or any(p.labels for p in run.predictions)):
            many = bool(report.get("multi_label"))
            groups.setdefault((names, report.get("data"), report.get("split"), many), []).append(
                run
            )
    sections = ""
    for (names, data, split, many), alike in groups.items():
        if len(alike) < 2:
            continue
        shares = [_per_class(run) for run in alike]
        known = [name for name in names if any(name in share for share in shares)]

        def gap(name: str, shares: Sequence[Mapping[str, float]] = shares) -> float:
            values = [share[name] for share in shares if name in share]
            return max(values) - min(values)

        known.sort(key=lambda name: (-gap(name), name))
        rows = [_class_row(name, shares, gap(name)) for name in known]
        table = _matrix(alike, "".join(rows[:FEW_CLASSES]), runs)
        if rows[FEW_CLASSES:]:
            whole = _matrix(alike, "".join(rows), runs)
            table += f"<details><summary>All {len(rows)} classes</summary>{whole}</details>"
        what = "Average precision" if many else "Accuracy"
        where = f" ({data}, {split} split)" if len(groups) > 1 else ""
        lead = "The classes in which the runs differ most come first."
        sections += _section(f"{what} per class{where}", lead, table, kind="perclass")
    return sections


def _per_class(run: Run) -> dict[str, float]:
    """Share of right first answers, or average precision, of each class that was met."""
    if run.report.get("multi_label"):
        values = run.report.get("class_ap") or {}
        return {name: float(v) for name, v in values.items() if v is not None and math.isfinite(v)}
    known = [p for p in run.predictions if p.labels]
    videos = Counter(p.labels[0] for p in known)
    right = Counter(p.labels[0] for p in known if p.right)
    return {name: right[name] / count for name, count in videos.items()}


def _class_row(name: str, shares: Sequence[Mapping[str, float]], gap: float) -> str:
    cells = ""
    top = max(share[name] for share in shares if name in share)
    for share in shares:
        if name not in share:
            cells += "<td class='share'>-</td>"
            continue
        best = " best" if gap > 0 and share[name] == top else ""
        cells += (
            f"<td class='share{best}'><i style='width:{100 * share[name]:.1f}%'></i>"
            f"<span>{_percent(share[name])}</span></td>"
        )
    return f"<tr><th scope='row'>{escape(name)}</th>{cells}</tr>"


def _settings(runs: Sequence[Run], differing: Sequence[str]) -> str:
    if not differing or len(runs) < 2:
        return ""
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>"
        + "".join(
            f"<td>{escape(_plain(run.settings[name]) if name in run.settings else '')}</td>"
            for run in runs
        )
        + "</tr>"
        for name in differing
    )
    lead = f"{_many(len(differing), 'setting')} of the config; all others are the same."
    if len(differing) == 1:
        lead = "One setting of the config; all others are the same."
    return _section("In what they differ", lead, _matrix(runs, rows, runs))


def _sources(runs: Sequence[Run]) -> str:
    """Where each run lies and what it was made by: command, code, rows of the data."""
    rows = ""
    for i, run in enumerate(runs):
        lines = [str(run.report.get("command") or "")]
        lines.append(code_in_words(run.code) if run.code else "")
        lines.append(f"data with fingerprint {run.fingerprint}" if run.fingerprint else "")
        said = "".join(f"<p class='path said'>{escape(line)}</p>" for line in lines if line)
        rows += (
            f"<tr><th scope='row'>{key(i)}{escape(run.name)}</th><td><p class='path'>"
            f"{escape(run.folder)}</p>{said}</td></tr>"
        )
    codes = {code_in_words(run.code) for run in runs if run.code}
    lead = "They were not trained with the same code." if len(codes) > 1 else ""
    return _section("Made from", lead, f"<table class='facts'>{rows}</table>")
