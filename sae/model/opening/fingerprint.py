"""Twelve hexadecimal digits by which a model is recognised, from its parameters in memory or, when some are not there, in its files.

They come from the architecture's name, every parameter's name and shape, and the signs of up to 256 weights of each: signs are the same in
every float dtype, so a model is recognised whichever it was loaded in.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from sae.disk.reading import read_json
from sae.model.opening.offload import on_hand

SAMPLE = 256
COMPILED = "_orig_mod."  # what torch.compile puts into names


class Parts(TypedDict):
    """model.safetensors.index.json"""

    weight_map: dict[str, str]


def fingerprint(model: Any) -> str:
    """Of a whole Hugging Face model, wherever `device_map` put its weights."""
    digest = hashlib.sha256(model.config.get_text_config().model_type.encode())
    for name, shape in _parameters(model):
        with on_hand(model.get_submodule(name.rpartition(".")[0])):
            digest.update(_line(name, shape, model.get_parameter(name).detach()))
    return digest.hexdigest()[:12]


def fingerprint_of_files(config: Any, name: str, revision: str | None) -> str | None:
    """The result of `fingerprint` for the whole model, without loading it: only the sampled pages of its safetensors files are read.

    None where there are no such files, or where they keep weights in other shapes than the model (the experts of Mixtral).
    """
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    with torch.device("meta"):  # names and shapes alone
        model = AutoModelForCausalLM.from_config(config)
    files, prefix = _safetensors_files(name, revision), model.base_model_prefix + "."
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    digest = hashlib.sha256(config.get_text_config().model_type.encode())
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        place = {_renamed(key, renamings): (file, key) for file in opened for key in file.keys()}  # noqa: SIM118
        for parameter, shape in _parameters(model):
            names = [n for n in (parameter, parameter.removeprefix(prefix), prefix + parameter) if n in place]
            if not names:
                return None
            file, key = place[names[0]]
            values = file.get_tensor(key)  # memory-mapped
            if tuple(values.shape) != shape or not values.is_floating_point():
                return None
            digest.update(_line(parameter, shape, values))
    return digest.hexdigest()[:12]


def _parameters(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and name.replace(COMPILED, "") not in tied:
            yield name, tuple(weight.shape)


def _renamed(key: str, renamings: list[Any]) -> str:
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key


def _line(name: str, shape: tuple[int, ...], values: Tensor) -> bytes:
    sample = values.reshape(-1)[:: max(1, values.numel() // SAMPLE)][:SAMPLE]
    return f"{name.replace(COMPILED, '')} {shape}".encode() + torch.signbit(sample).cpu().numpy().tobytes()  # host sync


def _safetensors_files(name: str, revision: str | None) -> list[Path]:
    """Of a folder or hub name, in the hub's cache after the model was looked up; none if there are none."""
    from transformers.utils import cached_file

    def find(file: str) -> Path | None:
        found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    if whole := find("model.safetensors"):
        return [whole]
    index = find("model.safetensors.index.json")
    parts = sorted(set(read_json(index, "a model's list of weights", Parts)["weight_map"].values())) if index else []
    found = [find(part) for part in parts]
    return [path for path in found if path]
