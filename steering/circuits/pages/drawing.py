"""The drawing of a circuit as SVG: layers from bottom to top, an edge from each writer's upper side to the reader's port on the lower one.

All edges that the page can show are in it; those that are not drawn at first carry the class "off". Coordinates are pixels of the view box.

r readers · w writers
"""

import math
from collections.abc import Sequence
from functools import cached_property
from html import escape
from typing import NamedTuple

from sae.html import figure
from steering.circuits.files import Circuit
from steering.circuits.model_graph.graph import EMBED, HEAD_INPUTS, LOGITS, Graph

MOST = 2000
"""number of edges outside the circuit, by absolute score, on a page"""
KINDS = {"q": "queries", "k": "keys", "v": "values", "mlp_in": "MLPs", "logits": "logits"}
"""kinds of readers, by the beginning of their names"""
LEFT, SIDE, TOP = 40.0, 190.0, 14.0
"""room for the layers' numbers, for the MLPs and their edges, and above the logits"""
HEIGHT_OF_NODE = 15.0
THINNEST, WIDEST = 0.7, 7.0


class Edge(NamedTuple):
    r: int
    w: int
    score: float | None
    inside: bool


def edges_of(circuit: Circuit, most: int = MOST) -> list[Edge]:
    """All edges of the circuit and the `most` others of the largest absolute score, the strongest first."""
    inside_rw = circuit.edges_rw.cpu()
    if circuit.score_rw is None:
        return [Edge(r, w, None, True) for r, w in inside_rw.nonzero().tolist()]
    score_rw = circuit.score_rw.double().cpu()
    size_rw = score_rw.abs().masked_fill(~circuit.graph.exists_rw | inside_rw, -math.inf)
    others = size_rw.flatten().argsort(descending=True, stable=True)[: min(most, circuit.graph.n_edges - int(inside_rw.sum()))]
    shown_rw = inside_rw.clone()
    shown_rw.view(-1)[others] = True
    found = [Edge(r, w, float(score_rw[r, w]), bool(inside_rw[r, w])) for r, w in shown_rw.nonzero().tolist()]
    return sorted(found, key=lambda edge: -abs(edge.score or 0.0))


class Layout:
    """The places of the parts of a graph."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.column = min(74.0, max(26.0, 620 / graph.n_heads))
        self.row = min(96.0, max(38.0, 1000 / graph.n_layers))
        self.head_width = self.column - 8
        self.mlp_x = LEFT + graph.n_heads * self.column + 56
        self.width = self.mlp_x + SIDE - 56
        self.height = TOP + (graph.n_layers + 1.2) * self.row + 3 * HEIGHT_OF_NODE
        self.middle = LEFT + graph.n_heads * self.column / 2

    @cached_property
    def writer_xy(self) -> list[tuple[float, float]]:
        """The middle of each writer's box."""
        blocks = []
        for layer in range(self.graph.n_layers):
            y = self.layer_y(layer)
            blocks += [(LEFT + (head + 0.5) * self.column, y) for head in range(self.graph.n_heads)]
            blocks.append((self.mlp_x, y if self.graph.parallel else y - self.row / 2))
        return [(self.middle, self.height - HEIGHT_OF_NODE), *blocks]

    @property
    def logits_xy(self) -> tuple[float, float]:
        return self.middle, TOP + HEIGHT_OF_NODE / 2

    def layer_y(self, layer: int) -> float:
        return self.height - 2 * HEIGHT_OF_NODE - (layer + 0.75) * self.row

    def reader_xy(self, r: int) -> tuple[float, float]:
        """The point where edges into each reader end."""
        fed = int(self.graph.fed_r[r])
        x, y = self.logits_xy if fed < 0 else self.writer_xy[fed]
        kind = self.graph.readers[r].partition(".")[0]
        if kind in HEAD_INPUTS:
            x += (HEAD_INPUTS.index(kind) - 1) * self.head_width * 0.32
        return x, y + HEIGHT_OF_NODE / 2

    def path(self, r: int, w: int) -> str:
        (x, y), (to_x, to_y) = self.writer_xy[w], self.reader_xy(r)
        y -= HEIGHT_OF_NODE / 2
        reach = max(8.0, (y - to_y) * 0.45)
        bow = 0.0
        if abs(x - to_x) < self.head_width / 2:  # else it would run through the parts between
            side = 1 if x == self.mlp_x else -1
            bow = side * min(0.9 * (SIDE - 56 - 34) if side > 0 else 0.45 * self.column, 0.16 * (y - to_y))
        return f"M{x:.1f} {y:.1f}C{x + bow:.1f} {y - reach:.1f} {to_x + bow:.1f} {to_y + reach:.1f} {to_x:.1f} {to_y:.1f}"


def width_of(score: float | None, strongest: float) -> float:
    """Pixels: the root of the share of the strongest edge's score, so that weak ones are still seen."""
    if score is None or not strongest:
        return 1.5
    return THINNEST + (WIDEST - THINNEST) * math.sqrt(abs(score) / strongest)


def drawing(circuit: Circuit, edges: Sequence[Edge]) -> str:
    """The SVG element. Edge number n of `edges` is the path with data-n="n"; the strongest lie on top."""
    graph, layout = circuit.graph, Layout(circuit.graph)
    strongest = max((abs(edge.score or 0.0) for edge in edges), default=0.0)
    paths = [_edge(graph, layout, number, edge, strongest) for number, edge in reversed(list(enumerate(edges)))]
    label = escape(f"{sum(edge.inside for edge in edges)} edges of {circuit.model}, layers from bottom to top")
    size = f'viewBox="0 0 {layout.width:.0f} {layout.height:.0f}" style="max-width:{1.5 * layout.width:.0f}px"'
    body = "".join([*_rows(graph, layout), f"<g>{''.join(paths)}</g>", *_nodes(graph, layout, edges)])
    return f'<svg id="graph" class="graph" {size} tabindex="-1" role="group" aria-label="{label}">{body}</svg>'


def _edge(graph: Graph, layout: Layout, number: int, edge: Edge, strongest: float) -> str:
    name = graph.edge_name(edge.r, edge.w)
    sign = "neg" if (edge.score or 0.0) < 0 else "pos"
    classes = f"e {sign}{' in' if edge.inside else ' off'}"
    layer = graph.n_layers if graph.readers[edge.r] == LOGITS else graph.readers[edge.r].split(".")[1]
    fed = int(graph.fed_r[edge.r])
    data = f'data-n="{number}" data-from="{edge.w}" data-to="{len(graph.writers) if fed < 0 else fed}"'
    data += f' data-kind="{graph.readers[edge.r].partition(".")[0]}" data-layer="{layer}"'
    width, title = width_of(edge.score, strongest), f"{name}  {figure(edge.score, signed=True)}"
    return (
        f'<path class="{classes}" {data} stroke-width="{width:.2f}" d="{layout.path(edge.r, edge.w)}"><title>{escape(title)}</title></path>'
    )


def _rows(graph: Graph, layout: Layout) -> list[str]:
    parts = []
    for layer in range(graph.n_layers):
        y = layout.layer_y(layer)
        parts.append(f'<line class="grid" x1="{LEFT - 8:.0f}" x2="{layout.mlp_x + 24:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 14:.0f}" y="{y + 4:.1f}" text-anchor="end">{layer}</text>')
    return parts


def _nodes(graph: Graph, layout: Layout, edges: Sequence[Edge]) -> list[str]:
    """A box for every part; part number n of the writers, the logits after them, has data-node="n"."""
    ends = {int(graph.fed_r[edge.r]) for edge in edges if edge.inside}
    active = {edge.w for edge in edges if edge.inside} | {len(graph.writers) if end < 0 else end for end in ends}
    places = [*layout.writer_xy, layout.logits_xy]
    parts = []
    for number, (name, (x, y)) in enumerate(zip([*graph.writers, LOGITS], places, strict=True)):
        kind, *numbers = name.split(".")
        label, width = {
            EMBED: ("embedding", 90.0),
            LOGITS: ("logits", 90.0),
            "head": (numbers[-1] if numbers else "", layout.head_width),
            "mlp": ("MLP", 40.0),
        }[kind]
        ports = "".join(
            f'<circle class="port {port}" cx="{x + (at - 1) * width * 0.32:.1f}" cy="{y + HEIGHT_OF_NODE / 2:.1f}" r="2.6"/>'
            for at, port in enumerate(HEAD_INPUTS if kind == "head" else ())
        )
        parts.append(
            f'<g class="node {kind}{"" if number in active else " idle"}" data-node="{number}" data-name="{name}"><title>{name}</title>'
            f'<rect x="{x - width / 2:.1f}" y="{y - HEIGHT_OF_NODE / 2:.1f}" width="{width:.1f}" height="{HEIGHT_OF_NODE:.1f}" rx="4"/>'
            f'<text x="{x:.1f}" y="{y + 3.6:.1f}" text-anchor="middle">{label}</text>{ports}</g>'
        )
    return parts


def kinds_in(graph: Graph, edges: Sequence[Edge]) -> dict[str, int]:
    """How many of the edges go into readers of each kind."""
    kinds = [graph.readers[edge.r].partition(".")[0] for edge in edges]
    return {kind: kinds.count(kind) for kind in KINDS}


def sizes_of_legend(edges: Sequence[Edge]) -> list[tuple[float, float]]:
    """A few absolute scores with the width at which they are drawn."""
    strongest = max((abs(edge.score or 0.0) for edge in edges), default=0.0)
    return [(value, width_of(value, strongest)) for value in (strongest, strongest / 10, strongest / 100)] if strongest else []
