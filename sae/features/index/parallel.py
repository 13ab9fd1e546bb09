"""One function over many items on several cores, results in the items' order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = 4  # each holds one item's memory


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int = WORKERS) -> Iterator[Result]:
    """`function` of every item in threads that share torch's: many steps here run on one core each, and leave the others idle.

    At most `workers` + 1 items are under way. Raises what the function raises.
    """
    threads = torch.get_num_threads()
    workers = min(workers, threads)
    waiting: deque[Future[Result]] = deque()
    torch.set_num_threads(threads // workers)  # here too: OpenMP's idle threads wait by spinning, on the workers' cores
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)  # MKL has one number for all threads
