"""`fieldmark label KIND`."""

from __future__ import annotations

from importlib import import_module

from fieldmark.cli import choose

PROG = "fieldmark label"
# kind -> what it is; its module is fieldmark.commands.label_KIND with `run(argv)`
KINDS = {
    "align": "how well titles fit photos, as `train maple --alignment` reads it",
    "captions": "what tells look-alike photos apart, as `train maple --captions` reads it",
    "attributes": "the few attributes that tell each item apart, as `train generator --examples` reads it",
}


def run(argv: list[str]) -> None:
    """Asks the teacher for one kind of answers; they are kept in a file."""
    if argv[:1] and argv[0] in ("-h", "--help"):
        print(f"usage: {PROG} KIND --teacher ID --data SRC --out F.parquet ...\n\nkinds:")
        for name, text in KINDS.items():
            print(f"  {name:12}{text}")
        print(f"\n`{PROG} KIND --help` says what a kind takes.")
        return
    kind = choose(next(iter(argv), None), list(KINDS), "kind of label", f"{PROG} --help")
    import_module(f"fieldmark.commands.label_{kind}").run(argv[1:])
