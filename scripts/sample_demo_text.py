"""Sample the bundled model's text, an equal number of tokens from each domain, as the token file that the demo trains on.

Each document is what the model writes after beginning-of-text and a domain's tag; that tag is then dropped and kept as the label, so
that a feature has to recognise the domain from the text. (A tag that the model writes by itself, once in 13,000 tokens, stays.) The file
is safetensors: `ids [n]` (documents end to end, each starting with beginning-of-text), `document_starts [documents + 1]`,
`document_label [documents]`, and the label names in the metadata.

The bundled file was made on 2026-11-22. Sampling has changed since, so the same seed now produces other texts from
the same distribution.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from sae.command_line import run
from sae.disk.places import require_file
from sae.disk.writing import write_tensors
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.progress import progress


@dataclass
class SampleConfig:
    model: Path = Path("checkpoints/demo-lm")
    """Folder of the model; the domains are those in its training.json."""
    out: Path = Path("checkpoints/demo-lm/tokens.safetensors")
    """Token file to write."""
    tokens_per_domain: int = 50_000
    """Minimum number of tokens from each domain."""
    batch: int = 256
    """Documents sampled together."""
    temperature: float = 0.9
    top_p: float = 0.95
    shortest: int = 16
    """Minimum number of tokens of a document; shorter ones are dropped."""
    seed: int = 0
    device: str = "auto"


def sample(config: SampleConfig) -> Path:
    require_file(config.out)
    lm = LanguageModel.load(str(config.model), device=config.device, dtype="float32")
    domains = list(json.loads((config.model / "training.json").read_text())["held_out"])
    documents: list[list[int]] = []
    labels: list[int] = []
    with progress("sampling", config.tokens_per_domain * len(domains), "tokens") as bar:
        for label, domain in enumerate(domains):
            tag_id = lm.tokenizer.convert_tokens_to_ids(f"<|{domain}|>")
            if tag_id is None or tag_id == lm.tokenizer.unk_token_id:
                raise InputError(f"the tokenizer of {config.model} has no tag for the domain {domain!r} that its training.json names")
            kept = 0
            for round_number in range(1_000_000):
                if kept >= config.tokens_per_domain:
                    break
                new = sample_documents(lm, tag_id, config, seed=config.seed + 1000 * label + round_number)
                new = [d for d in new if len(d) >= config.shortest]
                documents += new
                labels += [label] * len(new)
                tokens = sum(len(d) for d in new)
                kept += tokens
                bar.advance(tokens, domain=domain)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(config.seed)).tolist()
    documents, labels = [documents[i] for i in order], [labels[i] for i in order]  # so that any first part is a fair sample
    lengths = torch.tensor([0] + [len(d) for d in documents])
    write_tensors(
        config.out,
        {
            "ids": torch.tensor([i for d in documents for i in d], dtype=torch.int32).to(torch.uint16),
            "document_starts": lengths.cumsum(0),
            "document_label": torch.tensor(labels, dtype=torch.uint8),
        },
        {"label_names": json.dumps(domains), "sampling": json.dumps({k: v for k, v in vars(config).items() if not isinstance(v, Path)})},
    )
    print(f"{config.out}: {len(documents):,} documents, {int(lengths.sum()):,} tokens, {len(domains)} domains")
    return config.out


def sample_documents(lm: LanguageModel, tag_id: int, config: SampleConfig, seed: int) -> list[list[int]]:
    """Samples a batch of documents of one domain: beginning-of-text, then text up to the model's next beginning-of-text or its context."""
    bos_id = lm.tokenizer.bos_token_id
    prompt_sp = torch.tensor([[bos_id, tag_id]]).expand(config.batch, 2).to(lm.device)
    ids_sp = lm.generate(prompt_sp, max_new_tokens=lm.context - 2, temperature=config.temperature, top_p=config.top_p, seed=seed)
    documents = []
    for row in ids_sp[:, 2:].tolist():  # host sync
        end = next((i for i, token in enumerate(row) if token == bos_id), len(row))
        documents.append([bos_id, *row[:end]])
    return documents


if __name__ == "__main__":
    run(sample, SampleConfig, __doc__ or "")
