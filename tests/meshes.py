"""Processes of a mesh as threads of this one: the same calls, without a launcher."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

from sae.mesh import Axis, Mesh

Found = TypeVar("Found")


class Board:
    """What the threads of one axis show each other."""

    def __init__(self, size: int):
        self.shown: list[Tensor] = [torch.empty(0)] * size
        self.barrier = Barrier(size)


class ThreadAxis(Axis):
    def __init__(self, rank: int, board: Board):
        super().__init__(rank, len(board.shown))
        self.board = board

    def shown(self, tensor: Tensor) -> list[Tensor]:
        self.board.shown[self.rank] = tensor
        self.board.barrier.wait(60)
        found = list(self.board.shown)
        self.board.barrier.wait(60)
        return found

    def exchange(self, to_n: Tensor) -> Tensor:
        assert len(to_n) == self.size
        return to_n if self.alone else torch.stack([theirs[self.rank] for theirs in self.shown(to_n.clone())])

    def gather(self, piece: Tensor, out_n: Tensor | None = None) -> Tensor:
        found_n = torch.stack(self.shown(piece.clone()))
        return found_n if out_n is None else out_n.copy_(found_n)

    def to_first(self, piece: Tensor) -> Iterator[Tensor]:
        found = self.shown(piece.clone())
        yield from found if self.leads else []


def together(features: int, rows: int, work: Callable[[Mesh], Found]) -> list[Found]:
    """What `work` gives in each of features · rows processes."""
    every, columns, lines = Board(features * rows), [Board(features) for _ in range(rows)], [Board(rows) for _ in range(features)]

    def run(rank: int) -> Found:
        i, j = divmod(rank, rows)
        try:
            return work(Mesh(ThreadAxis(i, columns[j]), ThreadAxis(j, lines[i]), ThreadAxis(rank, every)))
        except BaseException:
            for board in (every, *columns, *lines):
                board.barrier.abort()
            raise

    with ThreadPoolExecutor(features * rows) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(features * rows)]]
