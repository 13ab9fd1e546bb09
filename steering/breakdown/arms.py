"""The ways of steering that are compared to find out what breaks the model, as plain rows.

s sequences · p positions · d width of the site
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.hooks import Edit
from sae.model.language_model import LanguageModel
from sae.model.sites import parse_site
from steering.circuits.model_graph.frozen import PARTS, Internals, frozen, frozen_as_unsteered, internals
from steering.directions.pca import principal_directions_of_texts
from steering.directions.random import random_direction, random_in_span
from steering.intervention import steered
from steering.positions import Positions
from steering.strength.calibration import encode_cut
from steering.strength.neutral import SENTENCES
from steering.vector import SteeringVector

FRONT = 4  # tokens behind beginning-of-text that the arm "front" steers, about as many as an ActAdd prompt has
SPAN = 10  # principal directions of neutral text in whose span a random direction is drawn
KEY_SHARE = 0.9  # of the keys' squared sensitivity that the arm "off the keys" gives up
KEY_SENTENCES = 8
CONTROL_SEEDS = 1 << 31  # added to the seed of random arms, so that none is the random direction studied; torch uses 32 bits
STREAM = ("resid_pre", "resid_mid", "resid_post")
ONE_DIRECTION = ("lengthened", "front", "last")  # arms that a direction for each position does not have


class Arm(NamedTuple):
    name: str
    vector: SteeringVector
    """what coefficient 1 adds; over all sites together as long as the studied vector"""
    operation: str = "add"
    """"add" and "rotate" of `steered`, or "lengthen": h keeps its direction and gets the length of h + added"""
    positions: Positions = "all"
    frozen: tuple[str, ...] = ()
    """parts that are those of the unsteered pass"""


class Arms(NamedTuple):
    arms: list[Arm]
    left_out: dict[str, str]
    """name -> the reason why the model or the site has no such arm"""


def make_arms(lm: LanguageModel, vector: SteeringVector, seed: int = 0) -> Arms:
    """The arms of one direction of the residual stream.

    "rotated" has the same cosine to v as adding, at the old length; adding and rescaling to the old length has the same result.
    "lengthened" is its counterpart. "all layers" adds v/L at each of L layers. "norms frozen" to "norms, patterns, values frozen" add v as
    "added" does. A direction for each of the first positions (ActAdd's, [p, d]) has no "lengthened", "front" and "last"; its random
    counterparts have the length of each row. Raises `InputError` for a zero vector and for one that is not of the residual stream.
    """
    site = vector.site
    v = vector.directions[site]
    kind, _ = parse_site(site, lm.n_layers)
    if kind not in STREAM:
        raise InputError(f"expected a direction of the residual stream ({', '.join(STREAM)}), got one at {site}")
    if v.shape[-1] != lm.width(site):
        raise InputError(f"expected a direction of width {lm.width(site)} for {site} of {lm.name!r}, got {v.shape[-1]}")
    vector.unit()  # a zero vector has none
    seed += CONTROL_SEEDS
    front = list(range(begin := int(lm.bos_id is not None), begin + FRONT))
    everywhere = SteeringVector({f"{kind}.{layer}": v / lm.n_layers for layer in range(lm.n_layers)}, {"all layers": vector.provenance})
    arms = [
        Arm("added", vector),
        Arm("rotated", vector, "rotate"),
        Arm("lengthened", vector, "lengthen"),
        Arm("opposite", -vector),
        Arm("all layers", everywhere),
        Arm("random", _row_by_row(vector, seed, lambda seed, norm: random_direction(v.shape[-1], site, seed, norm))),
        Arm("front", vector, positions=front),
        Arm("last", vector, positions="last"),
    ]
    left_out: dict[str, str] = {}
    if v.ndim == 2:
        arms = [arm for arm in arms if arm.name not in ONE_DIRECTION]
        for name in ONE_DIRECTION:
            left_out[name] = f"expected one direction for every position, got one for each of the first {len(v)}"
    made: dict[str, Callable[[], SteeringVector]] = {
        "random in the top span": lambda: _in_top_span(lm, vector, seed),
        "off the keys": lambda: off_the_keys(lm, vector),
    }
    for name, make in made.items():
        try:
            arms.append(Arm(name, make()))
        except InputError as reason:
            left_out[name] = str(reason)
    for parts in (("norms",), ("patterns",), ("values",), ("norms", "patterns"), ("patterns", "values"), PARTS):
        name = f"{', '.join(parts)} frozen"
        try:
            with internals(lm, parts):
                arms.append(Arm(name, vector, frozen=parts))
        except InputError as reason:
            left_out[name] = str(reason)
    return Arms(arms, left_out)


@contextmanager
def applied(lm: LanguageModel, arm: Arm, coefficient: float, unsteered: Internals | None, prompt_length: int) -> Iterator[None]:
    """Inside, passes are those of the arm; `unsteered` has the frozen parts for the same tokens, `prompt_length` their number of columns.

    With None, each pass first reads its tokens without edits, so that text can be generated.
    """
    with ExitStack() as stack:
        if arm.operation == "lengthen":
            stack.enter_context(lm.edited({arm.vector.site: _lengthening(coefficient * arm.vector.direction_d)}))
        else:
            per_position = any(direction.ndim == 2 for direction in arm.vector.directions.values())
            length = prompt_length if per_position or arm.positions == "last" else None  # or rows would reach generated tokens
            stack.enter_context(
                steered(lm, [(arm.vector, coefficient)], operation=arm.operation, positions=arm.positions, prompt_length=length)
            )
        if arm.frozen:
            stack.enter_context(frozen(lm, arm.frozen, unsteered) if unsteered else frozen_as_unsteered(lm, arm.frozen))
        yield


def _lengthening(added_d: Tensor) -> Edit:
    """Gives h the length of h + added in its own direction; where nothing is added, every bit stays."""

    def lengthen(value_spd: Tensor) -> Tensor:
        wide = value_spd.float()
        longer, own = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (wide + added_d.to(wide.device), wide))
        return (wide * (longer / own.clamp_min(torch.finfo(torch.float32).tiny))).to(value_spd.dtype)

    return lengthen


def _row_by_row(vector: SteeringVector, seed: int, make: Callable[[int, float], SteeringVector]) -> SteeringVector:
    """`make(seed, norm)` for a vector of one direction; else for each of its rows, with its own seed."""
    v = vector.directions[vector.site]
    if v.ndim == 1:
        return make(seed, vector.norm)
    rows = [make(seed + row, float(v_d.double().norm())) for row, v_d in enumerate(v)]
    return SteeringVector.at(vector.site, torch.stack([row.direction_d for row in rows]), {"rows": [row.provenance for row in rows]})


def _in_top_span(lm: LanguageModel, vector: SteeringVector, seed: int) -> SteeringVector:
    components = principal_directions_of_texts(lm, SENTENCES, vector.site, min(SPAN, lm.width(vector.site)))
    units_kd = torch.stack([component.unit().direction_d for component in components])
    return _row_by_row(vector, seed, lambda seed, norm: random_in_span(units_kd, vector.site, seed, norm))


def off_the_keys(lm: LanguageModel, vector: SteeringVector, share: float = KEY_SHARE) -> SteeringVector:
    """The vector without the part that the next attention's keys read, at the old length.

    That part is spanned by the principal directions of the gradients of the keys at the tokens of a few sentences, including the norm
    before them, as many as hold `share` of the squared gradients. Raises `InputError` if no attention follows or its keys cannot be found,
    and for a vector that lies in this span.
    """
    kind, layer = parse_site(vector.site, lm.n_layers)
    layer += kind != "resid_pre"
    if layer >= lm.n_layers:
        raise InputError(f"expected a direction that an attention reads, but none comes after {vector.site}")
    read_dk = _key_readers(lm, vector.site, f"k.{layer}", share)
    v = vector.directions[vector.site].double()  # [d] or [p, d]
    rest = v - v @ read_dk @ read_dk.T
    if not rest.norm() > 1e-3 * v.norm():
        raise InputError(f"expected a direction with a part that the keys of block {layer} do not read, got one that they read whole")
    provenance = {"off_the_keys": vector.provenance, "block": layer, "share": share}
    return SteeringVector.at(vector.site, rest * (v.norm() / rest.norm()), provenance)


def _key_readers(lm: LanguageModel, site: str, keys: str, share: float) -> Tensor:
    """Orthonormal columns, float64 [d, k]."""
    leaf, seen = torch.empty(0), torch.empty(0)

    def cut(value_spd: Tensor) -> Tensor:
        nonlocal leaf
        leaf = value_spd.detach().requires_grad_()
        return leaf.clone()  # an edit in place must not meet a leaf

    def see(value_spd: Tensor) -> Tensor:
        nonlocal seen
        seen = value_spd
        return value_spd

    ids_sp, mask_sp = encode_cut(lm, SENTENCES[:KEY_SENTENCES])
    real_sp = mask_sp.bool()
    with torch.enable_grad(), lm.edited({site: cut, keys: see}):
        lm.logits(ids_sp, mask_sp)
    gram_dd = torch.zeros(leaf.shape[-1], leaf.shape[-1], dtype=torch.float64)
    for key_sp in seen.unbind(-1):  # a key depends on the stream at its own token alone
        gradient_nd = torch.autograd.grad(key_sp.sum(), leaf, retain_graph=True)[0][real_sp].double().cpu()  # host sync
        gram_dd += gradient_nd.T @ gradient_nd
    square_k, directions_dk = torch.linalg.eigh(gram_dd)
    square_k, directions_dk = square_k.flip(0), directions_dk.flip(1)
    kept = int((square_k.cumsum(0) < share * square_k.sum()).sum()) + 1
    return directions_dk[:, :kept]
