"""What a process of `accelerate launch` does in tests/test_tuning_launched.py: a training with a planned validation.

launched_training.py FOLDER
"""

import os
import sys
from pathlib import Path

from mllm_srec.tuning import train
from test_tuning import RECORDS, settings
from tiny_models import tiny_mllm

VALUES = (0.1, 0.5, 0.4)
"""What each look says."""
ROWS = RECORDS + RECORDS[::-1]


def main() -> None:
    """Train; only the first process looks, so that no two of them can see different things."""
    left = iter(VALUES)

    def look() -> list[float]:
        assert os.environ["RANK"] == "0", "another process than the first has looked"
        return [next(left)]

    train(tiny_mllm(), ROWS, settings(accumulate=2), Path(sys.argv[1]), look=look)


if __name__ == "__main__":
    main()
