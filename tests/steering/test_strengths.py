"""Lists of words to count."""

import pytest

from sae.errors import InputError
from steering.strength.measure import read_words
from steering.studies.strengths import WORDS


def test_word_lists(tmp_path):
    words = read_words(WORDS / "curse_words.txt")
    assert {"damn", "fucking", "shit"} <= set(words)
    assert len(set(words)) == len(words)
    assert not any(w.startswith("#") for w in words)
    with pytest.raises(InputError, match="cannot be read"):
        read_words(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(InputError, match="found none"):
        read_words(tmp_path / "empty.txt")


def test_a_list_from_any_editor_counts_all_of_its_words(tmp_path):
    (tmp_path / "words.txt").write_bytes("naïve\r\nday\r\n".encode("utf-8-sig"))  # with a byte-order mark, as Windows saves it
    assert read_words(tmp_path / "words.txt") == ["naïve", "day"]
    (tmp_path / "words.txt").write_text("naïve", encoding="latin-1")
    with pytest.raises(InputError, match="cannot be read"):
        read_words(tmp_path / "words.txt")
