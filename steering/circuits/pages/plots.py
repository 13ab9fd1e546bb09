"""Faithfulness against the number of edges, with its interval, the circuit itself and the controls of its size, as SVG."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from sae.html import figure, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900.0, 380.0, 62.0, 14.0, 12.0, 46.0
LOWEST, HIGHEST = -1.0, 3.0
"""faithfulness that is drawn; what lies beyond is cut"""

Row = dict[str, Any]
Axis = Callable[[float], float]


def curve_svg(rows: Sequence[Row], circuit: Row, controls: dict[str, Sequence[float]]) -> str:
    """`rows` are circuits of the highest scores with "edges" and the estimate "f", `circuit` likewise; `controls` are faithfulness of
    circuits as large as it, by what they are."""
    rows = [row for row in sorted(rows, key=lambda row: row["edges"]) if row["edges"] > 0 and row["f"]["value"] is not None]
    one = circuit["f"]
    values = [row["f"][key] for row in [*rows, circuit] for key in ("value", "low", "high")] + [
        f for some in controls.values() for f in some
    ]
    known = [value for value in values if value is not None]
    low, high = max(LOWEST, min(0.0, *known) - 0.05), min(HIGHEST, max(1.0, *known) + 0.08)
    last = max([row["edges"] for row in rows] + [circuit["n_edges"], 2])
    first = min([row["edges"] for row in rows] + [max(1, circuit["n_edges"])])

    def x_of(edges: float) -> float:
        return LEFT + 8 + math.log(max(edges, first) / first) / math.log(max(last / first, 1.01)) * (WIDTH - LEFT - RIGHT - 16)

    def y_of(f: float) -> float:
        return TOP + (high - min(max(f, low), high)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [*_grid(first, last, low, high, x_of, y_of), _line(rows, x_of, y_of)]
    x = x_of(max(circuit["n_edges"], 1))
    for number, (name, drawn) in enumerate(controls.items()):
        shift = 9.0 * (number + 1)
        dots = "".join(f'<circle class="draw" cx="{x + shift:.1f}" cy="{y_of(f):.1f}" r="3"/>' for f in drawn)
        parts.append(f'<g class="control c{number}"><title>{escape(name)}</title>{dots}</g>')
    if one["value"] is not None:
        y, ends = y_of(one["value"]), [y_of(one[key] if one[key] is not None else one["value"]) for key in ("low", "high")]
        parts.append(
            f'<g class="circuit"><title>the circuit: {escape(interval(one))}</title>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
            f'<path d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"/></g>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6:.0f}" text-anchor="middle">edges (log scale)</text>')
    parts.append(f'<text transform="translate(14 {(HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">faithfulness</text>')
    size = f'viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}"'
    return f'<svg class="plot" {size} role="img" aria-label="faithfulness against edges">{"".join(parts)}</svg>'


def _grid(first: float, last: float, low: float, high: float, x_of: Axis, y_of: Axis) -> list[str]:
    parts = []
    for f in ticks(low, high):
        kind = "zero" if f in (0.0, 1.0) else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT:.0f}" x2="{WIDTH - RIGHT:.0f}" y1="{y_of(f):.1f}" y2="{y_of(f):.1f}"/>')
        parts.append(f'<text x="{LEFT - 7:.0f}" y="{y_of(f) + 4:.1f}" text-anchor="end">{f"{f:g}".replace("-", "−")}</text>')
    for power in range(math.ceil(math.log10(first) - 1e-9), math.floor(math.log10(last) + 1e-9) + 1):
        x = x_of(10.0**power)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP:.0f}" y2="{HEIGHT - BOTTOM:.0f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17:.0f}" text-anchor="middle">{10**power:,}</text>')
    return parts


def _line(rows: Sequence[Row], x_of: Axis, y_of: Axis) -> str:
    at = [(x_of(row["edges"]), row["f"]) for row in rows]
    bounded = [(x, f) for x, f in at if f["low"] is not None and f["high"] is not None]
    upper = [f"{x:.1f} {y_of(f['high']):.1f}" for x, f in bounded]
    lower = [f"{x:.1f} {y_of(f['low']):.1f}" for x, f in reversed(bounded)]
    band = f'<path class="band" d="M{"L".join([*upper, *lower])}z"/>' if bounded else ""
    points = [f"{x:.1f} {y_of(f['value']):.1f}" for x, f in at]
    dots = "".join(
        f'<circle class="dot" cx="{x:.1f}" cy="{y_of(row["f"]["value"]):.1f}" r="3.5">'
        f"<title>{row['edges']:,} edges: {escape(interval(row['f']))}</title></circle>"
        for (x, _), row in zip(at, rows)
    )
    return f'<g class="curve">{band}<path d="M{"L".join(points)}"/>{dots}</g>' if points else ""


def interval(value: Row) -> str:
    return f"{figure(value['value'])} ({figure(value['low'])} to {figure(value['high'])})"
