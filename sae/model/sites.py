"""Names of the places where a causal LM's vectors flow, and which modules they are in each family of architectures.

With L counted from 0: `resid_pre.L` and `resid_post.L` (the residual stream before and after block L), `attn_out.L` and `mlp_out.L` (what
block L adds to it), `head_out.L` (the heads' outputs, concatenated, before the output projection).
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from torch import nn

from sae.errors import InputError

KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_out")
SAFE_KINDS = ("resid_pre", "resid_post", "head_out")  # mean the same in any block, whatever it does to what it adds


class Family(NamedTuple):
    """Where related architectures keep their parts: `blocks` and `final_norm` below the decoder, the others below a block."""

    model_types: str
    """`model_type`s in Hugging Face configurations for which attn_out and mlp_out are known to be what is added to the stream"""
    blocks: str
    attn_out: str
    """the module whose output is added, so a norm that follows the attention belongs to it"""
    mlp_out: str
    projection: str
    """of the heads' outputs; its input is head_out"""
    final_norm: str


# The first row whose modules all exist is taken: rows with more specific names stand above those with common ones.
FAMILIES = (
    Family("gpt2", "h", "attn", "mlp", "attn.c_proj", "ln_f"),
    Family("gptj", "h", "attn", "mlp", "attn.out_proj", "ln_f"),
    Family("gpt_neo", "h", "attn", "mlp", "attn.attention.out_proj", "ln_f"),
    Family("gpt_neox", "layers", "attention", "mlp", "attention.dense", "final_layer_norm"),
    Family(
        "gemma2 gemma3_text olmo2",
        "layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
        "norm",
    ),
    Family("llama mistral mixtral qwen2 qwen3 phi3 olmo", "layers", "self_attn", "mlp", "self_attn.o_proj", "norm"),
    Family("phi", "layers", "self_attn", "mlp", "self_attn.dense", "final_layernorm"),
    Family("opt", "layers", "self_attn", "fc2", "self_attn.out_proj", "final_layer_norm"),
)


class Site(NamedTuple):
    kind: str
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"


def parse_site(text: str | Site, kinds: Sequence[str] = KINDS, n_layers: int | None = None) -> Site:
    """`"resid_post.2"` -> `Site("resid_post", 2)`; with `n_layers`, only a site that a model with so many blocks has.

    Raises `InputError` that lists the sites there are.
    """
    match = re.fullmatch(r"([a-z_]+)\.(0|[1-9][0-9]*)", str(text))
    if match and match[1] in kinds and (n_layers is None or int(match[2]) < n_layers):
        return Site(match[1], int(match[2]))
    last = "L" if n_layers is None else n_layers - 1
    there_are = ", ".join(f"{kind}.0 to {kind}.{last}" for kind in kinds)
    raise InputError(f"expected a site of the model, one of {there_are}, got {text!r}")


def family_of(decoder: nn.Module, name: str) -> Family:
    """The first row whose modules the decoder has. Raises `InputError` that lists what was looked for."""

    def has(module: nn.Module, path: str) -> bool:
        with suppress(AttributeError):
            return module.get_submodule(path) is not None
        return False

    for family in FAMILIES:
        parts = (family.attn_out, family.mlp_out, family.projection)
        if has(decoder, family.blocks) and all(has(decoder.get_submodule(f"{family.blocks}.0"), part) for part in parts):
            return family
    looked_for = "; ".join(f"{f.blocks} with {f.attn_out}, {f.mlp_out} and {f.projection}" for f in FAMILIES)
    raise InputError(
        f"expected {name!r} to keep its blocks as one of ({looked_for}), found {type(decoder).__name__}, which has none of them"
    )
