"""Importing: the rows and tokens of other programs arrive unchanged, and what is unknown or unusable is said in a sentence."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sae.activations.cache import ActivationCache
from sae.activations.imports.command import ImportConfig, import_activations
from sae.activations.imports.foreign import open_source
from sae.errors import InputError
from sae.features.index.build import IndexConfig, build_index
from sae.kinds import ReLU
from sae.model.language_model import LanguageModel
from sae.training import TrainingConfig, train

WIDTH, CONTEXT = 6, 10
PEERS = Path(__file__).resolve().parents[3] / ".peers" / "bin" / "python"
RUNNER = """
import sys
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
config = CacheActivationsRunnerConfig(
    dataset_path="none", model_name=sys.argv[1], model_class_name="AutoModelForCausalLM", model_batch_size=4, hook_name="transformer.h.1",
    d_in=16, training_tokens=2048, context_size=32, new_cached_activations_path=sys.argv[2], buffer_size_gb=512 * 16 * 4 / 1e9,
    device="cpu", streaming=False, seed=0,
)
texts = [" ".join(chr(97 + (i * j) % 26) * (1 + i % 5) for j in range(60)) for i in range(80)]
CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"text": texts})).run()
"""


def rows_of(cache: ActivationCache) -> dict[int, list[float]]:
    """Every row of the cache, by its global position."""
    found: dict[int, list[float]] = {}
    for split in ("train", "held_out"):
        for shard in cache.shards(split):
            activations, rows = cache.read(shard)
            assert not set(rows.tolist()) & set(found)
            found |= dict(zip(rows.tolist(), activations.float().tolist()))
    return found


def saelens_folder(folder: Path, sequences: int = 60, dtype: str = "float32", ids: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """In the schema of CacheActivationsRunner: a column named by the hook, Array2D a row, and token_ids. Returns both, end to end."""
    from datasets import Array2D, Dataset, Features, Sequence, Value

    rng = np.random.default_rng(0)
    acts = rng.normal(size=(sequences, CONTEXT, WIDTH)).astype(dtype)
    token_ids = rng.integers(1, 40, (sequences, CONTEXT)).astype(np.int32)
    token_ids[:, 0] = 0
    hook = "blocks.1.hook_resid_post"
    features, columns = {hook: Array2D((CONTEXT, WIDTH), dtype)}, {hook: acts}
    if ids:
        features["token_ids"] = Sequence(Value("int32"), length=CONTEXT)
        columns["token_ids"] = token_ids
    Dataset.from_dict(columns, features=Features(features)).save_to_disk(str(folder))
    return acts.reshape(-1, WIDTH), token_ids.reshape(-1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    size = dict(vocab_size=40, n_positions=16, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_saelens_folder_arrives_whole_with_its_tokens(tmp_path, dtype):
    acts, ids = saelens_folder(tmp_path / "theirs", dtype=dtype)
    out = import_activations(
        ImportConfig(source=(tmp_path / "theirs",), out=tmp_path / "ours", dtype="float32", held_out=0.3, pool_tokens=150, shard_tokens=60)
    )
    cache = ActivationCache.open(out)
    found = rows_of(cache)
    assert cache.site == "resid_post.1"
    assert found == dict(enumerate(acts.astype(np.float32).tolist()))
    assert cache.verify() == []
    assert cache.tokens.ids.tolist() == ids.tolist()
    held_out = {int(row) // CONTEXT for shard in cache.shards("held_out") for row in cache.read(shard)[1]}
    assert held_out == set(np.flatnonzero(cache.tokens.sequence_split == 1).tolist())
    assert 5 < len(held_out) < 35
    train_rows = np.concatenate([cache.read(shard)[1].numpy() for shard in cache.shards("train")])
    assert (np.diff(train_rows // CONTEXT) == 0).mean() < 0.3  # in order it would be 0.9
    squares = (acts[train_rows].astype(np.float64) ** 2).sum(1)
    assert cache.mean_squared_norm == pytest.approx(squares.mean(), rel=1e-12)
    assert (cache.manifest["context"], cache.manifest["dataset"], cache.manifest["prepend_bos"]) == (CONTEXT, None, None)


def test_with_its_model_beginnings_are_left_out_and_the_model_is_known(tmp_path, model):
    acts, _ = saelens_folder(tmp_path / "theirs")
    out = import_activations(ImportConfig(source=(tmp_path / "theirs",), out=tmp_path / "ours", model=model, dtype="float32"))
    cache = ActivationCache.open(out)
    assert rows_of(cache) == {n: row for n, row in enumerate(acts.tolist()) if n % CONTEXT}
    assert cache.manifest["counts"]["left_out"]["beginning_of_text"] == 60
    assert cache.manifest["prepend_bos"] is True
    cache.require_model(LanguageModel.load(model, device="cpu"))


def test_sequences_that_begin_twice_are_counted_and_keep_neither_beginning(tmp_path, model, capsys):
    from datasets import load_from_disk

    saelens_folder(tmp_path / "theirs")

    def begin_twice(row: dict, number: int) -> dict:
        return row | {"token_ids": [0, 0 if number % 3 == 0 else 1, *row["token_ids"][2:]]}

    load_from_disk(str(tmp_path / "theirs")).map(begin_twice, with_indices=True).save_to_disk(str(tmp_path / "twice"))
    out = import_activations(ImportConfig(source=(tmp_path / "twice",), out=tmp_path / "ours", model=model, dtype="float32"))
    assert "20 of 60 sequences begin with two beginning-of-text tokens" in capsys.readouterr().out
    assert set(rows_of(ActivationCache.open(out))) == {n for n in range(600) if n % 10 and n % 30 != 1}


def test_a_damaged_saelens_folder_is_one_sentence(tmp_path):
    saelens_folder(tmp_path / "theirs")
    for path in sorted((tmp_path / "theirs").iterdir()):
        whole = path.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], whole[:-9] + b"\xff" * 9):
            path.write_bytes(damaged)
            try:
                source = open_source((tmp_path / "theirs",), None, None)
                source.read(0, source.rows)
            except InputError as error:
                assert str(tmp_path / "theirs") in str(error)  # noqa: PT017 (the end of an arrow file may be anything)
        path.write_bytes(whole)


def test_what_is_unknown_is_refused_where_it_is_needed(tmp_path, model):
    values = np.random.default_rng(0).normal(size=(3000, WIDTH)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    out = import_activations(ImportConfig(source=(tmp_path / "x.npy",), out=tmp_path / "ours", site="resid_post.0"))
    cache = ActivationCache.open(out)
    assert cache.manifest["model"] == {"name": None, "revision": None, "fingerprint": None, "dtype": None}
    with pytest.raises(InputError, match="--token-ids"):
        _ = cache.tokens
    with pytest.raises(InputError, match="--model"):
        cache.require_model(LanguageModel.load(model, device="cpu"))
    (folder,) = train(TrainingConfig(cache=out, out=tmp_path / "d", d_sae=8, kind=ReLU(l1=(0.1,)), steps=3, batch_size=32, device="cpu"))
    with pytest.raises(InputError, match="--model"):
        build_index(IndexConfig(cache=out, dictionary=folder, out=tmp_path / "index"))


def test_plain_arrays_arrive_whole(tmp_path):
    values = torch.randn(2500, WIDTH, generator=torch.Generator().manual_seed(0))
    ids = np.arange(2500, dtype=np.uint16) % 300
    np.save(tmp_path / "a.npy", values[:1100].numpy())
    np.save(tmp_path / "b.npy", values[1100:].numpy())
    np.save(tmp_path / "ids.npy", ids)
    save_file({"x": values.bfloat16(), "other": torch.ones(3)}, tmp_path / "x.safetensors")
    two = dict(source=(tmp_path / "a.npy", tmp_path / "b.npy"), token_ids=tmp_path / "ids.npy", dtype="float32")
    one = dict(source=(tmp_path / "x.safetensors",), dtype="bfloat16")
    for name, options, expected in (("two", two, values), ("one", one, values.bfloat16())):
        config = ImportConfig(**options, out=tmp_path / name, site="mlp_out.1", pool_tokens=1500, held_out=0.4)
        cache = ActivationCache.open(import_activations(config))
        assert rows_of(cache) == dict(enumerate(expected.float().tolist()))
        before = (tmp_path / name / "manifest.json").stat().st_mtime_ns
        import_activations(config)  # complete: nothing happens
        assert (tmp_path / name / "manifest.json").stat().st_mtime_ns == before
    assert ActivationCache.open(tmp_path / "two").tokens.ids.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (np.where(np.arange(40)[:, None] == 7, np.nan, 1.0) * np.ones((40, 3)), {}, "row 7 .*NaN"),
        (np.where(np.arange(40)[:, None] % 20 == 7, 1e6, 1.0) * np.ones((40, 3)), {}, "row 7, 27 .*bfloat16"),
        (np.ones((40, 3), dtype=np.int64), {}, "floats.*int64"),
        (np.ones(40), {}, "2 dimensions"),
        (np.empty((0, 3)), {}, "empty"),
        (np.ones((40, 3)), {"site": None}, "--site"),
        (np.ones((40, 3)), {"site": "nowhere.1"}, "site"),
        (np.ones((40, 3)), {"model": "lm"}, "width 6"),
        (np.ones((40, 6)), {"model": "lm", "token_ids": np.full(40, 40)}, "vocabulary"),
        (np.ones((40, 3)), {"token_ids": np.ones(39, dtype=int)}, "40 integer token ids"),
        (np.array([{}] * 3), {}, "Python objects"),
    ],
)
def test_unusable_sources_are_refused_and_no_cache_appears(tmp_path, model, values, changes, message):
    np.save(tmp_path / "x.npy", values, allow_pickle=True)
    if "token_ids" in changes:
        np.save(tmp_path / "ids.npy", changes["token_ids"])
        changes = {**changes, "token_ids": tmp_path / "ids.npy"}
    if "model" in changes:
        changes = {**changes, "model": model}
    with pytest.raises(InputError, match=message):
        import_activations(ImportConfig(**{"source": (tmp_path / "x.npy",), "out": tmp_path / "c", "site": "resid_post.0", **changes}))
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((4, 3)))
    np.save(tmp_path / "b.npy", np.ones((4, 5)))
    save_file({"x": torch.ones(4, 3), "y": torch.ones(4, 3)}, tmp_path / "two.safetensors")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (("a.npy", "b.npy"), "width 3.*has 5"),
        (("two.safetensors",), "x, y.*--column"),
        (("none.npy",), "does not exist"),
        (("empty",), "CacheActivationsRunner"),
    ):
        with pytest.raises(InputError, match=message):
            import_activations(
                ImportConfig(source=tuple(tmp_path / name for name in source), out=tmp_path / "c", site="resid_post.0", dtype="float32")
            )


@pytest.mark.peers
@pytest.mark.timeout(240)
def test_what_the_real_runner_writes_are_the_models_activations_at_its_tokens(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not PEERS.exists():
        pytest.skip("no environment .peers with SAELens; make bench-peers creates it")
    alphabet = {"<bos>": 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = dict(bos_token="<bos>", eos_token="<bos>", pad_token="<bos>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(tmp_path / "lm")
    torch.manual_seed(0)
    size = dict(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(tmp_path / "lm")
    ran = subprocess.run([PEERS, "-c", RUNNER, tmp_path / "lm", tmp_path / "theirs"], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    config = ImportConfig(source=(tmp_path / "theirs",), out=tmp_path / "ours", site="resid_post.1", model=str(tmp_path / "lm"))
    cache = ActivationCache.open(import_activations(config))
    ids = torch.from_numpy(np.array(cache.tokens.ids)).long().reshape(-1, 32)
    expected = LanguageModel.load(str(tmp_path / "lm"), device="cpu").record(ids, ["resid_post.1"])["resid_post.1"].reshape(-1, 16)
    found = rows_of(cache)
    assert sorted(found) == ids.reshape(-1).nonzero()[:, 0].tolist()
    assert len(found) > 1900
    torch.testing.assert_close(torch.tensor([found[n] for n in sorted(found)]), expected[sorted(found)], rtol=2e-3, atol=1e-4)
