"""The vision tower of a student: photos in, tokens out, as the first module of a ``SentenceTransformer``.

A tower is taken out of any Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint (with its merger, and its DeepStack mergers
where it has them; the language model's tensors are not read), or is any Hugging Face vision model, or a timm network.
It sees square photos of one fixed resolution and yields the tokens that a teacher's language model would see (papers:
SAGA, arXiv 2606.15134, section 3.1; tokens are post-merger).

Normalisation is the checkpoint's own. The stock Qwen processors scale small photos up (Qwen3-VL's minimum area is 256
x 256 pixels, 64 tokens), so the pixels are prepared here: at 224 px a Qwen3-VL tower gives 7 x 7 = 49 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import InputModule
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from fieldmark.errors import FieldmarkError
from fieldmark.students.checkpoints import Checkpoint, ImageStatistics
from fieldmark.students.composed import PROJECTOR_PREFIX, TOWER_PREFIX, ComposedConfig
from fieldmark.students.encoders import Encoder, is_qwen, model_class, model_options, new_encoder, require_timm, wrap

QWEN_PREFIXES = ("model.visual.", "visual.")
DUAL_ENCODERS = ("clip", "siglip", "siglip2", "metaclip_2", "chinese_clip", "altclip")
CLASS_NAME = "fieldmark.students.tower.VisionTower"


class VisionTower(InputModule):
    """Photos -> tokens, at one square resolution. Build one with :meth:`from_pretrained`.

    Args:
        encoder: The network; ``encoder.model`` is the transformers model.
        image_mean: Three channel means, for pixels scaled to 0..1.
        image_std: Three channel standard deviations, likewise.
        projector_dim: Width to which a linear ``projector`` with initial weights maps the tokens (the token width of a
            composed teacher), or None for no projector.

    Attributes:
        token_dim: Width of a token, after the projector if there is one.
        tokens_per_image: Tokens of one photo.
        resolution: Side of the square photo in pixels.
        projector: The linear projector, or None.
        fast_decode: Whether large JPEGs are decoded at a fraction of their size (``load_square``); off unless it is
            set, and not saved.
    """

    config_keys = ["vision_config", "resolution", "image_mean", "image_std", "projector_dim"]  # noqa: RUF012

    def __init__(
        self,
        encoder: Encoder,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        projector_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.fast_decode = False
        self.projector = None if projector_dim is None else nn.Linear(encoder.token_dim, projector_dim)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        resolution: int | None = None,
        *,
        projector_dim: int | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> Self:
        """The tower of a published checkpoint, or of a student folder, in float32 and eval mode.

        Args:
            model_id: Folder or hub id of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL, CLIP or SigLIP checkpoint, of a vision model
                or of a timm network; of a composed teacher (tower and projector); or of a student (its own tower).
            resolution: Side of the square photo in pixels; None means 224, or the student's own.
            projector_dim: Width of a linear projector with initial weights, or None (a student or composed
                teacher keeps its own).
            image_mean: Channel means for pixels in 0..1; needed only if the checkpoint has no image processor.
            image_std: Channel standard deviations, likewise.

        Raises:
            FieldmarkError: If there is no such checkpoint, it has no vision tower, no safetensors or no image
                statistics, the hub cannot be reached, or the resolution does not fit.
        """
        checkpoint = Checkpoint(model_id)
        if is_student(checkpoint):
            return cls._from_settings(
                checkpoint.json("config.json") or {}, checkpoint.tensors(("",)), checkpoint.source, resolution
            )
        config = _vision_config(checkpoint)
        statistics = _statistics(checkpoint, image_mean, image_std)
        if is_composed(checkpoint):
            return cls._from_composed(checkpoint, config, statistics, 224 if resolution is None else resolution)
        encoder = _read_encoder(checkpoint, config, 224 if resolution is None else resolution)
        return cls(encoder, statistics.mean, statistics.std, projector_dim)

    @classmethod
    def _from_composed(
        cls, checkpoint: Checkpoint, config: PretrainedConfig, statistics: ImageStatistics, resolution: int
    ) -> Self:
        """Vision network and projector of a composed teacher."""
        encoder = new_encoder(config, resolution)
        _load_exactly(encoder.model, checkpoint.tensors((TOWER_PREFIX,)), checkpoint.source)
        projector = checkpoint.tensors((PROJECTOR_PREFIX,))
        tower = cls(encoder, statistics.mean, statistics.std, len(projector["bias"]))
        assert tower.projector is not None
        _load_exactly(tower.projector, projector, checkpoint.source)
        return tower

    @classmethod
    def _from_settings(
        cls, settings: dict[str, Any], weights: dict[str, torch.Tensor], source: str, resolution: int | None = None
    ) -> Self:
        """A saved tower from its ``config.json`` and its tensors."""
        vision_config = dict(settings["vision_config"])
        config = CONFIG_MAPPING[vision_config["model_type"]].from_dict(vision_config)
        encoder = new_encoder(config, settings["resolution"] if resolution is None else resolution)
        tower = cls(encoder, settings["image_mean"], settings["image_std"], settings["projector_dim"])
        _load_exactly(tower, weights, source)
        return tower

    def at_resolution(self, resolution: int) -> VisionTower:
        """A tower on the same weights (shared, not copied) for photos of another size.

        Raises:
            FieldmarkError: If the resolution does not fit the network.
        """
        tower = VisionTower(wrap(self.encoder.model, resolution), self.image_mean, self.image_std)
        tower.projector = self.projector
        tower.fast_decode = self.fast_decode
        return tower

    def __repr__(self) -> str:
        kind = type(self.encoder.config).model_type
        return f"VisionTower({kind}, {self.resolution} px, {self.tokens_per_image} tokens of {self.token_dim})"

    @property
    def modalities(self) -> list[Any]:
        """Only photos; a string is the path or uri of one."""
        return ["image"]

    @property
    def vision_config(self) -> dict[str, Any]:
        """The transformers configuration of the network, enough to build it again."""
        config = self.encoder.config
        values = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "dtype")}
        # Older checkpoints carry the model type of the whole there; the class knows its own.
        return values | {"model_type": type(config).model_type}

    @property
    def resolution(self) -> int:
        return self.encoder.resolution

    @property
    def projector_dim(self) -> int | None:
        return None if self.projector is None else self.projector.out_features

    @property
    def token_dim(self) -> int:
        return self.projector_dim or self.encoder.token_dim

    @property
    def tokens_per_image(self) -> int:
        return self.encoder.tokens_per_image

    def on_model_ready(self, model: BaseModel) -> None:
        """Let the owning model hand every input to this tower.

        sentence-transformers guesses the modality of a string from its ending and would refuse ``aviary://`` uris and
        photos with an unusual file name as text; here a string always means a photo. The model card's example is made
        of plain swatches for the same reason: its default is three sentences.
        """
        card: Any = model.model_card_data
        if card.usage_examples is None:
            card.usage_examples = [Image.new("RGB", (32, 32), name) for name in ("teal", "peru", "olive")]
        card.generate_widget_examples = False  # they would be texts
        model.preprocess = self.preprocess  # type: ignore[method-assign]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Photos as numbers.

        Args:
            inputs: Photos: paths, ``aviary://`` uris, encoded bytes, PIL images, uint8 arrays [h, w, 3], or any of
                these as ``{"image": photo}``. The whole photo is resized to the square, nothing is cropped.
            prompt: Ignored; photos take no prompt.
            **kwargs: Ignored; part of the sentence-transformers interface.

        Returns:
            ``pixel_values``, float32 [B, 3, R, R], normalised.

        Raises:
            FieldmarkError: If a photo cannot be read.
        """
        squares = np.stack([_square(photo, self.resolution, self.fast_decode) for photo in inputs])
        pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        mean, std = (
            torch.tensor(x, dtype=torch.float32)[:, None, None] * 255 for x in (self.image_mean, self.image_std)
        )
        return {"pixel_values": pixels.sub_(mean).div_(std)}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add the tokens of ``features["pixel_values"]`` [B, 3, R, R].

        Returns:
            The features with ``token_embeddings`` [B, N, D], ``attention_mask`` [B, N] (long, all ones) and
            ``deepstack`` (a list of [B, N, D], empty unless the network has DeepStack mergers).
        """
        weight = next(self.encoder.parameters())
        tokens, deepstack = self.encoder(features["pixel_values"].to(weight.device, weight.dtype))
        features["token_embeddings"] = tokens if self.projector is None else self.projector(tokens)
        features["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        features["deepstack"] = deepstack
        return features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write ``config.json`` and ``model.safetensors``, all that loading needs."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=True)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a saved tower; the interface that ``SentenceTransformer(path)`` uses.

        ``model_kwargs={"dtype": ...}`` gives the tower that dtype; without it, it has the dtype it was saved in.
        """
        where = {key: kwargs[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in kwargs}
        settings = cls.load_config(model_name_or_path, subfolder=subfolder, **where)
        weights = cls.load_torch_weights(model_name_or_path, subfolder=subfolder, **where)
        tower = cls._from_settings(settings, weights, model_name_or_path)
        options = kwargs.get("model_kwargs") or {}
        dtype = options.get("dtype") or options.get("torch_dtype")
        if dtype in (None, "auto"):
            dtype = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
        return tower.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def module_types(checkpoint: Checkpoint) -> list[str]:
    """Class paths of a sentence-transformers model's modules, in order; empty for any other checkpoint."""
    modules: Any = checkpoint.json("modules.json") or []
    return [module["type"] for module in modules]


def is_student(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a saved sentence-transformers model that starts with a ``VisionTower``."""
    return module_types(checkpoint)[:1] == [CLASS_NAME]


def is_composed(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a composed teacher (vision network, projector, small language model)."""
    return (checkpoint.json("config.json") or {}).get("model_type") == ComposedConfig.model_type


def _square(photo: Any, resolution: int, fast: bool) -> np.ndarray:
    """One photo as uint8 [R, R, 3]."""
    from fieldmark.data.photos import load_square

    if isinstance(photo, dict) and set(photo) == {"image"}:
        photo = photo["image"]
    if isinstance(photo, np.ndarray):
        photo = Image.fromarray(photo)
    if not isinstance(photo, (str, Path, bytes, Image.Image)):
        raise FieldmarkError(
            f"a photo of type {type(photo).__name__} was given; expected a path, uri, bytes or PIL image"
        )
    return np.asarray(load_square(photo, resolution, fast=fast))


def _vision_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of the checkpoint's vision part."""
    try:
        config = AutoConfig.from_pretrained(str(checkpoint.config_folder))
    except (ValueError, KeyError) as error:
        raise FieldmarkError(
            f"{checkpoint.source} is of a model type that transformers does not know; "
            "give a Qwen-VL checkpoint or a vision model"
        ) from error
    vision = getattr(config, "vision_config", None)
    if isinstance(vision, PretrainedConfig):
        if (
            is_qwen(vision)
            or is_composed(checkpoint)
            or (config.model_type in DUAL_ENCODERS and type(vision) in MODEL_MAPPING)
        ):
            return vision
        raise FieldmarkError(
            f"{checkpoint.source} is a {config.model_type} checkpoint, whose tower is not supported; give a Qwen2-VL, "
            "Qwen2.5-VL, Qwen3-VL, CLIP or SigLIP checkpoint, or a vision model such as ViT or DINO"
        )
    if type(config) in MODEL_MAPPING and model_class(config).main_input_name == "pixel_values":
        return config
    raise FieldmarkError(
        f"{checkpoint.source} is a text-only {config.model_type} checkpoint; expected one with a vision tower"
    )


def _statistics(checkpoint: Checkpoint, mean: Sequence[float] | None, std: Sequence[float] | None) -> ImageStatistics:
    """Mean and std as given, or the checkpoint's."""
    if mean is not None and std is not None:
        return ImageStatistics(tuple(mean), tuple(std))
    statistics = checkpoint.image_statistics()
    if statistics is None:
        raise FieldmarkError(
            f"{checkpoint.source} has no image processor with a mean and a standard deviation; "
            "pass image_mean and image_std"
        )
    return statistics


def _read_encoder(checkpoint: Checkpoint, config: PretrainedConfig, resolution: int) -> Encoder:
    """The encoder with the checkpoint's weights, in float32."""
    if is_qwen(config):
        encoder = new_encoder(config, resolution)
        _load_exactly(encoder.model, checkpoint.tensors(QWEN_PREFIXES), checkpoint.source)
        return encoder
    require_timm(config)
    checkpoint.shards()  # says in a sentence when there are no safetensors
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a text model's or classifier's unused weights are no news here
    try:
        model, report = model_class(config).from_pretrained(
            checkpoint.source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **model_options(config),
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        raise FieldmarkError(
            f"{checkpoint.source} lacks {len(missing)} weights of its vision model, first {missing[0]}"
        )
    return wrap(model, resolution)


def _load_exactly(module: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Load weights; neither a missing nor a surplus tensor is let pass."""
    expected = module.state_dict()
    wrong = sorted(set(expected) ^ set(weights))
    wrong += sorted(k for k in set(expected) & set(weights) if expected[k].shape != weights[k].shape)
    if wrong:
        raise FieldmarkError(
            f"{len(wrong)} weights of {source} do not fit the tower its config.json describes, first {wrong[0]}; "
            "download the checkpoint again"
        )
    module.load_state_dict(weights)
