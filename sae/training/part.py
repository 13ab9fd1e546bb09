"""One sweep of a run: the sites that it reads and writes and their units, its folders, its logs, and its saved files.

b rows (tokens) · d width that is read · o width that is written
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.activations.source import Source
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats.saelens.files import save
from sae.dictionaries.gates import Threshold
from sae.disk.writing import write_json
from sae.encoding import METHODS, fastest
from sae.encoding.choice import TRIED_ROWS
from sae.errors import InputError
from sae.kinds import BatchTopK, name_of
from sae.kinds.batchtopk import threshold_for
from sae.mesh import ALONE, Mesh
from sae.objective import Step, Workspace, bad_rows_text, refuse_encoder, screens
from sae.objective.step import of
from sae.training.config import RunConfig
from sae.training.ends import Ends
from sae.training.metrics import MetricsLog, lines_of
from sae.training.shard import refuse_split
from sae.training.start import ROWS, change_since, opened, part_of, said, starting_point
from sae.training.sweep import Start, Sweep

OF_ONE = ("out", "seed", "init", "decoder_norm", "b_dec")
"""settings, in addition to the swept option, that may differ between the runs of one sweep"""


def together(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Groups runs that differ only in seed, start and swept option: they train as one sweep."""
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        kind = {**vars(config.kind), config.kind.swept: None}
        shared = {name: value for name, value in vars(config).items() if name not in OF_ONE}
        groups.setdefault(repr(shared | {"kind": (type(config.kind), kind)}), []).append(config)
    return list(groups.values())


class Part:
    """Dictionaries of one kind, one width and the same sites, which train together."""

    def __init__(self, configs: Sequence[RunConfig], source: Source, device: torch.device, mesh: Mesh = ALONE):
        for config in configs:
            refuse_split(config, mesh)
        self.config, self.source, self.ends = configs[0], source, Ends.of(source, configs[0])
        self.folders = [folder for config in configs for folder in config.folders()]
        self.inits = [config.init for config in configs for _ in config.folders()]
        self.scales = self.ends.scales(source)
        starts: list[Start] = []
        for config in configs:
            dictionary, own = starting_point(source, self.ends, self.scales, config, mesh.features.part(config.d_sae))
            starts += [Start(dictionary, config.seed, own)] * len(config.folders())
        config, swept = self.config, self.config.kind.swept
        kind = replace(config.kind, **{swept: tuple(value for one in configs for value in one.kind.values)})
        workspace = Workspace(config.operands(device), config.deterministic, mesh=mesh)
        self.sweep, self.mesh = Sweep(starts, kind, config.recipe(), config.backend, workspace, device), mesh
        self.logs: list[MetricsLog] = []
        self.lines: list[dict[str, Any]] = [{} for _ in self.folders]
        """the last lines of metrics"""
        self._last: tuple[Step, Tensor, Tensor | None]

    def choose_encoder(self) -> None:
        """Sets how active entries are computed: as configured, or the fastest method for such rows if kind, device and path allow a choice.

        Raises `InputError` for a method that could not be used.
        """
        sweep, config = self.sweep, self.config
        weights, own, found = sweep.weights.of(0), of(sweep.own, 0), config.encoder
        rule = sweep.kind.goal(sweep.values[0], sweep.now(0, 0)).rule(weights, own)
        if found != "auto":
            refuse_encoder(found, config.backend, [rule], weights)
        elif weights.W_enc_fd.is_cuda or config.backend not in ("auto", "sparse") or not screens(rule):
            found = "product"
        else:
            rows = {site: self.source.first_rows(site)[:TRIED_ROWS].float() for site in self.ends.sites}
            x_bd, y_bo = self.ends.pair(rows, self.scales)
            input_bd = x_bd - weights.b_dec_d if y_bo is None else x_bd
            k = rule.top if rule is not None and rule.over == "row" else 0
            found = fastest(input_bd, weights.W_enc_fd, weights.b_enc_f, rows=config.steps * config.batch_size, k=k)
            found = METHODS[int(self.mesh.every.numbers(METHODS.index(found))[0])]  # all take the one that the first found
            if found != "product":
                print(
                    f"active entries are found by {found}, measured to be the fastest here; --encoder {found} repeats this run bit for bit"
                )
        sweep.workspace.encoder_number.fill_(METHODS.index(found))

    def open_logs(self, first: int, wandb_run: Any, out: Path) -> None:
        names = ["" if folder == out else str(folder.relative_to(out)) for folder in self.folders]
        if self.mesh.leads:
            self.logs = [MetricsLog(folder, name, self.config.batch_size, first, wandb_run) for folder, name in zip(self.folders, names)]

    def step(self, batch: dict[str, Tensor], step: int) -> Step:
        """One update of all dictionaries."""
        x_bd, y_bo = self.ends.pair(batch, self.scales)
        result = self.sweep.step(x_bd, step, y_bo)
        self._last = result, x_bd, y_bo
        return result

    def resample(self, step: int) -> None:
        """Resamples dead features if that is due after this step."""
        if self.sweep.recipe.resamples_after(step, self.sweep.kind.resamples_every()):
            _, x_bd, y_bo = self._last
            for k in range(len(self.folders)):
                self.sweep.resample(x_bd, step, k, y_bo)

    def log(self, done: int) -> None:
        """Writes metrics after `done` steps; prints a line if the objective's path has changed."""
        result, x_bd, y_bo = self._last
        before, self.lines = self.lines, lines_of(self.sweep, result, x_bd if y_bo is None else y_bo, done)
        if self.mesh.leads:
            self.lines = [log.write(line, self.sweep, k) for k, (log, line) in enumerate(zip(self.logs, self.lines))]
        self.sweep.forget_counts()
        was, now = before[0], self.lines[0]
        if was and was["path"] != now["path"]:
            print(f"step {now['step']:,}: the objective went from the {was['path']} path to {now['path']} (L0 {now['l0']:.0f})")

    def refuse_runaway(self, step: int, kept: str) -> None:
        """Raises `InputError` for activations or a loss that are not finite, and for an error a hundred times the activations' power."""
        bad_steps, bad_rows_b = self.sweep.workspace.bad_steps, self.sweep.workspace.bad_rows_b
        if bad_steps is not None and bad_rows_b is not None and bad_steps > 0:  # host sync
            rows = bad_rows_text(bad_rows_b.nonzero().flatten().tolist())  # host sync
            raise InputError(f"{int(bad_steps)} batches up to step {step + 1} were not finite ({rows}); harvest them again; {kept}")
        result = self._last[0]
        loss, d = float(result.loss.sum()), self.sweep.weights.W_dec_fd.shape[-1]  # host sync
        if loss - loss != 0 or float(result.squared_error.max()) > 100 * d:  # host sync
            clip = "" if self.config.clip else " or set --clip 1"
            raise InputError(f"training diverged at step {step + 1} (loss {loss:.3g}); lower --lr{clip}; {kept}")

    def finish(self, settings: dict[str, Any]) -> None:
        """Saves the dictionaries and their training records; training.json, written last, marks each as complete."""
        for k, folder in enumerate(self.folders):
            self._finish(k, folder, settings)

    def _finish(self, k: int, folder: Path, settings: dict[str, Any]) -> None:
        sweep, ends, config, every = self.sweep, self.ends, self.config, self.mesh.every
        dictionary, value = sweep.own_part(k), sweep.values[k]
        record: dict[str, Any] = {
            "settings": json.loads(json.dumps(settings)),
            "scale": self.scales[ends.reads[0]] if len(self.scales) == 1 else self.scales,
            "encoder": sweep.workspace.encoder,
            "last": {name: number for name, number in self.lines[k].items() if name != "tokens_per_second"},
        }
        if isinstance(sweep.kind, BatchTopK):
            record["threshold"] = self._settle(dictionary, value, folder)
        dictionary.metadata = provenance(self.source.manifest, ends) | {
            "training_tokens": config.steps * config.batch_size,
            "trained": {"kind": name_of(sweep.kind), sweep.kind.swept: value},
        }
        saved = dictionary.folded(*ends.factors(self.scales))
        if (init := self.inits[k]) is not None:
            before = part_of(opened(init, self.source, ends, config), every.part(config.d_sae)).to(saved.W_dec_fo.device)
            record["since_init"] = change_since(before, saved, self.source, ends, every)
            if every.leads:
                print(f"{folder}: {said(record['since_init'])}")
        save(saved.parts(), folder, every)
        if every.leads:
            write_json(folder / "training.json", record)

    def _settle(self, dictionary: Dictionary, k: int, folder: Path) -> dict[str, Any]:
        """Sets the threshold of a BatchTopK dictionary so that k features per row are active on held-out rows; returns the record of it.

        If a source has no held-out rows, training rows are used. Thresholds are in training units.
        """
        every = self.mesh.every
        held_out, rows = self.source.rows_for_measuring(self.ends.sites)
        gate = dictionary.gate
        assert isinstance(gate, Threshold)
        assert gate.theta_f is not None
        device = gate.theta_f.device
        parts = [dict(zip(rows, chunk)) for chunk in zip(*(part.split(ROWS) for part in rows.values()))]
        chunks = [self.ends.pair({site: x_bd.to(device) for site, x_bd in part.items()}, self.scales)[0] for part in parts]
        running = float(gate.theta_f[0])
        threshold, count, active = threshold_for(dictionary, chunks, k, running, every)
        gate.theta_f.data.fill_(threshold)
        print(
            f"{folder}: a threshold of {threshold:.4g} keeps {k} a row on {count:,} {'held-out' if held_out else 'training'} rows; the "
            f"running mean, {running:.4g}, would keep {active:.1f}"
        )
        return {"running": running, "exact": threshold, "rows": count, "held_out": held_out, "l0_of_running": active}


def provenance(manifest: dict[str, Any], ends: Ends) -> dict[str, Any]:
    """A dictionary's metadata about the activations it was trained on."""
    models = ends.models(manifest)
    first = models.pop(None)
    return {
        "model_name": first["name"],
        "model_revision": first["revision"],
        "model_fingerprint": first["fingerprint"],
        **({"models": models} if models else {}),
        **ends.metadata(),
        "context_size": manifest["context"],
        "prepend_bos": manifest.get("prepend_bos"),
        "dataset": manifest["dataset"],
    }
