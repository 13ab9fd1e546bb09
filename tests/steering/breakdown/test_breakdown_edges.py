"""Which parts carry the damage: shares against a closed form, and their sums against the KL.

s sequences · p positions · d width · h heads · v vocabulary
"""

import pytest
import torch
import transformers as hf
from circuit_world import engine_of
from scipy.special import rel_entr
from test_breakdown_report import Page, whole
from test_language_model import GPT2, ids_of, randomised, tiny

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.breakdown import edges
from steering.breakdown.command import _damage_by_edge
from steering.breakdown.edges import damage_by_edge
from steering.breakdown.report import report_html
from steering.breakdown.sweep import Setup
from steering.intervention import steered
from steering.vector import SteeringVector


def setup_of(lm: LanguageModel, site: str, rows: int | None = None, length: float = 2.0) -> Setup:
    shape = (lm.d_model,) if rows is None else (rows, lm.d_model)
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    vector = SteeringVector({site: length * direction / direction.norm(dim=-1, keepdim=True)}, {"method": "test"})
    mask_sp = torch.ones(3, 7, dtype=torch.long)
    mask_sp[1, :2] = 0
    return Setup(lm, vector, ids_of(3, 7), mask_sp, (), 1.0, 1.0, torch.empty(0), {})


def kl_by_hand(setup: Setup, c: float) -> float:
    kls = []
    for ids_p, mask_p in zip(setup.ids_sp, setup.mask_sp.bool(), strict=True):
        p = setup.lm.logits(ids_p[mask_p][None])[0].double().softmax(-1).numpy()
        with steered(setup.lm, [(setup.vector, c)]):
            kls.append(rel_entr(p, setup.lm.logits(ids_p[mask_p][None])[0].double().softmax(-1).numpy()).sum(1).mean())
    return sum(kls) / len(kls)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen3", "gemma2", "phi3", "gpt_neox", "mixtral"])
def test_the_shares_add_up_to_the_kl(family):
    setup = setup_of(tiny(family), "resid_post.0")
    found = damage_by_edge(setup, 1.0, steps=25)
    assert found["kl"] == pytest.approx(kl_by_hand(setup, 1.0), rel=1e-3)
    assert found["sum"] == pytest.approx(1, abs=0.02)
    assert (found["least_across"], found["most_across"]) == pytest.approx((1, 1), abs=0.02)
    values = {one["writer"]: one["value"] for one in found["writers"]}
    assert sum(values.values()) == pytest.approx(found["sum"], rel=1e-4)
    assert found["heads"] + found["mlps"] + values["vector"] == pytest.approx(found["sum"], rel=1e-4)
    assert not {name for name in values if name.split(".")[1:2] == ["0"]}  # they write before the vector is added
    assert all(one["low"] <= one["value"] <= one["high"] for one in found["writers"])


@pytest.mark.parametrize(("site", "rows"), [("resid_pre.0", None), ("resid_mid.1", None), ("resid_post.2", None), ("resid_pre.1", 2)])
def test_at_every_place_of_the_stream_and_at_some_positions_too(site, rows):
    setup = setup_of(tiny("llama"), site, rows)
    found = damage_by_edge(setup, 1.0, steps=25)
    assert found["kl"] == pytest.approx(kl_by_hand(setup, 1.0), rel=1e-3)
    assert (found["sum"], found["least_across"], found["most_across"]) == pytest.approx((1, 1, 1), abs=0.02)
    assert found["writers"][0]["writer"] == "vector" or site != "resid_post.2"
    if site == "resid_mid.1":
        assert not [one for one in found["edges"] if "vector->" in one["edge"] and one["edge"].endswith(("q.1.0", "k.1.0", "v.1.0"))]


class ScaleNorm(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = torch.nn.Parameter(0.5 + torch.rand(width, generator=torch.Generator().manual_seed(width), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_a_linear_models_shares_have_a_closed_form():
    """Attention is uniform, MLP and norms are linear, and the logits are ± one number: each part's share is its share of that number."""
    model = randomised(hf.GPT2Config(**{**GPT2, "n_layer": 2}, activation_function="linear", tie_word_embeddings=False), 5).model.double()
    model.transformer.ln_f = ScaleNorm(32)
    for block in model.transformer.h:
        block.ln_1, block.ln_2 = ScaleNorm(32), ScaleNorm(32)
        block.attn.c_attn.weight[:, :64] = 0
        block.attn.c_attn.bias[:64] = 0
    out_d = 0.1 * torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.lm_head.weight[:] = torch.outer(torch.tensor([1.0, -1.0]).repeat(25).double(), out_d)
    setup = setup_of(LanguageModel(model, name="linear"), "resid_post.0", length=0.5)
    v_d, block = setup.vector.direction_d.double(), model.transformer.h[1]
    W_V, W_O = block.attn.c_attn.weight[:, 64:], block.attn.c_proj.weight
    written = {"vector": v_d}
    for head in range(4):
        own = slice(8 * head, 8 * head + 8)
        written[f"head.1.{head}"] = (v_d * block.ln_1.weight) @ W_V[:, own] @ W_O[own]
    written["mlp.1"] = (sum(written.values()) * block.ln_2.weight) @ block.mlp.c_fc.weight @ block.mlp.c_proj.weight
    number = {name: float((change_d * model.transformer.ln_f.weight) @ out_d) for name, change_d in written.items()}
    expected = {name: part / sum(number.values()) for name, part in number.items()}
    found = damage_by_edge(setup, 1.0, steps=50)
    assert {one["writer"]: one["value"] / found["sum"] for one in found["writers"]} == pytest.approx(expected, rel=1e-6)
    assert found["sum"] == pytest.approx(1, abs=1e-3)


def test_texts_taken_in_turns_give_the_same(monkeypatch):
    setup = setup_of(tiny("gpt2"), "resid_post.0")
    together = damage_by_edge(setup, 1.0)
    monkeypatch.setattr(edges, "HELD_BYTES", 1)
    apart = damage_by_edge(setup, 1.0)
    assert apart["sum"] == pytest.approx(together["sum"], rel=1e-4)
    assert [one["writer"] for one in apart["writers"]] == [one["writer"] for one in together["writers"]]


def test_a_model_without_a_graph_says_why(capsys):
    found = _damage_by_edge(setup_of(tiny("olmo2"), "resid_post.0"), 1.0)
    assert "norms the queries or keys of all heads together" in found["left_out"]
    assert "without the damage by edge: expected 'olmo2' to be a model" in capsys.readouterr().err
    page = report_html(whole() | {"damage_by_edge": found})
    assert "Not here: expected 'olmo2'" in "".join(Page(page).text)


def test_a_coefficient_that_changes_nothing_is_refused():
    with pytest.raises(InputError, match="expected a coefficient that changes the predictions, got 0"):
        damage_by_edge(setup_of(engine_of("gpt2").lm, "resid_post.0"), 0.0)
