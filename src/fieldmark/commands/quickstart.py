"""`fieldmark quickstart`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from fieldmark.commands.arguments import parse
from fieldmark.commands.console import quiet_libraries


def run(argv: list[str]) -> None:
    """A control and SAGA on the embedded catalogue with the embedded teacher."""
    module = import_module("fieldmark.methods.quickstart")
    config = parse(
        module.QuickstartConfig,
        argv,
        prog="fieldmark quickstart",
        description="Trains a control and SAGA on drawn birds with the embedded teacher, and writes a report.",
    )
    quiet_libraries()
    try:
        module.quickstart(config)
    except KeyboardInterrupt as error:
        again = "Interrupted before anything was written; run the same command again."
        if Path(config.out).exists():
            again = (
                f"Interrupted; quickstart cannot go on: remove {config.out} or give another --out, and run it again."
            )
        raise KeyboardInterrupt(again) from error
