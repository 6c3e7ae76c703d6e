"""The hook as engines get it: a wheel, installed in a fresh environment, found by engines."""

import json
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("vllm.stat_logger_plugins", "sglang.srt.plugins")

# What vLLM and SGLang do: all entry points of their group, loaded by name. Their classes are
# stand-ins of a few lines.
PROBE = """
import importlib.metadata as m, json, pathlib, sys, types
def module(name, **content):
    for k in range(name.count(".") + 1):
        part = ".".join(name.split(".")[:k + 1])
        sys.modules.setdefault(part, types.ModuleType(part)).__path__ = []
    vars(sys.modules[name]).update(content)
class StatLoggerBase: pass
class AsyncScheduler: pass
registered = []
class HookRegistry:
    register = staticmethod(lambda *a: registered.append(a[0]))
module("vllm.v1.metrics.loggers", StatLoggerBase=StatLoggerBase)
module("vllm.v1.core.sched.async_scheduler", AsyncScheduler=AsyncScheduler)
module("sglang.srt.plugins.hook_registry", HookRegistry=HookRegistry,
       HookType=types.SimpleNamespace(BEFORE=1, AFTER=2))
loggers = [e.load() for e in m.entry_points(group="vllm.stat_logger_plugins")]
for e in m.entry_points(group="sglang.srt.plugins"):
    e.load()()
from biscale_hook.vllm_hook import BiscaleScheduler
site = pathlib.Path(sys.prefix, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}")
print(json.dumps({
    "loggers": [issubclass(c, StatLoggerBase) for c in loggers],
    "scheduler": issubclass(BiscaleScheduler, AsyncScheduler),
    "registered": registered,
    "loaded": sorted({n.split(".")[0] for n in sys.modules} & {"biscale_env", "numpy", "pandas"}),
    "found": {d: sorted(e.name for e in m.distribution(d).entry_points) for d in sys.argv[1:]},
}))
"""


def build(folder, source):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", folder, source], check=True, timeout=300, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


class Environment:
    """A fresh virtual environment with nothing but wheels, and pyzmq and msgspec of this one."""

    def __init__(self, folder):
        import msgspec
        import zmq

        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        for package in (zmq, msgspec):
            place = Path(package.__file__).parent
            (self.site / place.name).symlink_to(place)
        for libraries in Path(zmq.__file__).parents[1].glob("pyzmq.libs"):
            (self.site / libraries.name).symlink_to(libraries)
        self.before = set(self.site.iterdir())

    def install(self, wheel):
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--no-deps"]
        subprocess.run([*pip, "--no-index", wheel], check=True, timeout=120)

    def packages(self):
        new = {p.name for p in set(self.site.iterdir()) - self.before}
        return {name for name in new if not name.endswith(".dist-info")}

    def probe(self, *distributions):
        command = [self.python, "-I", "-c", PROBE, *distributions]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def engine_environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hook")
    environment = Environment(folder / "env")
    environment.install(build(folder, ROOT / "packaging" / "engine-hook"))
    return environment


def test_the_hook_brings_one_package_and_its_plug_ins(engine_environment):
    assert engine_environment.packages() == {"biscale_hook"}
    told = engine_environment.probe("biscale-engine-hook")
    assert told == {
        "loggers": [True],
        "scheduler": True,
        "registered": [
            "sglang.srt.managers.scheduler.Scheduler.run_batch",
            "sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        ],
        "loaded": [],
        "found": {"biscale-engine-hook": ["biscale", "biscale"]},
    }


def declared(path):
    project = tomllib.loads(path.read_text())["project"]
    return project["version"], {g: dict(project["entry-points"][g]) for g in GROUPS}


def test_both_distributions_declare_the_same_plug_ins_under_the_same_names():
    """Engines keep plug-ins by name, so that one of the two is loaded where both are installed."""
    version, whole = declared(ROOT / "pyproject.toml")
    hook_version, hook = declared(ROOT / "packaging" / "engine-hook" / "pyproject.toml")
    assert version == hook_version
    renamed = {
        g: {k: v.replace("biscale_hook", "biscale_env.hardware.engines.hook") for k, v in d.items()}
        for g, d in hook.items()
    }
    assert renamed == whole


@pytest.mark.slow
def test_the_whole_package_declares_its_plug_ins_too(tmp_path):
    environment = Environment(tmp_path / "env")
    environment.install(build(tmp_path, ROOT))
    code = (
        "import importlib.metadata as m, sys; "
        "print([(e.group, e.value) for e in m.distribution('biscale-env').entry_points "
        "if e.name == 'biscale'])"
    )
    done = subprocess.run([environment.python, "-I", "-c", code], capture_output=True, text=True)
    for group, values in declared(ROOT / "pyproject.toml")[1].items():
        assert str((group, values["biscale"])) in done.stdout
