"""A training run's checkpoint: one safetensors file, complete or absent, with everything that the next step depends on."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from sae.disk.reading import Number, layout, parse_json, require_intact
from sae.disk.streamed import DTYPES, Streamed, in_order, write_streamed
from sae.errors import InputError
from sae.mesh import Mesh
from sae.training.config import Recipe

FILE = "checkpoint.safetensors"
THEN = "start over with --restart"


class Record(TypedDict):
    """training.json, which marks a finished run."""

    settings: dict[str, Any]
    scale: Number | dict[str, Number]
    """one for each site if there are several"""
    encoder: NotRequired[str]
    last: dict[str, Any]
    since_init: NotRequired[dict[str, Any]]


class Kept(Protocol):
    """A sweep, or a part of one."""

    recipe: Recipe
    mesh: Mesh

    def states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...

    def gather(self) -> None: ...


class Checkpoint:
    """The checkpoint of the run in `folder`; `settings` are those that decide the result."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.path, self.settings = folder, folder / FILE, settings

    def save(self, sweeps: Sequence[Kept], step: int) -> None:
        """Saves the state after `step` steps, including Adam's moments and the counts. The batch order follows from seed and step.

        All processes call it. The leader writes the whole file, which is the same for any split; no process continues before that.
        """
        mesh, (split, whole) = sweeps[0].mesh, states_of(sweeps)
        tensors = split | whole
        streamed = {
            name: Streamed(
                tensors[name].dtype,
                whole_shape(tensors[name], mesh, name in split),
                all_rows(tensors[name], mesh) if name in split else [tensors[name].cpu()],  # host sync
            )
            for name in in_order(tensors)
        }
        about = {"step": str(step), "settings": json.dumps(self.settings), "mesh": str(mesh)}
        write_streamed(self.path, streamed, about, mesh.leads)
        mesh.every.wait()

    def restore(self, sweeps: Sequence[Kept]) -> int:
        """Loads the checkpoint into `sweeps` and returns the number of steps done; 0 if there is no checkpoint.

        Each process reads its part, for any split that wrote the checkpoint; after a different split, the last digits differ. Raises
        `InputError` if the folder holds a run with other settings, if the checkpoint is damaged or has no checksum, and if only some
        processes see a checkpoint.
        """
        mesh = sweeps[0].mesh
        there = mesh.every.numbers(self.path.exists())
        if not all(there):
            if any(there):
                raise InputError(
                    f"expected {self.path} in every process, but process {there.index(0)} does not see it; use a folder that all see"
                )
            return 0
        places, metadata = layout(self.path, "a checkpoint", THEN)
        if mesh.leads:
            require_intact(self.path, "a checkpoint", THEN)
        mesh.every.wait()
        if not {"crc32", "step", "settings"} <= metadata.keys():
            raise InputError(f"expected a checkpoint with a checksum at {self.path}, but an earlier version wrote this one; {THEN}")
        self.refuse_other(parse_json(metadata["settings"], f"the settings of the checkpoint {self.path}", dict[str, Any]))
        step, steps = parse_json(metadata["step"], f"the step of the checkpoint {self.path}", int), sweeps[0].recipe.steps
        split, whole = states_of(sweeps)
        ours = {name: (DTYPES[tensor.dtype], whole_shape(tensor, mesh, name in split)) for name, tensor in (split | whole).items()}
        if ours != {name: (place.dtype, place.shape) for name, place in places.items()} or not 0 < step <= steps:
            raise InputError(f"expected the state of this run after 1 to {steps} steps in {self.path}, but it holds another; {THEN}")
        with torch.no_grad(), safe_open(self.path, "pt") as file:
            for name, tensor in split.items():
                tensor.copy_(file.get_slice(name)[:, mesh.every.part(places[name].shape[1])])
            for name, tensor in whole.items():
                tensor.copy_(file.get_tensor(name))
        for sweep in sweeps:
            sweep.gather()
        if (theirs := metadata.get("mesh", str(mesh))) != str(mesh):
            print(f"the checkpoint was written with {theirs} and continues with {mesh}: sums have another order, so last digits differ")
        return step

    def refuse_other(self, theirs: dict[str, Any]) -> None:
        """Raises `InputError` if the settings of the run in the folder, `theirs`, are other ones."""
        ours = json.loads(json.dumps(self.settings))
        differing = list(differences(theirs, ours))
        if differing:
            raise InputError(
                f"{self.folder} holds a run with other settings ({'; '.join(differing)}); "
                "use another --out, the same settings to resume it, or --restart to start over"
            )

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def kept(self) -> str:
        """The part of an error message that says what is left after a failure."""
        return f"the last checkpoint in {self.folder} is untouched" if self.path.exists() else "no checkpoint was written yet"


def differences(theirs: dict[str, Any], ours: dict[str, Any], of: str = "") -> Iterator[str]:
    """What differs between settings. The cache is compared by its content, `cache_content`, wherever it lies."""
    for key in ours | theirs:
        there, now = theirs.get(key), ours.get(key)
        if there == now or (key == "cache" and "cache_content" in theirs.keys() & ours.keys()):
            continue
        if isinstance(there, dict) and isinstance(now, dict):
            yield from differences(there, now, f"{of}{key} ")
        elif isinstance(there, dict) or isinstance(now, dict):
            yield f"{of}{key} only {'now' if there is None else 'there'}"
        else:
            yield f"{of}{key} {there} there, {now} now"


def states_of(sweeps: Sequence[Kept]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """References to all tensors, as `Sweep.states`; the names start with a number if there are several sweeps."""
    if len(sweeps) == 1:
        return sweeps[0].states()
    split, whole = (
        {f"{number}.{name}": tensor for number, sweep in enumerate(sweeps) for name, tensor in sweep.states()[which].items()}
        for which in (0, 1)
    )
    return split, whole


def whole_shape(tensor: Tensor, mesh: Mesh, split: bool) -> tuple[int, ...]:
    k_and_features = (tensor.shape[0], tensor.shape[1] * mesh.every.size) if split else ()
    return *k_and_features, *tensor.shape[len(k_and_features) :]


def all_rows(tensor_kf: Tensor, mesh: Mesh) -> Iterator[Tensor]:
    """Yields, in the leader, each dictionary's tensor with the features of all processes."""
    for tensor_f in tensor_kf:
        yield from mesh.every.to_first(tensor_f)
