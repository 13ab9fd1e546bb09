"""GGUF files as models: which file a name means. transformers turns the packed weights back into plain ones, in full precision."""

import importlib.util
import mmap
from pathlib import Path
from typing import Any, NamedTuple

from sae.errors import InputError


class ModelLocation(NamedTuple):
    """Where transformers finds a model."""

    name: str
    """a folder or hub name"""
    gguf: str | None
    """the file in it, for a GGUF file"""

    def options(self) -> dict[str, Any]:
        return {} if self.gguf is None else {"gguf_file": self.gguf}


def locate_model(name: str) -> ModelLocation:
    """`model.gguf`, `folder` with one such file and no config.json, and `owner/repository/model.gguf` on the hub are GGUF files.

    Raises `InputError` for a file that does not exist, for a folder of several, and where a package is lacking.
    """
    path = Path(name)
    if name.endswith(".gguf") and not path.is_dir():
        parts = name.split("/")
        if path.is_file():
            place = ModelLocation(str(path.parent), path.name)
        elif len(parts) > 2 and not name.startswith(("/", ".", "~")):
            place = ModelLocation("/".join(parts[:2]), "/".join(parts[2:]))
        else:
            raise InputError(f"expected a GGUF file at {name}, which does not exist; check its path")
    else:
        files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise InputError(f"expected one model in the folder {name}, found {len(files)} GGUF files ({names}); name one, as {files[0]}")
        place = ModelLocation(name, files[0].name if files else None)
    if place.gguf is not None:
        require_packages(("gguf", "accelerate"), "GGUF files")
    return place


def require_packages(packages: tuple[str, ...], what: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"expected the package {package}, which {what} need, but it is not installed; pip install {package}")


def unpacked() -> dict[str, Any]:
    """Settings that make transformers unpack the weights with any installed kernels; older releases always do."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def forget_packing(model: Any) -> None:
    """Of a model whose weights are plain again, so that it can be saved and moved like any other."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        del model.config.quantization_config


def mentions(place: ModelLocation, revision: str | None, key: bytes) -> bool:
    """Whether a GGUF file has a field or tensor of that name: names stand in it as they are."""
    from transformers.utils import cached_file

    path: Any = cached_file(place.name, place.gguf or "", revision=revision)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(key) >= 0
