"""Protects the server against other web pages in the same browser, and against clients that never finish.

A server on 127.0.0.1 is reached by every page that its user visits. Requests that a foreign page causes are refused, by their Host (DNS
rebinding), their Origin and their Sec-Fetch headers: all but following a link into its own tab. Sizes and times are bounded.
"""

import asyncio
import json
import re
import time
from typing import Any

LOCAL = re.compile(r"(?:127\.0\.0\.1|localhost)(?::([1-9][0-9]{0,4}))?", re.IGNORECASE)  # no user, no path; the port may be a tunnel's
ONCE = ("host", "origin", "content-length", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest")  # headers that we go by
LONGEST_URL = 40_000  # bytes; a prompt of 2,000 characters is at most 24,000
LARGEST_BODY = {"/notes/import": 1 << 24}  # bytes
OTHER_BODY = 1 << 17  # a note of 10,000 characters is at most 120,000
BODY_SECONDS = 30.0  # for a body to arrive whole
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Unfit(Exception):
    """The body is longer or slower than announced or allowed."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Guard:
    """ASGI middleware: refuses with a sentence, and puts the same headers, with this content security policy, on every answer."""

    def __init__(self, app: Any, policy: str = POLICY):
        self.app = app
        self._headers = [(name.encode(), value.encode()) for name, value in (HEADERS | {"content-security-policy": policy}).items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import ClientDisconnect

        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        limit, received, whole = LARGEST_BODY.get(scope["path"], OTHER_BODY), 0, False
        until = time.monotonic() + BODY_SECONDS

        async def bounded() -> Any:
            nonlocal received, whole
            try:
                message = await asyncio.wait_for(receive(), None if whole else until - time.monotonic())
            except asyncio.TimeoutError:
                raise Unfit(408, f"expected a whole request within {BODY_SECONDS:.0f} seconds, got {received:,} bytes of it") from None
            received, whole = received + len(message.get("body", b"")), not message.get("more_body", False)
            if received > limit:
                raise Unfit(413, f"expected at most {limit:,} bytes, got more")
            return message

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        refusal = refused(scope["method"], headers, len(scope["query_string"]), limit)
        if refusal is None:
            try:
                return await self.app(scope, bounded, guarded)
            except ClientDisconnect:  # the client has left, and it is not an error of the server
                return
        status, sentence = refusal
        body = json.dumps({"error": sentence}).encode()
        kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await guarded({"type": "http.response.start", "status": status, "headers": kind})
        await send({"type": "http.response.body", "body": body})


def refused(method: str, given: list[tuple[str, str]], url_bytes: int, body_limit: int) -> tuple[int, str] | None:
    """Status and sentence for a request that must not be answered. `given`: its headers in lower case."""
    names, headers = [name for name, _ in given], dict(given)
    for name in ONCE:
        if names.count(name) > 1:
            return 400, f"expected one header {name}, got {names.count(name)}"
    host, origin = headers.get("host", ""), headers.get("origin")
    local = LOCAL.fullmatch(host)
    if local is None or int(local[1] or 80) > 65535:
        return 403, f"expected a request to 127.0.0.1 or localhost, got one to {host[:100]!r}"
    if origin != f"http://{host}" and (method not in ("GET", "HEAD") or origin is not None):
        return 403, f"only this server's own pages may do this, but the request is from {(origin or 'nowhere')[:100]!r}"
    arrives = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document") and "sec-purpose" not in headers
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not arrives:
        return 403, "a page of another origin may link to this server, but not load from it, frame it or fetch it beforehand"
    if url_bytes > LONGEST_URL:
        return 414, f"expected a URL of at most {LONGEST_URL:,} bytes, got {url_bytes:,}"
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()) or int(length[:20]) > body_limit:
        return 413, f"expected at most {body_limit:,} bytes, got {length[:20]}"
    return None
