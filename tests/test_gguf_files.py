"""GGUF files as models, against the same weights unpacked by the formulas of the format and put into the model by hand."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers.pre_tokenizers import ByteLevel

from sae.activations.harvest.command import HarvestConfig, harvest
from sae.errors import InputError
from sae.model.language_model import LanguageModel

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

WIDTH, BLOCKS, HEADS, KV_HEADS, HIDDEN = 64, 3, 4, 2, 96
BYTES = sorted(ByteLevel.alphabet())
VOCABULARY = ["<s>", "</s>", *BYTES, "he", "ll", "hell", "Ġhell", "o,"]
MERGES = ["h e", "l l", "he ll", "Ġ hell", "o ,"]


def unpacked(values: np.ndarray, kind: str) -> np.ndarray:
    """What a quantised tensor holds, by the definition of the format: blocks of 32 with a half precision scale, and offset in Q4_1."""
    quantization = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        return values.astype(np.float16 if kind == "F16" else np.float32).astype(np.float64)
    blocks = gguf.quants.quantize(values, quantization).reshape(-1, 34 if kind == "Q8_0" else 20)
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float64)
    if kind == "Q8_0":
        return (scale * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)).reshape(values.shape)
    offset = np.ascontiguousarray(blocks[:, 2:4]).view(np.float16).astype(np.float64)
    quarters = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (scale * quarters + offset).reshape(values.shape)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours where Hugging Face rotates halves, so its rows of queries and keys stand in another order."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_llama(path: Path, kind: str, vocabulary: bool = True, rotary_factors: bool = False) -> hf.LlamaForCausalLM:
    """A small Llama as a GGUF file, and the same one in float64 with the weights that the file's bits mean."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    reference = hf.LlamaForCausalLM(config).double()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(len(VOCABULARY))
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(VOCABULARY)
        writer.add_token_types([3, 3] + [1] * (len(VOCABULARY) - 2))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    for name, parameter in reference.named_parameters():
        values = torch.randn(parameter.shape).mul(0.3).add(1 if "norm" in name else 0).numpy()
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0)
        stored, held = (values, "F32") if values.ndim == 1 else (interleaved(values, heads) if heads else values, kind)
        theirs = whole.get(name) or f"blk.{name.split('.')[2]}.{names[name.split('.')[-2]]}.weight"
        quantization = gguf.GGMLQuantizationType[held]
        writer.add_tensor(theirs, gguf.quants.quantize(stored, quantization), raw_dtype=quantization)
        parameter.data = torch.from_numpy(unpacked(values, held))
    if rotary_factors:
        writer.add_tensor("rope_freqs.weight", np.ones(WIDTH // HEADS // 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return reference


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_llama(path, "Q8_0")
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_file_gives_the_logits_of_its_unpacked_weights(tmp_path, kind):
    reference = write_llama(tmp_path / "small.gguf", kind)
    lm = LanguageModel.load(str(tmp_path / "small.gguf"), device="cpu")
    assert lm.dtype == torch.float32
    ids_sp = torch.arange(40).view(2, 20)
    expected = reference(ids_sp).logits.detach()
    torch.testing.assert_close(lm.logits(ids_sp).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for mine, theirs in zip(lm.model.parameters(), reference.parameters()):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-7)


def test_the_vocabulary_and_the_chat_template_are_in_the_file(file):
    lm = LanguageModel.load(str(file), device="cpu")
    ids_sp, _ = lm.encode(["hello, hello"])
    assert [VOCABULARY[i] for i in ids_sp[0].tolist()] == ["<s>", "hell", "o", ",", "Ġhell", "o"]
    assert (lm.bos_id, lm.eos_ids) == (0, [1])
    assert lm.tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "he</s>"
    assert lm.context == 128


def test_a_folder_of_one_file_is_that_file_and_of_several_asks_which(file, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "any name.gguf").write_bytes(file.read_bytes())
    lm = LanguageModel.load(str(file), device="cpu")
    assert LanguageModel.load(str(alone), device="cpu").fingerprint() == lm.fingerprint()
    (alone / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"found 2 GGUF files \(any name.gguf, other.gguf\)"):
        LanguageModel.load(str(alone), device="cpu")
    assert LanguageModel.load(str(alone / "other.gguf"), device="cpu").fingerprint() == lm.fingerprint()


def test_saved_as_a_folder_it_is_the_same_model(file, tmp_path):
    lm = LanguageModel.load(str(file), device="cpu")
    lm.model.save_pretrained(tmp_path / "folder")
    lm.tokenizer.save_pretrained(tmp_path / "folder")
    saved = LanguageModel.load(str(tmp_path / "folder"), device="cpu")
    assert saved.fingerprint() == lm.fingerprint()
    assert all(torch.equal(a, b) for a, b in zip(saved.model.parameters(), lm.model.parameters()))
    assert torch.equal(saved.encode(["hello"])[0], lm.encode(["hello"])[0])
    beside = tmp_path / "folder" / "small.gguf"  # a folder with a config.json is a folder, whatever else is in it
    beside.write_bytes(b"no model")
    assert LanguageModel.load(str(tmp_path / "folder"), device="cpu").fingerprint() == lm.fingerprint()


def test_sites_load_all_blocks_and_say_so(file, capsys):
    lm = LanguageModel.load(str(file), device="cpu", sites=["resid_post.0"])
    assert lm.n_layers == BLOCKS
    assert "note: all blocks" in capsys.readouterr().err
    assert lm.logits(torch.arange(4)[None]).shape == (1, 4, len(VOCABULARY))


def test_a_file_without_a_vocabulary_has_no_tokenizer(tmp_path):
    write_llama(tmp_path / "bare.gguf", "F32", vocabulary=False)
    lm = LanguageModel.load(str(tmp_path / "bare.gguf"), device="cpu")
    assert lm.tokenizer is None
    with pytest.raises(InputError, match="expected a tokenizer"):
        lm.encode(["hello"])


def test_unusable_files_are_one_sentence(file, tmp_path, monkeypatch):
    whole = file.read_bytes()
    damaged = {f"cut at {n}": whole[:n] for n in (0, 3, 30, 500, 5000, len(whole) // 2, len(whole) - 50)}
    damaged |= {f"flipped at {n}": whole[:n] + bytes([whole[n] ^ 0x7F]) + whole[n + 1 :] for n in (1, 5, 9, 24, 33, 60)}
    damaged["text"] = b"some text that is no model"
    for name, content in damaged.items():
        (tmp_path / "damaged.gguf").write_bytes(content)
        with pytest.raises(InputError) as caught:
            LanguageModel.load(str(tmp_path / "damaged.gguf"), device="cpu")
        assert "\n" not in str(caught.value), name
    for name, settings, sentence in [
        (str(tmp_path / "absent.gguf"), {}, "which does not exist"),
        ("absent.gguf", {}, "which does not exist"),
        (str(file), dict(quantize="8bit"), "got the GGUF file"),
        ("nobody/nothing/model.gguf", {}, "could not be loaded"),
    ]:
        with pytest.raises(InputError, match=sentence):
            LanguageModel.load(name, device="cpu", **settings)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(InputError, match="pip install accelerate"):
        LanguageModel.load(str(file), device="cpu")


def test_rotary_factors_that_transformers_leaves_out_are_said(file, tmp_path, capsys):
    LanguageModel.load(str(file), device="cpu")
    assert "rotary" not in capsys.readouterr().err
    write_llama(tmp_path / "stretched.gguf", "F32", rotary_factors=True)
    LanguageModel.load(str(tmp_path / "stretched.gguf"), device="cpu")
    assert "rotary factors" in capsys.readouterr().err


def test_a_cache_from_a_file_names_it(file, tmp_path):
    (tmp_path / "text.txt").write_text("hello, hello\n" * 200)
    config = HarvestConfig(
        model=str(file), text=(str(tmp_path / "text.txt"),), sites=("resid_post.1",), tokens=500, out=tmp_path / "cache", device="cpu"
    )
    manifest = json.loads((harvest(config) / "manifest.json").read_text())
    assert manifest["model"]["name"] == str(file)
    assert manifest["model"]["fingerprint"] == LanguageModel.load(str(file), device="cpu").fingerprint()
