"""The training loop: batches from a cache, exact gradients, Adam, metrics, checkpoints; one dictionary or a sweep of them.

b rows (tokens) · d model width · f features
"""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.activations.source import Source
from sae.device import device_named
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import Threshold
from sae.dictionaries.source import sampled_crc32
from sae.disk.places import require_folder
from sae.disk.reading import read_json
from sae.disk.writing import only_writer, remove_leftovers, write_json
from sae.errors import InputError
from sae.kinds import BatchTopK, name_of
from sae.kinds.batchtopk import threshold_for
from sae.objective import Step, Workspace, bad_rows_text
from sae.progress import progress
from sae.training.checkpoint import Checkpoint, Record
from sae.training.config import RunConfig, TrainingConfig
from sae.training.ends import Ends
from sae.training.metrics import MetricsLog, start_wandb, write_lines
from sae.training.start import ROWS, change_since, opened, said, starting_point
from sae.training.sweep import Sweep


def train(config: TrainingConfig) -> list[Path]:
    """Trains one dictionary for each value of the kind's swept option on the cache's train split and gives their folders.

    A folder that holds an unfinished run with the same settings is resumed, bit for bit as if never interrupted. Raises `InputError`
    for settings or a cache that cannot be used, and when the activations or the loss are not finite or the loss runs away; the last
    checkpoint then still stands.
    """
    config.check()
    if not config.dry_run:
        require_folder(config.out)
    source = CachedSource(*(ActivationCache.open(config.cache, site, verify=config.verify) for site in config.sites or (None,)))
    return train_on(source, config, config.settings())


def train_on(source: Source, config: RunConfig, settings: dict[str, Any]) -> list[Path]:
    """`train` on rows from anywhere. `settings` decide the result: a run in the folder is resumed only if it has the same ones."""
    ends = Ends.of(source, config)
    device = device_named(config.device)
    if config.init is not None:
        settings = settings | {"init_crc32": sampled_crc32(opened(config.init, source, ends, config).parts())}
    drawn, count = config.steps * config.batch_size, len(config.kind.values)
    print(
        f"{count} dictionar{'y' if count == 1 else 'ies'} of {config.d_sae:,} features for {ends}: "
        f"{config.steps:,} steps of {config.batch_size:,} = {drawn / source.rows:.1f} times the {source.rows:,} training rows, on {device}"
    )
    if not config.dry_run:
        with only_writer(config.out):
            train_into(config.folders(), source, ends, config, settings, device)
    return config.folders()


def train_into(folders: list[Path], source: Source, ends: Ends, config: RunConfig, settings: dict[str, Any], device: torch.device) -> None:
    """Begins or resumes the run in the folder, and finishes it."""
    checkpoint = Checkpoint(config.out, settings)
    if config.restart:
        checkpoint.remove()
        for folder in folders:
            (folder / "training.json").unlink(missing_ok=True)
    if all((folder / "training.json").exists() for folder in folders):
        checkpoint.refuse_other(read_json(folders[0] / "training.json", "a run's training.json", Record)["settings"])
        remove_leftovers(config.out)
        checkpoint.remove()  # a kill may have come between the two last steps
        print(f"{config.out} is already complete; --restart trains it again")
        return

    remove_leftovers(config.out)
    scales = ends.scales(source)
    sweep = initial_sweep(source, ends, scales, config, device)
    first = checkpoint.restore(sweep)
    if first:
        print(f"resuming after step {first:,}")
    batches = source.batches(config.batch_size, seed=config.seed, device=device)
    batches.seek(first)
    wandb_run = start_wandb(config.wandb, config.wandb_project, config.out, settings)
    names = ["" if len(folders) == 1 else folder.name for folder in folders]
    logs = [MetricsLog(folder, name, config.batch_size, first, wandb_run) for folder, name in zip(folders, names)]
    try:
        pairs = (ends.pair(batch, scales) for batch in batches)
        last = loop(sweep, pairs, logs, checkpoint, first, config.log_every, config.checkpoint_every)
    finally:
        for log in logs:
            log.close()
        if wandb_run is not None:
            wandb_run.finish()
    for k, folder in enumerate(folders):
        finish(folder, k, sweep, source, ends, scales, config, settings, last[k])
    checkpoint.remove()


def finish(
    folder: Path,
    k: int,
    sweep: Sweep,
    source: Source,
    ends: Ends,
    scales: dict[str, float],
    config: RunConfig,
    settings: dict[str, Any],
    last: dict[str, Any],
) -> None:
    """Saves a dictionary and how it was trained; training.json, written last, marks it complete."""
    dictionary, value = sweep.dictionary(k), sweep.values[k]
    record: dict[str, Any] = {
        "settings": json.loads(json.dumps(settings)),
        "scale": scales[ends.reads[0]] if len(scales) == 1 else scales,
        "last": {name: number for name, number in last.items() if name != "tokens_per_second"},
    }
    if isinstance(sweep.kind, BatchTopK):
        record["threshold"] = settle(dictionary, source, ends, scales, value)
    metadata = provenance(source.manifest, ends) | {"training_tokens": config.steps * config.batch_size}
    metadata |= {"trained": {"kind": name_of(sweep.kind), sweep.kind.swept: value}}
    dictionary.metadata = metadata
    saved = dictionary.folded(*ends.factors(scales))
    if config.init is not None:
        record["since_init"] = change_since(opened(config.init, source, ends, config).to(sweep.weights.b_enc_f.device), saved, source, ends)
        print(f"{folder}: {said(record['since_init'])}")
    saved.save(folder)
    write_json(folder / "training.json", record)


def settle(dictionary: Dictionary, source: Source, ends: Ends, scales: dict[str, float], k: int) -> dict[str, Any]:
    """Gives a BatchTopK's dictionary the threshold that keeps k of a row on rows that were held out; what is recorded of it.

    Where a source has none, training rows stand in. Thresholds are in training units.
    """
    held_out, rows = source.rows_for_measuring(ends.sites)
    gate = dictionary.gate
    assert isinstance(gate, Threshold)
    assert gate.theta_f is not None
    device = gate.theta_f.device
    chunks = [ends.pair({site: part.to(device) for site, part in chunk.items()}, scales)[0] for chunk in in_chunks(rows)]
    running = float(gate.theta_f[0])
    active = sum(int((dictionary.encode(x_bd) > 0).sum()) for x_bd in chunks)
    threshold, count = threshold_for(dictionary, chunks, k)
    gate.theta_f.data.fill_(threshold)
    print(f"threshold {threshold:.4g} keeps {k} of a row on {count:,} {'held-out' if held_out else 'training'} rows; "
          f"the running mean {running:.4g} would keep {active / count:.1f}")  # fmt: skip
    return {"running": running, "exact": threshold, "rows": count, "held_out": held_out, "l0_of_running": active / count}


def initial_sweep(source: Source, ends: Ends, scales: dict[str, float], config: RunConfig, device: torch.device) -> Sweep:
    dictionary, own = starting_point(source, ends, scales, config)
    workspace = Workspace(config.operands(device), config.deterministic)
    return Sweep(dictionary.to(device), config.kind, config.recipe(), config.backend, workspace, own)


def loop(
    sweep: Sweep,
    batches: Iterator[tuple[Tensor, Tensor | None]],
    logs: list[MetricsLog],
    checkpoint: Checkpoint,
    first: int,
    log_every: int,
    checkpoint_every: int,
) -> list[dict[str, Any]]:
    """Steps `first` to the end on `batches` in training units; gives each dictionary's last line of metrics."""
    lines: list[dict[str, Any]] = [{} for _ in logs]
    steps, on_cpu = sweep.recipe.steps, sweep.weights.b_enc_f.device.type == "cpu"
    with stop_requests() as stop, progress("training", steps, "steps", first) as bar:
        for step in range(first, steps):
            x_bd, y_bo = next(batches)
            try:
                result = sweep.step(x_bd, step, y_bo)
            except InputError as error:
                raise InputError(f"step {step + 1}: {error}; harvest these activations again; {checkpoint.kept()}") from None
            done = step + 1
            log_now = done % log_every == 0 or done == steps
            save_now = bool(stop) or (done % checkpoint_every == 0 and done < steps)
            if on_cpu or log_now or save_now:  # elsewhere each look is a host sync
                refuse_runaway(sweep, result, step, checkpoint)
            if sweep.recipe.resamples_after(step, sweep.kind.resamples_every()):
                for k in range(len(logs)):
                    sweep.resample(x_bd, step, k, y_bo)
            if log_now:
                before, lines = lines, write_lines(logs, sweep, result, x_bd if y_bo is None else y_bo, done)
                say_switch(before[0], lines[0])
            bar.advance(1, **{k: f"{lines[0][k]:.3g}" for k in ("fvu", "l0") if lines[0]})
            if save_now:
                checkpoint.save(sweep, done)
            if stop:
                print(f"stopped after step {done:,}; the same command continues from there")
                raise KeyboardInterrupt
    return lines


def say_switch(before: dict, now: dict) -> None:
    """A line on the terminal when the objective has changed its path."""
    if before and before["path"] != now["path"]:
        print(f"step {now['step']:,}: the objective went from the {before['path']} path to {now['path']} (L0 {now['l0']:.0f})")


def refuse_runaway(sweep: Sweep, result: Step, step: int, checkpoint: Checkpoint) -> None:
    """Stops on activations or a loss that are not finite, and on an error a hundred times the activations' power."""
    bad_steps, bad_rows_b = sweep.workspace.bad_steps, sweep.workspace.bad_rows_b
    if bad_steps is not None and bad_rows_b is not None and bad_steps > 0:  # host sync
        rows = bad_rows_text(bad_rows_b.nonzero().flatten().tolist())  # host sync
        raise InputError(
            f"{int(bad_steps)} batches up to step {step + 1} were not finite ({rows}); harvest them again; {checkpoint.kept()}"
        )
    loss, d = float(result.loss.sum()), sweep.weights.W_dec_fd.shape[-1]  # host sync
    if loss - loss != 0 or float(result.squared_error.max()) > 100 * d:  # host sync
        raise InputError(f"training diverged at step {step + 1} (loss {loss:.3g}); lower --lr or set --clip 1; {checkpoint.kept()}")


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that becomes non-empty at SIGTERM, Ctrl-C or a lost terminal, so that the loop can end between two steps.

    A second signal ends at once.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield received
        return

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    asks = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # the terminal was closed; nohup ignores it
        asks.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in asks}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def provenance(manifest: dict[str, Any], ends: Ends) -> dict[str, Any]:
    """What a dictionary's metadata says about the activations it was trained on."""
    return {
        "model_name": manifest["model"]["name"],
        "model_revision": manifest["model"]["revision"],
        "model_fingerprint": manifest["model"]["fingerprint"],
        **({"models": manifest["models"]} if "models" in manifest else {}),
        **ends.metadata(),
        "context_size": manifest["context"],
        "prepend_bos": manifest.get("prepend_bos"),
        "dataset": manifest["dataset"],
    }


def in_chunks(rows: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    parts = {site: part.split(ROWS) for site, part in rows.items()}
    return [dict(zip(parts, chunk)) for chunk in zip(*parts.values())]
