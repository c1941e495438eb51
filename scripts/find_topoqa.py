"For the Python scripts beside it: start topoqa, whichever Python they were started with."

import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn


def run_topoqa(command: str, arguments: list[str]) -> NoReturn:
    "Replace this process by `topoqa COMMAND ARGUMENTS`; one line and exit code 2 when there is none."
    repository = Path(__file__).resolve().parent.parent
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), str(repository / ".venv" / "bin")]
    program = shutil.which("topoqa", path=os.pathsep.join(places))
    if program is None:
        name = Path(sys.argv[0]).name
        expected = "expected on the path or in the repository's .venv, found in neither"
        fix = "run make test once, or activate the environment that has it"
        print(f"{name}: error: topoqa: {expected}; {fix}", file=sys.stderr)
        sys.exit(2)
    os.execv(program, ["topoqa", command, *arguments])
