"""Tasks: what each pair says, read out of its texts by other code than the generators; equal seeds, and own pairs from a file."""

import json
import re
from random import Random

import pytest

from sae.errors import InputError
from steering.circuits.tasks.generators import TASKS, Pair, corruption_of, read_pairs

WORDS = [f" {a}{b}{c}" for a in "bdfglm" for b in "aeiou" for c in "nrst"]


def pairs(task: str, corruption: str, n: int = 60) -> list[Pair]:
    rng = Random(5)
    return [pair for _ in range(n) if (pair := TASKS[task].make(rng, corruption, WORDS))]


def texts(pair: Pair) -> tuple[str, str]:
    return "".join(pair.clean), "".join(pair.corrupt)


EACH = [(task, corruption) for task in TASKS for corruption in TASKS[task].corruptions]


@pytest.mark.parametrize(("task", "corruption"), EACH)
def test_equal_seeds_give_equal_pairs_and_the_sides_differ(task, corruption):
    assert pairs(task, corruption) == pairs(task, corruption)
    found = pairs(task, corruption)
    assert len(set(found)) > 20
    for pair in found:
        clean, corrupt = texts(pair)
        assert clean != corrupt
        assert not set(pair.right) & set(pair.wrong)
        assert all(pair.right)
        assert all(pair.wrong)
        assert "{" not in clean + corrupt


@pytest.mark.parametrize("corruption", TASKS["ioi"].corruptions)
def test_ioi_the_name_that_stands_once_is_right(corruption):
    for pair in pairs("ioi", corruption):
        clean, corrupt = texts(pair)
        (right,), (wrong,) = pair.right, pair.wrong
        count = {name: len(re.findall(rf"\b{name.strip()}\b", clean)) for name in (right, wrong)}
        assert count == {right: 1, wrong: 2}
        names = {name: len(re.findall(rf"\b{name.strip()}\b", corrupt)) for name in (right, wrong)}
        assert names == {"swap": {right: 2, wrong: 1}, "third": {right: 1, wrong: 1}, "abc": {right: 0, wrong: 0}}[corruption]


def test_both_orders_of_names_are_drawn():
    orders = {texts(pair)[0].find(pair.right[0].strip()) < texts(pair)[0].find(pair.wrong[0].strip()) for pair in pairs("ioi", "swap")}
    assert orders == {True, False}


def test_greater_than_splits_the_years():
    for pair in pairs("greater-than", "01"):
        year = int(re.findall(r"\d{4}", texts(pair)[0])[0][2:])
        assert sorted(map(int, pair.right)) == list(range(year + 1, 100))
        assert sorted(map(int, pair.wrong)) == list(range(year + 1))
        assert re.findall(r"\d{4}", texts(pair)[1])[0][2:] == "01"


def test_agreement_changes_the_number_of_one_noun_and_an_attractor_has_the_other():
    for task in ("agreement", "agreement-attractor"):
        for pair in pairs(task, "number"):
            clean, corrupt = (text.split() for text in texts(pair))
            ((one, other),) = [(a, b) for a, b in zip(clean, corrupt) if a != b]
            plural = len(one) > len(other) or one in ("men", "women")
            assert (" are" in pair.right) == plural
            assert (" is" in pair.wrong) == plural
            if task == "agreement":
                assert clean[-1] == one
            else:
                assert clean[-1].endswith("s") != plural or clean[-1] in ("men", "women", "children")


def test_pronouns_follow_the_person():
    she = {"girl", "woman", "mother", "princess", "queen", "sister"}
    for pair in pairs("pronoun", "gender"):
        clean, corrupt = (set(re.findall(r"\w+", text)) for text in texts(pair))
        assert (pair.right == (" she",)) == bool(clean & she) == (not corrupt & she)
        assert {*pair.right, *pair.wrong} == {" she", " he"}


def test_induction_repeats_the_block_and_corrupt_holds_the_wrong_word():
    for corruption in TASKS["induction"].corruptions:
        for pair in pairs("induction", corruption):
            clean, corrupt = (text.split() for text in texts(pair))
            again = len(clean) - 10
            assert clean[:again] == clean[10:]
            assert pair.right == (" " + clean[again],)
            assert pair.wrong == (" " + corrupt[again],)
            assert clean[10:] == corrupt[10:]
            assert sum(a != b for a, b in zip(clean, corrupt)) == (1 if corruption == "swap" else 10)
    assert TASKS["induction"].make(Random(0), "swap", WORDS[:19]) is None


def test_the_docstrings_function_is_python_with_the_answer_third():
    for corruption in TASKS["docstring"].corruptions:
        for pair in pairs("docstring", corruption):
            heads = [re.search(r"\(self, (.*)\):", text)[1].split(", ") for text in texts(pair)]
            assert pair.right == (" " + heads[0][2],)
            assert pair.wrong == (" " + heads[1][2],)
            assert texts(pair)[0].endswith(f":param {heads[0][1]}: " + texts(pair)[0].rsplit(": ", 1)[1])
            assert sum(a != b for a, b in zip(*heads)) == (1 if corruption == "swap" else 4)


def test_facts_are_of_one_relation():
    table = {" ".join(texts(pair)[0].split()): pair.right[0] for pair in pairs("fact", "swap", 600)}
    assert table["The capital of France is"] == " Paris"
    assert table["The opposite of hot is"] == " cold"
    for pair in pairs("fact", "swap"):
        clean, corrupt = (text.split() for text in texts(pair))
        assert sum(a != b for a, b in zip(clean, corrupt)) == 1


def test_unknown_names_are_refused():
    assert corruption_of("ioi", None) == "swap"
    with pytest.raises(InputError, match="one of ioi, greater-than"):
        corruption_of("iou", None)
    with pytest.raises(InputError, match="one of swap, third, abc, got 'flip'"):
        corruption_of("ioi", "flip")


GOOD = {"clean": "a b", "corrupt": "a c", "right": " d", "wrong": [" e", " f"]}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_own_pairs(tmp_path):
    pieces = {"clean": ["a", " b b"], "corrupt": ["a", " b"], "right": " d", "wrong": " e", "note": "two pieces"}
    found = read_pairs(write(tmp_path / "pairs.jsonl", GOOD, "", pieces))
    assert found == [
        Pair(("a b",), ("a c",), (" d",), (" e", " f")),
        Pair(("a", " b b"), ("a", " b"), (" d",), (" e",)),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 3 of .* not valid JSON"),
        ({**GOOD, "right": 5}, "line 3 of .*'right"),
        ({key: GOOD[key] for key in ("clean", "corrupt", "right")}, "line 3 of .*'wrong' is missing"),
        ({**GOOD, "answer": "d"}, "line 3 of .*got 'answer'; remove it"),
        ({**GOOD, "right": []}, "not empty in line 3"),
        ({**GOOD, "clean": ""}, "not empty in line 3"),
        ({**GOOD, "clean": ["a", "b"]}, "as many pieces of clean as of corrupt in line 3 of .*2 and 1"),
        ({**GOOD, "right": " e"}, "in line 3 of .*' e' in both"),
        ({**GOOD, "corrupt": GOOD["clean"]}, "a corrupt prompt other than the clean one in line 3 of"),
    ],
)
def test_a_bad_line_is_one_sentence_that_names_it(tmp_path, row, said):
    with pytest.raises(InputError, match=said) as caught:
        read_pairs(write(tmp_path / "pairs.jsonl", GOOD, "", row))
    assert "\n" not in str(caught.value)


def test_a_file_without_a_line_is_refused(tmp_path):
    with pytest.raises(InputError, match="found no line"):
        read_pairs(write(tmp_path / "pairs.jsonl", ""))
