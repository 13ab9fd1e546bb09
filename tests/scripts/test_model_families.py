"""docs/model_families.md: some of its rows against the code, and against what the families' sources say."""

import re
from pathlib import Path

import pytest
import transformers

from sae.errors import InputError
from sae.model.sites import EMBED, KINDS

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {  # kinds of sites that no block or not every block has
    "gpt2": set(),
    "gpt_neox": {"resid_mid"},  # attention and MLP side by side
    "gptj": {"resid_mid", "mlp_in_nogain"},  # and one norm for both
    "olmo2": {"mlp_in_nogain"},  # no norm before the MLP
    "mixtral": {"mlp_act"},  # experts
    "qwen3_5_text": {"q", "k", "v"},  # linear attention in some blocks
    "mamba": set(KINDS) - {"resid_pre", "resid_post", "attn_in", "attn_out"},
    "gemma4_text": set(),
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import model_families

    return model_families


def rows(text):
    """The cells of each row by family, with the reasons' numbers replaced by the reasons."""
    reasons = dict(re.findall(r"^(\d+)\. (.*)\.$", text, flags=re.MULTILINE))
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {cells[0].partition(",")[0]: [[reasons.get(word, word) for word in cell.split()] for cell in cells[1:]] for cells in table[2:]}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_page_are_what_the_code_finds(script, family):
    text = script.PAGE.read_text(encoding="utf-8")
    if (version := re.search(r"transformers (\d[\d.]*\d)", text)[1]) != transformers.__version__:
        pytest.skip(f"the page was made with transformers {version}, this is {transformers.__version__}")
    result = script.look_at(family)
    found = rows(script.page({family: result}, {}, {}))[family]
    assert [sorted(cell) for cell in rows(text)[family]] == [sorted(cell) for cell in found]
    lacking = {kind for kind in (EMBED, *KINDS) if result.n_there[kind] < (1 if kind == EMBED else result.n_layers)}
    assert lacking == FAMILIES[family]
    assert lacking == {kind for kind, reasons in result.reasons.items() if reasons}
    assert result.wrong == []
    assert result.is_sum == (family != "gemma4_text")  # whose blocks scale the stream at their end


def test_a_run_writes_the_page_and_names_families_that_are_not_there(script, tmp_path, capsys):
    script.look(script.FamiliesConfig(("gpt2", "gpt-sw3", "bart"), tmp_path / "page.md"))
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| gpt2, gpt-sw3 | yes | yes |" in text
    assert "- an encoder: bart" in text
    assert f"transformers {transformers.__version__}" in text
    assert "gpt2: all sites" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"expected families that transformers .* has, got gpt3"):
        script.look(script.FamiliesConfig(("gpt3",), tmp_path / "page.md"))


def test_a_site_that_is_not_what_it_should_be_is_called_wrong(script):
    from sae.model.language_model import LanguageModel

    lm = LanguageModel(script.tiny_model("gpt2"))
    ids_sp = script.torch.randint(3, 60, (1, 5))
    values = lm.record(ids_sp, ["attn_out.1", "mlp_out.1"])
    lm._inspection.found["mlp_out.1"] = lm._inspection.found["mlp_out.1"]._replace(module=script.torch.nn.Identity())
    with pytest.raises(InputError, match="expected the pass to go through mlp_out"):
        script.wrong_sites(lm, ids_sp, values)
    lm.blocks[1].attn.c_proj.weight.zero_()
    lm.blocks[1].mlp.c_proj.weight.zero_()
    assert script.wrong_sites(lm, ids_sp, {"head_out.1": lm.record(ids_sp, ["head_out.1"])["head_out.1"]}) == ["head_out.1"]
