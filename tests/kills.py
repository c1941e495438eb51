"""Kill a piece of work at one of its changes of the file system, in a process of its own."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

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


def killed_at(
    number: int | None,  # which change is not carried out any more, from 0; None: all of them are
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
        is_here = arguments and isinstance(arguments[0], str | bytes | os.PathLike)
        if (
            is_here
            and changes_something(event, arguments)
            and os.fsdecode(arguments[0]).startswith(str(folder))
        ):
            os.write(sending, b".")
            if seen == number:
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
