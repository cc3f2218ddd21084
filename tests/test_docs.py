"""The README and the docs: their Python runs, each page's blocks in order and in one namespace; the links, files and
commands that they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Page -> its blocks of Python, each with the output that the page shows for it ("It prints:"), or with "".
BLOCKS = {
    page.name: re.findall(r"```python\n(.*?)```(?:\n\nIt prints:\n\n```\n(.*?)```)?", page.read_text(), re.DOTALL)
    for page in PAGES
}
PACKAGES = "vlm_jax|interventions|eval|train"
FILE = rf"(?<![\w/.-])(?:{PACKAGES}|tests|docs|benchmarks|tpu_scripts|examples)/[\w./-]*\w"
COMMAND = rf"python -m ((?:{PACKAGES})[\w.]*)"


def every_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)(test)


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_python_blocks_run(page, capsys):
    namespace: dict = {}
    for block, output in BLOCKS[page]:
        capsys.readouterr()
        exec(compile(block, page, "exec"), namespace)
        assert not output or capsys.readouterr().out == output
    assert set(namespace) > {"__builtins__"}


@every_page
def test_links_and_figures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} points at {target}, which is not there"


@every_page
def test_links_within_a_page_have_a_heading(page):
    """GitHub's anchors: lower case, punctuation dropped, a hyphen for each space."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


@every_page
def test_named_files_exist(page):
    named = set(re.findall(FILE, page.read_text()))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@every_page
def test_named_commands_exist(page):
    """A file that runs, or a room with a ``__main__.py``."""
    for name in set(re.findall(COMMAND, page.read_text())):
        path = ROOT / name.replace(".", "/")
        assert (path / "__main__.py").exists() or "__main__" in path.with_suffix(".py").read_text(), name


def test_patterns_find_what_they_should():
    assert [bool(output) for _, output in BLOCKS["README.md"]] == [True]
    text = "`train/loop.py`, (tests/test_docs.py) but runs/eval/x.json; `python -m train.lora --k 2`; python -m pytest"
    assert re.findall(FILE, text) == ["train/loop.py", "tests/test_docs.py"]
    assert re.findall(COMMAND, text) == ["train.lora"]
