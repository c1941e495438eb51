"""The automatic checks of the house; `make lint` runs them all.

Each check takes the repository root and returns one line per problem, remedy included. Cleaning and exporting
happen in a copy, so a check never changes the tree it looks at and uncommitted work elsewhere does not disturb it.
"""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = "topoqa_nb"
GENERATED = ("__init__", "_modidx")  # written by nbdev_export for all pages together
REFRESH = "run `make export`"


def notebooks(root: Path, *folders: str) -> list[Path]:
    "The notebooks inside the given folders and their chapters, in the order of reading."
    found = (path for folder in folders for path in (root / folder).rglob("*.ipynb"))
    return sorted((path for path in found if ".ipynb_checkpoints" not in path.parts), key=page_order)


def page_order(page: Path) -> tuple[int, int, str, str]:
    "Chapters, then pages outside of them, each by number, such as 18a; pages without one come first."
    number = re.match(r"(\d+)([a-z]*)_", page.name)
    outside = page.parent.name == "nbs"
    return (int(outside), int(number[1]), number[2], str(page)) if number else (-1, 0, "", str(page))


def is_numbered(page: Path) -> bool:
    "Whether it is a page of a chapter; the index and helpers are not."
    return page_order(page)[0] >= 0


def modules(root: Path) -> list[Path]:
    "The files of the package, sorted; what it carries as data is not among them."
    return sorted(path for path in (root / PACKAGE).rglob("*.py") if "_data" not in path.parts)


def code_cells(notebook: Path) -> list[str]:
    "Sources of the code cells, without the lines that only IPython understands."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE) for source in sources]


def syntax(notebook: Path) -> Iterator[ast.AST]:
    "Every node of every code cell; a cell that does not parse is left to ruff."
    for source in code_cells(notebook):
        try:
            yield from ast.walk(ast.parse(source))
        except SyntaxError:
            continue


def run_tool(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    "Run a command of the environment that runs this script."
    command = [str(Path(sys.executable).parent / name), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@contextmanager
def regenerated(root: Path) -> Iterator[Path]:
    "A copy of the tree in which the notebooks are cleaned and the package is exported from nothing."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / root.resolve().name
        copy.mkdir()
        for name in ("settings.ini", "pyproject.toml"):
            shutil.copy(root / name, copy / name)
        for name in ("nbs", "pipelines"):
            for notebook in notebooks(root, name):
                place = copy / notebook.relative_to(root)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(notebook, place)
        (copy / PACKAGE).mkdir()
        if (root / PACKAGE / "__init__.py").exists():
            shutil.copy(root / PACKAGE / "__init__.py", copy / PACKAGE)
        for command in (["nbdev_clean"], ["nbdev_clean", "--fname", "pipelines"], ["nbdev_export"]):
            result = run_tool(*command, folder=copy)
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {''.join(result.stderr.splitlines()[-1:])}")
        yield copy


def contents(root: Path) -> dict[str, bytes]:
    "What cleaning and exporting may write: relative path -> bytes."
    files = notebooks(root, "nbs", "pipelines") + modules(root)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def check_clean_and_export(root: Path) -> list[str]:
    "Cleaning and exporting would change, add or leave behind nothing."
    committed = contents(root)
    try:
        with regenerated(root) as copy:
            fresh = contents(copy)
    except RuntimeError as problem:
        return [f"nbs: {problem}; repair the page that it names"]
    problems = [f"{name}: is not exported yet; {REFRESH}" for name in sorted(fresh.keys() - committed.keys())]
    for name in sorted(committed.keys() - fresh.keys()):
        problems.append(f"{name}: no page exports it any more; remove it")
    for name in sorted(committed.keys() & fresh.keys()):
        if committed[name] != fresh[name]:
            state = "is not clean" if name.endswith(".ipynb") else "differs from its page"
            problems.append(f"{name}: {state}; {REFRESH}")
    return problems


def check_module_pages(root: Path) -> list[str]:
    "Every module names, in its first lines, a page that exists."
    problems = []
    for module in modules(root):
        if module.stem in GENERATED:
            continue
        found = re.search(r"File to edit: (\S+\.ipynb)", module.read_text(encoding="utf-8"))
        name = module.relative_to(root)
        if not found:
            problems.append(f"{name}: names no page; write it as a page in nbs/, never by hand")
        elif not (module.parent / found[1].rstrip(".")).exists():
            problems.append(
                f"{name}: its page {found[1]} does not exist; remove the module or restore the page"
            )
    return problems


def exported_modules(root: Path) -> dict[str, Path]:
    "Dotted module name below the package -> the page that exports it."
    pages = {}
    for page in notebooks(root, "nbs"):
        for source in code_cells(page):
            if found := re.search(r"^#\|\s*default_exp\s+(\S+)", source, flags=re.MULTILINE):
                pages[found[1]] = page
    return pages


def imported_modules(notebook: Path) -> set[str]:
    "Names of the modules of this package that the notebook imports anywhere."
    dotted = set()
    for node in syntax(notebook):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            dotted |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix(f"{PACKAGE}.") for name in dotted if name.startswith(f"{PACKAGE}.")}


def check_import_order(root: Path) -> list[str]:
    "A numbered page imports only modules of earlier pages."
    pages, problems = exported_modules(root), []
    for page in notebooks(root, "nbs"):
        if not is_numbered(page):
            continue  # the index introduces every page
        for module in sorted(imported_modules(page) & pages.keys()):
            if page_order(pages[module]) >= page_order(page):
                problems.append(
                    f"{page.relative_to(root)}: imports {module} of {pages[module].name}; "
                    "import only from earlier pages, or move the page"
                )
    return problems


LONGEST_CELL, LONGEST_PAGE = 40, 430  # exported lines


def check_lengths(root: Path) -> list[str]:
    "A cell exports one idea, a page answers one question; both are short."
    problems = []
    for page in notebooks(root, "nbs"):
        name = page.relative_to(root)
        exported = [source for source in code_cells(page) if re.match(r"#\|\s*export\b", source)]
        lengths = [source.count("\n") + (not source.endswith("\n")) - 1 for source in exported]
        for source, length in zip(exported, lengths, strict=True):
            if length > LONGEST_CELL and not is_only_imports(source):
                first = re.search(r"^(?:def|class|\w+ *=)[^(:=]*", source, flags=re.MULTILINE)
                where = first[0].strip() if first else "a cell"
                problems.append(
                    f"{name}: {where} stands in a cell of {length} exported lines; cut it at {LONGEST_CELL}"
                )
        if sum(lengths) > LONGEST_PAGE:
            problems.append(f"{name}: exports {sum(lengths)} lines; make two pages of it at {LONGEST_PAGE}")
    return problems


def is_only_imports(source: str) -> bool:
    "Whether a cell holds imports alone, which may be many."
    with contextlib.suppress(SyntaxError):
        return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)
    return False


def check_prose(root: Path) -> list[str]:
    "A page has a title and a subtitle, says in the end what it promises, and leads to the next one."
    pages = [page for page in notebooks(root, "nbs") if is_numbered(page)]
    problems = []
    for page, following in zip(pages, [*pages[1:], None], strict=True):
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"] or [""]
        name = page.relative_to(root)
        if not re.match(r"# \S.*\n> \S", texts[0]):
            problems.append(
                f"{name}: begins without `# Title` and `> subtitle`; write them in its first cell"
            )
        if "**What this page promises.**" not in texts[-1]:
            problems.append(
                f"{name}: does not end with `**What this page promises.**`; write it in its last cell"
            )
        target = os.path.relpath(following, page.parent) if following else None
        led = re.search(r"^Next: .*\]\(([^)]+\.ipynb)\)", texts[-1], flags=re.MULTILINE)
        if following and (not led or led[1] != target):
            problems.append(
                f"{name}: leads to {led[1] if led else 'no page'}; write `Next: [...]({target}).`"
            )
    return problems


def check_links(root: Path) -> list[str]:
    "Every link from a page to a notebook meets one."
    problems = []
    for page in notebooks(root, "nbs"):
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^):#\s]+\.ipynb)", text):
            if not (page.parent / target).is_file():
                problems.append(
                    f"{page.relative_to(root)}: links to {target}, which does not exist; correct it"
                )
    return problems


def check_pipelines_define_nothing(root: Path) -> list[str]:
    "The pipeline notebooks call the package; they hold no functions or classes."
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        f"pipelines/{notebook.name}: defines {node.name}; move it to a page in nbs/ and import it"
        for notebook in notebooks(root, "pipelines")
        for node in syntax(notebook)
        if isinstance(node, definitions)
    ]


def output_texts(notebook: Path) -> Iterator[tuple[str, str]]:
    "Kind and text of every stored output; pictures are left out."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        data = [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
        texts = [*data, output.get("text", ""), output.get("traceback", "")]
        kind = output["name"] if output["output_type"] == "stream" else output["output_type"]
        yield kind, "\n".join("".join(text) for text in texts)


def check_outputs(root: Path) -> list[str]:
    "Stored outputs hold no errors, warnings or paths of one machine."
    problems = []
    for notebook in notebooks(root, "nbs", "pipelines"):
        name = notebook.relative_to(root)
        for kind, text in output_texts(notebook):
            if kind in ("error", "stderr"):
                first = " ".join(text.split())[:80]
                problems.append(
                    f"{name}: stores {kind} output ({first}); mend the cell and run the page again"
                )
            elif found := re.search(r"(?<![\w./])/(?:tmp|home|root|work|var|Users)/\S*", text):
                problems.append(f"{name}: shows {found[0][:60]}; show a relative path and run the page again")
    return problems


def lint_targets(root: Path) -> list[str]:
    "The folders that ruff reads; the exported package follows from the pages."
    return [
        name
        for name in ("nbs", "pipelines", "tests", "scripts", "benchmarks", "docs", ".ci")
        if (root / name).exists()
    ]


def check_ruff(root: Path) -> list[str]:
    "Notebooks, tests, benchmarks and these checks pass ruff's rules."
    options = ("--quiet", "--output-format=concise")
    result = run_tool("ruff", "check", *options, *lint_targets(root), folder=root)
    return [f"{line}; see `ruff rule CODE`" for line in (result.stdout + result.stderr).splitlines()]


def check_format(root: Path) -> list[str]:
    "Notebooks, tests, benchmarks and these checks are formatted."
    options = ("--check", "--quiet", "--output-format=concise")
    result = run_tool("ruff", "format", *options, *lint_targets(root), folder=root)
    names = dict.fromkeys(line.split(":")[0] for line in result.stdout.splitlines())
    problems = [f"{name}: is not formatted; {REFRESH}" for name in names]
    return problems + [f"ruff format: {line}" for line in result.stderr.splitlines()]


def check_notebooks_parse(root: Path) -> list[str]:
    "Every notebook is JSON with cells; a merge conflict or half a save is not."
    problems = []
    for notebook in notebooks(root, "nbs", "pipelines"):
        try:
            code_cells(notebook)
        except (ValueError, LookupError, TypeError) as problem:
            name = notebook.relative_to(root)
            problems.append(f"{name}: is not a notebook ({problem}); restore it")
    return problems


CHECKS = (
    check_clean_and_export,
    check_module_pages,
    check_import_order,
    check_lengths,
    check_prose,
    check_links,
    check_pipelines_define_nothing,
    check_outputs,
    check_ruff,
    check_format,
)


def main(root: Path) -> int:
    "Print every problem; 0 if there is none, else 1."
    problems = check_notebooks_parse(root)  # the other checks read the notebooks
    problems = problems or [problem for check in CHECKS for problem in check(root)]
    for problem in problems:
        print(f"lint: {problem}")
    print(f"lint: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
