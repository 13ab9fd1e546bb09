"""Histograms as inline SVG: no library, no script, and a description for those who do not see them."""

import math

import numpy as np

from sae.html import number

WIDTH, HEIGHT, LEFT, BOTTOM = 340, 130, 34, 16


def activation_histogram(edges: np.ndarray, counts: np.ndarray) -> str:
    """Bars [bins] over `edges` [bins + 1] that grow by one factor: both axes are logarithmic. Hovering shows range and count."""
    if not len(counts):
        return "<p>It never fires.</p>"
    bar, heights = (WIDTH - LEFT) / len(counts), _heights(counts)
    edge_texts = [number(edge) for edge in edges.tolist()]
    bars = [
        f'<rect x="{LEFT + i * bar:.1f}" y="{HEIGHT - h:.1f}" width="{max(bar - 0.6, 0.6):.1f}" height="{h:.1f}">'
        f"<title>{edge_texts[i]} to {edge_texts[i + 1]}: {count:,}</title></rect>"
        for i, (count, h) in enumerate(zip(counts.tolist(), heights))
    ]
    shown = sorted({0, len(counts) // 3, 2 * len(counts) // 3, len(counts)} if len(counts) >= 6 else {0, len(counts)})
    marks = [(LEFT + i * bar, edge_texts[i]) for i in shown]
    label = f"histogram of {counts.sum():,} activations from {edge_texts[0]} to {edge_texts[-1]}"
    return _chart(label, _grid(counts), "".join(bars), marks) + "<p class='soft'>tokens (log scale) by activation (log scale)</p>"


def weight_histogram(edges: np.ndarray, counts: np.ndarray) -> str:
    """The logit-lens weights of all tokens: linear x, logarithmic y, those below zero in the other colour and hatched by an outline."""
    low, high = float(edges[0]), float(edges[-1])
    scale = (WIDTH - LEFT) / max(high - low, 1e-30)
    sides = {"": "", "neg": ""}
    for left, right, count, h in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), _heights(counts)):
        if count:
            path = f"M{LEFT + (left - low) * scale:.1f} {HEIGHT}v-{h:.1f}h{max((right - left) * scale - 0.6, 0.6):.1f}v{h:.1f}z"
            sides["neg" if left + right < 0 else ""] += path
    marks: list[tuple[float, str]] = [(LEFT, number(low)), (WIDTH, number(high))]
    if low < 0 < high and 0.15 < -low / (high - low) < 0.85:
        marks.insert(1, (LEFT - low * scale, "0"))
    bars = "".join(f'<path class="{name}" d="{path}"/>' for name, path in sides.items() if path)
    label = f"histogram of the logit-lens weights of {counts.sum():,} tokens from {number(low)} to {number(high)}"
    return _chart(label, _grid(counts), bars, marks) + "<p class='soft'>tokens of the vocabulary (log scale) by logit weight</p>"


def share_histogram(edges: np.ndarray, counts: np.ndarray, what: str) -> str:
    """Bars [bins] over `edges` [bins + 1] on a linear axis, features on a logarithmic one; `what`: the label under the chart."""
    low, high = float(edges[0]), float(edges[-1])
    scale, texts = (WIDTH - LEFT) / (high - low), [number(edge) if edge else "0" for edge in edges.tolist()]
    bars = [
        f'<rect x="{LEFT + (left - low) * scale:.1f}" y="{HEIGHT - h:.1f}" width="{max((right - left) * scale - 0.6, 0.6):.1f}" '
        f'height="{h:.1f}"><title>{texts[i]} to {texts[i + 1]}: {count:,}</title></rect>'
        for i, (left, right, count, h) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), _heights(counts)))
    ]
    middle = (low + high) / 2
    marks = [(LEFT + (x - low) * scale, f"{x:g}") for x in (low, middle, high)]
    label = f"histogram of {what}: {counts.sum():,} features from {low:g} to {high:g}"
    return (
        _chart(label, _grid(counts) if counts.any() else "", "".join(bars), marks) + f"<p class='soft'>features (log scale) by {what}</p>"
    )


def _heights(counts: np.ndarray) -> list[float]:
    """On a scale on which a count of 0 has no height, 1 some, and the largest nearly all."""
    return (HEIGHT * 0.94 * np.log10(1 + counts) / math.log10(1 + max(int(counts.max()), 1))).tolist()


def _grid(counts: np.ndarray) -> str:
    tallest, lines = math.log10(1 + max(int(counts.max()), 1)), []
    for power in range(int(tallest) + 1):
        y = HEIGHT - HEIGHT * 0.94 * math.log10(1 + 10**power) / tallest
        if y > 4:
            text = _short(10**power)
            lines.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/><text x="0" y="{y + 3:.1f}">{text}</text>')
    return "".join(lines)


def _chart(label: str, grid: str, bars: str, marks: list[tuple[float, str]]) -> str:
    texts = ""
    for i, (x, text) in enumerate(marks):
        anchor = "start" if i == 0 else "end" if i == len(marks) - 1 else "middle"
        texts += f'<text x="{x:.1f}" y="{HEIGHT + BOTTOM - 3}" text-anchor="{anchor}">{text}</text>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT + BOTTOM}" role="img" aria-label="{label}">{grid}{bars}{texts}</svg>'


def _short(count: int) -> str:
    return f"{count // 1000}k" if 1000 <= count < 10**6 else f"{count // 10**6}M" if count >= 10**6 else str(count)
