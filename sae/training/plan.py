"""A plan: dictionaries of several kinds, widths, seeds and sites that train together, on one pass over a cache."""

from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sae.activations.files.manifest import manifest_crc32
from sae.device import device_named
from sae.disk.places import require_folder
from sae.disk.reading import read_json, require
from sae.errors import InputError
from sae.kinds import KINDS, Kind, ReLU
from sae.mesh import ALONE
from sae.processes import Processes
from sae.training import status
from sae.training.config import RunConfig, TrainingConfig
from sae.training.dealt import train_dealt
from sae.training.shard import meshed, require_same, split_of_all
from sae.training.trainer import announce, cached, with_inits

SHARED = (
    *("kind", "out", "cache", "verify", "steps", "batch_size", "device", "backend", "precision", "deterministic"),
    *("log_every", "checkpoint_every", "wandb", "wandb_project", "restart", "dry_run", "shard"),
)
"""settings that all runs of a plan share, or that a plan sets in another way"""


@dataclass(kw_only=True)
class PlanConfig(TrainingConfig):
    """All flags except those of one kind; they apply to every run of the plan that does not set them."""

    kind: Kind = field(default_factory=ReLU, init=False)  # said by each run
    plan: Path
    """JSON file with a list of runs. Each has a name, which is its folder in --out, a kind, and any of that kind's options and of --reads,
    --writes, --skip, --d-sae, --lr, --betas, --lr-warmup, --lr-decay, --clip, --init, --decoder-norm, --b-dec, --dead-steps, --encoder
    and --seed."""

    def runs(self) -> list[RunConfig]:
        """The configuration of each run. Raises `InputError` for a plan that makes no sense."""
        found = read_json(self.plan, "a plan", list[dict[str, Any]], unique=True)
        if not found:
            raise InputError(f"expected runs in the plan {self.plan}, got an empty list; give at least one")
        runs = [self._run(entry, f"run {number} of {self.plan}") for number, entry in enumerate(found, 1)]
        names = [run.out.name for run in runs]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two runs of {self.plan} have the name {name!r} and would write one folder; give each its own")
        return runs

    def _run(self, entry: dict[str, Any], where: str) -> RunConfig:
        name, kind = entry.get("name"), entry.get("kind")
        if not isinstance(name, str) or not name or Path(name).name != name or name.startswith(".") or name == status.FILE:
            raise InputError(f"expected a name that can be a folder's in {where}, got {name!r}; choose another")
        if kind not in KINDS:
            raise InputError(f"expected a kind among {', '.join(KINDS)} in {where}, got {kind!r}")
        own = {one.name: one for one in fields(KINDS[kind])}
        common = {one.name: one for one in fields(RunConfig) if one.name not in SHARED}
        options: dict[str, Any] = {}
        changes: dict[str, Any] = {}
        for key, value in entry.items():
            if key in ("name", "kind"):
                continue
            known = own.get(key) or common.get(key)
            if known is None:
                raise InputError(f"expected names among {', '.join(sorted(own | common))} in {where}, got {key!r}")
            value = tuple(value) if isinstance(value, list) else value
            value = Path(value) if key == "init" and isinstance(value, str) else value
            require(value, known.type, f"{key} of {where}")
            (options if key in own else changes)[key] = value
        base = {one.name: getattr(self, one.name) for one in fields(RunConfig)}
        run = RunConfig(**(base | changes | {"out": self.out / name, "kind": KINDS[kind](**options)}))
        try:
            run.check()
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return run


def train_plan(config: PlanConfig) -> list[Path]:
    """Trains all runs of a plan together and returns their folders. Each run has its own checkpoint, from which it is resumed.

    Called in every process that torchrun started, they share the runs (see deal.py); each run has the same bits as in one process,
    on a CPU with as many threads and with `--encoder` named. With `--shard` all processes share every run instead of dealing them
    out, and a run has the bits of that split. When one process fails, so do the others, with SystemExit. Started again,
    with any number of processes, the runs continue from their checkpoints. Raises `InputError` as `train` does, and in a process that has
    another plan, other settings, another cache or other code than the first.
    """
    if not config.dry_run:
        require_folder(config.out)
    processes = Processes.from_environment()
    with processes.together():
        runs = config.runs()
        device = device_named(processes.device(config.device))
        sites = dict.fromkeys(site for run in runs for site in run.sites)
        source = cached(config.cache, sites, config.verify and processes.leads)
        content = manifest_crc32(source.manifest)
        settings = with_inits(source, runs, shared_settings(config, runs) | {"cache_content": content})
        each = {f"run {name}": own for name, own in settings["runs"].items()}
        shared = {name: value for name, value in settings.items() if name != "runs"}
        require_same(config, processes, one_result=config.shard is not None, **shared, **each)
        if processes.leads:
            announce(source, config, runs, device)
        sharing = meshed(split_of_all(config, processes), str(device), processes) if config.shard else nullcontext(ALONE)
        with sharing as mesh, processes.numbered():
            assert mesh is not None  # all train
            if not config.dry_run:
                train_dealt(source, config, runs, settings, device, processes, mesh)
    return [folder for run in runs for folder in run.folders()]


def shared_settings(config: PlanConfig, runs: list[RunConfig]) -> dict[str, Any]:
    shared = config.settings()
    kept = {name: shared[name] for name in ("cache", "steps", "batch_size", "backend", "precision", "deterministic", "seed")}
    each = {run.out.name: {name: value for name, value in run.settings().items() if name not in kept or name == "seed"} for run in runs}
    return kept | {"runs": each}
