"""Distributes the runs of a plan over processes: by estimated cost, the largest first, each to the process with the least work."""

from collections.abc import Sequence
from typing import NamedTuple

from sae.kinds import name_of
from sae.training.config import RunConfig
from sae.training.ends import Ends

PRODUCTS = {
    "relu": 1.3,
    "p-annealing": 1.4,
    "topk": 1.6,
    "abstopk": 1.6,
    "batchtopk": 1.4,
    "matryoshka": 2.0,
    "jumprelu": 1.5,
    "gated": 3.0,
}
"""approximate number of encoder products in a step of each kind (benchmarks/README.md); only ratios matter"""


class Load(NamedTuple):
    """The cost of a run, in any unit, and the sites that it reads and writes."""

    cost: float
    sites: tuple[str, ...]


def load_of(config: RunConfig, ends: Ends, first: int) -> Load:
    """The cost from step `first`: multiply-adds of encoder and decoder, times the kind's additional work."""
    widths = (ends.d_in + ends.d_out) / 2
    products = PRODUCTS[name_of(config.kind)] * len(config.kind.values)
    return Load((config.steps - first) * config.batch_size * config.d_sae * widths * products, ends.sites)


def deal(loads: Sequence[Load], world: int) -> list[int]:
    """The process that trains each run; a function of the loads alone.

    Runs of equal cost change places so that those of one site are together, as far as every process keeps its share.
    """
    ranks, busy = [0] * len(loads), [0.0] * world
    for number in sorted(range(len(loads)), key=lambda number: (-loads[number].cost, number)):
        ranks[number] = min(range(world), key=lambda rank: (busy[rank], rank))
        busy[ranks[number]] += loads[number].cost
    for cost in {load.cost for load in loads}:
        alike = [number for number, load in enumerate(loads) if load.cost == cost]
        theirs = sorted(ranks[number] for number in alike)
        for number, rank in zip(sorted(alike, key=lambda number: (loads[number].sites, number)), theirs):
            ranks[number] = rank
    return ranks
