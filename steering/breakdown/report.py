"""The sweep as one self-contained HTML page: no network, no script, every text escaped.

`report_html` takes the dictionary that the command's JSON holds and looks nothing up by itself.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from sae.html import document, figure, visible
from steering.breakdown.edges import SHOWN
from steering.breakdown.findings import SIGNS
from steering.report_style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900.0, 460.0, 62.0, 12.0, 12.0, 46.0
LOWEST_KL = 1e-4
"""nats; smaller ones are drawn there"""
COLOURS = 9
SHOWN_TEXTS = 5
"""number of strengths with sample texts, in addition to the unsteered text"""
OWN_STYLE = """
.cells td{text-align:right;font-variant-numeric:tabular-nums;background:rgb(var(--pos)/var(--a))}
.cells td.low{background:rgb(var(--neg)/var(--a))}.cells th{text-align:right}
.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,34rem),1fr));gap:1rem 2rem}
.maps h3{font-size:1rem;margin:.6rem 0 .2rem}
tr.held td.m::before{content:"✓ ";color:var(--yes)}tr.failed td.m::before{content:"✗ ";color:var(--k6)}
td.text{white-space:pre-wrap;overflow-wrap:anywhere;min-width:15rem}
"""

Result = dict[str, Any]
Cell = Callable[[dict[str, Any]], float | None]
"""a layer's value"""


def _stream(name: str) -> Cell:
    return lambda layer: layer["stream"].get("steered", {}).get(name)


def _share(kind: str) -> Cell:
    def value(layer: dict[str, Any]) -> float | None:
        write = layer.get(kind)
        return write["steered_share"] / write["share"] if write and write["share"] else None

    return value


def _behind(kind: str, name: str) -> Cell:
    def value(layer: dict[str, Any]) -> float | None:
        pair = layer.get(kind)
        return pair[1][name] / pair[0][name] if pair and pair[0][name] else None

    return value


def _attention_kl(layer: dict[str, Any]) -> float | None:
    heads = layer.get("attention_kl_h")
    return sum(heads) / len(heads) if heads else None


MAPS: tuple[tuple[str, Cell], ...] = (
    ("norm of the stream, steered over unsteered", _stream("norm_ratio")),
    ("cosine of the stream and v", _stream("cos_v")),
    ("cosine of the stream and the unsteered one", _stream("cos_unsteered")),
    ("cosine of the stream's change and v: 1 where nothing answers", _stream("cos_change")),
    ("attention's write over the stream's norm, steered over unsteered", _share("attn_out")),
    ("MLP's write over the stream's norm, steered over unsteered", _share("mlp_out")),
    ("share of v that attention takes back", lambda layer: (layer.get("attn_out") or {}).get("taken_back")),
    ("share of v that the MLP takes back", lambda layer: (layer.get("mlp_out") or {}).get("taken_back")),
    ("token share after attention's norm, steered over unsteered", _behind("attn_in", "token_share")),
    ("effective rank after attention's norm, steered over unsteered", _behind("attn_in", "effective_rank")),
    ("KL of attention patterns to the unsteered ones, nats, mean of heads", _attention_kl),
    ("share of tokens beyond 99 % of neutral ones (Mahalanobis)", lambda layer: layer["beyond_p99"]),
)


def report_html(result: Result) -> str:
    """The whole page. The same result gives the same page, byte for byte."""
    added = [row for row in result["rows"] if row["arm"] == "added"]
    parts = [_head(result), _findings(result), _curves(result), _arms(result), _carried(result), _null(result, added)]
    parts += [_maps(result, added), _texts(result, added), _texts_at_walls(result)]
    isolate = "".join(
        f".pareto:has(.l{i}:hover) .plot .series:not(.s{i}),.pareto:has(.l{i}:focus) .plot .series:not(.s{i}){{opacity:.09}}"
        for i in range(len(result["walls"]))
    )
    return document(f"What breaks {result['model']}", "\n".join(parts), STYLE + OWN_STYLE + isolate, POLICY)


def _section(title: str, note: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class='soft'>{escape(note)}</p>{body}</section>"


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    cells = "".join(f"<th>{escape(head)}</th>" for head in heads)
    return f"<div class='scroll'><table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _row(first: str, cells: Iterable[str], kind: str = "") -> str:
    return f'<tr class="{kind}"><td class="m">{escape(first)}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _head(result: Result) -> str:
    facts = {
        "model": result["model"],
        "site": result["site"],
        "direction": ", ".join(f"{key} {value}" for key, value in result["vector"].items()),
        "rho 1 is a coefficient of": figure(1 / result["rho_of_1"]),
        "command": result["settings"]["command"],
    }
    pairs = "".join(f"<div><dt>{key}</dt><dd>{escape(str(value))}</dd></div>" for key, value in facts.items())
    left_out = "".join(
        f"<p class='soft'>The arm “{escape(arm)}” was left out. The reason: {escape(why)}</p>" for arm, why in result["left_out"].items()
    )
    return (
        f"<h1>What a too large coefficient does to {escape(str(result['model']))}</h1><p>One direction at rising strengths, and arms "
        f"that tell causes apart. Strengths are rho: the length of what is added over the stream's median length there.</p>"
        f"<dl class='facts'>{pairs}</dl>{left_out}"
    )


def _findings(result: Result) -> str:
    limits = {sign.name: f"{'above' if sign.above else 'below'} {sign.limit:g}" for sign in SIGNS}
    signs = [_row(name, [limits[name], "not crossed" if rho is None else figure(rho)]) for name, rho in result["crossings"].items()]
    null = []
    for one in result["predictions"]:
        kind = "" if one["held"] is None else "held" if one["held"] else "failed"
        numbers = ", ".join(f"{escape(name)} {figure(value)}" for name, value in one["numbers"].items())
        null.append(_row(one["prediction"], [kind or "not decided", numbers], kind))
    return _section(
        "What crosses its limit first",
        f"Added {result['where']}. The limits are conventions.",
        _table(("sign", "limit", "rho"), signs),
    ) + _section(
        "Predictions of the null model",
        "Tokens without any structure, held against this one direction at this one site.",
        _table(("prediction", "", "numbers"), null),
    )


def _curves(result: Result) -> str:
    names = list(result["walls"])
    points = {name: [(row["rho"], row.get("logits", {}).get("kl")) for row in result["rows"] if row["arm"] == name] for name in names}
    colours = [f"var(--k{i % COLOURS})" for i in range(len(names))]
    legend = "".join(
        f'<li class="l{i}" tabindex="0" style="--c:{colour}"><svg viewBox="0 0 24 16" class="series" aria-hidden="true">'
        f'<path d="M1 8L23 8"{_dash(i)}/></svg><span>{escape(name)}</span></li>'
        for i, (name, colour) in enumerate(zip(names, colours))
    )
    drawn = [(row["rho"], row.get("logits", {}).get("kl")) for row in result["rows"]]
    svg = _plot([points[name] for name in names], colours, drawn, result["wall"])
    return _section(
        "How far the predictions move",
        "KL of the predictions on neutral text against rho, on log scales. The dashed line is the wall. Point at a name to see it alone.",
        f'<div class="pareto">{svg}<ul class="legend">{legend}</ul></div>',
    )


def _dash(i: int) -> str:
    """Lines beyond the ninth repeat a colour, dashed."""
    return ' stroke-dasharray="5 4"' if i >= COLOURS else ""


def _plot(lines: Sequence[Sequence[tuple[float, float | None]]], colours: Sequence[str], drawn: Sequence[Any], wall: float) -> str:
    known = [max(kl, LOWEST_KL) for _, kl in drawn if kl is not None and math.isfinite(kl)]
    if not known:
        return "<p>No arm has finite predictions, so there is nothing to draw.</p>"
    rhos = [rho for rho, _ in drawn]
    x_low, x_high = math.log10(min(rhos)), math.log10(max(rhos)) + 1e-9
    y_low, y_high = math.log10(min(*known, wall)) - 0.1, math.log10(max(*known, wall)) + 0.1

    def x_of(rho: float) -> float:
        return LEFT + (math.log10(rho) - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_of(kl: float) -> float:
        return TOP + (y_high - math.log10(max(kl, LOWEST_KL))) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for power in range(math.ceil(y_low), math.floor(y_high) + 1):
        y = y_of(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT:.0f}" x2="{WIDTH - RIGHT:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7:.0f}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for rho in sorted(set(rhos)):
        parts.append(f'<text x="{x_of(rho):.1f}" y="{HEIGHT - BOTTOM + 17:.0f}" text-anchor="middle">{rho:g}</text>')
    parts.append(f'<line class="zero" x1="{LEFT:.0f}" x2="{WIDTH - RIGHT:.0f}" y1="{y_of(wall):.1f}" y2="{y_of(wall):.1f}"/>')
    for i, (line, colour) in enumerate(zip(lines, colours)):
        at = [(x_of(rho), y_of(kl)) for rho, kl in line if kl is not None and math.isfinite(kl)]
        if at:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
            parts.append(f'<g class="series s{i}" style="--c:{colour}"><path d="{path}"{_dash(i)}/></g>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6:.0f}" text-anchor="middle">rho (log scale)</text>')
    parts.append(f'<text transform="translate(14 {(HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">KL, nats per token</text>')
    label = f"KL against rho for {len(lines)} arms"
    return f'<svg class="plot" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _arms(result: Result) -> str:
    rows = []
    for name, wall in result["walls"].items():
        share = result["restored"].get(name)
        reached = figure(wall["rho"]) if wall["reached"] else f"not up to {figure(wall['rho'])} (KL {figure(wall['kl'])})"
        interval = f"{figure(share['value'])}<small>{figure(share['low'])} to {figure(share['high'])}</small>" if share else ""
        rows.append(_row(name, [reached, interval]))
    return _section(
        f"At equal KL: where each arm reaches {result['wall']:g} nat",
        "Restored: the share of the damage of “added” at its own wall that an arm takes away at the same coefficient, with a 95 % interval "
        "over texts; 1 is all, 0 none, below 0 it breaks more.",
        _table(("arm", "rho at the wall", "restored"), rows),
    )


def _carried(result: Result) -> str:
    carried, title = result.get("damage_by_edge", {"left_out": "it was not measured"}), "Which parts carry the damage"
    if "left_out" in carried:
        return _section(title, f"Not here: {carried['left_out']}", "")
    writers = [
        _row(one["writer"], [f"{figure(one['value'])}<small>{figure(one['low'])} to {figure(one['high'])}</small>", figure(one["through"])])
        for one in carried["writers"][:SHOWN]
    ]
    edges = [_row(one["edge"], [figure(one["share"])]) for one in carried["edges"]]
    note = (
        f"Shares of the KL of “added” at rho {figure(carried['rho'])}, {figure(carried['kl'])} nat, by conductance along the coefficient "
        f"in {carried['steps']} steps. What all parts write to the logits adds up to {figure(carried['sum'])} of it (heads "
        f"{figure(carried['heads'])}, MLPs {figure(carried['mlps'])}); the edges across the other places of the stream after the vector "
        f"to {figure(carried['least_across'])} to {figure(carried['most_across'])}. Through: what a part writes to any reader. Intervals "
        "(95 %) over texts."
    )
    tables = _table(("writer", "to the logits", "through"), writers) + _table(("edge", "share"), edges)
    return _section(title, note, f"<div class='maps'>{tables}</div>")


def _null(result: Result, added: Sequence[dict[str, Any]]) -> str:
    kind, _, number = (result["first_norm"] or "").partition(".")
    rows = []
    for row, null in zip(added, result["null"]):
        layers = row.get("inside", {}).get("layers", [])
        behind: dict[str, float | None] = next((layer[kind][1] for layer in layers if str(layer["layer"]) == number and kind in layer), {})
        cosine = _stream("cos_v")(layers[0]) if layers else None
        measured = (cosine, behind.get("token_share"), behind.get("effective_rank"))
        pairs = zip(measured, (null["cos_v"], null["token_share"], null["effective_rank"]))
        rows.append(_row(f"{row['rho']:g}", [cell for pair in pairs for cell in map(figure, pair)]))
    return _section(
        "The null model beside the measurement",
        f"Cosine of the stream and v at the site; token share and effective rank of what {result['first_norm'] or 'no norm'} puts out.",
        _table(("rho", "cosine", "null", "token share", "null", "effective rank", "null"), rows),
    )


def _maps(result: Result, added: Sequence[dict[str, Any]]) -> str:
    rhos = [f"{row['rho']:g}" for row in added]
    maps = []
    for title, value in MAPS:
        table: dict[int, list[float | None]] = {}
        for i, row in enumerate(added):
            for layer in row.get("inside", {}).get("layers", []):
                table.setdefault(layer["layer"], [None] * len(added))[i] = value(layer)
        known = [abs(one) for line in table.values() for one in line if one is not None and math.isfinite(one)]
        if known:
            rows = "".join(f"<tr><th>{layer}</th>{''.join(_cell(one, max(known)) for one in line)}</tr>" for layer, line in table.items())
            heads = "".join(f"<th>{rho}</th>" for rho in rhos)
            maps.append(
                f"<div><h3>{escape(title)}</h3><div class='scroll'><table class='cells'><thead><tr><th>layer</th>{heads}</tr></thead>"
                f"<tbody>{rows}</tbody></table></div></div>"
            )
    return _section(
        f"Layer by layer, added {result['where']}",
        "Columns are rho; the darker, the larger; below 0 in the other colour.",
        f"<div class='maps'>{''.join(maps)}</div>" if maps else "<p>Nothing inside was measured.</p>",
    )


def _cell(value: float | None, most: float) -> str:
    if value is None or not math.isfinite(value):
        return "<td style='--a:0'>–</td>"
    return f"<td{' class=low' if value < 0 else ''} style='--a:{0.75 * abs(value) / (most or 1):.2f}'>{figure(value)}</td>"


def _texts(result: Result, added: Sequence[dict[str, Any]]) -> str:
    some = sorted({round(i * (len(added) - 1) / (SHOWN_TEXTS - 1)) for i in range(SHOWN_TEXTS)}) if len(added) > 1 else [0]
    chosen = [("unsteered", result["unsteered_text"])] + [(f"rho {added[i]['rho']:g}", added[i].get("text", {})) for i in some]
    rows = [_text_row(name, text) for name, text in chosen]
    prompt = result["settings"]["prompts"][0]
    return _section(
        "What the model writes",
        f"Continuations of “{prompt}”, added {result['where']}.",
        _table(("", "text", "nats per token", "distinct-2"), rows),
    )


def _texts_at_walls(result: Result) -> str:
    """Of a sweep that sought every arm's wall."""
    walls = {name: wall for name, wall in result["walls"].items() if "text" in wall}
    if not walls:
        return ""
    rows = [
        _text_row(f"{name}, rho {figure(wall['rho'])}" + ("" if wall["reached"] else " (not reached)"), wall["text"])
        for name, wall in walls.items()
    ]
    prompt = next(iter(walls.values()))["text"]["prompt"]
    return _section(
        "What each arm writes at equal KL",
        f"Continuations of “{prompt}” where each arm's KL is {result['wall']:g} nat, or at the largest rho that was tried. Frozen parts "
        "are those of the unsteered model on the same text.",
        _table(("arm", "text", "nats per token", "distinct-2"), rows),
    )


def _text_row(name: str, text: dict[str, Any]) -> str:
    shown = visible(text["texts"][0]) if text.get("texts") else escape(text.get("failure", "not measured"))
    numbers = f"<td>{figure(text.get('nats_per_token'))}</td><td>{figure(text.get('distinct_2'))}</td>"
    return f'<tr><td class="m">{escape(name)}</td><td class="text">{shown}</td>{numbers}</tr>'
