"""The design's table of modules, enforced: who may import what, how many modules, how long."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlxlite"
# Plus __init__ and __main__. The design says 16; with files of at most 600 lines its rows gave
# others: server `connection`, api `request`, request `messages`, runner `caches`, `payloads` and
# `cpu`, scheduler `prefill`, config `flags`, text `arguments`, responses `conversations`, engine
# `embeddings`. `media` is what
# of pictures is not MLX: the design had it in `vision`, where requests could not read a source
# without loading MLX.
MAX_MODULES = 44
MAX_LINES = 600

# layer → module → what it may import beside the standard library: our modules | other packages
LAYERS: dict[int, dict[str, str]] = {
    0: {
        "flags": "|",
        "config": "flags |",
        "blocks": "| numpy",
        "sequence": "blocks |",
    },
    1: {
        "http1": "| h11",
        "api": "sequence blocks http1 | orjson",
        "fields": "api | orjson",
        "served": "sequence |",
        "faults": "|",
        "tools": "api fields served | orjson",
        "media": "api fields | h11 PIL",
        "messages": "api fields media | orjson",
        "request": "sequence api fields media messages served tools |",
        "plain": "sequence api fields http1 messages request | orjson",
        "dialects": "sequence http1 api fields media messages request served tools | orjson",
        "responses": "sequence http1 api fields messages request dialects served tools | orjson",
        "conversations": "messages |",
        "openapi": "fields request plain dialects responses | orjson",
        "arguments": "sequence | orjson",
        "text": "sequence arguments |",
        "harmony": "sequence arguments text |",
        "grammar": "sequence served | llguidance numpy",
        "prefix": "sequence blocks | numpy",
    },
    2: {
        "prefill": "sequence blocks |",
        "scheduler": "sequence blocks prefill prefix |",
        "prompts": "config sequence served blocks api media messages request plain dialects"
        " responses text harmony arguments |",
    },
    3: {
        "sampling": "sequence | mlx numpy",
        "hub": "served | huggingface_hub",
        "cpu": "| mlx mlx_lm",
        "model": "config sequence served faults grammar harmony hub cpu vision | mlx mlx_lm numpy"
        " huggingface_hub transformers jinja2",
        "vision": "sequence served | mlx mlx_lm mlx_vlm numpy PIL",
        "caches": "| mlx mlx_lm",
        "store": "sequence blocks | orjson",
        "payloads": "blocks caches store | mlx numpy",
        "runner": "sequence blocks faults sampling cpu caches payloads store vision"
        " | mlx mlx_lm numpy",
    },
    4: {
        "lane": "sequence faults |",
        "embeddings": "sequence lane |",
        "engine": "sequence blocks faults scheduler text harmony embeddings lane |",
        "connection": "sequence faults http1 api |",
        "routes": "config sequence http1 api fields messages request plain prompts dialects"
        " responses conversations openapi harmony served faults connection engine metrics |",
        "server": "config flags sequence served faults http1 api routes connection lane engine"
        " scheduler metrics |",
        "metrics": "blocks sequence |",
    },
}
ROWS = {module: row for layer in LAYERS.values() for module, row in layer.items()}
ROWS |= {"__init__": "config server __main__ |", "__main__": " ".join(ROWS) + " |"}
MAY_ASYNCIO = {*LAYERS[4], "__init__", "__main__"}
PUBLIC = {"Config": "config", "Server": "__main__"}  # what `mlxlite` itself hands out, from where

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path: Path) -> Iterator[str]:
    """The dotted name of everything a file imports, at any depth and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ("mlxlite" if node.level else None, node.module)))
            if base == "mlxlite":  # each name is a module, or the package's own
                yield from (f"mlxlite.{PUBLIC.get(alias.name, alias.name)}" for alias in node.names)
            else:
                yield base


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_what_its_row_allows(module: str) -> None:
    assert module in ROWS, f"{module} has no row in the design's table"
    ours, others = (set(half.split()) for half in ROWS[module].split("|"))
    allowed = {f"mlxlite.{name}" for name in ours} | {"mlxlite.__version__"}
    for name in imports(FILES[module]):
        package = name.partition(".")[0]
        if package == "mlxlite":
            assert name in allowed, f"{module} must not import {name}"
        elif package == "asyncio":
            assert module in MAY_ASYNCIO, f"{module} must not import asyncio: it is below layer 4"
        elif package not in sys.stdlib_module_names:
            assert package in others, f"{module} must not import {package}"


def test_the_table_itself_keeps_mlx_in_layer_3_and_points_downwards() -> None:
    level = {module: layer for layer, modules in LAYERS.items() for module in modules}
    for module, layer in level.items():
        ours, others = (half.split() for half in ROWS[module].split("|"))
        assert layer == 3 or not [package for package in others if package.startswith("mlx")]
        assert all(level[name] <= layer for name in ours)


def test_there_are_no_more_modules_than_the_cap() -> None:
    assert len(ROWS) <= MAX_MODULES + 2
    assert len(set(FILES) - {"__init__", "__main__"}) <= MAX_MODULES


@pytest.mark.parametrize("module", FILES)
def test_a_file_can_be_read_in_one_sitting(module: str) -> None:
    num_lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES


def test_the_scheduler_does_not_load_mlx() -> None:
    if "scheduler" not in FILES:
        pytest.skip("there is no scheduler yet")
    code = "import sys, mlxlite.scheduler; sys.exit('mlx' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, timeout=60)
    assert result.returncode == 0


def test_what_a_chat_does_not_need_is_imported_when_it_is_asked_for() -> None:
    code = "import sys, mlxlite.server; print(*(m for m in sys.modules if m.startswith('mlxlite')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert "mlxlite.request" in found
    assert not found & {"mlxlite.dialects", "mlxlite.responses", "mlxlite.openapi"}
