"""The published heads: their number by class, and how a circuit is held against them."""

import pytest
import torch
import transformers as hf

from sae.model.language_model import LanguageModel
from steering.circuits.finding.published import compared_with_ioi, ioi_heads, is_gpt2_small
from steering.circuits.model_graph.graph import Graph

GPT2 = Graph(12, 12)


def test_there_are_26_heads_each_once():
    heads = ioi_heads()
    assert [len(row) for row in heads.values()] == [3, 8, 2, 4, 4, 3, 2]
    listed = [head for row in heads.values() for head in row]
    assert len(set(listed)) == 26
    assert all(GPT2.writer(head) for head in listed)


def test_a_circuit_is_counted_by_the_heads_that_write_in_it():
    edges = ["embed->v.9.9", "head.9.9->logits", "head.5.5->k.6.9", "head.1.1->logits", "mlp.3->logits"]
    found = compared_with_ioi(GPT2, GPT2.circuit(edges))
    assert (found["published"], found["found"], found["heads_of_circuit"]) == (26, 2, 3)
    assert found["by_chance"] == pytest.approx(26 * 3 / 144)
    assert found["classes"]["name mover"]["found"] == ["head.9.9"]
    assert found["classes"]["induction"]["found"] == ["head.5.5"]
    everything = compared_with_ioi(GPT2, GPT2.exists_rw)
    assert (everything["found"], everything["by_chance"]) == (26, 26)


def test_gpt2_small_is_told_from_others(byte_lm):
    assert not is_gpt2_small(byte_lm)
    with torch.device("meta"):
        small = hf.GPT2LMHeadModel(hf.GPT2Config())
    assert is_gpt2_small(LanguageModel(small, None, "gpt2"))
