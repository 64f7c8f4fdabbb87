"""The README's tables are the code's own, and its routes are the ones there are."""

import re
from pathlib import Path

import pytest
from helpers import in_a_loop, serving
from tables import flag_table

from mlxlite.api.endpoints import chat_completions, completions, embeddings
from mlxlite.api.fields import markdown

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("flags", flag_table()),
        ("fields", markdown(chat_completions.FIELDS)),
        ("completion-fields", markdown(completions.FIELDS)),
        ("embedding-fields", markdown(embeddings.FIELDS)),
    ],
)
def test_a_table_in_the_readme_is_the_one_the_code_makes(name: str, table: str) -> None:
    shown = README.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    assert shown.strip() == table.strip()


@in_a_loop
async def test_the_readme_lists_every_route_with_its_methods() -> None:
    section = README.partition("## Endpoints")[2].partition("<details>")[0]
    shown = re.findall(r"`(GET|POST|DELETE) (/\S+)`", section)
    async with serving() as served:
        endpoints = served.server.app.endpoints
        assert set(shown) == {(endpoint.method, endpoint.path) for endpoint in endpoints}


@pytest.mark.parametrize(("section", "least"), [("Faults", 20), ("Hardening", 20)])
def test_each_row_in_the_readme_names_tests_that_there_are(section: str, least: int) -> None:
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .* \|$", text, re.M)[2:]
    there_are = set()
    for path in Path(__file__).parent.rglob("test_*.py"):
        there_are |= set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text("utf-8"), re.M))
    assert len(rows) > least
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named or "`python -m tests.robustness." in row, row
        assert set(named) <= there_are, row
