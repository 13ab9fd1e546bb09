"""Every benchmark at least imports: most of them run whole in the soak tests alone."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OF_PEERS = {"dashboard_arm"}  # in the environment of the other tools


def test_every_benchmark_imports():
    names = sorted({path.stem for path in (ROOT / "benchmarks").glob("*.py")} - OF_PEERS)
    code = f"import importlib; [importlib.import_module(name) for name in {names}]"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
