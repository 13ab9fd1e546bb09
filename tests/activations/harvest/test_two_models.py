"""Two models that read the same tokens into one cache: row i of every site belongs to one token, and a token left out is so for both."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from live_world import make_world
from several_processes import forked, said
from test_harvest import change, different, in_child
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.activations.describe import DescribeConfig, describe_cache
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.activations.harvest.settings import RecordingConfig
from sae.activations.live import LiveSource
from sae.disk.reading import read_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel

FIRST, SECOND = "resid_post.0", "chat/resid_post.2"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    """A second model of another width, depth and context beside the first."""
    folder = tmp_path_factory.mktemp("world")
    options = make_world(folder)
    torch.manual_seed(1)
    size = dict(vocab_size=50, n_positions=24, n_embd=24, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(folder / "chat")
    return options | {"second_model": str(folder / "chat"), "sites": (FIRST, SECOND), "shard_tokens": 150, "max_norm_ratio": None}


@pytest.fixture
def config(world, tmp_path) -> HarvestConfig:
    return HarvestConfig(out=tmp_path / "cache", **world)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    return harvest(HarvestConfig(out=tmp_path_factory.mktemp("whole") / "cache", **world))


def alone(config: HarvestConfig, out: Path, second: bool) -> HarvestConfig:
    """The settings for one of the two models; the second's context is the shorter."""
    one = dict(model=config.second_model if second else config.model, second_model=None, sites=("resid_post.2" if second else FIRST,))
    return change(config, out=out, context=24, **one)


def stored(folder: Path, site: str) -> dict[int, torch.Tensor]:
    """Global token position -> row"""
    cache = ActivationCache.open(folder, site)
    shards = [cache.read(shard) for split in ("train", "held_out") for shard in cache.shards(split)]
    return {int(r): x_d for x_nd, rows in shards for r, x_d in zip(rows, x_nd)}


def test_rows_are_what_transformers_computes_for_the_same_tokens_in_each_model(world, whole):
    tokens = ActivationCache.open(whole, FIRST).tokens
    assert int((tokens.sequence_starts[1:] - tokens.sequence_starts[:-1]).max()) == 24  # what both can read
    for site, folder, layer in ((FIRST, world["model"], 0), (SECOND, world["second_model"], 2)):
        rows = stored(whole, site)
        assert len(rows) == (tokens.ids != 0).sum()
        model = GPT2LMHeadModel.from_pretrained(folder).eval()
        for start, stop in list(zip(tokens.sequence_starts, tokens.sequence_starts[1:]))[:40]:
            with torch.no_grad():
                x_spd = model(torch.tensor(tokens.ids[None, start:stop], dtype=torch.long), output_hidden_states=True).hidden_states[
                    layer + 1
                ]
            for offset in range(1, stop - start):
                torch.testing.assert_close(rows[start + offset].float(), x_spd[0, offset], atol=2e-3, rtol=2e-3)


def test_each_model_gets_the_files_it_gets_alone(config, whole, tmp_path):
    for second, site in ((False, FIRST), (True, SECOND)):
        own = harvest(alone(config, tmp_path / str(second), second))
        name = site.rpartition("/")[2]
        for path in sorted((whole / site).iterdir()):
            assert path.read_bytes() == (own / name / path.name).read_bytes()
        manifest, manifests = read_json(own / "manifest.json", "a manifest"), read_json(whole / "manifest.json", "a manifest")
        assert manifests["sites"][site] == manifest["sites"][name]
        assert ActivationCache.open(whole, site).model == manifest["model"]


@pytest.mark.parametrize("ratio", [1.05, 1.3])
def test_a_row_that_is_massive_in_one_model_is_left_out_of_both(config, tmp_path, ratio):
    config = change(config, max_norm_ratio=ratio)
    both = harvest(config)
    kept = [set(stored(harvest(alone(config, tmp_path / str(k), bool(k))), s)) for k, s in enumerate((FIRST, "resid_post.2"))]
    assert kept[0] != kept[1]
    assert set(stored(both, FIRST)) == set(stored(both, SECOND)) == kept[0] & kept[1]


def test_batches_pair_rows_of_one_token_from_a_cache_and_live(world, whole):
    pairs = {tuple(x_d.tolist()): y_d for x_d, y_d in zip(stored(whole, FIRST).values(), stored(whole, SECOND).values())}
    cached = CachedSource(*(ActivationCache.open(whole, site) for site in (FIRST, SECOND)))
    live = LiveSource(RecordingConfig(**{key: value for key, value in world.items() if key != "shard_tokens"}))
    for source in (cached, live):
        assert source.widths == {FIRST: 16, SECOND: 24}
        assert source.manifest["models"].keys() == {"chat"}
        batch = next(source.batches(70, seed=3, device="cpu"))
        for x_d, y_d in zip(batch[FIRST], batch[SECOND]):
            assert torch.equal(pairs[tuple(x_d.tolist())].float(), y_d)


def test_killed_at_any_time_it_ends_with_the_same_bytes(config, whole):
    for sync in (6, 15, 31):
        assert os.WIFSIGNALED(in_child(config, kill_at_sync=sync))
    harvest(config)
    assert different(config.out, whole) == []


def test_several_processes_give_the_same_bytes(config, whole, tmp_path):
    assert forked(partial(harvest, config), 2, tmp_path / "log") == [0, 0]
    assert different(config.out, whole) == []


def test_another_second_model_does_not_go_on_with_it(config, world, tmp_path):
    assert os.WIFSIGNALED(in_child(config, kill_at_sync=8))
    model = GPT2LMHeadModel.from_pretrained(world["second_model"])
    with torch.no_grad():
        model.transformer.wte.weight[3] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"started with settings second_model"):
        harvest(change(config, second_model=str(tmp_path / "other")))
    assert forked(partial(harvest, change(config, second_model=str(tmp_path / "other"))), 2, tmp_path / "log") == [2, 2]
    assert "second_model" in "".join(said(tmp_path / "log"))


def test_a_cache_knows_the_model_of_each_site(world, whole, capsys):
    first, second = (LanguageModel.load(world[key], device="cpu") for key in ("model", "second_model"))
    ActivationCache.open(whole, FIRST).require_model(first)
    ActivationCache.open(whole, SECOND).require_model(second)
    with pytest.raises(InputError, match=r"expected a cache made with .*chat.*but .* was made with .*lm"):
        ActivationCache.open(whole, FIRST).require_model(second)
    described = describe_cache(DescribeConfig(cache=whole, site=SECOND))
    assert described["model"]["fingerprint"] == second.fingerprint()
    assert "chat/resid_post.2" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"expected one of the sites in .*, resid_post.0, chat/resid_post.2, but none was named"):
        ActivationCache.open(whole)


def test_facts_about_a_second_model_are_needed(config):
    manifest = read_json(harvest(config) / "manifest.json", "a manifest")
    del manifest["models"]
    (config.out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"facts about the model 'chat' of the site chat/resid_post.2"):
        ActivationCache.open(config.out, FIRST)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second_model": None}, "expected --second-model for the site chat/resid_post.2, got none"),
        ({"second_model": None, "sites": (FIRST,), "second_revision": "main"}, "expected --second-model beside --second-revision main"),
        ({"sites": (FIRST,)}, "expected a site of the second model too, .* add one such as other/resid_post.0"),
        ({"sites": (SECOND,)}, "expected a site of --model too"),
        ({"sites": (FIRST, SECOND, "base/embed")}, "expected one name for the second model, got chat and base"),
        ({"sites": (FIRST, "tokens/embed")}, "a name for the second model that no folder of a cache has, got 'tokens'"),
        ({"sites": (FIRST, "chat/resid_post.9")}, "expected a site of the model, one of embed, .* resid_post.3, got 'resid_post.9'"),
        ({"sites": ("resid_post.3", SECOND)}, "expected a site of the model, .* resid_post.1, got 'resid_post.3'"),
        ({"sites": (FIRST, SECOND, "a b/embed")}, "expected a site of the model"),
        ({"context": 30}, "expected --context from 2 to 24"),
    ],
)
def test_sites_and_options_that_do_not_fit_are_refused(config, changes, message):
    with pytest.raises(InputError, match=message):
        harvest(change(config, **changes))
    assert not config.out.exists()


def test_one_model_given_twice_is_refused(config):
    with pytest.raises(InputError, match=r"expected two models, but .*lm and .*lm have the same weights"):
        harvest(change(config, second_model=config.model, sites=(FIRST, "chat/resid_post.0")))


def test_a_copy_that_differs_too_little_for_its_fingerprint_is_recorded_and_said(config, world, tmp_path, capsys):
    model = GPT2LMHeadModel.from_pretrained(world["model"])
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "copy")
    folder = harvest(change(config, second_model=str(tmp_path / "copy"), sites=(FIRST, "copy/resid_post.0")))
    assert "differ too little for their fingerprints" in capsys.readouterr().err
    first, second = (stored(folder, site) for site in (FIRST, "copy/resid_post.0"))
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[position], second[position]) for position in first)


def tokenizer(vocabulary: dict[str, int], **options) -> PreTrainedTokenizerFast:
    cut = Tokenizer(models.BPE(vocabulary, options.get("merges", [])))
    cut.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=options.get("prefix", False))
    return PreTrainedTokenizerFast(tokenizer_object=cut, bos_token=options.get("bos", "<a>"))


LETTERS = {token: i for i, token in enumerate(["<a>", "<b>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"])}


@pytest.mark.parametrize(
    ("vocabulary", "options", "message"),
    [
        (LETTERS | {"a": LETTERS["b"], "b": LETTERS["a"]}, {}, r"token 'a' is \d+ in .*lm and \d+ in .*chat"),
        (LETTERS | {"abc": 259}, {}, r"chat has the token 'abc' \(259\) and .*lm has not"),
        ({k: v for k, v in LETTERS.items() if k != "ab"}, {}, r"lm has the token 'ab' \(258\) and .*chat has not"),
        (LETTERS, {"merges": [("a", "b")]}, r"have other rules \(model\)"),
        (LETTERS, {"prefix": True}, r"have other rules \(pre_tokenizer\)"),
        (None, {}, "chat has no tokenizer to compare"),
    ],
)
def test_models_that_tokenise_otherwise_are_refused(tmp_path, vocabulary, options, message):
    config = with_tokenizers(tmp_path, vocabulary and tokenizer(vocabulary, **options))
    with pytest.raises(InputError, match=f"expected two models that tokenise alike, but .*{message}"):
        harvest(config)
    assert not config.out.exists()


def test_another_beginning_of_text_is_said_and_the_first_is_read(tmp_path, capsys):
    config = with_tokenizers(tmp_path, tokenizer(LETTERS, bos="<b>"))
    tokens = ActivationCache.open(harvest(config), FIRST).tokens
    assert "begins texts with '<b>', but here it reads the tokens of" in capsys.readouterr().err
    assert (tokens.ids[tokens.sequence_starts[:-1]] == LETTERS["<a>"]).all()


def with_tokenizers(folder: Path, second: PreTrainedTokenizerFast | None) -> HarvestConfig:
    for seed, (name, cut) in enumerate({"lm": tokenizer(LETTERS), "chat": second}.items()):
        torch.manual_seed(seed)
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=24, n_embd=8, n_layer=1, n_head=2)).save_pretrained(folder / name)
        if cut is not None:
            cut.save_pretrained(folder / name)
    (folder / "text.txt").write_text("about a cab\n" * 900)
    two = dict(model=str(folder / "lm"), second_model=str(folder / "chat"), sites=(FIRST, "chat/resid_post.0"))
    return HarvestConfig(out=folder / "cache", text=(str(folder / "text.txt"),), device="cpu", **two)
