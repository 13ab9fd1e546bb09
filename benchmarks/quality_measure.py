"""What is measured of each dictionary of quality.py, and our own trainer's side of it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from sae.activations.cache import ActivationCache
from sae.dictionaries.dictionary import Dictionary
from sae.disk.writing import write_json
from sae.evaluation.evaluate import reconstruct
from sae.evaluation.language_model_loss import ARMS, Sums, batch_sums, batches, padded, summarise
from sae.evaluation.settings import EvaluationConfig, held_out_text
from sae.evaluation.splice import Splice
from sae.kinds import KINDS
from sae.training import TrainingConfig, train


class Measure:
    """Of a folder: L0, FVU, dead and dense features over held-out rows; loss recovered over held-out sequences."""

    def __init__(self, cache: ActivationCache, rows: int, sequences: int):
        self.cache, self.rows = cache, rows
        self.text = None
        self.sums_sc: np.ndarray | None = None
        if sequences:
            config = EvaluationConfig(dictionary="", cache=cache.folder, sequences=sequences)
            self.text = held_out_text(config, cache, torch.device("cpu"))

    def __call__(self, folder: Path) -> dict[str, Any]:
        dictionary = Dictionary.load(folder)
        found = reconstruct(dictionary, self.cache, self.rows, encoder="product")
        r = found.massive.without if found.massive else found.of_all
        firing_f = r.density_f[r.density_f > 0]
        numbers = {
            "l0": r.l0,
            "fvu": r.fvu,
            "dead": r.dead,
            "dense": r.dense,
            "median_density": float(firing_f.median()) if len(firing_f) else 0.0,
            "norm_ratio": r.norm_ratio,
        }
        if self.text is not None:
            dictionary.metadata["site"] = self.cache.site
            numbers |= self.loss_recovered(dictionary, r.mean_d)
        return numbers

    @torch.no_grad()
    def loss_recovered(self, dictionary: Dictionary, mean_d: torch.Tensor) -> dict[str, Any]:
        """Against zero and against the mean activation, with bootstrap intervals over sequences."""
        assert self.text is not None
        rows = list(batches(self.text.lm, self.text.sequences, self.text.replaced, 8))
        if self.sums_sc is None:  # clean, zero and mean are the same for all dictionaries
            sums = [batch_sums(self.text.lm, [dictionary], some, {self.cache.site: mean_d}) for some in rows]
            self.sums_sc = np.concatenate(sums)
        else:
            spliced_s = np.concatenate([self.spliced(dictionary, some) for some in rows])
            Sums.of(self.sums_sc).cross_entropy[:, ARMS.index("spliced")] = spliced_s
        loss = summarise(self.sums_sc, 0)
        return {
            "loss_recovered": loss.loss_recovered,
            "loss_recovered_interval": list(loss.loss_recovered_interval),
            "loss_recovered_mean": loss.loss_recovered_mean,
        }

    def spliced(self, dictionary: Dictionary, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Cross-entropy with the dictionary spliced in, summed over each sequence's next tokens."""
        assert self.text is not None
        ids_sp, mask_sp, replaced_sp = padded(rows)
        splice = Splice([dictionary], lambda site, x_spd, y_spd: torch.where(replaced_sp[..., None], y_spd, x_spd))
        with self.text.lm.edited(splice.edits):
            logits_spv = self.text.lm.logits(ids_sp, mask_sp)[:, :-1]
        loss_sp = cross_entropy(logits_spv.float().transpose(1, 2), ids_sp[:, 1:], reduction="none")
        return (loss_sp * mask_sp[:, 1:]).double().sum(1).numpy()


def train_ours(cache: Path, site: str, point: dict[str, Any]) -> None:
    """One dictionary by our trainer, with its own defaults but for what all tools share; the seconds of the whole run beside it."""
    kind, value, d_sae = KINDS[point["kind"]], point["sparsity"], point["d_sae"]
    swept = kind().swept
    prefixes = {"prefixes": (d_sae // 16, d_sae // 4, d_sae)} if point["kind"] == "matryoshka" else {}
    made = kind(**{swept: (int(value) if swept == "k" else value,)}, **prefixes)
    shared = {name: point[name] for name in ("d_sae", "steps", "batch_size", "dead_steps", "lr", "seed")}
    start = time.monotonic()
    train(TrainingConfig(cache=cache, reads=(site,), out=Path(point["folder"]), kind=made, device="cpu", **shared))
    write_json(Path(point["folder"]) / "seconds.json", {"seconds": time.monotonic() - start, "lr": point["lr"]})
