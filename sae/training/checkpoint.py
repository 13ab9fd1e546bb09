"""A training run's checkpoint: one safetensors file, whole or absent, with all that the next step depends on."""

import json
from typing import Any

from typing_extensions import TypedDict

from sae.disk.reading import Number, parse_json, read_tensors
from sae.disk.writing import write_tensors
from sae.errors import InputError
from sae.training.config import TrainingConfig
from sae.training.sweep import Sweep

FILE = "checkpoint.safetensors"
THEN = "begin anew with --restart"


class Record(TypedDict):
    """training.json, which marks a finished run."""

    settings: dict[str, Any]
    scale: Number
    last: dict[str, Any]


def save_checkpoint(config: TrainingConfig, sweep: Sweep, step: int) -> None:
    """After `step` steps. Adam's moments and the counts are in it, and the batch order follows from seed and step."""
    tensors = {name: tensor.cpu() for name, tensor in sweep.state().items()}  # host sync
    metadata = {"step": str(step), "settings": json.dumps(config.settings())}
    write_tensors(config.out / FILE, tensors, metadata)


def restore_checkpoint(config: TrainingConfig, sweep: Sweep) -> int:
    """Brings `sweep` to the checkpoint in the run's folder and gives the number of steps done; 0 without one.

    Raises `InputError` when the folder holds a run with other settings, or a checkpoint that is damaged or has no checksum.
    """
    path = config.out / FILE
    if not path.exists():
        return 0
    tensors, metadata = read_tensors(path, "a checkpoint", then=THEN)
    if not {"crc32", "step", "settings"} <= metadata.keys():
        raise InputError(f"expected a checkpoint with a checksum at {path}, but an earlier version wrote this one; {THEN}")
    refuse_other_settings(config, parse_json(metadata["settings"], f"the settings of the checkpoint {path}", dict[str, Any]))
    step = parse_json(metadata["step"], f"the step of the checkpoint {path}", int)
    ours = {name: (tensor.dtype, tensor.shape) for name, tensor in sweep.state().items()}
    if ours != {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} or not 0 < step <= config.steps:
        raise InputError(f"expected the state of this run after 1 to {config.steps} steps in {path}, but it holds another; {THEN}")
    sweep.restore(tensors)
    return step


def refuse_other_settings(config: TrainingConfig, theirs: dict) -> None:
    """Raises `InputError` if a run that is already in the folder was started with other settings."""
    ours = json.loads(json.dumps(config.settings()))
    differing = [f"{key} {theirs.get(key)} there, {ours.get(key)} now" for key in ours | theirs if theirs.get(key) != ours.get(key)]
    if differing:
        raise InputError(
            f"{config.out} holds a run with other settings ({'; '.join(differing)}); "
            "use another --out, the same settings to resume it, or --restart to begin anew"
        )
