"""From the configuration to a model: the embedded one, a folder, or a Hugging Face name."""

import hashlib
from inspect import signature
from pathlib import Path
from typing import Any

from mllm_srec.config import ModelConfig
from mllm_srec.errors import ModelError
from mllm_srec.mllm.local import LocalMllm

FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
"""What is fetched of a model: weights as safetensors only, never code or pickled files."""


def load_mllm(config: ModelConfig) -> LocalMllm:
    """Load the model that `config.name` says, in `config.dtype`, on `config.device` ("auto": a GPU where there is one).

    Raises:
        ModelError: the name is no folder and cannot be fetched, or the files are not a usable image-text-to-text model.
    """
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = model_folder(config.name)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        processor = _load_processor(folder, model.config)
    except (ValueError, OSError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model {config.name!r} cannot be loaded as an image-text-to-text model with safetensors weights: {error}"
        ) from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ModelError(
            f"model {config.name!r} lacks {len(missing)} of its weights ({', '.join(missing[:3])} ...): "
            "the folder is incomplete or holds a model of another kind"
        )
    return LocalMllm(model.to(device), processor, weights_identity(folder), config.batch_size)


def model_folder(name: str) -> Path:
    """Where the model's files are; a Hugging Face name is fetched into the hub's cache.

    Raises:
        ModelError: no such folder, and the hub does not give it.
    """
    if name == "embedded":
        from mllm_srec.mllm.embedded import embedded_folder
        from mllm_srec.mllm.visual_table import register

        register()
        return embedded_folder()
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:
        raise ModelError(
            f"model {name!r} is neither a folder nor could it be fetched from the Hugging Face hub "
            f"({type(error).__name__}): check the name and the network, or use model.name=embedded"
        ) from error


def _load_processor(folder: Path, config: Any) -> Any:
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available() and type(config) in PROCESSOR_MAPPING:
        known = PROCESSOR_MAPPING[type(config)]
        video = signature(known).parameters.get("video_processor")
        if video is not None and video.default is None:
            return pictures_only(known).from_pretrained(folder)
    return AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def pictures_only(processor_class: Any) -> Any:
    """A processor class of transformers (Qwen-VL) without its video processor, which would need torchvision."""
    attributes = [name for name in processor_class.get_attributes() if name != "video_processor"]
    return type(
        processor_class.__name__, (processor_class,), {"get_attributes": classmethod(lambda _: list(attributes))}
    )


def weights_identity(folder: Path) -> str:
    """Content hash of the model's weights, configuration, tokenizer and templates (16 hex digits)."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in FILES for p in folder.glob(pattern)):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
