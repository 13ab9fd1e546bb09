"""Edge scores of TransformerLens 4.3, an implementation that shares nothing with ours: the gradient at the corrupt run.

In its own environment (`pip install torch==2.13.0 transformer-lens==4.3.0 transformers==5.24.0`), from the project's folder:
python tests/steering/circuits/oracles/transformer_lens_edges.py
"""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, Node, attribution_patch
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).parents[1] / "data"


def name(node: Node) -> str:
    """As our graph calls it."""
    heads = {"attn_head_out": "head", "q_input": "q", "k_input": "k", "v_input": "v"}
    if node.kind in heads:
        return f"{heads[node.kind]}.{node.layer}.{node.head}"
    return {"embed": "embed", "mlp_out": f"mlp.{node.layer}", "mlp_in": f"mlp_in.{node.layer}", "logits": "logits"}[node.kind]


def difference(right: int, wrong: int, logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, right] - logits[0, -1, wrong]


pairs = json.loads((DATA / "pairs.json").read_text())
model = AutoModelForCausalLM.from_pretrained(pairs["model"], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(pairs["model"])
lens = TransformerBridge.boot_transformers(pairs["model"], hf_model=model, tokenizer=tokenizer, dtype=torch.float32)
lens.eval()
for weight in lens.parameters():
    weight.requires_grad_(True)
score: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(pairs["right"]))
for n, (right, wrong) in enumerate(zip(pairs["right"], pairs["wrong"])):
    clean, corrupt = (torch.tensor([pairs[side][n]]) for side in ("clean", "corrupt"))
    found = attribution_patch(lens, clean, corrupt, partial(difference, right, wrong), EdgeAttributionConfig(granularity="edge"))
    for (source, target), value in found.edge_scores.items():
        score[f"{name(source)}->{name(target)}"][n] += value
rounded = {edge: [float(f"{value:.7g}") for value in values] for edge, values in sorted(score.items())}
(DATA / "transformer_lens_edges.json").write_text(json.dumps({"fingerprint": pairs["fingerprint"], "scores": rounded}) + "\n")
print(len(rounded), "edges, the largest score", max(abs(value) for values in rounded.values() for value in values))
