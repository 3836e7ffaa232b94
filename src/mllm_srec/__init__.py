"""MLLM-SRec: next-item recommendation with a multimodal large language model.

Names are imported at first use, so that `mllm-srec --help` loads no model library.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Recommender", "Workspace", "__version__", "load_config"]

if TYPE_CHECKING:
    from mllm_srec.config import load_config
    from mllm_srec.recommender import Recommender
    from mllm_srec.workspace import Workspace


def __getattr__(name: str) -> Any:
    if name == "load_config":
        from mllm_srec.config import load_config

        return load_config
    if name == "Recommender":
        from mllm_srec.recommender import Recommender

        return Recommender
    if name == "Workspace":
        from mllm_srec.workspace import Workspace

        return Workspace
    raise AttributeError(f"module 'mllm_srec' has no attribute {name!r}")
