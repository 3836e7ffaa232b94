import os
from pathlib import Path

import pytest


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets that MLLM_SREC_DATA names."""
    if "MLLM_SREC_DATA" not in os.environ:
        pytest.skip("MLLM_SREC_DATA is not set")
    return Path(os.environ["MLLM_SREC_DATA"])
