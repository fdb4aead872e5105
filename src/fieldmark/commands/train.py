"""`fieldmark train METHOD`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from fieldmark.cli import METHODS, choose

PROG = "fieldmark train"


def run(argv: list[str]) -> None:
    """Trains, then prints the metrics before and after and the run folder."""
    if argv[:1] and argv[0] in ("-h", "--help"):
        print(f"usage: {PROG} METHOD --data SRC --out RUN [--config F.yaml] [--resume true] ...\n\nmethods:")
        for name, (_, text) in METHODS.items():
            print(f"  {name:12}{text}")
        print(f"\n`{PROG} METHOD --help` says what a method takes.")
        return
    method = choose(next(iter(argv), None), list(METHODS), "method", f"{PROG} --help")
    from fieldmark.commands.arguments import parse
    from fieldmark.commands.console import quiet_libraries

    module = import_module(f"fieldmark.methods.{method}")
    summary = (module.__doc__ or "").partition("\n")[0]
    options = getattr(module, METHODS[method][0])
    config = parse(options, argv[1:], prog=f"{PROG} {method}", description=summary, config_file=True)
    quiet_libraries()
    try:
        out = module.train(config)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(how_to_resume(Path(config.out))) from error
    if os.environ.get("RANK", "0") == "0":
        show_run(out)


def how_to_resume(out: Path) -> str:
    """What to do after Ctrl-C, in one sentence."""
    again = "the same command with --resume true"
    stage = max(out.glob("[0-9]-*"), default=None)  # of a loop of several runs
    if stage is not None:
        name = stage.name.partition(".")[0]
        return f"Interrupted; {again} goes on in the stage {name}, from its last checkpoint if it has one."
    if any(out.glob("checkpoints/checkpoint-*/complete")):
        return f"Interrupted; {again} goes on from the last checkpoint in {out / 'checkpoints'}."
    if not (out / "config.yaml").exists():
        return "Interrupted before the run began; run the same command again."
    return f"Interrupted before a checkpoint (--save_steps N saves one every N steps); {again} begins {out} anew."


def show_run(out: Path) -> None:
    """Prints a finished run: metrics before and after, and where it lies."""
    from fieldmark.commands.console import SHOWN, console, number, print_table
    from fieldmark.commands.enriching import print_gains

    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    before, after = metrics["before"], metrics["after"]
    rows = [
        (name, number(before[name]), number(after[name]), f"{after[name] - before[name]:+.3f}")
        for name in SHOWN
        if name in before and name in after
    ]
    if rows:
        print_table(f"{metrics['method']}, seed {metrics['seed']}", ("", "before", "after", "change"), rows)
    print_gains("instance_recall@1", gains_of(metrics))
    console().print(f"{metrics['seconds']:.0f} s; the run: {out}", markup=False, highlight=False, soft_wrap=True)


def gains_of(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What attributes in queries gain, and what a generator's cost; empty where no query had any."""
    from fieldmark.commands.enriching import Gain, gain_rows
    from fieldmark.methods.afmrl_report import GENERATORS

    name, ladder, seconds = "instance_recall@1", metrics.get("ladder", {}), metrics.get("seconds_per_query", {})
    found = [
        Gain(what, ladder["agcl"][name], ladder[f"agcl + {what}"][name], seconds.get(stage))
        for stage, what in GENERATORS.items()
        if f"agcl + {what}" in ladder
    ]
    if f"enriched_{name}" in metrics["after"]:
        found.append(Gain(metrics["method"], metrics["after"][name], metrics["after"][f"enriched_{name}"], None))
    return gain_rows(found)
