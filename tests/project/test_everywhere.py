"""Read-only installations of any user, and kernels as plain Python, up to whole episodes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("biscale_env", "controllers", "agents", "configs")
FIGURES = """
import json
import gymnasium as gym
from biscale_env.evaluation import evaluate

found = {}
for phase, policy, rate in (("Prefill", "mpc", 2.0), ("Decode", "slack", 4.0)):
    env = gym.make(f"BiScale/{phase}-v1", rate_rps=rate, episode_s=3.0, n_workloads=1)
    found[phase] = evaluate(policy, env, episodes=1).iloc[0].to_dict()
print(json.dumps(found))
"""


def figures(env):
    done = subprocess.run(
        [sys.executable, "-c", FIGURES], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_episodes_of_controllers_are_the_same_without_the_compiler():
    base = {**os.environ, "PYTHONPATH": str(ROOT)}
    plain, compiled = figures(base | {"NUMBA_DISABLE_JIT": "1"}), figures(base)
    assert set(plain) == {"Prefill", "Decode"}
    for phase, row in plain.items():
        assert row == pytest.approx(compiled[phase], rel=1e-9), phase
        assert row["tokens"] > 0


@pytest.mark.slow
def test_any_user_compares_with_a_read_only_installation_and_no_home(tmp_path):
    """The folder of the installation is another's, and stays as it is."""
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root, to become another user")
    home, here = tmp_path / "installed", tmp_path / "here"
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, home / name, ignore=ignored)
    subprocess.run(["chmod", "-R", "a+rX,a-w", str(home)], check=True)
    here.mkdir()
    os.chown(here, 12345, 12345)
    before = sorted(path.relative_to(home) for path in home.rglob("*"))
    drop = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    drop += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]  # of Python
    words = ["compare", "--quick", "--phase", "decode", "--policies", "static:900", "--jobs", "1"]
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [*drop, sys.executable, "-m", "biscale_env.cli", *words, "--out", "run"],
        env=env | {"PYTHONPATH": str(home), "TMPDIR": str(here)},
        cwd=here,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (here / "run" / "report.html").stat().st_uid == 12345
    assert sorted(path.relative_to(home) for path in home.rglob("*")) == before
