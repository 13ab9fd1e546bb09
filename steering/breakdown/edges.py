"""Which parts of a model carry the damage that steering does: conductance along the coefficient, from 0 to c, part by part.

The unsteered pass is one end of the path, the pass steered at c the other; the metric is the KL of the predictions to the unsteered ones.
The vector is one more writer. All changes of the predictions are written to the stream before the logits read it, so the shares
of all writers at the logits add up to the KL, up to the error of the finite steps of the path: see `sum`.

s sequences · p positions · v vocabulary · r readers · w writers · x the data and rounds of a bootstrap
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError
from sae.statistics import data_and_resamples, estimate
from steering.breakdown.sweep import Setup
from steering.circuits.finding.scores import conductance
from steering.circuits.model_graph.engine import Engine
from steering.intervention import steered

STEPS = 6
SHOWN = 10
"""number of writers and edges that are shown"""
VECTOR = "vector"
"""takes the place of "embed", which the coefficient does not change"""
HELD_BYTES = 1 << 28
"""limit for the output of all writers; more texts are processed in turns"""


def damage_by_edge(setup: Setup, coefficient: float, steps: int = STEPS) -> dict[str, Any]:
    """Shares of the KL at the coefficient, as plain values: every writer's, the largest first, and those of the largest edges.

    A writer's "value" is what it writes straight to the logits, with an interval over texts; they add up to "sum". Its "through" is what it
    writes to any reader, so a change that passes five parts in a row counts five times. Raises `InputError`, with the reason, for a model
    that the graph does not describe, and for a coefficient that does not change the predictions.
    """
    engine = Engine(setup.lm)
    graph = engine.graph
    score_srw, kl_s = _scores(engine, setup, coefficient, steps)
    kl, score_rw, names = float(kl_s.mean()), score_srw.mean(0), (VECTOR, *graph.writers[1:])
    if not kl > 0:
        raise InputError(
            f"expected a coefficient that changes the predictions, got {coefficient:g} with a KL of {kl:g} nat; take a larger one"
        )
    share_rw, through_w = score_rw / kl, score_rw.sum(0) / kl
    weight_xs = data_and_resamples(len(kl_s), np.random.default_rng(0))
    direct_xw = (weight_xs @ score_srw[:, -1].numpy()) / (weight_xs @ kl_s.numpy())[:, None]
    writers = [
        {"writer": name, **estimate(direct_xw[:, w]), "through": float(through_w[w])}
        for w, name in enumerate(names)
        if score_rw[:, w].any()
    ]
    largest = [divmod(at, len(names)) for at in score_rw.abs().flatten().topk(SHOWN).indices.tolist()]
    first = graph.first_behind(setup.vector.site)
    across = [float(share_rw[cut_rw].sum()) for cut_rw in graph.cuts().values() if not cut_rw[:first].any()]
    return {
        "coefficient": coefficient,
        "rho": coefficient * setup.rho_of_1,
        "kl": kl,
        "steps": steps,
        "sum": float(share_rw[-1].sum()),
        "least_across": min(across),
        "most_across": max(across),
        "heads": float(share_rw[-1, [name.startswith("head.") for name in names]].sum()),
        "mlps": float(share_rw[-1, [name.startswith("mlp.") for name in names]].sum()),
        "writers": sorted(writers, key=lambda one: -abs(one["value"])),
        "edges": [{"edge": f"{names[w]}->{graph.readers[r]}", "share": float(share_rw[r, w])} for r, w in largest if score_rw[r, w]],
    }


def _scores(engine: Engine, setup: Setup, coefficient: float, steps: int) -> tuple[Tensor, Tensor]:
    """Of each text, [s, r, w], and its KL at the coefficient, [s]; float64 on the CPU."""
    lm, vector = setup.lm, setup.vector

    def at(share: float) -> AbstractContextManager[None]:
        return steered(lm, [(vector, share * coefficient)])

    a_text = len(engine.graph.writers) * setup.ids_sp.shape[1] * lm.d_model * lm.dtype.itemsize
    parts = []
    for ids_sp, mask_sp in zip(*(x.split(max(1, HELD_BYTES // a_text)) for x in (setup.ids_sp, setup.mask_sp)), strict=True):
        with torch.no_grad():
            metric = kl_to(lm.logits(ids_sp, mask_sp), mask_sp)
        parts.append(conductance(engine, ids_sp, mask_sp, at, metric, steps, vector.site))
    score_srw, kl_s = (torch.cat(found).double().cpu() for found in zip(*((part.score_srw, part.corrupt_s) for part in parts), strict=True))
    return score_srw, kl_s


def kl_to(logits_spv: Tensor, mask_sp: Tensor) -> Callable[[Tensor], Tensor]:
    """The mean KL of each sequence, [s], of other logits from these, over its real positions."""
    wide = torch.promote_types(logits_spv.dtype, torch.float32)
    log_p_spv, real_sp = logits_spv.to(wide).log_softmax(-1), mask_sp.to(logits_spv.device, wide)

    def kl(other_spv: Tensor) -> Tensor:
        kl_sp = (log_p_spv.exp() * (log_p_spv - other_spv.to(log_p_spv).log_softmax(-1))).sum(-1)
        return (kl_sp * real_sp).sum(1) / real_sp.sum(1)

    return kl
