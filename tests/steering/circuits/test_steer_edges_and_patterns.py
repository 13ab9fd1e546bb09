"""Steering along one edge, at what MLPs write, and where heads look: against passes and softmaxes by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_steer_circuit import DEMO, ids_of, model_of

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.circuits.files import Circuit
from steering.circuits.model_graph.engine import Engine
from steering.circuits.steering_nodes.arms import (
    Arm,
    carriers,
    edge_arms,
    make_arms,
    measure_arm,
    random_edges,
    steered_by,
    strongest_edges,
    writers_change,
)
from steering.circuits.steering_nodes.command import SteerCircuitConfig, steer_circuit
from steering.circuits.steering_nodes.patterns import attending_to
from steering.circuits.tasks.prompts import make_prompts
from steering.vector import SteeringVector

MARKED = torch.tensor([[True, False, False, True, False, False, False], [False, False, True, False, False, False, False]])


def patterns_of(lm: LanguageModel, ids_sp: torch.Tensor) -> list[torch.Tensor]:
    seen = []
    with lm.attention_edited(lambda _, pattern, value: (seen.append(pattern.clone()) or pattern, value)), torch.no_grad():
        lm.logits(ids_sp)
    return seen


@pytest.mark.parametrize("amount", [2.0, -1.5, 80.0, -800.0])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_chosen_heads_look_elsewhere_and_the_others_keep_every_bit(family, amount):
    lm, ids_sp = model_of(family), ids_of()
    before = patterns_of(lm, ids_sp)
    with attending_to(lm, {1: [0, 3]}, MARKED, amount):
        after = patterns_of(lm, ids_sp)
    assert torch.equal(before[0], after[0])  # the block before
    assert torch.equal(before[1][:, [1, 2]], after[1][:, [1, 2]])
    for s, h, q in np.ndindex(2, 2, 7):
        p_k = before[1][s, [0, 3][h], q]
        weight = [float(p) * math.exp(amount * (bool(m) - (amount > 0))) for p, m in zip(p_k, MARKED[s])]
        if sum(weight) == 0 or not MARKED[s, : q + 1].any() or (amount < -700 and MARKED[s, : q + 1].all()):
            weight = p_k.tolist()  # no marked column is seen, or nothing else
        expected = torch.tensor([one / sum(weight) for one in weight])
        torch.testing.assert_close(after[1][s, [0, 3][h], q], expected.to(p_k), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(after[1].sum(-1), torch.ones_like(after[1].sum(-1)))
    assert not torch.equal(before[2], after[2])


def test_the_softmax_of_raised_logits_by_hand():
    """GPT-2 in float64, from its queries, keys and values."""
    lm, ids_sp = model_of("gpt2"), ids_of()
    with torch.no_grad():
        sites = lm.record(ids_sp, ["q.1", "k.1", "v.1"])
        with attending_to(lm, {1: [2]}, MARKED, 1.3):
            found_spz = lm.record(ids_sp, ["head_out.1"])["head_out.1"][..., 16:24]
    q, k, v = (sites[f"{kind}.1"].double()[..., 16:24] for kind in "qkv")
    logits_sqk = q @ k.transpose(1, 2) / math.sqrt(8) + 1.3 * MARKED[:, None]
    logits_sqk = logits_sqk.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    torch.testing.assert_close(found_spz.double(), logits_sqk.softmax(-1) @ v, rtol=1e-6, atol=1e-6)


def test_what_patterns_refuse():
    lm, ids_sp = model_of("gpt2"), ids_of()
    for heads, marked, amount, message in (
        ({0: [0]}, MARKED, math.inf, "a finite amount"),
        ({3: [0]}, MARKED, 1.0, "layers from 0 to 2, got 3"),
        ({0: [1, 4]}, MARKED, 1.0, "heads from 0 to 3, got 1, 4"),
        ({0: [0]}, MARKED[:, :5], 1.0, r"marks of 2 sequences by 7 columns, got \(2, 5\)"),
    ):
        with pytest.raises(InputError, match=message), attending_to(lm, heads, marked, amount), torch.no_grad():
            lm.logits(ids_sp)


def test_an_mlp_that_writes_the_direction_too():
    """By a hook of torch on the module itself."""
    lm, ids_sp, added_d = model_of("gpt2"), ids_of(), torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    handles = [lm.model.transformer.h[layer].mlp.register_forward_hook(lambda *args: args[2] + added_d) for layer in (0, 2)]
    with torch.no_grad():
        expected = lm.logits(ids_sp)
        for handle in handles:
            handle.remove()
        engine = Engine(lm)
        with steered_by(engine, Arm("", mlps=(0, 2)), added_d):
            found = lm.logits(ids_sp)
        assert not torch.equal(lm.logits(ids_sp), expected)
    torch.testing.assert_close(found, expected)
    circuit_rw = engine.graph.circuit(["embed->q.2.1", "embed->mlp_in.1", "mlp.0->mlp_in.2"])
    arms = {arm.name: arm for arm in make_arms(engine.graph, circuit_rw, "resid_post.1", 2, np.random.default_rng(0))}
    assert arms["circuit's MLPs, outputs"].mlps == (2,)


@pytest.fixture(scope="module")
def demo():
    lm = LanguageModel.load(DEMO, device="cpu")
    return Engine(lm), make_prompts(lm, "agreement", 12, 0)


def test_what_writers_write_more_on_clean_prompts(demo):
    engine, prompts = demo
    lm, totals = engine.lm, {"embed": 0.0, "head.2.5": 0.0, "mlp.1": 0.0}
    block = lm.model.transformer.h[2]
    for pair in prompts.pairs:
        for sign, side in ((1, pair.clean), (-1, pair.corrupt)):
            seen = {}
            handles = [
                block.attn.c_proj.register_forward_pre_hook(lambda _module, args, seen=seen: seen.update(z=args[0][0, -1])),
                lm.model.transformer.h[1].mlp.register_forward_hook(lambda *args, seen=seen: seen.update(mlp=args[2][0, -1])),
                lm.model.transformer.h[0].register_forward_pre_hook(lambda _module, args, seen=seen: seen.update(x=args[0][0, -1])),
            ]
            with torch.no_grad():
                lm.logits(torch.tensor([lm.token_ids("".join(side))]))
            for handle in handles:
                handle.remove()
            width = lm.d_model // engine.graph.n_heads
            own = slice(5 * width, 6 * width)
            totals["head.2.5"] += sign * (seen["z"][own] @ block.attn.c_proj.weight[own]).double()
            totals["mlp.1"] += sign * seen["mlp"].double()
            totals["embed"] += sign * seen["x"].double()
    change_wd = writers_change(engine, prompts, 5)
    for name, total_d in totals.items():
        found_d = change_wd[engine.graph.writer(name)].double()
        torch.testing.assert_close(found_d, total_d / len(prompts), rtol=1e-3, atol=1e-4 * float(total_d.norm()))


def test_an_edge_is_its_reader_and_its_writers_change(demo):
    engine, prompts = demo
    graph, change_wd = engine.graph, torch.zeros(len(engine.graph.writers), engine.lm.d_model)
    change_wd[graph.writer("head.0.1")] = torch.randn(engine.lm.d_model, generator=torch.Generator().manual_seed(0))
    first, second = edge_arms(graph, ["head.0.1->q.2.3", "vector->v.3.0"], "resid_post.1", change_wd)
    assert (first.name, first.readers, second.readers) == ("edge head.0.1->q.2.3", (graph.reader("q.2.3"),), (graph.reader("v.3.0"),))
    assert second.direction_d is None
    sites = ["q.2", "k.2", "v.2", "q.1"]
    with torch.no_grad():
        before = engine.lm.record(prompts.corrupt_np, sites)
        with steered_by(engine, first, first.direction_d):
            after = engine.lm.record(prompts.corrupt_np, sites)
    width = engine.lm.d_model // graph.n_heads
    own = torch.arange(engine.lm.d_model) // width == 3
    assert all(torch.equal(before[site], after[site]) for site in sites[1:])
    assert torch.equal(before["q.2"][..., ~own], after["q.2"][..., ~own])
    assert (before["q.2"][..., own] != after["q.2"][..., own]).any()
    # along an edge with its own length the strength is still that of the direction
    neutral = engine.lm.encode(["The old man said that it was late."])
    arms = [first, first._replace(direction_d=100 * change_wd[graph.writer("head.0.1")])]
    one, other = (measure_arm(engine, arm, torch.ones(engine.lm.d_model), prompts, neutral, [0.001])[0] for arm in arms)
    assert one.coefficient == pytest.approx(other.coefficient, rel=1e-3)
    for names, message in (
        (["mlp.0->q.2.3"], "differs between clean and corrupt prompts"),
        (["vector->q.1.0"], "a reader after resid_post.1"),
        (["head.3.0->q.2.0"], "writes behind"),
        (["q.2.0"], "such as"),
    ):
        with pytest.raises(InputError, match=message):
            edge_arms(graph, names, "resid_post.1", change_wd)


def test_the_strongest_and_random_edges(demo):
    graph = demo[0].graph
    names = ["embed->v.0.1", "head.0.1->q.2.3", "mlp.0->logits", "head.1.1->logits"]
    circuit_rw, score_rw = graph.circuit(names), torch.zeros(graph.exists_rw.shape)
    for name, score in zip(names, (9.0, -3.0, 2.0, 1.0)):
        score_rw[graph.edge(name)] = score
    change_wd = torch.ones(len(graph.writers), 4)
    change_wd[0] = 0  # the last token is the same in both prompts
    assert strongest_edges(graph, circuit_rw, score_rw, change_wd, 2) == ["head.0.1->q.2.3", "mlp.0->logits"]
    drawn = random_edges(graph, circuit_rw, change_wd, 50, np.random.default_rng(0))
    assert len(set(drawn)) == 50
    assert not set(drawn) & set(names)
    assert not any(name.startswith("embed") for name in drawn)
    graph.circuit(drawn)


def test_a_direction_that_changes_nothing_has_no_carriers(demo):
    engine, prompts = demo
    vector = SteeringVector.at("resid_post.1", torch.ones(engine.lm.d_model), {})
    with pytest.raises(InputError, match="a coefficient that changes the task's metric, got 0; take a larger one"):
        carriers(engine, vector, 0.0, prompts, engine.graph.exists_rw, 1)


def circuit_file(path: Path, engine: Engine) -> Path:
    graph = engine.graph
    settings = {"task": "agreement", "examples": 8, "seed": 0}
    edges_rw = graph.circuit(["embed->v.3.3", "head.3.3->logits"])
    Circuit(DEMO, engine.lm.fingerprint(), graph, edges_rw, None, {"name": "agreement"}, {"settings": settings}).save(path)
    return path


def test_features_and_what_is_refused_with_the_circuit(demo, tmp_path, capsys):
    engine, _ = demo
    base = dict(model=DEMO, circuit=circuit_file(tmp_path / "c.json", engine), examples=40, dry_run=True)
    sae = str(Path(DEMO).with_name("demo-sae"))
    assert steer_circuit(SteerCircuitConfig(**base, vector="3586", dictionary=sae)) == {}
    said = capsys.readouterr().err
    assert "after resid_post.2" in said
    assert "feature 3586" in said
    W_fd = torch.eye(engine.lm.d_model)[:3]
    other = {"site": "resid_post.2", "model_name": "other", "model_fingerprint": "0123456789ab"}
    Dictionary.autoencoder(W_fd, torch.zeros(3), W_fd, torch.zeros(engine.lm.d_model), other).save(tmp_path / "other")
    SteeringVector.at("mlp_out.2", W_fd[0], {}).save(tmp_path / "v")
    for given, message in (
        ({"vector": "1", "dictionary": str(tmp_path / "other")}, "other"),
        ({"dictionary": sae}, "expected --vector with the number of a feature"),
        ({"vector": "1"}, "expected --dictionary with the feature 1, got none"),
        ({"vector": str(tmp_path / "v")}, r"expected a site of the residual stream .*, got mlp_out\.2"),
        ({"edges": 2}, "a circuit with scores for its strongest edges"),
        ({"edges": -1}, "a number of edges from 0 on, got -1"),
        ({"edge": ("head.9.9->logits",)}, "expected a writer"),
    ):
        with pytest.raises(InputError, match=message):
            steer_circuit(SteerCircuitConfig(**base | given))
