"""How much every node of the sites matters: estimates of how far the metric falls when only this node has its corrupt value.

A node's part of the vector at its site times the metric's gradient there; what a site has is a sum of its nodes, so the scores of a site's
nodes add up to what the site's whole change is worth.

s sequences · p positions · o width of a site · k some features · n nodes of a site
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.progress import Progress
from steering.circuits.features.passes import Line, Nodes, require_aligned, rows_of_pass
from steering.circuits.features.sites import FeatureSite, Split, active
from steering.circuits.tasks.prompts import Prompts

Method = Literal["grad", "ig", "ceap"]
STEPS = 5


class Step(NamedTuple):
    """A gradient, and the change that it is multiplied by."""

    gradient: float
    """the point of the line at which it is taken"""
    begin: float
    end: float
    weight: float = 1.0


class NodeScores(NamedTuple):
    score_sn: Nodes
    """of each site, of each pair, [s, n]; 0 of nodes that never differ"""
    clean_s: Tensor
    corrupt_s: Tensor


def steps_of(method: str, steps: int) -> list[Step]:
    """The steps of a method along the line from clean, 0, to corrupt, 1. Raises `InputError` for other methods and no steps.

    grad: the gradient at the clean run (attribution patching, arXiv 2310.10348). ig: the mean gradient along the line (2403.17806, here in
    the middle of each step). ceap: each step's change times the gradient in its middle, which is conductance (2606.16920).
    """
    if steps < 1:
        raise InputError(f"expected at least one step, got {steps}")
    if method == "grad":
        return [Step(0.0, 0.0, 1.0)]
    if method == "ig":
        return [Step((step + 0.5) / steps, 0.0, 1.0, 1 / steps) for step in range(steps)]
    if method == "ceap":
        return [Step((step + 0.5) / steps, step / steps, (step + 1) / steps) for step in range(steps)]
    raise InputError(f"expected one of the methods grad, ig and ceap, got {method!r}")


def node_scores(
    lm: LanguageModel,
    sites: Sequence[FeatureSite],
    prompts: Prompts,
    method: str = "ceap",
    steps: int = STEPS,
    bar: Progress | None = None,
) -> NodeScores:
    """Scores of every pair. A step is a pass and a pass with its gradient; the dictionaries encode each site once for each point.

    Raises `InputError` as `steps_of` does and for pairs whose sides have different lengths.
    """
    require_aligned(prompts)
    taken, found = steps_of(method, steps), list[NodeScores]()
    for part in parts_of(sites, prompts):
        line = Line(lm, sites, part)
        score_sn: Nodes = [torch.zeros(len(part), site.n_nodes, dtype=site.dictionary.dtype) for site in sites]
        for step in taken:
            for total_sn, value_sn in zip(score_sn, contributions(line, step)):
                total_sn += value_sn.cpu() * step.weight
        ends = (_metric(line, share) for share in (0.0, 1.0))
        found.append(NodeScores([-one_sn for one_sn in score_sn], *ends))
        if bar is not None:
            bar.advance(len(part))
    joined = [torch.cat([one.score_sn[number] for one in found]) for number in range(len(sites))]
    return NodeScores(joined, torch.cat([one.clean_s for one in found]), torch.cat([one.corrupt_s for one in found]))


def parts_of(sites: Sequence[FeatureSite], prompts: Prompts) -> Iterator[Prompts]:
    """The pairs, as many as a pass takes at a time."""
    rows = rows_of_pass(sites, prompts.clean_np.shape[1])
    for start in range(0, len(prompts), rows):
        yield prompts.subset(range(start, min(start + rows, len(prompts))))


def contributions(line: Line, step: Step) -> Nodes:
    """For each site, the contribution of each node's change in the step to the metric of each pair, [s, n], to first order."""
    before, after = line.splits(step.begin), line.splits(step.end)
    _, gradients = line.gradients(step.gradient)
    return [along(*one) for one in zip(line.sites, before, after, gradients)]


def along(site: FeatureSite, before: Split, after: Split, gradient_spo: Tensor) -> Tensor:
    """The change of each node's part along a gradient, summed over positions, [s, n]."""
    change_spf = after.value_spf - before.value_spf
    features_k = active(change_spf)
    worth_spk = gradient_spo @ site.rows(features_k).T
    value_sn = gradient_spo.new_zeros(len(gradient_spo), site.n_nodes)
    value_sn[:, features_k] = (change_spf[..., features_k] * worth_spk).sum(1)
    value_sn[:, site.skip] = ((after.skip_spo - before.skip_spo) * gradient_spo).sum((1, 2))
    value_sn[:, site.error] = ((after.error_spo - before.error_spo) * gradient_spo).sum((1, 2))
    return value_sn


@torch.no_grad()
def _metric(line: Line, share: float) -> Tensor:
    with line.at(share):
        return line.prompts.measure(line.logits()).cpu()


def completeness(sites: Sequence[FeatureSite], scores: NodeScores) -> list[dict[str, Any]]:
    """Of each site, what its features, skip and error account for of the metric's fall from clean to corrupt, as it goes into JSON.

    The whole is 1 at a site of the residual stream if the scores are exact, since all passes through it; elsewhere it is the share of the
    change that passes through the site.
    """
    change = float((scores.clean_s - scores.corrupt_s).double().mean())
    rows = []
    for site, score_sn in zip(sites, scores.score_sn):
        share_n = score_sn.double().mean(0) / change
        shares = {"features": float(share_n[: site.d_sae].sum()), "skip": float(share_n[site.skip]), "error": float(share_n[site.error])}
        rows.append({"site": site.writes, **shares, "all": sum(shares.values()), "residual": site.is_residual})
    return rows
