"""A connection that is closed if no complete request arrives: uvicorn itself waits forever."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # for the head of a request to arrive whole, from the first of its bytes
MOST_CONNECTIONS = 100  # open at a time; a web browser opens about six
FULL = f"expected at most {MOST_CONNECTIONS} open connections, but more are open; close some windows or programs that use this server"


class Connection(H11Protocol):
    """uvicorn's connection, with a time limit for the head of a request; guard.py limits bodies, and uvicorn idle connections."""

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            body = json.dumps({"error": FULL}).encode()
            head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length:"
            transport.write(f"{head} {len(body)}\r\n\r\n".encode() + body)
            return transport.close()  # after what was written
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # a request has come and is being answered
            self._stop_watching()
        elif self._limit is None:
            self._limit = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
