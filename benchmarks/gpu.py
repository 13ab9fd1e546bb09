"""What to run first on a machine with a GPU: all that has to be known about the CUDA path, in six minutes, into one folder.

Every part runs in its own process with its own time limit, so that one that fails or hangs does not stop the others, and
results.json is written after every number. First come, side by side, the parts in which nothing is timed: the kernels against float64,
their tests, NVIDIA's memory and race checkers. Then one part after another has the machine to itself, the most important ones first;
what no longer fits into the time is left out and said to be. Needs only torch and triton; with the packages of `make gpu-wheels` the
other tools are measured as well. `--dry-run` goes through all of it on a CPU, at tiny sizes.

The folder: table.md (all that is worth a look), results.json (every number), logs.txt, profile.txt, trace.json.gz (for chrome://tracing).
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rounds import PEERS_PYTHON  # noqa: E402

from sae.disk.writing import write_json  # noqa: E402

REAL = {"sizes": [(768, 32_768), (2304, 65_536), (4096, 131_072)], "rows": 8192, "l0": 50.0, "cached_rows": 1 << 20, "tokens": 1 << 20}
REAL["precisions"] = ["bfloat16", "tf32", "float32"]
TINY = {"sizes": [(16, 16)], "precisions": ["bfloat16"], "rows": 4, "l0": 1.5, "cached_rows": 512, "tokens": 600}
FILES = ("table.md", "results.json", "logs.txt", "profile.txt", "trace.json.gz")
KEPT = 300_000
"""characters of a part's log that are kept"""


@dataclass
class Part:
    name: str
    command: list[str]
    limit: float
    """seconds"""
    together: bool = False
    """nothing in it is timed, so it may run beside others"""


class Results:
    """results.json, written again at every change; its parts in the order in which they started."""

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.record, self._lock = out, {**about, "parts": {}}, threading.Lock()
        self.log = out / "logs.txt"

    def change(self, part: str, **fields: Any) -> None:
        with self._lock:
            self.record["parts"].setdefault(part, {"state": "running", "answers": []}).update(fields)
            write_json(self.out / "results.json", self.record)

    def add(self, part: str, answer: dict[str, Any]) -> None:
        self.change(part, answers=[*self.record["parts"][part]["answers"], answer])


def plan(options: argparse.Namespace, work: Path) -> list[Part]:
    """By importance; the limits are what a part may take, not what it should."""
    dry = options.dry_run
    settings = {**(TINY if dry else REAL), "device": "cpu" if dry else "cuda", "seconds": 4.0 if dry else 60.0}
    settings |= {"work": str(work), "out": str(options.out.resolve())}

    def own(name: str, limit: float, *before: str, together: bool = False) -> Part:
        peers = PEERS_PYTHON if name in ("saelens", "dictionary_learning", "sparsify") and PEERS_PYTHON.exists() else sys.executable
        return Part(name, [*before, str(peers), str(HERE / "gpu_parts.py"), json.dumps({**settings, "part": name})], limit, together)

    def checker(tool: str) -> list[str]:
        return [] if dry else [sanitizer(), "--tool", tool, "--error-exitcode", "1"]

    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/objective/test_cuda.py"]
    tests += ["-k", "one_feature"] if dry else ["-n", "4"] if find_spec("xdist") else []
    parts = [
        *([install(options.wheels, work)] if options.wheels.is_dir() else []),
        own("exact", 60, together=True),
        Part("tests", tests, 75, together=True),
        own("memcheck", 60, *checker("memcheck"), together=True),
        own("racecheck", 60, *checker("racecheck"), together=True),
        own("cache", 60, together=True),
        own("machine", 20),
        own("steps", 60),
        own("eager", 20),
        own("compile", 35),
        own("saelens", 20),
        own("dictionary_learning", 20),
        own("sparsify", 15),
        own("train", 75),
        own("profile", 20),
        own("harvest", 40),
    ]
    chosen = [part for part in parts if options.parts is None or part.name in options.parts]
    return [replace(part, limit=5 * part.limit) for part in chosen] if dry else chosen


def sanitizer() -> str:
    """Not always on the path where CUDA's compiler is."""
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def install(wheels: Path, work: Path) -> Part:
    files = sorted(str(path.resolve()) for path in wheels.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    return Part("wheels", [*pip, "--target", str(work / "site"), *files], 60, together=True)


def run_plan(parts: list[Part], results: Results, work: Path, deadline: float) -> None:
    together = [part for part in parts if part.together]
    with ThreadPoolExecutor(max(1, len(together))) as pool:
        list(pool.map(lambda part: run_part(part, results, work, deadline), together))
    for part in parts:
        if not part.together:
            run_part(part, results, work, deadline)


def run_part(part: Part, results: Results, work: Path, deadline: float) -> None:
    """Whatever happens in it ends as a state: ok, failed, too slow, no time, not started."""
    began = time.monotonic()
    limit = min(part.limit, deadline - began)
    results.change(part.name)
    state = "no time"
    if limit > 0:
        try:
            state = follow(part, results, work, limit)
        except OSError as error:  # a program that is not there
            state = f"not started: {error}"
    seconds = round(time.monotonic() - began, 1)
    said = work / f"{part.name}.log"
    text = said.read_text(errors="replace")[-KEPT:] if said.exists() else ""
    results.change(part.name, state=state, seconds=seconds, last_lines=text.splitlines()[-1 if state == "ok" else -25 :])
    with open(results.log, "a") as file:
        file.write(f"\n===== {part.name}: {state}, {seconds} s\n{text}\n")
    print(f"{part.name:20} {seconds:6.1f} s  {len(results.record['parts'][part.name]['answers']):3} results  {state}", flush=True)


def follow(part: Part, results: Results, work: Path, limit: float) -> str:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(work / "site")])}
    if results.record["dry_run"]:
        env |= {"TRITON_INTERPRET": "1", "TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    if part.name == "memcheck":
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else most of what lies beyond a tensor belongs to the allocator
    late = threading.Event()
    with (
        open(work / f"{part.name}.log", "w") as log,
        subprocess.Popen(part.command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=log, start_new_session=True) as process,
    ):

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                results.add(part.name, json.loads(line))
            else:
                log.write(line)
                log.flush()
        code = process.wait()
        timer.cancel()
    if late.is_set():
        return f"too slow: stopped after {limit:.0f} s"
    if code:
        return f"failed with code {code}"
    failed = sum("error" in answer or answer.get("ok") is False for answer in results.record["parts"][part.name]["answers"])
    return f"failed in {failed} cases" if failed else "ok"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # tyro may not be there
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, help="what `make gpu-wheels` made (default: .gpu-wheels, in a dry run none)")
    parser.add_argument("--minutes", type=float, default=6.0, help="for everything (default: %(default)s; a dry run has no limit)")
    parser.add_argument("--parts", nargs="+", help="only these; by default all")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at tiny sizes")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error(f"expected a CUDA GPU, but torch {torch.__version__} finds none; --dry-run goes through everything on a CPU")
    if not options.minutes > 0:
        parser.error(f"expected --minutes above 0, got {options.minutes:g}; give more")
    options.wheels = options.wheels or Path("/nowhere" if options.dry_run else ".gpu-wheels")
    deadline = float("inf") if options.dry_run else time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (options.out / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        parts = plan(options, Path(folder))
        if unknown := set(options.parts or ()) - {part.name for part in parts}:
            parser.error(f"expected names of parts, got {', '.join(sorted(unknown))}; leave --parts out to see them all")
        results = Results(options.out, {"date": date.today().isoformat(), "dry_run": options.dry_run})
        print("seconds at most: " + ", ".join(f"{part.name} {part.limit:.0f}" for part in parts), flush=True)
        run_plan(parts, results, Path(folder), deadline)
    try:
        from gpu_table import markdown

        (options.out / "table.md").write_text(markdown(results.record))
    except Exception:
        traceback.print_exc()  # every number is in results.json all the same
    print(f"everything is in {options.out}; look at table.md first")


if __name__ == "__main__":
    main()
