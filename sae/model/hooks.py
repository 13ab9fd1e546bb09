"""The hooks by which vectors inside a model are seen or replaced, and what a pass under them is known by.

s sequences · p positions
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from sae.errors import InputError

Edit: TypeAlias = Callable[[Tensor], Tensor]
_COUNTING = threading.Lock()  # for a moment, while a thread begins or ends; not a model's own, which could not be copied then


class Place(NamedTuple):
    """A site in the modules of one model."""

    module: nn.Module
    is_output: bool
    """what flows at the site is the module's output, else its first input"""
    width: int


class Hooks:
    """Of one model. They run whatever `torch.compile` made of it: while there are any, it is run as it was before compilation."""

    def __init__(self, model: Any, decoder: Any):
        self.past_length = 0
        self._model, self._decoder = model, decoder
        self._rows = (0, 0)
        self._outer_mask: Any = None  # what the model was called with, and what it called its decoder with
        self._decoder_mask: Any = None
        self._owner, self._depth = 0, 0

    @property
    def attention_mask(self) -> Any:
        """[s, columns so far], not 0 for real tokens; None where none was given; anything else as it is."""
        mask = self._decoder_mask
        if isinstance(self._outer_mask, Tensor) and not _is_two_dimensional(mask):
            mask = self._outer_mask
        if isinstance(mask, dict):  # one for each kind of layer; windows of attention hide what is real
            mask = mask.get("full_attention", next(iter(mask.values())))
        if isinstance(mask, Tensor) and mask.ndim == 4:  # [s, 1, p, columns] of a static cache: real is what a position attends to
            may_attend = mask if mask.dtype == torch.bool else mask == 0
            return may_attend[:, 0].any(1)[:, : self.past_length + self._rows[1]]
        return mask

    @contextmanager
    def attached(self, edits: Mapping[str, Edit], places: Mapping[str, Place]) -> Iterator[None]:
        """Inside, the result of each site's edit takes the place of the value there.

        Raises `InputError` while another thread has its own attached, and from a pass that another thread makes or that did not show all
        sites.
        """
        seen: set[str] = set()

        def begin_model(_module: nn.Module, _args: tuple, kwargs: dict) -> None:
            self._require_own_thread()
            seen.clear()
            self._outer_mask = kwargs.get("attention_mask")

        def begin(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._require_own_thread()
            seen.clear()
            value = args[0] if args else kwargs.get("input_ids")
            value = kwargs["inputs_embeds"] if value is None else value
            cache = kwargs.get("past_key_values")
            self._rows = (value.shape[0], value.shape[1])
            self.past_length = 0 if cache is None else int(cache.get_seq_length())
            self._decoder_mask = kwargs.get("attention_mask")

        def end(*_: Any) -> None:
            if missed := [site for site in edits if site not in seen]:
                raise InputError(
                    f"expected the pass to go through {missed[0]}, but it went by, so nothing was recorded or changed there: the model's "
                    "modules were replaced after it was wrapped, or run as exported code; wrap it anew, as it was before, in LanguageModel"
                )

        with ExitStack() as stack:
            stack.enter_context(self._one_thread())
            # Compiled code neither sees new hooks nor forgets those it was compiled with
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(setattr, self, "_outer_mask", None)  # no later pass shall take it for its own
            stack.callback(self._model.register_forward_pre_hook(begin_model, with_kwargs=True).remove)
            stack.callback(self._decoder.register_forward_pre_hook(begin, with_kwargs=True).remove)
            for site, edit in edits.items():
                stack.callback(_attach(places[site], self._replacing(site, edit, places[site].width, seen)).remove)
            for module in (self._decoder, self._model):
                stack.callback(module.register_forward_hook(end).remove)
            yield

    def _replacing(self, site: str, edit: Edit, width: int, seen: set[str]) -> Edit:
        def replace(value: Tensor) -> Tensor:
            self._require_own_thread()
            seen.add(site)
            shape = (*self._rows, width)
            result = edit(value.reshape(shape))  # OPT runs its MLP on [s * p, d]
            if not isinstance(result, Tensor) or result.shape != shape:
                got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise InputError(f"expected the edit at {site} to return shape {shape}, got {got}")
            return result.to(value).reshape(value.shape)

        return replace

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        with _COUNTING:
            if self._depth:
                self._require_own_thread()
            self._owner, self._depth = threading.get_ident(), self._depth + 1
        try:
            yield
        finally:
            with _COUNTING:
                self._depth -= 1

    def _require_own_thread(self) -> None:
        if threading.get_ident() != self._owner:
            raise InputError(
                "expected one thread at a time to use a model that is steered, edited or recorded, got a second one; let the threads take "
                "turns with a lock that each holds around the whole of its steering or recording"
            )


def _is_two_dimensional(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _attach(place: Place, replace: Edit) -> Any:
    """One forward hook, on the module's output or on its first input."""

    def on_input(_module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        result = replace(args[0] if args else kwargs["hidden_states"])
        return ((result, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": result})

    def on_output(_module: nn.Module, _args: tuple, output: Any) -> Any:
        return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)

    if place.is_output:
        return place.module.register_forward_hook(on_output)
    return place.module.register_forward_pre_hook(on_input, with_kwargs=True)
