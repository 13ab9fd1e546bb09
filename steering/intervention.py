"""Change a model's activations along steering vectors or dictionary features, around any forward pass or generation.

s sequences · r rows of a pass (s, or s times beams) · p positions · t positions that a table covers · d width · k terms at a site
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import Threshold
from sae.errors import InputError
from sae.model.hooks import Edit
from sae.model.language_model import LanguageModel, NonFiniteLogits
from steering.positions import PositionMask, Positions, listed_positions
from steering.vector import SteeringVector

OPERATIONS = ("add", "rotate", "clamp", "ablate")

cached = lru_cache(maxsize=8)
"""of what a pass needs on its device, in its dtype and for its rows: prepared at the first pass of a generation, not at every one"""


@dataclass(frozen=True, eq=False)
class DictionaryFeature:
    """A feature together with its encoder, to clamp or to ablate."""

    dictionary: Dictionary
    feature: int
    site: str | None = None
    """its input site; by default the dictionary's own site"""

    def __post_init__(self) -> None:
        self.dictionary.require_feature(self.feature)
        object.__setattr__(self, "site", self.dictionary.require_site(self.site))

    @property
    def site_out(self) -> str:
        """its output site"""
        return str(self.dictionary.site_out or self.site)


Item: TypeAlias = SteeringVector | DictionaryFeature
Strength: TypeAlias = float | Sequence[float] | Tensor


@contextmanager
def steered(
    lm: LanguageModel,
    vectors: Sequence[Item | tuple[Item, Strength]],
    *,
    operation: str = "add",
    positions: Positions = "all",
    prompt_length: int | None = None,
) -> Iterator[None]:
    """Inside, every forward pass of the model is steered: `lm.logits`, `lm.generate`, or Hugging Face's own `lm.model.generate`.

    Each vector has a coefficient c, by default 1: a number, or one per sequence of the batch (the beams and the several returned
    texts of a sequence share it). All changes at a site are computed from one value h there:

    - "add": h + Σ c·v.
    - "rotate": the same direction as h + Σ c·v, at the length of h.
    - "clamp": a `DictionaryFeature`'s activation a_j becomes c, the reconstruction error stays: h + (c − a_j)·W_dec[j]
      (Templeton et al. 2024). A transcoder's activation is read at its input site and changes its output site. A vector's component along v
      becomes c·‖v‖.
    - "ablate": a feature's activation becomes 0, h − a_j·W_dec[j]; of vectors, h loses its projection on all they span (Arditi et al.
      2024). c is the share that is removed.

    `positions` counts in a sequence's own tokens, without padding, from 0; beginning-of-text is one of them:
    "all", padding too; "prompt"; "generated", the last position of the prompt and all after it, which predict the generated tokens; "last",
    that last position alone; ("first", n); or a list of positions. A vector with one direction per position has its first at position
    0, or at those of a list of its length. `prompt_length` is the prompt's columns with its padding, `ids_sp.shape[1]`: "prompt",
    "generated" and "last" need it; the others, "all" excepted, then end with the prompt. Every choice is the same with a KV cache.

    Raises `InputError` for a site the model lacks, another width, an impossible operation or positions, and (in the pass) for more
    positions than the model's context; `OverflowError` if the sum's norm overflows, because a model would then not fail but write arbitrary
    text; `NonFiniteLogits` at the end if a generation inside met logits that were not finite.
    """
    if not isinstance(lm, LanguageModel):
        raise InputError(f"expected a LanguageModel to steer, got {type(lm).__name__}; wrap it: LanguageModel(model, tokenizer)")
    listed = listed_positions(positions, prompt_length)
    edits: dict[str, Edit] = {}
    by_site = _by_site(lm, vectors, operation)
    for site, terms in by_site.items():
        per_position = any(term.is_positional for term in terms)
        if positions == "all" and prompt_length is not None and not per_position:
            raise InputError(f'expected no prompt_length with positions "all", got {prompt_length}')
        mask = PositionMask(lm, positions if isinstance(positions, str) else "listed", prompt_length, listed)
        if operation in ("add", "rotate"):
            edits[site] = _adding(site, terms, mask, operation == "rotate")
        else:
            edits[site] = _setting(site, terms, mask, operation == "ablate")
    with _reporting(lm), lm.edited(edits), lm.edited(_notes([t.own for terms in by_site.values() for t in terms if t.own])):
        yield


class _Own:
    """A feature whose dictionary must compute its activation: a TopK, one with a frame, or a transcoder, which reads at another site."""

    def __init__(self, item: DictionaryFeature):
        self.dictionary, self.feature, self.site = item.dictionary, item.feature, item.site
        self.elsewhere = item.dictionary.is_transcoder
        self.read_rpd: Tensor | None = None
        """what flowed where a transcoder reads, until the pass reaches where it writes"""

    def activation(self, value_rpd: Tensor) -> tuple[Tensor, Tensor | float]:
        """[r, p] float32, and what one unit of it is worth at each position, [r, p] or 1."""
        x_rpd, self.read_rpd = (self.read_rpd if self.elsewhere else value_rpd), None
        if x_rpd is None:
            raise InputError(f"the dictionary writes at {self.dictionary.site_out} before it reads at {self.site}, so it cannot be clamped")
        x_rpd = x_rpd.to(self.dictionary.W_enc_fd.device)
        unit = self.dictionary.unit(x_rpd)
        act_rp = self.dictionary.activations(x_rpd, [self.feature])[..., 0].float().to(value_rpd.device)
        return act_rp, unit if isinstance(unit, float) else unit[..., 0].float().to(value_rpd.device)


def _notes(owns: list[_Own]) -> dict[str, Edit]:
    """Edits that change nothing, but pass the value at the input site to every transcoder's feature; several may read at one site."""

    def noting(readers: list[_Own]) -> Edit:
        def note(value_rpd: Tensor) -> Tensor:
            for own in readers:
                own.read_rpd = value_rpd
            return value_rpd

        return note

    sites = {str(own.site) for own in owns if own.elsewhere}
    return {site: noting([own for own in owns if own.elsewhere and own.site == site]) for site in sites}


class _Term(NamedTuple):
    """One vector or feature at one site."""

    direction: Tensor
    """what is added, [d] or [p, d]"""
    strength_s: Tensor
    """[1] or [s]"""
    read_d: Tensor | None = None
    """for a feature: its encoder row"""
    bias: float = 0.0
    threshold: float = 0.0
    own: "_Own | None" = None
    """for a feature whose activation is more than its own row, bias and threshold"""

    @property
    def is_positional(self) -> bool:
        return self.direction.ndim == 2


def _by_site(lm: LanguageModel, vectors: Sequence[Item | tuple[Item, Strength]], operation: str) -> dict[str, list[_Term]]:
    if operation not in OPERATIONS:
        raise InputError(f"expected operation to be one of {', '.join(OPERATIONS)}, got {operation!r}")
    terms: dict[str, list[_Term]] = {}
    sequences: set[int] = set()
    features: set[tuple[int, int, str]] = set()
    for entry in _listed(vectors):
        item, coefficient = entry if isinstance(entry, tuple) else (entry, 1.0)
        strength_s = _strength(coefficient, lm.device)
        sequences |= {len(strength_s)} - {1}
        if isinstance(item, DictionaryFeature):
            key = (id(item.dictionary), item.feature, item.site or "")
            if operation not in ("clamp", "ablate") or key in features or (operation == "clamp" and entry is item):
                raise InputError(
                    f"feature {item.feature} can be clamped, once and to an activation that is given, or ablated; not {operation}"
                )
            features.add(key)
            if item.dictionary.d_in != (width := lm.width(str(item.site))):
                raise InputError(f"expected a dictionary {width} wide for {item.site} of {lm.name!r}, got one for {item.dictionary.d_in}")
            found: Mapping[str, _Term] = {item.site_out: _feature_term(item, strength_s)}
        else:
            found = {site: _Term(direction.to(lm.device), strength_s) for site, direction in item.directions.items()}
        for site, term in found.items():
            width = lm.width(site)
            if term.direction.shape[-1] != width:
                raise InputError(f"expected a direction of width {width} for {site} of {lm.name!r}, got {term.direction.shape[-1]}")
            terms.setdefault(site, []).append(term)
    if len(sequences) > 1:
        raise InputError(f"expected one coefficient per sequence of one batch, got batches of {sorted(sequences)}")
    return terms


def _listed(vectors: Any) -> list[Item | tuple[Item, Strength]]:
    items = (SteeringVector, DictionaryFeature)
    form = "expected vectors as a list such as [vector] or [(vector, 2.0), (other, -1.5)]"
    if isinstance(vectors, (Mapping, str, *items)) or not isinstance(vectors, Iterable):
        raise InputError(f"{form}, got {type(vectors).__name__}")
    entries = list(vectors)
    for entry in entries:
        if not isinstance(entry[0] if isinstance(entry, tuple) and len(entry) == 2 else entry, items):
            raise InputError(f"{form}, got one with {type(entry).__name__} {entry!r:.60} in it")
    return entries


def _strength(coefficient: Strength, device: torch.device) -> Tensor:
    try:
        wide = torch.as_tensor(coefficient, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"expected a coefficient, or one for each sequence, got {coefficient!r:.60}") from None
    if wide.ndim > 1 or wide.numel() == 0 or wide.isnan().any():  # host sync
        raise InputError(f"expected a coefficient, or one for each sequence, got {coefficient}")
    return wide.reshape(-1).float().to(device)


@torch.no_grad()
def _feature_term(item: DictionaryFeature, strength_s: Tensor) -> _Term:
    """z = read · h + bias and a = z above the threshold, with the bias that is subtracted from the input folded into the encoder's."""
    d, j = item.dictionary, item.feature
    row_d = d.rows([j])[0].float().to(strength_s.device)
    if not isinstance(d.gate, Threshold) or d.frame is not None or d.is_transcoder:
        return _Term(row_d, strength_s, torch.zeros_like(row_d), own=_Own(item))
    read_d = d.encoder_rows([j])[0]
    bias = d.b_enc_f[j].double() - (0 if d.b_in_d is None else read_d.double() @ d.b_in_d.double())
    threshold = 0.0 if d.gate.theta_f is None else d.gate.theta_f[j].item()
    return _Term(row_d, strength_s, read_d.float().to(strength_s.device), bias.item(), threshold)  # host sync


def _adding(site: str, terms: list[_Term], mask: PositionMask, rotate: bool) -> Edit:
    """Adds Σ c·v where `mask` says, and directions per position where they belong; other positions keep every bit."""
    positional = any(term.is_positional for term in terms)
    zero_11d = terms[0].direction.new_zeros(1, 1, terms[0].direction.shape[-1])
    table_std, spot = _table(site, terms, mask) if positional else (zero_11d, mask)
    flat = [t for t in terms if not t.is_positional and (mask.listed is None or not positional)]
    fixed_s1d = sum((t.strength_s[:, None, None] * t.direction for t in flat), start=zero_11d)
    for delta in (fixed_s1d, table_std):
        _refuse_overflow(site, delta)

    @cached
    def fixed(device: torch.device, dtype: torch.dtype, rows: int) -> Tensor:
        return _of_rows(fixed_s1d.to(device, dtype), rows)

    @cached
    def table(device: torch.device, rows: int) -> Tensor:
        return _of_rows(table_std.to(device), rows).expand(rows, -1, -1)

    def add(value_rpd: Tensor) -> Tensor:
        rows, device = len(value_rpd), value_rpd.device
        where = mask.of(value_rpd) if flat else False
        at = spot.of(value_rpd) if positional else False
        if where is False and at is False:
            return value_rpd
        delta = fixed(device, value_rpd.dtype if at is False and not rotate else torch.float32, rows)
        if isinstance(at, Tensor):
            own_rtd = table(device, rows)
            number_rp = spot.coordinates(value_rpd)[0].clamp(0, own_rtd.shape[1] - 1).expand(rows, -1)
            own_rpd = own_rtd.gather(1, number_rp[..., None].expand(-1, -1, own_rtd.shape[2]))
            where, delta = (where, delta + torch.where(at, own_rpd, 0)) if flat else (at, own_rpd)
        changed = _rotated(value_rpd, delta) if rotate else value_rpd + delta.to(value_rpd.dtype)
        return torch.where(where, changed, value_rpd) if isinstance(where, Tensor) else changed

    return add


def _table(site: str, terms: list[_Term], mask: PositionMask) -> tuple[Tensor, PositionMask]:
    """Σ c·v for each of the first t positions, [1 or s, t, d], and the mask of those that have one."""
    if mask.name not in ("all", "listed"):
        raise InputError(f'one direction per position at {site} needs positions "all" or a list of as many positions, got {mask.name!r}')
    listed = mask.listed or list(range(max(len(t.direction) for t in terms if t.is_positional)))
    if mask.prompt_length is not None and max(listed) >= mask.prompt_length:
        raise InputError(f"expected a prompt at least as long as the {len(listed)} directions at {site}, got {mask.prompt_length} columns")
    total: Tensor | float = 0.0
    for term in terms:
        if not term.is_positional and mask.listed is None:
            continue  # that one is added everywhere
        own = listed if mask.listed is not None else listed[: len(term.direction)]
        rows_pd = term.direction if term.is_positional else term.direction.expand(len(own), -1)
        if len(rows_pd) != len(own):
            raise InputError(f"expected as many positions as the {len(rows_pd)} directions at {site}, got {len(own)}")
        table_td = rows_pd.new_zeros(max(listed) + 1, rows_pd.shape[1])
        table_td[own] = rows_pd
        total = total + term.strength_s[:, None, None] * table_td
    assert isinstance(total, Tensor)
    return total, PositionMask(mask.lm, "listed", mask.prompt_length, listed)


def _rotated(value_rpd: Tensor, delta: Tensor) -> Tensor:
    """Rotates h towards h + `delta`, float32, at its own length; where delta is zero the factor is exactly 1."""
    wide = value_rpd.float()
    moved = wide + delta
    length, new_length = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (wide, moved))
    return (moved * (length / new_length.clamp_min(torch.finfo(torch.float32).tiny))).to(value_rpd.dtype)


def _setting(site: str, terms: list[_Term], mask: PositionMask, ablate: bool) -> Edit:
    """h + Σ_k (target_k − a_k)·write_k, with a = z where z = read·h + bias is above the threshold for most features, and a = read·h of a
    vector, all of the same h."""
    if any(term.is_positional for term in terms):
        raise InputError(f"one direction per position at {site} can be added or rotated to, not clamped or ablated")
    has_features = any(t.read_d is not None for t in terms)
    floor_k = torch.tensor([-torch.inf if t.read_d is None else t.threshold for t in terms], device=mask.lm.device)
    own = [(k, term.own) for k, term in enumerate(terms) if term.own]
    length_k = torch.stack([torch.ones_like(t.strength_s[0]) if t.read_d is not None else t.direction.norm() for t in terms])
    vectors = iter(_orthonormal([t.direction for t in terms if t.read_d is None], ablate))
    pairs = [(t.read_d, t.direction) if t.read_d is not None else (unit_d := next(vectors), unit_d) for t in terms]
    read_kd, write_kd = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
    bias_k = torch.tensor([t.bias for t in terms], device=mask.lm.device)
    sequences = max(len(t.strength_s) for t in terms)
    strength_s1k = torch.stack([t.strength_s.expand(sequences) for t in terms], dim=-1)[:, None]
    strength_s1k = -strength_s1k if ablate else strength_s1k * length_k
    _refuse_overflow(site, strength_s1k @ write_kd)

    @cached
    def prepared(device: torch.device, rows: int) -> tuple[Tensor, ...]:
        return *(t.to(device) for t in (read_kd, write_kd, bias_k, floor_k)), _of_rows(strength_s1k.to(device), rows)

    def change(value_rpd: Tensor) -> Tensor:
        where = mask.of(value_rpd)
        if where is False:
            return value_rpd
        read, write, bias, floor, strength = prepared(value_rpd.device, len(value_rpd))
        wide = value_rpd.float()
        act_rpk = torch.nn.functional.linear(wide, read, bias)
        if has_features:
            act_rpk = act_rpk.masked_fill_(act_rpk <= floor, 0)
        units = []
        for k, feature in own:
            act_rpk[..., k], unit = feature.activation(value_rpd)
            units.append((k, unit))
        gap_rpk = strength * act_rpk if ablate else strength - act_rpk
        for k, unit in units:
            gap_rpk[..., k] *= unit
        changed = torch.addmm(wide.flatten(0, 1), gap_rpk.flatten(0, 1), write).to(value_rpd.dtype).view(value_rpd.shape)
        return torch.where(where, changed, value_rpd) if isinstance(where, Tensor) else changed

    return change


def _orthonormal(directions: list[Tensor], together: bool) -> list[Tensor]:
    """Each row at length 1; `together`: each without its projection on the earlier ones. Zero if nothing is left."""
    units: list[Tensor] = []
    for direction_d in directions:
        rest_d = direction_d.double()
        for unit_d in units * 2 if together else []:  # twice, because once leaves rounding
            rest_d = rest_d - (rest_d @ unit_d) * unit_d
        some = rest_d.norm() > 1e-6 * direction_d.norm()
        units.append(torch.where(some, rest_d / rest_d.norm().clamp_min(1e-300), 0))
    return [unit_d.float() for unit_d in units]


def _of_rows(of_sequences: Tensor, rows: int) -> Tensor:
    """[s, ...] -> [rows, ...]: beams and returned texts of a sequence are neighbouring rows. [1, ...] stays, to be broadcast."""
    sequences = len(of_sequences)
    if rows % sequences:
        raise InputError(f"expected a batch of {sequences} sequences, one per coefficient, or their beams, got {rows} rows")
    return of_sequences if sequences in (1, rows) else of_sequences.repeat_interleave(rows // sequences, dim=0)


def _refuse_overflow(site: str, delta: Tensor) -> None:
    if not torch.isfinite(delta.square().sum(-1)).all():  # host sync
        raise OverflowError(f"what is added at {site} is so long that float32 cannot hold its square, which the model's norms need")


@contextmanager
def _reporting(lm: LanguageModel) -> Iterator[None]:
    """Raises `NonFiniteLogits` at the end if a generating pass (one that keeps a cache) gave logits that are not finite."""
    sums: list[Tensor] = []

    def watch(_module: Any, _args: tuple, output: Any) -> None:
        if getattr(output, "past_key_values", None) is not None and getattr(output, "logits", None) is not None:
            now = output.logits[:, -1].sum(dtype=torch.float32)  # not finite if any is not; stays on the device
            sums[:] = [sums[0] + now if sums else now]

    def report(cause: Exception | None = None) -> None:
        if sums and not sums[0].isfinite():  # host sync
            raise NonFiniteLogits("the steered model's logits are not finite, so what was generated means nothing") from cause

    handle = lm.model.register_forward_hook(watch)
    try:
        yield
    except RuntimeError as error:  # sampling from such logits fails in torch
        if lm.device.type == "cpu":  # a CUDA device can answer nothing any more
            report(error)
        raise
    else:
        report()
    finally:
        handle.remove()
