"""A causal LM and its tokenizer from a hub name, folder or GGUF file, quietly, with every failure as one sentence."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae.device import device_named
from sae.errors import InputError
from sae.model.opening.fingerprint import fingerprint_of_files
from sae.model.opening.gguf_files import ModelLocation, forget_packing, locate_model, mentions, require_packages, unpacked
from sae.model.sites import parse_site

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class Loaded(NamedTuple):
    model: Any
    fingerprint: str | None
    """of the whole model, if not all of its weights are in memory as in its files"""
    cut_off: bool
    """blocks after the deepest site are not loaded"""


def load_model(
    name: str,
    device: str | torch.device,
    dtype: str | torch.dtype,
    device_map: Any,
    revision: str | None,
    sites: Sequence[str] = (),
    quantize: str | None = None,
) -> Loaded:
    """Raises `InputError` when it is absent, damaged, lacks weights or is not a causal LM; the arguments are `LanguageModel.load`'s."""
    from transformers import AutoConfig, AutoModelForCausalLM

    place = None if device_map is not None else device_named(device)
    wanted = _dtype(dtype)
    if wanted == "auto" and place is not None and place.type == "cpu":
        wanted = torch.float32
    found = locate_model(name)
    if quantize and found.gguf:
        raise InputError(f"expected a model in safetensors files to quantize, got the GGUF file {name}; load it without quantize")
    options: dict[str, Any] = _eight_bits(quantize) if quantize else {}
    if quantize and place is not None:
        device_map = {"": place}  # such a model cannot be moved
    automatic: Any = AutoModelForCausalLM  # its annotations do not know output_loading_info
    with _one_sentence(name, "a causal language model", found), _quiet():
        config = AutoConfig.from_pretrained(found.name, revision=revision, **found.options())
        depth = _depth(config, sites)
        whole = fingerprint_of_files(config, name, revision) if (depth or quantize) and not found.gguf else None
        if depth and whole:
            _shorten(config.get_text_config(), depth)
        options |= dict(config=config, dtype=wanted, device_map=device_map, revision=revision, output_loading_info=True)
        if found.gguf:
            options |= found.options() | unpacked()
        model, info = automatic.from_pretrained(found.name, **options)
    if found.gguf:
        forget_packing(model)
        if mentions(found, revision, b"rope_freqs.weight"):
            print(f"note: {name} has rotary factors (rope_freqs.weight); transformers leaves them out", file=sys.stderr)
    # Hugging Face fills these with random numbers and continues
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise InputError(f"expected all weights of {name!r} in its files, but {len(lacking)} are absent or misshapen, such as {lacking[0]}")
    if whole is None and quantize:
        raise InputError(f"expected safetensors files that hold the weights of {name!r} one by one, found none; load it without quantize")
    if whole is None and depth:
        print(
            f"note: all blocks of {name} are loaded, because its files do not hold its weights one by one as safetensors", file=sys.stderr
        )
    return Loaded(model if place is None or quantize else model.to(place), whole, bool(depth and whole))


def _depth(config: Any, sites: Sequence[str]) -> int | None:
    """Number of blocks that the sites need, None for all of them. A site that does not exist is refused when it is used."""
    text = config.get_text_config()
    needed = max((parse_site(site, text.num_hidden_layers).layer + 1 for site in sites), default=text.num_hidden_layers)
    needed = max(needed, 1)  # the embedding comes before all blocks, but a model has at least one
    return needed if needed < text.num_hidden_layers else None


def _shorten(text: Any, depth: int) -> None:
    """Changes a configuration to that of the first blocks, so that Hugging Face skips the weights of the others."""
    blocks = text.num_hidden_layers
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == blocks and ("layer" in key or "attention" in key):  # one entry a block
            setattr(text, key, value[:depth])
    text.num_hidden_layers = depth


def _eight_bits(quantize: str) -> dict[str, Any]:
    if quantize != "8bit":
        raise InputError(f"expected quantize to be 8bit or nothing, got {quantize!r}")
    require_packages(("bitsandbytes", "accelerate"), "8-bit weights")
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}


def load_tokenizer(name: str, revision: str | None) -> Any:
    """None for a folder that has no tokenizer files, and for a GGUF file without a vocabulary."""
    from transformers import AutoTokenizer

    folder, found = Path(name), locate_model(name)
    if not found.gguf and folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
        return None
    with _one_sentence(name, "a tokenizer", found), _quiet():
        if found.gguf and not mentions(found, revision, b"tokenizer.ggml.tokens"):
            return None
        tokenizer = AutoTokenizer.from_pretrained(found.name, revision=revision, **found.options())
        tokenizer("a")  # a damaged setting may show only now
        return tokenizer


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return "auto"
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    raise InputError(f"expected a dtype of auto, float32, bfloat16, float16 or float64, got {dtype!r}")


@contextmanager
def _one_sentence(name: str, what: str, found: ModelLocation) -> Iterator[None]:
    if not found.gguf and not Path(name).exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise InputError(f"expected {what} at {name}, which does not exist; check its path")
    if not found.gguf and Path(name).is_file():
        raise InputError(f"expected {what} as a folder, a GGUF file or a hub name, got the file {name}; give the folder that holds it")
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged file breaks the packages that read it in any way
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 300 else reason[:300] + "..."
        raise InputError(
            f"expected {what} at {name!r}, but it could not be loaded ({reason}); give a folder, a GGUF file or a hub name in reach"
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
