"""A program that Tracr compiled, in a stock GPT-2: exactly the edges matter that its weights have between coordinates that vary.

`oracles/tracr_program.py` made the weights. The stream holds every coordinate as x and as -x, so that its mean is 0, and two large
constants, so that norms divide every stream by the same number.

k coordinates · c columns of the stream · p positions
"""

import json
import math
from pathlib import Path
from random import Random

import pytest
import torch
import transformers as hf
from safetensors import safe_open

from sae.model.language_model import LanguageModel
from steering.circuits.model_graph.engine import Engine

WEIGHTS = Path(__file__).with_name("data") / "tracr_induction.safetensors"
LETTERS, P = "abcdefgh", 8
M = 1e5
FIVE = {"embed->v.0.0", "head.0.0->k.1.0", "embed->q.1.0", "embed->v.1.0", "head.1.0->logits"}


def compiled() -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name).double() for name in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118


TENSORS, ABOUT = compiled()
LABELS = ABOUT["labels"]
K = len(LABELS)


def varies(label: str) -> bool:
    """Whether a coordinate depends on which letters a text has; positions and BOS do not."""
    return label.split(":")[-1] in LETTERS and not label.startswith("indices")


def both_signs(rows_nk: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows_nk, -rows_nk, torch.zeros(len(rows_nk), 2).double()], dim=1)


def gpt2() -> LanguageModel:
    d, size = 2 * K + 2, ABOUT["key_size"]
    config = hf.GPT2Config(
        vocab_size=len(ABOUT["tokens"]), n_positions=P + 1, n_embd=d, n_layer=2, n_head=1, n_inner=ABOUT["mlp_hidden_size"],
        activation_function="relu", bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config).double()
    for weight in model.parameters():
        weight.data.zero_()
    body = model.transformer
    body.wte.weight.data[:] = both_signs(TENSORS["token_embed/embeddings"])
    body.wpe.weight.data[:] = both_signs(TENSORS["pos_embed/embeddings"])
    body.wpe.weight.data[:, -2:] = torch.tensor([M, -M]).double()
    for layer, block in enumerate(body.h):
        own = {name.removeprefix(f"transformer/layer_{layer}/"): value for name, value in TENSORS.items() if f"layer_{layer}/" in name}
        for number, part in enumerate(("query", "key", "value")):
            scale = math.sqrt(d / size) if part == "query" else 1.0  # GPT-2 divides by its own head's width
            columns = slice(number * d, number * d + size)
            block.attn.c_attn.weight.data[:K, columns] = own[f"attn/{part}/w"] * scale
            block.attn.c_attn.bias.data[columns] = own[f"attn/{part}/b"] * scale
        block.attn.c_proj.weight.data[:size] = both_signs(own["attn/linear/w"])
        block.attn.c_proj.bias.data[:] = both_signs(own["attn/linear/b"][None])[0]
        block.mlp.c_fc.weight.data[:K] = own["mlp/linear_1/w"]
        block.mlp.c_fc.bias.data[:] = own["mlp/linear_1/b"]
        block.mlp.c_proj.weight.data[:] = both_signs(own["mlp/linear_2/w"])
        block.mlp.c_proj.bias.data[:] = both_signs(own["mlp/linear_2/b"][None])[0]
    for norm in (*(norm for block in body.h for norm in (block.ln_1, block.ln_2)), body.ln_f):
        norm.weight.data.fill_(M * math.sqrt(2 / d))
    for letter in LETTERS:
        model.lm_head.weight.data[ABOUT["tokens"][letter], LABELS.index(f"induction_1:{letter}")] = 10
    return LanguageModel(model, None, "compiled induction")


def drawn(n: int = 12) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """Texts whose last letter stood before, and what the program says of each."""
    rng, rows = Random(1), []
    while len(rows) < n:
        sides = []
        for _ in range(2):
            letters, at = rng.sample(LETTERS, P - 1), rng.randint(1, P - 3)
            sides.append(([ABOUT["tokens"][token] for token in ("BOS", *letters, letters[at])], ABOUT["tokens"][letters[at + 1]]))
        (clean, right), (corrupt, wrong) = sides
        if right != wrong:
            rows.append((clean, corrupt, right, wrong))
    clean, corrupt, right, wrong = zip(*rows)
    return torch.tensor(clean), torch.tensor(corrupt), list(right), list(wrong)


CLEAN, CORRUPT, RIGHT, WRONG = drawn()


def metric(logits_spv: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(logits_spv))
    return logits_spv[rows, -1, RIGHT] - logits_spv[rows, -1, WRONG]


@pytest.fixture(scope="module")
def engine():
    return Engine(gpt2())


def wired() -> set[str]:
    """By the weights alone: a reader that weighs a varying coordinate which the writer writes."""
    letters_k = torch.tensor([varies(label) for label in LABELS])
    writes = {"embed": TENSORS["token_embed/embeddings"].abs().sum(0) > 0}
    reads = {"logits": torch.tensor([label.startswith("induction") for label in LABELS])}
    for layer in range(2):
        place = f"transformer/layer_{layer}"
        value = TENSORS[f"{place}/attn/value/w"] @ TENSORS[f"{place}/attn/linear/w"]
        writes |= {f"head.{layer}.0": value.abs().sum(0) > 1e-9, f"mlp.{layer}": TENSORS[f"{place}/mlp/linear_2/w"].abs().sum(0) > 0}
        for letter, part in zip("qkv", ("query", "key", "value")):
            reads[f"{letter}.{layer}.0"] = TENSORS[f"{place}/attn/{part}/w"].abs().sum(1) > 0
        reads[f"mlp_in.{layer}"] = TENSORS[f"{place}/mlp/linear_1/w"].abs().sum(1) > 0
    return {f"{w}->{r}" for w, out_k in writes.items() for r, in_k in reads.items() if (out_k & in_k & letters_k).any()}


def test_the_stock_model_runs_the_program(engine):
    logits_spv = engine.lm.logits(CLEAN)
    assert logits_spv[:, -1].argmax(-1).tolist() == RIGHT
    assert (metric(logits_spv) > 5).all()


def test_exactly_the_compiled_edges_matter(engine):
    graph = engine.graph
    with torch.no_grad():
        corrupt_wspd, whole_s, changed = engine.writers(CORRUPT), metric(engine.lm.logits(CLEAN)), {}
        for r, w in graph.exists_rw.nonzero().tolist():
            cut_rw = torch.zeros(graph.exists_rw.shape, dtype=torch.float64)
            cut_rw[r, w] = 1
            with engine.patched(corrupt_wspd, cut_rw):
                changed[graph.edge_name(r, w)] = (metric(engine.lm.logits(CLEAN)) - whole_s).abs().max().item()
    assert len(changed) == 23
    assert {name for name, change in changed.items() if change > 1e-6} == FIVE == wired() & set(changed)
    assert min(changed[name] for name in FIVE) > 5


def test_the_compiled_edges_are_enough_and_all(engine):
    graph = engine.graph
    five_rw = graph.circuit(FIVE)
    with torch.no_grad():
        corrupt_wspd = engine.writers(CORRUPT)
        for cut_rw, side in ((graph.exists_rw & ~five_rw, CLEAN), (five_rw, CORRUPT)):
            with engine.patched(corrupt_wspd, cut_rw.double()):
                found = metric(engine.lm.logits(CLEAN))
            torch.testing.assert_close(found, metric(engine.lm.logits(side)), rtol=1e-6, atol=1e-6)
