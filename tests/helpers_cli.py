"""What the tests of the command line share."""

from __future__ import annotations

import pytest

from fieldmark import cli


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
