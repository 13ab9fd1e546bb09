"""Shared state of the server's routes: the index with its notes, model and queues, and the parsing of parameters."""

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sae.errors import InputError
from sae.features.browser.query import Query, Tables, finite
from sae.features.browser.turns import Turns
from sae.features.index.reader import FeatureIndex
from sae.features.notes import Notes
from sae.model.sampling import Sampling

if TYPE_CHECKING:
    from starlette.requests import Request

    from sae.dictionaries.dictionary import Dictionary
    from sae.features.browser.prompt import Reading
    from sae.model.language_model import LanguageModel
LONGEST_PROMPT = 2_000  # characters
MOST_STEERED = 8  # features together
T = TypeVar("T")


Steering: TypeAlias = Callable[[str, Sequence[tuple[int, float]], Sampling], Generator[dict[str, Any], None, None]]
Ranges: TypeAlias = Callable[[int], Generator[dict[str, Any] | None, None, None]]
"""the range of a feature: yields None after every step, between which others may use the model, then the result"""


class NotThere(InputError):
    """The URL names something that does not exist: status 404."""


class Browser:
    """Shared state of the routes."""

    def __init__(
        self,
        index: FeatureIndex,
        notes: Notes,
        lm: "LanguageModel | None",
        dictionary: "Dictionary | None",
        steering: Steering | None,
        ranges: Ranges | None = None,
    ):
        from sae.features.explanations.explanation import read_explanations

        self.index, self.notes, self.lm, self.dictionary, self.steering = index, notes, lm, dictionary, steering
        self.ranges = ranges
        self.explanations = read_explanations(index.folder)
        self.tables = Tables(index, notes)
        self.model, self.searches = Turns("the model", "prompt", "steer", "range"), Turns("the search through the index", "search")
        notes.update_search(index, self.explanations)

    def require(self, j: int) -> None:
        if not 0 <= j < self.index.d_sae:
            raise NotThere(f"feature {j} does not exist: the dictionary has features 0 to {self.index.d_sae - 1}")

    async def with_list(self, request: "Request", query: Query, make: Callable[[], T]) -> T:
        """`make()` in a thread; a list that needs a search through the whole index first waits for its turn."""
        from starlette.concurrency import run_in_threadpool

        if self.tables.remembers(query):
            return await run_in_threadpool(make)
        async with self.searches.turn("search", request):
            return await run_in_threadpool(make)

    async def read(self, request: "Request", params: dict[str, str], n: int) -> "Reading | None":
        """The prompt of a URL, when the model is free; None if there is none."""
        from starlette.concurrency import run_in_threadpool

        from sae.features.browser.prompt import Selection, read_prompt

        text = params.get("text", "")
        if not text:
            return None
        if self.lm is None or self.dictionary is None:
            raise InputError("expected a model to read the text with, but the server was started with --model none")
        if len(text) > LONGEST_PROMPT:
            raise InputError(f"expected a text of at most {LONGEST_PROMPT:,} characters, got {len(text):,}")
        density = params.get("density_max", "")
        order: Any = params.get("order") or "activation"
        positions = [whole("t", part) for part in params.get("t", "").split(",") if part] or None
        density_max = finite("density_max", density) if density else None
        async with self.model.turn("prompt", request):
            selection = Selection(order, positions, n, density_max)
            return await run_in_threadpool(read_prompt, self.lm, self.dictionary, self.index, text, selection)


def browser_of(request: "Request") -> Browser:
    return request.app.state.browser


def feature_of(request: "Request") -> int:
    """The feature that the path names. Raises `NotThere` for one that does not exist."""
    text = request.path_params["j"]
    if digits(text.removeprefix("-")) is None:
        raise NotThere(f"expected a whole number in the URL, got {text[:40]!r}")
    browser_of(request).require(int(text))
    return int(text)


def sampling(params: Any) -> Sampling:
    """From a URL or a request body. Raises `InputError` for values that sampling cannot use."""
    default = Sampling()
    given = {name: params.get(name) for name in vars(default) if params.get(name) not in (None, "")}
    tokens, seed = (whole(name, str(given.get(name, getattr(default, name)))) for name in ("max_new_tokens", "seed"))
    temperature, top_p = (finite(name, str(given.get(name, getattr(default, name)))) for name in ("temperature", "top_p"))
    if not (1 <= tokens <= 1000 and 0 <= temperature <= 10 and 0 < top_p <= 1 and 0 <= seed < 1 << 32):
        raise InputError(
            "expected 1 to 1000 new tokens, a temperature from 0 to 10, top_p above 0 and up to 1, and a seed from 0 to 2^32 - 1, "
            f"got {tokens}, {temperature:g}, {top_p:g} and {seed}"
        )
    return Sampling(max_new_tokens=tokens, temperature=temperature, top_p=top_p, seed=seed)


def digits(text: str) -> int | None:
    """The number written with digits only; None for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 12 else None


def whole(name: str, text: str) -> int:
    """A whole number from a URL parameter. Raises `InputError` that names the parameter."""
    if digits(text.strip().removeprefix("-")) is None:
        raise InputError(f"expected a whole number as {name}, got {text[:40]!r}")
    return int(text)
