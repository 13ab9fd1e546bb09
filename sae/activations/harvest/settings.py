"""The settings of a recording and everything before the first forward pass, shared by a harvest and training without a disk."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from sae.activations.files.number_formats import FORMATS
from sae.activations.harvest import massive
from sae.activations.harvest.models import Models, require_two, second_name
from sae.activations.harvest.plan import Masks, parse_positions
from sae.activations.harvest.pools import Recorder
from sae.activations.text.documents import TextConfig, check_source, documents
from sae.activations.text.tokens import Cutter, Part, Tokens, tokenise
from sae.errors import InputError
from sae.model.sites import split_model
from sae.text_input import text_list


@dataclass(kw_only=True)
class RecordingConfig(TextConfig):
    """What to record, and from which text."""

    model: str = "checkpoints/demo-lm"
    """A Hugging Face causal language model: a folder, a GGUF file or a hub name."""
    revision: str | None = None
    """Revision of the model on the hub."""
    second_model: str | None = None
    """Another model with the same tokenizer, to compare with the first: it reads the same tokens, and its sites in --sites start with a
    name of your choice, for example resid_post.2 chat/resid_post.2"""
    second_revision: str | None = None
    """Revision of the second model on the hub."""
    sites: tuple[str, ...] = ()
    """Sites to record, for example resid_post.2; several cost one forward pass."""
    tokens: int = 1_000_000
    """Token budget; the last document is cut to fit."""
    context: int | None = None
    """Maximum number of tokens per sequence. Default: the model's own context, at most 1024."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Number format of the stored activations; int8 is 8 bits per number with one scale per row."""
    held_out: float = 0.05
    """Share of documents held out from training, for measuring."""
    keep_bos: bool = False
    """Also store activations at beginning-of-text tokens; their norm is often hundreds of times that of others."""
    skip_special: bool = False
    """Do not store activations at the tokenizer's other special tokens: end of text, padding, unknown."""
    positions: str | None = None
    """Store only these positions of each sequence, FIRST:LAST counted from 0 as in a Python slice, for example 1:64 or 16:"""
    max_norm_ratio: float | None = massive.RATIO
    """Do not store tokens whose norm is more than this many times the median of their pool (attention sinks); None keeps all."""
    seed: int = 0
    """Seed of the order, the shuffling and the held-out documents."""
    pool_tokens: int = 1 << 18
    """Tokens shuffled together in memory."""
    batch_tokens: int = 1 << 13
    """Tokens per forward pass, padding included."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    model_dtype: str = "auto"
    """Number format of the model: auto, float32, bfloat16 or float16."""
    device_map: str | None = None
    """"auto" spreads a large model over several devices."""
    quantize: Literal["8bit"] | None = None
    """"8bit" loads the model's weights in 8 bits; needs the package bitsandbytes."""


def check_recording(config: RecordingConfig) -> None:
    """Raises `InputError` for options that make no sense."""
    check_source(config)
    text_list(config.sites, "sites")
    if not config.sites:
        raise InputError("expected at least one site to record, got none; give for example --sites resid_post.2")
    if len(set(config.sites)) < len(config.sites):
        raise InputError(f"expected every site once, but --sites is {' '.join(config.sites)}; leave out the repetition")
    for name, least in (("tokens", 2), ("pool_tokens", 1), ("shard_tokens", 1), ("batch_tokens", 1), ("seed", 0)):
        if getattr(config, name, least) < least:
            raise InputError(f"expected --{name.replace('_', '-')} of at least {least}, got {getattr(config, name)}; give a larger number")
    if not 0 <= config.held_out < 1:
        raise InputError(f"expected --held-out from 0 up to but not including 1, got {config.held_out}; 0.05 is usual")
    if config.max_norm_ratio is not None and not config.max_norm_ratio >= 1:
        raise InputError(
            f"expected --max-norm-ratio of at least 1, got {config.max_norm_ratio}; 10 leaves out attention sinks alone, None nothing"
        )
    parse_positions(config.positions)
    if config.dtype not in FORMATS:
        raise InputError(f"expected --dtype {', '.join(FORMATS)}, got {config.dtype!r}; choose one of them")
    second_name(config.sites, config.second_model, config.second_revision)


def load_models(config: RecordingConfig) -> Models:
    """Each model up to its deepest site, checked to have its sites; two are checked to read the same tokens."""
    from sae.model.language_model import LanguageModel

    if config.model == RecordingConfig.model and not Path(config.model).exists():
        raise InputError(f"expected --model: {config.model}, the default, is only there in a checkout of this project; name another model")

    def load(model: str, revision: str | None, name: str | None) -> LanguageModel:
        return LanguageModel.load(
            model,
            device=config.device,
            dtype=config.model_dtype,
            device_map=config.device_map,
            revision=revision,
            sites=[split_model(site)[1] for site in config.sites if split_model(site)[0] == name],
            quantize=config.quantize,
        )

    models = Models(load(config.model, config.revision, None))
    if config.second_model is not None:
        name = second_name(config.sites, config.second_model, config.second_revision)
        models = Models(models.first, load(config.second_model, config.second_revision, name), name)
        require_two(*models.all.values())
    for site in config.sites:
        models.width(site)
    return models


def make_masks(config: RecordingConfig, models: Models) -> Masks:
    lm = models.first
    special = set(lm.tokenizer.all_special_ids if lm.tokenizer is not None else lm.eos_ids) if config.skip_special else set()
    return Masks(None if config.keep_bos else lm.bos_id, tuple(sorted(special - {lm.bos_id})), *parse_positions(config.positions))


def make_recorder(config: RecordingConfig, models: Models, tokens: Tokens) -> Recorder:
    widths = {site: models.width(site) for site in config.sites}
    masks = make_masks(config, models)
    kept_bos = models.first.bos_id if config.keep_bos else None
    return Recorder(models, tokens, widths, config.dtype, masks, config.max_norm_ratio, kept_bos, config.batch_tokens, config.seed)


def context_of(config: RecordingConfig, models: Models) -> int:
    context = config.context or min(models.context, 1024)
    if not 2 <= context <= models.context:
        raise InputError(f"expected --context from 2 to {models.context}, the model's own, got {context}; choose one in between")
    return context


def cut_text(config: RecordingConfig, models: Models) -> tuple[Cutter, Iterator[Part]]:
    """The text as sequences, and the cutter, which has the counts after they were read."""
    lm = models.first
    cutter = Cutter(context_of(config, models), config.tokens, lm.bos_id, config.seed, config.held_out)
    return cutter, cutter.parts(tokenise(documents(config), lm.tokenizer, models.vocabulary, lm.bos_id))


def require_tokens(config: RecordingConfig, cutter: Cutter) -> None:
    """Raises `InputError` if the text is empty; prints a line if it has fewer tokens than requested."""
    source = config.dataset or ", ".join(config.text)
    if cutter.tokens == 0:
        raise InputError(f"expected text in {source}, but it holds no usable text ({cutter.empty_documents} empty documents); give another")
    if cutter.tokens < config.tokens - 1:  # a lone beginning-of-text token is never written
        print(f"the text ended at {cutter.tokens:,} of the {config.tokens:,} tokens asked for", file=sys.stderr)


def facts(config: RecordingConfig, models: Models) -> dict[str, Any]:
    """A manifest's facts about model and text."""
    lm = models.first
    return {
        **models.records(),
        "tokenizer": lm.tokenizer.name_or_path if lm.tokenizer is not None else None,
        "dataset": {f.name: getattr(config, f.name) for f in fields(TextConfig)},
        "context": context_of(config, models),
        "prepend_bos": lm.bos_id is not None,
    }
