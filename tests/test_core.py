"Whole files and links, whenever a signal comes."

import random
import secrets
import signal
from pathlib import Path

import pytest

from topoqa_nb.ground.core import atomic_directory, replace_link, write_json


class Alarm(Exception):
    "What the signal handler of this test raises."


def write_directory(path: Path, content: object) -> None:
    with atomic_directory(path / secrets.token_hex(8)) as temporary:
        (temporary / "file").write_text("whole")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers (not on Windows)")
@pytest.mark.parametrize(
    "write", [write_json, replace_link, write_directory], ids=["file", "link", "directory"]
)
def test_a_signal_at_any_moment_leaves_no_temporary_file(tmp_path: Path, write):
    armed = False

    def ring(*_: object) -> None:
        nonlocal armed
        if armed:  # once: a second signal must not disturb the cleaning up after the first, as in a run
            armed = False
            raise Alarm

    dice, before = random.Random(0), signal.signal(signal.SIGALRM, ring)
    try:
        for _ in range(500):
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-5, 1e-3))
                while armed:
                    write(tmp_path / "out", tmp_path / "target")
            except Alarm:
                pass
            assert [path.name for path in tmp_path.rglob(".*")] == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
