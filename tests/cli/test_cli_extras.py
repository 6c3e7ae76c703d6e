"""Commands without the optional packages: one sentence that names the extra, before any work."""

import json
import subprocess
import sys

import pytest
from hidden_packages import without_packages

HIDDEN = (
    "aiconfigurator_core",
    "aiohttp",
    "dash",
    "httpx",
    "httpx_sse",
    "minari",
    "msgspec",
    "optuna",
    "pettingzoo",
    "pynvml",
    "ray",
    "sb3_contrib",
    "stable_baselines3",
    "tensorboard",
    "torch",
    "torchrl",
    "zmq",
)
# The command, what is installed of the above, and the extra that is asked for.
CASES = [
    ("train decode --steps 1", (), "rl"),
    ("train cluster", (), "rl"),
    (
        "train multi",
        ("torch", "stable_baselines3", "tensorboard"),
        "rl,marl",
    ),
    ("tune decode --trials 1", ("torch", "stable_baselines3", "tensorboard"), "rl"),
    ("offline decode", (), "offline-rl"),
    ("reproduce multi --systems max", (), "marl"),
    ("export minari decode a/b-v1 --episodes 1 --episode-s 1", (), "offline"),
    ("dashboard .", (), "dashboard"),
    ("models tables", (), "tables"),
    ("fit --from nothing --out fitted", (), "hw"),
    ("replay --trace azure-conv-like", (), "hw"),
    ("validate nothing", (), "hw"),
    ("profile --device cpu --tiny --out rows.csv", (), "hw"),
    ("hw emulate", (), "hw"),
    ("hw doctor", (), "hw"),
    ("hw restore", (), "hw"),
    ("hw actuate --gpus prefill=0", (), "hw"),
    ("hw control --phase decode --policy slack", (), "hw"),
    ("hw bridge --phase decode --source tcp://127.0.0.1:1", (), "hw"),
    ("hw observe --gpus prefill=0", (), "hw"),
    ("hw explore --gpus prefill=0", (), "hw"),
    ("hw clock-latency", (), "hw"),
    ("hw keys emulated-two-machines", (), "hw"),
    ("hw up emulated-two-machines --check", (), "hw"),
    ("hw status emulated-two-machines --once", (), "hw"),
    ("hw route emulated-two-machines", (), "hw"),
    ("hw plan emulated-two-machines", (), "hw"),
]
RUN_ALL = (
    without_packages(HIDDEN)
    + """
import contextlib, io, json, traceback
from importlib.machinery import ModuleSpec
from types import ModuleType
from biscale_env.cli import main
told = []
for words, there, _ in json.loads(sys.argv[1]):
    for name in there:  # what is found, and what nothing here may come to use
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.argv = ["biscale", *words.split()]
    error, code = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        except Exception:
            code = traceback.format_exc()
    for name in there:
        del sys.modules[name]
    told.append((code, error.getvalue()))
print(json.dumps(told))
"""
)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Exit code and what was said on stderr, per command; all in one process."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(CASES)],
        cwd=tmp_path_factory.mktemp("here"),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.loads(done.stdout)
    return {words: said for (words, *_), said in zip(CASES, found, strict=True)}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="hardware needs Linux first")
@pytest.mark.parametrize(("words", "extra"), [(w, e) for w, _, e in CASES], ids=lambda v: str(v))
def test_what_is_missing_is_said_in_one_sentence(words, extra, told):
    code, error = told[words]
    assert code == 2, code
    assert error.startswith("biscale: ")
    assert error.count("\n") == 1, error
    assert f"'biscale-env[{extra}]'" in error
