"""The networks inside a vision tower, behind one interface: square pixels in, tokens and DeepStack features out.

- ``QwenEncoder``: the vision tower of Qwen2-VL, Qwen2.5-VL or Qwen3-VL with its merger and DeepStack mergers.
- ``PlainEncoder``: any Hugging Face vision model; its last hidden state without CLS and register tokens, or its
  feature map.
- ``Siglip2Encoder``: SigLIP 2 in its flexible-resolution form, which takes patches.

Parameters that cannot influence the tokens (a pooling head, DINO's mask token, CLIP's norm of the CLS token) are left
out where the model class allows it and frozen otherwise, so that every trainable parameter of a tower gets a
gradient.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from fieldmark.errors import FieldmarkError
from fieldmark.students.packed import PACKED, PatchProjection

# The one Qwen tower that transformers' own table of configurations and classes leaves out.
AutoModel.register(Qwen2VLVisionConfig, Qwen2VisionTransformerPretrainedModel, exist_ok=True)

UNUSED_PARAMETERS = {
    "clip_vision_model": ("post_layernorm.",),
    "metaclip_2_vision_model": ("post_layernorm.",),
    "dinov2": ("embeddings.mask_token",),
    "dinov2_with_registers": ("embeddings.mask_token",),
    "dinov3_vit": ("embeddings.mask_token",),
}


class Encoder(nn.Module):
    """Common part: a transformers model, a fixed square resolution, and the size of what comes out.

    Attributes:
        model: The transformers vision model.
        resolution: Side of the square photo, in pixels.
        token_dim: Width of a token.
        tokens_per_image: Tokens of one photo.
    """

    token_dim: int
    tokens_per_image: int

    def __init__(self, model: nn.Module, resolution: int) -> None:
        super().__init__()
        self.model = model
        self.resolution = resolution

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config  # type: ignore[return-value]

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """[B, 3, R, R] normalised pixels -> tokens [B, N, D] and DeepStack features, each [B, N, D] (often none)."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Encoder:
        """As usual, but batch-norm layers stay in eval mode: their statistics are frozen (their scale and shift train).

        Batches of hard, look-alike photos are no sample of the world, and a network that normalised by them in training
        and by running statistics in search would give other vectors in the two.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


class QwenEncoder(Encoder):
    """Vision tower of a Qwen-VL checkpoint at one square resolution; all images of a batch attend in one call.

    Tokens are post-merger: at 224 px 49 with patch 16 and merge 2 (Qwen3-VL), 64 with patch 14 (Qwen2-VL, Qwen2.5-VL).
    """

    position_ids: torch.Tensor
    interp_indices: torch.Tensor
    interp_weights: torch.Tensor
    window_index: torch.Tensor

    def __init__(self, model: nn.Module, resolution: int) -> None:
        super().__init__(model, resolution)
        config = self.config
        self.patch, self.merge = config.patch_size, config.spatial_merge_size
        if resolution <= 0 or resolution % (self.patch * self.merge):
            raise FieldmarkError(
                f"resolution {resolution} does not fit a tower with patches of {self.patch} px merged {self.merge} x "
                f"{self.merge}; give a multiple of {self.patch * self.merge}"
            )
        side = resolution // self.patch
        self.patches_per_image = side * side
        self.tokens_per_image = self.patches_per_image // self.merge**2
        # Qwen2-VL calls the merged width hidden_size; its successors have out_hidden_size.
        self.token_dim = getattr(config, "out_hidden_size", None) or config.hidden_size
        if isinstance(model.patch_embed.proj, nn.Conv3d):  # type: ignore[union-attr]
            model.patch_embed.proj = PatchProjection(model.patch_embed.proj)  # type: ignore[union-attr]
        grid = torch.tensor([[1, side, side]])
        self.register_buffer("position_ids", get_vision_position_ids(grid, self.merge), persistent=False)
        self._resample_positions(grid)
        self._divide_into_segments(grid)

    def _resample_positions(self, grid: torch.Tensor) -> None:
        """Where the patches of one image lie on Qwen3-VL's learned grid of positions."""
        model: Any = self.model
        self.learned_positions = getattr(self.config, "num_position_embeddings", None) is not None
        if not self.learned_positions:
            return
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=model.num_grid_per_side,
            mode=model.interpolation_mode,
            align_corners=model.interpolation_align_corners,
            spatial_merge_size=self.merge,
        )
        self.register_buffer("interp_indices", indices, persistent=False)
        self.register_buffer("interp_weights", weights, persistent=False)

    def _divide_into_segments(self, grid: torch.Tensor) -> None:
        """Tell each attention layer its windows: the whole image, or Qwen2.5-VL's windows where the config has them."""
        full_layers = getattr(self.config, "fullatt_block_indexes", None)
        order, windows = torch.arange(self.tokens_per_image), (self.patches_per_image,)
        if full_layers is not None:
            order, bounds = get_vision_window_index(grid, self.merge, self.config.window_size, self.patch)
            windows = tuple(bounds.diff().tolist())
        self.windowed = full_layers is not None
        self.register_buffer("window_index", order, persistent=False)
        for index, block in enumerate(self.model.blocks):  # type: ignore[arg-type]
            whole = full_layers is None or index in full_layers
            block.attn.segment_lengths = (self.patches_per_image,) if whole else windows

    def patchify(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, R, R] -> [B*n, 3*T*P*P], in the order and layout of the checkpoint's own image processor."""
        batch, channels = pixels.shape[:2]
        blocks = self.resolution // (self.patch * self.merge)
        split = pixels.reshape(batch, channels, *(blocks, self.merge, self.patch) * 2)
        # B, block row, block column, row, column, C, T, P, P
        patches = split.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        frames = self.config.temporal_patch_size
        return patches.expand(*(-1,) * 6, frames, -1, -1).reshape(batch * self.patches_per_image, -1)

    def _packing(self, batch: int) -> dict[str, torch.Tensor]:
        """Positions of the packed batch; one segment over everything, which ``packed_attention`` divides itself."""
        packing = {
            "position_ids": self.position_ids.repeat(batch, 1),
            # A product, not a list of numbers: the batch is a symbol where the network is exported.
            "cu_seqlens": torch.arange(2, dtype=torch.int32) * (batch * self.patches_per_image),
        }
        if self.learned_positions:
            packing["interp_indices"] = self.interp_indices.repeat(batch, 1)
            packing["interp_weights"] = self.interp_weights.repeat(batch, 1)
        if self.windowed:
            offsets = torch.arange(batch, device=self.window_index.device)[:, None] * self.tokens_per_image
            packing["window_index"] = (self.window_index + offsets).flatten()
            packing["cu_window_seqlens"] = packing["cu_seqlens"]
        return packing

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        batch, side = pixels.shape[0], self.resolution // self.patch
        grid = torch.tensor([[1, side, side]], device=pixels.device).expand(batch, 3)
        # With any other attention (set_attn_implementation) the model must divide the sequence itself.
        packing = self._packing(batch) if self.config._attn_implementation == PACKED else {}
        output = self.model(self.patchify(pixels), grid_thw=grid, **packing)
        deepstack = output.get("deepstack_features") or []
        shape = (batch, self.tokens_per_image, self.token_dim)
        return output.pooler_output.view(shape), [features.view(shape) for features in deepstack]


class PlainEncoder(Encoder):
    """Any Hugging Face vision model (ViT, DINOv2, DINOv3, SigLIP, CLIP, timm, ...): patch tokens or feature map."""

    def __init__(self, model: nn.Module, resolution: int) -> None:
        super().__init__(model, resolution)
        config = self.config
        patch = getattr(config, "patch_size", None)
        self.patch = patch if isinstance(patch, int) else None
        if resolution <= 0 or (self.patch and resolution % self.patch):
            raise FieldmarkError(
                f"resolution {resolution} does not fit a tower with patches of {self.patch or 1} px; "
                f"give a multiple of {self.patch or 1}"
            )
        accepted = inspect.signature(model.forward).parameters
        # Position tables are made for one image size; the models that need to be told resample them on request.
        self.options: dict[str, Any] = {}
        if "interpolate_pos_encoding" in accepted and getattr(config, "image_size", resolution) != resolution:
            self.options["interpolate_pos_encoding"] = True
        if "do_pooling" in accepted:
            self.options["do_pooling"] = False
        self._freeze_unused()
        # Convolutions are several times faster in this layout on a CPU, depth-wise ones above all.
        convolutional = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules())
        self.layout = torch.channels_last if convolutional else torch.contiguous_format
        self.tokens_per_image, self.token_dim = self._probe()

    def _freeze_unused(self) -> None:
        unused = UNUSED_PARAMETERS.get(type(self.config).model_type, ())
        for name, parameter in self.model.named_parameters():
            if name.startswith(unused):
                parameter.requires_grad_(False)

    @torch.no_grad()
    def _probe(self) -> tuple[int, int]:
        """Number and width of tokens, from one black photo."""
        parameter = next(self.model.parameters())
        self.eval()
        pixels = torch.zeros(1, 3, self.resolution, self.resolution, dtype=parameter.dtype, device=parameter.device)
        tokens, _ = self(pixels)
        return tokens.shape[1], tokens.shape[2]

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        pixels = pixels.contiguous(memory_format=self.layout)
        return self._patch_tokens(self.model(pixel_values=pixels, **self.options).last_hidden_state), []

    def _patch_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """[B, T, D] without the leading CLS and register tokens, or a feature map [B, C, h, w] as [B, h*w, C]."""
        if states.ndim == 4:
            return states.flatten(2).transpose(1, 2)
        if self.patch is None:
            # timm transformers say how many tokens lead; their configuration in transformers does not know.
            network = getattr(self.model, "timm_model", None)
            return states[:, getattr(network, "num_prefix_tokens", 0) :]
        patches = (self.resolution // self.patch) ** 2
        # Hierarchical transformers (Swin) merge patches and have no leading tokens.
        return states[:, max(states.shape[1] - patches, 0) :]


class Siglip2Encoder(PlainEncoder):
    """SigLIP 2 of flexible resolution: takes flattened patches (row, column, channel), their mask and the grid."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        patches, mask, shapes = flat_patches(pixels, self.config.patch_size)
        return self.model(patches, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state, []


def flat_patches(pixels: torch.Tensor, patch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, 3, R, R] -> what SigLIP 2 takes: patches [B, n, P*P*3], their mask [B, n], grids [B, 2]; n = (R / P)^2."""
    batch, side = pixels.shape[0], pixels.shape[-1] // patch
    split = pixels.reshape(batch, -1, *(side, patch) * 2)
    patches = split.permute(0, 2, 4, 3, 5, 1).reshape(batch, side * side, -1)
    mask = torch.ones(batch, side * side, dtype=torch.long, device=pixels.device)
    return patches, mask, torch.full((batch, 2), side, dtype=torch.long, device=pixels.device)


def is_qwen(config: PretrainedConfig) -> bool:
    """Whether a vision configuration is that of a Qwen-VL tower."""
    return type(config).model_type.startswith("qwen") and hasattr(config, "spatial_merge_size")


def model_class(config: PretrainedConfig) -> Any:
    """The transformers class of a vision configuration."""
    return MODEL_MAPPING[type(config)]


def model_options(config: PretrainedConfig) -> dict[str, Any]:
    """Constructor options that leave out what does not reach the tokens (pooling heads)."""
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    accepted = inspect.signature(model_class(config).__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}


def wrap(model: nn.Module, resolution: int) -> Encoder:
    """The encoder around a transformers vision model, in eval mode."""
    config: PretrainedConfig = model.config  # type: ignore[assignment]
    if is_qwen(config):
        return QwenEncoder(model, resolution).eval()
    kind = Siglip2Encoder if type(config).model_type == "siglip2_vision_model" else PlainEncoder
    return kind(model, resolution).eval()


def new_encoder(config: PretrainedConfig, resolution: int) -> Encoder:
    """An encoder of this configuration with initial weights, in float32.

    Raises:
        FieldmarkError: If the resolution does not fit, or the network needs timm and timm is not installed.
    """
    require_timm(config)
    attention = {"attn_implementation": PACKED} if is_qwen(config) else {}
    model = AutoModel.from_config(config, dtype=torch.float32, **attention, **model_options(config))
    return wrap(model, resolution)


def require_timm(config: PretrainedConfig) -> None:
    """Raise in one sentence if this is a timm network and timm is not there."""
    if type(config).model_type != "timm_wrapper":
        return
    try:
        import timm  # type: ignore[import-not-found,import-untyped]  # noqa: F401
    except ImportError as error:
        raise FieldmarkError(
            f"{config.architecture} is a timm network and timm is not installed; run `uv pip install timm`"  # type: ignore[attr-defined]
        ) from error
