"""Tasks for finding circuits: pairs of prompts that differ in the part that decides the answer, drawn with a seed.

The words of the tasks are in `steering/circuits/tasks/data/`; docs/circuit_tasks.md says what each task asks.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from typing_extensions import NotRequired, TypedDict

from sae.disk.reading import parse_json, read_bytes, read_json
from sae.errors import InputError

DATA = Path(__file__).with_name("data")
OWN = "own"
"""the name of a task whose pairs come from a file"""

MetricName = Literal["logit_difference", "probability_difference"]


class Pair(NamedTuple):
    """Two prompts, and right and wrong continuations of the clean one."""

    clean: tuple[str, ...]
    """the prompt; in several pieces where the corrupt one has other numbers of tokens, piece n standing where its piece n does"""
    corrupt: tuple[str, ...]
    right: tuple[str, ...]
    """what follows the clean prompt, from its first letter on, as " Mary" """
    wrong: tuple[str, ...]


class Task(NamedTuple):
    asks: str
    make: Callable[[Random, str, Sequence[str]], Pair | None]
    """from a random generator, a corruption and the model's one-token words to a pair; None for a draw that makes no pair"""
    corruptions: dict[str, str]
    """descriptions of the corrupt prompts, by name; the first is the default"""
    metric: MetricName = "logit_difference"


class Line(TypedDict):
    """A row of a file with pairs."""

    clean: str | list[str]
    corrupt: str | list[str]
    right: str | list[str]
    wrong: str | list[str]
    note: NotRequired[str]


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a .jsonl file, each line {"clean", "corrupt", "right", "wrong"}, texts or lists of them; "note" is let through.

    A list of clean is pieces of one prompt, each standing where the corrupt prompt's piece does; a list of right or wrong is several
    answers. Raises `InputError`, which names the line, for one that does not fit, and for a file without a line.
    """
    pairs: list[Pair] = []
    for number, line in enumerate(read_bytes(path, "pairs of prompts").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        row = parse_json(line, f"a pair in {where}", Line)
        if unknown := sorted(set(row) - set(Line.__annotations__)):
            raise InputError(f"expected the keys {', '.join(Line.__annotations__)} in {where}, got {unknown[0]!r}; remove it")
        sides = [_texts(row[key]) for key in Pair._fields]
        if not all(side and all(side) for side in sides):
            raise InputError(f"expected texts that are not empty in {where}, got an empty one; fill it or remove the line")
        if len(sides[0]) != len(sides[1]):
            raise InputError(f"expected as many pieces of clean as of corrupt in {where}, got {len(sides[0])} and {len(sides[1])}")
        if sides[0] == sides[1]:
            raise InputError(f"expected a corrupt prompt other than the clean one in {where}, got the same; change one or remove the line")
        if both := set(sides[2]) & set(sides[3]):
            raise InputError(f"expected other texts as wrong than as right in {where}, got {min(both)!r} in both; remove it from one")
        pairs.append(Pair(*sides))
    if not pairs:
        raise InputError(f"expected pairs in {path}, found no line; write at least one")
    return pairs


def _texts(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def corruption_of(task: str, corruption: str | None) -> str:
    """The corruption, or the task's default for None. Raises `InputError` for a task or a corruption that does not exist."""
    if task not in TASKS:
        raise InputError(f"expected a task, one of {', '.join(TASKS)}, got {task!r}")
    known = TASKS[task].corruptions
    if corruption is not None and corruption not in known:
        raise InputError(f"expected a corruption of the task {task}, one of {', '.join(known)}, got {corruption!r}")
    return corruption or next(iter(known))


@cache
def _data(name: str) -> dict[str, Any]:
    return read_json(DATA / f"{name}.json", "the words of a task")


def _pair(clean: str, corrupt: str, right: Sequence[str], wrong: Sequence[str]) -> Pair:
    return Pair((clean,), (corrupt,), tuple(right), tuple(wrong))


def _ioi(rng: Random, corruption: str, words: Sequence[str]) -> Pair:
    data = _data("ioi")
    template, place, item = (rng.choice(data[key]) for key in ("templates", "places", "objects"))
    *both, third = rng.sample(data["names"], 3)
    giver, taker = rng.sample(both, 2)

    def prompt(a: str, b: str, s: str) -> str:
        return template.format(a=a, b=b, s=s, place=place, object=item)

    a, b = both
    if corruption == "abc":
        corrupt = prompt(*rng.sample([name for name in data["names"] if name not in both], 3))
    else:
        corrupt = prompt(a, b, taker if corruption == "swap" else third)
    return _pair(prompt(a, b, giver), corrupt, [" " + taker], [" " + giver])


def _greater_than(rng: Random, corruption: str, words: Sequence[str]) -> Pair:
    data = _data("greater-than")
    template, noun, century = (rng.choice(data[key]) for key in ("templates", "nouns", "centuries"))
    year = rng.randint(2, 98)

    def prompt(year: int) -> str:
        return template.format(noun=noun, century=century, year=f"{year:02d}")

    years = [f"{number:02d}" for number in range(100)]
    return _pair(prompt(year), prompt(1), years[year + 1 :], years[: year + 1])


def _agreement(rng: Random, corruption: str, words: Sequence[str], attractor: bool = False) -> Pair:
    data = _data("agreement")
    template = rng.choice(data["attractor_templates" if attractor else "templates"])
    noun, other = rng.sample(data["nouns"], 2)
    number = rng.randrange(2)  # of the clean noun: 0 singular, 1 plural
    verbs = (data["singular"], data["plural"])

    def prompt(at: int) -> str:
        return template.format(noun=noun[at], other=other[1 - number])

    return _pair(prompt(number), prompt(1 - number), verbs[number], verbs[1 - number])


def _attractor(rng: Random, corruption: str, words: Sequence[str]) -> Pair:
    return _agreement(rng, corruption, words, attractor=True)


def _pronoun(rng: Random, corruption: str, words: Sequence[str]) -> Pair:
    data = _data("pronoun")
    template, nouns, adjective, verb = (rng.choice(data[key]) for key in ("templates", "nouns", "adjectives", "verbs"))
    names = [rng.choice(side) for side in data["names"]]
    at = rng.randrange(2)  # 0 she, 1 he

    def prompt(at: int) -> str:
        return template.format(noun=nouns[at], name=names[at], adjective=adjective, verb=verb)

    return _pair(prompt(at), prompt(1 - at), data["answers"][at], data["answers"][1 - at])


def _induction(rng: Random, corruption: str, words: Sequence[str]) -> Pair | None:
    length = 10
    if len(words) < 2 * length:
        return None
    block, (other, *others) = (drawn := rng.sample(words, 2 * length))[:length], drawn[length:]
    at = rng.randint(2, length - 1)  # not the first two, so that the word before the answer has one before it
    changed = [*block[:at], other, *block[at + 1 :]] if corruption == "swap" else [*others, other]
    if corruption == "random":
        other = changed[at]
    return _pair("".join(block + block[:at]), "".join(changed + block[:at]), [block[at]], [other])


def _docstring(rng: Random, corruption: str, words: Sequence[str]) -> Pair:
    data = _data("docstring")
    method, texts = rng.choice(data["methods"]), {key: " ".join(rng.sample(data["words"], 3)) for key in "xyz"}
    *arguments, other = rng.sample(data["arguments"], 5)
    more = rng.sample([name for name in data["arguments"] if name not in (*arguments, other)], 3)

    def prompt(a: str, b: str, c: str, d: str) -> str:
        return data["template"].format(method=method, a=a, b=b, c=c, d=d, **texts)

    a, b, _, d = arguments
    corrupt = prompt(a, b, other, d) if corruption == "swap" else prompt(more[0], more[1], other, more[2])
    return _pair(prompt(*arguments), corrupt, [" " + arguments[2]], [" " + other])


def _fact(rng: Random, corruption: str, words: Sequence[str]) -> Pair:
    relation = rng.choice(_data("fact")["relations"])
    template, ((x, right), (y, wrong)) = rng.choice(relation["templates"]), rng.sample(relation["facts"], 2)
    return _pair(template.format(x=x), template.format(x=y), [" " + right], [" " + wrong])


TASKS: dict[str, Task] = {
    "ioi": Task(
        "who gets the object: two names, one of which gives; the other is right",
        _ioi,
        {
            "swap": "the other one of the two gives, so that the answers change places (the default of MIB)",
            "third": "a third name gives",
            "abc": "three other names",
        },
    ),
    "greater-than": Task(
        "a year of the same century that is later than the first",
        _greater_than,
        {"01": "the first year ends in 01, so that every year is later"},
        "probability_difference",
    ),
    "agreement": Task("a verb in the number of the noun before it", _agreement, {"number": "the noun in the other number"}),
    "agreement-attractor": Task(
        "a verb in the number of its noun, after a second noun of the other number",
        _attractor,
        {"number": "the verb's noun in the other number"},
    ),
    "pronoun": Task("she or he, as the person before it", _pronoun, {"gender": "a person of the other gender"}),
    "induction": Task(
        "ten random words, their beginning once more: the word that followed",
        _induction,
        {"swap": "another word in the answer's place", "random": "ten other words first"},
    ),
    "docstring": Task(
        "the third argument of a function in its docstring",
        _docstring,
        {"swap": "another third argument in the function's head", "random": "other arguments in the function's head"},
    ),
    "fact": Task("a capital, a language or an opposite", _fact, {"swap": "another country or word"}),
}
