"""`sae diff-models`: differences of two models by a crosscoder, as JSON and as a page."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from sae.activations.joined import JoinedCache, cache_of
from sae.device import device_named
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.source import weights_crc32
from sae.disk.places import require_file
from sae.disk.remote import Place
from sae.disk.writing import atomic, write_json
from sae.errors import InputError
from sae.evaluation.reconstruction import CHUNK_BYTES, ReconstructionMetrics
from sae.features.model_diff.examples import Example, examples
from sae.features.model_diff.measures import (
    CLASSES,
    NU_ERROR,
    NU_RECONSTRUCTION,
    ONE_MODEL,
    SAID,
    SHARED,
    VERDICTS,
    LatentScaling,
    Measures,
    TopExamples,
)
from sae.progress import progress

if TYPE_CHECKING:
    from sae.activations.cache import Shard

FORMAT = "sae model diff 1"
LEAST = 10
"""rows on which a feature that is shown must fire"""
KEPT = 6
"""examples of each feature that is shown"""


@dataclass(kw_only=True)
class DiffConfig:
    dictionary: str
    """Folder of a crosscoder that reads and writes one site of each of two models (or two sites of one)."""
    cache: Place
    """Folder or URL of an activation cache with both sites: sae cache with --second-model."""
    out: Path
    """JSON file for the numbers; the page is written beside it as .html."""
    rows: int = 100_000
    """Maximum number of rows of both models to measure on."""
    split: Literal["held_out", "train"] = "held_out"
    """Split of the cache to take the rows from."""
    features: int = 20
    """Number of features of each group on the page."""
    model: str | None = None
    """Model for the tokenizer, by hub name, folder or GGUF file. Default: the one the cache names."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    verify: bool = False
    """First read both sites in the cache to compare every checksum. By default only those of token files up to 32 MB are compared."""


def diff_models(config: DiffConfig) -> dict[str, Any]:
    """Measures, prints a table, writes the JSON file and its page; returns what is in the file.

    Raises `InputError` for a dictionary that is not a crosscoder of two sites, and for a cache of other models, sites or widths.
    """
    from sae.features.model_diff.page import page_html

    require_file(config.out)
    page = config.out.with_suffix(".html")
    if page == config.out:
        raise InputError(f"expected a name for the JSON, beside which the page gets the ending .html, got {config.out}; end it in .json")
    require_file(page)
    if config.rows < 1 or config.features < 1:
        raise InputError(f"expected --rows and --features of at least 1, got {config.rows} and {config.features}; give larger numbers")
    dictionary = Dictionary.load(config.dictionary, device_named(config.device))
    require_two_sites(dictionary, config.dictionary)
    cache = cache_of(config.cache, dictionary, named=config.model is not None, verify=config.verify)
    assert isinstance(cache, JoinedCache)
    measures, metrics, top = measure(dictionary, cache, config)
    groups = chosen_groups(measures, config.features)
    shown = {feature: top.of(feature) for group in groups.values() for feature in group}
    found = examples(dictionary, cache, config.split, shown, pieces_of(config, cache))
    content = report(config, dictionary, cache, measures, metrics, groups, found)
    write_json(config.out, content)
    with atomic(page) as temporary:
        temporary.write_text(page_html(content, found), encoding="utf-8")
    show(content)
    print(f"numbers: {config.out}, page: {page}")
    return content


def require_two_sites(dictionary: Dictionary, source: str) -> None:
    reads, writes = ([port.site for port in ports] for ports in (dictionary.reads, dictionary.writes))
    if len(reads) != 2 or reads != writes:
        does = " and ".join(map(str, reads)) + ("" if reads == writes else f" and writes {' and '.join(map(str, writes))}")
        raise InputError(
            f"expected a crosscoder of two sites, one of each model, got one in {source} that reads {does}; train one on a cache of "
            "both models"
        )


@torch.no_grad()
def measure(dictionary: Dictionary, cache: JoinedCache, config: DiffConfig) -> tuple[Measures, ReconstructionMetrics, TopExamples]:
    """One pass over the rows."""
    total = min(config.rows, cache.rows(config.split))
    if not total:
        raise InputError(
            f"expected rows in the split {config.split!r} of {cache.folder}, but there are none; give --split train, or harvest more text"
        )
    device = dictionary.W_dec_fo.device
    norms = tuple(one.mean_squared_norm for one in cache.caches)
    if min(norms) <= 0:
        raise InputError(f"expected activations at both sites, but all are zero at one of {cache.site}; choose other sites")
    scaling = LatentScaling(dictionary, norms)  # type: ignore[arg-type]
    metrics = ReconstructionMetrics(dictionary.norms(), dictionary.d_out, dictionary.writes)
    top = TopExamples(dictionary.d_sae, KEPT, device)
    chunk = max(1, CHUNK_BYTES // (4 * dictionary.d_sae))
    with progress("measure", total, "tokens") as bar:
        for shard in cache.shards(config.split):
            for x_bd, positions_b in _chunks(cache, shard, chunk, total - bar.done):
                x_bd = x_bd.to(device)
                acts_bf = dictionary.encode(x_bd)
                x_hat_bo = dictionary.decode(acts_bf, x_bd)
                scaling.add(x_bd, acts_bf, x_hat_bo)
                metrics.add(x_bd, acts_bf, x_hat_bo)
                top.add(acts_bf, positions_b)
                bar.advance(len(x_bd))
    return scaling.result(), metrics, top


def _chunks(cache: JoinedCache, shard: "Shard", size: int, most: int) -> "list[tuple[Tensor, Tensor]]":
    if most <= 0:
        return []
    x_nd, positions_n = cache.read(shard)
    return list(zip(x_nd[:most].float().split(size), positions_n[:most].split(size)))


def chosen_groups(measures: Measures, count: int) -> dict[str, list[int]]:
    """The features to show: those of one model alone, specific ones first; shared ones whose rows differ most; the least certain.

    If no feature is of one model alone, the closest ones.
    """
    r, fires = measures.relative_norm_f, measures.count_f >= LEAST
    doubt = (measures.nu_error_f / NU_ERROR).maximum(measures.nu_reconstruction_f / NU_RECONSTRUCTION).nan_to_num(nan=torch.inf)
    shared = fires & (r >= SHARED) & (r <= 1 - SHARED)
    groups = {}
    for name, distance in (("first", r), ("second", 1 - r)):
        alone = fires & (distance < ONE_MODEL)
        groups[name] = _lowest(doubt if alone.any() else distance, alone if alone.any() else fires, count)
    return groups | {"shared": _lowest(measures.cosine_f, shared, count)}


def _lowest(key_f: Tensor, among_f: Tensor, count: int) -> list[int]:
    chosen = key_f.masked_fill(~among_f, torch.nan).argsort(stable=True)[: min(count, int(among_f.sum()))]
    return chosen.tolist()  # NaN comes last


def pieces_of(config: DiffConfig, cache: JoinedCache) -> list[bytes] | None:
    """UTF-8 of every token id; None, with a line on stderr, if there is no tokenizer."""
    from sae.model.opening.loading import load_tokenizer
    from sae.model.vocabulary import vocabulary

    tokenizer = load_tokenizer(config.model or cache.model_name(), None if config.model else cache.model["revision"])
    if tokenizer is None:
        print("the model has no tokenizer, so tokens are shown as their ids", file=sys.stderr)
        return None
    return vocabulary(tokenizer, int(cache.tokens.ids.max()) + 1).pieces


def report(
    config: DiffConfig,
    dictionary: Dictionary,
    cache: JoinedCache,
    measures: Measures,
    metrics: ReconstructionMetrics,
    groups: dict[str, list[int]],
    found: dict[int, list[Example]],
) -> dict[str, Any]:
    """The content of the file: see docs/crosscoders.md."""
    whole, sites = metrics.result(), metrics.by_site()
    classes, verdicts = measures.classes, measures.verdicts
    alive = [name != "silent" for name in classes]
    edges = np.linspace(0, 1, 41)
    turned = np.linspace(-1, 1, 41)
    shared = torch.tensor([name == "shared" for name in classes])
    columns = {name.removesuffix("_f").removesuffix("_pf"): getattr(measures, name).tolist() for name in Measures._fields}
    return {
        "format": FORMAT,
        "dictionary": config.dictionary,
        "weights_crc32": weights_crc32(config.dictionary, [dictionary.parts()]),
        "cache": str(config.cache),
        "split": config.split,
        "rows": whole.rows,
        "sites": [one.site for one in cache.caches],
        "models": [one.model for one in cache.caches],
        "mean_squared_norms": [one.mean_squared_norm for one in cache.caches],
        "reconstruction": {"fvu": whole.fvu, "l0": whole.l0, "fvu_by_site": {site: one.fvu for site, one in sites.items()}},
        "bounds": {"one_model": ONE_MODEL, "shared": SHARED, "nu_error": NU_ERROR, "nu_reconstruction": NU_RECONSTRUCTION},
        "classes": {name: classes.count(name) for name in CLASSES},
        "verdicts": {
            name: {verdict: own.count(verdict) for verdict in VERDICTS if verdict in own}
            for name, own in ((name, [v for c, v in zip(classes, verdicts) if c == name]) for name in ("first", "second"))
        },
        "histograms": {
            "relative_norm": _histogram(measures.relative_norm_f[torch.tensor(alive)], edges),
            "cosine_of_shared": _histogram(measures.cosine_f[shared], turned),
        },
        "groups": groups,
        "examples": {
            str(feature): [
                {
                    "position": one.context.position,
                    "document": one.context.document,
                    "label": one.context.label,
                    "activation": one.context.value,
                    "reads": list(one.reads),
                    "text": one.context.texts,
                    "activations": [round(value, 4) for value in one.context.values.tolist()],
                    "centre": one.context.centre,
                }
                for one in own
            ]
            for feature, own in found.items()
        },
        "features": columns,
    }


def _histogram(values: Tensor, edges: np.ndarray) -> dict[str, list[float]]:
    counts, _ = np.histogram(values.clamp(edges[0], edges[-1]).numpy(), edges)
    return {"edges": edges.round(6).tolist(), "features": counts.tolist()}


def show(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    first, second = content["sites"]
    found = content["reconstruction"]
    table = Table("features", "", title=f"{first} and {second}: {content['rows']:,} rows, L0 {found['l0']:.1f}, FVU {found['fvu']:.3f}")
    table.columns[1].justify = "right"
    classes, verdicts = content["classes"], content["verdicts"]
    for name, text in (("first", f"of {first} alone"), ("second", f"of {second} alone")):
        table.add_row(f"{text} (relative norm {'below' if name == 'first' else 'above'} {_bound(name)})", f"{classes[name]:,}")
        for verdict, count in verdicts[name].items():
            table.add_row(f"  {SAID[verdict]}", f"{count:,}")
    table.add_row(f"shared (relative norm {SHARED:g} to {1 - SHARED:g})", f"{classes['shared']:,}")
    table.add_row("in between", f"{classes['between']:,}")
    table.add_row("never fired", f"{classes['silent']:,}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _bound(name: str) -> str:
    return f"{ONE_MODEL if name == 'first' else 1 - ONE_MODEL:g}"
