"""The architecture of the embedded model: a LLaVA whose projector is a visual embedding table, in the manner of Ovis.

Image token j = softmax(classifier(picture)) @ T[:, j], where T[c, j] is the language model's own embedding of the j-th
token of class c's name: the picture arrives as words the language model knows, without any training. `extra` holds as
many trained tokens for what class names cannot say (a comma each until they are trained).
"""

from typing import Any

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

WORDS = 4
"""Name tokens kept per class; as many extra tokens follow."""
IMAGE_TOKENS = 2 * WORDS
CLASSES = 1000
FEATURES = 1280


class LiteVisionConfig(PretrainedConfig):  # type: ignore[misc]
    """EfficientNet-Lite0 as a vision tower."""

    model_type = "mllm_srec_lite_vision"

    def __init__(
        self,
        variant: str = "efficientnet-lite0",
        hidden_size: int = FEATURES,
        image_size: int = 224,
        patch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.variant, self.hidden_size, self.image_size, self.patch_size = variant, hidden_size, image_size, patch_size


class LiteVisionModel(PreTrainedModel):  # type: ignore[misc]
    """The network behind the tower's interface."""

    config_class = LiteVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: LiteVisionConfig) -> None:
        super().__init__(config)
        self.net = EfficientNet.from_name(config.variant)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """(B, 3, 224, 224), scaled as (x - 127) / 128, -> features (B, 49, 1280)."""
        grid = self.net.extract_features(pixel_values.to(self.dtype)).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=grid, pooler_output=grid.mean(1), hidden_states=(grid,))


class VisualTable(nn.Module):
    """Features (B, 49, 1280) -> (B, 2 * WORDS, D) tokens in the language model's embedding space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(CLASSES, WORDS, width))
        self.head = nn.Linear(FEATURES, CLASSES)
        self.extra = nn.Sequential(
            nn.LayerNorm(FEATURES), nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, WORDS * width)
        )

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Project a grid of features."""
        pooled = grid.mean(1)
        named = torch.einsum("bc,cjd->bjd", self.head(pooled).softmax(-1), self.table)
        return torch.cat([named, self.extra(pooled).unflatten(1, (WORDS, -1))], 1)


class VisualTableConfig(LlavaConfig):  # type: ignore[misc]
    """A type of its own, so that no other code loads the weights as a plain LLaVA with a fresh projector."""

    model_type = "mllm_srec_visual_table"


class VisualTableModel(LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA with the visual table in the projector's place."""

    config_class = VisualTableConfig

    def __init__(self, config: VisualTableConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = VisualTable(config.text_config.hidden_size)
        self.post_init()


def register() -> None:
    """Make the types known to transformers' Auto classes; again and again is fine."""
    AutoConfig.register(LiteVisionConfig.model_type, LiteVisionConfig, exist_ok=True)
    AutoModel.register(LiteVisionConfig, LiteVisionModel, exist_ok=True)
    AutoConfig.register(VisualTableConfig.model_type, VisualTableConfig, exist_ok=True)
    AutoModelForImageTextToText.register(VisualTableConfig, VisualTableModel, exist_ok=True)
