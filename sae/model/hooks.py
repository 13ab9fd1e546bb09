"""The hooks by which vectors inside a model are seen or replaced, and what a pass under them is known by.

s sequences · p positions
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.model.structure.places import InPlace, Place

Edit: TypeAlias = Callable[[Tensor], Tensor]
_COUNTING = threading.Lock()  # for a moment, while a thread begins or ends; not a model's own, which could not be copied then


class Hooks:
    """The hooks of one model. While there are any, a model compiled by `torch.compile` is run uncompiled."""

    def __init__(self, model: Any, decoder: Any):
        self.past_length = 0
        self._model, self._decoder = model, decoder
        self._rows, self._in_model = (0, 0), False
        self._outer_mask: Any = None  # what the model was called with, and what it called its decoder with
        self._decoder_mask: Any = None
        self._owner, self._depth = 0, 0
        self._paused = False
        self._viewed: dict[Place, list[Edit]] = {}  # the edits at each place that is seen through a view, which share one hook
        self._unregister: dict[Place, Callable[[], None]] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, passes of this thread are neither recorded nor changed."""
        with self._one_thread(), torch.compiler.set_stance("force_eager"):
            before, self._paused = self._paused, True
            try:
                yield
            finally:
                self._paused = before

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
        """Inside, the result of each site's edit replaces the value there.

        Raises `InputError` while another thread has attached hooks, and from a pass that another thread makes or that did not reach all
        sites.
        """
        seen: set[str] = set()

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._require_own_thread()
            if self._paused:
                return
            if module is self._model:
                self._outer_mask, self._in_model = kwargs.get("attention_mask"), True
            if module is self._model or not self._in_model:  # a multimodal model embeds the tokens ahead of its decoder
                seen.clear()
            value = args[0] if args else kwargs.get("input_ids")
            value = kwargs["inputs_embeds"] if value is None else value
            cache = kwargs.get("past_key_values")
            self._rows = (value.shape[0], value.shape[1])
            self.past_length = 0 if cache is None else int(cache.get_seq_length())
            if module is self._decoder:
                self._decoder_mask = kwargs.get("attention_mask")

        def leave_model(*_: Any) -> None:
            self._in_model = False

        def end(*_: Any) -> None:
            if not self._paused and (missed := [site for site in edits if site not in seen]):
                raise InputError(
                    f"expected the pass to go through {missed[0]}, but it did not, so nothing was recorded or changed there: the model's "
                    "modules were replaced after it was wrapped, or run as exported code; wrap it again in LanguageModel"
                )

        with ExitStack() as stack:
            stack.enter_context(self._one_thread())
            # Compiled code neither sees new hooks nor forgets those it was compiled with
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(setattr, self, "_outer_mask", None)  # so that no later pass takes it for its own
            for module in (self._model, self._decoder):
                stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(self._model.register_forward_hook(leave_model, always_call=True).remove)
            for site, edit in edits.items():
                stack.callback(self._attach(places[site], self._replacing(site, edit, places[site].width, seen)))
            for module in (self._decoder, self._model):
                stack.callback(module.register_forward_hook(end).remove)
            yield

    def _replacing(self, site: str, edit: Edit, width: int, seen: set[str]) -> Edit:
        def replace(value: Tensor) -> Tensor:
            self._require_own_thread()
            if self._paused:
                return value
            seen.add(site)
            shape = (*self._rows, width)
            given = value.reshape(shape)  # OPT runs its MLP on [s * p, d]
            result = edit(given)
            if result is given:
                return value
            if not isinstance(result, Tensor) or result.shape != shape:
                got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise InputError(f"expected the edit at {site} to return shape {shape}, got {got}")
            return result.to(value).reshape(value.shape)

        return replace

    def _attach(self, place: Place, replace: Edit) -> Callable[[], None]:
        """Returns the function that detaches it."""
        view = place.view
        if view is None:
            return register(place, lambda raw, _received: replace(raw))
        edits = self._viewed.setdefault(place, [])

        def change(raw: Tensor, received: Tensor) -> Tensor:
            value = new = view.read(raw, received)
            for edit in tuple(edits):  # all that are attached now, so that a later one reads what an earlier one made
                new = edit(new)
            return raw if new is value else view.write(raw, new, received)

        if not edits:
            self._unregister[place] = register(place, change)
        edits.append(replace)

        def detach() -> None:
            edits.remove(replace)
            if not edits:
                self._unregister.pop(place)()

        return detach

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


def register(place: Place, change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """One forward hook, on the module's output or an input of it; `change` gets that and the first input."""
    key = place.argument

    def on_input(_module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        raw = args[key] if isinstance(key, int) else kwargs[key]
        result = change(raw, raw)
        return ((*args[:key], result, *args[key + 1 :]), kwargs) if isinstance(key, int) else (args, {**kwargs, key: result})

    def on_output(_module: nn.Module, args: tuple, output: Any) -> Any:
        received = args[0] if args else output
        if isinstance(output, tuple | list):
            return type(output)((change(output[0], received), *output[1:]))
        return change(output, received)

    if place.is_output:
        return place.module.register_forward_hook(on_output).remove
    # a hook that changes the tensor in place is no use after one that hands the module another tensor
    first = isinstance(place.view, InPlace)
    return place.module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=first).remove
