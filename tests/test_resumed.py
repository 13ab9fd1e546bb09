"""Passes that begin at a block against whole passes, bit for bit, in every family."""

import copy

import pytest
import torch
from test_language_model import FAMILIES, ids_of, tiny
from test_sites import MORE, made

from sae.model.language_model import LanguageModel
from sae.model.resumed import Resumed, can_resume, first_block

SITES = ("embed", "resid_pre.1", "head_out.1", "resid_mid.1", "mlp_in.2", "resid_post.1", "resid_post.2")


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_resumed_passes_are_whole_passes_to_the_bit(family):
    lm = made(family) if family in MORE else tiny(family)
    ids_sp = ids_of()
    mask_sp = torch.ones_like(ids_sp)
    mask_sp[0, :3] = 0
    for mask in (None, mask_sp):
        for site in set(SITES) & set(lm.sites()):
            resumed, plain_spv = Resumed(lm, ids_sp, mask, [site]), lm.logits(ids_sp, mask)
            assert torch.equal(resumed.logits(), plain_spv)
            for edit in (lambda value: value + 1, lambda value: value * 0.5):
                with lm.edited({site: edit}):
                    assert torch.equal(resumed.logits(), lm.logits(ids_sp, mask))
            assert torch.equal(resumed.logits(), plain_spv)  # no edit has written into what was kept


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "opt"])
def test_blocks_below_do_not_run(family):
    lm = tiny(family)
    assert [first_block(lm, [site]) for site in ("embed", "attn_in.1", "mlp_out.1", "resid_post.1")] == [0, 1, 1, 2]
    assert first_block(lm, ["resid_post.1", "head_out.1"]) == 1
    resumed = Resumed(lm, ids_of(), None, ["resid_post.1"])
    ran: list[int] = []
    inner = [next(block.children()) for block in lm.blocks]
    handles = [part.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, part in enumerate(inner)]
    resumed.logits()
    for handle in handles:
        handle.remove()
    assert set(ran) == {2}
    assert all("forward" not in block.__dict__ for block in lm.blocks)


def test_a_model_whose_blocks_share_more_than_the_stream_runs_whole(byte_lm):
    """Its last block adds a mean that the first one left behind."""
    left, lm = {}, LanguageModel(copy.deepcopy(byte_lm.model))
    lm.blocks[0].attn.register_forward_hook(lambda _m, _a, out: left.update(mean=out[0].mean()))
    lm.blocks[2].attn.register_forward_hook(lambda _m, _a, out: (out[0] + left["mean"], *out[1:]))
    ids_sp = ids_of()
    assert not can_resume(lm, 2, ids_sp[:1, -3:])
    assert torch.equal(Resumed(lm, ids_sp, None, ["resid_post.1"]).logits(), lm.logits(ids_sp))
