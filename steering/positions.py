"""Which positions of a pass are steered, the same with and without a KV cache, for padded batches and single prompts.

s sequences · r rows of a pass (s, or s times beams) · p positions · c columns so far · t positions that a list covers · d width
"""

from collections.abc import Sequence
from numbers import Integral
from typing import TypeAlias

import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel

PLACES = ("all", "prompt", "generated", "last")

Positions: TypeAlias = str | tuple[str, int] | Sequence[int]


def listed_positions(positions: Positions, prompt_length: int | None) -> list[int] | None:
    """The chosen positions; None for a named choice. Raises `InputError` for an invalid choice or one that does not fit the prompt."""
    if prompt_length is not None and not (_is_whole(prompt_length) and prompt_length >= 1):
        raise InputError(f"expected prompt_length, columns of the prompt, of at least 1, got {prompt_length!r}")
    if isinstance(positions, str) and positions in PLACES:
        if positions != "all" and prompt_length is None:
            raise InputError(f'expected prompt_length, columns of the prompt, with positions "{positions}", got none')
        return None
    chosen: list[int] = []
    if isinstance(positions, tuple) and len(positions) == 2 and positions[0] == "first":
        chosen = list(range(positions[1])) if _is_whole(positions[1]) else []
    elif isinstance(positions, Sequence) and all(map(_is_whole, positions)) and len(set(positions)) == len(positions):
        chosen = [int(p) for p in positions]
    if not chosen or min(chosen) < 0:
        names = ", ".join(PLACES)
        raise InputError(f'expected positions to be one of {names}, ("first", n) or a list of different positions, got {positions!r}')
    if prompt_length is not None and max(chosen) >= prompt_length:
        raise InputError(f"expected positions inside the prompt of {prompt_length} columns, got up to {max(chosen)}; give a longer prompt")
    return chosen


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class PositionMask:
    """Which positions of a pass are steered."""

    def __init__(self, lm: LanguageModel, name: str, prompt_length: int | None, listed: list[int] | None):
        self.lm, self.name, self.prompt_length, self.listed = lm, name, prompt_length, listed
        self.listed_t = None if listed is None else _flags(listed, lm.device)

    def of(self, value_rpd: Tensor) -> Tensor | bool:
        """True for all, False for none, or a mask [r, p, 1] that broadcasts over rows."""
        past, length = self.lm.past_length, self.prompt_length
        if past + value_rpd.shape[1] > self.lm.context:
            raise InputError(
                f"expected at most {self.lm.context} positions, the context of {self.lm.name!r}, got {past + value_rpd.shape[1]}"
            )
        if self.name == "all":
            return True
        if length is not None and past >= length:
            return self.name == "generated"
        index_rp, real_rp, last_r1 = self.coordinates(value_rpd)
        in_prompt_rp = real_rp & (index_rp <= last_r1)
        if self.name == "prompt":
            chosen_rp = in_prompt_rp
        elif self.name == "last":
            chosen_rp = real_rp & (index_rp == last_r1)
        elif self.name == "generated":
            chosen_rp = real_rp & (index_rp >= last_r1)
        else:
            listed_t = self.listed_t.to(value_rpd.device)  # type: ignore[union-attr]
            chosen_rp = in_prompt_rp & (index_rp < len(listed_t)) & listed_t[index_rp.clamp(0, len(listed_t) - 1)]
        return chosen_rp[..., None]

    def coordinates(self, value_rpd: Tensor) -> tuple[Tensor, Tensor, Tensor | int]:
        """Each position's number among its row's tokens, whether it is one, and the number of the prompt's last; all on the device.

        That last number is beyond any where the prompt's length was not said.
        """
        past, length, mask = self.lm.past_length, self.prompt_length, self.lm.attention_mask
        columns = slice(past, past + value_rpd.shape[1])
        if mask is None:
            index_rp = torch.arange(columns.start, columns.stop, device=value_rpd.device)[None]
            return index_rp, torch.ones_like(index_rp, dtype=torch.bool), self.lm.context if length is None else length - 1
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < columns.stop:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(
                f'expected an attention mask that shows all {columns.stop} columns so far, to steer elsewhere than at "all", got {got}; '
                "a mask of sequences by positions does, one of a static cache with windows of attention may not"
            )
        real_rc = mask.to(value_rpd.device).bool()
        index_rc = real_rc.cumsum(1) - 1
        last_r1: Tensor | int = self.lm.context
        if length is not None:  # columns that later passes bring are tokens, as they are in a prompt that is padded on the left
            if past and (~real_rc & (index_rc >= 0))[:, past:length].any():  # host sync
                raise InputError("expected a prompt that is read in several passes to be padded on the left, got padding after tokens")
            last_r1 = real_rc[:, :length].sum(1, keepdim=True) - 1 + max(0, length - mask.shape[1])
        return index_rc[:, columns], real_rc[:, columns], last_r1


def _flags(listed: list[int], device: torch.device) -> Tensor:
    flags_t = torch.zeros(max(listed) + 1, dtype=torch.bool)
    flags_t[listed] = True
    return flags_t.to(device)
