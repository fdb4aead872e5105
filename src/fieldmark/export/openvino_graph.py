"""OpenVINO's files, made of an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fieldmark.export.networks import EMBEDDING

# Without it OpenVINO computes in bfloat16 on processors that can.
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}


def write_openvino(source: Path, path: Path) -> None:
    """Writes `path` (.xml) and its weights (.bin), float32.

    Args:
        source: an ONNX file.
        path: file to write.
    """
    import openvino

    # read_model, not convert_model: it needs no more than the file, and reports to nobody.
    openvino.save_model(openvino.Core().read_model(str(source)), str(path), compress_to_fp16=False)


class OpenvinoRunner:
    """OpenVINO's files on the CPU, in float32.

    Args:
        path: the .xml file.
    """

    def __init__(self, path: Path) -> None:
        import openvino

        self.compiled = openvino.Core().compile_model(str(path), "CPU", PRECISION)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """[B, D] float32."""
        return np.array(self.compiled(dict(inputs))[EMBEDDING])
