"""Goals' formulas through autograd: slow, and exact in float64, the reference for every faster path; and the step of a kind without a rule.

b rows (tokens) · d width that is read · o width that is written · f features
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae.objective.rule import Linear, Rule, norms
from sae.objective.step import Goal, Own, Step, Terms, Weights


class L1(NamedTuple):
    """loss = mean over b of ( ‖y_b − ŷ_b‖² + l1 · Σ_f acts_bf ‖W_dec_f‖ ), acts = relu(z)

    The L1 term is weighted by the decoder norms, so that shrinking activations while growing the decoder gains nothing
    (Anthropic, April 2024 update). The norm of a crosscoder's row is the sum of the norms at its sites (Lindsey et al. 2024).
    """

    l1: Tensor
    sites: int = 1

    def loss(self, x_bd: Tensor, y_bo: Tensor | None, weights: Weights, own: Own) -> Terms:
        acts_bf = torch.relu(pre_activations(x_bd, y_bo, weights))
        penalty_b = (acts_bf * norms(weights.W_dec_fd, self.sites)).sum(-1)
        return Terms((squared_error(x_bd, y_bo, acts_bf, weights, own) + self.l1.to(penalty_b.dtype) * penalty_b).mean(), acts_bf)

    def rule(self, weights: Weights, own: Own) -> Rule:
        return Rule(price=Linear(self.l1.to(weights.W_dec_fd.dtype)), sites=self.sites)


def pre_activations(x_bd: Tensor, y_bo: Tensor | None, weights: Weights) -> Tensor:
    """z, [b, f]. An autoencoder subtracts its decoder bias from its input."""
    return (x_bd - weights.b_dec_d if y_bo is None else x_bd) @ weights.W_enc_fd.T + weights.b_enc_f


def written(x_bd: Tensor, acts_bf: Tensor, weights: Weights, own: Own) -> Tensor:
    """ŷ, [b, o]"""
    y_hat_bo = acts_bf @ weights.W_dec_fd + weights.b_dec_d
    return y_hat_bo + x_bd @ own["W_skip_od"].T if "W_skip_od" in own else y_hat_bo


def squared_error(x_bd: Tensor, y_bo: Tensor | None, acts_bf: Tensor, weights: Weights, own: Own) -> Tensor:
    """‖y − ŷ‖², [b]"""
    return (written(x_bd, acts_bf, weights, own) - (x_bd if y_bo is None else y_bo)).square().sum(-1)


@torch.enable_grad()
def formula_step(x_bd: Tensor, y_bo: Tensor | None, weights: Weights, own: Own, goal: Goal, dtype: torch.dtype) -> Step:
    """The step with everything in `dtype` through autograd."""
    x_bd, y_bo = x_bd.detach().to(dtype), None if y_bo is None else y_bo.detach().to(dtype)
    leaves = Weights(*(w.detach().to(dtype).requires_grad_() for w in weights))
    own_leaves = {name: w.detach().to(dtype).requires_grad_() for name, w in own.items()}
    loss, acts_bf = goal.loss(x_bd, y_bo, leaves, own_leaves)
    parameters = [*leaves, *own_leaves.values()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    acts_bf = acts_bf.detach()
    active_bf = acts_bf != 0
    rule = goal.rule(weights, own)
    batch_chooses = rule is not None and rule.over == "batch"
    return Step(
        loss=loss.detach(),
        squared_error=squared_error(x_bd, y_bo, acts_bf, leaves, own_leaves).mean().detach(),
        sparsity=(acts_bf.abs() * norms(leaves.W_dec_fd, rule.sites if rule else 1)).sum(-1).mean().detach(),
        l0=active_bf.sum().to(dtype) / len(x_bd),
        fired_f=active_bf.sum(0),
        gradients=Weights(*found[:4]),
        sparse_share=loss.new_zeros(()),
        threshold=acts_bf[active_bf].min() if batch_chooses and active_bf.any() else loss.new_zeros(()),  # host sync
        own_gradients=dict(zip(own, found[4:])),
    )
