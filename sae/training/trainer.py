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

from sae.dictionaries.dictionary import Dictionary
from sae.disk.places import require_folder
from sae.disk.reading import read_json
from sae.disk.writing import only_writer, remove_leftovers, write_json
from sae.errors import InputError
from sae.objective import Step, bad_rows_text
from sae.progress import progress
from sae.training.checkpoint import FILE, Record, refuse_other_settings, restore_checkpoint, save_checkpoint
from sae.training.config import TrainingConfig
from sae.training.metrics import MetricsLog, start_wandb, write_lines
from sae.training.sweep import Sweep

if TYPE_CHECKING:
    from sae.activations.cache import ActivationCache
    from sae.activations.live import LiveActivations

    Source = ActivationCache | LiveActivations


def train(config: TrainingConfig) -> list[Path]:
    """Trains one dictionary for each `l1` on the cache's train split and gives their folders.

    A folder that holds an unfinished run with the same settings is resumed, bit for bit as if never interrupted. Raises `InputError`
    for settings or a cache that cannot be used, and when the activations or the loss are not finite or the loss runs away; the last
    checkpoint then still stands.
    """
    from sae.activations.cache import ActivationCache

    config.check()
    if not config.dry_run:
        require_folder(config.out)
    return train_on(ActivationCache.open(config.cache, config.site, verify=config.verify), config)


def train_on(source: "Source", config: TrainingConfig) -> list[Path]:
    """`train` on activations that are already open, or that are computed as they are needed."""
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    folders = [config.out if len(config.l1) == 1 else config.out / f"l1_{l1:g}" for l1 in config.l1]
    rows = source.rows("train")
    print(
        f"{len(config.l1)} dictionar{'y' if len(config.l1) == 1 else 'ies'} of {config.d_sae:,} features for {source.site} "
        f"({source.d_in} wide): {config.steps:,} steps of {config.batch_size:,} = {config.steps * config.batch_size / rows:.1f} times "
        f"the {rows:,} training rows, on {device}"
    )
    if not config.dry_run:
        with only_writer(config.out):
            train_into(folders, config, source, device)
    return folders


def train_into(folders: list[Path], config: TrainingConfig, source: "Source", device: torch.device) -> None:
    """Begins or resumes the run in the folder, and finishes it."""
    if config.restart:
        for path in [config.out / FILE, *(f / "training.json" for f in folders)]:
            path.unlink(missing_ok=True)
    if all((folder / "training.json").exists() for folder in folders):
        refuse_other_settings(config, read_json(folders[0] / "training.json", "a run's training.json", Record)["settings"])
        remove_leftovers(config.out)
        (config.out / FILE).unlink(missing_ok=True)  # a kill may have come between the two last steps
        print(f"{config.out} is already complete; --restart trains it again")
        return

    remove_leftovers(config.out)
    if said := source.about_massive():
        print(said)
    if not source.mean_squared_norm > 0:
        raise InputError(f"expected activations to train on, but all at {source.site} are zero; choose another site")
    scale = (source.d_in / source.mean_squared_norm) ** 0.5
    sweep = Sweep(initial_dictionary(config, source, scale).to(device), config)
    first = restore_checkpoint(config, sweep)
    if first:
        print(f"resuming after step {first:,}")
    batches = source.batches(config.batch_size, seed=config.seed, device=device)
    batches.seek(first)
    wandb_run = start_wandb(config)
    names = ["" if len(config.l1) == 1 else folder.name for folder in folders]
    logs = [MetricsLog(folder, name, config, first, wandb_run) for folder, name in zip(folders, names)]
    try:
        last = loop(config, sweep, batches, logs, scale, first)
    finally:
        for log in logs:
            log.close()
        if wandb_run is not None:
            wandb_run.finish()
    for k, folder in enumerate(folders):
        finish(folder, sweep.dictionary(k), config, source, scale, last[k], config.l1[k])
    (config.out / FILE).unlink(missing_ok=True)


def loop(config: TrainingConfig, sweep: Sweep, batches, logs: list[MetricsLog], scale: float, first: int) -> list[dict]:
    """Steps `first` to the end; gives each dictionary's last line of metrics."""
    lines: list[dict] = [{} for _ in logs]
    last_resampling = config.steps * (1 - config.lr_decay)
    on_cpu = sweep.l1_k.device.type == "cpu"
    with stop_requests() as stop, progress("training", config.steps, "steps", first) as bar:
        for step in range(first, config.steps):
            x_bd = next(batches) * scale
            try:
                result = sweep.step(x_bd, step)
            except InputError as error:
                raise InputError(f"step {step + 1}: {error}; harvest these activations again; {kept(config)}") from None
            done = step + 1
            log_now = done % config.log_every == 0 or done == config.steps
            save_now = bool(stop) or (done % config.checkpoint_every == 0 and done < config.steps)
            if on_cpu or log_now or save_now:  # elsewhere each look is a host sync
                refuse_runaway(sweep, result, step, config)
            if config.resample_every and done % config.resample_every == 0 and done <= last_resampling:
                for k in range(len(logs)):
                    sweep.resample(x_bd, step, k)
            if log_now:
                before, lines = lines, write_lines(logs, sweep, result, x_bd, done)
                say_switch(before[0], lines[0])
            bar.advance(1, **{k: f"{lines[0][k]:.3g}" for k in ("fvu", "l0") if lines[0]})
            if save_now:
                save_checkpoint(config, sweep, done)
            if stop:
                print(f"stopped after step {done:,}; the same command continues from there")
                raise KeyboardInterrupt
    return lines


def say_switch(before: dict, now: dict) -> None:
    """A line on the terminal when the objective has changed its path."""
    if before and before["path"] != now["path"]:
        print(f"step {now['step']:,}: the objective went from the {before['path']} path to {now['path']} (L0 {now['l0']:.0f})")


def initial_dictionary(config: TrainingConfig, source: "Source", scale: float) -> Dictionary:
    """Random decoder rows, the encoder their transpose, and biases of zero; the decoder's may start at the mean activation."""
    dictionary = Dictionary.initial(source.d_in, config.d_sae, seed=config.seed, decoder_norm=config.decoder_norm)
    if config.b_dec == "mean":
        with torch.no_grad():
            dictionary.b_dec_o.copy_(source.first_rows().double().mean(0) * scale)
    return dictionary


def refuse_runaway(sweep: Sweep, result: Step, step: int, config: TrainingConfig) -> None:
    """Stops on activations or a loss that are not finite, and on an error a hundred times the activations' power."""
    bad_steps, bad_rows_b = sweep.workspace.bad_steps, sweep.workspace.bad_rows_b
    if bad_steps is not None and bad_rows_b is not None and bad_steps > 0:  # host sync
        rows = bad_rows_text(bad_rows_b.nonzero().flatten().tolist())  # host sync
        raise InputError(f"{int(bad_steps)} batches up to step {step + 1} were not finite ({rows}); harvest them again; {kept(config)}")
    loss, d = float(result.loss.sum()), sweep.weights.W_dec_fd.shape[-1]  # host sync
    if loss - loss != 0 or float(result.squared_error.max()) > 100 * d:  # host sync
        raise InputError(f"training diverged at step {step + 1} (loss {loss:.3g}); lower --lr or set --clip 1; {kept(config)}")


def kept(config: TrainingConfig) -> str:
    saved = (config.out / FILE).exists()
    return f"the last checkpoint in {config.out} is untouched" if saved else "no checkpoint was written yet"


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


def finish(folder: Path, dictionary: Dictionary, config: TrainingConfig, source: "Source", scale: float, line: dict, l1: float) -> None:
    """Saves the dictionary for raw activations, and how it came to be; training.json, written last, marks it complete."""
    manifest = source.manifest
    dictionary.metadata = {
        "model_name": manifest["model"]["name"],
        "model_revision": manifest["model"]["revision"],
        "model_fingerprint": manifest["model"]["fingerprint"],
        "site": source.site,
        "context_size": manifest["context"],
        "prepend_bos": manifest.get("prepend_bos"),
        "dataset": manifest["dataset"],
        "l1_coefficient": l1,
        "training_tokens": config.steps * config.batch_size,
    }
    dictionary.folded(scale).save(folder)
    last = {k: v for k, v in line.items() if k != "tokens_per_second"}
    write_json(folder / "training.json", {"settings": json.loads(json.dumps(config.settings())), "scale": scale, "last": last})
