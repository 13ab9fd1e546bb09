"""The floor plan: no circle of imports, and none that runs upwards. Imports inside functions count; those for annotations alone do not."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# From the ground up; a room may import from those above it in this list, and from itself. ARCHITECTURE.md says what each is for.
ROOMS = (
    "sae.errors",
    "sae.device",
    "sae.entries",
    "sae.html",
    "sae.mesh",
    "sae.processes",
    "sae.progress",
    "sae.statistics",
    "sae.streams",
    "sae.disk",
    "sae.pieces",
    "sae.text_input",
    "sae.encoding",
    "sae.objective",
    "sae.model",
    "sae.dictionaries",
    "sae",
    "sae.kinds",
    "sae.activations.text",
    "sae.activations.files",
    "sae.activations.harvest",
    "sae.activations.imports",
    "sae.activations",
    "sae.training",
    "sae.evaluation",
    "sae.features.index",
    "sae.features.explanations",
    "sae.features.notes",
    "sae.features.pages",
    "sae.features.model_diff",
    "sae.features.exports",
    "sae.features.terminal",
    "sae.features.browser",
    "sae.features",
    "sae.command_line",
    "steering.positions",
    "steering.vector",
    "steering.dictionary",
    "steering.intervention",
    "steering",
    "steering.directions",
    "steering.strength",
    "steering.concept",
    "steering.named_direction",
    "steering.report_style",
    "steering.circuits.model_graph",
    "steering.circuits.tasks",
    "steering.circuits",
    "steering.circuits.pages",
    "steering.circuits.finding",
    "steering.circuits.features",
    "steering.circuits.attribution",
    "steering.circuits.steering_nodes",
    "steering.breakdown",
    "steering.panel",
    "steering.parts",
    "steering.steer",
    "steering.studies",
    "steering.compare",
    "steering.command_line",
)


def modules() -> dict[str, Path]:
    paths = [path for package in ("sae", "steering") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in known else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def room_of(module: str) -> str:
    return max((room for room in ROOMS if module == room or module.startswith(room + ".")), key=len)


def test_no_import_runs_in_a_circle_or_upwards():
    known = modules()
    graph = {module: imported(path, known) - {module} for module, path in known.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError that names the circle
    upwards = [
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in others
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(module))
    ]
    assert upwards == []


def test_every_room_exists():
    assert [room for room in ROOMS if room not in modules()] == []


def test_no_file_is_longer_than_400_lines():
    assert [str(path) for path in modules().values() if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []
