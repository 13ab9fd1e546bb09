"""How every command runs: flags from a dataclass, one call, one-sentence errors. The table of commands is in steering/command_line.py."""

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args

from sae.disk.places import refusal_sentence
from sae.disk.remote import Place, RemotePath, is_url
from sae.errors import InputError
from sae.streams import lasting_streams
from sae.text_input import replace_surrogates


def run(function: Callable[[Any], Any], config_class: type, description: str) -> None:
    """Parses the command line into `config_class` and calls `function` with it.

    Exit codes: 0 done, 2 unusable input or a place that cannot be written (one sentence on stderr), 130 interrupted. A reader of
    standard output that leaves early, as `head` does, changes neither the work nor the code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # stderr never fails on a character as it is
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character of the text shows "?"
    with lasting_streams():
        try:
            function(parse(config_class, description))
        except InputError as error:
            fail(str(error))
        except OSError as error:
            text = refusal_sentence(error)
            if text is None:
                raise
            fail(text)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)


def fail(why: str) -> NoReturn:
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def parse(config_class: type, description: str) -> Any:
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    _check_encoding(sys.argv[1:])
    registry = ConstructorRegistry()
    urls: list[str] = []  # where a path on this machine is meant

    @registry.primitive_rule
    def path(info: Any) -> Any:
        if info.type == Place:
            return PrimitiveConstructorSpec(1, "PATH|URL", _place, lambda value: isinstance(value, Place), lambda value: [str(value)])
        if info.type is not Path:
            return None

        def local(arguments: list[str]) -> Path:
            urls.extend(filter(is_url, arguments))
            return _path(arguments)

        return PrimitiveConstructorSpec(1, "PATH", local, lambda value: isinstance(value, Path), lambda value: [str(value)])

    asked: list[type] = []

    @registry.primitive_rule
    def optional(info: Any) -> Any:
        """Where tyro's help would say {None}|STR and (default: None), or (default: ) of a list."""
        if info.type in asked or not (NoneType in get_args(info.type) or info.type_origin is tuple):
            return None
        asked.append(info.type)
        spec = ConstructorRegistry.get_primitive_spec(info)  # tyro's own
        asked.pop()
        if not isinstance(spec, PrimitiveConstructorSpec):
            return spec
        words = spec.str_from_instance
        return replace(
            spec,
            metavar=spec.metavar.replace("{None}|", ""),
            str_from_instance=lambda value: (value is not None and words(value)) or ["not", "given"],
        )

    with registry:
        config: Any = tyro.cli(config_class, description=description)
    if urls:
        raise InputError(f"expected a path on this machine, got the URL {urls[0]}; only activation caches have URLs")
    return config


def _check_encoding(arguments: list[str]) -> None:
    """Refuses bytes that Python could not decode: otherwise they would fail only when printed or written, perhaps hours later."""
    for argument in arguments:
        if replace_surrogates(argument)[1]:
            raise InputError(
                f"expected arguments in {sys.getfilesystemencoding()}, got {argument!a}; write it in that encoding, or rename the file"
            )


def _path(arguments: list[str]) -> Path:
    if not arguments[0]:  # from an unset variable of the shell; for Python it would be the present folder
        raise ValueError("expected a path, got an empty text")
    return Path(arguments[0])


def _place(arguments: list[str]) -> Place:
    return RemotePath(arguments[0]) if is_url(arguments[0]) else _path(arguments)
