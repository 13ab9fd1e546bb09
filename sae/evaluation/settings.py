"""The settings of an evaluation, and held-out text of an activation cache on which nothing was trained."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from typing_extensions import TypedDict

from sae.disk.reading import Number, read_json, require
from sae.disk.remote import Place
from sae.encoding import Method
from sae.errors import InputError

if TYPE_CHECKING:
    from sae.activations.cache import ActivationCache
    from sae.model.language_model import LanguageModel


class Split(TypedDict):
    seed: int
    held_out: Number


class OnText(TypedDict):
    """Settings of a run that computed its activations."""

    live: Split


class OnCache(TypedDict):
    cache: Annotated[str, Field(pattern=r"^[^\x00]*$")]


@dataclass
class EvaluationConfig:
    dictionary: str
    """Folder, file or hub name of the dictionary."""
    cache: Place
    """Folder or URL of an activation cache with the dictionary's site; only its held-out tokens are used."""
    model: str | None = None
    """Hub name, folder or GGUF file of the language model. Default: the one the cache was made with."""
    sequences: int = 200
    """Held-out sequences for the language model's loss; 0 measures reconstruction alone and needs no model."""
    rows: int = 1_000_000
    """Maximum number of held-out activations for reconstruction."""
    batch: int = 8
    """Maximum number of sequences in one forward pass; fewer if their logits would take more than 0.27 GB."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    encoder: Literal["auto"] | Method = "auto"
    """How active entries of held-out rows are computed on a CPU, for ReLU, JumpReLU and TopK; the choice affects the last digits. auto
    measures which is fastest, and prints it if it is not the float32 product. Give the value in evaluation.json to get the same numbers bit
    for bit."""
    seed: int = 0
    """Seed of the choice of sequences and of the bootstrap."""
    out: Path | None = None
    """File for the numbers. Default: evaluation.json in the dictionary's folder, if that is a folder on this machine."""
    verify: bool = False
    """First read the whole site in the cache to compare every checksum. By default only those of token files up to 32 MB are compared."""

    def check(self) -> None:
        """Raises `InputError` for values that make no sense."""
        for name, least in (("sequences", 0), ("rows", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} must be at least {least}, got {getattr(self, name)}")


def refuse_training_tokens(folder: Path, cache: "ActivationCache") -> None:
    """Raises `InputError` unless the cache has held-out tokens, and if the dictionary's own cache split the same text differently."""
    from sae.activations.files.manifest import read_manifest
    from sae.training.checkpoint import Record

    if not cache.rows("held_out"):
        raise InputError(
            f"expected held-out tokens in {cache.folder}, but it has training tokens only; harvest more documents or a larger share"
        )
    if not (folder / "training.json").exists():
        return
    settings = read_json(folder / "training.json", "a run's training.json", Record)["settings"]
    live = "live" in settings
    require(settings, OnText if live else OnCache, f"a run's training.json in {folder}")
    if live:  # trained without a cache, on this text
        trained_on: Any = "activations computed live"
        theirs = settings["live"] | {"dataset": {name: settings["live"].get(name) for name in cache.manifest["dataset"] or ()}}
    else:
        trained_on = settings["cache"]
        if os.path.realpath(trained_on) == os.path.realpath(str(cache.folder)):
            return
        if not os.path.exists(os.path.join(trained_on, "manifest.json")):  # nor a URL, which the file of a stranger may name
            print(f"note: the dictionary was trained on {trained_on}, which is not at hand to compare texts with", file=sys.stderr)
            return
        theirs = read_manifest(Path(trained_on))
    split = [(manifest["seed"], manifest["held_out"]) for manifest in (theirs, cache.manifest)]
    if theirs["dataset"] and theirs["dataset"] == cache.manifest["dataset"] and split[0] != split[1]:
        raise InputError(
            f"the dictionary was trained on {trained_on}, which holds out other documents of the same text (seed and share "
            f"{split[0]}, here {split[1]}), so its training tokens would be among these; evaluate on its own"
        )


class Text(NamedTuple):
    """Held-out sequences of a cache, and the model that reads them."""

    lm: "LanguageModel"
    sequences: list[np.ndarray]
    replaced: list[np.ndarray]
    """for each token whether the cache has a row for it; only these are replaced"""


def held_out_text(config: EvaluationConfig, cache: "ActivationCache", device: torch.device) -> Text:
    """A seeded choice of the held-out sequences, in the cache's own context length."""
    from sae.model.language_model import LanguageModel

    lm = LanguageModel.load(
        config.model or cache.model_name(),
        device=device,
        revision=None if config.model else cache.model["revision"],
    )
    cache.require_model(lm)
    tokens = cache.tokens
    lengths = np.diff(tokens.sequence_starts)
    candidates = np.flatnonzero((np.asarray(tokens.sequence_split) == 1) & (lengths > 1))
    if len(candidates) < config.sequences:
        print(f"note: {len(candidates)} held-out sequences are all there are, {config.sequences} were asked for", file=sys.stderr)
    chosen = np.random.default_rng(config.seed).permutation(candidates)[: config.sequences]
    stored_n = np.zeros(len(tokens.ids), dtype=bool)  # a token that was left out for any reason has no row
    for shard in cache.shards("held_out"):
        stored_n[cache.positions(shard)] = True
    spans = [slice(*tokens.sequence_starts[[i, i + 1]]) for i in chosen]
    return Text(lm, [np.asarray(tokens.ids[span]) for span in spans], [stored_n[span] for span in spans])
