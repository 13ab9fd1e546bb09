"""The training loop: batches from a cache, exact gradients, Adam, metrics, checkpoints; one dictionary or a sweep of them.

b rows (tokens) · d model width · f features
"""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.dictionary import SparseAutoencoder
from sae.errors import InputError
from sae.files import only_writer, read_json, remove_leftovers, write_json
from sae.progress import progress
from sae.training.checkpoint import FILE, refuse_other_settings, restore_checkpoint, save_checkpoint
from sae.training.config import TrainingConfig
from sae.training.metrics import MetricsLog, start_wandb
from sae.training.run import Run

if TYPE_CHECKING:
    from sae.activations.cache import ActivationCache


def train(config: TrainingConfig) -> list[Path]:
    """Trains one dictionary for each `l1` on the cache's train split and gives their folders.

    A folder that holds an unfinished run with the same settings is resumed, bit for bit as if never interrupted. Raises `InputError`
    for settings or a cache that cannot be used, and when the activations or the loss are not finite or the loss runs away; the last
    checkpoint then still stands.
    """
    from sae.activations.cache import ActivationCache

    config.check()
    cache = ActivationCache.open(config.cache, config.site)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    folders = [config.out if len(config.l1) == 1 else config.out / f"l1_{l1:g}" for l1 in config.l1]
    rows = cache.rows("train")
    print(
        f"{len(config.l1)} dictionar{'y' if len(config.l1) == 1 else 'ies'} of {config.d_sae:,} features for {cache.site} "
        f"({cache.d_in} wide): {config.steps:,} steps of {config.batch_size:,} = {config.steps * config.batch_size / rows:.1f} times "
        f"the cache's {rows:,} rows, on {device}"
    )
    if not config.dry_run:
        with only_writer(config.out):
            train_into(folders, config, cache, device)
    return folders


def train_into(folders: list[Path], config: TrainingConfig, cache: "ActivationCache", device: torch.device) -> None:
    """Begins or resumes the run in the folder, and finishes it."""
    from sae.activations.batches import ActivationBatches

    if config.restart:
        for path in [config.out / FILE, *(f / "training.json" for f in folders)]:
            path.unlink(missing_ok=True)
    if all((folder / "training.json").exists() for folder in folders):
        refuse_other_settings(config, read_json(folders[0] / "training.json", "a run's training.json")["settings"])
        print(f"{config.out} is already complete; --restart trains it again")
        return

    remove_leftovers(config.out)
    scale = (cache.d_in / cache.mean_squared_norm) ** 0.5
    runs = [Run(l1, initial_dictionary(config, cache, scale).to(device), config) for l1 in config.l1]
    first = restore_checkpoint(config, runs)
    if first:
        print(f"resuming after step {first:,}")
    batches = ActivationBatches(cache, config.batch_size, seed=config.seed, device=str(device))
    batches.seek(first)
    wandb_run = start_wandb(config)
    names = ["" if len(config.l1) == 1 else folder.name for folder in folders]
    logs = [MetricsLog(folder, name, config, first, wandb_run) for folder, name in zip(folders, names)]
    try:
        last = loop(config, runs, batches, logs, scale, first)
    finally:
        for log in logs:
            log.close()
        if wandb_run is not None:
            wandb_run.finish()
    for folder, run, line in zip(folders, runs, last):
        finish(folder, run, config, cache, scale, line)
    (config.out / FILE).unlink(missing_ok=True)


def loop(config: TrainingConfig, runs: list[Run], batches, logs: list[MetricsLog], scale: float, first: int) -> list[dict]:
    """Steps `first` to the end; gives each dictionary's last line of metrics."""
    lines: list[dict] = [{} for _ in runs]
    last_resampling = config.steps * (1 - config.lr_decay)
    with stop_requests() as stop, progress("training", config.steps, "steps", first) as bar:
        for step in range(first, config.steps):
            x_bd = next(batches) * scale
            for i, (run, log) in enumerate(zip(runs, logs)):
                result = run.gradients(x_bd, step)
                refuse_runaway(result, x_bd, step, config)
                run.update(result, len(x_bd), step)
                done = step + 1
                if config.resample_every and done % config.resample_every == 0 and done <= last_resampling:
                    run.resample(x_bd, step)
                if done % config.log_every == 0 or done == config.steps:
                    lines[i] = log.write(run, result, x_bd, done)
            bar.advance(1, **{k: f"{lines[0][k]:.3g}" for k in ("fvu", "l0") if lines[0]})
            if stop or (done % config.checkpoint_every == 0 and done < config.steps):
                save_checkpoint(config, runs, done)
            if stop:
                print(f"stopped after step {done:,}; the same command continues from there")
                raise KeyboardInterrupt
    return lines


def initial_dictionary(config: TrainingConfig, cache: "ActivationCache", scale: float) -> SparseAutoencoder:
    """Random weights, and the mean activation as decoder bias: no feature need learn it."""
    dictionary = SparseAutoencoder.initial(cache.d_in, config.d_sae, seed=config.seed, decoder_norm=config.decoder_norm)
    first_shard_nd = cache.read(cache.shards("train")[0])[0]
    with torch.no_grad():
        dictionary.b_dec_d.copy_(first_shard_nd.double().mean(0) * scale)
    return dictionary


def refuse_runaway(result, x_bd: Tensor, step: int, config: TrainingConfig) -> None:
    """Stops before a broken step is applied: non-finite activations or loss, or an error a hundred times the activations' power."""
    squared_error, loss = float(result.squared_error), float(result.loss)  # host sync
    if squared_error <= 100 * x_bd.shape[1] and loss - loss == 0:
        return
    saved = (config.out / FILE).exists()
    kept = f"the last checkpoint in {config.out} is untouched" if saved else "no checkpoint was written yet"
    broken = (~torch.isfinite(x_bd)).any(-1).sum().item()
    if broken:
        raise InputError(f"{broken} of the activations in the batch of step {step + 1} are not finite; harvest them again; {kept}")
    raise InputError(f"training diverged at step {step + 1} (loss {loss:.3g}); lower --lr or set --clip 1; {kept}")


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that becomes non-empty at SIGTERM or Ctrl-C, so that the loop can end between two steps; a second signal ends at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield received
        return

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(folder: Path, run: Run, config: TrainingConfig, cache: "ActivationCache", scale: float, line: dict) -> None:
    """Saves the dictionary for raw activations, and how it came to be; training.json, written last, marks it complete."""
    manifest = cache.manifest
    run.dictionary.metadata = {
        "model_name": manifest["model"]["name"],
        "model_revision": manifest["model"]["revision"],
        "model_fingerprint": manifest["model"]["fingerprint"],
        "site": cache.site,
        "context_size": manifest["context"],
        "prepend_bos": True,
        "dataset": manifest["dataset"],
        "l1_coefficient": run.l1,
        "training_tokens": config.steps * config.batch_size,
    }
    run.dictionary.folded(scale).save(folder)
    last = {k: v for k, v in line.items() if k != "tokens_per_second"}
    write_json(folder / "training.json", {"settings": json.loads(json.dumps(config.settings())), "scale": scale, "last": last})
