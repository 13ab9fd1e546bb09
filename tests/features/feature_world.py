"""A small world in which every activation is known: a model whose residual stream at the start is the token itself, one-hot.

Its cache is harvested by the real code, so a dictionary with whole numbers for weights gives activations that any arithmetic agrees on.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from sae.dictionaries.dictionary import Dictionary
from sae.features.index.reader import FeatureIndex

VOCABULARY = 420
TEXTS = {
    "insects": "The zebrafly sat. A ZEBRAFLY! Two zebraflyers met no zebrafly's friend; zebra-fly and zebrafly_x are none.\n"
    "It hums <b>low</b>. ",
    "markup": '<script>alert(1)</script> & "quoted" it\'s <img src=x onerror=alert(2)>\n\tEnd &amp; done. ',
    "scripts": "Она сказала: привет, мир! 🦓🪰 naïve café 漢字 done. ",
}


class World(NamedTuple):
    model: Path
    cache: Path
    dictionary: Dictionary
    dictionary_folder: Path
    index: FeatureIndex
    tokenizer: object


def train_tokenizer(folder: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["The quick brown zebra sat on the low wall and said that it hums; done and gone, the end."] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def one_hot_model(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=VOCABULARY, n_layer=1, n_head=1, n_inner=8, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.eye(VOCABULARY))
        model.transformer.wpe.weight.zero_()
        model.transformer.ln_f.weight.uniform_(0.5, 2)
    model.save_pretrained(folder)


def save_dictionary(folder: Path, W_enc_fd: torch.Tensor, b_enc_f: torch.Tensor, cache_folder: Path, **metadata) -> Dictionary:
    model = json.loads((cache_folder / "manifest.json").read_text())["model"]
    known = {"model_name": model["name"], "model_fingerprint": model["fingerprint"], "site": "resid_pre.0"}
    W_dec_fd = torch.nn.functional.normalize(W_enc_fd + 0.5, dim=-1)
    dictionary = Dictionary.autoencoder(W_enc_fd, b_enc_f, W_dec_fd, torch.zeros(W_enc_fd.shape[1]), known | metadata).requires_grad_(False)
    dictionary.save(folder)
    return dictionary
