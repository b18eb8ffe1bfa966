"""The pages point at things that exist, and name everything that does."""

import re
from pathlib import Path

import pytest

import lora_lab
from lora_lab.launch import config
from lora_lab.settings import schema

HOME = Path(__file__).resolve().parents[1]
PAGES = [*sorted(HOME.glob("*.md")), *sorted((HOME / "docs").glob("*.md")), HOME / "multirun" / "README.md"]
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
    """Every path that the tree of docs/architecture.md has below lora_lab/."""
    text = (HOME / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = re.search(r"^lora_lab/\n(.*?)^tests/", text, re.M | re.S)[1].splitlines()
    paths, folder = set(), ""
    for line in lines:
        inner = line.startswith("    ")
        names = re.findall(r"[\w./]+", re.split(r" {3,}", line.strip())[0])
        if not inner and names[0].endswith("/"):
            folder = names[0]
        paths |= {(folder if inner else "") + name for name in names}
    return paths


def test_the_tree_of_the_architecture_is_the_tree_on_disk():
    package = Path(lora_lab.__file__).parent
    modules = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if p.name != "__init__.py"}
    folders = {f"{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert tree() == modules | folders


def test_the_tree_names_every_group_of_options():
    text = (HOME / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"(\w+)/", re.search(r"^conf/.*?^experiments/", text, re.M | re.S)[0]))
    assert {p.name for p in config.CONF.iterdir() if p.is_dir()} == shown - {"conf", "experiments"}


@pytest.mark.parametrize("stage", [name for name, keys in sorted(schema.KEYS_OF_STAGES.items()) if keys])
def test_every_key_of_a_stage_is_explained_somewhere(stage):
    said = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    for key in schema.STAGES[stage].__dataclass_fields__:
        assert re.search(rf"\bstage\.{key}\b", said), key


@pytest.mark.parametrize(
    ("group", "keys"),
    [("loss", schema.Loss), ("dataset", schema.Dataset), ("prior", schema.Prior), ("text", schema.Text)],
)
def test_every_key_of_a_group_is_explained_in_the_page_on_training(group, keys):
    said = (HOME / "docs" / "training.md").read_text(encoding="utf-8")
    for key in keys.__dataclass_fields__:
        assert f"\n| `{group}.{key}` | " in said, key


def test_every_key_of_scores_is_explained_in_their_page():
    said = (HOME / "docs" / "scores.md").read_text(encoding="utf-8")
    for key in schema.Score.__dataclass_fields__:
        assert f"\n| `score.{key}` | " in said, key
    for key in ("class_noun", "model.judge", "model.dino"):
        assert f"\n| `{key}` | " in said, key


def test_the_changelog_has_this_version():
    assert f"\n## [{lora_lab.__version__}]" in (HOME / "CHANGELOG.md").read_text(encoding="utf-8")


def test_continuous_integration_does_what_the_readme_says():
    readme = (HOME / "README.md").read_text(encoding="utf-8")
    ci = (HOME / ".ci" / "run").read_text(encoding="utf-8")
    assert '-e ".[dev]" -c constraints.txt' in ci
    developing = re.search(r"## Develop\n\n```bash\n(.*?)```", readme, re.S)[1]
    for command in developing.replace(" && ", "\n").splitlines():
        assert f"\n{command}\n" in ci
