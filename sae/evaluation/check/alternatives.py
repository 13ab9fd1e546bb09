"""The alternatives: common mistakes in publishing or loading a dictionary, one change at a time.

Each change is another way to use the same weights. f features · d width that is read · o width that is written · n rows
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats.saelens.cfg import CENTRED_KINDS
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import Threshold, TopK
from sae.evaluation.check.recording import Point, Recorder
from sae.model.sites import parse_site

CLEAR = 0.9
"""an alternative is clearly better when its FVU is at most this many times the other's, and the interval of the difference is below 0"""
CLEAR_FITTED = 0.7
"""for a number that is fitted"""
FACTOR = 1.5
"""a common factor closer to 1 is not a mistake: such factors compensate the shrinkage of an L1 penalty"""
FIRST = 4
"""positions that are left out as the first ones, with the beginning-of-text token; Gemma's <bos><start_of_turn>user\\n are as many"""
FRAMES: dict[Literal["constant_norm_rescale", "layer_norm", "centred"] | None, str] = {
    None: "no norm",
    "constant_norm_rescale": "each token divided by its root mean square (constant_norm_rescale)",
    "layer_norm": "layer norm of each token",
    "centred": "each token minus its mean over the width (TransformerLens' center_writing_weights)",
}


class Change(NamedTuple):
    kind: str
    """bias, frame, value_bias, threshold, decoder_norm, transposed, skip, scale, site, post_norm, bos, positions or model"""
    text: str
    clear: float = CLEAR
    gate: bool = False
    """whether other features fire"""


class Use(NamedTuple):
    """A way to use the dictionary: as declared, or with changes."""

    dictionary: Dictionary
    reads: Point
    writes: Point
    """equal to `reads` except for transcoders"""
    changes: tuple[Change, ...] = ()
    first: int = 0
    """position of the first token of a sequence that counts"""

    @property
    def name(self) -> str:
        return "; ".join(change.text for change in self.changes) or "as declared"

    def changed(self, change: Change, **fields: Any) -> "Use":
        return self._replace(changes=(*self.changes, change), **fields)

    def with_parts(self, change: Change, **parts: Any) -> "Use":
        """With other parts of the dictionary."""
        return self.changed(change, dictionary=Dictionary.of(self.dictionary.parts()._replace(**parts)))


def alternatives(use: Use, recorder: Recorder) -> list[Use]:
    """All ways that differ from `use` in one thing, the simplest to explain first."""
    dictionary = use.dictionary
    found = [*sites(use, recorder), *biases(use), *frames(use), *contexts(use, recorder), *transposed(use)]
    if isinstance(dictionary.gate, Threshold) and dictionary.gate.theta_f is not None:
        found += thresholds(use, dictionary.gate.theta_f, usual_scale(recorder.values(use.reads)))
    return [*found, *decoder_norms(use), *scales(use, recorder)]


def is_near_1(factor: float) -> bool:
    return 1 / FACTOR < factor < FACTOR


def points(use: Use, recorder: Recorder) -> list[Point]:
    """The recording points of `alternatives`, so that one pass records all of them."""
    ends = [use.reads, use.writes]
    found = [*ends, *(point for pair in near_sites(use, recorder) for point in pair)]
    if recorder.lm.bos_id is not None:
        found += [point._replace(bos=not point.bos) for point in ends]
    if recorder.other is not None:
        found += [point._replace(other=True) for point in ends]
    if has_post_norm(recorder, use.writes.site):
        found.append(use.writes._replace(before_norm=True))
    return list(dict.fromkeys(found))


def biases(use: Use) -> Iterator[Use]:
    d = use.dictionary
    if d.b_in_d is not None and d.b_in_d.any():
        yield use.with_parts(Change("bias", "no bias is taken off the input"), b_in_d=None)
    elif d.b_dec_o.any() and d.d_in == d.d_out:
        yield use.with_parts(Change("bias", "b_dec is taken off the input"), b_in_d=d.b_dec_o)


def frames(use: Use) -> Iterator[Use]:
    d = use.dictionary
    kinds = [kind for kind in FRAMES if kind != (d.frame.kind if d.frame else None)]
    for kind in kinds:
        if kind == "centred" and (d.is_transcoder or parse_site(use.reads.site).kind not in CENTRED_KINDS):
            continue
        frame = None if kind is None else Frame(kind, restores=use.reads == use.writes)
        yield use.with_parts(Change("frame", FRAMES[kind]), frame=frame)


def contexts(use: Use, recorder: Recorder) -> Iterator[Use]:
    """Other beginnings, other positions, another model, and a norm's other side."""
    if recorder.lm.bos_id is not None:
        bos = not use.reads.bos
        text = f"{'a' if bos else 'no'} beginning-of-text token before the text"
        yield use.changed(Change("bos", text), reads=use.reads._replace(bos=bos), writes=use.writes._replace(bos=bos))
    if not use.first:
        first = FIRST - use.reads.bos
        yield use.changed(Change("positions", f"without the first {FIRST} positions"), first=first)
    if recorder.other is not None and not use.reads.other:
        change = Change("model", f"the model {recorder.other.name}")
        yield use.changed(change, reads=use.reads._replace(other=True), writes=use.writes._replace(other=True))
    if not use.writes.before_norm and has_post_norm(recorder, use.writes.site):
        writes = use.writes._replace(before_norm=True)
        change = Change("post_norm", f"{use.writes.site} ahead of the norm that follows it")
        yield use.changed(change, writes=writes, reads=writes if use.reads == use.writes else use.reads)
    kind, d = parse_site(use.reads.site).kind, use.dictionary
    if kind in ("v", "head_out") and use.reads == use.writes and (bias_d := recorder.value_bias(use.reads.site).to(d.b_dec_o)).any():
        b_in_d = bias_d if d.b_in_d is None else d.b_in_d + bias_d
        change = Change("value_bias", "the values' biases are taken off (TransformerLens' fold_value_biases)")
        yield use.with_parts(change, b_in_d=b_in_d, b_dec_o=d.b_dec_o + bias_d)


def has_post_norm(recorder: Recorder, site: str) -> bool:
    return parse_site(site).kind in ("attn_out", "mlp_out") and "norm" in type(recorder.lm.place(site).module).__name__.lower()


def sites(use: Use, recorder: Recorder) -> Iterator[Use]:
    """Other sites of the layer and the same site of the neighbouring layers, if width and values allow; a transcoder's sites separately."""
    seen: list[tuple[Tensor, Tensor]] = []
    for reads, writes in [(use.reads, use.writes), *near_sites(use, recorder)]:
        x_nd, y_no = recorder.values(reads), recorder.values(writes)
        if any(torch.equal(x_nd, x) and torch.equal(y_no, y) for x, y in seen):  # resid_pre.3 is resid_post.2
            continue
        seen.append((x_nd, y_no))
        if len(seen) > 1:
            moved = [f"reads {reads.site}"] * (reads != use.reads) + [f"writes {writes.site}"] * (writes != use.writes)
            text = f"at {reads.site}" if use.reads == use.writes else " and ".join(moved)
            yield use.changed(Change("site", text), reads=reads, writes=writes)


def near_sites(use: Use, recorder: Recorder) -> list[tuple[Point, Point]]:
    reads, writes = (
        near(point, width, recorder) for point, width in ((use.reads, use.dictionary.d_in), (use.writes, use.dictionary.d_out))
    )
    if use.reads == use.writes:
        return [(point, point) for point in reads]
    both = [(x, y) for step in (-1, 1) for x in shifted(use.reads, step, recorder) for y in shifted(use.writes, step, recorder)]
    return [*((point, use.writes) for point in reads), *((use.reads, point) for point in writes), *both]


def near(point: Point, width: int, recorder: Recorder) -> list[Point]:
    layer = parse_site(point.site).layer
    here = [point._replace(site=site, before_norm=False) for site in recorder.lm.sites() if parse_site(site).layer == layer]
    beside = [*shifted(point, -1, recorder), *shifted(point, 1, recorder)]
    return [other for other in (*beside, *here) if other.site != point.site and recorder.lm.width(other.site) == width]


def shifted(point: Point, step: int, recorder: Recorder) -> list[Point]:
    """The same kind of site `step` layers up, if there is one."""
    kind, layer = parse_site(point.site)
    return [point._replace(site=site) for site in recorder.lm.sites() if parse_site(site) == (kind, layer + step)]


def everywhere(use: Use, recorder: Recorder) -> list[Use]:
    """The declared kind of site in all layers, for a dictionary that fits at no nearby site."""
    layers = range(1 - recorder.lm.n_layers, recorder.lm.n_layers)
    ends = [
        (x, y) for step in layers if abs(step) > 1 for x in shifted(use.reads, step, recorder) for y in shifted(use.writes, step, recorder)
    ]
    return [
        use.changed(Change("site", f"at {x.site}" if x == y else f"reads {x.site} and writes {y.site}"), reads=x, writes=y) for x, y in ends
    ]


def transposed(use: Use) -> Iterator[Use]:
    """For square matrices alone: the shape of any other shows whether it is transposed."""
    d = use.dictionary
    if d.d_sae == d.d_in:
        yield use.with_parts(Change("transposed", "W_enc transposed"), W_enc_fd=d.W_enc_fd.T.contiguous())
        if d.d_sae == d.d_out:
            both = dict(W_enc_fd=d.W_enc_fd.T.contiguous(), W_dec_fo=d.W_dec_fo.T.contiguous())
            yield use.with_parts(Change("transposed", "W_enc and W_dec transposed"), **both)
    if d.d_sae == d.d_out:
        yield use.with_parts(Change("transposed", "W_dec transposed"), W_dec_fo=d.W_dec_fo.T.contiguous())
    if d.W_skip_od is not None:
        yield use.with_parts(Change("skip", "no skip matrix"), W_skip_od=None)
        if d.d_in == d.d_out:
            yield use.with_parts(Change("skip", "the skip matrix transposed"), W_skip_od=d.W_skip_od.T.contiguous())


def thresholds(use: Use, theta_f: Tensor, scale: float) -> Iterator[Use]:
    """The threshold in other units than the encoder, as when only one of them was scaled."""
    if is_near_1(scale):
        return
    said = f"{scale:.3g}, √d over the mean norm"
    yield use.with_parts(Change("threshold", f"threshold × {said}", gate=True), gate=Threshold(theta_f * scale))
    yield use.with_parts(Change("threshold", f"threshold ÷ {said}", gate=True), gate=Threshold(theta_f / scale))


def decoder_norms(use: Use) -> Iterator[Use]:
    """The lengths of the decoder's rows on the other side of the gate, or in the encoder alone."""
    d = use.dictionary
    norm_f = d.norms().clamp(min=torch.finfo(d.W_dec_fo.dtype).tiny)
    if (norm_f - 1).abs().max() < 1e-3:
        return
    W_dec_fo = d.W_dec_fo / norm_f[:, None]
    yield use.with_parts(Change("decoder_norm", "decoder rows divided by their norms, the encoder's left"), W_dec_fo=W_dec_fo)
    if isinstance(d.gate, TopK):
        text = "features chosen by activation × decoder norm"
        W_enc_fd, b_enc_f = d.W_enc_fd * norm_f[:, None], d.b_enc_f * norm_f
        yield use.with_parts(Change("decoder_norm", text), W_enc_fd=W_enc_fd, b_enc_f=b_enc_f, W_dec_fo=W_dec_fo)
    elif isinstance(d.gate, Threshold) and (theta_f := d.gate.theta_f) is not None:
        text = "threshold {} the decoder norm"
        yield use.with_parts(Change("decoder_norm", text.format("÷"), gate=True), gate=Threshold(theta_f / norm_f))
        yield use.with_parts(Change("decoder_norm", text.format("×"), gate=True), gate=Threshold(theta_f * norm_f))


def usual_scale(x_nd: Tensor) -> float:
    """√d / mean ‖x‖, the factor by which many trainers multiply activations."""
    return x_nd.shape[1] ** 0.5 / float(x_nd.norm(dim=-1).mean())


def scales(use: Use, recorder: Recorder) -> Iterator[Use]:
    """Activations in the units of a trainer that multiplied them, or in the model's if it did not."""
    x_nd, y_no = recorder.values(use.reads), recorder.values(use.writes)
    s_in, s_out = usual_scale(x_nd), usual_scale(y_no)
    if is_near_1(s_in) and is_near_1(s_out):
        return
    yield scaled(use, s_in, s_out, Change("scale", f"activations × {s_in:.4g}, √d over their mean norm"))
    yield scaled(use, 1 / s_in, 1 / s_out, Change("scale", f"activations ÷ {s_in:.4g}, √d over their mean norm"))


def scaled(use: Use, scale_in: float, scale_out: float, change: Change) -> Use:
    """For inputs that are not yet multiplied by `scale_in` and outputs divided by `scale_out`; see `Dictionary.folded`.

    A common factor commutes with every gate, so only biases and thresholds change where both are the same, and no matrix is copied.
    """
    d, out = use.dictionary, scale_in / scale_out
    return use.with_parts(
        change,
        b_in_d=None if d.b_in_d is None else d.b_in_d / scale_in,
        b_enc_f=d.b_enc_f / scale_in,
        gate=d.gate.scaled(torch.full_like(d.b_enc_f, 1 / scale_in)) or d.gate,
        W_dec_fo=d.W_dec_fo if out == 1 else d.W_dec_fo * out,
        b_dec_o=d.b_dec_o / scale_out,
        W_skip_od=d.W_skip_od if d.W_skip_od is None or out == 1 else d.W_skip_od * out,
    )
