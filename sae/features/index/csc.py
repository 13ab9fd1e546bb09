"""Non-zero activations from row order to feature order, larger than memory: sorted runs on disk, then one merge.

f features · r rows of a run

A compressed sparse column matrix: `offsets` [f + 1] int64, and for the entries offsets[j] to offsets[j + 1] of feature j the token
`positions` (uint32, ascending) and `values` (float16). Where activations may be negative, `values` are without sign and `negative` (bool)
says which were; runs keep the sign. Runs and merge sort plain 64-bit words in which (feature, row, value) or
(feature, position, value) are packed from the top, which is several times faster than sorting indices.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sae.disk.arrays import create, open_arrays, write_arrays
from sae.progress import progress

RUN_ENTRIES = 1 << 23  # entries sorted at a time: 24 bytes of memory each
BLOCK_ENTRIES = 1 << 20  # merged at a time: arrays so small that they stay in the processor's cache, and their memory is used again
MAX_FEATURES = MAX_ROWS = 1 << 24
MAX_VALUE = float(np.finfo(np.float16).max)


class Spool:
    """Takes non-zeros in row order and writes sorted runs into `folder`."""

    def __init__(self, folder: Path, d_sae: int, run_entries: int = RUN_ENTRIES, name: str = "run"):
        self.folder, self.d_sae, self.run_entries, self.name = folder, d_sae, run_entries, name
        self.paths: list[Path] = []
        self.entries = self.clipped = 0
        self._keys: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._waiting = self._rows = 0

    def add(self, positions: np.ndarray, row: np.ndarray, feature: np.ndarray, value: np.ndarray) -> None:
        """Rows at token `positions` [r]; entry i has `value[i]` for `feature[i]` on row `row[i]`. Values beyond 65,504 are cut to it."""
        if self._rows + len(positions) > MAX_ROWS:
            self.flush()
        self.clipped += int((np.abs(value) > MAX_VALUE).sum())
        bits = np.clip(value, -MAX_VALUE, MAX_VALUE).astype(np.float16).view(np.uint16)
        key = feature.astype(np.uint64) << np.uint64(40)
        key |= (row + self._rows).astype(np.uint64) << np.uint64(16)
        key |= bits
        self._keys.append(key)
        self._positions.append(positions.astype(np.uint32))
        self._rows += len(positions)
        self._waiting += len(key)
        self.entries += len(key)
        if self._waiting >= self.run_entries:
            self.flush()

    def flush(self) -> None:
        """Writes the entries in memory as one run."""
        keys, rows, waiting = self._keys, self._positions, self._waiting
        self._keys, self._positions, self._waiting, self._rows = [], [], 0, 0
        if not waiting:
            return
        key, positions = np.concatenate(keys), np.concatenate(rows)
        key.sort()
        path = run_path(self.folder, self.name, len(self.paths))
        begins = np.searchsorted(key, np.arange(self.d_sae, dtype=np.uint64) << np.uint64(40))
        row = (key >> np.uint64(16)) & np.uint64(MAX_ROWS - 1)
        values = key.astype(np.uint16).view(np.float16)  # the lowest 16 bits
        write_arrays(path, {"offsets": np.r_[begins, len(key)], "positions": positions[row], "values": values})
        self.paths.append(path)


def run_path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number:05d}.safetensors"


def merge(
    runs: list[Path], d_sae: int, path: Path, block_entries: int = BLOCK_ENTRIES, shifts: list[int] | None = None, signed: bool = False
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Merges `runs` into the matrix at `path`, block of features after block; `shifts` are added to the runs' positions.

    Yields each block's first feature and its part of the matrix, offsets counted from the block's beginning, while it is in memory.
    """
    parts = [open_arrays(run) for run in runs]
    shifts = shifts or [0] * len(runs)
    counts_f = np.zeros(d_sae, np.int64)
    for part in parts:
        counts_f += np.diff(part["offsets"])
    offsets = np.r_[0, np.cumsum(counts_f)]
    n = int(offsets[-1])
    layout: dict[str, tuple[str, tuple[int, ...]]] = {"offsets": ("I64", (d_sae + 1,)), "positions": ("U32", (n,)), "values": ("F16", (n,))}
    records = create(path, layout | ({"negative": ("BOOL", (n,))} if signed else {}))
    records["offsets"][:] = offsets
    with progress("sort by feature", n, "activations") as bar:
        begin = 0
        while begin < d_sae:
            end = int(np.searchsorted(offsets, offsets[begin] + block_entries, "right")) - 1
            end = min(max(end, begin + 1), begin + (1 << 16), d_sae)
            low, high = offsets[begin], offsets[end]
            key = (
                np.concatenate([_keys(part, begin, end, shift) for part, shift in zip(parts, shifts)]) if parts else np.zeros(0, np.uint64)
            )
            key.sort()
            positions = (key >> np.uint64(16)).astype(np.uint32)  # the middle 32 bits
            bits = key.astype(np.uint16)  # the lowest 16
            block: dict[str, np.ndarray] = {"positions": positions}
            if signed:
                block["negative"], bits = bits > 0x7FFF, bits & np.uint16(0x7FFF)
            block["values"] = bits.view(np.float16)
            for name, values in block.items():
                records[name][low:high] = values
            yield begin, block | {"offsets": offsets[begin : end + 1] - low}
            bar.advance(int(high - low))
            begin = end


def _keys(part: dict[str, np.ndarray], begin: int, end: int, shift: int) -> np.ndarray:
    """(feature - begin: 16 bits, position: 32, value: 16) of a run's entries of features `begin` to `end` - 1."""
    offsets = part["offsets"][begin : end + 1]
    low, high = offsets[0], offsets[-1]
    key = np.repeat(np.arange(end - begin, dtype=np.uint64) << np.uint64(48), np.diff(offsets))
    key |= (part["positions"][low:high].astype(np.uint64) + np.uint64(shift)) << np.uint64(16)
    key |= part["values"][low:high].view(np.uint16)
    if "negative" in part:  # an index whose values have lost their signs, to be merged with others
        key |= part["negative"][low:high].astype(np.uint64) << np.uint64(15)
    return key


def statistics(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns of a block's features, from the stored values: see docs/features.md. `top_position` is -1 if there is none."""
    offsets = block["offsets"]
    count = np.diff(offsets)
    fires = np.flatnonzero(count)
    total, mean, second, third, fourth = (np.zeros(len(count)) for _ in range(5))
    top, where = np.zeros(len(count), np.float32), np.full(len(count), -1, np.int64)
    if len(fires):
        starts, many = offsets[fires], count[fires]
        values = block["values"].astype(np.float64)
        total[fires] = np.add.reduceat(values, starts)
        mean[fires] = total[fires] / many
        top[fires] = np.maximum.reduceat(block["values"].view(np.uint16), starts).view(
            np.float16
        )  # in order as integers, for none is below 0
        at_top = np.where(values == np.repeat(top, count), block["positions"].astype(np.int64), np.iinfo(np.int64).max)
        where[fires] = np.minimum.reduceat(at_top, starts)
        values -= np.repeat(mean, count)
        power = values * values
        second[fires] = np.add.reduceat(power, starts) / many
        power *= values
        third[fires] = np.add.reduceat(power, starts) / many
        power *= values
        fourth[fires] = np.add.reduceat(power, starts) / many
    spread = np.where(second > (1e-6 * mean) ** 2, second, np.inf)  # all values equal, but for rounding: no shape
    return {
        "count": count,
        "sum": total,
        "max": top,
        "top_position": where,
        "mean": mean.astype(np.float32),
        "std": np.sqrt(second).astype(np.float32),
        "skewness": (third / spread**1.5).astype(np.float32),
        "kurtosis": (fourth / spread**2).astype(np.float32),
    } | ({"negative_share": negative_share(block, fires)} if "negative" in block else {})


def negative_share(block: dict[str, np.ndarray], fires: np.ndarray) -> np.ndarray:
    """Share of each feature's activations that are below 0, float32."""
    count = np.diff(block["offsets"])
    share = np.zeros(len(count), np.float32)
    if len(fires):
        share[fires] = np.add.reduceat(block["negative"], block["offsets"][fires], dtype=np.int64) / count[fires]
    return share
