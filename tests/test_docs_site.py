"""The documentation's site: its navigation has every page, and the API reference every module. `make docs` builds it."""

import importlib.util
from pathlib import Path

import yaml
from test_layers import modules

ROOT = Path(__file__).parents[1]


def pages(nav):
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else pages(value)


def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_navigation_has_every_page_that_the_site_shows():
    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    shown = {path.relative_to(ROOT).as_posix() for pattern in hooks().SHOWN for path in ROOT.glob(pattern) if path.suffix == ".md"}
    assert set(listed) == shown
    assert len(listed) == len(shown)


def test_the_reference_has_every_module_once():
    reference = [module for listed in hooks().api_pages().values() for module in listed]
    assert sorted(reference) == sorted(modules())
