"""The page of a circuit: the drawing with its filters, the edges as a table, the task, and how good the circuit is.

One HTML file without a network. Without its script it shows the circuit's edges, drawn and as a table.
"""

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from sae.disk.writing import atomic
from sae.errors import InputError
from sae.html import document, figure, visible
from steering.circuits.files import Circuit, some_cuts
from steering.circuits.model_graph.graph import HEAD_INPUTS
from steering.circuits.pages.drawing import KINDS, Edge, drawing, edges_of, kinds_in, sizes_of_legend
from steering.circuits.pages.plots import curve_svg, interval
from steering.report_style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
CONTROLS = {"random": "random circuits of as many edges", "random_heads": "circuits of random heads instead of its own"}
"""by their names in an evaluation"""
WEB = resources.files("steering.circuits.pages") / "web"


def write_page(circuit: Circuit, path: Path) -> None:
    """Writes the page, atomically. Raises `InputError` for a place that cannot be written and as `circuit_html` does."""
    page = circuit_html(circuit)
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def circuit_html(circuit: Circuit) -> str:
    """The whole page. The same circuit gives the same page, byte for byte; sections whose numbers the circuit lacks are left out.

    Raises `InputError` for a task or an evaluation that find-circuit did not write.
    """
    edges = edges_of(circuit)
    try:
        parts = [_head(circuit), _drawn(circuit, edges), _task(circuit.task), _measures(circuit), _sums(circuit), _table_of(circuit, edges)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"expected a circuit's task and evaluation as find-circuit writes them, got others ({type(error).__name__}: {error}); find it "
            "again"
        ) from None
    style, script = ((WEB / name).read_text(encoding="utf-8") for name in ("circuit.css", "circuit.js"))
    body = "\n".join([*filter(None, parts), f"<script>{script}</script>"])
    return document(f"Circuit of {circuit.task.get('name', 'a task')} in {circuit.model}", body, STYLE + style, POLICY)


def _section(title: str, note: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class='soft'>{escape(note)}</p>{body}</section>"


def _facts(facts: dict[str, Any]) -> str:
    pairs = "".join(f"<div><dt>{escape(key)}</dt><dd>{visible(str(value))}</dd></div>" for key, value in facts.items() if value is not None)
    return f"<dl class='facts'>{pairs}</dl>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """All cells but the first are numbers; everything is escaped here."""
    head = "".join(f'<th scope="col"{" class=n" if at else ""}>{escape(text)}</th>' for at, text in enumerate(heads))
    body = "".join(f"<tr>{''.join(f'<td{_kind(at)}>{escape(cell)}</td>' for at, cell in enumerate(row))}</tr>" for row in rows)
    return f"<div class='scroll'><table class='small'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _kind(at: int) -> str:
    return " class=n" if at else ""


def _head(circuit: Circuit) -> str:
    task, method, n = circuit.task, circuit.method, int(circuit.edges_rw.sum())
    found = circuit.evaluation.get("circuit")
    facts = {
        "model": circuit.model,
        "fingerprint": circuit.fingerprint,
        "scores by": method.get("scores"),
        "searched by": method.get("search"),
        "edges": f"{n:,} of {circuit.graph.n_edges:,}",
        "faithfulness": interval(found["f"]) if found else None,
        "command": method.get("settings", {}).get("command"),
    }
    return f"<h1>Circuit of {visible(str(task.get('name', 'a task')))} in {visible(circuit.model)}</h1>{_facts(facts)}"


def _drawn(circuit: Circuit, edges: Sequence[Edge]) -> str:
    note = (
        "Layers from bottom to top; a line runs from the part that writes to the part that reads, the numbered boxes are heads. Point at "
        "a line or a part to see its name and score; in the drawing and in the table below, the arrow keys go from one to the next. A "
        "score is how much the task's metric falls when the edge alone is cut, or an estimate of that."
    )
    return _section("Edges", note, f"{_controls(circuit, edges)}{_legend(edges)}<div class='scroll'>{drawing(circuit, edges)}</div>")


def _controls(circuit: Circuit, edges: Sequence[Edge]) -> str:
    inside = sum(edge.inside for edge in edges)
    last = circuit.graph.n_layers
    kinds = "".join(
        f'<label><input type="checkbox" name="kind" value="{kind}" checked> into {name}</label>'
        for kind, name in KINDS.items()
        if kinds_in(circuit.graph, edges)[kind]
    )
    others = f'<label><input type="radio" name="set" value="all"> the {len(edges):,} strongest of all</label>'
    return (
        f'<form id="filters" hidden><fieldset><legend>Edges</legend>'
        f'<label><input type="radio" name="set" value="circuit" checked> of the circuit ({inside:,})</label>'
        f"{others if len(edges) > inside else ''}"
        f'<label>at most <input type="range" name="most" min="0" max="100" value="100"><output name="count"></output></label></fieldset>'
        f"<fieldset><legend>Readers</legend>{kinds}"
        f'<label>in layers <input type="number" name="low" min="0" max="{last}" value="0"></label>'
        f'<label>to <input type="number" name="high" min="0" max="{last}" value="{last}"></label>'
        f'<span class="soft">(the logits are layer {last})</span></fieldset>'
        f'<p id="status" role="status"></p></form>'
    )


def _legend(edges: Sequence[Edge]) -> str:
    ports = [f'<svg viewBox="0 0 12 12" aria-hidden="true"><circle class="port {kind}" cx="6" cy="6" r="4"/></svg>' for kind in HEAD_INPUTS]
    items = [port + text for port, text in zip(ports, ("queries (left to right)", "keys", "values"))]
    items += [_line("pos in", 3) + "carries the answer (score above 0)", _line("neg in", 3) + "works against it (below 0)"]
    items += [_line("any in", width) + figure(value) for value, width in sizes_of_legend(edges)]
    if not all(edge.inside for edge in edges):
        items.append(_line("pos", 2) + "not in the circuit")
    return f"<ul class='key'>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _line(kind: str, width: float) -> str:
    return f'<svg viewBox="0 0 26 12" class="wide" aria-hidden="true"><path class="e {kind}" stroke-width="{width:.1f}" d="M1 6H25"/></svg>'


def _task(task: dict[str, Any]) -> str:
    if not task:
        return ""
    example = task["example"]
    sides = "".join(
        f"<dt>{name}</dt><dd>{'<b>|</b>'.join(visible(piece) for piece in example[name])}</dd>" for name in ("clean", "corrupt")
    ) + "".join(f"<dt>{name}</dt><dd>{', '.join(f'“{visible(text)}”' for text in example[name])}</dd>" for name in ("right", "wrong"))
    left = ", ".join(f"{count:,} {reason}" for reason, count in task["left_out"].items())
    facts = {
        "corruption": task["corruption"],
        "metric": str(task["metric"]).replace("_", " "),
        "pairs": f"{task['found_on']} to find the circuit on, {task['held_out']} to measure it on",
        "left out": left or None,
        "share of right answers": interval(task["accuracy"]),
        "clean": interval(task["clean"]),
        "corrupt": interval(task["corrupt"]),
        "clean minus corrupt": interval(task["effect"]),
    }
    return _section(
        "The task", "A pair of prompts, and the metric on all of them (95 %).", f"<dl class='pairs'>{sides}</dl>{_facts(facts)}"
    )


def _measures(circuit: Circuit) -> str:
    found = circuit.evaluation
    if not found:
        return ""
    one = found["circuit"]
    sizes = {row["edges"]: row for row in [*found["absolute"], *found["counts"]]}  # some are in both
    rows, controls = [sizes[n] for n in sorted(sizes)], {name: one[key]["f"] for key, name in CONTROLS.items() if key in one}
    names = "".join(f"<li class='c{number}'>{escape(name)}</li>" for number, name in enumerate(controls))
    key = f"<ul class='key plain'><li class='line'>edges of the highest scores</li><li class='own'>the circuit</li>{names}</ul>"
    measures = [
        ["faithfulness", interval(one["f"])],
        ["the model with the circuit cut", interval(one["without"])],
        *(
            [f"{len(drawn)} {name}: mean, best", f"{figure(sum(drawn) / len(drawn))}, {figure(max(drawn))}"]
            for name, drawn in controls.items()
            if drawn
        ),
        ["CPR", interval(found["cpr"])],
        ["CMD", interval(found["cmd"])],
        ["CMD on log size", interval(found["cmd_log"])],
    ]
    curve = [[f"{row['edges']:,}", f"{row['kept']:,}", interval(row["f"]), figure(row["ndf"]["value"])] for row in rows]
    note = (
        f"Faithfulness on {found['n_pairs']} held-out pairs, with 95 % intervals: 1 as the whole model (metric {interval(found['full'])}), "
        f"0 as with every edge cut ({interval(found['empty'])}). What lies beyond the plot is drawn at its border."
    )
    tables = _table(("measure", ""), measures) + _table(("edges", "on a path", "faithfulness", "NDF"), curve)
    return _section("How good it is", note, f"{key}{curve_svg(rows, one, controls)}<div class='side'>{tables}</div>")


def _sums(circuit: Circuit) -> str:
    found, tables = circuit.evaluation, []
    if "stability" in found:
        rows = [[f"{row['asked']:,}", figure(row["mean"]), figure(row["lowest"])] for row in found["stability"]]
        tables.append(_table(("edges in common (Jaccard) of resampled pairs", "mean", "lowest"), rows))
    if "completeness" in found:
        shares = found["completeness"]
        rows = [[place, figure(shares[place])] for place in some_cuts(shares)]
        rows += [["lowest of all", figure(min(shares.values()))], ["highest", figure(max(shares.values()))]]
        tables.append(_table(("scores across a cut", "over the metric's change"), rows))
    if "published" in found:
        rows = [[name, str(len(row["heads"])), ", ".join(row["found"])] for name, row in found["published"]["classes"].items()]
        tables.append(_table(("published heads", "heads", "in the circuit"), rows))
    note = "How far the edges depend on the pairs, and whether the scores add up to the metric's change: 1 is all of it."
    return _section("How far to trust the scores", note, f"<div class='side'>{''.join(tables)}</div>") if tables else ""


def _table_of(circuit: Circuit, edges: Sequence[Edge]) -> str:
    worth = {row["edge"]: row for row in circuit.evaluation.get("minimality", [])}
    head = "<th scope=col class=n>rank</th><th scope=col>edge</th><th scope=col class=n>score</th><th scope=col>in the circuit</th>"
    head += "<th scope=col class=n>fall of faithfulness when it is cut</th>" if worth else ""
    rows = []
    for number, edge in enumerate(edges):
        name = circuit.graph.edge_name(edge.r, edge.w)
        cells = f"<td class=n>{number + 1}</td><td><code>{escape(name)}</code></td><td class=n>{figure(edge.score, signed=True)}</td>"
        cells += f"<td>{'✓' if edge.inside else ''}</td>"
        cells += f"<td class=n>{interval(worth[name]) if name in worth else ''}</td>" if worth else ""
        rows.append(f'<tr data-n="{number}"{"" if edge.inside else " hidden"}>{cells}</tr>')
    table = f"<table id='edges'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    note = "By absolute score; the rank is among the edges that the page holds. Filters above hold here too."
    return _section("The edges as a table", note, f"<div class='scroll tall'>{table}</div>")
