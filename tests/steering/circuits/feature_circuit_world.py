"""A tiny model in float64 with small random dictionaries at its sites, and pairs of prompts for it.

d width · f features
"""

import torch

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import Threshold, TopK
from steering.circuits.features.sites import FeatureSite
from steering.circuits.tasks.generators import Pair
from steering.circuits.tasks.prompts import Prompts

N, P = 3, 5


def random_site(lm, reads: str, writes: str | None = None, kind: str = "relu", f: int = 12, seed: int = 0) -> FeatureSite:
    """A dictionary that reconstructs badly, so that its error is large."""
    generator = torch.Generator().manual_seed(seed)
    d, o = lm.width(reads), lm.width(writes or reads)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gate = TopK(4) if kind == "topk" else Threshold(torch.full((f,), 0.2, dtype=torch.float64)) if kind == "jumprelu" else None
    frame = Frame("layer_norm") if kind == "frame" else None
    skip = drawn(o, d) / d**0.5 if kind == "skip" else None
    metadata = {"site": reads, "site_out": writes or reads}
    one = Dictionary(
        drawn(f, d) / 3, drawn(f) / 10, drawn(f, o) / 3, drawn(o) / 10, gate=gate, W_skip_od=skip, frame=frame, metadata=metadata
    )
    return FeatureSite(one.requires_grad_(False), reads, writes or reads)


def random_pairs(lm, seed: int = 0, n: int = N) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, lm.model.config.vocab_size, (2, n, P), generator=generator)
    ids[1, :, -1] = ids[0, :, -1]
    mask = torch.ones(n, P, dtype=torch.long)
    return Prompts(
        "random", "other", "logit_difference", tuple(Pair((f"{row}",), ("",), ("",), ("",)) for row in range(n)),
        ids[0], mask, ids[1], mask, torch.arange(P).repeat(n, 1),
        torch.arange(n).repeat_interleave(2), torch.tensor([3, 7] * n), torch.tensor([1.0, -1.0]).repeat(n).double(),
    )  # fmt: skip
