"""The browser's server: pages whose address is their whole state, notes that are kept, and the same things as JSON.

Everything is rendered here (screens.py); the one script adds keys and streaming. No request ever leaves the machine.
"""

from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import asynccontextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar
from urllib.parse import parse_qs, urlencode

import numpy as np

from sae.errors import InputError
from sae.features.browser import panels, screens
from sae.features.browser.guard import Guard, Unfit
from sae.features.browser.query import Query, Tables, finite
from sae.features.browser.turns import Busy, Turns
from sae.features.index.reader import FeatureIndex
from sae.features.notes import Notes, NotesUnusable
from sae.features.pages.assets import STYLE

if TYPE_CHECKING:
    from fastapi import Request

    from sae.dictionaries.dictionary import Dictionary
    from sae.features.browser.prompt import Reading
    from sae.model.language_model import LanguageModel

WEB = Path(__file__).with_name("web")
LONGEST_PROMPT = 2_000  # characters
MOST_STEERED = 8  # features together
MOST_FIELDS = 20  # of a form
THREADS = 8  # that make pages: each may hold several arrays of the length of the dictionary
T = TypeVar("T")


class Sampling(NamedTuple):
    """How a text is drawn."""

    max_new_tokens: int = 40
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


Steering: TypeAlias = Callable[[str, Sequence[tuple[int, float]], Sampling], Generator[dict[str, Any], None, None]]


class NotThere(InputError):
    """What the address names does not exist: status 404."""


def status_of(error: InputError) -> int:
    return 404 if isinstance(error, NotThere) else 503 if isinstance(error, (Busy, NotesUnusable)) else 400


class Browser:
    """What the routes share."""

    def __init__(
        self,
        index: FeatureIndex,
        notes: Notes,
        lm: "LanguageModel | None",
        dictionary: "Dictionary | None",
        steering: Steering | None,
    ):
        from sae.features.explanations.explain import read_explanations

        self.index, self.notes, self.lm, self.dictionary, self.steering = index, notes, lm, dictionary, steering
        self.explanations = read_explanations(index.folder)
        self.tables = Tables(index, notes)
        self.model, self.searches = Turns("the model", "prompt", "steer"), Turns("the search through the index", "search")
        notes.update_search(index, self.explanations)

    def require(self, j: int) -> None:
        if not 0 <= j < self.index.d_sae:
            raise NotThere(f"feature {j} does not exist: the dictionary has features 0 to {self.index.d_sae - 1}")

    async def with_list(self, request: "Request", query: Query, make: Callable[[], T]) -> T:
        """`make()` in a thread; a list that needs a search through the whole index first waits for its turn."""
        from starlette.concurrency import run_in_threadpool

        if self.tables.remembers(query):
            return await run_in_threadpool(make)
        async with self.searches.turn("search", request):
            return await run_in_threadpool(make)

    async def read(self, request: "Request", params: dict[str, str], n: int) -> "Reading | None":
        """The prompt of an address, when the model is free; None without one."""
        from starlette.concurrency import run_in_threadpool

        from sae.features.browser.prompt import read_prompt

        text = params.get("text", "")
        if not text:
            return None
        if self.lm is None or self.dictionary is None:
            raise InputError("expected a model to read the text with, but the server was started with --model none")
        if len(text) > LONGEST_PROMPT:
            raise InputError(f"expected a text of at most {LONGEST_PROMPT:,} characters, got {len(text):,}")
        density = params.get("density_max", "")
        order: Any = params.get("order") or "activation"
        positions = [whole("t", part) for part in params.get("t", "").split(",") if part] or None
        density_max = finite("density_max", density) if density else None
        async with self.model.turn("prompt", request):
            return await run_in_threadpool(
                read_prompt,
                self.lm,
                self.dictionary,
                self.index,
                text,
                order=order,
                positions=positions,
                n=n,
                density_max=density_max,
            )


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


def sampling(params: Any) -> Sampling:
    """From an address or a body. Raises `InputError` for values that cannot be sampled with."""
    default = Sampling()
    given = {name: params.get(name) for name in Sampling._fields if params.get(name) not in (None, "")}
    tokens, seed = (whole(name, str(given.get(name, getattr(default, name)))) for name in ("max_new_tokens", "seed"))
    temperature, top_p = (finite(name, str(given.get(name, getattr(default, name)))) for name in ("temperature", "top_p"))
    if not (1 <= tokens <= 1000 and 0 <= temperature <= 10 and 0 < top_p <= 1 and 0 <= seed < 1 << 32):
        raise InputError(
            "expected 1 to 1000 new tokens, a temperature from 0 to 10, top_p above 0 and up to 1, and a seed from 0 to 2^32 - 1, "
            f"got {tokens}, {temperature:g}, {top_p:g} and {seed}"
        )
    return Sampling(tokens, temperature, top_p, seed)


def digits(text: str) -> int | None:
    """The number that digits alone write; None for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 12 else None


def whole(name: str, text: str) -> int:
    """A whole number from an address. Raises `InputError` naming what it was for."""
    if digits(text.strip().removeprefix("-")) is None:
        raise InputError(f"expected a whole number as {name}, got {text[:40]!r}")
    return int(text)
