"""An attribution graph and interventions at its nodes as tables in the terminal."""

from typing import Any

from sae.html import figure
from steering.circuits.attribution.files import GraphFile, Node

STRONGEST = 12
"""edges that are listed"""
COLUMNS = {
    "edge": "edge × (factor − 1)",
    "direct": "linear model, others held",
    "through": "along the graph's paths",
    "replacement": "replacement model",
    "model": "model itself",
}


def node_label(node: Node, tokens: list[str]) -> str:
    at = f"“{tokens[node['position']]}”"
    if node["kind"] == "logit":
        return f"logit of “{node['text']}”"
    if node["kind"] == "token":
        return f"token {node['position']} {at}"
    what = f"feature {node['feature']}" if node["kind"] == "feature" else "error"
    return f"{what} of layer {node['layer']} at {node['position']} {at}"


def print_graph(content: GraphFile) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, found, nodes = Console(), content["scores"], content["nodes"]
    logits = ", ".join(f"{node['text']!r} {node['influence']:.2f}" for node in nodes if node["kind"] == "logit")
    shown = sum(node["kind"] == "feature" for node in nodes)
    print(f"next token: {logits}")
    print(f"{content['n_active']:,} active features, {content['n_features']:,} in the graph, {shown:,} after pruning")
    print(
        f"completeness {found['completeness']:.2f}, replacement score {found['replacement']:.2f}; from features that are not in the graph: "
        f"{100 * found['left_out']:.2g} % of what nodes read"
    )
    table = Table("from", "to", "edge", title="the strongest edges")
    for edge in content["edges"][:STRONGEST]:
        names = (escape(node_label(nodes[n], content["tokens"])) for n in (edge.source, edge.target))
        table.add_row(*names, figure(edge.value, signed=True))
    console.print(table)
    if content["interventions"]:
        print_intervention(content["interventions"][0], content)


def print_intervention(result: dict[str, Any], content: GraphFile) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    nodes = {node["id"]: node for node in content["nodes"]}
    title = f"{result['node']} set to {result['factor']:g} times its value: change of"
    table = Table("node", *COLUMNS.values(), title=title)
    for row in result["changes"]:
        label = escape(node_label(nodes[row["node"]], content["tokens"]))
        table.add_row(label, *(figure(row[key], signed=True) for key in COLUMNS))
    Console().print(table)
