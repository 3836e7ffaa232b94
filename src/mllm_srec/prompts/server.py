"""What a server is told in words where a model in this process has its turn begun, or its options weighed."""

from collections.abc import Sequence

VERSION = "server-1"


def begin(answer: str) -> str:
    """The last line of the user's turn that stands for the words the assistant's turn would begin with."""
    return f"\nBegin your answer with: {answer}"


def choose(options: Sequence[str]) -> str:
    """The last line of the user's turn where one of `options` is to be chosen."""
    return f"\nAnswer with one of: {', '.join(options)}."
