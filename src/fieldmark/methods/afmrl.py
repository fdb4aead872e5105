"""AFMRL: attributes that sharpen product retrieval, and retrieval that sharpens attributes, arXiv 2604.20135.

Two models take turns. A generator names the attributes that tell an item from its look-alikes; they weigh the negatives
of an embedder (AGCL). What the embedder then finds with them in its queries rewards the generator (RAR), and its better
attributes train the embedder once more (CIT, "circular iterative training").

    stage            what it does                                               what it leaves in the run folder
    1 generator      cold start on examples (`methods.generator`)               1-generator/
    2 attributes     the generator names attributes of all items                2-attributes.parquet, .json
    3 agcl           Eq. 1-3 on the embedder (`methods.agcl`)                    3-agcl/
    4 rar            Eq. 4-6 on the generator (`methods.rar`)                    4-rar/
    5 rl_attributes  attributes of the rewarded generator                       5-rl_attributes.parquet, .json
    6 cit            AGCL again, from stage 3, with them, on 30 % of the items  6-cit/

Each stage is a run of its own with its own log and metrics; a killed run goes on in its stage (`--resume true`).
`metrics.json` has the rows of the paper's table 2. Deviations: those of the three methods, and

1. `generator_settings` and the like set any setting of a stage; what is not given keeps that method's default.
2. CIT goes on from stage 3's embedder; the paper does not say from where.
3. CIT's 30 % are whole products.
4. The first row of the table is the embedder before any training; the paper's has been trained by plain InfoNCE (`train
   agcl --weights none`).
"""

from __future__ import annotations

import json
import shutil
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from accelerate.utils.memory import clear_device_cache
from jsonargparse import ArgumentError, ArgumentParser

from fieldmark.data.catalog import select_split
from fieldmark.data.checks import this_process
from fieldmark.data.options import read_catalog
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.enriched import PREFIX
from fieldmark.methods import agcl, generator, rar
from fieldmark.methods.afmrl_report import write_afmrl_report
from fieldmark.methods.agcl import AgclConfig
from fieldmark.methods.generator import GeneratorConfig
from fieldmark.methods.rar import RarConfig
from fieldmark.methods.run import FolderConfig, check_folder, check_same_run, refuse
from fieldmark.progress import JobProgress
from fieldmark.students.build import load_student
from fieldmark.students.checkpoints import Checkpoint
from fieldmark.students.multimodal import read_config
from fieldmark.teacher.attribute_labels import attribute_cache, label_attributes
from fieldmark.teacher.attributes import load_schema
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.questions import square_side

STAGES = ("generator", "attributes", "agcl", "rar", "rl_attributes", "cit")
CIT_SHARE = 0.3  # "only 30 % of the training samples"


@dataclass
class AfmrlConfig(FolderConfig):
    """Settings of the whole loop.

    Attributes:
        student: multimodal LLM that becomes the embedder (a folder or a hub id); null takes the teacher.
        teacher: multimodal LLM that becomes the generator.
        schema: YAML file of the generator's prompt and attributes; null is the packaged one.
        enrich: whose attributes join the titles when measuring: query, both or none.
        category: attribute that holds a product's category, for coarse retrieval; null takes `category`.
        max_new_tokens: a generator's answers end there at the latest.
        until: the last stage to run; a later one with --resume true goes on from there.
        cold_start: false takes the teacher for a generator that answers in the form asked for, and leaves stage 1 out.
        generator_settings: settings of stage 1, see `fieldmark train generator --help`, e.g. {"max_steps": 500}.
        agcl_settings: of stage 3 and of stage 6, see `fieldmark train agcl --help`.
        rar_settings: of stage 4, see `fieldmark train rar --help`.
        cit_settings: of stage 6 alone; they win over agcl_settings.
    """

    teacher: str | None = None
    schema: str | None = None
    enrich: Literal["query", "both", "none"] = "query"
    category: str | None = None
    max_new_tokens: int = 512
    until: Literal["generator", "attributes", "agcl", "rar", "rl_attributes", "cit"] = "cit"
    cold_start: bool = True
    generator_settings: dict[str, Any] = field(default_factory=dict)
    agcl_settings: dict[str, Any] = field(default_factory=dict)
    rar_settings: dict[str, Any] = field(default_factory=dict)
    cit_settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses what no stage could run with, before the first one runs."""
        super().__post_init__()
        refuse(self, ("max_new_tokens",), above_zero=True)
        if self.teacher is None:
            raise FieldmarkError(
                "AFMRL makes an attribute generator of a multimodal LLM; name one with --teacher (a folder or a hub "
                "id), or build one for your catalogue with `fieldmark build-teacher`."
            )
        if not stages_of(self):
            raise FieldmarkError("until generator leaves nothing to do without a cold start; name a later stage.")
        Stages(self)


AfmrlConfig.__doc__ = f"{FolderConfig.__doc__}\n{AfmrlConfig.__doc__}"


def stages_of(config: AfmrlConfig) -> list[str]:
    """The stages to run, in order."""
    return [s for s in STAGES[: 1 + STAGES.index(config.until)] if s != "generator" or config.cold_start]


class Stages:
    """Where each stage lies, and its settings."""

    def __init__(self, config: AfmrlConfig) -> None:
        self.config, self.out = config, Path(config.out)
        self.generator = self._settings(GeneratorConfig, "generator", config.generator_settings, teacher=config.teacher)
        first = str(self.folder("generator") / "model") if config.cold_start else config.teacher
        self.agcl = self._settings(
            AgclConfig,
            "agcl",
            config.agcl_settings,
            student=config.student or config.teacher,
            attributes=str(self.file("attributes")),
            enrich=config.enrich,
            category=config.category,
        )
        self.rar = self._settings(
            RarConfig, "rar", config.rar_settings, teacher=first, student=str(self.folder("agcl") / "model")
        )
        self.cit = self._settings(
            AgclConfig,
            "cit",
            {"sample_share": CIT_SHARE} | config.agcl_settings | config.cit_settings,
            student=str(self.folder("agcl") / "model"),
            attributes=str(self.file("rl_attributes")),
            enrich=config.enrich,
            category=config.category,
        )
        self.generators = {"attributes": first, "rl_attributes": str(self.folder("rar") / "model")}

    def folder(self, stage: str) -> Path:
        """The run folder of a stage that trains."""
        return self.out / f"{1 + STAGES.index(stage)}-{stage}"

    def file(self, stage: str) -> Path:
        """The Parquet file of a stage that asks for attributes."""
        return self.folder(stage).with_suffix(".parquet")

    def _settings(self, kind: type, stage: str, given: dict[str, Any], **fixed: Any) -> Any:
        """The stage's own config: what all stages share, what the loop decides, what the user gives."""
        names = {one.name for one in fields(kind)}
        shared = {one.name: getattr(self.config, one.name) for one in fields(FolderConfig) if one.name != "student"}
        shared |= {name: getattr(self.config, name) for name in ("schema", "max_new_tokens") if name in names}
        decided = {**shared, **fixed, "out": str(self.folder(stage)), "resume": self.folder(stage).exists()}
        free = sorted(names - {*decided, "student"})
        for name in given:
            if name not in free:
                raise FieldmarkError(f"{name!r} cannot be set for the stage {stage}; it takes {', '.join(free)}.")
        return kind(**decided, **checked(kind, stage, given))


def checked(kind: type, stage: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings given for a stage, their values checked as the command line of its method does."""
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in given.items():
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{name}", type=hints[name])
        try:
            values[name] = parser.parse_object({name: value})[name]
        except ArgumentError as error:
            method = "agcl" if stage == "cit" else stage
            raise FieldmarkError(
                f"{name} of the stage {stage} was given {value!r}; see `fieldmark train {method} --help` for what it "
                "can be."
            ) from error
    return values


def train(config: AfmrlConfig) -> Path:
    """Runs the loop; returns the run folder."""
    started = time.time()
    wanted = stages_of(config)
    catalog, bad = read_catalog(config)
    select_split(catalog, "train"), select_split(catalog, "test")
    check_catalog(Stages(config), wanted)
    reopen(config)
    out = check_folder(config, bad)
    stages = Stages(config)
    steps: dict[str, Callable[[], Any]] = {
        # 1. The generator learns the form of an answer
        "generator": lambda: run_stage(generator.train, stages.generator),
        # 2. What it says of every item
        "attributes": lambda: ask(stages, "attributes"),
        # 3. The embedder, its negatives weighed by attributes
        "agcl": lambda: run_stage(agcl.train, stages.agcl),
        # 4. The generator, rewarded by what the frozen embedder finds
        "rar": lambda: run_stage(rar.train, stages.rar),
        # 5. What it says now; what the embedder of stage 3 finds with it
        "rl_attributes": lambda: ask(stages, "rl_attributes"),
        # 6. The embedder again
        "cit": lambda: run_stage(agcl.train, stages.cit),
    }
    for stage in wanted:
        steps[stage]()
        clear_device_cache(garbage_collection=True)  # models of a stage lie in cycles, and the next one needs the room
        this_process().wait_for_everyone()  # the main process alone writes
    # 7. The last embedder, the report, and the table of all stages, which says that the run has ended
    if this_process().is_main_process:
        copy_embedder(stages, wanted)
        results = find_results(stages, wanted, started)
        write_afmrl_report(stages, wanted, results)
        write_json(out / "metrics.json", results)
    return out


def check_catalog(stages: Stages, wanted: Sequence[str]) -> None:
    """Refuses what a later stage would, before the first one runs.

    Raises:
        FieldmarkError: no titles, no products with two items, fewer items than a stage takes at once, no such category,
            or a generator that RAR could not train.
    """
    tables = {"bad_photos": "raise"}  # names and counts alone: no photo is opened
    stage = ""
    try:
        for stage, settings in (("agcl", stages.agcl), ("cit", stages.cit)):
            if stage in wanted:
                own = replace(settings, **tables, attributes=None, weights="none", enrich="none")
                agcl.make_batches(own, agcl.open_task(own))
        stage = "rar"
        if stage in wanted:
            task = rar.open_task(replace(stages.rar, **tables))
            rar.make_arguments(stages.rar, len(task.train.queries))
            rar.check_reference(stages.rar, read_config(Checkpoint(str(stages.config.teacher))))
    except FieldmarkError as error:
        raise FieldmarkError(f"The stage {stage} could not run: {error}") from error


def reopen(config: AfmrlConfig) -> None:
    """Makes a finished run whose `until` was an earlier stage one that can go on; its other settings must be the same.

    Raises:
        FieldmarkError: they are not.
    """
    stored = Path(config.out) / "config.yaml"
    if not (config.resume and stored.exists() and this_process().is_main_process):
        return
    try:
        settings = yaml.safe_load(stored.read_text(encoding="utf-8"))
        until = settings["until"]
    except (UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return  # check_folder says what is wrong with it
    if until in STAGES[: STAGES.index(config.until)]:
        check_same_run(stored, config, asdict(replace(config, until=until)))
        (stored.parent / "metrics.json").unlink(missing_ok=True)
        stored.write_text(yaml.safe_dump(settings | {"until": config.until}, sort_keys=False), encoding="utf-8")


def run_stage(method: Callable[[Any], Path], settings: Any) -> None:
    """Trains, or goes on with, a stage that is not finished."""
    if not (Path(settings.out) / "metrics.json").exists():
        method(settings)


def ask(stages: Stages, stage: str) -> None:
    """Attributes of all items; what is known already is not asked again.

    Beside the file its numbers: seconds an item, valid answers, and what the trained embedder finds with them.
    """
    with this_process().main_process_first():
        summary = stages.file(stage).with_suffix(".json")
        if summary.exists():
            return
        found = name_attributes(stages, stage)
        if stage == "rl_attributes":
            settings = replace(stages.agcl, attributes=str(stages.file(stage)))
            student = load_student(stages.folder("agcl") / "model")
            measured = agcl.measure(student, agcl.open_task(settings), settings)
            found |= {"metrics": measured.metrics, "intervals": measured.intervals}
        write_json(summary, found)


def name_attributes(stages: Stages, stage: str) -> dict[str, Any]:
    """Asks the stage's generator about all items; returns how it went."""
    config, source = stages.config, stages.generators[stage]
    catalog, _ = read_catalog(config)
    parts = [select_split(catalog, split) for split in ("train", "test")]
    photos, titles = ([one for part in parts for one in part[name]] for name in ("image", "title"))
    assert source is not None
    teacher = Teacher.load(source, device=this_process().device)
    schema = load_schema(config.schema)
    cache = attribute_cache(
        stages.file(stage),
        teacher,
        schema,
        temperature=0.0,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        resolution=square_side(teacher, config.resolution),  # as it was trained
    )
    with cache, JobProgress(stage.replace("_", " "), len(photos)) as job:
        labels = label_attributes(teacher, photos, titles, cache, schema, progress=job.update)
    return {
        "items": labels.answers,
        "valid": 1 - sum(labels.invalid.values()) / labels.answers,
        "invalid": dict(labels.invalid),
        "seconds_per_item": labels.seconds_per_item,
    }


def copy_embedder(stages: Stages, wanted: Sequence[str]) -> None:
    """`model/`, a copy of the last embedder."""
    last = next((stage for stage in ("cit", "agcl") if stage in wanted), None)
    if last is not None:
        shutil.rmtree(stages.out / "model", ignore_errors=True)  # of a run that ended earlier
        shutil.copytree(stages.folder(last) / "model", stages.out / "model")


def find_results(stages: Stages, wanted: Sequence[str], started: float) -> dict[str, Any]:
    """What `metrics.json` holds: the ladder, and what enriched queries cost."""
    ladder = find_ladder(stages, wanted)
    asked = {
        stage: read_json(stages.file(stage).with_suffix(".json"))["seconds_per_item"]
        for stage in ("attributes", "rl_attributes")
        if stage in wanted
    }
    ends = list(ladder.values()) or [{"metrics": {}, "intervals": {}}]
    return {
        "method": "afmrl",
        "seed": stages.config.seed,
        "before": ends[0]["metrics"],
        "after": ends[-1]["metrics"],
        "intervals": {"before": ends[0]["intervals"], "after": ends[-1]["intervals"]},
        "ladder": {name: rung["metrics"] for name, rung in ladder.items()},
        "ladder_intervals": {name: rung["intervals"] for name, rung in ladder.items()},
        "seconds_per_query": asked,
        "seconds": round(time.time() - started, 1),
    }


def find_ladder(stages: Stages, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of the paper's table 2 that were run: `metrics` and `intervals` of each.

    Where queries are not enriched there is no row with a generator.
    """
    rungs: dict[str, Any] = {}
    if "agcl" in wanted:
        found = read_json(stages.folder("agcl") / "metrics.json")
        whole = {when: {"metrics": found[when], "intervals": found["intervals"][when]} for when in ("before", "after")}
        rungs["untrained"], rungs["agcl"] = (plain(whole[when]) for when in ("before", "after"))
        rungs["agcl + distilled generator"] = enriched(whole["after"])
    if "rl_attributes" in wanted:
        rungs["agcl + RL generator"] = enriched(read_json(stages.file("rl_attributes").with_suffix(".json")))
    if "cit" in wanted:
        found = read_json(stages.folder("cit") / "metrics.json")
        own = {"metrics": found["after"], "intervals": found["intervals"]["after"]}
        rungs["CIT"] = enriched(own) or plain(own)
    return {name: rung for name, rung in rungs.items() if rung}


def plain(measured: dict[str, Any]) -> dict[str, Any]:
    """What queries without attributes find."""
    return {
        kind: {name: value for name, value in measured[kind].items() if not name.startswith(PREFIX)}
        for kind in ("metrics", "intervals")
    }


def enriched(measured: dict[str, Any]) -> dict[str, Any]:
    """What queries with attributes find, under the names of those without; what has no queries as it is.

    Empty where no query had any.
    """
    with_them = {
        kind: {name.removeprefix(PREFIX): value for name, value in measured[kind].items() if name.startswith(PREFIX)}
        for kind in ("metrics", "intervals")
    }
    if not with_them["metrics"]:
        return {}
    return {kind: values | with_them[kind] for kind, values in plain(measured).items()}


def read_json(path: Path) -> Any:
    """What a stage wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all: the file says that its stage is done."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
