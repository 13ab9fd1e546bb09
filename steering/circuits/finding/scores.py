"""How much every edge of a model matters: estimates of what cutting it alone would do to a metric, from a few passes with gradients.

`conductance` follows any path of passes; `edge_scores` is the methods for pairs of prompts. A score is how much the metric would rise if
the edge alone carried what it carries in the corrupt run.

s sequences · p positions · d width of the stream · x positions times width · n some readers · r readers · w writers
k spans of positions
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sae.errors import InputError
from steering.circuits.finding.first_hop import first_hop
from steering.circuits.model_graph.engine import Engine, Gradient, Metric, Run
from steering.circuits.model_graph.graph import Graph
from steering.circuits.model_graph.hooking import Latest
from steering.circuits.model_graph.rules import RULES_OF

METHODS = ("ceap", "eap", "eap-ig", "clean-corrupted", "relp", "gim", "first-hop")
STEPS = 5
STREAM = "resid_pre.0"

Path: TypeAlias = Callable[[float], AbstractContextManager[None]]
"""returns the context in which passes are those at a point between 0, clean, and 1, corrupt"""


class Scores(NamedTuple):
    score_srw: Tensor
    """of each sequence: its own metric's rise; 0 where there is no edge"""
    clean_s: Tensor
    """the metric"""
    corrupt_s: Tensor
    """the metric of the corrupt run; NaN if there is none"""
    span_srwk: Tensor | None = None
    """the part of a score from each span of positions, if spans were given"""


def edge_scores(
    engine: Engine,
    clean_sp: Tensor,
    corrupt: Tensor,
    metric: Metric,
    mask_sp: Tensor | None = None,
    *,
    method: str = "ceap",
    steps: int = STEPS,
    spans_sp: Tensor | None = None,
) -> Scores:
    """Of pairs of prompts, whose tokens stand at the same positions.

    `corrupt` are the corrupt prompts' ids [s, p] (resample ablation), or what each writer writes instead, [w, s or 1, p or 1, d], from
    `engine.mean_writers` or `engine.zero_writers`.

    | method | score of an edge, Δ being what its writer writes more in the corrupt run | forward | backward |
    |---|---|---|---|
    | `eap` | Δ · gradient at the clean run | 3 | 1 |
    | `relp`, `gim` | Δ · gradient at the clean run under their rules, `steering.circuits.model_graph.rules.RULES_OF` | 3 | 1 |
    | `clean-corrupted` | Δ · mean of the gradients at both runs | 4 | 2 |
    | `eap-ig` | Δ · mean of the gradients on the line from the corrupt embedding to the clean one, its end left out | 2 + steps | steps |
    | `ceap` | conductance on that line: scores across any cut add up to the metric's change | 1 + 2 · steps | steps |
    | `first-hop` | the reader's own module run on its changed input, by the gradient from there on: module `first_hop` | about w | 1 |

    Under `relp` edges into queries and keys score 0, since its patterns are constant. Held are three times what all writers write,
    [w, s, p, d]. With `spans_sp`, the number of each position's span from 0 on and -1 for positions of none, each score is also given by
    span: a writer's change is read where it is written, so every position has its own part, and the parts add up to the score. Spans 0 to
    p - 1 give every position.

    Raises `InputError` for a method that is none of these, for prompts of different shapes, for `ceap` and `clean-corrupted` without a
    corrupt run, for `relp` and `gim` in a model whose MLPs, norms or attention their rules cannot change, for `first-hop` in one whose
    blocks cannot be run alone, for spans of another shape, and for spans with `first-hop`, which changes all positions at once.
    """
    is_run = not corrupt.is_floating_point()
    _check(engine, clean_sp, corrupt, method, steps)
    _check_spans(clean_sp, spans_sp, method)
    if method == "ceap":
        clean_spd, corrupt_spd = (engine.lm.record(ids_sp, [STREAM], mask_sp)[STREAM] for ids_sp in (clean_sp, corrupt))
        return conductance(engine, clean_sp, mask_sp, _between(engine, clean_spd, corrupt_spd), metric, steps, spans_sp=spans_sp)
    clean = engine.run(clean_sp, mask_sp)
    clean_s, corrupt_s = metric(clean.logits_spv), torch.full((len(clean_sp),), torch.nan)
    stands_in_wspd = corrupt.to(clean.written_wspd)
    if is_run:
        corrupted = engine.run(corrupt, mask_sp)
        corrupt_s, stands_in_wspd = metric(corrupted.logits_spv), corrupted.written_wspd
    change_wspd = stands_in_wspd - clean.written_wspd
    if method == "first-hop":
        return Scores(first_hop(engine, clean_sp, mask_sp, metric, change_wspd), clean_s, corrupt_s)
    at = _between(engine, clean.written_wspd[0].clone(), stands_in_wspd[0].clone())
    del clean, stands_in_wspd
    points = {"clean-corrupted": [0.0, 1.0], "eap-ig": [1 - step / steps for step in range(steps)]}.get(method, [0.0])
    total = _Sums(engine, change_wspd, spans_sp)
    for point in points:
        with at(point):
            _, gradients = engine.gradients(clean_sp, mask_sp, metric, rules=RULES_OF.get(method, ()))
            total.add(gradients, change_wspd)
    by_span = None if total.span_srwk is None else total.span_srwk / len(points)
    return Scores(total.score_srw / len(points), clean_s, corrupt_s, by_span)


def conductance(
    engine: Engine,
    ids_sp: Tensor,
    mask_sp: Tensor | None,
    at: Path,
    metric: Metric,
    steps: int = STEPS,
    site: str | None = None,
    spans_sp: Tensor | None = None,
) -> Scores:
    """Σ over steps of (what a writer writes at the step's end − at its beginning) · the gradient in its middle.

    The more steps, the nearer are the scores' sums across any of the graph's `cuts` to the metric's change from one end of the path to the
    other. With `site`, passes of the path differ by what is edited there, a place of the residual stream, instead of by their embeddings:
    then what the edit adds has the place of "embed", for the readers after it. Held are three times what all writers write.
    """
    first_reader = 0 if site is None else engine.graph.first_behind(site)
    first_layer = engine.graph.block_of(first_reader)
    run = _run_at(engine, ids_sp, mask_sp, at(0.0), site)
    clean_s, total = metric(run.logits_spv), _Sums(engine, run.written_wspd, spans_sp)
    for step in range(steps):
        before_wspd, run = run.written_wspd, _run_at(engine, ids_sp, mask_sp, at((step + 1) / steps), site)
        with at((step + 0.5) / steps):
            _, gradients = engine.gradients(ids_sp, mask_sp, metric, first_layer)
            total.add(gradients, run.written_wspd - before_wspd)
    for sums in (total.score_srw, total.span_srwk):
        if sums is not None:
            sums[:, :first_reader] = 0
    return Scores(total.score_srw, clean_s, metric(run.logits_spv), total.span_srwk)


def _run_at(engine: Engine, ids_sp: Tensor, mask_sp: Tensor | None, point: AbstractContextManager[None], site: str | None) -> Run:
    """The pass at a point of the path; with `site`, what is added there has the place of the embedding."""
    if site is None:
        with point:
            return engine.run(ids_sp, mask_sp)
    before, after = Latest(), Latest()
    with engine.lm.edited({site: before.unchanged}), point, engine.lm.edited({site: after.unchanged}):
        run = engine.run(ids_sp, mask_sp)
    run.written_wspd[0] = after.value - before.value
    return run


def completeness(graph: Graph, score_rw: Tensor, change: float) -> dict[str, float]:
    """The sum of the scores across each cut of the graph over the metric's change: 1 if they account for all of it."""
    return {place: float(score_rw.cpu()[across_rw].sum()) / change for place, across_rw in graph.cuts().items()}


class _Sums:
    """Of products of gradients and changes."""

    def __init__(self, engine: Engine, written_wspd: Tensor, spans_sp: Tensor | None):
        self._graph, self._spans_sp = engine.graph, spans_sp
        dtype, shape = torch.promote_types(written_wspd.dtype, torch.float32), (written_wspd.shape[1], *engine.graph.exists_rw.shape)
        self.score_srw = torch.zeros(shape, dtype=dtype, device=written_wspd.device)
        spans = 0 if spans_sp is None else int(spans_sp.max()) + 1  # host sync
        self.span_srwk = self.score_srw.new_zeros(*shape, spans) if spans else None

    def add(self, gradients: Iterable[Gradient], change_wspd: Tensor) -> None:
        for readers, gradient_nspd in gradients:
            seen = int(self._graph.seen_r[readers.start])
            # views, which bmm takes as they are; einsum would copy all writers for every place that is read
            gradient_snx, change_sxw = gradient_nspd.flatten(2).transpose(0, 1), change_wspd[:seen].flatten(2).permute(1, 2, 0)
            self.score_srw[:, readers, :seen] += torch.bmm(gradient_snx, change_sxw)
            if self.span_srwk is not None and self._spans_sp is not None:
                product_spnw = torch.einsum("nspd,wspd->spnw", gradient_nspd, change_wspd[:seen])
                for span in range(self.span_srwk.shape[-1]):
                    inside_sp11 = (self._spans_sp == span)[..., None, None].to(product_spnw.device)
                    self.span_srwk[:, readers, :seen, span] += (product_spnw * inside_sp11).sum(1)


def _between(engine: Engine, clean_spd: Tensor, corrupt_spd: Tensor) -> Path:
    """The line from one input of block 0 to another; at its ends it equals those inputs to the bit."""

    def at(share: float) -> AbstractContextManager[None]:
        return engine.lm.edited({STREAM: lambda _: torch.lerp(clean_spd, corrupt_spd.expand_as(clean_spd), share)})

    return at


def _check_spans(clean_sp: Tensor, spans_sp: Tensor | None, method: str) -> None:
    if spans_sp is None:
        return
    if method == "first-hop":
        raise InputError("expected a method that adds up over positions for scores by span, got first-hop; take another or leave spans out")
    if spans_sp.shape != clean_sp.shape or spans_sp.is_floating_point() or not (spans_sp >= 0).any():
        raise InputError(
            f"expected the number of each position's span, of the prompts' shape {tuple(clean_sp.shape)} and some from 0 on, got "
            f"{spans_sp.dtype} of shape {tuple(spans_sp.shape)}"
        )


def _check(engine: Engine, clean_sp: Tensor, corrupt: Tensor, method: str, steps: int) -> None:
    if method not in METHODS:
        raise InputError(f"expected one of the methods {', '.join(METHODS)}, got {method!r}")
    if steps < 1:
        raise InputError(f"expected at least one step, got {steps}")
    if corrupt.is_floating_point():
        if method in ("ceap", "clean-corrupted"):
            raise InputError(f"expected corrupt prompts for {method}, which needs their run, got values of the writers; take eap or eap-ig")
        if corrupt.ndim != 4 or len(corrupt) != len(engine.graph.writers):
            raise InputError(f"expected values of {len(engine.graph.writers)} writers [w, s, p, d], got shape {tuple(corrupt.shape)}")
    elif corrupt.shape != clean_sp.shape:
        raise InputError(
            f"expected corrupt prompts of the clean ones' shape {tuple(clean_sp.shape)}, got {tuple(corrupt.shape)}; pair equal lengths"
        )
