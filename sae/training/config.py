"""Settings of a training run."""

from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from sae.disk.remote import Place
from sae.encoding import Method
from sae.errors import InputError
from sae.kinds import Kind, ReLU, name_of
from sae.kinds.kind import flag
from sae.objective import Backend, Precision


class Recipe(NamedTuple):
    """The optimiser's schedule; steps count from 0. The fields are those of `RunConfig`."""

    steps: int
    lr: float
    betas: tuple[float, float]
    lr_warmup: float
    lr_decay: float
    clip: float
    dead_steps: int

    def learning_rate(self, step: int) -> float:
        """Linear rise, plateau, linear fall to zero."""
        rise = min(1.0, (step + 1) / max(1, self.lr_warmup * self.steps))
        fall = min(1.0, (self.steps - step) / max(1, self.lr_decay * self.steps))
        return self.lr * min(rise, fall)

    def resamples_after(self, step: int, every: int) -> bool:
        """Whether dead features are resampled after a step: at every `resample_every`-th step until the learning rate falls; never if that
        is 0."""
        done = step + 1
        return every > 0 and done % every == 0 and done <= self.steps * (1 - self.lr_decay)


@dataclass(kw_only=True)
class RunConfig:
    """A training run, from a cache or live."""

    kind: Kind = field(default_factory=ReLU)
    out: Path
    """Folder of the dictionary; with several values of the swept option, it gets one folder for each."""
    reads: tuple[str, ...] = ()
    """Sites that the dictionary reads; several are put side by side (a crosscoder). Default: the only one, if there is only one."""
    writes: tuple[str, ...] = ()
    """Sites that a transcoder writes, for example mlp_out.2 of a dictionary that reads mlp_in.2. Default: the sites that it reads."""
    skip: bool = False
    """Give a transcoder a linear path from what it reads to what it writes."""
    d_sae: int = 4096
    """Number of features."""
    steps: int = 20_000
    """Optimiser steps."""
    batch_size: int = 4096
    """Activations per step."""
    lr: float = 3e-4
    """Peak learning rate of Adam."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    lr_warmup: float = 0.01
    """Share of the steps over which the learning rate rises linearly."""
    lr_decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    clip: float = 1.0
    """Maximum norm of the whole gradient; 0 does not clip. Clipping keeps large first gradients out of Adam's second moment."""
    init: Path | None = None
    """Dictionary to start from: of the same model and sites, with --d-sae features and a gate that this kind can continue with. Default:
    random rows. With --l1-warmup 0, for kinds that have it, the code is sparse from the first step."""
    decoder_norm: float | None = None
    """Initial norm of the decoder rows. Default: 0.3, or 1 for kinds that keep it at 1 and allow no other."""
    b_dec: Literal["zero", "mean"] | None = None
    """Initial decoder bias: zero, or the mean activation, which helps if a few dimensions have means far from 0. Default: mean for kinds
    that keep decoder rows at length 1 (they then have fewer dead features), otherwise zero. With mean, a transcoder's encoder bias
    subtracts the mean of its input."""
    dead_steps: int = 1000
    """Steps without firing after which a feature counts as dead."""
    seed: int = 0
    """Seed of the initial weights, the order of the batches and the resampling."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    backend: Backend = "auto"
    """How the objective is computed. auto chooses the sparse path (triton on CUDA) or the dense one by the share of active entries."""
    precision: Literal["auto"] | Precision = "auto"
    """Precision of the operands of matrix products; sums are in float32. auto is tf32 on CUDA; a CPU has only float32."""
    encoder: Literal["auto"] | Method = "auto"
    """How active entries are computed on a CPU while the code is sparse; the choice affects the last digits. auto measures which is fastest
    at the start, and prints it if it is not the float32 product. Give the value in training.json to repeat the run bit for bit."""
    deterministic: bool = True
    """Sum in a fixed order on CUDA, so that a run can be repeated bit for bit; a CPU always does."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between resumable checkpoints; one is also written on SIGTERM, on Ctrl-C and when the terminal closes."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Log to Weights & Biases too, with histograms of density."""
    wandb_project: str = "sae"
    """Project name in Weights & Biases."""
    restart: bool = False
    """Start over if --out already holds a run. Default: resume it."""
    dry_run: bool = False
    """Print what would be trained, and stop."""
    shard: str | None = None
    """How the processes that torchrun started share a dictionary: features, rows (of a batch), or both, as in features=4,rows=2. In
    train-live the first processes do so, by default one alone, and the others run the model; in train-plan all processes share every
    run, while by default each run is trained by one. One process is enough for --dry-run, with which train and train-live also print
    memory, bytes and time."""

    def check(self) -> None:
        """Raises `InputError` for values that cannot be meant."""
        for name in ("d_sae", "steps", "batch_size", "lr", "log_every", "checkpoint_every", "dead_steps"):
            if not getattr(self, name) > 0:
                raise InputError(f"{flag(name)} must be greater than 0, got {getattr(self, name)}")
        for name in ("lr_warmup", "lr_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{flag(name)} is a share of the steps between 0 and 1, got {getattr(self, name)}")
        if self.lr_warmup + self.lr_decay > 1:
            raise InputError(
                f"expected --lr-warmup and --lr-decay of together at most 1, got {self.lr_warmup:g} and {self.lr_decay:g}: --lr would "
                "never be reached; lower one of them"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"expected --betas of at least 0 and less than 1, got {' '.join(map(str, self.betas))}; 0.9 0.999 is usual")
        for name, value in (vars(self) | vars(self.kind)).items():
            if not all(isfinite(one) for one in (value if isinstance(value, tuple) else [value]) if isinstance(one, float)):
                raise InputError(f"expected numbers that are finite for {flag(name)}, got {value}; give others")
        if self.decoder_norm is not None and not self.decoder_norm > 0:
            raise InputError(f"--decoder-norm must be greater than 0, got {self.decoder_norm}")
        if self.decoder_norm not in (None, 1.0) and self.kind.unit_rows:
            raise InputError(f"this kind keeps decoder rows at length 1, got --decoder-norm {self.decoder_norm:g}; leave it out")
        self.kind.check(self.d_sae)
        if self.skip and not self.writes:
            raise InputError("--skip is for transcoders, got no --writes; say where the dictionary writes")
        for name in ("reads", "writes"):
            sites = getattr(self, name)
            if len(set(sites)) < len(sites):
                raise InputError(f"{flag(name)} takes different sites, got {' '.join(sites)}")
        if self.writes and set(self.writes) == set(self.reads):
            raise InputError(f"expected --writes that differ from --reads, got {' '.join(self.writes)} for both; leave --writes out")
        if self.init is not None:
            for name in ("decoder_norm", "b_dec"):
                if getattr(self, name) != getattr(RunConfig, name):
                    raise InputError(f"{flag(name)} is for random rows, got --init too; leave one of them out")
        if self.clip < 0:
            raise InputError(f"--clip must be 0 (off) or greater, got {self.clip}")

    def operands(self, device: torch.device) -> Precision:
        return self.precision if self.precision != "auto" else "tf32" if device.type == "cuda" else "float32"

    def recipe(self) -> Recipe:
        return Recipe(*(getattr(self, name) for name in Recipe._fields))

    def settings(self) -> dict[str, Any]:
        """What decides the result: everything but how it is watched and where it runs."""
        watching = ("out", "device", "wandb", "wandb_project", "restart", "dry_run", "log_every", "checkpoint_every", "shard")
        found = {one.name: getattr(self, one.name) for one in fields(RunConfig) if one.name not in watching}
        return found | {"init": self.init and str(self.init), "kind": name_of(self.kind), **vars(self.kind)}

    @property
    def sites(self) -> tuple[str, ...]:
        """Those that are named."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))

    def folders(self) -> list[Path]:
        """One for each dictionary."""
        values = self.kind.values
        return [self.out if len(values) == 1 else self.out / f"{self.kind.swept}_{value:g}" for value in values]


@dataclass(kw_only=True)
class TrainingConfig(RunConfig):
    """A training run on a cache."""

    cache: Place
    """Folder or URL of the activation cache to train on (its train split)."""
    verify: bool = False
    """First read the whole site in the cache to compare every checksum. By default only those of token files up to 32 MB are compared."""

    def settings(self) -> dict[str, Any]:
        return {"cache": str(self.cache)} | super().settings()
