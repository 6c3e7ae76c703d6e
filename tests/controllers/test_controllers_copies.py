"""Policies travel to worker processes, and leave the process they live in as it was."""

import copy
import importlib.util
import pickle
import sys
import threading
from pathlib import Path

import casadi as ca
import numpy as np
import pytest
from controllers_cases import context, plant, recorded

import agents
from controllers import make_policy, policy_names
from controllers.columns import DECODE, PREFILL
from controllers.prefill.mpc_dompc import NUMPY_MODE, _without_torch

ALL = [(phase, name) for phase in ("prefill", "decode") for name in policy_names(phase)]
FITTED = [("prefill", "mpc-greedy:model=boosted"), ("decode", "slack:model=boosted")]
WAYS = {"pickled": lambda policy: pickle.loads(pickle.dumps(policy)), "copied": copy.deepcopy}


def decisions(policy, rows):
    """Actions over a few steps of two rows, memory handed on."""
    state, actions = None, []
    for pair in rows:
        action, state = policy.predict(pair, state)
        actions.append(action)
    return np.array(actions)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("phase", "name"), [*ALL, *FITTED])
def test_a_copy_decides_the_same(phase, name, way):
    rows = recorded(phase, 24)[12:].reshape(6, 2, -1)
    policy = make_policy(name, context(phase))
    policy.predict(rows[0])  # whatever it builds or counts at its first decision is there
    twin = WAYS[way](policy)
    assert np.array_equal(decisions(twin, rows), decisions(policy, rows))
    assert type(twin) is type(policy)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_copy_of_a_shipped_agent_decides_the_same(phase, way):
    path = Path(agents.__file__).parent / "checkpoints" / f"{phase}.npz"
    policy = agents.load_agent(path, plant(phase))
    rows = recorded(phase, 12)
    assert np.array_equal(WAYS[way](policy).predict(rows)[0], policy.predict(rows)[0])


def test_counters_travel_with_a_copy():
    policy = make_policy("mpc-dompc", context("prefill"))
    policy.predict(recorded("prefill", 12)[10:])
    assert pickle.loads(pickle.dumps(policy)).stats() == policy.stats()


def test_do_mpc_leaves_casadis_option_as_the_caller_set_it():
    if not hasattr(ca.GlobalOptions, "setNumpyMode"):
        pytest.skip("this CasADi has no such option")
    before = ca.GlobalOptions.getNumpyMode()
    try:
        for mode in (0, 1):
            ca.GlobalOptions.setNumpyMode(mode)
            policy = make_policy("mpc-dompc", context("prefill"))
            assert ca.GlobalOptions.getNumpyMode() == mode
            policy.predict(recorded("prefill", 12)[10:])
            assert ca.GlobalOptions.getNumpyMode() == mode
            with NUMPY_MODE, NUMPY_MODE:
                assert ca.GlobalOptions.getNumpyMode() == -1
            with pytest.raises(ValueError, match="inside"), NUMPY_MODE:
                raise ValueError("inside")
            assert ca.GlobalOptions.getNumpyMode() == mode
    finally:
        ca.GlobalOptions.setNumpyMode(before)


def test_the_import_of_do_mpc_hides_torch_from_its_own_thread_only(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    before, elsewhere = importlib.util.find_spec, []
    known = before("torch") is not None
    with _without_torch():
        assert importlib.util.find_spec("torch") is None
        assert importlib.util.find_spec("numpy") is not None
        other = threading.Thread(
            target=lambda: elsewhere.append(importlib.util.find_spec("torch") is not None)
        )
        other.start()
        other.join()
    assert elsewhere == [known]
    assert importlib.util.find_spec is before
    with pytest.raises(ValueError, match="inside"), _without_torch():
        raise ValueError("inside")
    assert importlib.util.find_spec is before


@pytest.mark.parametrize(("phase", "columns"), [("prefill", PREFILL), ("decode", DECODE)])
def test_columns_are_those_of_the_spec(phase, columns):
    spec = plant(phase).spec
    for name in columns._fields:
        assert getattr(columns, name) == spec.index(name)
    singles = {f.name for f in spec.features if not f.name.rpartition("_")[2].isdigit()}
    assert singles <= set(columns._fields)
