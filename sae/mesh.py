"""Several processes that train one dictionary: how it is split among them, and sums over them in a fixed order.

Processes form a grid. Along one axis features are split, along the other the rows of a batch. An axis of one process sends nothing. All
messages use two primitives: `exchange` (each process has a piece for every other) and `gather` (each has one piece for all). Sums are made
of these, so that terms are added from the first process to the last with any backend.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Gone(Exception):
    """Another process of this run has ended or cannot be reached."""


@contextmanager
def speaking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL have no class of their own for a lost connection
        raise Gone(" ".join(str(error).split())) from error


class Axis:
    """Processes among which something is split into equal parts, and this process's rank, counted from 0.

    All of them call the same methods in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Callable[[], Any] = lambda: None):
        """`group` looks up torch's process group, by default that of all processes. No reference to it is kept: destroying it reports a
        failure to the others."""
        self.rank, self.size, self._group = rank, size, group

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def part(self, n: int) -> slice:
        """The slice of `n` items of this process; `n` is a multiple of the size."""
        return slice(n // self.size * self.rank, n // self.size * (self.rank + 1))

    def exchange(self, to_n: Tensor) -> Tensor:
        """Sends piece i to process i and returns the pieces received from all of them, [size, ...]."""
        import torch.distributed as dist

        if self.alone:
            return to_n
        from_n = torch.empty_like(to_n)
        with speaking():
            dist.all_to_all_single(from_n, to_n.contiguous(), group=self._group())
        return from_n

    def gather(self, piece: Tensor, out_n: Tensor | None = None) -> Tensor:
        """The pieces of all processes, [size, ...]."""
        import torch.distributed as dist

        if self.alone:
            return piece[None]
        found_n = piece.new_empty(self.size, *piece.shape) if out_n is None else out_n
        with speaking():
            dist.all_gather_single(found_n.view(-1), piece.reshape(-1), group=self._group())
        return found_n

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place, with the same bits everywhere. Each process adds up one part and sends it to all."""
        if self.alone:
            return tensor
        count = tensor.numel()
        size = -(-count // self.size)
        flat = tensor.reshape(-1)
        if count % self.size:
            flat = torch.nn.functional.pad(flat, (0, size * self.size - count))
        whole = self.gather(added(self.exchange(flat.view(self.size, size)))).view(-1)
        return tensor.copy_(whole[:count].view_as(tensor))

    def sums(self, *tensors: Tensor) -> Sequence[Tensor]:
        """The sums of several small tensors of one dtype, in one message."""
        if self.alone:
            return tensors
        whole = self.sum_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        return [part.view_as(tensor) for part, tensor in zip(whole.split([tensor.numel() for tensor in tensors]), tensors)]

    def leave_to_first_(self, tensor: Tensor) -> Tensor:
        """Sets the tensor to zero in all processes except the first: for terms that a sum should contain once."""
        return tensor if self.leads else tensor.zero_()

    def numbers(self, number: float) -> list[float]:
        """The numbers of all processes, exact below 2^53. They are sent through the CPU."""
        return [number] if self.alone else self.gather(torch.tensor(number, dtype=torch.float64)).tolist()

    def total(self, number: int) -> int:
        return int(sum(self.numbers(number)))

    def wait(self) -> None:
        """Waits until all processes have called it."""
        self.numbers(0)

    def any(self, here: bool) -> bool:
        return any(self.numbers(here))

    def sum_of_part(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of the sum, along a dimension."""
        return tensor if self.alone else added(self.exchange(tensor.unflatten(dim, (self.size, -1)).movedim(dim, 0).contiguous()))

    def gather_parts_(self, whole: Tensor, part: Tensor, dim: int) -> None:
        """Fills `whole` with the parts of all processes along a dimension."""
        if self.alone:
            return
        parts_n = whole.unflatten(dim, (self.size, -1)).movedim(dim, 0)
        if parts_n.is_contiguous():  # straight to its place
            self.gather(part, parts_n)
        else:
            parts_n.copy_(self.gather(part))

    def to_first(self, piece: Tensor) -> Iterator[Tensor]:
        """Yields, in the first process, the pieces of all processes one after another, on the CPU; nothing in the others. All must exhaust
        it."""
        import torch.distributed as dist

        piece = piece.cpu().contiguous()
        with speaking():
            if not self.leads:
                dist.send(piece, 0, group=self._group())
                return
            yield piece
            for rank in range(1, self.size):
                received = torch.empty_like(piece)
                dist.recv(received, rank, group=self._group())
                yield received


def added(parts_n: Tensor) -> Tensor:
    """The sum in order: the first plus the second, plus the third ..."""
    total = parts_n[0]
    for part in parts_n[1:]:
        total = total + part
    return total


class Mesh:
    """This process's place in the grid of a run. Process i · rows + j has the i-th part of the features and the j-th part of the rows."""

    def __init__(self, features: Axis | None = None, rows: Axis | None = None, every: Axis | None = None):
        self.features, self.rows, self.every = features or Axis(), rows or Axis(), every or Axis()

    @property
    def alone(self) -> bool:
        return self.every.alone

    @property
    def leads(self) -> bool:
        return self.every.leads

    def __str__(self) -> str:
        """ "features=4,rows=2" """
        return f"features={self.features.size},rows={self.rows.size}"


ALONE = Mesh()
