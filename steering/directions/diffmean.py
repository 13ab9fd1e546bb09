"""The difference of two means.

n rows (tokens or texts) · d width of the site
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.text_input import text_list
from steering.directions.contrast import contrast_sets, digest, warn_if_uncertain
from steering.directions.texts import activations_of_texts
from steering.vector import SteeringVector


def diffmean(acts_pos_nd: Tensor, acts_neg_nd: Tensor, site: str, provenance: dict[str, Any] | None = None) -> SteeringVector:
    """v = mean(positive) − mean(negative), so that coefficient 1 moves one mean onto the other.

    DiffMean of Marks and Tegmark 2023 (arXiv 2310.06824) and AxBench (Wu et al. 2025); for pairs it is CAA's mean of differences
    (Rimsky et al. 2023, arXiv 2312.06681). `provenance` is added to what is known here: method, counts and a hash of the activations.
    Warns when the sets are tiny or unequal; raises `InputError` for empty ones.
    """
    pos_nd, neg_nd = contrast_sets(acts_pos_nd, acts_neg_nd)

    def direction_of(pos_n: Tensor, neg_n: Tensor) -> Tensor:
        return pos_n @ pos_nd / pos_n.sum() - neg_n @ neg_nd / neg_n.sum()

    warn_if_uncertain(direction_of, len(pos_nd), len(neg_nd))
    known = {"method": "diffmean", "positive": len(pos_nd), "negative": len(neg_nd), "data": digest(pos_nd, neg_nd)}
    return SteeringVector.at(site, pos_nd.mean(0) - neg_nd.mean(0), known | (provenance or {}))


def diffmean_of_texts(
    lm: LanguageModel,
    positive_texts: Sequence[str],
    negative_texts: Sequence[str],
    site: str,
    *,
    tokens: Literal["all", "last"] = "all",
) -> SteeringVector:
    """`diffmean` of the activations of texts: every token counts once ("all", as in AxBench), or only each text's last ("last").

    CAA is "last" with texts that end in the answer's letter. The beginning-of-text token never counts. The direction's uncertainty is
    estimated by resampling whole texts, since tokens of one text are not independent.
    """
    positive_texts, negative_texts = text_list(positive_texts, "positive_texts"), text_list(negative_texts, "negative_texts")
    if not positive_texts or not negative_texts:
        raise InputError(f"expected positive and negative texts, got {len(positive_texts)} and {len(negative_texts)}")
    pos, neg = (activations_of_texts(lm, texts, site, tokens=tokens) for texts in (positive_texts, negative_texts))
    (pos_sum_nd, pos_count_n), (neg_sum_nd, neg_count_n) = (
        (torch.stack([x_nd.sum(0) for x_nd in texts]), torch.tensor([float(len(x_nd)) for x_nd in texts])) for texts in (pos, neg)
    )

    def direction_of(pos_n: Tensor, neg_n: Tensor) -> Tensor:
        return pos_n @ pos_sum_nd / (pos_n @ pos_count_n) - neg_n @ neg_sum_nd / (neg_n @ neg_count_n)

    warn_if_uncertain(direction_of, len(pos), len(neg))
    known = {"method": "diffmean", "model": lm.name, "tokens": tokens, "positive": len(pos), "negative": len(neg)}
    return SteeringVector.at(
        site, torch.cat(pos).mean(0) - torch.cat(neg).mean(0), known | {"data": digest(positive_texts, negative_texts)}
    )
