"""Attention autoencoders as Kissane and others publish them, against their code, written out in float64."""

import json

import pytest
import torch

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError

D, F = 6, 12
X = torch.randn(40, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
NAME = "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds12_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9.pt"


def weights():
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, (name, shape) in enumerate(shapes.items())
    }


def write(file, **change):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights(), file)
    cfg = {"act_name": "blocks.5.attn.hook_z", "act_size": D, "dict_size": F, "model_name": "gpt2-small", "seq_len": 128, "head": "cat"}
    cfg |= {"concat_heads": True, "site": "z", "layer": 5, "enc_dtype": "fp32", "b_dec_init": "zeros"} | change
    (file.parent / f"{file.name.removesuffix('.pt')}_cfg.json").write_text(json.dumps(cfg))
    return file


def test_it_reads_the_heads_side_by_side(tmp_path, capsys):
    dictionary = Dictionary.load(write(tmp_path / NAME))
    w = weights()
    acts = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    torch.testing.assert_close(dictionary.encode(X), acts, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dictionary(X), acts @ w["W_dec"] + w["b_dec"], rtol=1e-12, atol=1e-12)
    assert dictionary.site == dictionary.site_out == "head_out.5"
    assert (dictionary.metadata["model_name"], dictionary.metadata["context_size"]) == ("gpt2", 128)
    assert "takes head_out.5 without what the bias of the values adds to it" in capsys.readouterr().err
    dictionary.save(tmp_path / "saved")
    torch.testing.assert_close(Dictionary.load(tmp_path / "saved")(X), dictionary(X), rtol=1e-12, atol=1e-12)
    assert "takes head_out.5 without what the bias of the values adds to it" in capsys.readouterr().err  # a copy says so too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_name": "blocks.5.hook_resid_pre"}, "has act_name 'blocks.5.hook_resid_pre', which is not known here"),
        ({"act_name": "nothing"}, "has act_name 'nothing', which is not known here; expected blocks.L.attn.hook_z"),
        ({"concat_heads": False}, "has concat_heads False, which is not understood; expected True"),
        ({"act_size": D + 1}, r"expected W_enc in .* found \[6, 12\]"),
        ({"dict_size": "x"}, "'dict_size' should be a valid integer"),
    ],
)
def test_settings_that_are_not_understood(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        Dictionary.load(write(tmp_path / NAME, **change))


def test_without_its_settings_nobody_knows_it(tmp_path):
    file = write(tmp_path / NAME)
    next(tmp_path.glob("*_cfg.json")).unlink()
    with pytest.raises(InputError, match="found no known format"):
        Dictionary.load(file)
