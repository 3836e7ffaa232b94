"""Tiny multimodal models in code: random weights, a trained tokenizer, the real processor; no files, no network."""

import io
from functools import cache
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    Idefics3VisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
    SmolVLMVisionConfig,
)

from mllm_srec.mllm.base import Picture
from mllm_srec.mllm.load import pictures_only
from mllm_srec.mllm.local import LocalMllm

KINDS = ("llava", "llava_next", "idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl")

SPECIAL = {
    "llava": ["<pad>", "<s>", "</s>", "<image>"],
    "llava_next": ["<pad>", "<s>", "</s>", "<image>"],
    "idefics3": ["<pad>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"],
    "qwen2_5_vl": [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
        *("<|image_pad|>", "<|video_pad|>"),
    ],
}
SPECIAL["smolvlm"] = [*SPECIAL["idefics3"], *(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2))]
SPECIAL["qwen3_vl"] = SPECIAL["qwen2_5_vl"]

# In the manner of the released models' templates, defaults and all.
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT = (
    "Yes No Yes No Yes. No. USER: ASSISTANT: User: Assistant: system user assistant You predict which item a user "
    "chooses next. Will the user choose this item next? Answer Yes or No. a red shoe, a blue shirt, a green hat with "
    "stripes. The user likes warm colours. Lately the user: cotton, wool, summer. Item: What is in the picture? "
    "It meets the taste for red. None of its facts meets the known taste."
)

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def tiny_tokenizer(kind: str = "llava", **changes: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 400 tokens with the special tokens of `kind`."""
    special = SPECIAL[kind]
    named = {"qwen": {"pad_token": special[0], "eos_token": special[min(2, len(special))]}}.get(kind[:4])
    named = named or {"pad_token": special[0], "bos_token": special[1], "eos_token": special[2]}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(kind)), **{**named, "model_max_length": 4096, **changes}
    )


@cache
def _tokenizer_json(kind: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        special_tokens=SPECIAL[kind],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    if kind.startswith("llava"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return str(tokenizer.to_str())


def tiny_model(kind: str = "llava", seed: int = 0, text: Any = None) -> tuple[Any, Any]:
    """(model in float32, processor); `text` replaces the language model's configuration of a LLaVA."""
    model, processor = globals()[f"_{kind}"](*([text] if text is not None else []))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Wide enough that every part moves the logits, narrow enough that float32 error stays far below 1e-4.
            if parameter.ndim > 1:
                parameter.copy_(noise * (1.5 / parameter[0].numel() ** 0.5))
            else:
                parameter.copy_((parameter == 1) + 0.1 * noise)  # a norm begins with ones
    end = processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model, processor


def tiny_mllm(kind: str = "llava", seed: int = 0) -> LocalMllm:
    """A `LocalMllm` over `tiny_model`, a few milliseconds old."""
    return LocalMllm(*tiny_model(kind, seed), base_identity=f"tiny-{kind}-{seed}", batch_size=4)


def drawing(colour: str = "red", size: tuple[int, int] = (64, 64)) -> Picture:
    """A PNG of an ellipse on white; `sha256` is a name, for pictures are not looked up here."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((size[0] // 8, size[1] // 4, size[0] // 2, size[1] - 4), fill=colour)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return Picture(f"{colour}-{size[0]}x{size[1]}", stream.getvalue())


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        projection_dim=16,
    )


def _llava(text: Any = None) -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer("llava")
    config = LlavaConfig(
        vision_config=_clip(),
        text_config=text or LlamaConfig(vocab_size=len(tokenizer), **SHAPE),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=7,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


def _llava_next() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer("llava_next")
    grid = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **SHAPE),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grid
        ),
        tokenizer=tokenizer,
        patch_size=7,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
    )
    return LlavaNextForConditionalGeneration(config), processor


def _idefics3() -> tuple[Any, Any]:
    tokenizer, vision, text, rest = _idefics("idefics3")
    config = Idefics3Config(vision_config=Idefics3VisionConfig(**vision), text_config=text, **rest)
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(**SPLIT),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
    return Idefics3ForConditionalGeneration(config), processor


def _smolvlm() -> tuple[Any, Any]:
    tokenizer, vision, text, rest = _idefics("smolvlm")
    config = SmolVLMConfig(vision_config=SmolVLMVisionConfig(**vision), text_config=text, **rest)
    processor = pictures_only(SmolVLMProcessor)(
        SmolVLMImageProcessorPil(**SPLIT), tokenizer, None, image_seq_len=4, chat_template=IDEFICS_TEMPLATE
    )
    return SmolVLMForConditionalGeneration(config), processor


SPLIT = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def _idefics(kind: str) -> tuple[Any, dict[str, Any], LlamaConfig, dict[str, Any]]:
    tokenizer = tiny_tokenizer(kind)
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=1, eos_token_id=2, **SHAPE
    )
    return tokenizer, vision, text, {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "scale_factor": 2}


def _qwen(kind: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    tokenizer = tiny_tokenizer(kind)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image": "image_pad",
            "video": "video_pad",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
        }.items()
    }
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10_000.0}
    text = {"vocab_size": len(tokenizer), "rope_parameters": rope, "bos_token_id": None, "eos_token_id": 2, **SHAPE}
    return tokenizer, ids, text


def _qwen2_5_vl() -> tuple[Any, Any]:
    tokenizer, ids, text = _qwen("qwen2_5_vl")
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 7,
        "out_hidden_size": 32,
        "window_size": 28,
        "fullatt_block_indexes": [1],
    }
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    return model, pictures_only(Qwen2_5_VLProcessor)(_qwen_images(7), tokenizer, chat_template=QWEN_TEMPLATE)


def _qwen3_vl() -> tuple[Any, Any]:
    tokenizer, ids, text = _qwen("qwen3_vl")
    text["head_dim"] = 8
    text["rope_parameters"] |= {"mrope_interleaved": True}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    return model, pictures_only(Qwen3VLProcessor)(_qwen_images(8), tokenizer, chat_template=QWEN_TEMPLATE)


def _qwen_images(patch: int) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 70 * 70}
    )
