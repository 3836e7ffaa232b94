from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlamaConfig, LlavaForConditionalGeneration

from mllm_srec.mllm.visual_table import (
    CLASSES,
    FEATURES,
    IMAGE_TOKENS,
    WORDS,
    LiteVisionConfig,
    LiteVisionModel,
    VisualTable,
    VisualTableConfig,
    VisualTableModel,
    register,
)
from tiny_models import SHAPE, tiny_tokenizer

pytestmark = pytest.mark.embedded

WIDTH = 6


@pytest.fixture
def table() -> VisualTable:
    made = VisualTable(WIDTH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.table.copy_(torch.randn(made.table.shape, generator=generator))
        made.head.weight.zero_()
        made.head.bias.fill_(-1000)
        made.extra[-1].weight.zero_()
        made.extra[-1].bias.copy_(torch.arange(WORDS * WIDTH).float())
    return made


def tiny_table_model() -> Any:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer("llava")
    config = VisualTableConfig(
        vision_config=LiteVisionConfig(),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **SHAPE),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=IMAGE_TOKENS,
    )
    return VisualTableModel(config).eval()


@torch.no_grad()
def test_a_sure_picture_is_the_words_of_its_class(table: VisualTable) -> None:
    table.head.bias[7] = 0
    tokens = table(torch.randn(2, 49, FEATURES))
    assert tokens.shape == (2, IMAGE_TOKENS, WIDTH)
    torch.testing.assert_close(tokens[:, :WORDS], table.table[7].expand(2, -1, -1))
    # Behind them the extra tokens: here one value each, for their weights are 0.
    extra = torch.arange(WORDS * WIDTH).float().reshape(WORDS, WIDTH)
    torch.testing.assert_close(tokens[:, WORDS:], extra.expand(2, -1, -1))


@torch.no_grad()
def test_a_picture_between_classes_mixes_their_words(table: VisualTable) -> None:
    table.head.bias[7], table.head.bias[CLASSES - 1] = 0, torch.tensor(3.0).log()
    named = table(torch.zeros(1, 49, FEATURES))[0, :WORDS]
    torch.testing.assert_close(named, 0.25 * table.table[7] + 0.75 * table.table[CLASSES - 1])


@torch.no_grad()
def test_the_class_is_read_from_the_mean_over_the_grid(table: VisualTable) -> None:
    table.head.bias[:2] = 0
    table.head.weight[1, 0] = 49 * 1000.0
    grid = torch.zeros(1, 49, FEATURES)
    grid[0, 30, 0] = 1
    torch.testing.assert_close(table(grid)[0, :WORDS], table.table[1])


@torch.no_grad()
def test_the_tower_gives_a_grid_of_features() -> None:
    tower = LiteVisionModel(LiteVisionConfig()).eval()
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    seen = tower(pixels)
    assert seen.last_hidden_state.shape == (2, 49, FEATURES)
    torch.testing.assert_close(seen.pooler_output, seen.last_hidden_state.mean(1))
    torch.testing.assert_close(tower(pixels[1:]).last_hidden_state, seen.last_hidden_state[1:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_model_keeps_its_type_and_its_weights(tmp_path: Path) -> None:
    register()
    register()  # again is fine
    model = tiny_table_model()
    model.save_pretrained(tmp_path)
    again, found = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, VisualTableModel)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    ids = torch.tensor([[1, *[model.config.image_token_index] * IMAGE_TOKENS, 5, 6]])
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids, pixel_values=pixels).logits
    assert torch.equal(again(input_ids=ids, pixel_values=pixels).logits, logits)
    assert not torch.allclose(model(input_ids=ids, pixel_values=-pixels).logits, logits)
    with pytest.raises(Exception, match=r"(?i)tokens"):
        model(input_ids=ids[:, 1:], pixel_values=torch.cat([pixels, pixels]))


def test_it_is_no_plain_llava() -> None:
    assert VisualTableConfig.model_type != LlavaForConditionalGeneration.config_class.model_type
