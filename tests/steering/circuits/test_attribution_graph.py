"""Attribution graphs against finite differences, a set whose graph is known, and influence and pruning written with dense matrices.

n nodes · t targets · c sources · p positions · d width
"""

import pytest
import torch
import transformers as hf
from attribution_world import linear_model, neurons, random_set, relu_gpt2
from circuit_world import FAMILIES, exact, hooks_of  # noqa: F401  (a fixture)
from test_language_model import CONFIGS, ids_of, tiny
from test_sites import made

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.frames import Frame
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.circuits.attribution.edges import Targets
from steering.circuits.attribution.files import Edge, parse_node, pruned_nodes
from steering.circuits.attribution.graph import find_graph, influence_of_all, prune, scores
from steering.circuits.attribution.interventions import Intervening
from steering.circuits.attribution.replacement import LocalReplacement, Sources
from steering.circuits.attribution.transcoders import checked

P = 6
IDS = ids_of(1, P, seed=4)
KINDS = [("mlp_in", False), ("resid_mid", True), ("mlp_in_nogain", True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_or_the_family_is_refused_by_name(family):
    lm = tiny(family) if family in CONFIGS else made(family)
    before = hooks_of(lm)
    for kind, skip in KINDS:
        if family == "gptj" or (kind == "resid_mid" and f"{kind}.0" in lm.refused_sites()):
            with pytest.raises(InputError, match=f"'{family}'"):
                LocalReplacement(lm, checked(lm, random_set(lm, kind, skip), "the set"), IDS)
            continue
        model = linear_model(lm, random_set(lm, kind, skip), IDS, 1).model
        with torch.no_grad():
            for read in (model.linear(model.sources), model.responding({})):
                torch.testing.assert_close(read.final_pd, model.own.final_pd, rtol=1e-5, atol=1e-5)
        if family not in ("gemma2", "granite"):  # which cap or scale what the unembedding gives
            torch.testing.assert_close(model.logits(read.final_pd), lm.logits(IDS)[0], rtol=1e-5, atol=1e-5)
    assert hooks_of(lm) == before


@pytest.mark.parametrize(("kind", "skip"), KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "granite"])
def test_edges_are_finite_differences_and_add_up_to_what_is_read(family, kind, skip, exact):  # noqa: F811
    lm = exact(family)
    found = random_set(lm, kind, skip)
    linear = linear_model(lm, found, IDS, 1)
    graph = find_graph(linear, 10_000)
    n, model = graph.n_features, linear.model
    assert n == graph.n_active > 30
    seen = lm.record(IDS, [f"{kind}.{layer}" for layer in found])
    for t, (layer, position, j, value) in enumerate(zip(*(part.tolist() for part in graph.features))):
        x_d, one = seen[f"{kind}.{layer}"][0, position], found[layer]
        z = (x_d - one.b_in_d) @ one.W_enc_fd[j] + one.b_enc_f[j]
        assert position >= 1
        assert abs(z - value) < 1e-6  # a ReLU
        assert abs(graph.edge_tc[t].sum() + graph.bias_t[t] - z) < 1e-6
    logits_v = model.logits(model.own.final_pd[-1])
    total_t = graph.edge_tc[n:].sum(1) + graph.bias_t[n:]
    torch.testing.assert_close(total_t, logits_v[graph.token_t] - logits_v.mean(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(graph.size_t, graph.edge_tc.abs().sum(1), rtol=1e-9, atol=1e-9)

    targets = (Targets(torch.arange(n)), Targets(None, graph.token_t))
    with torch.no_grad():
        before_t = torch.cat([linear.readings(one, linear.read) for one in targets])
        for c in (0, n // 3, n - 1, n + 2, n + P + 3, graph.first_token + 1):
            written_lpd, embed_pd = [pd.clone() for pd in model.sources.written_lpd], model.embed_pd.clone()
            if c < n:
                layer, position, j, value = (part[c] for part in graph.features)
                written_lpd[layer][position] += value * found[int(layer)].W_dec_fo[j] / 2
            elif c < graph.first_token:
                layer, position = divmod(c - n, P)
                written_lpd[layer][position] += model.error_lpd[layer][position] / 2
            else:
                embed_pd[c - graph.first_token] *= 1.5
            after = model.linear(Sources(embed_pd, written_lpd))
            after_t = torch.cat([linear.readings(one, after) for one in targets])
            torch.testing.assert_close(2 * (after_t - before_t), graph.edge_tc[:, c], rtol=1e-6, atol=1e-6)


def test_blocks_and_lists_long_enough_do_not_change_the_graph():
    lm = relu_gpt2()
    linear = linear_model(lm, neurons(lm), IDS)
    graph = find_graph(linear, 150)
    assert graph.n_features == 150 < graph.n_active
    for settings in ({"at_once": 1}, {"at_once": 7}, {"edges": 1000}):
        other = find_graph(linear, 150, **settings)
        assert all(torch.equal(one, two) for one, two in zip(graph.features[:3], other.features[:3]))
        torch.testing.assert_close(other.edge_tc, graph.edge_tc, rtol=1e-9, atol=1e-12)
    short = find_graph(linear, graph.n_active, edges=5)
    whole = find_graph(linear, graph.n_active)
    n = whole.n_features
    assert (short.edge_tc[:, :n] != 0).sum(1).max() == 5
    for found_c, true_c in zip(short.edge_tc[:, :n], whole.edge_tc[:, :n]):
        kept_c = found_c != 0
        torch.testing.assert_close(found_c[kept_c], true_c[kept_c], rtol=1e-9, atol=1e-12)
        assert true_c[kept_c].abs().min() >= true_c[~kept_c].abs().max() - 1e-9 if kept_c.any() else (true_c == 0).all()
    torch.testing.assert_close(short.size_t, whole.size_t)


def square(graph):
    """[n, n] in the order of sources and then logits, and the logits' weights."""
    t, c = graph.edge_tc.shape
    n = graph.n_features
    whole_nn = torch.zeros(c + t - n, c + t - n, dtype=torch.float64)
    whole_nn[:n, :c], whole_nn[c:, :c] = graph.edge_tc[:n].double(), graph.edge_tc[n:].double()
    weight_n = torch.cat([torch.zeros(c, dtype=torch.float64), graph.probability_t])
    return whole_nn, weight_n


def divided(whole_nn):
    return whole_nn.abs() / whole_nn.abs().sum(1, keepdim=True).clamp(min=1e-10)


def of_paths(share_nn, weight_n):
    return weight_n @ (torch.linalg.inv(torch.eye(len(share_nn)).double() - share_nn) - torch.eye(len(share_nn)).double())


def cut_at(score, share):
    value, running, total = 0.0, 0.0, float(score.sum())
    for value in sorted(score.flatten().tolist(), reverse=True):
        running += value
        if running >= share * total:
            break
    return value


def test_influence_scores_and_pruning_are_those_of_dense_matrices():
    lm = tiny("llama")
    graph = find_graph(linear_model(lm, random_set(lm), IDS, 1), 60)
    whole_nn, weight_n = square(graph)
    c, n = graph.edge_tc.shape[1], graph.n_features
    share_nn = divided(whole_nn)
    influence_n = of_paths(share_nn, weight_n)
    error, token = slice(n, graph.first_token), slice(graph.first_token, c)
    out_n = influence_n + weight_n
    found = scores(graph)
    assert found.completeness == pytest.approx(float(((1 - share_nn[:, error].sum(1)) * out_n).sum() / out_n.sum()))
    tokens, errors = influence_n[token].sum(), influence_n[error].sum()
    assert found.replacement == pytest.approx(float(tokens / (tokens + errors)))
    assert 0 < found.left_out < 1

    pruned = prune(graph, 0.9, 0.98)
    torch.testing.assert_close(pruned.influence_c, influence_n[:c], rtol=1e-9, atol=1e-12)
    kept_n = influence_n >= cut_at(influence_n, 0.9) - 1e-12
    kept_n[graph.first_token :] = True
    inner_nn = divided(whole_nn * kept_n[:, None] * kept_n)
    score_nn = inner_nn * (of_paths(inner_nn, weight_n) + weight_n)[:, None]
    edges_nn = score_nn >= cut_at(score_nn, 0.98) - 1e-12
    while True:
        before = kept_n.clone()
        kept_n[: graph.first_token] &= edges_nn.any(0)[: graph.first_token]
        kept_n[:n] &= edges_nn.any(1)[:n]
        edges_nn &= kept_n[:, None] & kept_n
        if torch.equal(before, kept_n):
            break
    assert torch.equal(pruned.kept_c, kept_n[:c])
    assert torch.equal(torch.cat([pruned.kept_tc[:n], torch.zeros(c - n, c).bool(), pruned.kept_tc[n:]]), edges_nn[:, :c])
    assert 5 < int(pruned.kept_c[:n].sum()) < n
    with pytest.raises(InputError, match=r"expected a node threshold from 0 to 1.*got 1\.5"):
        prune(graph, 1.5, 0.9)


def test_features_come_in_by_their_influence_through_those_before():
    lm = tiny("llama")
    linear = linear_model(lm, random_set(lm), IDS, 1)
    whole = find_graph(linear, 10_000)
    whole_nn = square(whole)[0]
    size_n = torch.cat([whole.size_t[: whole.n_features], torch.ones(len(whole_nn) - whole.n_features)])
    size_n[-len(whole.token_t) :] = whole.size_t[whole.n_features :]
    first_n = (whole_nn.abs() / size_n[:, None])[-len(whole.token_t) :]
    direct_n = whole.probability_t @ first_n[:, : whole.n_features]
    few = find_graph(linear, 20)
    keys = list(zip(*(part.tolist() for part in whole.features[:3])))
    chosen = [keys.index(key) for key in zip(*(part.tolist() for part in few.features[:3]))]
    assert set(chosen) == set(direct_n.argsort(descending=True)[:20].tolist())
    assert influence_of_all([], 7, 3).tolist() == [0] * 7


def test_neurons_of_a_relu_model_leave_no_error():
    lm = relu_gpt2()
    linear = linear_model(lm, neurons(lm), IDS)
    assert max(float(error_pd.abs().max()) for error_pd in linear.model.error_lpd) < 1e-12
    found = scores(find_graph(linear, 10_000))
    assert found.completeness == pytest.approx(1)
    assert found.replacement == pytest.approx(1)
    assert found.left_out == pytest.approx(0, abs=1e-9)


def known_set() -> tuple[LanguageModel, dict[int, Dictionary]]:
    """Feature 3 of layer 0 reads token 7 and writes coordinate 20; attention of layer 1 copies coordinate 20 to 21 of all later positions,
    with equal weight; feature 5 of layer 1 reads 21 with weight 2. Token 11 sets what feature 1 of layer 0 reads, which nobody reads.
    """
    d = 32
    config = hf.LlamaConfig(
        vocab_size=16,
        hidden_size=d,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    lm = LanguageModel(hf.LlamaForCausalLM(config).double(), name="known")
    for name, weight in lm.model.named_parameters():
        weight.data.zero_()
        if "norm" in name:
            weight.data.fill_(1)
    lm.model.model.embed_tokens.weight.data[:16, :16] = torch.eye(16)
    attention = lm.model.model.layers[1].self_attn
    attention.v_proj.weight.data[0, 20] = attention.o_proj.weight.data[21, 0] = 1
    lm.model.lm_head.weight.data[4, 25] = 3
    matrices = {layer: [torch.zeros(6, d).double(), torch.zeros(6).double(), torch.zeros(6, d).double()] for layer in range(2)}
    matrices[0][0][3, 7], matrices[0][2][3, 20] = 1.5, 4.0
    matrices[0][0][1, 11], matrices[0][2][1, 30] = 1.0, 1.0
    matrices[1][0][5, 21], matrices[1][2][5, 25] = 2.0, 1.0
    found = {}
    for layer, parts in matrices.items():
        metadata = {"site": f"mlp_in.{layer}", "site_out": f"mlp_out.{layer}"}
        found[layer] = Dictionary(*parts, torch.zeros(d).double(), metadata=metadata).requires_grad_(False)
    # the MLPs do what the set says: at each position, what its features write
    for layer, mlp in enumerate(block.mlp for block in lm.model.model.layers):
        mlp.register_forward_hook(lambda _m, args, _out, one=found[layer]: one(args[0]))
    return lm, found


def test_a_set_with_a_known_graph_gives_exactly_that_graph(exact):  # noqa: F811
    exact("llama")  # norms in float64
    lm, found = known_set()
    ids = torch.tensor([[2, 11, 7, 1, 5]])
    graph = find_graph(linear_model(lm, found, ids), 100)
    keys = list(zip(*(part.tolist() for part in graph.features[:3])))
    assert keys == [(0, 1, 1), (0, 2, 3), (1, 2, 5), (1, 3, 5), (1, 4, 5)]
    seen = lm.record(ids, ["resid_mid.0", "resid_pre.1", "resid_mid.1", "resid_post.1"])
    rms = {site: (value[0].pow(2).mean(-1) + 1e-6).sqrt() for site, value in seen.items()}
    activation = 1.5 / rms["resid_mid.0"][2]
    edge_nn = graph.edge_tc[:, : len(keys)]
    true_nn = torch.zeros_like(edge_nn)
    for t, position in ((2, 2), (3, 3), (4, 4)):
        true_nn[t, 1] = activation * 4 / rms["resid_pre.1"][2] / (position + 1) * 2 / rms["resid_mid.1"][position]
    row = len(keys) + graph.token_t.tolist().index(4)
    logit = float(graph.features.value_n[4]) * 3 / rms["resid_post.1"][4]
    true_nn[len(keys) :, 4] = -logit / 16
    true_nn[row, 4] += logit
    torch.testing.assert_close(edge_nn, true_nn, rtol=1e-9, atol=1e-9)
    errors_tc = graph.edge_tc[:, len(keys) : graph.first_token]
    assert float(errors_tc.abs().max()) < 1e-12
    pruned = prune(graph, 1, 1)
    shown = [key for key, kept in zip(keys, pruned.kept_c.tolist()) if kept]
    assert shown == [(0, 2, 3), (1, 4, 5)]


def content_of(lm, linear, graph, node_threshold=1.0, edge_threshold=1.0):
    pruned = prune(graph, node_threshold, edge_threshold)
    nodes, edges = pruned_nodes(graph, pruned, IDS[0].tolist(), [str(i) for i in range(P)], str)
    return {"nodes": nodes, "edges": edges, "ids": IDS[0].tolist(), "n_layers": lm.n_layers}


def test_interventions_are_predicted_and_measured():
    lm = relu_gpt2()
    linear = linear_model(lm, neurons(lm), IDS)
    graph = find_graph(linear, 10_000)
    content = content_of(lm, linear, graph)
    intervening = Intervening(linear, content)
    nodes = content["nodes"]
    name = next(nodes[edge.source]["id"] for edge in content["edges"] if nodes[edge.source]["layer"] == 0)
    _, layer, position, j = name.split(".")
    value = next(node["activation"] for node in nodes if node["id"] == name)
    for factor in (0.0, -1.0, 2.0):
        found = intervening.set(name, factor)["changes"]
        added_d = (factor - 1) * value * neurons(lm)[0].W_dec_fo[int(j)]

        def add(value_spd, added_d=added_d):
            value_spd = value_spd.clone()
            value_spd[0, int(position)] += added_d
            return value_spd

        with lm.edited({f"mlp_out.{layer}": add}):
            after_v = lm.logits(IDS)[0, -1]
        change_v = after_v - lm.logits(IDS)[0, -1]
        for row in found:
            assert row["direct"] == pytest.approx(row["edge"], abs=1e-9)
            if row["node"].startswith("logit"):
                expected = float(change_v[int(row["node"].split(".")[1])] - change_v.mean())
                assert row["model"] == pytest.approx(expected, abs=1e-9)
        assert sum(abs(row["model"]) > 1e-3 for row in found) > 5
    # a change so small that no neuron switches goes along the graph's paths
    for row in intervening.set(name, 1 + 1e-7)["changes"]:
        assert row["replacement"] == pytest.approx(row["through"], rel=1e-3, abs=1e-12)
    for other in ("token.1", "error.1.3"):
        if other in {node["id"] for node in nodes}:
            assert all(row["direct"] == pytest.approx(row["edge"], abs=1e-9) for row in intervening.set(other, 0.0)["changes"])


def test_bad_input_is_one_sentence():
    lm = tiny("llama")
    good = random_set(lm)
    with pytest.raises(InputError, match=r"expected one prompt of more than 9 tokens"):
        linear_model(lm, good, IDS, 9)
    for change, said in (
        ({"site_out": "mlp_out.2"}, "to mlp_out of the same block, got one from mlp_in.0 to mlp_out.2"),
        ({"site": "resid_post.0", "site_out": "resid_post.0"}, "an autoencoder or a cross-layer transcoder"),
        ({"site_out": ["mlp_out.0", "mlp_out.1"]}, "read at one known site and write at one"),
    ):
        wrong = Dictionary(**good[0].parts()._replace(metadata=good[0].metadata | change)._asdict()).requires_grad_(False)
        with pytest.raises(InputError, match=said):
            checked(lm, {0: wrong}, "the set")
    framed = Dictionary(**good[0].parts()._replace(frame=Frame("layer_norm"))._asdict()).requires_grad_(False)
    with pytest.raises(InputError, match="without a frame"):
        checked(lm, {0: framed}, "the set")
    with pytest.raises(InputError, match="got two for block 0"):
        checked(lm, {0: good[0], 1: good[0]}, "the set")
    for name in ("feature.0.1", "feature.0.99.1", "head.0.1", "token.x", "error.9.0"):
        with pytest.raises(InputError, match="expected a node feature"):
            parse_node(name, 3, P)
    linear = linear_model(lm, good, IDS, 1)
    content = content_of(lm, linear, find_graph(linear, 30))
    with pytest.raises(InputError, match=r"expected a node of the graph, got feature\.0\.1\.999"):
        Intervening(linear, content).set("feature.0.1.999", 0.0)
    with pytest.raises(InputError, match="got the logit"):
        Intervening(linear, content).set(next(node["id"] for node in content["nodes"] if node["kind"] == "logit"), 0.0)
    node = next(node for node in content["nodes"] if node["kind"] == "feature")
    with pytest.raises(InputError, match="the transcoders are others now"):
        Intervening(linear, content | {"nodes": [node | {"activation": 2 * node["activation"]}]})
    assert all(isinstance(edge, Edge) for edge in content["edges"])
