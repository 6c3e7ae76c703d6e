"""One network for any LLM on any GPU: what features say of costs, and training over a mixture."""

import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from agents.policy.feature_parts import N_LEVELS, spread_levels_mhz
from agents.policy.features import NAMES, FeatureMap, plants_of
from agents.policy.numpy_policy import NumpyPolicy
from agents.training.clone import Teacher
from agents.training.heldout import HeldOut
from agents.training.train_config import AgentConfig, load_config
from agents.training.worlds.group_plants import GroupPlants
from agents.training.worlds.mixture import make_groups
from agents.training.worlds.training_env import AgentVecEnv
from biscale_env.config.instance import DEFAULT_GPU, DEFAULT_LLM, InstanceSpec
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.loads.capacity import run_static
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.experiment.robustness import load_robustness
from biscale_env.models import load_model
from biscale_env.traces import Trace
from controllers.base import context_of
from controllers.registry import make_policy
from tests.agents.test_agents_levels import network

PHASES = ("prefill", "decode")
SMALL = {"llm": "llama-3.1-8b", "tp": 1}


def plant_with_a_crowd(phase: str, **settings: object) -> tuple[Plant, Batch]:
    """Four requests that have just come, in one row."""
    plant = Plant(PlantSettings.of(phase, **settings))
    n = 4
    trace = Trace("t", np.full(n, 0.5), np.full(n, 700, np.int32), np.full(n, 50, np.int32), "test")
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]))
    batch.reset(np.zeros(1, int), np.zeros(1, int), np.full(1, -1))
    return plant, batch


def named(plant: Plant, batch: Batch) -> dict[str, float]:
    made = FeatureMap(plant.phase, plant.spec)(batch.obs, *plants_of(plant, plant.phase, [-1]))
    return dict(zip(NAMES[plant.phase], made.features[0].tolist(), strict=True))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("settings", [{}, SMALL, {"gpu": "b200-sxm", "tp": 2}], ids=str)
def test_energy_at_the_levels_is_the_models_relative_to_the_highest(phase, settings):
    plant, batch = plant_with_a_crowd(phase, **settings)
    got = named(plant, batch)
    x = batch.obs[0] * plant.spec.scale
    at = plant.spec.index
    if phase == "prefill":
        tokens, attn = x[at("batch_tokens_0")], x[at("batch_attn_0")]
        work = (tokens, attn, 0.0, x[at("batch_requests_0")])
    else:
        work = (x[at("batch")], 0.0, x[at("cached_tokens")], x[at("batch")])
    joules = plant.model.energy_j(*work, spread_levels_mhz(plant.clocks))
    said = [got[f"energy_at_level_{k}"] for k in range(N_LEVELS)]
    assert said == pytest.approx((joules / joules[-1]).tolist(), rel=2e-3)
    assert said[-1] == 1.0


@pytest.mark.parametrize("phase", PHASES)
def test_a_parked_instance_waits_at_one_power_and_its_features_say_so(phase):
    plant, batch = plant_with_a_crowd(phase)
    lively = named(plant, batch)
    assert lively["idle_at_highest"] > 1.1 * lively["idle_at_lowest"]
    low, high = (plant.waiting_power_w(-1, f) for f in (plant.clocks.freq_min_mhz, 1980.0))
    assert lively["idle_at_highest"] / lively["idle_at_lowest"] == pytest.approx(high / low, 1e-4)
    parked = named(*plant_with_a_crowd(phase, idle="parked"))
    assert parked["idle_at_highest"] == parked["idle_at_lowest"] == lively["idle_at_lowest"]


def test_a_policy_in_a_controllers_context_sees_the_same_plant():
    made, actions = network("decode"), []
    made.weights[-1][:] *= 0.05  # far from the ends of the range
    obs = plant_with_a_crowd("decode")[1].obs
    for idle in ("last-clock", "parked"):
        plant = Plant(PlantSettings.of("decode", idle=idle))
        own, told = NumpyPolicy(made, plant), NumpyPolicy(made, context_of(plant))
        assert own.predict(obs)[0] == told.predict(obs)[0]
        actions.append(own.predict(obs)[0].item())
    assert actions[0] != actions[1], "the rule of idle power reaches the network"


def mixed(phase: str = "prefill") -> AgentConfig:
    """A mixture of three kinds of instances, small."""
    part = {"profile": "azure-conv-like", "rates_rps": (2.0,), "workloads": 2, "episode_s": 30.0}
    return AgentConfig.model_validate(
        {
            "phase": phase,
            "n_envs": 24,
            "total_timesteps": 1000,
            "mixture": [
                part,
                {**part, **SMALL, "rates_rps": (8.0,)},
                {**part, "gpu": "b200-sxm", "tp": 2, "idle": "parked", "slo": "distserve"},
            ],
            "randomise": {"delay_s": None, "nominal_share": 1.0},
        }
    )


def test_a_part_names_its_instance_and_takes_the_llms_published_format():
    groups, _ = make_groups(mixed())
    specs = [g.plant.settings.instance for g in groups]
    assert [s.family for s in specs] == [
        "h100-sxm/llama-3.3-70b", "h100-sxm/llama-3.1-8b", "b200-sxm/llama-3.3-70b"
    ]  # fmt: skip
    assert [s.tp for s in specs] == [4, 1, 2]
    assert groups[2].slo_s == 0.4
    assert groups[2].name == "azure-conv-like-distserve-b200-sxm-tp2-parked-2rps"
    part = mixed().mixture[0].model_copy(update={"llm": "gpt-oss-20b", "tp": 1})
    assert part.instance_of(specs[0]).dtype == "mxfp4"


@pytest.mark.parametrize("phase", PHASES)
def test_every_row_is_of_its_own_groups_plant(phase):
    """A mixture's rows do what the same plants do alone: clocks, model, idle rule, reference."""
    config = mixed(phase)
    groups, counts = make_groups(config)
    env = AgentVecEnv(config, groups, counts, seed=0)
    env.reset()
    for g, group in enumerate(groups):
        rows = np.flatnonzero(env.group == g)
        alone = group.plant.params(-1, 30.0)
        for name in alone.dtype.names:
            assert np.array_equal(env.batch.params[name][rows], [alone[name]] * len(rows)), name
        assert [tuple(c) for c in env.batch.coefs[rows]] == [
            tuple(group.plant.model.member(-1))
        ] * len(rows)
        features = env.features(env.batch.obs, *plants_of(group.plant, phase, [-1])).features
        assert np.array_equal(env._observe()[rows], features[rows]), "told its own plant"
    assert env.plants.energy_ref_j.tolist() == [g.plant.energy_ref_j for g in groups]


def test_held_out_at_max_clock_is_the_energy_of_each_groups_own_plant():
    config = mixed()
    groups, _ = make_groups(config)
    held_out = HeldOut(config, groups, 1)
    half = held_out(lambda obs, start: np.zeros(len(obs), dtype=np.float32))
    for g, group in enumerate(groups):
        workload = group.source.workload(5000)
        low, high = group.plant.clocks.freq_min_mhz, group.plant.clocks.freq_max_mhz
        slow, fast = (run_static(group.plant, workload, f) for f in ((low + high) / 2, high))
        ratio = slow.energy_j / fast.energy_j
        assert half.energy_ratio[g] == pytest.approx(ratio, rel=0.02), group.name


def test_the_teacher_knows_each_groups_model():
    config = mixed()
    groups, counts = make_groups(config)
    env = AgentVecEnv(config, groups, counts, seed=1)
    env.reset()
    said = Teacher("mpc:margin=0.2", env)(env.batch.obs.copy())
    for g, group in enumerate(groups):
        rows = env.group == g
        alone = make_policy("mpc:margin=0.2", context_of(group.plant))
        assert np.array_equal(said[rows], alone.predict(env.batch.obs[rows])[0][:, 0])
    with pytest.raises(BiscaleError, match="unknown policy"):
        Teacher("nobody", env)


def test_records_of_members_are_the_members():
    groups, _ = make_groups(mixed())
    plants = GroupPlants(groups, 0.0)
    at = np.array([0, 1, 2]), np.array([3, -1, 0])
    got = plants.records(*at)
    expected = [groups[g].plant.model.member(k) for g, k in zip(*at, strict=True)]
    assert [tuple(c) for c in got.coefs] == [tuple(c) for c in expected]
    assert load_model("prefill").n_members == plants.n_members[0]
    assert got.params["parked"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("phase", PHASES)
def test_the_shipped_mixture_never_saw_what_robustness_calls_another(phase):
    """Its LLMs and GPUs are those of the parts; the splits named so have others."""
    seen = [part.instance_of(InstanceSpec()) for part in load_config(None, phase).mixture]
    llms, gpus = {s.llm or DEFAULT_LLM for s in seen}, {s.gpu or DEFAULT_GPU for s in seen}
    splits = load_robustness("default").splits
    assert {c.changes["llm"] for c in splits["another LLM"]}.isdisjoint(llms)
    assert {c.changes["gpu"] for c in splits["another GPU"]}.isdisjoint(gpus)
    assert len(llms) >= 3
    assert len(gpus) >= 2
