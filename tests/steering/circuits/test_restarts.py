"""Passes that begin at the block of the first cut edge, against passes of the whole model."""

import numpy as np
import pytest
import torch
from circuit_world import P, exact, logit_difference  # noqa: F401  (a fixture)
from test_language_model import ids_of

from sae.errors import InputError
from steering.circuits.finding.searches import Patching, acdc, exact_scores
from steering.circuits.model_graph.engine import Engine
from steering.circuits.tasks.generators import Pair
from steering.circuits.tasks.prompts import Prompts

N = 3
CLEAN, CORRUPT = ids_of(N, P, seed=1), ids_of(N, P, seed=2)


def prompts() -> Prompts:
    mask_np = torch.ones(N, P, dtype=torch.long)
    mask_np[0, :2] = 0
    return Prompts(
        "own", "own", "logit_difference", tuple(Pair((f"{row}",), ("",), ("",), ("",)) for row in range(N)),
        CLEAN, mask_np, CORRUPT, mask_np, torch.arange(P).repeat(N, 1),
        torch.arange(N).repeat_interleave(2), torch.tensor([3, 7] * N), torch.tensor([1.0, -1.0] * N).double(),
    )  # fmt: skip


def both(engine: Engine) -> tuple[Patching, Patching]:
    """Begun at a later block, and whole."""
    whole = Engine(engine.lm)
    whole.__dict__["_outputs"] = None
    assert engine.restarts
    assert not whole.restarts
    return Patching(engine, prompts(), batch=7), Patching(whole, prompts(), batch=7)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen3", "gemma2", "gpt_neox", "gptj", "granite"])
def test_edges_cut_alone_do_the_same(family, exact):  # noqa: F811
    later, whole = both(Engine(exact(family)))
    edges = [tuple(edge) for edge in later.graph.exists_rw.nonzero().tolist()[::7]]
    found, expected = exact_scores(later, edges), exact_scores(whole, edges)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 if family == "gptj" else 1e-12)
    assert (np.abs(expected) > 1e-6).mean() > 0.8


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_acdc_finds_the_same(family, exact):  # noqa: F811
    later, whole = both(Engine(exact(family)))
    (cut_all,) = whole.kls([torch.zeros_like(whole.graph.exists_rw)])
    found, expected = (acdc(patching, cut_all / 50) for patching in (later, whole))
    assert torch.equal(found.circuit_rw, expected.circuit_rw)
    assert 0 < int(found.circuit_rw.sum()) < found.circuit_rw.numel()
    assert found.kl == pytest.approx(expected.kl, abs=1e-12)


def test_earlier_blocks_are_not_run_and_come_back(exact):  # noqa: F811
    engine = Engine(exact("llama"))
    blocks, ran = engine.lm.model.model.layers, []
    for number, block in enumerate(blocks):
        block.mlp.register_forward_hook(lambda _module, _args, _output, number=number: ran.append(number))
    patching = Patching(engine, prompts(), batch=64)
    patching(engine.graph.exists_rw)
    circuits = [engine.graph.exists_rw & ~engine.graph.circuit([name]) for name in ("embed->k.2.1", "head.0.1->mlp_in.2", "mlp.1->logits")]
    patching.metrics(circuits)  # what is kept for all passes
    ran.clear()
    patching.metrics(circuits)
    assert ran == [2]
    ran.clear()
    patching.metrics(circuits[2:])
    assert ran == []
    patching(engine.graph.exists_rw)
    assert ran == [0, 1, 2]


def test_a_model_whose_later_blocks_need_earlier_ones_is_run_whole(exact):  # noqa: F811
    engine = Engine(exact("gpt2"))
    first, last = engine.lm.model.transformer.h[0], engine.lm.model.transformer.h[-1]
    kept = []
    first.mlp.register_forward_hook(lambda _module, _args, output: kept.append(output))
    last.register_forward_hook(lambda _module, _args, output: output + kept.pop() if kept else output)
    assert not engine.restarts
    assert exact_scores(Patching(engine, prompts()), [engine.graph.edge("embed->logits")]).shape == (1, N)
    with pytest.raises(InputError, match="whose passes can begin at a later block"), engine.begun_at(1, torch.zeros(1, 1, 32)):
        pass
