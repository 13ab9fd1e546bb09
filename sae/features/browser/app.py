"""The browser's server: pages whose URL is their whole state, notes that are kept, and the same things as JSON (api.py).

Everything is rendered here (screens.py); the one script adds keys and streaming. No request ever leaves the machine.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from sae.errors import InputError
from sae.features.browser import api, panels, screens
from sae.features.browser.guard import Guard, Unfit
from sae.features.browser.query import Query, finite
from sae.features.browser.state import LONGEST_PROMPT, Browser, NotThere, Ranges, Steering, browser_of, digits, feature_of, sampling, whole
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


def create_app(
    index: FeatureIndex,
    notes: Notes,
    *,
    model: "LanguageModel | None" = None,
    dictionary: "Dictionary | None" = None,
    steering: Steering | None = None,
    ranges: Ranges | None = None,
) -> Any:
    """The ASGI application. Without `model` and `dictionary` there are no prompts, without `steering` there is no steering panel.

    `ranges` finds up to which strengths a feature works, which the panel then shows.
    """
    pages: dict[str, Callable] = {
        "/": table,
        "/f/{j}": feature,
        "/random": random,
        "/prompt": prompt,
        "/steer": steer,
        "/lists": lists,
        "/notes.jsonl": export,
        "/favicon.ico": lambda _: Response(status_code=204),
        "/style.css": file("text/css", STYLE + (WEB / "server.css").read_text(encoding="utf-8")),
        "/app.js": file("text/javascript", (WEB / "app.js").read_text(encoding="utf-8")),
    }
    changes: dict[str, Callable] = {"/f/{j}": change, "/lists": remove_list, "/notes/import": take_over}
    routes = [
        *(Route(path, answer) for path, answer in pages.items()),
        *(Route(path, answer, methods=["POST"]) for path, answer in changes.items()),
        *api.ROUTES,
    ]
    refusals: Any = {InputError: unusable, Unfit: unfit, HTTPException: nothing_there, Exception: broken}
    app = Starlette(routes=routes, exception_handlers=refusals, lifespan=_few_threads)
    app.state.browser = Browser(index, notes, model, dictionary, steering, ranges)
    return Guard(app)


@asynccontextmanager
async def _few_threads(_app: Any) -> AsyncIterator[None]:
    from anyio.to_thread import current_default_thread_limiter

    current_default_thread_limiter().total_tokens = THREADS
    yield


# Every refusal is a sentence: as JSON below /api/, else on a page.


def refusal(request: Request, status: int, sentence: str) -> Response:
    if request.url.path.startswith("/api/") or request.url.path == "/notes/import":
        return JSONResponse({"error": sentence}, status)
    return HTMLResponse(screens.refusal(sentence), status)


def status_of(error: InputError) -> int:
    return 404 if isinstance(error, NotThere) else 503 if isinstance(error, (Busy, NotesUnusable)) else 400


async def unusable(request: Request, error: InputError) -> Response:
    return refusal(request, status_of(error), str(error))


async def unfit(request: Request, error: Unfit) -> Response:
    reply = refusal(request, error.status, str(error))
    reply.headers["connection"] = "close"  # the rest of the body is not waited for
    return reply


async def nothing_there(request: Request, error: HTTPException) -> Response:
    return refusal(request, error.status_code, f"{request.method} {request.url.path[:100]}: there is nothing here ({error.detail})")


async def broken(request: Request, error: Exception) -> Response:
    return refusal(request, 500, "something in the server failed; its terminal says what")


# Pages. Functions that are not async run in a thread.


def file(kind: str, text: str) -> Callable[[Request], Response]:
    return lambda _: Response(text, media_type=kind, headers={"cache-control": "no-cache"})


async def table(request: Request) -> Response:
    browser, params = browser_of(request), dict(request.query_params)
    number = params.get("q", "").strip().removeprefix("#")
    if number.isascii() and number.isdigit() and params.get("how", "text") == "text":
        return RedirectResponse(f"/f/{int(number[:12])}", 303)
    page, query = max(1, whole("page", params.get("page") or "1")), Query.read(params)
    try:
        return HTMLResponse(await browser.with_list(request, query, lambda: screens.table(browser, query, page)))
    except InputError as error:
        return HTMLResponse(screens.table(browser, query, page, str(error)), status_of(error))


async def feature(request: Request) -> Response:
    browser, j = browser_of(request), feature_of(request)
    query, at = Query.read(request.query_params), digits(request.query_params.get("at", ""))
    return HTMLResponse(await browser.with_list(request, query, lambda: screens.feature(browser, j, query, at)))


async def random(request: Request) -> Response:
    browser, query = browser_of(request), Query.read(request.query_params)
    features = await browser.with_list(request, query, lambda: browser.tables.features(query))
    if not len(features):
        raise InputError("the list is empty, so there is no feature to draw from it")
    at = int(np.random.default_rng().integers(len(features)))
    return RedirectResponse(f"/f/{features[at]}?{query.params(at=str(at))}", 303)


async def prompt(request: Request) -> Response:
    browser, params = browser_of(request), dict(request.query_params)
    params["t"] = ",".join(request.query_params.getlist("t"))
    try:
        reading = await browser.read(request, params, 50 if params["t"] else 8)
        return HTMLResponse(await run_in_threadpool(panels.prompt, browser, params, reading))
    except InputError as error:
        return HTMLResponse(panels.prompt(browser, params, None, str(error)), status_of(error))


def steer(request: Request) -> Response:
    browser, params = browser_of(request), request.query_params
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


def lists(request: Request) -> Response:
    return HTMLResponse(screens.lists(browser_of(request), digits(request.query_params.get("imported", ""))))


def export(request: Request) -> Response:
    disposition = {"content-disposition": 'attachment; filename="notes.jsonl"'}
    return Response("".join(browser_of(request).notes.jsonl()), media_type="application/jsonl", headers=disposition)


# Changes: forms, which the guard lets only this server's own pages send.


async def form(request: Request) -> dict[str, str]:
    body = (await request.body()).decode("utf-8", "replace")
    try:
        return {name: values[-1] for name, values in parse_qs(body, keep_blank_values=True, max_num_fields=MOST_FIELDS).items()}
    except ValueError:
        raise InputError(f"expected a form of at most {MOST_FIELDS} fields") from None


async def change(request: Request) -> Response:
    browser, j, fields = browser_of(request), feature_of(request), await form(request)
    try:
        lists = await run_in_threadpool(keep, browser.notes, j, fields)
    except InputError as error:  # what was typed stays in the form
        return HTMLResponse(screens.unsaved(j, f"/f/{j}?{request.query_params}", fields, str(error)), status_of(error))
    kept = [(name, value) for name, value in request.query_params.multi_items() if name != "list" or value in lists]
    return RedirectResponse(f"/f/{j}" + (f"?{urlencode(kept)}" if kept else ""), 303)  # a list goes with its last member


def keep(notes: Notes, j: int, fields: dict[str, str]) -> dict[str, list[int]]:
    """Writes what a form says of a feature into the notes, and returns the lists that are there then."""
    if "label" in fields or "note" in fields or "starred" in fields:
        starred = {"1": True, "0": False}.get(fields.get("starred", ""))
        notes.set(j, label=fields.get("label"), note=fields.get("note"), starred=starred)
    if "remove" in fields:
        notes.remove_from_list(fields["remove"], j)
    if fields.get("list", "").strip():
        notes.add_to_list(fields["list"], j)
    if not {"label", "note", "starred", "remove", "list"} & set(fields):
        raise InputError("expected a label, a note, a star or a list, got none of them")
    return notes.lists()


async def remove_list(request: Request) -> Response:
    fields = await form(request)
    await run_in_threadpool(browser_of(request).notes.remove_from_list, fields.get("remove", ""))
    return RedirectResponse("/lists", 303)


async def take_over(request: Request) -> Response:
    try:
        lines = (await request.body()).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise InputError("expected notes as lines of JSON in UTF-8, got other bytes") from None
    return JSONResponse({"entries": await run_in_threadpool(browser_of(request).notes.import_jsonl, lines)})
