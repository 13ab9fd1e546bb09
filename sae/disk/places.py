"""Output paths: checked before the work, with every refusal of the operating system as one sentence."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae.disk.remote import Place, RemotePath
from sae.errors import InputError

ELSEWHERE = "choose another place"
SENTENCES = {
    errno.ENOSPC: "the disk ran full while writing {path}; free some space and run the same command again",
    errno.EDQUOT: "your disk quota ran out while writing {path}; free some space and run the same command again",
    errno.EFBIG: "{path} would be larger than files may be here; raise the limit (ulimit -f) or " + ELSEWHERE,
    errno.EROFS: "{path} is on a disk that can only be read; " + ELSEWHERE,
    errno.EACCES: "there is no permission for {path}; change that or " + ELSEWHERE,
    errno.EPERM: "{path} is protected from changes; lift that or " + ELSEWHERE,
    errno.ENOTDIR: "expected folders on the way to {path}, but one of them is a file; " + ELSEWHERE,
    errno.EEXIST: "expected a folder at {path}, but something else is there; " + ELSEWHERE,
    errno.EISDIR: "expected a file at {path}, but it is a folder; " + ELSEWHERE,
    errno.ELOOP: "{path} leads through symbolic links that go in a circle; correct them or " + ELSEWHERE,
    errno.ENAMETOOLONG: "the name {path} is too long; choose a shorter one",
    errno.ENOENT: "{path} does not exist, or a link on the way to it leads nowhere; check its name",
    errno.EOPNOTSUPP: "{path} would be in a folder in which the system allows no new files; " + ELSEWHERE,
    errno.EIO: "the disk reports an error at {path}; look after it or " + ELSEWHERE,
}


def refusal_sentence(error: OSError, path: Path | None = None) -> str | None:
    """A sentence about what the operating system refused and what to do; None for errors that are not about files. `path`: the output
    path."""
    named = _named(error, path)
    if named is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    text = SENTENCES.get(error.errno or 0, "{path} cannot be used ({reason}); " + ELSEWHERE)
    shown = "a file" if named is None else named if len(str(named)) < 300 else f"{str(named)[:300]}..."
    return text.format(path=shown, reason=error.strerror)


def _named(error: OSError, path: Path | None) -> Path | None:
    """The file to name in the error: `path` instead of its temporary file, its folders or its content; another file under its own name."""
    if not isinstance(error.filename, str | bytes):
        return path
    other = Path(os.fsdecode(error.filename))
    if path is not None and (other.parent == path.parent or path in other.parents or other in path.parents):
        return path
    return other


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns refusals of the operating system inside into an `InputError` that names `path`."""
    try:
        yield
    except BrokenPipeError:  # of a stream, not of a file
        raise
    except OSError as error:
        text = refusal_sentence(error, path)
        if error.errno is None or text is None:
            raise
        raise InputError(text) from error


def require_file(path: Path) -> None:
    """Raises `InputError` unless a file can be written at `path`; its folders need not exist yet. Leaves nothing behind."""
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        longest = f".{path.name}.{os.getpid()}.tmp"  # as `sae.disk.writing.atomic` calls it on its way
        _try(path.parent, longest)


def require_folder(path: Place) -> None:
    """Raises `InputError` unless files can be written into the folder `path`, which need not exist yet. Leaves nothing behind."""
    if isinstance(path, RemotePath):
        return path.require_writable()
    with writing(path):
        if path.is_file():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        _try(path, "file")


def _try(folder: Path, name: str) -> None:
    """Raises the `OSError` that writing a file of this name into the folder would raise."""
    try:
        os.lstat(folder / name)
    except FileNotFoundError:
        existing = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
        if not existing.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(existing)) from None
    else:
        existing = folder
    try:
        with tempfile.TemporaryFile(dir=existing):  # where the system allows it, without a name
            pass
    except FileNotFoundError:  # of a folder that is there, such as /proc
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), str(folder)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
