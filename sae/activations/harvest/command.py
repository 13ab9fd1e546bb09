"""Text through a language model into an activation cache: first all tokens, then pool after pool of shuffled activations."""

import json
import math
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from sae.activations.files.ledger import FORMAT_VERSION, Ledger, abandon, claim, describe_file, has_size, require_same
from sae.activations.files.manifest import read_manifest, verify
from sae.activations.files.number_formats import row_bytes
from sae.activations.harvest.massive import PoolRows, sentence, summary
from sae.activations.harvest.models import Models
from sae.activations.harvest.parts import Parts
from sae.activations.harvest.plan import REASONS, Pool, count_reasons, count_rows, padding, plan_pools
from sae.activations.harvest.pools import Recorded, Recorder
from sae.activations.harvest.settings import (
    RecordingConfig,
    check_recording,
    cut_text,
    facts,
    load_models,
    make_masks,
    make_recorder,
    require_tokens,
)
from sae.activations.text.documents import PASSAGE, text_files
from sae.activations.text.tokens import SPLITS, Tokens
from sae.disk.places import require_folder
from sae.disk.remote import Place, RemotePath
from sae.disk.writing import only_writer, require_free_space, write_json, write_tensors
from sae.errors import InputError
from sae.processes import Processes
from sae.progress import counted, progress


@dataclass(kw_only=True)
class HarvestConfig(RecordingConfig):
    """Where to put what is recorded."""

    out: Place
    """Folder or URL of the cache. Run again with the same settings, an interrupted harvest continues: computed rows are kept every ten
    seconds."""
    shard_tokens: int = 1 << 16
    """Rows per file at most."""
    dry_run: bool = False
    """Only print what would be done; text is read and tokenised, nothing is written."""
    verify: bool = False
    """Only read the cache at --out again and compare every file's checksum."""


def harvest(config: HarvestConfig) -> Place:
    """Makes the cache, or finishes one that was interrupted; returns its folder.

    Killed at any moment and started again, it ends with the same bytes as one that was not. Called in every process that torchrun
    started, they make one cache together, again with the same bytes; when one of them fails, so do the others, with SystemExit.
    Raises `InputError` for unusable options or text, a folder started with other settings or another model, activations that are not
    finite in the number format on disk, and a full disk.
    """
    processes = Processes.from_environment()
    with processes.together():
        if processes.leads:
            _lead(config, processes)
        else:
            _help(config, processes)
    return config.out


def _lead(config: HarvestConfig, processes: Processes) -> None:
    if config.verify:
        _verify(config)
        return processes.tell("work", None)
    check_recording(config)
    if not config.dry_run:
        require_folder(config.out)
    models = load_models(replace(config, device=device_of(config, processes)))
    if config.dry_run:
        _dry_run(config, models)
        return processes.tell("work", None)
    settings, is_new = _settings(config), not config.out.exists()
    with only_writer(config.out) as let_others_in:
        claim(config.out, settings=settings, **models.records())
        ledger = Ledger.of_place(config.out)
        ledger.take_over()
        if (config.out / "manifest.json").exists():
            ledger.clear()  # a kill may have come between the two last steps
            print(f"{config.out} is already complete", file=sys.stderr)
            return processes.tell("work", None)
        try:
            _write_tokens(config, models, ledger)
        except InputError:  # nothing is recorded yet, so the corrected command may have the folder
            abandon(config.out, ledger, is_new)
            raise
        work: dict[str, Any] = {"tokens": ledger.of("tokens"), "counts": ledger.of("counts")[0]}
        recorder, pools = _prepare(config, models, work)
        _say_held_out(config, pools, work["counts"]["documents"])
        work["left"] = _left(config, recorder, pools, ledger)
        let_others_in()
        processes.tell("work", work)
        _write_pools(config, processes, recorder, [pools[number] for number in work["left"]], ledger)
        ledger.take_over()
        Parts(config.out).clear()  # before the manifest: whoever reads a finished cache finds nothing else
        write_json(config.out / "manifest.json", _manifest(config, recorder, pools, ledger))
        ledger.clear()
    _report(config.out)
    processes.tell("complete", True)


def _help(config: HarvestConfig, processes: Processes) -> None:
    work = processes.hear("work")
    if work is None:
        return
    with only_writer(config.out, shared=True):
        models = load_models(replace(config, device=device_of(config, processes)))
        require_same(config.out, **models.records())
        recorder, pools = _prepare(config, models, work)
        _write_pools(config, processes, recorder, [pools[number] for number in work["left"]], Ledger.of_place(config.out, processes.rank))
    processes.hear("complete")


def device_of(config: RecordingConfig, processes: Processes) -> str:
    """The device of this process, see `Processes.device`. Raises `InputError` for several that would each spread a model over all GPUs."""
    if processes.local_world > 1 and config.device_map is not None:
        raise InputError(f"--device-map spreads a model over all GPUs, but {processes.local_world} processes run here; start one a machine")
    return processes.device(config.device)


def _verify(config: HarvestConfig) -> Place:
    defaults = HarvestConfig(out=config.out, verify=True)
    given = [f.name for f in fields(config) if getattr(config, f.name) != getattr(defaults, f.name)]
    if given:
        raise InputError(f"--verify needs --out alone, got --{given[0].replace('_', '-')} too; leave it out")
    damaged = verify(config.out)
    if damaged:
        raise InputError(
            f"{len(damaged)} damaged files in {config.out}: {', '.join(damaged)}; read the rest with skip_damaged, or harvest again"
        )
    print(f"{config.out}: every file is as it was written")
    return config.out


def _settings(config: HarvestConfig) -> dict[str, Any]:
    """The settings that decide the content of the cache. The device is not one of them: a harvest may continue on another."""
    settings = asdict(config)
    for name in ("out", "device", "device_map", "dry_run", "verify"):
        del settings[name]
    if not config.skip_special:  # caches begun before there was this option are the same
        del settings["skip_special"]
    settings["text_bytes"] = [path.stat().st_size for path in text_files(config)]
    return json.loads(json.dumps(settings))


def _write_tokens(config: HarvestConfig, models: Models, ledger: Ledger) -> None:
    """Stage 1. Interrupted, it starts over: tokenising is cheap beside the forward passes."""
    if ledger.of("counts") and all(has_size(config.out / entry["file"], entry["bytes"]) for entry in ledger.of("tokens")):
        return
    ledger.clear()
    Parts(config.out).clear()
    cutter, parts = cut_text(config, models)
    with progress("tokens", config.tokens, "tokens") as bar:
        for number, part in enumerate(parts):
            name = f"tokens/{number:05d}.safetensors"
            write_tensors(config.out / name, {key: torch.from_numpy(value) for key, value in part._asdict().items()})
            counts = {"tokens": len(part.ids), "sequences": len(part.sequence_split), "documents": len(part.document_label)}
            ledger.append({"kind": "tokens", "file": name, **describe_file(config.out / name), **counts})
            bar.advance(len(part.ids))
    require_tokens(config, cutter)
    totals = {name: getattr(cutter, name) for name in ("documents", "empty_documents", "sequences", "tokens")}
    ledger.append({"kind": "counts", "label_names": cutter.label_names, **totals})


def _prepare(config: HarvestConfig, models: Models, work: dict[str, Any]) -> tuple[Recorder, list[Pool]]:
    """Computed from the tokens on disk: the same in every process."""
    tokens = Tokens.read([config.out / entry["file"] for entry in work["tokens"]], work["counts"]["label_names"])
    return make_recorder(config, models, tokens), _plan(config, models, tokens)


def _plan(config: HarvestConfig, models: Models, tokens: Tokens) -> list[Pool]:
    pools = plan_pools(
        tokens,
        seed=config.seed,
        pool_tokens=config.pool_tokens,
        shard_tokens=config.shard_tokens,
        masks=make_masks(config, models),
    )
    if count_rows(pools)["train"] == 0:
        raise InputError("expected text to train on, but all of its tokens are left out; give more text, or leave out less")
    return pools


def _say_held_out(config: HarvestConfig, pools: list[Pool], documents: int) -> None:
    if count_rows(pools)["held_out"] == 0 and config.held_out > 0:
        print(
            f"too few documents to hold any out: {counted(documents, 'document')}, which are passages of about {PASSAGE:,} characters of a "
            ".txt file; the cache has training rows only, and evaluation needs others; give more text or a larger --held-out",
            file=sys.stderr,
        )


def _bytes(config: HarvestConfig, rows: int, models: Models) -> int:
    return rows * sum(row_bytes(config.dtype, models.width(site)) for site in config.sites)


def _dry_run(config: HarvestConfig, models: Models) -> Place:
    cutter, cut = cut_text(config, models)
    parts = list(cut)
    require_tokens(config, cutter)
    pools = _plan(config, models, Tokens.join(parts, cutter.label_names))
    _say_held_out(config, pools, cutter.documents)
    rows = count_rows(pools)
    size = _bytes(config, sum(rows.values()), models) + 4 * cutter.tokens
    memory = 2 * _bytes(config, max(pool.rows for pool in pools), models)
    shards = sum(len(pool.shard_names) for pool in pools) * len(config.sites)
    print(
        f"would write into {config.out}: {cutter.documents:,} documents, {cutter.sequences:,} sequences, {cutter.tokens:,} tokens; "
        f"{rows['train']:,} training and {rows['held_out']:,} held-out rows at {', '.join(config.sites)}; "
        f"{shards:,} shards, {size / 1e6:,.1f} MB; {memory / 1e6:,.1f} MB of memory for two pools"
    )
    return config.out


def _left(config: HarvestConfig, recorder: Recorder, pools: list[Pool], ledger: Ledger) -> list[int]:
    """Indices of the pools whose files are not all there; raises `InputError` if the disk has no room for them."""
    if isinstance(config.out, RemotePath):
        for site in config.sites:  # all sizes at once
            (config.out / site).names()
    done = {
        (entry["split"], entry["number"])
        for entry in ledger.of("pool")
        if all(s["files"].keys() == s["squared_norm"].keys() == set(config.sites) for s in entry["shards"])
        and entry["massive"]["squared_norm"].keys() == entry["massive"]["all_squared_norm"].keys() == set(config.sites)
        and all(has_size(_path(config, site, s["name"]), file["bytes"]) for s in entry["shards"] for site, file in s["files"].items())
    }
    left = [index for index, pool in enumerate(pools) if (pool.split, pool.number) not in done]
    rows = [pools[index].rows for index in left]
    needed = sum(rows) + max(rows, default=0)  # of a pool at work, parts lie there too
    require_free_space(config.out, _bytes(config, needed, recorder.models), "the harvest")
    return left


def _path(config: HarvestConfig, site: str, name: str) -> Place:
    return config.out / site / f"{name}.safetensors"


def _write_pools(config: HarvestConfig, processes: Processes, recorder: Recorder, left: list[Pool], ledger: Ledger) -> None:
    """Stage 2, the forward passes, shared by all processes; one pool is written while the next is recorded.

    The leader returns when all pools are written, and only it shows progress.
    """
    total = len(recorder.tokens.ids)
    lengths = recorder.tokens.sequence_starts[1:] - recorder.tokens.sequence_starts[:-1]
    parts = Parts(config.out)
    before = total - sum(int(lengths[pool.sequences].sum()) - parts.tokens(pool) for pool in left)

    def advance(tokens: int) -> None:
        done = processes.count(tokens)
        if bar:
            bar.advance(before + done - bar.done)

    def write(recorded: Recorded) -> None:
        ledger.append(recorder.write(recorded, partial(_path, config)))
        parts.remove(recorded.pool)

    showing = progress("harvest", total, "tokens", before) if processes.leads else nullcontext()
    with showing as bar, ThreadPoolExecutor(1) as background:
        writing: Future[None] | None = None
        for pool in processes.deal(left):
            recorded = recorder.begin(pool, advance, parts)
            if writing:
                writing.result()
            writing = background.submit(write, recorded)
        if writing:
            writing.result()
        for _ in processes.wait_for_all():
            advance(0)


def _manifest(config: HarvestConfig, recorder: Recorder, pools: list[Pool], ledger: Ledger) -> dict[str, Any]:
    """Equal for every harvest of the same settings: no times, no names of machines."""
    tokens, counts = recorder.tokens, ledger.of("counts")[0]
    entries = {(entry["split"], entry["number"]): entry for entry in ledger.of("pool")}
    shards = [shard for pool in pools for shard in entries[pool.split, pool.number]["shards"]]
    train = [shard for shard in shards if shard["split"] == "train"]
    n_train = sum(shard["rows"] for shard in train)
    rows = {split: sum(shard["rows"] for shard in shards if shard["split"] == split) for split in SPLITS}
    sites = {
        site: {"d_in": d, "mean_squared_norm": math.fsum(shard["squared_norm"][site] for shard in train) / n_train}
        for site, d in recorder.widths.items()
    }
    found = summary(config.max_norm_ratio, [PoolRows(**entries[pool.split, pool.number]["massive"]) for pool in pools])
    left_out = {
        **dict(zip(REASONS, count_reasons(tokens, recorder.masks).sum(0)[1:].tolist())),
        "norm_outliers": sum(found["rows"].values()) if found["left_out"] else 0,
        "padding": padding(pools, tokens, config.batch_tokens),
    }
    return {
        "format_version": FORMAT_VERSION,
        **facts(config, recorder.models),
        "dtype": config.dtype,
        "seed": config.seed,
        "held_out": config.held_out,
        "sites": sites,
        "massive": found,
        "counts": {
            **{name: counts[name] for name in ("documents", "empty_documents", "sequences", "tokens")},
            "rows": rows,
            "left_out": left_out,
        },
        "labels": counts["label_names"],
        "shards": shards,
        "tokens": [{key: value for key, value in entry.items() if key != "kind"} for entry in ledger.of("tokens")],
        "complete": True,
    }


def _report(folder: Place) -> None:
    manifest = read_manifest(folder)
    rows = manifest["counts"]["rows"]
    size = sum(file["bytes"] for shard in manifest["shards"] for file in shard["files"].values())
    norms = ", ".join(f"{site} {value['mean_squared_norm']:.4g}" for site, value in manifest["sites"].items())
    print(f"{folder}: {rows['train']:,} training and {rows['held_out']:,} held-out rows, {size / 1e6:,.1f} MB; mean squared norm {norms}")
    if said := sentence(manifest["massive"]):
        print(said)
