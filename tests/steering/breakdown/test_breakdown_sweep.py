"""The sweep and its command on tiny models, against passes made here."""

import json
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy.special import rel_entr

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sampling import Sampling
from sae.progress import progress
from steering.breakdown.arms import applied, make_arms
from steering.breakdown.command import BreakdownConfig, diagnose_breakdown
from steering.breakdown.report import report_html
from steering.breakdown.sweep import by_token, make_setup, sweep, sweep_steps
from steering.circuits.model_graph.frozen import internals
from steering.command_line import main
from steering.directions.actadd import actadd
from steering.directions.random import random_direction
from steering.intervention import steered
from steering.named_direction import named_direction
from steering.vector import SteeringVector

SITE, RHOS = "resid_post.0", (0.1, 0.8)
TEXTS, OTHERS = ["the first text of all", "another, a little longer text", "and one"], ["words that are neutral", "more of these words"]
FEW = ["added", "rotated", "front", "norms frozen", "patterns, values frozen"]


def setup_and_arms(lm: LanguageModel, names=FEW):
    vector = random_direction(32, SITE, 3)
    arms = [arm for arm in make_arms(lm, vector).arms if arm.name in names]
    return make_setup(lm, vector, TEXTS, OTHERS, arms), arms


def run(lm: LanguageModel, rhos=RHOS, names=FEW) -> dict:
    setup, arms = setup_and_arms(lm, names)
    with progress("test", sweep_steps(len(arms), len(rhos)), "steps") as bar:
        return sweep(setup, arms, rhos, ["A prompt"], Sampling(max_new_tokens=12), bar.advance)


@pytest.fixture(scope="module")
def found(byte_lm) -> dict:
    return run(byte_lm)


def kl_of_texts(lm: LanguageModel, vector, c: float) -> list[float]:
    """One text at a time, without padding, by scipy."""
    kls = []
    for text in TEXTS:
        ids_sp, _ = lm.encode([text])
        p = lm.logits(ids_sp)[0].double().softmax(-1).numpy()
        with steered(lm, [(vector, c)]):
            kls.append(rel_entr(p, lm.logits(ids_sp)[0].double().softmax(-1).numpy()).sum(1).mean())
    return kls


def test_rho_is_in_units_of_the_stream_and_kl_that_of_each_text(byte_lm, found):
    vector = random_direction(32, SITE, 3)
    norms = [byte_lm.record(byte_lm.encode([text])[0], [SITE])[SITE][0, 1:].norm(dim=-1) for text in TEXTS]
    assert found["rho_of_1"] == pytest.approx(1 / torch.cat(norms).median().item(), rel=1e-4)
    for row in (row for row in found["rows"] if row["arm"] == "added"):
        assert row["coefficient"] == pytest.approx(row["rho"] / found["rho_of_1"])
        by_hand = kl_of_texts(byte_lm, vector, row["coefficient"])
        assert row["kl_of_texts"] == pytest.approx(by_hand, rel=1e-3)
        assert row["logits"]["kl"] == pytest.approx(np.mean(by_hand), rel=1e-3)


def test_every_arm_has_a_row_at_every_rho_and_all_walls_are_one_nat(byte_lm, found):
    assert [(row["rho"], row["arm"]) for row in found["rows"]] == [(size, name) for size in RHOS for name in FEW]
    for name, wall in found["walls"].items():
        assert wall["kl"] == pytest.approx(1, abs=0.03) or not wall["reached"], name
    added = found["walls"]["added"]
    assert added["reached"]
    at_wall = np.mean(kl_of_texts(byte_lm, random_direction(32, SITE, 3), added["coefficient"]))
    assert at_wall == pytest.approx(added["kl"], rel=1e-3)
    assert set(found["restored"]) == set(FEW) - {"added"}
    for share in found["restored"].values():
        assert share["low"] <= share["value"] <= share["high"] <= 1
    assert found["restored"]["front"]["value"] > 0


def test_inside_says_what_steering_did_at_the_site(found):
    rows = {(row["arm"], row["rho"]): row for row in found["rows"]}
    assert "inside" not in rows["rotated", 0.8]
    inner = rows["added", 0.8]["inside"]
    at_site = inner["layers"][0]
    assert at_site["stream"]["steered"]["cos_change"] == pytest.approx(1, abs=1e-5)
    assert at_site["attn_out"]["taken_back"] == pytest.approx(0, abs=1e-9)  # written before the vector is added
    assert [layer["layer"] for layer in inner["layers"]] == [0, 1, 2]
    assert set(at_site["stream"]) == {"first", "steered"}
    assert set(rows["front", 0.8]["inside"]["layers"][1]["stream"]) == {"first", "steered", "later"}
    assert set(inner["norm_gain"]) == {"h.0.ln_1", "h.0.ln_2", *(f"h.{n}.ln_{k}" for n in (1, 2) for k in (1, 2)), "ln_f"}
    assert inner["norm_gain"]["h.0.ln_1"] == pytest.approx(1)
    assert inner["norm_gain"]["h.1.ln_1"] < 0.9
    assert found["first_norm"] == "attn_in.1"
    masses = inner["layers"][1]["attention"][1]
    np.testing.assert_allclose(masses["steered_h"], 1, rtol=1e-5)


def test_scales_of_heads_are_laid_out_by_token():
    scale_sphx = torch.rand(2, 7, 4, 1)
    assert by_token(scale_sphx, 7) is scale_sphx
    assert torch.equal(by_token(scale_sphx.transpose(1, 2), 7), scale_sphx)
    assert by_token(torch.rand(2, 4, 4, 1), 4) is None
    assert by_token(torch.rand(14, 1), 7) is None
    assert by_token(scale := torch.rand(2, 7, 1), 7) is scale


def test_text_breaks_down_with_strength(found):
    texts = [row["text"] for row in found["rows"] if row["arm"] == "added"]
    assert all(len(text["texts"]) == 1 and text["nats_per_token"] > 0 for text in [found["unsteered_text"], *texts])


def test_every_arm_writes_at_its_wall_as_passes_without_a_cache_would(byte_lm):
    """The likeliest token each time, with what is frozen taken from the unsteered pass of the same text."""
    setup, arms = setup_and_arms(byte_lm, ["added", "rotated", "lengthened", "front", "last", "norms frozen", "patterns, values frozen"])
    found = sweep(setup, arms, RHOS, ["A prompt", "another"], Sampling(max_new_tokens=8, temperature=0.0))
    for arm in arms:
        wall = found["walls"][arm.name]
        ids_sp, _ = byte_lm.encode(["A prompt"])
        begin = ids_sp.shape[1]
        for _ in range(8):
            with internals(byte_lm, arm.frozen or ("patterns",)) as unsteered:
                byte_lm.logits(ids_sp)
            with applied(byte_lm, arm, wall["coefficient"], unsteered, begin):
                ids_sp = torch.cat([ids_sp, byte_lm.logits(ids_sp)[:, -1:].argmax(-1)], dim=1)
        written = byte_lm.tokenizer.decode(ids_sp[0, begin:], skip_special_tokens=True)
        assert (wall["text"]["prompt"], wall["text"]["texts"]) == ("A prompt", [written]), arm.name
    brief = sweep(setup, arms, RHOS, ["A prompt"], Sampling(max_new_tokens=2), brief=True)
    assert "text" not in brief["walls"]["added"]


def test_strengths_that_do_not_rise_or_begin_above_the_wall_are_refused(byte_lm):
    for rhos in ((), (0.0, 1.0), (1.0, 0.5)):
        with pytest.raises(InputError, match="expected rising strengths above 0"):
            run(byte_lm, rhos, ["added"])
    with pytest.raises(InputError, match="strengths that begin below the wall, a KL of 1 nat, got"):
        run(byte_lm, (30.0, 40.0), ["added"])


def test_what_is_not_finite_is_a_row(byte_lm):
    found = run(byte_lm, (0.1, 1e15, 1e30), ["added", "norms frozen"])
    rows = {(row["arm"], row["rho"]): row for row in found["rows"]}
    assert "float32 cannot hold its square" in rows["added", 1e30]["failure"]
    assert "failure" in rows["added", 1e30]["text"]
    assert np.isfinite(rows["added", 0.1]["logits"]["kl"])
    json.dumps(found["walls"])


@pytest.fixture(scope="module")
def folder(byte_lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    byte_lm.model.save_pretrained(path)
    byte_lm.tokenizer.save_pretrained(path)
    return path


def config(folder, out, **given) -> BreakdownConfig:
    settings = dict(model=str(folder), vector="random:1", strengths=(0.1, 1.0), prompts=("A",), out=out, device="cpu")
    return BreakdownConfig(**settings | {"sampling": Sampling(max_new_tokens=4)} | given)


def test_the_command_writes_what_it_prints(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "b.json"
    command = ["sae", "diagnose-breakdown", "--model", folder, "--vector", "random:1", "--strengths", "0.1", "1", "--prompts", "A"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*command, "--max-new-tokens", 4, "--out", out, "--device", "cpu"]])
    main()
    said, result = capsys.readouterr(), json.loads(out.read_text())
    assert "16 arms at 2 strengths at resid_post.1" in said.err
    assert "norms, patterns frozen" in said.out
    assert result["format"] == "breakdown-1"
    assert result["vector"] == {"method": "random", "seed": 1}
    assert len(result["rows"]) == 32
    assert result["left_out"] == {}
    assert [one["held"] for one in result["predictions"]][2] is None
    assert (result["crossings"]["KL of the predictions, nats"] is not None) == (result["walls"]["added"]["rho"] <= 1)
    assert "KL of the predictions" in said.out
    assert "not decided" in said.out
    carried = result["damage_by_edge"]
    assert carried["sum"] == pytest.approx(1, abs=0.05)
    assert carried["kl"] == pytest.approx(result["walls"]["added"]["kl"], rel=1e-3)
    assert "which parts carry the damage" in said.out
    page = (tmp_path / "b.html").read_text()
    assert page == report_html(result)
    assert all(f">{name}</td>" in page for name in [*result["walls"], *(one["writer"] for one in carried["writers"][:10])])


def test_prompts_shorter_than_two_prompts_rows_are_counted(folder, tmp_path, capsys):
    given = {"vector": "actadd:Love|Hate", "strengths": (0.1,), "prompts": ("A", "A longer one")}
    result = diagnose_breakdown(config(folder, tmp_path / "b.json", **given))
    said = capsys.readouterr()
    assert "1 of 2 prompts are shorter than the vector's 5 positions: they get the first ones" in said.err
    assert 'the arm "last" is left out; the reason: expected one direction for every position' in said.err
    assert "added at the first 5 tokens" in said.out
    assert "added at the first 5 tokens" in (tmp_path / "b.html").read_text()
    assert set(result["left_out"]) == {"lengthened", "front", "last"}
    assert {wall["text"]["prompt"] for wall in result["walls"].values()} == {"A longer one"}


def test_a_features_direction_is_measured_by_its_dictionary(folder, tmp_path, byte_lm, capsys):
    """At the site itself the rise is what its encoder makes of the coefficient, for a feature that is active anyway."""
    dictionary = Dictionary.initial(32, 48, seed=0, decoder_norm=1.0)
    dictionary.b_enc_f.data += 100  # every feature is always active, so the rise is linear
    dictionary.metadata |= {"hook_name": "blocks.1.hook_resid_post"}
    dictionary.save(tmp_path / "sae")
    result = diagnose_breakdown(config(folder, tmp_path / "b.json", vector="5", dictionary=str(tmp_path / "sae")))
    assert (result["site"], result["feature"]) == ("resid_post.1", 5)
    for row in (row for row in result["rows"] if row["arm"] == "added"):
        view = row["inside"]["dictionary"]
        assert view["activation_rise"] == pytest.approx(row["coefficient"], rel=1e-3)
        assert (view["l0"], view["steered_l0"], view["turnover"]) == (48, 48, 0)
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines() if not line.startswith("report: ")) <= 80  # its path may be long


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    assert diagnose_breakdown(config(folder, tmp_path / "b.json", dry_run=True)) == {}
    assert not (tmp_path / "b.json").exists()
    assert "about 1 min" in capsys.readouterr().err


def test_directions_by_name_and_from_files(tmp_path, byte_lm):
    saved = tmp_path / "v.safetensors"
    random_direction(32, SITE, 3).save(saved)
    vector, dictionary, feature = named_direction(byte_lm, str(saved))
    assert (vector.site, dictionary, feature) == (SITE, None, None)
    component, _, _ = named_direction(byte_lm, "pca:2", site="resid_pre.1")
    assert (component.site, component.provenance["component"]) == ("resid_pre.1", 2)
    assert named_direction(byte_lm, "random:7").vector.site == "resid_post.1"


def test_two_prompts_by_name(byte_lm):
    """At the input of the block after the site; spaces count."""
    found, by_hand = named_direction(byte_lm, "actadd: Love|Hate", site=SITE).vector, actadd(byte_lm, " Love", "Hate", "resid_pre.1")
    assert found.site == "resid_pre.1"
    assert torch.equal(found.directions["resid_pre.1"], by_hand.directions["resid_pre.1"])
    assert named_direction(byte_lm, "actadd:a||", site="resid_pre.2").vector.provenance["negative"] == "|"


def test_a_concept_by_name_is_the_difference_of_all_its_tokens(byte_lm, tmp_path):
    concept = {"name": "x", "positive": ["yes, gladly", "of course"], "negative": ["no", "never again"]}
    (tmp_path / "c.json").write_text(json.dumps(concept))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few texts
        found = named_direction(byte_lm, f"diffmean:{tmp_path / 'c.json'}", site=SITE).vector
    means = [
        torch.cat([byte_lm.record(byte_lm.encode([text])[0], [SITE])[SITE][0, 1:] for text in concept[side]]).double().mean(0)
        for side in ("positive", "negative")
    ]
    torch.testing.assert_close(found.direction_d.double(), means[0] - means[1], rtol=1e-3, atol=1e-5)
    shipped = named_direction(byte_lm, "diffmean:curse_words").vector
    assert (shipped.site, shipped.provenance["method"], shipped.provenance["positive"]) == ("resid_post.1", "diffmean", 54)


def test_activation_addition_is_measured_where_it_adds(byte_lm):
    """Rows by hand, one text at a time: KL, cosines at the tokens that have a row, and no null beside it."""
    vector = actadd(byte_lm, "Love", "Hate", "resid_pre.1")
    rows_pd = vector.directions["resid_pre.1"]
    arms = [arm for arm in make_arms(byte_lm, vector).arms if arm.name in ("added", "norms, patterns, values frozen")]
    setup = make_setup(byte_lm, vector, TEXTS, OTHERS, arms)
    with progress("test", sweep_steps(len(arms), 2), "steps") as bar:
        found = sweep(setup, arms, (0.1, 0.8), ["A prompt"], Sampling(max_new_tokens=4), bar.advance)
    assert found["where"] == "at the first 5 tokens"
    assert all(np.isnan(row["cos_v"]) for row in found["null"])
    row = next(row for row in found["rows"] if (row["arm"], row["rho"]) == ("added", 0.8))
    c, kls, cosines, norms = row["coefficient"], [], [], []

    def add(value_spd):
        changed = value_spd.clone()
        changed[:, : len(rows_pd)] += c * rows_pd
        return changed

    for text in TEXTS:
        ids_sp, _ = byte_lm.encode([text])
        h_pd = byte_lm.record(ids_sp, ["resid_pre.1"])["resid_pre.1"][0]
        norms.append(h_pd[1:].norm(dim=-1))
        p = byte_lm.logits(ids_sp)[0].double().softmax(-1).numpy()
        with byte_lm.edited({"resid_pre.1": add}):
            kls.append(rel_entr(p, byte_lm.logits(ids_sp)[0].double().softmax(-1).numpy()).sum(1).mean())
            after_pd = byte_lm.record(ids_sp, ["resid_post.1"])["resid_post.1"][0]
        cosines.append(torch.nn.functional.cosine_similarity(after_pd[1:5], rows_pd[1:]))
    assert found["rho_of_1"] == pytest.approx(rows_pd.norm(dim=-1).max().item() / torch.cat(norms).median().item(), rel=1e-4)
    assert row["kl_of_texts"] == pytest.approx(kls, rel=1e-3)
    streams = row["inside"]["layers"][0]["stream"]
    assert streams["steered"]["cos_v"] == pytest.approx(torch.cat(cosines).mean().item(), rel=1e-3)
    assert np.isnan(streams["later"]["cos_v"])
    assert 0 < row["inside"]["layers"][1]["attention"][1]["steered_h"][0] < 1
    assert np.isfinite(row["inside"]["layers"][0]["mlp_out"]["taken_back"])


def test_directions_of_more_positions_than_a_text_has_are_refused(byte_lm):
    vector = SteeringVector.at(SITE, torch.ones(9, 32))
    with pytest.raises(InputError, match="expected directions for at most 8 positions, as many as the shortest text has tokens, got 9"):
        make_setup(byte_lm, vector, TEXTS, OTHERS, ())


def test_bad_input_is_one_sentence(folder, tmp_path):
    zero = tmp_path / "zero.safetensors"
    SteeringVector.at(SITE, torch.zeros(32)).save(zero)
    for given, message in (
        ({"vector": "7"}, "expected --dictionary with the feature 7, got none"),
        ({"vector": "nothing"}, "expected a vector file, a feature's number, actadd:.* or random:SEED as --vector, got 'nothing'"),
        ({"vector": "actadd:Love"}, "expected two prompts with | between them as actadd:POSITIVE|NEGATIVE, got 'actadd:Love'"),
        ({"vector": "actadd:a|a"}, "expected two different prompts"),
        ({"vector": "actadd:a|b", "site": "resid_post.2"}, "expected a site in front of a block, where activation addition adds"),
        ({"vector": "actadd:a|much longer"}, "expected a prompt of at least 12 tokens, as many as the vector has directions, got one of 2"),
        ({"vector": "diffmean:angry"}, "expected a concept, one of anger_calm"),
        ({"vector": "diffmean:label:x"}, "expected a concept with positive and negative texts as diffmean:CONCEPT, but 'label:x' has none"),
        ({"vector": str(zero)}, "expected a steering vector that is not zero"),
        ({"site": "resid_post.3"}, "expected a site of the model"),
        ({"site": "mlp_act.1"}, "expected a direction of the residual stream"),
        ({"prompts": ()}, "expected at least one prompt"),
    ):
        with pytest.raises(InputError, match=message.replace("|", "[|]")):
            diagnose_breakdown(config(folder, tmp_path / "b.json", **given))
