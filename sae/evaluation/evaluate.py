"""Measure a dictionary on the held-out tokens of an activation cache."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.activations.harvest.massive import RATIO, is_massive, share
from sae.device import device_named
from sae.dictionaries.bundle import Bundle, load
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.source import locate, weights_crc32
from sae.disk.places import require_file
from sae.disk.writing import jsonable, write_json
from sae.encoding import Method
from sae.encoding.choice import agreed
from sae.errors import InputError
from sae.evaluation.bundle import evaluate_bundle
from sae.evaluation.language_model_loss import ARMS, LanguageModelLoss, language_model_loss
from sae.evaluation.reconstruction import Reconstruction, ReconstructionMetrics, add_reconstruction
from sae.evaluation.settings import EvaluationConfig, held_out_text, refuse_training_tokens
from sae.pieces import Pieces, pieces, results, stretches
from sae.processes import Processes

if TYPE_CHECKING:
    from sae.activations.cache import ActivationCache

READ_ROWS = 4096
OF_A_SITE = ("fvu", "explained_variance", "mse", "cosine", "norm_ratio", "relative_bias")
"""measures that are computed at each of several sites"""


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Measures, prints a table and writes `evaluation.json`; returns what is in that file. Sets of transcoders: see bundle.py.

    Called in every process that torchrun started, they share the work, and the file has the same bytes as that of one; when one of them
    fails, so do the others, with SystemExit. Killed and started again, it continues with what was finished (see sae/pieces.py).

    A dictionary of several sites (a crosscoder) is measured at each of them too, but not spliced in: it writes at the first before it
    has read the last, or in two models.

    Raises `InputError` for a cache of another model, site or width, for one without held-out tokens or whose held-out tokens were
    trained on, and for values that are not finite.
    """
    config.check()
    folder = Path(config.dictionary)
    if config.out is None and not folder.is_dir():
        locate(config.dictionary)  # what does not exist is said first
        raise InputError(f"expected --out for the numbers of {config.dictionary}, which is not a local folder; give a file's name")
    out = config.out or folder / "evaluation.json"
    require_file(out)
    processes = Processes.from_environment()
    with processes.together():
        device = device_named(processes.device(config.device))
        dictionary = load(config.dictionary, device)
        every = list(dictionary.values()) if isinstance(dictionary, Bundle) else [dictionary]
        known = weights_crc32(config.dictionary, [one.parts() for one in every])
        with pieces(processes, out, {"weights": known, **decisive(config)}) as made:
            if isinstance(dictionary, Bundle):
                result, show = evaluate_bundle(config, dictionary, known, device, made)
            else:
                result, show = evaluate_one(config, dictionary, known, device, made)
            result = jsonable(result)
            if processes.leads:
                write_json(out, result)
                show()
    return result


def decisive(config: EvaluationConfig) -> dict[str, Any]:
    """The settings that decide the numbers, in addition to the weights."""
    from sae.activations.files.manifest import manifest_crc32, read_manifest

    chosen = {name: getattr(config, name) for name in ("model", "sequences", "rows", "batch", "seed", "encoder")}
    return {"cache": manifest_crc32(read_manifest(config.cache)), **chosen}


def evaluate_one(
    config: EvaluationConfig, dictionary: Dictionary, known: str, device: torch.device, made: Pieces
) -> tuple[dict[str, Any], Callable[[], None]]:
    """The content of the file, and a function that prints the table; `known`: the checksum of the weights."""
    from sae.activations.joined import cache_of, targets_of

    cache = cache_of(config.cache, dictionary, named=config.model is not None, verify=config.verify and made.processes.leads)
    refuse_training_tokens(Path(config.dictionary), cache)
    reconstruction, sites, massive, encoder = reconstruct(dictionary, cache, config.rows, made, config.encoder)
    if made.processes.leads and encoder != "product":
        print(f"held-out rows were encoded by {encoder}; name it with --encoder to repeat these numbers bit for bit")
    loss, several = None, len(dictionary.reads) + len(dictionary.writes) > 2
    if config.sequences and several:
        if made.processes.leads:
            print("the model's loss is not measured: a dictionary of several sites cannot be spliced into one pass", file=sys.stderr)
    elif config.sequences:
        dictionary.metadata["site"] = cache.own_site  # where it does not name its own
        text = held_out_text(config, cache, device)
        means = {str(dictionary.site_out): reconstruction.mean_d}
        loss = language_model_loss(
            text.lm, [dictionary], text.sequences, means, replaced=text.replaced, batch=config.batch, seed=config.seed, made=made
        )
    result = {
        "dictionary": str(config.dictionary),
        "weights_crc32": known,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "site": [port.site for port in dictionary.reads] if several else cache.own_site,
        **({"site_out": [port.site for port in dictionary.writes] if several else dictionary.site_out} if dictionary.is_transcoder else {}),
        "model": cache.model,
        **({"models": cache.manifest["models"]} if several and "models" in cache.manifest else {}),
        "cache": str(config.cache),
        "split": "held_out",
        "seed": config.seed,
        "encoder": encoder,
        "reconstruction": reconstruction_facts(reconstruction),
        **({"sites": {site: {key: getattr(one, key) for key in OF_A_SITE} for site, one in sites.items()}} if several else {}),
        "massive_rows": massive and massive._asdict() | {"without": reconstruction_facts(massive.without)},
        "language_model": loss._asdict() if loss else None,
    }
    return result, partial(print_evaluation, config, cache, targets_of(cache, dictionary).site, reconstruction, sites, massive, loss)


class MassiveRows(NamedTuple):
    """The massive rows among the scanned ones, and the measures of the others."""

    above_median: float
    rows: int
    share_of_squared_norm: float
    without: Reconstruction


class Reconstructed(NamedTuple):
    """The result for the rows of one evaluation."""

    of_all: Reconstruction
    by_site: dict[str, Reconstruction]
    """if there are several"""
    massive: MassiveRows | None
    encoder: Method


def reconstruct(
    dictionary: Dictionary, cache: "ActivationCache", rows: int, made: Pieces | None = None, encoder: Literal["auto"] | Method = "auto"
) -> Reconstructed:
    """Over the first `rows` held-out rows, at each of several sites too, and over those rows that are not massive, where some are.

    The first rows are a fair sample: shards were shuffled when they were written. Other processes of `made` share the work.
    """
    from sae.activations.joined import targets_of

    target, blocks = targets_of(cache, dictionary), blocks_of(cache, rows)
    parts = [blocks[part.start : part.stop] for part in stretches(len(blocks))]
    sizes = [sum(block.rows for block in part) for part in parts]

    def norms(number: int, advance: Callable[[int], None]) -> dict[str, Tensor]:
        found = [torch.linalg.vector_norm(x_bd.float(), dim=-1) for x_bd in read_blocks(cache, parts[number])]
        advance(sizes[number])
        return {"norm_n": torch.cat(found)}

    def first() -> Tensor:
        return next(read_blocks(cache, blocks)).to(dictionary.W_dec_fo.device)

    def find() -> Method:
        found = dictionary.encoder(first(), encoder, sum(sizes))
        return found.method if found else "product"

    def measure(number: int, advance: Callable[[int], None]) -> dict[str, Tensor]:
        usual, massive = empty(), empty()
        massive_n = massive_parts[number]
        for x_bd, y_bo in zip(read_blocks(cache, parts[number]), read_blocks(target, parts[number])):
            massive_b, massive_n = massive_n[: len(x_bd)], massive_n[len(x_bd) :]
            for rows_b, metrics in ((~massive_b, usual), (massive_b, massive)):
                chosen = slice(None) if rows_b.all() else rows_b
                add_reconstruction(dictionary, x_bd[chosen], metrics, y_bo[chosen], prepared)
            advance(len(x_bd))
        named = (("usual", usual), ("massive", massive))
        return {f"{name}.{key}": sum_ for name, metrics in named for key, sum_ in metrics.state().items()}

    def empty() -> ReconstructionMetrics:
        return ReconstructionMetrics(dictionary.norms(), dictionary.d_out, dictionary.writes)

    norm_n = torch.cat([found["norm_n"] for found in results(made, "norms", "tokens", sizes, norms)])
    massive_n, square_n = is_massive(norm_n), norm_n.double().square()
    massive_parts = massive_n.split(sizes)
    method = agreed(made, find)
    prepared = None if method == "product" else dictionary.encoder(first(), method)
    usual, massive = empty(), empty()
    for found in results(made, "reconstruction", "tokens", sizes, measure):
        for name, metrics in (("usual", usual), ("massive", massive)):
            metrics.merge_state({key.removeprefix(f"{name}."): sum_ for key, sum_ in found.items() if key.startswith(f"{name}.")})
    without = usual.result()
    if not massive.rows:
        return Reconstructed(without, usual.by_site(), None, method)
    usual.merge(massive)
    of_norm = share(float(square_n[massive_n].sum()), float(square_n.sum()))
    return Reconstructed(usual.result(), usual.by_site(), MassiveRows(RATIO, massive.rows, of_norm, without), method)


class Block(NamedTuple):
    """Some rows of a shard that are read at a time."""

    shard: int
    start: int
    rows: int


def blocks_of(cache: "ActivationCache", rows: int) -> list[Block]:
    """The first `rows` held-out rows."""
    blocks = []
    for number, shard in enumerate(cache.shards("held_out")):
        taken = min(rows, shard.rows)
        blocks += [Block(number, start, min(READ_ROWS, taken - start)) for start in range(0, taken, READ_ROWS)]
        rows -= taken
    return blocks


def read_blocks(cache: "ActivationCache", blocks: Sequence[Block]) -> Iterator[Tensor]:
    """Yields [b, d] of one block after another."""
    for number, own in groupby(blocks, lambda block: block.shard):
        x_nd = cache.read(cache.shards("held_out")[number])[0]
        yield from (x_nd[block.start : block.start + block.rows] for block in own)


def reconstruction_facts(reconstruction: Reconstruction) -> dict[str, Any]:
    """For the file: density as a histogram in half decades, without the mean row."""
    edges = [-math.inf, *np.arange(-6, 0.01, 0.5).tolist()]
    density_f = reconstruction.density_f.numpy()
    counts, _ = np.histogram(np.log10(density_f[density_f > 0]), edges)
    values = {k: v for k, v in reconstruction._asdict().items() if k not in ("density_f", "mean_d")}
    histogram = {"log10_upper_edges": edges[1:], "features": counts.tolist()}
    return values | {"density_histogram": histogram}


def print_evaluation(
    config: EvaluationConfig,
    cache: "ActivationCache",
    written: str,
    r: Reconstruction,
    sites: dict[str, Reconstruction],
    massive: MassiveRows | None,
    loss: LanguageModelLoss | None,
) -> None:
    """`written`: the site or sites that are reconstructed."""
    from rich.console import Console
    from rich.table import Table

    place, target = (cache.site, "x") if written == cache.site else (f"{cache.site} to {written}", "target")
    table = Table("measure", "value", title=f"{config.dictionary} at {place}, held-out tokens of {config.cache}")
    table.columns[1].justify = "right"
    features = len(r.density_f)
    rows = {
        "activations scanned": f"{r.rows:,}",
        "FVU (fraction of variance unexplained)": f"{r.fvu:.4f}",
        **{f"FVU at {site}": f"{one.fvu:.4f}" for site, one in sites.items()},
        **({"FVU without the massive rows": f"{massive.without.fvu:.4f}"} if massive else {}),
        "explained variance": f"{r.explained_variance:.4f}",
        "explained second moment (about 0, not the mean)": f"{r.explained_second_moment:.4f}",
        "squared error per token": f"{r.mse:.4g}",
        f"cosine of {target} and reconstruction": f"{r.cosine:.4f}",
        f"norm of reconstruction / norm of {target}": f"{r.norm_ratio:.4f}",
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
