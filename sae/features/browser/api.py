"""The server's answers as JSON, and steered text as it is written."""

import json
from collections.abc import AsyncIterator, Generator
from typing import TYPE_CHECKING, Any

from sae.disk.writing import jsonable
from sae.errors import InputError
from sae.features.browser import screens
from sae.features.browser.query import PAGE, Query, finite
from sae.features.browser.state import LONGEST_PROMPT, MOST_STEERED, NotThere, sampling, whole

if TYPE_CHECKING:
    from sae.features.browser.state import Browser


def add_api(app: Any, browser: "Browser") -> None:
    from fastapi import Depends, Request
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.concurrency import run_in_threadpool

    from sae.features.exports.neuronpedia import feature_json, source_of

    index = browser.index

    class Written(StreamingResponse):
        """Events, after which the model is let go of: also when the reader left before the first."""

        async def __call__(self, *connection: Any) -> None:
            try:
                await super().__call__(*connection)
            finally:
                browser.model.release("steer")

    @app.get("/api/feature/{model:path}/{source}/{j}")
    def feature(model: str, source: str, j: int) -> Any:
        known = source_of(index)
        if (model, source) != known:
            raise NotThere(f"expected /api/feature/{known[0]}/{known[1]}/{j}, the model and source of this index, got {model}/{source}")
        browser.require(j)
        return JSONResponse(feature_json(index, j, browser.explanations.get(j, ())))

    @app.get("/api/features")
    async def features(request: Request) -> Any:
        query, page = Query.read(request.query_params), max(1, whole("page", request.query_params.get("page") or "1"))

        def answer() -> Any:
            chosen = browser.tables.features(query)
            shown = chosen[(page - 1) * PAGE : page * PAGE].tolist()
            return JSONResponse({"total": len(chosen), "page": page, "features": [screens.feature_row(browser, j) for j in shown]})

        return await browser.with_list(request, query, answer)

    @app.get("/api/prompt")
    async def prompt(request: Request) -> Any:
        params = dict(request.query_params)
        reading = await browser.read(request, params, min(1000, max(1, whole("n", params.get("n") or "10"))))
        if reading is None:
            raise InputError("expected a text to read, got none")
        firings = [[firing._asdict() for firing in found] for found in reading.firings]
        return JSONResponse(jsonable(reading._asdict() | {"firings": firings}))

    async def body(request: Request) -> dict[str, Any]:
        try:
            value = json.loads(await request.body())
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InputError("expected an object of JSON, got something else")
        return value

    @app.post("/api/steer")
    async def steer(request: Request, value: dict[str, Any] = Depends(body)) -> Any:  # noqa: B008
        if browser.steering is None:
            raise InputError("expected a model to steer, but the server was started without one")
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
        drawn = sampling(value)
        await browser.model.wait_for("steer", request)
        try:
            pieces = await run_in_threadpool(browser.steering, prompt, pairs, drawn)
            return Written(_events(pieces), media_type="text/event-stream", headers={"cache-control": "no-store"})
        except BaseException:
            browser.model.release("steer")
            raise


async def _events(pieces: Generator[dict[str, Any], None, None]) -> AsyncIterator[str]:
    """Pieces as server-sent events."""
    from starlette.concurrency import run_in_threadpool

    try:
        while (piece := await run_in_threadpool(next, pieces, None)) is not None:
            yield f"data: {json.dumps(piece)}\n\n"
        yield 'data: {"done": true}\n\n'
    except (InputError, RuntimeError) as error:  # of the model's arithmetic; the text so far stays
        yield f"data: {json.dumps({'error': str(error)})}\n\n"
    finally:
        pieces.close()
