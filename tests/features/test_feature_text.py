"""Tokens to text, byte for byte, and words to tokens."""

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import InputError
from sae.features.index.words import folded, occurrences, words_of
from sae.model.vocabulary import Vocabulary, token_texts, vocabulary

TEXT = 'Она сказала: "привет" 🦓🪰 naïve 漢字\n\tзебра <b> it\'s'


def test_texts_join_to_the_text_and_split_characters_stand_whole(world):
    ids = world.tokenizer(TEXT)["input_ids"]
    texts = token_texts(world.tokenizer, ids)
    assert "".join(texts) == TEXT
    assert len(texts) == len(ids) > len(TEXT)  # so characters were split
    assert "" in texts
    assert "🦓" in texts


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives(world, text):
    assert "".join(token_texts(world.tokenizer, world.tokenizer(text)["input_ids"])) == text


def test_sentencepiece_pieces_are_the_decoder_s(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    text = "Once upon a time, Zoë saw a 🦓."
    assert "".join(token_texts(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])) == " " + text  # its leading mark


def test_context_texts_are_exact_where_a_window_cuts_a_character(world):
    """A window of one token shows the whole character that ends in it, though its first bytes lie before the window."""
    index = world.index
    ids = np.asarray(index.tokens["ids"])
    zebra = world.tokenizer("🦓")["input_ids"]
    assert len(zebra) > 1
    ends = [p for p in range(len(zebra), len(ids)) if ids[p - len(zebra) + 1 : p + 1].tolist() == zebra]
    position = ends[0]
    context = index.context(index.feature(4), position, 0, 0)
    assert context.texts == ["🦓"]


def brute_occurrences(words, ids, starts, vocab):
    """Sequence by sequence, with the first and last token found by decoding ever longer prefixes."""
    found = []
    for low, high in zip(starts, [*starts[1:], len(ids)]):
        pieces = [b"\n" if vocab.special[i] else vocab.pieces[i] for i in ids[low:high]]
        text = b"".join(pieces).decode("utf-8", "surrogateescape")
        for match in re.finditer(r"(?i)(?<!\w)(" + "|".join(map(re.escape, words)) + r")(?!\w)", text):
            begin, end = (len(text[:x].encode("utf-8", "surrogateescape")) for x in match.span())
            touched = [k for k in range(len(pieces)) if len(b"".join(pieces[:k])) < end and len(b"".join(pieces[: k + 1])) > begin]
            found.append((low + touched[0], low + touched[-1]))
    return found


@pytest.mark.parametrize("words", [["zebrafly"], ["ПРИВЕТ"], ["мир", "café"], ["漢字"], ["it's"], ["a", "the"]])
@pytest.mark.parametrize("block", [1, 500, 1 << 22])
def test_occurrences_equal_a_scan_of_every_sequence(world, monkeypatch, words, block):
    import sae.features.index.words as text_module

    monkeypatch.setattr(text_module, "BLOCK_TOKENS", block)
    tokens = world.index.tokens
    ids, starts = np.asarray(tokens["ids"]), np.asarray(tokens["sequence_starts"][:-1])
    found = occurrences(words, ids, starts, vocabulary(world.tokenizer))
    assert len(found.first) > 5
    assert list(zip(found.first.tolist(), found.last.tolist())) == brute_occurrences(words, ids, starts, vocabulary(world.tokenizer))
    if words == ["zebrafly"]:
        assert (found.last > found.first).all()  # split over several tokens


def test_special_tokens_are_no_words(world):
    tokens = world.index.tokens
    found = occurrences(["end"], np.asarray(tokens["ids"]), np.asarray(tokens["sequence_starts"][:-1]), vocabulary(world.tokenizer))
    assert not world.index.vocabulary.special[tokens["ids"][found.first]].any()


letters = st.text(st.sampled_from("aeio\u0301\u0308nñéäǖöǫ̈한’'ʼß1 .,"), max_size=30)


@settings(max_examples=300, deadline=None)
@given(letters, letters, st.sampled_from(["NFC", "NFD", None]))
def test_a_word_is_found_in_every_spelling_of_it(word, text, form):
    """Against a search in the folded text, letter by letter; the vocabulary is that of single bytes."""
    word = unicodedata.normalize("NFC", word).strip()
    written = unicodedata.normalize(form, text) if form else text
    if not word or "ß" in word + text or unicodedata.combining(word[0]):  # ss is not ß to a regular expression
        return
    plain = rf"(?<![\w\u0300-\u036f]){re.escape(folded(word))}(?![\w\u0300-\u036f])"
    bytes_alone = Vocabulary([bytes([b]) for b in range(256)], np.zeros(256, bool))
    found = occurrences([word], np.frombuffer(written.encode(), np.uint8).astype(np.int32), np.array([0]), bytes_alone)
    spelled = [written.encode()[a : b + 1].decode() for a, b in zip(found.first.tolist(), found.last.tolist())]
    assert len(spelled) == len(re.findall(plain, folded(written)))
    assert {folded(each) for each in spelled} <= {folded(word)}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("don't", "don’t"),
        ("don't", "DONʼT"),
        ("caf\u00e9", "cafe\u0301"),
        ("ǖ", "u\u0308\u0304"),
        ("ǖ", "ü\u0304"),
        ("한", "\u1112\u1161\u11ab"),
    ],
)
def test_spellings_of_one_word_fold_to_one(one, other):
    assert folded(one) == folded(other)
    vocab = Vocabulary([bytes([b]) for b in range(256)], np.zeros(256, bool))
    for asked, text in ((one, other), (other, one)):
        ids = np.frombuffer(f"so {text}, then".encode(), np.uint8).astype(np.int32)
        found = occurrences([asked], ids, np.array([0]), vocab)
        assert (found.first.tolist(), found.last.tolist()) == ([3], [2 + len(text.encode())])


def test_a_letter_without_its_accent_is_another_word_however_the_accent_is_written():
    vocab = Vocabulary([bytes([b]) for b in range(256)], np.zeros(256, bool))
    for text in ("café", "cafe\u0301", "e\u0301cafe"):
        assert not len(occurrences(["cafe"], np.frombuffer(text.encode(), np.uint8).astype(np.int32), np.array([0]), vocab).first)


def test_words_of_a_query():
    assert words_of("one| two |") == ["one", "two"]
    assert words_of(["one|two", "three"]) == ["one", "two", "three"]
    with pytest.raises(InputError, match="expected a word"):
        words_of(" | ")
