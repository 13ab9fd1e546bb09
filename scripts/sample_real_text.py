"""Sample labelled text from the real language model (`make real-model`), about the same number of tokens for each label, as a token file.

Each document is the model's answer to a request drawn from a file of prompts ("Write a sermon about {faith}."), after an opening
that the answer must start with ("God "). The request is dropped and its label kept. The token file is that of sample_demo_text.py.

Texts are sampled in rounds of one batch, each kept on disk, so that an interrupted run continues and writes the same file. An existing
token file is extended: more `--tokens` are appended, even if the folder of rounds is gone, and the result is the
file that one run would have written. A round's requests go to the labels with the fewest tokens so far.
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from typing_extensions import TypedDict

from sae.command_line import run
from sae.disk.checksum import crc32
from sae.disk.places import require_file, require_folder
from sae.disk.reading import parse_json, read_json, read_tensors
from sae.disk.writing import jsonable, write_json, write_tensors
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sampling import sample as draw
from sae.progress import progress

NAME = re.compile(r"\{(\w+)\}")


class Label(TypedDict):
    asks: list[str]
    openings: list[str]


class Prompts(TypedDict):
    lists: dict[str, list[str]]
    labels: dict[str, Label]


@dataclass
class SampleConfig:
    model: Path = Path("runs/models/smollm2")
    """Folder of a Llama with a chat template."""
    prompts: Path = Path("checkpoints/smollm2-text/prompts.json")
    """Labels with their requests and openings, and the lists that {names} in them are filled from."""
    out: Path = Path("checkpoints/smollm2-text/tokens.safetensors")
    """Token file to write, or to add to."""
    parts: Path = Path("runs/smollm2-text")
    """Folder for the rounds."""
    tokens: int = 1_000_000
    """Minimum number of tokens of all labels together."""
    batch: int = 96
    """Documents sampled together."""
    longest: int = 256
    """Maximum number of tokens sampled for one document."""
    shortest: int = 24
    """Minimum number of tokens of a document; shorter ones are dropped."""
    distinct: float = 0.7
    """Minimum share of distinct runs of four tokens in a document; others are dropped, because the model sometimes repeats itself."""
    temperature: float = 0.85
    top_p: float = 0.95
    seed: int = 0


def read_prompts(path: Path) -> Prompts:
    """Raises `InputError` for a file that does not fit, and for a {name} that has no list."""
    prompts: Prompts = read_json(path, "a file of prompts", Prompts)
    for label, entry in prompts["labels"].items():
        for text in (*entry["asks"], *entry["openings"]):
            if missing := [name for name in NAME.findall(text) if not prompts["lists"].get(name)]:
                raise InputError(f"expected a list of words for {{{missing[0]}}} in {text!r} of {label}, found none in {path}; add one")
    return prompts


def require_same_settings(config: SampleConfig, found: dict[str, Any], where: Path) -> None:
    """Raises `InputError` for rounds made with other settings: they are another text."""
    settings = settings_of(config)
    if changed := [k for k in settings if settings[k] != found.get(k)]:
        raise InputError(f"expected the text in {where} to be of these settings, but {changed} differ; give another --out and --parts")


def settings_of(config: SampleConfig) -> dict[str, Any]:
    settings = {k: v for k, v in vars(config).items() if not isinstance(v, Path) and k != "tokens"}
    return jsonable(settings | {"prompts": crc32(config.prompts)})


Documents = list[tuple[int, list[int]]]
"""the number of a label, and tokens; in the order in which they were sampled"""


def sampled_before(config: SampleConfig, labels: list[str]) -> tuple[Documents, int]:
    """Returns the token file's documents and the number of their rounds. Raises `InputError` for a file of other settings or labels."""
    if not config.out.exists():
        return [], 0
    schema = {"ids": ("U16", "n"), "document_starts": ("I64", "d+1"), "document_label": ("U8", "d"), "document_number": ("I32", "d")}
    found, metadata = read_tensors(config.out, "a token file of this script", schema, then="give another --out")
    sampling = parse_json(metadata.get("sampling", "{}"), f"the settings in {config.out}", dict[str, Any])
    require_same_settings(config, sampling, config.out)
    rows = [row.tolist() for row in found["ids"].int().split(found["document_starts"].diff().tolist())]
    documents = list(zip(found["document_label"].tolist(), rows))
    return [documents[n] for n in found["document_number"].argsort().tolist()], sampling["rounds"]


class RoomyLayer(DynamicLayer):
    """Keys and values of one block in a buffer with room for `room` positions, so that a new position copies none of the old ones."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            s, h, _p, z = key_states.shape
            self.dtype, self.device, self.length, self.is_initialized = key_states.dtype, key_states.device, 0, True
            self.buffers = key_states.new_empty(2, s, h, self.room, z)
        end = self.length + key_states.shape[2]
        self.buffers[0, :, :, self.length : end] = key_states
        self.buffers[1, :, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self.buffers[0, :, :, :end], self.buffers[1, :, :, :end]
        return self.keys, self.values


def grouped_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **rest: Any) -> Any:
    """One new position per sequence: the query heads that share keys are taken as positions, so that keys are not repeated for them."""
    s, h, p, z = query.shape
    if p > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    grouped = query.view(s, key.shape[1], -1, z)
    mixed = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(s, 1, h, z), None


def sample(config: SampleConfig) -> Path:
    """Writes the token file. Raises `InputError` for a file of prompts that cannot be used and for parts made with other settings."""
    require_file(config.out)
    require_folder(config.parts)
    prompts = read_prompts(config.prompts)
    labels = list(prompts["labels"])
    documents, rounds = sampled_before(config, labels)
    settings = config.parts / "settings.json"
    if settings.exists():
        require_same_settings(config, read_json(settings, "settings of a sampling"), config.parts)
    write_json(settings, settings_of(config))
    tokens = Counter(dict.fromkeys(labels, 0))
    for label, document in documents:
        tokens[labels[label]] += len(document)
    lm = LanguageModel.load(str(config.model), device="cpu", dtype="float32")
    lm.model.set_attn_implementation("grouped")
    with progress("sampling", config.tokens, "tokens") as bar:
        bar.advance(tokens.total(), rounds=str(rounds))
        while tokens.total() < config.tokens:
            part = config.parts / f"{rounds:05d}.json"
            if not part.exists():
                write_json(part, sample_round(lm, prompts, tokens, config, seed=config.seed + rounds))
            found = read_json(part, "a round of sampling", dict[str, list[list[int]]])
            new = [(n, d) for n, label in enumerate(labels) for d in found.get(label, ()) if worth_keeping(d, config)]
            tokens.update({label: sum(len(d) for m, d in new if m == n) for n, label in enumerate(labels)})
            documents, rounds = documents + new, rounds + 1
            bar.advance(sum(len(d) for _, d in new), rounds=str(rounds))
    return write(config, labels, documents, rounds)


def sample_round(lm: LanguageModel, prompts: Prompts, tokens: Counter[str], config: SampleConfig, seed: int) -> dict[str, list[list[int]]]:
    """The documents of each label in one batch: beginning-of-text, opening and the model's continuation."""
    chance = random.Random(seed)
    expected = Counter(tokens)
    wanted = []
    for _ in range(config.batch):  # the label that is furthest behind, if every document gets half of its greatest length
        label = min(expected, key=lambda name: expected[name])
        expected[label] += config.longest // 2
        ask, opening = request(prompts, label, chance)
        wanted.append((label, f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n", opening))
    rows = generate(lm, [before + opening for _, before, opening in wanted], config, seed)
    documents: dict[str, list[list[int]]] = {}
    for (label, _, opening), row in zip(wanted, rows):
        documents.setdefault(label, []).append([*lm.token_ids(opening), *row])
    return documents


def worth_keeping(document: list[int], config: SampleConfig) -> bool:
    runs = list(zip(document, document[1:], document[2:], document[3:]))
    return len(document) >= config.shortest and len(set(runs)) >= config.distinct * len(runs)


def request(prompts: Prompts, label: str, chance: random.Random) -> tuple[str, str]:
    """A request and an opening, each {name} filled from its list; the opening uses the last word used in the request."""
    drawn: dict[str, str] = {}

    def word(match: re.Match[str], again: bool) -> str:
        name = match[1]
        if name not in drawn or not again:
            drawn[name] = chance.choice(prompts["lists"][name])
        return drawn[name]

    ask = NAME.sub(partial(word, again=False), chance.choice(prompts["labels"][label]["asks"]))
    opening = NAME.sub(partial(word, again=True), chance.choice(prompts["labels"][label]["openings"]))
    return ask, opening.rstrip(" ")  # a space belongs to the token that follows it


@torch.inference_mode()
def generate(lm: LanguageModel, texts: list[str], config: SampleConfig, seed: int) -> list[list[int]]:
    """New tokens of each text up to the model's end-of-text; all texts end when three quarters have ended."""
    ids_sp, mask_sp = lm.encode(texts)
    cache = DynamicCache()
    cache.layers = [RoomyLayer(ids_sp.shape[1] + config.longest) for _ in range(lm.n_layers)]
    generator = torch.Generator().manual_seed(seed)
    ended_s, new = torch.zeros(len(ids_sp), dtype=torch.bool), []
    ends = torch.tensor([*lm.eos_ids, lm.bos_id])
    for _ in range(config.longest):
        position_sp = (mask_sp.cumsum(-1) - 1).clamp(min=0)[:, -ids_sp.shape[1] :]
        output = lm.model(
            input_ids=ids_sp, attention_mask=mask_sp, position_ids=position_sp, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        next_s = draw(output.logits[:, -1], config.temperature, config.top_p, generator)
        ended_s |= torch.isin(next_s, ends)
        new.append(torch.where(ended_s, -1, next_s))
        if ended_s.float().mean() >= 0.75:
            break
        ids_sp, mask_sp = next_s[:, None], torch.cat([mask_sp, mask_sp.new_ones(len(mask_sp), 1)], dim=1)
    return [[token for token in row if token >= 0] for row in torch.stack(new, dim=1).tolist()]


def write(config: SampleConfig, labels: list[str], documents: Documents, rounds: int) -> Path:
    """Writes all documents in random order, so that any first part of the file is a fair sample."""
    order = list(range(len(documents)))
    random.Random(config.seed).shuffle(order)
    drawn = [documents[n] for n in order]
    lengths = torch.tensor([0] + [len(document) for _, document in drawn])
    write_tensors(
        config.out,
        {
            "ids": torch.tensor([token for _, document in drawn for token in document], dtype=torch.int32).to(torch.uint16),
            "document_starts": lengths.cumsum(0),
            "document_label": torch.tensor([n for n, _ in drawn], dtype=torch.uint8),
            "document_number": torch.tensor(order, dtype=torch.int32),
        },
        {"label_names": json.dumps(labels), "sampling": json.dumps(settings_of(config) | {"rounds": rounds})},
    )
    shares = [sum(len(document) for label, document in documents if label == n) for n in range(len(labels))]
    print(f"{config.out}: {len(documents):,} documents, {sum(shares):,} tokens, {min(shares):,} to {max(shares):,} of each label")
    return config.out


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)

if __name__ == "__main__":
    run(sample, SampleConfig, __doc__ or "")
