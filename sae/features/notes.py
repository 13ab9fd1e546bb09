"""The user's labels, stars, notes and lists of features, in one SQLite file that a rebuild of an index does not touch.

Entries are keyed by the checksum of the dictionary's weights and the feature's number, so they also apply to any other index of the same
dictionary. The same file holds the words for full-text search; those are made again from the index whenever it changes.
"""

import json
import re
import sqlite3
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from sae.disk.arrays import EXPLANATIONS
from sae.disk.writing import atomic
from sae.errors import InputError
from sae.features.index.reader import FeatureIndex
from sae.features.index.words import folded
from sae.progress import progress
from sae.text_input import replace_surrogates, replace_surrogates_in

LONGEST = {"label": 200, "note": 10_000, "name": 100}  # characters
MOST_LISTED = 10_000  # features of one list
LABEL_FILES = ("index.json", EXPLANATIONS)  # the index's files that the words for search are made from
WORDS_VERSION = 2  # of how these words are made: another one makes them again
WAIT = 10.0  # seconds for other threads and programs to let go of the notes
TABLES = {
    "notes": "dictionary TEXT, feature INTEGER, label TEXT NOT NULL, note TEXT NOT NULL, starred INTEGER NOT NULL, changed TEXT NOT NULL, "
    "PRIMARY KEY(dictionary, feature)",
    "lists": "dictionary TEXT, name TEXT, feature INTEGER, place INTEGER NOT NULL, PRIMARY KEY(dictionary, name, feature)",
    "words": "dictionary TEXT, source TEXT NOT NULL, PRIMARY KEY(dictionary)",
}
WORDS = "fts5(label, explanation, tokens, tokenize = 'unicode61 remove_diacritics 2', prefix = '2 3')"
CAUSES = {  # part of SQLite's own message: what it means and what to do
    "locked": "another program or a long change holds them; wait until it is done and try again",
    "full": "the disk is full; free some space and try again",
    "readonly": "the file can only be read, or was moved away; make it writable, or start with another --notes",
    "unable to open": "the file or its folder cannot be opened or written; check both, or start with another --notes",
    "": "the file is damaged or is none of notes; restore a copy, rescue it with `sqlite3 FILE .recover`, or start another with --notes",
}


class NotesUnusable(InputError):
    """The file of notes cannot be read or written, temporarily or permanently."""


class Note(NamedTuple):
    """The notes on one feature."""

    label: str = ""
    note: str = ""
    starred: bool = False


class Notes:
    """The notes on one dictionary's features. May be used from several threads, and the file by several programs."""

    def __init__(self, connection: sqlite3.Connection, path: Path, dictionary: str, d_sae: int, read_only: bool = False):
        self.path, self.dictionary, self.d_sae, self.read_only = path, dictionary, d_sae, read_only
        self._connection, self._lock, self._changes = connection, threading.RLock(), 0
        self._search = f"search_{dictionary}"
        self._source: tuple[str, Callable[[], Iterator[tuple[int, str, str, str]]]] | None = None

    @classmethod
    def open(cls, path: str | Path | None, index: FeatureIndex) -> "Notes":
        """The notes on the index's dictionary; without a path, in notes.sqlite beside the index's folder.

        A file that can only be read is read; every change is then refused. Raises `NotesUnusable`, an `InputError`, for a file that is
        damaged or no such database, or that another program holds; so does every method that meets such a failure later.
        """
        if path is not None and not Path(path).parent.is_dir():
            raise InputError(f"expected a database of notes at {path}, or a folder to start one in, but there is no {Path(path).parent}")
        path = Path(path) if path is not None else index.folder.resolve().parent / "notes.sqlite"
        if path.is_dir():
            raise InputError(
                f"expected a database of notes at {path}, or nothing yet, but that is a folder; name a file in it with --notes"
            )
        dictionary = index.info["dictionary_crc32"]
        if not re.fullmatch("[0-9a-f]{8}", dictionary):
            raise InputError(f"expected eight hexadecimal digits as dictionary_crc32 of {index.folder}, got {dictionary!r}; index it again")
        try:
            connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
            _require_notes(connection)
            read_only = not _make_tables(connection, dictionary)
        except sqlite3.Error as error:
            raise NotesUnusable(_sentence(path, error)) from None
        return cls(connection, path, dictionary, index.d_sae, read_only)

    def close(self) -> None:
        self._connection.close()

    @property
    def version(self) -> tuple[int, int]:
        """A value that differs after every change, also by another program."""
        with self._using():
            return self._changes, self._connection.execute("PRAGMA data_version").fetchone()[0]

    def get(self, j: int) -> Note:
        row = self._row("SELECT label, note, starred FROM notes WHERE dictionary = ? AND feature = ?", j)
        return Note(row[0], row[1], bool(row[2])) if row else Note()

    def set(self, j: int, *, label: str | None = None, note: str | None = None, starred: bool | None = None) -> Note:
        """Changes the given fields and keeps the others. Raises `InputError` for a feature that does not exist, or too long a text."""
        self._require(j)
        given: dict[str, Any] = {"label": label, "note": note, "starred": starred}
        given = {name: _checked(name, value) for name, value in given.items() if value is not None}
        with self._changing():
            after = self.get(j)._replace(**given)
            self._store(self.dictionary, j, after)
            self._index_label(j, after.label)
        return after

    def all(self) -> dict[int, Note]:
        """Every feature with a label, star or note."""
        rows = self._rows(
            "SELECT feature, label, note, starred FROM notes WHERE dictionary = ? AND feature < ? ORDER BY feature", self.d_sae
        )
        return {feature: Note(label, note, bool(starred)) for feature, label, note, starred in rows}

    def lists(self) -> dict[str, list[int]]:
        """Each list's features in the order they were added."""
        found: dict[str, list[int]] = {}
        for name, feature in self._rows(
            "SELECT name, feature FROM lists WHERE dictionary = ? AND feature < ? ORDER BY name, place", self.d_sae
        ):
            found.setdefault(name, []).append(feature)
        return found

    def add_to_list(self, name: str, j: int) -> None:
        """Appends the feature to the list, which starts with its first feature; one that is in it stays where it is."""
        self._require(j)
        name = _checked("name", name)
        with self._changing():
            self._append(self.dictionary, name, [j])

    def remove_from_list(self, name: str, j: int | None = None) -> None:
        """Removes the feature from the list; if `feature` is None, the whole list."""
        with self._changing():
            if j is None:
                self._connection.execute("DELETE FROM lists WHERE dictionary = ? AND name = ?", (self.dictionary, name))
            else:
                self._connection.execute("DELETE FROM lists WHERE dictionary = ? AND name = ? AND feature = ?", (self.dictionary, name, j))

    def jsonl(self) -> Iterator[str]:
        """Notes and lists as lines of JSON, those of every dictionary in the file."""
        with self._using():
            notes = self._connection.execute("SELECT dictionary, feature, label, note, starred FROM notes ORDER BY 1, 2").fetchall()
            listed = self._connection.execute("SELECT dictionary, name, feature FROM lists ORDER BY dictionary, name, place").fetchall()
        for dictionary, feature, label, note, starred in notes:
            entry = {"dictionary": dictionary, "feature": feature, "label": label, "note": note, "starred": bool(starred)}
            yield json.dumps(entry, ensure_ascii=False) + "\n"
        for dictionary, name, feature in listed:
            yield json.dumps({"dictionary": dictionary, "list": name, "feature": feature}, ensure_ascii=False) + "\n"

    def export_jsonl(self, path: str | Path) -> None:
        with atomic(Path(path)) as temporary:
            temporary.write_text("".join(self.jsonl()), encoding="utf-8")

    def import_jsonl(self, lines: str | Path | Iterable[str]) -> int:
        """Takes over a file that `export_jsonl` wrote, or its lines: all of it or, with an `InputError`, nothing. Returns the entries read.

        For a feature that is known already, the file's label, note and star replace the present ones; lists are appended to.
        """
        if isinstance(lines, (str, Path)):
            try:
                lines = Path(lines).read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also part at U+0085 inside a note
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"expected notes as lines of JSON in {lines}, but it cannot be read ({error})") from None
        entries = [_parsed(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        listed: dict[tuple[str, str], list[int]] = {}
        with self._changing():
            for dictionary, feature, content in entries:
                if dictionary == self.dictionary:
                    self._require(feature)
                if isinstance(content, str):
                    listed.setdefault((dictionary, content), []).append(feature)
                else:
                    self._store(dictionary, feature, content)
                    if dictionary == self.dictionary:
                        self._index_label(feature, content.label)
            for (dictionary, name), features in listed.items():
                self._append(dictionary, name, features)
        return len(entries)

    def update_search(self, index: FeatureIndex, explanations: dict[int, list[Any]]) -> None:
        """Makes the words of top tokens and explanations searchable, if they were last made from another index.

        `search` repeats this if a program with another index of the dictionary has done the same meanwhile.
        """
        source = f"{WORDS_VERSION} " + " ".join(
            f"{p.stat().st_size}-{p.stat().st_mtime_ns}" for name in LABEL_FILES if (p := index.folder / name).exists()
        )
        spelled = index.vocabulary.spelling

        def rows() -> Iterator[tuple[int, str, str, str]]:
            labels = {j: note.label for j, note in self.all().items()}
            with progress("make features searchable", index.d_sae, "features") as bar:
                for j in range(index.d_sae):
                    texts = " ".join(explanation.text for explanation in explanations.get(j, ()))
                    tokens = " ".join(spelled(token) for token, _ in index.top_tokens(j))
                    yield j, folded(labels.get(j, "")), folded(texts), folded(tokens)
                    bar.advance(1)

        self._source = source, rows
        with self._using():
            self._refresh_search()

    def _refresh_search(self) -> None:
        row = self._row("SELECT source FROM words WHERE dictionary = ?")
        if self._source is None or (row and row[0] == self._source[0]):
            return
        source, rows = self._source
        with self._changing():  # of a file that can only be read, in tables of this connection alone
            self._connection.execute(f"DELETE FROM {self._search}")
            self._connection.executemany(f"INSERT INTO {self._search}(rowid, label, explanation, tokens) VALUES (?, ?, ?, ?)", rows())
            self._connection.execute("INSERT OR REPLACE INTO words VALUES (?, ?)", (self.dictionary, source))

    def search(self, query: str, n: int = 1000) -> list[int]:
        """At most `n` features of which a label, an explanation or a top token has a word that starts with each word asked for.

        Best first by BM25, in which a label counts ten times and an explanation three times as much as a token.
        """
        words = re.findall(r"\w+(?:'\w+)*", folded(query))
        if not words:
            raise InputError(f"expected a word to search for, got {query!r}; signs are found by the filter of top tokens")
        matching = " ".join(f'"{word}"*' for word in words)  # FTS5 takes don't for the words don and t, one after the other
        with self._using():
            self._refresh_search()
            rows = self._connection.execute(
                f"SELECT rowid FROM {self._search} WHERE {self._search} MATCH ? ORDER BY bm25({self._search}, 10, 3, 1), rowid LIMIT ?",
                (matching, n),
            ).fetchall()
        return [j for (j,) in rows]

    def _require(self, j: int) -> None:
        if not 0 <= j < self.d_sae:
            raise InputError(f"feature {j} does not exist: the dictionary has features 0 to {self.d_sae - 1}")

    def _rows(self, statement: str, *values: Any) -> list[tuple]:
        with self._using():
            return self._connection.execute(statement, (self.dictionary, *values)).fetchall()

    def _row(self, statement: str, *values: Any) -> tuple | None:
        return next(iter(self._rows(statement, *values)), None)

    @contextmanager
    def _using(self) -> Iterator[None]:
        """A connection of this thread; refusals of SQLite become a sentence."""
        if not self._lock.acquire(timeout=WAIT):
            raise NotesUnusable(_sentence(self.path, "locked"))
        try:
            yield
        except sqlite3.Error as error:
            raise NotesUnusable(_sentence(self.path, error)) from error
        finally:
            self._lock.release()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One transaction: all of it, or after an error nothing."""
        with self._using():
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            self._changes += 1

    def _store(self, dictionary: str, j: int, note: Note) -> None:
        if note == Note():
            self._connection.execute("DELETE FROM notes WHERE dictionary = ? AND feature = ?", (dictionary, j))
        else:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self._connection.execute("INSERT OR REPLACE INTO notes VALUES (?, ?, ?, ?, ?, ?)", (dictionary, j, *note, now))

    def _index_label(self, j: int, label: str) -> None:
        self._connection.execute(f"UPDATE {self._search} SET label = ? WHERE rowid = ?", (folded(label), j))

    def _append(self, dictionary: str, name: str, features: Sequence[int]) -> None:
        """In one statement: counting the list once for each member would take quadratic time."""
        known = "FROM lists WHERE dictionary = ? AND name = ?"
        (last,) = self._connection.execute(f"SELECT COALESCE(MAX(place), -1) {known}", (dictionary, name)).fetchone()
        rows = [(dictionary, name, j, place) for place, j in enumerate(features, last + 1)]
        self._connection.executemany("INSERT OR IGNORE INTO lists VALUES (?, ?, ?, ?)", rows)
        (count,) = self._connection.execute(f"SELECT COUNT(*) {known}", (dictionary, name)).fetchone()
        if count > MOST_LISTED:
            raise InputError(f"expected at most {MOST_LISTED:,} features in a list, and {name!r} is full; start another list")


def _require_notes(connection: sqlite3.Connection) -> None:
    """Raises `sqlite3.DatabaseError` for a file that is damaged, has tables of another form or values of other types than ours."""
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(found)
    if not _has_tables(connection):
        return
    for name, columns in TABLES.items():
        found = [(column, kind) for _, column, kind, *_ in connection.execute(f"PRAGMA table_info({name})")]
        wanted = [tuple(part.split()[:2]) for part in columns.split(", PRIMARY")[0].split(", ")]
        if found != wanted:
            raise sqlite3.DatabaseError(f"its table {name} has other columns" if found else f"it has tables, but none of the name {name}")
        odd = " OR ".join(f"typeof({column}) != '{kind.lower()}'" for column, kind in wanted)
        below = " OR feature < 0" if ("feature", "INTEGER") in wanted else ""
        if connection.execute(f"SELECT 1 FROM {name} WHERE {odd}{below} LIMIT 1").fetchone():
            raise sqlite3.DatabaseError(f"its table {name} has a value that is no {' or '.join(column for column, _ in wanted)}")


def _has_tables(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM main.sqlite_master LIMIT 1").fetchone() is not None


def _make_tables(connection: sqlite3.Connection, dictionary: str) -> bool:
    """Whether the file can be written. If not, the words for search are in tables of this connection, which precede the file's."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        for name, columns in TABLES.items():
            connection.execute(f"CREATE TABLE IF NOT EXISTS {name}({columns}) WITHOUT ROWID")
        connection.execute(f"CREATE VIRTUAL TABLE IF NOT EXISTS search_{dictionary} USING {WORDS}")
        connection.execute("COMMIT")
        connection.execute("BEGIN")
        connection.execute("INSERT OR REPLACE INTO words VALUES ('', '')")  # tried and taken back
        connection.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        if not re.search("readonly|unable to open", str(error)) or not _has_tables(connection):
            raise
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute(f"CREATE TEMP TABLE words({TABLES['words']})")
        connection.execute(f"CREATE VIRTUAL TABLE temp.search_{dictionary} USING {WORDS}")
        return False
    return True


def _sentence(path: Path, error: sqlite3.Error | str) -> str:
    said = " ".join(str(error).split())
    return f"the notes in {path} cannot be used ({said}): {next(cause for part, cause in CAUSES.items() if part in said)}"


def _checked(name: str, value: Any) -> Any:
    if name == "starred":
        if not isinstance(value, bool):
            raise InputError(f"expected true or false as starred, got {value!r}")
        return value
    if not isinstance(value, str) or len(value) > LONGEST[name]:
        got = f"{len(value):,} characters" if isinstance(value, str) else f"{value!r}"
        raise InputError(f"expected a {name} of at most {LONGEST[name]:,} characters, got {got}")
    value, _ = replace_surrogates(value.replace("\r\n", "\n").strip())
    if name == "name":
        value = unicodedata.normalize("NFC", value)  # a list has one name however its accents are typed
    if name == "name" and not value:
        raise InputError("expected a list's name, got none")
    return value if name == "note" else " ".join(value.split())


def _parsed(number: int, line: str) -> tuple[str, int, Note | str]:
    """(dictionary, feature, its note or the name of a list it is in)"""
    try:
        entry = json.loads(line)
        if replace_surrogates_in(entry)[1]:
            raise InputError("it holds half of a surrogate pair, which is no character")
        dictionary, feature = entry["dictionary"], entry["feature"]
        if not isinstance(dictionary, str) or not re.fullmatch("[0-9a-f]{8}", dictionary) or type(feature) is not int:
            raise InputError("its dictionary is not eight hexadecimal digits or its feature not a whole number")
        if not 0 <= feature < 1 << 32:
            raise InputError(f"there is no feature {feature}")
        if "list" in entry:
            return dictionary, feature, _checked("name", entry["list"])
        return dictionary, feature, Note(**{name: _checked(name, entry[name]) for name in Note._fields})
    except (InputError, ValueError, KeyError, TypeError, RecursionError) as error:
        cause = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"expected notes as lines of JSON that an export wrote, but line {number} is none: {cause}") from None
