"""ONNX files: written by PyTorch's exporter, run by onnxruntime, quantised to 8 bits by onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from fieldmark.errors import FieldmarkError
from fieldmark.export.networks import BATCH, EMBEDDING, Side, one_grid

TAKEN = "embedding_of_positions"  # PyTorch may call a look-up in a table `embedding`, which is the output's name
Method = Literal["dynamic", "static"]


def write_onnx(side: Side, path: Path) -> None:
    """Writes one side of a student; weights of more than about 1.5 GB go to a second file beside it.

    The file holds neither source lines nor paths, only the graph.

    Raises:
        FieldmarkError: PyTorch cannot export this network for any batch (or length).
    """
    example = tuple(side.inputs.values())
    axes = {place: torch.export.Dim(name) for place, name in enumerate(side.axes)}
    with _quiet(), one_grid(side.network), torch.no_grad():
        try:
            exported = torch.export.export(
                side.network, example, dynamic_shapes=(tuple(axes for _ in example),), strict=False
            )
            program: Any = torch.onnx.export(exported, example, dynamo=True, verbose=False)
        except Exception as error:  # the exporter raises whatever the network's own code does to it
            reason = " ".join(str(error).split())[:160]
            raise FieldmarkError(
                f"PyTorch cannot export this student to ONNX ({type(error).__name__}: {reason}); "
                "give --to sentence-transformers."
            ) from error
        _tidy(program.model, side)
        program.save(str(path))


def _tidy(model: Any, side: Side) -> None:
    """Names for inputs, output, batch and length; no source lines of the machine that exported it."""
    import onnx_ir

    graph = model.graph
    for value, name in zip(graph.inputs, side.inputs, strict=True):
        value.name, value.shape = name, onnx_ir.Shape(side.shape(name))
        value.metadata_props.clear()
    (output,) = graph.outputs
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value is not output:
                value.shape = None  # told by the runtime; here they would name the batch by another symbol
                value.name = TAKEN if value.name == EMBEDDING else value.name
    if EMBEDDING in graph.initializers:
        constant = graph.initializers.pop(EMBEDDING)
        constant.name = TAKEN
        graph.register_initializer(constant)
    output.name, output.shape = EMBEDDING, onnx_ir.Shape([BATCH, *output.shape[1:]])
    graph.metadata_props.clear()
    model.metadata_props.clear()


class OnnxRunner:
    """An ONNX file in onnxruntime, on the CPU, with as many threads as PyTorch has.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """[B, D] float32."""
        return np.asarray(self.session.run([EMBEDDING], dict(inputs))[0])


def int8_method(path: Path) -> Method:
    """`static` for a network of convolutions, whose activations need a range found beforehand, `dynamic` for others."""
    import onnx

    kinds = [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]
    return "static" if kinds.count("Conv") > kinds.count("MatMul") + kinds.count("Gemm") else "dynamic"


def write_int8(source: Path, path: Path, method: Method, batches: Iterable[np.ndarray]) -> None:
    """Writes a file of 8-bit weights.

    Args:
        source: the float32 file of the photo side.
        path: file to write.
        method: `dynamic`: weights of matrix products are int8, activations are quantised as they come; `static`:
            convolutions too, and the range of the activations is that of `batches`.
        batches: pixels [B, 3, R, R] of photos to calibrate on; used by `static` only.

    Raises:
        FieldmarkError: onnxruntime cannot quantise this network, or what reading `batches` raises.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Calibration(quantization.CalibrationDataReader):
        pixels = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(self.pixels, None)
            return None if found is None else {"pixel_values": found}

    with TemporaryDirectory() as folder, _quiet():
        prepared, products = Path(folder) / "model.onnx", ["MatMul", "Gemm"]
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            if method == "dynamic":
                quantization.quantize_dynamic(prepared, path, op_types_to_quantize=products)
            else:
                quantization.quantize_static(
                    prepared, path, Calibration(), per_channel=True, op_types_to_quantize=["Conv", *products]
                )
        except FieldmarkError:
            raise
        except Exception as error:  # whatever a network that it does not know makes it raise
            reason = " ".join(str(error).split())[:160]
            raise FieldmarkError(
                f"onnxruntime cannot quantise this network ({type(error).__name__}: {reason}); leave --int8 out."
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters note on the log what they could not simplify; an error still ends the export."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
