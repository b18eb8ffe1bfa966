"""The pages point at things that exist, and name everything that does."""

import re
from pathlib import Path

import pytest

import lora_lab
from lora_lab.launch import config, docs
from lora_lab.settings.decides import values_of
from lora_lab.settings.stages import STAGES

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


def test_the_changelog_has_this_version():
    assert f"\n## [{lora_lab.__version__}]" in (HOME / "CHANGELOG.md").read_text(encoding="utf-8")


def test_continuous_integration_does_what_the_readme_says():
    readme = (HOME / "README.md").read_text(encoding="utf-8")
    ci = (HOME / ".ci" / "run").read_text(encoding="utf-8")
    assert '-e ".[dev]" -c constraints.txt' in ci
    developing = re.search(r"## Develop\n\n```bash\n(.*?)```", readme, re.S)[1]
    for command in developing.replace(" && ", "\n").splitlines():
        assert f"\n{command}\n" in ci
