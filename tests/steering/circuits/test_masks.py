"""Learned masks: the wired circuit is found even from scores that say nothing, gates are Louizos' and draws come from the seed."""

import math

import numpy as np
import pytest
import torch
from test_wired_circuit import TRUE, prompts, wired

from sae.errors import InputError
from steering.circuits.finding.gates import drawn, opened
from steering.circuits.finding.masks import learn_masks
from steering.circuits.finding.metrics import jaccard
from steering.circuits.finding.searches import Patching
from steering.circuits.model_graph.engine import Engine


@pytest.fixture(scope="module")
def patching() -> Patching:
    return Patching(Engine(wired(40.0)), prompts(), batch=64)


def scores(patching: Patching) -> torch.Tensor:
    """Of any edges, by chance."""
    drawn_rw = torch.rand(patching.graph.exists_rw.shape, generator=torch.Generator().manual_seed(7))
    return drawn_rw * patching.graph.exists_rw


def test_the_wired_circuit_is_learned(patching):
    five_rw, score_rw = patching.graph.circuit(TRUE), scores(patching)
    begun_with = score_rw >= score_rw.flatten().topk(5).values[-1]
    assert jaccard(begun_with, five_rw) < 0.3
    found = learn_masks(patching, score_rw, 5, steps=150)
    assert jaccard(found.circuit_rw, five_rw) == 1
    assert found.expected == pytest.approx(5, abs=1)
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_everything_comes_from_the_seed(patching):
    first, again, other = (learn_masks(patching, scores(patching), 5, steps=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.gate_rw, again.gate_rw)
    assert not torch.equal(first.gate_rw, other.gate_rw)


def test_gates_are_hard_concrete():
    """Against the formula in numpy with the same uniforms, and the probability of being open by counting."""
    gate = torch.tensor([-3.0, -1.0, 0.0, 2.0])
    sampled = drawn(gate.expand(20_000, 4), torch.Generator().manual_seed(0)).numpy()
    u = torch.rand((20_000, 4), generator=torch.Generator().manual_seed(0)).double().numpy()
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + gate.numpy()) / (2 / 3)))
    assert sampled == pytest.approx(np.clip(-0.1 + 1.2 * s, 0, 1), abs=1e-4)
    assert opened(gate).numpy() == pytest.approx((sampled > 0).mean(0), abs=0.015)
    assert (sampled == 1).mean() > 0.1 < (sampled == 0).mean()


def test_a_cut_by_fractions_is_what_the_kl_is_of(patching):
    """One pair alone, by the engine, its KL written here."""
    engine, pairs, row = patching.engine, patching.prompts, 2
    cut_rw = torch.rand(patching.graph.exists_rw.shape, dtype=torch.float64) * patching.graph.exists_rw
    with torch.no_grad():
        clean_v = engine.lm.logits(pairs.clean_np[row : row + 1])[0, -1].log_softmax(-1)
        with engine.patched(engine.writers(pairs.corrupt_np[row : row + 1]), cut_rw):
            cut_v = engine.lm.logits(pairs.clean_np[row : row + 1])[0, -1].log_softmax(-1)
        found = patching.kl_of_cut(torch.tensor([0, row]), torch.stack([0 * cut_rw, cut_rw]))
    expected = sum(math.exp(p) * (p - q) for p, q in zip(clean_v.tolist(), cut_v.tolist()))
    assert found.tolist() == pytest.approx([0, expected], rel=1e-9, abs=1e-12)
    assert expected > 0.01


def test_bad_requests(patching):
    with pytest.raises(InputError, match="at most 46 edges"):
        learn_masks(patching, scores(patching), 47)
    with pytest.raises(InputError, match="got only zeros"):
        learn_masks(patching, 0 * scores(patching), 5)
