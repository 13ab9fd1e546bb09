"""Files of a repository on the Hugging Face hub: from this machine's cache, or downloaded one by one."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sae.disk.places import refusal_sentence
from sae.errors import InputError


class HubFile(NamedTuple):
    path: str
    """in the repository, with "/" at the end of a folder"""
    size: int
    """bytes"""


def in_cache(repo: str, revision: str | None = None) -> Path | None:
    """The folder of the revision (default "main") in the hub's cache, with its downloaded files; None if it does not exist."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def list_folder(repo: str, folder: str, revision: str | None = None) -> list[HubFile] | None:
    """The entries of a folder of the repository ("" is its root), without those of folders below; None if the folder does not exist.

    Raises `InputError` for a repository or revision that does not exist, and if the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    with asking(repo, folder):
        try:
            found = list(HfApi().list_repo_tree(repo, folder or None, revision=revision))
        except EntryNotFoundError:
            return None
    return [HubFile(one.path, one.size) if isinstance(one, RepoFile) else HubFile(one.path + "/", 0) for one in found]


def download(repo: str, files: Sequence[str], revision: str | None = None) -> Path:
    """The cache's folder of the revision, with at least these files; existing ones are not downloaded again.

    Raises `InputError` for files that do not exist, if the hub cannot be reached, and if the disk is full.
    """
    from huggingface_hub import hf_hub_download

    snapshot = Path()
    for file in files:
        with asking(repo, file):
            path = Path(hf_hub_download(repo, file, revision=revision))
        snapshot = path.parents[file.count("/")]
    return snapshot


def fetch(uri: str) -> Path:
    """The file that "hf://owner/repository/folders/file?revision=…" names: from the cache, or downloaded. Raises like `download`."""
    from huggingface_hub import try_to_load_from_cache

    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)/([^?]+)(?:\?revision=(.+))?", uri)
    if found is None:
        raise InputError(f"expected a file on the hub, such as hf://owner/repository/folder/file, got {uri!r}")
    repo, file, revision = found.groups()
    cached = try_to_load_from_cache(repo, file, revision=revision)
    return Path(cached) if isinstance(cached, str) else download(repo, [file], revision) / file


@contextmanager
def asking(repo: str, inside: str) -> Iterator[None]:
    """Turns every error of huggingface_hub and the network into one sentence."""
    from huggingface_hub import errors

    what = f"{repo}/{inside}".rstrip("/")
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of every retry
    try:
        yield
    except errors.LocalEntryNotFoundError as error:  # which is an EntryNotFoundError too
        _refuse(repo, inside, error)
    except errors.EntryNotFoundError:
        raise InputError(f"there is no {what} on the hub; check its name") from None
    except errors.GatedRepoError:
        raise InputError(f"{repo} is given only to those who accept its terms on the hub; do so, then log in (hf auth login)") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"expected {repo} on this machine or on the hub, found it on neither; check its name, or log in if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repo} is on the hub, but not in that revision; check what follows the @") from None
    except Exception as error:
        _refuse(repo, inside, error)
    finally:
        logger.setLevel(level)


def _refuse(repo: str, inside: str, error: Exception) -> None:
    if isinstance(error, OSError) and error.errno is not None and (text := refusal_sentence(error)):
        raise InputError(text) from None
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    reason = "HF_HUB_OFFLINE is set" if offline else " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
    part = f" --include '{inside}*'" if inside else ""
    raise InputError(
        f"{repo}/{inside} is not on this machine and the hub cannot be reached ({reason}); on a machine with a network, download it with "
        f"`hf download {repo}{part}`, and copy the folder that this prints"
    ) from None
