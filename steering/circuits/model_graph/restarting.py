"""Passes that start at a later block with a given stream, so that the blocks before it need not run again.

The model's own code still embeds the tokens and makes masks and rotations; a block that is left out only returns the stream.

s sequences · p positions · d width of the stream
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sae.model.hooks import register
from sae.model.language_model import LanguageModel
from steering.circuits.model_graph.hooking import Latest, see

Outputs = Sequence[int]
"""for each block, the number of its outputs in addition to the stream; -1 if it returns only the stream, not in a tuple"""


def find_outputs(lm: LanguageModel, ids_sp: Tensor, rounding: float) -> Outputs | None:
    """By passes over a few tokens; None if the logits differ without the blocks before the last one."""
    found: list[int] = []
    stream, last = Latest(), lm.n_layers - 1

    def note(_module: nn.Module, _args: tuple, output: Any) -> None:
        found.append(len(output) - 1 if isinstance(output, tuple) else -1)

    with lm.unedited(), torch.no_grad():
        with ExitStack() as stack:
            for layer in range(lm.n_layers):
                stack.callback(_block(lm, layer).register_forward_hook(note).remove)
            stack.callback(see(lm.place(f"resid_pre.{last}"), stream))
            whole_spv = lm.logits(ids_sp)
        with begun_at(lm, found, last, stream.value.view(*ids_sp.shape, -1)):
            later_spv = lm.logits(ids_sp)
    same = (later_spv - whole_spv).abs().max() <= rounding * whole_spv.abs().max()  # host sync
    return found if same else None


@contextmanager
def begun_at(lm: LanguageModel, outputs: Outputs, layer: int, stream_spd: Tensor) -> Iterator[None]:
    """Inside, every pass continues from `stream_spd` at block `layer`; at `n_layers`, after the last."""
    with ExitStack() as stack:
        if layer == 0:
            stack.callback(register(lm.place("resid_pre.0"), lambda raw, _: stream_spd.view_as(raw)))
        for earlier in range(layer):
            block = _block(lm, earlier)
            given = stream_spd if outputs[earlier] < 0 else (stream_spd, *[None] * outputs[earlier])
            stack.callback(_restore, block, block.__dict__.get("forward"))
            block.forward = partial(_hand_on, given)
        yield


def _hand_on(given: Any, *_args: Any, **_kwargs: Any) -> Any:
    return given


def _restore(block: nn.Module, before: Any) -> None:
    del block.forward
    if before is not None:
        block.forward = before


def _block(lm: LanguageModel, layer: int) -> nn.Module:
    return lm.place(f"resid_pre.{layer}").module
