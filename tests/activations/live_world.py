"""A small random model and random tokens, and the settings to record them with."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

SITE = "resid_post.0"


def make_world(folder: Path, documents: int = 60) -> dict:
    """Writes model and text into the folder; returns the options that name them."""
    torch.manual_seed(0)
    size = dict(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(folder / "lm")
    lengths = torch.randint(5, 60, (documents,))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(1, 50, (int(starts[-1]),), dtype=torch.int32)
    save_file({"ids": ids, "document_starts": starts}, folder / "text.safetensors")
    text, lm = (str(folder / "text.safetensors"),), str(folder / "lm")
    return dict(model=lm, text=text, sites=(SITE,), tokens=10_000, pool_tokens=400, batch_tokens=100, held_out=0.2, device="cpu")
