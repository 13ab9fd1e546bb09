"""Effects of steering on text: how often words occur, and how readable the text is.

s sequences · p positions of the prompt · n new tokens · v vocabulary
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sae.errors import InputError
from sae.features.index.words import whole_words
from sae.model.language_model import LanguageModel
from sae.model.sampling import token_losses
from sae.text_input import text_list

WORD = re.compile(r"\w+(?:['’]\w+)*")


class WordRate(NamedTuple):
    found: int
    """listed words and phrases"""
    words: int
    """words altogether"""

    @property
    def rate(self) -> float:
        """Share of all words, 0 for no text."""
        return self.found / self.words if self.words else 0.0


def listed_words(words: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the listed words (or phrases) as `whole_words` does. Raises `InputError` for no word."""
    listed = [word.strip() for word in text_list(words, "words")]
    if not listed or not all(listed):
        raise InputError(f"expected a list of words to count, got {list(words)}")
    return whole_words(listed)


def read_words(path: Path) -> list[str]:
    """The lines of a file, without empty ones and those that start with #. Raises `InputError` for a file that has none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected a text file of words at {path}, but it cannot be read ({error})") from None
    words = [line for line in lines if line and not line.startswith("#")]
    if not words:
        raise InputError(f"expected one word a line in {path}, found none")
    return words


def word_rate(texts: Iterable[str], words: Sequence[str]) -> WordRate:
    """Counts the matches of `listed_words` in `texts`, and all words.

    Inflected forms count only if they are listed: "damn" alone does not count "damned".
    """
    texts, any_listed = text_list(texts), listed_words(words)
    found = sum(len(any_listed.findall(text)) for text in texts)
    return WordRate(found, sum(len(WORD.findall(text)) for text in texts))


@torch.no_grad()
def continuation_loss(lm: LanguageModel, prompt_ids_sp: Tensor, generated_ids_sn: Tensor, prompt_mask_sp: Tensor | None = None) -> float:
    """Mean nats per token of continuations under the model: −mean log p(token | all before it), lower is more readable.

    `generated_ids_sn` are the new tokens alone; those after a row's first end-of-text token are not counted. Call it outside `steered`,
    so that the model judging is the unsteered one.
    """
    if generated_ids_sn.ndim != 2 or generated_ids_sn.shape[1] == 0:
        raise InputError(f"expected new tokens of at least one position, got shape {tuple(generated_ids_sn.shape)}")
    generated_ids_sn = generated_ids_sn.to(prompt_ids_sp.device)
    new = generated_ids_sn.shape[1]
    mask_sp = torch.ones_like(prompt_ids_sp) if prompt_mask_sp is None else prompt_mask_sp
    mask = torch.cat([mask_sp, mask_sp.new_ones(generated_ids_sn.shape)], dim=1)
    logits_snv = lm.logits(torch.cat([prompt_ids_sp, generated_ids_sn], dim=1), mask)[:, -new - 1 : -1]
    target_sn = generated_ids_sn.to(logits_snv.device, torch.long)
    return token_losses(logits_snv, target_sn)[until_end(lm, target_sn)].mean().item()  # host sync


def until_end(lm: LanguageModel, generated_ids_sn: Tensor) -> Tensor:
    """True up to and including each row's first end-of-text token, bool [s, n]; what follows only fills the row."""
    ends_sn = torch.isin(generated_ids_sn, generated_ids_sn.new_tensor(lm.eos_ids))
    return ends_sn.cumsum(1) - ends_sn.long() == 0


def distinct_2(rows: Sequence[Sequence[int]]) -> float | None:
    """Share of different pairs among all pairs of neighbouring tokens of all rows; None without a pair."""
    pairs = [pair for row in rows for pair in pairwise(row)]
    return len(set(pairs)) / len(pairs) if pairs else None


def longest_repeat(row: Sequence[int]) -> int:
    """Tokens of the longest run that occurs twice in the row (the two may overlap): n − 1 for n times one token, 0 if none occurs twice."""
    length = 0
    while length < len(row) and _comes_twice(row, length + 1):
        length += 1
    return length


def _comes_twice(row: Sequence[int], length: int) -> bool:
    runs = Counter(tuple(row[i : i + length]) for i in range(len(row) - length + 1))
    return max(runs.values()) > 1


def first_repeated_step(row: Sequence[int], length: int = 3) -> int | None:
    """The first new token, counted from 0, that ends a run of `length` tokens that the row has already had; None where none does."""
    seen: set[tuple[int, ...]] = set()
    for end in range(length, len(row) + 1):
        run = tuple(row[end - length : end])
        if run in seen:
            return end - 1
        seen.add(run)
    return None
