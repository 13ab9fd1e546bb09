"""Text as people give it."""

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.activations.export import ExportConfig, export_cache
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.activations.text.documents import TextConfig, documents
from sae.errors import InputError
from sae.text_input import replace_surrogates, text_list
from steering.compare.command import CompareConfig, compare_directions
from steering.studies.effect_map import EffectConfig, effect_map

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # surrogates too


@given(ANY_TEXT)
def test_what_is_left_can_be_written_and_nothing_else_changes(text):
    cleaned, count = replace_surrogates(text)
    kept = [c for c in text if not "\ud800" <= c <= "\udfff"]
    assert count == len(text) - len(kept)
    assert len(cleaned) == len(text)
    assert [new for new, old in zip(cleaned, text) if new == old] == kept
    assert cleaned.encode().decode() == cleaned
    assert replace_surrogates(cleaned) == (cleaned, 0)


@pytest.mark.parametrize("text", [json.loads(r'"x \ud83d"'), b"x \xff".decode("utf-8", "surrogateescape"), "\udc00 x"])
def test_a_warning_counts_what_was_replaced(text):
    with pytest.warns(UserWarning, match=r"halves of surrogate pairs in prompts are replaced by U\+FFFD \(1\)"):
        assert text_list(["plain", text], "prompts")[1] == "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text_list(["plain", json.loads(r'"\ud83d\ude00"')]) == ["plain", "😀"]


@pytest.mark.parametrize(
    ("texts", "found"), [("I think", "single string 'I think'"), (b"x", "single string"), (3, "int"), (["a", 3], "int at position 1")]
)
def test_what_is_no_list_of_strings_is_refused(texts, found):
    with pytest.raises(InputError, match=rf"expected prompts to be a list of strings, got .*{found}"):
        text_list(texts, "prompts")


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("text", lambda out: list(documents(TextConfig(text="folder/file.txt")))),
        ("sites", lambda out: harvest(HarvestConfig(out=out, text=("a.txt",), sites="resid_post.1"))),
        ("splits", lambda out: export_cache(ExportConfig(cache=Path("none"), out=out, splits="train"))),
        ("prompts", lambda out: compare_directions(CompareConfig(concept="bible", model="none", prompts="I think", out=out))),
        ("prompts", lambda out: effect_map(EffectConfig(model="none", dictionary=Path(), feature=(1,), prompts="I think"))),
    ],
)
def test_the_settings_of_a_command_take_no_single_string_for_a_list(tmp_path, what, call):
    with pytest.raises(InputError, match=f"expected {what} to be a list of strings, got the single string"):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()
