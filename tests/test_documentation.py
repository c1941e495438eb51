"""The map is right: pages are listed, links lead somewhere, and the README's commands exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import in_turn

from topoqa_nb.cli import main
from topoqa_nb.everyday import EVERYDAY

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
PAGES = {str(path.relative_to(REPOSITORY / "nbs")) for path in (REPOSITORY / "nbs").rglob("[0-9]*.ipynb")}
CHAPTERS = sorted(path.name for path in (REPOSITORY / "nbs").glob("[0-9]_*"))
LINKING = sorted(
    [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("nbs/**/*.ipynb"), *REPOSITORY.glob("pipelines/*.ipynb")]
)


def prose(path: Path) -> str:
    "A Markdown file, or the Markdown cells of a notebook."
    text = path.read_text()
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def commands(text: str) -> list[str]:
    "What is given to `topoqa`, also by a job script."
    text = text.replace("\\\n", " ")
    by_script = re.findall(r"^sbatch .*?run\.sh \S+ (--.+)$", text, flags=re.MULTILINE)
    own = re.findall(r"^(?:topoqa|sbatch .*?ray\.sh) (.+?)(?:\s+#.*)?$", text, flags=re.MULTILINE)
    return own + [f"run {options}" for options in by_script]


EXAMPLES = commands(README) + commands(prose(REPOSITORY / "nbs" / "96b_cluster.ipynb"))


def test_readme_lists_the_chapters_and_the_index_the_pages():
    assert re.findall(r"^\| `(\d_\w+)` ", README, flags=re.MULTILINE) == CHAPTERS
    index = prose(REPOSITORY / "nbs" / "index.ipynb")
    assert set(re.findall(r"\]\(([^)]+\.ipynb)\)", index)) >= PAGES


def test_readme_shows_the_everyday_names():
    assert set(re.findall(r"`(\w+)`", README)) >= set(EVERYDAY)


def test_readme_is_short():
    assert len(README.splitlines()) < 150


@in_turn("path", LINKING)
def test_links_lead_to_files(path: Path):
    for link in re.findall(r"\]\(([^)#\s]+)", prose(path)):
        assert "://" in link or (path.parent / link).exists(), link


@in_turn("example", EXAMPLES)
def test_commands_of_the_readme_and_of_the_cluster_page_exist(
    example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("COLUMNS", "200")  # so that no option is cut short
    command, *arguments = shlex.split(example)
    assert main([command, "--help"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for option in filter(lambda word: word.startswith("--"), arguments):
        assert option in text


def test_security_names_tests_and_pages_that_exist():
    named = re.findall(r"`(test_\w+(?:\.py)?|\d\d[a-z]?_\w+)`", (REPOSITORY / "SECURITY.md").read_text())
    tests = {file.name: file.read_text() for file in (REPOSITORY / "tests").glob("test_*.py")}
    functions = {
        name for text in tests.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    }
    pages = {page.stem for page in (REPOSITORY / "nbs").rglob("*.ipynb")}
    assert len(named) > 20 and set(named) <= functions | pages | {*tests}


LASTING = {  # what a page does to its process -> how it takes that back
    r'^os\.environ\["(\w+)"\] = ': 'del os.environ["{}"]',
    r"^(log)\.(?:setLevel\(logging\.INFO|.*level = )": "{}.setLevel(logging.NOTSET)",
    r"^(log)\.(?:addHandler|handlers)": "{}.handlers.clear()",
}


def test_a_page_leaves_its_process_as_it_was_for_the_next_page():
    lasting = []
    for page in sorted(PAGES):
        cells = json.loads((REPOSITORY / "nbs" / page).read_text())["cells"]
        lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
        for done, undone in LASTING.items():
            changes = [change for line in lines if (change := re.match(done, line))]
            lasting += [(page, change[0]) for change in changes if undone.format(change[1]) not in lines]
    assert lasting == []
