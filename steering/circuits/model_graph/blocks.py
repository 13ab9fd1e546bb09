"""Data about each block for the engine: the weights of every head, the norms it reads through, and the modules to hook.

Found from a model's sites, so no family needs a table; what the graph cannot describe is refused by name.

s sequences · p positions · d width of the stream · h query heads · g groups of them · z width of a head · c outputs of a projection
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.structure.norms import Norm
from sae.model.structure.places import Columns, Place, Scaled
from steering.circuits.model_graph.graph import HEAD_INPUTS, Graph

GROUPS, KEY_HEADS = "num_key_value_groups", "num_key_value_heads"  # what Hugging Face's attentions call them


class HeadInput(NamedTuple):
    """The queries, keys or values of a block, head by head."""

    module: nn.Module
    """the projection that computes them"""
    weight_gzd: Tensor
    """for each group of heads that share theirs"""
    bias_gz: Tensor | None
    shared: int
    """heads of a group"""
    columns_hz: Tensor
    """their columns in the projection's output, after `Widened` has given each query head its own key and value"""


class Widened(NamedTuple):
    """How a block whose query heads share keys and values is run with a separate key and value for each."""

    columns: Mapping[nn.Module, Tensor]
    """of each projection, the outputs [c] in the order in which it then returns them"""
    settings: Mapping[str, int]
    attention: nn.Module
    """the module whose settings they are"""


class Block(NamedTuple):
    attention_norm: nn.Module | None
    """None: the attention reads the stream itself"""
    mlp_norm: nn.Module | None
    attention_in: Place
    mlp_in: Place
    inputs: Mapping[str, HeadInput]
    """by "q", "k" and "v\""""
    widened: Widened | None
    heads_out: Place
    """the input of the output projection"""
    output_hzd: Tensor
    """the matrix by which each head writes to the stream"""
    bias_d: Tensor
    """the output projection's bias, added to the stream in addition to the heads"""
    post: Norm | None
    """the norm after the output projection, as Gemma 2 has"""
    factor: float
    """factor of the attention's output in the stream"""
    mlp_out: Place


def find_blocks(lm: LanguageModel, graph: Graph) -> tuple[list[Block], nn.Module]:
    """All blocks and the norm after the last. Raises `InputError`, with the reason, for a model that the graph does not describe."""
    if len({weight.device for weight in lm.model.parameters()}) > 1:
        raise InputError(f"expected {lm.name!r} on one device for a graph, got one spread over several; load it without device_map")
    if lm.final_norm is None:
        raise InputError(f"expected a norm before the unembedding of {lm.name!r}, where the graph's logits read the stream, got none")
    return [_block(lm, graph, layer) for layer in range(lm.n_layers)], lm.final_norm


def _block(lm: LanguageModel, graph: Graph, layer: int) -> Block:
    refused = lm.refused_sites()
    for kind in ("attn_in", *HEAD_INPUTS, "head_out", "attn_out", "mlp_in", "mlp_out"):
        if f"{kind}.{layer}" in refused:
            raise _refused(lm, layer, f"{kind} is not known: {refused[f'{kind}.{layer}']}")
    heads, out, added = graph.n_heads, lm.place(f"head_out.{layer}"), lm.place(f"attn_out.{layer}")
    W_O_cd = _weight(lm, out.module).T
    if len(W_O_cd) % heads:
        raise _refused(lm, layer, f"its heads' outputs are {len(W_O_cd)} wide, which is no multiple of {heads} heads")
    inputs, widened = _inputs(lm, graph, layer)
    post = None if out.module in added.module.modules() else _post(lm, layer, added.module, out.module)
    factor, bias_d = added.view.factor if isinstance(added.view, Scaled) else 1.0, getattr(out.module, "bias", None)
    return Block(
        attention_norm=lm.norm_before(f"attn_in.{layer}"),
        mlp_norm=lm.norm_before(f"mlp_in.{layer}"),
        attention_in=lm.place(f"attn_in.{layer}"),
        mlp_in=lm.place(f"mlp_in.{layer}"),
        inputs=inputs,
        widened=widened,
        heads_out=out,
        output_hzd=W_O_cd.reshape(heads, -1, W_O_cd.shape[1]),
        bias_d=torch.zeros_like(W_O_cd[0]) if bias_d is None else factor * bias_d,
        post=post,
        factor=factor,
        mlp_out=lm.place(f"mlp_out.{layer}"),
    )


def _post(lm: LanguageModel, layer: int, module: nn.Module, projection: nn.Module) -> Norm:
    norm = next((norm for norm in lm.norms.values() if isinstance(norm, Norm) and norm.module is module), None)
    biased = getattr(projection, "bias", None) is not None
    if norm is None or norm.formula.centred or biased or norm.bias_d.any():
        raise _refused(lm, layer, "what its heads write goes through more than an RMSNorm without biases, so it is no sum of theirs")
    return norm


def _inputs(lm: LanguageModel, graph: Graph, layer: int) -> tuple[dict[str, HeadInput], Widened | None]:
    places = {kind: lm.place(f"{kind}.{layer}") for kind in HEAD_INPUTS}
    heads, width = graph.n_heads, {kind: place.width for kind, place in places.items()}
    z = width["q"] // heads
    groups = {"q": heads, "k": width["k"] // z, "v": width["k"] // z}
    if width["q"] % heads or width["k"] % z or not groups["k"] or heads % groups["k"] or width["v"] % groups["v"]:
        raise _refused(lm, layer, f"its queries, keys and values of widths {', '.join(map(str, width.values()))} are no {heads} heads")
    index_gz = {}
    for kind, place in places.items():
        index = place.view.index if isinstance(place.view, Columns) else torch.arange(place.width, device=lm.device)
        index_gz[kind] = index.view(groups[kind], -1)
    widened, columns_hz = (None, index_gz) if groups["k"] == heads else _widened(lm, layer, places, index_gz, heads)
    _refuse_norms_over_heads(lm, layer, z)
    inputs = {}
    for kind, place in places.items():
        weight_cd, bias_c = _weight(lm, place.module), getattr(place.module, "bias", None)
        whole = place.view is None  # then a view does, which takes no memory
        weight_gzd = weight_cd.unflatten(0, index_gz[kind].shape) if whole else weight_cd[index_gz[kind]]
        bias_gz = None if bias_c is None else bias_c[index_gz[kind]]
        inputs[kind] = HeadInput(place.module, weight_gzd, bias_gz, heads // groups[kind], columns_hz[kind])
    return inputs, widened


def _widened(
    lm: LanguageModel, layer: int, places: Mapping[str, Place], index_gz: Mapping[str, Tensor], heads: int
) -> tuple[Widened, dict[str, Tensor]]:
    """And where q, k and v of each head, [h, z], then are."""
    columns: dict[nn.Module, Tensor] = {}
    found_hz: dict[str, Tensor] = {}
    in_order = True
    for module in {place.module for place in places.values()}:
        kinds = [kind for kind in HEAD_INPUTS if places[kind].module is module]
        raw = torch.cat([index_gz[kind].flatten() for kind in kinds])
        in_order &= torch.equal(raw, torch.arange(len(raw), device=raw.device))  # as Phi-3's: queries, keys, values
        parts_hz = [index_gz[kind].repeat_interleave(heads // len(index_gz[kind]), dim=0) for kind in kinds]
        start = 0
        for kind, part_hz in zip(kinds, parts_hz, strict=True):
            found_hz[kind] = start + torch.arange(part_hz.numel(), device=part_hz.device).view_as(part_hz)
            start += part_hz.numel()
        columns[module] = torch.cat([part_hz.flatten() for part_hz in parts_hz])
    owners = [part for part in lm.place(f"resid_pre.{layer}").module.modules() if hasattr(part, GROUPS)]
    fused = len(columns) < len(HEAD_INPUTS)
    if len(owners) != 1 or not in_order or (fused and not hasattr(owners[0], KEY_HEADS)):
        raise _refused(lm, layer, "its query heads share keys and values in a way that cannot be undone")
    settings = {GROUPS: 1} | ({KEY_HEADS: heads} if hasattr(owners[0], KEY_HEADS) else {})
    return Widened(columns, settings, owners[0]), found_hz


def _refuse_norms_over_heads(lm: LanguageModel, layer: int, z: int) -> None:
    """Such as OLMo 2's, which norms the queries of all heads together, so that no head's can be changed alone."""
    known = {id(lm.norm_before(f"{kind}.{layer}")) for kind in ("attn_in", "mlp_in")} | {id(lm.place(f"attn_out.{layer}").module)}
    attention = lm.place(f"attn_in.{layer}").module
    for part in attention.modules():
        width: Sequence[int] = getattr(getattr(part, "weight", None), "shape", ())
        if "norm" in type(part).__name__.lower() and id(part) not in known and len(width) == 1 and width[0] > z:
            raise _refused(lm, layer, f"its {type(part).__name__} norms the queries or keys of all heads together")


def _weight(lm: LanguageModel, module: nn.Module) -> Tensor:
    """[c, d] of a plain linear map."""
    from transformers.pytorch_utils import Conv1D

    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | Conv1D) or weight is None or not weight.is_floating_point() or weight.is_meta:
        raise InputError(
            f"expected projections that are plain linear maps in {lm.name!r}, got {type(module).__name__}; load the model whole, without "
            "adapters and not in 8 bits"
        )
    return weight.T if isinstance(module, Conv1D) else weight


def _refused(lm: LanguageModel, layer: int, reason: str) -> InputError:
    return InputError(f"expected {lm.name!r} to be a model that the graph describes, but not so block {layer}: {reason}")
