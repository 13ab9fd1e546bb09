"""Frames: normalisations that some dictionaries apply to every token before encoding and undo after decoding.

A frame is x' = (x − shift) · scale, with a separate scale and shift for each token. What a feature adds then depends on the token:
its activation times its decoder row, divided by the token's scale.

d width
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-5


class Entered(NamedTuple):
    x_bd: Tensor
    """the token as the encoder reads it"""
    unit_b1: Tensor
    """the size of one unit of the decoder's output in the token's own units"""
    shift_b1: Tensor | None
    """what is added after that"""


class Frame(NamedTuple):
    """ "constant_norm_rescale" and "layer_norm" as SAELens computes them (normalize_activations in cfg.json). "centred" subtracts the mean
    over the width, which TransformerLens folds into the model's weights (center_writing_weights) and raw activations still have.
    """

    kind: Literal["constant_norm_rescale", "layer_norm", "centred"]
    restores: bool = True
    """whether the output is transformed back to the token's units; not for a transcoder, whose output is at another site"""

    def enter(self, x_bd: Tensor) -> Entered:
        if self.kind == "constant_norm_rescale":
            norm_b1 = x_bd.norm(dim=-1, keepdim=True) / x_bd.shape[-1] ** 0.5
            return Entered(x_bd / norm_b1, norm_b1, None)
        mean_b1 = x_bd.mean(dim=-1, keepdim=True)
        centred_bd = x_bd - mean_b1
        if self.kind == "centred":
            return Entered(centred_bd, torch.ones_like(mean_b1), mean_b1)
        std_b1 = centred_bd.std(dim=-1, keepdim=True)
        return Entered(centred_bd / (std_b1 + EPSILON), std_b1, mean_b1)

    def leave(self, y_bd: Tensor, x_bd: Tensor) -> Tensor:
        """The decoder's output in the units of the tokens `x_bd` that were encoded."""
        if not self.restores:
            return y_bd
        _, unit_b1, shift_b1 = self.enter(x_bd)
        y_bd = y_bd * unit_b1
        return y_bd if shift_b1 is None else y_bd + shift_b1
