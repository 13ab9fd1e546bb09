"""Text sampled with labels: fast decoding beside transformers' own, rounds that continue, equal shares, what is refused."""

import json
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sae.errors import InputError
from sae.model.language_model import LanguageModel

ROOT = Path(__file__).parents[2]
PROMPTS = {
    "lists": {"name": ["Ann", "Bob"]},
    "labels": {
        "letters": {"asks": ["Write to {name} from {name}."], "openings": ["Dear {name},", ""]},
        "news": {"asks": ["Write news."], "openings": ["The "]},
    },
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return import_module("sample_real_text")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama whose four query heads share two heads of keys, with the bundled model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints" / "demo-lm")
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**shape, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=5, initializer_range=0.5)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(script, model, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    small = dict(batch=6, longest=12, shortest=4, distinct=0.0, tokens=300)
    return script.SampleConfig(
        model=model, prompts=tmp_path / "prompts.json", out=tmp_path / "a.safetensors", parts=tmp_path / "a", **small
    )


def test_its_decoding_is_that_of_transformers(script, model, settings):
    settings.temperature, settings.longest = 0.0, 20
    texts = ["Once upon a time there was", "I", "The weather"]
    fast = LanguageModel.load(str(model), device="cpu")
    fast.model.set_attn_implementation("grouped")
    found = script.generate(fast, texts, settings, seed=0)
    lm = LanguageModel.load(str(model), device="cpu")
    ids_sp, mask_sp = lm.encode(texts)
    theirs_sp = lm.model.generate(ids_sp, attention_mask=mask_sp, max_new_tokens=20, do_sample=False)[:, ids_sp.shape[1] :]
    ends = {*lm.eos_ids, lm.bos_id}
    expected = [row[: next((n for n, token in enumerate(row) if token in ends), len(row))] for row in theirs_sp.tolist()]
    assert found == expected
    assert max(map(len, found)) == 20  # not all ended at once


def test_an_interrupted_run_gives_the_same_file(script, settings, tmp_path):
    whole = load_file(script.sample(settings))
    settings.out, settings.parts, settings.tokens = tmp_path / "b.safetensors", tmp_path / "b", 100
    script.sample(settings)
    rounds = len(list(settings.parts.glob("0*.json")))
    settings.tokens = 300
    again = load_file(script.sample(settings))
    assert 0 < rounds < len(list(settings.parts.glob("0*.json")))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_file_whose_rounds_are_gone_is_added_to_as_one_run_would_have(script, settings, tmp_path):
    whole = load_file(script.sample(settings))
    settings.out, settings.parts, settings.tokens = tmp_path / "b.safetensors", tmp_path / "b", 100
    first = len(load_file(script.sample(settings))["ids"])
    settings.parts, settings.tokens = tmp_path / "c", 300
    again = load_file(script.sample(settings))
    assert first < 300
    assert (settings.parts / "00000.json").exists() is False
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_labels_have_about_equal_shares_and_documents_begin_with_bos(script, model, settings):
    out = script.sample(settings)
    found = load_file(out)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["label_names"]) == ["letters", "news"]
    starts, bos = found["document_starts"], LanguageModel.load(str(model)).bos_id
    lengths = starts[1:] - starts[:-1]
    shares = [int(lengths[found["document_label"] == label].sum()) for label in (0, 1)]
    assert min(shares) > 0.7 * max(shares)
    assert found["ids"].dtype == torch.uint16
    assert (found["ids"][starts[:-1]].int() == bos).all()
    assert int((found["ids"].int() == bos).sum()) == len(lengths)
    assert int(lengths.min()) >= settings.shortest


def test_an_opening_has_the_name_that_the_request_had_last(script):
    import random

    chance = random.Random(0)
    drawn = Counter(script.request(PROMPTS, "letters", chance) for _ in range(200))
    asks = {ask for ask, _ in drawn}
    assert asks == {f"Write to {a} from {b}." for a in ("Ann", "Bob") for b in ("Ann", "Bob")}
    assert all(not opening or opening == f"Dear {ask.split()[-1]}".rstrip(".") + "," for ask, opening in drawn)
    assert script.request(PROMPTS, "news", chance) == ("Write news.", "The")  # no space at the end, which would be a token


@pytest.mark.parametrize(
    ("document", "kept"),
    [([1, 2, 3], False), ([1, 2, 3, 4, 5, 6], True), ([1, 2, 1, 2, 1, 2, 1, 2], False)],
    ids=["too short", "kept", "round in circles"],
)
def test_which_documents_are_kept(script, document, kept):
    assert script.worth_keeping(document, script.SampleConfig(shortest=4, distinct=0.7)) is kept


def test_rounds_of_other_settings_are_refused(script, settings):
    settings.tokens = 30
    script.sample(settings)
    settings.temperature = 0.1
    with pytest.raises(
        InputError, match=r"a\.safetensors to be of these settings, but .*'temperature'.* differ; give another --out and --parts"
    ):
        script.sample(settings)
    settings.out.unlink()
    with pytest.raises(InputError, match=r"/a to be of these settings, but \['temperature'\] differ"):
        script.sample(settings)


def test_a_name_without_a_list_is_refused(script, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS | {"lists": {}}))
    with pytest.raises(InputError, match=r"expected a list of words for \{name\} in 'Write to \{name\} from \{name\}\.' of letters"):
        script.read_prompts(tmp_path / "prompts.json")
    assert script.read_prompts(ROOT / "checkpoints" / "smollm2-text" / "prompts.json")["labels"].keys() >= {"bible", "wine_reviews"}
