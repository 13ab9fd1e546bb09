"""Edges into features and logits of the linear model, for blocks of targets at a time: the derivative of what a target reads with respect
to each source, times the source. A block keeps the m largest edges from features of each target, found layer by layer, so that memory does
not grow with targets × features.

l layers · p positions · d width of the stream · t targets of a block · n active features of a layer · m edges kept · e errors and tokens
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sae.errors import InputError
from steering.circuits.attribution.replacement import LocalReplacement, Read, Sources
from steering.circuits.model_graph.engine import ROUNDING


class Features(NamedTuple):
    """All active features of a prompt, by layer, position and number."""

    layer_n: Tensor
    position_n: Tensor
    feature_n: Tensor
    value_n: Tensor


class Targets(NamedTuple):
    """Features, by their index among all active ones; without features, the tokens of logits at the last position."""

    place_t: Tensor | None
    token_t: Tensor | None = None


class Edges(NamedTuple):
    """The edges into each target of a block."""

    place_tm: Tensor
    """of features among all active ones, those with the largest edges first; -1 if there are fewer"""
    value_tm: Tensor
    rest_te: Tensor
    """from the error of each layer and position, and from each token"""
    size_t: Tensor
    """sum of the absolute values of all edges into a target, also those that are not kept"""
    reads_t: Tensor
    """what the target reads: a feature's pre-activation, a logit minus the mean logit"""
    bias_t: Tensor
    """what the target reads if every source is 0"""


class LinearModel:
    """One pass of the linear model with gradients, kept for all blocks."""

    def __init__(self, model: LocalReplacement):
        self.model = model
        counts = [len(active.feature_n) for active in model.active]
        self.starts = torch.tensor([0, *counts]).cumsum(0).tolist()
        layer_n = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        parts = (torch.cat(column) for column in zip(*model.active))
        self.features = Features(layer_n.to(model.embed_pd.device), *parts)
        unembedding = model.unembedding
        if tuple(unembedding.weight.shape[1:]) != tuple(model.own.final_pd.shape[1:]):
            raise InputError(f"expected the unembedding of {model.lm.name!r} to be a linear map of what it gets, found another module")
        self._mean_d = unembedding.weight.mean(0)
        with torch.enable_grad():
            self._leaves = [pd.clone().requires_grad_() for pd in (model.embed_pd, *model.sources.written_lpd)]
            self.read = model.linear(Sources(self._leaves[0], self._leaves[1:]))
        with torch.no_grad():
            nothing_pd = torch.zeros_like(model.embed_pd)
            self._of_nothing = model.linear(Sources(nothing_pd, [nothing_pd] * len(counts)))

    def top_logits(self, share: float, most: int) -> tuple[Tensor, Tensor]:
        """The likeliest next tokens that together have this probability, with a maximum number; and their probabilities."""
        probability_v = self.model.own_logits_v.double().softmax(-1)
        value_k, token_k = probability_v.topk(min(most, len(probability_v)))
        n = int((value_k.cumsum(0) < share).sum()) + 1  # host sync
        return token_k[:n], value_k[:n]

    def readings(self, targets: Targets, read: Read) -> Tensor:
        """What each target reads in a pass, [t]."""
        if targets.token_t is not None:
            unembedding, final_d = self.model.unembedding, read.final_pd[-1]
            reads_t = (unembedding.weight[targets.token_t] - self._mean_d).to(final_d.dtype) @ final_d
            bias = getattr(unembedding, "bias", None)
            return reads_t if bias is None else reads_t + bias[targets.token_t] - bias.mean()
        place_t = targets.place_t
        assert place_t is not None
        reads_t = read.final_pd.new_empty(0)
        layer_t, parts, order = self.features.layer_n[place_t], [], []
        for layer in layer_t.unique().tolist():  # host sync
            here_k = (layer_t == layer).nonzero()[:, 0]
            dictionary, feature_k = self.model.transcoders[layer].dictionary, self.features.feature_n[place_t[here_k]]
            x_kd = dictionary.encoder_input(read.input_lpd[layer])[self.features.position_n[place_t[here_k]]]
            parts.append((dictionary.encoder_rows(feature_k) * x_kd).sum(-1) + dictionary.b_enc_f[feature_k].to(x_kd.dtype))
            order.append(here_k)
        return reads_t if not parts else torch.cat(parts)[torch.cat(order).argsort()]

    def into(self, targets: Targets, m: int) -> Edges:
        """Raises `InputError` if the edges and the bias do not add up to what a target reads, as in a model that is not linear between
        features.

        In memory are the gradients of the block, [t, p, d] for each layer, and the result.
        """
        model = self.model
        with torch.enable_grad():
            reads_t = self.readings(targets, self.read)
            each_tt = torch.eye(len(reads_t), dtype=reads_t.dtype, device=reads_t.device)
            inputs = self._leaves if targets.place_t is None else self._leaves[: 1 + int(self.features.layer_n[targets.place_t].max())]
            found = torch.autograd.grad(reads_t, inputs, each_tt, retain_graph=True, is_grads_batched=True, materialize_grads=True)
        with torch.no_grad():
            t, (p, _) = len(reads_t), model.embed_pd.shape
            rest_te = reads_t.new_zeros(t, (len(model.active) + 1) * p)
            rest_te[:, -p:] = torch.einsum("tpd,pd->tp", found[0], model.embed_pd)
            place_tm, value_tm = (torch.empty(t, 0, dtype=dtype, device=rest_te.device) for dtype in (torch.long, reads_t.dtype))
            size_t, total_t = rest_te.new_zeros(t), rest_te.new_zeros(t)
            for layer, gradient_tpd in enumerate(found[1:]):
                constant_pd = model.error_lpd[layer]
                rest_te[:, layer * p : (layer + 1) * p] = torch.einsum("tpd,pd->tp", gradient_tpd, constant_pd)
                value_tn = self._from_features(layer, gradient_tpd)
                size_t, total_t = size_t + value_tn.abs().sum(1), total_t + value_tn.sum(1)
                here_tn = torch.arange(self.starts[layer], self.starts[layer + 1], device=place_tm.device).expand(t, -1)
                place_tm, value_tm = _largest(torch.cat([place_tm, here_tn], 1), torch.cat([value_tm, value_tn], 1), m)
            bias_t = self.readings(targets, self._of_nothing).to(reads_t.dtype)
            bias_t = bias_t + self._decoder_biases(found)
            size_t, total_t = size_t + rest_te.abs().sum(1), total_t + rest_te.sum(1)
            off_t = (total_t + bias_t - reads_t).abs() / (size_t + bias_t.abs() + reads_t.abs())
            if len(off_t) and not off_t.max() <= ROUNDING.get(model.lm.dtype, max(ROUNDING.values())):  # host sync
                raise InputError(
                    f"expected {model.lm.name!r} to be linear between features once patterns and norms are constant, but edges and bias "
                    f"miss what a target reads by {float(off_t.max()):.2g} of their size; it has parts that are not known here"
                )
        return Edges(place_tm, value_tm, rest_te, size_t, reads_t.detach(), bias_t)

    def _decoder_biases(self, found: tuple[Tensor, ...]) -> Tensor:
        """The contribution of the decoders' biases, [t]: constants that are written with the features, so they are missing in the pass
        without sources."""
        total_t = found[0].new_zeros(len(found[0]))
        for layer, gradient_tpd in enumerate(found[1:]):
            if layer in self.model.transcoders:
                total_t = total_t + gradient_tpd.sum(1) @ self.model.transcoders[layer].dictionary.b_dec_o.to(gradient_tpd.dtype)
        return total_t

    def _from_features(self, layer: int, gradient_tpd: Tensor) -> Tensor:
        """Edges from the layer's active features, [t, n]."""
        (rows_ud, row_n), active = self.model.rows_lud[layer], self.model.active[layer]
        value_tn = gradient_tpd.new_empty(len(gradient_tpd), len(row_n))
        ends = torch.searchsorted(active.position_n, torch.arange(gradient_tpd.shape[1] + 1, device=row_n.device)).tolist()  # host sync
        for position, (low, high) in enumerate(pairwise(ends)):
            if low < high:
                value_tn[:, low:high] = gradient_tpd[:, position] @ rows_ud[row_n[low:high]].T
        return value_tn * active.value_n


def _largest(place_tm: Tensor, value_tm: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m entries of each row with the largest absolute value."""
    if value_tm.shape[1] <= m:
        return place_tm, value_tm
    at_tm = value_tm.abs().topk(m, dim=1).indices
    return place_tm.gather(1, at_tm), value_tm.gather(1, at_tm)
