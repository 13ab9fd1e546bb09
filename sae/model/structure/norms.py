"""The norms of a model, found by inspecting one pass of three tokens, and the scales by which they divide.

d width of what a norm takes · x its input [..., d] · scale [..., 1]
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.model.opening.offload import on_hand
from sae.model.structure.places import Ungained, ungained
from sae.model.structure.trace import first_tensor, own

ScaleEdit: TypeAlias = Callable[[str, Tensor], Tensor]
"""gets a norm's name and its scale, [..., 1], and returns the scale to divide by"""


class Norm(NamedTuple):
    """(x − mean) / scale · gain + bias, without the mean for an RMSNorm."""

    module: nn.Module
    formula: Ungained
    bias_d: Tensor
    """in the norm's own dtype; 0 where it has none"""

    def scale(self, x: Tensor) -> Tensor:
        """√(variance + ε), or √(mean square + ε) for an RMSNorm, in float32 or wider."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # as norms compute
        x = x - x.mean(-1, keepdim=True) if self.formula.centred else x
        return (x.pow(2).mean(-1, keepdim=True) + self.formula.eps).sqrt()

    def rescaled(self, y: Tensor, scale: Tensor, new: Tensor) -> Tensor:
        """The output `y` as it is with `new` in place of `scale`; where they are equal, every bit stays."""
        wide = y.to(scale.dtype)
        return (wide + (wide - self.bias_d.to(wide)) * (scale / new - 1)).to(y.dtype)


def find_norms(decoder: nn.Module, run: Callable[[], Any]) -> dict[str, Norm | str]:
    """By name, every norm that the pass of `run` goes through, norms of queries and keys too; a reason where its formula is unknown."""
    found: dict[str, Norm | str] = {}

    def look(name: str) -> Callable:
        def see(module: nn.Module, args: tuple, kwargs: dict, y: Any) -> None:
            _, x = first_tensor(args, kwargs)
            if name in found:
                found[name] = "a pass goes through it more than once"
            elif x is None or not isinstance(y, Tensor) or x.shape != y.shape:
                found[name] = "it does not take one tensor and give one of its shape"
            else:
                x_nd, y_nd = (t.detach().reshape(-1, t.shape[-1]).cpu().double() for t in (x, y))  # host sync
                # some norms compute in float32 for any input
                precision = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
                with on_hand(module):
                    formula, bias = ungained(module, x_nd, y_nd, precision), getattr(module, "bias", None)
                    bias_d = torch.zeros(()) if bias is None else bias.detach().clone()
                found[name] = "it is neither a LayerNorm nor an RMSNorm" if formula is None else Norm(module, formula, bias_d)

        return see

    with ExitStack() as stack:
        for name, module in decoder.named_modules():
            if "norm" in type(module).__name__.lower() and all(weight.ndim < 2 for weight in module.parameters()):
                stack.callback(module.register_forward_hook(own(look(name)), with_kwargs=True).remove)
        run()
    return found


@contextmanager
def scales_edited(norms: Mapping[str, Norm | str], edit: ScaleEdit, name: str) -> Iterator[None]:
    """Inside, every norm divides by what `edit` returns. Raises `InputError` for a model with a norm whose formula is unknown."""
    unknown = {path: reason for path, reason in norms.items() if isinstance(reason, str)}
    if unknown or not norms:
        path, reason = next(iter(unknown.items()), ("the model", "a pass goes through no norm"))
        raise InputError(f"expected {name!r} to have LayerNorms or RMSNorms alone, got {path}: {reason}; leave the norms as they are")

    def divide(path: str, norm: Norm) -> Callable:
        def change(_module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor | None:
            x = first_tensor(args, kwargs)[1]
            assert x is not None
            scale = norm.scale(x)
            new = edit(path, scale)
            return None if new is scale else norm.rescaled(y, scale, new)

        return change

    with ExitStack() as stack:
        for path, norm in norms.items():
            assert isinstance(norm, Norm)
            # ahead of other hooks, so that what is added to a norm's output is not divided as well
            stack.callback(norm.module.register_forward_hook(divide(path, norm), with_kwargs=True, prepend=True).remove)
        yield
