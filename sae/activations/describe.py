"""An overview of a cache: its source, the norms of its rows, outlier dimensions, massive tokens, some of its text.

n sampled rows · d width of the site
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.harvest.massive import RATIO, is_massive
from sae.activations.text.tokens import SPLITS
from sae.disk.remote import Place
from sae.errors import InputError

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
OUTLIER = 6
"""A dimension is an outlier if its mean or standard deviation is more than this many times the median standard deviation."""
TOP = 10
SHOWN_LABELS = 20


@dataclass(kw_only=True)
class DescribeConfig:
    cache: Place
    """Folder or URL of the cache."""
    site: str | None = None
    """Which of the cache's sites, when it has several."""
    rows: int = 1 << 16
    """Maximum number of training rows to sample; at most 256 MB of them are read."""
    texts: int = 3
    """Number of sequences whose beginning is shown."""
    json: bool = False
    """Print one JSON object instead of tables."""
    verify: bool = False
    """First read the whole site in the cache to compare every checksum. By default only those of token files up to 32 MB are compared."""


def describe_cache(config: DescribeConfig) -> dict[str, Any]:
    """Prints the tables, and returns the same as plain values. Raises `InputError` for a cache that cannot be read."""
    if config.rows < 1 or config.texts < 0:
        raise InputError(f"expected --rows of at least 1 and --texts of at least 0, got {config.rows} and {config.texts}")
    cache = ActivationCache.open(config.cache, config.site, verify=config.verify)
    x_nd, positions_n = sample_rows(cache, config.rows)
    norm_n = torch.linalg.vector_norm(x_nd, dim=-1)
    pieces = token_texts(cache)
    description = {
        **facts(cache),
        "sampled_rows": len(x_nd),
        "norms": dict(zip(map(str, QUANTILES), np.quantile(norm_n.numpy(), QUANTILES).tolist())),
        "outlier_dimensions": outlier_dimensions(x_nd),
        "massive_activations": massive_activations(cache, norm_n, positions_n.numpy(), pieces),
        "texts": sample_texts(cache, config.texts, pieces),
    }
    if config.json:
        print(json.dumps(description, indent=1, allow_nan=False))
    else:
        show(description)
    return description


def facts(cache: ActivationCache) -> dict[str, Any]:
    """Facts from the manifest alone."""
    manifest = cache.manifest
    entries = [shard for shard in manifest["shards"] if cache.site in shard["files"]]
    size, rows = sum(shard["files"][cache.site]["bytes"] for shard in entries), sum(shard["rows"] for shard in entries)
    stored = ("imported", "dataset", "context", "prepend_bos", "dtype", "seed", "held_out", "counts", "labels")
    return {
        "folder": str(cache.folder),
        "site": cache.site,
        "sites": list(manifest["sites"]),
        "d_in": cache.d_in,
        "mean_squared_norm": cache.mean_squared_norm,
        "model": cache.model,
        "second_model": {name: model["name"] for name, model in manifest.get("models", {}).items()},
        **{key: manifest[key] for key in stored if key in manifest},
        "rows": {split: cache.rows(split) for split in SPLITS},
        "bytes": size,
        "bytes_per_row": size / rows if rows else None,
        "token_bytes": sum(entry["bytes"] for entry in manifest["tokens"]),
    }


def sample_rows(cache: ActivationCache, most: int) -> tuple[Tensor, Tensor]:
    """Training rows, float32 [n, d], and their global token positions, int64 [n]: from every shard, in proportion to its size.

    The first rows of a shard are a fair sample of it, since it was shuffled when it was written.
    """
    shards = cache.shards("train")
    total = cache.rows("train")
    if total == 0:
        raise InputError(f"expected training rows in {cache.folder}, but there are none; harvest more documents")
    count = min(most, total, max(1, (1 << 28) // (4 * cache.d_in)))
    shares = np.diff(np.cumsum([0] + [shard.rows for shard in shards]) * count // total)
    x_nd, positions_n = torch.empty(count, cache.d_in, dtype=cache.dtype), torch.empty(count, dtype=torch.int64)
    for shard, stop, share in zip(shards, np.cumsum(shares).tolist(), shares.tolist()):
        if share:
            cache.read_block(shard, 0, x_nd[stop - share : stop])
            positions_n[stop - share : stop] = torch.from_numpy(cache.positions(shard)[:share].copy())
    return x_nd.float(), positions_n


def outlier_dimensions(x_nd: Tensor) -> list[dict[str, float]]:
    """The ten largest outlier dimensions."""
    std_d, mean_d = torch.std_mean(x_nd.double(), dim=0, correction=0)
    usual = float(std_d.median())
    largest_d = torch.maximum(mean_d.abs(), std_d)
    found = [int(d) for d in largest_d.argsort(descending=True)[:TOP] if largest_d[d] > OUTLIER * usual]
    return [{"dimension": d, "mean": float(mean_d[d]), "std": float(std_d[d]), "median_std": usual} for d in found]


def massive_activations(cache: ActivationCache, norm_n: Tensor, positions_n: np.ndarray, pieces: list[bytes] | None) -> dict[str, Any]:
    """How many sampled rows are massive, at which tokens, and where in their sequences."""
    median = float(norm_n.median())
    massive_n = is_massive(norm_n).numpy()
    found: dict[str, Any] = {"rows": int(massive_n.sum()), "largest_over_median": float(norm_n.max()) / median if median else None}
    if not cache.manifest["tokens"]:
        return found | {"tokens": None, "positions": None}  # imported without its text
    tokens, at = cache.tokens, positions_n[massive_n]
    ids = Counter(np.asarray(tokens.ids[at]).tolist()).most_common(TOP)
    offsets = Counter((at - tokens.sequence_starts[tokens.sequence_of(at)]).tolist()).most_common(TOP)
    return found | {
        "tokens": [{"id": i, "text": pieces[i].decode("utf-8", "replace") if pieces else None, "rows": count} for i, count in ids],
        "positions": [{"position": position, "rows": count} for position, count in offsets],
    }


def token_texts(cache: ActivationCache) -> list[bytes] | None:
    """UTF-8 of every token id; None, with a line on stderr, if text or tokenizer is not available."""
    from sae.model.opening.loading import load_tokenizer
    from sae.model.vocabulary import vocabulary

    try:
        tokens = cache.tokens
        pieces = vocabulary(load_tokenizer(cache.model_name(), cache.model["revision"]), int(tokens.ids.max()) + 1).pieces
    except InputError as error:
        print(f"without texts: {error}", file=sys.stderr)
        return None
    return pieces


def sample_texts(cache: ActivationCache, count: int, pieces: list[bytes] | None) -> list[dict[str, Any]]:
    """The first 40 tokens of sequences from all over the cache."""
    if pieces is None or count == 0:
        return []
    tokens, found = cache.tokens, []
    for sequence in np.linspace(0, len(tokens.sequence_split) - 1, count).astype(int).tolist():
        document = int(tokens.sequence_document[sequence])
        label = int(tokens.document_label[document])
        start, stop = tokens.sequence_starts[sequence : sequence + 2]
        ids = tokens.ids[start : min(stop, start + 40)]
        found.append(
            {
                "document": document,
                "label": tokens.label_names[label] if label >= 0 else None,
                "split": SPLITS[tokens.sequence_split[sequence]],
                "text": b"".join(pieces[i] for i in ids).decode("utf-8", "replace"),
            }
        )
    return found


def show(description: dict[str, Any]) -> None:
    show_facts(description)
    show_sample(description)


def show_facts(description: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{description['site']} of {description['folder']}", show_header=False)
    for key in ("model", "second_model", "sites", "imported", "dataset", "context", "prepend_bos", "dtype", "d_in", "held_out", "labels"):
        value = description.get(key)
        if key == "labels" and value and len(value) > SHOWN_LABELS:
            value = f"{', '.join(value[:SHOWN_LABELS])} and {len(value) - SHOWN_LABELS:,} more"
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v not in (None, False))
        if key == "sites":
            value = " ".join(description["sites"])
        if value not in (None, "", []):
            table.add_row(key.replace("_", " "), Text(str(value)))
    counts = description["counts"]
    size = f"{description['bytes'] / 1e6:,.1f} MB, {description['bytes_per_row']:.1f} bytes a row"
    table.add_row("rows", ", ".join(f"{rows:,} {split}" for split, rows in description["rows"].items()))
    table.add_row("of", ", ".join(f"{counts[key]:,} {key}" for key in ("tokens", "sequences", "documents") if counts.get(key) is not None))
    table.add_row("left out", ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in counts.get("left_out", {}).items() if count))
    table.add_row("on disk", size)
    table.add_row("tokens on disk", f"{description['token_bytes']:,} bytes")
    table.add_row("mean ‖x‖²", f"{description['mean_squared_norm']:.4g}")
    Console().print(table)


def show_sample(description: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, massive = Console(), description["massive_activations"]
    console.print(f"From a sample of {description['sampled_rows']:,} training rows:")
    norms = Table("quantile of ‖x‖", *(f"{100 * float(q):g} %" for q in description["norms"]))
    norms.add_row("", *(f"{value:.4g}" for value in description["norms"].values()))
    console.print(norms)
    dimensions = Table("dimension", "mean", "std", title=f"dimensions with mean or std above {OUTLIER} times the median std")
    for row in description["outlier_dimensions"]:
        dimensions.add_row(str(row["dimension"]), f"{row['mean']:.4g}", f"{row['std']:.4g}")
    console.print(
        dimensions if description["outlier_dimensions"] else f"no dimension's mean or std is above {OUTLIER} times the median std"
    )
    largest = "" if massive["largest_over_median"] is None else f"; the largest has {massive['largest_over_median']:.3g} times"
    console.print(f"{massive['rows']:,} rows have a norm above {RATIO:g} times the median{largest}")
    if massive["rows"] and massive["tokens"] is not None:
        at = Table("token", "rows", "position in the sequence", "rows", title="where the largest norms are")
        tokens = [(str(t["id"]) if t["text"] is None else repr(t["text"]), str(t["rows"])) for t in massive["tokens"]]
        places = [(str(p["position"]), str(p["rows"])) for p in massive["positions"]]
        for token, place in zip_longest(tokens, places, fillvalue=("", "")):
            at.add_row(Text(token[0]), token[1], *place)
        console.print(at)
    for text in description["texts"]:
        console.print(Text(f"document {text['document']} ({text['label'] or 'no label'}, {text['split']}): {text['text']!r}"))
