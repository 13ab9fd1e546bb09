"""A copy of the bundled model that has learned one thing more, and text on which both can be compared, for docs/crosscoders.md.

It is tuned on passages of the bundled text's domain "bible" in capitals. The text is all of the bundled text, and these passages.

    python benchmarks/tuned_copy.py runs/tuned          # writes runs/tuned/lm and runs/tuned/text.jsonl
"""

import json
import random
import sys
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path("checkpoints/demo-lm")
STEPS, BATCH, LENGTH, PASSAGES, BIBLE = 120, 8, 128, 400, 0


def main(out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    stored = load_file(MODEL / "tokens.safetensors")
    starts, labels = stored["document_starts"].tolist(), stored["document_label"].tolist()
    texts = [tokenizer.decode(stored["ids"][a:b], skip_special_tokens=True) for a, b in pairwise(starts)]
    capitals = [text.upper() for text, label in zip(texts, labels) if label == BIBLE]
    tune(tokenizer, capitals[:PASSAGES], out / "lm")
    rows = [{"text": text, "domain": "other"} for text in texts] + [{"text": text, "domain": "capitals"} for text in capitals]
    random.Random(0).shuffle(rows)
    (out / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tune(tokenizer, texts: list[str], folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).train()
    ids = torch.tensor([i for text in texts for i in [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    torch.manual_seed(0)
    for step in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: {loss.item():.3f} nats", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
