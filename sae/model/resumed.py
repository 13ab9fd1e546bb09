"""Passes of one batch that start at a later block: the blocks below run only once.

s sequences · p positions · v vocabulary
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sae.model.language_model import LanguageModel
from sae.model.sites import parse_site


class _Enough(Exception):
    """Unwinds a pass after the last block whose output is kept."""


class Resumed:
    """A batch, with the unedited outputs of the blocks below the lowest of `sites`.

    `logits` runs the other blocks alone, under the edits of the moment, which must be at those sites or above them, and returns every bit
    of `lm.logits`. A model whose blocks pass on more than their outputs is run completely.
    """

    def __init__(self, lm: LanguageModel, ids_sp: Tensor, mask_sp: Tensor | None, sites: Sequence[str]):
        """Raises `InputError` for a site that the model lacks."""
        self.lm, self.ids_sp, self.mask_sp = lm, ids_sp, mask_sp
        count = first_block(lm, sites)
        self._outputs = _outputs(lm, count, ids_sp, mask_sp) if count and can_resume(lm, count, ids_sp[:1, -3:]) else []

    def logits(self) -> Tensor:
        """Next-token logits, [s, p, v]."""
        with _giving(self.lm, self._outputs):
            return self.lm.logits(self.ids_sp, self.mask_sp)


def first_block(lm: LanguageModel, sites: Sequence[str]) -> int:
    """The number of blocks below every edit at the sites, which need not run again. Raises `InputError` as `place` does."""
    first = lm.n_layers
    for site in sites:
        place = lm.place(site)
        inside = next((i for i, block in enumerate(lm.blocks) if any(part is place.module for part in block.modules())), None)
        if inside is None:
            inside = max(parse_site(site).layer, 0)
        elif place.module is lm.blocks[inside] and place.is_output:  # a hook on its output acts on one that was kept, too
            inside += 1
        first = min(first, inside)
    return first


@torch.no_grad()
def can_resume(lm: LanguageModel, count: int, ids_sp: Tensor) -> bool:
    """Whether passes without the first `count` blocks are the same to the bit, tried on a few tokens."""
    with lm.unedited():
        outputs, whole_spv = _outputs(lm, count, ids_sp, None), lm.logits(ids_sp)
        lm.logits(ids_sp[:, :1])  # what blocks leave for one another is now of another pass
        try:
            with _giving(lm, outputs):
                return torch.equal(lm.logits(ids_sp), whole_spv)
        except Exception:  # a model's own code may fail in any way without its blocks
            return False


@torch.no_grad()
def _outputs(lm: LanguageModel, count: int, ids_sp: Tensor, mask_sp: Tensor | None) -> list[Any]:
    """The outputs of the first `count` blocks in an unedited pass."""
    outputs: list[Any] = []

    def keep(_module: nn.Module, _args: tuple, output: Any) -> None:
        outputs.append(_fresh(output))
        if len(outputs) == count:
            raise _Enough

    with ExitStack() as stack:
        stack.enter_context(lm.unedited())
        for block in lm.blocks[:count]:
            stack.callback(block.register_forward_hook(keep).remove)
        with suppress(_Enough):
            lm.logits(ids_sp, mask_sp)
    return outputs


@contextmanager
def _giving(lm: LanguageModel, outputs: Sequence[Any]) -> Iterator[None]:
    """Inside, the first blocks return these outputs without computing anything; hooks on them still run."""
    with ExitStack() as stack:
        stack.enter_context(lm.edited({}))  # compiled code would not see it, and other threads should not
        for block, output in zip(lm.blocks, outputs):
            own = block.__dict__.get("forward")  # as accelerate leaves one
            restore = (setattr, block, "forward", own) if own is not None else (delattr, block, "forward")
            block.forward = lambda *_args, _output=output, **_kwargs: _fresh(_output)  # type: ignore[method-assign]
            stack.callback(*restore)
        yield


def _fresh(output: Any) -> Any:
    """A copy, because blocks may write into what they get."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(_fresh(part) for part in output) if isinstance(output, tuple | list) else output
