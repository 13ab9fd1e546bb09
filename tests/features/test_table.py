"""Lists of features against plain Python over every feature."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qsl

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae.errors import InputError
from sae.features.browser.query import Query, Tables
from sae.features.notes import Notes

NUMBERS = ("feature", "density", "max", "mean", "fvu_contribution", "skewness", "kurtosis")


@pytest.fixture(scope="module")
def tables(world, tmp_path_factory):
    notes = Notes.open(tmp_path_factory.mktemp("table") / "notes.sqlite", world.index)
    for j, label in ((5, "beta"), (30, "Alpha"), (12, "gamma ray")):
        notes.set(j, label=label, starred=j == 12)
    for j in (30, 2, 3, 17):
        notes.add_to_list("mine", j)
    notes.update_search(world.index, {})
    yield Tables(world.index, notes)
    notes.close()


def value(index, name: str, j: int) -> float:
    return j if name == "feature" else float(index.columns[name][j])


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_sorting_by_a_number_is_that_of_python(world, tables, name, up):
    found = tables.features(Query(sort=name, up=up, dead=True)).tolist()

    def key(j: int) -> tuple:
        x = np.float32(value(world.index, name, j))
        return (math.isnan(x), 0.0 if math.isnan(x) else float(x) * (1 if up else -1), j)

    assert found == sorted(range(40), key=key)


def test_sorting_by_text(world, tables):
    assert tables.features(Query(sort="label", up=True, dead=True))[:3].tolist() == [30, 5, 12]
    assert tables.features(Query(sort="label", dead=True))[:3].tolist() == [12, 5, 30]
    top = world.index.columns["top_token"]
    spelled = [world.index.vocabulary.spelling(int(top[j])).strip().casefold() for j in tables.features(Query(sort="top_token", up=True))]
    assert spelled == sorted(spelled)


bounds = st.none() | st.floats(0, 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bounds, bounds, bounds, bounds, st.sampled_from(["", "e", " ", "a", "<"]), st.booleans(), st.booleans(), st.booleans())
def test_filters_are_those_of_python(world, tables, density_min, density_max, low, high, token, starred, labelled, dead):
    columns, top = world.index.columns, float(world.index.columns["max"].max())
    max_min, max_max = (None if x is None else x * top for x in (low, high))
    query = Query(
        density_min=density_min, density_max=density_max, max_min=max_min, max_max=max_max, token=token, starred=starred,
        labelled=labelled, dead=dead, sort="feature", up=True,
    )  # fmt: skip
    notes = tables.notes.all()

    def kept(j: int) -> bool:
        density, highest = float(columns["density"][j]), float(columns["max"][j])
        spelled = world.index.vocabulary.spelling(int(columns["top_token"][j])) if columns["count"][j] else ""
        return (  # a bound counts in the precision of the column: 0.1 keeps what is stored for 0.1
            (dead or columns["count"][j] > 0)
            and (density_min is None or density >= np.float32(density_min))
            and (density_max is None or density <= np.float32(density_max))
            and (max_min is None or highest >= np.float32(max_min))
            and (max_max is None or highest <= np.float32(max_max))
            and (not token or token in spelled.casefold())
            and (not starred or (j in notes and notes[j].starred))
            and (not labelled or (j in notes and bool(notes[j].label)))
        )

    assert tables.features(query).tolist() == [j for j in range(40) if kept(j)]


def test_an_address_says_the_query_and_nothing_else(tables):
    query = Query(q="a&b=c", how="fires", sort="mean", up=True, density_max=0.015, token=" <script>", list="mine", starred=True)
    assert Query.read(dict(parse_qsl(query.params()))) == query
    assert Query().params() == ""
    assert Query(fvu_max=0.0, max_min=-0.0).params() == "max_min=-0&fvu_max=0"  # a limit of 0 is one
    assert Query.read({"page": "3", "at": "7", "sort": ""}) == Query()


def test_lists_and_searches_keep_their_order(world, tables):
    assert tables.features(Query(list="mine")).tolist() == [30, 2, 3, 17]
    assert tables.features(Query(list="mine", up=True)).tolist() == [17, 3, 2, 30]
    assert tables.features(Query(list="mine", sort="feature", up=True)).tolist() == [2, 3, 17, 30]
    assert tables.features(Query(q="zebrafly", how="fires")).tolist() == [hit.feature for hit in world.index.search("zebrafly", 40)]
    assert tables.features(Query(q="the", how="promotes")).tolist() == [hit.feature for hit in world.index.promotes("the", 40)]
    assert tables.features(Query(q="gamma")).tolist() == [12]
    assert tables.features(Query(q="alpha", list="mine")).tolist() == [30]


def test_a_change_of_the_notes_is_seen_at_once(tables):
    assert tables.features(Query(label="fresh")).tolist() == []
    tables.notes.set(9, label="fresh")
    assert tables.features(Query(label="FRESH")).tolist() == [9]
    tables.notes.set(9, label="")


def test_a_change_by_another_program_is_seen_too(world, tables):
    assert tables.features(Query(starred=True, list="mine")).tolist() == []
    other = Notes.open(tables.notes.path, world.index)
    other.set(3, starred=True)
    assert tables.features(Query(starred=True, list="mine")).tolist() == [3]
    other.set(3, starred=False)
    other.close()
    assert tables.features(Query(starred=True, list="mine")).tolist() == []


@pytest.mark.parametrize("how", ["fires", "promotes"])
def test_one_search_runs_at_a_time_and_none_twice(world, tables, monkeypatch, how):
    tables = Tables(world.index, tables.notes)
    name = "search" if how == "fires" else "promotes"
    real, running, most, asked, lock = getattr(world.index, name), 0, 0, [], threading.Lock()

    def counted(word, n):
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
            asked.append(word)
        time.sleep(0.01)
        hits = real(word, n)
        with lock:
            running -= 1
        return hits

    monkeypatch.setattr(world.index, name, counted)
    words = ["zebrafly", "the", "done", "zebrafly|the"]
    with ThreadPoolExecutor(24) as pool:
        lists = list(pool.map(lambda word: tables.features(Query(q=word, how=how)).tolist(), words * 6))
    assert lists == [[hit.feature for hit in real(word, 40)] for word in words] * 6
    assert most == 1
    assert sorted(asked) == sorted(words)
    tables.notes.set(9, starred=True)  # a change of the notes is no reason to search again
    tables.features(Query(q="zebrafly", how=how))
    tables.notes.set(9, starred=False)
    assert len(asked) == len(words)
    assert tables.remembers(Query(q="zebrafly", how=how))
    assert not tables.remembers(Query(q="quick", how=how))


@pytest.mark.parametrize(
    ("kept", "asked"), [("don't", "don’t"), ("don’t", "don't"), ("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")]
)
def test_spellings_of_a_word_find_each_other_in_labels_and_lists(tables, kept, asked):
    tables.notes.set(21, label=f"we {kept} know")
    tables.notes.add_to_list(f"{kept} list", 21)
    try:
        for query in (Query(q=asked), Query(label=asked), Query(list=f"{asked} list")):
            assert tables.features(query).tolist() == [21]
        assert tables.features(Query(q=f"{asked} kn")).tolist() == [21]
        assert tables.features(Query(q="don't xyz")).tolist() == []
    finally:
        tables.notes.set(21, label="")
        for name in tables.notes.lists():
            if name != "mine":
                tables.notes.remove_from_list(name)


def test_spellings_find_each_other_in_top_tokens_and_explanations(world, tables, monkeypatch):
    class Said:
        text = "fires on don’t and cafe\u0301"

    tables.notes.update_search(world.index, {13: [Said()]})
    monkeypatch.setattr(tables.notes, "_source", (f"another {Said.text}", tables.notes._source[1]))  # the words are made again
    assert tables.notes.search("don't") == tables.notes.search("caf\u00e9") == [13]
    pieces = list(world.index.vocabulary.pieces)
    top = int(world.index.columns["top_token"][9])
    for written, asked in (("cafe\u0301", "caf\u00e9"), ("don’t", "don't"), ("caf\u00e9", "cafe\u0301")):
        pieces[top] = written.encode()
        monkeypatch.setattr(world.index, "vocabulary", world.index.vocabulary._replace(pieces=pieces))
        fresh = Tables(world.index, tables.notes)
        assert 9 in fresh.features(Query(token=asked, dead=True))
        lens = int(world.index.columns["top_token_ids"][9, 0])
        pieces[lens] = written.encode()
        assert 9 in fresh.features(Query(q=asked, how="promotes"))


@pytest.mark.parametrize(
    "params",
    [
        {"sort": "colour"},
        {"how": "magic"},
        {"max_min": "high"},
        {"density_max": "nan"},
        {"list": "none such"},
        {"sort": "match"},
        {"q": "quokka", "how": "fires"},
    ],
)
def test_an_address_that_cannot_be_meant_is_refused(tables, params):
    with pytest.raises(InputError):
        tables.features(Query.read(params))
