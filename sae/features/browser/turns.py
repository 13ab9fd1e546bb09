"""A queue: long work is done one piece at a time, and waiting uses no thread."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sae.errors import InputError

MOST_WAITING = 64  # of each kind
PATIENCE = 30.0  # seconds


class Busy(InputError):
    """Too many requests wait, or one has waited too long: status 503."""


class Turns:
    """One piece of work at a time. Kinds of work alternate, and within a kind the first request goes first. For one event loop."""

    def __init__(self, what: str, *kinds: str):
        self.what = what  # as a sentence begins: "the model"
        self._waiting: dict[str, deque[asyncio.Future]] = {kind: deque() for kind in kinds}
        self._taken = False

    @asynccontextmanager
    async def turn(self, kind: str, request: Any) -> AsyncIterator[None]:
        await self.wait_for(kind, request)
        try:
            yield
        finally:
            self.release(kind)

    async def wait_for(self, kind: str, request: Any) -> None:
        """Waits for a turn, which the caller must end with `release`.

        Raises `Busy` if too many wait already or the turn does not come in time, and `ClientDisconnect` if the client has left.
        """
        if not self._taken:
            self._taken = True
            return
        waiting = self._waiting[kind]
        if len(waiting) >= MOST_WAITING:
            raise Busy(f"{self.what} is busy and {len(waiting)} others wait for it already; try again in a moment")
        mine = asyncio.get_running_loop().create_future()
        waiting.append(mine)
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait([mine, leaving], timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                leaving.result()  # raises
            if not mine.done():
                raise Busy(
                    f"{self.what} is still at work for others after {PATIENCE:.0f} seconds; wait until that is done, or stop it there"
                )
        except BaseException:
            if mine.done():  # it got its turn in the same moment
                self.release(kind)
            else:
                waiting.remove(mine)
            raise
        finally:
            leaving.cancel()

    def release(self, kind: str) -> None:
        """Ends a turn; the next one is of another kind if any is waiting."""
        kinds = list(self._waiting)
        after = kinds.index(kind) + 1
        for other in kinds[after:] + kinds[:after]:
            if self._waiting[other]:
                return self._waiting[other].popleft().set_result(None)
        self._taken = False


async def _left(request: Any) -> None:
    """Raises `ClientDisconnect` when the client has left."""
    from starlette.requests import ClientDisconnect

    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect
