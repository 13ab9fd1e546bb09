"""The cost of a run, before it starts: memory of each process, bytes sent and read in a step, rows per second.

b rows (tokens) of a batch · d width that is read · o width that is written · f features
"""

from collections import Counter
from collections.abc import Callable
from math import ceil
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from sae.activations.cached import BUFFER_BYTES, CachedSource
from sae.device import device_named
from sae.dictionaries.formats.saelens.files import BLOCK_BYTES
from sae.kinds import Now
from sae.mesh import Axis, Mesh
from sae.objective import Adam, Weights
from sae.objective.fast import CHUNK_BYTES
from sae.objective.rule import Rule
from sae.training.config import RunConfig, TrainingConfig
from sae.training.ends import Ends
from sae.training.shard import Split

STEP = 1.3
"""time of a step in units of the encoder product, once the code is sparse: 1.0 to 1.8 in benchmarks/README.md, by kind and activations"""
PASSES = 3
"""time of the passes over weights, gradients and moments, in units of Adam's own: it matters where a batch has few rows for the features"""
TRIED_ROWS, TRIED_FEATURES, TRIED_BYTES, TRIED_NUMBERS = 1024, 4096, 4 << 20, 1 << 22
"""sizes of the products, of the sum and of the update that are timed"""


class Shape(NamedTuple):
    """The sizes that decide the cost of a step."""

    features: int
    rows: int
    d: int
    o: int
    transcodes: bool
    skip: bool
    per_feature: int
    """numbers per feature in addition to its rows and bias, such as a threshold"""
    rules: tuple[Rule, ...]
    """one for each dictionary"""
    clips: bool
    chunk_bytes: int = CHUNK_BYTES

    @classmethod
    def of(cls, config: RunConfig, ends: Ends) -> "Shape":
        kind, nothing = config.kind, torch.empty(0)
        own = kind.own(ends.d_out, config.d_sae)
        now = Now(config.steps - 1, config.steps, ends.d_out, torch.zeros(config.d_sae, dtype=torch.bool), kind.state())
        rules = tuple(kind.goal(value, now).rule(Weights(*[nothing] * 4), own) or Rule() for value in kind.values)
        what = ends.d_in, ends.d_out, ends.transcodes, config.skip, len(own)
        return cls(config.d_sae, config.batch_size, *what, rules, config.clip > 0)

    @property
    def dictionaries(self) -> int:
        return len(self.rules)

    @property
    def of_feature(self) -> int:
        return self.d + self.o + 1 + self.per_feature


def wire_bytes(shape: Shape, split: Split) -> Counter[str]:
    """Bytes that each process sends in a step whose code is sparse and in which no feature is dead, by purpose.

    In a sum of n numbers over N processes, each sends a part of ⌈n/N⌉ numbers to N − 1 others, and then its part of the sum to all of them.
    """
    f, r, every = split.features, split.rows, split.processes

    def summed(numbers: int, processes: int, width: int = 4) -> int:
        return 2 * (processes - 1) * ceil(numbers / processes) * width

    def gathered(numbers: int, processes: int, width: int = 8) -> int:
        return (processes - 1) * numbers * width

    rows, own_features = shape.rows // r, shape.features // f
    chunk = max(1, shape.chunk_bytes // (4 * own_features))
    chunks = [min(chunk, rows - start) for start in range(0, rows, chunk)]
    candidates = {
        "row": sum((f - 1) * ceil(n / f) * 5 for n in chunks),
        "batch": gathered(1, every) + 4 * summed(256, every, 8),
    }
    of_rows = summed(6, r) + summed(shape.o, r) + summed(own_features, r, 8) + (summed(shape.o * shape.d, r) if shape.skip else 0)
    norms = gathered(3 + shape.per_feature, every, 4) if shape.clips else 0
    found: Counter[str] = Counter()
    for rule in shape.rules:
        codes = max(1, len(rule.prefixes)) + (rule.magnitude is not None)
        found["partial reconstructions"] += codes * summed(rows * shape.o, f)
        if rule.top:
            found["candidates of the k largest"] += candidates[rule.over] * (rule.top if rule.over == "row" else 1)
        else:
            found["numbers that decide the path"] += 2 * len(chunks) * gathered(1, f)
        if rule.aid is not None:
            found["numbers that decide the path"] += gathered(1, f)
        found["gradient of the input bias and sums"] += summed((0 if shape.transcodes else shape.d) + 3, f) + of_rows
        for name in ("gradients of the weights", "weights"):
            found[name] += (r - 1) * (own_features // r) * shape.of_feature * 4
        found["norms, and whether to stop"] += norms
    found["norms, and whether to stop"] += gathered(1, every)
    return found


def memory_bytes(shape: Shape, split: Split) -> dict[str, int]:
    """Bytes that each process holds while it trains, by purpose, without its source of rows."""
    whole = shape.dictionaries * shape.features * shape.of_feature * 4
    mine, rows = whole // split.features, shape.rows // split.rows
    chunk = min(CHUNK_BYTES, 4 * rows * (shape.features // split.features))
    return {
        "weights": mine + (mine // split.rows if split.rows > 1 else 0),
        "gradients": mine + (mine if split.rows > 1 else 0),
        "Adam's moments": 2 * mine // split.rows,
        "batch and chunks": 4 * shape.rows * (shape.d + shape.o) + 4 * rows * 3 * shape.o + 2 * chunk,
    }


def saving_bytes(shape: Shape, split: Split) -> tuple[int, int]:
    """Additional bytes in each process, and in the one that leads, while a dictionary is saved: its features in the model's own units and
    some transposed columns; in the one that leads also another process's part of a matrix."""
    features = shape.features // split.processes
    mine = 4 * features * shape.of_feature + min(BLOCK_BYTES, 4 * features * shape.d)
    return mine, mine + (4 * features * shape.o if split.processes > 1 else 0)


def report(config: TrainingConfig, source: CachedSource, mesh: Mesh) -> None:
    """Prints the cost of a run on a cache; measures for less than a second."""
    ends = Ends.of(source, config)
    row_bytes = sum(source.caches[site].d_in * source.caches[site].dtype.itemsize for site in ends.sites)
    reader = {"the cache's reader": 2 * min(BUFFER_BYTES, 64 * BUFFER_BYTES // row_bytes * row_bytes)}
    reads = f"a step reads {size(config.batch_size * row_bytes)} of the cache in each process, once for those of one machine"
    report_run(config, ends, Split.of(config.shard or "features", mesh.every.size), mesh, reader, reads)


def report_run(config: RunConfig, ends: Ends, split: Split, mesh: Mesh, source_bytes: dict[str, int], reads: str) -> float:
    """Prints the cost of training and what it `reads`; returns the estimate of rows per second. `source_bytes`: memory of the rows' source
    in each process, by purpose."""
    shape = Shape.of(config, ends)
    memory, sent = memory_bytes(shape, split) | source_bytes, wire_bytes(shape, split)
    several, who = split.processes > 1, "one process"
    if several:
        who = f"each of {split.processes} processes ({split.features} by features, {split.rows} by rows)"
    print(f"{who}: {size(sum(memory.values()))} of memory ({listed(memory)})")
    mine, first = saving_bytes(shape, split)
    print(f"saving a dictionary takes {size(mine)} more at the end" + f", {size(first)} in the process that leads" * several)
    if several:
        print(f"a step sends {size(sum(sent.values()))} from each process ({listed(sent)})")
    print(reads)
    product, update, speed = product_seconds(shape, split, config), adam_seconds(shape, split, config), wire_speed(mesh.every)
    wire = 0.0 if speed is None else sum(sent.values()) / speed
    rate = config.batch_size / (STEP * product + PASSES * update + wire)
    of_wire = f" and {wire:.3g} s for what is sent, at {size(int(speed))}/s" if speed else "; what is sent was not timed" * several
    print(
        f"about {rate:,.0f} rows/s once the code is sparse: {STEP} times the encoder product of {product:.3g} s and {PASSES} times Adam's "
        f"{update:.3g} s, measured on a part{of_wire}"
    )
    if not any(rule.top for rule in shape.rules):
        print("the first steps of this kind, in which many features are active, take several times as long")
    return rate


def product_seconds(shape: Shape, split: Split, config: RunConfig) -> float:
    """Seconds of a step's encoder product, scaled up from the shortest of three smaller ones."""
    rows, features = shape.rows // split.rows, shape.features // split.features
    tried = min(rows, TRIED_ROWS), min(features, TRIED_FEATURES)
    device = device_named(config.device)
    x_bd, W_fd = (torch.randn(n, shape.d, device=device) for n in tried)
    seconds = min(timed(lambda: x_bd @ W_fd.T, x_bd) for _ in range(3))
    return seconds * (rows / tried[0]) * (features / tried[1]) * shape.dictionaries


def adam_seconds(shape: Shape, split: Split, config: RunConfig) -> float:
    """Seconds of Adam's update of this process's weights, scaled up from the shortest of three smaller ones."""
    numbers = shape.dictionaries * shape.features * shape.of_feature // split.processes
    tried = torch.randn(min(numbers, TRIED_NUMBERS), device=device_named(config.device))
    gradient = torch.zeros_like(tried)
    adam, finite = Adam([tried]), torch.zeros((), dtype=torch.bool, device=tried.device)
    seconds = min(timed(lambda: adam.step([gradient], finite), tried) for _ in range(3))
    return seconds * numbers / len(tried)


def wire_speed(every: Axis) -> float | None:
    """Bytes per second that each process sends in a sum."""
    if every.alone:
        return None
    tensor = torch.zeros(TRIED_BYTES // 4)
    seconds = min(timed(lambda: every.sum_(tensor), tensor) for _ in range(3))
    return 2 * (every.size - 1) / every.size * TRIED_BYTES / max(every.numbers(seconds))


def timed(work: Callable[[], object], like: Tensor) -> float:
    start = perf_counter()
    work()
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return perf_counter() - start


def size(count: int) -> str:
    """ "1.2 GB" """
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} bytes"


def listed(bytes_of: dict[str, int]) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in bytes_of.items() if count)
