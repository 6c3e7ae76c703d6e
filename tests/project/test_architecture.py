"""Imports point one way: the table of ARCHITECTURE.md, checked."""

import ast
from collections import Counter, defaultdict
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = [  # lowest first; a room may import from earlier entries only
    "biscale_env.core",
    "biscale_env.jobs",
    "biscale_env.config",
    "biscale_env.contract",
    "biscale_env.laws",
    "biscale_env.models",
    "biscale_env.traces",
    "biscale_env.sim",
    "biscale_env.render",
    "biscale_env.envs",
    "biscale_env.wrappers",
    "controllers",
    "agents",
    "biscale_env.policies",
    "biscale_env.evaluation",
    "biscale_env.plots",
    "biscale_env.reproduce",
    "biscale_env.hardware",
    "biscale_env.dashboard",
    "biscale_env.cli",
]
FORBIDDEN = {  # exceptions to "earlier is allowed"
    "biscale_env.laws": {"biscale_env.config", "biscale_env.contract"},
    "biscale_env.models": {"biscale_env.contract", "biscale_env.laws"},
    "biscale_env.traces": {"biscale_env.contract", "biscale_env.laws", "biscale_env.models"},
    "biscale_env.sim": {"biscale_env.traces", "biscale_env.contract"},
    "biscale_env.render": {
        f"biscale_env.{room}" for room in ("config", "contract", "laws", "models", "traces", "sim")
    },
}
CONTROLLERS_MAY_SEE_ENVS = ("controllers/oracle/", "controllers/placement/")


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] in ("controllers", "agents"):
        return parts[0]
    if parts[0] == "biscale_env" and len(parts) > 1:
        return ".".join(parts[:2])
    return None


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module}
    return found


SOURCES = sorted(
    p for top in ("biscale_env", "controllers", "agents") for p in (ROOT / top).rglob("*.py")
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def module_imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of ours that a file imports anywhere, also inside functions.

    `from package import module` counts as the module.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= inner or ({node.module} & modules)
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected groups of more than one module."""
    graph = nx.DiGraph((a, b) for a, targets in edges.items() for b in targets)
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def test_no_circle_of_modules_even_a_lazy_one():
    modules = {module_of(p) for p in SOURCES}
    edges = {
        module_of(p): module_imports(p, modules) - {module_of(p)}
        for p in SOURCES
        if p.name != "__init__.py"
    }
    assert circles(edges | {"a": {"b"}, "b": {"a"}}), "the search itself finds none"
    assert not circles(edges)


def test_no_module_name_twice():
    names = Counter(p.name for p in SOURCES if p.name not in ("__init__.py", "__main__.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_class_name_twice():
    homes = defaultdict(set)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].add(module_of(path))
    assert {name: sorted(where) for name, where in homes.items() if len(where) > 1} == {}


def test_there_are_sources():
    assert len(SOURCES) > 40


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    relative = path.relative_to(ROOT)
    me = room_of(".".join(relative.with_suffix("").parts).removesuffix(".__init__"))
    if me is None:  # the package's own __init__ registers the environments
        assert relative == Path("biscale_env/__init__.py")
        return
    assert me in LAYERS, f"{relative}: add the room to ARCHITECTURE.md and to this test"
    for module in imports_of(path):
        other = room_of(module)
        if other is None or other == me:
            continue
        allowed = LAYERS.index(other) < LAYERS.index(me) and other not in FORBIDDEN.get(me, set())
        if me == "controllers" and other in (
            "biscale_env.wrappers",
            "biscale_env.render",
            "biscale_env.envs",
            "biscale_env.sim",
            "biscale_env.traces",
        ):
            allowed = str(relative).startswith(CONTROLLERS_MAY_SEE_ENVS)
        assert allowed, f"{relative} imports {module}"
