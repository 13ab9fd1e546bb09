"""Train the small GPT-2-architecture language model that the project bundles, on labelled text domains.

The corpora folder holds DOMAIN.{train,validation}.jsonl.gz, one {"text": ...} per line. Every document starts with the
beginning-of-text token; half of them also get their domain's tag token, so that text of a chosen domain can be sampled
with its label. Held-out loss per domain goes into the model card. Killed runs resume from the last saved state.

b rows (sequences) · p positions · v vocabulary
"""

import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sae.activations.text.documents import TextConfig, documents
from sae.command_line import run
from sae.device import device_named
from sae.disk.places import require_folder
from sae.disk.reading import read_json
from sae.disk.writing import atomic, write_json
from sae.errors import InputError
from sae.training.metrics import keep_until

STATE = "training_state.pt"
BOS = "<|endoftext|>"


@dataclass
class DemoModelConfig:
    corpora: Path
    """Folder of DOMAIN.{train,validation}.jsonl.gz."""
    out: Path = Path("checkpoints/demo-lm")
    """Folder of the finished model, in Hugging Face layout."""
    init_from: Path | None = None
    """Continue this model instead of a fresh one; its tokenizer and shape are kept, so the next four settings must be left alone."""
    n_layer: int = 6
    d_model: int = 256
    n_head: int = 8
    vocab_size: int = 8192
    context: int = 256
    """Positions per training row; a model given with --init-from is cut to this length."""
    batch_rows: int = 16
    """Rows per step; on a GPU use 128 or more."""
    tokens: int = 10_000_000
    """Length of the schedule, in training tokens; 0 only measures, and writes the model with its card."""
    muon_lr: float = 0.02
    """Peak rate of the hidden matrices."""
    adam_lr: float = 2e-3
    """Peak rate of embeddings, biases and norms."""
    save_every: int = 250
    """Steps between resumable states."""
    seed: int = 0
    device: str = "auto"
    compile: bool = True
    """Compile the loss with torch.compile (about a minute once, then a third faster)."""


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan 2024), in float32: torch.optim.Muon's bfloat16 crawls on most CPUs."""

    def __init__(self, params, lr: float):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95)
                wide = update.T if update.shape[0] > update.shape[1] else update
                x = wide / (wide.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.T if update.shape[0] > update.shape[1] else x
                p.mul_(1 - group["lr"] * 0.01).add_(x, alpha=-group["lr"] * max(1, p.shape[1] / p.shape[0]) ** 0.5)


def read_domains(corpora: Path, split: str) -> dict[str, list[str]]:
    paths = sorted(corpora.glob(f"*.{split}.jsonl.gz"))
    if not paths:
        raise InputError(f"expected DOMAIN.{split}.jsonl.gz files in {corpora}, found none; give the folder with --corpora")
    return {path.name.split(".")[0]: [str(document.content) for document in documents(TextConfig(text=(str(path),)))] for path in paths}


def tag(domain: str) -> str:
    return f"<|{domain}|>"


def make_tokenizer(config: DemoModelConfig, texts: dict[str, list[str]]):
    """The tokenizer of `init_from`, or a new byte-level BPE over the training text."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if config.init_from:
        return AutoTokenizer.from_pretrained(config.init_from, model_max_length=config.context)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tags = [tag(d) for d in texts]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, special_tokens=[BOS, *tags], initial_alphabet=alphabet)
    bpe.train_from_iterator((t for d in texts for t in texts[d]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=BOS,
        unk_token=BOS,
        pad_token=BOS,
        model_max_length=config.context,
        additional_special_tokens=tags,
    )


def make_model(config: DemoModelConfig, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    if config.init_from:
        model = GPT2LMHeadModel.from_pretrained(config.init_from, dtype=torch.float32)
        if config.context > model.config.n_positions:
            raise InputError(f"{config.init_from} has {model.config.n_positions} positions; --context {config.context} asks for more")
        wpe = model.transformer.wpe
        wpe.weight = torch.nn.Parameter(wpe.weight[: config.context].clone())
        wpe.num_embeddings = model.config.n_positions = config.context
        return model
    bos = tokenizer.bos_token_id
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=config.context,
            n_embd=config.d_model,
            n_layer=config.n_layer,
            n_head=config.n_head,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=bos,
            eos_token_id=bos,
        )
    )


def token_streams(texts: dict[str, list[str]], tokenizer, tagged_share: float, seed: int) -> dict[str, np.ndarray]:
    """Each domain's documents end to end, each after a beginning-of-text token and, for a share of them, the domain's tag."""
    rng = np.random.default_rng(seed)
    streams = {}
    for domain, own in texts.items():
        tag_id = tokenizer.convert_tokens_to_ids(tag(domain))
        ids: list[int] = []
        for encoded in tokenizer(own, add_special_tokens=False)["input_ids"]:
            ids += [tokenizer.bos_token_id] + [tag_id] * bool(rng.random() < tagged_share) + encoded
        streams[domain] = np.array(ids, np.int32)
    return streams


def random_rows(streams: dict[str, np.ndarray], rows: int, context: int, seed: tuple[int, int]) -> torch.Tensor:
    """Windows cut at random, a domain drawn by its token count to the 0.7 so that small ones are included; [b, context + 1]."""
    rng = np.random.default_rng(seed)
    names = list(streams)
    weights = np.array([len(streams[d]) ** 0.7 for d in names])
    cut = []
    for name in rng.choice(names, rows, p=weights / weights.sum()):
        start = rng.integers(0, len(streams[name]) - context)
        cut.append(streams[name][start : start + context + 1])
    return torch.from_numpy(np.stack(cut).astype(np.int64))


@torch.no_grad()
def held_out_loss(model, tokenizer, texts: dict[str, list[str]], context: int) -> dict[str, dict[str, float]]:
    """Mean nats per token and bits per character of every validation document, cut into rows of `context`, no tags."""
    model.eval()
    device = model.device
    result = {}
    for domain, stream in token_streams(texts, tokenizer, 0.0, 0).items():
        cut = [stream[i : i + context + 1] for i in range(0, len(stream) - 1, context)]
        total = 0.0
        for row in range(0, len(cut), 32):
            ids_bp = torch.nn.utils.rnn.pad_sequence(
                [torch.from_numpy(c.astype(np.int64)) for c in cut[row : row + 32]], batch_first=True, padding_value=-100
            ).to(device)
            logits_bpv = model(ids_bp[:, :-1].clamp(min=0)).logits.float()
            total += F.cross_entropy(logits_bpv.flatten(0, 1), ids_bp[:, 1:].flatten(), reduction="sum").item()  # host sync
        characters = sum(len(t) + 1 for t in texts[domain])
        tokens = sum(len(c) - 1 for c in cut)
        result[domain] = {"nats_per_token": total / tokens, "bits_per_character": total / math.log(2) / characters}
    model.train()
    return result


def rate(step: int, steps: int) -> float:
    """Fraction of the peak learning rate: 2 % warm-up, then linear to zero from 30 % on."""
    return min(1.0, (step + 1) / max(1, steps // 50)) * min(1.0, (1 - step / steps) / 0.7)


def settings_of(config: DemoModelConfig) -> dict[str, Any]:
    """The settings that determine the model; where it runs and how often it is saved do not."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()}
    return {k: v for k, v in settings.items() if k not in ("out", "save_every", "device", "compile")}


def save_state(path: Path, parts: dict[str, Any], config: DemoModelConfig, step: int) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    # into memory first: torch's own writer does not tell why it failed
    torch.save(state | {"step": step, "settings": settings_of(config)}, whole := io.BytesIO())
    with atomic(path) as temporary:
        temporary.write_bytes(whole.getbuffer())


def resume(path: Path, parts: dict[str, Any], config: DemoModelConfig) -> int:
    """Loads the saved state and returns the steps done. Raises `InputError` for a state that was saved under other settings."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["settings"] != settings_of(config):
        raise InputError(f"{path} was saved under other settings; give those to resume it, or another --out to start over")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    print(f"resuming after step {state['step']}", flush=True)
    return state["step"]


def finished(config: DemoModelConfig) -> bool:
    """Whether the folder holds the model that these settings produced."""
    path = config.out / "training.json"
    return path.exists() and settings_of(config).items() <= read_json(path, "a model's training.json").get("settings", {}).items()


def train(config: DemoModelConfig) -> None:
    from rich.progress import Progress, TextColumn, TimeRemainingColumn

    shape_fields = ("n_layer", "d_model", "n_head", "vocab_size")
    if config.init_from and any(getattr(config, name) != getattr(DemoModelConfig, name) for name in shape_fields):
        raise InputError(
            "a model given with --init-from keeps its shape and tokenizer; leave out --n-layer, --d-model, --n-head, --vocab-size"
        )
    require_folder(config.out)
    if finished(config):
        (config.out / STATE).unlink(missing_ok=True)  # a kill may have come between the two last steps
        print(f"{config.out} is already complete; remove its training.json to train it again")
        return
    torch.manual_seed(config.seed)
    device = device_named(config.device)
    texts = read_domains(config.corpora, "train")
    tokenizer = make_tokenizer(config, texts)
    model = make_model(config, tokenizer).to(device)
    streams = token_streams(texts, tokenizer, 0.5, config.seed)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".h." in name)]
    adam = torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    muon = Muon(hidden, lr=config.muon_lr)
    steps = config.tokens // (config.batch_rows * config.context)

    def loss_of(ids_bp):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits_bpv = model(ids_bp[:, :-1]).logits
        return F.cross_entropy(logits_bpv.float().flatten(0, 1), ids_bp[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if config.compile and steps else loss_of
    config.out.mkdir(parents=True, exist_ok=True)
    state_path = config.out / STATE
    parts = {"model": model, "adam": adam, "muon": muon}
    first = resume(state_path, parts, config)
    keep_until(config.out / "training.log", first - 1)  # which numbers its steps from 0
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns) as progress, open(config.out / "training.log" if steps else os.devnull, "a") as log:
        bar = progress.add_task("training", total=steps, completed=first, loss=float("nan"))
        for step in range(first, steps):
            for optimiser, peak in ((muon, config.muon_lr), (adam, config.adam_lr)):
                optimiser.param_groups[0]["lr"] = peak * rate(step, steps)
            ids_bp = random_rows(streams, config.batch_rows, config.context, (config.seed, step)).to(device)
            loss = step_loss(ids_bp)
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            muon.step()
            if step % 25 == 0:
                loss_now = loss.item()  # host sync
                log.write(json.dumps({"step": step, "loss": round(loss_now, 4)}) + "\n")
                log.flush()
                progress.update(bar, loss=loss_now)
            progress.advance(bar)
            if (step + 1) % config.save_every == 0:
                save_state(state_path, parts, config, step + 1)

    losses = held_out_loss(model, tokenizer, read_domains(config.corpora, "validation"), config.context)
    tokenizer.save_pretrained(config.out)
    model.half().save_pretrained(config.out)
    write_card(config, model, losses)
    state_path.unlink(missing_ok=True)


def write_card(config: DemoModelConfig, model, losses: dict[str, dict[str, float]]) -> None:
    mean = {k: float(np.mean([row[k] for row in losses.values()])) for k in ("nats_per_token", "bits_per_character")}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()}
    record: dict[str, Any] = {"settings": settings, "mean": mean, "held_out": losses}
    if config.init_from and (config.init_from / "training.json").exists():
        record["continued_from"] = json.loads((config.init_from / "training.json").read_text())
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    c = model.config
    rows = "\n".join(
        f"| {d} | {r['nats_per_token']:.3f} | {math.exp(r['nats_per_token']):.1f} | {r['bits_per_character']:.3f} |"
        for d, r in losses.items()
    )
    history = f"`python scripts/train_demo_model.py` with the settings in `training.json`, {config.tokens:,} tokens"
    earlier = record.get("continued_from", {}).get("tokens")
    if earlier:
        history = f"{earlier:,} tokens in an earlier run, whose record is in `training.json`" + f"; then {history}" * bool(config.tokens)
    card = f"""# demo-lm

A {parameters:.1f}M-parameter GPT-2-architecture language model ({c.n_layer} layers of width {c.n_embd}, {c.n_head} heads,
{c.vocab_size}-token byte-level BPE of its own, context {config.context}, float16 on disk), small enough to ship and to run on a laptop,
for trying the toolkit offline. It was trained on English text of {len(losses)} domains; half of the training documents began with their
domain's tag (`{tag(next(iter(losses)))}` and so on), so text of a domain can be sampled with its label. It learned to swear from film
dialogue and overheard conversation. It knows nothing worth asking for, and its text should not be taken for anybody's words.

Training: {history}.

## Held-out loss
Validation documents, never trained on, without tags, in rows of {config.context} tokens.

| domain | nats per token | perplexity | bits per character |
|---|---|---|---|
{rows}
| **mean of domains** | {mean["nats_per_token"]:.3f} | {math.exp(mean["nats_per_token"]):.1f} | {mean["bits_per_character"]:.3f} |
"""
    with atomic(config.out / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    write_json(config.out / "training.json", record)  # last: it says that the model is complete


if __name__ == "__main__":
    run(train, DemoModelConfig, __doc__ or "")
