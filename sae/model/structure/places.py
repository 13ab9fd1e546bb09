"""The place of a site in the modules of one model, and how its value is read from the module's value and written back.

s sequences · p positions · t tokens · d width
"""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

EPSILONS = ("variance_epsilon", "eps", "layer_norm_epsilon", "rms_norm_eps", "layer_norm_eps", "epsilon")  # as norms name theirs
USUAL_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)  # of a norm that keeps it to itself, such as OLMo's


class View(Protocol):
    """A site that is not simply a module's input or output; `received` is the module's first input."""

    def read(self, raw: Tensor, received: Tensor) -> Tensor: ...

    def write(self, raw: Tensor, new: Tensor, received: Tensor) -> Tensor: ...


class Place(NamedTuple):
    """A site in the modules of one model."""

    module: nn.Module
    is_output: bool
    """the site's value is in the module's output, else in an input"""
    width: int
    argument: int | str = 0
    """which input: its position, or its name where it is given by name"""
    view: View | None = None


@dataclass(frozen=True, eq=False)
class Kept:
    """A tensor that the model overwrites later in the pass: the model gets a copy and we keep the original."""

    def read(self, raw: Tensor, received: Tensor) -> Tensor:
        return raw.clone()

    def write(self, raw: Tensor, new: Tensor, received: Tensor) -> Tensor:
        return new.clone()


@dataclass(frozen=True, eq=False)
class Scaled:
    """A tensor that the model multiplies by a constant before it uses it."""

    factor: float

    def read(self, raw: Tensor, received: Tensor) -> Tensor:
        return raw * self.factor

    def write(self, raw: Tensor, new: Tensor, received: Tensor) -> Tensor:
        return raw + (new - raw * self.factor) / self.factor  # what was not changed stays as it was, to the bit


@dataclass(frozen=True, eq=False)
class Columns:
    """Some of the numbers of each vector."""

    index: Tensor

    def read(self, raw: Tensor, received: Tensor) -> Tensor:
        return raw.index_select(-1, self.index)

    def write(self, raw: Tensor, new: Tensor, received: Tensor) -> Tensor:
        return raw.index_copy(-1, self.index, new)


@dataclass(frozen=True, eq=False)
class InPlace:
    """The residual stream inside a block: the block continues with the very tensor that the module gets, so that is what changes."""

    def read(self, raw: Tensor, received: Tensor) -> Tensor:
        return raw.clone()

    def write(self, raw: Tensor, new: Tensor, received: Tensor) -> Tensor:
        return raw.copy_(new)


@dataclass(frozen=True, eq=False)
class Ungained:
    """A norm's output x̂ · gain + bias before gain and bias."""

    centred: bool
    """LayerNorm, which subtracts the mean over d; else RMSNorm"""
    eps: float
    gain_d: Tensor
    bias_d: Tensor

    def read(self, raw: Tensor, received: Tensor) -> Tensor:
        x_spd = received.float() if received.dtype in (torch.float16, torch.bfloat16) else received  # as norms compute
        x_spd = x_spd - x_spd.mean(-1, keepdim=True) if self.centred else x_spd
        return (x_spd * torch.rsqrt(x_spd.pow(2).mean(-1, keepdim=True) + self.eps)).to(raw.dtype)

    def write(self, raw: Tensor, new: Tensor, received: Tensor) -> Tensor:
        return raw + ((new - self.read(raw, received)) * self.gain_d.to(raw.device)).to(raw.dtype)


def ungained(norm: nn.Module, x_td: Tensor, y_td: Tensor, precision: float) -> Ungained | None:
    """The formula by which the norm made `y_td` of `x_td`, both float64; None where it is none of those known here.

    `precision` is the machine epsilon of what the norm computed in.
    """
    weight_d, bias_d = (None if (own := getattr(norm, name, None)) is None else own.detach().cpu().double() for name in ("weight", "bias"))
    bias_d = torch.zeros_like(y_td[0]) if bias_d is None else bias_d
    own_eps = [float(value) for name in EPSILONS if (value := getattr(norm, name, None)) is not None]
    gains = [torch.ones_like(y_td[0])] if weight_d is None else [weight_d, 1 + weight_d]  # Gemma and Nemotron keep gain - 1
    for gain_d in gains:
        for centred, eps in product((False, True), own_eps[:1] or USUAL_EPSILONS):
            view = Ungained(centred, eps, gain_d.float(), bias_d.float())
            made_td = view.read(x_td, x_td) * gain_d
            if ((made_td + bias_d - y_td).abs() <= 8 * precision * (made_td.abs() + bias_d.abs()) + 1e-6).all():
                return view
    return None
