"""The whole comparison on files, with a tiny model that reads bytes, and what it refuses."""

import json
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from several_processes import forked, leaving_work_to, said

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sampling import Sampling
from steering.breakdown.working_range import working_range
from steering.command_line import main
from steering.compare import continuations as comparing
from steering.compare.arms import MAKERS, NONE, PROMPTING
from steering.compare.command import CompareConfig, compare_directions, cosines, fitting, print_comparison, works_up_to
from steering.directions.random import random_direction

SITE = "resid_post.1"
FEW = ("sae-feature-by-auroc", "actadd")
MEASURE = comparing.measure_arm
pytestmark = pytest.mark.filterwarnings("ignore:few texts of")


@pytest.fixture(scope="module")
def parts(byte_lm, tmp_path_factory) -> Path:
    """model/, sae/ made for it, other-sae/ of another width, and concept.json."""
    folder = tmp_path_factory.mktemp("parts")
    byte_lm.model.save_pretrained(folder / "model")
    byte_lm.tokenizer.save_pretrained(folder / "model")
    fingerprint = LanguageModel.load(str(folder / "model"), device="cpu").fingerprint()
    for name, d, made in (("sae", 32, fingerprint), ("narrow", 16, None), ("foreign", 32, "0123456789ab")):
        W_fd = torch.randn(12, d, generator=torch.Generator().manual_seed(d))
        metadata = {"site": SITE, "model_name": "model", "model_fingerprint": made}
        Dictionary.autoencoder(W_fd, torch.zeros(12), W_fd, torch.zeros(d), metadata).save(folder / name)
    concept = {
        "name": "a <b>",
        "positive": [f"aaaa number {i} of the apples" for i in range(40)],
        "negative": [f"zzzz zone {i} of the puzzles" for i in range(40)],
        "prompt_pairs": [["a", "z"]],
        "prompt": "aaaa",
    }
    (folder / "concept.json").write_text(json.dumps(concept))
    (folder / "empty.json").write_text(json.dumps({"name": "nothing"}))
    return folder


def config_of(parts: Path, **changes) -> CompareConfig:
    settings = dict(
        model=str(parts / "model"),
        dictionary=parts / "sae",
        concept=str(parts / "concept.json"),
        budgets=(0.1, 0.5),
        prompts=("one", "two", "three of", "four"),
        samples=2,
        sampling=Sampling(max_new_tokens=8),
        device="cpu",
    )
    return CompareConfig(**(settings | changes))


@pytest.fixture(scope="module")
def result(parts) -> dict:
    return compare_directions(config_of(parts, out=parts / "out"))


def test_both_files_hold_the_whole_comparison(parts, result):
    written = json.loads((parts / "out" / "comparison.json").read_text())
    assert written == json.loads(json.dumps(result, allow_nan=False))
    assert result["format"] == "comparison-1"
    assert [arm["method"] for arm in result["arms"]] == [NONE, PROMPTING, *MAKERS]
    for arm in result["arms"]:
        assert (arm["best"] is None) == (arm["left_out"] is not None)
        for level in arm["levels"]:
            assert len(level["texts"]) == 8
    page = (parts / "out" / "report.html").read_text()
    assert "a &lt;b&gt;" in page
    assert "a <b>" not in page
    assert all(arm["method"] in page for arm in result["arms"])
    assert sorted(path.name for path in (parts / "out").iterdir()) == ["comparison.json", "report.html"]


def test_every_direction_of_the_stream_has_a_working_range(parts, result):
    """Those of the arms' own vectors, and a mark at every strength above; ITI acts at several heads."""
    lm = LanguageModel.load(str(parts / "model"), device="cpu")
    arms = {arm["method"]: arm for arm in result["arms"]}
    found = working_range(lm, random_direction(32, SITE, 0).unit())
    own = arms["random direction"]["working_range"]
    assert [own["coefficient"], own["unusual"], own["tried"]] == pytest.approx([found.coefficient, found.unusual, found.tried], rel=1e-4)
    assert own["sign"] == found.sign
    assert arms["ITI"]["working_range"] is None
    assert "expected a steering vector at one site, got one at head_out." in arms["ITI"]["no_working_range"]
    for method in ("DiffMean", "ActAdd", "SAE feature by AUROC"):
        arm = arms[method]
        assert arm["no_working_range"] is None
        end = arm["working_range"]["coefficient"]
        assert [level["beyond_working_range"] for level in arm["levels"]] == [level["coefficient"] > end for level in arm["levels"]]
    assert (arms[NONE]["working_range"], arms[NONE]["no_working_range"]) == (None, None)
    assert arms[NONE]["levels"][0]["beyond_working_range"] is None


def test_what_is_printed_names_the_range(result, tmp_path, capsys):
    print_comparison(result, tmp_path)
    said = capsys.readouterr().out
    assert "works up to" in said
    arm = next(arm for arm in result["arms"] if arm["method"] == "DiffMean")
    chosen = next(level for level in arm["levels"] if level["budget"] == arm["best"]["budget"])
    row = next(line for line in said.splitlines() if "DiffMean" in line)
    assert works_up_to(arm) in row
    assert ("beyond" in row) == chosen["beyond_working_range"]
    assert "without a working range: ITI, expected a steering vector at one site" in said
    assert works_up_to(arm | {"working_range": arm["working_range"] | {"coefficient": None, "tried": 12.0}}) == "over 12"


def numbers(result: dict) -> dict:
    """All but where it went and how it was started."""
    return result | {"settings": {name: value for name, value in result["settings"].items() if name not in ("out", "command")}}


def stopped_at(monkeypatch, arm: int) -> list[str]:
    """The methods that are measured from now on; Ctrl-C comes at the start of that arm."""
    measured = []

    def watched(setup, one, *rest):
        if len(measured) == arm:
            raise KeyboardInterrupt
        measured.append(one.method)
        return MEASURE(setup, one, *rest)

    monkeypatch.setattr(comparing, "measure_arm", watched)
    return measured


@pytest.fixture(scope="module")
def few(parts) -> dict:
    return compare_directions(config_of(parts, out=parts / "few", methods=FEW))


def test_an_interrupted_comparison_goes_on_with_the_arms_that_are_left(parts, few, tmp_path, monkeypatch):
    config, every = config_of(parts, out=tmp_path / "out", methods=FEW), [arm["method"] for arm in few["arms"]]
    done = []
    for arms in (1, 3):
        done.append(stopped_at(monkeypatch, arms))
        with pytest.raises(KeyboardInterrupt):
            compare_directions(config)
    done.append(stopped_at(monkeypatch, -1))
    again = compare_directions(config)
    assert [method for methods in done for method in methods] == every
    assert numbers(again) == numbers(few)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == json.loads(json.dumps(again))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("changes", [{"sampling": Sampling(max_new_tokens=8, seed=1)}, {"concept": "other.json"}])
def test_arms_of_another_comparison_are_not_used(parts, tmp_path, monkeypatch, changes):
    config = config_of(parts, out=tmp_path / "out", methods=FEW[1:], concept=str(tmp_path / "concept.json"))
    concept = json.loads((parts / "concept.json").read_text())
    (tmp_path / "concept.json").write_text(json.dumps(concept))
    stopped_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        compare_directions(config)
    if "concept" in changes:  # the same name, but other texts
        (tmp_path / "concept.json").write_text(json.dumps(concept | {"positive": [*concept["positive"][:-1], "aaaa pears"]}))
        changes = {}
    measured = stopped_at(monkeypatch, -1)
    compare_directions(replace(config, **changes))
    assert measured[:2] == [NONE, PROMPTING]


def test_killed_it_goes_on_and_several_processes_share_the_arms(parts, few, tmp_path):
    several = config_of(parts, out=tmp_path / "several", methods=FEW)
    assert forked(leaving_work_to(0, partial(compare_directions, several)), 2, tmp_path / "log", kill=(0, 5))[0] == -9
    assert len(list((tmp_path / ".several.pieces").glob("arm-*"))) >= 1
    assert not (several.out / "comparison.json").exists()
    assert forked(partial(compare_directions, several), 2, tmp_path / "log") == [0, 0]
    assert numbers(json.loads((several.out / "comparison.json").read_text())) == numbers(json.loads(json.dumps(few)))
    assert not (tmp_path / ".several.pieces").exists()
    first, second = said(tmp_path / "log")
    assert "everything is in" in first
    assert "everything is in" not in second


def test_cosines_are_those_of_the_directions_at_the_site(result):
    methods, matrix = result["cosines"]["methods"], torch.tensor(result["cosines"]["matrix"])
    assert "DiffMean" in methods
    assert "ActAdd" not in methods
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(len(methods)))
    assert cosines([], SITE) == {"methods": [], "matrix": []}


def test_a_dry_run_says_what_and_how_long_and_writes_nothing(parts, tmp_path, capsys):
    assert compare_directions(config_of(parts, out=tmp_path / "out", dry_run=True)) == {}
    said = capsys.readouterr().out
    assert "20 strengths of 11 arms, 8 continuations of 8 tokens each: about" in said
    assert "minutes" in said
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_leaves_no_file(parts, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            compare_directions(config_of(parts, out=tmp_path / "out", samples=100, sampling=Sampling(max_new_tokens=200)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not (tmp_path / "out").exists()


def test_a_text_longer_than_the_context_loses_its_end(byte_lm):
    cut = fitting(byte_lm, "abcd" * 1000)
    assert byte_lm.encode([cut])[0].shape[1] <= byte_lm.context
    assert ("abcd" * 1000).startswith(cut)
    assert len(cut) > 100
    assert fitting(byte_lm, "short") == "short"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(budgets=()), "KL budgets above 0 in rising order, got none"),
        (dict(budgets=(0.3, 0.1)), "rising order"),
        (dict(budgets=(float("nan"),)), "rising order"),
        (dict(budgets=(0.0, 1.0)), "above 0"),
        (dict(prompts=("a", "b", "c")), "at least 4 different prompts"),
        (dict(prompts=("a", "b", "c", "c")), "at least 4 different prompts"),
        (dict(samples=0), "1 sample"),
        (dict(prompts=("a", "b", "c", "long " * 200)), "expected prompts that leave room for 8 new tokens in the 512 positions"),
        (dict(concept="empty.json"), "empty concept"),
        (dict(concept="no_such_concept"), "expected a concept"),
        (dict(concept="label:bible"), "bible"),
        (dict(dictionary=Path("narrow")), "a dictionary of width 32"),
        (dict(dictionary=Path("foreign")), "has other weights"),
        (dict(site="resid_post.2"), "made for resid_post.1, so it says nothing about resid_post.2"),
        (dict(feature=10**6), "expected a dictionary that has feature 1000000, got one with features 0 to"),
        (dict(dictionary=None), "expected --site"),
        (dict(dictionary=None, site="resid_post.9"), "resid_post.9"),
        (dict(text=("no/such/file.txt",)), "no/such/file.txt"),
    ],
)
def test_unusable_input_is_refused_in_a_sentence(parts, tmp_path, changes, sentence):
    for name in ("dictionary", "concept"):
        if changes.get(name) and (parts / str(changes[name])).exists():
            changes = changes | {name: type(changes[name])(parts / str(changes[name]))}
    with pytest.raises(InputError, match=sentence):
        compare_directions(config_of(parts, out=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_the_command_exits_2_with_one_sentence(parts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare-directions", "--model", str(parts / "model"), "--concept", "no_such_concept"])
    with pytest.raises(SystemExit) as caught:
        main("compare")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: expected a concept")
