"""Announce each change of the file system, in this process and in all below it, and strike at one of them.

Every process of a watched command imports this when it starts, so it needs nothing but Python.
"""

import fcntl
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

WATCHED = "TOPOQA_WATCHED"  # variable that names a folder of notes to the processes below
CHANGES = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.utime",
}


def changes_something(event: str, arguments: tuple) -> bool:
    "Whether an audit event announces a write, a new name or a removal."
    if event == "open":
        _, mode, flags = arguments
        return bool(set(mode) & set("wax+")) if mode else bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in CHANGES


def is_below(folder: str, event: str, arguments: tuple) -> bool:
    "Whether an audit event announces a change in a folder."
    is_path = bool(arguments) and isinstance(arguments[0], str | bytes | os.PathLike)
    return is_path and changes_something(event, arguments) and os.fsdecode(arguments[0]).startswith(folder)


def watch() -> None:
    "Note this process, and announce its changes among those of all others; at the one that is asked for, strike."
    notes = Path(os.environ[WATCHED])
    told = json.loads((notes / "told").read_text())

    def hook(event: str, arguments: tuple) -> None:
        if is_below(told["folder"], event, arguments):
            with (notes / "changes").open("ab", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # no other change before the blow has fallen
                file.write(b".")
                if file.tell() - 1 == told["number"]:
                    strike(notes, told["leader_alone"])

    enter(notes)
    os.register_at_fork(after_in_child=lambda: enter(notes))
    sys.addaudithook(hook)


def enter(notes: Path) -> None:
    with (notes / "processes").open("a") as file:
        file.write(f"{os.getpid()}\n")


def entered(notes: Path) -> list[int]:
    "All processes, the leader first."
    return [int(number) for number in (notes / "processes").read_text().split()]


def strike(notes: Path, leader_alone: bool) -> None:
    numbers = entered(notes)
    others = [number for number in numbers if number != os.getpid()]
    for number in numbers[:1] if leader_alone else [*others, os.getpid()]:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
