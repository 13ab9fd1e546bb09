"""One direction at several strengths in every arm: the predictions, the stream, the norms, attention and the text.

s texts · p positions · n tokens · d width · v vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.features.index.lens import folded_unembedding
from sae.model.language_model import LanguageModel, NonFiniteLogits
from sae.model.resumed import Resumed
from sae.model.sampling import Sampling
from sae.model.sites import parse_site
from sae.statistics import Estimate, data_and_resamples, estimate
from steering.breakdown.arms import Arm, applied
from steering.breakdown.diagnostics import (
    LogitChange,
    Neutral,
    Null,
    attention_kl,
    attention_masses,
    dictionary_change,
    effective_rank,
    fit_neutral,
    isotropic_null,
    kl_slopes,
    lens_sharpness,
    logit_change,
    mahalanobis,
    norm_gain,
    rho,
    stream_change,
    token_share,
    write_change,
)
from steering.breakdown.findings import WALL
from steering.circuits.model_graph.frozen import PARTS, Internals, internals
from steering.strength.calibration import coefficient_for_kl, encode_cut, typical_norm
from steering.strength.measure import continuation_loss, distinct_2, first_repeated_step, until_end
from steering.vector import SteeringVector

NO_NULL = Null(*[float("nan")] * 3)  # of a vector that is not added at every position
MOST = 30.0  # times the largest rho of the grid that is tried to find an arm's wall
INSIDE = ("added", "front")  # arms whose passes are looked into; of the others only the predictions are measured


class Setup(NamedTuple):
    """Shared data for the measurements of all arms."""

    lm: LanguageModel
    vector: SteeringVector
    ids_sp: Tensor
    mask_sp: Tensor
    parts: tuple[str, ...]
    """parts that can be frozen, and so observed"""
    norm: float
    """typical norm of the stream at the site"""
    rho_of_1: float
    """rho of coefficient 1; for several directions, that of the longest"""
    lens_v: Tensor
    """what the vector, or its longest direction, adds to the logits when it is read as the final stream"""
    neutral: dict[str, Neutral]
    """of the stream, by site, on other texts"""
    dictionary: Dictionary | None = None
    feature: int | None = None
    resumed: Resumed | None = None
    """the texts, for passes that start at the vector's block"""

    @property
    def everywhere(self) -> bool:
        """whether the vector is one direction, which is added at every position"""
        return self.vector.directions[self.vector.site].ndim == 1


class Pass(NamedTuple):
    logits_spv: Tensor
    values: dict[str, Tensor]
    inner: Internals
    spreads: dict[str, dict[str, float]]
    """by site, how different its tokens are; measured once"""

    def spread(self, site: str, chosen_sp: Tensor) -> dict[str, float]:
        if site not in self.spreads:
            x_nd = self.values[site][chosen_sp]
            self.spreads[site] = {"token_share": token_share(x_nd), "effective_rank": effective_rank(x_nd)}
        return self.spreads[site]


def make_setup(
    lm: LanguageModel,
    vector: SteeringVector,
    texts: Sequence[str],
    others: Sequence[str],
    arms: Sequence[Arm],
    dictionary: Dictionary | None = None,
    feature: int | None = None,
) -> Setup:
    """Measured on `texts`; distances are those to the stream on `others`.

    Raises `InputError` for a zero vector, for empty texts, and for directions of more positions than a text has.
    """
    ids_sp, mask_sp = encode_cut(lm, texts)
    site = vector.site
    norm = typical_norm(lm.record(ids_sp, [site], mask_sp)[site][_behind_first(lm, mask_sp)])
    streams, (other_sp, other_mask_sp) = _streams(lm, site), encode_cut(lm, others)
    recorded = lm.record(other_sp, streams, other_mask_sp)
    neutral = {stream: fit_neutral(recorded[stream][_behind_first(lm, other_mask_sp)]) for stream in streams}
    parts = tuple(part for part in PARTS if any(part in arm.frozen for arm in arms))
    setup = Setup(lm, vector, ids_sp, mask_sp, parts, norm, 0.0, torch.empty(0), neutral, dictionary, feature)
    return with_vector(setup, vector)


def with_vector(setup: Setup, vector: SteeringVector) -> Setup:
    """The same for another vector at the site. Raises `InputError` for a zero one, and for directions of more positions than a text has."""
    rows = vector.directions[vector.site].reshape(-1, setup.lm.width(vector.site))
    if len(rows) > (shortest := int(setup.mask_sp.sum(1).min())):  # host sync
        raise InputError(
            f"expected directions for at most {shortest} positions, as many as the shortest text has tokens, got {len(rows)}; "
            "give shorter prompts"
        )
    longest_d = rows[rows.norm(dim=-1).argmax()]
    W_U_vd, _ = folded_unembedding(setup.lm)
    return setup._replace(vector=vector, rho_of_1=rho(1.0, longest_d, setup.norm), lens_v=W_U_vd @ longest_d.to(W_U_vd))


def _behind_first(lm: LanguageModel, mask_sp: Tensor) -> Tensor:
    return mask_sp.bool() & (mask_sp.cumsum(1) > (lm.bos_id is not None))


def _streams(lm: LanguageModel, site: str) -> list[str]:
    return [f"resid_post.{layer}" for layer in range(parse_site(site).layer, lm.n_layers)]


@torch.no_grad()
def run_pass(setup: Setup, sites: Sequence[str] = (), arm: Arm | None = None, c: float = 0.0, at: Internals | None = None) -> Pass:
    """A pass of the unsteered model, or of an arm at a coefficient, with the parts of `at` if the arm freezes any."""
    lm, values = setup.lm, dict[str, Tensor]()

    def keeping(site: str) -> Callable[[Tensor], Tensor]:
        return lambda value: values.setdefault(site, value)

    with ExitStack() as stack:
        if arm is not None:
            stack.enter_context(applied(lm, arm, c, at or Internals(), setup.ids_sp.shape[1]))
        # every pass runs the same attention code, so that coefficient 0 changes no bit
        inner = stack.enter_context(internals(lm, setup.parts)) if setup.parts else Internals()
        stack.enter_context(lm.edited({site: keeping(site) for site in sites}))
        return Pass(lm.logits(setup.ids_sp, setup.mask_sp) if setup.resumed is None else setup.resumed.logits(), values, inner, {})


def changes_of_texts(setup: Setup, before: Pass, after: Pass) -> list[LogitChange]:
    """One for each text."""
    rows = zip(before.logits_spv, after.logits_spv, setup.mask_sp.bool())
    return [logit_change(one_pv[real_p], other_pv[real_p], setup.lens_v) for one_pv, other_pv, real_p in rows]


def first_norm(lm: LanguageModel, site: str) -> str | None:
    """The site right after the first norm that reads the stream from `site` on; None if only the final norm does, or it is unclear."""
    kind, layer = parse_site(site)
    found = {"resid_pre": f"attn_in.{layer}", "resid_mid": f"mlp_in.{layer}", "resid_post": f"attn_in.{layer + 1}"}[kind]
    return found if found in lm.sites() else None


def sites_inside(setup: Setup) -> list[str]:
    layers = range(parse_site(setup.vector.site).layer, setup.lm.n_layers)
    wanted = [f"{kind}.{layer}" for layer in layers for kind in ("attn_in", "attn_out", "mlp_in", "mlp_out", "resid_post")]
    return sorted({*wanted, setup.vector.site} & set(setup.lm.sites()))


def inside(setup: Setup, before: Pass, after: Pass, arm: Arm, c: float) -> dict[str, Any]:
    """Every diagnostic of one steered pass, layer by layer from the vector's on, as plain values."""
    real_sp = setup.mask_sp.bool()
    number_sp = real_sp.cumsum(1) - 1
    first_sp = real_sp & (number_sp == 0)
    added = c * setup.vector.directions[setup.vector.site].to(setup.lm.device)
    if added.ndim == 2:
        padded_pd = torch.nn.functional.pad(added, (0, 0, 0, real_sp.shape[1]))
        added = padded_pd[number_sp.clamp_min(0)]  # [s, p, d]
        steered_sp = real_sp & (added != 0).any(-1)
    elif arm.positions == "all":
        steered_sp = real_sp
    else:
        steered_sp = real_sp & torch.isin(number_sp, torch.tensor(arm.positions).to(number_sp))
    classes = {"first": first_sp, "steered": steered_sp & ~first_sp, "later": real_sp & ~steered_sp & ~first_sp}
    behind_sp, layers = real_sp & ~first_sp, []

    def v_of(chosen_sp: Tensor) -> Tensor:
        return added if added.ndim == 1 else added[chosen_sp]

    def pair(site: str, chosen_sp: Tensor) -> tuple[Tensor, Tensor]:
        return before.values[site][chosen_sp], after.values[site][chosen_sp]

    for stream in _streams(setup.lm, setup.vector.site):
        layer = parse_site(stream).layer
        h_nd, steered_nd = pair(stream, behind_sp)
        distance_n = mahalanobis(steered_nd, setup.neutral[stream])
        row: dict[str, Any] = {
            "layer": layer,
            "stream": {name: stream_change(*pair(stream, of_sp), v_of(of_sp))._asdict() for name, of_sp in classes.items() if of_sp.any()},
            "mahalanobis": float(distance_n.mean()),
            "beyond_p99": float((distance_n > setup.neutral[stream].p99).double().mean()),
        }
        for kind in ("attn_out", "mlp_out"):
            if (site := f"{kind}.{layer}") in before.values:
                row[kind] = write_change(*pair(site, behind_sp), h_nd, steered_nd, v_of(behind_sp))._asdict()
        for kind in ("attn_in", "mlp_in"):
            if (site := f"{kind}.{layer}") in before.values:
                row[kind] = [one.spread(site, behind_sp) for one in (before, after)]
        if layer in before.inner.patterns:
            patterns = before.inner.patterns[layer], after.inner.patterns[layer]
            row["attention"] = [
                {name: mass_h.tolist() for name, mass_h in attention_masses(p, real_sp, steered_sp)._asdict().items()} for p in patterns
            ]
            row["attention_kl_h"] = attention_kl(*patterns, real_sp).tolist()
        layers.append(row)
    gains: dict[str, float | None] = {}
    for name in before.inner.scales:
        scale, other = (by_token(one.inner.scales[name], real_sp.shape[1]) for one in (before, after))
        gains[name] = None if scale is None or other is None else norm_gain(scale[behind_sp].flatten(), other[behind_sp].flatten())
    found = {"layers": layers, "norm_gain": gains}
    if setup.dictionary is not None:
        found["dictionary"] = dictionary_change(setup.dictionary, *pair(setup.vector.site, behind_sp), setup.feature)._asdict()
    return found


def by_token(scale: Tensor, p: int) -> Tensor | None:
    """A norm's scale as [s, p, ...], where a norm of each head may have it as [s, heads, p, 1]; None if its layout is unclear."""
    as_it_is, transposed = scale.shape[1] == p, scale.ndim == 4 and scale.shape[2] == p
    if as_it_is == transposed:
        return None
    return scale if as_it_is else scale.transpose(1, 2)


def text_at(lm: LanguageModel, arm: Arm, c: float, prompts: Sequence[str], sampling: Sampling) -> dict[str, Any]:
    """Continuations by an arm at a coefficient, and measures of how broken they are; a prompt shorter than a vector's rows gets only the
    first ones."""
    ids_sp, mask_sp = lm.encode(prompts)
    try:
        with applied(lm, arm, c, None, ids_sp.shape[1]):
            whole_sp = lm.generate(ids_sp, mask_sp, **vars(sampling))
    except (NonFiniteLogits, OverflowError) as error:
        return {"failure": str(error)}
    new_sn = whole_sp[:, ids_sp.shape[1] :]
    rows = [row[:real] for row, real in zip(new_sn.tolist(), until_end(lm, new_sn).sum(1).tolist())]  # host sync
    return {
        "nats_per_token": continuation_loss(lm, ids_sp, new_sn, mask_sp),
        "distinct_2": distinct_2(rows),
        "first_repeated_step": [first_repeated_step(row) for row in rows],
        "texts": [lm.tokenizer.decode(row, skip_special_tokens=True) for row in rows],
    }


def sweep(
    setup: Setup,
    arms: Sequence[Arm],
    rhos: Sequence[float],
    prompts: Sequence[str],
    sampling: Sampling,
    advance: Callable[..., None] = lambda *_, **__: None,
    *,
    brief: bool = False,
) -> dict[str, Any]:
    """Rows for every arm and rho, each arm's wall, and how much of the damage at the wall of "added" each other arm has.

    `advance(1, ...)` is called after each step, as that of a `Progress` is. With `brief`, rows are of the arms in `INSIDE`, and
    "added" alone is looked into and has its wall sought, for a tenth of the passes. Raises `InputError` for rhos that do not rise from
    above 0, or that begin above the wall of "added".
    """
    if not rhos or rhos[0] <= 0 or list(rhos) != sorted(set(rhos)):
        raise InputError(f"expected rising strengths above 0, got {', '.join(map(str, rhos)) or 'none'}")
    before, rows = run_pass(setup, sites_inside(setup)), []
    added = next(arm for arm in arms if arm.name == "added")
    at_every_rho = [arm for arm in arms if arm.name in INSIDE or not brief]
    for size in rhos:
        for arm in at_every_rho:
            rows.append(measured_row(setup, before, arm, size, look=arm.name == "added" if brief else arm.name in INSIDE))
            advance(1, rho=f"{size:g}")
            if arm.name == "added" and size == rhos[0] and not (kl := rows[-1].get("logits", {}).get("kl", np.inf)) < WALL:
                raise InputError(
                    f"expected strengths that begin below the wall, a KL of {WALL:g} nat, got {kl:.3g} at {size:g}; begin lower"
                )
        next(row for row in rows if row["rho"] == size and row["arm"] == "added")["text"] = text_at(
            setup.lm, added, size / setup.rho_of_1, prompts, sampling
        )
    shown = _with_room(setup, prompts)
    walls: dict[str, dict[str, Any]] = {}
    for arm in arms:
        if arm.name == "added" or not brief:
            walls[arm.name] = _wall(setup, before, arm, rhos)
            if not brief:
                written = text_at(setup.lm, arm, walls[arm.name]["coefficient"], [shown], sampling)
                walls[arm.name]["text"] = {"prompt": shown, **written}
            advance(1, wall=arm.name)
    kl_by_arm = {arm.name: [row.get("logits", {}).get("kl", np.nan) for row in rows if row["arm"] == arm.name] for arm in at_every_rho}
    kl_at_wall = _kl_at_wall(setup, before, arms, walls["added"]["coefficient"], advance)
    tokens, width = int(setup.mask_sp.sum()) - len(setup.mask_sp), setup.lm.d_model  # without each text's first
    return {
        "rho_of_1": setup.rho_of_1,
        "first_norm": first_norm(setup.lm, setup.vector.site),
        "lens_sharpness": lens_sharpness(setup.lens_v),
        "unsteered_text": text_at(setup.lm, added, 0.0, prompts, sampling),
        "rows": rows,
        "slopes": {name: kl_slopes(rhos, kl_c).tolist() for name, kl_c in kl_by_arm.items()},
        "walls": walls,
        "kl_of_texts_at_wall": {name: kl_s.tolist() for name, kl_s in kl_at_wall.items()},
        "restored": restored(kl_at_wall) if walls["added"]["reached"] else {},  # without a wall there is nothing to share
        "where": "everywhere" if setup.everywhere else f"at the first {len(setup.vector.directions[setup.vector.site])} tokens",
        "null": [{"rho": size, **(isotropic_null(size, tokens, width) if setup.everywhere else NO_NULL)._asdict()} for size in rhos],
    }


def _with_room(setup: Setup, prompts: Sequence[str]) -> str:
    """The first prompt that is as long as the vector's directions are many, else the longest."""
    lengths = setup.lm.encode(prompts)[1].sum(1).tolist()  # host sync
    rows = 0 if setup.everywhere else len(setup.vector.directions[setup.vector.site])
    return next((prompt for prompt, length in zip(prompts, lengths) if length >= rows), prompts[lengths.index(max(lengths))])


def sweep_steps(arms: int, strengths: int) -> int:
    """The steps of the bar: a row each, then for each arm its wall and its share of the damage."""
    return arms * (strengths + 2)


def sweep_passes(arms: int, strengths: int) -> int:
    """About how many passes a sweep makes: its rows, six for each wall, and text as long as three for each arm and ten at each strength."""
    return arms * strengths + 10 * arms + 10 * strengths


def measured_row(setup: Setup, before: Pass, arm: Arm, size: float, *, look: bool = True) -> dict[str, Any]:
    """The row of an arm at a rho; with `look`, also its inner diagnostics."""
    c = size / setup.rho_of_1
    row: dict[str, Any] = {"arm": arm.name, "rho": size, "coefficient": c}
    try:
        after = run_pass(setup, sites_inside(setup) if look else (), arm, c, before.inner)
    except OverflowError as error:
        return row | {"failure": str(error)}
    changes = changes_of_texts(setup, before, after)
    row["logits"] = LogitChange(*(float(np.mean(values)) for values in zip(*changes)))._asdict()
    row["kl_of_texts"] = [change.kl for change in changes]
    if look and np.isfinite(row["logits"]["kl"]):
        row["inside"] = inside(setup, before, after, arm, c)
    return row


def _kl_of_texts(setup: Setup, before: Pass, arm: Arm, c: float) -> np.ndarray:
    try:
        after = run_pass(setup, (), arm, c, before.inner)
    except OverflowError:
        return np.full(len(setup.ids_sp), np.inf)
    kl_s = []
    for one_pv, other_pv, real_p in zip(before.logits_spv, after.logits_spv, setup.mask_sp.bool()):
        log_p_nv, log_q_nv = (logits_pv[real_p].double().log_softmax(-1) for logits_pv in (one_pv, other_pv))
        kl_s.append(float(torch.nn.functional.kl_div(log_q_nv, log_p_nv, reduction="batchmean", log_target=True)))  # host sync
    return np.array(kl_s)


def _wall(setup: Setup, before: Pass, arm: Arm, rhos: Sequence[float]) -> dict[str, Any]:
    """The strength at which the arm's KL is that of the wall: all arms at equal KL."""
    found = coefficient_for_kl(
        lambda c: float(_kl_of_texts(setup, before, arm, c).mean()),
        WALL,
        start=rhos[0] / setup.rho_of_1,
        most=MOST * rhos[-1] / setup.rho_of_1,
    )
    return {
        "coefficient": found.coefficient,
        "rho": found.coefficient * setup.rho_of_1,
        "kl": found.kl,
        "reached": found.reached,
        "monotone": found.monotone,
    }


def _kl_at_wall(setup: Setup, before: Pass, arms: Sequence[Arm], c: float, advance: Callable[..., None]) -> dict[str, np.ndarray]:
    """Of each arm at the coefficient of the wall of "added", one for each text."""
    kl_at_wall = {}
    for arm in arms:
        kl_at_wall[arm.name] = _kl_of_texts(setup, before, arm, c)
        advance(1, wall=arm.name)
    return kl_at_wall


def restored(kl_at_wall: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """1 − KL/KL of "added", both at one coefficient, with the interval over texts: 1 restores all, below 0 breaks more."""
    added_s = kl_at_wall["added"]
    weight_rs = data_and_resamples(len(added_s), np.random.default_rng(0))
    with np.errstate(invalid="ignore"):
        return {name: estimate(1 - (weight_rs @ kl_s) / (weight_rs @ added_s)) for name, kl_s in kl_at_wall.items() if name != "added"}
