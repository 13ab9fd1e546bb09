"""The steering command end to end on files it would meet: a tiny model, a cache, a dictionary and its feature index.

f features · d model width
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as hf

from sae.activations.harvest.command import HarvestConfig, harvest
from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import FeatureIndex
from sae.model.language_model import LanguageModel
from sae.model.sampling import Sampling
from steering.command_line import main
from steering.intervention import steered
from steering.steer import SteerConfig, compare_texts, steer
from steering.vector import SteeringVector

WORDS = ["the", "cat", "sat", "on", "a", "mat", "damn", "it", "dog", "ran", "far", "away", "hell", "no", "yes", "red", "blue", "green"]
SILENT = 5  # a feature that never fires


def save_model(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(seed)
    vocab = {word: i for i, word in enumerate(["<s>", *(f"Ġ{word}" for word in WORDS)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<s>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<s>").save_pretrained(folder)
    config = hf.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = hf.LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """model/, sae/ and index/ made with one another; other-model/ beside them."""
    folder = tmp_path_factory.mktemp("parts")
    save_model(folder / "model", 0)
    save_model(folder / "other-model", 1)
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (30,), generator=generator)) for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    site = "resid_post.0"
    harvest(
        HarvestConfig(text=(str(folder / "text.jsonl"),), out=folder / "cache", model=str(folder / "model"), sites=(site,), tokens=1000)
    )
    lm = LanguageModel.load(str(folder / "model"))
    W_fd = torch.randn(8, 16, generator=generator)
    b_enc_f = torch.zeros(8)
    b_enc_f[SILENT] = -1e3
    metadata = {"site": site, "model_name": str(folder / "model"), "model_fingerprint": lm.fingerprint()}
    Dictionary.autoencoder(W_fd, b_enc_f, 2 * W_fd, torch.zeros(16), metadata).save(folder / "sae")
    build_index(IndexConfig(cache=folder / "cache", dictionary=folder / "sae", out=folder / "index"))
    return folder


def config_of(parts: Path, sampling: Sampling = Sampling(max_new_tokens=12), **settings) -> SteerConfig:  # noqa: B008 (it is frozen)
    return SteerConfig(index=parts / "index", prompt="the cat", sampling=sampling, device="cpu", **settings)


def test_report_is_what_the_parts_give_when_used_by_hand(parts):
    settings = dict(max_new_tokens=12, seed=7, temperature=0.8, top_p=0.9)
    report = steer(config_of(parts, Sampling(**settings), feature=3, strength=-2.5, samples=2, positions="generated"))
    lm = LanguageModel.load(str(parts / "model"), device="cpu")
    highest = float(FeatureIndex.open(parts / "index").feature(3).values.max())
    row_d = Dictionary.load(parts / "sae").W_dec_fo[3]
    assert report["max_activation"] == pytest.approx(highest, rel=1e-3)
    assert report["activation"] == pytest.approx(-2.5 * highest, rel=1e-3)
    ids_sp = torch.tensor([[0, 1, 2]] * 2)  # <s> the cat
    plain = lm.generate(ids_sp, **settings)
    with steered(lm, [SteeringVector.at("resid_post.0", -2.5 * report["max_activation"] * row_d)], positions="generated", prompt_length=3):
        changed = lm.generate(ids_sp, **settings)
    for side, ids in (("unsteered", plain), ("steered", changed)):
        expected = [" ".join(WORDS[i - 1] for i in row[3:].tolist() if i) for row in ids]
        assert [text.strip() for text in report[side]["texts"]] == expected
    assert report["steered"]["texts"] != report["unsteered"]["texts"]
    norms = lm.record(plain, ["resid_post.0"])["resid_post.0"].norm(dim=-1)
    relative = 2.5 * highest * row_d.norm() / report["relative_to_residual_norm"]
    assert norms[:, 1:].min() < relative < norms[:, 1:].max()
    assert report["steered"]["nats_per_token"] > 0


def test_strength_zero_changes_nothing_and_a_run_repeats(parts):
    report = steer(config_of(parts, feature=3, strength=0.0))
    assert report["steered"] == report["unsteered"]
    assert report == steer(config_of(parts, feature=3, strength=0.0))


def test_search_takes_the_first_feature_listed_and_counts_the_word(parts):
    report = steer(config_of(parts, search="damn|hell", strength=4.0))
    assert report["feature"] == FeatureIndex.open(parts / "index").search("damn|hell")[0].feature
    for side in ("unsteered", "steered"):
        words = " ".join(report[side]["texts"]).split()
        assert (report[side]["word_count"], report[side]["words"]) == (words.count("damn") + words.count("hell"), len(words))


def test_another_dictionary_folder_with_the_same_weights_is_accepted(parts, tmp_path):
    shutil.copytree(parts / "sae", tmp_path / "moved")
    assert steer(config_of(parts, feature=3, dictionary=tmp_path / "moved")) == steer(config_of(parts, feature=3))
    cfg = json.loads((tmp_path / "moved" / "cfg.json").read_text())
    cfg["metadata"] |= {"site": "resid_pre.0", "hook_name": "blocks.0.hook_resid_pre"}
    (tmp_path / "moved" / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(InputError, match=r"made for resid_pre\.0.*resid_post\.0"):
        steer(config_of(parts, feature=3, dictionary=tmp_path / "moved"))


def run_command(parts: Path, monkeypatch, *flags: str) -> None:
    arguments = ["--index", str(parts / "index"), "--prompt", "the [b]cat", "--max-new-tokens", "12", "--device", "cpu", *flags]
    monkeypatch.setattr(sys, "argv", ["steer", *arguments])
    main("steer")


@pytest.mark.parametrize("width", [100, 50])
def test_printed_side_by_side_or_one_under_the_other(parts, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    run_command(parts, monkeypatch, "--feature", "3", "--samples", "1", "--strength", "1.5")
    printed = capsys.readouterr().out
    assert "feature 3 at resid_post.0" in printed
    assert "1.5 x its maximum activation" in " ".join(printed.split())
    assert "x the residual norm" in " ".join(printed.split())
    assert "the [b]cat" in printed  # not taken for markup
    together = [line for line in printed.splitlines() if "unsteered" in line and line.count("steered") == 2 and "nats" not in line]
    assert bool(together) == (width == 100)
    assert max(map(len, printed.splitlines())) <= width


def test_json_is_one_object(parts, monkeypatch, capsys):
    run_command(parts, monkeypatch, "--search", "damn", "--json")
    report = json.loads(capsys.readouterr().out)
    assert len(report["steered"]["texts"]) == 3
    assert report["failure"] is None


@pytest.mark.parametrize("strength", ["1e30", "1e300"])
def test_a_strength_beyond_arithmetic_is_said_in_a_sentence(parts, monkeypatch, capsys, strength):
    run_command(parts, monkeypatch, "--feature", "3", "--json", "--strength", strength)
    report = json.loads(capsys.readouterr().out)
    assert report["steered"] is None
    assert "more than the model's arithmetic can carry" in report["failure"]
    monkeypatch.setenv("COLUMNS", "50")
    run_command(parts, monkeypatch, "--feature", "3", "--strength", strength)
    assert "arithmetic can carry" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_half_precision_that_overflows_is_said_in_a_sentence(parts):
    lm = LanguageModel.load(str(parts / "model"), device="cpu", dtype="float16")
    vector = SteeringVector.at("resid_post.0", torch.ones(16))
    report = compare_texts(lm, vector, 1e6, config_of(parts, feature=3))  # above 65,504
    assert report["steered"] is None
    assert "not finite at new token 1" in report["failure"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(feature=8), "features 0 to 7"),
        (dict(feature=-1), "features 0 to 7"),
        (dict(feature=SILENT), "never fires"),
        (dict(), "either --feature or --search"),
        (dict(feature=1, search="damn"), "either --feature or --search"),
        (dict(search="zebra"), "zebra"),
        (dict(feature=1, strength=float("nan")), "finite strength"),
        (dict(feature=1, samples=0), "at least one sample"),
        (dict(feature=1, sampling=Sampling(top_p=2.0)), "top_p"),
    ],
)
def test_unusable_settings(parts, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        steer(config_of(parts, **settings))


def test_parts_that_do_not_belong_together(parts, tmp_path):
    sae = Dictionary.load(parts / "sae")
    Dictionary.autoencoder(sae.W_enc_fd, sae.b_enc_f + 1, sae.W_dec_fo, sae.b_dec_o, sae.metadata).save(tmp_path / "other")
    with pytest.raises(InputError, match=r"weights in .* differ"):
        steer(config_of(parts, feature=1, dictionary=tmp_path / "other"))
    with pytest.raises(InputError, match="has other weights"):
        steer(config_of(parts, feature=1, model=str(parts / "other-model")))


def test_command_exits_2_with_one_sentence(parts, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(parts, monkeypatch, "--feature", "8")
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: feature 8 does not exist")
