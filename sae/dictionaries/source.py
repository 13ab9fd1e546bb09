"""Where a dictionary is: a folder or file of this machine, or a name on the hub, which is looked for in the cache and then downloaded.

runs/sae                                                        a folder of any format, or a file
google/gemma-scope-2b-pt-res/layer_12/width_16k/canonical       on the hub: owner/repository/folders
owner/repository/folder@revision                                a branch, tag or commit of it
hf://owner/repository                                           never looked for among the folders of this machine
mwhanna/qwen3-0.6b-transcoders-lowl0/layer_3                    one dictionary of a set
https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k    what Neuronpedia shows there
runs/learned_dicts.pt/3                                         one of several in a file
"""

import json
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch

from sae.dictionaries.formats import format_of, load
from sae.dictionaries.formats.saelens.files import WEIGHTS
from sae.dictionaries.formats.tensors import Device, name_of
from sae.dictionaries.neuronpedia import URL as NEURONPEDIA
from sae.dictionaries.neuronpedia import posted
from sae.dictionaries.parts import Choice, Layers, Parts
from sae.disk.checksum import crc32
from sae.disk.hub import HubFile, download, in_cache, list_folder
from sae.disk.mapped import read_ahead
from sae.errors import InputError

ENDINGS = (".safetensors", ".npz", ".pt", ".pth")
"""of files with weights"""
SETTINGS = (".json", ".yaml", ".yml")
LARGEST_SETTINGS = 1 << 20
MOST_FILES = 4
"""maximum number of weight files in one folder, except for a set"""
OF_LAYER = re.compile(r"(?:(?:.*_)?(?:layer|W_enc|W_dec)_(?=[0-9]+\.safetensors)|layer(?=[0-9]+\.sae\.pt))([0-9]+)\..*")
"""files of a set with one for each layer"""
CANONICAL = "canonical"
SHOWN = 12
ROWS = 4096
"""number of rows copied at a time"""
SAMPLES = 64


class Source(NamedTuple):
    path: Path
    """the folder or file"""
    layer: int | None
    """of a set, or of several in one file, the requested one"""


def locate(source: str | Path) -> Source:
    """The local path of the dictionary, downloaded if necessary. Raises `InputError` if it is neither local nor reachable."""
    text = str(source)
    if not text:  # from an unset variable of the shell; as a path it would be the present folder
        raise InputError("expected a folder, a file or a name on the hub, got an empty text")
    if NEURONPEDIA.fullmatch(text):
        found = posted(text)
        if found.feature is not None:
            raise InputError(f"expected a dictionary, got {text} of feature {found.feature}; leave out its number")
        text = found.dictionary
    local = Path(text).expanduser()
    if not text.startswith("hf://"):
        if local.name == CANONICAL and not local.exists() and local.parent.is_dir():
            if (folder := canonical_folder(name_of(local.parent))) is None:
                raise ask_for_one(str(local.parent), sorted(path.name for path in local.parent.iterdir()))
            local = local.with_name(folder)
        if there := _find(local):
            return there
    name = re.fullmatch(r"(?:hf://)?([\w.-]+)/([\w.-]+)((?:/[^/@]+)*)/?(?:@(.+))?", text.replace("\\", "/"))
    if name is None or text.startswith((".", "~")) or (Path(name[1]).is_dir() and not text.startswith("hf://")):
        raise InputError(f"expected a dictionary in {local}, which does not exist; check its name")
    return _on_hub(f"{name[1]}/{name[2]}", name[3].strip("/"), name[4])


def _find(path: Path) -> Source | None:
    """The path, or the set of which its last part names a layer, or the file of which it is a number."""
    if path.exists():
        return Source(path, None)
    if path.parent.is_file() and path.name.isdecimal():
        return Source(path.parent, int(path.name))
    layer = re.fullmatch(r"layer_([0-9]+)", path.name)
    return Source(path.parent, int(layer[1])) if layer and path.parent.is_dir() else None


@cache
def _on_hub(repo: str, inside: str, revision: str | None) -> Source:
    folder, _, last = inside.rpartition("/")
    if last == CANONICAL:
        if (known := canonical_folder(f"{repo}/{folder}")) is None:
            raise ask_for_one(f"{repo}/{folder}", _names(list_folder(repo, folder, revision)))
        inside = f"{folder}/{known}"
    snapshot = in_cache(repo, revision)
    cached = _find(snapshot / inside) if snapshot else None
    if cached and _is_whole(cached):
        return cached
    try:
        files = _wanted(repo, inside, revision)
    except InputError as error:
        if cached is None or cached.layer is not None or not _is_known(cached.path):
            raise
        print(f"only the layers of {repo}/{inside} that were downloaded before are used: {error}", file=sys.stderr)
        return cached
    size = sum(file.size for file in files)
    print(f"downloading {len(files)} files ({size / 1e6:,.1f} MB) of {repo} from the hub, but for those that are here", file=sys.stderr)
    found = _find(download(repo, [file.path for file in files], revision) / inside)
    assert found is not None
    return found


def _is_whole(source: Source) -> bool:
    """Whether the cache has all needed files. The number of layers of a set is unknown without asking the hub."""
    if source.path.is_file():
        return _is_known(source.path)
    layers = [found[1] for path in source.path.glob("*") if (found := OF_LAYER.fullmatch(path.name))]
    return str(source.layer) in layers if source.layer is not None else not layers and _is_known(source.path)


def _is_known(path: Path) -> bool:
    try:
        format_of(path)
    except InputError:
        return False
    return True


def _wanted(repo: str, inside: str, revision: str | None) -> list[HubFile]:
    """The files of one dictionary or set, with the small settings beside them and in the folders above."""
    file, _, number = inside.rpartition("/")
    if number.isdecimal() and file.endswith(ENDINGS):
        inside = file
    folder, there, weights = _weights(repo, inside, revision)
    settings = [file for file in there if _is_settings(file)]
    if len(weights) > MOST_FILES and not all(map(_layer_of, weights)):
        raise InputError(f"{repo}/{inside} holds {len(weights)} files of weights; {_choice(there)}")
    if not weights and not any(file.path.endswith(".yaml") for file in settings):  # which may say where they are
        raise InputError(f"{repo}/{inside} holds no weights of a dictionary; {_choice(there)}")
    while folder:
        folder = folder.rpartition("/")[0]
        settings += filter(_is_settings, list_folder(repo, folder, revision) or ())
    return settings + weights  # so that weights without their settings are never taken for whole after an interruption


def _weights(repo: str, inside: str, revision: str | None) -> tuple[str, list[HubFile], list[HubFile]]:
    """A dictionary's folder, what is in it, and those of these files that hold its weights."""
    folder, _, last = inside.rpartition("/")
    if inside.endswith(ENDINGS):
        there = list_folder(repo, folder, revision) or []
        return folder, there, [file for file in there if file.path == inside]
    if (found := list_folder(repo, inside, revision)) is None:
        there = list_folder(repo, folder, revision) or []
        weights = [file for file in there if file.path.endswith(ENDINGS)]
        if weights and (layer := re.fullmatch(r"layer_([0-9]+)", last)):
            return folder, there, [file for file in weights if _layer_of(file) == layer[1]] or weights
        raise InputError(f"there is no {inside} in {repo} on the hub; {_choice(there)}")
    weights = [file for file in found if file.path.endswith(ENDINGS)]
    if not weights and any(file.path.endswith("/checkpoints/") for file in found):  # Llama Scope
        weights = [file for file in list_folder(repo, f"{inside}/checkpoints", revision) or () if file.path.endswith(ENDINGS)]
    return inside, found, weights


def _layer_of(file: HubFile) -> str | None:
    """The number in the name of a set's file."""
    found = OF_LAYER.fullmatch(file.path.rpartition("/")[2])
    return found and found[1]


def _is_settings(file: HubFile) -> bool:
    return file.path.endswith(SETTINGS) and file.size <= LARGEST_SETTINGS


def _names(listed: Sequence[HubFile] | None) -> list[str]:
    return [file.path.rstrip("/").rpartition("/")[2] for file in listed or ()]


def _choice(listed: Sequence[HubFile]) -> str:
    names = _names([file for file in listed if file.path.endswith(("/", *ENDINGS))])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"name one of {', '.join(names[:SHOWN])}{more}" if names else "nothing is there"


def canonical_folder(name: str) -> str | None:
    """The folder that SAELens' list of Gemma Scope calls canonical, for "…/gemma-scope-2b-pt-res/layer_12/width_16k"; None for others."""
    found = re.search(r"(gemma-scope-[\w-]+)/layer_([0-9]+)/(width_\w+)$", name)
    l0 = found and canonical_l0().get(found[1], {}).get(found[3], {}).get(found[2])
    return f"average_l0_{l0}" if l0 else None


def ask_for_one(name: str, names: Sequence[str]) -> InputError:
    """Of a folder with these subfolders, of which no list calls one canonical."""
    listed = [one for one in names if one.startswith("average_l0_")]
    if not listed:
        return InputError(f"expected folders average_l0_… in {name}, of which one is canonical, found {', '.join(names) or 'none'}")
    return InputError(f"no list says which of {', '.join(listed)} in {name} is canonical; name one of them instead")


@cache
def canonical_l0() -> dict[str, dict[str, dict[str, int]]]:
    """From repository, width and layer to the L0 in the folder's name: of SAELens' 429 "canonical" ids, each the one nearest to 100."""
    return json.loads(files("sae.dictionaries").joinpath("canonical.json").read_text())


def read(source: str | Path, device: Device = "cpu") -> Parts | Layers:
    """The parts of the dictionary, or of each of a set. Raises `InputError` like `locate`, and for none of the formats."""
    path, layer = locate(source)
    found = load(path, device)
    if isinstance(found, Choice) and layer not in found:
        there = "; ".join(f"{number}: {facts}" for number, facts in zip(found, found.facts))
        raise InputError(f"{path} holds {len(found)} dictionaries ({there}); name one of them, such as {path}/{next(iter(found))}")
    if layer is None:
        return found
    if isinstance(found, Parts):
        end = "" if path.is_file() else "layer_"
        raise InputError(f"expected a set in {path}, of which {source} is one, found a single dictionary; leave out /{end}{layer}")
    if layer not in found:
        raise InputError(f"expected layer {layer} of the set in {path}, which has {', '.join(map(str, found))}; choose one of them")
    return found[layer]()


def weights_crc32(source: str | Path, parts: Iterable[Parts]) -> str:
    """Eight hexadecimal digits that identify the weights; `parts` were read from the source.

    For a folder of SAELens' layout its file's checksum, otherwise a checksum of all tensors.
    """
    path, layer = locate(source)
    if layer is None and (path / WEIGHTS).is_file():
        return crc32(path / WEIGHTS)
    value = 0
    for one in parts:
        for tensor in _tensors_of(one):
            for rows in tensor.split(ROWS):
                value = _crc32(rows, value)
    return f"{value:08x}"


def sampled_crc32(parts: Parts) -> str:
    """Like `weights_crc32`, but of all vectors, and of each matrix only the values where `SAMPLES` evenly spread rows and columns cross.

    Computed without reading all of a dictionary that stays on the disk; any training changes it.
    """
    value = 0
    for tensor in _tensors_of(parts):
        if tensor.ndim > 1:
            value = zlib.crc32(str(tuple(tensor.shape)).encode(), value)
            read_ahead(tensor, False)
            rows, columns = (torch.linspace(0, size - 1, min(size, SAMPLES)).long().to(tensor.device) for size in tensor.shape)
            tensor = tensor[rows[:, None], columns]
        value = _crc32(tensor, value)
    return f"{value:08x}"


def _tensors_of(parts: Parts) -> list[torch.Tensor]:
    tensors = (parts.W_enc_fd, parts.b_enc_f, parts.W_dec_fo, parts.b_dec_o, parts.b_in_d, parts.W_skip_od, *parts.gate.parameters())
    return [tensor.detach() for tensor in tensors if tensor is not None]


def _crc32(tensor: torch.Tensor, value: int) -> int:
    return zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data, value)  # host sync
