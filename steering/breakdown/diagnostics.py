"""Changes in a steered pass, as numbers: each function compares tensors of the unsteered and the steered pass, computed in float64.

n tokens · d width · s sequences · h heads · q positions of the pass · k columns so far · v vocabulary · f features · c coefficients
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.evaluation.reconstruction import ReconstructionMetrics

LENS_TOKENS = 10  # of the steered prediction and of the logit lens whose overlap is measured
ROWS = 1024  # of a dictionary's activations that are in memory at once


def rho(coefficient: float, v_d: Tensor, norm: float) -> float:
    """c·‖v‖/‖h‖, the coefficient in units of the stream; `norm` is `typical_norm`. Raises `InputError` for a zero vector."""
    length = float(v_d.double().norm())  # host sync
    if not length > 0:
        raise InputError("expected a steering vector that is not zero, got zeros; its coefficient would mean nothing")
    return coefficient * length / norm


class StreamChange(NamedTuple):
    """Means over tokens; a cosine with a zero vector counts as NaN."""

    norm_ratio: float
    """‖h'‖/‖h‖"""
    norm_ratio_p95: float
    cos_v: float
    """of h' and v"""
    cos_unsteered: float
    """of h' and h"""
    cos_change: float
    """of h' − h and v; 1 if nothing responds to the vector"""


def stream_change(h_nd: Tensor, steered_nd: Tensor, v: Tensor) -> StreamChange:
    """The change of the residual stream at one place; `v` is [d], or one for each token, [n, d]."""
    h_nd, steered_nd, v = h_nd.double(), steered_nd.double(), v.double()
    ratio_n = steered_nd.norm(dim=-1) / h_nd.norm(dim=-1)
    cosines = (_cosine(steered_nd, v), _cosine(steered_nd, h_nd), _cosine(steered_nd - h_nd, v))
    return StreamChange(
        float(ratio_n.mean()), float(ratio_n.quantile(0.95)), *(float(cosine_n.mean()) for cosine_n in cosines)
    )  # host sync


def _cosine(x_nd: Tensor, y_nd: Tensor) -> Tensor:
    return (x_nd * y_nd).sum(-1) / (x_nd.norm(dim=-1) * y_nd.norm(dim=-1))


def norm_gain(scale_n: Tensor, steered_scale_n: Tensor) -> float:
    """Mean of σ(h)/σ(h') at one norm: how much smaller everything except the vector becomes after it."""
    return float((scale_n.double() / steered_scale_n.double()).mean())  # host sync


class WriteChange(NamedTuple):
    """What an attention or an MLP adds to the stream; means over tokens."""

    share: float
    """‖w‖/‖h‖"""
    steered_share: float
    """‖w'‖/‖h'‖"""
    taken_back: float
    """−(w' − w)·v/(c‖v‖²), mean over the tokens that v was added to: the share of the vector that it cancels; 1 undoes the steering, below
    0 it adds to it"""


def write_change(write_nd: Tensor, steered_write_nd: Tensor, h_nd: Tensor, steered_nd: Tensor, added: Tensor) -> WriteChange:
    """The change of the writes to the stream h; `added` is c·v, [d] or one for each token, [n, d]. NaN for `taken_back` if nothing was
    added."""
    write_nd, steered_write_nd, added = write_nd.double(), steered_write_nd.double(), added.double()
    shares = [(w.norm(dim=-1) / h.double().norm(dim=-1)).mean() for w, h in ((write_nd, h_nd), (steered_write_nd, steered_nd))]
    back_n = -((steered_write_nd - write_nd) * added).sum(-1) / added.square().sum(-1)
    return WriteChange(float(shares[0]), float(shares[1]), float(back_n.nanmean()))  # host sync


def token_share(x_nd: Tensor) -> float:
    """tr Cov(x)/E‖x‖² over tokens: the part of a norm's output that depends on the token; 0 if it is the same for all."""
    x_nd = x_nd.double()
    return float((x_nd - x_nd.mean(0)).square().sum() / x_nd.square().sum())  # host sync


def effective_rank(x_nd: Tensor) -> float:
    """exp of the entropy of the shares of ‖x‖² along the singular directions (not centred): 1 when all tokens are parallel."""
    x_nd = x_nd.double()
    gram = x_nd @ x_nd.T if len(x_nd) < x_nd.shape[1] else x_nd.T @ x_nd
    share_k = torch.linalg.eigvalsh(gram).clamp_min(0)  # three times as fast as singular values, which are not needed exactly near 0
    share_k = share_k / share_k.sum()
    return float(torch.special.entr(share_k).sum().exp())  # host sync


class Null(NamedTuple):
    """The effect of steering on tokens without any structure."""

    cos_v: float
    token_share: float
    effective_rank: float


def isotropic_null(rho: float, n: int, d: int, seed: int = 0) -> Null:
    """n tokens h ~ N(0, I) of width d and a vector of length rho·√d: cosine rho/√(1 + rho²), token share 1/(1 + rho²).

    The effective rank, which has no closed form, is that of one drawing behind a LayerNorm without gain.
    """
    generator = torch.Generator().manual_seed(seed)
    h_nd = torch.randn(n, d, generator=generator, dtype=torch.float64)
    v_d = torch.randn(d, generator=generator, dtype=torch.float64)
    x_nd = torch.nn.functional.layer_norm(h_nd + rho * d**0.5 * v_d / v_d.norm(), (d,))
    return Null(rho / (1 + rho**2) ** 0.5, 1 / (1 + rho**2), effective_rank(x_nd))


class AttentionMasses(NamedTuple):
    """For each head, [h] float64, means over the positions that count."""

    entropy_h: Tensor
    """nats"""
    first_h: Tensor
    """mass on each sequence's first token"""
    self_h: Tensor
    """mass on the position itself"""
    steered_h: Tensor
    """mass on steered positions"""


def attention_masses(pattern_shqk: Tensor, real_sk: Tensor, steered_sk: Tensor) -> AttentionMasses:
    """`real_sk` is False for padding, `steered_sk` True where the vector is added; the pass's positions are the last q of the columns."""
    pattern_shqk = pattern_shqk.double()
    q, k = pattern_shqk.shape[2:]
    first_sk = real_sk & (real_sk.cumsum(1) == 1)
    masses = (
        torch.special.entr(pattern_shqk).sum(-1),
        _mass(pattern_shqk, first_sk),
        pattern_shqk.diagonal(offset=k - q, dim1=2, dim2=3),
        _mass(pattern_shqk, steered_sk),
    )
    return AttentionMasses(*(_mean_of_heads(mass_shq, real_sk[:, k - q :]) for mass_shq in masses))


def attention_kl(pattern_shqk: Tensor, steered_shqk: Tensor, real_sk: Tensor) -> Tensor:
    """KL(unsteered ‖ steered) of each head's pattern, nats, [h] float64, mean over the positions that count."""
    p, tiny = pattern_shqk.double(), torch.finfo(torch.float32).tiny  # below it, float32 may have lost the mass
    ratio = p.clamp_min(tiny).log() - steered_shqk.double().clamp_min(tiny).log()
    return _mean_of_heads((p * ratio).sum(-1), real_sk[:, -p.shape[2] :])


def _mass(pattern_shqk: Tensor, chosen_sk: Tensor) -> Tensor:
    return (pattern_shqk * chosen_sk[:, None, None, :]).sum(-1)


def _mean_of_heads(value_shq: Tensor, real_sq: Tensor) -> Tensor:
    return value_shq.transpose(0, 1)[:, real_sq].mean(1)


class LogitChange(NamedTuple):
    """Means over tokens, nats; NaN where logits are not finite."""

    entropy: float
    steered_entropy: float
    kl: float
    """KL(unsteered ‖ steered)"""
    reverse_kl: float
    top1_flips: float
    """share of tokens after which another token is the likeliest"""
    lens_overlap: float
    """Jaccard overlap of the likeliest tokens with those that the logit lens of v raises most"""


def logit_change(logits_nv: Tensor, steered_nv: Tensor, lens_v: Tensor, tokens: int = LENS_TOKENS) -> LogitChange:
    """`lens_v`: what v adds to the logits when it is read as the final stream."""
    log_p_nv, log_q_nv = logits_nv.double().log_softmax(-1), steered_nv.double().log_softmax(-1)
    p_nv, q_nv = log_p_nv.exp(), log_q_nv.exp()
    difference_nv = log_p_nv - log_q_nv
    tokens = min(tokens, len(lens_v))
    raised_v = torch.zeros_like(lens_v, dtype=torch.bool)
    raised_v[lens_v.topk(tokens).indices] = True
    both_n = raised_v[steered_nv.topk(tokens, dim=-1).indices].sum(-1)
    values = (
        -(p_nv * log_p_nv).sum(-1),
        -(q_nv * log_q_nv).sum(-1),
        (p_nv * difference_nv).sum(-1),
        -(q_nv * difference_nv).sum(-1),
        (logits_nv.argmax(-1) != steered_nv.argmax(-1)).double(),
        both_n / (2 * tokens - both_n).double(),
    )
    if not all(logits.sum(dtype=torch.float64).isfinite() for logits in (logits_nv, steered_nv)):  # host sync
        return LogitChange(*[float("nan")] * len(values))
    return LogitChange(*(float(value_n.mean()) for value_n in values))  # host sync


def lens_sharpness(lens_v: Tensor, tokens: int = LENS_TOKENS) -> float:
    """How many standard deviations the tokens that the logit lens of v raises most are above all: whether the vector can be read as words.

    It replaces LAP (arXiv 2604.15557), which is how often the unembedding names the right token from hidden states: LAP needs prompts with
    known answers and belongs to a layer, not to a vector. Compare with the sharpness of a random direction.
    """
    lens_v = lens_v.double()
    return float((lens_v.topk(min(tokens, len(lens_v))).values.mean() - lens_v.mean()) / lens_v.std(correction=0))  # host sync


def kl_slopes(coefficient_c: Sequence[float], kl_c: Sequence[float]) -> np.ndarray:
    """d log KL / d log c between neighbours, float64 [c − 1]: 2 where KL is quadratic, below 2 it saturates, above 2 a plateau ends.

    NaN where a KL is not finite or 0. Raises `InputError` for coefficients that do not rise from above 0.
    """
    c, kl = np.asarray(coefficient_c, np.float64), np.asarray(kl_c, np.float64)
    if c.shape != kl.shape or c.ndim != 1 or not (c > 0).all() or not (np.diff(c) > 0).all():
        raise InputError(f"expected rising coefficients above 0 with one KL each, got {list(coefficient_c)} and {len(kl)} of KL")
    log_kl = np.log(np.where(np.isfinite(kl) & (kl > 0), kl, np.nan))
    return np.diff(log_kl) / np.diff(np.log(c))


class Neutral(NamedTuple):
    """The distribution of the stream on neutral text."""

    mean_d: Tensor
    precision_dd: Tensor
    """inverse of the covariance, shrunk by Ledoit and Wolf's rule"""
    p99: float
    """99 % of the neutral tokens are nearer"""


def fit_neutral(h_nd: Tensor) -> Neutral:
    """Raises `InputError` for fewer than two tokens."""
    from sklearn.covariance import LedoitWolf

    if len(h_nd) < 2:
        raise InputError(f"expected activations of at least 2 neutral tokens, got {len(h_nd)}")
    h_nd = h_nd.double().cpu()  # host sync
    fitted = LedoitWolf().fit(h_nd.numpy())
    neutral = Neutral(torch.from_numpy(fitted.location_), torch.from_numpy(fitted.precision_), 0.0)
    return neutral._replace(p99=float(mahalanobis(h_nd, neutral).quantile(0.99)))


def mahalanobis(h_nd: Tensor, neutral: Neutral) -> Tensor:
    """√((h − mean)ᵀ precision (h − mean)) of each token, [n] float64; near √d on neutral text."""
    centred_nd = h_nd.double().cpu() - neutral.mean_d  # host sync
    return ((centred_nd @ neutral.precision_dd) * centred_nd).sum(-1).clamp_min(0).sqrt()


class DictionaryChange(NamedTuple):
    """Whether a dictionary still describes the stream."""

    fvu: float
    steered_fvu: float
    l0: float
    steered_l0: float
    turnover: float
    """mean over tokens of 1 − Jaccard overlap of the features that are active in either pass"""
    activation_rise: float
    """mean rise of the steered feature's activation, to be compared with what was asked; NaN without a feature"""


@torch.no_grad()
def dictionary_change(dictionary: Dictionary, h_nd: Tensor, steered_nd: Tensor, feature: int | None = None) -> DictionaryChange:
    """For a dictionary that reads and writes the stream. Raises `InputError` for a transcoder, a feature it lacks, or values that are not
    finite."""
    if dictionary.is_transcoder:
        raise InputError("expected a dictionary that reconstructs its input, got a transcoder; give one of the residual stream")
    if feature is not None:
        dictionary.require_feature(feature)
    metrics = [ReconstructionMetrics(dictionary.norms(), dictionary.d_out) for _ in range(2)]
    turnover, rise = 0.0, 0.0
    for h, steered in zip(h_nd.split(ROWS), steered_nd.split(ROWS), strict=True):
        acts_bf, steered_bf = (dictionary.encode(x.to(dictionary.dtype)) for x in (h, steered))
        for metric, x, a in zip(metrics, (h, steered), (acts_bf, steered_bf)):
            metric.add(x, a, dictionary.decode(a, x.to(dictionary.dtype)))
        either_b = ((acts_bf != 0) | (steered_bf != 0)).sum(-1)
        both_b = ((acts_bf != 0) & (steered_bf != 0)).sum(-1)
        turnover += float((1 - both_b / either_b.clamp_min(1)).where(either_b > 0, 0).double().sum())  # host sync
        rise += float("nan") if feature is None else float((steered_bf[:, feature] - acts_bf[:, feature]).double().sum())  # host sync
    before, after = (metric.result() for metric in metrics)
    return DictionaryChange(before.fvu, after.fvu, before.l0, after.l0, turnover / len(h_nd), rise / len(h_nd))
