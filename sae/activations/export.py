"""A cache as a folder of the `datasets` library: one row per activation, with its token and the token's position.

n rows · d width of the site
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sae.activations.cache import ActivationCache
from sae.activations.text.tokens import SPLITS
from sae.disk.folders import fresh_folder
from sae.disk.places import require_folder
from sae.disk.remote import Place
from sae.disk.writing import require_free_space
from sae.errors import InputError
from sae.progress import progress
from sae.text_input import text_list

if TYPE_CHECKING:
    import pyarrow

CHUNK_ROWS = 4096


@dataclass(kw_only=True)
class ExportConfig:
    cache: Place
    """Folder or URL of the cache."""
    out: Path
    """Folder to write, for `datasets.load_from_disk`; it must not exist yet."""
    site: str | None = None
    """Which of the cache's sites, when it has several."""
    splits: tuple[str, ...] = SPLITS
    """Splits to write."""


def export_cache(config: ExportConfig) -> Path:
    """Writes the complete folder or nothing, in the cache's order, and returns it.

    Columns: `activations` (floats in the cache's dtype; bfloat16 becomes float32, which Arrow has), `token_position` (counted over the
    whole cache), `token_id`, `document`, `label` (null for none), `split`. Facts unknown to an imported cache are null. Memory: 4,096
    rows, and the tokens if they are in several files. Raises `InputError` for unusable options, a damaged cache and a full disk.
    """
    if os.path.lexists(config.out):
        raise InputError(f"expected a new folder, but {config.out} exists already; choose another --out")
    require_folder(config.out)
    if not text_list(config.splits, "splits") or len(set(config.splits)) < len(config.splits):
        raise InputError(f"expected every split once, but --splits is {' '.join(config.splits)!r}; give {' or '.join(SPLITS)}")
    cache = ActivationCache.open(config.cache, config.site, verify=True)
    rows = sum(map(cache.rows, config.splits))
    if rows == 0:
        raise InputError(f"expected rows in the split {' or '.join(config.splits)} of {config.cache}, but there are none")
    dtype = np.dtype("float16" if cache.dtype == torch.float16 else "float32")
    require_free_space(config.out.parent, rows * (cache.d_in * dtype.itemsize + 40), "the export")
    with fresh_folder(config.out, "state.json", "export") as folder:
        _write(cache, config, dtype, folder)
    print(f"{config.out}: {rows:,} rows of {cache.site}")
    return config.out


def _write(cache: ActivationCache, config: ExportConfig, dtype: np.dtype, folder: Path) -> None:
    """The Arrow files that `load_from_disk` expects, one per shard, and the two small files beside them."""
    import pyarrow
    from datasets import DatasetInfo, Features, Sequence, Value

    features = Features(
        {
            "activations": Sequence(Value(dtype.name), length=cache.d_in),
            "token_position": Value("int64"),
            "token_id": Value("int32"),
            "document": Value("int64"),
            "label": Value("string"),
            "split": Value("string"),
        }
    )
    shards = [(split, shard) for split in config.splits for shard in cache.shards(split)]
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    with progress("export", sum(shard.rows for _, shard in shards), "rows") as bar:
        for name, (split, shard) in zip(names, shards):
            with open(folder / name, "wb") as file, pyarrow.ipc.new_stream(file, features.arrow_schema) as writer:
                for batch in _batches(cache, shard, split, dtype, features.arrow_schema):
                    writer.write_batch(batch)
                    bar.advance(batch.num_rows)
    about = {"site": cache.site, "model": cache.model, **{key: cache.manifest[key] for key in ("dtype", "seed", "held_out")}}
    DatasetInfo(features=features, description=json.dumps(about)).write_to_directory(str(folder))
    content = json.dumps([cache.site, config.splits, cache.manifest["shards"]]).encode()
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.blake2b(content, digest_size=8).hexdigest(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))


def _batches(cache: ActivationCache, shard: Any, split: str, dtype: np.dtype, schema: "pyarrow.Schema") -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow

    acts_nd, positions_n = cache.read(shard)
    tokens = cache.tokens if cache.manifest["tokens"] else None
    for start in range(0, shard.rows, CHUNK_ROWS):
        chosen = slice(start, start + CHUNK_ROWS)
        values = acts_nd[chosen].to(getattr(torch, dtype.name)).numpy().reshape(-1)
        positions = positions_n[chosen].numpy()
        ids: Any = [None] * len(positions)
        documents: Any = ids
        labels: list[str | None] = ids
        if tokens is not None:
            ids = np.asarray(tokens.ids[positions])
            documents = np.asarray(tokens.sequence_document[tokens.sequence_of(positions)])
            labels = [tokens.label_names[label] if label >= 0 else None for label in tokens.document_label[documents]]
        columns = [
            pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), cache.d_in),
            *(pyarrow.array(column) for column in (positions, ids, documents, labels, [split] * len(positions))),
        ]
        yield pyarrow.RecordBatch.from_arrays([c.cast(field.type) for c, field in zip(columns, schema)], schema=schema)
