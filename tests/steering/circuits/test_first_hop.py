"""First-hop scores against passes of the whole model in which one edge is cut, and a finite difference after the reader.

e edges · s sequences · p positions · c numbers at a site · h heads · r readers · w writers
"""

import pytest
import torch
from circuit_world import FAMILIES, P, engine_of, exact, logit_difference  # noqa: F401  (a fixture)
from test_language_model import ids_of
from test_wired_circuit import prompts, truth, wired

from sae.errors import InputError
from steering.circuits.finding.scores import edge_scores
from steering.circuits.model_graph.engine import Engine

CLEAN, CORRUPT = ids_of(2, P, seed=1), ids_of(2, P, seed=2)
FLOAT32_INSIDE = ("gptj", "mixtral")  # queries and keys, the router, whatever the dtype


def by_whole_passes(engine: Engine, clean_sp: torch.Tensor, corrupt_sp: torch.Tensor, step: float) -> torch.Tensor:
    """Of one pair, [r, w]: how the reader's head or MLP answers to the cut, and how the metric moves along that answer."""
    graph, lm = engine.graph, engine.lm
    score_rw, corrupt_wspd = torch.zeros(graph.exists_rw.shape, dtype=torch.float64), engine.writers(corrupt_sp)

    def cut(edges_e2: torch.Tensor) -> torch.Tensor:
        cut_erw = torch.zeros(len(edges_e2), *graph.exists_rw.shape, dtype=torch.float64)
        cut_erw[torch.arange(len(edges_e2)), edges_e2[:, 0], edges_e2[:, 1]] = 1
        return cut_erw

    for reader in range(len(graph.readers)):
        kind, *numbers = graph.readers[reader].split(".")
        edges_e2 = torch.tensor([(reader, w) for w in range(int(graph.seen_r[reader]))])
        ids_ep = clean_sp.expand(len(edges_e2), -1)
        if kind == "logits":
            with torch.no_grad(), engine.patched(corrupt_wspd, cut(edges_e2)):
                score_rw[reader] = logit_difference(lm.logits(ids_ep))
            score_rw[reader] -= logit_difference(lm.logits(clean_sp))
            continue
        site = f"{'mlp_out' if kind == 'mlp_in' else 'head_out'}.{numbers[0]}"
        clean_spc = lm.record(clean_sp, [site])[site]
        with engine.patched(corrupt_wspd, cut(edges_e2)):
            change_epc = lm.record(ids_ep, [site])[site] - clean_spc
        if kind != "mlp_in":  # nothing but this head's output
            change_ephz = change_epc.unflatten(-1, (graph.n_heads, -1))
            others = [head for head in range(graph.n_heads) if head != int(numbers[1])]
            assert change_ephz[:, :, others].abs().max() < 1e-4
            change_ephz[:, :, others] = 0
            change_epc = change_ephz.flatten(-2)
        moved = []
        for sign in (1, -1):
            with lm.edited({site: lambda now, by=sign * step * change_epc: now + by}), torch.no_grad():
                moved.append(logit_difference(lm.logits(ids_ep)))
        score_rw[reader, : len(edges_e2)] = (moved[0] - moved[1]) / (2 * step)
    return score_rw


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_the_readers_own_answer_and_the_gradient_behind_it(family, exact):  # noqa: F811
    engine = Engine(exact(family))
    found = edge_scores(engine, CLEAN, CORRUPT, logit_difference, method="first-hop")
    rough = family in FLOAT32_INSIDE
    expected_rw = by_whole_passes(engine, CLEAN[1:], CORRUPT[1:], 1e-2 if rough else 1e-5)
    tolerance = (1e-3 if rough else 1e-7) * float(expected_rw.abs().max())
    torch.testing.assert_close(found.score_srw[1], expected_rw, rtol=0, atol=tolerance)
    assert (found.score_srw[:, ~engine.graph.exists_rw] == 0).all()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_padded_prompts_score_as_alone(family):
    engine, mask_sp = engine_of(family), torch.ones(2, P, dtype=torch.long)
    mask_sp[0, :2] = 0
    together = edge_scores(engine, CLEAN, CORRUPT, logit_difference, mask_sp, method="first-hop").score_srw
    for row, first in ((0, 2), (1, 0)):
        clean_sp, corrupt_sp = (ids_sp[row : row + 1, first:] for ids_sp in (CLEAN, CORRUPT))
        alone_rw = edge_scores(engine, clean_sp, corrupt_sp, logit_difference, method="first-hop").score_srw[0]
        torch.testing.assert_close(together[row], alone_rw, rtol=0, atol=2e-5 * float(alone_rw.abs().max()))


@pytest.mark.parametrize("beta", [20.0, 40.0])
def test_it_sees_through_the_saturated_softmax_of_its_reader(beta):
    """Where gradients at queries and keys are nothing; the edge whose effect goes through another saturated softmax stays unseen."""
    engine, pairs, exact = Engine(wired(beta)), prompts(), truth(beta)  # noqa: F811
    first_hop, eap = (
        edge_scores(engine, pairs.clean_np, pairs.corrupt_np, lambda logits: pairs.measure(logits[:, -1]), method=method).score_srw.mean(0)
        for method in ("first-hop", "eap")
    )
    for name in ("head.0.0->k.1.0", "embed->q.1.0", "embed->v.1.0", "head.1.0->logits"):
        assert float(first_hop[engine.graph.edge(name)]) == pytest.approx(exact[name].mean(), rel=1e-3), name
    for name in ("head.0.0->k.1.0", "embed->q.1.0", "embed->v.0.0"):
        assert abs(eap[engine.graph.edge(name)]) < 1e-4 * abs(exact[name].mean())
    assert abs(first_hop[engine.graph.edge("embed->v.0.0")]) < 1e-4 * abs(exact["embed->v.0.0"].mean())


def test_a_model_whose_blocks_cannot_be_run_alone_is_refused(exact):  # noqa: F811
    engine = Engine(exact("gpt2"))
    first, last = engine.lm.model.transformer.h[0], engine.lm.model.transformer.h[-1]
    kept = []
    first.mlp.register_forward_hook(lambda _module, _args, output: kept.append(output))
    last.register_forward_hook(lambda _module, _args, output: output + kept.pop() if kept else output)
    with pytest.raises(InputError, match="whose blocks can be run alone for first-hop"):
        edge_scores(engine, CLEAN, CORRUPT, logit_difference, method="first-hop")
