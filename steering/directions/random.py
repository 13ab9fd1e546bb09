"""Controls: directions that are independent of the concept.

n rows of activations · d width of the site
"""

import torch
from torch import Tensor

from sae.errors import InputError
from steering.directions.contrast import activations, contrast_sets, digest
from steering.vector import SteeringVector


def random_direction(d: int, site: str, seed: int, norm: float = 1.0) -> SteeringVector:
    """v = norm · g/‖g‖ with g ~ N(0, I): every direction equally likely."""
    random_d = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return SteeringVector.at(site, norm * random_d / random_d.norm(), {"method": "random", "seed": seed})


def random_in_span(acts_nd: Tensor, site: str, seed: int, norm: float = 1.0) -> SteeringVector:
    """v = norm · (Σ gᵢ aᵢ)/‖Σ gᵢ aᵢ‖ with g ~ N(0, I): a random direction that leans to where the rows do.

    Its covariance before scaling is that of the rows, Σ aᵢ aᵢᵀ: centre them first to leave out their mean. For orthonormal rows it is
    uniform in their span. Raises `InputError` if all rows are zero.
    """
    acts_nd = activations(acts_nd)
    random_d = torch.randn(len(acts_nd), generator=torch.Generator().manual_seed(seed)) @ acts_nd
    if not random_d.norm() > 0:
        raise InputError("expected activations that span at least one direction, got only zeros")
    provenance = {"method": "random_in_span", "seed": seed, "rows": len(acts_nd), "data": digest(acts_nd)}
    return SteeringVector.at(site, norm * random_d / random_d.norm(), provenance)


def shuffled_labels(pos_nd: Tensor, neg_nd: Tensor, site: str, seed: int) -> SteeringVector:
    """The difference of means of a random half of both sets, and the rest: `diffmean` of random labels.

    Half of each set, because labels dealt out without this balance leave some of the difference between the sets in it, with either
    sign: of 20 rows a side that lie far apart, a cosine of 0.8 with `diffmean` is common. Raises `InputError` for sets that cannot be
    halved.
    """
    pos_nd, neg_nd = contrast_sets(pos_nd, neg_nd)
    if len(pos_nd) == len(neg_nd) == 1:
        raise InputError("expected sets of more than one row to shuffle labels between, got one positive and one negative row")
    generator = torch.Generator().manual_seed(seed)
    shuffled = [rows_nd[torch.randperm(len(rows_nd), generator=generator)] for rows_nd in (pos_nd, neg_nd)]
    first_nd, second_nd = (torch.cat(half) for half in zip(*(rows_nd.tensor_split(2) for rows_nd in shuffled)))
    provenance = {
        "method": "shuffled_labels",
        "seed": seed,
        "positive": len(pos_nd),
        "negative": len(neg_nd),
        "data": digest(pos_nd, neg_nd),
    }
    return SteeringVector.at(site, first_nd.mean(0) - second_nd.mean(0), provenance)
