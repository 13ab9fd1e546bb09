"""First-hop scores: the exact effect of cutting an edge on its own reader, and from there on an estimate by the gradient.

score = [f_r(x_r + Δ_u) − f_r(x_r)] · ∂m/∂f_r

f_r is the reader's own module on its input: for a head's query, key or value the norm, the projection, the rotation, the softmax and the
mixing, up to that head's output before the output projection; for an MLP its norm and the MLP; for the logits everything that follows,
which makes those edges exact. It captures a saturated softmax, which a gradient at the reader's input misses; it misses saturation after
the reader. AtP* (arXiv 2403.00745) does this for queries and keys of single nodes.

s sequences · p positions · d width of the stream · v vocabulary · n some writers · h heads · z width of a head · r readers · w writers
"""

from functools import partial

import torch
from torch import Tensor

from sae.errors import InputError
from steering.circuits.model_graph.engine import Engine, Metric
from steering.circuits.model_graph.graph import HEAD_INPUTS

BATCH = 64
"""sequences of a pass: prompts times writers"""


def first_hop(engine: Engine, ids_sp: Tensor, mask_sp: Tensor | None, metric: Metric, change_wspd: Tensor) -> Tensor:
    """Scores [s, r, w] of what writers write more in the corrupt run, `change_wspd`, [w, s, p, d].

    A block is run alone, on the stream plus one writer's change, with two of queries, keys and values held at the clean run's: heads do not
    see one another there, so three passes of it serve all of its heads. About one forward pass for each writer. Raises `InputError` for
    a model whose blocks cannot be run alone.
    """
    graph = engine.graph
    if not engine.restarts:
        raise InputError(f"expected a model whose blocks can be run alone for first-hop, got {engine.lm.name!r}; take another method")
    gradients = _gradients(engine, ids_sp, mask_sp, metric)
    score_srw = torch.zeros(
        len(ids_sp), *graph.exists_rw.shape, dtype=torch.promote_types(change_wspd.dtype, torch.float32), device=change_wspd.device
    )
    stream_spd = engine.lm.record(ids_sp, ["resid_pre.0"], mask_sp)["resid_pre.0"]
    for layer in range(graph.n_layers):
        block, mlp_in, seen = _BlockAlone(engine, layer, ids_sp, mask_sp, stream_spd), graph.mlp_in(layer), graph.heads(layer).start
        gradient = {site: gradients[f"{site}.{layer}"] for site in ("head_out", "mlp_out")}
        for writers in _parts(range(seen), len(ids_sp)):
            for kind in HEAD_INPUTS:
                sites = ["head_out", "mlp_out"] if kind == "v" else ["head_out"]
                found = block.changes(change_wspd[writers], kind, sites)
                product_nsph = (found["head_out"] * gradient["head_out"]).unflatten(-1, (graph.n_heads, -1)).sum(-1)
                score_srw[:, graph.head_inputs(kind, layer), writers] = product_nsph.sum(2).permute(1, 2, 0).to(score_srw)
            score_srw[:, mlp_in, writers] = (found["mlp_out"] * gradient["mlp_out"]).sum((2, 3)).T.to(score_srw)
        for writers in _parts(range(seen, int(graph.seen_r[mlp_in])), len(ids_sp)):  # its own heads
            (change_nspd,) = block.changes(change_wspd[writers], "v", ["mlp_out"]).values()
            score_srw[:, mlp_in, writers] = (change_nspd * gradient["mlp_out"]).sum((2, 3)).T.to(score_srw)
        stream_spd = block.stream_behind_spd
    score_srw[:, -1] = _of_logits(engine, ids_sp, mask_sp, metric, stream_spd, change_wspd).T.to(score_srw)
    return score_srw


class _BlockAlone:
    """One block on the clean run's stream plus something."""

    def __init__(self, engine: Engine, layer: int, ids_sp: Tensor, mask_sp: Tensor | None, stream_spd: Tensor):
        self._engine, self._layer, self._prompts, self._stream_spd = engine, layer, (ids_sp, mask_sp), stream_spd
        kinds = (*HEAD_INPUTS, "head_out", "attn_out", "mlp_out", "resid_post")
        with engine.begun_at(layer, stream_spd):
            clean = engine.lm.record(ids_sp, [f"{kind}.{layer}" for kind in kinds], mask_sp)
        self._clean = {kind: clean[f"{kind}.{layer}"] for kind in kinds}
        self.stream_behind_spd = self._clean.pop("resid_post")

    def changes(self, change_nspd: Tensor, kind: str, sites: list[str]) -> dict[str, Tensor]:
        """The change of the values at `sites`, each [n, s, p, width]; the heads' outputs if only "q", "k" or "v", `kind`, reads the change.

        The MLP reads the stream with the change and the attention's output of the clean run.
        """
        n, layer, lm = len(change_nspd), self._layer, self._engine.lm
        held = [one for one in (*HEAD_INPUTS, "attn_out") if one != kind]
        edits = {f"{one}.{layer}": partial(_held, self._clean[one].repeat(n, 1, 1)) for one in held}
        ids, mask = _repeated(self._prompts, n)
        with self._engine.begun_at(layer, (self._stream_spd + change_nspd).flatten(0, 1)), lm.edited(edits):
            found = lm.record(ids, [f"{site}.{layer}" for site in sites], mask)
        return {site: found[f"{site}.{layer}"].unflatten(0, (n, -1)) - self._clean[site] for site in sites}


def _held(clean: Tensor, _now: Tensor) -> Tensor:
    return clean


def _with_gradient(embedding_spd: Tensor) -> Tensor:
    return embedding_spd.detach().clone().requires_grad_().clone()


def _gradients(engine: Engine, ids_sp: Tensor, mask_sp: Tensor | None, metric: Metric) -> dict[str, Tensor]:
    """The metric's gradients with respect to the outputs of every block's heads and MLP, by site."""
    seen: dict[str, Tensor] = {}

    def keep(site: str, value: Tensor) -> Tensor:
        seen[site] = value.view_as(value)
        return seen[site]

    sites = [f"{kind}.{layer}" for layer in range(engine.graph.n_layers) for kind in ("head_out", "mlp_out")]
    edits = {site: partial(keep, site) for site in sites}
    with torch.enable_grad(), engine.lm.edited({"resid_pre.0": _with_gradient}), engine.lm.edited(edits):
        total = metric(engine.lm.logits(ids_sp, mask_sp)).sum()
        found = torch.autograd.grad(total, [seen[site] for site in sites], materialize_grads=True)
    return dict(zip(sites, found, strict=True))


@torch.no_grad()
def _of_logits(engine: Engine, ids_sp: Tensor, mask_sp: Tensor | None, metric: Metric, stream_spd: Tensor, change_wspd: Tensor) -> Tensor:
    """[w, s], by the metric itself."""

    def metric_of(stream_nspd: Tensor) -> list[Tensor]:
        ids, mask = _repeated((ids_sp, mask_sp), len(stream_nspd))
        with engine.begun_at(engine.graph.n_layers, stream_nspd.flatten(0, 1)):
            logits_nspv = engine.lm.logits(ids, mask).unflatten(0, (len(stream_nspd), -1))
        return [metric(logits_spv) for logits_spv in logits_nspv]

    (clean_s,) = metric_of(stream_spd[None])
    parts = _parts(range(len(change_wspd)), len(ids_sp))
    return torch.stack([metric_s - clean_s for part in parts for metric_s in metric_of(stream_spd + change_wspd[part])])


def _repeated(prompts: tuple[Tensor, Tensor | None], n: int) -> tuple[Tensor, Tensor | None]:
    ids_sp, mask_sp = prompts
    return ids_sp.repeat(n, 1), None if mask_sp is None else mask_sp.repeat(n, 1)


def _parts(writers: range, sequences: int) -> list[slice]:
    """Groups of as many as fit into a pass."""
    together = max(1, BATCH // sequences)
    return [slice(first, min(first + together, writers.stop)) for first in range(writers.start, writers.stop, together)]
