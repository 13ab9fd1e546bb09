"""Places that cannot be written: every command says so before its work, in one sentence, and leaves nothing behind."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from sae.disk.places import SENTENCES, refusal_sentence, require_file, require_folder, writing
from sae.disk.writing import atomic, only_writer, write_json, write_tensors
from sae.errors import InputError

ROOT = Path(__file__).parents[1]
NOBODY = 65534


def commands() -> dict:
    """Every command that writes, as a call with the place alone; inputs need not be there, since the place comes first."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import demo
    import demo_real
    import make_pictures
    import sample_demo_text
    import sample_real_text
    import train_demo_model

    from sae.activations.export import ExportConfig as CacheExportConfig
    from sae.activations.export import export_cache
    from sae.activations.harvest.command import HarvestConfig, harvest
    from sae.activations.harvest.settings import RecordingConfig
    from sae.activations.imports.command import ImportConfig, import_activations
    from sae.dictionaries.importing import ImportConfig as DictionaryImport
    from sae.dictionaries.importing import import_dictionary
    from sae.evaluation import EvaluationConfig, evaluate
    from sae.evaluation.check.check import CheckConfig, check
    from sae.features.exports.command import ExportConfig, export_features
    from sae.features.exports.transcoders import TranscodersConfig, export_transcoders
    from sae.features.index.build import IndexConfig, build_index
    from sae.features.index.merge import MergeConfig, merge_indexes
    from sae.features.model_diff.command import DiffConfig, diff_models
    from sae.features.terminal import ListConfig, list_features
    from sae.training import TrainingConfig, train
    from sae.training.live import LiveTrainingConfig, train_live
    from sae.training.plan import PlanConfig, train_plan
    from steering.breakdown.command import BreakdownConfig, diagnose_breakdown
    from steering.breakdown.study import StudyConfig, study
    from steering.circuits.attribution.command import AttributeConfig, attribute
    from steering.circuits.features.command import FindCircuitConfig, find
    from steering.circuits.finding.command import CircuitConfig, find_circuit
    from steering.circuits.pages.command import DrawConfig, draw_circuit
    from steering.circuits.steering_nodes.command import SteerCircuitConfig, steer_circuit
    from steering.compare.command import CompareConfig, compare_directions
    from steering.studies.effect_map import EffectConfig, effect_map
    from steering.studies.principal import PrincipalConfig, principal_study
    from steering.studies.strengths import StrengthsConfig, strengths

    none, text, usable = Path("none"), (str(ROOT / "README.md"),), Path(tempfile.gettempdir())
    real_text = partial(sample_real_text.SampleConfig, prompts=none)
    live = RecordingConfig(text=text, sites=("resid_post.0",))
    formats = ("static", "neuronpedia", "neuronpedia-upload", "saedashboard", "circuit-tracer")
    folders = {
        "cache-activations": lambda p: harvest(HarvestConfig(out=p, text=text, sites=("resid_post.0",), model="none")),
        "import-activations": lambda p: import_activations(ImportConfig(source=(none,), out=p)),
        "import-dictionary": lambda p: import_dictionary(DictionaryImport(source="none", out=p)),
        "export-transcoders": lambda p: export_transcoders(TranscodersConfig(dictionaries=("none",), out=p)),
        "export-cache": lambda p: export_cache(CacheExportConfig(cache=none, out=p)),
        "train-sae": lambda p: train(TrainingConfig(cache=none, out=p)),
        "train-plan": lambda p: train_plan(PlanConfig(cache=none, out=p, plan=none)),
        "train-sae-live": lambda p: train_live(LiveTrainingConfig(out=p, live=live)),
        "build-feature-index": lambda p: build_index(IndexConfig(cache=none, dictionary=none, out=p)),
        "merge-feature-indexes": lambda p: merge_indexes(MergeConfig(parts=(none, none), out=p)),
        **{
            f"export-features {f}": lambda p, f=f: export_features(ExportConfig(index=none, out=p, format=f))  # type: ignore[misc]
            for f in formats
        },
        "check-dictionary --write": lambda p: check(CheckConfig(dictionary="none", model="none", write=p)),
        "list-features --html": lambda p: list_features(ListConfig(index=none, html=p)),
        "principal-directions": lambda p: principal_study(PrincipalConfig(model="none", site="resid_post.0", text=text, out=p)),
        "compare-directions": lambda p: compare_directions(CompareConfig(concept="bible", model="none", out=p)),
        "study-breakdown": lambda p: study(StudyConfig(model="none", out=p)),
        "train_demo_model": lambda p: train_demo_model.train(train_demo_model.DemoModelConfig(corpora=none, out=p)),
        "make_pictures": lambda p: make_pictures.make_pictures(make_pictures.PicturesConfig(demo=none, out=p)),
        "demo": lambda p: demo.demo(demo.DemoConfig(out=p)),
        "demo_real": lambda p: demo_real.demo(demo_real.RealDemoConfig(out=p)),
        "sample_real_text --parts": lambda p: sample_real_text.sample(
            sample_real_text.SampleConfig(prompts=none, out=usable / "t", parts=p)
        ),
    }
    files = {
        "evaluate-sae": lambda p: evaluate(EvaluationConfig(dictionary=none, cache=none, out=p)),
        "diff-models": lambda p: diff_models(DiffConfig(dictionary="none", cache=none, out=p)),
        "check-dictionary": lambda p: check(CheckConfig(dictionary="none", model="none", out=p)),
        "measure-steering": lambda p: strengths(StrengthsConfig(index=none, feature=1, out=p)),
        "effect-map": lambda p: effect_map(EffectConfig(model="none", dictionary=none, feature=(1,), text=text, out=p)),
        "effect-map --effects": lambda p: effect_map(
            EffectConfig(model="none", dictionary=none, feature=(1,), text=text, effects=p, fit=100)
        ),
        "diagnose-breakdown": lambda p: diagnose_breakdown(BreakdownConfig(model="none", vector="random:1", out=p)),
        "find-circuit": lambda p: find_circuit(CircuitConfig(model="none", task="ioi", out=p)),
        "find-circuit --features": lambda p: find(FindCircuitConfig(model="none", task="ioi", features=("none",), out=p)),
        "find-circuit --mib": lambda p: find_circuit(CircuitConfig(model="none", task="ioi", mib=p)),
        "draw-circuit": lambda p: draw_circuit(DrawConfig(circuit=none, out=p)),
        "attribute": lambda p: attribute(AttributeConfig(model="none", transcoders="none", prompt="a", out=p)),
        "attribute --circuit-tracer": lambda p: attribute(AttributeConfig(model="none", transcoders="none", prompt="a", circuit_tracer=p)),
        "steer-circuit": lambda p: steer_circuit(SteerCircuitConfig(model="none", circuit=none, out=p)),
        "sample_real_text": lambda p: sample_real_text.sample(real_text(out=p, parts=usable)),
        "sample_demo_text": lambda p: sample_demo_text.sample(sample_demo_text.SampleConfig(model=none, out=p)),
    }
    return {"folder": folders, "file": files}


def places(tmp: Path) -> dict[str, Path]:
    """Where neither a file nor a folder can be written."""
    (tmp / "file").write_text("kept")
    (tmp / "loop").symlink_to(tmp / "loop")
    (tmp / "nowhere").symlink_to(tmp / "absent")
    (tmp / "closed").mkdir(mode=0o500)
    return {
        "below a file": tmp / "file" / "new",
        "far below a file": tmp / "file" / "a" / "b",
        "below a loop": tmp / "loop" / "new",
        "below a link that leads nowhere": tmp / "nowhere" / "new",
        "name too long": tmp / ("x" * 300),
        "name too long below": tmp / ("y" * 300) / "new",
        "no permission": tmp / "closed" / "new",
        "far below, no permission": tmp / "closed" / "a" / "b",
    }


ONLY = {"folder": ("a file", "a loop", "a link that leads nowhere"), "file": ("a folder", "only a dot")}


@contextmanager
def whom_permissions_hold_for(what: str) -> Iterator[None]:
    """They do not for the administrator, but the other kinds do."""
    if "permission" not in what or os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def bad_places(tmp_path) -> dict[str, dict[str, Path]]:
    common = places(tmp_path)
    (tmp_path / "folder").mkdir()
    folder = dict(zip(ONLY["folder"], (tmp_path / "file", tmp_path / "loop", tmp_path / "nowhere")))
    file = dict(zip(ONLY["file"], (tmp_path / "folder", Path("."))))
    return {"folder": common | folder, "file": common | file}


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_every_command_says_it_before_its_work(kind, bad_places, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = listing(tmp_path)
    for command, call in commands()[kind].items():
        for what, place in bad_places[kind].items():
            with whom_permissions_hold_for(what), pytest.raises(InputError) as caught:
                call(place)
            said = str(caught.value)
            assert str(place)[:250] in said, (command, what, said)
            assert "\n" not in said
            assert len(said) < 500
    assert listing(tmp_path) == before
    assert (tmp_path / "file").read_text() == "kept"


def test_every_command_with_an_output_is_in_the_table():
    """Fields of the settings that name a place to write; steer and intervene only print, explain-features writes into its index."""
    of_script = {re.search(r'main\("([\w-]+)"\)', p.read_text()): p.stem for p in (ROOT / "scripts").glob("*.py")}
    names = [stem.replace("_", "-") for found, stem in of_script.items() if found]
    listed = {command.split()[0] for calls in commands().values() for command in calls}
    assert set(names) - listed == {"describe-cache", "explain-features", "browse-features", "steer", "intervene", "browse-graph"}


WRITERS = {
    "json": lambda path: write_json(path, list(range(100_000))),
    "tensors": lambda path: write_tensors(path, {"a": torch.zeros(100_000)}),
    "bytes": lambda path: _bytes(path),
}


def _bytes(path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(bytes(400_000))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_goes_bad_in_the_middle_is_a_sentence(writer, bad_places, tmp_path):
    before = listing(tmp_path)
    for what, place in bad_places["file"].items():
        if place.name:
            with whom_permissions_hold_for(what), pytest.raises(InputError):
                WRITERS[writer](place)
            assert listing(tmp_path) == before, what
    for what, place in bad_places["folder"].items():
        with whom_permissions_hold_for(what), pytest.raises(InputError), only_writer(place):
            pass
    assert listing(tmp_path) == before


LIMITED = """
import sys, resource
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_places import WRITERS
from sae.errors import InputError
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
for writer in WRITERS.values():
    try:
        writer(Path({path!r}))
    except InputError as error:
        print(error)
"""


def in_child(path: Path, *, limit: int = 0, before: tuple[str, ...] = ()) -> list[str]:
    code = LIMITED.format(root=str(ROOT), tests=str(ROOT / "tests"), limit=limit, path=str(path))
    done = subprocess.run([*before, sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_limit_of_a_files_size_is_a_sentence(tmp_path):
    said = in_child(tmp_path / "t", limit=50_000)
    assert len(said) == len(WRITERS)
    assert all("ulimit -f" in line and str(tmp_path / "t") in line for line in said)
    assert not list(tmp_path.iterdir())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000


@pytest.mark.parametrize(("options", "words"), [("ro", "can only be read"), ("size=64k", "disk ran full")])
def test_real_disks_that_can_only_be_read_or_are_full(options, words, tmp_path):
    mount = f'mount -t tmpfs -o {options} none {tmp_path} && exec "$@"'
    mounting = ("unshare", "-m", "sh", "-c", mount, "sh")
    if not shutil.which("unshare") or subprocess.run([*mounting, "true"], capture_output=True).returncode:
        pytest.skip("mounting needs an administrator")
    said = in_child(tmp_path / "t", before=mounting)
    assert len(said) == len(WRITERS)
    assert all(words in line and str(tmp_path / "t") in line for line in said)


@pytest.mark.parametrize("number", [*SENTENCES, errno.EBUSY, errno.ENXIO])
def test_every_refusal_names_the_place_and_what_to_do(number, tmp_path, monkeypatch):
    """At the moment of flushing, where quotas and network disks speak; the older file stays."""
    path = tmp_path / "f.json"
    write_json(path, [1])
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(InputError) as caught:
        write_json(path, [2])
    said = str(caught.value)
    assert str(path) in said
    assert ";" in said
    assert path.read_text() == "[\n 1\n]\n"
    assert listing(tmp_path) == {"f.json"}


def test_what_is_no_refusal_of_a_place_is_not_hidden(tmp_path):
    with pytest.raises(BrokenPipeError), writing(tmp_path / "f"):
        raise BrokenPipeError(errno.EPIPE, "a stream's")
    assert refusal_sentence(OSError("a library's own")) is None
    assert refusal_sentence(ConnectionRefusedError(errno.ECONNREFUSED, "refused")) is None
    assert "other.txt" in str(
        refusal_sentence(PermissionError(errno.EACCES, "no", str(tmp_path / "b" / "other.txt")), tmp_path / "a" / "f")
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder of Linux")
def test_a_folder_in_which_nobody_can_make_files_is_named_as_such():
    for require in (require_file, require_folder):
        with pytest.raises(InputError, match="/proc/x would be in a folder in which the system allows no new files"):
            require(Path("/proc/x"))


def test_good_places_are_left_as_they_were(tmp_path):
    for path in (tmp_path, tmp_path / "a" / "b", Path("relative/place"), tmp_path / "x.json"):
        require_folder(path)
        if path != tmp_path:
            require_file(path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    require_folder(tmp_path / "link")
    require_file(tmp_path / "link" / "f")
    assert listing(tmp_path) == {"real", "link"}
    assert not Path("relative").exists()


def test_the_cache_of_the_datasets_library_is_named_when_it_cannot_be_written(tmp_path, monkeypatch):
    import datasets

    from sae.activations.text.datasets_errors import told_plainly

    (tmp_path / "file").touch()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    cache = tmp_path / "file" / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    with pytest.raises(InputError, match=rf"way to {cache}, .*HF_HOME"), told_plainly("a dataset"):
        datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(cache))
