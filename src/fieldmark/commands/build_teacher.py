"""`fieldmark build-teacher`."""

from __future__ import annotations

from importlib import import_module

from fieldmark.commands.arguments import parse
from fieldmark.commands.console import quiet_libraries


def run(argv: list[str]) -> None:
    """Builds a teacher from the part of a catalogue that its students never see."""
    module = import_module("fieldmark.teacher.build")
    config = parse(
        module.BuildConfig,
        argv,
        prog="fieldmark build-teacher",
        description="Makes a small teacher for a catalogue with attributes.",
        config_file=True,
    )
    quiet_libraries()
    try:
        module.build_teacher(config)
    except KeyboardInterrupt as error:
        again = "Interrupted; the same command with --resume true goes on behind the last finished stage."
        raise KeyboardInterrupt(again) from error
