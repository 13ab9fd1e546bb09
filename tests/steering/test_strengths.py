"""The bootstrap against a closed form, and the word lists."""

import numpy as np
import pytest

from sae.errors import InputError
from steering.studies.strengths import WORDS, bootstrap, read_words


def test_bootstrap_interval_is_that_of_a_proportion():
    """Texts of one word each: the rate is a mean of n coin flips, whose normal interval is known."""
    flips = np.random.default_rng(0).random(400) < 0.3
    low, high = bootstrap([(int(flip), 1) for flip in flips], seed=1)
    p = flips.mean()
    half = 1.96 * (p * (1 - p) / 400) ** 0.5
    assert low == pytest.approx(p - half, abs=0.01)
    assert high == pytest.approx(p + half, abs=0.01)
    assert bootstrap([(0, 10)] * 50, seed=0) == (0.0, 0.0)
    assert bootstrap([], seed=0) == (0.0, 0.0)


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
