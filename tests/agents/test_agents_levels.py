"""One checkpoint for every GPU: features look at seven levels, however many the GPU has."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_hardware import TOY_GPU, TOY_LLM

import agents
from agents.policy.action_map import ActionMap
from agents.policy.feature_parts import N_LEVELS, feature_plants, spread_levels_mhz
from agents.policy.features import NAMES, FeatureMap, feature_id, nominal_plants
from agents.policy.numpy_policy import Network, NumpyPolicy
from biscale_env.contract import ClockRange
from biscale_env.envs.plant import Plant, PlantSettings

PHASES = ("prefill", "decode")
PLANTS = {phase: Plant(PlantSettings.of(phase)) for phase in PHASES}
H100 = PLANTS["decode"].clocks


def with_levels(count, low=510.0, high=1980.0):
    """The H100's range with another number of control levels."""
    levels = tuple(np.linspace(low, high, count).tolist())
    return dataclasses.replace(H100, levels_mhz=levels)


def observations(phase, n=16, seed=0):
    spec, rng = PLANTS[phase].spec, np.random.default_rng(seed)
    obs = rng.uniform(0.0, 1.0, (n, spec.dim)).astype(np.float32)
    obs[:, spec.index("slo")] = 0.6 if phase == "prefill" else 0.1
    return obs


def network(phase, action="rule", outputs=1):
    rng = np.random.default_rng(1)
    dims = [len(NAMES[phase]), 16, outputs]
    weights = [rng.normal(0, 0.3, (a, b)).astype(np.float32) for a, b in itertools.pairwise(dims)]
    biases = [rng.normal(0, 0.3, b).astype(np.float32) for b in dims[1:]]
    return Network(phase, f"{phase}-v1", feature_id(phase), action, 0.5, "tanh", weights, biases)


@given(st.integers(2, 12), st.floats(510.0, 1200.0))
def test_spread_levels_rise_from_the_lowest_to_the_highest(count, low):
    clocks = with_levels(count, low)
    spread = spread_levels_mhz(clocks)
    assert spread.shape == (N_LEVELS,)
    assert spread[0] == clocks.levels_mhz[0]
    assert spread[-1] == clocks.levels_mhz[-1]
    assert (np.diff(spread) > 0).all()
    assert spread == pytest.approx(np.linspace(low, 1980.0, N_LEVELS)), "even levels stay even"


def test_seven_levels_are_the_gpus_own_bit_for_bit():
    assert spread_levels_mhz(H100).tolist() == list(H100.levels_mhz)
    uneven = dataclasses.replace(H100, levels_mhz=(600.0, 700.0, 1980.0))
    assert spread_levels_mhz(uneven, 5).tolist() == [600.0, 650.0, 700.0, 1340.0, 1980.0]


@pytest.mark.parametrize("phase", PHASES)
@settings(max_examples=22, deadline=None)
@given(count=st.integers(2, 12), seed=st.integers(0, 5))
def test_features_of_any_number_of_levels_are_those_at_the_spread_ones(phase, count, seed):
    """No kernel reads past the levels: every value is that of seven levels given outright."""
    plant, clocks = PLANTS[phase], with_levels(count)
    seven = dataclasses.replace(clocks, levels_mhz=tuple(spread_levels_mhz(clocks).tolist()))
    obs = observations(phase, seed=seed)
    made = FeatureMap(phase, plant.spec)
    told = (nominal_plants(phase, plant.model, c, [-1], [None]) for c in (clocks, seven))
    got, same = (made(obs, *nominal) for nominal in told)
    assert np.isfinite(got.features).all()
    for a, b in zip(got, same, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("count", range(2, 13))
def test_the_record_of_the_kernels_has_a_fixed_number_of_levels(count):
    record = feature_plants(with_levels(count), [1.2], [None])
    assert record["levels_ghz"].shape == (1, N_LEVELS)
    assert float(record["levels_ghz"][0, -1]) == pytest.approx(1.98)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("count", [2, 3, 7, 12])
def test_a_checkpoint_decides_on_a_gpu_with_another_number_of_levels(phase, count):
    clocks = with_levels(count)
    plant = Plant(PlantSettings.of(phase))
    plant.clocks = clocks
    obs = observations(phase)
    action = NumpyPolicy(network(phase), plant).predict(obs)[0]
    assert np.isfinite(action).all()
    assert (np.abs(action) <= 1.0).all()
    levels = NumpyPolicy(network(phase, "levels", 7), plant).predict(obs)[0]
    assert set(np.round(levels.ravel(), 5)) <= set(
        np.round(clocks.to_action(spread_levels_mhz(clocks)), 5)
    )


def test_the_shipped_checkpoint_decides_on_a_toy_gpu_with_a_toy_llm():
    plant = Plant(PlantSettings.of("decode", tp=4, gpu=TOY_GPU, llm=TOY_LLM))
    shipped = Path(agents.__file__).parent / "checkpoints" / "decode.npz"
    action = agents.load_agent(shipped, plant).predict(observations("decode"))[0]
    assert np.isfinite(action).all()
    assert len(plant.clocks.levels_mhz) != N_LEVELS


def test_levels_of_outputs_are_spread_and_inverted():
    three = dataclasses.replace(H100, levels_mhz=(510.0, 1245.0, 1980.0))
    actions = ActionMap.of("levels", 1.0, three, outputs=5)
    assert actions.levels == pytest.approx([-1.0, -0.5, 0.0, 0.5, 1.0])
    rule = np.zeros(2, np.float32)
    assert actions(np.array([4, 1]), rule) == pytest.approx([1.0, -0.5])
    assert actions.output_for(np.array([0.9, -0.6], np.float32), rule).tolist() == [4.0, 1.0]
    own = ActionMap.of("levels", 1.0, three)
    assert own.levels == pytest.approx([-1.0, 0.0, 1.0])


@given(st.floats(-1.0, 1.0, width=32), st.floats(-1.0, 1.0, width=32))
def test_outputs_and_actions_invert_each_other(action, rule):
    rules, wanted = np.array([rule], np.float32), np.array([action], np.float32)
    for kind, span in (("rule", 1.0), ("clock", 0.5)):
        actions = ActionMap.of(kind, span, H100)
        assert actions(actions.output_for(wanted, rules), rules) == pytest.approx(wanted, abs=1e-6)


def test_what_a_checkpoint_was_trained_on_is_in_the_file(tmp_path):
    facts = {"gpu": "h100-sxm", "llm": "llama-3.3-70b", "levels_mhz": [810.0, 1980.0]}
    dataclasses.replace(network("decode"), trained_on=facts).save(tmp_path / "a.npz")
    policy = NumpyPolicy.load(tmp_path / "a.npz", PLANTS["decode"])
    assert policy.trained_on == policy.network.trained_on == facts


def test_a_single_level_is_enough_for_the_kernels():
    """A range object made by hand may have one level only."""
    one = ClockRange(510.0, 1980.0, 15.0, (1200.0,))
    assert spread_levels_mhz(one).tolist() == [1200.0] * N_LEVELS
