"""Raw connections to a real server: odd heads, connections that never end, clients that leave or do not read."""

import contextlib
import json
import logging
import socket
import time

import pytest
from browser_world import served

import sae.features.browser.connection as connection_module
import sae.features.browser.guard as guard_module
import sae.features.browser.serve as browse_module
from sae.features.browser.app import create_app


@pytest.fixture
def site(hostile):
    """(port, notes); steering writes for ever."""

    def endless(prompt, features, sampling):
        while True:
            time.sleep(0.01)
            yield {"side": "steered", "text": "x" * 1000}

    with served(create_app(hostile.index, hostile.notes, steering=endless)) as url:
        yield int(url.rpartition(":")[2]), hostile.notes


def answer(port: int, *pieces: bytes, seconds: float = 10) -> bytes:
    """All that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        for piece in pieces:
            connection.sendall(piece)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(1 << 16):
                received += piece
        return received


def drip(port: int) -> int:
    """How many single bytes the server takes, one every 20 ms, 300 at most."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for sent in range(300):
            try:
                connection.sendall(b"X")
            except (BrokenPipeError, ConnectionResetError):
                return sent
            time.sleep(0.02)
    return 300


def status(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n", 200),
        (b"GET / HTTP/1.1\r\nhOsT: LOCALHOST:80\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nHost: 127.0.0.1:PORT\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nHost: evil.example\r\n", 400),
        (b"GET / HTTP/1.1\r\n", 400),
        (b"GET / HTTP/1.0\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost:\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1/evil.example\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: user@127.0.0.1\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: user:word@127.0.0.1:PORT\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1:\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1:70000\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1:0x50\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1, evil.example\r\n", 403),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\nX-Forwarded-Host: 127.0.0.1\r\n", 403),
        (b"GET http://evil.example/ HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n", 404),
        (b"POST /f/3 HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nOrigin: http://127.0.0.1:PORT\r\nOrigin: http://evil.example\r\n", 400),
        (b"POST /f/3 HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nOrigin: http://evil.example\r\norigin: http://127.0.0.1:PORT\r\n", 400),
        (b"POST /f/3 HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nOrigin: http://127.0.0.1:PORT, http://evil.example\r\n", 403),
        (b"POST /f/3 HTTP/1.1\r\nHost: localhost:PORT\r\nOrigin: http://127.0.0.1:PORT\r\n", 403),
        (b"POST /f/3 HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nReferer: http://127.0.0.1:PORT/f/3\r\n", 403),
        (b"POST /f/3 HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nOrigin: http://127.0.0.1:PORT\r\nContent-Length: 0, 5\r\n", 400),
        (b"OPTIONS /f/3 HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nOrigin: http://evil.example\r\n", 403),
    ],
)
def test_a_head_is_answered_or_refused(site, head, expected):
    port, notes = site
    before = notes.all()
    reply = answer(port, head.replace(b"PORT", str(port).encode()) + b"Connection: close\r\n\r\n")
    assert status(reply) == expected
    assert notes.all() == before


def head(port: int, length: int, path: str = "/f/3") -> bytes:
    own = f"127.0.0.1:{port}"
    return f"POST {path} HTTP/1.1\r\nHost: {own}\r\nOrigin: http://{own}\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_request_that_never_arrives_whole_is_let_go(site, monkeypatch):
    port, notes = site
    monkeypatch.setattr(connection_module, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(guard_module, "BODY_SECONDS", 0.3)
    before = notes.all()
    for begin in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: "):
        assert answer(port, begin) == b""
    assert drip(port) < 100  # a byte now and then is no request either
    whole = b"GET /app.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    assert answer(port, whole, b"GET /app").count(b"HTTP/1.1 200") == 1  # the second request of a connection
    assert answer(port, whole * 3).count(b"HTTP/1.1 200") == 3  # uvicorn closes it when no more comes
    reply = answer(port, head(port, 100), b"label=sto")
    assert status(reply) == 408
    assert b"expected a whole request within" in reply
    assert notes.all() == before


def test_more_connections_than_the_server_holds_get_a_sentence(site):
    port, _ = site
    with contextlib.ExitStack() as held:
        for _ in range(connection_module.MOST_CONNECTIONS):
            held.enter_context(socket.create_connection(("127.0.0.1", port)))
        reply = answer(port)  # without having asked
        assert status(reply) == 503
        assert connection_module.FULL in json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    for _ in range(100):  # when they are closed, there is room again
        if status(answer(port, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")) == 200:
            return
        time.sleep(0.02)
    pytest.fail("no room after the others were closed")


def test_a_text_takes_longer_than_a_head_may(site, monkeypatch):
    port, _ = site
    monkeypatch.setattr(connection_module, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(guard_module, "BODY_SECONDS", 0.2)
    wanted = json.dumps({"prompt": "I", "features": {}}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head(port, len(wanted), "/api/steer") + wanted)
        begin, received = time.monotonic(), 0
        while time.monotonic() - begin < 1:
            received += len(connection.recv(1 << 16))
    assert received > 50_000  # pieces came all the while


def test_clients_that_leave_are_no_errors_and_hold_nothing(site, caplog):
    port, _ = site
    wanted = json.dumps({"prompt": "I", "features": {}}).encode()
    log = logging.getLogger("uvicorn.error")
    log.addHandler(caplog.handler)
    try:
        for path in ("/f/3", "/lists", "/notes/import", "/api/steer"):
            for sent in (b"", b"label=x"):
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(head(port, 500, path) + sent)
                    time.sleep(0.02)
        for pause in (0, 0.03, 0.1) * 3:  # in the queue or in the middle of the text
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(head(port, len(wanted), "/api/steer") + wanted)
            time.sleep(pause)
            connection.close()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:  # the model is free for the next
            connection.sendall(head(port, len(wanted), "/api/steer") + wanted)
            assert b"event-stream" in connection.recv(1 << 16)
        assert caplog.records == []
        assert status(answer(port, b"no request\r\n\r\n")) == 400
        assert {record.getMessage() for record in caplog.records} == {"Invalid HTTP request received."}  # so that faults would be seen here
    finally:
        log.removeHandler(caplog.handler)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="a limit of Linux")
def test_a_reader_that_does_not_read_lets_go_of_the_model(hostile, monkeypatch):
    monkeypatch.setattr(browse_module, "UNREAD_MILLISECONDS", 500)
    closed = []

    def endless(prompt, features, sampling):
        try:
            while True:
                yield {"side": "steered", "text": "x" * 100_000}
        finally:
            closed.append(prompt)

    with served(create_app(hostile.index, hostile.notes, steering=endless)) as url:
        port = int(url.rpartition(":")[2])
        wanted = json.dumps({"prompt": "I", "features": {}}).encode()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head(port, len(wanted), "/api/steer") + wanted)
            for _ in range(200):
                if closed:
                    break
                time.sleep(0.1)
    assert closed == ["I"]
