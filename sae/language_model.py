"""A Hugging Face causal language model with named places: record what flows there, or replace it, in any forward pass.

s sequences · p positions · d model width · v vocabulary

Sites, with L counted from 0: `resid_pre.L` and `resid_post.L` (the residual stream before and after block L), `attn_out.L` and `mlp_out.L`
(what block L adds to it), `head_out.L` (the heads' outputs, concatenated, before the output projection).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.fingerprint import fingerprint

KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_out")
SAFE_KINDS = ("resid_pre", "resid_post", "head_out")  # mean the same in any block, whatever it does to what it adds

Edit = Callable[[Tensor], Tensor]


class Family(NamedTuple):
    """Where related architectures keep their parts: `blocks` and `final_norm` below the decoder, the others below a block."""

    model_types: str
    """`model_type`s in Hugging Face configurations for which attn_out and mlp_out are known to be what is added to the stream"""
    blocks: str
    attn_out: str
    """the module whose output is added, so a norm that follows the attention belongs to it"""
    mlp_out: str
    projection: str
    """of the heads' outputs; its input is head_out"""
    final_norm: str


# The first row whose modules all exist is taken: rows with more specific names stand above those with common ones.
FAMILIES = (
    Family("gpt2", "h", "attn", "mlp", "attn.c_proj", "ln_f"),
    Family("gptj", "h", "attn", "mlp", "attn.out_proj", "ln_f"),
    Family("gpt_neo", "h", "attn", "mlp", "attn.attention.out_proj", "ln_f"),
    Family("gpt_neox", "layers", "attention", "mlp", "attention.dense", "final_layer_norm"),
    Family(
        "gemma2 gemma3_text olmo2",
        "layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
        "norm",
    ),
    Family("llama mistral mixtral qwen2 qwen3 phi3 olmo", "layers", "self_attn", "mlp", "self_attn.o_proj", "norm"),
    Family("phi", "layers", "self_attn", "mlp", "self_attn.dense", "final_layernorm"),
    Family("opt", "layers", "self_attn", "fc2", "self_attn.out_proj", "final_layer_norm"),
)


class Site(NamedTuple):
    kind: str
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"


def parse_site(text: str, kinds: Sequence[str] = KINDS, n_layers: int | None = None) -> Site:
    """`"resid_post.2"` -> `Site("resid_post", 2)`; with `n_layers`, only a site that a model with so many blocks has.

    Raises `InputError` that lists the sites there are.
    """
    match = re.fullmatch(r"([a-z_]+)\.(0|[1-9][0-9]*)", text)
    if match and match[1] in kinds and (n_layers is None or int(match[2]) < n_layers):
        return Site(match[1], int(match[2]))
    last = "L" if n_layers is None else n_layers - 1
    there_are = ", ".join(f"{kind}.0 to {kind}.{last}" for kind in kinds)
    raise InputError(f"expected a site of the model, one of {there_are}, got {text!r}")


class NonFiniteLogits(ArithmeticError):
    """The logits became infinite or not a number, so there is no next token to choose."""


class _AllRecorded(Exception):
    """Unwinds the forward pass once every wanted site has been seen."""


class LanguageModel:
    """A causal LM in evaluation mode, without gradients for its weights; `load` gets one by name, the constructor wraps a loaded one."""

    def __init__(self, model: Any, tokenizer: Any = None, name: str = "", revision: str | None = None):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.name, self.revision = tokenizer, name, revision
        if tokenizer is not None:  # the texts we cut ourselves are longer than the context; not worth a warning
            tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        config = model.config.get_text_config()
        self._decoder = model.get_decoder()
        self._family = _family(self._decoder, name or type(model).__name__)
        self._blocks = list(self._decoder.get_submodule(self._family.blocks))
        self.kinds = KINDS if config.model_type in self._family.model_types.split() else SAFE_KINDS
        self.n_layers: int = len(self._blocks)
        self.d_model: int = config.hidden_size
        self.context: int = config.max_position_embeddings
        self.bos_id: int | None = tokenizer.bos_token_id if tokenizer is not None else config.bos_token_id
        self.past_length = 0
        """inside a forward under `edited`: positions already in the KV cache, so the column of the pass's first token"""
        self.attention_mask: Any = None
        """inside a forward under `edited`: the mask the model was given, [s, past + p], or None"""
        self._rows = (0, 0)
        self._given_mask: Any = ()
        self._fingerprint: str | None = None  # set where not all weights are in memory as they are in the files
        self._cut_off = False

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        revision: str | None = None,
        sites: Sequence[str] = (),
        quantize: str | None = None,
    ) -> "LanguageModel":
        """A model by hub name, local folder or GGUF file.

        `device` "auto" is CUDA where there is one; `dtype` "auto" is float32 on a CPU, where half precision is slow, and as stored
        elsewhere; `device_map` ("auto" or a mapping, needs the package accelerate) spreads a large model and excludes `device`.
        With `sites`, blocks after the deepest of them stay out of memory where possible, and then only `record` works. `quantize`
        "8bit" has Linear weights in 8 bits (needs the packages bitsandbytes and accelerate).
        Raises `InputError` for anything that is not a loadable causal LM with all of its weights.
        """
        from sae.model_files import load_model, load_tokenizer

        if device_map is not None and device != "auto":
            raise InputError(f"expected either device or device_map, got both ({device!r} and {device_map!r}); give one of them")
        loaded = load_model(str(name), device, dtype, device_map, revision, sites, quantize)
        lm = cls(loaded.model, load_tokenizer(str(name), revision), str(name), revision)
        lm._fingerprint, lm._cut_off = loaded.fingerprint, loaded.cut_off
        return lm

    @property
    def device(self) -> torch.device:
        """Where token ids go (with `device_map`, later blocks may live elsewhere)."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm before the unembedding; None for the few models without one (OPT-350m)."""
        return getattr(self._decoder, self._family.final_norm)

    def sites(self) -> list[str]:
        return [str(Site(kind, layer)) for layer in range(self.n_layers) for kind in self.kinds]

    def width(self, site: str) -> int:
        """Length of one vector there. Raises `InputError` listing the sites the model has."""
        kind, layer = parse_site(site, self.kinds, self.n_layers)
        if kind != "head_out":
            return self.d_model
        projection: Any = self._blocks[layer].get_submodule(self._family.projection)
        return projection.in_features if hasattr(projection, "in_features") else projection.nx  # GPT-2's Conv1D says nx

    def module(self, site: str) -> tuple[nn.Module, bool]:
        """The module whose first input (False) or output (True) flows at the site."""
        kind, layer = parse_site(site, self.kinds, self.n_layers)
        block = self._blocks[layer]
        if kind in ("resid_pre", "head_out"):
            return (block if kind == "resid_pre" else block.get_submodule(self._family.projection)), False
        return (block if kind == "resid_post" else block.get_submodule(getattr(self._family, kind))), True

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts as left-padded token ids [s, p] and attention mask [s, p], each behind a beginning-of-text token where there is one."""
        if self.tokenizer is None:
            raise InputError(f"expected a tokenizer beside the model {self.name!r} to read text, found none; add its files to the folder")
        start = [] if self.bos_id is None else [self.bos_id]
        rows = [start + self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        if not rows or not all(rows):
            raise InputError("expected text of at least one token, got none; this model has no beginning-of-text token to start from")
        longest = max(len(row) for row in rows)
        ids_sp = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in rows])
        mask_sp = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids_sp.to(self.device), mask_sp.to(self.device)

    @property
    def eos_ids(self) -> list[int]:
        ids = self.model.generation_config.eos_token_id if self.model.generation_config else None
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @property
    def pad_id(self) -> int:
        """Fills rows; masked out, so any token does."""
        pad = None if self.tokenizer is None else self.tokenizer.pad_token_id
        return pad if pad is not None else next(iter(self.eos_ids), 0)

    @torch.no_grad()
    def record(self, ids_sp: Tensor, sites: Sequence[str], attention_mask_sp: Tensor | None = None) -> dict[str, Tensor]:
        """Values at `sites`, each [s, p, width], on the device and in the dtype of their block; the pass stops after the deepest one.

        Inside `edited`, values are those after the edits. Padding positions hold meaningless numbers.
        """
        found: dict[str, Tensor] = {}

        def keep(site: str) -> Callable[[Tensor], None]:
            def see(value: Tensor) -> None:
                found[site] = value
                if len(found) == len(set(sites)):
                    raise _AllRecorded

            return see

        with self._hooked({site: keep(site) for site in sites}), suppress(_AllRecorded):
            self._forward(ids_sp, attention_mask_sp)
        return {site: found[site] for site in sites}

    def logits(self, ids_sp: Tensor, attention_mask_sp: Tensor | None = None) -> Tensor:
        """Next-token logits, [s, p, v]. Gradients flow only to tensors that an edit brings in."""
        self._require_all_blocks()
        return self._forward(ids_sp, attention_mask_sp).logits

    @contextmanager
    def edited(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """Inside, the value at each site is replaced by the function's result, in every forward pass and `generate`.

        A function gets [s, p, width] and returns that shape; a cached decoding step brings [s, 1, width], the column `past_length`.
        Nested contexts apply in the order they were entered.
        """
        with self._hooked(edits):
            yield

    def generate(self, ids_sp: Tensor, attention_mask_sp: Tensor | None = None, **sampling: Any) -> Tensor:
        """Prompt and new ids, [s, p + new], with the settings of `stream`; rows that ended are filled with `pad_id`."""
        new_s = self.stream(ids_sp, attention_mask_sp, **sampling)
        return torch.cat([ids_sp.to(self.device, torch.long), *(next_s[:, None] for next_s in new_s)], dim=1)

    @torch.no_grad()
    def stream(
        self,
        ids_sp: Tensor,
        attention_mask_sp: Tensor | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[Tensor]:
        """Up to `max_new_tokens` new ids, one [s] after the other as they are chosen; temperature 0 is greedy.

        Own loop, because `model.generate` mixes in penalties and top-k from the hub's generation_config.json. Sampling has its own
        generator: equal seeds give equal text and the global random state is untouched. Edits and hooks hold for the tokens that are
        asked for inside them. Raises `NonFiniteLogits`.
        """
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise InputError(
                "expected max_new_tokens of at least 1, a temperature of at least 0 and top_p above 0 and up to 1, "
                f"got {max_new_tokens}, {temperature} and {top_p}"
            )
        self._require_all_blocks()
        (step_sp, mask_sp), cache = self._inputs(ids_sp, attention_mask_sp, max_new_tokens), None
        generator = torch.Generator(self.device).manual_seed(seed)
        eos = torch.tensor(self.eos_ids, dtype=torch.long, device=self.device)
        ended_s = torch.zeros(len(ids_sp), dtype=torch.bool, device=self.device)
        for step in range(max_new_tokens):
            output = self.model(
                input_ids=step_sp,
                attention_mask=mask_sp,
                position_ids=_position_ids(mask_sp)[:, -step_sp.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits_sv = output.logits[:, -1].float()
            if not torch.isfinite(logits_sv[~ended_s]).all():  # host sync
                raise NonFiniteLogits(f"the model's logits are not finite at new token {step + 1}")
            next_s = _sample(logits_sv, temperature, top_p, generator).to(self.device)
            next_s = torch.where(ended_s, self.pad_id, next_s)
            yield next_s
            ended_s |= torch.isin(next_s, eos)
            if ended_s.all():  # host sync
                break
            step_sp, mask_sp = next_s[:, None], torch.cat([mask_sp, mask_sp.new_ones(len(mask_sp), 1)], dim=1)

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that recognise the whole model in any float dtype; see sae/fingerprint.py."""
        return self._fingerprint or fingerprint(self.model)

    def _require_all_blocks(self) -> None:
        if self._cut_off:
            raise InputError(
                f"expected all blocks of {self.name!r}, but it was loaded up to block {self.n_layers - 1}; load it without sites"
            )

    def _inputs(self, ids_sp: Tensor, mask_sp: Tensor | None, new: int = 0) -> tuple[Tensor, Tensor]:
        if ids_sp.ndim != 2 or ids_sp.shape[1] == 0:
            raise InputError(f"expected token ids as sequences by positions, got shape {tuple(ids_sp.shape)}")
        if ids_sp.shape[1] + new > self.context:
            came = f"{ids_sp.shape[1]}" + (f" and {new} new ones" if new else "")
            raise InputError(f"expected at most {self.context} positions, the context of {self.name!r}, got {came}; shorten the text")
        mask_sp = torch.ones_like(ids_sp) if mask_sp is None else mask_sp
        return ids_sp.to(self.device, torch.long), mask_sp.to(self.device, torch.long)

    def _forward(self, ids_sp: Tensor, mask_sp: Tensor | None) -> Any:
        ids_sp, full_mask_sp = self._inputs(ids_sp, mask_sp)
        if mask_sp is None:  # spares the model a mask that says nothing
            return self.model(input_ids=ids_sp, use_cache=False)
        return self.model(input_ids=ids_sp, attention_mask=full_mask_sp, position_ids=_position_ids(full_mask_sp), use_cache=False)

    @contextmanager
    def _hooked(self, functions: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
        """Shows each site's value to its function, and puts the function's result, if it is not None, in its place."""

        def begin_model(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._given_mask = kwargs.get("attention_mask", args[1:] or None)  # which of several positional arguments it is, is not known

        def begin(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            value = args[0] if args else kwargs.get("input_ids")
            value = kwargs["inputs_embeds"] if value is None else value
            cache = kwargs.get("past_key_values")
            self._rows = (value.shape[0], value.shape[1])
            self.past_length = 0 if cache is None else int(cache.get_seq_length())
            mask = kwargs.get("attention_mask")
            # Gemma 3 with images makes masks for its kinds of layers before it calls the decoder
            self.attention_mask = self._given_mask if isinstance(mask, dict) else mask

        with ExitStack() as stack:
            places = {site: self.module(site) for site in functions}
            stack.callback(setattr, self, "_given_mask", ())  # no later pass shall take it for its own
            stack.callback(self.model.register_forward_pre_hook(begin_model, with_kwargs=True).remove)
            stack.callback(self._decoder.register_forward_pre_hook(begin, with_kwargs=True).remove)
            for site, function in functions.items():
                stack.callback(self._attach(*places[site], self._replacing(site, function)).remove)
            yield

    def _replacing(self, site: str, function: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        width = self.width(site)

        def replace(value: Tensor) -> Tensor | None:
            shape = (*self._rows, width)
            result = function(value.reshape(shape))  # OPT runs its MLP on [s * p, d]
            if result is None:
                return None
            if result.shape != shape:
                raise InputError(f"expected the edit at {site} to return shape {shape}, got {tuple(result.shape)}")
            return result.to(value).reshape(value.shape)

        return replace

    @staticmethod
    def _attach(module: nn.Module, is_output: bool, replace: Callable[[Tensor], Tensor | None]) -> Any:
        """One forward hook, on the module's output or on its first input."""

        def on_input(_module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
            result = replace(args[0] if args else kwargs["hidden_states"])
            if result is None:
                return None
            return ((result, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": result})

        def on_output(_module: nn.Module, _args: tuple, output: Any) -> Any:
            result = replace(output[0] if isinstance(output, tuple) else output)
            return None if result is None else (result, *output[1:]) if isinstance(output, tuple) else result

        if is_output:
            return module.register_forward_hook(on_output)
        return module.register_forward_pre_hook(on_input, with_kwargs=True)


def _family(decoder: nn.Module, name: str) -> Family:
    def has(module: nn.Module, path: str) -> bool:
        with suppress(AttributeError):
            return module.get_submodule(path) is not None
        return False

    for family in FAMILIES:
        parts = (family.attn_out, family.mlp_out, family.projection)
        if has(decoder, family.blocks) and all(has(decoder.get_submodule(f"{family.blocks}.0"), part) for part in parts):
            return family
    looked_for = "; ".join(f"{f.blocks} with {f.attn_out}, {f.mlp_out} and {f.projection}" for f in FAMILIES)
    raise InputError(
        f"expected {name!r} to keep its blocks as one of ({looked_for}), found {type(decoder).__name__}, which has none of them"
    )


def _position_ids(mask_sp: Tensor) -> Tensor:
    """Positions counted from each row's first real token, so that left padding does not shift it."""
    return (mask_sp.cumsum(-1) - 1).clamp(min=0)


def _sample(logits_sv: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row, [s]: from the smallest set of likeliest tokens that holds `top_p` of the probability."""
    if temperature == 0:
        return logits_sv.argmax(-1)
    probs_sv, order_sv = (logits_sv / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    probs_sv = probs_sv.masked_fill(probs_sv.cumsum(-1) - probs_sv >= top_p, 0)
    return order_sv.gather(-1, torch.multinomial(probs_sv.to(generator.device), 1, generator=generator).to(order_sv.device))[:, 0]
