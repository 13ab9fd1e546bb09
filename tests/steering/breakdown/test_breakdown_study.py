"""Many directions of a model: what their files hold, against the command for one direction; the summary against loops written here."""

import json
import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.sampling import Sampling
from steering.breakdown.command import BreakdownConfig, diagnose_breakdown
from steering.breakdown.findings import SIGNS
from steering.breakdown.study import StudyConfig, study
from steering.breakdown.study_summary import KL, late_layers, markdown, rank_correlation, restored_by, signs, summary, walls

TEXTS, RNG = 5, np.random.default_rng(0)


def made(kind: str, rho: float, *, site: str = "resid_post.0", reached: bool = True, **crossed: float) -> dict:
    kl_of_texts = {"added": RNG.uniform(0.5, 1.5, TEXTS).tolist(), "rotated": RNG.uniform(0.2, 1.5, TEXTS).tolist()}
    return {
        "site": site,
        "kind": kind,
        "name": f"{kind}:1",
        "walls": {"added": {"rho": rho, "reached": reached}},
        "kl_of_texts_at_wall": kl_of_texts,
        "crossings": {sign.name: crossed.get(sign.name) for sign in SIGNS} | {KL: rho},
        "rows": [],
        "restored": {"rotated": {"value": 0.1, "low": 0.0, "high": 0.2}},
        "slopes": {},
        "lens_sharpness": float(RNG.normal()),
    }


def test_shares_and_their_intervals_are_those_of_both_draws():
    results = [made("pca", 1.0), made("random", 2.0), made("random", 3.0), made("random", 9.0, reached=False)]
    found = restored_by(results, "rotated")
    reached = [result["kl_of_texts_at_wall"] for result in results[:3]]
    shares = [1 - sum(one["rotated"]) / sum(one["added"]) for one in reached]
    assert (found["directions"], found["not_finite"], found["value"]) == (3, 0, pytest.approx(sorted(shares)[1]))
    assert (found["least"], found["most"]) == (pytest.approx(min(shares)), pytest.approx(max(shares)))
    rng, drawn = np.random.default_rng(5), []
    for _ in range(20_000):
        directions, texts = rng.integers(0, 3, 3), rng.integers(0, TEXTS, TEXTS)
        drawn.append(
            np.median([1 - sum(reached[i]["rotated"][s] for s in texts) / sum(reached[i]["added"][s] for s in texts) for i in directions])
        )
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.04)
    assert restored_by(results, "nothing") is None
    results[0]["kl_of_texts_at_wall"]["rotated"][0] = None  # JSON's word for what is not finite
    found = restored_by(results, "rotated")
    assert (found["directions"], found["not_finite"]) == (2, 1)


def test_walls_signs_and_ranks():
    results = [made("pca", rho, **{SIGNS[0].name: rho / 2}) for rho in (0.5, 1.0, 4.0)] + [made("pca", 8.0, reached=False)]
    found = walls(results)
    assert (found["reached"], found["of"], found["median"]["value"], found["least"], found["most"]) == (3, 4, 1.0, 0.5, 4.0)
    assert walls([made("pca", 1, reached=False)])["median"]["value"] is None
    first = signs(results)[SIGNS[0].name]
    assert first == {"crossed": 3, "of": 4, "median_rho": 0.5, "ahead_of_kl": 3}
    assert signs(results)[SIGNS[1].name] == {"crossed": 0, "of": 4, "median_rho": None, "ahead_of_kl": 0}
    x, y = RNG.normal(size=12).round(1), RNG.normal(size=12).round(1)
    assert rank_correlation(x, y)["value"] == pytest.approx(spearmanr(x, y).statistic)
    assert rank_correlation([*x, math.nan], [*y, 1.0])["directions"] == 12
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4])["value"] is None


def test_late_layers_are_decided_by_the_whole_interval():
    def side(site: str, rhos: list[float]) -> list[dict]:
        return [made("pca", rho, site=site) for rho in rhos]

    early, late = side("resid_post.0", [2, 2.1, 2.2, 2.3]), side("resid_post.9", [1, 1.1, 1.2, 1.3])
    found = late_layers(early, late)
    assert (found["held"], found["ratio"]["value"]) == (True, pytest.approx(1.15 / 2.15))
    assert late_layers(late, early)["held"] is False
    assert late_layers(early, side("resid_post.9", [1, 2, 3, 4]))["held"] is None
    other_kind = [{**one, "kind": "feature"} for one in side("resid_post.9", [100])]
    assert late_layers(early, [*late, *other_kind])["ratio"] == found["ratio"]  # features are at one site alone


def test_random_directions_are_held_against_the_others():
    results = [made("random", 2.0), made("random", 4.0), made("pca", 1.0), made("feature", 2.0), made("pca", 1.5)]
    found = summary(results)["sites"]["resid_post.0"]["random_over_others"]
    assert found["value"] == pytest.approx(3.0 / 1.5)
    assert found["low"] < 2 < found["high"]
    assert summary(results[2:])["sites"]["resid_post.0"]["random_over_others"] is None


def test_the_tables_have_every_site_and_arm():
    results = [made("pca", rho, site=site) for site in ("resid_post.10", "resid_post.9") for rho in (0.5, 2.0)]
    found = summary(results)
    assert list(found["sites"]) == ["resid_post.9", "resid_post.10"]
    breaks, front = "added everywhere, the model breaks at rho 1 to 4", "added in front alone, the KL stops growing"
    assert found["sites"]["resid_post.9"]["predictions"][breaks] == {"held": 1, "failed": 1, "not_decided": 0}
    text = markdown({"model": "m", "summary": found})
    assert "## resid_post.10: 2 directions" in text
    assert "| rotated | " in text
    assert f"| {breaks} | 1 | 1 |" in text
    assert front not in text


@pytest.fixture(scope="module")
def folder(byte_lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    byte_lm.model.save_pretrained(path)
    byte_lm.tokenizer.save_pretrained(path)
    dictionary = Dictionary.initial(32, 48, seed=0, decoder_norm=1.0)
    dictionary.metadata |= {"hook_name": "blocks.1.hook_resid_post"}
    dictionary.save(path / "sae")
    return path


def config(folder, out, **given) -> StudyConfig:
    settings = dict(model=str(folder), dictionary=str(folder / "sae"), strengths=(0.1, 1.0), prompts=("A",), out=out, device="cpu", each=2)
    return StudyConfig(**settings | {"sampling": Sampling(max_new_tokens=4)} | given)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_study_holds_what_single_directions_give_and_goes_on_where_it_stopped(folder, tmp_path, capsys):
    found = study(config(folder, tmp_path / "study"))
    assert "resid_post.1: 8 directions" in capsys.readouterr().out
    assert {site: one["directions"] for site, one in found["summary"]["sites"].items()} == {"resid_post.0": 6, "resid_post.1": 8}
    kept = {path.name: json.loads(path.read_text()) for path in sorted((tmp_path / "study/directions/resid_post.1").iterdir())}
    assert sum(one["kind"] == "feature" for one in kept.values()) == 2

    given = dict(site="resid_post.1", strengths=(0.1, 1.0), prompts=("A",), sampling=Sampling(max_new_tokens=4), device="cpu")
    single = BreakdownConfig(model=str(folder), vector="pca:2", out=tmp_path / "one.json", **given)
    alone, studied = diagnose_breakdown(single), kept["pca-2.json"]
    for row in (row for row in alone["rows"] if row["arm"] in ("added", "front")):
        other = next(one for one in studied["rows"] if (one["arm"], one["rho"]) == (row["arm"], row["rho"]))
        left = {"text", "inside"} if row["arm"] == "front" else {"text"}
        assert {name: value for name, value in other.items() if name not in left} == {n: v for n, v in row.items() if n not in left}
    assert list(studied["walls"]) == ["added"]
    assert {**studied["walls"]["added"], "text": None} == {**alone["walls"]["added"], "text": None}
    assert studied["restored"]["norms frozen"] == alone["restored"]["norms frozen"]
    assert studied["crossings"] == alone["crossings"]

    (tmp_path / "study/directions/resid_post.1/random-0.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("directions/*/*.json")}
    again = study(config(folder, tmp_path / "study"))
    assert again["summary"] == found["summary"]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    capsys.readouterr()
    study(config(folder, tmp_path / "study", strengths=(0.1, 2.0)))
    assert capsys.readouterr().err.count("was made with other settings: measured again") == len(times) + 1
    assert all(path.stat().st_mtime_ns > before for path, before in times.items())


def test_a_dry_run_and_bad_settings(folder, tmp_path, capsys):
    assert study(config(folder, tmp_path / "none", dry_run=True)) == {}
    assert not (tmp_path / "none").exists()
    assert "resid_post.0 diffmean diffmean:anger_calm" in capsys.readouterr().out
    with pytest.raises(InputError, match="at least two directions of each kind"):
        study(config(folder, tmp_path / "none", each=1))
    with pytest.raises(InputError, match="expected a site of the model"):
        study(config(folder, tmp_path / "none", sites=("resid_post.7",)))
    with pytest.raises(InputError, match="all were left out"):
        study(config(folder, tmp_path / "out", dictionary=None, sites=("resid_post.0",), strengths=(50.0, 60.0)))
    assert "without random:1 at resid_post.0: expected strengths that begin below the wall" in capsys.readouterr().err
