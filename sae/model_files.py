"""A causal LM and its tokenizer from a hub name or folder, quietly, with every failure as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sae.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_model(name: str, device: str | torch.device, dtype: str | torch.dtype, device_map: Any, revision: str | None) -> Any:
    """Raises `InputError` when it is absent, damaged, lacks weights or is not a causal LM."""
    from transformers import AutoModelForCausalLM

    place = None if device_map is not None else _device(device)
    wanted = _dtype(dtype)
    if wanted == "auto" and place is not None and place.type == "cpu":
        wanted = torch.float32
    automatic: Any = AutoModelForCausalLM  # its annotations do not know output_loading_info
    with _one_sentence(name, "a causal language model"), _quiet():
        model, info = automatic.from_pretrained(name, dtype=wanted, device_map=device_map, revision=revision, output_loading_info=True)
    # Hugging Face fills these with random numbers and goes on
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise InputError(f"expected all weights of {name!r} in its files, but {len(lacking)} are absent or misshapen, such as {lacking[0]}")
    return model if place is None else model.to(place)


def load_tokenizer(name: str, revision: str | None) -> Any:
    """None for a folder that has no tokenizer files."""
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
        return None
    with _one_sentence(name, "a tokenizer"), _quiet():
        return AutoTokenizer.from_pretrained(name, revision=revision)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise InputError(f"expected a device such as auto, cpu, cuda or cuda:1, got {device!r}") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(f"expected the device {device} to be there, but {torch.cuda.device_count()} CUDA devices are; use cpu or auto")
    return place


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return "auto"
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    raise InputError(f"expected a dtype of auto, float32, bfloat16, float16 or float64, got {dtype!r}")


@contextmanager
def _one_sentence(name: str, what: str) -> Iterator[None]:
    from safetensors import SafetensorError

    if not Path(name).exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise InputError(f"expected {what} in the folder {name}, which does not exist; check its path")
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 300 else reason[:300] + "..."
        raise InputError(
            f"expected {what} at {name!r}, but it could not be loaded ({reason}); give a folder or a hub name in reach"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings while loading (errors are still raised); the user's settings come back afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
