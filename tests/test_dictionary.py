"""The dictionary's functions against the formula, its folder against SAELens' layout, and damaged folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError


def a_dictionary(d=6, f=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W_enc_fd, W_dec_fd = torch.randn(2, f, d, generator=generator)
    b_enc_f, b_dec_d = torch.randn(f, generator=generator), torch.randn(d, generator=generator)
    return Dictionary.autoencoder(W_enc_fd, b_enc_f, W_dec_fd, b_dec_d, {"site": "resid_post.2", "model_name": "m"}).requires_grad_(False)


def test_encode_and_decode_are_the_formula():
    sae, x_bd = a_dictionary(), torch.randn(5, 3, 6)
    acts_bf = torch.clamp(torch.einsum("spd,fd->spf", x_bd - sae.b_dec_o, sae.W_enc_fd) + sae.b_enc_f, min=0)
    torch.testing.assert_close(sae.encode(x_bd), acts_bf)
    torch.testing.assert_close(sae(x_bd), torch.einsum("spf,fd->spd", acts_bf, sae.W_dec_fo) + sae.b_dec_o)
    torch.testing.assert_close(sae.encode(x_bd.half()), sae.encode(x_bd.half().float()))


def test_folding_gives_unit_rows_and_the_same_function_of_raw_activations():
    sae, x_bd, scale = a_dictionary(), torch.randn(7, 6).double() * 30, 0.17
    sae = sae.double()
    with torch.no_grad():
        sae.W_dec_fo[3] = 0
    folded = sae.folded(scale)
    torch.testing.assert_close(folded(x_bd), sae(x_bd * scale) / scale)
    norms = folded.W_dec_fo.norm(dim=-1)
    torch.testing.assert_close(norms, torch.where(torch.arange(10) == 3, 0.0, 1.0).double())
    assert torch.equal(folded.encode(x_bd) > 0, sae.encode(x_bd * scale) > 0)


def test_initial_dictionary():
    sae = Dictionary.initial(16, 50, seed=1, decoder_norm=0.3)
    assert torch.equal(sae.W_enc_fd, sae.W_dec_fo)
    assert sae.W_enc_fd.data_ptr() != sae.W_dec_fo.data_ptr()
    torch.testing.assert_close(sae.W_dec_fo.norm(dim=-1), torch.full((50,), 0.3))
    assert torch.equal(sae.W_dec_fo, Dictionary.initial(16, 50, seed=1, decoder_norm=0.3).W_dec_fo)


def test_save_writes_saelens_layout_and_load_gives_it_back(tmp_path):
    sae = a_dictionary()
    sae.save(tmp_path / "s")
    weights = load_file(tmp_path / "s" / "sae_weights.safetensors")
    assert {k: tuple(v.shape) for k, v in weights.items()} == {"W_enc": (6, 10), "b_enc": (10,), "W_dec": (10, 6), "b_dec": (6,)}
    cfg = json.loads((tmp_path / "s" / "cfg.json").read_text())
    assert cfg["architecture"] == "standard"
    assert cfg["apply_b_dec_to_input"] is True
    assert cfg["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
    loaded = Dictionary.load(tmp_path / "s")
    assert loaded.site == "resid_post.2"
    for ours, theirs in zip(sae.parameters(), loaded.parameters()):
        assert torch.equal(ours, theirs)


def test_a_dictionary_without_input_bias_subtraction_is_read_as_the_same_function(tmp_path):
    sae, x_bd = a_dictionary(), torch.randn(9, 6)
    sae.save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"apply_b_dec_to_input": False}))
    expected = torch.relu(x_bd @ sae.W_enc_fd.T + sae.b_enc_f) @ sae.W_dec_fo + sae.b_dec_o
    torch.testing.assert_close(Dictionary.load(tmp_path)(x_bd), expected)


def test_missing_keys_and_damaged_files_are_named(tmp_path):
    a_dictionary().save(tmp_path)
    weights_path, cfg_path = tmp_path / "sae_weights.safetensors", tmp_path / "cfg.json"
    weights, whole, cfg = load_file(weights_path), weights_path.read_bytes(), cfg_path.read_text()
    save_file({k: v for k, v in weights.items() if k != "b_enc"}, weights_path)
    with pytest.raises(InputError, match="lacks b_enc"):
        Dictionary.load(tmp_path)
    weights_path.write_bytes(whole[:-20])
    with pytest.raises(InputError, match="damaged or no safetensors file"):
        Dictionary.load(tmp_path)
    weights_path.unlink()
    with pytest.raises(InputError, match=r"no known format .* but cfg.json; check"):
        Dictionary.load(tmp_path)
    weights_path.write_bytes(whole)
    cfg_path.write_text(cfg[:-5])
    with pytest.raises(InputError, match="not valid JSON"):
        Dictionary.load(tmp_path)


def test_a_dictionary_is_used_at_its_own_site_alone():
    sae = a_dictionary()
    assert sae.require_site() == sae.require_site("resid_post.2") == "resid_post.2"
    with pytest.raises(InputError, match=r"made for resid_post\.2.*resid_post\.1"):
        sae.require_site("resid_post.1")
    sae.metadata.clear()
    assert sae.require_site("resid_post.1") == "resid_post.1"
    with pytest.raises(InputError, match="give the site"):
        sae.require_site()


@pytest.mark.parametrize(
    ("made", "used", "answers"),  # of the dictionary and of what it meets: name and fingerprint; answers without and with --model
    [
        (("a", "1"), ("b", "1"), ("", "")),
        (("a", "1"), ("a", "2"), ("other weights", "other weights")),
        (("gpt2-small", None), ("openai-community/gpt2", "1"), ("say so with --model", "no fingerprint tells")),
        (("gpt2-small", "1"), (None, None), ("say so with --model", "no fingerprint tells")),
        (("a", None), ("a", "1"), ("", "")),
        ((None, None), ("a", "1"), ("no fingerprint tells", "no fingerprint tells")),
    ],
)
def test_a_name_proves_nothing_and_a_fingerprint_does(capsys, made, used, answers):
    sae = a_dictionary()
    sae.metadata |= {"model_name": made[0], "model_fingerprint": made[1]}
    for named, answer in zip((False, True), answers):
        try:
            sae.require_model(*used, named=named)
            said = capsys.readouterr().err
        except InputError as error:
            said = str(error)
            assert "no fingerprint tells" not in answer
        assert (answer in said) if answer else said == ""
        assert said.count("\n") <= 1
