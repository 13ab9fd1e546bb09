"""The report of `sae diff-models` as a page that opens without a network: histograms, latent scaling, features with examples."""

import math
from html import escape
from typing import Any

import numpy as np

from sae.features.model_diff.examples import Example
from sae.features.model_diff.measures import SAID
from sae.features.pages.assets import STYLE
from sae.features.pages.charts import share_histogram
from sae.features.pages.contexts import row_html
from sae.html import document, figure

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
OWN_STYLE = """
.row{grid-template-columns:4.3rem 11rem minmax(0,1fr)}
details{border-top:1px solid var(--line);padding:.4rem 0}
summary{cursor:pointer;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
summary b{font-weight:600;border:0}
svg circle{fill:rgb(var(--hot)/.5)}
svg circle.second{fill:var(--low);opacity:.6}
svg .bound{stroke:var(--soft);stroke-dasharray:3 3}
td.num{white-space:nowrap}
"""
SIZE, MARGIN, SPAN = 300, 34, (-0.25, 1.25)
"""of the scatter plot: its side, what its axes take, and the range of both ν; points beyond stand at the border"""


def page_html(content: dict[str, Any], examples: dict[int, list[Example]]) -> str:
    """The whole page; `content` is what the JSON file holds."""
    parts = [_head(content), "<div class='top'>", _norms(content), _cosines(content), _scaling(content), "</div>"]
    first, second = map(escape, content["sites"])
    for name, title in (("first", f"Of {first} alone"), ("second", f"Of {second} alone"), ("shared", "Shared, with rows that differ most")):
        parts.append(_group(content, name, title, examples))
    parts.append(
        "<p class='soft'>Beside each example: the activation, what the activations of the two models add to the feature's pre-activation "
        "at this token, and the document's label. Shade gives the activation on every token; faded tokens are not among the rows of the "
        "cache.</p>"
    )
    return document(f"{' and '.join(content['sites'])}: differences", "\n".join(parts), STYLE + OWN_STYLE, POLICY)


def _head(content: dict[str, Any]) -> str:
    found = content["reconstruction"]
    facts = {
        **{site: f"{model['name']} ({model['fingerprint']})" for site, model in zip(content["sites"], content["models"])},
        "crosscoder": f"{content['dictionary']}, {len(content['features']['count']):,} features",
        "measured on": f"{content['rows']:,} rows of {content['cache']} ({content['split'].replace('_', ' ')})",
        "L0": figure(found["l0"]),
        "FVU": figure(found["fvu"]) + ": " + ", ".join(f"{site} {figure(fvu)}" for site, fvu in found["fvu_by_site"].items()),
    }
    pairs = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f"<h1>What one model has and the other has not</h1><dl>{pairs}</dl>"


def _norms(content: dict[str, Any]) -> str:
    first, second = map(escape, content["sites"])
    bounds, classes = content["bounds"], content["classes"]
    rows = [
        (f"of {first} alone, below {bounds['one_model']:g}", classes["first"]),
        (f"shared, {bounds['shared']:g} to {1 - bounds['shared']:g}", classes["shared"]),
        (f"of {second} alone, above {1 - bounds['one_model']:g}", classes["second"]),
        ("in between", classes["between"]),
        ("never fired", classes["silent"]),
    ]
    return (
        "<section><h2>Relative decoder norm</h2><p class='soft'>Length of the decoder row in the second model as a share of both, in units "
        f"of each model's activations: 0 is {first} alone, 1 is {second} alone.</p>"
        f"{_chart(content, 'relative_norm', 'relative norm')}{_table(rows)}</section>"
    )


def _cosines(content: dict[str, Any]) -> str:
    return (
        "<section><h2>Direction of shared features</h2><p class='soft'>Cosine between a feature's two decoder rows.</p>"
        f"{_chart(content, 'cosine_of_shared', 'cosine')}</section>"
    )


def _chart(content: dict[str, Any], name: str, what: str) -> str:
    held = content["histograms"][name]
    return share_histogram(np.array(held["edges"]), np.array(held["features"]), what)


def _table(rows: list[tuple[str, int]]) -> str:
    return "<table>" + "".join(f"<tr><td>{text}</td><td class='num'>{count:,}</td></tr>" for text, count in rows) + "</table>"


def _scaling(content: dict[str, Any]) -> str:
    columns, bounds = content["features"], content["bounds"]
    points = []
    for feature, (norm, error, reconstruction) in enumerate(
        zip(columns["relative_norm"], columns["nu_error"], columns["nu_reconstruction"])
    ):
        alone = "" if norm < bounds["one_model"] else "second" if norm > 1 - bounds["one_model"] else None
        if alone is not None and math.isfinite(error) and math.isfinite(reconstruction):
            points.append(
                f'<circle class="{alone}" cx="{_x(error):.1f}" cy="{_y(reconstruction):.1f}" r="3"><title>feature {feature}: '
                f"ν^ε {figure(error)}, ν^r {figure(reconstruction)}</title></circle>"
            )
    x, y = _x(bounds["nu_error"]), _y(bounds["nu_reconstruction"])
    lines = [
        f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{SIZE - MARGIN}"/>',
        f'<line class="bound" x1="{MARGIN}" x2="{SIZE}" y1="{y:.1f}" y2="{y:.1f}"/>',
    ]
    marks = [f'<text x="{_x(v):.1f}" y="{SIZE - MARGIN + 14}" text-anchor="middle">{v:g}</text>' for v in (0, 0.5, 1)]
    marks += [f'<text x="{MARGIN - 4}" y="{_y(v) + 3:.1f}" text-anchor="end">{v:g}</text>' for v in (0, 0.5, 1)]
    marks += [
        f'<text x="{SIZE}" y="{SIZE - 6}" text-anchor="end">ν^ε, error</text><text x="{MARGIN + 4}" y="11">ν^r, reconstruction</text>'
    ]
    label = f"scatter of {len(points):,} features of one model alone by ν^ε and ν^r"
    rows = [
        (f"{escape(site)}: {escape(SAID[verdict])}", count)
        for site, name in zip(content["sites"], ("first", "second"))
        for verdict, count in content["verdicts"][name].items()
    ]
    return (
        "<section><h2>Latent scaling</h2><p class='soft'>Features of one model alone. Far right: the other model's error holds the feature "
        "(complete shrinkage). High: other features write it in the other model (latent decoupling). Lower left: specific.</p>"
        f'<svg viewBox="0 0 {SIZE} {SIZE}" role="img" aria-label="{label}">{"".join(lines + marks + points)}</svg>{_table(rows)}</section>'
    )


def _place(value: float) -> float:
    low, high = SPAN
    return (min(max(value, low), high) - low) / (high - low)


def _x(value: float) -> float:
    return MARGIN + _place(value) * (SIZE - MARGIN)


def _y(value: float) -> float:
    return (SIZE - MARGIN) * (1 - _place(value))


def _group(content: dict[str, Any], name: str, title: str, examples: dict[int, list[Example]]) -> str:
    features, columns = content["groups"][name], content["features"]
    note = ""
    if name != "shared" and features and not content["classes"][name]:
        note = "<p class='soft'>None has so small a row in the other model; those that come nearest:</p>"
    held = "".join(_feature(feature, columns, examples[feature]) for feature in features)
    return f"<section><h2>{title}</h2>{note}{held or '<p>None fires often enough.</p>'}</section>"


def _feature(feature: int, columns: dict[str, Any], examples: list[Example]) -> str:
    facts = (
        ("relative norm", columns["relative_norm"]),
        ("cosine", columns["cosine"]),
        ("ν^ε", columns["nu_error"]),
        ("ν^r", columns["nu_reconstruction"]),
    )
    said = ", ".join(f"{name} {figure(column[feature])}" for name, column in facts)
    top = max((abs(one.context.value) for one in examples), default=0.0)
    rows = "".join(row_html(one.context._replace(label=_beside(one)), top) for one in examples)
    return (
        f"<details open><summary><b>Feature {feature}</b> <span class='soft'>{said}; fires on {columns['count'][feature]:,} rows"
        f"</span></summary>{rows}</details>"
    )


def _beside(example: Example) -> str:
    reads = " + ".join(figure(value) for value in example.reads)
    return f"{reads} {example.context.label}" if example.context.label else reads
