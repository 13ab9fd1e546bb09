"""The attribution graph of a prompt: its nodes by their influence on the logits, the edges among them, pruning and scores.

Influence, pruning, completeness and replacement score are as circuit-tracer computes them (Ameisen et al. 2025, Circuit Tracing): rows of
edges are divided by the sum of their sizes, A; influence on the logits is w ((I − A)⁻¹ − I), w the logits' probabilities.

n active features · t targets: chosen features, then logits · c sources: chosen features, errors by layer and position, tokens
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae.errors import InputError
from sae.progress import progress
from steering.circuits.attribution.edges import Edges, Features, LinearModel, Targets

SHARE, MOST_LOGITS = 0.95, 10
RANK_EVERY = 128
"""features between two rankings of the remaining ones, for any size of a block"""
EDGES = 4096
"""number of a target's largest edges from features that are kept until all features are chosen"""
HELD = 1 << 29
"""bytes of the gradients of a block"""
MOST_AT_ONCE = 64


@dataclass(frozen=True)
class AttributionGraph:
    """Targets and sources start with the same features, in the same order: by layer, position and number."""

    features: Features
    token_t: Tensor
    """of the logits"""
    probability_t: Tensor
    edge_tc: Tensor
    """also 0 if a target has more than `EDGES` larger ones from features"""
    size_t: Tensor
    """sum over all edges into a target, also from features that were not chosen"""
    reads_t: Tensor
    """a feature's pre-activation, a logit minus the mean logit"""
    bias_t: Tensor
    """what is read if every source is 0, so that reads = sum of all edges + bias"""
    n_layers: int
    n_positions: int
    n_active: int
    """features that were active, chosen or not"""

    @property
    def n_features(self) -> int:
        return len(self.features.layer_n)

    @property
    def first_token(self) -> int:
        """The first source that is a token."""
        return self.n_features + self.n_layers * self.n_positions

    @property
    def weight_t(self) -> Tensor:
        """The weight of each target itself: the probability of a logit."""
        return torch.cat([self.probability_t.new_zeros(self.n_features), self.probability_t])


class Row(NamedTuple):
    layer: int
    place: int
    """among all active features; -1 of a logit"""
    weight: float
    place_m: Tensor
    value_m: Tensor
    rest_e: Tensor
    size: float
    reads: float
    bias: float


def find_graph(linear: LinearModel, max_features: int, *, edges: int = EDGES, at_once: int | None = None) -> AttributionGraph:
    """The logits, and features one after another by their influence through the current graph, up to `max_features`.

    Neither `edges`, if it is larger than what features have, nor `at_once`, the targets of a block, changes the result. Held are
    (targets) × (errors + tokens + edges) numbers and the gradients of a block, `HELD` bytes by default. Raises `InputError` as
    `LinearModel.into` does.
    """
    n, n_layers = len(linear.features.layer_n), len(linear.model.active)
    token_k, probability_k = linear.top_logits(SHARE, MOST_LOGITS)
    at_once = at_once or block_size(linear)
    rows: list[Row] = []
    for low in range(0, len(token_k), at_once):
        part = slice(low, low + at_once)
        found = linear.into(Targets(None, token_k[part]), edges)
        rows += _rows(found, [n_layers] * len(found.size_t), [-1] * len(found.size_t), probability_k[part].tolist())
    chosen_n = torch.zeros(n, dtype=torch.bool)
    wanted = min(max_features, n)
    with progress("edges into features", wanted, "features") as bar:
        while (left := wanted - int(chosen_n.sum())) > 0:
            influence_n = influence_of_all(rows, n, n_layers).masked_fill(chosen_n, -1)
            order_n = influence_n.argsort(descending=True, stable=True)[: min(RANK_EVERY, left)]
            if wanted < n:
                order_n = order_n[influence_n[order_n] > 0]  # those without a path to the logits come in only where all do
            if not len(order_n):
                break
            for place_b in order_n.sort().values.split(at_once):
                found = linear.into(Targets(place_b.to(linear.features.layer_n.device)), edges)
                rows += _rows(found, linear.features.layer_n[place_b].tolist(), place_b.tolist(), [0.0] * len(place_b))
                bar.advance(len(place_b))
            chosen_n[order_n] = True
    return _assembled(linear, rows, chosen_n.nonzero()[:, 0], token_k, probability_k)


def block_size(linear: LinearModel) -> int:
    model = linear.model
    one = (len(model.active) + 1) * model.embed_pd.numel() * torch.finfo(model.embed_pd.dtype).bits // 8
    return max(1, min(MOST_AT_ONCE, HELD // one))


def influence_of_all(rows: list[Row], n: int, n_layers: int) -> Tensor:
    """The influence of every active feature on the logits through the current rows, [n]: from the last layer to the first, since edges only
    go up."""
    influence_n = torch.zeros(n, dtype=torch.float64)
    by_layer: list[list[Row]] = [[] for _ in range(n_layers + 1)]
    for row in rows:
        by_layer[row.layer].append(row)
    for layer in reversed(range(n_layers + 1)):
        for row in by_layer[layer]:
            weight = row.weight if row.place < 0 else float(influence_n[row.place])
            if weight and row.size:
                influence_n.index_add_(0, row.place_m, row.value_m.double().abs() * (weight / row.size))
    return influence_n


def _rows(found: Edges, layers: list[int], places: list[int], weights: list[float]) -> list[Row]:
    place_tm, value_tm, rest_te = (part.cpu() for part in (found.place_tm.int(), found.value_tm, found.rest_te))  # host sync
    parts = (found.size_t.tolist(), found.reads_t.tolist(), found.bias_t.tolist())
    return [
        Row(layer, place, weight, place_tm[i].clone(), value_tm[i].clone(), rest_te[i].clone(), size, reads, bias)
        for i, (layer, place, weight, size, reads, bias) in enumerate(zip(layers, places, weights, *parts))
    ]


def _assembled(linear: LinearModel, rows: list[Row], place_k: Tensor, token_k: Tensor, probability_k: Tensor) -> AttributionGraph:
    n_layers, (p, _) = len(linear.model.active), linear.model.embed_pd.shape
    row_of = {row.place: row for row in rows if row.place >= 0}
    ordered = [row_of[place] for place in place_k.tolist()] + [row for row in rows if row.place < 0]
    column_n = torch.full((len(linear.features.layer_n),), -1)
    column_n[place_k] = torch.arange(len(place_k))
    edge_tc = torch.zeros(len(ordered), len(place_k) + (n_layers + 1) * p, dtype=linear.model.embed_pd.dtype)
    for row, edge_c in zip(ordered, edge_tc):
        column_m = column_n[row.place_m.long()]
        edge_c[column_m[column_m >= 0]] = row.value_m[column_m >= 0]
        edge_c[len(place_k) :] = row.rest_e
    size_t, reads_t, bias_t = (
        torch.tensor([getattr(row, name) for row in ordered], dtype=torch.float64) for name in ("size", "reads", "bias")
    )
    features = Features(*(part[place_k.to(part.device)].cpu() for part in linear.features))
    return AttributionGraph(
        features, token_k.cpu(), probability_k.cpu(), edge_tc, size_t, reads_t, bias_t, n_layers, p, len(linear.features.layer_n)
    )


def influence(graph: AttributionGraph, share_tc: Tensor) -> Tensor:
    """The influence of each source on the logits over all paths, [c]; `share_tc` are rows divided by their sums."""
    now_t, total_c = graph.weight_t, torch.zeros(share_tc.shape[1], dtype=torch.float64)
    for _ in range(graph.n_layers + 1):  # no path has more edges
        now_c = now_t @ share_tc
        total_c += now_c
        now_t = torch.cat([now_c[: graph.n_features], torch.zeros_like(graph.probability_t)])
    return total_c


def shares(edge_tc: Tensor) -> Tensor:
    """Absolute values of the rows of edges, divided by their sums; a row of zeros stays."""
    size_tc = edge_tc.double().abs()
    return size_tc / size_tc.sum(1, keepdim=True).clamp(min=1e-10)


class Scores(NamedTuple):
    completeness: float
    """weighted by the influence of nodes on the logits, the share of what they read that does not come from errors; errors and tokens,
    which read nothing, count as complete"""
    replacement: float
    """of the influence of tokens and errors on the logits, the share of the tokens"""
    left_out: float
    """of what nodes read, weighted by their influence, the share from features that are not in the graph, which the other two do not
    count"""


def scores(graph: AttributionGraph) -> Scores:
    """Of the graph before pruning."""
    share_tc = shares(graph.edge_tc)
    influence_c = influence(graph, share_tc)
    error = slice(graph.n_features, graph.first_token)
    out_t = torch.cat([influence_c[: graph.n_features], torch.zeros_like(graph.probability_t)]) + graph.weight_t
    leaves = influence_c[graph.n_features :].sum()
    completeness = (((1 - share_tc[:, error].sum(1)) * out_t).sum() + leaves) / (out_t.sum() + leaves)
    tokens, errors = influence_c[graph.first_token :].sum(), influence_c[error].sum()
    kept_t = graph.edge_tc.double().abs().sum(1) / graph.size_t.clamp(min=1e-10)
    left_out = (1 - kept_t.clamp(max=1)) * out_t
    return Scores(float(completeness), float(tokens / (tokens + errors)), float(left_out.sum() / out_t.sum()))


class Pruned(NamedTuple):
    kept_c: Tensor
    """sources; all tokens are kept, and all logits"""
    kept_tc: Tensor
    """edges"""
    influence_c: Tensor
    """before pruning"""
    score_tc: Tensor
    """of edges: share of what the target reads, times the target's influence, among the nodes that are kept"""


def prune(graph: AttributionGraph, node_threshold: float, edge_threshold: float) -> Pruned:
    """The nodes, and then the edges between them, that together have these shares of the influence; nodes that then lead nowhere are
    removed.

    Raises `InputError` for thresholds that are not shares.
    """
    for name, value in (("node", node_threshold), ("edge", edge_threshold)):
        if not 0 <= value <= 1:
            raise InputError(f"expected a {name} threshold from 0 to 1, the share of the influence that is kept, got {value:g}")
    n = graph.n_features
    influence_c = influence(graph, shares(graph.edge_tc))
    kept_c = influence_c >= _threshold(influence_c, node_threshold)
    kept_c[graph.first_token :] = True
    always_t = torch.ones(len(graph.probability_t), dtype=torch.bool)
    inside_tc = torch.cat([kept_c[:n], always_t])[:, None] & kept_c
    share_tc = shares(torch.where(inside_tc, graph.edge_tc, 0))
    out_t = torch.cat([influence(graph, share_tc)[:n], torch.zeros_like(graph.probability_t)]) + graph.weight_t
    score_tc = share_tc * out_t[:, None]
    kept_tc = score_tc >= _threshold(score_tc.flatten(), edge_threshold)
    while True:
        alive_c = kept_c.clone()
        alive_c[: graph.first_token] &= kept_tc[:, : graph.first_token].any(0)
        alive_c[:n] &= kept_tc[:n].any(1)
        kept_tc &= torch.cat([alive_c[:n], always_t])[:, None] & alive_c
        if torch.equal(alive_c, kept_c):
            return Pruned(kept_c, kept_tc, influence_c, score_tc)
        kept_c = alive_c


def _threshold(score: Tensor, share: float) -> Tensor:
    """The score above which the largest together have this share; never 0, which would keep nodes without influence."""
    sorted_k = score.sort(descending=True).values
    at = int(torch.searchsorted(sorted_k.cumsum(0) / sorted_k.sum(), share))
    return sorted_k[min(at, max(int((sorted_k > 0).sum()) - 1, 0))]
