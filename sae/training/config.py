"""Settings of a training run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sae.errors import InputError
from sae.objective import Backend, Precision


@dataclass
class TrainingConfig:
    cache: Path
    """activation cache to train on (its train split)"""
    out: Path
    """folder of the dictionary; with several --l1 values, one folder for each inside it"""
    site: str | None = None
    """which of the cache's sites, when it has several"""
    d_sae: int = 4096
    """features"""
    l1: tuple[float, ...] = (5.0,)
    """L1 coefficients; several are trained together on one stream of batches"""
    steps: int = 20_000
    """optimiser steps"""
    batch_size: int = 4096
    """activations per step"""
    lr: float = 3e-4
    """peak learning rate of Adam"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay rates of Adam's moments"""
    lr_warmup: float = 0.01
    """share of the steps over which the learning rate rises linearly"""
    lr_decay: float = 0.2
    """share of the steps, at the end, over which it falls linearly to zero"""
    l1_warmup: float = 0.05
    """share of the steps over which the L1 coefficient rises linearly"""
    clip: float = 1.0
    """largest norm of the whole gradient, so that the large first ones do not linger in Adam's second moment; 0 leaves it alone"""
    decoder_norm: float = 0.3
    """norm of the decoder rows at the start"""
    b_dec: Literal["zero", "mean"] = "zero"
    """decoder bias at the start; the mean activation helps where a few dimensions have means far above the others' spread"""
    resample_every: int = 2500
    """steps between resamplings of dead features; 0 for none; none in the last --lr-decay of the run"""
    dead_steps: int = 1000
    """a feature that has not fired for so many steps is dead"""
    seed: int = 0
    """of the initial weights, the order of the batches and the resampling"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU when there is one"""
    backend: Backend = "auto"
    """how the objective is computed: auto picks a sparse path (on CUDA, triton) or the dense one by the share of active entries"""
    precision: Literal["auto"] | Precision = "auto"
    """of the matrix products' operands, sums being in float32: auto is tf32 on CUDA and float32, the only one, on a CPU"""
    deterministic: bool = True
    """on CUDA, add in one fixed order, so that a run can be repeated bit for bit; a CPU always does"""
    log_every: int = 50
    """steps between lines of metrics.jsonl"""
    checkpoint_every: int = 1000
    """steps between resumable checkpoints (one is also written on SIGTERM, Ctrl-C and a closed terminal)"""
    wandb: Literal["off", "offline", "online"] = "off"
    """also log to Weights & Biases, histograms of density included"""
    wandb_project: str = "sae"
    """project name there"""
    verify: bool = False
    """first read the whole site in the cache to compare every checksum; by default only those of token files up to 32 MB"""
    restart: bool = False
    """begin anew where --out already holds a run, instead of resuming it"""
    dry_run: bool = False
    """say what would be trained and stop"""

    def check(self) -> None:
        """Raises `InputError` for values that cannot be meant."""
        positive = ("d_sae", "steps", "batch_size", "lr", "log_every", "checkpoint_every", "decoder_norm", "dead_steps")
        for name in positive:
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} must be greater than 0, got {getattr(self, name)}")
        for name in ("lr_warmup", "lr_decay", "l1_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name.replace('_', '-')} is a share of the steps between 0 and 1, got {getattr(self, name)}")
        if not self.l1 or min(self.l1) < 0 or len(set(self.l1)) < len(self.l1):
            raise InputError(f"--l1 takes one or several different values of at least 0, got {list(self.l1)}")
        for name in ("clip", "resample_every"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} must be 0 (off) or greater, got {getattr(self, name)}")

    def operands(self, device: torch.device) -> Precision:
        return self.precision if self.precision != "auto" else "tf32" if device.type == "cuda" else "float32"

    def settings(self) -> dict:
        """What decides the result: everything but how it is watched and where it runs."""
        watching = ("out", "device", "wandb", "wandb_project", "restart", "dry_run", "checkpoint_every", "verify")
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items() if k not in watching}


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear rise, plateau, linear fall to zero; `step` counts from 0."""
    rise = min(1.0, (step + 1) / max(1, config.lr_warmup * config.steps))
    fall = min(1.0, (config.steps - step) / max(1, config.lr_decay * config.steps))
    return config.lr * min(rise, fall)


def l1_now(step: int, l1: float, config: TrainingConfig) -> float:
    """The L1 coefficient at a step, after its linear rise (Anthropic, April 2024 update: the first 5 % of the steps)."""
    return l1 * min(1.0, (step + 1) / max(1, config.l1_warmup * config.steps))
