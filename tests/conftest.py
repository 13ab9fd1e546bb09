"""What tests share: the folder of shared material, one thread so that tiny work does not fight over cores, and Triton's interpreter."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, so before anything imports them


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of corpora and small models beside the checkout; tests that need it skip if it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name!r} beside the checkout")
    return folder


@pytest.fixture(scope="session")
def byte_lm() -> "LanguageModel":
    """GPT-2 of three blocks with four heads of width 8; token 0 begins every text, and " " is one token."""
    import tokenizers
    import transformers as hf

    from sae.model.language_model import LanguageModel

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", *letters])}
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<s>", eos_token="<s>")
    torch.manual_seed(11)
    config = hf.GPT2Config(
        vocab_size=len(vocabulary), n_embd=32, n_layer=3, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0, pad_token_id=None
    )
    model = hf.GPT2LMHeadModel(config)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    return LanguageModel(model, tokenizer, "tiny bytes")
