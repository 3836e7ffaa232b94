"""How long something takes, in words; the lines themselves are tested with the work that they show."""

import pytest

from mllm_srec import progress


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (65, "1:05"), (3725, "1:02:05")]
)
def test_clock(seconds: float, text: str) -> None:
    assert progress.clock(seconds) == text
