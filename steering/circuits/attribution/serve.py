"""An attribution graph's page, served together with its model: an edge is checked by setting its source in a pass, from the page itself."""

import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sae.errors import InputError
from sae.features.browser.guard import Guard
from sae.features.browser.serve import HOST, listening, server_of
from steering.circuits.attribution.command import opened
from steering.circuits.attribution.files import GraphFile
from steering.circuits.attribution.interventions import Intervening
from steering.circuits.attribution.page import graph_html

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(kw_only=True)
class BrowseGraphConfig:
    graph: Path
    """JSON file that `sae attribute` wrote."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    port: int = 8766
    """Port on 127.0.0.1; 0 uses any free one."""
    open: bool = True
    """Open the web browser."""


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    node: str
    factor: float
    targets: list[str] = []


def browse_graph(config: BrowseGraphConfig) -> None:
    """Serves until Ctrl-C. Raises `InputError` for parts that no longer belong together, and for a port that is taken."""
    with listening(config.port) as listener:
        content, intervening = opened(config.graph, config.device)
        url = f"http://{HOST}:{listener.getsockname()[1]}/"
        print(f"{config.graph} at {url} (Ctrl-C ends it)", flush=True)
        if config.open:
            threading.Timer(0.5, webbrowser.open, (url,)).start()
        try:
            server_of(create_app(content, intervening, config.graph)).run(sockets=[listener])
        except KeyboardInterrupt:  # how it is meant to end
            print()


def create_app(content: GraphFile, intervening: Intervening, path: Path) -> Any:
    """The ASGI application: the page at /, and POST /intervene, which returns the result of `Intervening.set`."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    html, one_at_a_time = graph_html(content, str(path), served=True), threading.Lock()

    def page(_request: Request) -> Response:
        return HTMLResponse(html)

    async def intervene(request: Request) -> Response:
        try:
            asked = Asked.model_validate_json(await request.body())
        except ValidationError as error:
            raise InputError(f"expected JSON with node, factor and targets, got something else: {error.errors()[0]['msg']}") from None

        def run() -> dict[str, Any]:
            with one_at_a_time:
                return intervening.set(asked.node, asked.factor, asked.targets)

        return JSONResponse(await run_in_threadpool(run))

    async def unusable(_request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    async def nothing_there(_request: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"there is nothing here ({error})"}, getattr(error, "status_code", 404))

    routes = [Route("/", page), Route("/intervene", intervene, methods=["POST"])]
    app = Starlette(routes=routes, exception_handlers={InputError: unusable, HTTPException: nothing_there})
    return Guard(app, POLICY)
