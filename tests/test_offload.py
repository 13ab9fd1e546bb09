"""A model part of whose weights stays on disk between passes."""

import pytest
import torch
from test_language_model import ids_of, tiny

from sae.features.index.lens import folded_unembedding
from sae.model.language_model import LanguageModel

pytest.importorskip("accelerate")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_offloaded_embeddings_unembedding_and_norm(family, tmp_path):
    whole, ids_sp = tiny(family), ids_of()
    whole.model.save_pretrained(tmp_path)
    base = whole.model.base_model_prefix
    parts = [f"{base}.{name}" for name, _ in whole.model.base_model.named_children()]
    tied = whole.model.config.tie_word_embeddings
    places = dict.fromkeys(parts, "cpu") | {parts[0]: "disk", "lm_head": "disk" if tied else "cpu", parts[-1]: "disk"}
    places |= {part: "disk" for part in parts if "norm" in part or "ln_f" in part}
    lm = LanguageModel.load(str(tmp_path), device_map=places)
    assert lm.model.get_input_embeddings().weight.is_meta
    assert lm.device == torch.device("cpu")
    torch.testing.assert_close(lm.logits(ids_sp), whole.logits(ids_sp))
    assert torch.equal(lm.generate(ids_sp, max_new_tokens=3, temperature=0), whole.generate(ids_sp, max_new_tokens=3, temperature=0))
    assert lm.fingerprint() == whole.fingerprint()
    torch.testing.assert_close(folded_unembedding(lm)[0], folded_unembedding(whole)[0])
