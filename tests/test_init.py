"""The package's public names."""

import subprocess
import sys

import pytest

import mllm_srec
from mllm_srec import config, recommender, workspace


def test_the_public_names_are_those_of_their_modules() -> None:
    assert mllm_srec.Recommender is recommender.Recommender
    assert mllm_srec.Workspace is workspace.Workspace
    assert mllm_srec.load_config is config.load_config
    assert all(hasattr(mllm_srec, name) for name in mllm_srec.__all__)


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'mllm_srec' has no attribute 'Recomender'"):
        mllm_srec.Recomender  # noqa: B018


def test_the_package_alone_loads_nothing_else() -> None:
    script = "import sys, mllm_srec; print(sorted(name for name in sys.modules if name.startswith('mllm_srec.')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
