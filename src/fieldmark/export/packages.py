"""The packages of the extra `export`, asked for before anything is computed."""

from __future__ import annotations

from importlib import import_module, metadata

from fieldmark.errors import FieldmarkError

NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}


def require(kind: str) -> None:
    """Imports what a kind of export needs (`onnx` or `openvino`; any other kind needs nothing).

    Raises:
        FieldmarkError: a package is missing; names it and the extra that brings it.
    """
    for name in NEEDED.get(kind, ()):
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise FieldmarkError(
                f'{error.name} is not installed; export to {kind} needs `pip install "fieldmark[export]"`.'
            ) from error


def versions(*names: str) -> dict[str, str]:
    """Package -> installed version."""
    return {name: metadata.version(name) for name in names}
