"""The READMEs: generated tables are current, links resolve, names exist, lengths are bounded."""

import ast
import re
from pathlib import Path

import pytest
from helpers import in_a_loop, serving
from tables import PACKAGE, ROOT, field_tables, shown, tables
from test_layers import ROOMS, room_of

from mlxlite.api.endpoints import ENDPOINTS

README = ROOT / "README.md"
MAX_LINES = {README: 200, PACKAGE / "README.md": 180}
PAGES = [README, *(p for top in ("bench", "mlxlite", "tests") for p in (ROOT / top).rglob("*.md"))]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("place", "table"), tables().items(), ids=[name for _, name in tables()])
def test_a_table_is_the_one_that_the_code_makes(place: tuple[Path, str], table: str) -> None:
    path, name = place
    assert shown(text_of(path), name) == table, "run python -m tests.support.tables"


def test_each_endpoint_with_a_body_has_its_table() -> None:
    headings = set(re.findall(r"^### `POST (\S+)`$", field_tables(), re.M))
    assert headings == {endpoint.path for endpoint in ENDPOINTS if endpoint.method == "POST"}


@in_a_loop
async def test_the_readme_lists_every_route_with_its_methods() -> None:
    section = text_of(README).partition("## Endpoints")[2].partition("\n## ")[0]
    listed = re.findall(r"`(GET|POST|DELETE) (/\S*)`", section)
    async with serving() as served:
        endpoints = served.server.app.endpoints
        assert set(listed) == {(endpoint.method, endpoint.path) for endpoint in endpoints}


@pytest.mark.parametrize("path", MAX_LINES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_for_newcomers_is_short(path: Path) -> None:
    assert len(text_of(path).splitlines()) <= MAX_LINES[path]


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors_of(text_of(linked)), f"{target} has no such heading"


# --- the contributor's page ---------------------------------------------------------------------


def names_in_the_package() -> set[str]:
    """Files, functions, classes, tables, and the classes' members as `Class.member`."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        names.add(path.relative_to(PACKAGE).as_posix())
        tree = ast.parse(text_of(path))
        names |= members_of(tree)
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{name}" for name in members_of(node)}
    return names


def members_of(node: ast.Module | ast.ClassDef) -> set[str]:
    members = set()
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            members.add(item.name)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            members.add(item.target.id)
    return members


@pytest.mark.parametrize(
    "section", ["The life of a request", "The life of a token", "Rules", "Five errands"]
)
def test_the_names_on_the_contributors_page_exist(section: str) -> None:
    """Commands, prefixes of names and the like have other characters, and are not looked at."""
    there_are = names_in_the_package()
    text = text_of(PACKAGE / "README.md").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    quoted = re.findall(r"`([^`]+)`", text)
    names = {name for name in quoted if re.fullmatch(r"[\w/.]*[a-zA-Z]", name)}
    assert names
    for name in names:
        exists = name in there_are or ("/" in name and (ROOT / name).is_file())
        assert exists, f"{name} does not exist"


@pytest.mark.parametrize("room", sorted(ROOMS.keys() - {"__init__"}))
def test_the_map_of_the_rooms_has_the_imports_that_the_layers_allow(room: str) -> None:
    rows = re.findall(r"^\| .*`(\w+)`.* \| .* \| (.*) \|$", text_of(PACKAGE / "README.md"), re.M)
    order = [name for name, _ in rows]
    above = set(order[: order.index(room)])
    listed = dict(rows)[room]
    if listed.startswith("all above"):
        named = above - set(listed.split()[3:])  # «but» these
    else:
        named = set(listed.replace("–", "").replace(",", "").split())
    assert named <= above, "a room imports only rooms above it"
    allowed = ROOMS[room].ours.split()
    assert allowed == ["*"] or named == {room_of(name) for name in allowed}


# --- the tables that name tests -----------------------------------------------------------------


@pytest.mark.parametrize(("section", "least"), [("Faults", 20), ("Hardening", 20)])
def test_each_row_names_tests_that_exist(section: str, least: int) -> None:
    page = text_of(ROOT / "tests" / "README.md")
    text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .* \|$", text, re.M)[2:]
    there_are = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        there_are |= set(re.findall(r"^(?:async )?def (test_\w+)", text_of(path), re.M))
    assert len(rows) > least
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named or re.search(r"`python -m (bench|tests)\.", row), row
        assert set(named) <= there_are, row
