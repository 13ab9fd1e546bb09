"""What a direction at a site writes into the residual stream, against what an edit there changes in it."""

import pytest
import torch
import transformers as hf

from sae.errors import InputError
from sae.features.index.lens import into_residual
from sae.model.language_model import LanguageModel

SMALL = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=16)
LLAMA = hf.LlamaConfig(num_key_value_heads=2, head_dim=6, **SMALL)
MODELS = {
    "gpt2": hf.GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4),
    "opt": hf.OPTConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32),
    "llama": LLAMA,  # heads whose widths do not add up to the stream's
    "granite": hf.GraniteConfig(residual_multiplier=0.3, **SMALL),
    "gemma2": hf.Gemma2Config(num_key_value_heads=2, head_dim=6, **SMALL),
}


def model(name: str) -> LanguageModel:
    torch.manual_seed(0)
    lm = LanguageModel(hf.AutoModelForCausalLM.from_config(MODELS[name]).float(), name=name)
    for weight in lm.model.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # biases too
    return lm


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "granite"])
@pytest.mark.parametrize(("site", "out"), [("head_out.1", "attn_out.1"), ("mlp_act.1", "mlp_out.1")])
def test_a_direction_behind_a_projection_goes_through_it(name, site, out):
    lm, ids_sp = model(name), torch.arange(8)[None]
    rows_fd = torch.randn(3, lm.width(site))
    written_fd = into_residual(lm, site, rows_fd)
    for row_d, written_d in zip(rows_fd, written_fd):
        before = lm.record(ids_sp, [out])[out]
        with lm.edited({site: lambda x, row_d=row_d: x + row_d}):
            after = lm.record(ids_sp, [out])[out]
        torch.testing.assert_close((after - before)[0], written_d.expand(8, -1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("site", ["resid_pre.0", "resid_post.1", "attn_out.1", "mlp_out.0"])
def test_directions_in_the_stream_are_what_they_write(site):
    rows_fd = torch.randn(3, 32)
    assert into_residual(model("llama"), site, rows_fd) is rows_fd


def test_heads_are_refused_where_more_than_a_projection_lies_between():
    with pytest.raises(InputError, match="no place in the residual stream"):
        into_residual(model("gemma2"), "head_out.1", torch.randn(3, 24))
    with pytest.raises(InputError, match=r"directions at mlp_in\.1 have no place in the residual stream"):
        into_residual(model("llama"), "mlp_in.1", torch.randn(3, 32))
