"""The feature index measured: building it against encoding alone, reading one feature of a million, its page at the server, its export.

build: the whole build beside the encoder alone on the same tokens (the build's own loop over chunks, with its reused memory, and nothing
    done with the result), each in its own process, in interleaved rounds; the time is that of the work, without imports.
read: a synthetic index of `--features` features, some of them dense; a read is all that a feature's page needs. Cold: before every read
    the index is closed and all its files are put out of the page cache. Warm: read once before.
page: the time of a request for a random feature's page to browse_features.py without a model, one client on one connection.
export: the folder that opens from file://, all features, in as many processes as there are cores.

Medians and ranges are over rounds, ratios are taken within a round.
"""

import gc
import http.client
import json
import multiprocessing
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from disk import forget
from objective import machine, spread
from rounds import OFFLINE, ROOT

from sae.activations.cache import ActivationCache
from sae.command_line import run
from sae.dictionaries.dictionary import Dictionary
from sae.disk.arrays import create, write_arrays
from sae.disk.reading import NUMPY_DTYPES, read_json
from sae.disk.writing import write_json
from sae.entries import Buffers
from sae.errors import InputError
from sae.features.exports.command import ExportConfig, export_features
from sae.features.index import examples
from sae.features.index.build import IndexConfig, build_index, choose_tokens
from sae.features.index.contribution import MAX_ROWS
from sae.features.index.opening import FORMAT_VERSION, SCHEMAS, details_layout
from sae.features.index.reader import FeatureIndex
from sae.features.index.spooling import CHUNK_BYTES, chunks, shards_of
from sae.model.language_model import LanguageModel

Part = Literal["build", "read", "page", "export"]


@dataclass(kw_only=True)
class BenchmarkConfig:
    parts: tuple[Part, ...] = ("build", "read", "page", "export")
    """What to measure; the numbers of the others stay in the file."""
    cache: Path = Path("runs/demo/cache")
    """Activation cache; the part read needs none."""
    dictionary: Path = Path("checkpoints/demo-sae")
    """Dictionary; the part read needs none."""
    tokens: int = 500_000
    """Tokens to encode and to index."""
    rounds: int = 5
    """Interleaved rounds."""
    threads: int | None = None
    """Threads of torch. Default: one per core."""
    features: int = 1_000_000
    """Features of the synthetic index."""
    mean_count: int = 48
    """Mean number of activations of its features, log-normally distributed."""
    dense: int = 40
    """Further features that fire on --dense-count tokens."""
    dense_count: int = 400_000
    """Activations of each of those."""
    corpus: int = 20_000_000
    """Tokens of the synthetic index."""
    reads: int = 100
    """Reads of each kind, and pages, in each round."""
    work: Path = Path("runs")
    """Folder for temporary indexes; the disk that holds it is the one measured."""
    out: Path = Path("benchmarks/results/features.json")
    """File for the numbers."""
    device: Literal["cpu"] = "cpu"
    """Device; only the CPU is measured."""


def benchmark(config: BenchmarkConfig) -> None:
    if min(config.tokens, config.rounds, config.features, config.mean_count, config.reads, config.corpus) < 1:
        raise InputError("expected sizes and rounds of at least 1, got a smaller one; give larger ones")
    if config.threads:
        torch.set_num_threads(config.threads)
    record: dict[str, Any] = read_json(config.out, "numbers of this benchmark") if config.out.exists() else {}
    config.work.mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        about = machine(config, torch.get_num_threads())  # type: ignore[arg-type]  # only asks for the device
        with tempfile.TemporaryDirectory(dir=config.work) as folder:
            measure = {"build": measure_build, "read": measure_read, "page": measure_page, "export": measure_export}[part]
            found = measure(config, Path(folder).resolve())
        record[part] = {"date": date.today().isoformat(), "machine": about, **found}
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.out, record)
        print(json.dumps(record[part], indent=1), flush=True)


def measure_build(config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of both arms; the build's index is removed after each round."""
    context = multiprocessing.get_context("spawn")
    arms: dict[str, list[dict[str, float]]] = {"encode": [], "build": []}
    for number in range(config.rounds):
        for arm in list(arms)[:: 1 if number % 2 else -1]:
            ours, theirs = context.Pipe()
            process = context.Process(target=arm_in_process, args=(arm, config, folder / "index", torch.get_num_threads(), theirs))
            process.start()
            theirs.close()
            try:
                arms[arm].append(ours.recv())
            except EOFError:
                raise InputError(f"the process that measured {arm} died; its message is above") from None
            finally:
                process.join()
            shutil.rmtree(folder / "index", ignore_errors=True)
    ratios = [build["seconds"] / alone["seconds"] for build, alone in zip(arms["build"], arms["encode"])]
    return {
        "tokens": config.tokens,
        "times_encode": spread(ratios),
        **{
            arm: {"seconds": spread([r["seconds"] for r in rows]), "peak_mib": spread([r["peak_mib"] for r in rows])}
            for arm, rows in arms.items()
        },
    }


def arm_in_process(arm: str, config: BenchmarkConfig, out: Path, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    index = index_config(config, out)
    LanguageModel.load(ActivationCache.open(config.cache).model_name(), device="cpu")  # what it imports is no part of the time

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    {"encode": encode_alone, "build": build_index}[arm](index)
    seconds = time.perf_counter() - start
    pipe.send({"seconds": seconds, "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024})


@torch.no_grad()
def encode_alone(config: IndexConfig) -> None:
    dictionary = Dictionary.load(config.dictionary)
    cache = ActivationCache.open(config.cache, dictionary.site)
    buffers = Buffers()
    size = min(MAX_ROWS, max(1, CHUNK_BYTES // (dictionary.d_sae * 4)))
    wanted = choose_tokens(cache.tokens, cache, config)
    for shard in shards_of([cache], config.splits):
        for (x_bd,), _ in chunks([cache], shard, wanted, size):
            dictionary.encode(x_bd, buffers)


def measure_read(config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    dense = write_index(folder, config, rng)
    files = sorted(folder.iterdir())
    found: dict[str, Any] = {
        "features": config.features, "tokens": config.corpus, "gigabytes": sum(path.stat().st_size for path in files) / 1e9
    }  # fmt: skip
    kinds = {"any": rng.integers(0, config.features, config.reads).tolist(), "dense": rng.choice(dense, config.reads).tolist()}
    for kind, features in kinds.items():
        cold = []
        for j in features:
            gc.collect()  # closes the maps of the index before: mapped pages stay in memory
            forget(files)
            index = FeatureIndex.open(folder)
            cold.append(1000 * read_page(index, j))
            del index
        index = FeatureIndex.open(folder)
        for j in features:
            read_page(index, j)
        warm = [1000 * read_page(index, j) for j in features]
        del index
        for state, times in (("cold", cold), ("warm", warm)):
            found[f"{kind}_{state}_ms"] = {
                "p50": float(np.percentile(times, 50)),
                "p95": float(np.percentile(times, 95)),
                "max": max(times),
            }
    return found


def read_page(index: FeatureIndex, j: int) -> float:
    """Seconds in which all that a feature's page shows is read."""
    start = time.perf_counter()
    index.prefetch(j)
    index.feature(j)
    for read in (index.top_contexts, index.random_contexts, index.bucket_contexts, index.histogram, index.top_tokens, index.lens_histogram):
        read(j)
    index.lens_tokens(j)
    index.lens_tokens(j, bottom=True)
    index.cosine_neighbours(j)
    index.coactive(j)
    return time.perf_counter() - start


def measure_page(config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    build_index(index_config(config, folder / "index"))
    drawn = np.random.default_rng(0)
    d_sae = FeatureIndex.open(folder / "index").d_sae
    command = [sys.executable, str(ROOT / "scripts" / "browse_features.py"), "--index", str(folder / "index")]
    command += ["--model", "none", "--no-open", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=OFFLINE) as server:
        assert server.stdout is not None
        try:
            port = int(next(found[1] for line in server.stdout if (found := re.search(r"127\.0\.0\.1:(\d+)", line))))
            connection = http.client.HTTPConnection("127.0.0.1", port)
            rounds, sizes = [], []
            for _ in range(config.rounds):
                times = []
                for j in drawn.integers(d_sae, size=config.reads):
                    start = time.perf_counter()
                    connection.request("GET", f"/f/{j}")
                    sizes.append(len(connection.getresponse().read()))
                    times.append(1000 * (time.perf_counter() - start))
                rounds.append(times)
        finally:
            server.terminate()
    percentiles = {f"p{p}_ms": spread([float(np.percentile(times, p)) for times in rounds]) for p in (50, 95)}
    return {
        "features": d_sae,
        "requests": len(sizes),
        **percentiles,
        "mean_kb": float(np.mean(sizes)) / 1e3,
        "largest_kb": max(sizes) / 1e3,
    }


def measure_export(config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    build_index(index_config(config, folder / "index"))
    d_sae, seconds = FeatureIndex.open(folder / "index").d_sae, []
    for _ in range(config.rounds):
        start = time.perf_counter()
        export_features(ExportConfig(index=folder / "index", out=folder / "export"))
        seconds.append((time.perf_counter() - start) * 10_000 / d_sae)
    size = sum(path.stat().st_size for path in (folder / "export").rglob("*"))
    return {"features": d_sae, "seconds_per_10000": spread(seconds), "megabytes_per_10000": size / 1e6 * 10_000 / d_sae}


def index_config(config: BenchmarkConfig, out: Path) -> IndexConfig:
    return IndexConfig(cache=config.cache, dictionary=config.dictionary, out=out, tokens=config.tokens, device="cpu")


def write_index(folder: Path, config: BenchmarkConfig, rng: np.random.Generator) -> np.ndarray:
    """An index of random numbers, every page of it really on the disk; returns its dense features."""
    f, n, vocabulary = config.features, config.corpus, 50_000
    counts = np.minimum(rng.lognormal(np.log(config.mean_count) - 0.5, 1, f).astype(np.int64), n)
    dense = rng.choice(f, min(config.dense, f), replace=False)
    counts[dense] = min(config.dense_count, n)
    offsets = np.r_[0, np.cumsum(counts)]
    total = int(offsets[-1])
    records = create(
        folder / "records.safetensors", {"offsets": ("I64", (f + 1,)), "positions": ("U32", (total,)), "values": ("F16", (total,))}
    )
    details = create(folder / "details.safetensors", details_layout(f))
    records["offsets"][:] = offsets
    for low in range(0, f, 1 << 14):
        high = min(f, low + (1 << 14))
        part, count = slice(offsets[low], offsets[high]), counts[low:high]
        step = np.repeat(n // np.maximum(count, 1), count)
        place = np.arange(len(step)) - np.repeat(offsets[low:high] - offsets[low], count)
        records["positions"][part] = place * step + (rng.random(len(step)) * step).astype(np.int64)
        records["values"][part] = rng.exponential(2, len(step)) + 1e-3
        for name, array in details.items():
            limit = {"token_ids": vocabulary, "coactive_ids": f, "neighbour_ids": f}.get(name, 1000)
            rows = array[low:high]
            if name.endswith("entries"):  # far apart within the feature
                limit_b = count.reshape(-1, *[1] * (rows.ndim - 1))
                rows[:] = np.where(limit_b > 0, rng.random(rows.shape) * limit_b, int(examples.NONE))
            else:
                rows[:] = rng.integers(0, limit, rows.shape)
    columns = {name: rng.random(f).astype(NUMPY_DTYPES[dtype]) for name, (dtype, _) in SCHEMAS["columns"].items()}
    for side in ("top", "bottom"):
        columns[f"{side}_token_values"] = np.sort(rng.random((f, 20), np.float32))
        columns[f"{side}_token_ids"] = rng.integers(0, vocabulary, (f, 20), np.int32)
    write_arrays(folder / "columns.safetensors", columns | {"count": counts})
    write_arrays(folder / "token_features.safetensors", examples.by_top_token(np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)))
    sequences = n // 128
    tokens = {
        "ids": rng.integers(0, vocabulary, n).astype(np.int32),
        "sequence_starts": np.r_[np.arange(sequences) * 128, n],
        "sequence_document": np.arange(sequences) // 4,
        "document_label": np.zeros(sequences // 4 + 1, np.int32),
        "sequence_split": np.zeros(sequences, np.uint8),
        "scanned": np.ones(n, bool),
        "piece_bytes": np.full(4 * vocabulary, ord("a"), np.uint8),
        "piece_lengths": np.full(vocabulary, 4, np.int32),
        "piece_special": np.zeros(vocabulary, bool),
    }
    write_arrays(folder / "tokens.safetensors", tokens)
    info = {
        "format_version": FORMAT_VERSION,
        "dictionary": "none",
        "dictionary_crc32": "00000000",
        "cache": "none",
        "model": {"name": None, "revision": None, "fingerprint": None},
        "site": "resid_post.0",
        "d_in": 1,
        "d_sae": f,
        "splits": ["train"],
        "activations": total,
        "activations_cut_to_65504": 0,
        "label_names": ["text"],
        "logit_lens": "random numbers",
        "tokens_scanned": n,
        "fvu": None,
    }
    write_json(folder / "index.json", info)
    return dense


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    run(benchmark, BenchmarkConfig, __doc__ or "")
