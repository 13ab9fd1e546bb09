"""The command that draws a circuit's file as a page."""

from dataclasses import dataclass
from pathlib import Path

from sae.disk.places import require_file
from steering.circuits.files import open_circuit
from steering.circuits.pages.page import write_page


@dataclass(kw_only=True)
class DrawConfig:
    circuit: Path
    """JSON file of a circuit, as find-circuit writes it."""
    out: Path | None = None
    """HTML file for the page. Default: beside the circuit, with its name."""


def draw_circuit(config: DrawConfig) -> Path:
    """Writes the page and returns its path. Raises `InputError` for a file that is not a circuit and a place that cannot be written."""
    if config.out is not None:
        require_file(config.out)
    circuit = open_circuit(config.circuit)
    path = config.out or config.circuit.with_suffix(".html")
    write_page(circuit, path)
    print(f"page: {path}")
    return path
