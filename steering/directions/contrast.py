"""Two contrast sets: checks, warnings, and the uncertainty of the direction between them.

n rows of a set (activations or texts) · d width of the site
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError
from sae.statistics import percentile_interval, resamples

TINY = 16  # rows of a set under which chance may turn the direction far
ROUNDS = 200


def activations(acts_nd: Tensor, what: str = "activations") -> Tensor:
    """Float32 [n, d] on the CPU. Raises `InputError` if there is no row or a number is not finite."""
    if acts_nd.ndim != 2 or 0 in acts_nd.shape:
        raise InputError(f"expected {what} as rows by width with at least one row, got shape {tuple(acts_nd.shape)}")
    acts_nd = acts_nd.detach().cpu().float()  # host sync
    if not torch.isfinite(acts_nd).all():
        raise InputError(f"expected {what} of finite numbers, got some that are infinite or not a number")
    return acts_nd


def contrast_sets(pos_nd: Tensor, neg_nd: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets as `activations` returns them. Raises `InputError` for an empty one or different widths."""
    pos_nd, neg_nd = activations(pos_nd, "positive activations"), activations(neg_nd, "negative activations")
    if pos_nd.shape[1] != neg_nd.shape[1]:
        raise InputError(f"expected both sets of activations to have one width, got {pos_nd.shape[1]} and {neg_nd.shape[1]}")
    return pos_nd, neg_nd


def digest(*data: Tensor | Sequence[str]) -> str:
    """Twelve hexadecimal digits that identify texts or activations."""
    total = hashlib.sha256()
    for part in data:
        if isinstance(part, Tensor):
            total.update(str(tuple(part.shape)).encode() + part.contiguous().numpy().tobytes())
        else:
            total.update("".join(f"{len(text)}:{text}" for text in part).encode())
    return total.hexdigest()[:12]


def cosine_interval(direction_of: Callable[[Tensor, Tensor], Tensor], n_pos: int, n_neg: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the cosine between the direction and those of sets drawn from the same rows with replacement.

    `direction_of` takes how often each row counts, float32 [n_pos] and [n_neg], and returns [d].
    """
    rng = np.random.default_rng(seed)
    full_d = direction_of(torch.ones(n_pos), torch.ones(n_neg))

    def drawn(n: int) -> Tensor:
        return torch.from_numpy(resamples(n, 1, rng)[0].astype(np.float32))

    again_rd = torch.stack([direction_of(drawn(n_pos), drawn(n_neg)) for _ in range(ROUNDS)])
    cosine_r = torch.nn.functional.cosine_similarity(again_rd, full_d[None], dim=-1)
    return percentile_interval(cosine_r.numpy())


def warn_if_uncertain(
    direction_of: Callable[[Tensor, Tensor], Tensor],
    n_pos: int,
    n_neg: int,
    *,
    what: str = "the direction",
    at_most: float = 1.0,
    seed: int = 0,
) -> None:
    """Warns in one sentence when a set has under `TINY` rows or more than `at_most` times those of the other.

    The sentence has `cosine_interval`, which a single row does not have.
    """
    few, many = sorted((n_pos, n_neg))
    if few >= TINY and many <= at_most * few:
        return
    if few == 1:
        warnings.warn(
            f"{n_pos} positive and {n_neg} negative examples: from a single one it is unknown how certain {what} is", stacklevel=3
        )
        return
    said = "few" if few < TINY else "unequally many"
    low, high = cosine_interval(direction_of, n_pos, n_neg, seed)
    warnings.warn(
        f"{said} examples, {n_pos} positive and {n_neg} negative: drawn again from them, {what} has a cosine of {low:.2f} to {high:.2f} "
        "(95 %) with the one that is used",
        stacklevel=3,
    )
