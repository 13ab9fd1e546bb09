"""What stands between the server and any other web page that the same browser has open.

A server on 127.0.0.1 is reached by every page that its user visits. Requests that a foreign page causes are refused, by their Host (DNS
rebinding), their Origin (changes) and their Sec-Fetch-Site (everything else but following a link); and sizes are bounded.
"""

import json
from typing import Any
from urllib.parse import urlsplit

HOSTS = ("127.0.0.1", "localhost")
LONGEST_ADDRESS = 40_000  # bytes; a prompt of 2,000 characters is at most 24,000
LARGEST_BODY = {"/notes/import": 1 << 24}  # bytes
OTHER_BODY = 1 << 17  # a note of 10,000 characters is at most 120,000
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class TooLarge(Exception):
    """The body went on beyond what was announced or allowed."""


class Guard:
    """ASGI middleware: refuses with a sentence, and puts the same headers on every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        limit, received = LARGEST_BODY.get(scope["path"], OTHER_BODY), 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise TooLarge(f"expected at most {limit:,} bytes, but more came")
            return message

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        refusal = refused(scope["method"], headers, len(scope["query_string"]), limit)
        if refusal is None:
            await self.app(scope, counted, guarded)
        else:
            status, sentence = refusal
            body = json.dumps({"error": sentence}).encode()
            kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await guarded({"type": "http.response.start", "status": status, "headers": kind})
            await send({"type": "http.response.body", "body": body})


def refused(method: str, headers: dict[str, str], address_bytes: int, body_limit: int) -> tuple[int, str] | None:
    """Status and sentence for a request that must not be answered."""
    host = headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in HOSTS:
        return 403, f"expected a request to 127.0.0.1 or localhost, got one to {host[:100]!r}"
    if method not in ("GET", "HEAD") and headers.get("origin") != f"http://{host}":
        origin = headers.get("origin", "nowhere")[:100]
        return 403, f"only this server's own pages may change anything, but the request came from {origin!r}"
    if headers.get("sec-fetch-site") in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
        return 403, "a page of another origin may link to this server, but not load from it"
    if address_bytes > LONGEST_ADDRESS:
        return 414, f"expected an address of at most {LONGEST_ADDRESS:,} bytes, got {address_bytes:,}"
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > body_limit:
        return 413, f"expected at most {body_limit:,} bytes, got {length[:20]}"
    return None
