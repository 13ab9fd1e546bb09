"""What a dictionary costs the language model: its loss with the dictionary spliced in, against clean, zero and mean ablation.

Spliced means that the value at the dictionary's output site is replaced by its output (splice.py). Positions without a row in the
cache (beginning of text, and others that it leaves out) are not replaced in any arm, since no dictionary is
trained on such. Losses are means over the real next tokens of all sequences.

s sequences · p positions · d model width · v vocabulary · n next tokens
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.evaluation.splice import Splice, require_widths
from sae.pieces import Pieces, results, stretches
from sae.statistics import percentile_interval, resamples

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel

ARMS = ("clean", "spliced", "zero", "mean")
LOGITS_BYTES = 64 << 20
"""of one float32 chunk [n, v] of log-probabilities"""
TABLE_BYTES = 1 << 28
"""of the logits of one batch"""
RESAMPLES = 1000


class Sums(NamedTuple):
    """The sums of `batch_sums` over the next tokens of a sequence, or over several sequences."""

    tokens: np.ndarray
    cross_entropy: np.ndarray
    """[..., 4], in the order of `ARMS`"""
    kl: np.ndarray
    """[..., 3], in the order of `ARMS` without clean"""
    replaced: np.ndarray
    """positions"""

    @classmethod
    def of(cls, sums_xc: np.ndarray) -> "Sums":
        return cls(sums_xc[..., 0], sums_xc[..., 1:5], sums_xc[..., 5:8], sums_xc[..., 8])


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
    """the same with the mean activation instead of zeros, a stronger baseline"""
    loss_recovered_mean_interval: tuple[float, float]
    kl_recovered: float
    """1 − KL_spliced / KL_zero"""


@torch.no_grad()
def language_model_loss(
    lm: "LanguageModel",
    dictionaries: Sequence[Dictionary],
    sequences: Sequence[np.ndarray],
    means: Mapping[str, Tensor],
    *,
    replaced: Sequence[np.ndarray],
    batch: int = 8,
    seed: int = 0,
    made: Pieces | None = None,
) -> LanguageModelLoss:
    """Loss with one dictionary, or with several, spliced in. `sequences` of token ids; `means` [d] by site where they write replace
    its values in the mean arm; `replaced` says of each token whether its position is replaced (True) or left as it is. Other
    processes of `made` share the work.

    Raises `InputError` for sequences without a next token, or a dictionary whose width is not the site's.
    """
    require_widths(lm, dictionaries)
    every = list(batches(lm, sequences, replaced, batch))
    groups = [every[part.start : part.stop] for part in stretches(len(every))]

    def compute(number: int, advance: Callable[[int], None]) -> dict[str, Tensor]:
        sums = []
        for rows in groups[number]:
            sums.append(batch_sums(lm, dictionaries, rows, means))
            advance(len(rows))
        return {"sums_sc": torch.from_numpy(np.concatenate(sums))}

    sizes = [sum(map(len, group)) for group in groups]
    sums = [found["sums_sc"].numpy() for found in results(made, "language model", "sequences", sizes, compute)]
    return summarise(np.concatenate(sums), seed)


def batches(
    lm: "LanguageModel", sequences: Sequence[np.ndarray], replaced: Sequence[np.ndarray], batch: int
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Those of two tokens or more, with which of their positions are replaced, at most `batch` at a time and fewer where their logits
    would be large. Raises `InputError` if there are none."""
    rows = [(ids, own) for ids, own in zip(sequences, replaced, strict=True) if len(ids) > 1]
    if not rows:
        raise InputError("expected sequences of at least two tokens to measure the language model's loss on, got none")
    rows.sort(key=lambda row: len(row[0]))  # alike lengths share a batch
    table = 4 * lm.model.config.get_text_config().vocab_size * len(rows[-1][0])  # bytes of one sequence's logits; two of each are held
    batch = max(1, min(batch, TABLE_BYTES // table))
    for start in range(0, len(rows), batch):
        yield rows[start : start + batch]


def batch_sums(
    lm: "LanguageModel", dictionaries: Sequence[Dictionary], rows: Sequence[tuple[np.ndarray, np.ndarray]], means: Mapping[str, Tensor]
) -> np.ndarray:
    """Of rows of ids and whether they are replaced, the sums over each one's next tokens, float64 [s, 9], which `Sums.of` takes apart."""
    ids_sp, mask_sp, replaced_sp = (t_sp.to(lm.device) for t_sp in padded(rows))

    def there(site: str, x_spd: Tensor, y_spd: Tensor) -> Tensor:
        return torch.where(replaced_sp.to(x_spd.device)[..., None], y_spd, x_spd)

    def constant(site: str, x_spd: Tensor) -> Tensor:
        return there(site, x_spd, means[site].to(x_spd))

    splice = Splice(dictionaries, there)
    edits: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
        "spliced": splice.edits,
        "zero": {site: lambda x_spd: there("", x_spd, torch.zeros_like(x_spd)) for site in splice.writers},
        "mean": {site: partial(constant, site) for site in splice.writers},
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
    return torch.cat([sums_sc, replaced_sp.sum(1, keepdim=True).cpu()], dim=1).numpy()  # host sync


def padded(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and which positions are replaced, each [s, p], padded behind, where a causal model cannot look."""
    shape = len(rows), max(len(ids) for ids, _ in rows)
    ids_sp, mask_sp = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    replaced_sp = torch.zeros(shape, dtype=torch.bool)
    for s, (ids, own) in enumerate(rows):
        ids_sp[s, : len(ids)], mask_sp[s, : len(ids)] = torch.from_numpy(ids.astype(np.int64)), 1
        replaced_sp[s, : len(ids)] = torch.from_numpy(own)
    return ids_sp, mask_sp, replaced_sp


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
    total = Sums.of(sums_sc.sum(0))
    cross_entropy = dict(zip(ARMS, (total.cross_entropy / total.tokens).tolist()))
    kl = dict(zip(ARMS[1:], (total.kl / total.tokens).tolist()))
    rng, n = np.random.default_rng(seed), len(sums_sc)
    drawn = Sums.of(resamples(n, RESAMPLES, rng).astype(np.float64) @ sums_sc)
    recovered = {arm: float(loss_recovered(total.cross_entropy, arm)) for arm in ("zero", "mean")}
    intervals = {arm: percentile_interval(loss_recovered(drawn.cross_entropy, arm)) for arm in recovered}
    return LanguageModelLoss(
        sequences=n,
        tokens=int(total.tokens),
        replaced=int(total.replaced),
        cross_entropy=cross_entropy,
        kl=kl,
        loss_recovered=recovered["zero"],
        loss_recovered_interval=intervals["zero"],
        loss_recovered_mean=recovered["mean"],
        loss_recovered_mean_interval=intervals["mean"],
        kl_recovered=1 - kl["spliced"] / kl["zero"] if kl["zero"] else float("nan"),
    )


def loss_recovered(cross_entropy: np.ndarray, baseline: str) -> np.ndarray:
    """Loss recovered against an arm, from cross-entropies [..., 4] in the order of `ARMS`; NaN if the baseline does no harm."""
    clean, spliced, worst = (cross_entropy[..., ARMS.index(arm)] for arm in ("clean", "spliced", baseline))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(worst == clean, np.nan, (worst - spliced) / (worst - clean))
