"""The page: one HTML file that needs nothing else, neither a network nor a script to be read."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import resources
from pathlib import Path
from string import Template
from typing import Final

from matplotlib.colors import LinearSegmentedColormap, to_hex

from geosurge.archive.outputs.files import replacing
from geosurge.archive.report.tally import MAX_EXAMPLES, PROBABILITY_CLASSES, RADIUS_EDGES_KM, Tally
from geosurge.archive.report.world import world_svg
from geosurge.archive.rows import Row, Status

MAX_COUNTRIES: Final = 12

_MEANINGS: Final = {
    Status.DONE: "located",
    Status.SKIPPED: "left as they are, such as pictures that say themselves where they were taken",
    Status.WITHHELD: "located, but less surely than was asked for",
    Status.FAILED: "not readable as a picture, or not locatable",
}

# From sure to unsure. Each colour has a contrast of at least 3 to the land and the sea of its theme.
_LIGHT_COLOURS: Final = LinearSegmentedColormap.from_list("light", ["#0b1a75", "#5a16a6", "#b5177b", "#d4501a"])
_DARK_COLOURS: Final = LinearSegmentedColormap.from_list("dark", ["#fff3a3", "#ffb545", "#f4698a", "#a67bea"])

_INVISIBLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class RunSummary:
    """What the rows do not say about a run.

    Attributes:
        started: When it began, with its time zone; of a run that was resumed the last start.
        seconds: How long it took since then.
        pictures_per_s: Pictures that it located in a second of that time; 0 where none was left.
        sources: What was asked to be located.
        index_version: Name of the index bundle; may be empty, where nothing was located.
        options: Options by name, as they should be read.
    """

    started: datetime
    seconds: float
    pictures_per_s: float
    sources: Sequence[str]
    index_version: str
    options: Mapping[str, str] = field(default_factory=dict)


def write_report(rows: Iterable[Row], path: Path, *, summary: RunSummary) -> Path:
    """Writes a run as one self-contained HTML page.

    Everything is counted from the rows, so that page and rows agree. However many they are, memory and page stay small:
    answers that are many become few dots on the map.

    Args:
        rows: The rows; they are gone through once.
        path: The file to write; its folder is made when it is missing.
        summary: What the rows do not say.

    Returns:
        The path.

    Raises:
        OutputNotWritableError: The file cannot be written; there is none of it then.
    """
    tally = Tally()
    for row in rows:
        tally.add(row)
    with replacing(path) as file:
        file.write(_page(tally, summary).encode())
    return path


def _page(tally: Tally, summary: RunSummary) -> str:
    here = resources.files(__package__)
    template, style, script = ((here / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    script_hash = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    return Template(template).substitute(
        title=f"{tally.statuses[Status.DONE]:,} of {_counted(tally.found)} located",
        lede=_lede(tally, summary),
        style=style + _colours(tally),
        script=script,
        script_hash=f"sha256-{script_hash}",
        outcome=_outcome(tally),
        map=_map(tally),
        radii=_radii(tally),
        probabilities=_probabilities(tally),
        reasons=_reasons(tally),
        countries=_countries(tally),
        run=_run(summary),
    )


def _lede(tally: Tally, summary: RunSummary) -> str:
    sentences = []
    if tally.median_radius_km is not None:
        sentences.append(f"Half of the answers have a radius of {_kilometres(tally.median_radius_km)} or less.")
    rate = f", {_rate(summary)}" if summary.pictures_per_s else ""
    index = f", with the index {_isolated(summary.index_version)}" if summary.index_version else ""
    sentences.append(f"The run took {_duration(summary.seconds)}{rate}{index}.")
    return " ".join(sentences)


def _outcome(tally: Tally) -> str:
    counts = {status: tally.statuses[status] for status in Status}
    parts = "".join(
        f'<span class="{status}" style="--share:{count}"></span>' for status, count in counts.items() if count
    )
    lines = "".join(
        f'<tr><th scope="row" class="status"><span class="swatch {status}"></span>{status}</th>'
        f'<td class="meaning">{_MEANINGS[status]}</td>{_number(count)}{_share(count, tally.found)}</tr>'
        for status, count in counts.items()
    )
    total = f'<tr><th scope="row">found</th><td></td>{_number(tally.found)}<td></td></tr>'
    return f'<div class="parts" aria-hidden="true">{parts}</div>' + _table(
        ("status", "meaning", "*pictures", "*share"), lines + total
    )


def _map(tally: Tally) -> str:
    dots = tally.dots.all()
    if not dots:
        return '<p class="note">No picture was located.</p>'
    count = sum(dot.count for dot in dots)
    label = (
        f"Map of the world with {_counted(count)} at {len(dots):,} places; the tables of radii and countries "
        "say the same in numbers."
    )
    joined = " A larger dot stands for several pictures." if count > len(dots) else ""
    legend = "".join(
        f'<span><span class="swatch r{number}"></span>{_radius_name(number)}</span>' for number in _classes(tally)
    )
    return (
        f'<figure><div class="frame">{world_svg(dots, label)}'
        '<div class="zoom" role="group" aria-label="Zoom of the map" hidden>'
        '<button type="button" data-zoom="in" aria-label="Zoom in">+</button>'
        '<button type="button" data-zoom="out" aria-label="Zoom out">−</button>'
        '<button type="button" data-zoom="all" aria-label="Show the whole world">⤢</button></div></div>'
        f"<figcaption><span>The colour of a dot is the radius of the answer.{joined}</span>"
        f'<span class="legend">{legend}</span></figcaption></figure>'
    )


def _radii(tally: Tally) -> str:
    if not tally.radii:
        return '<p class="note">No picture was located.</p>'
    level = "part" if tally.confidence_level is None else f"{100.0 * tally.confidence_level:g} %"
    bars = [(_radius_name(number), f"r{number}", tally.radii[number]) for number in _classes(tally)]
    return f'<p class="note">The circle around an answer holds {level} of the posterior.</p>' + _bars("radius", bars)


def _probabilities(tally: Tally) -> str:
    if not tally.probabilities:
        return '<p class="note">No picture was located.</p>'
    bars = [
        (
            f"{tenth * 100 // PROBABILITY_CLASSES} to {(tenth + 1) * 100 // PROBABILITY_CLASSES} %",
            "",
            tally.probabilities[tenth],
        )
        for tenth in range(PROBABILITY_CLASSES)
    ]
    return '<p class="note">The posterior probability of the most likely leaf.</p>' + _bars("probability", bars)


def _reasons(tally: Tally) -> str:
    if not tally.reasons:
        return '<p class="note">Every picture has one.</p>'
    order = [Status.FAILED, Status.WITHHELD, Status.SKIPPED]
    lines = []
    for (status, name), reason in sorted(
        tally.reasons.items(), key=lambda item: (order.index(item[0][0]), -item[1].count, item[0][1])
    ):
        details = [""] + [detail for _, detail in reason.examples]
        examples = "".join(
            f"<li><code>{_isolated(path)}</code>"
            + (f'<span class="detail">{_isolated(detail)}</span></li>' if detail != before else "</li>")
            for (path, detail), before in zip(reason.examples, details, strict=False)
        )
        lines.append(
            f'<tr class="reason"><th scope="row"><code>{html.escape(name)}</code></th>'
            f'<td class="status"><span class="swatch {status}"></span>{status}</td>{_number(reason.count)}</tr>'
            f'<tr class="examples"><td colspan="3"><ul>{examples}</ul></td></tr>'
        )
    note = f'<p class="note">With the first {MAX_EXAMPLES} pictures of each reason.</p>'
    return note + _table(("reason", "status", "*pictures"), "".join(lines))


def _countries(tally: Tally) -> str:
    if not tally.countries:
        return '<p class="note">The answers name no places.</p>'
    common = tally.countries.most_common(MAX_COUNTRIES)
    others = tally.countries.total() - sum(count for _, count in common)
    bars = [(_isolated(country), "", count) for country, count in common]
    if others:
        bars.append((f"{len(tally.countries) - len(common):,} others", "", others))
    return '<p class="note">Of the named place that is nearest to each answer.</p>' + _bars("country", bars)


def _run(summary: RunSummary) -> str:
    facts = {
        "Started": f"{summary.started.day} {summary.started:%B %Y, %H:%M %Z}",
        "Took": _duration(summary.seconds),
        "Rate": _rate(summary) if summary.pictures_per_s else "nothing was left to be located",
        "Sources": "<br>".join(f"<code>{_isolated(source)}</code>" for source in summary.sources),
    }
    values = {"Index": summary.index_version, **summary.options}
    facts |= {html.escape(name): f"<code>{_isolated(value)}</code>" for name, value in values.items() if value}
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in facts.items())}</dl>"


def _bars(heading: str, bars: Sequence[tuple[str, str, int]]) -> str:
    """A bar chart that is a table: names (HTML), classes that colour the bars, and counts."""
    total, largest = sum(count for *_, count in bars), max(count for *_, count in bars)
    lines = "".join(
        f'<tr><th scope="row">{name}</th>'
        + (
            f'<td class="bar {kind}"><span style="--share:{100 * count / largest:.2f}%"></span></td>'
            if count
            else "<td></td>"
        )
        + f"{_number(count)}{_share(count, total)}</tr>"
        for name, kind, count in bars
    )
    return _table((heading, "", "*pictures", "*share"), lines, "bars")


def _table(headings: Sequence[str], lines: str, kind: str = "") -> str:
    """A table; headings that begin with ``*`` stand above numbers, an empty one above what numbers say better."""
    cells = "".join(
        f'<th scope="col" class="number">{heading[1:]}</th>'
        if heading.startswith("*")
        else f'<th scope="col">{heading}</th>'
        if heading
        else "<td></td>"
        for heading in headings
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _colours(tally: Tally) -> str:
    """Style rules that give each class of radii its colour; the colours are shared out evenly among the answers."""
    total, surer, steps = tally.radii.total(), 0, {}
    for number in _classes(tally):
        steps[number] = (surer + tally.radii[number] / 2.0) / total
        surer += tally.radii[number]
    light, dark = (
        "".join(f".r{number}{{--mark:{to_hex(colours(step))}}}" for number, step in steps.items())
        for colours in (_LIGHT_COLOURS, _DARK_COLOURS)
    )
    return f"{light}\n@media (prefers-color-scheme: dark){{{dark}}}"


def _classes(tally: Tally) -> range:
    """The classes of radii from the first that occurs to the last."""
    return range(min(tally.radii), max(tally.radii) + 1) if tally.radii else range(0)


def _radius_name(number: int) -> str:
    if number == len(RADIUS_EDGES_KM):
        return f"over {RADIUS_EDGES_KM[-1]:,.0f} km"
    low = RADIUS_EDGES_KM[number - 1] if number else 0.0
    return f"{low:,.0f} to {RADIUS_EDGES_KM[number]:,.0f} km"


def _isolated(text: str) -> str:
    """Text of others: it cannot be markup, turn around the text around it, or hide what it is."""
    shown = _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return f"<bdi>{html.escape(shown)}</bdi>"


def _number(count: int) -> str:
    return f'<td class="number">{count:,}</td>'


def _share(count: int, total: int) -> str:
    return f'<td class="number">{_percent(count / total) if total else ""}</td>'


def _percent(part: float) -> str:
    if 0.0 < part < 0.001:
        return "under 0.1 %"
    return "over 99.9 %" if 0.999 < part < 1.0 else f"{100.0 * part:.1f} %"


def _counted(count: int) -> str:
    return f"{count:,} picture{'' if count == 1 else 's'}"


def _kilometres(distance_km: float) -> str:
    return f"{distance_km:,.0f} km" if distance_km >= 10.0 else f"{distance_km:.1f} km"


def _rate(summary: RunSummary) -> str:
    return f"{summary.pictures_per_s:,.1f} pictures a second"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
