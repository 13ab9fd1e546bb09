"""Pairs of prompts as token ids, and the metric of a task: how far the last position prefers the right answers to the wrong ones.

n pairs · p positions · v vocabulary · a answers of all pairs, one after the other
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.vocabulary import vocabulary
from steering.circuits.tasks.generators import OWN, TASKS, MetricName, Pair, corruption_of

TRIES = 40  # draws for each pair that is asked for
LONGEST_WORD, SHORTEST_WORD = 12, 3  # letters of the words that induction is made of


class Encoded(NamedTuple):
    clean: list[int]
    corrupt: list[int]
    aligned: list[int]
    """for each position of clean, the aligned position of corrupt"""
    right: list[int]
    wrong: list[int]
    pieces: list[int]
    """for each position of clean, the number of its piece"""


@dataclass(frozen=True)
class Prompts:
    """Pairs that a model can be run on: the same positions for both, padded on the left, so that the last column ends every prompt."""

    task: str
    corruption: str
    metric: MetricName
    pairs: tuple[Pair, ...]
    clean_np: Tensor
    clean_mask_np: Tensor
    corrupt_np: Tensor
    corrupt_mask_np: Tensor
    aligned_np: Tensor
    """the column of corrupt that is aligned with each column of clean: the same one, except in pieces with different numbers of tokens"""
    pair_a: Tensor
    """which pair an answer belongs to"""
    token_a: Tensor
    weight_a: Tensor
    """of the answer in the metric: 1 / number of right ones, or of wrong ones with a minus; of probabilities 1 and -1"""
    dropped: dict[str, int] = field(default_factory=dict)
    """how many pairs were left out, by reason"""
    piece_np: Tensor | None = None
    """the number of the piece of each column of clean, -1 for padding; None if every prompt is one piece"""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def aligned(self) -> bool:
        """Whether every position is aligned with itself."""
        return bool((self.aligned_np == torch.arange(self.aligned_np.shape[1], device=self.aligned_np.device)).all())

    def measure(self, logits_nv: Tensor) -> Tensor:
        """The metric of every pair, [n], of logits at the last position: gradients flow.

        Mean logit of the right answers minus that of the wrong ones; or their total probabilities instead of mean logits.
        """
        value_nv = logits_nv.float() if logits_nv.dtype in (torch.float16, torch.bfloat16) else logits_nv
        if self.metric == "probability_difference":
            value_nv = value_nv.softmax(-1)
        value_a = value_nv[self.pair_a, self.token_a] * self.weight_a.to(value_nv.dtype)
        return value_nv.new_zeros(len(self)).index_add(0, self.pair_a, value_a)

    def subset(self, numbers: Sequence[int]) -> "Prompts":
        """Some of the pairs, in the order given. Raises `InputError` for none."""
        if not len(numbers):
            raise InputError("expected at least one pair, got none; ask for more pairs")
        at = torch.as_tensor(list(numbers), device=self.pair_a.device)
        count_n = torch.bincount(self.pair_a, minlength=len(self))
        first_n, count_m = count_n.cumsum(0) - count_n, count_n[at]
        pair_a = torch.repeat_interleave(count_m)
        within_a = torch.arange(len(pair_a), device=at.device) - (count_m.cumsum(0) - count_m)[pair_a]
        kept_a = first_n[at][pair_a] + within_a
        rows = {name: getattr(self, name)[at] for name in ("clean_np", "clean_mask_np", "corrupt_np", "corrupt_mask_np", "aligned_np")}
        if self.piece_np is not None:
            rows["piece_np"] = self.piece_np[at]
        pairs = tuple(self.pairs[int(number)] for number in numbers)
        return replace(self, pairs=pairs, pair_a=pair_a, token_a=self.token_a[kept_a], weight_a=self.weight_a[kept_a], **rows)

    def halves(self, seed: int = 0) -> tuple["Prompts", "Prompts"]:
        """Two parts of a shuffled order, the second not smaller. Raises `InputError` for fewer than two pairs."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        return self.subset(order[: len(order) // 2]), self.subset(order[len(order) // 2 :])

    def summary(self) -> str:
        """ "32 pairs of 15 tokens; left out: 3 of different lengths" """
        shortest, longest = (int(f(self.clean_mask_np.sum(1))) for f in (torch.min, torch.max))
        length = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
        left = "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) if self.dropped else ""
        return f"{len(self):,} pair{'s' * (len(self) != 1)} of {length} tokens{left}"


def make_prompts(lm: LanguageModel, task: str, n: int, seed: int = 0, corruption: str | None = None) -> Prompts:
    """Up to `n` different pairs of a task with equal numbers of tokens on both sides; the others are counted.

    Raises `InputError` for a task or corruption that there is not, for `n` below 1, and where no pair fits.
    """
    corruption = corruption_of(task, corruption)
    if n < 1:
        raise InputError(f"expected at least one pair, got {n}")
    rng, words = random.Random(seed), one_token_words(lm) if task == "induction" else []
    found: dict[Pair, Encoded] = {}
    dropped: Counter[str] = Counter()
    seen = set()
    for _ in range(TRIES * n):
        pair = TASKS[task].make(rng, corruption, words)
        if pair is None or pair in seen:
            continue
        seen.add(pair)
        encoded = encode_pair(lm, pair)
        if isinstance(encoded, str):
            dropped[encoded] += 1
        else:
            found[pair] = encoded
        if len(found) == n:
            break
    return _prompts(lm, task, corruption, TASKS[task].metric, found, dropped)


def own_prompts(lm: LanguageModel, pairs: Sequence[Pair], metric: MetricName = "logit_difference") -> Prompts:
    """Pairs read from a file; those that do not fit the tokenizer are counted. Raises `InputError` if none fits."""
    found: dict[Pair, Encoded] = {}
    dropped: Counter[str] = Counter()
    for pair in pairs:
        if pair in found:
            dropped["a second time"] += 1
        elif isinstance(encoded := encode_pair(lm, pair), str):
            dropped[encoded] += 1
        else:
            found[pair] = encoded
    return _prompts(lm, OWN, OWN, metric, found, dropped)


def encode_pair(lm: LanguageModel, pair: Pair) -> Encoded | str:
    """Token ids of a pair; or the reason why the tokenizer cannot make a pair of it."""
    if len(pair.clean) == 1:
        clean, corrupt = (lm.token_ids(side[0]) for side in pair[:2])
        if len(clean) != len(corrupt):
            return "of different lengths in tokens"
        aligned, pieces = list(range(len(clean))), [0] * len(clean)
    else:
        sides = [_pieces(lm, side) for side in pair[:2]]
        if None in sides:
            return "with a token across two pieces"
        (clean, clean_ends), (corrupt, corrupt_ends) = sides  # type: ignore[misc]
        aligned = _alignment(clean_ends, corrupt_ends)
        pieces = [number for number, end in enumerate(clean_ends) for _ in range(end - (clean_ends[number - 1] if number else 0))]
    if max(len(clean), len(corrupt)) > lm.context:
        return "longer than the model's context"
    answers = [_answers(lm, pair.clean, texts, clean) for texts in (pair.right, pair.wrong)]
    if None in answers:
        return "with an answer that changes the prompt's last token"
    right, wrong = answers
    both = set(right) & set(wrong)  # type: ignore[arg-type]
    right, wrong = ([token for token in side if token not in both] for side in (right, wrong))  # type: ignore[union-attr]
    if not right or not wrong:
        return "with right and wrong answers of the same first token"
    return Encoded(clean, corrupt, aligned, right, wrong, pieces)


def _answers(lm: LanguageModel, prompt: Sequence[str], texts: Sequence[str], ids: list[int]) -> list[int] | None:
    """The first token of each continuation, without repeats; None where one changes the prompt's own tokens."""
    found: dict[int, None] = {}
    for text in texts:
        whole = lm.token_ids("".join(prompt) + text)
        if whole[: len(ids)] != ids or len(whole) == len(ids):
            return None
        found[whole[len(ids)]] = None
    return list(found)


def _pieces(lm: LanguageModel, pieces: Sequence[str]) -> tuple[list[int], list[int]] | None:
    """Ids of the joined pieces and the end of each; None if a token crosses two of them."""
    whole, ends = lm.token_ids("".join(pieces)), list[int]()
    for number in range(1, len(pieces) + 1):
        ids = lm.token_ids("".join(pieces[:number]))
        if whole[: len(ids)] != ids or len(ids) <= (ends[-1] if ends else 0):
            return None
        ends.append(len(ids))
    return whole, ends


def _alignment(clean_ends: list[int], corrupt_ends: list[int]) -> list[int]:
    """Pieces are aligned at their ends; extra tokens of clean are aligned with the corrupt piece's first token."""
    aligned, start, other = [], 0, 0
    for end, corrupt_end in zip(clean_ends, corrupt_ends):
        aligned += [max(other, corrupt_end - end + position) for position in range(start, end)]
        start, other = end, corrupt_end
    return aligned


def one_token_words(lm: LanguageModel) -> list[str]:
    """Words of letters only that are one token after a space, such as " cat"; used for induction."""
    if lm.tokenizer is None:
        lm.token_ids("")  # raises
    found = []
    for token, piece in enumerate(vocabulary(lm.tokenizer).pieces):
        text = piece.decode("utf-8", "replace")
        word = text[1:]
        if text[:1] == " " and SHORTEST_WORD <= len(word) <= LONGEST_WORD and word.isascii() and word.isalpha() and word.islower():
            found.append((token, text))
    start = lm.token_ids("a")
    return [text for token, text in found if lm.token_ids("a" + text) == [*start, token]]


def _prompts(
    lm: LanguageModel, task: str, corruption: str, metric: MetricName, found: dict[Pair, Encoded], dropped: Counter[str]
) -> Prompts:
    if not found:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "too few words of one token"
        raise InputError(f"expected pairs of the task {task} that fit {lm.name!r}, found none ({why}); give another task or model")
    encoded = list(found.values())
    width = max(max(len(one.clean), len(one.corrupt)) for one in encoded)
    sides = [[getattr(one, name) for one in encoded] for name in ("clean", "corrupt")]
    ids = [torch.tensor([[lm.pad_id] * (width - len(row)) + row for row in side]) for side in sides]
    masks = [torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in side]) for side in sides]
    aligned_np = torch.arange(width).repeat(len(encoded), 1)
    for row, one in enumerate(encoded):
        aligned_np[row, width - len(one.clean) :] = torch.tensor(one.aligned) + width - len(one.corrupt)
    piece_np = torch.full_like(ids[0], -1)
    for row, one in enumerate(encoded):
        piece_np[row, width - len(one.clean) :] = torch.tensor(one.pieces)
    of_logits = metric == "logit_difference"
    answers = [
        (row, token, sign / (len(side) if of_logits else 1))
        for row, one in enumerate(encoded)
        for sign, side in ((1, one.right), (-1, one.wrong))
        for token in side
    ]
    pair_a, token_a, weight_a = zip(*answers)
    device = lm.device
    return Prompts(
        task,
        corruption,
        metric,
        tuple(found),
        ids[0].to(device),
        masks[0].to(device),
        ids[1].to(device),
        masks[1].to(device),
        aligned_np.to(device),
        torch.tensor(pair_a, device=device),
        torch.tensor(token_a, device=device),
        torch.tensor(weight_a, dtype=torch.float64, device=device),
        dict(dropped.most_common()),
        piece_np.to(device) if piece_np.max() > 0 else None,
    )
