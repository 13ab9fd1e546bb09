"""Edge scores, and the metric of a circuit, by the code of EAP-IG's authors (github.com/hannamw/EAP-IG, commit 795f560).

It needs its own environment, with TransformerLens before its version 4, and a checkout:

    pip install torch==2.13.0 transformer-lens==3.8.0 transformers==5.24.0 pandas pygraphviz matplotlib
    PYTHONPATH=EAP-IG/src python tests/steering/circuits/oracles/eap_ig.py [--seconds]

Two models: the bundled one, and a random Llama with grouped queries, which is written beside the scores. With --seconds it writes
nothing, and times the scores of a model of GPT-2 small's size with random weights.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

torch_zeros = torch.zeros
torch.zeros = lambda *size, device=None, **rest: torch_zeros(*size, **rest)  # the authors' code asks for CUDA by name

import eap.attribute  # noqa: E402
import eap.evaluate  # noqa: E402
import transformers as hf  # noqa: E402
from eap.graph import Graph  # noqa: E402
from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: E402
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights  # noqa: E402

DATA = Path(__file__).parents[1] / "data"
METHODS = {"eap": "EAP", "eap-ig": "EAP-IG-inputs", "clean-corrupted": "clean-corrupted"}
STEPS = 5
KEPT = 90  # edges of the circuit that is run


def tokens(_model: HookedTransformer, ids: torch.Tensor, _longest: int | None = None) -> tuple:
    """In the place of the authors' tokenization: ids as they are, all of one length."""
    return ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1]


eap.attribute.tokenize_plus = eap.evaluate.tokenize_plus = tokens


def hooked(model: hf.PreTrainedModel) -> HookedTransformer:
    c = model.config
    common: dict[str, Any] = {"n_layers": c.num_hidden_layers, "d_model": c.hidden_size, "n_heads": c.num_attention_heads}
    common |= {"d_head": c.hidden_size // c.num_attention_heads, "d_vocab": c.vocab_size, "n_ctx": c.max_position_embeddings}
    if c.model_type == "gpt2":
        own = {"d_mlp": 4 * c.n_embd, "act_fn": "gelu_new", "normalization_type": "LN", "eps": c.layer_norm_epsilon}
        own |= {"attention_dir": "causal"}
        convert = convert_gpt2_weights
    else:
        own = {"d_mlp": c.intermediate_size, "act_fn": "silu", "normalization_type": "RMS", "eps": c.rms_norm_eps, "gated_mlp": True}
        own |= {"positional_embedding_type": "rotary", "rotary_dim": common["d_head"], "rotary_adjacent_pairs": False, "final_rms": True}
        own |= {
            "n_key_value_heads": c.num_key_value_heads,
            "ungroup_grouped_query_attention": True,
            "original_architecture": "LlamaForCausalLM",
        }
        convert = convert_llama_weights
    cfg = HookedTransformerConfig(**common, **own, device="cpu", dtype=torch.float32)
    found = HookedTransformer(cfg)
    found.load_state_dict(convert(model, cfg), strict=False)
    cfg.use_attn_result = cfg.use_split_qkv_input = cfg.use_hook_mlp_in = True
    found.setup()
    return found.eval()


def batch(pairs: dict[str, Any]) -> list[tuple]:
    clean, corrupt = (torch.tensor(pairs[side]) for side in ("clean", "corrupt"))
    return [(clean, corrupt, torch.tensor([pairs["right"], pairs["wrong"]]).T)]


def difference(logits: torch.Tensor, _clean: torch.Tensor, _lengths: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(logits))
    return logits[rows, -1, answers[:, 0]] - logits[rows, -1, answers[:, 1]]


def summed(*args: torch.Tensor) -> torch.Tensor:
    return difference(*args).sum()


def scored(model: HookedTransformer, data: list[tuple], method: str) -> Graph:
    graph = Graph.from_model(model)
    eap.attribute.attribute(model, graph, data, summed, METHODS[method], ig_steps=STEPS, quiet=True)
    return graph


def reference(model: hf.PreTrainedModel, pairs: dict[str, Any]) -> dict[str, Any]:
    lens, data = hooked(model), batch(pairs)
    with torch.no_grad():
        off = (lens(data[0][0]) - model(data[0][0]).logits).abs().max().item()
    assert off < 1e-4, f"expected the logits of the Hugging Face model, got them {off} off"
    graphs = {method: scored(lens, data, method) for method in METHODS}
    scores = {method: {name: float(f"{float(edge.score):.7g}") for name, edge in graph.edges.items()} for method, graph in graphs.items()}
    graph = graphs["eap-ig"]
    graph.apply_topn(KEPT, absolute=True)
    with torch.no_grad():
        metric = eap.evaluate.evaluate_graph(lens, graph, data, difference, quiet=True)
    kept = [name for name, edge in graph.edges.items() if edge.in_graph]
    return {"scores": scores, "circuit": kept, "metric": metric.tolist()}


def random_llama() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.LlamaConfig(**sizes, vocab_size=20, max_position_embeddings=16, initializer_range=0.5, tie_word_embeddings=False)
    return hf.LlamaForCausalLM(config).eval()


def seconds() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config()).eval()
    lens = hooked(model)
    ids = torch.randint(50257, (2, 8, 20))
    data = [(ids[0], ids[1], torch.randint(50257, (8, 2)))]
    for method in METHODS:
        start = time.process_time()
        scored(lens, data, method)
        print(f"{method}: {time.process_time() - start:.1f} s of one thread for 8 pairs of 20 tokens")


if __name__ == "__main__":
    if "--seconds" in sys.argv:
        seconds()
    else:
        pairs = json.loads((DATA / "pairs.json").read_text())
        demo = hf.AutoModelForCausalLM.from_pretrained(pairs["model"], dtype=torch.float32)
        llama, generator = random_llama(), torch.Generator().manual_seed(1)
        llama.save_pretrained(DATA / "random-llama")
        ids = torch.randint(20, (2, 4, 7), generator=generator)
        own = {"clean": ids[0].tolist(), "corrupt": ids[1].tolist(), "right": [1, 2, 3, 4], "wrong": [5, 6, 7, 8]}
        found = {"demo-lm": reference(demo, pairs), "random-llama": own | reference(llama, own)}
        (DATA / "eap_ig.json").write_text(json.dumps(found) + "\n")
        for name, one in found.items():
            print(name, len(one["scores"]["eap"]), "edges,", len(one["circuit"]), "kept, metric", one["metric"])
