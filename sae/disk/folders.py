"""Folders that are complete or absent, also after a kill."""

import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from sae.disk.places import writing
from sae.disk.writing import only_writer, running, sync
from sae.errors import InputError


@contextmanager
def fresh_folder(out: Path, marker: str, what: str, keep: str | None = None) -> Iterator[Path]:
    """A temporary folder beside `out` that is renamed to it at a clean exit, replacing an older folder, recognised by its file `marker`.

    Leftovers of a killed process are removed first. Files of the older folder that match `keep` are copied. Raises `InputError` if the
    place cannot be written, and for a folder with other content.
    """
    if out.name in ("", ".."):
        raise InputError(f"expected the name of a folder to write, but got {str(out)!r}; give it by name")
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("tmp", "old.tmp"))
    with writing(out):
        clear_leftovers(out)
        require_replaceable(out, marker, what)
        try:
            temporary.mkdir(parents=True)
            # both are held: from `clear_leftovers` of others, and from `sae explain`, whose scores are of the older index's text
            with only_writer(temporary), only_writer(out) if out.exists() else nullcontext():
                yield temporary
                for path in out.glob(keep) if keep else ():
                    shutil.copy2(path, temporary)
                for path in temporary.rglob("*"):
                    sync(path)
                if out.exists():
                    out.rename(old)
                temporary.rename(out)  # a kill between the two leaves the older index beside, as .NAME.PID.old.tmp
                sync(out.parent)
        finally:
            if old.exists() and not out.exists():  # interrupted between the two renames
                old.rename(out)
            for folder in (temporary, old):
                shutil.rmtree(folder, ignore_errors=True)


def require_replaceable(out: Path, marker: str, what: str) -> None:
    """Raises `InputError` for an existing file, and for a folder that is neither empty nor an older one, recognised by its file
    `marker`."""
    if os.path.lexists(out) and not (out / marker).exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"expected a new folder or an older {what} to replace, but {out} holds something else; choose another one")


def clear_leftovers(out: Path) -> None:
    """Removes temporary folders that no process uses any more; renames an older folder back if a kill left it without its name."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        found = re.fullmatch(r"([0-9]+)(\.old)?\.tmp", path.name[len(out.name) + 2 :])
        if found is None or not path.is_dir() or running(int(found[1])):
            continue
        with suppress(InputError), only_writer(path):  # a process of another machine may be at work in it
            if found[2] and not out.exists():
                path.rename(out)
            else:
                shutil.rmtree(path, ignore_errors=True)
