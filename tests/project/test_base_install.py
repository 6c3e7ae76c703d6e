"""The tests are for every install: without the optional packages they are collected and skip."""

import subprocess
import sys
from pathlib import Path

import pytest
from hidden_packages import without_packages

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "dash",
    "optuna",
    "playwright",
    "pytest_benchmark",
    "ray",
    "sb3_contrib",
    "stable_baselines3",
    "tensorboard",
    "torch",
    "torchrl",
)
HIDDEN = without_packages(HEAVY) + "import pytest\nsys.exit(pytest.main(sys.argv[1:]))\n"


def without_extras(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Pytest where the heavy packages cannot be imported."""
    plugins = ("-p", "no:benchmark", "-p", "no:dash", "-p", "no:xdist", "-p", "no:cacheprovider")
    return subprocess.run(
        [sys.executable, "-c", HIDDEN, "-q", *plugins, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_every_module_of_tests_is_collected_without_the_extras():
    done = without_extras("--collect-only", "tests")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.slow
def test_what_reads_a_config_or_a_shipped_network_needs_no_training_library():
    done = without_extras(
        "tests/agents/test_offline_parts.py",
        "tests/agents/test_agents_levels.py",
        "tests/reproduce/test_multi.py",
        "-m",
        "not slow",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
