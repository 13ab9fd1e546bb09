"""Circuits of features: a planted one is found, random features are as frequent, the file is strict, and the command's numbers by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_circuit_world import random_site
from test_wired_circuit import P, V, drawn, wired

from sae.activations.harvest.command import HarvestConfig, harvest
from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.features.index.build import IndexConfig, build_index
from sae.html import word_html
from sae.model.language_model import LanguageModel
from sae.progress import progress
from steering.circuits.features.command import FindCircuitConfig, find
from steering.circuits.features.controls import frequencies, matched_nodes, other_bases
from steering.circuits.features.curves import Curve, evaluate_features, top_nodes
from steering.circuits.features.files import open_feature_circuit
from steering.circuits.features.masks import learned_masks
from steering.circuits.features.page import known_of, write_page
from steering.circuits.features.passes import NodePatching
from steering.circuits.features.scores import node_scores
from steering.circuits.features.sites import FeatureSite, open_sites
from steering.circuits.tasks.generators import Pair
from steering.circuits.tasks.prompts import Prompts, make_prompts
from steering.steer import SteerConfig, steer
from steering.vector import SteeringVector

ROOT = Path(__file__).resolve().parents[3]
DEMO, SAE = (str(ROOT / "checkpoints" / name) for name in ("demo-lm", "demo-sae"))
SHE, HE = 3, 7


def planted() -> tuple[LanguageModel, FeatureSite, Prompts]:
    """Induction whose answer is always one token and in the corrupt prompt another; a feature for each token that is written or read."""
    lm = wired(8.0)
    k = (lm.d_model - 2) // 2
    out, tok = 3 * V + P - V, 0  # where the output's and the tokens' coordinates begin
    W_fd = torch.zeros(2 * V, lm.d_model, dtype=torch.float64)
    for token in range(V):
        for row, start in ((token, out), (V + token, tok)):
            W_fd[row, start + token], W_fd[row, start + token + k] = 0.5, -0.5
    zero_d = torch.zeros(lm.d_model, dtype=torch.float64)
    one = Dictionary(W_fd, torch.zeros(2 * V, dtype=torch.float64), 2 * W_fd, zero_d, metadata={"site": "resid_post.1"})
    clean, corrupt, *_ = drawn(12)
    rows = []
    for row in range(len(clean)):
        sides = [clean[row].copy(), corrupt[row].copy()]
        for side, answer in zip(sides, (SHE, HE)):
            at = side[:-1].tolist().index(side[-1]) + 1
            if answer in side:  # the answer changes places with what stood after the repeated token
                side[side == answer] = side[at]
            side[at] = answer
        if all(side[-1] not in (SHE, HE) for side in sides):
            rows.append(sides)
    clean, corrupt = (torch.tensor(np.array(side)) for side in zip(*rows))
    n, mask = len(rows), torch.ones(len(rows), P, dtype=torch.long)
    prompts = Prompts(
        "wired", "other", "logit_difference", tuple(Pair((f"{row}",), ("",), ("3",), ("7",)) for row in range(n)),
        clean, mask, corrupt, mask, torch.arange(P).repeat(n, 1),
        torch.arange(n).repeat_interleave(2), torch.tensor([SHE, HE] * n), torch.tensor([1.0, -1.0]).repeat(n).double(),
    )  # fmt: skip
    return lm, FeatureSite(one.requires_grad_(False), "resid_post.1", "resid_post.1"), prompts


@pytest.mark.parametrize("method", ["grad", "ig", "ceap", "mask"])
def test_the_two_features_that_carry_a_task_are_found(method):
    lm, site, prompts = planted()
    if method == "mask":
        score_n = learned_masks(lm, [site], prompts, 0.01, rounds=80)
        assert int((score_n[0] > 0.5).sum()) == 2
    else:
        score_n = [one_sn.mean(0) for one_sn in node_scores(lm, [site], prompts, method).score_sn]
    inside = top_nodes([site], score_n, 2, errors=False)
    assert inside[0].nonzero()[:, 0].tolist() == [SHE, HE]
    with progress("circuits", 1, "circuits") as bar:
        found = evaluate_features(Curve(NodePatching(lm, [site], prompts), score_n, bar), {}, frequencies(lm, [site], prompts), inside)
    assert found["circuit"]["errors_out"]["value"] == pytest.approx(1, abs=1e-3)
    assert found["circuit"]["without"]["value"] == pytest.approx(0, abs=1e-3)


def test_bases_are_complete_and_principal_directions_ordered(lm):
    sites, prompts = open_sites(lm, [SAE]), make_prompts(lm, "agreement", 8, 0)
    for name, others in other_bases(lm, sites, prompts, 0).items():
        rows = others[0].dictionary.W_dec_fo
        assert torch.allclose(rows @ rows.T, torch.eye(256), atol=1e-5), name
        assert not others[0].exists_n[others[0].error]
        if name == "principal directions":
            x_nd = torch.cat(
                [
                    lm.record(ids, ["resid_post.2"], mask)["resid_post.2"][mask.bool()]
                    for ids, mask in ((prompts.clean_np, prompts.clean_mask_np), (prompts.corrupt_np, prompts.corrupt_mask_np))
                ]
            )
            variance = (x_nd @ rows.T).double().var(0)
            assert torch.allclose(
                variance[:10], torch.linalg.svdvals((x_nd - x_nd.mean(0)).double())[:10] ** 2 / (len(x_nd) - 1), rtol=1e-3
            )


def test_random_features_fire_as_often():
    site = random_site_of(40)
    rng = np.random.default_rng(0)
    frequency = torch.tensor(np.r_[np.geomspace(0.001, 1, 38), 0, 0])
    inside = torch.zeros(42, dtype=torch.bool)
    inside[[5, 20, 33, site.error]] = True
    seen = set()
    for _ in range(30):
        (drawn_n,) = matched_nodes([site], [inside], [frequency], rng)
        chosen = drawn_n[:40].nonzero()[:, 0].tolist()
        assert len(chosen) == 3
        assert drawn_n[site.error]
        assert not set(chosen) & {5, 20, 33, 38, 39}
        assert all(abs(one - own) <= 11 for one, own in zip(sorted(chosen), (5, 20, 33)))
        seen |= set(chosen)
    assert len(seen) > 15
    assert matched_nodes([site], [torch.arange(42) < 25], [frequency], rng) is None


def random_site_of(f: int) -> FeatureSite:
    one = Dictionary.initial(8, f, seed=0)
    one.metadata["site"] = "resid_post.0"
    return FeatureSite(one, "resid_post.0", "resid_post.0")


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.load(DEMO, device="cpu")


def test_the_shipped_dictionary_and_a_transcoder_are_spliced_into_real_models_exactly(lm):
    prompts = make_prompts(lm, "agreement", 6, 0)
    clean = lm.logits(prompts.clean_np, prompts.clean_mask_np)[:, -1]
    double = random_site(lm, "mlp_in.1", "mlp_out.1", kind="skip")
    transcoder = FeatureSite(double.dictionary.float(), "mlp_in.1", "mlp_out.1")
    for sites in (open_sites(lm, [SAE]), [transcoder], [transcoder, *open_sites(lm, [SAE])]):
        keep = [torch.ones(site.n_nodes, requires_grad=True) for site in sites]
        spliced = NodePatching(lm, sites, prompts).logits(keep, 0)
        assert not torch.equal(spliced, clean)
        assert (spliced - clean).abs().max() < 1e-5 * clean.abs().max()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "c.json"
    config = FindCircuitConfig(model=DEMO, features=(SAE,), task="agreement", examples=12, nodes=10, seed=2, out=path)
    return config, find(config)


def test_faithfulness_is_of_the_held_out_pairs(found, lm):
    """One pair after the other, by the dictionary's formula written out."""
    config, circuit = found
    opened = open_feature_circuit(config.out, lm, open_sites(lm, [SAE]))
    assert opened == replace(circuit, **{key: json.loads(json.dumps(getattr(circuit, key))) for key in ("task", "method", "evaluation")})
    dictionary = Dictionary.load(SAE)
    inside = [int(row["node"].partition("/")[2]) for row in opened.nodes]
    assert len(inside) == 10
    out = torch.ones(4096)
    out[inside] = 0
    _, held_out = make_prompts(lm, "agreement", 12, 2).halves(2)

    def acts(x):
        return torch.relu((x - dictionary.b_dec_o) @ dictionary.W_enc_fd.T + dictionary.b_enc_f)

    def measured(change):
        values = []
        for pair in held_out.pairs:
            clean, corrupt = (torch.tensor([lm.token_ids("".join(side))]) for side in pair[:2])
            x = lm.record(corrupt, ["resid_post.2"])["resid_post.2"]
            with torch.no_grad(), lm.edited({"resid_post.2": lambda y, x=x: change(y, x)}):
                last_v = lm.logits(clean)[0, -1].double()
            right, wrong = ([lm.token_ids("x" + text)[-1] for text in side] for side in pair[2:])
            values.append(float(last_v[right].mean() - last_v[wrong].mean()))
        return np.mean(values)

    def errors_in(y, x):
        return y + ((acts(x) - acts(y)) * out) @ dictionary.W_dec_fo

    def errors_out(y, x):
        error = [one - acts(one) @ dictionary.W_dec_fo for one in (y, x)]
        return errors_in(y, x) + error[1] - error[0]

    full, empty = measured(lambda y, x: y), measured(lambda y, x: x)
    for name, change in (("errors_in", errors_in), ("errors_out", errors_out)):
        expected = (measured(change) - empty) / (full - empty)
        assert opened.evaluation["circuit"][name]["value"] == pytest.approx(expected, abs=1e-4), name


def test_the_file_says_what_was_measured(found):
    _, circuit = found
    (row,) = circuit.evaluation["completeness"]
    assert row["all"] == pytest.approx(1, abs=0.02)
    assert row["features"] + row["error"] == pytest.approx(row["all"])
    curve = circuit.evaluation["curve"]
    assert [line["nodes"] for line in curve[:4]] == [0, 1, 3, 10]
    assert curve[0]["errors_out"]["value"] == 0
    assert curve[3]["errors_in"]["value"] == pytest.approx(circuit.evaluation["circuit"]["errors_in"]["value"])
    assert curve[3]["matched"]["highest"] < curve[3]["errors_in"]["value"]
    assert {"neurons", "principal directions", "random directions"} <= set(curve[3])
    assert circuit.task["found_on"] == circuit.task["held_out"] == 6
    assert f"{circuit.dictionaries[0]['writes']}/error" in circuit.scores
    assert all(row["weight"] != 0 for row in circuit.nodes[:3])


def test_a_circuit_of_something_else_is_refused(found, lm, tmp_path):
    config, circuit = found
    sites = open_sites(lm, [SAE])
    other = FeatureSite(Dictionary.initial(256, 4096, seed=0), "resid_post.2", "resid_post.2")
    with pytest.raises(InputError, match="expected the circuit's dictionaries"):
        circuit.inside([other])
    assert int(circuit.inside(sites)[0].sum()) == 10
    content = json.loads(config.out.read_text())
    changes = {
        "format feature-circuit-1": {"format": "circuit-1"},
        "got 'resid_post.2/4096'": {"nodes": [content["nodes"][0] | {"node": "resid_post.2/4096"}]},
        "got 'resid_post.3/error'": {"scores": {"resid_post.3/error": 1.0}},
        "expected edges such as": {"edges": [{"edge": "resid_post.2/1", "score": 1.0}]},
        "expected the model of the circuit": {"fingerprint": "0" * 12},
        "a circuit of features": {"nodes": [{"node": "resid_post.2/1"}]},
    }
    for said, change in changes.items():
        path = tmp_path / "c.json"
        path.write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=said):
            open_feature_circuit(path, lm)


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    config = FindCircuitConfig(model=DEMO, features=(SAE,), task="agreement", examples=8, out=tmp_path / "c.json", dry_run=True)
    assert find(config) is None
    assert "4,096 features at resid_post.2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"features": (SAE,), "search": "acdc"}, "--search is for circuits of edges, got --features too; leave --search out"),
        ({"features": (SAE,), "mib": Path("m.json")}, "--mib is for circuits of edges"),
        ({"nodes": 3}, "--nodes is for circuits of features; leave --nodes out, or give --features"),
        ({"features": (SAE,), "penalty": 0.1}, "--penalty is for --node-method mask"),
        ({"features": (SAE,), "penalty": -1.0, "node_method": "mask"}, "penalty above 0"),
        ({"features": (SAE,), "nodes": 0}, "at least one node"),
        ({"features": (SAE, SAE)}, "two that write at resid_post.2"),
        ({"features": (SAE,), "task": None}, "either --task or --pairs"),
    ],
)
def test_bad_requests(tmp_path, flags, said):
    with pytest.raises(InputError, match=said):
        find(FindCircuitConfig(**{"model": DEMO, "task": "agreement", "out": tmp_path / "c.json", **flags}))


def test_a_dictionary_of_another_model_is_refused(tmp_path):
    dictionary = Dictionary.load(SAE)
    dictionary.metadata["model_fingerprint"] = "0" * 12
    dictionary.save(tmp_path / "sae")
    with pytest.raises(InputError, match="has other weights"):
        find(FindCircuitConfig(model=DEMO, features=(str(tmp_path / "sae"),), task="agreement", out=tmp_path / "c.json"))


def test_the_vector_is_the_circuits_features_by_weight_and_steers(found, lm):
    config, circuit = found
    dictionary = Dictionary.load(SAE)
    weights = {int(row["node"].partition("/")[2]): row["weight"] for row in circuit.nodes}
    vector = SteeringVector.load(config.out.with_suffix(".safetensors"))
    expected = sum(weight * dictionary.W_dec_fo[feature] for feature, weight in weights.items())
    assert torch.allclose(vector.direction_d, expected, atol=1e-4)
    found_on, held_out = make_prompts(lm, "agreement", 12, 2).halves(2)
    strongest = int(circuit.nodes[0]["node"].partition("/")[2])
    falls = []
    for pair in found_on.pairs:
        if pair.right == tuple(circuit.method["steering"]["answer"]):
            tops = []
            for side in pair[:2]:
                x = lm.record(torch.tensor([lm.token_ids("".join(side))]), ["resid_post.2"])["resid_post.2"]
                tops.append(float(dictionary.encode(x)[..., strongest].max()))
            falls.append(tops[0] - tops[1])
    assert weights[strongest] == pytest.approx(np.mean(falls), rel=1e-3)
    measured = circuit.evaluation["steering"]
    assert measured["pairs"] == sum(pair.right == tuple(circuit.method["steering"]["answer"]) for pair in held_out.pairs)
    assert measured["steered_minus_corrupt"]["value"] > max(measured["random"])
    report = steer(SteerConfig(model=DEMO, vector=config.out.with_suffix(".safetensors"), prompt="The boys", samples=1, device="cpu"))
    assert report["steered"] != report["unsteered"]
    assert report["site"] == "resid_post.2"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"feature": "3"}, "--feature is for steering with a feature, got --vector too"),
        ({"activation": 2.0}, "--activation is for steering with a feature"),
        ({"model": None}, "expected --model with --vector"),
    ],
)
def test_steering_with_a_vector_takes_nothing_of_a_feature(found, flags, said):
    with pytest.raises(InputError, match=said):
        steer(SteerConfig(**{"model": DEMO, "vector": found[0].out.with_suffix(".safetensors"), **flags}))


def test_the_page_escapes_and_links(found, tmp_path):
    _, circuit = found
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "stats.js").touch()
    sites = open_sites(LanguageModel.load(DEMO, device="cpu"), [SAE])
    known = known_of(sites, [], [tmp_path / "export"])
    evil = replace(circuit, model="<script>alert(1)</script>")
    (tmp_path / "pages").mkdir()
    write_page(evil, known, Path("a b.safetensors"), tmp_path / "pages" / "c.html")
    text = (tmp_path / "pages" / "c.html").read_text()
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    feature = circuit.nodes[0]["node"].partition("/")[2]
    assert f"href='../export/index.html#/f/{feature}'" in text
    assert "--vector &#x27;a b.safetensors&#x27;" in text
    with pytest.raises(InputError, match="as many folders of --export as dictionaries, 1, got 2"):
        known_of(sites, [], [tmp_path, tmp_path])
    with pytest.raises(InputError, match="that sae export"):
        known_of(sites, [], [tmp_path])


def test_an_index_gives_words_and_addresses(found, tmp_path, lm):
    harvest(HarvestConfig(text=(str(ROOT / "checkpoints" / "demo-lm" / "tokens.safetensors"),), out=tmp_path / "cache", model=DEMO,
                          sites=("resid_post.2",), tokens=3000, device="cpu"))  # fmt: skip
    build_index(IndexConfig(cache=tmp_path / "cache", dictionary=Path(SAE), out=tmp_path / "index", device="cpu"))
    _, circuit = found
    known = known_of(open_sites(lm, [SAE]), [tmp_path / "index"], [])
    write_page(circuit, known, Path("v.safetensors"), tmp_path / "c.html")
    text = (tmp_path / "c.html").read_text()
    feature = circuit.nodes[0]["node"].partition("/")[2]
    assert f"href='http://127.0.0.1:8765/f/{feature}'" in text
    index = known["resid_post.2"].index
    assert "http://127.0.0.1:8765/steer?prompt=" in text
    assert f"sae browse --index {index.folder} --port 8765" in text
    for token, _ in index.lens_tokens(int(feature), 4):
        assert word_html(index.vocabulary.spelling(token)) in text
    Dictionary.initial(256, 64, seed=0).save(tmp_path / "other")
    other = FeatureSite(Dictionary.load(tmp_path / "other"), "resid_post.2", "resid_post.2", str(tmp_path / "other"))
    with pytest.raises(InputError, match="expected feature indexes of the dictionaries"):
        known_of([other], [tmp_path / "index"], [])
