from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlamaConfig, LlavaForConditionalGeneration

from mllm_srec.mllm.visual_table import (
    CLASSES,
    FEATURES,
    IMAGE_TOKENS,
    LOW_FEATURES,
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
    """Random words for all classes; no classifier knows any class before a test gives it one."""
    made = VisualTable(WIDTH, goods=5, colours=3, patterns=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for words in (made.table, made.goods_table, made.colour_table, made.pattern_table):
            words.copy_(torch.randn(words.shape, generator=generator))
        for last in (made.head, made.goods[-1], made.looks[-1]):
            last.weight.zero_()
            last.bias.fill_(-1000)
    return made


def grid(rows: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 49, FEATURES + LOW_FEATURES, generator=torch.Generator().manual_seed(seed))


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
        goods=5,
        colours=3,
        patterns=2,
    )
    model = VisualTableModel(config).eval()
    projector = model.model.multi_modal_projector
    for words in (projector.table, projector.goods_table, projector.colour_table, projector.pattern_table):
        torch.nn.init.normal_(words)
    return model


@torch.no_grad()
def test_a_sure_picture_is_the_words_of_its_classes(table: VisualTable) -> None:
    table.head.bias[7] = 0
    table.goods[-1].bias[3] = 0
    table.looks[-1].bias[[1 + 2, 1 + 3 + 1]] = 0  # behind the cell's weight: three colours, two patterns
    tokens = table(grid(2))
    assert tokens.shape == (2, IMAGE_TOKENS, WIDTH)
    expected = [*table.table[7], *table.goods_table[3], table.colour_table[2], table.pattern_table[1]]
    torch.testing.assert_close(tokens, torch.stack(expected).expand(2, -1, -1))


@torch.no_grad()
def test_a_picture_between_classes_mixes_their_words(table: VisualTable) -> None:
    table.head.bias[7], table.head.bias[CLASSES - 1] = 0, torch.tensor(3.0).log()
    named = table(grid())[0, :WORDS]
    torch.testing.assert_close(named, 0.25 * table.table[7] + 0.75 * table.table[CLASSES - 1])


@torch.no_grad()
def test_the_kind_is_read_from_the_mean_over_the_cells(table: VisualTable) -> None:
    table.head.bias[:2] = 0
    table.head.weight[1, 0] = 49 * 1000.0
    cells = torch.zeros(1, 49, FEATURES + LOW_FEATURES)
    cells[0, 30, 0] = 1
    torch.testing.assert_close(table(cells)[0, :WORDS], table.table[1])


@torch.no_grad()
def test_colours_are_judged_where_the_weight_falls(table: VisualTable) -> None:
    table.looks[0].weight.zero_()
    table.looks[0].bias.zero_()
    table.looks[0].weight[0, 0] = table.looks[0].weight[1, 1] = 1.0  # the first two features reach the last layer
    table.looks[-1].bias.zero_()
    table.looks[-1].weight[1 + 0, 0], table.looks[-1].weight[1 + 1, 1] = 100.0, 100.0
    low = torch.zeros(1, 49, LOW_FEATURES)
    low[0, 8, 0], low[0, 40, 1] = 10.0, 10.0  # cell 8 says colour 0, cell 40 says colour 1
    for cell, colour in ((8, 0), (40, 1)):
        table.place.zero_()
        table.place[cell] = 100
        assert int(table.classify(torch.zeros(1, FEATURES), low)[1].argmax()) == colour


@torch.no_grad()
def test_a_cell_is_judged_beside_the_pictures_edge(table: VisualTable) -> None:
    table.looks[0].weight.zero_()
    table.looks[0].bias.zero_()
    table.looks[0].weight[0, LOW_FEATURES] = 1.0  # what the first feature differs in from the edge
    table.looks[-1].bias.zero_()
    table.looks[-1].weight[1, 0] = 100.0
    table.place[24] = 1000  # the middle
    low = torch.zeros(1, 49, LOW_FEATURES)
    low[0, 24, 0] = 5.0
    apart = table.classify(torch.zeros(1, FEATURES), low)[1][0, 0]
    low[0, :7, 0] = 5.0 * 24 / 7  # seven of the 24 cells of the edge: their mean is 5
    even = table.classify(torch.zeros(1, FEATURES), low)[1][0, 0]
    assert apart > 100
    assert abs(even) < 1e-3


@torch.no_grad()
def test_the_tower_gives_a_grid_of_features() -> None:
    tower = LiteVisionModel(LiteVisionConfig()).eval()
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    seen = tower(pixels)
    assert seen.last_hidden_state.shape == (2, 49, FEATURES + LOW_FEATURES)
    high = tower.net.extract_features(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen.last_hidden_state[..., :FEATURES], high, atol=1e-5, rtol=1e-4)
    # The first low features are the mean and the variance of a cell's 32 x 32 pixels.
    cell = pixels[1, :, 64:96, 32:64].flatten(1)
    low = seen.last_hidden_state[1, 2 * 7 + 1, FEATURES : FEATURES + 6]
    torch.testing.assert_close(low, torch.cat([cell.mean(1), cell.var(1, unbiased=False)]), atol=1e-5, rtol=1e-4)
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
