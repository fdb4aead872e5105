"""Reading parts of a published checkpoint: its configuration, its image statistics and a chosen group of tensors.

A multimodal checkpoint holds billions of weights behind a vision tower of a few hundred million. Only the tower is
wanted here, so tensors are read one by one out of safetensors (which stores an index of offsets), and shards that
hold none of them are neither opened nor downloaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from fieldmark.errors import FieldmarkError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class ImageStatistics:
    """How pixels become numbers: ``(pixel - 255 * mean) / (255 * std)`` for pixels in 0..255, three channels each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Checkpoint:
    """A local folder or a hub model id, read file by file.

    Args:
        source: A folder with a ``config.json``, or a hub id such as ``Qwen/Qwen3-VL-2B-Instruct``.

    Raises:
        FieldmarkError: If the source is neither a folder with a ``config.json`` nor a reachable hub model.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        folder = Path(self.source).expanduser()
        self.folder: Path | None = folder if folder.is_dir() else None
        if self.folder is None and (folder.exists() or folder.is_absolute() or self.source.startswith((".", "~"))):
            raise FieldmarkError(
                f"{self.source} is not a model folder; expected a folder with a config.json or a hub id"
            )
        config = self.file("config.json")
        if config is None:
            raise FieldmarkError(f"{self.source} holds no config.json; expected the folder or hub id of a model")
        self.config_folder = config.parent

    def file(self, name: str) -> Path | None:
        """Local path of one file of the checkpoint (fetched if it lies on the hub), or None if there is none."""
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.source, name))
        except LocalEntryNotFoundError as error:
            if name == "config.json":
                raise FieldmarkError(
                    f"{self.source} is not a folder here and the hub cannot be reached; "
                    "give the folder of a downloaded model"
                ) from error
            return None
        except EntryNotFoundError:
            return None
        except GatedRepoError as error:
            raise FieldmarkError(
                f"{self.source} is gated on the hub; accept its terms and run `hf auth login`"
            ) from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise FieldmarkError(f"{self.source} is neither a model folder here nor a model on the hub") from error
        except HfHubHTTPError as error:
            raise FieldmarkError(f"{self.source} is not a folder here and the hub answered with an error") from error

    def json(self, name: str) -> dict[str, Any] | None:
        """One JSON file of the checkpoint, or None if there is no such file."""
        path = self.file(name)
        if path is None:
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise FieldmarkError(f"{path} is not valid JSON; expected a file of a Hugging Face checkpoint") from error

    def shards(self) -> dict[str, str] | None:
        """Tensor name -> shard file by the index, or None for a checkpoint in one file.

        Raises:
            FieldmarkError: If the checkpoint has no safetensors.
        """
        index = self.json(INDEX_FILE)
        if index is not None:
            return index["weight_map"]
        if self.file(SINGLE_FILE) is None:
            raise FieldmarkError(
                f"{self.source} holds no safetensors (looked for {SINGLE_FILE} and its index); "
                "convert it to safetensors first"
            )
        return None

    def tensors(self, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Tensors whose names start with one of ``prefixes``, the prefix removed; no other tensor is read.

        Raises:
            FieldmarkError: If there are no safetensors, or a needed shard is missing or broken.
        """
        shards = self.shards()
        files = [SINGLE_FILE] if shards is None else sorted({f for n, f in shards.items() if n.startswith(prefixes)})
        found: dict[str, torch.Tensor] = {}
        for name in files:
            path = self.file(name)
            if path is None:
                raise FieldmarkError(f"{self.source} lacks its shard {name}; download the checkpoint again")
            try:
                with safe_open(str(path), framework="pt") as handle:
                    names = handle.keys()
                    for key in names:
                        prefix = next((p for p in prefixes if key.startswith(p)), None)
                        if prefix is not None:
                            found[key.removeprefix(prefix)] = handle.get_tensor(key)
            except SafetensorError as error:
                raise FieldmarkError(
                    f"{path} is not a readable safetensors file; download the checkpoint again"
                ) from error
        return found

    def image_statistics(self) -> ImageStatistics | None:
        """Mean and standard deviation of the checkpoint's image processor, or None if it has none.

        Read from ``preprocessor_config.json``, from ``processor_config.json`` (newer checkpoints nest the image
        processor there) or from timm's ``pretrained_cfg``.
        """
        nested = (self.json("processor_config.json") or {}).get("image_processor")
        for settings in (self.json("preprocessor_config.json"), nested):
            if settings and (settings.get("do_normalize") is False or "image_mean" in settings):
                return fold_rescaling(settings)
        timm = (self.json("config.json") or {}).get("pretrained_cfg") or {}
        if "mean" in timm and "std" in timm:
            return ImageStatistics(tuple(timm["mean"]), tuple(timm["std"]))
        return None


def fold_rescaling(settings: dict[str, Any]) -> ImageStatistics:
    """Mean and std that do the processor's rescaling too: x*factor - offset, minus mean, over std."""
    plain = settings.get("do_normalize") is False
    mean, std = ([0.0] * 3, [1.0] * 3) if plain else (settings["image_mean"], settings["image_std"])
    rescales = settings.get("do_rescale", True)
    scale = 255 * settings.get("rescale_factor", 1 / 255) if rescales else 255.0
    offset = 1.0 if rescales and settings.get("rescale_offset") else 0.0
    return ImageStatistics(tuple((m + offset) / scale for m in mean), tuple(s / scale for s in std))
