"""The model that is recorded, or two that read the same tokens, so that row i of every site of both belongs to the same token.

s sequences · p positions
"""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sae.activations.harvest.parts import FOLDER
from sae.errors import InputError
from sae.model.sites import EMBED, split_model

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel

RESERVED = (EMBED, "tokens", FOLDER)
"""names that a second model cannot have: folders of a cache use them"""


class Models(NamedTuple):
    first: "LanguageModel"
    """the model whose tokenizer and beginning-of-text token are used for both"""
    second: "LanguageModel | None" = None
    name: str | None = None
    """of the second, before its sites"""

    @property
    def all(self) -> "dict[str | None, LanguageModel]":
        """The models by the name before their sites: None for the first."""
        return {None: self.first} if self.second is None else {None: self.first, self.name: self.second}

    def width(self, site: str) -> int:
        """Raises `InputError` for a site that its model does not have."""
        name, own = split_model(site)
        return self.all[name].width(own)

    def record(self, ids_sp: Tensor, sites: Iterable[str]) -> dict[str, Tensor]:
        """Values at the sites, each [s, p, width], from one pass of each model."""
        found: dict[str, Tensor] = {}
        for name, lm in self.all.items():
            own = {split_model(site)[1]: site for site in sites if split_model(site)[0] == name}
            found |= {own[site]: value for site, value in lm.record(ids_sp, list(own)).items()}
        return {site: found[site] for site in sites}

    @property
    def context(self) -> int:
        """Number of positions that all can read."""
        return min(lm.context for lm in self.all.values())

    @property
    def vocabulary(self) -> int:
        """Number of tokens for which all have an embedding."""
        return min(lm.model.get_input_embeddings().weight.shape[0] for lm in self.all.values())

    def records(self) -> dict[str, Any]:
        """For a manifest: facts about the model, and about the second by its name, if there is one."""
        first = {"model": facts_of(self.first)}
        return first if self.second is None else first | {"models": {self.name: facts_of(self.second)}}


def facts_of(lm: "LanguageModel") -> dict[str, Any]:
    return {"name": lm.name, "revision": lm.revision, "fingerprint": lm.fingerprint(), "dtype": str(lm.dtype).removeprefix("torch.")}


def second_name(sites: Iterable[str], second_model: str | None, second_revision: str | None) -> str | None:
    """The name of the second model before its sites. Raises `InputError` if options and sites do not fit."""
    sites = list(sites)
    names = list(dict.fromkeys(split_model(site)[0] for site in sites))
    named = [name for name in names if name is not None]
    if second_model is None:
        if named:
            example = next(site for site in sites if split_model(site)[0])
            raise InputError(f"expected --second-model for the site {example}, got none; give it, or leave out {named[0]}/")
        if second_revision is not None:
            raise InputError(f"expected --second-model beside --second-revision {second_revision}, got none; give both or neither")
        return None
    if not named:
        raise InputError(
            f"expected a site of the second model too, behind a name for it, got --sites {' '.join(sites)}; add one such as "
            f"other/{sites[0]}"
        )
    if len(named) > 1:
        raise InputError(f"expected one name for the second model, got {' and '.join(named)} in --sites; choose one of them")
    if None not in names:
        raise InputError(f"expected a site of --model too, got --sites {' '.join(sites)}; add one without {named[0]}/")
    if named[0] in RESERVED:
        raise InputError(f"expected a name for the second model that no folder of a cache has, got {named[0]!r}; choose another")
    return named[0]


def require_two(first: "LanguageModel", second: "LanguageModel") -> None:
    """Raises `InputError` unless they are two models that tokenise text in the same way, naming the first difference."""
    if first.fingerprint() == second.fingerprint():
        if same_weights(first, second):
            raise InputError(
                f"expected two models, but {first.name} and {second.name} have the same weights as far as the sites need them; give "
                "another --second-model"
            )
        print(
            f"{first.name} and {second.name} differ too little for their fingerprints, which are signs of some weights: later only their "
            "names tell one from the other",
            file=sys.stderr,
        )
    if difference := tokens_differ(first, second):
        raise InputError(f"expected two models that tokenise alike, but {difference}; give models with the same tokenizer")
    if first.tokenizer is None:
        print(f"neither {first.name} nor {second.name} has a tokenizer: that they tokenise alike is taken on trust", file=sys.stderr)
    if first.bos_id != second.bos_id:
        print(
            f"{second.name} begins texts with {said_token(second, second.bos_id)}, but here it reads the tokens of {first.name}, which "
            f"begin with {said_token(first, first.bos_id)}",
            file=sys.stderr,
        )


def same_weights(first: "LanguageModel", second: "LanguageModel") -> bool:
    """Compares all weights that both have in memory; a model may be loaded only up to its deepest site."""
    others = dict(second.model.named_parameters())
    pairs = [(weight, others[name]) for name, weight in first.model.named_parameters() if name in others]
    return all(a.is_meta or b.is_meta or torch.equal(a, b.to(a.device)) for a, b in pairs)


def tokens_differ(first: "LanguageModel", second: "LanguageModel") -> str | None:
    """The first difference between two tokenizers, as the middle of a sentence; None if there is none."""
    without = [lm.name for lm in (first, second) if lm.tokenizer is None]
    if len(without) == 2:
        return None
    if without:
        return f"{without[0]} has no tokenizer to compare"
    ids, others = (lm.tokenizer.get_vocab() for lm in (first, second))
    for token in sorted({*ids, *others}, key=lambda token: (min(ids.get(token, 1 << 40), others.get(token, 1 << 40)), token)):
        if ids.get(token) != others.get(token):
            has, lacks = (first.name, second.name) if token in ids else (second.name, first.name)
            if token in ids and token in others:
                return f"token {token!r} is {ids[token]} in {first.name} and {others[token]} in {second.name}"
            return f"{has} has the token {token!r} ({ids.get(token, others.get(token))}) and {lacks} has not"
    rules, other_rules = (rules_of(lm.tokenizer) for lm in (first, second))
    part = next((part for part in rules if rules[part] != other_rules.get(part)), None)
    return part and f"the tokenizers of {first.name} and {second.name} have other rules ({part})"


def rules_of(tokenizer: Any) -> Mapping[str, Any]:
    """The rules by which text is cut into tokens, as far as the tokenizer shows them.

    Special tokens are not compared: chat models have more of them, and only text that spells one out is cut differently.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"class": type(tokenizer).__name__}
    settings = json.loads(backend.to_str())
    return {part: settings[part] for part in ("normalizer", "pre_tokenizer", "model")}


def said_token(lm: "LanguageModel", token: int | None) -> str:
    if token is None:
        return "no token of its own"
    return f"token {token}" if lm.tokenizer is None else f"{lm.tokenizer.convert_ids_to_tokens(token)!r}"
