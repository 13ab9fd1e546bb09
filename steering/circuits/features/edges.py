"""Edges between nodes of consecutive dictionaries: the part of the metric that a later node carries because of an earlier one.

The change of node i before, taken through the model between the two sites to the value of node j behind, times what j is worth to the
metric. All of it by gradients at points of the line between the prompts: Σ over positions q of (∂v_j(q) / ∂y) · W_dec_i Δv_i · worth_j(q).
The model between is unchanged; the metric's gradient stops at j, so that a path around the second site is not part of the edge. At a
site of the stream there is none: the edges from a node to all nodes behind add up to the node's own score.

n pairs · c copies of them, one for each node behind · p positions · o, e widths of the sites · u nodes before · j nodes behind
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sae.model.language_model import LanguageModel
from sae.progress import Progress
from steering.circuits.features.files import EdgeRow
from steering.circuits.features.passes import Line, Nodes, rows_of_pass
from steering.circuits.features.scores import STEPS, Step, parts_of, steps_of
from steering.circuits.features.sites import FeatureSite, Split, changed
from steering.circuits.tasks.prompts import Prompts


class _Reached(Exception):
    """Ends a pass at the later site."""


class Between(NamedTuple):
    before: FeatureSite
    behind: FeatureSite
    nodes_u: Tensor
    nodes_j: Tensor
    score_uj: Tensor
    """how much the metric falls along the edge, mean over the pairs"""


def edge_scores(
    lm: LanguageModel,
    sites: Sequence[FeatureSite],
    prompts: Prompts,
    inside: Nodes,
    method: str = "ceap",
    steps: int = STEPS,
    bar: Progress | None = None,
) -> list[Between]:
    """Between each two sites that follow one another, from and to the nodes inside and the skips and errors.

    A node behind costs, for each pair and step, a pass up to its site and a backward pass from there to the site before; as many nodes as a
    pass takes are copies of the pairs in it.
    """
    chosen = [((one_n | special(site)) & site.exists_n).nonzero()[:, 0] for site, one_n in zip(sites, inside)]
    found = []
    for number, (before, behind) in enumerate(pairwise(sites)):
        nodes_u, nodes_j = chosen[number], chosen[number + 1]
        total_uj = torch.zeros(len(nodes_u), len(nodes_j), dtype=torch.float64)
        for part in parts_of(sites, prompts):
            line = Line(lm, sites, part)
            for step in steps_of(method, steps):
                total_uj -= step.weight * _of_step(line, number, nodes_u, nodes_j, step, bar)
        found.append(Between(before, behind, nodes_u, nodes_j, total_uj / len(prompts)))
    return found


def passes_of(sites: Sequence[FeatureSite], prompts: Prompts, inside: Nodes, method: str, steps: int) -> int:
    """How often `edge_scores` advances its bar: later nodes, parts of the pairs and steps."""
    behind = sum(int((one_n | special(site)).sum()) for site, one_n in zip(sites[1:], inside[1:]))
    return behind * len(list(parts_of(sites, prompts))) * len(steps_of(method, steps))


def special(site: FeatureSite) -> Tensor:
    """The skip, if there is one, and the error, bool [n]."""
    found_n = site.exists_n.clone()
    found_n[: site.d_sae] = False
    return found_n


def rows_of_edges(between: Sequence[Between], most: int) -> list[EdgeRow]:
    """The strongest edges, as they go into JSON."""
    rows: list[EdgeRow] = []
    for one in between:
        for u, j in (one.score_uj != 0).nonzero().tolist():
            name = f"{one.before.name(int(one.nodes_u[u]))}->{one.behind.name(int(one.nodes_j[j]))}"
            rows.append({"edge": name, "score": float(one.score_uj[u, j])})
    return sorted(rows, key=lambda row: -abs(row["score"]))[:most]


def _of_step(line: Line, number: int, nodes_u: Tensor, nodes_j: Tensor, step: Step, bar: Progress | None) -> Tensor:
    """Of one step, what the metric rises by along each edge, summed over the pairs, [u, j]."""
    before, after = line.splits(step.begin)[number], line.splits(step.end)[number]
    _, gradients = line.gradients(step.gradient)
    site, total_uj = line.sites[number], torch.zeros(len(nodes_u), len(nodes_j), dtype=torch.float64)
    copies = max(1, rows_of_pass(line.sites, before.error_spo.shape[1]) // len(line.prompts))
    for start in range(0, len(nodes_j), copies):
        part_j = nodes_j[start : start + copies]
        pulled_cnpo = _pulled(line, number, part_j, gradients[number + 1], step.gradient)
        total_uj[:, start : start + copies] = _contracted(site, nodes_u, before, after, pulled_cnpo).double().cpu()
        if bar is not None:
            bar.advance(len(part_j))
    return total_uj


def _pulled(line: Line, number: int, nodes_j: Tensor, gradient_npe: Tensor, share: float) -> Tensor:
    """The gradient of what each node behind is worth with respect to what the site before has, [c, n, p, o]."""
    n, seen = len(line.prompts), dict[str, Tensor]()
    copies = Line(line.lm, line.sites, line.prompts.subset(list(range(n)) * len(nodes_j)))

    def pull(at: int, x_spd: Tensor, y_spo: Tensor) -> Tensor:
        if at == number:
            seen["leaf"] = y_spo.detach().requires_grad_()
            return seen["leaf"].clone()
        if at == number + 1:
            seen["x"], seen["y"] = x_spd, y_spo
            raise _Reached
        return y_spo

    with torch.enable_grad(), suppress(_Reached), copies.at(share), changed(line.lm, line.sites, pull):
        copies.logits()
    with torch.enable_grad():
        behind = line.sites[number + 1]
        worths = torch.stack(list(_worths(behind, behind.split(seen["x"], seen["y"]), nodes_j, gradient_npe)))
        (pulled_spo,) = torch.autograd.grad(worths.sum(), seen["leaf"])
    site = line.sites[number]
    return pulled_spo.to(site.dictionary.W_dec_fo.device, site.dictionary.dtype).unflatten(0, (len(nodes_j), n))


def _worths(site: FeatureSite, split: Split, nodes_j: Tensor, gradient_npe: Tensor) -> Iterator[Tensor]:
    """Of each copy its own node's part along the metric's gradient, a number with a gradient."""
    n = len(gradient_npe)
    for copy, node in enumerate(nodes_j.tolist()):
        own = slice(copy * n, (copy + 1) * n)
        if node < site.d_sae:
            row_e = site.rows(nodes_j[copy : copy + 1])[0]
            yield (split.value_spf[own, :, node] * (gradient_npe @ row_e)).sum()
        else:
            part_spo = split.error_spo if node == site.error else split.skip_spo
            yield (part_spo[own] * gradient_npe).sum()


def _contracted(site: FeatureSite, nodes_u: Tensor, before: Split, after: Split, pulled_cnpo: Tensor) -> Tensor:
    """Each node's change before along the gradients, summed over pairs and positions, [u, c]."""
    features_u = nodes_u[nodes_u < site.d_sae]
    change_npu = (after.value_spf - before.value_spf)[..., features_u]
    of_features_uc = torch.einsum("npu,cnpu->uc", change_npu, pulled_cnpo @ site.rows(features_u).T)
    parts = {site.skip: after.skip_spo - before.skip_spo, site.error: after.error_spo - before.error_spo}
    others = [(pulled_cnpo * parts[node]).sum((1, 2, 3))[None] for node in nodes_u[nodes_u >= site.d_sae].tolist()]
    return torch.cat([of_features_uc, *others])
