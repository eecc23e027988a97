"""The docs agree with the code: what they name exists, and they describe every asset, reason and choice."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from scalselect_assets import ASSET_MODULES
from scalselect_assets.declaration.export_specs import FORMAT_NAMES
from scalselect_assets.method.choice.strategies import STRATEGIES
from scalselect_assets.method.representation.families import TESTED_FAMILIES
from scalselect_assets.method.representation.rejection import RejectionReason

ROOT = Path(__file__).parents[1]
PRODUCT = ROOT / "scalselect_assets"
# The changelog and the decisions also name modules of earlier releases.
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "decisions.md"),
]


def exists(name: str) -> bool:
    """Whether a path, or a module with at most one name in it, is there."""
    if "/" in name:
        return (ROOT / name).exists()
    module = ROOT.joinpath(*name.split("."))
    if module.is_dir() or module.with_suffix(".py").is_file():
        return True
    file = module.parent.with_suffix(".py")
    return file.is_file() and re.search(rf"\b{module.name}\b", file.read_text()) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(
        r"(?<![\w./])(?:scalselect_assets|tests|training|benchmarks|docs|examples)(?:/[\w/.]*\w|(?:\.(?!md\b)\w+)+)",
        page.read_text(),
    )
    assert [name for name in named if not exists(name)] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "decisions.md"], ids=lambda page: page.name)
def test_links_of_a_page_lead_to_pages_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("README.md", ASSET_MODULES),
        ("docs/data.md", RejectionReason),
        ("docs/choosing.md", STRATEGIES),
        ("docs/exports.md", FORMAT_NAMES),
    ],
    ids=["assets", "rejection reasons", "strategies", "export formats"],
)
def test_a_table_describes_each_of(page: str, names: Iterable[str]) -> None:
    first_cells = re.findall(r"^\|(?: [\da]+ \|)?([^|]+)\|", (ROOT / page).read_text(), re.MULTILINE)
    described = {word for cell in first_cells for word in re.findall(r"`(\w+)`", cell)}
    assert set(names) - described == set()


@pytest.mark.parametrize("page", ["README.md", "docs/representation.md"])
def test_every_tested_family_is_named(page: str) -> None:
    text = (ROOT / page).read_text()
    assert [name for name in TESTED_FAMILIES.values() if name not in text] == []


def test_the_readme_lists_every_folder_of_the_product() -> None:
    folders = {path.name for path in PRODUCT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    listed = re.findall(r"^  (\w+)/ ", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(folders)
