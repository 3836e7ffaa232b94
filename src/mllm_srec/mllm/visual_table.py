"""The architecture of the embedded model: a LLaVA whose projector is a visual embedding table, in the manner of Ovis.

A picture arrives as words that the language model knows: a classifier's shares of its classes mix the language model's
own embeddings of the classes' names. Four classifiers speak so: the 1,000 kinds of ImageNet, which came with the vision
tower, and three trained ones for goods, colours and patterns. Until they are trained their tokens are commas.
"""

from typing import Any

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torch.nn import functional
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
"""Name tokens kept per kind."""
IMAGE_TOKENS = 2 * WORDS + 2
"""Per picture: a kind of ImageNet, a kind of goods, a colour, a pattern."""
CLASSES = 1000
CELLS = 7
FEATURES = 1280
LOW_FEATURES = 3 + 3 + 24 + 24 + 40 + 112
"""Per cell: mean and variance of red, green and blue and of block 2, means of blocks 4 and 10."""
GOODS_HIDDEN, LOOKS_HIDDEN = 512, 128


class LiteVisionConfig(PretrainedConfig):  # type: ignore[misc]
    """EfficientNet-Lite0 as a vision tower."""

    model_type = "mllm_srec_lite_vision"

    def __init__(
        self,
        variant: str = "efficientnet-lite0",
        hidden_size: int = FEATURES + LOW_FEATURES,
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
        """(B, 3, 224, 224), scaled as (x - 127) / 128, -> features of 7 x 7 cells (B, 49, FEATURES + LOW_FEATURES)."""
        # Convolutions of this kind run twice as fast with channels last.
        pixels = pixel_values.to(self.dtype).contiguous(memory_format=torch.channels_last)
        low = [*_mean_and_variance(pixels)]
        state = self.net._swish(self.net._bn0(self.net._conv_stem(pixels)))
        for number, block in enumerate(self.net._blocks):
            state = block(state)
            if number == 2:
                low += _mean_and_variance(state)
            elif number in (4, 10):
                low.append(_cells(state))
        state = self.net._swish(self.net._bn1(self.net._conv_head(state)))
        grid = torch.cat([state, *(part.to(state.dtype) for part in low)], 1).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=grid, pooler_output=grid.mean(1), hidden_states=(grid,))


def _cells(state: torch.Tensor) -> torch.Tensor:
    return functional.adaptive_avg_pool2d(state, CELLS)


def _mean_and_variance(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    state = state.float()
    mean = _cells(state)
    return mean, _cells(state * state) - mean * mean


class Standardised(nn.Module):
    """(x - mean) / deviation with what training measured."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean, self.deviation = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.ones(width))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(..., width) -> the same."""
        return (values - self.mean) / self.deviation


class VisualTable(nn.Module):
    """Features (B, 49, FEATURES + LOW_FEATURES) -> (B, IMAGE_TOKENS, D) tokens in the language model's space."""

    def __init__(self, width: int, goods: int, colours: int, patterns: int) -> None:
        """`goods` counts a last class for none of them."""
        super().__init__()
        self.sizes = [1, colours, patterns]
        self.table = nn.Parameter(torch.zeros(CLASSES, WORDS, width))
        self.head = nn.Linear(FEATURES, CLASSES)
        self.goods_table = nn.Parameter(torch.zeros(goods, WORDS, width))
        self.goods = nn.Sequential(
            Standardised(FEATURES), nn.Linear(FEATURES, GOODS_HIDDEN), nn.GELU(), nn.Linear(GOODS_HIDDEN, goods)
        )
        self.colour_table = nn.Parameter(torch.zeros(colours, width))
        self.pattern_table = nn.Parameter(torch.zeros(patterns, width))
        self.cells = Standardised(LOW_FEATURES)
        self.looks = nn.Sequential(
            nn.Linear(2 * LOW_FEATURES, LOOKS_HIDDEN), nn.GELU(), nn.Linear(LOOKS_HIDDEN, sum(self.sizes))
        )
        self.place = nn.Parameter(torch.zeros(CELLS * CELLS))

    @property
    def edge(self) -> torch.Tensor:
        """(49,): equal shares of the cells on the picture's edge."""
        share = torch.ones(CELLS, CELLS, device=self.place.device)
        share[1:-1, 1:-1] = 0
        return (share / share.sum()).flatten()

    def classify(self, pooled: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of goods (B, G), colours (B, C) and patterns (B, P).

        Colours and patterns are judged cell by cell, each beside what it differs in from the picture's edge; a learned
        weight per cell, which falls on the main thing, pools the judgements.
        """
        cells = self.cells(low)
        edge = (cells * self.edge[:, None].to(cells.dtype)).sum(-2, keepdim=True)
        weight, colours, patterns = self.looks(torch.cat([cells, cells - edge], -1)).split(self.sizes, -1)
        share = (weight[..., 0] + self.place).softmax(-1)[..., None]
        return self.goods(pooled), (share * colours).sum(1), (share * patterns).sum(1)

    def tokens(self, pooled: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """(B, FEATURES) mean features and (B, 49, LOW_FEATURES) -> (B, IMAGE_TOKENS, D)."""
        goods, colours, patterns = self.classify(pooled, low)
        return torch.cat(
            [
                torch.einsum("bc,cjd->bjd", self.head(pooled).softmax(-1), self.table),
                torch.einsum("bc,cjd->bjd", goods.softmax(-1), self.goods_table),
                (colours.softmax(-1) @ self.colour_table)[:, None],
                (patterns.softmax(-1) @ self.pattern_table)[:, None],
            ],
            1,
        )

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Project a grid of features."""
        high, low = grid[..., :FEATURES], grid[..., FEATURES:]
        return self.tokens(high.mean(1), low)


class VisualTableConfig(LlavaConfig):  # type: ignore[misc]
    """A type of its own, so that no other code loads the weights as a plain LLaVA with a fresh projector."""

    model_type = "mllm_srec_visual_table"

    def __init__(self, goods: int = 2, colours: int = 1, patterns: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.goods, self.colours, self.patterns = goods, colours, patterns


class VisualTableModel(LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA with the visual table in the projector's place."""

    config_class = VisualTableConfig

    def __init__(self, config: VisualTableConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = VisualTable(
            config.text_config.hidden_size, config.goods, config.colours, config.patterns
        )
        self.post_init()


def register() -> None:
    """Make the types known to transformers' Auto classes; again and again is fine."""
    AutoConfig.register(LiteVisionConfig.model_type, LiteVisionConfig, exist_ok=True)
    AutoModel.register(LiteVisionConfig, LiteVisionModel, exist_ok=True)
    AutoConfig.register(VisualTableConfig.model_type, VisualTableConfig, exist_ok=True)
    AutoModelForImageTextToText.register(VisualTableConfig, VisualTableModel, exist_ok=True)
