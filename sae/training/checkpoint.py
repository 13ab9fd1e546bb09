"""A training run's checkpoint: one safetensors file, whole or absent, with all that the next step depends on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from sae.disk.reading import Number, parse_json, read_tensors
from sae.disk.writing import write_tensors
from sae.errors import InputError
from sae.training.sweep import Sweep

FILE = "checkpoint.safetensors"
THEN = "begin anew with --restart"


class Record(TypedDict):
    """training.json, which marks a finished run."""

    settings: dict[str, Any]
    scale: Number | dict[str, Number]
    """several sites have one each"""
    encoder: NotRequired[str]
    last: dict[str, Any]
    since_init: NotRequired[dict[str, Any]]


class Checkpoint:
    """The checkpoint of the run in `folder`, of which `settings` decide the result."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.path, self.settings = folder, folder / FILE, settings

    def save(self, sweeps: Sequence[Sweep], step: int) -> None:
        """After `step` steps. Adam's moments and the counts are in it, and the batch order follows from seed and step."""
        tensors = {name: tensor.cpu() for name, tensor in state_of(sweeps).items()}  # host sync
        write_tensors(self.path, tensors, {"step": str(step), "settings": json.dumps(self.settings)})

    def restore(self, sweeps: Sequence[Sweep]) -> int:
        """Brings `sweeps` to the checkpoint and gives the number of steps done; 0 if there is no checkpoint.

        Raises `InputError` when the folder holds a run with other settings, or a checkpoint that is damaged or has no checksum.
        """
        if not self.path.exists():
            return 0
        tensors, metadata = read_tensors(self.path, "a checkpoint", then=THEN)
        if not {"crc32", "step", "settings"} <= metadata.keys():
            raise InputError(f"expected a checkpoint with a checksum at {self.path}, but an earlier version wrote this one; {THEN}")
        self.refuse_other(parse_json(metadata["settings"], f"the settings of the checkpoint {self.path}", dict[str, Any]))
        step, steps = parse_json(metadata["step"], f"the step of the checkpoint {self.path}", int), sweeps[0].recipe.steps
        ours = {name: (tensor.dtype, tensor.shape) for name, tensor in state_of(sweeps).items()}
        if ours != {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} or not 0 < step <= steps:
            raise InputError(f"expected the state of this run after 1 to {steps} steps in {self.path}, but it holds another; {THEN}")
        with torch.no_grad():
            for name, tensor in state_of(sweeps).items():
                tensor.copy_(tensors[name])
        return step

    def refuse_other(self, theirs: dict[str, Any]) -> None:
        """Raises `InputError` if the run that is already in the folder was started with other settings, `theirs`."""
        ours = json.loads(json.dumps(self.settings))
        differing = [f"{key} {theirs.get(key)} there, {ours.get(key)} now" for key in ours | theirs if theirs.get(key) != ours.get(key)]
        if differing:
            raise InputError(
                f"{self.folder} holds a run with other settings ({'; '.join(differing)}); "
                "use another --out, the same settings to resume it, or --restart to begin anew"
            )

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def kept(self) -> str:
        """What a failure leaves, for its sentence."""
        return f"the last checkpoint in {self.folder} is untouched" if self.path.exists() else "no checkpoint was written yet"


def state_of(sweeps: Sequence[Sweep]) -> dict[str, Tensor]:
    """References to all tensors; with a number in front of the names where there are several sweeps."""
    if len(sweeps) == 1:
        return sweeps[0].state()
    return {f"{number}.{name}": tensor for number, sweep in enumerate(sweeps) for name, tensor in sweep.state().items()}
