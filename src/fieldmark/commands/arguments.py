"""A dataclass becomes flags: `--name VALUE`, help from its docstring, values checked by jsonargparse.

Every mistake is a :class:`FieldmarkError` of one sentence; an unknown flag or key names the nearest known one.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from fieldmark.errors import FieldmarkError

T = TypeVar("T")
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a mapping", list: "a list"}


def parse(
    options: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    positional: Collection[str] = (),
    switches: Collection[str] = (),
    several: Collection[str] = (),
    config_file: bool = False,
) -> T:
    """Reads a command's arguments.

    Args:
        options: dataclass of the arguments; a field without default is required; the `Attributes:` of its docstring
            are the help.
        argv: what stands behind the command.
        prog: the command, as the help names it.
        description: what the command does.
        positional: fields given by position; a list takes one or more.
        switches: boolean fields given without a value, such as `--json`.
        several: lists given as one or more words behind the flag. A text is taken as it stands, so that it may hold
            commas, brackets and spaces, and the flag of a list of texts may be repeated.
        config_file: whether `--config FILE.yaml` gives defaults for the flags.

    Raises:
        FieldmarkError: unknown flag or key, missing argument, value of the wrong type.
        SystemExit: after `--help`.
    """
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    if config_file:
        parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    hints = typing.get_type_hints(options)
    of_texts = {name for name in several if hints[name] == list[str]}
    help_texts = field_help(options)
    for field in fields(options):  # type: ignore[arg-type]
        text = help_texts.get(field.name, "").replace("%", "%%")
        given = field.default if field.default_factory is MISSING else field.default_factory()
        default: dict[str, Any] = {"required": True} if given is MISSING else {"default": given}
        if field.name in switches:
            parser.add_argument(f"--{field.name}", action="store_true", help=text)
        elif field.name in of_texts:
            parser.add_argument(f"--{field.name}", type=str, nargs="+", action="extend", help=text, **default)
        elif field.name in positional:
            many = {"nargs": "+", "type": str} if typing.get_origin(hints[field.name]) is list else {"type": str}
            parser.add_argument(field.name, help=text, **many)
        else:
            parser.add_argument(f"--{field.name}", type=hints[field.name], help=text, **default)
    try:
        values = parser.parse_args(_bracketed(argv, hints, several, of_texts)).as_dict()
    except ArgumentError as error:
        raise FieldmarkError(_sentence(str(error), hints, positional, prog)) from error
    return options(**{field.name: values[field.name] for field in fields(options)})  # type: ignore[arg-type]


def _bracketed(
    argv: Sequence[str], hints: dict[str, Any], several: Collection[str], of_texts: Collection[str]
) -> list[str]:
    """The arguments with `--ks 1,10` written as `--ks [1,10]`, which is how jsonargparse takes a list, and so is
    `--dims 64 32` where a list may be several words."""
    lists = {f"--{name}" for name, hint in hints.items() if _is_list(hint) and name not in of_texts}
    joined = lists & {f"--{name}" for name in several}
    written: list[str] = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if equals and flag in lists and not value.startswith("["):
            word = f"{flag}=[{value}]"
        elif written and written[-1] in lists and not word.startswith(("[", "-")) and word != "null":
            word = f"[{word}]"
        elif written[-2:-1] and written[-2] in joined and not word.startswith("-"):
            word = f"{written.pop()[:-1]},{word}]"
        written.append(word)
    return written


def _is_list(hint: Any) -> bool:
    """A list, or a list or null."""
    return typing.get_origin(hint) is list or any(typing.get_origin(part) is list for part in typing.get_args(hint))


def positive(name: str, value: int) -> None:
    """Refuses a count below 1."""
    if value < 1:
        raise FieldmarkError(f"--{name} was given {value}; expected 1 or more.")


def check_owned(options: Any, owner: str, names: Collection[str]) -> None:
    """Refuses flags that differ from their defaults where the flag that they belong to was not given."""
    if getattr(options, owner) is not None:
        return
    for field in fields(options):
        if field.name in names and getattr(options, field.name) != field.default:
            raise FieldmarkError(f"--{field.name} was given without --{owner}; add it, or leave it out.")


def field_help(options: type) -> dict[str, str]:
    """What a dataclass's docstring says of each field under `Attributes:`."""
    names = {field.name for field in fields(options)}
    found: dict[str, str] = {}
    current: str | None = None
    for line in (options.__doc__ or "").splitlines():
        match = re.match(r"\s+(\w+): (.+)", line)
        if match and match[1] in names:
            current = match[1]
            found[current] = match[2].strip()
        elif current and line.strip():
            found[current] += f" {line.strip()}"
        else:
            current = None
    return found


def expectation(hint: Any) -> str:
    """A type in words, for an error."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join("null" if part is NoneType else expectation(part) for part in typing.get_args(hint))
    return _NAMES.get(typing.get_origin(hint) or hint, str(hint))


def _sentence(message: str, hints: dict[str, Any], positional: Collection[str], prog: str) -> str:
    """jsonargparse's message, often of many lines, as one sentence with what was given, expected and to do."""
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        return _unknown_argument(match[1], list(hints), prog)
    if match := re.match(r"[Oo]ption '([^']+)' is not accepted", message):
        return f"Unknown key {match[1]!r} in the config file; {_nearest(match[1], list(hints), '', prog)}"
    if match := re.match(r"the following arguments are required: (.+)", message):
        names = sorted((name.strip() for name in match[1].split(",")), key=lambda name: name not in positional)
        missing = ", ".join(name.upper() if name in positional else f"--{name}" for name in names)
        return f"{missing} {'is' if len(names) == 1 else 'are'} missing; see `{prog} --help`."
    if match := re.match(r"argument --([\w.]+)(?:/\S+)?: expected one argument", message):
        return f"--{match[1]} was given without a value; expected {_expected(match[1], hints)}."
    if match := re.match(r"argument --([\w.]+): expected at least one argument", message):
        return f"--{match[1]} was given without a value; expected one or more."
    if match := re.match(r'Parser key "config": File does not exist: (.+)', message):
        return f"The config file {match[1]} does not exist; give the path of a YAML file."
    if match := re.match(r'Parser key "([\w.]+)":', message):
        given = re.search(r"(?:Given|Got) value: (.*)", message)
        value = f" {given[1].strip()!r}" if given else " a wrong value"
        return f"--{match[1]} was given{value}; expected {_expected(match[1], hints)}."
    if message.startswith(("Unexpected config", "Problems parsing config")):
        return f"The config file is not YAML with one `key: value` a line; see `{prog} --print_config`."
    return " ".join(message.split())


def _expected(name: str, hints: dict[str, Any]) -> str:
    return "the path of a YAML file" if name == "config" else expectation(hints.get(name.partition(".")[0], str))


def _unknown_argument(given: str, names: list[str], prog: str) -> str:
    if not given.startswith("-"):
        return f"Unexpected argument {given!r}; see `{prog} --help`."
    flag = given.partition("=")[0]
    return f"Unknown flag {flag}; {_nearest(flag.lstrip('-').replace('-', '_'), names, '--', prog)}"


def _nearest(name: str, names: list[str], dashes: str, prog: str) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {dashes}{near[0]}?" if near else f"see `{prog} --help`."
