"""What a dictionary costs the language model: its loss with the dictionary spliced in, against clean, zero and mean ablation.

Spliced means that the value where the dictionary writes is replaced by its output: by the reconstruction of that value or, with a
transcoder, by what it makes of the value where it reads. Positions of which the activation cache holds no
row (beginning of text, and whatever else it was told to leave out) are left untouched in every arm, since no dictionary is trained on such.
Losses are means over the real next tokens of all sequences.

s sequences · p positions · d model width · v vocabulary · n next tokens
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.progress import progress
from sae.statistics import percentile_interval, resamples

if TYPE_CHECKING:
    from sae.model.language_model import Edit, LanguageModel

ARMS = ("clean", "spliced", "zero", "mean")
LOGITS_BYTES = 64 << 20
"""of one float32 chunk [n, v] of log-probabilities"""
TABLE_BYTES = 1 << 28
"""of the logits of one batch"""
RESAMPLES = 1000


class LanguageModelLoss(NamedTuple):
    sequences: int
    tokens: int
    """next tokens scored"""
    replaced: int
    """positions whose value was replaced, of `sequences` + `tokens`"""
    cross_entropy: dict[str, float]
    """nats per token, for each of "clean", "spliced", "zero", "mean" """
    kl: dict[str, float]
    """KL(clean ‖ arm) in nats per token, for "spliced", "zero", "mean" """
    loss_recovered: float
    """(CE_zero − CE_spliced) / (CE_zero − CE_clean): 1 is no harm done, 0 no better than writing zeros"""
    loss_recovered_interval: tuple[float, float]
    """95 % bootstrap interval over sequences"""
    loss_recovered_mean: float
    """the same with the mean activation in place of zeros, a stronger baseline"""
    loss_recovered_mean_interval: tuple[float, float]
    kl_recovered: float
    """1 − KL_spliced / KL_zero"""


@torch.no_grad()
def language_model_loss(
    lm: "LanguageModel",
    dictionary: Dictionary,
    site: str,
    sequences: Sequence[np.ndarray],
    mean_d: Tensor,
    *,
    replaced: Sequence[np.ndarray],
    batch: int = 8,
    seed: int = 0,
) -> LanguageModelLoss:
    """`sequences` of token ids; `mean_d` replaces activations in the mean arm; `replaced` says of each token whether its position is
    replaced (True) or left as it is.

    Raises `InputError` for sequences without a next token, or a dictionary whose width is not the site's.
    """
    for place, width in ((site, dictionary.d_in), (dictionary.site_out or site, dictionary.d_out)):
        if width != lm.width(place):
            raise InputError(f"expected a dictionary {lm.width(place)} wide for {place} of {lm.name}, got one for {width}")
    rows = [(ids, own) for ids, own in zip(sequences, replaced, strict=True) if len(ids) > 1]
    if not rows:
        raise InputError("expected sequences of at least two tokens to measure the language model's loss on, got none")
    rows.sort(key=lambda row: len(row[0]))  # alike lengths share a batch
    table = 4 * lm.model.config.get_text_config().vocab_size * len(rows[-1][0])  # bytes of one sequence's logits; two of each are held
    batch = max(1, min(batch, TABLE_BYTES // table))
    sums = []
    with progress("language model", len(rows), "sequences") as bar:
        for start in range(0, len(rows), batch):
            sums.append(batch_sums(lm, dictionary, site, rows[start : start + batch], mean_d))
            bar.advance(len(sums[-1]))
    return summarise(np.concatenate(sums), seed)


def batch_sums(
    lm: "LanguageModel", dictionary: Dictionary, site: str, rows: Sequence[tuple[np.ndarray, np.ndarray]], mean_d: Tensor
) -> np.ndarray:
    """Of rows of ids and whether they are replaced, sums over each one's next tokens, float64 [s, 9]: their count, four cross-entropies
    and three KLs (order of `ARMS`); then its replaced positions."""
    shape = len(rows), max(len(ids) for ids, _ in rows)
    ids_sp, mask_sp = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    replaced_sp = torch.zeros(shape, dtype=torch.bool)
    for s, (ids, own) in enumerate(rows):  # padded behind, where a causal model cannot look
        ids_sp[s, : len(ids)], mask_sp[s, : len(ids)] = torch.from_numpy(ids.astype(np.int64)), 1
        replaced_sp[s, : len(ids)] = torch.from_numpy(own)
    ids_sp, mask_sp = ids_sp.to(lm.device), mask_sp.to(lm.device)

    def there(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x_spd: torch.where(replaced_sp.to(x_spd.device)[..., None], function(x_spd).to(x_spd), x_spd)

    out = dictionary.site_out or site
    edits: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
        "spliced": spliced(dictionary, site, there),
        "zero": {out: there(torch.zeros_like)},
        "mean": {out: there(lambda x_spd: mean_d.expand(x_spd.shape))},
    }
    scored_sp = mask_sp[:, 1:].bool()
    targets_n = ids_sp[:, 1:][scored_sp]
    clean_nv = lm.logits(ids_sp, mask_sp)[:, :-1][scored_sp]
    columns = [torch.ones_like(targets_n, dtype=torch.float64), losses(clean_nv, clean_nv, targets_n)[0]]
    kls = []
    for arm in ARMS[1:]:
        with lm.edited(edits[arm]):
            cross_entropy_n, kl_n = losses(lm.logits(ids_sp, mask_sp)[:, :-1][scored_sp], clean_nv, targets_n)
        columns.append(cross_entropy_n)
        kls.append(kl_n)
    per_token_nc = torch.stack([*columns, *kls], dim=1)
    sums_sc = per_token_nc.new_zeros(len(rows), per_token_nc.shape[1])
    sequence_n = torch.arange(len(rows), device=sums_sc.device)[:, None].expand(scored_sp.shape)[scored_sp]
    sums_sc = sums_sc.index_add_(0, sequence_n, per_token_nc).cpu()  # host sync
    return torch.cat([sums_sc, replaced_sp.sum(1, keepdim=True)], dim=1).numpy()


def spliced(dictionary: Dictionary, site: str, there: "Callable[[Edit], Edit]") -> "dict[str, Edit]":
    """Edits that put the dictionary's output where it writes; `there` keeps an edit off the positions that are left as they are."""
    device = dictionary.W_dec_fo.device
    if not dictionary.is_transcoder:
        return {site: there(lambda x_spd: dictionary(x_spd.to(device)))}
    read: list[Tensor] = []

    def note(x_spd: Tensor) -> Tensor:
        read.append(x_spd)
        return x_spd

    def write(_: Tensor) -> Tensor:
        if not read:
            raise InputError(f"the dictionary writes at {dictionary.site_out} before it reads at {site}, so it cannot be spliced in")
        return dictionary(read.pop().to(device))

    return {site: note, str(dictionary.site_out): there(write)}


def losses(logits_nv: Tensor, clean_nv: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the targets and KL(clean ‖ logits), float64 [n]; log-softmax in float32, a chunk of tokens at a time."""
    chunk = max(1, LOGITS_BYTES // (4 * logits_nv.shape[1]))
    cross_entropy, kl = [], []
    for start in range(0, len(logits_nv), chunk):
        part = slice(start, start + chunk)
        log_q_nv, log_p_nv = logits_nv[part].float().log_softmax(-1), clean_nv[part].float().log_softmax(-1)
        cross_entropy.append(-log_q_nv.gather(1, targets_n[part, None])[:, 0].double())
        kl.append((log_p_nv.exp() * (log_p_nv - log_q_nv)).sum(-1, dtype=torch.float64))
    return torch.cat(cross_entropy), torch.cat(kl)


def summarise(sums_sc: np.ndarray, seed: int) -> LanguageModelLoss:
    """Means per token from the sums of `batch_sums`; the intervals draw whole sequences, since tokens of one are not independent."""
    if not np.isfinite(sums_sc).all():
        raise InputError("expected finite losses, found NaN or infinity; check the model and the dictionary")
    totals = sums_sc.sum(0)
    tokens, means = totals[0], totals[1:8] / totals[0]
    cross_entropy, kl = dict(zip(ARMS, means[:4].tolist())), dict(zip(ARMS[1:], means[4:].tolist()))
    rng, n = np.random.default_rng(seed), len(sums_sc)
    drawn_rc = resamples(n, RESAMPLES, rng).astype(np.float64) @ sums_sc
    recovered = {arm: (recovery(totals[1:5], arm), percentile_interval(recovery(drawn_rc[:, 1:5].T, arm))) for arm in ("zero", "mean")}
    return LanguageModelLoss(
        sequences=n,
        tokens=int(tokens),
        replaced=int(totals[8]),
        cross_entropy=cross_entropy,
        kl=kl,
        loss_recovered=float(recovered["zero"][0]),
        loss_recovered_interval=recovered["zero"][1],
        loss_recovered_mean=float(recovered["mean"][0]),
        loss_recovered_mean_interval=recovered["mean"][1],
        kl_recovered=1 - kl["spliced"] / kl["zero"] if kl["zero"] else float("nan"),
    )


def recovery(cross_entropies: np.ndarray, baseline: str) -> np.ndarray:
    """Loss recovered against an arm, from cross-entropies in the order of `ARMS`; NaN where the baseline does no harm."""
    clean, spliced, *_ = cross_entropies
    worst = cross_entropies[ARMS.index(baseline)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(worst == clean, np.nan, (worst - spliced) / (worst - clean))
