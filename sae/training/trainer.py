"""The training loop: batches from a cache, exact gradients, Adam, metrics, checkpoints; all parts of a run on one stream of batches."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.activations.files.manifest import manifest_crc32
from sae.activations.source import Ended, Source
from sae.device import device_named
from sae.dictionaries.source import sampled_crc32
from sae.disk.places import require_folder
from sae.disk.reading import read_json
from sae.disk.remote import Place
from sae.disk.writing import only_writer, remove_leftovers
from sae.errors import InputError
from sae.mesh import ALONE, Mesh
from sae.objective import NotFinite, refuse_device
from sae.processes import Processes
from sae.progress import progress
from sae.training.checkpoint import FILE, Checkpoint, Record
from sae.training.config import RunConfig, TrainingConfig
from sae.training.cost import report
from sae.training.ends import Ends
from sae.training.metrics import FILE as METRICS
from sae.training.metrics import start_wandb
from sae.training.part import Part
from sae.training.shard import meshed, require_same, split_of_all
from sae.training.start import opened
from sae.training.sweep import Sweep

LOGS = ".log", ".out", ".err"
"""ends of the names of files that launchers write"""


def train(config: TrainingConfig) -> list[Path]:
    """Trains one dictionary for each value of the kind's swept option on the cache's train split and returns their folders.

    An unfinished run with the same settings in the folder is resumed, bit for bit as if never interrupted. Raises `InputError` for settings
    or a cache that cannot be used, and if activations or loss are not finite or the loss diverges; the last checkpoint then still exists.
    If torchrun started several processes, all call it and train together (`--shard`); if one fails, all end.
    """
    config.check()
    processes = Processes.from_environment()
    config = replace(config, device=processes.device(config.device))
    with processes.together(), meshed(split_of_all(config, processes), config.device, processes) as mesh:
        assert mesh is not None  # all train
        if not config.dry_run:
            require_folder(config.out)
        source = cached(config.cache, config.sites, config.verify)
        if not mesh.alone:
            require_same(config, processes, cache_content=manifest_crc32(source.manifest), **config.settings())
        folders = train_on(source, config, config.settings() | {"cache_content": manifest_crc32(source.manifest)}, mesh)
        if config.dry_run:
            report(config, source, mesh)
        return folders


def cached(cache: Place, sites: Iterable[str], verify: bool) -> CachedSource:
    """The named sites of a cache, or its only one."""
    return CachedSource(*(ActivationCache.open(cache, site, verify=verify) for site in list(sites) or (None,)))


def train_on(source: Source, config: RunConfig, settings: dict[str, Any], mesh: Mesh = ALONE) -> list[Path]:
    """Trains on the rows of any source.

    `settings` decide the result: a run in the folder is resumed only if it has the same ones.
    """
    device = device_named(config.device)
    settings = with_inits(source, [config], settings)
    announce(source, config, [config], device)
    if not config.dry_run:
        with only_writer(config.out) if mesh.leads else nullcontext():
            train_into(source, config, settings, device, mesh)
    return config.folders()


def with_inits(source: Source, configs: Sequence[RunConfig], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the checksums of the `--init` dictionaries."""
    for number, config in enumerate(configs):
        if config.init is not None:
            with named(config, configs):
                crc32 = sampled_crc32(opened(config.init, source, Ends.of(source, config), config).parts())
            settings = settings | {"init_crc32" if len(configs) == 1 else f"init_crc32_{number}": crc32}
    return settings


def announce(source: Source, run: RunConfig, configs: Sequence[RunConfig], device: torch.device) -> None:
    """Prints what will be trained. Raises `InputError` for sites that the source lacks and for what the device cannot compute."""
    for config in configs:
        count = len(config.kind.values)
        with named(config, configs):
            print(f"{count} dictionar{'y' if count == 1 else 'ies'} of {config.d_sae:,} features for {Ends.of(source, config)}")
            refuse_device(run.backend, run.operands(device), device)
    drawn = run.steps * run.batch_size
    print(f"{run.steps:,} steps of {run.batch_size:,} = {drawn / source.rows:.1f} times the {source.rows:,} training rows, on {device}")


@contextmanager
def named(config: RunConfig, configs: Sequence[RunConfig]) -> Iterator[None]:
    """Errors inside say which of several runs they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"run {config.out.name}: {error}" if len(configs) > 1 else str(error)) from None


def train_into(source: Source, config: RunConfig, settings: dict[str, Any], device: torch.device, mesh: Mesh) -> None:
    """Starts or resumes the run in the folder, and finishes it."""
    checkpoint = Checkpoint(config.out, settings)
    complete = mesh.leads and prepared(checkpoint, config)
    if mesh.every.any(complete):
        print(f"{config.out} is already complete; --restart trains it again")
        return

    part = Part([config], source, device, mesh)
    first = checkpoint.restore([part.sweep])
    if first:
        print(f"resuming after step {first:,}")
    else:
        part.choose_encoder()
    batches = source.batches(config.batch_size, seed=config.seed, device=device)
    batches.seek(first)
    wandb_run = start_wandb(config.wandb if mesh.leads else "off", config.wandb_project, config.out, settings)
    try:
        part.open_logs(first, wandb_run, config.out)
        loop([part], batches, checkpoint, first, config)
    finally:
        for log in part.logs:
            log.close()
        if wandb_run is not None:
            wandb_run.finish()
    part.finish(settings)
    if mesh.leads:
        checkpoint.remove()
    mesh.every.wait()


def prepared(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Removes outdated files; returns whether the run is already complete."""
    folders = config.folders()
    require_own(config)  # before anything is removed
    if config.restart and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:  # torchrun's own restarts resume
        checkpoint.remove()
        for folder in folders:
            (folder / "training.json").unlink(missing_ok=True)
    complete = all((folder / "training.json").exists() for folder in folders)
    if complete:
        checkpoint.refuse_other(read_json(folders[0] / "training.json", "a run's training.json", Record)["settings"])
    remove_leftovers(config.out)
    if complete:
        checkpoint.remove()  # a kill may have come between the two last steps
    return complete


def require_own(config: RunConfig) -> None:
    """Raises `InputError` if the folder holds a finished run of other values, or what no training run writes; logs may be there."""
    out, folders = config.out, config.folders()
    others = [path.parent for path in (*out.glob("training.json"), *sorted(out.glob("*/training.json"))) if path.parent not in folders]
    if others and not all((folder / "training.json").exists() for folder in folders):
        raise InputError(f"{out} holds another run in {', '.join(map(str, others))}; use another --out, or remove that run")
    names = sorted(path.name for path in out.glob("*") if not path.name.startswith(".") and path.suffix not in LOGS)
    marked = any(any(out.glob(f"{inside}{name}")) for name in (FILE, METRICS, "training.json") for inside in ("", "*/"))
    if set(names) - {"wandb"} and not marked:
        raise InputError(f"expected a new or empty folder, or one with a run, for --out, got {out} with {names[0]}; choose another")


class Saves(Protocol):
    """Saves the state that the next step depends on."""

    def save(self, sweeps: Sequence[Sweep], step: int) -> None: ...

    def kept(self) -> str: ...


def loop(
    parts: Sequence[Part],
    batches: Iterator[dict[str, Tensor]],
    checkpoint: Saves,
    first: int,
    run: RunConfig,
    until: int | None = None,
    shown: bool = True,
) -> None:
    """Runs the steps from `first` to `until`, by default the last; `shown`: with a progress bar."""
    sweeps, mesh = [part.sweep for part in parts], parts[0].mesh
    on_cpu = sweeps[0].weights.b_enc_f.device.type == "cpu"
    showing = progress("training", run.steps, "steps", first) if shown and mesh.leads else nullcontext()
    with stop_requests() as stop, showing as bar:
        for step in range(first, run.steps if until is None else until):
            try:
                batch = next(batches)
            except (InputError, SystemExit, Ended) as error:  # a damaged shard, or another process has failed: what is trained is kept
                if step > first and (mesh.alone or isinstance(error, Ended)):  # other processes may not have met a damaged shard
                    checkpoint.save(sweeps, step)
                if isinstance(error, Ended):
                    print(f"stopped after step {step:,}; the same command continues from there")
                raise
            for part in parts:
                try:
                    part.step(batch, step)
                except NotFinite as error:
                    raise InputError(f"step {step + 1}: {error}; harvest these activations again; {checkpoint.kept()}") from None
            done = step + 1
            log_now = done % run.log_every == 0 or done == run.steps
            stop_now = mesh.every.any(bool(stop))  # a signal may have come during the step
            save_now = stop_now or (done % run.checkpoint_every == 0 and done < run.steps)
            for part in parts:
                if on_cpu or log_now or save_now:  # elsewhere each look is a host sync
                    part.refuse_runaway(step, checkpoint.kept())
                part.resample(step)
                if log_now:
                    part.log(done)
            line = parts[0].lines[0]
            if bar:
                bar.advance(1, **{k: f"{line[k]:.3g}" for k in ("fvu", "l0") if line})
            if save_now:
                checkpoint.save(sweeps, done)
            if stop_now:  # a later one waits for the next step
                print(f"stopped after step {done:,}; the same command continues from there")
                raise KeyboardInterrupt


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
