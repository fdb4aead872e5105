"""The command line: what it prints, what it writes, and one sentence for every mistake."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from PIL import Image

from fieldmark import cli, machine, progress
from fieldmark.commands import arguments
from fieldmark.commands.train import how_to_resume
from fieldmark.errors import FieldmarkError
from fieldmark.methods import metric
from fieldmark.students.build import build_student, load_student
from helpers_cli import fails
from helpers_tiny import make_tiny_teacher

CLASSES, PHOTOS = 8, 4
METRIC = ["--resolution", "64", "--max_steps", "2", "--classes_per_batch", "4", "--items_per_class", "2"]


@pytest.fixture(autouse=True)
def _loud_libraries():
    """Commands quieten the libraries for the whole process."""
    yield
    transformers.utils.logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with photos of eight classes, a tiny teacher, an untrained student and a finished run."""
    root = tmp_path_factory.mktemp("house")
    rng = np.random.default_rng(0)
    for number in range(CLASSES):
        colour = rng.integers(0, 256, 3)
        (root / "photos" / f"class{number}").mkdir(parents=True)
        for photo in range(PHOTOS):
            pixels = colour + rng.integers(-90, 90, 3) + rng.integers(-20, 20, (40, 60, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(
                root / "photos" / f"class{number}" / f"{photo}.png"
            )
    make_tiny_teacher("qwen3_vl", root / "teacher")
    build_student(root / "teacher", resolution=64).save_pretrained(str(root / "student"), create_model_card=False)
    assert cli.main(train_arguments(root, "run")) == 0
    return root


def train_arguments(house: Path, out: str, *more: str) -> list[str]:
    where = ["--data", str(house / "photos"), "--student", str(house / "teacher"), "--out", str(house / out)]
    return ["train", "metric", *where, *METRIC, *more]


# -- names and help


def test_help_and_version_import_nothing_heavy():
    for argv, expected in (["--help"], "build-teacher"), (["train", "--help"], "saga"), (["--version"], "0.1"):
        code = (
            "import sys; from fieldmark.cli import main; code = main(sys.argv[1:]); "
            "print({'torch', 'transformers', 'datasets', 'numpy', 'jsonargparse', 'rich'} & set(sys.modules)); "
            "sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
        assert expected in done.stdout
        assert done.stdout.rstrip().endswith("set()")


def test_every_command_has_a_module_and_help(capsys):
    chosen = {"train": ["saga"], "label": ["align"]}
    for command in cli.COMMANDS:
        argv = [command, *chosen.get(command, []), "--help"]
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
        assert f"usage: fieldmark {' '.join(argv[:-1])}" in capsys.readouterr().out


def test_help_says_what_each_setting_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "saga", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--group_size GROUP_SIZE G, rollouts a pair." in text
    assert "--out OUT run folder." in text
    from fieldmark.methods.saga import SagaConfig

    assert set(arguments.field_help(SagaConfig)) == set(SagaConfig.__dataclass_fields__)


# -- mistakes: one sentence, exit code 2

USAGE = [
    ([], "No command was given; choose one of quickstart, inspect, train"),
    (["trian"], "did you mean train?"),
    (["--max_steps", "3"], "Unknown command '--max_steps'"),
    (["train"], "No method was given; choose one of metric, saga, maple, afmrl"),
    (["train", "sage"], "did you mean saga?"),
    (["train", "metric"], "--data, --out are missing"),
    (["train", "metric", "--data", "d"], "--out is missing"),
    (["train", "metric", "--data", "d", "--out", "o", "--max-steps", "3"], "did you mean --max_steps?"),
    (["train", "metric", "--data", "d", "--out", "o", "--max_step=3"], "did you mean --max_steps?"),
    (["train", "metric", "--data", "d", "--out", "o", "--max_steps", "many"], "'many'; expected an integer or null"),
    (["train", "metric", "--data", "d", "--out", "o", "--learning_rate", "x"], "'x'; expected a number"),
    (["train", "metric", "--data", "d", "--out", "o", "--pooling", "max"], "'max'; expected one of attention, mean"),
    (["train", "metric", "--data", "d", "--out", "o", "--resume"], "--resume was given without a value; expected true"),
    (["train", "metric", "--data", "d", "--out", "o", "extra"], "Unexpected argument 'extra'"),
    (["train", "metric", "--data", "d", "--out", "o", "--loss_options", "[1]"], "expected a mapping or null"),
    (["train", "metric", "--data", "d", "--out", "o", "--config", "nowhere.yaml"], "nowhere.yaml' does not exist"),
    (["evaluate"], "MODEL, --data are missing"),
    (["evaluate", "m"], "--data is missing"),
    (["evaluate", "m", "--data", "d", "--split", "all"], "'all'; expected one of train, val, test"),
    (["evaluate", "m", "--data", "d", "--batch_size", "0"], "--batch_size was given 0; expected 1 or more"),
    (["embed", "m", "--data", "d", "--out", "vectors.csv"], "expected a name that ends in .parquet or .npy."),
    (["compare"], "RUNS is missing"),
    (["compare", "nowhere"], "The run nowhere does not exist"),
    (["doctor", "--jsn"], "did you mean --json?"),
    (["build-teacher", "--data", "d", "--out", "o", "--tower_step", "3"], "did you mean --tower_steps?"),
    (["quickstart", "--sed", "3"], "did you mean --seed?"),
]


@pytest.mark.parametrize(("argv", "expected"), USAGE, ids=[" ".join(argv) or "nothing" for argv, _ in USAGE])
def test_usage_errors(capsys, argv, expected):
    assert expected in fails(capsys, argv)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_step: 3", "Unknown key 'max_step' in the config file; did you mean max_steps?"),
        ("zzz: 3", "Unknown key 'zzz' in the config file; see `fieldmark train metric --help`"),
        ("max_steps: abc", "--max_steps was given 'abc'; expected an integer or null"),
        ("- a", "is not YAML with one `key: value` a line"),
        ("a: [", "is not YAML with one `key: value` a line"),
    ],
)
def test_config_file_errors(capsys, tmp_path, text, expected):
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    assert expected in fails(capsys, ["train", "metric", "--data", "d", "--out", "o", "--config", str(file)])


def test_broken_inputs(capsys, monkeypatch, house, tmp_path):
    photos, student = str(house / "photos"), str(house / "student")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    bad = tmp_path / "bad"
    for name in "ab":
        (bad / name).mkdir(parents=True)
        for photo in range(2):
            (bad / name / f"{photo}.jpg").write_bytes(b"no photo")
    run = str(tmp_path / "run")
    monkeypatch.chdir(Path(__file__).parents[1])
    cases = [
        (["evaluate", str(tmp_path / "none"), "--data", photos], "none does not exist; give a run folder"),
        (["evaluate", "tests/none", "--data", photos], "The model tests/none does not exist"),
        (["evaluate", "none", "--data", photos], "The model none does not exist"),
        (["evaluate", str(tmp_path / "empty"), "--data", photos], "holds no config.json"),
        (["evaluate", str(house / "teacher"), "--data", photos], "is not a trained student"),
        (["evaluate", str(tmp_path / "unfinished"), "--data", photos], "its training has not ended"),
        (["evaluate", student, "--data", str(tmp_path / "none")], "does not exist"),
        (["evaluate", student, "--data", "birds:x"], "unknown prefix 'birds'"),
        (["evaluate", student, "--data", photos, "--split", "val"], "no row of split 'val'"),
        (["evaluate", student, "--data", str(bad)], "it is not an image"),
        (
            ["embed", student, "--data", photos, "--out", str(house / "run" / "config.yaml" / "v.parquet")],
            "not lie in a",
        ),
        (["train", "metric", "--data", photos, "--out", run], "No student was given"),
        (["train", "saga", "--data", photos, "--out", run], "SAGA needs a teacher"),
        (["train", "saga", "--data", photos, "--out", run, "--teacher", str(tmp_path / "empty")], "empty"),
        (train_arguments(house, "other", "--loss", "triplet"), "Unknown metric loss 'triplet'"),
        (["compare", str(tmp_path / "empty")], "is not a run: it has no config.yaml"),
    ]
    for argv, expected in cases:
        assert expected in fails(capsys, argv), argv
    assert not Path(run).exists()


def test_paths_that_the_system_refuses_are_one_sentence(capsys, house, tmp_path):
    photos, student, long = str(house / "photos"), str(house / "student"), "x" * 300
    cases = [
        (train_arguments(house, "/proc/x"), "/proc/x cannot be read or written: no such file or directory."),
        (["embed", student, "--data", photos, "--out", "/proc/v.parquet"], "/proc/v.parquet"),
        (["embed", student, "--data", photos, "--out", "/sys/v.parquet"], "/sys/v.parquet"),
        (["evaluate", student, "--data", long], "cannot be read or written: file name too long."),
        (["evaluate", long, "--data", photos], "cannot be read or written: file name too long."),
    ]
    for argv, expected in cases:
        sentence = fails(capsys, argv)
        assert expected in sentence
        assert "None" not in sentence


@pytest.mark.parametrize("how", ["cut", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "config_sentence_transformers.json"])
@pytest.mark.parametrize("part", [".", "1_AttentionPooling"])
def test_a_broken_student_is_one_sentence(capsys, house, tmp_path, part, name, how):
    broken = tmp_path / "broken"
    shutil.copytree(house / "student", broken)
    file = broken / part / name
    if not file.exists() or (how == "gone" and part == "." and name.startswith("config")):
        pytest.skip("there is no such file, or it is not needed")
    content = file.read_bytes()
    file.unlink()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    assert "missing or broken file" in fails(capsys, ["evaluate", str(broken), "--data", str(house / "photos")])


WRONG_OPTIONS = [
    ("proxy_anchor", '{"alpha": "x"}'),
    ("potential_field", '{"alpha": "x"}'),
    ("potential_field", '{"delta": "x"}'),
    ("multi_similarity", '{"beta": null}'),
    ("multi_similarity", '{"base": "x"}'),
    ("info_nce", '{"temperature": "x"}'),
    ("info_nce", '{"distance": "cosine"}'),
]


@pytest.mark.parametrize(("loss", "options"), WRONG_OPTIONS, ids=[f"{a} {b}" for a, b in WRONG_OPTIONS])
def test_loss_options_of_the_wrong_type_are_refused_before_anything_is_written(capsys, house, tmp_path, loss, options):
    out = tmp_path / "run"
    sentence = fails(capsys, train_arguments(house, str(out), "--loss", loss, "--loss_options", options))
    assert f"{loss} cannot compute with the loss_options" in sentence
    assert not out.exists()


def test_photos_that_cannot_be_measured_are_refused_before_anything_is_written(capsys, house, tmp_path):
    photos = sorted((house / "photos").rglob("*.png"))
    train = [f"{path},{path.parent.name},train,both\n" for path in photos[: len(photos) // 2]]
    cases = {
        "one photo a class": [f"{path},{path.parent.name},test,both\n" for path in photos[len(photos) // 2 :: PHOTOS]],
        "queries alone": [f"{path},{path.parent.name},test,query\n" for path in photos[len(photos) // 2 :]],
        "no label": [f"{path},,test,both\n" for path in photos[len(photos) // 2 :]],
    }
    for name, rows in cases.items():
        table = tmp_path / "photos.csv"
        table.write_text("image,label,split,role\n" + "".join(train + rows), encoding="utf-8")
        sentence = fails(capsys, [*train_arguments(house, "unmeasured"), "--data", str(table)])
        assert ("test photos without a label" if name == "no label" else "another one of its class") in sentence
        assert not (house / "unmeasured").exists()
    one = photos[-1]
    both = [f"{one},a,test,query\n", f"{one.with_name('0.png')},a,test,gallery\n"]
    table.write_text("image,label,split,role\n" + "".join(train + both), encoding="utf-8")
    config = metric.MetricConfig(data=str(table), out="unused")
    assert len(metric.open_task(config).test) == 2, "a query and its answer are enough"


def test_a_mistake_in_a_worker_process_is_one_sentence():
    trace = (
        "Caught FieldmarkError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in <module>\nfieldmark.errors.FieldmarkError: cannot read the photo a.jpg: truncated\n'
    )
    assert cli.one_sentence(FieldmarkError(trace)) == "cannot read the photo a.jpg: truncated"
    assert cli.one_sentence(FieldmarkError("two\n lines")) == "two lines"


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(metric, "train", lambda config: {}["a bug"])
    with pytest.raises(KeyError):
        cli.main(["train", "metric", "--data", "d", "--out", "o"])


# -- train


def test_train_writes_the_run_folder_and_says_where(capsys, house):
    assert cli.main(train_arguments(house, "shown", "--pooling", "mean", "--seed", "3")) == 0
    out, err = capsys.readouterr()
    run = house / "shown"
    assert str(run) in out
    for word in ("before", "after", "recall@1", "map@r", "nmi", "metric, seed 3"):
        assert word in out
    assert "Traceback" not in err
    assert "Warning" not in err
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "log.jsonl", "metrics.json", "model", "checkpoints"}
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert (settings["pooling"], settings["seed"], settings["max_steps"]) == ("mean", 3, 2)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in log] == [1, 2]
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["method"] == "metric"
    assert metrics["after"]["n_queries"] == metrics["before"]["n_queries"] == CLASSES // 2 * PHOTOS
    assert load_student(run / "model").encode([str(next((house / "photos").rglob("*.png")))]).shape == (1, 32)


def test_a_runs_own_config_repeats_it_bit_by_bit_in_a_new_process(house):
    again = ["train", "metric", "--config", str(house / "run" / "config.yaml"), "--out", str(house / "again")]
    done = subprocess.run([sys.executable, "-m", "fieldmark", *again], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (
        [json.loads(line)["loss"] for line in (house / run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for run in ("run", "again")
    )
    assert first == second
    weights = sorted(path.relative_to(house / "run") for path in (house / "run" / "model").rglob("*.safetensors"))
    assert len(weights) == 2
    assert all((house / "run" / path).read_bytes() == (house / "again" / path).read_bytes() for path in weights)
    metrics = [json.loads((house / run / "metrics.json").read_text(encoding="utf-8")) for run in ("run", "again")]
    assert metrics[0]["after"] == metrics[1]["after"]


def test_flags_win_over_the_config_file(monkeypatch, tmp_path):
    seen = []

    def train(config):
        seen.append(config)
        raise FieldmarkError("enough")

    monkeypatch.setattr(metric, "train", train)
    file = tmp_path / "settings.yaml"
    file.write_text("data: photos\nlearning_rate: 1e-4\nloss_options: {temperature: 0.05}\nseed: 1\n", encoding="utf-8")
    argv = ["train", "metric", "--config", str(file), "--out", "o", "--seed", "7", "--resume", "true"]
    assert cli.main(argv) == 2
    assert (seen[0].data, seen[0].learning_rate, seen[0].seed) == ("photos", 1e-4, 7)
    assert seen[0].loss_options == {"temperature": 0.05}
    assert seen[0].resume is True
    assert isinstance(seen[0], metric.MetricConfig)


def test_a_used_folder_is_refused_and_resume_goes_on(capsys, house):
    for more in (), ("--resume", "true"), ("--resume", "true", "--seed", "9"):
        assert "holds a finished run; give a new folder" in fails(capsys, train_arguments(house, "run", *more))
    unfinished = house / "unfinished"
    shutil.copytree(house / "run", unfinished)
    (unfinished / "metrics.json").unlink()
    assert "--resume true" in fails(capsys, train_arguments(house, "unfinished"))
    before = (unfinished / "config.yaml").read_text(encoding="utf-8")
    other = ["--resume", "true", "--seed", "9", "--loss_options", "{alpha: 16}"]
    sentence = fails(capsys, train_arguments(house, "unfinished", *other))
    assert "(seed was 0, is 9, loss_options was None, is {'alpha': 16})" in sentence
    assert (unfinished / "config.yaml").read_text(encoding="utf-8") == before
    settings = yaml.safe_load(before)
    del settings["warmup"]  # as a version before this setting would have written it
    (unfinished / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    faster = ["--workers", "1", "--eval_batch_size", "7", "--save_steps", "1"]
    assert cli.main(train_arguments(house, "unfinished", "--resume", "true", *faster)) == 0
    (unfinished / "metrics.json").unlink()
    (unfinished / "config.yaml").write_text("{", encoding="utf-8")
    assert "does not hold the settings of a run" in fails(
        capsys, train_arguments(house, "unfinished", "--resume", "true")
    )
    (house / "file").write_text("", encoding="utf-8")
    assert "is a file" in fails(capsys, train_arguments(house, "file"))


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(metric, "train", interrupted)
    sentence = fails(capsys, ["train", "metric", "--data", "d", "--out", str(tmp_path)], code=130)
    assert "Interrupted before the run began" in sentence
    (tmp_path / "config.yaml").touch()
    assert "--save_steps N" in how_to_resume(tmp_path)
    (tmp_path / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    assert "--save_steps N" in how_to_resume(tmp_path), "a checkpoint that is not complete is none"
    (tmp_path / "checkpoints" / "checkpoint-4" / "complete").touch()
    assert "--resume true goes on from the last checkpoint" in how_to_resume(tmp_path)


def test_ctrl_c_in_quickstart_says_what_is_true(capsys, monkeypatch, tmp_path):
    argv = ["quickstart", "--out", str(tmp_path / "quick")]

    def interrupted(config):
        raise KeyboardInterrupt

    def interrupted_later(config):
        Path(config.out).mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(metric, "train", interrupted)
    assert "before anything was written; run the same command again" in fails(capsys, argv, code=130)
    monkeypatch.setattr(metric, "train", interrupted_later)
    sentence = fails(capsys, argv, code=130)
    assert f"remove {tmp_path / 'quick'} or give another --out" in sentence
    assert "same command" not in sentence


# -- evaluate, embed


def test_evaluate_prints_one_json_object_or_a_table(capsys, house):
    data = ["--data", str(house / "photos")]
    capsys.readouterr()
    assert cli.main(["evaluate", str(house / "run"), *data, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert 0 < found["map@r"] < 1, "photos too easy or too hard to tell anything"
    assert [line.partition("  ")[0] for line in err.splitlines()] == ["measuring"], "progress and nothing else"
    after = json.loads((house / "run" / "metrics.json").read_text(encoding="utf-8"))["after"]
    assert {key: found[key] for key in after} == pytest.approx(after, abs=1e-6)
    assert found["split"] == "test"

    assert cli.main(["evaluate", str(house / "run" / "model"), *data, "--split", "train", "--batch_size", "3"]) == 0
    table = capsys.readouterr().out
    assert "recall@1" in table
    assert "│ n_queries " in table
    assert "16" in table


def test_embed_writes_the_students_vectors(capsys, house, tmp_path):
    out = tmp_path / "new" / "vectors.parquet"
    argv = ["embed", str(house / "student"), "--data", str(house / "photos"), "--out", str(out), "--batch_size", "2"]
    assert cli.main(argv) == 0
    assert str(out) in capsys.readouterr().out
    table = pq.read_table(out)
    assert table.column_names == ["item_id", "label", "split", "role", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert table["item_id"].to_pylist() == [f"class{c}/{p}.png" for c in range(CLASSES) for p in range(PHOTOS)]
    assert table["split"].to_pylist() == ["train"] * 16 + ["test"] * 16
    assert set(table["role"].to_pylist()) == {"both"}
    paths = [str(house / "photos" / name) for name in table["item_id"].to_pylist()]
    with torch.inference_mode():
        expected = load_student(house / "student").encode(paths, batch_size=32)
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy(zero_copy_only=False)), expected, atol=1e-5)
    assert [path.name for path in out.parent.iterdir()] == [out.name]

    assert "exists; give another name" in fails(capsys, argv)
    part = tmp_path / "test.parquet"
    assert cli.main([*argv[:4], "--out", str(part), "--split", "test"]) == 0
    assert pq.read_table(part).num_rows == 16


def test_embed_leaves_no_half_file_behind(capsys, monkeypatch, house, tmp_path):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", math.inf)
    table = tmp_path / "photos.csv"
    good = next((house / "photos").rglob("*.png"))
    table.write_text(
        "item_id,image,label\n" + "".join(f"{i},{good},a\n" for i in range(8)) + "9,missing.png,b\n", encoding="utf-8"
    )
    out = tmp_path / "out" / "vectors.parquet"
    argv = ["embed", str(house / "student"), "--data", str(table), "--out", str(out), "--batch_size", "1"]
    assert "missing.png: no such file" in fails(capsys, argv)
    assert list(out.parent.iterdir()) == []


# -- compare


def write_run(folder: Path, seed: int, recall: float, method: str = "metric", **settings) -> str:
    folder.mkdir()
    shared = {"data": "aviary", "out": str(folder), "student": "s", "pooling": "mean", "loss": "proxy_anchor"}
    shared |= {"max_steps": 50, "epochs": 3.0, "seed": seed, "learning_rate": 1e-4, "workers": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(shared | settings), encoding="utf-8")
    before = {"recall@1": 0.2, "recall@4": 0.4, "map@r": 0.1, "nmi": 0.5}
    after = {**before, "recall@1": recall}
    metrics = {"method": method, "seed": seed, "before": before, "after": after}
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return str(folder)


def test_compare_groups_runs_by_all_but_their_seed(capsys, tmp_path):
    recalls = [0.5, 0.6, 0.8]
    runs = [write_run(tmp_path / f"m{seed}", seed, recall) for seed, recall in enumerate(recalls)]
    runs.append(write_run(tmp_path / "long", 0, 0.9, max_steps=200))
    runs.append(write_run(tmp_path / "fast", 0, 0.7, learning_rate=1e-3))
    runs.append(write_run(tmp_path / "saga", 0, 0.95, method="saga", lambda_lm=1.0, max_steps=None))
    assert cli.main(["compare", *runs, "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [group["seeds"] for group in groups] == [[0, 1, 2], [0], [0], [0]]
    first, long, fast, saga = groups
    assert first["after"]["recall@1"] == pytest.approx({"mean": statistics.mean(recalls), "std": math.sqrt(7 / 300)})
    assert first["before"]["recall@1"] == pytest.approx({"mean": 0.2, "std": 0.0})
    assert long["after"]["recall@1"] == {"mean": 0.9, "std": None}
    assert (long["max_steps"], saga["max_steps"], saga["epochs"]) == (200, None, 3.0)
    assert fast["differs"] == {"learning_rate": 1e-3}
    assert saga["differs"] == {}

    assert cli.main(["compare", *runs]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "0.633 ± 0.153" in table
    for words in ("│ metric proxy_anchor, mean │ before", "│ saga", "│ 50 steps, 3 seeds │", "│ 3 epochs, 1 seed │"):
        assert words in table
    assert "learning_rate 0.001" in table


def test_compare_reads_what_train_writes(capsys, house):
    capsys.readouterr()
    assert cli.main(["compare", str(house / "run"), "--json"]) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    after = json.loads((house / "run" / "metrics.json").read_text(encoding="utf-8"))["after"]
    assert group["after"]["nmi"]["mean"] == after["nmi"]


def test_compare_refuses_what_would_mislead(capsys, tmp_path):
    run = write_run(tmp_path / "run", 0, 0.5)
    assert "was given twice" in fails(capsys, ["compare", run, f"{run}/../run"])
    (tmp_path / "run" / "metrics.json").write_text("{}", encoding="utf-8")
    assert "train that run again" in fails(capsys, ["compare", run])
    (tmp_path / "run" / "metrics.json").unlink()
    assert "has not ended" in fails(capsys, ["compare", run])


# -- doctor


def test_doctor_tells_of_this_machine(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["devices"][0]["kind"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert 0 < found["memory_gib"] < 100_000
    assert found["can_run"]["quickstart"] == (found["memory_gib"] >= 6)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in (torch.__version__.partition("+")[0], "cores", "memory", "quickstart"):
        assert word in text


def test_doctor_finds_what_is_misconfigured():
    cpu = [machine.Device("cpu", "x", 4.0, "emulated")]
    card = machine.Device("cuda:0", "card", 80.0, "native")
    assert machine.machine_problems(8, 8, 32.0, [*cpu, card], 1.0) == []
    assert "OMP_NUM_THREADS=2" in machine.machine_problems(2, 64, 32.0, [*cpu, card], 1.0)[0]
    assert "memory" in machine.machine_problems(2, 2, 4.0, [*cpu, card], 1.0)[0]
    assert "--workers 0" in machine.machine_problems(2, 2, 32.0, [*cpu, card], 0.06)[0]
    assert machine.package_problems(["torch>=2", 'nowhere>1; extra == "x"']) == []
    old, missing = machine.package_problems(["torch>=99", "nowhere-to-be-found>=1"])
    assert ">=99" in old
    assert "not installed" in missing
    assert machine.what_can_run(16.0, [*cpu, card]) == {
        "quickstart": True,
        "device": "cuda:0",
        "precision": "bf16",
        "teacher_billions": 21.5,
        "teachers": [name for name, size in machine.PUBLISHED_TEACHERS if size < 21],
    }
    assert machine.what_can_run(2.0, cpu)["teachers"] == []
    assert machine.what_can_run(4.0, cpu)["precision"] == "fp32"


def test_cores_and_memory_obey_the_container(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    free = machine.usable_cores(), machine.usable_memory_gib()
    (tmp_path / "cpu.max").write_text("max 100000\n", encoding="utf-8")
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert (machine.usable_cores(), machine.usable_memory_gib()) == free
    (tmp_path / "cpu.max").write_text("100000 100000\n", encoding="utf-8")
    (tmp_path / "memory.max").write_text(f"{2**29}\n", encoding="utf-8")
    assert (machine.usable_cores(), machine.usable_memory_gib()) == (1, 0.5)


# -- documentation


def documented(fence: str) -> list[tuple[str, str]]:
    """Code blocks of the documentation, as (file, text)."""
    root = Path(__file__).parents[1]
    files = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]
    return [
        (file.name, block)
        for file in files
        for block in re.findall(rf"^```{fence}\n(.*?)^```$", file.read_text(encoding="utf-8"), re.M | re.S)
    ]


def test_documented_commands_parse(capsys, monkeypatch):
    class Parsed(Exception):
        pass

    class OnlyParses(arguments.ArgumentParser):
        def parse_args(self, *args, **kwargs):
            raise Parsed(super().parse_args(*args, **kwargs))

    monkeypatch.setattr(arguments, "ArgumentParser", OnlyParses)
    lines = [
        (file, match[1].replace("\\\n", " "))
        for file, block in documented("(?:bash|sh)?")
        for match in re.finditer(r"^(?:.*&& )?(?:uv run )?fieldmark ((?:.*\\\n)*.*)$", block, re.M)
    ]
    assert len([file for file, _ in lines if file == "README.md"]) >= 8
    for file, line in lines:
        try:
            assert cli.main(shlex.split(line, comments=True)) == 0, (file, line, capsys.readouterr().err)
        except Parsed:
            continue


def test_documented_python_runs(house, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(house / "run")
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = [(file, block) for file, block in documented("python") if file != "rar.md"]  # test_methods_rar runs that
    assert blocks
    for _, block in blocks:
        names: dict = {}
        exec(block, names)
        assert names["vectors"].shape == (1, 32)


def test_documented_test_command_is_what_the_integration_runs():
    root = Path(__file__).parents[1]
    commands = {line for file, block in documented("") if file == "README.md" for line in block.splitlines()}
    command = "uv run pytest -n 2 --dist loadfile"
    assert command in commands
    assert command in (root / ".ci" / "run").read_text(encoding="utf-8").splitlines()
