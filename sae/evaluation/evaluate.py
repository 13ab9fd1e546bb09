"""Measure a dictionary on the held-out tokens of an activation cache."""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from sae.activations.massive import RATIO, is_massive, share
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats.saelens import WEIGHTS
from sae.disk.checksum import crc32
from sae.disk.places import require_file
from sae.disk.reading import Number, read_json, require
from sae.disk.writing import write_json
from sae.errors import InputError
from sae.evaluation.language_model_loss import ARMS, LanguageModelLoss, language_model_loss
from sae.evaluation.reconstruction import Reconstruction, ReconstructionMetrics, measure
from sae.progress import progress

if TYPE_CHECKING:
    from sae.activations.cache import ActivationCache

READ_ROWS = 4096


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
    dictionary: Path
    """folder of the dictionary"""
    cache: Path
    """activation cache with the dictionary's site; its held-out tokens are used, never its training tokens"""
    model: str | None = None
    """hub name, folder or GGUF file of the language model; by default the one the cache was made with"""
    sequences: int = 200
    """held-out sequences for the language model's loss; 0 measures reconstruction alone and needs no model"""
    rows: int = 1_000_000
    """held-out activations for reconstruction, at most"""
    batch: int = 8
    """sequences in one forward pass at most; fewer where their logits would take more than 0.27 GB"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU when there is one"""
    seed: int = 0
    """of the choice of sequences and of the bootstrap"""
    out: Path | None = None
    """where the numbers go; by default evaluation.json in the dictionary's folder"""
    verify: bool = False
    """first read the whole site in the cache to compare every checksum; by default only those of token files up to 32 MB"""

    def check(self) -> None:
        """Raises `InputError` for values that cannot be meant."""
        for name, least in (("sequences", 0), ("rows", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} must be at least {least}, got {getattr(self, name)}")


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Measures, prints a table and writes `evaluation.json`; gives what is in that file.

    Raises `InputError` for a cache of another model, site or width, for one without held-out tokens or whose held-out tokens were
    trained on, and for values that are not finite.
    """
    from sae.activations.cache import ActivationCache

    config.check()
    out = config.out or config.dictionary / "evaluation.json"
    if config.out or config.dictionary.is_dir():
        require_file(out)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    dictionary = Dictionary.load(config.dictionary, device)
    cache = ActivationCache.open(config.cache, dictionary.site, verify=config.verify)
    cache.require_dictionary(dictionary, named=config.model is not None)
    refuse_training_tokens(config.dictionary, cache)
    reconstruction, massive = reconstruct(dictionary, cache, config.rows)
    loss = splice(config, dictionary, cache, reconstruction.mean_d, device) if config.sequences else None
    result = {
        "dictionary": str(config.dictionary),
        "weights_crc32": crc32(config.dictionary / WEIGHTS),
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "site": cache.site,
        **({"site_out": dictionary.site_out} if dictionary.is_transcoder else {}),
        "model": cache.manifest["model"],
        "cache": str(config.cache),
        "split": "held_out",
        "seed": config.seed,
        "reconstruction": describe(reconstruction),
        "massive_rows": massive and massive._asdict() | {"without": describe(massive.without)},
        "language_model": finite(loss._asdict()) if loss else None,
    }
    write_json(out, result)
    print_table(config, cache, reconstruction, massive, loss)
    return result


def refuse_training_tokens(folder: Path, cache: "ActivationCache") -> None:
    """Raises `InputError` unless the cache holds tokens out, and when the dictionary's own cache split the same text otherwise."""
    from sae.activations.manifest import read_manifest
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
        trained_on = Path(settings["cache"])
        if os.path.realpath(trained_on) == os.path.realpath(cache.folder):
            return
        if not os.path.exists(trained_on / "manifest.json"):
            print(f"note: the dictionary was trained on {trained_on}, which is not at hand to compare texts with", file=sys.stderr)
            return
        theirs = read_manifest(trained_on)
    split = [(manifest["seed"], manifest["held_out"]) for manifest in (theirs, cache.manifest)]
    if theirs["dataset"] and theirs["dataset"] == cache.manifest["dataset"] and split[0] != split[1]:
        raise InputError(
            f"the dictionary was trained on {trained_on}, which holds out other documents of the same text (seed and share "
            f"{split[0]}, here {split[1]}), so its training tokens would be among these; evaluate on its own"
        )


class MassiveRows(NamedTuple):
    """Those among the scanned rows, and what the other rows say."""

    above_median: float
    rows: int
    share_of_squared_norm: float
    without: Reconstruction


def reconstruct(dictionary: Dictionary, cache: "ActivationCache", rows: int) -> tuple[Reconstruction, MassiveRows | None]:
    """Over the first `rows` held-out rows, and over those of them that are not massive, where some are.

    The first rows are a fair sample: shards were shuffled when they were written.
    """
    total, target = min(rows, cache.rows("held_out")), cache.target_of(dictionary)
    norm_n = torch.cat([torch.linalg.vector_norm(x_bd.float(), dim=-1) for x_bd in held_out(cache, total)])
    massive_n, square_n = is_massive(norm_n), norm_n.double().square()
    usual, massive = (ReconstructionMetrics(dictionary.norms(), dictionary.d_out) for _ in range(2))
    with progress("reconstruction", total, "tokens") as bar:
        for x_bd, y_bo in zip(held_out(cache, total), held_out(target, total)):
            massive_b = massive_n[bar.done : bar.done + len(x_bd)]
            for rows_b, metrics in ((~massive_b, usual), (massive_b, massive)):
                chosen = slice(None) if rows_b.all() else rows_b
                measure(dictionary, x_bd[chosen], metrics, y_bo[chosen])
            bar.advance(len(x_bd))
    without = usual.result()
    if not massive.rows:
        return without, None
    usual.merge(massive)
    return usual.result(), MassiveRows(RATIO, massive.rows, share(float(square_n[massive_n].sum()), float(square_n.sum())), without)


def held_out(cache: "ActivationCache", rows: int) -> Iterator[Tensor]:
    """The first `rows` of the split, some at a time."""
    for shard in cache.shards("held_out"):
        if not rows:
            return
        x_nd = cache.read(shard)[0][:rows]
        rows -= len(x_nd)
        yield from x_nd.split(READ_ROWS)


def splice(
    config: EvaluationConfig, dictionary: Dictionary, cache: "ActivationCache", mean_d: Tensor, device: torch.device
) -> LanguageModelLoss:
    """On a seeded choice of the held-out sequences, in the cache's own context length."""
    from sae.model.language_model import LanguageModel

    lm = LanguageModel.load(
        config.model or cache.model_name(),
        device=device,
        revision=None if config.model else cache.manifest["model"]["revision"],
    )
    cache.require_model(lm)
    tokens = cache.tokens
    lengths = np.diff(tokens.sequence_starts)
    candidates = np.flatnonzero((np.asarray(tokens.sequence_split) == 1) & (lengths > 1))
    if len(candidates) < config.sequences:
        print(f"note: {len(candidates)} held-out sequences are all there are, {config.sequences} were asked for", file=sys.stderr)
    chosen = np.random.default_rng(config.seed).permutation(candidates)[: config.sequences]
    stored_n = np.zeros(len(tokens.ids), dtype=bool)  # whatever a token was left out for, it has no row
    for shard in cache.shards("held_out"):
        stored_n[cache.read(shard)[1].numpy()] = True
    spans = [slice(*tokens.sequence_starts[[i, i + 1]]) for i in chosen]
    sequences, replaced = [np.asarray(tokens.ids[span]) for span in spans], [stored_n[span] for span in spans]
    return language_model_loss(lm, dictionary, cache.site, sequences, mean_d, replaced=replaced, batch=config.batch, seed=config.seed)


def describe(reconstruction: Reconstruction) -> dict[str, Any]:
    """For the file: density as a histogram in half decades, without the mean row."""
    edges = [-math.inf, *np.arange(-6, 0.01, 0.5).tolist()]
    density_f = reconstruction.density_f.numpy()
    counts, _ = np.histogram(np.log10(density_f[density_f > 0]), edges)
    values = {k: v for k, v in reconstruction._asdict().items() if k not in ("density_f", "mean_d")}
    histogram = {"log10_upper_edges": edges[1:], "features": counts.tolist()}
    return finite(values) | {"density_histogram": histogram}


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: an undefined ratio becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def print_table(
    config: EvaluationConfig, cache: "ActivationCache", r: Reconstruction, massive: MassiveRows | None, loss: LanguageModelLoss | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "value", title=f"{config.dictionary} at {cache.site}, held-out tokens of {config.cache}")
    table.columns[1].justify = "right"
    features = len(r.density_f)
    rows = {
        "activations scanned": f"{r.rows:,}",
        "FVU (fraction of variance unexplained)": f"{r.fvu:.4f}",
        **({"FVU without the massive rows": f"{massive.without.fvu:.4f}"} if massive else {}),
        "explained variance": f"{r.explained_variance:.4f}",
        "explained second moment (about 0, not the mean)": f"{r.explained_second_moment:.4f}",
        "squared error per token": f"{r.mse:.4g}",
        "cosine of x and reconstruction": f"{r.cosine:.4f}",
        "norm of reconstruction / norm of x": f"{r.norm_ratio:.4f}",
        "relative reconstruction bias": f"{r.relative_bias:.4f}",
        "L0 (features per token)": f"{r.l0:.1f}",
        "L0, 5th / 50th / 95th percentile": " / ".join(str(r.l0_percentiles[q]) for q in ("5", "50", "95")),
        "L1 (activation × decoder norm per token)": f"{r.l1:.4g}",
        f"dead features (never fired) of {features:,}": f"{r.dead:,} ({r.dead / features:.1%})",
        "dense features (fire on > 10 %)": f"{r.dense:,} ({r.dense / features:.1%})",
    }
    if loss:
        low, high = loss.loss_recovered_interval
        rows |= {
            "sequences, next tokens": f"{loss.sequences:,}, {loss.tokens:,}",
            "positions replaced": f"{loss.replaced:,} of {loss.sequences + loss.tokens:,}",
            "loss recovered, against zero": f"{loss.loss_recovered:.4f} [{low:.4f}, {high:.4f}]",
            "loss recovered, against mean": "{:.4f} [{:.4f}, {:.4f}]".format(loss.loss_recovered_mean, *loss.loss_recovered_mean_interval),
            "cross-entropy, nats: " + " / ".join(ARMS): " / ".join(f"{loss.cross_entropy[arm]:.4f}" for arm in ARMS),
            "KL from clean, nats: " + " / ".join(ARMS[1:]): " / ".join(f"{loss.kl[arm]:.4f}" for arm in ARMS[1:]),
        }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if massive:
        console.print(
            f"{massive.rows:,} rows have norms above {massive.above_median:g} times the median and hold "
            f"{massive.share_of_squared_norm:.1%} of all squared norm, so the FVU depends on them."
        )
    elif left_out := cache.manifest["counts"]["left_out"].get("norm_outliers"):
        console.print(f"The FVU is without {left_out:,} rows that the cache left out for their norm; --max-norm-ratio None keeps them.")
    if loss:
        reasons = cache.manifest["counts"]["left_out"]
        named = ", ".join(why.replace("_", " ") for why, count in reasons.items() if count and why != "padding")
        console.print(f"Positions that the cache left out ({named or 'none'}) stay as they are: no dictionary is trained on them.")
