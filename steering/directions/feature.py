"""The direction of one dictionary feature: by number, found by a word, or chosen by its effect on the output.

s sequences · p positions · d model width · f features · v vocabulary
"""

from collections.abc import Sequence

import torch

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.features.index.lens import folded_unembedding, into_residual, logit_lens
from sae.features.index.reader import FeatureIndex
from sae.model.language_model import LanguageModel
from steering.intervention import DictionaryFeature, steered
from steering.vector import SteeringVector

PROMPT, FACTOR, TOKENS = "From my experience,", 10.0, 20
"""of the output score"""


def feature_direction(dictionary: Dictionary, feature: int, max_activation: float, site: str | None = None) -> SteeringVector:
    """v = a_max · W_dec[feature], so that coefficient 1 adds what the feature adds to a reconstruction at its strongest activation.

    `max_activation` has that activation's sign and is in the dictionary's own units (activations times decoder rows). `site` is needed
    only if the dictionary does not say where it was trained. (Templeton et al. 2024 steer in the same unit, but clamp: they set the
    activation instead of adding to it.) Raises `InputError` for a feature that does not exist or never fires.
    """
    dictionary.require_feature(feature)
    if not abs(max_activation) > 0:
        raise InputError(f"feature {feature} never fires (maximum activation {max_activation}), so it has no strength to steer with")
    if dictionary.frame is not None and dictionary.frame.kind != "centred":
        raise InputError(
            f"feature {feature} adds a vector whose length depends on the token, since its dictionary normalises every token "
            f"({dictionary.frame.kind}); clamp it instead"
        )
    site = dictionary.require_site(site)
    site = str(dictionary.site_out or site)
    provenance = {
        "method": "feature",
        "feature": feature,
        "max_activation": max_activation,
        "model": dictionary.metadata.get("model_name"),
    }
    return SteeringVector.at(site, max_activation * dictionary.rows([feature])[0].float(), provenance)


def first_found(index: FeatureIndex, word: str) -> int:
    """The first feature that the index lists for this word ("one|two" for several)."""
    found = index.search(word, 1)
    if not found:
        raise InputError(f"expected a feature of {index.folder} that fires on {word!r}, found none; try another word")
    return found[0].feature


def by_search_word(index: FeatureIndex, dictionary: Dictionary, word: str) -> SteeringVector:
    """`feature_direction` of `first_found` at its maximum activation in the index."""
    feature = first_found(index, word)
    vector = feature_direction(dictionary, feature, index.feature(feature).maximum, index.info["site"])
    return SteeringVector.at(vector.site, vector.direction_d, vector.provenance | {"search": word})


@torch.no_grad()
def output_scores(
    lm: LanguageModel,
    dictionary: Dictionary,
    features: Sequence[int],
    max_activations: Sequence[float],
    site: str | None = None,
    *,
    prompt: str = PROMPT,
    factor: float = FACTOR,
    tokens: int = TOKENS,
) -> list[float]:
    """S_out = (1 − min rank / |V|) · max p for each feature: how much of its own tokens it makes the model say.

    Rank (0 for the likeliest) and p are over the feature's `tokens` highest logit-lens tokens, in the model's next-token distribution
    after `prompt` while the feature is clamped to `factor` times its maximum activation at every position, everything else in the
    stream kept: h + (factor · max − a_j) · d_j (Arad et al. 2025, arXiv 2505.20063). `max_activations` has one value for each feature.
    """
    if len(features) != len(max_activations) or not features:
        raise InputError(f"expected one maximum activation for each feature, got {len(max_activations)} for {len(features)} features")
    vectors = [feature_direction(dictionary, j, highest, site) for j, highest in zip(features, max_activations)]
    rows_fd = torch.stack([vector.direction_d for vector in vectors])  # with the sign of the strongest activation
    written_fd = into_residual(lm, vectors[0].site, rows_fd)
    unembedding_vd, _ = folded_unembedding(lm)
    lens_fk = torch.from_numpy(logit_lens(written_fd, unembedding_vd, tokens)["top_token_ids"]).long()
    ids_sp, _ = lm.encode([prompt])
    scores = []
    for j, highest, lens_k in zip(features, max_activations, lens_fk):
        with steered(lm, [(DictionaryFeature(dictionary, j, site), factor * highest)], operation="clamp"):
            p_v = lm.logits(ids_sp)[0, -1].float().cpu().softmax(-1)  # host sync
        rank = int((p_v > p_v[lens_k].max()).sum())
        scores.append((1 - rank / len(p_v)) * p_v[lens_k].max().item())
    return scores


def by_output_score(
    lm: LanguageModel,
    dictionary: Dictionary,
    features: Sequence[int],
    max_activations: Sequence[float],
    site: str | None = None,
) -> SteeringVector:
    """`feature_direction` of the feature with the highest of `output_scores`, the first of equal ones; all scores are in its provenance."""
    scores = output_scores(lm, dictionary, features, max_activations, site)
    best = max(range(len(scores)), key=scores.__getitem__)
    vector = feature_direction(dictionary, features[best], max_activations[best], site)
    chosen = {"output_scores": {str(j): score for j, score in zip(features, scores)}, "prompt": PROMPT, "factor": FACTOR, "tokens": TOKENS}
    return SteeringVector.at(vector.site, vector.direction_d, vector.provenance | {"model": lm.name} | chosen)
