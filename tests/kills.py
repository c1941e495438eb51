"""Kill a piece of work at one of its changes of the file system, in a process of its own, or in any that it starts."""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from conftest import PATIENCE, is_running, speak_into
from watch import WATCHED, entered, is_below, watch


def killed_at(
    number: int | str | None,  # the change that is not carried out any more, from 0; None: all of them are;
    # or a part of the name of a file that is about to be renamed
    folder: Path,  # changes elsewhere do not count
    work: Callable[[], object],
) -> int:  # how many changes were announced
    "Do the work in a copy of this process, which a SIGKILL ends just before one change. Raises what is not a kill."
    receiving, sending = os.pipe()
    child = os.fork()
    if child:
        os.close(sending)
        with os.fdopen(receiving, "rb") as pipe:
            text = pipe.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), text
        assert (code == 0) is ("done" in text), text
        return text.count(".")
    os.close(receiving)
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if is_below(str(folder), event, arguments):
            os.write(sending, b".")
            is_named = (
                isinstance(number, str) and event == "os.rename" and number in os.fsdecode(arguments[0])
            )
            if is_named or seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.addaudithook(hook)
        work()
        os.write(sending, b"done")
        os._exit(0)
    except BaseException:
        os.write(sending, traceback.format_exc().encode())
        os._exit(1)


# --- the same with all the processes that a command starts ---


def killed_below(
    number: int | None,  # as of `killed_at`; changes of all processes count, in the order in which they come
    folder: Path,  # changes elsewhere do not count
    work: Callable[[], object],
    leader_alone: bool = False,  # the others are to notice; False: all are killed at once
) -> int:  # how many changes were announced
    "Do the work in a copy of this process and kill it there, or in what it started. Raises when a process is left."
    with tempfile.TemporaryDirectory() as name:
        notes = Path(name)
        told = {"number": number, "folder": str(folder), "leader_alone": leader_alone}
        (notes / "told").write_text(json.dumps(told))
        child = os.fork()
        if not child:
            lead(notes, work)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = those_left(notes)
        assert code == 0 if number is None else code in (0, -signal.SIGKILL), (notes / "said").read_text()
        assert not left, left
        return (notes / "changes").stat().st_size


def lead(notes: Path, work: Callable[[], object]) -> NoReturn:
    "The work, in a process that leads a session; those below it find the hook, too."
    os.setsid()
    said = os.open(notes / "said", os.O_WRONLY | os.O_CREAT)
    speak_into(said, said)
    tests = Path(__file__).parent
    path = [str(tests / "watched"), str(tests), os.environ.get("PYTHONPATH", "")]
    os.environ |= {WATCHED: str(notes), "PYTHONPATH": os.pathsep.join(path)}
    try:
        watch()
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def those_left(notes: Path, seconds: float = PATIENCE) -> list[str]:
    "The processes that are still there after a while."
    end = time.monotonic() + seconds
    while (left := list(filter(is_running, entered(notes)))) and time.monotonic() < end:
        time.sleep(0.05)
    return [Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ") for number in left]
