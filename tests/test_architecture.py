"""Imports point one way: the table of ARCHITECTURE.md, checked."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [  # lowest first; a room may import from earlier entries only
    "biscale_env.errors",
    "biscale_env.jit",
    "biscale_env.config",
    "biscale_env.contract",
    "biscale_env.models",
    "biscale_env.traces",
    "biscale_env.sim",
    "biscale_env.envs",
    "controllers",
    "agents",
    "biscale_env.evaluation",
    "biscale_env.hardware",
    "biscale_env.cli",
]
FORBIDDEN = {  # exceptions to "earlier is allowed"
    "biscale_env.models": {"biscale_env.contract"},
    "biscale_env.traces": {"biscale_env.contract", "biscale_env.models"},
    "biscale_env.sim": {"biscale_env.traces", "biscale_env.contract"},
    "biscale_env.evaluation": {"controllers", "agents"},
}
CONTROLLERS_MAY_SEE_ENVS = ("controllers/oracle", "controllers/placement", "controllers/cluster")


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


SOURCES = sorted(p for top in ("biscale_env", "controllers", "agents") for p in (ROOT / top).rglob("*.py"))


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
        if me == "controllers" and other in ("biscale_env.envs", "biscale_env.sim", "biscale_env.traces"):
            allowed = str(relative).startswith(CONTROLLERS_MAY_SEE_ENVS)
        assert allowed, f"{relative} imports {module}"
