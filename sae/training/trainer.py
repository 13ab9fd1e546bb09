"""The training loop: batches from a cache, exact gradients, Adam, metrics, checkpoints; one dictionary or a sweep of them.

b rows (tokens) · d model width · f features
"""

import json
import signal
import threading
from collections.abc import Iterable, Iterator
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
from sae.dictionaries.source import sampled_crc32
from sae.disk.places import require_folder
from sae.disk.reading import read_json
from sae.disk.writing import only_writer, remove_leftovers, write_json
from sae.errors import InputError
from sae.objective import Step, Workspace, bad_rows_text
from sae.progress import progress
from sae.training.checkpoint import Checkpoint, Record
from sae.training.config import RunConfig, TrainingConfig
from sae.training.metrics import MetricsLog, start_wandb, write_lines
from sae.training.start import change_since, opened, said, starting_point
from sae.training.sweep import Sweep


def train(config: TrainingConfig) -> list[Path]:
    """Trains one dictionary for each `l1` on the cache's train split and gives their folders.

    A folder that holds an unfinished run with the same settings is resumed, bit for bit as if never interrupted. Raises `InputError`
    for settings or a cache that cannot be used, and when the activations or the loss are not finite or the loss runs away; the last
    checkpoint then still stands.
    """
    config.check()
    if not config.dry_run:
        require_folder(config.out)
    return train_on(CachedSource(ActivationCache.open(config.cache, config.site, verify=config.verify)), config, config.settings())


def train_on(source: Source, config: RunConfig, settings: dict[str, Any]) -> list[Path]:
    """`train` on rows from anywhere. `settings` decide the result: a run in the folder is resumed only if it has the same ones."""
    site = only_site(source.widths)
    device = device_named(config.device)
    if config.init is not None:
        settings = settings | {"init_crc32": sampled_crc32(opened(config.init, source, site, config).parts())}
    folders = [config.out if len(config.l1) == 1 else config.out / f"l1_{l1:g}" for l1 in config.l1]
    drawn = config.steps * config.batch_size
    print(
        f"{len(config.l1)} dictionar{'y' if len(config.l1) == 1 else 'ies'} of {config.d_sae:,} features for {site} "
        f"({source.widths[site]} wide): {config.steps:,} steps of {config.batch_size:,} = {drawn / source.rows:.1f} times "
        f"the {source.rows:,} training rows, on {device}"
    )
    if not config.dry_run:
        with only_writer(config.out):
            train_into(folders, source, site, config, settings, device)
    return folders


def train_into(folders: list[Path], source: Source, site: str, config: RunConfig, settings: dict[str, Any], device: torch.device) -> None:
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
    scale = scale_of(source, site)
    sweep = initial_sweep(source, site, scale, config, device)
    first = checkpoint.restore(sweep)
    if first:
        print(f"resuming after step {first:,}")
    batches = source.batches(config.batch_size, seed=config.seed, device=device)
    batches.seek(first)
    wandb_run = start_wandb(config.wandb, config.wandb_project, config.out, settings)
    names = ["" if len(config.l1) == 1 else folder.name for folder in folders]
    logs = [MetricsLog(folder, name, config.batch_size, first, wandb_run) for folder, name in zip(folders, names)]
    try:
        scaled = (batch[site] * scale for batch in batches)
        last = loop(sweep, scaled, logs, checkpoint, first, config.log_every, config.checkpoint_every)
    finally:
        for log in logs:
            log.close()
        if wandb_run is not None:
            wandb_run.finish()
    for k, folder in enumerate(folders):
        dictionary = sweep.dictionary(k)
        trained = {"l1_coefficient": config.l1[k], "training_tokens": config.steps * config.batch_size}
        dictionary.metadata = provenance(source.manifest, site) | trained
        line = {key: value for key, value in last[k].items() if key != "tokens_per_second"}
        saved = dictionary.folded(scale)
        record: dict[str, Any] = {"settings": json.loads(json.dumps(settings)), "scale": scale, "last": line}
        if config.init is not None:
            record["since_init"] = change_since(opened(config.init, source, site, config).to(device), saved, source, site)
            print(f"{folder}: {said(record['since_init'])}")
        finish(folder, saved, record)
    checkpoint.remove()


def only_site(sites: Iterable[str]) -> str:
    names = list(sites)
    if len(names) != 1:
        raise InputError(f"expected one site to train on, got {' '.join(names) or 'none'}; name one")
    return names[0]


def scale_of(source: Source, site: str) -> float:
    """What gives the rows a mean squared norm of d; says what is known of massive ones, which decide it."""
    if said := source.about_massive(site):
        print(said)
    mean_squared_norm = source.mean_squared_norm(site)
    if not mean_squared_norm > 0:
        raise InputError(f"expected activations to train on, but all at {site} are zero; choose another site")
    return (source.widths[site] / mean_squared_norm) ** 0.5


def initial_sweep(source: Source, site: str, scale: float, config: RunConfig, device: torch.device) -> Sweep:
    dictionary = starting_point(source, site, scale, config)
    workspace = Workspace(config.operands(device), config.deterministic)
    return Sweep(dictionary.to(device), config.l1, config.recipe(), config.backend, workspace)


def loop(
    sweep: Sweep,
    batches: Iterator[Tensor],
    logs: list[MetricsLog],
    checkpoint: Checkpoint,
    first: int,
    log_every: int,
    checkpoint_every: int,
) -> list[dict[str, Any]]:
    """Steps `first` to the end on `batches` in training units; gives each dictionary's last line of metrics."""
    lines: list[dict[str, Any]] = [{} for _ in logs]
    steps, on_cpu = sweep.recipe.steps, sweep.l1_k.device.type == "cpu"
    with stop_requests() as stop, progress("training", steps, "steps", first) as bar:
        for step in range(first, steps):
            x_bd = next(batches)
            try:
                result = sweep.step(x_bd, step)
            except InputError as error:
                raise InputError(f"step {step + 1}: {error}; harvest these activations again; {checkpoint.kept()}") from None
            done = step + 1
            log_now = done % log_every == 0 or done == steps
            save_now = bool(stop) or (done % checkpoint_every == 0 and done < steps)
            if on_cpu or log_now or save_now:  # elsewhere each look is a host sync
                refuse_runaway(sweep, result, step, checkpoint)
            if sweep.recipe.resamples_after(step):
                for k in range(len(logs)):
                    sweep.resample(x_bd, step, k)
            if log_now:
                before, lines = lines, write_lines(logs, sweep, result, x_bd, done)
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


def provenance(manifest: dict[str, Any], site: str) -> dict[str, Any]:
    """What a dictionary's metadata says about the activations it was trained on."""
    return {
        "model_name": manifest["model"]["name"],
        "model_revision": manifest["model"]["revision"],
        "model_fingerprint": manifest["model"]["fingerprint"],
        "site": site,
        "context_size": manifest["context"],
        "prepend_bos": manifest.get("prepend_bos"),
        "dataset": manifest["dataset"],
    }


def finish(folder: Path, dictionary: Dictionary, record: dict[str, Any]) -> None:
    """Saves a dictionary and how it was trained; training.json, written last, marks it complete."""
    dictionary.save(folder)
    write_json(folder / "training.json", record)
