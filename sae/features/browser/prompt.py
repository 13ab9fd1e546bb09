"""Which features fire on a typed text: strongest, most unusual, or most useful to the model.

s ablated copies of the text · p positions · d model width · f features · v vocabulary

Three orders, for feature j at position p with activation a:

- by activation: a itself.
- by percentile: the share of the feature's activations in the indexed text that are at most a.
- by effect on the loss: the sum over all later tokens t of −log p(x_t) with the feature taken away at p alone, minus the same sum of the
  unchanged model, in nats. "Taken away" replaces the value h at its output site by h − a·W_dec[j], so that the reconstruction error
  stays. Above 0 the feature helped to predict the following text. The last token has no effect, because nothing follows it.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.entries import Buffers
from sae.errors import InputError
from sae.features.index.reader import FeatureIndex
from sae.model.language_model import LanguageModel
from sae.model.sampling import token_losses
from sae.model.vocabulary import vocabulary

Order = Literal["activation", "percentile", "effect"]
ORDERS: tuple[Order, ...] = ("activation", "percentile", "effect")
MOST_PAIRS = 256  # of feature and position whose effect is measured: one pass of the text for each
LOGITS = 1 << 25  # of the copies that run together: 128 MB


class TokenFeature(NamedTuple):
    """A feature that fires on a token of the text."""

    position: int
    feature: int
    activation: float
    percentile: float
    """0 to 1, in the feature's own distribution; nan for one that never fires in the index"""
    effect: float | None
    """nats; None if it was not measured"""


class Reading(NamedTuple):
    """A text as the model and its dictionary read it."""

    texts: list[str]
    """of every token; joined, the text"""
    losses: list[float | None]
    """nats of every token given those before it; None for a first token with nothing before it"""
    firings: list[list[TokenFeature]]
    """of every token, in the requested order; empty at beginning-of-text, which the index does not scan either"""
    active: int
    """number of pairs of feature and token that fire, among the requested tokens and density"""
    measured: int
    """number of these pairs whose effect was measured"""


class Selection(NamedTuple):
    """Which features of a text are returned, and in what order."""

    order: Order = "activation"
    positions: list[int] | None = None
    """of the tokens, beginning-of-text counted if the model has one; None for all"""
    n: int = 10
    """features of each token"""
    density_max: float | None = None
    """denser features are left out"""
    most_pairs: int = MOST_PAIRS
    """of feature and token whose effect is measured, when effects decide the order"""


class Active(NamedTuple):
    """A feature on a token, before its effect is measured."""

    position: int
    feature: int
    activation: float


@torch.no_grad()
def read_prompt(
    lm: LanguageModel,
    dictionary: Dictionary,
    index: FeatureIndex,
    text: str,
    selection: Selection = Selection(),  # noqa: B008 (it is frozen)
) -> Reading:
    """The selected features of every token of `text`.

    Effects are measured of those pairs of feature and token that add the longest vectors, a·‖W_dec[j]‖. Raises `InputError` for a text
    longer than the context.
    """
    order, positions, n, density_max, most_pairs = selection
    if order not in ORDERS:
        raise InputError(f"expected an order out of {', '.join(ORDERS)}, got {order!r}")
    ids_1p, _ = lm.encode([text])
    if ids_1p.shape[1] > lm.context:
        raise InputError(f"expected at most {lm.context} tokens, the context of {lm.name!r}, got {ids_1p.shape[1]}; shorten the text")
    first = 0 if lm.bos_id is None else 1
    chosen = range(first, ids_1p.shape[1]) if positions is None else {p for p in positions if first <= p < ids_1p.shape[1]}
    site = index.info["site"]
    h_pd = lm.record(ids_1p, [site])[site][0].to(dictionary.W_enc_fd.device)
    row_n, feature_n, value_n = dictionary.entries(h_pd, Buffers())
    if not torch.isfinite(value_n).all():  # host sync
        raise InputError("the dictionary's activations on this text are not finite; its weights or the model's are damaged")
    active = zip(row_n.tolist(), feature_n.tolist(), value_n.float().tolist())  # host sync
    pairs = [Active(p, j, a) for p, j, a in active if p in chosen]
    if density_max is not None:
        pairs = [pair for pair in pairs if index.columns["density"][pair.feature] <= density_max]
    losses_p = _losses(lm, ids_1p)[0]
    effects: dict[tuple[int, int], float] = {}
    if order == "effect":
        unit = dictionary.unit(h_pd)
        units_p = [unit] * len(h_pd) if isinstance(unit, float) else unit[:, 0].float().tolist()  # host sync
        added = [pair._replace(activation=pair.activation * units_p[pair.position]) for pair in pairs if pair.position < len(losses_p)]
        features = sorted({pair.feature for pair in added})
        norms = dict(zip(features, dictionary.rows(features).norm(dim=-1).tolist()))  # host sync
        longest = sorted(added, key=lambda pair: -abs(pair.activation) * norms[pair.feature])[:most_pairs]
        effects = _effects(lm, dictionary, dictionary.site_out or site, ids_1p, losses_p, longest)
    firings: list[list[TokenFeature]] = [[] for _ in range(ids_1p.shape[1])]
    for p, j, a in pairs:
        stored = float(np.float16(abs(a)))  # as the index holds its own
        firings[p].append(TokenFeature(p, j, a, index.percentile(j, stored), effects.get((p, j))))
    size = lm.model.get_input_embeddings().num_embeddings
    return Reading(
        vocabulary(lm.tokenizer, size).texts(ids_1p[0].tolist()),
        [None, *losses_p.tolist()],
        [sorted(found, key=lambda firing: _key(firing, order))[:n] for found in firings],
        len(pairs),
        len(effects),
    )


def _key(firing: TokenFeature, order: Order) -> tuple:
    """The greatest first; of equal ones the stronger, then the lower number."""
    value = -np.inf if firing.effect is None else firing.effect
    first = {"activation": abs(firing.activation), "percentile": np.nan_to_num(firing.percentile, nan=2.0), "effect": value}[order]
    return -first, -abs(firing.activation), firing.feature


def _losses(lm: LanguageModel, ids_sp: Tensor) -> Tensor:
    """Nats of each token but the first, float64 [s, p − 1]."""
    logits_spv = lm.logits(ids_sp)[:, :-1]
    if not torch.isfinite(logits_spv).all():  # host sync
        raise InputError("the model's logits on this text are not finite; its weights are damaged or its number format is too narrow")
    return token_losses(logits_spv, ids_sp[:, 1:]).double().cpu()


def _effects(
    lm: LanguageModel, dictionary: Dictionary, site: str, ids_1p: Tensor, losses_p: Tensor, pairs: list[Active]
) -> dict[tuple[int, int], float]:
    """(position, feature) -> nats by which the later tokens' loss rises without the feature there; `site`: the dictionary's output site."""
    length = ids_1p.shape[1]
    vocabulary_size = lm.model.get_output_embeddings().weight.shape[0]
    size = max(1, LOGITS // (length * vocabulary_size))
    effects = {}
    for low in range(0, len(pairs), size):
        part = pairs[low : low + size]
        row_s, position_s = torch.arange(len(part)), torch.tensor([pair.position for pair in part])
        act_s = torch.tensor([pair.activation for pair in part])
        taken_sd = act_s[:, None] * dictionary.rows([pair.feature for pair in part]).float().cpu()

        def without(value_spd: Tensor) -> Tensor:
            changed_spd = value_spd.clone()
            at = (row_s.to(value_spd.device), position_s.to(value_spd.device))  # noqa: B023 (called before the next part)
            changed_spd[at] = (value_spd[at].float() - taken_sd.to(value_spd.device)).to(value_spd)  # noqa: B023
            return changed_spd

        with lm.edited({site: without}):
            changed_sp = _losses(lm, ids_1p.expand(len(part), -1))
        for (p, j, _), changed_p in zip(part, changed_sp):
            effects[p, j] = float((changed_p[p:] - losses_p[p:]).sum())  # losses_p[p] is that of token p + 1
    return effects
