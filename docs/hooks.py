"""What mkdocs asks while it builds the site: pages at their paths in the repository, and the API reference, a page for each room."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHOWN = (
    "*.md",
    "docs/*.md",
    "docs/pictures/*.png",
    "benchmarks/*.md",
    "benchmarks/results/*.png",
    "checkpoints/*/README.md",
    "examples/*.ipynb",
)


def api_pages() -> dict[str, list[str]]:
    """Page of each package that holds modules -> these modules; none is named by hand, so none is forgotten."""
    pages: dict[str, list[str]] = {}
    for package in ("sae", "steering"):
        for path in sorted((ROOT / package).rglob("*.py")):
            room = ".".join(path.parent.relative_to(ROOT).parts)
            module = room if path.stem == "__init__" else f"{room}.{path.stem}"
            pages.setdefault(f"api/{room}.md", []).append(module)
    return pages


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_dir == config.docs_dir]:  # the theme's own stay
        files.remove(file)
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    reference = []
    for page, modules in sorted(api_pages().items()):
        room = page.removeprefix("api/").removesuffix(".md")
        text = "\n\n".join(
            [f"::: {room}\n    options:\n      heading_level: 1", *(f"::: {module}" for module in modules if module != room)]
        )
        files.append(File.generated(config, page, content=text))
        reference.append({room: page})
    config.nav.append({"API reference": reference})
    return files
