"""`mllm-srec comprehend WS --user U`: one user's windows, what rose and what faded."""

import json
from pathlib import Path

from conftest import Command


def test_the_timeline_of_a_user_shows_windows_movement_and_state(command: Command, copied: Path) -> None:
    ended = command("comprehend", copied, "--user", "u001")
    assert ended.code == 0
    assert "User u001: " in ended.out
    assert "  events 1-6, 2025-" in ended.out
    for part in ("  profile:    ", "  lately:     ", "  choices that meet a taste by: picture "):
        assert part in ended.out
    told = json.loads(command("comprehend", copied, "--user", "u001", "--json").out)
    assert (told["windows"][0]["start"], told["windows"][0]["stop"]) == (0, 6)
    assert told["windows"][-1]["stop"] == told["state"]["end"]
    assert all(step["summary"] for step in told["windows"])


def test_a_timeline_of_somebody_unknown_names_who_is_near(command: Command, copied: Path) -> None:
    ended = command("comprehend", copied, "--user", "u01")
    assert ended.code == 2
    assert "error: unknown user 'u01': did you mean u0" in ended.err
