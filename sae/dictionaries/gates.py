"""Gates: which pre-activations become activations. At inference, all kinds of dictionaries differ only in the gate.

b rows (tokens) · f features

| kind | gate |
|---|---|
| ReLU with L1, p-annealing | `Threshold()` |
| JumpReLU; BatchTopK and Matryoshka once trained | `Threshold(theta_f)` |
| gated | `Threshold(theta_f)`, by `gated` |
| TopK | `TopK(k)` |
| AbsTopK | `AbsTopK(k)` |
| GroupMax (sparsify) | `GroupMax(k)` |
| TopK without ReLU (circuit-tracer) | `BareTopK(k)` |

A gate is called with pre-activations z [..., f] and may overwrite them. Those that choose k of a row also take z block by block, with the
same result for any blocks: of equal values the feature with the lower number is chosen.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sae.entries import largest
from sae.errors import InputError


class Gate(nn.Module, ABC):
    """The interface of gates. A new kind is a subclass with `forward`, and `of` and `scaled` if they are possible.

    Tensors are parameters: they are saved, cast and part of a dictionary's checksum. Without `scaled`, g(c z) = c g(z) must hold for one
    common factor c above 0.
    """

    signed: ClassVar[bool] = False
    """activations may be negative"""

    @abstractmethod
    def forward(self, z_bf: Tensor) -> Tensor:
        """Activations [..., f], perhaps in the memory of `z_bf`."""

    def of(self, features: Sequence[int] | Tensor | slice) -> "Gate | None":
        """The gate of these features alone, or None if an activation also depends on the others."""
        return None

    def scaled(self, factor_f: Tensor) -> "Gate | None":
        """The gate g' with g'(factor · z) = factor · g(z) for factors above 0, or None if there is no such gate."""
        return None


class Threshold(Gate):
    """z where z > theta, else 0. `theta_f` [f] is at least 0; by default it is 0 everywhere, which is ReLU."""

    def __init__(self, theta_f: Tensor | None = None):
        super().__init__()
        # a threshold below 0 would let negative values through; the published JumpReLU takes the ReLU first
        self.theta_f = None if theta_f is None else nn.Parameter(theta_f.clamp(min=0), requires_grad=False)

    def forward(self, z_bf: Tensor) -> Tensor:
        return z_bf.relu_() if self.theta_f is None else z_bf.masked_fill_(z_bf <= self.theta_f, 0)

    def of(self, features: Sequence[int] | Tensor | slice) -> "Threshold":
        return Threshold(None if self.theta_f is None else self.theta_f[features])

    def scaled(self, factor_f: Tensor) -> "Threshold":
        return Threshold(None if self.theta_f is None else (self.theta_f * factor_f).to(self.theta_f.dtype))


def gated(W_enc_fd: Tensor, r_mag_f: Tensor, b_mag_f: Tensor, b_gate_f: Tensor) -> tuple[Tensor, Threshold]:
    """W_enc and gate of a gated dictionary, whose b_enc is then b_mag (Rajamanoharan et al. 2024, arXiv 2404.16014).

    Exact: x W + b_gate > 0 is e^r x W + b_mag > b_mag − e^r b_gate, a threshold of the magnitude's own pre-activation.
    """
    gain_f = r_mag_f.exp()
    return W_enc_fd * gain_f[:, None], Threshold(b_mag_f - gain_f * b_gate_f)


class Chosen(NamedTuple):
    """The choice of a gate for each row: at most k features, their numbers ascending, and their activations, which may be 0."""

    feature_bk: Tensor
    value_bk: Tensor


class Choice(Gate):
    """Keeps k features of a row, so that an activation also depends on the other features."""

    def __init__(self, k: int):
        super().__init__()
        if k < 1:
            raise InputError(f"expected k of at least 1, got {k}")
        self.k = k

    @abstractmethod
    def choose(self, blocks: Iterable[tuple[int, Tensor]], f: int) -> Chosen:
        """`blocks` yields the number of each block's first feature, and pre-activations [..., features]; `f` features in total."""

    def forward(self, z_bf: Tensor) -> Tensor:
        feature_bk, value_bk = self.choose([(0, z_bf)], z_bf.shape[-1])
        rest_bf = torch.zeros_like(z_bf) if z_bf.requires_grad else z_bf.zero_()  # a gradient needs what was chosen from
        return rest_bf.scatter_(-1, feature_bk, value_bk)

    def extra_repr(self) -> str:
        return f"k={self.k}"


class TopK(Choice):
    """The k largest of a row that are above 0."""

    def choose(self, blocks: Iterable[tuple[int, Tensor]], f: int) -> Chosen:
        best: Chosen | None = None
        for first, z_bf in blocks:
            here_bk = largest(self.size(z_bf), self.k)
            found = Chosen(here_bk + first, z_bf.gather(-1, here_bk))
            if best is not None:  # those of earlier blocks come first, as lower numbers must
                both = Chosen(*(torch.cat(pair, dim=-1) for pair in zip(best, found)))
                kept_bk = largest(self.size(both.value_bk), self.k)
                found = Chosen(*(one.gather(-1, kept_bk) for one in both))
            best = found
        assert best is not None
        return Chosen(best.feature_bk, self.kept(best.value_bk))

    def size(self, z_bf: Tensor) -> Tensor:
        """The values by which features are compared."""
        return z_bf

    def kept(self, value_bk: Tensor) -> Tensor:
        """Activations of the chosen."""
        return value_bk.relu()


class AbsTopK(TopK):
    """The k of a row with the largest absolute value, with their signs (arXiv 2510.00404)."""

    signed = True

    def size(self, z_bf: Tensor) -> Tensor:
        return z_bf.abs()

    def kept(self, value_bk: Tensor) -> Tensor:
        return value_bk


class BareTopK(TopK):
    """The k largest of a row, also those below 0: circuit-tracer's TopK, which has no ReLU."""

    signed = True

    def kept(self, value_bk: Tensor) -> Tensor:
        return value_bk


class GroupMax(Choice):
    """The largest of each of k equal groups of neighbouring features, if it is above 0."""

    def choose(self, blocks: Iterable[tuple[int, Tensor]], f: int) -> Chosen:
        if f % self.k:
            raise InputError(f"expected features that divide into {self.k} groups, got {f}")
        size = f // self.k
        best: Chosen | None = None
        for first, z_bf in blocks:
            if best is None:
                begin_k = torch.arange(0, f, size, device=z_bf.device)
                best = Chosen(begin_k.expand(*z_bf.shape[:-1], -1).clone(), z_bf.new_full((*z_bf.shape[:-1], self.k), -torch.inf))
            end = first + z_bf.shape[-1]
            begins = min(end, -(-first // size) * size)  # the first whole group's, and the end of the last one's
            ends = max(begins, end // size * size)
            for low, high in ((first, begins), (begins, ends), (ends, end)):
                if low < high:
                    groups = slice(low // size, -(-high // size))
                    value_bg, at_bg = z_bf[..., low - first : high - first].unflatten(-1, (groups.stop - groups.start, -1)).max(dim=-1)
                    at_bg += torch.arange(groups.stop - groups.start, device=at_bg.device) * size + low
                    more_bg = (value_bg > best.value_bk[..., groups]) | value_bg.isnan()
                    best.value_bk[..., groups] = torch.where(more_bg, value_bg, best.value_bk[..., groups])
                    best.feature_bk[..., groups] = torch.where(more_bg, at_bg, best.feature_bk[..., groups])
        assert best is not None
        return Chosen(best.feature_bk, best.value_bk.relu())
