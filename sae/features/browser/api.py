"""The server's answers as JSON, and steered text as it is written."""

import json
from collections.abc import AsyncIterator, Generator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sae.disk.writing import jsonable
from sae.errors import InputError
from sae.features.browser import screens
from sae.features.browser.query import PAGE, Query, finite
from sae.features.browser.state import LONGEST_PROMPT, MOST_STEERED, Browser, NotThere, browser_of, feature_of, sampling, whole


def feature(request: Request) -> Response:
    from sae.features.exports.neuronpedia import feature_json, source_of

    browser, asked = browser_of(request), (request.path_params["model"], request.path_params["source"])
    known = source_of(browser.index)
    if asked != known:
        expected = f"/api/feature/{known[0]}/{known[1]}/{request.path_params['j']}"
        raise NotThere(f"expected {expected}, the model and source of this index, got {asked[0]}/{asked[1]}")
    j = feature_of(request)
    return JSONResponse(feature_json(browser.index, j, browser.explanations.get(j, ())))


async def features(request: Request) -> Response:
    browser = browser_of(request)
    query, page = Query.read(request.query_params), max(1, whole("page", request.query_params.get("page") or "1"))

    def answer() -> Response:
        chosen = browser.tables.features(query)
        on_page = chosen[(page - 1) * PAGE : page * PAGE].tolist()
        return JSONResponse({"total": len(chosen), "page": page, "features": [screens.feature_row(browser, j) for j in on_page]})

    return await browser.with_list(request, query, answer)


async def prompt(request: Request) -> Response:
    params = dict(request.query_params)
    reading = await browser_of(request).read(request, params, min(1000, max(1, whole("n", params.get("n") or "10"))))
    if reading is None:
        raise InputError("expected a text to read, got none")
    firings = [[firing._asdict() for firing in found] for found in reading.firings]
    return JSONResponse(jsonable(reading._asdict() | {"firings": firings}))


async def steer(request: Request) -> Response:
    browser, value = browser_of(request), await body(request)
    if browser.steering is None:
        raise InputError("expected a model to steer, but the server was started without a model")
    prompt, pairs = steered_prompt(browser, value)
    drawn = sampling(value)
    await browser.model.wait_for("steer", request)
    try:
        pieces = await run_in_threadpool(browser.steering, prompt, pairs, drawn)
        return Events(browser, pieces)
    except BaseException:
        browser.model.release("steer")
        raise


async def working_range(request: Request) -> Response:
    """Runs in pieces, each of which waits for its turn, so that a text to be written never waits for more than one piece."""
    browser = browser_of(request)
    if browser.ranges is None:
        raise InputError("expected a model to steer, but the server was started without a model")
    j = whole("feature", request.query_params.get("feature", ""))
    browser.require(j)
    pieces, found = browser.ranges(j), None
    while found is None:
        if await request.is_disconnected():
            raise ClientDisconnect
        async with browser.model.turn("range", request):
            found = await run_in_threadpool(next, pieces)
    return JSONResponse(jsonable(found))


async def body(request: Request) -> dict[str, Any]:
    try:
        value = json.loads(await request.body())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError("expected an object of JSON, got something else")
    return value


def steered_prompt(browser: Browser, value: dict[str, Any]) -> tuple[str, list[tuple[int, float]]]:
    """The prompt, and the features with their strengths. Raises `InputError` for what cannot be steered with."""
    prompt, features = str(value.get("prompt", "")), value.get("features")
    if not prompt.isascii() and prompt != prompt.encode("utf-8", "replace").decode():
        raise InputError("expected a prompt of whole characters, got half of a surrogate pair")
    if len(prompt) > LONGEST_PROMPT or not isinstance(features, dict) or len(features) > MOST_STEERED:
        raise InputError(
            f"expected a prompt of at most {LONGEST_PROMPT:,} characters and features as an object of at most {MOST_STEERED} "
            'pairs such as {"123": 1.5}'
        )
    pairs = [(whole("feature", j), finite("strength", str(strength))) for j, strength in features.items()]
    for j, _ in pairs:
        browser.require(j)
    return prompt, pairs


class Events(StreamingResponse):
    """Pieces of text as they are written; then the model is released, even if the reader disconnected before the first piece."""

    def __init__(self, browser: Browser, pieces: Generator[dict[str, Any], None, None]):
        super().__init__(_events(pieces), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.browser = browser

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            self.browser.model.release("steer")


async def _events(pieces: Generator[dict[str, Any], None, None]) -> AsyncIterator[str]:
    """Pieces as server-sent events."""
    try:
        while (piece := await run_in_threadpool(next, pieces, None)) is not None:
            yield f"data: {json.dumps(piece)}\n\n"
        yield 'data: {"done": true}\n\n'
    except (InputError, RuntimeError) as error:  # of the model's arithmetic; the text so far stays
        yield f"data: {json.dumps({'error': str(error)})}\n\n"
    finally:
        pieces.close()


ROUTES = [
    Route("/api/feature/{model:path}/{source}/{j}", feature),
    Route("/api/features", features),
    Route("/api/prompt", prompt),
    Route("/api/range", working_range),
    Route("/api/steer", steer, methods=["POST"]),
]
