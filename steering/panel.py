"""The browser's steering panel, and the command that starts the browser with it: `sae` itself knows nothing of steering.

s sequences, here one · p positions
"""

import codecs
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.features.browser.serve import BrowseConfig, serve
from sae.features.index.reader import FeatureIndex
from sae.model.language_model import LanguageModel, NonFiniteLogits
from sae.model.sampling import Sampling
from sae.model.vocabulary import Vocabulary, vocabulary
from steering.breakdown.working_range import RangeFinder, WorkingRange
from steering.directions.feature import feature_direction
from steering.intervention import steered
from steering.strength.measure import continuation_loss

SIDES = ("unsteered", "steered")


def browse(config: BrowseConfig) -> None:
    """Starts the feature browser, and with a model also its steering panel."""
    serve(config, make_steering, make_ranges)


def make_steering(
    lm: LanguageModel, dictionary: Dictionary, index: FeatureIndex
) -> Callable[[str, Sequence[tuple[int, float]], Sampling], Generator[dict[str, Any], None, None]]:
    """The function that the server calls, for one model and dictionary."""
    vocab = vocabulary(lm.tokenizer, lm.model.get_input_embeddings().num_embeddings)

    def steer(prompt: str, features: Sequence[tuple[int, float]], sampling: Sampling) -> Generator[dict[str, Any], None, None]:
        """Two texts in pieces as they are written, without and with Σ strength · maximum activation · decoder row added at every position.

        Both sides draw with the same random numbers, so that at strength 0 they are equal. Yields {"side", "text"} for each piece, and
        for each side at the end {"side", "nats_per_token"} (under the unsteered model) or {"side", "failure"}, a sentence. Raises
        `InputError` before the first piece for a feature that does not exist or never fires, or a prompt beyond the context.
        """
        vectors = []
        for j, strength in features:
            vectors.append((feature_direction(dictionary, j, index.feature(j).maximum, index.info["site"]), strength))
        ids_sp, mask_sp = lm.encode([prompt])
        if sampling.max_new_tokens >= lm.context:
            raise InputError(f"expected fewer than {lm.context} new tokens, the context of {lm.name!r}, got {sampling.max_new_tokens}")
        if ids_sp.shape[1] + sampling.max_new_tokens > lm.context:
            raise InputError(
                f"expected a prompt of at most {lm.context - sampling.max_new_tokens} tokens before {sampling.max_new_tokens} new ones, "
                f"got {ids_sp.shape[1]}; shorten it or write less"
            )
        return _both_sides(lm, vocab, ids_sp, mask_sp, vectors, sampling)

    return steer


def make_ranges(
    lm: LanguageModel, dictionary: Dictionary, index: FeatureIndex
) -> Callable[[int], Generator[dict[str, Any] | None, None, None]]:
    """Returns a function that finds up to which strengths a feature works, for one model and dictionary; it caches its results."""
    finder: RangeFinder | None = None
    known: dict[int, dict[str, Any]] = {}

    def ranges(j: int) -> Generator[dict[str, Any] | None, None, None]:
        """None after each pass of the model, then {"feature", "up", "down", "sentence", "details"}, or {"feature", "why"} where there is
        no range.

        "up" and "down" are the `WorkingRange` above and below 0, in multiples of the maximum activation, each counted from 0 upwards.
        """
        nonlocal finder
        if j not in known:
            try:
                vector = feature_direction(dictionary, j, index.feature(j).maximum, index.info["site"])
                if finder is None:
                    finder = RangeFinder(lm, vector.site)
                    yield None
                found = []
                for signed in (vector, -vector):
                    passes = finder.passes(signed)
                    found.append((yield from passes))
                up, down = found
                known[j] = {"feature": j, "up": up._asdict(), "down": down._asdict(), **range_words(up, down)}
            except InputError as reason:
                known[j] = {"feature": j, "why": str(reason)}
        yield known[j]

    return ranges


def range_words(up: WorkingRange, down: WorkingRange) -> dict[str, str]:
    """Both ends of a feature's range in plain words: a sentence, and the details after it."""

    def end(side: WorkingRange, sign: str) -> str:
        return f"{sign}{side.tried:.2g} and further" if side.coefficient is None else f"{sign}{side.coefficient:.2g}"

    sides = [("above", up, ""), ("below", down, "−")]
    details = [f"{where} {sign}{side.coefficient:.2g}, {side.beyond}" for where, side, sign in sides if side.coefficient is not None]
    unusual = [f"{where} {sign}{side.unusual:.2g}" for where, side, sign in sides if side.unusual is not None]
    if unusual:
        details.append(f"{' and '.join(unusual)}, most tokens are unlike those of plain text, which text survives")
    beyond = "; beyond, the text usually breaks" if up.coefficient is not None or down.coefficient is not None else ""
    return {"sentence": f"works from about {end(down, '−')} to {end(up, '')}{beyond}", "details": "; ".join(details)}


def _both_sides(
    lm: LanguageModel, vocab: Vocabulary, ids_sp: Tensor, mask_sp: Tensor, vectors: list[Any], sampling: Sampling
) -> Generator[dict[str, Any], None, None]:
    streams = {side: lm.stream(ids_sp, mask_sp, **vars(sampling)) for side in SIDES}
    decoders = {side: codecs.getincrementaldecoder("utf-8")("replace") for side in SIDES}
    new: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    while streams:
        for side in list(streams):
            try:
                with ExitStack() as stack:
                    if side == "steered" and vectors:
                        stack.enter_context(steered(lm, vectors))
                    next_s = next(streams[side])
            except StopIteration:
                del streams[side]
                yield {"side": side, "text": decoders[side].decode(b"", True), **_readability(lm, ids_sp, new[side])}
                continue
            except (NonFiniteLogits, OverflowError) as error:
                del streams[side]
                cause = "the strength is more than the model's arithmetic can carry" if side == "steered" else "the model fails by itself"
                yield {"side": side, "failure": f"No text: {error}; {cause}."}
                continue
            new[side].append(next_s)
            token = int(next_s)  # host sync
            yield {"side": side, "text": "" if vocab.special[token] else decoders[side].decode(vocab.pieces[token])}


def _readability(lm: LanguageModel, ids_sp: Tensor, new: list[Tensor]) -> dict[str, Any]:
    return {"nats_per_token": continuation_loss(lm, ids_sp, torch.stack(new, dim=1))} if new else {}
