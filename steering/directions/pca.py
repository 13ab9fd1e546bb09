"""Principal components: of the differences between two sets, or of a plain batch of activations.

n rows of activations · k components · d width of the site
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.text_input import text_list
from steering.directions.contrast import TINY, activations, contrast_sets, cosine_interval, digest, warn_if_uncertain
from steering.directions.texts import activations_of_texts
from steering.vector import SteeringVector

FIRST_DROPPED = 4


def pca_of_differences(
    pos_nd: Tensor, neg_nd: Tensor, site: str, provenance: dict[str, Any] | None = None, *, seed: int = 0
) -> SteeringVector:
    """v = u · √mean((dᵢ·u)²), u the first component of [d; −d] for the differences dᵢ = posᵢ − negᵢ of paired rows.

    Stacking both signs makes the mean zero, so that centring does not remove what the differences have in common (as
    steering-vectors' `pca_aggregator`; after Zou et al. 2023, arXiv 2310.01405). u points to where the mean difference does, and
    coefficient 1 is the root mean square of the differences along it. Rows without a partner are left out, with a warning; warns as
    well when pairs are few. `seed` is that of scikit-learn's solver for large inputs.
    """
    pos_nd, neg_nd = contrast_sets(pos_nd, neg_nd)
    pairs = min(len(pos_nd), len(neg_nd))
    difference_nd = pos_nd[:pairs] - neg_nd[:pairs]
    if not difference_nd.any():
        raise InputError("expected pairs that differ, got two equal sets of activations")
    unit_d, share = _first_component(difference_nd, seed)

    def direction_of(count_n: Tensor, _: Tensor) -> Tensor:
        return _first_component(difference_nd.repeat_interleave(count_n.long(), dim=0), seed)[0]

    if len(pos_nd) != len(neg_nd):
        low, high = cosine_interval(direction_of, pairs, pairs)
        warnings.warn(
            f"unequally many examples, {len(pos_nd)} positive and {len(neg_nd)} negative: the first {pairs} of each make the pairs; drawn "
            f"again from them, the direction has a cosine of {low:.2f} to {high:.2f} (95 %) with the one that is used",
            stacklevel=2,
        )
    elif pairs < TINY:
        warn_if_uncertain(direction_of, pairs, pairs)
    projection_n = difference_nd @ unit_d
    known = {
        "method": "pca_of_differences",
        "pairs": pairs,
        "explained_share": share,
        "pairs_agreeing": (projection_n > 0).double().mean().item(),
        "seed": seed,
        "data": digest(pos_nd, neg_nd),
    }
    return SteeringVector.at(site, unit_d * projection_n.square().mean().sqrt(), known | (provenance or {}))


def _first_component(difference_nd: Tensor, seed: int) -> tuple[Tensor, float]:
    """The unit direction of most uncentred variance, pointing to where the mean does, and its share of the squared length."""
    from sklearn.decomposition import PCA

    array = difference_nd.double().numpy()
    pca = PCA(1, random_state=seed).fit(np.concatenate([array, -array]))
    unit_d = torch.from_numpy(pca.components_[0]).float()
    sign = -1.0 if (difference_nd.mean(0) @ unit_d) < 0 else 1.0
    return sign * unit_d, float(pca.explained_variance_ratio_[0])


def principal_directions(
    acts_nd: Tensor, site: str, k: int, provenance: dict[str, Any] | None = None, *, seed: int = 0
) -> list[SteeringVector]:
    """v_i = u_i · √λ_i for the first `k` components of the centred rows: u_i of norm 1, λ_i the variance along it (n − 1 below).

    Coefficient 1 is one standard deviation of the activations. A component has no natural sign: here its largest loading by size is
    positive. Drop each text's first tokens before (`principal_directions_of_texts` does): a few of them are so long that they are the
    first component. The variance and its share are in each provenance. Raises `InputError` for more components than there can be.
    """
    from sklearn.decomposition import PCA

    acts_nd = activations(acts_nd)
    most = min(len(acts_nd) - 1, acts_nd.shape[1])
    if not 1 <= k <= most:
        raise InputError(f"expected 1 to {most} components of {len(acts_nd)} activations of width {acts_nd.shape[1]}, got {k}")
    pca = PCA(k, random_state=seed).fit(acts_nd.double().numpy())
    known = {"method": "principal_direction", "rows": len(acts_nd), "seed": seed, "data": digest(acts_nd)} | (provenance or {})
    vectors = []
    for i, unit_d in enumerate(torch.from_numpy(pca.components_)):
        unit_d = unit_d * unit_d[unit_d.abs().argmax()].sign()
        variance, share = float(pca.explained_variance_[i]), float(pca.explained_variance_ratio_[i])
        vectors.append(
            SteeringVector.at(
                site,
                (unit_d * variance**0.5).float(),
                known | {"component": i + 1, "explained_variance": variance, "explained_share": share},
            )
        )
    return vectors


def principal_directions_of_texts(
    lm: LanguageModel, texts: Sequence[str], site: str, k: int, *, first_dropped: int = FIRST_DROPPED, seed: int = 0
) -> list[SteeringVector]:
    """`principal_directions` of all tokens of the texts after the first `first_dropped` of each (and the beginning-of-text token)."""
    texts = text_list(texts)
    if not texts:
        raise InputError("expected texts to take activations from, got none")
    acts_nd = torch.cat(activations_of_texts(lm, texts, site, first_dropped=first_dropped))
    provenance = {"model": lm.name, "texts": len(texts), "first_dropped": first_dropped, "data": digest(texts)}
    return principal_directions(acts_nd, site, k, provenance, seed=seed)
