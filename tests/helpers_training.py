"""What the tests of all methods share: what a run left behind, a run that is killed, a run in two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


def few(task: Any) -> Any:
    """The task with a measurement on eight photos; one with groups also has four of them and a few rows to train on."""
    test = task.test.select(range(8))
    if hasattr(task, "test_attributes"):
        return replace(task, test=test, test_attributes=task.test_attributes[:8])
    if not hasattr(task, "groups"):
        return replace(task, test=test)
    return replace(task, test=test, groups=task.groups[:4], train=task.train.select(range(0, len(task.train), 4)))


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """Tower and pooler as they were saved."""
    found = {}
    for path in sorted((out / "model").rglob("*.safetensors")):
        found |= {f"{path.parent.name}/{name}": value for name, value in load_file(path).items()}
    assert {name.partition("/")[0] for name in found} == {"model", "1_AttentionPooling"}
    return found


@contextmanager
def killed_at(trainer: type, step: int) -> Iterator[None]:
    """A run of that trainer inside the block must not outlive the step."""

    class Killed(Exception):
        pass

    whole = trainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return whole(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_step", dying)
        with pytest.raises(Killed):
            yield


def train_in_two_processes(method: str, settings: dict[str, Any]) -> None:
    """Trains with gloo under torchrun, on eight test photos."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = Path(__file__).with_name("two_processes.py")
    command = [*launcher, str(script), method, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
