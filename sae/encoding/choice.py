"""Finds the fastest method on this machine by timing those that its processor has instructions for."""

from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from torch import Tensor
from typing_extensions import TypedDict

from sae.disk.reading import read_json
from sae.disk.writing import write_json
from sae.encoding.encoder import Encoder, Method, adds_exactly
from sae.encoding.guess import Line
from sae.entries import Buffers
from sae.pieces import CHOICE, Pieces

TRIED_ROWS = 1024
ROUNDS = 3
MARGIN = 0.8
"""another method is chosen only if its time is below this share of the product's"""
WORTH_TRYING = 1 << 32
"""total multiplications below which nothing is timed: the product takes less time than the test"""
DENSITY = 1 / 256
"""share of active entries at which methods are compared if the true share is unknown, as before training"""

_fastest: dict[tuple[object, ...], Method] = {}


def candidates(device: torch.device) -> tuple[Method, ...]:
    """Methods that may be faster than the product here. None on CUDA, because nothing was measured there: name `bfloat16` to try it."""
    if device.type != "cpu":
        return ()
    found: list[Method] = []
    if torch.cpu._is_avx512_supported() and torch.backends.mkldnn.is_available():
        found.append("onednn")
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        found.append("bfloat16")
    if torch.cpu._is_vnni_supported():
        found.append("int8")
    return tuple(method for method in found if method == "onednn" or adds_exactly(method, device))


def fastest(
    x_bd: Tensor, W_fd: Tensor, b_f: Tensor, above_f: Tensor | float | None = None, rows: int | None = None, *, k: int = 0
) -> Method:
    """The fastest method for such rows, with `above_f` as in `Encoder`; None: as if a 256th of the entries were active, or, with `k`, the k
    largest of each row.

    Complete encodings are timed, alternating, on at most 1,024 of the rows, once in a process for each shape, dtype, device and number of
    threads. Times vary, so another process may choose another method, whose last digits differ: record the choice if a run must be
    repeated. Without AVX-512 it is always the product, and nothing is timed. `rows`: how many will be encoded in total, by default these.
    """
    ways = candidates(x_bd.device) if W_fd.dtype == torch.float32 else ()
    if not ways or (rows or len(x_bd)) * W_fd.numel() < WORTH_TRYING:
        return "product"
    x_bd = x_bd[:TRIED_ROWS]
    key = (x_bd.shape, W_fd.shape, W_fd.dtype, W_fd.device, torch.get_num_threads(), above_f is None, k)
    if key not in _fastest:
        floor: float | Tensor = 0.0
        if k:
            above_f, floor = 0.0, likely_floors(x_bd, W_fd, b_f, k)
        elif above_f is None:
            above_f = quantile(x_bd, W_fd, b_f)
        seconds = timed(("product", *ways), x_bd, W_fd, b_f, above_f, floor)
        best = min(seconds, key=lambda method: seconds[method])
        _fastest[key] = best if seconds[best] < MARGIN * seconds["product"] else "product"
    return _fastest[key]


def agreed(made: Pieces | None, find: Callable[[], Method]) -> Method:
    """Makes all processes that share the work, and later restarts, use the method that one process found: it affects the last digits."""
    if made is None:
        return find()
    (path,) = made.make({CHOICE: 1}, lambda _, path: partial(write_json, path, {"encoder": find()}))
    return read_json(path, "the choice of an encoder", Choice)["encoder"]


class Choice(TypedDict):
    encoder: Method


def timed(
    ways: tuple[Method, ...], x_bd: Tensor, W_fd: Tensor, b_f: Tensor, above_f: Tensor | float, floor: float | Tensor = 0.0
) -> dict[Method, float]:
    """Shortest seconds of each method to encode these rows, in interleaved rounds after a first one that is not counted."""
    encoders = {method: Encoder(method, W_fd, b_f, above_f, like_bd=x_bd) for method in ways}
    buffers = {method: Buffers() for method in ways}
    seconds = dict.fromkeys(ways, float("inf"))
    for turn in range(ROUNDS + 1):
        for method, encoder in encoders.items():
            start = perf_counter()
            encoder.entries(x_bd, buffers[method], floor=floor)
            if turn:
                seconds[method] = min(seconds[method], perf_counter() - start)
    return seconds


def quantile(x_bd: Tensor, W_fd: Tensor, b_f: Tensor) -> float:
    """The value that a share `DENSITY` of the entries of some rows exceeds, at least 0."""
    z_n = torch.addmm(b_f, x_bd[:16], W_fd.T).flatten()
    return max(0.0, float(z_n.kthvalue(max(1, int((1 - DENSITY) * z_n.numel()))).values))


def likely_floors(x_bd: Tensor, W_fd: Tensor, b_f: Tensor, k: int) -> Tensor:
    """The guesses of the k-th largest entry of each row that rows like these lead to, [b]."""
    length_b, kth_b = x_bd.norm(dim=1), torch.addmm(b_f, x_bd, W_fd.T).topk(min(k, len(W_fd))).values[:, -1]
    return Line.below(kth_b.clamp(min=0), length_b).at(length_b)
