"""Massive activations: rows whose norm is many times the others', such as sinks of attention at the first tokens (Sun et al. 2024).

A handful can hold half of all squared norm, and then decides the scale, the loss and the FVU of a dictionary.

n rows · d width of a site
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

RATIO = 10.0
"""A row is massive when its norm is more than this many times the median norm (dictionary_learning recommends the same number)."""
POSITIONS = 5  # that are named, of those where massive rows stand


class PoolRows(NamedTuple):
    """The massive rows of one pool; as a plain dictionary it is written into the ledger."""

    split: str
    rows: int
    squared_norm: dict[str, float]
    """of these rows, site by site"""
    all_squared_norm: dict[str, float]
    """of these and all others"""
    positions: list[tuple[int, int]]
    """position in the sequence -> number of these rows"""


def is_massive(norm_n: Tensor, ratio: float | None = None) -> Tensor:
    """bool [n]: norms above `ratio` times their median."""
    return norm_n > (ratio or RATIO) * norm_n.median() if len(norm_n) else torch.zeros(0, dtype=torch.bool)


def share(squared_norm: float, of: float) -> float:
    return squared_norm / of if of else 0.0


def summary(ratio: float | None, pools: Sequence[PoolRows]) -> dict[str, Any]:
    """For a manifest: the number of massive rows, their positions, and their share of the training rows' squared norm."""
    train = [pool for pool in pools if pool.split == "train"]
    shares = {
        site: share(*(sum(getattr(pool, name)[site] for pool in train) for name in ("squared_norm", "all_squared_norm")))
        for site in (train[0].squared_norm if train else ())
    }
    places: Counter[int] = Counter()
    for pool in pools:
        places.update(dict(pool.positions))
    return {
        "above_median": ratio or RATIO,
        "left_out": ratio is not None,
        "rows": {split: sum(pool.rows for pool in pools if pool.split == split) for split in ("train", "held_out")},
        "share_of_squared_norm": shares,
        "positions": [list(place) for place in sorted(places.items(), key=lambda item: (-item[1], item[0]))[:POSITIONS]],
    }


def sentence(found: dict[str, Any], site: str | None = None) -> str | None:
    """A sentence about a `summary`, with the flag that changes it; None if no row was massive."""
    rows = sum(found["rows"].values())
    if not rows:
        return None
    norm = max(value for key, value in found["share_of_squared_norm"].items() if site in (None, key))
    places = ", ".join(f"{position} ({count:,})" for position, count in found["positions"])
    kept = "are left out; --max-norm-ratio None keeps them" if found["left_out"] else "are kept; --max-norm-ratio 10 leaves out such rows"
    return (
        f"{rows:,} row{'s' * (rows > 1)} with norms above {found['above_median']:g} times the median and {norm:.1%} of the training rows' "
        f"squared norm, at positions {places} of the sequences, {kept}"
    )


def sampled(x_nd: Tensor) -> str | None:
    """The same for rows without other information; `x_nd` is a fair sample of them."""
    norm_n = torch.cat([torch.linalg.vector_norm(part.float(), dim=-1) for part in x_nd.split(1 << 12)])
    massive_n, square_n = is_massive(norm_n), norm_n.double().square()
    if not massive_n.any():
        return None
    part = share(float(square_n[massive_n].sum()), float(square_n.sum()))
    return (
        f"{int(massive_n.sum()):,} of {len(norm_n):,} sampled rows have norms above {RATIO:g} times the median and {part:.1%} of all "
        "squared norm; a harvest leaves out such rows by default"
    )
