"""The activation cache measured: harvesting against forward passes, reading and writing against `dd`, shuffling against a perfect shuffle.

harvest: whole harvests beside the bare forward pass stopped at the deepest site on the very same batches, Hugging Face's own forward pass
    with all hidden states, and SAELens' cache runner in the environment that `make bench-peers` creates; the model is loaded beforehand.
disk: a cache with random numbers is written pool by pool, fsync included, beside `dd conv=fdatasync` of the same files; then an epoch of
    training batches is read from it beside `dd`, both with the files out of the page cache, and again with them in it.
shuffle: documents in a batch and pairs of its rows from one document, beside a perfect shuffle, for several pool sizes and widths.

Arms run in processes of their own, one at a time, in interleaved rounds, so that a slow spell of the machine hits all alike. Medians and
ranges are over rounds, those of ratios over ratios within a round.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from activation_arms import LABELS, PEERS
from activation_report import markdown, report
from disk import dd, forget, repeated_tokens, write_cache
from objective import machine, spread
from rounds import OFFLINE, PEERS_PYTHON, ArmFailed, started

from sae.activations.cache import ActivationCache
from sae.activations.cached import BUFFER_BYTES
from sae.activations.files.number_formats import row_bytes
from sae.activations.harvest.command import HarvestConfig
from sae.activations.shuffle import shuffle_quality
from sae.activations.text.documents import TextConfig, documents
from sae.activations.text.tokens import tokenise
from sae.command_line import run
from sae.disk.reading import read_json
from sae.disk.writing import write_json, write_tensors
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sites import parse_site

Part = Literal["harvest", "disk", "shuffle"]


@dataclass
class BenchmarkConfig:
    parts: tuple[Part, ...] = ("harvest", "disk", "shuffle")
    """What to measure; the numbers of the others stay in the file."""
    model: str = "checkpoints/demo-lm"
    """Language model, by folder or hub name."""
    text: tuple[str, ...] = ("checkpoints/demo-lm/tokens.safetensors",)
    """Text that the model reads."""
    sites: tuple[str, ...] = ("resid_post.2",)
    """Sites to harvest."""
    tokens: int = 1 << 20
    """Tokens in a round of harvest."""
    pool_tokens: int = HarvestConfig.pool_tokens
    """Tokens in a pool, in the harvest and in the cache that is read."""
    rivals: tuple[Literal["full", "saelens"], ...] = ("full", "saelens")
    """What to time beside the bare forward pass and the harvest."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the harvest."""
    cache_tokens: int = 2_000_000
    """Tokens in the cache that is written, read and looked at for its shuffle."""
    width: int = 512
    """Width of that cache."""
    batch_size: int = 4096
    """Rows of a training batch."""
    shuffle_pools: tuple[int, ...] = (1 << 16, 1 << 18)
    """Pool sizes to compare."""
    shuffle_widths: tuple[int, ...] = (512, 4096)
    """Widths to compare: rows are wider, so the reader's buffer has fewer."""
    rounds: int = 5
    """Interleaved rounds; those of the harvest follow one that is not counted."""
    threads: int | None = None
    """Threads of each arm. Default: one per core."""
    work: Path = Path("runs")
    """Folder for temporary caches; the disk that holds it is the one measured."""
    out: Path = Path("benchmarks/results/activations.json")
    """File for the numbers."""
    markdown: bool = False
    """Also print the numbers as markdown tables."""

    def check(self) -> None:
        """Raises `InputError` for flags that cannot be used."""
        numbers = (self.tokens, self.pool_tokens, self.cache_tokens, self.width, self.batch_size, self.rounds, self.threads or 1)
        if min(numbers + self.shuffle_pools + self.shuffle_widths) < 1:
            raise InputError("expected sizes, rounds and threads of at least 1, got a smaller one; give larger ones")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError(f"expected a CUDA GPU for --device cuda, but torch {torch.__version__} finds none; take --device cpu")


def benchmark(config: BenchmarkConfig) -> None:
    config.check()
    record: dict[str, Any] = read_json(config.out, "numbers of this benchmark") if config.out.exists() else {}
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items() if name != "parts"}
    config.work.mkdir(parents=True, exist_ok=True)
    for part, measure in {"harvest": measure_harvest, "disk": measure_disk, "shuffle": measure_shuffle}.items():
        if part in config.parts:
            about = machine(config, config.threads or torch.get_num_threads())  # type: ignore[arg-type]  # only asks for the device
            with tempfile.TemporaryDirectory(dir=config.work) as folder:
                found = measure(config, Path(folder).resolve())
            record[part] = {"date": date.today().isoformat(), "machine": about, "flags": flags, **found}
            write_json(config.out, record)
            print(report(part, record[part]), flush=True)
    print(f"written to {config.out}")
    if config.markdown:
        print(markdown(record))


def measure_harvest(config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    settings, left_out = harvest_settings(config, folder)
    arms = ["bare", "harvest", *(arm for arm in config.rivals if arm not in left_out)]
    answers: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with ExitStack() as stack:
        workers = {}
        for arm in arms:
            print(f"starting {LABELS[arm]}", flush=True)
            with leaving_out(arm, left_out):
                process = started("activation_arms.py", {"arm": arm, **settings}, OFFLINE, peers=arm in PEERS)
                workers[arm] = stack.enter_context(process)
                workers[arm].answer()
        for number in range(config.rounds + 1):
            for arm in [arm for arm in arms if arm not in left_out]:
                with leaving_out(arm, left_out):
                    answers[arm].append(workers[arm].ask("round"))
                    print(f"round {number}: {arm} {answers[arm][-1]['seconds']:.2f} s", flush=True)
    rates = {arm: [a["tokens"] / a["seconds"] for a in found[1:]] for arm, found in answers.items() if arm not in left_out}
    cache = answers["harvest"][0]
    return {
        "arms": {
            arm: {
                "label": LABELS[arm],
                "tokens": answers[arm][0]["tokens"],
                "tokens_per_second": spread(own),
                "times_bare": spread([mine / bare for mine, bare in zip(own, rates["bare"])]),
                **({"bytes_per_token": answers[arm][0]["bytes"] / answers[arm][0]["tokens"]} if "bytes" in answers[arm][0] else {}),
            }
            for arm, own in rates.items()
        },
        "left_out": left_out,
        "padding_share": cache["padding"] / (cache["tokens"] + cache["padding"]),
        "bytes_per_row": cache["bytes"] / cache["rows"],
    }


def harvest_settings(config: BenchmarkConfig, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that the arms get; and the rivals that cannot run, with the reason."""
    names = ("model", "text", "sites", "tokens", "pool_tokens", "device")
    settings: dict[str, Any] = {"harvest": {name: getattr(config, name) for name in names}, "folder": str(folder)}
    settings["threads"] = config.threads or torch.get_num_threads()
    if "saelens" not in config.rivals:
        return settings, {}
    if not PEERS_PYTHON.exists():
        return settings, {"saelens": "there is no .peers environment (make bench-peers creates it)"}
    lm = LanguageModel.load(config.model)
    site = parse_site(config.sites[0])
    if len(config.sites) > 1 or site.kind != "resid_post":
        return settings, {"saelens": f"its runner records one module's output, and the sites are {' '.join(config.sites)}"}
    rows_sp = packed(config, lm)
    batch_rows = max(1, HarvestConfig.batch_tokens // rows_sp.shape[1])
    rows_sp = rows_sp[: len(rows_sp) // batch_rows * batch_rows]
    if len(rows_sp) == 0:
        return settings, {"saelens": "its batches are of whole contexts only, and there is not text enough for one"}
    write_tensors(folder / "packed.safetensors", {"tokens": rows_sp})
    batches = len(rows_sp) // batch_rows
    at_most = min(batches, max(1, config.pool_tokens // (batch_rows * rows_sp.shape[1])))
    pool = max(n for n in range(1, at_most + 1) if batches % n == 0)  # its pools are all of one size: else it begins the text again
    settings |= {"packed": str(folder / "packed.safetensors"), "batch_rows": batch_rows, "pool_rows": pool * batch_rows}
    block = lm.blocks[site.layer]
    settings |= {"hook": next(name for name, module in lm.model.named_modules() if module is block), "d_in": lm.d_model}
    return settings, {}


def packed(config: BenchmarkConfig, lm: LanguageModel) -> torch.Tensor:
    """The text end to end in rows of the context, as SAELens packs it: [s, p], with a beginning of text before every row and document."""
    bos = [] if lm.bos_id is None else [lm.bos_id]
    stream, size = [], 0
    for ids in token_ids(config, lm):
        stream += [np.asarray(bos, dtype=np.int32), ids]
        size += len(bos) + len(ids)
        if size >= config.tokens:
            break
    width = min(lm.context, 1024) - len(bos)
    ids_n = torch.from_numpy(np.concatenate(stream)[: config.tokens]).long()
    rows_sp = ids_n[: len(ids_n) // width * width].view(-1, width)
    return torch.nn.functional.pad(rows_sp, (len(bos), 0), value=lm.bos_id or 0).contiguous()


def token_ids(config: BenchmarkConfig, lm: LanguageModel) -> Iterator[np.ndarray]:
    found = documents(TextConfig(text=config.text))
    for ids, _ in tokenise(found, lm.tokenizer, lm.model.get_input_embeddings().weight.shape[0], lm.bos_id):
        yield ids


def measure_disk(config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    lm = LanguageModel.load(config.model)
    tokens = synthetic_tokens(config, lm)
    sizes = {"pool_tokens": config.pool_tokens, "shard_tokens": HarvestConfig.shard_tokens}
    ours, theirs, shards, copy = [], [], [], folder / "copy"
    print(f"writing {len(tokens.ids):,} tokens of width {config.width}", flush=True)
    for written in write_cache(folder / "cache", tokens, config.width, bos_id=lm.bos_id, **sizes):
        ours.append(written.bytes / written.seconds)
        theirs.append(written.bytes / sum(dd(path, str(copy), "conv=fdatasync") for path in written.paths))
        shards += written.paths
        copy.unlink()
    cache = ActivationCache.open(folder / "cache")
    rows, row_size = cache.rows("train") // config.batch_size * config.batch_size, config.width * cache.dtype.itemsize
    if rows == 0:
        raise InputError(f"expected at least one batch of rows, but the cache has {cache.rows('train'):,}; give more --cache-tokens")
    size = sum(path.stat().st_size for path in shards)
    rates: dict[str, list[float]] = {"cold": [], "cold_dd": [], "warm": [], "warm_dd": []}
    settings = {"cache": str(folder / "cache"), "batch_size": config.batch_size, "threads": config.threads or torch.get_num_threads()}
    peak = 0
    for number in range(config.rounds):
        for mine in (True, False) if number % 2 else (False, True):  # a disk with bursts favours the first
            seconds, peak = read_seconds(settings, shards) if mine else (dd_seconds(shards), peak)
            for state, taken in zip(("cold", "warm"), seconds):
                rates[state if mine else f"{state}_dd"].append((rows * row_size if mine else size) / taken)
        print(f"round {number + 1}: " + ", ".join(f"{state} {found[-1] / 1e6:,.0f} MB/s" for state, found in rates.items()), flush=True)
    return {
        "bytes": size,
        "write": versus(ours, theirs),
        "cold": versus(rates["cold"], rates["cold_dd"]),
        "warm": versus(rates["warm"], rates["warm_dd"]),
        "reader_peak_mib": peak / 2**20,
        "buffers_mib": 2 * min(BUFFER_BYTES, rows * row_size) / 2**20,
    }


def read_seconds(settings: dict[str, Any], shards: list[Path]) -> tuple[list[float], int]:
    """Of an epoch out of the page cache and of one in it, and the bytes the reader's process grew by."""
    with started("activation_arms.py", {"arm": "read", **settings}, OFFLINE, peers=False) as reader:
        reader.answer()
        forget(shards)
        cold, warm = reader.ask("round"), reader.ask("round")
    return [cold["seconds"], warm["seconds"]], warm["peak"]


def dd_seconds(shards: list[Path]) -> list[float]:
    """The same of `dd`."""
    forget(shards)
    return [sum(dd(path, "/dev/null") for path in shards) for _ in range(2)]


def versus(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Bytes a second, of us and of dd."""
    ratio = spread([mine / other for mine, other in zip(ours, theirs)])
    return {"mb_per_second": spread([v / 1e6 for v in ours]), "dd_mb_per_second": spread([v / 1e6 for v in theirs]), "ratio": ratio}


def measure_shuffle(config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    """Of caches with the plan and the shards of each pool size, read with the buffer of each width; they hold one number a row."""
    lm = LanguageModel.load(config.model)
    tokens = synthetic_tokens(config, lm)
    cases = []
    for pool_tokens in config.shuffle_pools:
        out = folder / str(pool_tokens)
        sizes = {"pool_tokens": pool_tokens, "shard_tokens": HarvestConfig.shard_tokens}
        for _ in write_cache(out, tokens, 1, bos_id=lm.bos_id, **sizes):
            pass
        cache = ActivationCache.open(out)
        for width in config.shuffle_widths:
            quality = shuffle_quality(cache, config.batch_size, buffer_rows=BUFFER_BYTES // (2 * width))
            cases.append(
                {
                    "pool_tokens": pool_tokens,
                    "pool_mib": pool_tokens * row_bytes("float16", width) / 2**20,
                    "width": width,
                    "buffer_rows": BUFFER_BYTES // (2 * width),
                    "documents": quality.measured.documents,
                    "documents_perfect": quality.perfect.documents,
                    "documents_ratio": quality.ratio.documents,
                    "pairs": quality.measured.pairs,
                    "pairs_perfect": quality.perfect.pairs,
                    "pairs_ratio": quality.ratio.pairs,
                }
            )
    return {"tokens": len(tokens.ids), "documents": len(tokens.document_label), "batch_size": quality.batch_size, "cases": cases}


def synthetic_tokens(config: BenchmarkConfig, lm: LanguageModel) -> Any:
    return repeated_tokens(list(token_ids(config, lm)), config.cache_tokens, context=min(lm.context, 1024), bos_id=lm.bos_id)


@contextmanager
def leaving_out(arm: str, left_out: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except ArmFailed as reason:
        if arm in ("bare", "harvest"):
            raise InputError(f"{LABELS[arm]} failed, so the others have nothing to be compared with: {reason}") from None
        print(f"{LABELS[arm]} is left out: {reason}", flush=True)
        left_out[arm] = str(reason)


if __name__ == "__main__":
    run(benchmark, BenchmarkConfig, __doc__ or "")
