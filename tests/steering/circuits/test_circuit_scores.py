"""Scores of edges against their formulas, written here with automatic differentiation through patched passes, and against calculus.

s sequences · p positions · r readers · w writers
"""

import ast
import re
from pathlib import Path

import pytest
import torch
from circuit_world import FAMILIES, P, engine_of, exact, hooks_of, logit_difference  # noqa: F401  (a fixture)
from test_language_model import ids_of

from sae.errors import InputError
from steering.circuits.finding.scores import METHODS, completeness, edge_scores
from steering.circuits.model_graph.engine import Engine

CLEAN, CORRUPT = ids_of(2, P, seed=1), ids_of(2, P, seed=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_ceap_accounts_for_the_whole_change_across_every_cut(family, exact):  # noqa: F811
    engine = Engine(exact(family))
    scores = edge_scores(engine, CLEAN, CORRUPT, logit_difference, steps=800 if family == "opt" else 40)  # OPT's ReLUs have kinks
    with torch.no_grad():
        clean_s, corrupt_s = (logit_difference(engine.lm.logits(ids_sp)) for ids_sp in (CLEAN, CORRUPT))
    torch.testing.assert_close(scores.clean_s, clean_s)
    torch.testing.assert_close(scores.corrupt_s, corrupt_s)
    for score_rw, change in zip(scores.score_srw, (corrupt_s - clean_s).tolist(), strict=True):
        sums = completeness(engine.graph, score_rw, change)
        assert len(sums) == (4 if engine.graph.parallel else 7)
        assert sums == pytest.approx(dict.fromkeys(sums, 1.0), abs=0.02)


def gradient_at(engine: Engine, embedding_spd: torch.Tensor) -> torch.Tensor:
    """Of the metric with respect to every edge's cut, [r, w], by automatic differentiation, over a stand-in that writes 1 more."""
    written_wspd = engine.writers(CLEAN)
    gradient_rspd = []
    with engine.lm.edited({"resid_pre.0": lambda _: embedding_spd}):
        for reader in range(len(engine.graph.readers)):
            added_nspd = torch.zeros_like(written_wspd[:1]).requires_grad_()
            with engine.reading([reader], lambda readers, added_nspd=added_nspd: added_nspd):
                logit_difference(engine.lm.logits(CLEAN)).sum().backward()
            gradient_rspd.append(added_nspd.grad[0])
    return torch.stack(gradient_rspd)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_methods_are_products_of_changes_and_mean_gradients(family, exact):  # noqa: F811
    """The gradients are those through `reading`, which the engine's own never goes through."""
    engine = Engine(exact(family))
    clean_wspd, corrupt_wspd = engine.writers(CLEAN), engine.writers(CORRUPT)
    points = {"eap": [0.0], "clean-corrupted": [0.0, 1.0], "eap-ig": [1.0, 0.75, 0.5, 0.25]}
    for method, shares in points.items():
        mean_rspd = sum(gradient_at(engine, clean_wspd[0] + share * (corrupt_wspd[0] - clean_wspd[0])) for share in shares) / len(shares)
        expected_srw = torch.einsum("rspd,wspd->srw", mean_rspd, corrupt_wspd - clean_wspd) * engine.graph.exists_rw
        found = edge_scores(engine, CLEAN, CORRUPT, logit_difference, method=method, steps=4)
        torch.testing.assert_close(found.score_srw, expected_srw, rtol=1e-9, atol=1e-12)


def test_conductance_is_products_of_steps_and_gradients_in_their_middle(exact):  # noqa: F811
    engine = Engine(exact("gemma2"))
    start_spd, end_spd = engine.writers(CLEAN)[0], engine.writers(CORRUPT)[0]

    def embedding_at(share):
        return start_spd + share * (end_spd - start_spd)

    def written_at(share):
        with engine.lm.edited({"resid_pre.0": lambda _: embedding_at(share)}):
            return engine.writers(CLEAN)

    expected_srw = 0
    for step in range(3):
        change_wspd = written_at((step + 1) / 3) - written_at(step / 3)
        expected_srw = expected_srw + torch.einsum("rspd,wspd->srw", gradient_at(engine, embedding_at((step + 0.5) / 3)), change_wspd)
    found = edge_scores(engine, CLEAN, CORRUPT, logit_difference, steps=3)
    torch.testing.assert_close(found.score_srw, expected_srw * engine.graph.exists_rw, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_scores_as_its_sequences_alone_and_leaves_no_hooks(method):
    engine = engine_of("mistral")
    before = hooks_of(engine.lm)
    together = edge_scores(engine, CLEAN, CORRUPT, logit_difference, method=method)
    for row in range(2):
        own = slice(row, row + 1)
        alone = edge_scores(engine, CLEAN[own], CORRUPT[own], logit_difference, method=method)
        torch.testing.assert_close(together.score_srw[row], alone.score_srw[0], rtol=1e-4, atol=1e-5)
    assert hooks_of(engine.lm) == before


def test_writers_that_stand_in_give_first_order_scores():
    engine = engine_of("gpt2")
    zero, mean = engine.zero_writers(), engine.mean_writers(CORRUPT)
    score_srw = {
        name: edge_scores(engine, CLEAN, given, logit_difference, method="eap").score_srw
        for name, given in (("zero", zero), ("mean", mean))
    }
    step, edge = 1e-2, engine.graph.edge("mlp.1->logits")
    for name, given in (("zero", zero), ("mean", mean)):
        moved = []
        for size in (step, -step):
            cut_rw = torch.zeros(engine.graph.exists_rw.shape)
            cut_rw[edge] = size
            with engine.patched(given, cut_rw), torch.no_grad():
                moved.append(logit_difference(engine.lm.logits(CLEAN)))
        torch.testing.assert_close(score_srw[name][:, edge[0], edge[1]], (moved[0] - moved[1]) / (2 * step), rtol=2e-3, atol=1e-4)
    with pytest.raises(InputError, match="expected corrupt prompts for ceap, which needs their run"):
        edge_scores(engine, CLEAN, zero, logit_difference)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_positions_part_is_the_score_of_a_change_there_alone(family, exact):  # noqa: F811
    engine = Engine(exact(family))
    clean_wspd, corrupt_wspd = engine.writers(CLEAN), engine.writers(CORRUPT)
    spans_sp = torch.tensor([[-1, 0, 0, 1, 2, 2], [1, 1, 0, 0, 0, 2]])
    found = edge_scores(engine, CLEAN, CORRUPT, logit_difference, method="eap", spans_sp=spans_sp).span_srwk
    for span in range(3):
        inside_sp1 = (spans_sp == span)[..., None]
        alone = edge_scores(engine, CLEAN, torch.where(inside_sp1, corrupt_wspd, clean_wspd), logit_difference, method="eap")
        torch.testing.assert_close(found[..., span], alone.score_srw, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "first-hop"])
def test_parts_by_position_add_up_to_the_score(method):
    engine, spans_sp = engine_of("llama"), torch.arange(P).expand(2, -1)
    found = edge_scores(engine, CLEAN, CORRUPT, logit_difference, method=method, spans_sp=spans_sp)
    assert found.span_srwk.shape == (*found.score_srw.shape, P)
    torch.testing.assert_close(found.span_srwk.sum(-1), found.score_srw, rtol=1e-4, atol=1e-5)


def test_unusable_input_is_refused():
    engine = engine_of("gpt2")
    with pytest.raises(InputError, match=r"expected one of the methods ceap, eap, .*, first-hop, got 'acdc'"):
        edge_scores(engine, CLEAN, CORRUPT, logit_difference, method="acdc")
    with pytest.raises(InputError, match="a method that adds up over positions for scores by span, got first-hop"):
        edge_scores(engine, CLEAN, CORRUPT, logit_difference, method="first-hop", spans_sp=torch.zeros_like(CLEAN))
    with pytest.raises(InputError, match=r"of the prompts' shape \(2, 6\) and some from 0 on, got torch.int64 of shape \(6,\)"):
        edge_scores(engine, CLEAN, CORRUPT, logit_difference, spans_sp=torch.arange(P))
    with pytest.raises(InputError, match="expected at least one step, got 0"):
        edge_scores(engine, CLEAN, CORRUPT, logit_difference, steps=0)
    with pytest.raises(InputError, match=r"expected corrupt prompts of the clean ones' shape \(2, 6\), got \(2, 5\)"):
        edge_scores(engine, CLEAN, CORRUPT[:, 1:], logit_difference)
    with pytest.raises(InputError, match=r"expected values of 16 writers \[w, s, p, d\], got shape \(3, 1, 1, 32\)"):
        edge_scores(engine, CLEAN, engine.zero_writers()[:3], logit_difference, method="eap")


def test_the_example_of_the_docs_prints_what_they_say(monkeypatch, capsys):
    root = Path(__file__).parents[3]
    monkeypatch.chdir(root)
    text = (root / "docs" / "circuits.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code, {})
    change, sums, circuit, kept = capsys.readouterr().out.splitlines()
    assert change == "from 3.84 by -7.49"
    assert set(ast.literal_eval(sums).values()) <= {n / 1000 for n in range(1000, 1011)}
    assert circuit.endswith(" 44")
    assert [f"{value:.2f}" for value in ast.literal_eval(kept)] == ["3.39", "4.44"]
