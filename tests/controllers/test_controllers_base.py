"""Every controller: shapes, rows against batches, memory, names, parameters, imports."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from controllers_cases import context, encode, recorded

import biscale_env  # noqa: F401 - registers the environments
from biscale_env.core.errors import BiscaleError
from controllers import default_policies, make_policy, policy_names, policy_tunables
from controllers.base import MARGINS
from controllers.registry import ENTRIES, parse_name, policy_settings

ALL = [(phase, name) for phase in ("prefill", "decode") for name in policy_names(phase)]
DETERMINISTIC = [pair for pair in ALL if pair[1] != "random"]


@pytest.mark.parametrize(("phase", "name"), ALL)
def test_shapes_types_and_range(phase, name):
    policy = make_policy(name, context(phase))
    rows = recorded(phase, 6)
    before = rows.copy()
    one, _ = policy.predict(rows[0])
    many, _ = policy.predict(rows)
    assert one.shape == (1,)
    assert many.shape == (6, 1)
    assert one.dtype == many.dtype == np.float32
    assert np.all(np.abs(many) <= 1.0 + 1e-6)
    assert np.array_equal(rows, before)


@pytest.mark.parametrize(("phase", "name"), DETERMINISTIC)
def test_a_batch_is_its_rows_with_memory_and_restarts(phase, name):
    steps, n = (6 if name == "mpc-dompc" else 40), 3
    rows = recorded(phase, steps * n).reshape(n, steps, -1)
    starts = np.zeros((steps, n), dtype=bool)
    starts[0] = True
    starts[steps // 2, 1] = True
    together, apart = (
        make_policy(name, context(phase)),
        [make_policy(name, context(phase)) for _ in range(n)],
    )
    state, states = None, [None] * n
    for t in range(steps):
        actions, state = together.predict(rows[:, t], state, starts[t])
        for i in range(n):
            action, states[i] = apart[i].predict(rows[i, t], states[i], starts[t, i : i + 1])
            np.testing.assert_allclose(actions[i], action, atol=1e-5)


@pytest.mark.parametrize(("phase", "name"), DETERMINISTIC)
def test_predict_keeps_nothing_outside_its_state(phase, name):
    policy, rows = make_policy(name, context(phase)), recorded(phase, 12)
    _, state = policy.predict(rows[0])
    kept = None if state is None else state.copy()
    a, _ = policy.predict(rows[1], state)
    for row in rows[2:]:
        policy.predict(row)
    b, _ = policy.predict(rows[1], state)
    np.testing.assert_allclose(a, b, atol=1e-5)
    if kept is not None:
        assert np.array_equal(state, kept, equal_nan=True)


@pytest.mark.parametrize(("phase", "name"), [p for p in ALL if p[1] != "mpc-dompc"])
def test_sb3_evaluates_it(phase, name):
    sb3 = pytest.importorskip("stable_baselines3.common.evaluation")
    env = gym.make(f"BiScale/{phase.capitalize()}-v1", rate_rps=2.0, episode_s=5.0)
    policy = make_policy(name, context(phase))
    with pytest.warns(UserWarning, match="Monitor"):
        rewards, lengths = sb3.evaluate_policy(
            policy, env, n_eval_episodes=2, return_episode_rewards=True
        )
    assert len(rewards) == 2
    assert min(lengths) >= 1
    assert np.all(np.isfinite(rewards))


def test_state_of_one_row_does_not_leak_into_another():
    policy, rows = make_policy("dynamollm", context("decode")), recorded("decode", 2)
    _, state = policy.predict(rows)
    fresh, _ = policy.predict(rows, np.tile([0.0, 1500.0, 0.0], (2, 1)), np.array([True, False]))
    expected, _ = policy.predict(rows[:1])
    assert state.shape == (2, 3)
    assert np.array_equal(fresh[0], expected[0])
    assert policy.context.clocks.to_freq_mhz(fresh[1]) == pytest.approx(1500.0, abs=0.1)


def test_static_clocks():
    o = encode("decode")
    top, low = make_policy("max", context("decode")), make_policy("static:510", context("decode"))
    assert top.predict(o)[0] == pytest.approx(1.0)
    assert low.predict(o)[0] == pytest.approx(-1.0)
    assert make_policy("static", context("decode"), freq_mhz=1203.0).freq_mhz == 1200.0


def test_random_covers_the_grid_and_repeats_with_its_seed():
    c, rows = context("decode"), np.repeat(encode("decode")[None], 4000, axis=0)
    a, b = (
        make_policy("random:3", c).predict(rows)[0],
        make_policy("random", c, seed=3).predict(rows)[0],
    )
    assert np.array_equal(a, b)
    assert len(np.unique(a)) == len(c.clocks.grid_mhz)


@pytest.mark.parametrize(
    ("name", "phase", "says"),
    [
        ("slak", "decode", "did you mean 'slack'"),
        ("nothing-like-it", "decode", "known: max, static"),
        ("slack", "prefill", "'slack' is not for prefill"),
        ("slack:marign=0.1", "decode", "no parameter 'marign'; it has: margin"),
        ("max:1200", "decode", "no key"),
        ("max:freq_mhz=1200", "decode", "no parameter 'freq_mhz'"),
        ("static:5000", "decode", "static clock 5000 MHz is impossible: choose 510 to 1980"),
        ("slack:margin=much", "decode", "margin should be a valid number, got much"),
        ("slack:member=100000", "decode", "ensemble member 100000 does not exist"),
    ],
)
def test_a_wrong_name_is_one_clear_sentence(name, phase, says):
    with pytest.raises(BiscaleError, match=says) as caught:
        make_policy(name, context(phase))
    assert "\n" not in str(caught.value)


def test_an_observation_of_the_other_phase_is_refused():
    with pytest.raises(BiscaleError, match="decode-v1 has"):
        make_policy("max", context("decode")).predict(encode("prefill"))


def test_names_and_parameters():
    assert parse_name("slack:0.1,energy_floor=true,kv_guard=1") == (
        "slack",
        {"margin": 0.1, "energy_floor": True, "kv_guard": 1},
    )
    for phase in ("prefill", "decode"):
        assert set(default_policies(phase)) <= set(policy_names(phase))
        assert "max" in default_policies(phase)


@pytest.mark.parametrize(("phase", "name"), ALL)
def test_every_tunable_value_can_be_used(phase, name):
    for key, values in policy_tunables(name, phase).items():
        assert len(set(values)) == len(values) >= 2
        for value in values if name != "mpc-dompc" else values[:1]:
            make_policy(name, context(phase), **{key: value})
    assert "margin" not in policy_tunables("ecofreq:0.1", "decode")
    assert policy_tunables("max", phase) == {}


def test_presets_are_parameters_and_can_be_overruled():
    preset, spelled = (
        make_policy("mpc-plus", context("prefill")),
        make_policy("mpc:delay_aware=true,forecast=4", context("prefill")),
    )
    assert preset.problem.options == spelled.problem.options
    assert make_policy("mpc-plus:forecast=1", context("prefill")).problem.options.forecast == 1.0
    slack = make_policy("slack-plus:0.2", context("decode"))
    spelled_out = make_policy("slack:0.2,fine=true", context("decode"))
    assert slack.margin == spelled_out.margin == 0.2
    assert (slack.load_floor, slack.accumulated, slack.delay_aware) == (False, False, False)
    obs = np.zeros((1, context("decode").spec.dim), dtype=np.float32)
    assert slack.predict(obs)[0] == pytest.approx(spelled_out.predict(obs)[0])


def test_member_changes_what_it_believes():
    a, b = make_policy("slack", context("decode")), make_policy("slack:member=3", context("decode"))
    assert (a.context.member, b.context.member) == (-1, 3)


@pytest.mark.slow
def test_controllers_import_no_environment():
    modules = sorted(
        {f"controllers.{path.split(':')[0]}" for e in ENTRIES.values() for path in e.paths.values()}
    )
    load = f"[importlib.import_module(m) for m in {modules!r}]"
    code = (
        f"import sys, importlib, biscale_env; before = set(sys.modules); {load}; "
        "print(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    added = out.stdout.split()
    assert "controllers.decode.slack" in added
    assert not [m for m in added if m.startswith("biscale_env.envs")]


def test_settings_vary_one_parameter_at_a_time_and_joint_ones_together():
    assert policy_settings("ecofreq", "decode") == [{"margin": m} for m in MARGINS["margin"]]
    agft = policy_settings("agft", "decode")
    assert all(len(setting) == 1 for setting in agft)
    assert {key for setting in agft for key in setting} == {"penalty", "explore"}
    plus = policy_settings("mpc-plus", "prefill")
    assert plus[0] == {"margin": 0.0, "forecast": 0.0}
    assert len({tuple(s.items()) for s in plus}) == len(plus) == 3 * len(MARGINS["margin"])
    assert policy_settings("mpc-plus:0.1,forecast=2", "prefill") == []
    settings = policy_settings("mpc-plus:0.1", "prefill")
    assert [s["forecast"] for s in settings] == [0.0, 2.0, 4.0]
