"""What mkdocs asks while it builds the book: the navigation, each page as the book shows it, the index of the API.

The order of reading and the page of each module are known to `.ci/lint.py` and taken from there. Only the functions
at the end, which mkdocs calls by their names, need mkdocs.
"""

import ast
import importlib.util
import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from html import escape
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag

ROOT = Path(__file__).resolve().parent.parent
API_PAGE = "api.md"
HIDDEN = ("#| hide", "#| default_exp")  # cells for the machine, not for the reader
log = logging.getLogger("mkdocs.hooks.book")  # below `mkdocs`, so that `--strict` counts its warnings


def _load_lint() -> ModuleType:
    "The checks of the house; their folder is not a package."
    spec = importlib.util.spec_from_file_location("house_lint", ROOT / ".ci" / "lint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lint = _load_lint()


# The navigation: chapters are folders, pages are files, and both are numbered


def chapter_title(folder: str) -> str:
    "`1_data` becomes `1 Data`."
    number, _, name = folder.partition("_")
    return f"{number} {name.replace('_', ' ').capitalize()}"


def page_title(page: Path) -> str:
    "The first heading of a notebook, or its name."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found = re.search(r"^# (.+)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else page.stem


def navigation(root: Path) -> list[dict]:
    "Titles and files in the order of reading: index, chapters, pages outside chapters, API."
    pages, tree = lint.notebooks(root, "nbs"), []
    for folder, group in groupby(pages, key=lambda page: page.parent.relative_to(root / "nbs")):
        entries = [{page_title(page): page.relative_to(root / "nbs").as_posix()} for page in group]
        tree += [{chapter_title(folder.name): entries}] if folder.name else entries
    return [*tree, {"API": API_PAGE}]


# A page, as the book shows it


def tidy(
    page: str,  # what mkdocs-jupyter made of a notebook
    anchors: dict[str, str],  # public name that the page exports -> id of its definition
    to_mathml: Callable[[str, bool], str],  # formula and whether it has a line of its own -> MathML
) -> str:
    "Prose, code and stored outputs alone; styles, scripts and buttons of JupyterLab stay behind."
    parts, soup = [], BeautifulSoup(page, "html.parser")
    _tell_headings_apart(soup)
    for cell in soup.select(".jp-Notebook > .jp-Cell"):
        code = cell.select_one(".highlight-ipynb")
        if code and code.get_text().lstrip().startswith(HIDDEN):
            continue
        for part in cell.select(".jp-MarkdownOutput, .highlight-ipynb, .jp-OutputArea-output"):
            parts.append(_shown(part, anchors, to_mathml))
    return "\n".join(parts)


def _tell_headings_apart(soup: BeautifulSoup) -> None:
    "Headings with the same words get the ids that the table of contents expects: `x`, `x_1`, `x_2`."
    seen = Counter()
    for link in soup.select(".jp-MarkdownOutput .anchor-link"):
        name = link.parent["id"]
        if seen[name]:
            link.parent["id"] = f"{name}_{seen[name]}"
            link["href"] = f"#{link.parent['id']}"
        seen[name] += 1


def _shown(part: Tag, anchors: dict[str, str], to_mathml: Callable[[str, bool], str]) -> str:
    "One piece of a cell, in the classes of the theme."
    if "highlight-ipynb" in part["class"]:
        return f'<div class="highlight"><pre><code>{with_anchors(part.pre.decode_contents(), anchors)}</code></pre></div>'
    if "jp-OutputArea-output" in part["class"]:
        return f'<div class="output">{part.decode_contents()}</div>'
    for link in part.select("a[href]"):
        link["href"] = book_link(link["href"])
        if "anchor-link" in link.get("class", []):
            link["class"] = "headerlink"  # which the theme shows where the mouse is
    for text in part.find_all(string=re.compile(r"\$")):
        if not text.find_parent(["code", "pre"]):
            text.replace_with(BeautifulSoup(with_formulas(str(text), to_mathml), "html.parser"))
    return part.decode_contents()


def book_link(target: str) -> str:
    "Where a link between notebooks leads in the book."
    return target if "://" in target else re.sub(r"\.ipynb(?=#|$)", ".html", target)


def with_formulas(text: str, to_mathml: Callable[[str, bool], str]) -> str:
    "HTML of a text with `$...$` and `$$...$$` as MathML, which browsers draw without any script."
    pieces = re.split(r"(\$\$.+?\$\$|\$[^$]+\$)", text, flags=re.DOTALL)
    for at, piece in enumerate(pieces):
        formula = piece.strip("$")
        pieces[at] = to_mathml(formula, piece.startswith("$$")) if at % 2 else escape(piece, quote=False)
    return "".join(pieces)


def with_anchors(
    code: str,  # highlighted
    anchors: dict[str, str],  # name -> id
) -> str:
    "The code with an id at the definition of each name, which the index of the API links to."
    keyword = '<span class="k">(?:async|def|class)</span>(?:<span class="w"> </span>| )'
    for name, anchor in anchors.items():  # the theme hides an empty `a` in code; other ids break its lines
        begins = rf'^((?:<span></span>)?)((?:{keyword})+<span class="n[fc]">{name}<)'
        code = re.sub(begins, rf'\1<a id="{anchor}"></a>\2', code, count=1, flags=re.MULTILINE)
    return code


# The index of the API


class Definition(NamedTuple):
    "A public function or class."

    name: str
    anchor: str  # its dotted name; the id of its definition on the page
    summary: str  # the first line of its docstring


def definitions(
    module: Path,  # a file of the package
    dotted: str,  # its dotted name
) -> list[Definition]:
    "What a module offers, in the order of its page."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in ast.parse(module.read_text(encoding="utf-8")).body if isinstance(node, kinds)]
    return [
        Definition(node.name, f"{dotted}.{node.name}", (ast.get_docstring(node) or "").partition("\n")[0])
        for node in nodes
        if not node.name.startswith("_")
    ]


@lru_cache
def api(root: Path) -> dict[Path, tuple[str, list[Definition]]]:
    "Page -> the dotted name of its module and what it offers, in the order of reading."
    found = {}
    for name, page in lint.exported_modules(root).items():
        module, dotted = root / lint.PACKAGE / f"{name.replace('.', '/')}.py", f"{lint.PACKAGE}.{name}"
        found[page.relative_to(root / "nbs")] = (dotted, definitions(module, dotted))
    return found


def api_index(root: Path) -> str:
    "The page that lists every public name below the page that exports it."
    lines = [
        "# API",
        "",
        "Every public function and class, with the page that defines, shows and tests it.",
        "",
    ]
    for folder, pages in groupby(api(root).items(), key=lambda entry: entry[0].parent):
        lines += [f"## {chapter_title(folder.name) if folder.name else 'Outside chapters'}", ""]
        for page, (dotted, offered) in pages:
            lines += [f"### [{dotted}]({page.as_posix()})", ""]
            lines += _table(
                [(f"[`{one.name}`]({page.as_posix()}#{one.anchor})", one.summary) for one in offered]
            )
    return "\n".join(lines)


def _table(rows: list[tuple[str, str]]) -> list[str]:
    "Rows of names and summaries in Markdown; nothing when there are none."
    lines = [f"| {name} | {summary.replace('|', chr(92) + '|')} |" for name, summary in rows]
    return ["| name | what it is |", "|---|---|", *lines, ""] if lines else []


# Links of the built book


class _Links(HTMLParser):
    "Collects where a page can be entered, where it leads and what it loads."

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.leads_to, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]):
        found = dict(attributes)
        self.ids |= {found.get("id"), found.get("name")} - {None}
        target = found.get("src") or found.get("href")
        if target and not target.startswith("data:"):
            (self.leads_to if tag == "a" else self.loads).append(target)


def link_problems(site: Path) -> list[str]:
    "Links of the built pages that meet nothing, and files that a reader without a network would miss."
    site, problems = site.resolve(), []
    pages = {page: _Links(page.read_text(encoding="utf-8")) for page in sorted(site.rglob("*.html"))}
    for page, links in pages.items():
        name = page.relative_to(site)
        problems += [
            f"{name}: loads {target} from the network; bring it along"
            for target in links.loads
            if urlsplit(target).netloc
        ]
        for target in dict.fromkeys(links.leads_to + links.loads):
            if not _is_met(target, page, site, pages):
                problems.append(f"{name}: leads to {target}, which does not exist; correct the link")
    return problems


def _is_met(target: str, page: Path, site: Path, pages: dict[Path, _Links]) -> bool:
    "Whether a link out of the book, to a file of it, or to a place on a page meets something."
    scheme, netloc, path, _, fragment = urlsplit(target)
    if scheme or netloc:
        return True  # checked by nobody here: the build needs no network
    folder = site if path.startswith("/") else page.parent
    file = (folder / unquote(path).lstrip("/")).resolve() if path else page
    file = file / "index.html" if file.is_dir() else file
    return file.is_file() and (not fragment or file not in pages or unquote(fragment) in pages[file].ids)


# What mkdocs calls


def on_config(config):
    "The navigation follows from the folders."
    api.cache_clear()  # `mkdocs serve` builds again and again
    logging.getLogger("mkdocs.mkdocs-jupyter").setLevel(logging.WARNING)  # else it says a line for each page
    config.nav = navigation(ROOT)
    return config


def on_files(files, config):
    "The index of the API is a page without a file."
    from mkdocs.structure.files import File

    files.append(File.generated(config, API_PAGE, content=api_index(ROOT)))
    return files


def on_page_content(content, page, config, files):
    "Pages from notebooks are tidied."
    if not page.file.src_uri.endswith(".ipynb"):
        return content
    _, offered = api(ROOT).get(Path(page.file.src_uri), ("", []))
    return tidy(content, {one.name: one.anchor for one in offered}, _to_mathml)


def _to_mathml(formula: str, on_its_own_line: bool) -> str:
    "A formula in LaTeX as MathML."
    from latex2mathml.converter import convert

    return convert(formula, display="block" if on_its_own_line else "inline")


def on_post_build(config):
    "A dead link is a warning, and `--strict` fails at warnings."
    for problem in link_problems(Path(config.site_dir)):
        log.warning(problem)
