"""Features as nodes: the splice is exact, scores against finite differences, sums over sites and edges; several kinds of dictionaries."""

import pytest
import torch
from circuit_world import exact  # noqa: F401
from feature_circuit_world import N, random_pairs, random_site

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.circuits.features.curves import everything
from steering.circuits.features.edges import edge_scores, rows_of_edges
from steering.circuits.features.passes import NodePatching
from steering.circuits.features.scores import completeness, node_scores
from steering.circuits.features.sites import in_order

H = 1e-5


@pytest.fixture
def lm(exact) -> LanguageModel:  # noqa: F811
    return exact("llama")


def sites_of(lm):
    """A transcoder with a skip between two dictionaries of the stream, in frames and with gates of their own."""
    return [
        random_site(lm, "resid_pre.1", kind="jumprelu", seed=1),
        random_site(lm, "mlp_in.1", "mlp_out.1", kind="skip", seed=2),
        random_site(lm, "resid_post.1", kind="frame", seed=3),
    ]


def test_everything_inside_is_the_model_and_nothing_the_corrupt_run(lm):
    prompts = random_pairs(lm)
    for sites in ([random_site(lm, "resid_mid.1", kind="topk")], sites_of(lm)):
        patching = NodePatching(lm, sites, prompts)
        clean, corrupt = (lm.logits(ids)[:, -1] for ids in (prompts.clean_np, prompts.corrupt_np))
        assert torch.equal(patching.logits(everything(sites, True), 0), clean)
        keep = [torch.ones(site.n_nodes, dtype=torch.float64, requires_grad=True) for site in sites]  # put together again all the same
        spliced = patching.logits(keep, 0)
        assert not torch.equal(spliced, clean)
        assert torch.allclose(spliced, clean, atol=1e-11)
        assert torch.allclose(patching.logits(everything(sites, False), 0), corrupt, atol=1e-11)


def test_a_transcoders_nodes_alone_leave_what_does_not_pass_through_them(lm):
    site = random_site(lm, "mlp_in.1", "mlp_out.1", kind="skip")
    prompts = random_pairs(lm)
    corrupt_out = lm.record(prompts.corrupt_np, ["mlp_out.1"])["mlp_out.1"]
    with lm.edited({"mlp_out.1": lambda _: corrupt_out}):
        expected = lm.logits(prompts.clean_np)[:, -1]
    assert torch.allclose(NodePatching(lm, [site], prompts).logits(everything([site], False), 0), expected, atol=1e-11)


def test_outside_may_be_the_mean_over_the_real_tokens_of_other_pairs(lm):
    prompts, others = random_pairs(lm), random_pairs(lm, seed=5)
    others.clean_mask_np[0, :2] = 0
    for site in (random_site(lm, "mlp_in.1", "mlp_out.1", kind="skip"), random_site(lm, "resid_pre.1", kind="topk")):
        sides = ((others.clean_np, others.clean_mask_np), (others.corrupt_np, others.corrupt_mask_np))
        y_nd = torch.cat([lm.record(ids, [site.writes], mask)[site.writes][mask.bool()] for ids, mask in sides])
        mean_d = y_nd.mean(0)
        with lm.edited({site.writes: lambda y, mean_d=mean_d: mean_d.expand_as(y)}):
            expected = lm.logits(prompts.clean_np)[:, -1]
        patching = NodePatching(lm, [site], prompts, others)
        assert torch.allclose(patching.logits(everything([site], False), 0), expected, atol=1e-11)
        assert torch.equal(patching.logits(everything([site], True), 0), lm.logits(prompts.clean_np)[:, -1])


@pytest.mark.parametrize("place", ["resid_pre.1", "mlp_out.0", "attn_out.1", "head_out.0"])
@pytest.mark.parametrize("kind", ["relu", "topk", "frame"])
def test_gradient_scores_are_finite_differences_of_the_cut(lm, place, kind):
    site = random_site(lm, place, kind=kind, f=8)
    prompts = random_pairs(lm)
    patching = NodePatching(lm, [site], prompts)
    score_sn = node_scores(lm, [site], prompts, "grad").score_sn[0]
    for node in range(site.n_nodes):
        ends = []
        for h in (H, -H):
            keep_n = torch.ones(site.n_nodes, dtype=torch.float64)
            keep_n[node] -= h
            ends.append(prompts.measure(patching.logits([keep_n], 0)))
        assert torch.allclose(-(ends[0] - ends[1]) / (2 * H), score_sn[:, node], atol=1e-6), site.name(node)


def test_scores_of_a_site_of_the_stream_add_up_to_the_change(lm):
    sites, prompts = sites_of(lm), random_pairs(lm)
    scores = node_scores(lm, sites, prompts, "ceap", 100)
    clean, corrupt = (prompts.measure(lm.logits(ids)[:, -1]) for ids in (prompts.clean_np, prompts.corrupt_np))
    assert torch.allclose(scores.clean_s, clean)
    assert torch.allclose(scores.corrupt_s, corrupt)
    for number in (0, 2):
        assert torch.allclose(scores.score_sn[number].sum(1), clean - corrupt, atol=1e-3)
    rows = completeness(sites, scores)
    assert [row["residual"] for row in rows] == [True, False, True]
    assert rows[0]["all"] == pytest.approx(1, abs=1e-3)
    assert rows[1]["skip"] != 0
    assert rows[0]["skip"] == 0


def test_ig_is_the_mean_gradient_of_autograd(lm):
    """Against a plain pass per step, without the code that watches sites."""
    site, prompts, steps = random_site(lm, "resid_post.0"), random_pairs(lm), 4
    start = [lm.record(ids, ["resid_pre.0"])["resid_pre.0"] for ids in (prompts.clean_np, prompts.corrupt_np)]
    value = [site.dictionary.encode(lm.record(ids, [site.reads])[site.reads]) for ids in (prompts.clean_np, prompts.corrupt_np)]
    expected_nf = torch.zeros(N, site.d_sae, dtype=torch.float64)
    for step in range(steps):
        point, share = {}, (step + 0.5) / steps

        def leaf(y, point=point):
            point["y"] = y.detach().requires_grad_()
            return point["y"]

        with lm.edited({"resid_pre.0": lambda _, share=share: (1 - share) * start[0] + share * start[1]}), lm.edited({site.writes: leaf}):
            logits_nv = lm.logits(prompts.clean_np)[:, -1]
        (gradient_npd,) = torch.autograd.grad((logits_nv[:, 3] - logits_nv[:, 7]).sum(), point["y"])
        worth_npf = gradient_npd @ site.dictionary.W_dec_fo.T
        expected_nf -= ((value[1] - value[0]) * worth_npf).sum(1) / steps
    assert torch.allclose(node_scores(lm, [site], prompts, "ig", steps).score_sn[0][:, :-2], expected_nf, atol=1e-10)


@pytest.mark.parametrize("method", ["grad", "ceap"])
def test_edges_to_all_nodes_behind_add_up_to_the_nodes_score(lm, method):
    sites = [random_site(lm, "resid_pre.1", seed=1), random_site(lm, "resid_mid.1", kind="topk", seed=2)]
    sites.append(random_site(lm, "resid_post.1", kind="frame", seed=3))
    prompts = random_pairs(lm)
    scores = node_scores(lm, sites, prompts, method, 3)
    for number, one in enumerate(edge_scores(lm, sites, prompts, everything(sites, True), method, 3)):
        assert torch.allclose(one.score_uj.sum(1), scores.score_sn[number].mean(0)[one.nodes_u], atol=1e-10)


def test_an_edge_is_a_finite_difference_of_what_the_node_behind_carries(lm):
    """Into a transcoder: the vector before is moved along one node's change, and the node behind is read where it is encoded."""
    sites = [random_site(lm, "resid_pre.1", kind="jumprelu", seed=1), random_site(lm, "mlp_in.1", "mlp_out.1", kind="skip", seed=2)]
    prompts = random_pairs(lm)
    (found,) = edge_scores(lm, sites, prompts, everything(sites, True), "grad")
    places = [sites[0].reads, "mlp_in.1", "mlp_out.1"]
    clean, corrupt = (lm.record(ids, places) for ids in (prompts.clean_np, prompts.corrupt_np))
    point = {}

    def leaf(y):
        point["y"] = y.detach().requires_grad_()
        return point["y"]

    with lm.edited({"mlp_out.1": leaf}):
        logits_nv = lm.logits(prompts.clean_np)[:, -1]
    (gradient_npd,) = torch.autograd.grad((logits_nv[:, 3] - logits_nv[:, 7]).sum(), point["y"])
    one, other = (site.dictionary for site in sites)
    change_npf = one.encode(corrupt[places[0]]) - one.encode(clean[places[0]])
    active_u = change_npf.flatten(0, 1).any(0).nonzero()[:, 0].tolist()
    assert len(active_u) > 3
    for node in active_u:
        ends = []
        for h in (H, -H):
            move = h * change_npf[..., node, None] * one.W_dec_fo[node]
            with lm.edited({places[0]: lambda y, move=move: y + move}):
                seen = lm.record(prompts.clean_np, places)
            acts_npf, skip_npd = other.encode(seen["mlp_in.1"]), seen["mlp_in.1"] @ other.W_skip_od.T
            error_npd = seen["mlp_out.1"] - acts_npf @ other.W_dec_fo - skip_npd
            of_features = (acts_npf * (gradient_npd @ other.W_dec_fo.T)).sum((0, 1))
            others = [(part * gradient_npd).sum()[None] for part in (skip_npd, error_npd)]
            ends.append(torch.cat([of_features, *others]))
        assert torch.allclose(found.score_uj[node], -(ends[0] - ends[1]) / (2 * H) / N, atol=1e-6)
    names = {row["edge"]: row["score"] for row in rows_of_edges([found], 5)}
    assert len(names) == 5
    assert max(names.values(), key=abs) == pytest.approx(float(max(found.score_uj.flatten().tolist(), key=abs)))
    assert all(name.startswith("resid_pre.1/") and "->mlp_out.1/" in name for name in names)


def test_several_batches_give_the_same(lm, monkeypatch):
    sites, prompts = sites_of(lm), random_pairs(lm)
    whole, edges = node_scores(lm, sites, prompts), edge_scores(lm, sites, prompts, everything(sites, True))
    ends = NodePatching(lm, sites, prompts)(everything(sites, False))
    monkeypatch.setattr("steering.circuits.features.passes.BATCH", 2)
    parts, parts_edges = node_scores(lm, sites, prompts), edge_scores(lm, sites, prompts, everything(sites, True))
    for one_sn, other_sn in zip(whole.score_sn, parts.score_sn):
        assert torch.allclose(one_sn, other_sn, atol=1e-12)
    for one, other in zip(edges, parts_edges):
        assert torch.allclose(one.score_uj, other.score_uj, atol=1e-12)
    assert NodePatching(lm, sites, prompts)(everything(sites, False)) == pytest.approx(ends)


def test_sites_that_do_not_go_together_are_refused(lm):
    one, other = random_site(lm, "mlp_in.1", "mlp_out.1"), random_site(lm, "mlp_act.1")
    with pytest.raises(InputError, match=r"mlp_out.1 is written from mlp_in.1, before mlp_act.1"):
        in_order([one, other])
    with pytest.raises(InputError, match=r"one dictionary for each site, got two that write at mlp_out.1"):
        in_order([one, random_site(lm, "mlp_out.1")])
    assert [site.writes for site in in_order([random_site(lm, "resid_post.1"), one])] == ["mlp_out.1", "resid_post.1"]
