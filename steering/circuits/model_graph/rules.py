"""Rules for the backward pass: values keep every bit, gradients are those of a model that is made linear in some places.

The forms are those of the authors' code: github.com/FarnoushRJ/RelP (arXiv 2508.21258) and github.com/corticph/gim (2505.17630). Norms are
those of `sae.model.structure.norms` and attention is the one registered function, so that rules are in force in every family, eager or not.

s sequences · p positions · h heads · g heads of keys and values · q, k positions · z width of a head · c neurons
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.model.hooks import register
from sae.model.language_model import LanguageModel
from sae.model.structure.norms import Norm
from sae.model.structure.places import Place
from steering.circuits.model_graph.hooking import see

RULES = {
    "norms": "a norm's scale is constant",
    "patterns": "attention patterns are constant",
    "activations": "the slope of an activation function a at x is a(x) / x, and 0 at 0",
    "gates": "each factor of a gated MLP's product gets half of its gradient",
    "softmax": "the attention's softmax has the slope that it has at temperature 2, not divided by 2",
    "products": "queries and keys get a quarter of their gradient, values half",
}
RULES_OF = {"relp": ("norms", "patterns", "activations", "gates"), "gim": ("norms", "softmax", "products", "gates")}
"""rules by method of `steering.circuits.finding.scores`"""


class Neurons(NamedTuple):
    """The neurons of one MLP: activation(x), or activation(x) times something else."""

    activation: nn.Module
    place: Place
    """the place where the last projection's input is recorded"""
    gated: bool


@contextmanager
def gradient_rules(lm: LanguageModel, rules: Collection[str], neurons: Sequence[Neurons]) -> Iterator[None]:
    """Inside, gradients of passes follow `rules`, of those in `RULES`; "patterns" leaves nothing for "softmax" to act on.

    `neurons` are those of all blocks, from `find_neurons`; empty where neither "activations" nor "gates" is asked for. The model runs its
    eager attention for the three rules about it. Raises `InputError` for other rules, for a norm whose formula is not known and for an
    attention that cannot be seen.
    """
    if unknown := set(rules) - set(RULES):
        raise InputError(f"expected rules among {', '.join(RULES)}, got {', '.join(sorted(unknown))}")
    with ExitStack() as stack:
        if "norms" in rules:
            stack.enter_context(lm.scales_edited(lambda _, scale: scale.detach()))
        if not {"patterns", "softmax", "products"}.isdisjoint(rules):
            stack.enter_context(lm.attention_edited(partial(_attention, rules)))
        for own in neurons:
            if "activations" in rules:
                stack.callback(own.activation.register_forward_hook(_linearised).remove)
            if "gates" in rules and own.gated:
                stack.callback(register(own.place, lambda raw, _: with_gradient_of(raw, raw / 2)))
        yield


def find_neurons(lm: LanguageModel) -> list[Neurons]:
    """Of each block, by one pass with gradients. Raises `InputError`, with the reason, for a block in which they are not found.

    What the last projection receives has to be y · ∂(its sum)/∂y for the output y of one module without weights: a product, or y itself.
    """
    refused = lm.refused_sites()
    for layer in range(lm.n_layers):
        if reason := refused.get(f"mlp_act.{layer}"):
            raise _refused(lm, layer, reason)
    given: list[list[tuple[nn.Module, Tensor]]] = [[] for _ in range(lm.n_layers)]
    found: dict[int, Neurons] = {}

    def keep(layer: int, module: nn.Module, args: tuple, y: Any) -> Tensor | None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not y.is_floating_point() or x.shape != y.shape or torch.equal(x, y):
            return None  # torch.equal: a dropout
        given[layer].append((module, y.detach().requires_grad_()))
        return given[layer][-1][1]

    def look(layer: int, neurons_spc: Tensor) -> None:
        for module, y in given[layer] if neurons_spc.requires_grad else ():
            (gate,) = torch.autograd.grad(neurons_spc.sum(), y, retain_graph=True, allow_unused=True)
            if gate is not None and gate.shape == neurons_spc.shape and torch.allclose(neurons_spc, y * gate, rtol=1e-2, atol=1e-5):
                found[layer] = Neurons(module, lm.place(f"mlp_act.{layer}"), gated=not bool((gate == 1).all()))

    with lm.unedited(), ExitStack() as stack, torch.enable_grad():
        for layer in range(lm.n_layers):
            for module in lm.place(f"resid_pre.{layer}").module.modules():
                if next(module.children(), None) is None and next(module.parameters(), None) is None:
                    stack.callback(module.register_forward_hook(partial(keep, layer)).remove)
            stack.callback(see(lm.place(f"mlp_act.{layer}"), partial(look, layer)))
        known = lm.model.get_input_embeddings().num_embeddings
        lm.logits((torch.arange(3) + known // 2)[None] % known)
    for layer in range(lm.n_layers):
        if layer not in found:
            raise _refused(lm, layer, "its neurons are not what a module without weights gives, times something or alone")
    return [found[layer] for layer in range(lm.n_layers)]


def with_constant_scale(norm: Norm, x: Tensor) -> Tensor:
    """The norm's output for x under the rule "norms", without the hooks on the norm."""
    scale = norm.scale(x)
    return norm.rescaled(norm.module.forward(x), scale, scale.detach())


def with_gradient_of(value: Tensor, stand_in: Tensor) -> Tensor:
    """`value` to the bit, with the gradient that `stand_in` of the same shape has."""
    return _ValueAndGradient.apply(value, stand_in)


def _attention(rules: Collection[str], _layer: int, pattern_shqk: Tensor, value_sgkz: Tensor) -> tuple[Tensor, Tensor]:
    if "patterns" in rules:
        pattern_shqk = pattern_shqk.detach()
    if "softmax" in rules:
        pattern_shqk = _WarmSoftmax.apply(pattern_shqk)
    if "products" in rules:  # what follows backwards is linear, so that queries and keys get the pattern's quarter
        pattern_shqk = with_gradient_of(pattern_shqk, pattern_shqk / 4)
        value_sgkz = with_gradient_of(value_sgkz, value_sgkz / 2)
    return pattern_shqk, value_sgkz


def _linearised(_module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    x = args[0]
    slope = torch.where(x == 0, torch.zeros_like(y), y / x).detach()
    return with_gradient_of(y, x * slope)


class _ValueAndGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, value: Tensor, stand_in: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _WarmSoftmax(torch.autograd.Function):
    """The pattern; backwards, what the model's own softmax turns into t · (g − Σ g t), t the softmax at temperature 2.

    The softmax takes h to s · (h − Σ h s), so h has to be t · (g − Σ g t) / s; t is √s over its sum.
    """

    @staticmethod
    def forward(ctx: Any, pattern_shqk: Tensor) -> Tensor:
        ctx.save_for_backward(pattern_shqk)
        return pattern_shqk.view_as(pattern_shqk)

    @staticmethod
    def backward(ctx: Any, gradient_shqk: Tensor) -> Tensor:
        (pattern_shqk,) = ctx.saved_tensors
        root_shqk = pattern_shqk.sqrt()
        total_shq1 = root_shqk.sum(-1, keepdim=True)
        mean_shq1 = (gradient_shqk * root_shqk).sum(-1, keepdim=True) / total_shq1
        # t / s = 1 / (√s · its sum); where s is 0 no gradient passes the softmax anyway
        return torch.where(pattern_shqk == 0, 0, (gradient_shqk - mean_shq1) / (root_shqk * total_shq1))


def _refused(lm: LanguageModel, layer: int, reason: str) -> InputError:
    return InputError(
        f"expected an MLP whose activation function can be seen in block {layer} of {lm.name!r}, but {reason}; take another method than "
        f"{' or '.join(RULES_OF)}"
    )
