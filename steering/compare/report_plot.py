"""The report's drawings as inline SVG: gain against KL, and one interval on a common scale."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from sae.html import ticks

COLOURS = 9
SHAPES = ("circle", "square", "triangle", "diamond", "down")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900.0, 480.0, 62.0, 12.0, 12.0, 46.0
APART = 5.0  # pixels between points of neighbouring series at one budget


class Point(NamedTuple):
    kl: float
    gain: dict[str, float]
    reached: bool
    beyond: bool
    """above the direction's working range"""
    title: str


class Series(NamedTuple):
    """One method's points, in the order of their KL."""

    number: int
    method: str
    kind: str
    colour: str
    shape: str
    points: list[Point]


def series_of(arms: Sequence[dict[str, Any]]) -> list[Series]:
    """All arms with text, except for no steering, which is the zero line. Controls are grey, methods have a colour and shape each."""
    found: list[Series] = []
    hue = 0
    for arm in arms:
        points = [point for level in arm["levels"] if (point := _point(arm["method"], level)) is not None]
        if not points:
            continue
        if arm["kind"] == "method":
            colour, shape, hue = f"var(--k{hue % COLOURS})", SHAPES[hue % len(SHAPES)], hue + 1
        else:
            colour = "var(--control)" if arm["kind"] == "control" else "var(--baseline)"
            shape = SHAPES[sum(other.kind == arm["kind"] for other in found) % len(SHAPES)] if arm["kind"] == "control" else "star"
        found.append(Series(len(found), arm["method"], arm["kind"], colour, shape, sorted(points, key=lambda point: point.kl)))
    return found


def _point(method: str, level: dict[str, Any]) -> Point | None:
    kl = level.get("off_topic_kl")
    if level["score"] is None or kl is None or not 0 < kl < math.inf:
        return None
    gain = level["score"]["gain"]
    budget = "" if level["budget"] is None else f" at a budget of {level['budget']:g} nats"
    beyond = bool(level["beyond_working_range"])
    title = f"{method}{budget}: gain {gain['value']:.3g} ({gain['low']:.3g} to {gain['high']:.3g}), off-topic KL {kl:.3g}"
    title += ", beyond its working range" * beyond
    return Point(kl, gain, level["reached"], beyond, title)


def pareto_svg(series: Sequence[Series], kind: str) -> str:
    """Gain against off-topic KL (logarithmic), a line per method, with interval bars and the controls' band."""
    points = [point for s in series for point in s.points]
    if not points:
        return "<p>No method gave text, so there is nothing to draw.</p>"
    x_low, x_high = _widened(min(math.log10(p.kl) for p in points), max(math.log10(p.kl) for p in points))
    y_low, y_high = _widened(min(0.0, *(p.gain["low"] for p in points)), max(0.0, *(p.gain["high"] for p in points)))

    def x_of(kl: float) -> float:
        return LEFT + (math.log10(kl) - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_of(gain: float) -> float:
        return TOP + (y_high - gain) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [*_grid(x_low, x_high, y_low, y_high, x_of, y_of), _band(series, y_of)]
    steered = [s for s in series if s.kind != "baseline"]
    for s in series:
        shift = APART * (steered.index(s) - (len(steered) - 1) / 2) if s in steered else 0.0
        parts.append(_series(s, shift, x_of, y_of))
    unit = "words per 1,000" if kind == "words" else "probability"
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6:.0f}" text-anchor="middle">off-topic KL, nats per token (log scale)</text>'
        f'<text transform="translate(14 {(HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle" class="name">gain, {unit}</text>'
    )
    label = f"gain in {unit} against off-topic KL for {len(series)} methods"
    return f'<svg class="plot" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _grid(x_low: float, x_high: float, y_low: float, y_high: float, x_of: Any, y_of: Any) -> list[str]:
    parts = []
    for value in ticks(y_low, y_high):
        y, kind = y_of(value), "zero" if value == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT:.0f}" x2="{WIDTH - RIGHT:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = f"{value:+g}".replace("-", "−") if value else "0"
        parts.append(f'<text x="{LEFT - 7:.0f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for power in range(math.floor(x_low), math.ceil(x_high) + 1):
        for step in (1, 2, 5):
            value = step * 10.0**power
            if x_low <= math.log10(value) <= x_high:
                x = x_of(value)
                parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP:.0f}" y2="{HEIGHT - BOTTOM:.0f}"/>')
                parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17:.0f}" text-anchor="middle">{value:g}</text>')
    return parts


def _band(series: Sequence[Series], y_of: Any) -> str:
    """Lowest to highest end of the controls' intervals at any budget, to compare a method's bar with."""
    gains = [p.gain for s in series if s.kind == "control" for p in s.points]
    if not gains:
        return ""
    bottom, top = y_of(min(gain["low"] for gain in gains)), y_of(max(gain["high"] for gain in gains))
    return f'<rect class="control" x="{LEFT:.1f}" y="{top:.1f}" width="{WIDTH - RIGHT - LEFT:.1f}" height="{bottom - top:.1f}"/>'


def _series(s: Series, shift: float, x_of: Any, y_of: Any) -> str:
    at = [(x_of(p.kl) + shift, y_of(p.gain["value"]), p) for p in s.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in at)
    bars = "".join(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y_of(p.gain["low"]):.1f}" y2="{y_of(p.gain["high"]):.1f}"/>' for x, _, p in at)
    dots = "".join(
        f"<g>{ring(x, y) if p.beyond else ''}{marker(s.shape, x, y, p.reached)}<title>{escape(p.title)}</title></g>" for x, y, p in at
    )
    return f'<g class="series s{s.number} {escape(s.kind)}" style="--c:{s.colour}">{bars}<path d="{path}"/>{dots}</g>'


def ring(x: float, y: float) -> str:
    """Around a point beyond its direction's working range."""
    return f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="9.5"/>'


def marker(shape: str, x: float, y: float, filled: bool = True) -> str:
    """A point; hollow unless `filled`."""
    kind = "dot" if filled else "dot open"
    if shape == "circle":
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    corners = {
        "square": [(-4.6, -4.6), (4.6, -4.6), (4.6, 4.6), (-4.6, 4.6)],
        "triangle": [(0, -6), (5.8, 4.4), (-5.8, 4.4)],
        "down": [(0, 6), (5.8, -4.4), (-5.8, -4.4)],
        "diamond": [(0, -6.4), (6.4, 0), (0, 6.4), (-6.4, 0)],
        "star": [
            (math.sin(k * math.pi / 5) * (3.2 if k % 2 else 7.6), -math.cos(k * math.pi / 5) * (3.2 if k % 2 else 7.6)) for k in range(10)
        ],
    }[shape]
    return f'<polygon class="{kind}" points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"/>'


def whisker_svg(gain: dict[str, float], span: tuple[float, float], control: Sequence[dict[str, float]]) -> str:
    """One interval with its mean, on the scale of all rows, with the zero line and the controls' band."""
    low, high = _widened(min(0.0, span[0]), max(0.0, span[1]))

    def x_of(value: float) -> float:
        return (value - low) / (high - low) * 240

    band = ""
    if control:
        left, right = x_of(min(c["low"] for c in control)), x_of(max(c["high"] for c in control))
        band = f'<rect class="control" x="{left:.1f}" y="0" width="{max(right - left, 1):.1f}" height="34"/>'
    return (
        f'<svg class="whisker" viewBox="0 0 240 34" aria-hidden="true">{band}'
        f'<line class="zero" x1="{x_of(0):.1f}" x2="{x_of(0):.1f}" y1="0" y2="34"/>'
        f'<line x1="{x_of(gain["low"]):.1f}" x2="{x_of(gain["high"]):.1f}" y1="17" y2="17"/>'
        f'<circle cx="{x_of(gain["value"]):.1f}" cy="17" r="4.5"/></svg>'
    )


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range with a little room, never empty."""
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room
