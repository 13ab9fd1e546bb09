"""Circuits by learned masks: a gate on every edge, trained to keep the model's predictions with few edges open.

An edge whose hard-concrete gate is z carries z of what it carries in the clean run and 1 − z of what it carries in the corrupt one, as in
Edge Pruning (arXiv 2406.16778).

s sequences of a batch · r readers · w writers
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sae.errors import InputError
from sae.progress import Progress
from steering.circuits.finding.gates import drawn, opened
from steering.circuits.finding.metrics import top_edges
from steering.circuits.finding.searches import Patching

STEPS = 600
PAIRS = 16
"""pairs of a step"""
LEARNING_RATE = 0.1
MULTIPLIER_RATE = 0.05
SHRINKING = 0.5
"""share of the steps in which the target number of edges falls to the requested one"""
SHORT_LIST = 4
"""multiple of the requested edges: the rank in the order of scores at which a gate starts at log α = 0"""
BEGIN = 3.0
"""initial log α of the largest scores, and minus that of the smallest"""


class Learned(NamedTuple):
    circuit_rw: Tensor
    gate_rw: Tensor
    """log α of every edge"""
    expected: float
    """expected number of open edges at the end, by the gates' probabilities"""
    kl: float
    """mean KL of the circuit's predictions to the model's, in nats"""


def learn_masks(patching: Patching, score_rw: Tensor, n: int, *, steps: int = STEPS, seed: int = 0, bar: Progress | None = None) -> Learned:
    """The `n` edges with the most open gates, those on no path left out.

    Each step samples gates for each pair of a batch and takes one step of Adam on the mean KL to the model's predictions plus
    λ · log(expected number of open edges / number aimed at), that number falling to `n` over the first half of the steps; λ ≥ 0 rises
    while there are too many and falls while there are too few. Gates begin in the order of the absolute scores. All random numbers are
    drawn from `seed`, on the CPU. Held for a step's gradients are several streams for every reader: readers × tokens × width numbers.

    Raises `InputError` for `n` and scores as `top_edges` does, and for scores that are all 0.
    """
    graph, exists_rw = patching.graph, patching.graph.exists_rw
    top_edges(graph, score_rw, n, absolute=True)  # says what is wrong with n or the scores
    gate_rw = _begun(score_rw, exists_rw, n).requires_grad_()
    generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam([gate_rw], lr=LEARNING_RATE)
    begun, multiplier = float(opened(gate_rw.detach())[exists_rw].sum()), 1.0
    for step in range(steps):
        aim = begun * (n / begun) ** min(1.0, step / (SHRINKING * steps))
        pairs = torch.randperm(len(patching.prompts), generator=generator)[: min(PAIRS, patching.batch)]
        z_srw = drawn(gate_rw.expand(len(pairs), -1, -1), generator) * exists_rw
        kl = patching.kl_of_cut(pairs, exists_rw.float() - z_srw).mean()
        excess = (opened(gate_rw)[exists_rw].sum() / aim).log()
        optimizer.zero_grad()
        (kl + multiplier * excess.to(kl.device)).backward()
        optimizer.step()
        multiplier = max(0.0, multiplier + MULTIPLIER_RATE * float(excess.detach()))  # host sync
        if bar is not None:
            bar.advance(1, edges=f"{aim * math.exp(float(excess.detach())):,.0f}", KL=f"{float(kl.detach()):.3f}")
    gate_rw = gate_rw.detach().masked_fill(~exists_rw, -math.inf)
    circuit_rw = top_edges(graph, gate_rw, n, absolute=False)
    return Learned(circuit_rw, gate_rw, float(opened(gate_rw).sum()), patching.kls([circuit_rw])[0])


def _begun(score_rw: Tensor, exists_rw: Tensor, n: int) -> Tensor:
    """Initial log α: the logarithm of the score over that of the edge at the end of the short list."""
    size_rw = score_rw.detach().cpu().float().abs()
    sizes = size_rw[exists_rw].sort(descending=True).values
    if not sizes[0] > 0:
        raise InputError("expected scores of which some are not 0, got only zeros; use another method")
    middle = sizes[min(SHORT_LIST * n, len(sizes)) - 1].clamp(min=sizes[0] * 1e-12)
    return (size_rw / middle).clamp(min=1e-12).log().clamp(-BEGIN, BEGIN)
