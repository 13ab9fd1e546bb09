"""Pairs that the oracles beside this file score: python tests/steering/circuits/oracles/pairs.py, with the project's own Python."""

import json
from pathlib import Path

from sae.model.language_model import LanguageModel
from steering.circuits.tasks.prompts import make_prompts

DATA = Path(__file__).parents[1] / "data"
MODEL = Path(__file__).parents[4] / "checkpoints" / "demo-lm"

lm = LanguageModel.load(str(MODEL))
drawn = make_prompts(lm, "agreement", 24, seed=0)
lengths_n = drawn.clean_mask_np.sum(1)
prompts = drawn.subset((lengths_n == lengths_n.max()).nonzero().flatten().tolist()[:6])  # of one length: oracles pad otherwise
answers = [(int(prompts.token_a[prompts.pair_a == n][0]), int(prompts.token_a[prompts.pair_a == n][-1])) for n in range(len(prompts))]
found = {
    "model": "checkpoints/demo-lm",
    "fingerprint": lm.fingerprint(),
    "clean": prompts.clean_np.tolist(),
    "corrupt": prompts.corrupt_np.tolist(),
    "right": [right for right, _ in answers],
    "wrong": [wrong for _, wrong in answers],
}
(DATA / "pairs.json").write_text(json.dumps(found) + "\n")
