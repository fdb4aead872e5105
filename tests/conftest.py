"""Fixtures of several test files."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# The suite runs on the CPU, where its equalities hold to the last bit and two processes need no second GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported; what tests start inherits it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Products of tiny models on one thread: more would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def loud_libraries() -> Iterator[None]:
    """Commands quieten the libraries for the whole process; afterwards they speak again."""
    yield
    transformers.utils.logging.set_verbosity_warning()
