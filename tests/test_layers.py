"""The house, enforced: which room may import which, and how large its parts may be.

One row a room. `others` are packages beside the standard library; `asyncio` is listed like one. A
room's own files may import one another; only what `WITHIN` lists narrows that.
"""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlxlite"


@dataclass(frozen=True)
class Row:
    """Rooms, or single files of rooms, that one room may import, and packages."""

    ours: str = ""
    others: str = ""


ROOMS = {
    "errors": Row(),
    "wanted": Row(),
    "config": Row(),
    "http": Row("errors", "h11 asyncio orjson"),
    "prefix_cache": Row("", "numpy orjson safetensors"),
    "engine": Row("prefix_cache errors", "asyncio"),
    "metrics": Row("engine.sequence engine.step prefix_cache.operations"),
    "output": Row(
        "engine.sequence engine.step engine.sampling_params errors", "orjson numpy llguidance"
    ),
    "runner": Row(
        "engine.sequence engine.step engine.sampling_params engine.memory"
        " prefix_cache.operations prefix_cache.disk errors",
        "mlx mlx_lm numpy",
    ),
    "vision": Row("engine.sequence wanted", "h11 mlx mlx_lm mlx_vlm numpy PIL"),
    "models": Row(
        "config engine.sequence engine.sampling_params output vision errors wanted",
        "mlx mlx_lm numpy transformers jinja2 huggingface_hub",
    ),
    "api": Row(
        "config http engine output prefix_cache.hashing prefix_cache.operations"
        " models.interface vision.images vision.fetch metrics errors wanted",
        "orjson asyncio",
    ),
    "server": Row("* ", "asyncio"),
    "__main__": Row("server config", "asyncio"),
    "__init__": Row("server config"),
}

# Files with rules of their own, beside their room's row: what they may not import after all.
MLX_ONLY_IN = ("runner", "models.load", "vision.network")
ENGINE_ONLY_IN = ("api", "server", "engine")  # `engine.engine`: the tick itself
RUNNER_ONLY_IN = ("server", "runner")
ASYNCIO_IN_ENGINE = ("engine.engine", "engine.device_thread", "engine.embeddings")
MAX_LINES, MAX_MEDIAN_LINES, MAX_CLASS = 600, 200, 250
MAX_MEDIAN_FUNCTION, MAX_P95_FUNCTION = 8, 40
MAX_ENTRIES = 16  # of mlxlite/, the typing marker and the README aside
PUBLIC = {"Config": "config", "Server": "server"}  # what `mlxlite` itself exports, from where

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(module: str) -> Iterator[str]:
    """The dotted name of everything a file imports, at any depth and under TYPE_CHECKING too."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative name"
            base = node.module or ""
            for alias in node.names:
                name = PUBLIC.get(alias.name, alias.name) if base == "mlxlite" else alias.name
                inner = f"{base}.{name}"
                yield inner if inner.removeprefix("mlxlite.") in FILES else base


def room_of(module: str) -> str:
    return module.partition(".")[0]


def is_within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def violations(module: str) -> Iterator[str]:
    """The imports of a file that its room's row does not allow."""
    row = ROOMS[room_of(module)]
    ours = tuple(row.ours.split())
    for name in imports(module):
        package, _, inner = name.partition(".")
        if package == "mlxlite":
            if inner in ("", "__version__") or room_of(inner) == room_of(module) or ours == ("*",):
                continue
            if not is_within(inner.removesuffix(".__init__"), ours):
                yield f"{module} → {inner}"
        elif package == "asyncio" or package not in sys.stdlib_module_names:
            yield from () if package in row.others.split() else (f"{module} → {package}",)


def test_files_import_only_what_the_rows_of_their_rooms_allow() -> None:
    assert {arrow for module in FILES for arrow in violations(module)} == set()


@pytest.mark.parametrize("module", FILES)
def test_mlx_the_engine_and_the_runner_are_imported_only_where_they_belong(module: str) -> None:
    names = set(imports(module))
    if {name.partition(".")[0] for name in names} & {"mlx", "mlx_lm", "mlx_vlm"}:
        assert is_within(module, MLX_ONLY_IN)
    if "mlxlite.engine.engine" in names:
        assert is_within(module, ENGINE_ONLY_IN)
    if any(is_within(name, ("mlxlite.runner",)) for name in names):
        assert is_within(module, RUNNER_ONLY_IN)
    if "asyncio" in names and room_of(module) == "engine":
        assert module in ASYNCIO_IN_ENGINE


def test_endpoints_never_import_one_another() -> None:
    for module in FILES:
        if module.startswith("api.endpoints.") and not module.endswith("__init__"):
            assert not any(name.startswith("mlxlite.api.endpoints.") for name in imports(module))


def test_imports_between_rooms_make_no_circle() -> None:
    arrows: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module in FILES:
        for name in imports(module):
            target = room_of(name.removeprefix("mlxlite."))
            if target in ROOMS and target != room_of(module):
                arrows[room_of(module)].add(target)
    while arrows:
        leaves = {room for room, targets in arrows.items() if not targets & arrows.keys()}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {room: targets for room, targets in arrows.items() if room not in leaves}


def test_imports_within_a_room_make_no_circle() -> None:
    arrows = {
        module: {name.removeprefix("mlxlite.") for name in imports(module)} & FILES.keys()
        for module in FILES
    }
    while arrows:
        leaves = {module for module, targets in arrows.items() if not targets & arrows.keys()}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {module: targets for module, targets in arrows.items() if module not in leaves}


def test_there_are_no_more_rooms_than_the_design_has() -> None:
    entries = {p.name for p in PACKAGE.iterdir()} - {"__pycache__", "py.typed", "README.md"}
    assert len(entries) <= MAX_ENTRIES
    assert {room_of(module) for module in FILES} == ROOMS.keys()


@pytest.mark.parametrize("module", FILES)
def test_files_and_classes_have_a_maximum_length(module: str) -> None:
    lines = FILES[module].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_CLASS, f"{node.name} is too long"


def test_the_median_file_and_function_are_short() -> None:
    sizes = [len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values()]
    assert statistics.median(size for size in sizes if size > 1) <= MAX_MEDIAN_LINES
    functions = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert statistics.median(functions) <= MAX_MEDIAN_FUNCTION
    assert functions[len(functions) * 95 // 100] <= MAX_P95_FUNCTION


@pytest.mark.parametrize("module", ["engine.scheduler", "api.app", "http.connection"])
def test_what_is_above_mlx_does_not_load_it(module: str) -> None:
    code = f"import sys, mlxlite.{module}; sys.exit('mlx' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, timeout=60)
    assert result.returncode == 0
