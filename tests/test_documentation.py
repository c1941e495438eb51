"""The map is right: pages are listed, links lead somewhere, and the README's commands exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
PAGES = sorted(path.stem for path in (REPOSITORY / "nbs").glob("[0-9]*.ipynb"))
LINKING = sorted(
    [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("nbs/*.ipynb"), *REPOSITORY.glob("pipelines/*.ipynb")]
)
EXAMPLES = re.findall(r"^topoqa (.+?)(?:\s+#.*)?$", README, flags=re.MULTILINE)


def prose(path: Path) -> str:
    "A Markdown file, or the Markdown cells of a notebook."
    text = path.read_text()
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def test_readme_and_index_list_the_pages_that_exist():
    assert re.findall(r"^\| `(\d\d_\w+)` ", README, flags=re.MULTILINE) == PAGES
    index = prose(REPOSITORY / "nbs" / "index.ipynb")
    assert re.findall(r"^\| \[[^]]+\]\((\d\d_\w+)\.ipynb\)", index, flags=re.MULTILINE) == PAGES


def test_readme_is_short():
    assert len(README.splitlines()) < 150


@pytest.mark.parametrize("path", LINKING, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path):
    for link in re.findall(r"\]\(([^)#\s]+)", prose(path)):
        assert "://" in link or (path.parent / link).exists(), link


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.split()[0])
def test_commands_of_the_readme_exist(example: str):
    command, *arguments = shlex.split(example)
    words = [sys.executable, "-m", "topoqa_nb.cli", command, "--help"]
    environment = {**os.environ, "COLUMNS": "200"}  # so that no option is cut short
    shown = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout)
    for option in filter(lambda word: word.startswith("--"), arguments):
        assert option in text
