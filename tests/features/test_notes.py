"""Labels, stars, notes and lists: what is kept, what survives, what is found, what is refused."""

import json
import os
import re
import shutil
import sqlite3
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae.errors import InputError
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import FeatureIndex
from sae.features.notes import Note, Notes

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture
def notes(world, tmp_path):
    opened = Notes.open(tmp_path / "notes.sqlite", world.index)
    yield opened
    opened.close()


def test_what_is_set_is_there_again_after_reopening(world, notes):
    assert notes.get(7) == Note()
    notes.set(7, label="  curse   words ", note="line one\r\nline two 🦓", starred=True)
    notes.set(7, label="swearing")  # the rest stays
    for name, feature in (("good", 9), ("good", 7), ("odd", 7), ("good", 9)):
        notes.add_to_list(name, feature)
    notes.close()
    again = Notes.open(notes.path, world.index)
    assert again.get(7) == Note("swearing", "line one\nline two 🦓", True)
    assert again.all() == {7: again.get(7)}
    assert again.lists() == {"good": [9, 7], "odd": [7]}
    again.remove_from_list("good", 9)
    again.remove_from_list("odd")
    assert again.lists() == {"good": [7]}
    again.set(7, label="", note="", starred=False)
    assert again.all() == {}
    again.close()


def test_a_rebuild_of_the_index_leaves_them_and_another_dictionary_has_its_own(world, tmp_path):
    def build() -> FeatureIndex:
        build_index(IndexConfig(cache=world.cache, dictionary=world.dictionary_folder, out=tmp_path / "index", device="cpu"))
        return FeatureIndex.open(tmp_path / "index")

    first = Notes.open(None, build())
    assert first.path == tmp_path / "notes.sqlite"  # beside the folder, which a rebuild replaces
    first.set(1, label="kept")
    first.close()
    index = build()
    again = Notes.open(None, index)
    assert again.get(1).label == "kept"
    again.close()
    index.info["dictionary_crc32"] = "0123abcd"
    other = Notes.open(tmp_path / "notes.sqlite", index)
    assert other.all() == {}
    other.close()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.integers(0, 39), st.tuples(TEXT, TEXT, st.booleans()), max_size=6),
    st.lists(st.tuples(TEXT, st.integers(0, 39)), max_size=6),
)
def test_an_export_read_back_is_the_same(world, tmp_path_factory, entries, listed):
    folder = tmp_path_factory.mktemp("notes")
    notes, other = (Notes.open(folder / f"{i}.sqlite", world.index) for i in range(2))
    for j, (label, note, starred) in entries.items():
        notes.set(j, label=label, note=note, starred=starred)
    for name, j in listed:
        if name.strip():
            notes.add_to_list(name, j)
    notes.export_jsonl(folder / "notes.jsonl")
    lines = [json.loads(line) for line in (folder / "notes.jsonl").read_bytes().decode().split("\n") if line]
    assert other.import_jsonl(folder / "notes.jsonl") == len(lines)
    assert other.all() == notes.all()
    assert other.lists() == notes.lists()
    notes.close()
    other.close()


def test_letters_that_other_programs_take_for_line_ends_stay_in_a_note(world, notes, tmp_path):
    note = "a\u0085b\u2028c\x0bd\x1ce"
    notes.set(1, note=note)
    notes.export_jsonl(tmp_path / "notes.jsonl")
    notes.set(1, note="")
    assert notes.import_jsonl(tmp_path / "notes.jsonl") == 1
    assert notes.get(1).note == note


def test_a_byte_order_mark_before_an_export_and_half_a_character_in_a_note_are_no_text(world, notes, tmp_path):
    notes.set(1, note="half a \ud83d")
    assert notes.get(1).note == "half a \ufffd"
    notes.export_jsonl(tmp_path / "notes.jsonl")
    (tmp_path / "marked.jsonl").write_bytes("\ufeff".encode() + (tmp_path / "notes.jsonl").read_bytes())
    notes.set(1, note="")
    assert notes.import_jsonl(tmp_path / "marked.jsonl") == 1
    assert notes.get(1).note == "half a \ufffd"


def test_a_long_list_is_imported_as_it_was_and_no_longer_one_than_is_allowed(world, notes, monkeypatch):
    monkeypatch.setattr("sae.features.notes.MOST_LISTED", 30)
    numbers = [*range(29, 9, -1), 5, 12, 5]
    lines = [json.dumps({"dictionary": notes.dictionary, "list": "a", "feature": j}) for j in numbers]
    notes.add_to_list("a", 15)
    statements = []
    notes._connection.set_trace_callback(statements.append)
    notes.import_jsonl(lines)
    notes._connection.set_trace_callback(None)
    assert sum("COUNT" in statement for statement in statements) == 1  # counted for every member, a list would take the square
    assert notes.lists() == {"a": [15, *(j for j in dict.fromkeys(numbers) if j != 15)]}
    with pytest.raises(InputError, match="'a' is full"):
        notes.import_jsonl([json.dumps({"dictionary": notes.dictionary, "list": "a", "feature": j}) for j in range(40)])
    assert len(notes.lists()["a"]) == 21


def test_an_import_is_whole_or_nothing(world, notes):
    notes.set(2, label="mine")
    good = {"dictionary": notes.dictionary, "feature": 2, "label": "theirs", "note": "", "starred": False}
    for bad in (
        "no json",
        "[]",
        "3",
        json.dumps({**good, "feature": 40}),
        json.dumps({**good, "feature": True}),
        json.dumps({**good, "feature": -1}),
        json.dumps({**good, "starred": 1}),
        json.dumps({**good, "label": "x" * 201}),
        json.dumps({**good, "dictionary": "'; DROP TABLE notes; --"}),
        json.dumps({**good, "note": "half a \ud83d"}),
        json.dumps({"dictionary": notes.dictionary, "feature": 2, "list": "\udc00"}),
        json.dumps({"dictionary": notes.dictionary, "feature": 2}),
        json.dumps({"dictionary": notes.dictionary, "feature": 2, "list": ""}),
    ):
        with pytest.raises(InputError):
            notes.import_jsonl([json.dumps(good), bad])
        assert notes.all() == {2: Note("mine")}
        assert notes.lists() == {}
    assert notes.import_jsonl([json.dumps(good), "", json.dumps({**good, "dictionary": "00000000"})]) == 2
    assert notes.all() == {2: Note("theirs")}


def test_search_finds_labels_explanations_and_top_tokens_at_once(world, notes):
    class Said:
        text = "marks naïve insects"

    notes.set(5, label="curse words")
    notes.update_search(world.index, {11: [Said()]})
    assert notes.search("curse") == [5]
    assert notes.search("CUR wor") == [5]  # beginnings, in any case
    assert notes.search("naive insect") == [11]
    assert notes.search("curse insect") == []
    notes.set(5, label="oaths")
    assert notes.search("curse") == []
    assert notes.search("oath") == [5]
    token, _ = world.index.top_tokens(9, 1)[0]
    word = next((w for w in [world.index.vocabulary.spelling(token).strip()] if w.isalnum()), None)
    if word:
        assert 9 in notes.search(word)
    notes.set(6, label="OR NOT")
    for query in ('"OR', "OR NOT (", "or* NEAR/2 not", "label: or not", "or -not"):  # FTS5's own language is not spoken
        assert isinstance(notes.search(query), list)
    assert notes.search("or not") == [6]
    with pytest.raises(InputError, match="word"):
        notes.search('"*')


def test_search_is_made_again_only_when_the_index_or_its_explanations_change(world, tmp_path, capsys):
    build_index(IndexConfig(cache=world.cache, dictionary=world.dictionary_folder, out=tmp_path / "index", device="cpu"))
    index = FeatureIndex.open(tmp_path / "index")
    notes = Notes.open(None, index)
    before = notes.version
    notes.update_search(index, {})
    made = notes.version
    assert made > before
    notes.update_search(index, {})
    assert notes.version == made
    (tmp_path / "index" / "explanations.jsonl").write_text("{}\n")
    notes.update_search(index, {})
    assert notes.version > made
    notes.close()


def test_two_indexes_of_a_dictionary_each_search_their_own_text(world, tmp_path):
    builds = [IndexConfig(cache=world.cache, dictionary=world.dictionary_folder, out=tmp_path / name, device="cpu", splits=(name,))
              for name in ("train", "held_out")]  # fmt: skip
    indexes = [FeatureIndex.open(build_index(build)) for build in builds]
    both = [Notes.open(tmp_path / "notes.sqlite", index) for index in indexes]
    for notes, index in zip(both, indexes):
        notes.update_search(index, {})
    words = [[notes.search("zebra") for notes in both] for _ in range(2)]
    assert words[0] == words[1]
    for found, index in zip(words[0], indexes):
        spelled = [" ".join(index.vocabulary.spelling(token) for token, _ in index.top_tokens(j)) for j in range(40)]
        assert sorted(found) == [j for j in range(40) if re.search(r"(?<!\w)zebra", spelled[j])]
    both[0].set(5, label="zebra crossing")
    assert all(5 in notes.search("crossing") for notes in both)
    for notes in both:
        notes.close()


def test_a_change_that_another_program_holds_up_is_told_and_the_next_one_works(world, notes, monkeypatch):
    notes._connection.execute("PRAGMA busy_timeout = 50")
    notes.set(1, label="before")
    other = sqlite3.connect(notes.path, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT * FROM notes").fetchall()  # a reader: our COMMIT has to wait for it
    with pytest.raises(InputError, match="another program or a long change holds them"):
        notes.set(2, label="lost")
    assert notes.get(2) == Note()
    other.execute("COMMIT")
    other.close()
    notes.set(3, label="kept")
    again = Notes.open(notes.path, world.index)
    assert again.all() == {1: Note("before"), 3: Note("kept")}
    again.close()


def test_several_threads_lose_nothing(notes):
    def work(base: int) -> None:
        for j in range(base, base + 8):
            notes.set(j, label=f"label {j}")
            notes.add_to_list("all", j)

    threads = [threading.Thread(target=work, args=(base,)) for base in (0, 8, 16, 24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {j: note.label for j, note in notes.all().items()} == {j: f"label {j}" for j in range(32)}
    assert sorted(notes.lists()["all"]) == list(range(32))


@pytest.mark.parametrize(
    "change",
    [
        lambda notes: notes.set(40, label="x"),
        lambda notes: notes.set(-1, label="x"),
        lambda notes: notes.set(1, label="x" * 201),
        lambda notes: notes.set(1, note="x" * 10_001),
        lambda notes: notes.set(1, starred=1),
        lambda notes: notes.add_to_list(" ", 1),
        lambda notes: notes.add_to_list("x", 40),
        lambda notes: notes.import_jsonl("/nowhere.jsonl"),
    ],
)
def test_unusable_input_is_refused_and_changes_nothing(notes, change):
    with pytest.raises(InputError):
        change(notes)
    assert notes.all() == {}
    assert notes.lists() == {}


def test_a_file_that_is_no_database_is_refused_and_kept(world, tmp_path):
    (tmp_path / "notes.sqlite").write_text("my own notes, not a database at all" * 50)
    with pytest.raises(InputError, match="--notes"):
        Notes.open(tmp_path / "notes.sqlite", world.index)
    assert (tmp_path / "notes.sqlite").read_text().startswith("my own notes")
    with pytest.raises(InputError, match=r"that is a folder; name a file in it with --notes"):
        Notes.open(tmp_path, world.index)


def filled(notes) -> None:
    for j in range(40):
        notes.set(j, label=f"label {j}", note="text " * 400)
        notes.add_to_list("all", j)
    notes.close()


@pytest.mark.parametrize("damage", ["middle", "cut", "header", "one page", "empty schema"])
def test_a_damaged_file_is_refused_at_the_start_and_left_as_it_is(world, notes, damage):
    root = notes._connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'lists'").fetchone()[0]
    filled(notes)
    content = bytearray(notes.path.read_bytes())
    if damage == "middle":
        content[8192 : len(content) // 2] = b"\xa5" * (len(content) // 2 - 8192)
    elif damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "header":
        content[:40] = bytes(40)
    elif damage == "one page":
        content[(root - 1) * 4096 : root * 4096] = bytes(4096)
    else:
        content[100:4096] = b"\0" * 3996
    notes.path.write_bytes(content)
    with pytest.raises(InputError, match=r"the notes in .* the file is damaged or is none of notes"):
        Notes.open(notes.path, world.index)
    assert notes.path.read_bytes() == content


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE lists; CREATE TABLE lists(title TEXT)",
        "DROP TABLE lists; DROP TABLE words; DROP TABLE notes; CREATE TABLE bookmarks(title TEXT)",
        "DROP TABLE notes; CREATE TABLE notes(dictionary TEXT, feature TEXT, label TEXT, note TEXT, starred INTEGER, changed TEXT)",
        "ALTER TABLE notes ADD COLUMN colour TEXT",
        "UPDATE notes SET label = x'ff00' WHERE feature = 3",
        "UPDATE notes SET starred = 'yes' WHERE feature = 3",
        "UPDATE notes SET feature = -1 WHERE feature = 3",
        "UPDATE lists SET feature = 'three' WHERE feature = 3",
        "UPDATE lists SET name = x'00' WHERE feature = 3",
    ],
)
def test_a_database_of_another_form_is_refused_and_left_as_it_is(world, notes, statement):
    filled(notes)
    other = sqlite3.connect(notes.path)
    other.executescript(statement)
    other.close()
    content = notes.path.read_bytes()
    with pytest.raises(InputError, match=r"the file is damaged or is none of notes.*--notes"):
        Notes.open(notes.path, world.index)
    assert notes.path.read_bytes() == content


@pytest.fixture
def as_nobody():
    """A folder that this process may read but not write, though root runs it: permissions bind nobody else."""
    folder = Path(tempfile.mkdtemp(prefix="notes"))
    folder.chmod(0o755)
    yield folder
    if os.getuid() == 0:
        os.seteuid(0)  # also after a failure
    shutil.rmtree(folder)


@pytest.mark.parametrize("words", ["made", "another index's"])
def test_a_file_that_can_only_be_read_is_read_and_searched_and_refuses_changes(world, as_nobody, words):
    path = as_nobody / "notes.sqlite"
    notes = Notes.open(path, world.index)
    notes.update_search(world.index, {})
    if words != "made":
        notes._connection.execute("UPDATE words SET source = 'of another index'")
    notes.set(7, label="kept here", note="n", starred=True)
    notes.add_to_list("mine", 7)
    notes.close()
    path.chmod(0o444)
    as_nobody.chmod(0o555)
    if os.getuid() == 0:
        os.seteuid(65534)
    content = path.read_bytes()
    notes = Notes.open(path, world.index)
    with pytest.raises(InputError, match="cannot be opened or written"):
        Notes.open(as_nobody / "new.sqlite", world.index)
    if os.getuid() == 0:
        os.seteuid(0)  # what is open stays as it is
    assert notes.read_only
    notes.update_search(world.index, {})
    assert (notes.get(7), notes.lists(), notes.search("kept")) == (Note("kept here", "n", True), {"mine": [7]}, [7])
    for change in (lambda: notes.set(7, label="x"), lambda: notes.add_to_list("x", 1), lambda: notes.remove_from_list("mine")):
        with pytest.raises(InputError, match="can only be read"):
            change()
    assert notes.search("kept") == [7]
    notes.close()
    assert path.read_bytes() == content
    assert os.listdir(as_nobody) == ["notes.sqlite"]


def test_a_file_that_was_moved_away_takes_no_more_notes(notes):
    notes.set(1, label="before")
    notes.path.rename(notes.path.with_name("moved.sqlite"))
    with pytest.raises(InputError, match="was moved away"):
        notes.set(2, label="lost")


def test_a_disk_that_runs_full_keeps_what_was_there(world, notes):
    notes.set(1, label="before")
    notes._connection.execute(f"PRAGMA max_page_count = {notes._connection.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(InputError, match="the disk is full"):
        notes.set(2, note="x" * 10_000)
    assert notes.all() == {1: Note("before")}
    notes._connection.execute("PRAGMA max_page_count = 100000")
    notes.set(2, note="x" * 10_000)
    again = Notes.open(notes.path, world.index)
    assert again.get(2).note == "x" * 10_000
    again.close()


def test_reading_waits_for_another_program_and_then_says_so(world, notes):
    notes.set(1, label="before")
    other = sqlite3.connect(notes.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(0.3, other.execute, ("ROLLBACK",))
    release.start()
    assert notes.get(1) == Note("before")  # waited
    release.join()
    notes._connection.execute("PRAGMA busy_timeout = 20")
    other.execute("BEGIN EXCLUSIVE")
    for read in (
        lambda: notes.get(1),
        notes.all,
        notes.lists,
        lambda: list(notes.jsonl()),
        lambda: notes.version,
        lambda: notes.search("x"),
    ):
        with pytest.raises(InputError, match="another program or a long change holds them; wait"):
            read()
    other.execute("ROLLBACK")
    other.close()
    assert notes.get(1) == Note("before")


def test_a_thread_does_not_wait_for_ever_for_another(notes, monkeypatch):
    monkeypatch.setattr("sae.features.notes.WAIT", 0.02)
    with notes._lock, ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match="a long change holds them"):
        pool.submit(notes.get, 1).result()


def test_a_mistyped_folder_is_not_made(world, tmp_path):
    with pytest.raises(InputError, match="there is no"):
        Notes.open(tmp_path / "none" / "notes.sqlite", world.index)
    assert list(tmp_path.iterdir()) == []


def test_text_is_never_taken_for_a_statement(notes):
    hostile = "'); DROP TABLE notes; --"
    notes.set(3, label=hostile, note=hostile)
    notes.add_to_list(hostile, 3)
    assert notes.get(3).label == hostile
    assert notes.lists() == {hostile: [3]}
    assert sqlite3.connect(notes.path).execute("SELECT COUNT(*) FROM notes").fetchone() == (1,)
