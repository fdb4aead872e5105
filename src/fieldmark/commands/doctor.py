"""`fieldmark doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fieldmark.commands.arguments import parse
from fieldmark.commands.console import console, print_json, print_table


@dataclass
class DoctorOptions:
    """Arguments of `doctor`.

    Attributes:
        json: print one JSON object.
    """

    json: bool = False


def run(argv: list[str]) -> None:
    """Prints what this machine is, what can run on it, and what is set up wrong."""
    options = parse(
        DoctorOptions,
        argv,
        prog="fieldmark doctor",
        description="Versions, devices, memory, and what is misconfigured.",
        switches=("json",),
    )
    from fieldmark.machine import inspect_machine

    found = inspect_machine()
    if options.json:
        print_json(found)
        return
    rows = [("python", found["python"]), *found["versions"].items()]
    print_table("versions", ("", ""), rows)
    devices = [(d["kind"], d["name"], f"{d['memory_gib']:.1f} GiB", d["bf16"]) for d in found["devices"]]
    print_table("devices", ("", "name", "memory", "bf16"), devices)
    for line in (*_sentences(found), *(f"Problem: {problem}" for problem in found["problems"])):
        console().print(line, markup=False, highlight=False, soft_wrap=True)


def _sentences(found: dict[str, Any]) -> list[str]:
    can = found["can_run"]
    return [
        f"{found['cores']} cores, {found['threads']} threads of torch, {found['memory_gib']} GiB of memory.",
        f"The quickstart {'fits' if can['quickstart'] else 'may not fit'} into this memory.",
        f"Training runs on {can['device']}; --precision {can['precision']} suits it.",
        f"A frozen teacher may have about {can['teacher_billions']} billion parameters: its "
        f"{can['precision']} weights then take half of that memory.",
        f"Published teachers that fit: {', '.join(can['teachers']) or 'none; `fieldmark build-teacher` makes one'}.",
        *([] if found["problems"] else ["No problem found."]),
    ]
