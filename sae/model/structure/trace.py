"""Inputs and outputs of the modules of each block in one pass of three tokens, every value distinct from every other.

Noise on the output of each module without parts makes them so, for any weights. It is also added in place to the stream between
attention and MLP, as soon as a module takes the stream plus an earlier output.

t tokens · d width of the stream
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.model.opening.offload import device_of

TOKENS = 3
NOTHING = torch.empty(0, 0, dtype=torch.float64)


class Seen(NamedTuple):
    """A tensor of the model and how often it had been overwritten."""

    tensor: Tensor
    version: int

    @classmethod
    def now(cls, tensor: Tensor) -> "Seen":
        return cls(tensor, tensor._version)

    @property
    def overwritten(self) -> bool:
        return self.tensor._version != self.version


@dataclass(eq=False)
class Call:
    """One call of a module in a block. Values are float64 [t, width] on the CPU, empty where they are nothing of the kind."""

    path: str
    module: nn.Module
    began: int
    argument: int | str = 0
    x: Tensor = NOTHING
    x_seen: Seen | None = None
    raw: Tensor = NOTHING
    """the output as the module made it"""
    y: Tensor = NOTHING
    """the output as the model continued with it"""
    y_seen: Seen | None = None
    ended: bool = False

    def order(self) -> tuple[int, int]:
        """The outermost first, then the earliest."""
        return self.path.count("."), self.began

    def named(self, words: Sequence[str]) -> bool:
        return any(word in f"{self.path} {type(self.module).__name__}".lower() for word in words)

    @property
    def is_norm(self) -> bool:
        return self.named(["norm"]) and all(weight.ndim < 2 for weight in self.module.parameters())

    @property
    def is_projection(self) -> bool:
        return getattr(getattr(self.module, "weight", None), "ndim", 0) == 2

    @property
    def passes_on(self) -> bool:
        """Whether it returns its input, as dropout does."""
        return same(self.x, self.y)

    def within(self, other: "Call") -> bool:
        return f"{self.path}.".startswith(f"{other.path}.")


class Added(NamedTuple):
    """The output of a module, times a constant, as a part of a sum."""

    call: Call
    factor: float


@dataclass(eq=False)
class Block:
    """The effect of one block on the stream, [t, d]."""

    module: nn.Module
    constants: Sequence[float]
    """numbers of the model's configuration, by which it may multiply"""
    times: int = 0
    argument: int | str = 0
    pre: Tensor = NOTHING
    pre_seen: Seen | None = None
    post: Tensor = NOTHING
    post_seen: Seen | None = None
    precision: float = 0.0
    """machine epsilon of the stream"""
    calls: list[Call] = field(default_factory=list)
    mid: Call | None = None
    """the first module that takes the stream plus an earlier output"""
    first: Added | None = None
    """that output"""

    def repeats(self, module: nn.Module) -> bool:
        """Whether the pass went several times through a module of the block."""
        return sum(call.module is module for call in self.calls) > 1

    def added(self, base: Tensor, total: Tensor, calls: Sequence[Call]) -> Added | None:
        """Which of the calls' outputs makes the total of the base, the outermost module first."""
        for call in sorted(calls, key=Call.order):
            if call.y.shape == base.shape and (factor := self.factor(base, total, call.y)) is not None:
                return Added(call, factor)
        return None

    def rescaled(self, base: Tensor, total: Tensor, calls: Sequence[Call]) -> Added | None:
        """The same where a multiple of the sum is the total; the output itself is then added, not times a constant."""
        for call in sorted(calls, key=Call.order):
            if call.y.shape == base.shape:
                columns = torch.stack([base.flatten(), call.y.flatten()], dim=1)
                whole, _ = torch.linalg.lstsq(columns, total.flatten()).solution.tolist()
                if 1e-3 < abs(whole) < 1e3 and self.factor(base, total / whole, call.y) == 1:
                    return Added(call, 1.0)
        return None

    def factor(self, base: Tensor, total: Tensor, part: Tensor) -> float | None:
        """c of total = base + c · part to rounding."""
        change, slack = total - base, 16 * self.precision * (total.abs() + base.abs())
        fitted = float((change * part).sum() / (part * part).sum().clamp(min=1e-300))
        near = [c for c in self.constants if abs(c - fitted) < 0.01 * abs(fitted)]
        for c in (1.0, *near, fitted):
            if c and bool(((change - c * part).abs() <= slack).all()):
                return c
        return None


def same(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and torch.equal(a, b)


def decoder_and_blocks(model: Any, n_layers: int, name: str) -> tuple[nn.Module, list[nn.Module]]:
    """The model below the unembedding, and its first list of as many modules as it has blocks. Raises `InputError` if there is none."""
    decoder = model.get_decoder()
    for below in (decoder, model.base_model):  # what ModernBERT calls its decoder is its unembedding
        for part in below.modules():
            if isinstance(part, nn.ModuleList) and len(part) == n_layers:
                return below, list(part)
    name = name or type(model).__name__
    raise InputError(f"expected {name!r} to keep its {n_layers} blocks in a list of modules, found none in {type(decoder).__name__}")


def short_pass(model: Any, decoder: Any, name: str) -> None:
    """A pass of three tokens from the middle of the vocabulary, where no special ones are. Raises `InputError` where the model fails."""
    embedding = model.get_input_embeddings()
    pad, known = model.config.get_text_config().pad_token_id, embedding.num_embeddings
    ids = [*(token for token in range(known // 2, known) if token != pad), *[0] * TOKENS][:TOKENS]
    try:
        decoder(input_ids=torch.tensor([ids], device=device_of(embedding)), use_cache=False)
    except Exception as error:  # a model's own code may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"expected {name!r} to run on {TOKENS} tokens, but it failed ({reason:.300})") from error


def own(hook: Callable) -> Callable:
    """A hook for passes of this thread alone, so that other threads are not affected."""
    thread = threading.get_ident()
    return lambda *given: hook(*given) if threading.get_ident() == thread else None


def trace(blocks: Sequence[nn.Module], constants: Sequence[float], run: Callable[[], Any]) -> list[Block]:
    """Records the pass that `run` makes, without gradients."""
    traced = [Block(block, constants) for block in blocks]
    parts = [[(path, part) for path, part in block.named_modules() if path] for block in blocks]
    uses = Counter(id(part) for block in parts for _, part in block)
    noise, clock = torch.Generator().manual_seed(0), count()
    with ExitStack() as stack:
        for block, inner in zip(traced, parts, strict=True):
            hooks = _Hooks(block, noise, clock)
            stack.callback(block.module.register_forward_pre_hook(own(hooks.enter), with_kwargs=True).remove)
            stack.callback(block.module.register_forward_hook(own(hooks.leave)).remove)
            for path, part in inner:
                if uses[id(part)] == 1:  # a hook on what several blocks share would see them all
                    stack.callback(part.register_forward_pre_hook(own(hooks.begin(path)), with_kwargs=True).remove)
                    stack.callback(part.register_forward_hook(own(hooks.end(path))).remove)
        run()
    return traced


class _Hooks:
    """On one block."""

    def __init__(self, block: Block, noise: torch.Generator, clock: "count[int]"):
        self.block, self.noise, self.clock = block, noise, clock
        self.open: dict[str, Call] = {}

    def enter(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        block = self.block
        block.times += 1
        block.argument, stream = first_tensor(args, kwargs)
        if stream is not None:
            block.pre, block.pre_seen, block.precision = values_of(stream), Seen.now(stream), torch.finfo(stream.dtype).eps

    def leave(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple | list) else output
        if isinstance(stream, Tensor):
            self.block.post, self.block.post_seen = values_of(stream), Seen.now(stream)

    def begin(self, path: str) -> Callable:
        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            key, tensor = first_tensor(args, kwargs)
            call = Call(path, module, next(self.clock), key)
            if tensor is not None:
                call.x = self._between(call, tensor, values_of(tensor))
                call.x_seen = Seen.now(tensor)
            self.block.calls.append(call)
            self.open[path] = call

        return begin

    def _between(self, call: Call, tensor: Tensor, values: Tensor) -> Tensor:
        """The module's input; where that is the stream between attention and MLP, with noise in place."""
        block = self.block
        if block.mid is None and values.shape == block.pre.shape and not torch.equal(values, block.pre):
            first = block.added(block.pre, values, [call for call in block.calls if call.ended])
            if first is not None:
                block.mid, block.first = call, first
                tensor += self._noise(tensor, values / 4)
                return values_of(tensor)
        return values

    def end(self, path: str) -> Callable:
        def end(module: nn.Module, _args: tuple, output: Any) -> Any:
            call, first = self.open[path], output[0] if isinstance(output, tuple | list) else output
            call.ended = True
            if not isinstance(first, Tensor) or not first.is_floating_point():
                return None
            call.raw = call.y = values_of(first)
            call.y_seen = Seen.now(first)
            if not len(call.raw) or next(module.children(), None) is not None or call.passes_on:
                return None
            noisy = first + self._noise(first, call.raw, into_stream=call.raw.shape == self.block.pre.shape and not call.is_norm)
            call.y, call.y_seen = values_of(noisy), Seen.now(noisy)
            return type(output)((noisy, *output[1:])) if isinstance(output, tuple | list) else noisy

        return end

    def _noise(self, tensor: Tensor, values: Tensor, into_stream: bool = False) -> Tensor:
        """Half as large as the values; what may be added to the stream must be seen in it, and larger noise would grow in every block."""
        size = values.pow(2).mean().sqrt() / 2
        if into_stream:
            size = size + min(1 / 8, 1024 * self.block.precision) * self.block.pre.pow(2).mean().nan_to_num().sqrt()
        return ((float(size) or 1.0) * torch.randn(tensor.shape, generator=self.noise)).to(tensor)


def first_tensor(args: tuple, kwargs: dict) -> tuple[int | str, Tensor | None]:
    """Of floating point, with its position or name."""
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return key, value
    return 0, None


def values_of(tensor: Tensor) -> Tensor:
    """One row a token, a copy; empty where the tensor is not that."""
    if tensor.numel() == 0 or tensor.numel() != TOKENS * tensor.shape[-1]:
        return NOTHING
    return tensor.detach().reshape(TOKENS, -1).to("cpu", torch.float64, copy=True)  # host sync
