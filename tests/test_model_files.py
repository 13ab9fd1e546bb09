"""Loading a model from its files: dtypes, quietness, and every failure as one sentence."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from sae.errors import InputError
from sae.language_model import LanguageModel


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
    import importlib.util

    if importlib.util.find_spec("accelerate"):
        pytest.skip("accelerate is installed")
    lm.model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="pip install accelerate"):
        LanguageModel.load(str(tmp_path / "model"), device_map="auto")
