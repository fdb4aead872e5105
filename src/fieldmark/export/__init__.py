"""Export: a student as ONNX, OpenVINO or a sentence-transformers folder, checked against itself, with a card."""

from __future__ import annotations
