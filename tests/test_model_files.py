"""Loading a model from its files: dtypes, quietness, and every failure as one sentence."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_language_model import FAMILIES, blocks_of, ids_of, tiny

from sae.errors import InputError
from sae.model.language_model import LanguageModel


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)))


IDS_SP = torch.arange(18).view(2, 9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_float_dtypes_load_run_and_share_a_fingerprint(lm, tmp_path, dtype):
    lm.model.save_pretrained(tmp_path / "model")
    other = LanguageModel.load(str(tmp_path / "model"), device="cpu", dtype=dtype)
    assert other.dtype == getattr(torch, dtype)
    seen = other.record(IDS_SP, ["head_out.1"])["head_out.1"]
    assert seen.dtype == other.dtype
    torch.testing.assert_close(seen.float(), lm.record(IDS_SP, ["head_out.1"])["head_out.1"], rtol=0.2, atol=0.05)
    with other.edited({"resid_post.0": lambda value: value.float() + 1}):  # an edit may compute in its own dtype
        assert other.logits(IDS_SP).dtype == other.dtype
    assert other.fingerprint() == lm.fingerprint()


def test_loads_its_own_folder_quietly_in_float32_on_a_cpu(lm, tmp_path, capfd):
    lm.model.save_pretrained(tmp_path / "model")
    half = load_file(tmp_path / "model" / "model.safetensors")
    save_file({k: v.half() for k, v in half.items()}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    capfd.readouterr()
    loaded = LanguageModel.load(str(tmp_path / "model"), device="cpu")
    assert capfd.readouterr() == ("", "")
    assert loaded.dtype == torch.float32
    assert loaded.tokenizer is None
    with pytest.raises(InputError, match="expected a tokenizer"):
        loaded.encode(["text"])


def test_load_errors_are_one_sentence(lm, tmp_path):
    lm.model.save_pretrained(tmp_path / "lacking")
    weights = load_file(tmp_path / "lacking" / "model.safetensors")
    weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, tmp_path / "lacking" / "model.safetensors", {"format": "pt"})
    lm.model.save_pretrained(tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    cases = {
        str(tmp_path / "absent"): "does not exist",
        str(tmp_path / "empty"): "could not be loaded",
        str(tmp_path / "t5"): "could not be loaded",
        str(tmp_path / "cut"): "could not be loaded",
        str(tmp_path / "lacking"): "1 are absent or misshapen, such as transformer.h.1.mlp.c_fc.weight",
        "no-such-model-anywhere": "could not be loaded",
    }
    for name, sentence in cases.items():
        with pytest.raises(InputError, match=sentence) as caught:
            LanguageModel.load(name, device="cpu")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(device="gpu7"), "expected a device such as"),
        (dict(device="cuda:99"), "expected the device cuda:99"),
        (dict(dtype="int8"), "expected a dtype of"),
        (dict(dtype="float31"), "expected a dtype of"),
        (dict(device="cpu", device_map="auto"), "either device or device_map"),
    ],
)
def test_unusable_load_settings(lm, tmp_path, settings, sentence):
    lm.model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=sentence):
        LanguageModel.load(str(tmp_path / "model"), **settings)


def test_a_model_partly_on_disk_gives_the_same_values_and_fingerprint(lm, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs the package accelerate")
    lm.model.save_pretrained(tmp_path / "model")
    places = {"lm_head": "cpu", "transformer.h.1": "disk"}
    places |= {f"transformer.{name}": "cpu" for name in ("wte", "wpe", "h.0", "ln_f", "drop")}
    spread = LanguageModel.load(str(tmp_path / "model"), device_map=places, dtype="float32")
    assert spread.fingerprint() == lm.fingerprint()
    for _ in range(2):  # a recording that was cut short leaves the model usable
        assert torch.equal(spread.record(IDS_SP, ["attn_out.1"])["attn_out.1"], lm.record(IDS_SP, ["attn_out.1"])["attn_out.1"])
    assert torch.equal(spread.logits(IDS_SP), lm.logits(IDS_SP))


def test_device_map_without_its_package_is_one_sentence(lm, tmp_path):
    if importlib.util.find_spec("accelerate"):
        pytest.skip("accelerate is installed")
    lm.model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="pip install accelerate"):
        LanguageModel.load(str(tmp_path / "model"), device_map="auto")


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_after_the_deepest_site_stay_on_disk(family, tmp_path, capsys):
    tiny(family).model.save_pretrained(tmp_path)
    whole = LanguageModel.load(str(tmp_path), device="cpu")
    sites = ["resid_pre.0", "head_out.0", "resid_post.0"]
    part = LanguageModel.load(str(tmp_path), device="cpu", sites=sites)
    if family == "mixtral":  # its files hold every expert by itself
        assert "note: all blocks" in capsys.readouterr().err
        assert torch.equal(part.logits(ids_of()), whole.logits(ids_of()))
        return
    left_out = {name for name, _ in whole.model.named_parameters()} - {name for name, _ in part.model.named_parameters()}
    assert left_out == {
        name for name, p in whole.model.named_parameters() if any(p is q for b in blocks_of(whole)[1:] for q in b.parameters())
    }
    assert left_out
    recorded = whole.record(ids_of(), sites)
    assert all(torch.equal(value, recorded[site]) for site, value in part.record(ids_of(), sites).items())
    assert part.fingerprint() == whole.fingerprint() == LanguageModel(whole.model).fingerprint()
    for use in (lambda: part.logits(ids_of()), lambda: part.generate(ids_of(), max_new_tokens=1)):
        with pytest.raises(InputError, match="up to block 0"):
            use()


def test_files_in_parts_and_without_a_prefix_are_recognised_too(lm, tmp_path):
    lm.model.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    lm.model.transformer.save_pretrained(tmp_path / "base")  # as GPT-2 on the hub: h.0 for transformer.h.0
    for name in ("parts", "base"):
        part = LanguageModel.load(str(tmp_path / name), device="cpu", sites=["resid_post.0"])
        assert len(part.model.transformer.h) == 1
        assert part.fingerprint() == lm.fingerprint()


def test_files_that_are_not_safetensors_load_all_blocks_and_say_so(lm, tmp_path, capsys):
    lm.model.config.save_pretrained(tmp_path)
    torch.save(lm.model.state_dict(), tmp_path / "pytorch_model.bin")
    part = LanguageModel.load(str(tmp_path), device="cpu", sites=["resid_post.0"])
    assert "note: all blocks" in capsys.readouterr().err
    assert part.fingerprint() == lm.fingerprint()
    assert torch.equal(part.logits(IDS_SP), lm.logits(IDS_SP))


def test_the_bundled_model_in_part_is_the_one_its_dictionary_was_trained_on():
    home = Path(__file__).resolve().parents[1] / "checkpoints"
    made = json.loads((home / "demo-sae" / "cfg.json").read_text())["metadata"]
    part = LanguageModel.load(str(home / "demo-lm"), device="cpu", sites=[made["site"]])
    assert len(part.model.transformer.h) == int(made["site"].split(".")[1]) + 1
    assert part.fingerprint() == made["model_fingerprint"]


def test_a_site_deeper_than_the_model_is_refused_before_loading(lm, tmp_path):
    lm.model.config.save_pretrained(tmp_path)  # no weights
    with pytest.raises(InputError, match=r"resid_pre\.0 to resid_pre\.1.*resid_pre\.2"):
        LanguageModel.load(str(tmp_path), device="cpu", sites=["resid_pre.2"])


def test_eight_bits_ask_for_their_package(lm, tmp_path, monkeypatch):
    lm.model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="8bit or nothing"):
        LanguageModel.load(str(tmp_path), device="cpu", quantize="4bit")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(InputError, match="pip install bitsandbytes"):
            LanguageModel.load(str(tmp_path), device="cpu", quantize="8bit")
    given = {}

    def from_pretrained(_name, **options):
        given.update(options)
        raise ValueError("as far as this goes without the package")

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "there")
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(InputError, match="without the package"):
        LanguageModel.load(str(tmp_path), device="cpu", quantize="8bit")
    assert given["quantization_config"].load_in_8bit
    assert given["device_map"] == {"": torch.device("cpu")}
