"""The kernel cache forgets whatever a changed source could have changed.

Importing the package stays light.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import biscale_env
from biscale_env.core import jit

PACKAGE = Path(biscale_env.__file__).parent
HELPERS = Path(__file__).resolve().parents[1] / "helpers"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sources, free to be changed."""
    target = tmp_path / "biscale_env"
    shutil.copytree(
        PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__", "_configs", "templates")
    )
    return target


def test_digest_of_unchanged_sources_is_stable(copy: Path) -> None:
    assert jit.source_digest(copy) == jit.source_digest() == jit.source_digest()
    assert jit.cache_dir().name == jit.source_digest()


@pytest.mark.parametrize(
    "source",
    [
        "models/physics.py",
        "models/iteration_model.py",
        "contract/observation.py",
        "sim/clock.py",
        "sim/decode.py",
        "envs/observe.py",
        "sim/cluster/routing.py",
        "core/jit.py",
    ],
)
def test_a_changed_source_changes_the_digest(copy: Path, source: str) -> None:
    before = jit.source_digest(copy)
    file = copy / source
    file.write_text(file.read_text() + "\n# changed\n")
    assert jit.source_digest(copy) != before


def test_a_new_or_renamed_source_changes_the_digest(copy: Path) -> None:
    before = jit.source_digest(copy)
    (copy / "sim" / "extra.py").write_text("")
    added = jit.source_digest(copy)
    (copy / "sim" / "extra.py").rename(copy / "sim" / "other.py")
    assert len({before, added, jit.source_digest(copy)}) == 3


def test_parts_are_only_inlined_where_they_count() -> None:
    """A part outside the shared sources may be inlined only by kernels of its own package, whose
    digest it is in.
    """
    digested = {p.resolve() for s in jit.SOURCES for p in jit.python_files(PACKAGE / s)}
    tops = (PACKAGE, PACKAGE.parent / "controllers", PACKAGE.parent / "agents")
    texts = {file.resolve(): file.read_text() for top in tops for file in top.rglob("*.py")}
    parts = [
        f
        for f, text in texts.items()
        if ("@inlined" in text or "@register_jitable" in text) and f not in digested
    ]
    assert {f.name for f in digested} >= {"physics.py", "clock.py", "observe.py", "routing.py"}
    assert parts
    for part in parts:
        for file, text in texts.items():
            if jit.package_of(file.parent) != jit.package_of(part.parent) and "@compiled" in text:
                assert f".{part.stem} import" not in text, (
                    f"{file} may inline {part}, which does not count for its cache"
                )


def test_kernels_of_other_packages_count_their_whole_package(tmp_path: Path) -> None:
    rule = tmp_path / "law" / "rule.py"
    rule.parent.mkdir()
    for folder in (tmp_path, rule.parent):
        (folder / "__init__.py").write_text("")
    rule.write_text("A = 1\n")
    assert jit.package_of(rule.parent) == tmp_path
    before = jit.source_digest(other=tmp_path)
    rule.write_text("A = 2\n")
    assert len({before, jit.source_digest(other=tmp_path), jit.source_digest()}) == 3
    assert (
        jit.cache_dir(PACKAGE / "sim" / "cluster")
        == jit.cache_dir(PACKAGE / "models")
        == jit.cache_dir()
    )
    assert jit.cache_dir(tmp_path) != jit.cache_dir()
    controllers = PACKAGE.parent / "controllers"
    assert (
        jit.package_of(controllers / "prefill")
        == jit.package_of(controllers / "surrogates")
        == controllers
    )
    assert jit.package_of(PACKAGE / "hardware" / "emulation") == PACKAGE / "hardware"


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light() -> None:
    """No torch, casadi, pandas or plotly before they are used.

    The time itself is printed by the bench.
    """
    code = (
        "import sys, biscale_env; print([m for m in ('torch', 'casadi', 'pandas', 'plotly',"
        " 'stable_baselines3') if m in sys.modules])"
    )
    assert run(code).strip() == "[]"


def test_making_an_environment_needs_no_torch() -> None:
    code = (
        "import sys, gymnasium, biscale_env; e = gymnasium.make('BiScale/Prefill-v1', rate_rps=3.0,"
        " episode_s=3.0);e.reset(seed=0); e.step(e.action_space.sample()); print('torch' in"
        " sys.modules)"
    )
    assert run(code).strip() == "False"


@pytest.mark.slow
def test_a_changed_formula_is_never_answered_from_the_cache(copy: Path, tmp_path: Path) -> None:
    """The very mistake the cache exists to prevent.

    A formula changed in physics.py changes the capped clock of model.py's kernel.
    """
    code = (
        f"import sys; sys.path.insert(0, {str(copy.parent)!r});from biscale_env.models import"
        " physics; from biscale_env.models.iteration_model import effective_freq_ghz as kernel,"
        " as_record;import biscale_env, numpy as np; from sim_support import COEFFICIENTS as c; o"
        " = np.zeros(1); a = np.ones(1);kernel(as_record(c._replace(p_cap_w=400.0)), 2048 * a, 2e6"
        " * a, 0 * a, a, 1.98 * a, 0.51, o); print(biscale_env.__file__, o[0])"
    )
    setting = {
        "BISCALE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": f"{copy.parent}{os.pathsep}{HELPERS}",
    }
    before = run(code, **setting).split()
    assert before == run(code, **setting).split()
    formula = copy / "models" / "physics.py"
    text = formula.read_text()
    changed = text.replace("per_flop = c.e_flop_j *", "per_flop = 0.9 * c.e_flop_j *")
    assert changed != text
    formula.write_text(changed)
    after = run(code, **setting).split()
    assert Path(before[0]).is_relative_to(tmp_path)
    assert float(after[1]) != float(before[1])
