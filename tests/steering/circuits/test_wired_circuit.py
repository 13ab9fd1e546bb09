"""An induction circuit wired by hand into a stock GPT-2: the truth of every edge is known, and found where estimates miss it.

Layer 0, head 0 writes the token before (values from the embedding); layer 1, head 0 looks for the present token among those (queries from
the embedding, keys from head 0) and writes the token it finds to the output, which the unembedding reads. The other heads are decoys.

v tokens · p positions · k coordinates, each of which stands in the stream as x and as -x, so that its mean is 0
"""

import math
from random import Random

import numpy as np
import pytest
import torch
import transformers as hf

from sae.model.language_model import LanguageModel
from steering.circuits.finding.metrics import jaccard
from steering.circuits.finding.scores import completeness, edge_scores
from steering.circuits.finding.searches import Patching, acdc, eliminate, exact_scores
from steering.circuits.model_graph.engine import Engine
from steering.circuits.tasks.generators import Pair
from steering.circuits.tasks.prompts import Prompts

V, P, HEADS = 12, 9, 2
M = 1e5  # what makes a norm's scale the same for every stream
GAIN = 20.0  # of the unembedding
TRUE = ["embed->v.0.0", "head.0.0->k.1.0", "embed->q.1.0", "embed->v.1.0", "head.1.0->logits"]
POSITIONS = ["embed->q.0.0", "embed->k.0.0"]  # equal in both prompts, so that only zero ablation shows them


def wired(beta: float) -> LanguageModel:
    """Attention to what matches is e^beta times that to anything else."""
    k = 4 * V + P + 1
    d = 2 * k + 2
    tok, pos, prev, out, junk, spare = (
        slice(*ends) for ends in ((0, V), (V, V + P), *((V * n + P, V * (n + 1) + P) for n in (1, 2, 3)), (k - 1, k))
    )
    config = hf.GPT2Config(
        vocab_size=V, n_positions=P, n_embd=d, n_layer=2, n_head=HEADS, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False
    )
    model = hf.GPT2LMHeadModel(config).double()
    for weight in model.parameters():
        weight.data.zero_()
    size = d // HEADS

    def write(rows_nd: torch.Tensor, where: slice, value_nn: torch.Tensor) -> None:
        rows_nd[:, where] += value_nn
        rows_nd[:, where.start + k : where.stop + k] -= value_nn

    body = model.transformer
    write(body.wte.weight.data, tok, torch.eye(V))
    write(body.wpe.weight.data, pos, torch.eye(P))
    shift = torch.eye(P).roll(1, 1)  # position j as a key says j + 1
    shift[-1] = 0
    wiring = {  # layer, head -> what queries, keys and values read, and where the head writes
        (0, 0): ((pos, torch.eye(P)), (pos, shift), (tok, torch.eye(V)), prev),
        (0, 1): (None, None, (tok, torch.eye(V)), junk),
        (1, 0): ((tok, torch.eye(V)), (prev, torch.eye(V)), (tok, torch.eye(V)), out),
        (1, 1): (None, None, (junk, torch.eye(V)), prev),
    }
    for (layer, head), (*inputs, target) in wiring.items():
        attention = body.h[layer].attn
        for number, one in enumerate(inputs):
            if one is not None:
                where, weight = one
                start = number * d + head * size
                scale = beta * math.sqrt(size) if number == 0 else 1.0
                attention.c_attn.weight.data[where, start : start + weight.shape[1]] = weight.double() * scale
        write(attention.c_proj.weight.data[head * size : head * size + V], target, torch.eye(V))
    body.h[0].attn.c_proj.bias.data[-2:] = torch.tensor([M, -M], dtype=torch.float64)
    for block in body.h:  # an MLP writes where no one reads
        block.mlp.c_fc.weight.data[tok, :V] = torch.eye(V).double()
        write(block.mlp.c_proj.weight.data[:V], spare, torch.linspace(0.1, 1, V)[:, None])
    of_constant = M * math.sqrt(2 / d)
    for norm in (*(norm for block in body.h for norm in (block.ln_1, block.ln_2)), body.ln_f):
        norm.weight.data.fill_(of_constant)
    body.h[0].ln_1.weight.data.fill_(math.sqrt(4 / d + config.layer_norm_epsilon))  # a token and a position: two ones, twice
    model.lm_head.weight.data[:, out] = GAIN * torch.eye(V).double()
    return LanguageModel(model, None, "wired induction")


def drawn(n: int = 8) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """Pairs of sequences whose last token stood before, not at the beginning, and what follows it in each."""
    rng, rows = Random(4), []
    while len(rows) < n:
        sides = []
        for _ in range(2):
            tokens, at = rng.sample(range(V), P - 1), rng.randint(1, P - 3)
            sides.append(([*tokens, tokens[at]], tokens[at + 1]))
        (clean, right), (corrupt, wrong) = sides
        if right != wrong:
            rows.append((clean, corrupt, right, wrong))
    clean, corrupt, right, wrong = zip(*rows)
    return np.array(clean), np.array(corrupt), list(right), list(wrong)


CLEAN, CORRUPT, RIGHT, WRONG = drawn()


def prompts() -> Prompts:
    n = len(CLEAN)
    mask_np = torch.ones(n, P, dtype=torch.long)
    return Prompts(
        "wired", "other", "logit_difference", tuple(Pair((f"{row}",), ("",), ("",), ("",)) for row in range(n)),
        torch.tensor(CLEAN), mask_np, torch.tensor(CORRUPT), mask_np, torch.arange(P).repeat(n, 1),
        torch.arange(n).repeat_interleave(2), torch.tensor([RIGHT, WRONG]).T.flatten(), torch.tensor([1.0, -1.0]).repeat(n).double(),
    )  # fmt: skip


def formula(beta: float, before: np.ndarray, query: np.ndarray, values: np.ndarray, *, zero_before: bool = False) -> np.ndarray:
    """The metric of every pair, from the tokens that each edge carries: those of the values of head 0.0, of queries and values of 1.0."""
    found = []
    for row in range(len(CLEAN)):
        weight_pp = np.tril(np.ones((P, P))) * np.exp(beta * np.eye(P, k=-1))
        weight_pp /= weight_pp.sum(1, keepdims=True)
        previous_pv = weight_pp @ np.eye(V)[before[row]] * (not zero_before)
        score_p = beta * previous_pv @ np.eye(V)[query[row][-1]]
        attention_p = np.exp(score_p - score_p.max())
        attention_p /= attention_p.sum()
        logits_v = GAIN * attention_p @ np.eye(V)[values[row]]
        found.append(logits_v[RIGHT[row]] - logits_v[WRONG[row]])
    return np.array(found)


def truth(beta: float) -> dict[str, np.ndarray]:
    """What cutting each of the five edges adds to the metric."""
    whole_n = formula(beta, CLEAN, CLEAN, CLEAN)
    by_keys = formula(beta, CORRUPT, CLEAN, CLEAN) - whole_n
    return {
        "embed->v.0.0": by_keys,
        "head.0.0->k.1.0": by_keys,
        "embed->q.1.0": formula(beta, CLEAN, CORRUPT, CLEAN) - whole_n,
        "embed->v.1.0": formula(beta, CLEAN, CLEAN, CORRUPT) - whole_n,
        "head.1.0->logits": formula(beta, CORRUPT, CORRUPT, CORRUPT) - whole_n,
    }


@pytest.fixture(scope="module", params=[5.0, 40.0])
def world(request):
    engine = Engine(wired(request.param))
    return request.param, engine, Patching(engine, prompts(), batch=64)


def test_the_model_does_what_is_wired(world):
    beta, engine, patching = world
    graph = engine.graph
    assert patching(graph.exists_rw) == pytest.approx(formula(beta, CLEAN, CLEAN, CLEAN), rel=1e-6)
    assert patching(graph.exists_rw & False) == pytest.approx(formula(beta, CORRUPT, CORRUPT, CORRUPT), rel=1e-6, abs=1e-6)
    assert (patching(graph.exists_rw) > 0).all()


def test_exactly_five_edges_matter_each_as_much_as_it_should(world):
    beta, engine, patching = world
    graph = engine.graph
    edges = [(r, w) for r, w in graph.exists_rw.nonzero().tolist()]
    assert len(edges) == 46
    found = {graph.edge_name(*edge): rise_n for edge, rise_n in zip(edges, exact_scores(patching, edges))}
    for name, expected_n in truth(beta).items():
        assert np.abs(expected_n).max() > 5
        assert found[name] == pytest.approx(expected_n, rel=1e-6, abs=1e-6), name
    assert max(np.abs(found[name]).max() for name in set(found) - set(TRUE)) < 1e-6


def test_the_five_edges_are_enough_and_all(world):
    _, engine, patching = world
    graph = engine.graph
    five_rw = graph.circuit(TRUE)
    assert patching(five_rw) == pytest.approx(patching(graph.exists_rw), rel=1e-6)
    assert patching(graph.exists_rw & ~five_rw) == pytest.approx(patching(graph.exists_rw & False), rel=1e-6, abs=1e-6)


def test_zero_ablation_shows_where_the_positions_are_read(world):
    _, engine, patching = world
    graph, pairs = engine.graph, patching.prompts
    changed = set()
    with torch.no_grad():
        whole_n = pairs.measure(engine.lm.logits(pairs.clean_np)[:, -1])
        for r, w in graph.exists_rw.nonzero().tolist():
            cut_rw = torch.zeros(graph.exists_rw.shape, dtype=torch.float64)
            cut_rw[r, w] = 1
            with engine.patched(engine.zero_writers(), cut_rw):
                if (pairs.measure(engine.lm.logits(pairs.clean_np)[:, -1]) - whole_n).abs().max() > 1e-3:
                    changed.add(graph.edge_name(r, w))
    assert changed == {*TRUE, *POSITIONS}


def test_searches_find_the_five_edges(world):
    _, engine, patching = world
    five_rw = engine.graph.circuit(TRUE)
    assert jaccard(acdc(patching, 1e-4).circuit_rw, five_rw) == 1
    pairs = patching.prompts
    scores = edge_scores(engine, pairs.clean_np, pairs.corrupt_np, lambda logits: pairs.measure(logits[:, -1]), method="ceap", steps=30)
    assert jaccard(eliminate(patching, scores.score_srw.mean(0), 20, 1e-4).circuit_rw, five_rw) == 1


def test_estimates_by_gradients_miss_what_saturates():
    """A softmax that is one-sided has no gradient: EAP misses queries and keys altogether; conductance along the line does not."""
    beta = 20.0
    engine = Engine(wired(beta))
    pairs, graph = prompts(), engine.graph
    metric = lambda logits: pairs.measure(logits[:, -1])  # noqa: E731
    exact = {name: rise_n.mean() for name, rise_n in truth(beta).items()}
    eap, ceap = (
        edge_scores(engine, pairs.clean_np, pairs.corrupt_np, metric, method=method, steps=100).score_srw.mean(0)
        for method in ("eap", "ceap")
    )
    for name in ("embed->v.0.0", "head.0.0->k.1.0", "embed->q.1.0"):
        assert abs(eap[graph.edge(name)]) < 1e-4 * abs(exact[name])
        assert abs(ceap[graph.edge(name)]) > 0.1 * abs(exact[name])
    for name in ("embed->v.1.0", "head.1.0->logits"):
        assert float(eap[graph.edge(name)]) == pytest.approx(exact[name], rel=1e-3)
    change = truth(beta)["head.1.0->logits"].mean()
    assert list(completeness(graph, ceap, change).values()) == pytest.approx([1.0] * 5, abs=0.02)
