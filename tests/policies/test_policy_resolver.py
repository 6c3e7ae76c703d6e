"""One name, one policy: every kind of base, its parameters, and every mistake in one sentence."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from controllers_cases import context, recorded

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.policies import (
    find_policy,
    known_policies,
    phases_of,
    policy_settings,
    resolve_policy,
    with_parameters,
)
from biscale_env.policies.checkpoint_source import SHIPPED, best_of, checkpoint_in, ships
from biscale_env.policies.policy_source import is_class_name, split_name
from controllers import policy_names
from controllers.registry import policy_settings as built_in_settings

HERE = Path(__file__).resolve()
OUTSIDE = HERE.parents[1] / "helpers" / "outside_rule.py"
KNOWN = {"mpc", "static", "agent"}


@pytest.mark.parametrize(
    ("name", "base", "rest"),
    [
        ("mpc", "mpc", ""),
        ("static:1200", "static", "1200"),
        ("mpc:margin=0.1,forecast=4", "mpc", "margin=0.1,forecast=4"),
        ("agent:margin=0.1", "agent", "margin=0.1"),
        ("runs/a:b/x.zip:price=4,margin=0.2", "runs/a:b/x.zip", "price=4,margin=0.2"),
        ("runs/a:b/x.zip", "runs/a:b/x.zip", ""),
        ("runs/p:margin=0.2", "runs/p", "margin=0.2"),
        ("x.npz:0.2", "x.npz", "0.2"),
        ("mine.rules:Rule", "mine.rules:Rule", ""),
        ("mine:Rule:0.1,b=2", "mine:Rule", "0.1,b=2"),
        ("/a/b c/mine.py:Rule:b=2", "/a/b c/mine.py:Rule", "b=2"),
        ("mpx:margin=0.1", "mpx", "margin=0.1"),
        (r"C:\runs\best.zip", r"C:\runs\best.zip", ""),
    ],
)
def test_names_are_cut_in_base_and_parameters(name, base, rest):
    assert split_name(name, KNOWN) == (base, rest)
    assert is_class_name(base) == ("Rule" in base)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_controllers_of_the_package_are_found(phase):
    for name in policy_names(phase):
        assert phase in phases_of(name)
        assert name in known_policies(phase)
    own = {"prefill": "mpc-plus", "decode": "slack"}[phase]
    assert policy_settings(own, phase) == built_in_settings(own, phase)
    assert policy_settings("static", phase) == []


def same(a, b, phase):
    rows = recorded(phase, 5)
    return np.array_equal(a.predict(rows)[0], b.predict(rows)[0])


def test_parameters_in_the_name_and_beside_it_are_one():
    c = context("decode")
    assert same(
        resolve_policy("slack:margin=0.3", c), resolve_policy("slack", c, margin=0.3), "decode"
    )
    wrong = resolve_policy("slack:member=3", c)
    assert same(wrong, resolve_policy("slack", c, member=3), "decode")
    assert wrong.context.member == 3
    with pytest.raises(BiscaleError, match="member should be a valid integer"):
        resolve_policy("slack", c, member="a")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_shipped_agent_and_its_file_are_the_same_policy(phase):
    plant = Plant(PlantSettings.of(phase))
    assert set(phases_of("agent")) == {"prefill", "decode"}
    path = SHIPPED / f"{phase}.npz"
    assert phases_of(str(path)) == (phase,)
    assert same(resolve_policy("agent", plant), resolve_policy(str(path), plant), phase)
    assert len(policy_settings("agent", phase)) >= 4
    assert policy_settings("agent:price=3", phase) == []
    assert ships(phase)


def test_an_agents_margin_is_a_parameter_everywhere():
    plant = Plant(PlantSettings.of("prefill"))
    wide = resolve_policy("agent:margin=0.4", plant)
    assert wide.margin == resolve_policy("agent:0.4", plant).margin == 0.4
    assert resolve_policy("agent", plant, margin=0.4).margin == 0.4
    assert not same(wide, resolve_policy("agent:margin=0", plant), "prefill")
    for bad in ("agent:cost=3", "agent:price=dear", "agent:price=3,x=1", "agent:margin=true"):
        with pytest.raises(BiscaleError, match="takes price=<number> and margin=<number>"):
            resolve_policy(bad, plant)


def run_directory(folder, phase="prefill", name="best.npz"):
    folder.mkdir(parents=True)
    (folder / name).write_bytes((SHIPPED / f"{phase}.npz").read_bytes())
    return folder


def test_run_directories_stand_for_their_best(tmp_path):
    run = run_directory(tmp_path / "p")
    assert find_policy(str(run)).phases == ("prefill",)
    assert best_of(run) == checkpoint_in(str(run)) == run / "best.npz"
    plant = Plant(PlantSettings.of("prefill"))
    named = resolve_policy(f"{run}:margin=0.2", plant)
    assert named.margin == 0.2
    seeds = tmp_path / "seeds"
    run_directory(seeds / "seed-0")
    run_directory(seeds / "seed-1")
    with pytest.raises(BiscaleError, match=r"holds runs of 2 seeds: name one .*seed-0"):
        resolve_policy(str(seeds), plant)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BiscaleError, match=r"holds no best\.npz or best\.zip yet"):
        resolve_policy(str(tmp_path / "empty"), plant)
    with pytest.raises(BiscaleError, match="neither a run directory nor a checkpoint"):
        resolve_policy(str(tmp_path / "nothing"), plant)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mcp", "unknown policy 'mcp': did you mean 'mpc'?"),
        ("agnt:margin=0.1", "unknown policy 'agnt': did you mean 'agent'?"),
        ("slak:fine", "there is no module 'slak'; did you mean 'slack'?"),
        ("no.such.module:Rule", "there is no module 'no'; did you mean"),
        ("oracle", "made from the whole workload"),
        ("static-best", "made from the whole workload"),
        ("nowhere/best.npz", "there is no checkpoint at nowhere/best.npz"),
        ("outside_rule:QueueRul", "outside_rule has no 'QueueRul': did you mean 'QueueRule'?"),
        ("outside_rule:NUMBER", "is int, but must be a class or a function"),
        ("outside_rule:Mute", "has no predict"),
        ("outside_rule:QueueRule:gain=2", "no parameter 'gain'; it has: low_mhz"),
        ("outside_rule:QueueRule:low_mhz=much", "low_mhz should be a valid number"),
        ("outside_rule:QueueRule:3", "write parameters as key=value, '3' has no key"),
        ("outside_rule:Plain:action=a", "could not convert string to float: 'a'"),
        ("outside_rule:Plain", "is for decode, not for prefill"),
        ("nowhere.py:Rule", "there is no file nowhere.py"),
    ],
)
def test_every_mistake_is_one_sentence(name, says):
    with pytest.raises(BiscaleError, match=re.escape(says)) as caught:
        resolve_policy(name, context("decode" if "action" in name else "prefill"))
    assert "\n" not in str(caught.value)


def test_a_controller_from_outside_gets_the_context_and_is_tuned():
    c = context("prefill")
    policy = resolve_policy("outside_rule:QueueRule:low_mhz=900", c)
    assert policy.context is c
    assert policy.low_mhz == 900.0
    assert phases_of("outside_rule:QueueRule") == ("prefill", "decode")
    tried = [{"low_mhz": 900.0}, {"low_mhz": 1200.0}, {"low_mhz": 1500.0}]
    assert policy_settings("outside_rule:QueueRule", "prefill") == tried
    assert policy_settings("outside_rule:QueueRule:low_mhz=900", "prefill") == []
    assert resolve_policy("outside_rule:QueueRule:member=2", c).context.member == 2


def test_a_class_with_predict_alone_and_a_function_will_do():
    plain = resolve_policy("outside_rule:Plain:action=-0.5", context("decode"))
    assert (plain.predict(recorded("decode", 3))[0] == -0.5).all()
    assert phases_of("outside_rule:Plain") == ("decode",)
    assert policy_settings("outside_rule:Plain", "decode") == []
    made = resolve_policy("outside_rule:make_plain:gain=2", context("decode"))
    assert made.action == pytest.approx(0.4)


def test_a_file_by_its_path_is_read_again_when_it_changes(tmp_path):
    path = tmp_path / "my rule.py"
    path.write_text(OUTSIDE.read_text())
    c = context("decode")
    assert resolve_policy(f"{path}:Plain:action=0.5", c).action == 0.5
    path.write_text(OUTSIDE.read_text().replace("float(action)", "-float(action)"))
    assert resolve_policy(f"{path}:Plain:action=0.5", c).action == -0.5
    path.write_text("import nowhere_at_all\n")
    with pytest.raises(BiscaleError, match=r"fails with ModuleNotFoundError: .*nowhere_at_all"):
        resolve_policy(f"{path}:Plain", c)
    path.write_text("def f(:\n")
    with pytest.raises(BiscaleError, match="fails with SyntaxError"):
        resolve_policy(f"{path}:Plain", c)


@pytest.mark.slow
def test_a_module_in_the_working_folder_is_found(tmp_path):
    (tmp_path / "beside_me.py").write_text(OUTSIDE.read_text())
    code = (
        "import sys; sys.path = [p for p in sys.path if p]; before = list(sys.path)\n"
        "from biscale_env.policies import phases_of\n"
        "print(phases_of('beside_me:Plain'), sys.path == before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "('decode',) True\n", done.stderr


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed distribution that brings policies, as pip leaves it."""
    info = tmp_path / "site" / "outside_rule-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-rule\nVersion: 1.0\n")
    lines = (
        "[biscale.policies]",
        "queue-rule = installed_rule:QueueRule",
        "broken = installed_rule:Nothing",
        "mpc = installed_rule:Mute",
    )
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (info.parent / "installed_rule.py").write_text(OUTSIDE.read_text())
    monkeypatch.syspath_prepend(str(info.parent))
    yield info.parent
    sys.modules.pop("installed_rule", None)


@pytest.mark.parametrize(
    ("name", "longer"),
    [
        ("mpc", "mpc:b=2"),
        ("mpc:a=1", "mpc:a=1,b=2"),
        ("mine:Rule", "mine:Rule:b=2"),
        ("mine:Rule:a=1", "mine:Rule:a=1,b=2"),
        ("runs/a:b/x.zip", "runs/a:b/x.zip:b=2"),
        ("queue-rule", "queue-rule:b=2"),
        ("queue-rule:3", "queue-rule:3,b=2"),
    ],
)
def test_parameters_are_added_to_any_name(name, longer, installed):
    assert with_parameters(name, {"b": 2}) == longer
    assert with_parameters(name, {}) == name


def test_entry_points_have_names_of_their_own(installed):
    c = context("prefill")
    assert "queue-rule" in known_policies("prefill")
    assert resolve_policy("queue-rule:low_mhz=1500", c).low_mhz == 1500.0
    assert len(policy_settings("queue-rule", "prefill")) == 3
    with pytest.raises(BiscaleError, match="did you mean 'queue-rule'"):
        resolve_policy("queue-rul", c)
    with pytest.raises(BiscaleError, match="'broken': its entry point installed_rule:Nothing"):
        resolve_policy("broken", c)
    assert type(resolve_policy("mpc", c)).__name__ == "FastMpcController"
