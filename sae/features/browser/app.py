"""The browser's server: pages whose address is their whole state, notes that are kept, and the same things as JSON.

Everything is rendered here (screens.py); the one script adds keys and streaming. No request ever leaves the machine.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

import numpy as np

from sae.errors import InputError
from sae.features.browser import panels, screens
from sae.features.browser.guard import Guard, Unfit
from sae.features.browser.query import Query, finite
from sae.features.browser.state import LONGEST_PROMPT, Browser, NotThere, Steering, digits, sampling, whole
from sae.features.browser.turns import Busy
from sae.features.index.reader import FeatureIndex
from sae.features.notes import Notes, NotesUnusable
from sae.features.pages.assets import STYLE
from sae.model.sampling import Sampling

if TYPE_CHECKING:
    from sae.dictionaries.dictionary import Dictionary
    from sae.model.language_model import LanguageModel

WEB = Path(__file__).with_name("web")
MOST_FIELDS = 20  # of a form
THREADS = 8  # that make pages: each may hold several arrays of the length of the dictionary


def status_of(error: InputError) -> int:
    return 404 if isinstance(error, NotThere) else 503 if isinstance(error, (Busy, NotesUnusable)) else 400


def create_app(
    index: FeatureIndex,
    notes: Notes,
    *,
    model: "LanguageModel | None" = None,
    dictionary: "Dictionary | None" = None,
    steering: Steering | None = None,
) -> Any:
    """The ASGI application. Without `model` and `dictionary` there are no prompts, without `steering` there is no steering panel."""
    from fastapi import FastAPI

    from sae.features.browser.api import add_api

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=_few_threads)  # their pages load scripts from elsewhere
    browser = Browser(index, notes, model, dictionary, steering)
    _answer_errors(app)
    _add_pages(app, browser)
    _add_changes(app, browser)
    add_api(app, browser)
    return Guard(app)


@asynccontextmanager
async def _few_threads(_app: Any) -> AsyncIterator[None]:
    from anyio.to_thread import current_default_thread_limiter

    current_default_thread_limiter().total_tokens = THREADS
    yield


def _answer_errors(app: Any) -> None:
    """Every refusal is a sentence: as JSON below /api/, else on a page."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.exceptions import HTTPException

    def answer(request: Request, status: int, sentence: str) -> Any:
        if request.url.path.startswith("/api/") or request.url.path == "/notes/import":
            return JSONResponse({"error": sentence}, status)
        return HTMLResponse(screens.refusal(sentence), status)

    @app.exception_handler(InputError)
    async def unusable(request: Request, error: InputError) -> Any:
        return answer(request, status_of(error), str(error))

    @app.exception_handler(Unfit)
    async def unfit(request: Request, error: Unfit) -> Any:
        reply = answer(request, error.status, str(error))
        reply.headers["connection"] = "close"  # the rest of the body is not waited for
        return reply

    @app.exception_handler(RequestValidationError)
    async def not_a_number(request: Request, error: RequestValidationError) -> Any:
        return answer(request, 404, f"expected a whole number in the address, got {str(error.errors()[0].get('input'))[:40]!r}")

    @app.exception_handler(HTTPException)
    async def nothing_there(request: Request, error: HTTPException) -> Any:
        return answer(request, error.status_code, f"{request.method} {request.url.path[:100]}: there is nothing here ({error.detail})")

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Any:
        return answer(request, 500, "something in the server failed; its terminal says what")


def _add_pages(app: Any, browser: Browser) -> None:
    from fastapi import Request
    from fastapi.responses import HTMLResponse, RedirectResponse, Response
    from starlette.concurrency import run_in_threadpool

    files = {
        "/style.css": ("text/css", STYLE + (WEB / "server.css").read_text(encoding="utf-8")),
        "/app.js": ("text/javascript", (WEB / "app.js").read_text(encoding="utf-8")),
    }

    def file(request: Request) -> Any:  # no parameters but the path: FastAPI would take them from the address
        kind, text = files[request.url.path]
        return Response(text, media_type=kind, headers={"cache-control": "no-cache"})

    for path in files:
        app.get(path)(file)
    app.get("/favicon.ico")(lambda: Response(status_code=204))

    @app.get("/")
    async def table(request: Request) -> Any:
        params = dict(request.query_params)
        number = params.get("q", "").strip().removeprefix("#")
        if number.isascii() and number.isdigit() and params.get("how", "text") == "text":
            return RedirectResponse(f"/f/{int(number[:12])}", 303)
        page, query = max(1, whole("page", params.get("page") or "1")), Query.read(params)
        try:
            return HTMLResponse(await browser.with_list(request, query, lambda: screens.table(browser, query, page)))
        except InputError as error:
            return HTMLResponse(screens.table(browser, query, page, str(error)), status_of(error))

    @app.get("/f/{j}")
    async def feature(j: int, request: Request) -> Any:
        browser.require(j)
        query, at = Query.read(request.query_params), digits(request.query_params.get("at", ""))
        return HTMLResponse(await browser.with_list(request, query, lambda: screens.feature(browser, j, query, at)))

    @app.get("/random")
    async def random(request: Request) -> Any:
        query = Query.read(request.query_params)
        features = await browser.with_list(request, query, lambda: browser.tables.features(query))
        if not len(features):
            raise InputError("the list is empty, so there is no feature to draw from it")
        at = int(np.random.default_rng().integers(len(features)))
        return RedirectResponse(f"/f/{features[at]}?{query.params(at=str(at))}", 303)

    @app.get("/prompt")
    async def prompt(request: Request) -> Any:
        params = dict(request.query_params)
        params["t"] = ",".join(request.query_params.getlist("t"))
        try:
            reading = await browser.read(request, params, 50 if params["t"] else 8)
            return HTMLResponse(await run_in_threadpool(panels.prompt, browser, params, reading))
        except InputError as error:
            return HTMLResponse(panels.prompt(browser, params, None, str(error)), status_of(error))

    @app.get("/steer")
    def steer(request: Request) -> Any:
        params = request.query_params
        features = list(zip_longest(params.getlist("feature"), params.getlist("strength")[: len(params.getlist("feature"))], fillvalue="1"))
        features += [(added, "1") for added in params.getlist("add") if added]
        chosen, drawn, failure = dict[int, float](), Sampling(), None
        try:
            drawn = sampling(params)
            for j, strength in features:
                if j:
                    browser.require(whole("feature", j))
                    chosen[whole("feature", j)] = finite("strength", strength or "0")
        except InputError as error:  # what was right stays in the form
            failure = error
        html = panels.steer(browser, chosen, drawn, params.get("prompt", "")[:LONGEST_PROMPT], str(failure or ""))
        return HTMLResponse(html, status_of(failure) if failure else 200)

    @app.get("/lists")
    def lists(request: Request) -> Any:
        return HTMLResponse(screens.lists(browser, digits(request.query_params.get("imported", ""))))

    @app.get("/notes.jsonl")
    def export() -> Any:
        disposition = {"content-disposition": 'attachment; filename="notes.jsonl"'}
        return Response("".join(browser.notes.jsonl()), media_type="application/jsonl", headers=disposition)


def _add_changes(app: Any, browser: Browser) -> None:
    """Forms; the guard lets only this server's own pages send them."""
    from fastapi import Depends, Request
    from fastapi.responses import HTMLResponse, RedirectResponse

    async def form(request: Request) -> dict[str, str]:
        body = (await request.body()).decode("utf-8", "replace")
        try:
            return {name: values[-1] for name, values in parse_qs(body, keep_blank_values=True, max_num_fields=MOST_FIELDS).items()}
        except ValueError:
            raise InputError(f"expected a form of at most {MOST_FIELDS} fields") from None

    async def lines(request: Request) -> list[str]:
        try:
            return (await request.body()).decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise InputError("expected notes as lines of JSON in UTF-8, got other bytes") from None

    @app.post("/f/{j}")
    def change(j: int, request: Request, fields: dict[str, str] = Depends(form)) -> Any:  # noqa: B008 (how FastAPI is told)
        browser.require(j)
        try:
            keep(j, fields)
            lists = browser.notes.lists()
        except InputError as error:  # what was typed stays in the form
            return HTMLResponse(screens.unsaved(j, f"/f/{j}?{request.query_params}", fields, str(error)), status_of(error))
        kept = [(name, value) for name, value in request.query_params.multi_items() if name != "list" or value in lists]
        return RedirectResponse(f"/f/{j}" + (f"?{urlencode(kept)}" if kept else ""), 303)  # a list goes with its last member

    def keep(j: int, fields: dict[str, str]) -> None:
        if "label" in fields or "note" in fields or "starred" in fields:
            starred = {"1": True, "0": False}.get(fields.get("starred", ""))
            browser.notes.set(j, label=fields.get("label"), note=fields.get("note"), starred=starred)
        if "remove" in fields:
            browser.notes.remove_from_list(fields["remove"], j)
        if fields.get("list", "").strip():
            browser.notes.add_to_list(fields["list"], j)
        if not {"label", "note", "starred", "remove", "list"} & set(fields):
            raise InputError("expected a label, a note, a star or a list, got none of them")

    @app.post("/lists")
    def remove(fields: dict[str, str] = Depends(form)) -> Any:  # noqa: B008
        browser.notes.remove_from_list(fields.get("remove", ""))
        return RedirectResponse("/lists", 303)

    @app.post("/notes/import")
    def take_over(entries: list[str] = Depends(lines)) -> Any:  # noqa: B008
        return {"entries": browser.notes.import_jsonl(entries)}
