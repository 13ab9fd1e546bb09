"""An attribution graph as one page that opens from file://: layers as rows, tokens as columns; no network, every text escaped."""

import json
import math
import shlex
from collections import defaultdict
from html import escape
from typing import Any

from sae.html import document, figure, word_html
from steering.circuits.attribution.files import GraphFile, Node
from steering.circuits.attribution.page_script import SCRIPT
from steering.circuits.attribution.report import COLUMNS, node_label
from steering.report_style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SERVED_POLICY = POLICY + "; connect-src 'self'"
ROW, GAP, MARGIN, LEFT, MOST_ACROSS = 15.0, 14.0, 26.0, 74.0, 6
"""of a line of nodes; between layers; around; for the names of layers; nodes beside one another in a cell"""
STEP = 15.0
OWN_STYLE = """
body{max-width:none}
.tools{display:flex;flex-wrap:wrap;gap:.4rem 2rem;align-items:center;margin:.2rem 0 .6rem}
.tools label{display:flex;gap:.5rem;align-items:center;font-size:.9rem}
.tools output{min-width:3.2rem;font-variant-numeric:tabular-nums}
.graph{display:grid;grid-template-columns:minmax(0,1fr) 25rem;gap:1rem;align-items:start}
@media(max-width:70rem){.graph{grid-template-columns:1fr}}
.drawing{overflow:auto;max-height:82vh;border:1px solid var(--line);border-radius:8px}
.drawing svg{width:auto;max-width:none}
.drawing .band{fill:var(--grid);opacity:.6}
.drawing .word{fill:var(--text)}
.node{cursor:pointer;fill:var(--k0);stroke:var(--card);stroke-width:1}
.node.error{fill:var(--control)}.node.token{fill:var(--k2)}.node.logit{fill:var(--k1)}
.node.dim{opacity:.13}.node.chosen{stroke:var(--text);stroke-width:2.5}.node:focus{outline:0;stroke:var(--text);stroke-width:2.5}
.node[hidden],.link[hidden]{display:none}
.link{fill:none;stroke:rgb(var(--pos));opacity:.5;pointer-events:none}.link.minus{stroke:rgb(var(--neg))}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0;margin:.3rem 0;font-size:.87rem}
.key i{display:inline-block;width:.75rem;height:.75rem;margin-right:.4rem;border-radius:50%;background:var(--c)}
.key i.square{border-radius:1px}.key i.line{height:.2rem;border-radius:0;vertical-align:middle}
.detail{max-height:82vh;overflow:auto;min-width:0}
.detail h3{font-size:.95rem;margin:.9rem 0 .2rem}
.detail button.to{all:unset;cursor:pointer;color:rgb(var(--pos));overflow-wrap:anywhere}
.detail button.to:hover,.detail button.to:focus{text-decoration:underline}
.detail td{padding:.2rem .4rem .2rem 0}
.detail td.cp{padding-right:0;text-align:right}
.detail input.factor{width:5rem;font:inherit}
.detail .outcome{border:1px solid var(--line);border-radius:8px;padding:.2rem .6rem;margin:.5rem 0}
button.copy{font:inherit;font-size:.78rem;border:1px solid var(--line);border-radius:5px;background:var(--page);cursor:pointer}
code{font-size:.82rem;overflow-wrap:anywhere}
"""


def graph_html(content: GraphFile, path: str, served: bool = False) -> str:
    """The whole page; `path` is where the JSON is, for the commands that are shown. The same content gives the same page.

    Of a page that is `served` (serve.py), edges and nodes have buttons that run the model instead of commands to copy.
    """
    tokens, nodes = content["tokens"], content["nodes"]
    data = {
        "nodes": [
            {
                "id": node["id"],
                "kind": node["kind"],
                "label": _seen(node_label(node, tokens)),
                "influence": node["influence"],
                "facts": _facts(node),
                "layer": node["layer"],
            }
            for node in nodes
        ],
        "edges": [list(edge) for edge in content["edges"]],
        "command": f"sae intervene --graph {shlex.quote(path)} --node ",
        "columns": COLUMNS if served else None,
    }
    parts = [_head(content), _graph(content), _interventions(content)]
    held = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")  # so that no text of a token ends the script
    parts.append(f'<script type="application/json" id="data">{held}</script><script>{SCRIPT}</script>')
    return document(
        f"Attribution graph of {_seen(content['prompt'][:60])}", "\n".join(parts), STYLE + OWN_STYLE, SERVED_POLICY if served else POLICY
    )


def _facts(node: Node) -> list[list[str]]:
    facts = [["influence on the logits" if node["kind"] != "logit" else "probability", figure(node["influence"])]]
    if node["kind"] == "feature":
        facts += [["activation", figure(node["activation"])]]
    if "bias" in node:
        facts += [["reads", figure(node["reads"])], ["of this, constant", figure(node["bias"], signed=True)]]
    return facts


def _head(content: GraphFile) -> str:
    found, nodes = content["scores"], content["nodes"]
    shown = sum(node["kind"] == "feature" for node in nodes)
    facts = {
        "model": content["model"],
        "transcoders": content["transcoders"],
        "features": f"{content['n_active']:,} active, {content['n_features']:,} in the graph, {shown:,} after pruning",
        "completeness": figure(found["completeness"]),
        "replacement score": figure(found["replacement"]),
        "read from features that are not in the graph": f"{100 * found['left_out']:.2g} %",
        "command": content["settings"].get("command", ""),
    }
    pairs = "".join(f"<div><dt>{key}</dt><dd>{_plain(str(value))}</dd></div>" for key, value in facts.items())
    logits = ", ".join(f"{word_html(node['text'])} {figure(node['influence'])}" for node in nodes if node["kind"] == "logit")
    prompt = "".join(word_html(token) for token in content["tokens"])
    return f"<h1>What makes the next token likely</h1><p>{prompt}</p><p class='soft'>next token: {logits}</p><dl class='facts'>{pairs}</dl>"


def _graph(content: GraphFile) -> str:
    key = (
        ("", "var(--k0)", "feature"),
        ("square", "var(--control)", "error: what the transcoder misses"),
        ("square", "var(--k2)", "token"),
        ("", "var(--k1)", "logit"),
        ("line", "rgb(var(--pos))", "raises"),
        ("line", "rgb(var(--neg))", "lowers"),
    )
    listed = "".join(f'<li><i class="{kind}" style="--c:{colour}"></i>{name}</li>' for kind, colour, name in key)
    return (
        "<section><h2>Graph</h2><p class='soft'>Larger nodes have more influence on the logits. Click a node: what it reads from, and what "
        "reads it. Errors have no input, since their parts are unknown.</p>"
        f"<ul class='key'>{listed}</ul><div class='tools'>"
        '<label>nodes of the largest influence <input type="range" id="nodes" min="1" max="100" value="100"><output></output></label>'
        '<label>edges of the highest score <input type="range" id="edges" min="0" max="100" step="any" value="15"><output></output></label>'
        '<label><input type="checkbox" id="errors" checked> errors</label></div>'
        f'<div class="graph"><div class="drawing">{_svg(content)}</div><div class="detail" id="detail" aria-live="polite">'
        "<p class='soft'>Nothing chosen.</p></div></div></section>"
    )


def _svg(content: GraphFile) -> str:
    """Cells of layer and position, each a few nodes wide and as high as its layer needs."""
    nodes, n_layers = content["nodes"], content["n_layers"]
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for n, node in enumerate(nodes):
        cells[node["layer"], node["position"]].append(n)
    used = range(len(content["ids"]))
    across, lines = dict.fromkeys(used, 1), dict.fromkeys(range(-1, n_layers + 1), 1)
    for (_, p), own in cells.items():
        across[p] = max(across[p], min(MOST_ACROSS, len(own)))
    for (layer, p), own in cells.items():
        lines[layer] = max(lines[layer], math.ceil(len(own) / across[p]))
    x, left = LEFT, {}
    for p in used:
        left[p] = x
        x += max(across[p] * STEP + GAP, 8.0 * min(12, len(content["tokens"][p])) + GAP)
    y, top = MARGIN, {}
    for layer in range(n_layers, -2, -1):
        top[layer] = y
        y += lines[layer] * ROW + GAP
    width, height = x + LEFT, y + MARGIN
    names = {-1: "tokens", n_layers: "logits"}
    drawn = []
    for layer in range(-1, n_layers + 1):
        if (n_layers - layer) % 2:
            drawn.append(f'<rect class="band" x="0" y="{top[layer] - GAP / 2:g}" width="{width:g}" height="{lines[layer] * ROW + GAP:g}"/>')
        middle = top[layer] + lines[layer] * ROW / 2 + 4
        name = names.get(layer, f"layer {layer}")
        drawn.append(f'<text x="{LEFT - 12:g}" y="{middle:g}" text-anchor="end">{name}</text><text x="{x:g}" y="{middle:g}">{name}</text>')
    for p in used:
        text = content["tokens"][p]
        short = text if len(text) <= 12 else text[:11] + "…"
        drawn.append(f'<text class="word" x="{left[p]:g}" y="{y + 8:g}">{_plain(short)}</text>')
    largest = max((node["influence"] for node in nodes if node["kind"] != "logit"), default=0.0) or 1.0
    marks = []
    for (layer, p), own in cells.items():
        for place, n in enumerate(sorted(own, key=lambda n: -nodes[n]["influence"])):
            cx = left[p] + (place % across[p]) * STEP + 6
            cy = top[layer] + (place // across[p]) * ROW + 7
            marks.append(_mark(n, nodes[n], cx, cy, largest, content["tokens"]))
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="group" aria-label="attribution graph">'
        f'{"".join(drawn)}<g id="links"></g><g id="marks">{"".join(marks)}</g></svg>'
    )


def _mark(n: int, node: Node, x: float, y: float, largest: float, tokens: list[str]) -> str:
    size = 5.5 if node["kind"] == "logit" else 2 + 4.5 * math.sqrt(min(1.0, max(0.0, node["influence"]) / largest))
    label = _plain(f"{node_label(node, tokens)}, {figure(node['influence'])}")
    common = f'class="node {node["kind"]}" data-n="{n}" data-x="{x:g}" data-y="{y:g}" tabindex="0"'
    if node["kind"] in ("error", "token"):
        shape = f'<rect {common} x="{x - size:.2f}" y="{y - size:.2f}" width="{2 * size:.2f}" height="{2 * size:.2f}">'
        return f"{shape}<title>{label}</title></rect>"
    return f'<circle {common} cx="{x:g}" cy="{y:g}" r="{size:.2f}"><title>{label}</title></circle>'


def _seen(text: str) -> str:
    """Characters that cannot be seen as their code, for places without markup."""
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text)


def _plain(text: str) -> str:
    return escape(_seen(text))


def _interventions(content: GraphFile) -> str:
    if not content["interventions"]:
        return ""
    nodes = {node["id"]: node for node in content["nodes"]}
    heads = ("set", "to", "change of", *COLUMNS.values())
    cells = "".join(f'<th class="{"n" if i > 2 else ""}">{escape(head)}</th>' for i, head in enumerate(heads))
    rows = []
    for one in content["interventions"]:
        rows += [_row(one, row, nodes, content["tokens"]) for row in _shown(one["changes"])]
    return (
        "<section><h2>Interventions</h2><p class='soft'>Features at the strongest edges, set to 0, −1 and 2 times their value; change "
        "of the three features with the largest edges from it and of the three likeliest tokens' logits. The first two columns of numbers "
        "have to agree. Along the graph's paths features stay active and pruned edges are missing; in the replacement model features "
        "switch on and off; in the model itself attention patterns and norms follow too.</p>"
        f"<div class='scroll'><table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _shown(changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    features = [row for row in changes if not row["node"].startswith("logit.")]
    return [*features[:3], *[row for row in changes if row["node"].startswith("logit.")][:3]]


def _row(one: dict[str, Any], row: dict[str, Any], nodes: dict[str, Node], tokens: list[str]) -> str:
    numbers = "".join(f'<td class="n">{figure(row[key], signed=True)}</td>' for key in COLUMNS)
    names = (node_label(nodes[name], tokens) for name in (one["node"], row["node"]))
    first, second = (_plain(name) for name in names)
    return f"<tr><td>{first}</td><td class='n'>× {one['factor']:g}</td><td>{second}</td>{numbers}</tr>"
