"""The pages point at things that exist, and name everything that does."""

import ast
import re
from pathlib import Path

import pytest

import lora_lab
from lora_lab.launch import config, docs
from lora_lab.settings.schema import values_of
from lora_lab.settings.stages import STAGES

HOME = Path(__file__).resolve().parents[1]
ARCHITECTURE = HOME / "docs" / "architecture.md"
PAGES = [*sorted(HOME.glob("*.md")), *sorted((HOME / "docs").rglob("*.md")), HOME / "multirun" / "README.md"]
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]+)\)")
# What a page calls by its place in the repository: `conf/optimizer`, `tests/stages/test_check.py`, ...
PLACE = re.compile(r"`((?:lora_lab|conf|tests|docs|multirun)/[\w./-]+)`")


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(HOME).as_posix())
def test_what_a_page_points_at_is_there(page):
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"
    for place in PLACE.findall(text):
        assert (HOME / place).exists(), f"{page.name} names {place}"


def tree() -> set[str]:
    """Every path that the tree of docs/architecture.md has below lora_lab/, by two more spaces for each folder."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    lines = re.search(r"^lora_lab/\n(.*?)^tests/", text, re.M | re.S)[1].splitlines()
    paths, folders = set(), []
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        name, meaning = re.fullmatch(r" +([\w./]+)(?: {2,}(\S.*))?", line).groups()
        assert depth <= len(folders) and (meaning or name.endswith("/")), line
        folders = folders[:depth]
        assert "".join(folders) + name not in paths, line
        paths.add("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_the_tree_of_the_architecture_is_the_tree_on_disk():
    package = Path(lora_lab.__file__).parent
    modules = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if p.name != "__init__.py"}
    folders = {f"{p.parent.relative_to(package).as_posix()}/" for p in package.glob("*/**/__init__.py")}
    assert tree() == modules | folders


def test_every_decision_is_in_the_table_of_decisions():
    folder = HOME / "docs" / "decisions"
    linked = set(LINK.findall((folder / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in folder.glob("*.md")} - {"README.md"} <= linked


def defined_names(source: str) -> set[str]:
    """The functions and classes of a module, and the methods and fields of its classes as Class.name."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            names |= {f"{node.name}.{inner.name}"} if isinstance(inner, ast.FunctionDef) else set()
    return names


def test_the_architecture_names_functions_where_they_are_defined():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    package = Path(lora_lab.__file__).parent
    pairs = re.findall(r"`([\w.]+)`\s\(`([\w/]+\.py)`\)", text)
    assert len(pairs) > 30
    for name, file in pairs:
        assert name in defined_names((package / file).read_text(encoding="utf-8")), f"{name} is not in {file}"


def test_the_questions_of_the_architecture_name_files_that_define_the_answers():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    package = Path(lora_lab.__file__).parent
    rows = re.findall(r"^\| ([^|]*\?) \| ([^|]*) \| ([^|]*) \|$", text, re.M)
    assert len(rows) > 20
    everything = set().union(*(defined_names(p.read_text(encoding="utf-8")) for p in package.rglob("*.py")))
    for question, files, names in rows:
        paths = [package / file for file in re.findall(r"`([\w/]+\.py|\w+/)`", files)]
        assert paths and all(path.exists() for path in paths), question
        for name in re.findall(r"`([A-Za-z][\w.]*)`", names):
            assert name in everything, f"{question} {name}"
        sources = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
        first = re.search(r"`([A-Za-z][\w.]*)`", names)[1]
        assert any(first in defined_names(source) for source in sources) or paths[0].is_dir(), question


def test_the_tree_names_every_group_of_options():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    shown = set(re.findall(r"(\w+)/", re.search(r"^conf/.*?^experiments/", text, re.M | re.S)[0]))
    assert {p.name for p in config.CONF.iterdir() if p.is_dir()} == shown - {"conf", "experiments"}


def test_the_page_of_settings_is_up_to_date():
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(), "write it again: python -m lora_lab.launch.docs"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_every_key_of_a_configuration_has_a_row_in_the_page_of_settings(composed, stage):
    needed = {"img2img": ["stage.photo=me.jpg"], "compare": ["stage.folder=multirun/1"]}
    rows = set(re.findall(r"^\| `([\w.]+)` \| ", docs.PAGE.read_text(encoding="utf-8"), re.M))
    keys = {value.key for value in values_of(composed(f"stage={stage}", *needed.get(stage, [])))}
    keys = {re.sub(r"^stage\.(train|img2img)\.", "stage.", key) for key in keys if not key.endswith("kind")}
    # targets= gives target_modules; the keys of a scheduler are diffusers' own
    open_keys = {"adapter.target_modules", *(key for key in keys if key.startswith("sampler.scheduler."))}
    assert len(keys) > 90 and keys - open_keys <= rows


def slow_tests(file: Path) -> set[bool]:
    """Whether the tests of a file are slow: of each, or of its cases, one answer."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if any(re.match(r"pytestmark = .*pytest\.mark\.slow", ast.unparse(node)) for node in tree.body):
        return {True}
    answers = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            slow = "pytest.mark.slow" in marks
            answers |= {True, False} if not slow and "pytest.mark.slow" in " ".join(marks) else {slow}
    return answers


def test_the_promises_say_which_tests_are_slow():
    rows = re.findall(r"^\| .*", (HOME / "docs" / "reliability.md").read_text(encoding="utf-8"), re.M)
    named = [match for row in rows for match in re.findall(r"`([\w/]*test_\w+\.py)`(?: \((slow in part|slow))?", row)]
    marks = {(True,): "slow", (False,): "", (False, True): "slow in part"}
    assert len(named) > 30
    for file, mark in named:
        assert mark == marks[tuple(sorted(slow_tests(HOME / "tests" / file)))], file


def test_the_changelog_has_this_version():
    assert f"\n## [{lora_lab.__version__}]" in (HOME / "CHANGELOG.md").read_text(encoding="utf-8")


def test_continuous_integration_does_what_the_readme_says():
    readme = (HOME / "README.md").read_text(encoding="utf-8")
    ci = (HOME / ".ci" / "run").read_text(encoding="utf-8")
    assert '-e ".[dev]" -c constraints.txt' in ci
    developing = re.search(r"## Develop\n\n```bash\n(.*?)```", readme, re.S)[1]
    for command in developing.replace(" && ", "\n").splitlines():
        assert f"\n{command}\n" in ci
