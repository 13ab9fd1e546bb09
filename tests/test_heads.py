"""Queries, keys and values of structurally different families against what the families' sources split off their projections.

s sequences · p positions
"""

from copy import deepcopy

import pytest
import torch
from test_language_model import ids_of, tiny
from test_sites import FAMILIES, block_of, made, names_of, taken_and_given

from sae.errors import InputError
from sae.model.language_model import LanguageModel


def parts(family: str, layer: int, attention: torch.nn.Module) -> dict[str, tuple[str, torch.Tensor]] | None:
    """By q, k and v: the module that makes it and which of its outputs it is, as the family's source splits them. 4 heads of 8."""
    if family in ("gpt2", "phi3"):  # one after the other
        width = 32 if family == "gpt2" else 16
        starts = {"q": (0, 32), "k": (32, 32 + width), "v": (32 + width, 32 + 2 * width)}
        name = "c_attn" if family == "gpt2" else "qkv_proj"
        return {kind: (name, torch.arange(*ends)) for kind, ends in starts.items()}
    if family in ("gpt_neox", "bloom"):  # head by head
        return {kind: ("query_key_value", torch.arange(96).view(4, 3, 8)[:, n].flatten()) for n, kind in enumerate("qkv")}
    if family == "falcon":  # one key and value for all
        return {
            kind: ("query_key_value", torch.arange(48).view(6, 8)[rows].flatten()) for kind, rows in zip("qkv", ([0, 1, 2, 3], [4], [5]))
        }
    if family == "qwen3_next":  # queries and gates head by head
        gated = {"q": ("q_proj", torch.arange(64).view(4, 2, 8)[:, 0].flatten())} | {
            kind: (f"{kind}_proj", torch.arange(16)) for kind in "kv"
        }
        return gated if layer == 1 else None
    return {kind: (f"{kind}_proj", torch.arange(attention.get_submodule(f"{kind}_proj").out_features)) for kind in "qkv"}


@pytest.mark.parametrize("family", [*FAMILIES, "phi3"])
@pytest.mark.parametrize("layer", [0, 1])
def test_queries_keys_and_values_are_recorded_and_changed_where_the_family_splits_them(family, layer):
    lm, ids_sp = tiny("phi3") if family == "phi3" else made(family), ids_of()
    name = "self_attn" if family == "phi3" else names_of(family, layer).attention
    attention = block_of(lm, layer).get_submodule(name)
    split = parts(family, layer, attention)
    if split is None:
        with pytest.raises(InputError, match=rf"got q\.{layer}, which it does not have: no one module of the attention makes it"):
            lm.width(f"q.{layer}")
        return
    _, given = taken_and_given(lm, layer, ids_sp)
    for kind, (module, index) in split.items():
        site = f"{kind}.{layer}"
        value = lm.record(ids_sp, [site])[site]
        assert torch.equal(value, given[f"{name}.{module}"][..., index])
        new = value + torch.randn(value.shape, generator=torch.Generator().manual_seed(4))

        def by_hand(_m, _args, out, index=index, new=new):
            out = out.clone()
            out[..., index] = new.reshape(*out.shape[:-1], -1)
            return out

        handle = attention.get_submodule(module).register_forward_hook(by_hand)
        expected = lm.logits(ids_sp)
        handle.remove()
        with lm.edited({site: lambda _, new=new: new}):
            assert torch.equal(lm.logits(ids_sp), expected)
            assert torch.equal(lm.record(ids_sp, [site])[site], new)
        assert not torch.equal(expected, lm.logits(ids_sp))


@pytest.mark.parametrize("family", ["qwen3_next", "falcon", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_are_told_from_gates_keys_and_values_in_half_precision(family, dtype):
    if family == "phi3":
        lm, name = LanguageModel(deepcopy(tiny("phi3").model).to(dtype)), "self_attn"
    else:
        lm, name = LanguageModel(deepcopy(made(family).model).to(dtype)), names_of(family, 1).attention
    for kind, (module, index) in parts(family, 1, block_of(lm, 1).get_submodule(name)).items():
        place = lm.place(f"{kind}.1")
        assert place.module is block_of(lm, 1).get_submodule(f"{name}.{module}")
        assert place.width == len(index)
        assert place.view is None or torch.equal(place.view.index, index)
