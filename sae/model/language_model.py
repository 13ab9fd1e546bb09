"""A Hugging Face causal language model with named sites: record the values there, or replace them, in any forward pass.

s sequences · p positions · d model width · v vocabulary · for the names of places see sae/model/sites.py
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.model.hooks import Edit, Hooks
from sae.model.opening.fingerprint import fingerprint
from sae.model.opening.offload import device_of
from sae.model.sampling import sample
from sae.model.sites import EMBED, KINDS, parse_site
from sae.model.structure.attention import AttentionEdit, attention_edited, find_attentions
from sae.model.structure.heads import SEPARATE, find_heads
from sae.model.structure.inspection import Inspection, inspect
from sae.model.structure.norms import Norm, ScaleEdit, find_norms, scales_edited
from sae.model.structure.places import Place
from sae.model.structure.trace import decoder_and_blocks, short_pass
from sae.text_input import text_list

CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # what configurations call it
UNLIMITED = 1 << 20  # positions of a model without positions, such as Mamba and BLOOM


class NonFiniteLogits(ArithmeticError):
    """The logits became infinite or not a number, so there is no next token to choose."""


class _AllRecorded(Exception):
    """Unwinds the forward pass after every wanted site was recorded."""


class LanguageModel:
    """A causal LM in evaluation mode, without gradients for its weights; `load` loads one by name, the constructor wraps a loaded one."""

    def __init__(self, model: Any, tokenizer: Any = None, name: str = "", revision: str | None = None):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.name, self.revision = tokenizer, name, revision
        if tokenizer is not None:  # the texts we cut ourselves are longer than the context; not worth a warning
            tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        config = model.config.get_text_config()
        self._refuse_virtual_tokens()
        self._decoder, self.blocks = decoder_and_blocks(model, getattr(config, "num_hidden_layers", 0), name)
        self._hooks = Hooks(model, self._decoder)
        self.n_layers: int = len(self.blocks)
        self.d_model: int = config.hidden_size
        self.context: int = next((n for name in CONTEXTS if isinstance(n := getattr(config, name, None), int) and n > 0), UNLIMITED)
        self.bos_id: int | None = tokenizer.bos_token_id if tokenizer is not None else config.bos_token_id
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

        `device` "auto" is CUDA if there is one; `dtype` "auto" is float32 on a CPU, where half precision is slow, and as stored
        elsewhere; `device_map` ("auto" or a mapping, needs the package accelerate) spreads a large model and excludes `device`.
        With `sites`, blocks after the deepest of them stay out of memory where possible, and then only `record` works. `quantize`
        "8bit" has Linear weights in 8 bits (needs the packages bitsandbytes and accelerate).
        Raises `InputError` for anything that is not a loadable causal LM with all of its weights.
        """
        from sae.model.opening.loading import load_model, load_tokenizer

        sites = text_list(sites, "sites")
        if device_map is not None and device != "auto":
            raise InputError(f"expected either device or device_map, got both ({device!r} and {device_map!r}); give one of them")
        loaded = load_model(str(name), device, dtype, device_map, revision, sites, quantize)
        lm = cls(loaded.model, load_tokenizer(str(name), revision), str(name), revision)
        lm._fingerprint, lm._cut_off = loaded.fingerprint, loaded.cut_off
        return lm

    @property
    def device(self) -> torch.device:
        """The device of token ids (with `device_map`, later blocks may be on other devices)."""
        return device_of(self.model.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def past_length(self) -> int:
        """Inside a pass under `edited`: positions already in the KV cache, so the column of the pass's first token."""
        return self._hooks.past_length

    @property
    def attention_mask(self) -> Any:
        """Inside a pass under `edited`: which columns up to the pass's last hold tokens, [s, past + p]; None where no mask was given."""
        return self._hooks.attention_mask

    @cached_property
    def _inspection(self) -> Inspection:
        with self._hooks.paused(), torch.inference_mode(False), torch.no_grad():
            return inspect(self.model, self._decoder, self.blocks, partial(short_pass, self.model, self._decoder, self.name))

    @cached_property
    def _projected(self) -> dict[str, Place | str]:
        """q, k and v: their places, or why they do not exist."""
        with self._hooks.paused(), torch.inference_mode(False):
            found = find_heads(self._inspection.attentions, partial(short_pass, self.model, self._decoder, self.name))
        return {f"{kind}.{layer}": place for layer, own in enumerate(found) for kind, place in own.items()}

    @cached_property
    def norms(self) -> dict[str, Norm | str]:
        """By name, every norm of a pass; a reason if its formula is not known."""
        with self._hooks.paused(), torch.inference_mode(False), torch.no_grad():
            return find_norms(self._decoder, partial(short_pass, self.model, self._decoder, self.name))

    @cached_property
    def _attentions(self) -> list[nn.Module | str]:
        with self._hooks.paused(), torch.inference_mode(False), torch.no_grad():
            return find_attentions(self._decoder, self.blocks, partial(short_pass, self.model, self._decoder, self.name))

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm before the unembedding; None for the few models that have none (OPT-350m)."""
        return self._inspection.final_norm

    def norm_before(self, site: str) -> nn.Module | None:
        """For attn_in.L or mlp_in.L, the norm that computes it from the stream; None if it is the stream itself. Raises as `place` does."""
        self.place(site)
        return self._inspection.norms[str(parse_site(site))]

    def sites(self) -> list[str]:
        """The sites of this model, in the order in which they are computed."""
        return [site for site in self._all_sites() if isinstance(self._found(site), Place)]

    def refused_sites(self) -> dict[str, str]:
        """The other sites, with the reasons why this model does not have them."""
        return {site: found for site in self._all_sites() if isinstance(found := self._found(site), str)}

    def width(self, site: str) -> int:
        """Length of one vector there. Raises `InputError` as `place` does."""
        return self.place(site).width

    def place(self, site: str) -> Place:
        """The place of the site. Raises `InputError` listing the known sites, or with the reason why this model does not have it."""
        site = str(parse_site(site, self.n_layers))
        found = self._found(site)
        if isinstance(found, str):
            raise InputError(f"expected a site of {self.name!r}, got {site}, which it does not have: {found}")
        return found

    def _found(self, site: str) -> Place | str:
        return (self._projected if parse_site(site).kind in SEPARATE else self._inspection.found)[site]

    def _all_sites(self) -> list[str]:
        return [EMBED, *(f"{kind}.{layer}" for layer in range(self.n_layers) for kind in KINDS)]

    def token_ids(self, text: str) -> list[int]:
        """Behind one beginning-of-text token, if there is one; a text that brings its own, as chat templates do, gets no second.

        Halves of surrogate pairs become U+FFFD, with a warning. Raises `InputError` without a tokenizer, and for tokens that the model has
        no embedding of.
        """
        if self.tokenizer is None:
            raise InputError(f"expected a tokenizer beside the model {self.name!r} to read text, found none; add its files to the folder")
        (text,) = text_list([text], "text")
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.bos_id is not None:
            first = next((n for n, token in enumerate(ids) if token != self.bos_id), len(ids))
            ids = [self.bos_id, *ids[first:]]
        if ids and max(ids) >= self._vocabulary:
            raise InputError(
                f"expected a tokenizer of at most {self._vocabulary} tokens, the embeddings of {self.name!r}, got token {max(ids)} in "
                f"{text!r:.60}; give the model's own tokenizer"
            )
        return ids

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`token_ids` of several texts, left-padded: ids [s, p] and attention mask [s, p].

        Halves of surrogate pairs become U+FFFD, with a warning. Raises `InputError` for a single string, and for no token at all.
        """
        rows = [self.token_ids(text) for text in text_list(texts)]
        if not rows or not all(rows):
            raise InputError("expected text of at least one token, got none; this model has no beginning-of-text token to start from")
        longest = max(len(row) for row in rows)
        ids_sp = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in rows])
        mask_sp = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids_sp.to(self.device), mask_sp.to(self.device)

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a text, from generation_config.json. Raises `InputError` where that file holds no token ids."""
        given = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = [] if given is None else given if isinstance(given, list) else [given]
        if not all(type(token) is int for token in ids):
            raise InputError(
                f"expected eos_token_id in generation_config.json to be one token id or a list of them, got {given!r}; mend it"
            )
        return ids

    @property
    def pad_id(self) -> int:
        """Fills rows; masked out, so it can be any token with an embedding, which a tokenizer's own pad token may lack."""
        pad = None if self.tokenizer is None else self.tokenizer.pad_token_id
        choices = [*([] if pad is None else [pad]), *self.eos_ids, 0]
        return next(token for token in choices if 0 <= token < self._vocabulary)

    @property
    def _vocabulary(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    @torch.no_grad()
    def record(self, ids_sp: Tensor, sites: Sequence[str], attention_mask_sp: Tensor | None = None) -> dict[str, Tensor]:
        """Values at `sites`, each [s, p, width], on the device and in the dtype of their block; the pass stops after the deepest one.

        Inside `edited`, values are those after the edits. Padding positions hold meaningless numbers.
        """
        sites, found = text_list(sites, "sites"), dict[str, Tensor]()

        def keep(site: str) -> Edit:
            def see(value: Tensor) -> Tensor:
                found[site] = value
                if len(found) == len(set(sites)):
                    raise _AllRecorded
                return value

            return see

        with self.edited({site: keep(site) for site in sites}), suppress(_AllRecorded):
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
        Nested contexts apply in the order they were entered. What `torch.compile` made of the model is run uncompiled inside. Raises
        `InputError` while another thread is inside, and from a pass that another thread makes.
        """
        self._refuse_virtual_tokens()
        for site, edit in edits.items():
            if not callable(edit):
                raise InputError(f"expected a function of the value at {site}, got {type(edit).__name__}")
        places = {site: self.place(site) for site in edits}
        with self._hooks.attached(edits, places):
            yield

    @contextmanager
    def scales_edited(self, edit: ScaleEdit) -> Iterator[None]:
        """Inside, every norm divides by `edit(name, scale)`: [s, p, 1], or one number for each head in norms of queries and keys.

        An edit that returns the scale it got keeps every bit. Raises `InputError` for a model with a norm whose formula is not known.
        """
        self.sites()  # the pass that looks for them must not be edited
        with self.edited({}), scales_edited(self.norms, edit, self.name):
            yield

    @contextmanager
    def attention_edited(self, edit: AttentionEdit) -> Iterator[None]:
        """Inside, block L mixes the pattern [s, h, q, k] and values [s, g, k, z] that `edit(L, pattern, values)` returns.

        h are all heads, g those of keys and values, k the columns so far. The model runs its eager attention; an edit that returns the
        tensors it got keeps every bit of that. Raises `InputError` for a model with a block whose attention cannot be seen so.
        """
        self.sites()  # the pass that looks for them must not be edited
        with self.edited({}), attention_edited(self._decoder, self._attentions, edit, self.name):
            yield

    def unedited(self) -> AbstractContextManager[None]:
        """Inside, passes are as without `edited`; edits of scales and of attention stay."""
        return self._hooks.paused()

    def generate(self, ids_sp: Tensor, attention_mask_sp: Tensor | None = None, **sampling: Any) -> Tensor:
        """Prompt and new ids, [s, p + new], with the settings of `stream`; rows that ended are filled with `pad_id`.

        Prompts that were padded on the right are padded on the left in the result.
        """
        ids_sp, mask_sp = self._padded_left(*self._inputs(ids_sp, attention_mask_sp))
        new_s = self.stream(ids_sp, mask_sp, **sampling)
        return torch.cat([ids_sp, *(next_s[:, None] for next_s in new_s)], dim=1)

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
        asked for inside them. Padding is moved to the left, since new tokens follow the last column. Raises `NonFiniteLogits`.
        """
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise InputError(
                "expected max_new_tokens of at least 1, a temperature of at least 0 and top_p above 0 and up to 1, "
                f"got {max_new_tokens}, {temperature} and {top_p}"
            )
        self._require_all_blocks()
        (step_sp, mask_sp), cache = self._padded_left(*self._inputs(ids_sp, attention_mask_sp, max_new_tokens)), None
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
            finite_s = logits_sv.amax(-1).isfinite() & logits_sv.amin(-1).isfinite()
            if not (finite_s | ended_s).all():  # host sync
                raise NonFiniteLogits(f"the model's logits are not finite at new token {step + 1}")
            next_s = sample(logits_sv, temperature, top_p, generator).to(self.device)
            next_s = torch.where(ended_s, self.pad_id, next_s)
            yield next_s
            ended_s |= torch.isin(next_s, eos)
            if ended_s.all():  # host sync
                break
            step_sp, mask_sp = next_s[:, None], torch.cat([mask_sp, mask_sp.new_ones(len(mask_sp), 1)], dim=1)

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that identify the whole model in any float dtype; see sae/model/opening/fingerprint.py."""
        return self._fingerprint or fingerprint(self.model)

    def _refuse_virtual_tokens(self) -> None:
        """Of peft, which counts them as positions before the first: every place would lie elsewhere than said."""
        adapter = getattr(self.model, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            raise InputError(
                f"expected a model without virtual tokens, got {self.name!r} with {adapter.peft_type}; give an adapter that "
                "changes weights, such as LoRA"
            )

    def _require_all_blocks(self) -> None:
        if self._cut_off:
            raise InputError(
                f"expected all blocks of {self.name!r}, but it was loaded up to block {self.n_layers - 1}; load it without sites"
            )

    def _inputs(self, ids_sp: Tensor, mask_sp: Tensor | None, new: int = 0) -> tuple[Tensor, Tensor]:
        if ids_sp.ndim != 2 or ids_sp.shape[1] == 0:
            raise InputError(f"expected token ids as sequences by positions, got shape {tuple(ids_sp.shape)}")
        if ids_sp.shape[1] + new > self.context:
            found = f"{ids_sp.shape[1]}" + (f" and {new} new ones" if new else "")
            raise InputError(f"expected at most {self.context} positions, the context of {self.name!r}, got {found}; shorten the text")
        mask_sp = torch.ones_like(ids_sp) if mask_sp is None else mask_sp
        if mask_sp.shape != ids_sp.shape:
            raise InputError(f"expected an attention mask of the ids' shape {tuple(ids_sp.shape)}, got {tuple(mask_sp.shape)}")
        return ids_sp.to(self.device, torch.long), mask_sp.to(self.device, torch.long)

    def _padded_left(self, ids_sp: Tensor, mask_sp: Tensor) -> tuple[Tensor, Tensor]:
        """Rows with their masked columns first and everything else in its order."""
        real_sp = mask_sp != 0
        if not real_sp.any(1).all():  # host sync
            raise InputError("expected prompts of at least one token, got one that is all padding")
        order_sp = real_sp.to(torch.uint8).argsort(dim=1, stable=True)
        return ids_sp.gather(1, order_sp), mask_sp.gather(1, order_sp)

    def _forward(self, ids_sp: Tensor, mask_sp: Tensor | None) -> Any:
        ids_sp, full_mask_sp = self._inputs(ids_sp, mask_sp)
        if mask_sp is None:  # spares the model a mask that says nothing
            return self.model(input_ids=ids_sp, use_cache=False)
        return self.model(input_ids=ids_sp, attention_mask=full_mask_sp, position_ids=_position_ids(full_mask_sp), use_cache=False)


def _position_ids(mask_sp: Tensor) -> Tensor:
    """Positions counted from each row's first real token, so that left padding does not shift it."""
    return (mask_sp.cumsum(-1) - 1).clamp(min=0)
