"""Activations of other programs into a cache of ours: shuffled, sharded, with checksums. What they do not say stays unknown.

n rows · d width of the site
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sae.activations.files.ledger import FORMAT_VERSION, claim, describe_file
from sae.activations.files.number_formats import FORMATS, decode, encode, row_bytes, write_shard
from sae.activations.harvest.plan import REASONS, Masks, Pool, count_reasons, plan_pools
from sae.activations.harvest.pools import sum_of_squares
from sae.activations.imports.foreign import ForeignRows, open_source
from sae.activations.text.tokens import PART_TOKENS, Part, Tokens, is_held_out
from sae.disk.places import require_folder
from sae.disk.remote import Place
from sae.disk.writing import only_writer, require_free_space, write_json, write_tensors
from sae.errors import InputError
from sae.progress import progress


@dataclass(kw_only=True)
class ImportConfig:
    source: tuple[Path, ...]
    """A folder that SAELens' CacheActivationsRunner wrote, or .npy or .safetensors files with one array [n, d] each, joined in this
    order."""
    out: Place
    """Folder or URL of the cache."""
    site: str | None = None
    """Site of the activations, for example resid_post.2; a SAELens folder names its own."""
    column: str | None = None
    """Hook (SAELens) or tensor (.safetensors) to import, if there are several."""
    token_ids: Path | None = None
    """File with the token id of every row of plain arrays, [n] integers (.npy or .safetensors)."""
    model: str | None = None
    """Model that produced the activations: folder, GGUF file or hub name. Default: unknown; commands that need the model then refuse the
    cache."""
    revision: str | None = None
    """Revision of the model on the hub."""
    keep_bos: bool = False
    """Keep rows at beginning-of-text tokens. By default they are left out if model and token ids are known."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Number format on disk; int8 is 8 bits per number with one scale per row."""
    held_out: float = 0.05
    """Share held out from training: of the sequences of a SAELens folder, or of blocks of 1024 rows of plain arrays."""
    seed: int = 0
    """Seed of the order, the shuffling and the held-out share."""
    pool_tokens: int = 1 << 18
    """Rows shuffled together in memory."""
    shard_tokens: int = 1 << 16
    """Rows per file at most."""


def import_activations(config: ImportConfig) -> Place:
    """Copies the activations into a new cache and returns its folder; an interrupted import starts over.

    Memory: one pool of rows, and 4 bytes per row if token ids are known. Raises `InputError` for a source that cannot be read, rows that
    are not finite, and a full disk.
    """
    _check(config)
    require_folder(config.out)
    source = open_source(config.source, config.column, config.token_ids)
    site = _site(config, source)
    model, bos_id = _model(config, source, site)
    tokens = _tokens(config, source)
    _say_doubled(source, bos_id)
    masks = Masks(None if config.keep_bos else bos_id)
    pools = plan_pools(tokens, seed=config.seed, pool_tokens=config.pool_tokens, shard_tokens=config.shard_tokens, masks=masks)
    settings = {k: [str(path) for path in v] if k == "source" else v for k, v in asdict(config).items() if k != "out"}
    settings |= {"token_ids": config.token_ids and str(config.token_ids), "rows": source.rows, "d_in": source.d_in}
    with only_writer(config.out):
        claim(config.out, settings=settings, model=model)
        if (config.out / "manifest.json").exists():
            print(f"{config.out} is already complete")
            return config.out
        require_free_space(config.out, sum(pool.rows for pool in pools) * row_bytes(config.dtype, source.d_in), "the import")
        shards = _write_pools(config, source, site, tokens, masks, pools)
        manifest = _manifest(config, source, site, model, shards)
        manifest["prepend_bos"] = None if bos_id is None or source.ids is None else bool((source.ids[:: source.run] == bos_id).all())
        manifest["counts"]["left_out"] |= dict(zip(REASONS, count_reasons(tokens, masks).sum(0)[1:].tolist()))
        manifest["tokens"] = _write_tokens(config.out, tokens) if source.ids is not None else []
        write_json(config.out / "manifest.json", manifest)
    rows = manifest["counts"]["rows"]
    print(f"{config.out}: {rows['train']:,} training and {rows['held_out']:,} held-out rows at {site}")
    unknown = [name for name, known in (("model", model["name"]), ("text", source.ids)) if known is None]
    if unknown:
        print(f"unknown, so nothing that needs it can be done: {' and '.join(unknown)}")
    return config.out


def _check(config: ImportConfig) -> None:
    for name, least in (("pool_tokens", 1), ("shard_tokens", 1), ("seed", 0)):
        if getattr(config, name) < least:
            raise InputError(f"expected --{name.replace('_', '-')} of at least {least}, got {getattr(config, name)}")
    if not 0 <= config.held_out < 1:
        raise InputError(f"expected --held-out from 0 up to but not including 1, got {config.held_out}; 0.05 is usual")


def _site(config: ImportConfig, source: ForeignRows) -> str:
    from sae.dictionaries.formats.transformer_lens import site_of_hook
    from sae.model.sites import parse_site

    if config.site is not None:
        return str(parse_site(config.site))
    found = site_of_hook(source.hook_name or "")
    if found is not None:
        return found
    raise InputError(f"expected the site of these activations, which {source.hook_name or 'a plain array'} does not tell; give --site")


def _model(config: ImportConfig, source: ForeignRows, site: str) -> tuple[dict[str, Any], int | None]:
    """The manifest's facts about the model, and the beginning-of-text token; all unknown without --model."""
    if config.model is None:
        return {"name": None, "revision": None, "fingerprint": None, "dtype": None}, None
    from sae.model.language_model import LanguageModel

    lm = LanguageModel.load(config.model, revision=config.revision, device="cpu")
    if lm.width(site) != source.d_in:
        raise InputError(f"expected rows of width {lm.width(site)}, as {lm.name} has at {site}, but they have {source.d_in}; check --model")
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    if source.ids is not None and not 0 <= source.ids.min() <= source.ids.max() < vocabulary:
        raise InputError(f"expected token ids below {vocabulary}, the vocabulary of {lm.name}, got {source.ids.max()}; check --model")
    return {"name": lm.name, "revision": lm.revision, "fingerprint": lm.fingerprint(), "dtype": None}, lm.bos_id


def _say_doubled(source: ForeignRows, bos_id: int | None) -> None:
    """Warns about texts that start with two beginning-of-text tokens (chat template and tokenizer). The recording stays as it is."""
    if bos_id is None or source.ids is None or source.what != "saelens":  # the runs of a plain array are not sequences
        return
    first_n = np.arange(0, source.rows - 1, source.run)
    doubled = int(((source.ids[first_n] == bos_id) & (source.ids[first_n + 1] == bos_id)).sum())
    if doubled:
        print(f"{doubled:,} of {len(first_n):,} sequences begin with two beginning-of-text tokens: the model was given both")


def _tokens(config: ImportConfig, source: ForeignRows) -> Tokens:
    """Each run is a sequence and, since nothing else is known, also a document. Unknown ids are zeros that take no memory."""
    starts = np.append(np.arange(0, source.rows, source.run), source.rows)
    runs = len(starts) - 1
    held_out = np.array([is_held_out(run, config.seed, config.held_out) for run in range(runs)], dtype=np.uint8)
    ids = np.broadcast_to(np.int32(0), source.rows) if source.ids is None else source.ids
    return Tokens(ids, starts.astype(np.int64), np.arange(runs), np.full(runs, -1, dtype=np.int32), held_out, [])


def _write_tokens(folder: Place, tokens: Tokens) -> list[dict[str, Any]]:
    """Writes files of about 16 million tokens; returns the manifest's entries."""
    entries = []
    lengths = np.diff(tokens.sequence_starts)
    cuts = np.flatnonzero(np.diff(tokens.sequence_starts[:-1] // PART_TOKENS)) + 1
    for number, sequences in enumerate(np.split(np.arange(len(lengths)), cuts)):
        first, last = sequences[0], sequences[-1] + 1
        begin, end = tokens.sequence_starts[first], tokens.sequence_starts[last]
        part = Part(
            np.asarray(tokens.ids[begin:end]),
            tokens.sequence_starts[first : last + 1] - begin,
            tokens.sequence_document[first:last],
            tokens.document_label[first:last],
            tokens.sequence_split[first:last],
        )
        name = f"tokens/{number:05d}.safetensors"
        write_tensors(folder / name, {key: torch.from_numpy(value) for key, value in part._asdict().items()})
        counts = {"tokens": len(part.ids), "sequences": len(sequences), "documents": len(sequences)}
        entries.append({"file": name, **describe_file(folder / name), **counts})
    return entries


def _write_pools(
    config: ImportConfig, source: ForeignRows, site: str, tokens: Tokens, masks: Masks, pools: list[Pool]
) -> list[dict[str, Any]]:
    shards = []
    with progress("import", sum(pool.rows for pool in pools), "rows") as bar:
        for pool in pools:
            acts_nd, positions_n = _read_pool(config, source, tokens, masks, pool)
            stored = encode(acts_nd, config.dtype)
            order_n = pool.permutation(config.seed, pool.rows)
            for name, start, stop in pool.shards(pool.rows):
                chosen_n = order_n[start:stop]
                file = write_shard(config.out / site / f"{name}.safetensors", config.dtype, stored, positions_n, chosen_n)
                squares = sum_of_squares(decode({key: value[torch.from_numpy(chosen_n)] for key, value in stored.items()}))
                shard = {"name": name, "split": pool.split, "rows": stop - start, "files": {site: file}, "squared_norm": {site: squares}}
                shards.append(shard)
            bar.advance(pool.rows)
    return shards


def _read_pool(config: ImportConfig, source: ForeignRows, tokens: Tokens, masks: Masks, pool: Pool) -> tuple[Tensor, Tensor]:
    """The pool's kept rows, converted to the number format if that is a float format, and their global positions; all finite."""
    kind = FORMATS[config.dtype].read
    acts_nd = torch.empty(pool.rows, source.d_in, dtype=kind)
    positions_n = torch.empty(pool.rows, dtype=torch.int64)
    filled = 0
    for sequence in pool.sequences:
        start, stop = int(tokens.sequence_starts[sequence]), int(tokens.sequence_starts[sequence + 1])
        kept_n = torch.from_numpy(np.flatnonzero(masks.reasons(tokens.ids[start:stop], np.arange(stop - start)) == 0))
        rows = slice(filled, filled + len(kept_n))
        read_nd = source.read(start, stop)[kept_n]
        acts_nd[rows], positions_n[rows] = read_nd.to(kind), kept_n + start
        bad_n = ~acts_nd[rows].isfinite().all(-1)
        if bad_n.any():
            bad = (kept_n[bad_n] + start).tolist()
            named = ", ".join(map(str, bad[:5])) + (" and others" if len(bad) > 5 else "")
            if read_nd[bad_n].isfinite().all():
                raise InputError(f"expected numbers that fit {config.dtype}, but row {named} has larger ones; use --dtype bfloat16")
            raise InputError(f"expected finite activations, but row {named} of the source has NaN or infinity; leave it out")
        filled = rows.stop
    return acts_nd, positions_n


def _manifest(config: ImportConfig, source: ForeignRows, site: str, model: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {split: sum(shard["rows"] for shard in shards if shard["split"] == split) for split in ("train", "held_out")}
    if rows["train"] == 0:
        raise InputError("expected rows to train on, but all are at beginning-of-text tokens; give more, or --keep-bos")
    squares = math.fsum(shard["squared_norm"][site] for shard in shards if shard["split"] == "train")
    return {
        "format_version": FORMAT_VERSION,
        "imported": {"kind": source.what, "source": [str(path) for path in config.source], "hook_name": source.hook_name},
        "model": model,
        "tokenizer": None,
        "dataset": None,
        "context": source.run if source.what == "saelens" else None,
        "dtype": config.dtype,
        "seed": config.seed,
        "held_out": config.held_out,
        "sites": {site: {"d_in": source.d_in, "mean_squared_norm": squares / rows["train"]}},
        "counts": {
            "documents": None,
            "sequences": -(-source.rows // source.run) if source.what == "saelens" else None,
            "tokens": source.rows,
            "rows": rows,
            "left_out": {"norm_outliers": 0, "padding": 0},
        },
        "labels": [],
        "shards": shards,
        "complete": True,
    }
