"""The scripts that make the bundled model, on a corpus of two tiny domains: train, resume, measure, sample, harvest the sample."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sae.errors import InputError

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name, *flags):
    command = [sys.executable, SCRIPTS / f"{name}.py", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of two domains: one that says "aa bb" for ever, one that says "cc dd"."""
    folder = tmp_path_factory.mktemp("demo")
    for domain, words in {"first": "aa bb ", "second": "cc dd "}.items():
        for split, count in {"train": 40, "validation": 4}.items():
            with gzip.open(folder / f"{domain}.{split}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps({"text": words * 30, "domain": domain}) + "\n" for _ in range(count))
    shape = "--n-layer 1 --d-model 32 --n-head 2 --vocab-size 300 --context 32 --batch-rows 8 --no-compile --device cpu".split()  # noqa: SIM905
    script("train_demo_model", "--corpora", folder, "--out", folder / "lm", *shape, "--tokens", 8 * 32 * 60, "--save-every", 25)
    return folder / "lm"


def test_the_trained_model_knows_its_domains_by_their_tags(model):
    from sae.model.language_model import LanguageModel

    record = json.loads((model / "training.json").read_text())
    assert set(record["held_out"]) == {"first", "second"}
    assert record["mean"]["nats_per_token"] < 2.0  # 300 tokens at random are 5.7 nats
    assert "| first |" in (model / "README.md").read_text()
    lm = LanguageModel.load(str(model))
    for domain, word, other in (("first", "aa bb", "cc"), ("second", "cc dd", "aa")):
        tag = lm.tokenizer.convert_tokens_to_ids(f"<|{domain}|>")
        text = lm.tokenizer.decode(lm.generate(torch.tensor([[lm.bos_id, tag]]), max_new_tokens=8, temperature=0)[0, 2:])
        assert word in text
        assert other not in text


def test_a_state_saved_under_other_settings_is_refused(tmp_path):
    sys.path.insert(0, str(SCRIPTS))
    import train_demo_model as demo

    config = demo.DemoModelConfig(corpora=tmp_path, out=tmp_path)
    layer = torch.nn.Linear(2, 2)
    demo.save_state(tmp_path / "state.pt", {"layer": layer}, config, 7)
    other = torch.nn.Linear(2, 2)
    assert demo.resume(tmp_path / "state.pt", {"layer": other}, config) == 7
    assert torch.equal(layer.weight, other.weight)
    assert demo.resume(tmp_path / "none.pt", {}, config) == 0
    with pytest.raises(InputError, match="other settings"):
        demo.resume(tmp_path / "state.pt", {"layer": other}, demo.DemoModelConfig(corpora=tmp_path, out=tmp_path, tokens=5))


def test_its_held_out_loss_is_that_of_the_model_on_the_validation_text(model):
    from sae.model.language_model import LanguageModel

    lm = LanguageModel.load(str(model))
    ids = [lm.bos_id, *lm.tokenizer("aa bb " * 30, add_special_tokens=False)["input_ids"]] * 4  # the four validation documents
    total = 0.0
    for start in range(0, len(ids) - 1, 32):
        row = torch.tensor([ids[start : start + 33]])
        log_p = lm.logits(row[:, :-1]).double().log_softmax(-1)
        total -= log_p[0, torch.arange(row.shape[1] - 1), row[0, 1:]].sum().item()
    stored = json.loads((model / "training.json").read_text())["held_out"]["first"]["nats_per_token"]
    assert stored == pytest.approx(total / (len(ids) - 1), rel=0.02)  # the file's weights are in half precision


def test_sampled_text_carries_its_label_and_can_be_harvested(model, tmp_path):
    from sae.activations.cache import ActivationCache

    out = tmp_path / "tokens.safetensors"
    script("sample_demo_text", "--model", model, "--out", out, "--tokens-per-domain", 300, "--batch", 8, "--device", "cpu")
    again = tmp_path / "again.safetensors"
    script("sample_demo_text", "--model", model, "--out", again, "--tokens-per-domain", 300, "--batch", 8, "--device", "cpu")
    sampled, repeated = load_file(out), load_file(again)
    assert all(torch.equal(sampled[name], repeated[name]) for name in sampled)
    with safe_open(out, "pt") as file:
        names = json.loads(file.metadata()["label_names"])
    ids, starts = sampled["ids"].int(), sampled["document_starts"]
    assert (ids[starts[:-1]] == ids[0]).all()  # every document starts with beginning-of-text
    assert (ids == ids[0]).sum() == len(starts) - 1  # and has it nowhere else
    for label in (0, 1):
        assert (starts[1:] - starts[:-1])[sampled["document_label"] == label].sum() >= 300
    flags = ["--model", model, "--text", out, "--sites", "resid_post.0", "--out", tmp_path / "cache", "--held-out", "0.3"]
    script("cache_activations", *flags)
    tokens = ActivationCache.open(tmp_path / "cache").tokens
    assert [tokens.label_names[i] for i in tokens.document_label] == [names[i] for i in sampled["document_label"]]
    assert len(tokens.ids) == len(ids)
