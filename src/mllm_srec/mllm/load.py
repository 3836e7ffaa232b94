"""From the configuration to a model: the embedded one, a folder, a Hugging Face name, or a server."""

import hashlib
import os
import re
from inspect import signature
from pathlib import Path
from typing import Any

from mllm_srec.config import ModelConfig
from mllm_srec.errors import ModelError
from mllm_srec.mllm.local import LocalMllm
from mllm_srec.mllm.remote import RemoteMllm

FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
"""What is fetched of a model: weights as safetensors only, never code or pickled files."""


def load_mllm(config: ModelConfig) -> LocalMllm | RemoteMllm:
    """Load the model that `config.name` says, in `config.dtype`, on `config.device` ("auto": a GPU where there is one).

    With `config.server` nothing is loaded or sent yet: the server has the model.

    Raises:
        ModelError: the name is no folder and cannot be fetched, the files are not a usable image-text-to-text model,
            a package that the model needs is not installed, or the server's key is not in the environment.
    """
    if config.server:
        key = os.environ.get(config.api_key_variable, "") if config.api_key_variable else ""
        if config.api_key_variable and not key:  # not named: someone may have entered the key itself
            raise ModelError("the environment variable that model.api_key_variable names is not set: export it")
        return RemoteMllm(config.server, config.name, key, config.concurrency, config.timeout)
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = model_folder(config.name)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        # What is wrong with the small files is said before the weights are read.
        processor = _load_processor(folder, AutoConfig.from_pretrained(folder, trust_remote_code=False))
        model, found = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, OSError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        package = _missing_package(error)
        if package:
            raise ModelError(f"model {config.name!r} needs the package {package}: pip install {package}") from error
        raise ModelError(
            f"model {config.name!r} cannot be loaded as an image-text-to-text model with safetensors weights: {error}"
        ) from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ModelError(
            f"model {config.name!r} lacks {len(missing)} of its weights ({', '.join(missing[:3])} ...): "
            "the folder is incomplete or holds a model of another kind"
        )
    mllm = LocalMllm(model.to(device), processor, weights_identity(folder), config.batch_size)
    if config.name == "embedded":
        from mllm_srec.mllm.embedded import HEAD_START

        mllm.head_start = HEAD_START if HEAD_START.exists() else None
    return mllm


def trainable(mllm: LocalMllm | RemoteMllm) -> LocalMllm:
    """`mllm`, to be trained or to carry an adapter.

    Raises:
        ModelError: it is behind a server.
    """
    if isinstance(mllm, RemoteMllm):
        raise ModelError(
            "a model behind a server cannot be trained: set training.rows=0, or train it in this process (model.server "
            "empty) and serve it with its adapter"
        )
    return mllm


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
        if "video_processor" in signature(known).parameters:
            return pictures_only(known).from_pretrained(folder)
    return AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def pictures_only(processor_class: Any) -> Any:
    """A processor class of transformers (Qwen-VL, SmolVLM) without its video processor, which would need torchvision.

    Its chat template is applied as every processor's is: SmolVLM's own way asks the video processor for a frame rate.
    """
    from transformers import ProcessorMixin

    attributes = [name for name in processor_class.get_attributes() if name != "video_processor"]

    def from_args_and_dict(cls: Any, /, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        without = {**processor_dict, "video_processor": None}
        return processor_class.from_args_and_dict.__func__(cls, args, without, **kwargs)

    return type(
        processor_class.__name__,
        (processor_class,),
        {
            "get_attributes": classmethod(lambda _: list(attributes)),
            "from_args_and_dict": classmethod(from_args_and_dict),
            "apply_chat_template": ProcessorMixin.apply_chat_template,
        },
    )


def _missing_package(error: Exception) -> str:
    """The package whose absence `error` tells of; transformers says it in a sentence."""
    if not isinstance(error, ImportError):
        return ""
    told = re.search(r"pip install (?:(?:-U|--upgrade) )?([\w.-]*\w)", str(error))
    return told[1] if told else (error.name or "")


def weights_identity(folder: Path) -> str:
    """Content hash of the model's weights, configuration, tokenizer and templates (16 hex digits)."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in FILES for p in folder.glob(pattern)):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
