"""Every check of `make lint` accepts a sound tree and can fail."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from conftest import in_turn, module_of
from jupyter_server.services.contents.filemanager import FileContentsManager

REPOSITORY = Path(__file__).resolve().parent.parent


lint = module_of(".ci/lint.py")


def write_notebook(path: Path, *sources: str, tags: list[str] | None = None, leads_to: str = "") -> None:
    "A notebook of code cells; `tags` go to the first one, `leads_to` to the end of a page."
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    if tags:
        cells[0].metadata["tags"] = tags
    if path.name[0].isdigit():
        cells = [nbformat.v4.new_markdown_cell(f"# {path.stem}\n> A page."), *cells]
        cells.append(
            nbformat.v4.new_markdown_cell(f"**What this page promises.** Little.\n\n{leads_to}".strip())
        )
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def add_cell(root: Path, notebook: str, source: str) -> None:
    "Append a code cell, as an editor would."
    content = nbformat.read(root / notebook, as_version=4)
    content.cells.insert(
        -1 if content.cells[-1].cell_type == "markdown" else len(content.cells),
        nbformat.v4.new_code_cell(source),
    )
    nbformat.write(content, root / notebook)


@pytest.fixture(scope="module")
def sound_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Two pages, their modules, one pipeline notebook; clean and exported."
    root = tmp_path_factory.mktemp("lint") / "repository"
    root.mkdir()
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, root)
    scale = "#| export\ndef scale(\n    width: float,  # metres\n) -> float:\n    return 2 * width"
    write_notebook(
        root / "nbs" / "0_ground" / "00_first.ipynb",
        "#| default_exp ground.first",
        scale,
        "scale(2.0)",
        leads_to="Next: [more](../1_data/01_second.ipynb).",
    )
    use = "#| export\nfrom topoqa_nb.ground.first import scale\n\nDOUBLE = scale(1.0)"
    write_notebook(root / "nbs" / "1_data" / "01_second.ipynb", "#| default_exp data.second", use)
    write_notebook(
        root / "pipelines" / "flow.ipynb", "graph_dir = None", "print(graph_dir)", tags=["parameters"]
    )
    with lint.regenerated(root) as copy:
        for name in ("nbs", "pipelines", lint.PACKAGE):
            shutil.copytree(copy / name, root / name, dirs_exist_ok=True)
    return root


@pytest.fixture
def tree(sound_tree: Path, tmp_path: Path) -> Path:
    "A copy of the sound tree that a test may break."
    return Path(shutil.copytree(sound_tree, tmp_path / "repository"))


def snapshot(root: Path) -> dict[str, bytes]:
    "Every file and its bytes, but for caches."
    files = (path for path in root.rglob("*") if path.is_file() and ".ruff_cache" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@in_turn("check", lint.CHECKS)
def test_a_sound_tree_passes(check: Callable, tree: Path):
    assert check(tree) == []


def test_lint_changes_nothing_and_repeats_itself(tree: Path, capsys: pytest.CaptureFixture):
    add_cell(tree, "nbs/0_ground/00_first.ipynb", "#| export\ndef  half(width): return width / 2")
    before = snapshot(tree)
    outputs = []
    for _ in range(2):
        assert lint.main(tree) == 1
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert snapshot(tree) == before


def test_a_notebook_that_is_not_clean(tree: Path):
    page = tree / "pipelines" / "flow.ipynb"
    content = json.loads(page.read_text())
    content["cells"][1]["metadata"]["collapsed"] = True
    page.write_text(json.dumps(content))
    assert lint.check_clean_and_export(tree) == ["pipelines/flow.ipynb: is not clean; run `make export`"]


def test_cleaning_keeps_the_parameters_tag(tree: Path):
    content = nbformat.read(tree / "pipelines" / "flow.ipynb", as_version=4)
    assert content.cells[0].metadata == {"tags": ["parameters"]}


def test_a_module_edited_by_hand(tree: Path):
    with (tree / lint.PACKAGE / "ground" / "first.py").open("a") as module:
        module.write("EXTRA = 1\n")
    assert lint.check_clean_and_export(tree) == [
        "topoqa_nb/ground/first.py: differs from its page; run `make export`"
    ]


def test_a_module_that_was_never_exported(tree: Path):
    (tree / lint.PACKAGE / "data" / "second.py").unlink()
    assert lint.check_clean_and_export(tree) == [
        "topoqa_nb/data/second.py: is not exported yet; run `make export`"
    ]


def test_a_module_whose_page_is_gone(tree: Path):
    (tree / "nbs" / "1_data" / "01_second.ipynb").unlink()
    assert "topoqa_nb/data/second.py: no page exports it any more; remove it" in lint.check_clean_and_export(
        tree
    )
    (problem,) = lint.check_module_pages(tree)
    assert problem.startswith(
        "topoqa_nb/data/second.py: its page ../../nbs/1_data/01_second.ipynb does not exist"
    )


def test_a_renamed_page_leaves_its_module_out_of_date(tree: Path):
    page = tree / "nbs" / "1_data" / "01_second.ipynb"
    page.rename(page.with_name("02_second.ipynb"))
    assert (
        "topoqa_nb/data/second.py: differs from its page; run `make export`"
        in lint.check_clean_and_export(tree)
    )
    assert len(lint.check_module_pages(tree)) == 1


def test_a_module_written_by_hand(tree: Path):
    (tree / lint.PACKAGE / "shortcut.py").write_text("ANSWER = 1\n")
    (problem,) = lint.check_module_pages(tree)
    assert problem.startswith("topoqa_nb/shortcut.py: names no page")


def test_a_file_that_is_not_a_notebook(tree: Path, capsys: pytest.CaptureFixture):
    (tree / "nbs" / "1_data" / "01_second.ipynb").write_text("{\n<<<<<<< HEAD\n")
    assert lint.main(tree) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("lint: nbs/1_data/01_second.ipynb: is not a notebook")
    assert last == "lint: 1 problem"


def test_a_page_that_cannot_be_exported(tree: Path):
    add_cell(tree, "nbs/1_data/01_second.ipynb", "#| export\ndef (")
    (problem,) = lint.check_clean_and_export(tree)
    assert "nbdev_export failed" in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    "source",
    [
        "from topoqa_nb.data.second import DOUBLE",
        "from topoqa_nb.data import second",
        "import topoqa_nb.data.second as later",
        "%time scale(1.0)\nif True:\n    from topoqa_nb.data.second import DOUBLE",
        "from topoqa_nb.ground.first import scale as itself",
    ],
)
def test_a_page_that_imports_itself_or_a_later_one(tree: Path, source: str):
    add_cell(tree, "nbs/0_ground/00_first.ipynb", source)
    (problem,) = lint.check_import_order(tree)
    assert problem.startswith("nbs/0_ground/00_first.ipynb: imports ")
    assert "import only from earlier pages" in problem


def test_the_index_may_import_any_page(tree: Path):
    write_notebook(tree / "nbs" / "index.ipynb", "from topoqa_nb.data.second import DOUBLE")
    assert lint.check_import_order(tree) == []


@pytest.mark.parametrize(
    "source", ["def plot():\n    pass", "class Stage:\n    pass", "if True:\n    def plot(): ..."]
)
def test_a_definition_in_a_pipeline(tree: Path, source: str):
    add_cell(tree, "pipelines/flow.ipynb", source)
    (problem,) = lint.check_pipelines_define_nothing(tree)
    assert problem.startswith("pipelines/flow.ipynb: defines ")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (nbformat.v4.new_output("stream", name="stderr", text="Warning: old"), "stores stderr output"),
        (nbformat.v4.new_output("error", ename="E", evalue="no", traceback=["E: no"]), "stores error output"),
        (nbformat.v4.new_output("stream", name="stdout", text="saved in /tmp/x1/run"), "shows /tmp/x1/run"),
        (
            nbformat.v4.new_output("display_data", data={"text/plain": "PosixPath('/home/a/b')"}),
            "shows /home/a/b",
        ),
    ],
    ids=["warning", "error", "printed path", "displayed path"],
)
def test_an_output_that_should_not_be_stored(tree: Path, output: nbformat.NotebookNode, expected: str):
    content = nbformat.read(tree / "nbs" / "0_ground" / "00_first.ipynb", as_version=4)
    content.cells[-2].outputs = [output]
    nbformat.write(content, tree / "nbs" / "0_ground" / "00_first.ipynb")
    (problem,) = lint.check_outputs(tree)
    assert problem.startswith(f"nbs/0_ground/00_first.ipynb: {expected}")


def test_an_output_may_show_a_relative_path_or_an_address(tree: Path):
    content = nbformat.read(tree / "nbs" / "0_ground" / "00_first.ipynb", as_version=4)
    text = "runs/tmp/a https://example.org/home/x"
    content.cells[-2].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    nbformat.write(content, tree / "nbs" / "0_ground" / "00_first.ipynb")
    assert lint.check_outputs(tree) == []


@pytest.mark.parametrize("notebook", ["nbs/0_ground/00_first.ipynb", "pipelines/flow.ipynb"])
def test_a_notebook_that_breaks_a_rule(tree: Path, notebook: str):
    add_cell(tree, notebook, "import os")
    (problem,) = lint.check_ruff(tree)
    assert problem.startswith(notebook)
    assert "F401" in problem


def test_a_cell_that_does_not_parse(tree: Path):
    add_cell(tree, "nbs/0_ground/00_first.ipynb", "def (")
    assert any(problem.startswith("nbs/0_ground/00_first.ipynb") for problem in lint.check_ruff(tree))


@pytest.mark.parametrize("notebook", ["nbs/0_ground/00_first.ipynb", "pipelines/flow.ipynb"])
def test_a_notebook_that_is_not_formatted(tree: Path, notebook: str):
    add_cell(tree, notebook, "ANSWER  =  1")
    assert lint.check_format(tree) == [f"{notebook}: is not formatted; run `make export`"]


def test_pages_are_ordered_by_their_numbers(tree: Path):
    names = ["2_network/9_last", "1_data/18_a", "1_data/18a_b", "99_cli", "index"]
    for name in names:
        write_notebook(tree / "nbs" / f"{name}.ipynb", "1")
    found = [str(page.relative_to(tree / "nbs").with_suffix("")) for page in lint.notebooks(tree, "nbs")]
    assert found == ["index", "0_ground/00_first", "1_data/01_second", names[0], *names[1:4]]


def test_a_cell_and_a_page_that_are_too_long(tree: Path):
    body = "".join(f"    x{number} = {number}\n" for number in range(40))
    add_cell(tree, "nbs/0_ground/00_first.ipynb", f"#| export\ndef endless():\n{body}")
    (problem,) = lint.check_lengths(tree)
    assert problem.startswith(
        "nbs/0_ground/00_first.ipynb: def endless stands in a cell of 41 exported lines"
    )
    for number in range(11):
        add_cell(tree, "nbs/0_ground/00_first.ipynb", f"#| export\ndef short{number}():\n{body[:-20]}")
    assert "exports" in lint.check_lengths(tree)[-1] and "make two pages" in lint.check_lengths(tree)[-1]


def test_many_imports_may_stand_in_one_cell(tree: Path):
    names = ", ".join(f"name{number}" for number in range(60)).replace(", ", ",\n    ")
    add_cell(tree, "nbs/0_ground/00_first.ipynb", f"#| export\nfrom somewhere import (\n    {names}\n)")
    assert lint.check_lengths(tree) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("> A page.", "", "begins without `# Title` and `> subtitle`"),
        ("**What this page promises.**", "", "does not end with"),
        (
            "../1_data/01_second.ipynb",
            "01_second.ipynb",
            "leads to 01_second.ipynb; write `Next: [...](../1_data/01",
        ),
        ("Next: [more]", "[more]", "leads to no page"),
    ],
)
def test_a_page_without_what_every_page_has(tree: Path, old: str, new: str, expected: str):
    page = tree / "nbs" / "0_ground" / "00_first.ipynb"
    page.write_text(page.read_text().replace(old, new))
    (problem,) = lint.check_prose(tree)
    assert problem.startswith(f"nbs/0_ground/00_first.ipynb: {expected}")


def test_a_link_that_meets_nothing(tree: Path):
    page = tree / "nbs" / "0_ground" / "00_first.ipynb"
    page.write_text(
        page.read_text().replace("[more](../1_data/01_second.ipynb)", "[more](../1_data/02_gone.ipynb)")
    )
    (problem,) = lint.check_links(tree)
    assert (
        problem
        == "nbs/0_ground/00_first.ipynb: links to ../1_data/02_gone.ipynb, which does not exist; correct it"
    )


def test_a_page_that_jupyterlab_opened_and_saved_is_as_it_was(tmp_path, monkeypatch):
    "It enters its kernel's display name and the version of Python, with the marks of a cell that was run."
    pages = tmp_path / "nbs" / "0_ground"
    pages.mkdir(parents=True)
    shutil.copy(REPOSITORY / "settings.ini", tmp_path)
    page = Path(shutil.copy(REPOSITORY / "nbs" / "0_ground" / "00_core.ipynb", pages))
    monkeypatch.chdir(tmp_path / "nbs")
    (hook,) = re.findall(
        r"cd nbs && .* lab --FileContentsManager.pre_save_hook=(\S+)", (REPOSITORY / "Makefile").read_text()
    )
    manager = FileContentsManager(root_dir=str(tmp_path / "nbs"), pre_save_hook=hook)
    model = manager.get("0_ground/00_core.ipynb")
    model["content"]["metadata"]["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    model["content"]["metadata"]["language_info"] = {"name": "python", "version": "3.11.7"}
    for cell in model["content"]["cells"]:
        cell["metadata"]["trusted"] = True
    before = page.read_bytes()
    manager.save(model, "0_ground/00_core.ipynb")
    assert page.read_bytes() == before
