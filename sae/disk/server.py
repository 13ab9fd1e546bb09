"""The server behind a URL of fsspec: opened at first use; lost connections are retried a bounded number of times."""

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from sae.errors import InputError

WAITS: Sequence[float] = (1, 2, 4, 8, 16)
"""seconds before each further try"""
EXTRA = "pip install '.[remote]' has what s3:// and hf:// need"

Result = TypeVar("Result")


class Server:
    """The server behind a URL: opened at first use; lost connections are retried."""

    def __init__(self, url: str):
        self._url = url
        self._commit: str | None = None
        self._said: dict[int, float] = {}
        self._lock = threading.Lock()

    @property
    def protocol(self) -> str:
        return self._url.partition("://")[0]

    @property
    def unchanging(self) -> bool:
        """Whether reads are certain to be of the opened file: S3 compares the version in the same request, and on the hub a commit does not
        change."""
        return self.protocol in ("s3", "s3a") or (self.protocol == "hf" and not self._url.startswith("hf://buckets/"))

    def path(self, url: str) -> str:
        """The file system's name of it; on the hub, in the newest commit at the time of the first request."""
        path = self.filesystem._strip_protocol(url)
        if self.protocol != "hf":
            return path
        at = self.filesystem.resolve_path(path)
        if not hasattr(at, "revision"):
            return path
        with self._lock:
            if self._commit is None:
                self._commit = self.filesystem._api.repo_info(at.repo_id, repo_type=at.repo_type, revision=at.revision).sha
        return dataclasses.replace(at, revision=self._commit, _raw_revision=None).unresolve()

    @cached_property
    def filesystem(self) -> Any:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self._url)[0]
        except ImportError as error:
            raise InputError(f"{self._url} needs a package that is not here ({reason(error)}); {EXTRA}") from None
        except ValueError as error:
            raise InputError(f"expected a URL that fsspec knows, got {self._url} ({reason(error)}); s3:// and hf:// are usual") from None

    def lasting(self, call: Callable[[], Result], path: object) -> Result:
        """The result of `call`, retried if the connection is lost.

        Raises `InputError` if that does not help, and if access is refused; `FileNotFoundError` is passed on.
        """
        for number, wait in enumerate((*WAITS, None), 1):
            try:
                return call()
            except (InputError, FileNotFoundError):
                raise
            except Exception as error:
                if sentence := _refused(error, path):
                    raise InputError(sentence) from None
                if not isinstance(error, OSError) and type(error).__module__ == "builtins":  # a mistake of ours
                    raise
                why = reason(error)
            if wait is None:
                break
            self._say(number, f"the connection to {path} is lost ({why}); trying again in {wait:g} s, {number} of {len(WAITS)} times")
            time.sleep(wait)
        raise InputError(
            f"the connection to {path} is lost ({why}), and {len(WAITS)} further tries have not helped; "
            "give the same command again when it is back"
        )

    def _say(self, number: int, text: str) -> None:
        """Prints a line once for all simultaneous requests."""
        with self._lock:
            now = time.monotonic()
            if now - self._said.get(number, -60) >= 10:
                self._said[number] = now
                print(text, file=sys.stderr)


def _refused(error: Exception, path: object) -> str | None:
    """The sentence for an error that retrying does not fix; None for others."""
    name = type(error).__name__
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in name or "Token" in name:
        return f"access to {path} is refused ({reason(error)}); set the credentials of an account that may use it"
    if isinstance(error, NotImplementedError):
        return f"{path} cannot be written, because its protocol only reads; choose another place"
    if isinstance(error, ValueError) or "Validation" in name:
        return f"{path} cannot be used ({reason(error)}); check the URL"
    return None


def reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:300] or type(error).__name__
