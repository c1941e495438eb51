"""The book follows from the pages: their order, titles, formulas and links, and an index of what they export."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import module_of

REPOSITORY = Path(__file__).resolve().parent.parent


hooks = module_of("docs/hooks.py")


def written(formula: str, on_its_own_line: bool) -> str:
    "A formula as a tag that a test can read."
    return (
        f"<{'block' if on_its_own_line else 'inline'}>{formula}</{'block' if on_its_own_line else 'inline'}>"
    )


def write_page(root: Path, name: str, title: str, module: str = "") -> None:
    "A notebook with a title, and the module that it exports."
    cells = [nbformat.v4.new_markdown_cell(f"# {title}\n> A page.")]
    if module:
        cells.append(nbformat.v4.new_code_cell(f"#| default_exp {module}"))
    path = root / "nbs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    "Pages with numbers that do not sort as text, and one module."
    write_page(tmp_path, "99_cli.ipynb", "The command line")
    write_page(tmp_path, "1_data/18a_demo.ipynb", "Demo")
    write_page(tmp_path, "1_data/18_complexes.ipynb", "Complexes")
    write_page(tmp_path, "9_from_files/91_atoms.ipynb", "Atoms", "from_files.atoms")
    write_page(tmp_path, "index.ipynb", "Start")
    module = tmp_path / "topoqa_nb" / "from_files" / "atoms.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        'class Atom:\n    "A point | with a name.\\n\\nMore."\n    def move(self): ...\n\n'
        'def _read(): ...\n\nasync def read():\n    "Read `atoms`."\n\nLIMIT = 1\n'
    )
    return tmp_path


def test_the_order_and_the_titles_follow_from_folders_and_pages(tree: Path):
    assert hooks.navigation(tree) == [
        {"Start": "index.ipynb"},
        {"1 Data": [{"Complexes": "1_data/18_complexes.ipynb"}, {"Demo": "1_data/18a_demo.ipynb"}]},
        {"9 From files": [{"Atoms": "9_from_files/91_atoms.ipynb"}]},
        {"The command line": "99_cli.ipynb"},
        {"API": "api.md"},
    ]


def test_the_book_holds_every_page_once():
    files = []
    for entry in hooks.navigation(REPOSITORY):
        for found in entry.values():
            files += [found] if isinstance(found, str) else [file for page in found for file in page.values()]
    pages = [
        path.relative_to(REPOSITORY / "nbs").as_posix() for path in (REPOSITORY / "nbs").rglob("*.ipynb")
    ]
    assert files[0] == "index.ipynb"
    assert sorted(files) == sorted([*pages, "api.md"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width $H$, heads $K$", "width <inline>H</inline>, heads <inline>K</inline>"),
        ("so:\n$$a\n= b$$", "so:\n<block>a\n= b</block>"),
        ("for $5 or 1 < 2", "for $5 or 1 &lt; 2"),
        ("$$", "$$"),
    ],
)
def test_formulas_are_told_from_text(text: str, expected: str):
    assert hooks.with_formulas(text, written) == expected


def test_every_formula_of_the_pages_becomes_mathml():
    pytest.importorskip("latex2mathml", reason="latex2mathml comes with the extra `docs`")
    formulas = []
    for page in hooks.lint.notebooks(REPOSITORY, "nbs"):
        for cell in nbformat.read(page, as_version=4).cells:
            if cell.cell_type == "markdown":
                prose = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.DOTALL)
                hooks.with_formulas(prose, lambda *found: formulas.append(found) or "")
    assert any(on_its_own_line for _, on_its_own_line in formulas)
    for formula, on_its_own_line in formulas:
        mathml = hooks._to_mathml(formula, on_its_own_line)
        assert mathml.startswith("<math") and "\\" not in mathml, formula


CELL = '<div class="jp-Cell">{}</div>'
CODE = '<div class="highlight-ipynb hl-python"><pre><span></span>{}</pre></div><div class="copy">copy</div>'
PROSE = '<div class="jp-MarkdownOutput">{}</div>'
OUTPUT = '<div class="jp-OutputArea-output"><pre>{}</pre></div>'


def tidied(*cells: str, anchors: dict[str, str] | None = None) -> str:
    "The cells in what mkdocs-jupyter puts around them, tidied."
    notebook = "".join(CELL.format(cell) for cell in cells)
    page = f'<style>a</style><script src="https://x.org"></script><div class="jp-Notebook">{notebook}</div><style>b</style>'
    return hooks.tidy(page, anchors or {}, written)


def test_a_page_keeps_prose_code_and_outputs_alone():
    shown = tidied(PROSE.format("<p>Why.</p>"), CODE.format("x") + OUTPUT.format("42"))
    assert shown.split("\n") == [
        "<p>Why.</p>",
        '<div class="highlight"><pre><code><span></span>x</code></pre></div>',
        '<div class="output"><pre>42</pre></div>',
    ]


@pytest.mark.parametrize("directive", hooks.HIDDEN)
def test_cells_for_the_machine_are_left_out(directive: str):
    assert tidied(CODE.format(f'<span class="c1">{directive} x</span>') + OUTPUT.format("1")) == ""


def test_dollars_in_code_and_outputs_are_no_formulas():
    kept = "<code>$a$</code>", CODE.format("'$a$'"), OUTPUT.format("$a$")
    shown = tidied(PROSE.format(f"{kept[0]} $b$"), kept[1] + kept[2])
    assert shown.count("$a$") == 3
    assert "<inline>b</inline>" in shown


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("../1_data/13_store.ipynb", "../1_data/13_store.html"),
        ("13_store.ipynb#open", "13_store.html#open"),
        ("https://example.org/a.ipynb", "https://example.org/a.ipynb"),
        ("#here", "#here"),
    ],
)
def test_links_between_notebooks_are_links_between_pages(target: str, expected: str):
    assert f'href="{expected}"' in tidied(PROSE.format(f'<a href="{target}">there</a>'))


def test_the_definition_of_a_public_name_can_be_linked_to():
    indented = '    <span class="k">def</span><span class="w"> </span><span class="nf">read</span>'
    code = f"\n{indented}\n{indented.strip()}(\n{indented.strip()}("
    shown = tidied(CODE.format(code), anchors={"read": "topoqa_nb.read"})
    assert shown.count("<a ") == 1
    assert f'{indented}\n<a id="topoqa_nb.read"></a><span class="k">def' in shown


def test_the_index_lists_what_is_public(tree: Path):
    text = hooks.api_index(tree)
    assert "## 9 From files" in text
    assert "### [topoqa_nb.from_files.atoms](9_from_files/91_atoms.ipynb)" in text
    assert [line for line in text.splitlines() if line.startswith("| [")] == [
        "| [`Atom`](9_from_files/91_atoms.ipynb#topoqa_nb.from_files.atoms.Atom) | A point \\| with a name. |",
        "| [`read`](9_from_files/91_atoms.ipynb#topoqa_nb.from_files.atoms.read) | Read `atoms`. |",
    ]


def test_every_public_name_has_a_summary():
    for _, offered in hooks.api(REPOSITORY).values():
        assert [one.anchor for one in offered if not one.summary] == []


@pytest.fixture
def site(tmp_path: Path) -> Path:
    "Two built pages that link to each other."
    (tmp_path / "data").mkdir()
    (tmp_path / "book.css").touch()
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="book.css"><a href="data/store.html#open">x</a><a href="https://x.org">x</a>'
    )
    (tmp_path / "data" / "store.html").write_text(
        '<p id="open"><a href="..">x</a><a href="/index.html">x</a></p>'
    )
    return tmp_path


def test_links_that_meet_something_are_no_problem(site: Path):
    assert hooks.link_problems(site) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("store.html#open", "stores.html", "leads to data/stores.html, which does not exist"),
        ("store.html#open", "store.html#shut", "leads to data/store.html#shut, which does not exist"),
        ('href="book.css"', 'href="style.css"', "leads to style.css, which does not exist"),
        ('href="book.css"', 'href="https://x.org/a.css"', "loads https://x.org/a.css from the network"),
        ('href="book.css"', 'href="//x.org/a.css"', "loads //x.org/a.css from the network"),
    ],
)
def test_links_that_meet_nothing_are_named(site: Path, old: str, new: str, expected: str):
    page = site / "index.html"
    page.write_text(page.read_text().replace(old, new))
    (problem,) = hooks.link_problems(site)
    assert problem.startswith(f"index.html: {expected}")


def build(tree: Path) -> subprocess.CompletedProcess:
    "What `make docs` runs, in a tree with pages of its own."
    pytest.importorskip(
        "mkdocs_jupyter", reason="mkdocs comes with the extra `docs`; `make docs` installs it"
    )
    shutil.copy(REPOSITORY / "mkdocs.yml", tree)
    for folder in ("docs", ".ci"):
        shutil.copytree(REPOSITORY / folder, tree / folder)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def add_cells(page: Path, *cells: nbformat.NotebookNode) -> None:
    "Append cells, as an editor would."
    content = nbformat.read(page, as_version=4)
    content.cells.extend(cells)
    nbformat.write(content, page)


def test_a_book_is_built_with_formulas_outputs_and_search(tree: Path):
    picture = nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    add_cells(
        tree / "nbs" / "9_from_files" / "91_atoms.ipynb",
        nbformat.v4.new_markdown_cell("## Atoms\nA mass $m$; see [the demo](../1_data/18a_demo.ipynb)."),
        nbformat.v4.new_code_cell("class Atom: ...\n\n\nasync def read(): ...", outputs=[picture]),
    )
    built = build(tree)
    assert built.returncode == 0, built.stderr
    shown = (tree / "_docs" / "9_from_files" / "91_atoms.html").read_text()
    for part in (
        'id="atoms_1"',
        "<math",
        "../1_data/18a_demo.html",
        "data:image/png",
        'id="topoqa_nb.from_files',
    ):
        assert part in shown
    assert "from_files.atoms.Atom" in (tree / "_docs" / "api.html").read_text()
    assert "mass" in (tree / "_docs" / "search" / "search_index.js").read_text()


def test_a_dead_link_fails_the_build(tree: Path):
    link = nbformat.v4.new_markdown_cell("[there](9_from_files/92_gone.ipynb)")
    add_cells(tree / "nbs" / "index.ipynb", link)
    (tree / "topoqa_nb" / "from_files" / "atoms.py").write_text("")  # its names stand on no page here
    built = build(tree)
    assert built.returncode == 1
    assert "index.html: leads to 9_from_files/92_gone.html, which does not exist" in built.stderr
    assert "Aborted with 1 warnings" in built.stdout
