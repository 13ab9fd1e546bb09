"""The index against brute force on a world whose activations are known exactly."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_world import VOCABULARY, save_dictionary

from sae.disk.writing import only_writer
from sae.errors import InputError
from sae.features.index import spooling
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import FeatureIndex

ROOT = Path(__file__).resolve().parents[2]


def config_of(world, out, **changes):
    return IndexConfig(cache=world.cache, dictionary=world.dictionary_folder, out=out, device="cpu", **changes)


def assert_equals_dense(index: FeatureIndex, dense: np.ndarray) -> None:
    """All records and statistics; the stored values are the float16 roundings, here exact."""
    scanned = np.asarray(index.tokens["scanned"])
    dense = dense * scanned[:, None]
    for j in range(index.d_sae):
        feature = index.feature(j)
        np.testing.assert_array_equal(feature.positions, np.flatnonzero(dense[:, j]))
        np.testing.assert_array_equal(feature.values, dense[feature.positions, j])
    np.testing.assert_array_equal(index.columns["count"], (dense > 0).sum(0))
    np.testing.assert_array_equal(index.columns["density"], ((dense > 0).sum(0) / scanned.sum()).astype(np.float32))
    np.testing.assert_array_equal(index.columns["max"], dense.max(0))
    np.testing.assert_allclose(index.columns["mean"], dense.sum(0) / np.maximum((dense > 0).sum(0), 1), rtol=1e-6)
    document = np.repeat(index.tokens["sequence_document"], np.diff(index.tokens["sequence_starts"]))
    for j in range(index.d_sae):
        values = dense[dense[:, j] > 0, j].astype(np.float64)
        for name, expected in zip(("std", "skewness", "kurtosis"), shape_of(values)):
            assert index.columns[name][j] == pytest.approx(expected, rel=1e-4, abs=1e-6), name
        assert index.columns["documents"][j] == len(set(document[dense[:, j] > 0]))


def shape_of(values: np.ndarray) -> tuple[float, float, float]:
    """Standard deviation, skewness and kurtosis; 0 where all values are equal."""
    if not len(values) or values.std() < 1e-9:
        return 0, 0, 0
    z = (values - values.mean()) / values.std()
    return values.std(), (z**3).mean(), (z**4).mean()


def test_index_equals_brute_force(world, dense):
    ids = np.asarray(world.index.tokens["ids"])
    np.testing.assert_array_equal(world.index.tokens["scanned"], ids != 0)  # all but beginning-of-text
    assert world.index.info["tokens_scanned"] == (ids != 0).sum()
    assert_equals_dense(world.index, dense)


def test_small_chunks_give_the_same_files(world, tmp_path, monkeypatch):
    monkeypatch.setattr(spooling, "CHUNK_BYTES", 40 * 4 * 7)  # seven rows at a time
    build_index(config_of(world, tmp_path / "index"))
    names = {path.name for path in world.index.folder.iterdir()}
    assert names == {path.name for path in (tmp_path / "index").iterdir()}
    for name in names:
        assert (tmp_path / "index" / name).read_bytes() == (world.index.folder / name).read_bytes(), name


def test_budget_takes_whole_sequences(world, dense, tmp_path):
    index = FeatureIndex.open(build_index(config_of(world, tmp_path / "index", tokens=1000)))
    scanned, ids = np.asarray(index.tokens["scanned"]), np.asarray(index.tokens["ids"])
    assert 900 < index.info["tokens_scanned"] <= 1000
    starts = index.tokens["sequence_starts"]
    for low, high in itertools.pairwise(starts):
        inside = scanned[low:high][ids[low:high] != 0]
        assert inside.all() or not inside.any()
    assert_equals_dense(index, dense)


def test_splits_are_kept_apart(world, tmp_path):
    index = FeatureIndex.open(build_index(config_of(world, tmp_path / "index", splits=("held_out",))))
    split = np.repeat(index.tokens["sequence_split"], np.diff(index.tokens["sequence_starts"]))
    np.testing.assert_array_equal(index.tokens["scanned"], (split == 1) & (np.asarray(index.tokens["ids"]) != 0))


def test_logit_lens_is_the_change_of_the_logits(world):
    """Adding a feature to a stream changes the logits by the lens values over the stream's standard deviation, to first order."""
    from sae.model.language_model import LanguageModel

    lm = LanguageModel.load(str(world.model), device="cpu")
    model = lm.model.double()
    head = torch.nn.Sequential(model.transformer.ln_f, model.lm_head)
    x_d = torch.randn(VOCABULARY, dtype=torch.float64) * 10
    row_d = world.dictionary.W_dec_fo[7].double()
    step = 1e-5
    change_v = (head(x_d + step * row_d) - head(x_d))[: len(world.tokenizer)] / step
    # moving along x itself changes nothing after the norm, so that part of the row is subtracted on both sides
    centred_d = x_d - x_d.mean()
    sigma = centred_d.pow(2).mean().sqrt()
    along = (row_d @ centred_d) / (centred_d @ centred_d)
    change_v += (head(x_d) - head(torch.zeros_like(x_d)))[: len(world.tokenizer)] * along
    expected_v = (change_v - change_v.mean()) * sigma
    columns = world.index.feature(7).columns
    top, bottom = expected_v.topk(20), (-expected_v).topk(20)
    np.testing.assert_allclose(columns["top_token_values"], top.values, rtol=1e-3)
    np.testing.assert_allclose(columns["bottom_token_values"], -bottom.values, rtol=1e-3)
    assert columns["top_token_ids"].tolist() == top.indices.tolist()


def test_logit_lens_of_the_heads_goes_through_the_output_projection(world, tmp_path):
    from sae.activations.harvest.command import HarvestConfig, harvest
    from sae.features.index.lens import folded_unembedding
    from sae.model.language_model import LanguageModel

    text = str(world.cache.parent / "text.jsonl")
    site = ("head_out.0",)
    harvest(HarvestConfig(text=(text,), out=tmp_path / "cache", model=str(world.model), sites=site, tokens=300, held_out=0.0, device="cpu"))
    W_fd = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(1))
    dictionary = save_dictionary(tmp_path / "heads", W_fd, torch.ones(6), tmp_path / "cache", site="head_out.0")
    config = IndexConfig(cache=tmp_path / "cache", dictionary=tmp_path / "heads", out=tmp_path / "index", splits=("train",), device="cpu")
    index = FeatureIndex.open(build_index(config))
    lm = LanguageModel.load(str(world.model), device="cpu")
    W_U_vd, _ = folded_unembedding(lm)
    lens_fv = dictionary.W_dec_fo @ lm.model.transformer.h[0].attn.c_proj.weight @ W_U_vd[: len(world.tokenizer)].T
    lens_fv -= lens_fv.mean(1, keepdim=True)
    np.testing.assert_allclose(index.columns["top_token_values"], lens_fv.topk(20).values, rtol=1e-3, atol=1e-5)
    assert "output projection" in index.info["logit_lens"]


def test_what_does_not_belong_together_is_refused(world, tmp_path, capsys):
    W_enc_fd, b = torch.ones(2, VOCABULARY), torch.zeros(2)
    cases = {
        "site": save_dictionary(tmp_path / "site", W_enc_fd, b, world.cache, site="resid_post.0"),
        "model": save_dictionary(tmp_path / "model", W_enc_fd, b, world.cache, model_fingerprint="000000000000"),
        "name": save_dictionary(tmp_path / "name", W_enc_fd, b, world.cache, model_name="other", model_fingerprint=None),
        "width": save_dictionary(tmp_path / "width", W_enc_fd[:, :8], b, world.cache),
    }
    said = {"site": r"resid_pre\.0.*'resid_post\.0'", "model": "fingerprint 000000000000", "name": "--model", "width": "of width 8"}
    for name in cases:
        config = dataclasses.replace(config_of(world, tmp_path / "index"), dictionary=tmp_path / name)
        with pytest.raises(InputError, match=said[name]):
            build_index(config)
        assert not (tmp_path / "index").exists()
    named = dataclasses.replace(config_of(world, tmp_path / "index"), dictionary=tmp_path / "name", model=str(world.model), tokens=500)
    build_index(named)
    assert "no fingerprint tells" in capsys.readouterr().err
    hooked = json.loads((tmp_path / "site" / "cfg.json").read_text())
    del hooked["metadata"]["site"]  # a folder of SAELens knows the hook alone
    (tmp_path / "site" / "cfg.json").write_text(json.dumps(hooked))
    with pytest.raises(InputError, match=said["site"]):
        build_index(dataclasses.replace(config_of(world, tmp_path / "other"), dictionary=tmp_path / "site"))


@pytest.mark.parametrize(
    "changes", [{"splits": ("test",)}, {"splits": ()}, {"splits": ("train", "train")}, {"tokens": 0}, {"part": "3/2"}, {"part": "half"}]
)
def test_unusable_options_are_refused(world, tmp_path, changes):
    with pytest.raises(InputError):
        build_index(config_of(world, tmp_path / "index", **changes))
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_only_an_older_index_is_replaced(world, tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="something else"):
        build_index(config_of(world, tmp_path / "index"))
    assert (tmp_path / "index" / "letter.txt").read_text() == "dear"
    (tmp_path / "index" / "letter.txt").rename(tmp_path / "index" / "index.json")
    build_index(config_of(world, tmp_path / "index", tokens=500))
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert FeatureIndex.open(tmp_path / "index").info["tokens_scanned"] <= 500


def test_an_index_cut_short_is_refused(world, tmp_path):
    out = build_index(config_of(world, tmp_path / "index", tokens=500))
    records = out / "records.safetensors"
    records.write_bytes(records.read_bytes()[:-2])
    with pytest.raises(InputError, match="records"):
        FeatureIndex.open(out)
    (out / "index.json").write_text(json.dumps({"format_version": 0}))
    with pytest.raises(InputError, match="format"):
        FeatureIndex.open(out)


def test_contributions_to_the_fvu_equal_leaving_a_feature_out(world, dense):
    index = world.index
    kept = np.asarray(index.tokens["scanned"])
    x = torch.eye(VOCABULARY, dtype=torch.float64)[torch.from_numpy(np.asarray(index.tokens["ids"])[kept].astype(np.int64))]
    acts, dictionary = torch.from_numpy(dense[kept]).double(), world.dictionary
    centred = (x - x.mean(0)).square().sum()
    error = (x - acts @ dictionary.W_dec_fo.double() - dictionary.b_dec_o.double()).square()
    assert index.info["fvu"] == pytest.approx((error.sum() / centred).item(), rel=1e-5)
    for j in (3, 4, 17):
        without = acts.clone()
        without[:, j] = 0
        rise = (x - without @ dictionary.W_dec_fo.double() - dictionary.b_dec_o.double()).square().sum() - error.sum()
        assert index.columns["fvu_contribution"][j] == pytest.approx((rise / centred).item(), rel=1e-4, abs=1e-9)


def test_lens_histogram_counts_the_whole_vocabulary(world):
    from sae.features.index.lens import folded_unembedding
    from sae.model.language_model import LanguageModel

    W_U_vd, _ = folded_unembedding(LanguageModel.load(str(world.model), device="cpu"))
    W_U_vd = W_U_vd[: len(world.tokenizer)].detach()
    values = ((W_U_vd - W_U_vd.mean(0)) @ world.dictionary.W_dec_fo[7]).numpy()
    edges, counts = world.index.lens_histogram(7)
    assert counts.sum() == len(values)
    assert (edges[0], edges[-1]) == pytest.approx((values.min(), values.max()), rel=1e-4)
    assert (
        np.abs(np.cumsum(counts) - np.cumsum(np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0])).max() <= 1
    )  # a value on an edge may round either way


KILLED = """
import os, signal, sys
import sae.features.index.build as module
from pathlib import Path
write = module.write_final_files
def killed(*arguments):
    write(*arguments) if sys.argv[4] == "late" else None
    os.kill(os.getpid(), signal.SIGKILL)
module.write_final_files = killed
module.build_index(module.IndexConfig(cache=Path(sys.argv[1]), dictionary=Path(sys.argv[2]), out=Path(sys.argv[3]), device="cpu"))
"""


def test_a_kill_leaves_the_older_index_whole_and_the_next_build_clears_up(world, tmp_path):
    out = build_index(config_of(world, tmp_path / "index", tokens=500))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for moment in ("early", "late"):
        command = [sys.executable, "-c", KILLED, str(world.cache), str(world.dictionary_folder), str(out), moment]
        assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == -signal.SIGKILL
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert len(list(tmp_path.iterdir())) == 3  # what it had written so far, and its pieces
    out.rename(tmp_path / ".index.999999999.old.tmp")  # as a kill between the two renames leaves it
    with pytest.raises(InputError):
        build_index(config_of(world, out, tokens=0))
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_interruption_between_the_two_renames_keeps_the_older_index(world, tmp_path, monkeypatch):
    out = build_index(config_of(world, tmp_path / "index", tokens=500))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rename = Path.rename

    def interrupted(self, target):
        if target == out and not self.name.endswith(".old.tmp"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_index(config_of(world, out, tokens=300))
    assert {path.name for path in tmp_path.iterdir()} == {"index", ".index.pieces"}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_place_where_nothing_can_be_written_is_said_so(world, tmp_path):
    (tmp_path / "file").touch()
    for out in (Path("/proc/index"), tmp_path / "file" / "index"):
        with pytest.raises(InputError, match=f"{out}.*choose another place|{out} does not exist"):
            build_index(config_of(world, out))


def test_a_build_leaves_alone_what_others_are_at_work_on(world, tmp_path):
    out, other = tmp_path / "part", tmp_path / ".part.9.999999999.tmp"  # that of a build of "part.9"
    with only_writer(tmp_path / ".part.999999999.tmp"):  # a process of another machine
        other.mkdir()
        build_index(config_of(world, out, tokens=300))
        assert sorted(path.name for path in tmp_path.iterdir()) == [".part.9.999999999.tmp", ".part.999999999.tmp", "part"]
    with only_writer(out), pytest.raises(InputError, match="another run"):  # as `sae explain` holds it
        build_index(config_of(world, out, tokens=500))
    (tmp_path / f".part.{os.getpid()}.tmp").mkdir()  # of a process that was killed and had our number: in a container that is the rule
    build_index(config_of(world, out, tokens=500))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".part.9.999999999.tmp", "part"]


def test_a_search_goes_on_in_an_index_that_was_replaced(world, tmp_path):
    index = FeatureIndex.open(build_index(config_of(world, tmp_path / "index")))
    before = index.search("zebrafly")
    build_index(config_of(world, tmp_path / "index", tokens=500))
    assert index.search("zebrafly") == before != FeatureIndex.open(tmp_path / "index").search("zebrafly")


def test_a_full_disk_is_one_sentence_and_leaves_the_older_index_whole(world, tmp_path, monkeypatch):
    """The disk runs full at each of the fifteen arrays in turn that the pieces and the index reserve room for."""
    out = build_index(config_of(world, tmp_path / "index", tokens=300))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    reserve, left = os.posix_fallocate, [0]

    def fill_up(*place):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(*place)

    monkeypatch.setattr(os, "posix_fallocate", fill_up)
    for room in range(15):
        left[0] = room
        with pytest.raises(InputError, match="the disk ran full"):
            build_index(config_of(world, out, tokens=500))
        assert {path.name for path in tmp_path.iterdir()} <= {"index", ".index.pieces"}  # what is finished is kept for the next try
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        shutil.rmtree(tmp_path / ".index.pieces", ignore_errors=True)
    left[0] = 15
    assert FeatureIndex.open(build_index(config_of(world, out, tokens=500))).info["tokens_scanned"] > 300


def test_activations_that_are_not_finite_are_refused(world, tmp_path):
    b_enc_f = world.dictionary.b_enc_f.clone()
    b_enc_f[5] = 3e38
    save_dictionary(tmp_path / "dictionary", 1e38 * world.dictionary.W_enc_fd, b_enc_f, world.cache)  # sums beyond float32
    with pytest.raises(InputError, match="NaN or infinite"):
        build_index(dataclasses.replace(config_of(world, tmp_path / "index"), dictionary=tmp_path / "dictionary"))
    assert [path.name for path in tmp_path.iterdir()] == ["dictionary"]
