"""Sets a node of a graph to a multiple of its value: the graph's prediction for the nodes after it, and the result of a pass.

p positions · d width of the stream · t targets
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae.errors import InputError
from steering.circuits.attribution.edges import LinearModel, Targets
from steering.circuits.attribution.files import GraphFile, Node, parse_node
from steering.circuits.attribution.replacement import Read

FACTORS = (0.0, -1.0, 2.0)
SHOWN = 10
"""number of features whose change is reported, in addition to all logits"""


class Intervening:
    """Of one graph, with its model and transcoders at its prompt."""

    def __init__(self, linear: LinearModel, content: GraphFile):
        self.linear, self.content = linear, content
        features = linear.features
        keys = zip(features.layer_n.tolist(), features.position_n.tolist(), features.feature_n.tolist())
        self._place = {key: place for place, key in enumerate(keys)}
        self._out: dict[int, list[tuple[int, float]]] = {}
        for edge in content["edges"]:
            self._out.setdefault(edge.source, []).append((edge.target, edge.value))
        self._number = {node["id"]: n for n, node in enumerate(content["nodes"])}
        self._require_same()

    def _require_same(self) -> None:
        for node in self.content["nodes"]:
            if node["kind"] == "feature":
                place = self._place.get((node["layer"], node["position"], node["feature"]))
                value = 0.0 if place is None else float(self.linear.features.value_n[place])
                if abs(value - node["activation"]) > 0.01 * abs(node["activation"]) + 1e-6:
                    raise InputError(
                        f"expected the activation {node['activation']:.4g} of {node['id']}, as in the graph, got {value:.4g}: the "
                        "transcoders are others now; make the graph again"
                    )

    @torch.no_grad()
    def set(self, name: str, factor: float, others: Sequence[str] = ()) -> dict[str, Any]:
        """The node is set to `factor` times its value; of the nodes with the largest edges from it, `others` and all logits:

        | key | change of what the node reads |
        |---|---|
        | `edge` | (factor − 1) times the edge: what the graph says of this one step; 0 without an edge |
        | `direct` | in the linear model, all other activations held |
        | `through` | along all paths of the pruned graph, if features stay active |
        | `replacement` | in the replacement model, features following through their gates; errors, patterns and norms held |
        | `model` | in the model itself, nothing held |

        Raises `InputError` for a node that is not in the graph, and for a logit.
        """
        nodes, model, base = self.content["nodes"], self.linear.model, self.linear.read
        number = self._number_of(name)
        layer, added_pd = self._added(nodes[number], factor)
        embed_pd = model.embed_pd + added_pd if layer < 0 else None
        added = {} if layer < 0 else {layer: added_pd}
        written_lpd = [pd + added[at] if at in added else pd for at, pd in enumerate(model.sources.written_lpd)]
        sources = replace(model.sources, embed_pd=model.embed_pd if embed_pd is None else embed_pd, written_lpd=written_lpd)
        passes = {
            "direct": (model.linear(sources), base),
            "replacement": (model.responding(added, embed_pd), base),
            "model": (model.real(added, embed_pd), model.real({})),
        }
        edge = {target: value * (factor - 1) for target, value in self._out.get(number, [])}
        through = self._along_paths(number, factor)
        strongest = sorted((n for n in edge if nodes[n]["kind"] == "feature"), key=lambda n: -abs(edge[n]))[:SHOWN]
        wanted = [*strongest, *(self._number_of(other) for other in others)]
        wanted += [n for n, node in enumerate(nodes) if node["kind"] == "logit"]
        rows = []
        for n in dict.fromkeys(wanted):
            changes = {key: self._reading(nodes[n], after) - self._reading(nodes[n], before) for key, (after, before) in passes.items()}
            found = {"edge": edge.get(n, 0.0), "through": through.get(n, 0.0)} | changes
            rows.append({"node": nodes[n]["id"]} | {key: found[key] for key in ("edge", "direct", "through", "replacement", "model")})
        return {"node": name, "factor": factor, "changes": rows}

    def _number_of(self, name: str) -> int:
        if name not in self._number:
            parse_node(name, self.content["n_layers"], len(self.content["ids"]))
            raise InputError(f"expected a node of the graph, got {name}, which is not in it; make a graph with more nodes")
        return self._number[name]

    def _added(self, node: Node, factor: float) -> tuple[int, Tensor]:
        """The layer at which something is added to the written output, -1 for the beginning of the stream; and the vector, [p, d]."""
        model, layer, position = self.linear.model, node["layer"], node["position"]
        added_pd = torch.zeros_like(model.embed_pd)
        if node["kind"] == "logit":
            raise InputError(f"expected a feature, an error or a token to intervene at, got the logit {node['id']}")
        if node["kind"] == "token":
            added_pd[position] = model.embed_pd[position]
        elif node["kind"] == "error":
            added_pd[position] = model.error_lpd[layer][position]
        else:
            place = self._place[layer, position, node["feature"]]
            value = self.linear.features.value_n[place]
            added_pd[position] = value * model.transcoders[layer].dictionary.rows([node["feature"]])[0]
        return layer, added_pd * (factor - 1)

    def _along_paths(self, number: int, factor: float) -> dict[int, float]:
        nodes = self.content["nodes"]
        change = dict.fromkeys(range(len(nodes)), 0.0)
        order = sorted(self._out, key=lambda n: nodes[n]["layer"])
        for n in order:
            if n == number:
                share = factor - 1
            elif nodes[n]["kind"] == "feature" and change[n] and nodes[n]["layer"] > nodes[number]["layer"]:
                share = change[n] / nodes[n]["activation"]
            else:
                continue
            for target, value in self._out[n]:
                change[target] += share * value
        return change

    def _reading(self, node: Node, read: Read) -> float:
        device = self.linear.features.layer_n.device
        if node["kind"] == "logit":
            targets = Targets(None, torch.tensor([node["token"]], device=device))
        elif node["kind"] == "feature":
            targets = Targets(torch.tensor([self._place[node["layer"], node["position"], node["feature"]]], device=device))
        else:
            raise InputError(f"expected a feature or a logit whose change is to be seen, got {node['id']}")
        return float(self.linear.readings(targets, read)[0])


def strongest_nodes(content: GraphFile, most: int) -> list[str]:
    """Of the edges with the highest score, the sources that are features, each once."""
    nodes = content["nodes"]
    names = dict.fromkeys(nodes[edge.source]["id"] for edge in content["edges"] if nodes[edge.source]["kind"] == "feature")
    return list(names)[:most]
