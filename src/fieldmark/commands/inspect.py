"""`fieldmark inspect --data SRC`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import console, print_json, print_table, quiet_libraries
from fieldmark.data.options import CatalogOptions
from fieldmark.errors import FieldmarkError

FILES = ("report.json", "bad_files.csv", "sheet.png")
EXAMPLES = 5


@dataclass
class InspectOptions(CatalogOptions):
    """Arguments of `inspect`.

    Attributes:
        part: student for the photos that a student is trained and measured on, teacher for a teacher's own.
        out: folder for report.json, bad_files.csv and sheet.png; null makes inspect-NAME here.
        max_photos: look at the pixels of that many photos only, evenly spread; null looks at all.
        json: print one JSON object.
        bad_photos: of no effect here; bad photos are listed in any case.
    """

    part: Literal["student", "teacher"] = "student"
    out: str | None = None
    max_photos: int | None = None
    json: bool = False


InspectOptions.__doc__ = f"{CatalogOptions.__doc__}\n{InspectOptions.__doc__}"


def run(argv: list[str]) -> None:
    """Looks at every photo, prints what the catalogue holds and writes a report, a list and a contact sheet."""
    options = parse(
        InspectOptions,
        argv,
        prog="fieldmark inspect",
        description="Says what a catalogue holds, what is wrong with it, and what it can be used for.",
        switches=("json",),
    )
    if options.max_photos is not None:
        positive("max_photos", options.max_photos)
    quiet_libraries()
    from fieldmark.data.catalog import load_catalog
    from fieldmark.data.checks import write_bad_photos
    from fieldmark.data.inspection import inspect_catalog
    from fieldmark.data.sheet import sheet_classes, write_sheet
    from fieldmark.progress import JobProgress

    catalog = load_catalog(
        options.data, part=options.part, columns=options.columns(), attribute_columns=options.attribute_columns
    )
    out = _folder(Path(options.out or f"inspect-{_name(options.data)}"))
    report, good, bad = inspect_catalog(catalog, max_photos=options.max_photos)
    if len(good):
        with JobProgress("drawing the sheet", sheet_classes(good)) as job:
            write_sheet(good, out / "sheet.png", progress=job.update)
    write_bad_photos(bad, out / "bad_files.csv")
    report = {"data": options.data, "part": options.part, **report, "bad_photos": [asdict(one) for one in bad]}
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.json:
        print_json(report | {"out": str(out)})
        return
    _print(report, out)


def _folder(out: Path) -> Path:
    """The folder to write, without the files of an earlier inspection; others are not written over."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / FILES[0]).is_file())):
        raise FieldmarkError(f"--out {out} exists and was not made by inspect; give another name, or delete it first.")
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    return out


def _name(source: str) -> str:
    """A source as part of a folder's name: the prefix of NAME:DIR, else the last part of its path."""
    prefix, colon, _ = source.partition(":")
    name = prefix if colon and prefix != "wds" and "/" not in prefix else Path(source).absolute().stem
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "catalogue"


def _print(report: dict[str, Any], out: Path) -> None:
    classes, photos = report["classes"], report["photos"]
    print_table(report["data"], ("", ""), [
        ("photos", f"{report['n_photos']:,}"),
        ("classes", f"{classes['n']:,}"),
        ("photos a class", _range(classes["photos_per_class"])),
        ("classes of one photo", f"{classes['n_with_one_photo']:,}"),
        ("photos without a label", f"{classes['n_photos_without_label']:,}"),
        ("classes in train and test", f"{classes['n_in_train_and_test']:,}"),
        ("titles", f"{report['titles']['coverage']:.0%}, {report['titles']['n_different']:,} different"),
        *((f"split {name}", _split(part)) for name, part in report["splits"].items()),
        *((f"role {name}", f"{count:,} photos") for name, count in report["roles"].items()),
        *((f"attribute {name}", _attribute(part)) for name, part in report["attributes"].items()),
        ("photos looked at", f"{photos['n_looked_at']:,}"),
        ("width", _range(photos["width"])),
        ("height", _range(photos["height"])),
        ("colour modes", ", ".join(f"{name} {count:,}" for name, count in photos["modes"].items()) or "–"),
    ])  # fmt: skip
    _say(f"\n{photos['n_bad']:,} photos cannot be read" + (f": {out / FILES[1]}" if photos["n_bad"] else ""))
    for one in report["bad_photos"][:EXAMPLES]:
        _say(f"  {one['item_id']}: {one['reason']}")
    equal, near = report["exact_duplicates"], report["near_duplicates"]
    _say(
        f"{equal['n_photos']:,} photos are the same file as another ({equal['n_groups']:,} groups, "
        f"{equal['n_groups_across_train_and_test']:,} of them across train and test)"
    )
    _examples(equal["item_ids"])
    ended = ", then the search ended" if near["ended_early"] else ""
    _say(
        f"{near['n_photos']:,} photos look nearly the same as another ({near['n_pairs']:,} pairs{ended}, "
        f"{near['n_pairs_across_train_and_test']:,} of them across train and test; at most "
        f"{near['max_bits_of_64']} of 64 bits of the difference hash and {near['max_grey_of_255']} of 255 greys apart)"
    )
    _examples(near["item_ids"])
    _say("\nWhat it can be used for")
    for kind, found in report["uses"].items():
        for name, reason in found.items():
            _say(f"  {kind[:-1]} {name}: {'yes' if reason is None else f'no, {reason}'}")
    _say(f"\nfingerprint {report['fingerprint']} (items, labels, splits and roles)")
    _say(f"report, list of bad photos and contact sheet: {out}")


def _say(line: str) -> None:
    console().print(line, markup=False, highlight=False, soft_wrap=True)


def _examples(groups: list[list[str]]) -> None:
    for group in groups[:EXAMPLES]:
        _say(f"  {', '.join(group[:EXAMPLES])}{', ...' if len(group) > EXAMPLES else ''}")


def _range(found: dict[str, float] | None) -> str:
    return "–" if found is None else f"{found['min']:g} to {found['max']:g}, median {found['median']:g}"


def _split(part: dict[str, int]) -> str:
    return f"{part['n_photos']:,} photos of {part['n_classes']:,} classes"


def _attribute(part: dict[str, Any]) -> str:
    return f"{part['coverage']:.0%}, {part['n_values']:,} values"
