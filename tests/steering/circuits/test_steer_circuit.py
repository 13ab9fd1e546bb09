"""Steering at readers: all of them against steering the stream, one against a pass by hand, budgets and shares against definitions."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from scipy.special import rel_entr

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.circuits.finding.command import CircuitConfig, find_circuit
from steering.circuits.model_graph.engine import Engine
from steering.circuits.steering_nodes.arms import Arm, Measured, make_arms, mean_over, of_one_answer, steered_at, task_direction
from steering.circuits.steering_nodes.command import DIRECTIONS, SteerCircuitConfig, rows_of, steer_circuit
from steering.circuits.tasks.prompts import make_prompts
from steering.intervention import steered
from steering.strength.calibration import typical_norm
from steering.strength.neutral import MEASURED, OTHERS
from steering.vector import SteeringVector

DEMO = str(Path(__file__).resolve().parents[3] / "checkpoints" / "demo-lm")
SMALL = dict(vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, head_dim=8, intermediate_size=48)
FAMILIES = {
    "gpt2": lambda: hf.GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "llama": lambda: hf.LlamaConfig(num_key_value_heads=2, **SMALL),
    "qwen3": lambda: hf.Qwen3Config(num_key_value_heads=2, **SMALL),
}


def model_of(family: str) -> LanguageModel:
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family]()).double().eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return LanguageModel(model, name=family)


def ids_of(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(2, 40, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("site", ["resid_pre.0", "resid_mid.1", "resid_post.1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_readers_behind_a_site_are_the_stream(family, site):
    lm = model_of(family)
    engine, ids_sp = Engine(lm), ids_of()
    vector = SteeringVector.at(site, torch.randn(32, generator=torch.Generator().manual_seed(0)), {})
    first = engine.graph.first_behind(site)
    with torch.no_grad():
        before = lm.logits(ids_sp)
        with steered(lm, [(vector, 0.7)]):
            expected = lm.logits(ids_sp)
        with steered_at(engine, range(first, len(engine.graph.readers)), 0.7 * vector.direction_d):
            found = lm.logits(ids_sp)
        with steered_at(engine, [], vector.direction_d):
            assert torch.equal(lm.logits(ids_sp), before)
    # RMSNorms compute in float32 whatever they are given
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 if family == "gpt2" else 1e-4)
    assert (expected - before).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_one_heads_input_leaves_every_other_projection_as_it_is(kind):
    """GPT-2: the columns of the chosen head are those of its norm and weights on the steered stream, all others keep every bit."""
    lm = model_of("gpt2")
    engine, ids_sp, added_d = Engine(lm), ids_of(), torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = lm.model.transformer.h[1]
    seen: list[torch.Tensor] = []
    block.attn.c_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    columns = slice(32 * "qkv".index(kind) + 16, 32 * "qkv".index(kind) + 24)  # head 2
    with torch.no_grad():
        h_spd = lm.record(ids_sp, ["resid_pre.1"])["resid_pre.1"]
        fused = {name: lm.record(ids_sp, [f"{name}.1"])[f"{name}.1"] for name in "qkv"}
        seen.clear()
        lm.logits(ids_sp)
        with steered_at(engine, [engine.graph.reader(f"{kind}.1.2")], added_d):
            lm.logits(ids_sp)
        new_spz = block.attn.c_attn(block.ln_1.forward(h_spd + added_d))[..., columns]
    fused[kind][..., 16:24] = new_spz
    q, k, v = (fused[name].view(2, 7, 4, 8).transpose(1, 2) for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    before, after = (one.view(2, 7, 4, 8) for one in seen)
    assert torch.equal(before[:, :, [0, 1, 3]], after[:, :, [0, 1, 3]])
    torch.testing.assert_close(after[:, :, 2], expected[:, :, 2])


def test_arms_are_sets_of_readers_behind_the_site():
    graph = Engine(model_of("llama")).graph
    circuit_rw = graph.circuit(["embed->q.0.1", "embed->k.1.0", "mlp.0->v.2.3", "head.1.0->v.2.1", "embed->mlp_in.1", "mlp.2->logits"])
    arms = {
        arm.name: {graph.readers[r] for r in arm.readers}
        for arm in make_arms(graph, circuit_rw, "resid_post.0", 6, np.random.default_rng(0))
    }
    heads = {(1, 0), (2, 1), (2, 3)}  # that of block 0 is in front of the site
    assert arms["circuit's heads"] == {f"{kind}.{layer}.{head}" for kind in "qkv" for layer, head in heads}
    assert arms["circuit's heads, values"] == {f"v.{layer}.{head}" for layer, head in heads}
    assert arms["circuit's MLPs"] == {"mlp_in.1"}
    assert arms["all MLPs"] == {"mlp_in.1", "mlp_in.2"}
    assert arms["other heads"] | arms["circuit's heads"] == arms["all heads"]
    assert not arms["other heads"] & arms["circuit's heads"]
    assert arms["whole stream"] == arms["all heads"] | arms["all MLPs"] | {"logits"}
    drawn = [arm for name, arm in arms.items() if name.startswith("random heads")]
    assert len(drawn) == 6
    values = [arm for name, arm in arms.items() if name.startswith("values of random heads")]
    assert values == [{name for name in one if name.startswith("v.")} for one in drawn]
    for one in drawn:
        assert Counter(name.split(".")[1] for name in one) == {"1": 3, "2": 6}  # q, k and v of one and of two heads
    with pytest.raises(InputError, match=r"a circuit with heads after resid_post\.1, got one without"):
        make_arms(graph, graph.circuit(["embed->q.0.1", "mlp.2->logits"]), "resid_post.1", 2, np.random.default_rng(0))


def test_intervals_are_over_draws_and_pairs():
    change_kn = np.random.default_rng(1).normal(size=(4, 9))
    found = mean_over(change_kn)
    assert found["value"] == pytest.approx(change_kn.mean())
    rng = np.random.default_rng(7)
    means = [change_kn[rng.integers(0, 4, 4)][:, rng.integers(0, 9, 9)].mean() for _ in range(20_000)]
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.03)


@pytest.fixture(scope="module")
def circuit(tmp_path_factory):
    path = tmp_path_factory.mktemp("circuit") / "c.json"
    find_circuit(CircuitConfig(model=DEMO, task="agreement", examples=16, edges=95, seed=0, out=path))
    return path


@pytest.fixture(scope="module")
def result(circuit):
    config = SteerCircuitConfig(
        model=DEMO,
        circuit=circuit,
        edge=("vector->mlp_in.2",),
        edges=1,
        budgets=(0.02, 0.2),
        draws=2,
        examples=40,
        out=circuit.with_name("s.json"),
    )
    found = steer_circuit(config)
    assert json.loads(config.out.read_text()) == found
    return found


def test_numbers_are_those_of_passes_made_here(result):
    """The whole stream, steered by hand: KL on neutral sentences one at a time, the metric pair by pair."""
    lm = LanguageModel.load(DEMO, device="cpu")
    prompts, (before, _) = make_prompts(lm, "agreement", 40, 1), make_prompts(lm, "agreement", 16, 0).halves(0)
    known = {text for pair in before.pairs for text in ("".join(pair.clean), "".join(pair.corrupt))}
    new = [n for n, pair in enumerate(prompts.pairs) if not known & {"".join(pair.clean), "".join(pair.corrupt)}]
    assert 4 < len(new) < 40  # the circuit was found on some of them
    found_on, held_out = prompts.subset(new).halves(1)
    vector = task_direction(Engine(lm), found_on, "resid_post.1")
    row = next(row for row in result["arms"] if (row["arm"], row["budget"]) == ("whole stream", 0.2))
    assert result["pairs"] == sum(pair.right == tuple(result["answer"]) for pair in held_out.pairs)
    length = _typical(lm)
    edit = [(vector.unit(), row["rho"] * length)]
    total, tokens = 0.0, 0
    with torch.no_grad():
        for text in MEASURED:
            ids_sp = lm.encode([text])[0][:, :64]
            p = lm.logits(ids_sp)[0].double().softmax(-1)
            with steered(lm, edit):
                q = lm.logits(ids_sp)[0].double().softmax(-1)
            total, tokens = total + rel_entr(p.numpy(), q.numpy()).sum(), tokens + len(p)
        changes = []
        for pair in held_out.pairs:
            if pair.right != tuple(result["answer"]):
                continue
            ids_sp = torch.tensor([lm.token_ids("".join(pair.corrupt))])
            right, wrong = ([lm.token_ids("x" + text)[-1] for text in side] for side in pair[2:])
            before_v = lm.logits(ids_sp)[0, -1].double()
            with steered(lm, edit):
                after_v = lm.logits(ids_sp)[0, -1].double()
            changes.append(float(sum(sign * (after_v - before_v)[some].mean() for sign, some in ((1, right), (-1, wrong)))))
    assert total / tokens == pytest.approx(row["kl"], rel=0.02) == pytest.approx(0.2, rel=0.1)
    assert np.mean(changes) == pytest.approx(row["change"]["value"], rel=1e-3)


def _typical(lm: LanguageModel) -> float:
    rows = [lm.record(lm.encode([text])[0], ["resid_post.1"])["resid_post.1"][0] for text in OTHERS]
    return typical_norm(torch.cat([row_pd[int(lm.bos_id is not None) :] for row_pd in rows]))


def test_arms_meet_their_budgets_and_shares_add_up(result):
    rows = {(row["arm"], row["budget"]): row for row in result["arms"]}
    assert {arm for arm, _ in rows} >= {"whole stream", "circuit's heads", "random heads", "all MLPs", "random direction, whole stream"}
    for (arm, budget), row in rows.items():
        assert 0 <= row["reached"] <= row["draws"]
        if row["reached"] == row["draws"]:
            assert row["kl"] == pytest.approx(budget, rel=0.04), arm
    assert rows["random heads", 0.2]["draws"] == 2
    assert rows["random direction, whole stream", 0.2]["draws"] == DIRECTIONS
    stream, random = (rows[arm, 0.2]["change"] for arm in ("whole stream", "random direction, whole stream"))
    assert stream["low"] > random["value"]  # the task's own direction does more
    assert rows["edge vector->mlp_in.2", 0.2]["readers"] == 1
    assert sum(arm.startswith("edge ") for arm, _ in rows) == 2 * 2  # and the strongest
    assert rows["random edge", 0.2]["draws"] == 2
    carried = result["carriers"]
    assert len(carried["random_readers"]) == len(carried["random_heads"]) == 2
    assert max(carried["random_readers"]) < carried["in_circuit"]
    assert carried["sum"] == pytest.approx(1, abs=0.05)
    assert sum(carried["by_kind"].values()) == pytest.approx(carried["sum"])
    assert 0.9 < carried["least_across"] <= carried["most_across"] < 1.1
    assert carried["change"] == pytest.approx(rows["whole stream", 0.2]["change"]["value"], rel=1e-3)


def test_draws_that_miss_the_budget_are_left_out():
    def one(change: float, reached: bool) -> Measured:
        return Measured(1.0, 0.2, reached, np.full(3, change))

    arms = [Arm(name, (0,)) for name in ("whole stream", "random heads 0", "random heads 1", "values of random heads 0")]
    found = {"whole stream": [one(1, True)], "random heads 0": [one(2, True)], "random heads 1": [one(50, False)]}
    rows = {row["arm"]: row for row in rows_of(arms, found | {"values of random heads 0": [one(4, False)]}, [0.2])}
    assert (rows["random heads"]["change"]["value"], rows["random heads"]["reached"], rows["random heads"]["draws"]) == (2, 1, 2)
    assert (rows["values of random heads"]["change"]["value"], rows["values of random heads"]["reached"]) == (4, 0)


def test_a_dry_run_and_what_is_refused(circuit, tmp_path, capsys):
    def config(**given) -> SteerCircuitConfig:
        return SteerCircuitConfig(**dict(model=DEMO, circuit=circuit, out=tmp_path / "s.json", examples=40) | given)

    assert steer_circuit(config(dry_run=True)) == {}
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().err
    assert "arms after resid_post.1" in said
    no_task = json.loads(circuit.read_text())
    no_task["method"] = {}
    (tmp_path / "none.json").write_text(json.dumps(no_task))
    for given, message in (
        ({"budgets": (0.2, 0.1)}, "expected rising budgets above 0, got 0.2, 0.1"),
        ({"budgets": (math.nan,), "dry_run": True}, "expected rising budgets above 0, got nan"),
        ({"draws": 1}, "expected at least 2 draws"),
        ({"vector": "nothing"}, "expected a vector file"),
        ({"site": "mlp_out.1"}, "expected a site of the residual stream"),
        ({"circuit": tmp_path / "absent.json"}, "a circuit"),
        ({"circuit": tmp_path / "none.json"}, "expected a circuit with its task"),
    ):
        with pytest.raises(InputError, match=message):
            steer_circuit(config(**given))
    assert not (tmp_path / "s.json").exists()


def test_a_direction_needs_one_answer():
    lm = LanguageModel.load(DEMO, device="cpu")
    prompts = make_prompts(lm, "agreement", 40, 1)
    chosen = of_one_answer(prompts)
    assert len({prompts.pairs[number].right for number in chosen}) == 1
    assert len(chosen) >= max(Counter(pair.right for pair in prompts.pairs).values())
    site = "resid_post.1"
    vector = task_direction(Engine(lm), prompts, site)
    means = []
    for side in ("clean", "corrupt"):
        rows = [lm.record(torch.tensor([lm.token_ids("".join(getattr(prompts.pairs[n], side)))]), [site])[site][0, -1] for n in chosen]
        means.append(torch.stack(rows).double().mean(0))
    torch.testing.assert_close(vector.direction_d.double(), means[0] - means[1], rtol=1e-3, atol=1e-3 * math.sqrt(float(means[0].norm())))
    with pytest.raises(InputError, match="expected at least 4 pairs with the same right answer to make a direction of, got 1"):
        task_direction(Engine(lm), prompts.subset([0]), site)
