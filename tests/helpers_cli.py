"""What the tests of the command line share."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from fieldmark import cli


def draw(seed: int) -> Image.Image:
    """A small photo like no other."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 4, 3)).astype(np.uint8)
    return Image.fromarray(cells).resize((50, 40), Image.Resampling.BICUBIC)


def table_rows(out: str) -> list[list[str]]:
    """The cells of every line of the tables in what a command printed."""
    lines = [line for line in out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A disk that is full: no file may grow above `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fails(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 2) -> str:
    """Runs a command that must end with `code`; returns its one sentence."""
    capsys.readouterr()
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("fieldmark: ")
    return lines[0]
