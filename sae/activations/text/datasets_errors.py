"""Errors inside the `datasets` library as one sentence, instead of its traceback and its log."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae.disk.places import refusal_sentence
from sae.errors import InputError

LONGEST = 300
"""characters of the library's own message"""
SILENT = {"datasets": logging.ERROR, "huggingface_hub": logging.WARNING}
"""log level from which the library only repeats the error that is raised anyway, or counts retries"""


@contextmanager
def told_plainly(expected: str) -> Iterator[None]:
    """Any error inside becomes an `InputError`: `expected`, the file that was being read if known, and the reason."""
    with _quiet():
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # of pyarrow, pandas, fsspec, huggingface_hub or another reader of this kind of file
            cause = _cause(error)
            _refuse_cache(cause)
            file = _file_read(cause)
            where = f" of {file}" if file and file not in str(cause) else ""
            raise InputError(f"expected {expected}, but datasets says{where}: {_reason(cause)}") from None


def _refuse_cache(cause: BaseException) -> None:
    """Raises `InputError` if the failure is in the folder in which the library caches its input."""
    from datasets import config

    cache = Path(config.HF_DATASETS_CACHE)
    if isinstance(cause, OSError) and isinstance(cause.filename, str) and cause.errno:
        refused = Path(cause.filename)
        if refused in (cache, *cache.parents) or cache in refused.parents:
            raise InputError(f"{refusal_sentence(cause, cache)}, with HF_HOME: datasets keeps its copies there") from None


def _cause(error: BaseException) -> BaseException:
    """The error behind "An error occurred while generating the dataset", which has no information itself."""
    while type(error).__name__.startswith("DatasetGeneration") and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error


def _reason(error: BaseException) -> str:
    if type(error).__name__ == "CastError":
        return f"its columns are not those of the other files, {error.details()}"  # type: ignore[attr-defined]
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"it needs the package {error.name}; install it"
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= LONGEST else said[: LONGEST - 1] + "…"


def _file_read(error: BaseException) -> str | None:
    """The file that the library's reader had open, which most of its errors do not name: readers call it `file`."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__", "")).startswith("datasets.packaged_modules."):
            file = frame.f_locals.get("file")
            found = str(file) if isinstance(file, str) else found
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    import datasets  # noqa: F401 (makes the handlers)

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno < SILENT.get(record.name.split(".")[0], logging.CRITICAL + 1)

    handlers = [handler for name in SILENT for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(keep)
