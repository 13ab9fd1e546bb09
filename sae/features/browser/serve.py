"""The feature browser: a server on this machine alone, for one index and, with its model, for prompts and steering."""

import gc
import socket
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.features.browser.state import Ranges, Steering
from sae.features.index.reader import FeatureIndex
from sae.features.notes import Notes
from sae.model.language_model import LanguageModel

if TYPE_CHECKING:
    import uvicorn

HOST = "127.0.0.1"
UNREAD_MILLISECONDS = 60_000


@dataclass(kw_only=True)
class BrowseConfig:
    index: Path
    """Folder that `sae index` wrote."""
    notes: Path | None = None
    """SQLite file of labels, stars, notes and lists. Default: notes.sqlite beside the index."""
    model: str | None = None
    """Model for prompts and steering, by hub name, folder or GGUF file; "none" browses without a model. Default: the one the index
    names."""
    dictionary: str | None = None
    """Folder, file or hub name of the dictionary. Default: the one the index was built from."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    port: int = 8765
    """Port on 127.0.0.1; 0 uses any free one."""
    open: bool = True
    """Open the web browser."""
    verify: bool = False
    """First compare every file's checksum. By default only those of files up to 32 MB are compared."""


def serve(
    config: BrowseConfig,
    make_steering: Callable[[LanguageModel, Dictionary, FeatureIndex], Steering] | None = None,
    make_ranges: Callable[[LanguageModel, Dictionary, FeatureIndex], Ranges] | None = None,
) -> None:
    """Serves until Ctrl-C. `make_steering` and `make_ranges` return the functions of the steering panel, which are not in this package.

    Raises `InputError` for parts that do not belong together, or a port that is in use.
    """
    from sae.features.browser.app import create_app

    index = FeatureIndex.open(config.index, verify=config.verify)
    with listening(config.port) as listener:  # before the model is loaded: a taken port and a damaged file are said at once
        notes = Notes.open(config.notes, index)
        if notes.read_only:
            print(f"the notes in {notes.path} can only be read: they are shown, but no change is kept", flush=True)
        lm, dictionary, steering, ranges = None, None, None, None
        if config.model != "none":
            lm, dictionary = parts_of(index, config.dictionary, config.model, config.device)
            steering = make_steering(lm, dictionary, index) if make_steering else None
            ranges = make_ranges(lm, dictionary, index) if make_ranges else None
        app = create_app(index, notes, model=lm, dictionary=dictionary, steering=steering, ranges=ranges)
        url = f"http://{HOST}:{listener.getsockname()[1]}/"
        print(f"features of {config.index} at {url} (Ctrl-C ends it)", flush=True)
        if config.open:
            threading.Timer(0.5, webbrowser.open, (url,)).start()
        gc.freeze()  # what was loaded stays; no collection in the middle of a page need walk through it
        try:
            server_of(app).run(sockets=[listener])
        except KeyboardInterrupt:  # how it is meant to end
            print()
        finally:
            gc.unfreeze()  # or libraries complain of what is left at the end


def parts_of(index: FeatureIndex, dictionary: str | None, model: str | None, device: str = "auto") -> tuple[LanguageModel, Dictionary]:
    """Model and dictionary of an index, or others with the same weights. Raises `InputError` if the weights differ."""
    sae = index.dictionary(dictionary)
    known = index.info["model"]
    lm = LanguageModel.load(model or known["name"], device=device)
    if known.get("fingerprint") not in (None, lm.fingerprint()):
        raise InputError(f"expected the model of {index.folder}, {known['name']}, but {lm.name} has other weights; give that model")
    return lm, sae


def server_of(app: Any) -> "uvicorn.Server":
    import uvicorn

    from sae.features.browser.connection import Connection

    settings = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=1 << 18,  # a URL beyond what we take is still answered with a sentence
    )
    return uvicorn.Server(settings)


def listening(port: int) -> socket.socket:
    """A socket that only programs on this machine can reach."""
    if not 0 <= port < 1 << 16:
        raise InputError(f"expected a port from 0 to 65535, got {port}")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle on: 40 ms
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: a client that does not read its answer is let go
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MILLISECONDS)
    try:
        listener.bind((HOST, port))
        listener.listen()  # who comes before the server is ready waits for it
    except OSError as error:
        listener.close()
        raise InputError(f"expected port {port} of {HOST} to be free, but it is not ({error.strerror}); choose another --port") from None
    return listener
