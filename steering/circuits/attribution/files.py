"""Attribution graphs as files: a pruned graph as our JSON, and as the JSON that circuit-tracer's viewer reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from typing_extensions import NotRequired, TypedDict

from sae.disk.reading import Count, Number, read_json
from sae.disk.writing import write_json
from sae.errors import InputError
from sae.features.exports.circuit_tracer import cantor_pair
from steering.circuits.attribution.graph import AttributionGraph, Pruned

FORMAT = "attribution-graph-1"

Kind = Literal["feature", "error", "token", "logit"]


class Node(TypedDict):
    id: str
    kind: Kind
    layer: int
    """-1 for tokens, the number of layers for logits"""
    position: Count
    influence: Number
    """on the logits over all paths; for a logit its probability"""
    feature: NotRequired[Count]
    activation: NotRequired[Number]
    token: NotRequired[Count]
    """id in the vocabulary, for tokens and logits"""
    text: NotRequired[str]
    reads: NotRequired[Number]
    """a feature's pre-activation, a logit minus the mean logit: the sum of all edges into it, pruned ones too, and `bias`"""
    bias: NotRequired[Number]


class Edge(NamedTuple):
    source: Count
    """number of the node"""
    target: Count
    value: Number
    """the source's contribution to what the target reads"""
    score: Number
    """share of all that the target reads from nodes of the graph, times the target's influence"""


class GraphFile(TypedDict):
    format: str
    model: str
    fingerprint: str
    transcoders: str
    prompt: str
    ids: list[Count]
    tokens: list[str]
    n_layers: Count
    skip_positions: Count
    n_active: Count
    n_features: Count
    """chosen, before pruning"""
    scores: dict[str, Number]
    settings: dict[str, Any]
    nodes: list[Node]
    edges: list[Edge]
    interventions: list[dict[str, Any]]


@dataclass(frozen=True)
class Place:
    """A node, parsed from its name."""

    kind: Kind
    layer: int
    position: int
    number: int
    """of a feature; for a logit its token"""


def feature_name(layer: int, position: int, feature: int) -> str:
    return f"feature.{layer}.{position}.{feature}"


def parse_node(name: str, n_layers: int, n_positions: int) -> Place:
    """feature.LAYER.POSITION.NUMBER, error.LAYER.POSITION, token.POSITION or logit.TOKEN. Raises `InputError` for other names."""
    kind, *numbers = name.split(".")
    counts = {"feature": 3, "error": 2, "token": 1, "logit": 1}
    if counts.get(kind) == len(numbers) and all(number.isdecimal() for number in numbers):
        layer, position, number = -1, n_positions - 1, 0
        if kind == "feature":
            layer, position, number = map(int, numbers)
        elif kind == "error":
            layer, position = map(int, numbers)
        elif kind == "token":
            position = int(numbers[0])
        else:
            layer, number = n_layers, int(numbers[0])
        if position < n_positions and (layer < n_layers or kind == "logit"):
            return Place(kind, layer, position, number)  # type: ignore[arg-type]
    raise InputError(
        f"expected a node feature.LAYER.POSITION.NUMBER, error.LAYER.POSITION, token.POSITION or logit.TOKEN of {n_layers} layers and "
        f"{n_positions} positions, got {name!r}"
    )


def pruned_nodes(graph: AttributionGraph, pruned: Pruned, ids: list[int], texts: list[str], spell: Any) -> tuple[list[Node], list[Edge]]:
    """Nodes of the pruned graph by layer, and its edges, the highest score first; `spell` returns a token's text."""
    nodes: list[Node] = []
    number_c: dict[int, int] = {}
    n, p = graph.n_features, graph.n_positions

    def add(source: int | None, kind: Kind, name: str, layer: int, position: int, share: float, **more: Any) -> None:
        if source is not None:
            number_c[source] = len(nodes)
        nodes.append({"id": name, "kind": kind, "layer": layer, "position": position, "influence": share, **more})  # type: ignore[typeddict-item]

    share_c = pruned.influence_c.tolist()
    for position, (token, text) in enumerate(zip(ids, texts)):
        c = graph.first_token + position
        add(c, "token", f"token.{position}", -1, position, share_c[c], token=token, text=text)
    columns = [part.tolist() for part in graph.features]
    reads, biases = graph.reads_t.tolist(), graph.bias_t.tolist()
    for c in pruned.kept_c[: graph.first_token].nonzero()[:, 0].tolist():
        if c < n:
            layer, position, feature, value = (column[c] for column in columns)
            more = {"feature": feature, "activation": value, "reads": reads[c], "bias": biases[c]}
            add(c, "feature", feature_name(layer, position, feature), layer, position, share_c[c], **more)
        else:
            layer, position = divmod(c - n, p)
            add(c, "error", f"error.{layer}.{position}", layer, position, share_c[c])
    first_logit = len(nodes)
    for t, (token, probability) in enumerate(zip(graph.token_t.tolist(), graph.probability_t.tolist()), n):
        more = {"token": token, "text": spell(token), "reads": reads[t], "bias": biases[t]}
        add(None, "logit", f"logit.{token}", graph.n_layers, p - 1, probability, **more)
    edges = []
    for t, c in pruned.kept_tc.nonzero().tolist():
        target = number_c[t] if t < n else first_logit + t - n
        edges.append(Edge(number_c[c], target, float(graph.edge_tc[t, c]), float(pruned.score_tc[t, c])))
    return nodes, sorted(edges, key=lambda edge: -edge.score)


def save_graph(content: GraphFile, path: Path) -> None:
    """Writes the JSON, atomically. Raises `InputError` for a place that cannot be written."""
    write_json(path, content)


def open_graph(path: Path) -> GraphFile:
    """Raises `InputError` for a file that is damaged, of another format or version, or whose edges name nodes that do not exist."""
    content: GraphFile = read_json(path, "an attribution graph", GraphFile)
    if content["format"] != FORMAT:
        raise InputError(f"expected a graph of the format {FORMAT} at {path}, got {content['format']!r}; make it again with this version")
    content["edges"] = [Edge(*edge) for edge in content["edges"]]
    if any(max(edge.source, edge.target) >= len(content["nodes"]) for edge in content["edges"]):
        raise InputError(f"expected edges between the {len(content['nodes'])} nodes of {path}, got one to another; make it again")
    return content


def write_circuit_tracer(content: GraphFile, slug: str, path: Path) -> None:
    """The JSON of one graph for circuit-tracer's viewer (schema version 1): its node names, edges as links."""
    nodes = content["nodes"]
    total = sum(node["influence"] for node in nodes if node["kind"] != "logit") or 1.0
    running, cumulative = 0.0, dict[str, float]()
    for node in sorted(nodes, key=lambda node: -node["influence"]):
        if node["kind"] != "logit":
            running += node["influence"]
            cumulative[node["id"]] = running / total
    first = next(node["id"] for node in nodes if node["kind"] == "logit")
    listed = [_viewer_node(node, content["n_layers"], cumulative.get(node["id"]), node["id"] == first) for node in nodes]
    metadata = {
        "slug": slug,
        "scan": content["transcoders"],
        "transcoder_list": [],
        "prompt_tokens": content["tokens"],
        "prompt": content["prompt"],
        "node_threshold": content["settings"]["node_threshold"],
        "schema_version": 1,
    }
    links = [
        {"source": listed[edge.source]["node_id"], "target": listed[edge.target]["node_id"], "weight": edge.value}
        for edge in content["edges"]
    ]
    shown = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    write_json(path, {"metadata": metadata, "qParams": shown, "nodes": listed, "links": links})


def _viewer_node(node: Node, n_layers: int, influence: float | None, first: bool) -> dict[str, Any]:
    layer, position = node["layer"], node["position"]
    entry: dict[str, Any] = {"ctx_idx": position, "influence": influence, "activation": node.get("activation"), "clerp": ""}
    entry |= {"token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0}
    if node["kind"] == "feature":
        j = node["feature"]
        return entry | {
            "node_id": f"{layer}_{j}_{position}",
            "jsNodeId": f"{layer}_{j}-0",
            "feature": cantor_pair(layer, j),
            "layer": str(layer),
            "feature_type": "cross layer transcoder",
        }
    if node["kind"] == "error":
        names = {"node_id": f"{layer}_-1_{position}", "jsNodeId": f"{layer}_-1-{position}"}
        return entry | names | {"feature": -1, "layer": str(layer), "feature_type": "mlp reconstruction error"}
    token = node["token"]
    if node["kind"] == "token":
        names = {"node_id": f"E_{token}_{position}", "jsNodeId": f"E_{token}-{position}"}
        return entry | names | {"feature": position, "layer": "E", "feature_type": "embedding"}
    names = {"node_id": f"{n_layers + 1}_{token}_{position}", "jsNodeId": f"L_{token}-{position}"}
    said = {"clerp": f'Output "{node["text"]}" (p={node["influence"]:.3f})', "token_prob": node["influence"], "is_target_logit": first}
    return entry | names | said | {"feature": token, "layer": str(n_layers + 1), "feature_type": "logit"}
