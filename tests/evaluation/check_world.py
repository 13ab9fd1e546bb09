"""Small models with good dictionaries, in which tests plant mistakes, and the search without its command."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from sae.activations.text.documents import TextConfig
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.frames import Frame
from sae.evaluation.check.alternatives import points
from sae.evaluation.check.check import TEXT, as_declared
from sae.evaluation.check.promises import Promises
from sae.evaluation.check.recording import Point, Recorder, read_sequences
from sae.evaluation.check.search import Search
from sae.evaluation.check.trial import Sample, Trial
from sae.model.language_model import LanguageModel

ROOT = Path(__file__).parents[2]
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8)


def rough(model_class: Any, config: Any, tokenizer: Any, name: str) -> LanguageModel:
    """A random model whose weights, biases and gains are all large enough to matter, and whose tokens have a mean over the width."""
    torch.manual_seed(3)
    model = model_class(config)
    for weight_name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.25)
        else:
            torch.nn.init.normal_(weight, mean=0.0 if weight_name.endswith("bias") else 1.0, std=0.3)
    model.get_input_embeddings().weight.data += 0.3
    return LanguageModel(model, tokenizer, name)


def llama(tokenizer: Any) -> LanguageModel:
    config = hf.LlamaConfig(**SHAPE, vocab_size=257, max_position_embeddings=128, bos_token_id=0, eos_token_id=0)
    return rough(hf.LlamaForCausalLM, config, tokenizer, "tiny llama")


def gemma(tokenizer: Any) -> LanguageModel:
    config = hf.Gemma2Config(**SHAPE, vocab_size=257, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return rough(hf.Gemma2ForCausalLM, config, tokenizer, "tiny gemma")


def gpt2(tokenizer: Any) -> LanguageModel:
    shape = dict(n_embd=32, n_layer=4, n_head=4, n_positions=128)
    return rough(hf.GPT2LMHeadModel, hf.GPT2Config(**shape, vocab_size=257, bos_token_id=0, eos_token_id=0), tokenizer, "tiny gpt2")


def recorder_of(lm: LanguageModel, tokens: int = 700, other: LanguageModel | None = None) -> Recorder:
    return Recorder(lm, read_sequences(lm, TextConfig(text=(str(TEXT),)), tokens), other)


def trained(
    recorder: Recorder,
    site: str,
    *,
    out: str | None = None,
    frame: str | None = None,
    subtracts: bool = True,
    bos: bool = True,
    before_norm: bool = False,
    value_bias: bool = False,
    first: int = 0,
    l1: float = 0.8,
    d_sae: int = 96,
) -> Dictionary:
    """ReLU and L1, trained in the given frame on the very rows that it will be checked on; declared as it was trained."""
    rows = recorder.position_n >= first
    framed = Frame(frame) if frame else None  # type: ignore[arg-type]
    x_nd = recorder.values(Point(site, bos, before_norm))[rows]
    if value_bias:
        x_nd = x_nd - recorder.value_bias(site)
    y_no = x_nd if out is None else recorder.values(Point(out, bos, before_norm))[rows]
    x_nd, y_no = (t if framed is None else framed.enter(t).x_bd for t in (x_nd, y_no))
    scale_in, scale_out = (float(t.shape[1] ** 0.5 / t.norm(dim=1).mean()) for t in (x_nd, y_no))
    x_nd, y_no = x_nd * scale_in, y_no * scale_out
    generator = torch.Generator().manual_seed(0)
    W_enc_fd, W_dec_fo = (torch.nn.functional.normalize(torch.randn(d_sae, t.shape[1], generator=generator), dim=1) for t in (x_nd, y_no))
    W_dec_fo = W_enc_fd.clone() if out is None else W_dec_fo
    weights = [W_enc_fd, torch.zeros(d_sae), W_dec_fo, y_no.mean(0)]
    W_enc_fd, b_enc_f, W_dec_fo, b_dec_o = (t.clone().requires_grad_() for t in weights)
    optimizer, steps = torch.optim.Adam([W_enc_fd, b_enc_f, W_dec_fo, b_dec_o], lr=2e-2), 250
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-2 * min(1.0, 2 * (1 - step / steps))
        acts_nf = torch.relu((x_nd - b_dec_o if subtracts and out is None else x_nd) @ W_enc_fd.T + b_enc_f)
        error = (y_no - acts_nf @ W_dec_fo - b_dec_o).square().sum(1)
        loss = (error + l1 * (acts_nf @ W_dec_fo.norm(dim=1))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    W_enc_fd, b_enc_f, W_dec_fo, b_dec_o = (t.detach() for t in (W_enc_fd, b_enc_f, W_dec_fo, b_dec_o))
    metadata = {"site": site, "prepend_bos": bos} | ({"site_out": out} if out else {})
    b_in_d = b_dec_o if subtracts and out is None else None
    dictionary = Dictionary(W_enc_fd, b_enc_f, W_dec_fo, b_dec_o, b_in_d=b_in_d, frame=framed, metadata=metadata)
    return dictionary.folded(scale_in, scale_out)


def changed(dictionary: Dictionary, **parts: Any) -> Dictionary:
    return Dictionary.of(dictionary.parts()._replace(**parts))


def declared(dictionary: Dictionary, **metadata: Any) -> Dictionary:
    """With other facts."""
    kept = {key: value for key, value in dictionary.metadata.items() if key != "hook_name"}
    return changed(dictionary, metadata={**kept, **metadata})


def searched(recorder: Recorder, dictionary: Dictionary, promises: Sequence[Any] = ()) -> list[Trial]:
    """What is declared, then what fits clearly better."""
    use = as_declared(dictionary, recorder.lm, None)
    if not recorder.massive_n.any():
        recorder.begin(points(use, recorder))
    return Search(Sample(recorder, 0), Promises(promises)).run(use)


def kinds(steps: list[Trial]) -> list[str]:
    return [change.kind for change in steps[-1].use.changes]
