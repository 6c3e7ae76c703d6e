"""Checkpoints without torch.

Equal to SB3's network, refused when they do not fit, fast enough to decide every iteration.
"""

import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from agents.policy.features import NAMES, FeatureMap, feature_id, tighten
from agents.policy.numpy_policy import Network, NumpyPolicy, load_network
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces import Trace


def network(phase="prefill", price=None, seed=0, **changes):
    rng = np.random.default_rng(seed)
    dims = [len(NAMES[phase]) + (price is not None), 64, 64, 1]
    weights = [rng.normal(0, 0.2, (a, b)).astype(np.float32) for a, b in itertools.pairwise(dims)]
    biases = [rng.normal(0, 0.2, b).astype(np.float32) for b in dims[1:]]
    known = {
        "spec_id": f"{phase}-v1",
        "feature_id": feature_id(phase),
        "action": "rule",
        "span": 0.5,
        "activation": "tanh",
    }
    return Network(phase=phase, weights=weights, biases=biases, price=price, **(known | changes))


@pytest.fixture(scope="module")
def plant():
    return Plant(PlantSettings.of("prefill"))


def some_observations(plant, n=64):
    rng = np.random.default_rng(5)
    obs = rng.uniform(0, 1, (n, plant.spec.dim)).astype(np.float32)
    obs[:, plant.spec.index("slo")] = 0.6
    return obs


def test_saved_and_loaded_it_decides_the_same(tmp_path, plant):
    made = network()
    made.save(tmp_path / "a.npz")
    obs = some_observations(plant)
    before = NumpyPolicy(made, plant).predict(obs)[0]
    after = NumpyPolicy.load(tmp_path / "a.npz", plant).predict(obs)[0]
    assert np.array_equal(before, after)
    assert after.shape == (64, 1)
    assert len(np.unique(after)) > 10
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npz"]


def test_one_observation_and_many_agree(plant):
    policy = NumpyPolicy(network(), plant)
    obs = some_observations(plant)
    many = policy.predict(obs)[0]
    assert np.allclose([policy.predict(o)[0] for o in obs[:8]], many[:8], atol=1e-5)


def test_full_output_spans_what_it_says(plant):
    made = network()
    obs = some_observations(plant)
    flat = [np.zeros_like(w) for w in made.weights]
    at = {}
    for bias in (-5.0, 0.0, 5.0):
        biases = [np.zeros_like(b) for b in made.biases[:-1]] + [np.array([bias], np.float32)]
        fixed = Network(**{**made.__dict__, "weights": flat, "biases": biases})
        at[bias] = NumpyPolicy(fixed, plant).predict(obs)[0]
    assert np.allclose(
        at[5.0], np.clip(at[0.0] + 1.0, -1, 1)
    )  # span 0.5 of the range is 1.0 of [-1, 1]
    assert np.allclose(at[-5.0], np.clip(at[0.0] - 1.0, -1, 1))


def test_price_is_a_free_parameter(plant):
    made = network(price=20.0)
    obs = some_observations(plant)
    actions = [NumpyPolicy(made, plant, price=p).predict(obs)[0] for p in (None, 20.0, 200.0)]
    assert np.array_equal(actions[0], actions[1])
    assert not np.array_equal(actions[0], actions[2])
    with pytest.raises(BiscaleError, match="must be positive"):
        NumpyPolicy(made, plant, price=0.0)
    with pytest.raises(BiscaleError, match="takes no price"):
        NumpyPolicy(network(), plant, price=2.0)


def queued(plant, slo_s):
    """Observation of a short queue under a bound."""
    arrivals, prompts = np.array([0.2, 0.21, 0.3]), np.array([900, 1500, 700], np.int32)
    trace = Trace("t", arrivals, prompts, np.full(3, 20, np.int32), "test")
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]))
    batch.reset(np.zeros(1, int), np.zeros(1, int), np.full(1, -1), {"slo_s": np.full(1, slo_s)})
    batch.step(np.zeros(1, np.float32))
    return batch.obs.copy()


def test_margin_shows_the_network_a_tighter_bound(plant):
    """What a margin of m shows is what the same queue gives under a bound (1 - m) times as long."""
    batch_of = {slo_s: queued(plant, slo_s) for slo_s in (0.6, 0.45)}
    assert np.allclose(tighten(batch_of[0.6], plant.spec, 0.25), batch_of[0.45], atol=1e-5)
    assert not np.allclose(batch_of[0.6], batch_of[0.45], atol=1e-3)
    assert tighten(batch_of[0.6], plant.spec, 0.0) is batch_of[0.6]


def test_margin_makes_the_agent_faster_and_is_checked(plant):
    made, obs = network(), queued(plant, 0.6)
    flat = Network(
        **{
            **made.__dict__,
            "weights": [np.zeros_like(w) for w in made.weights],
            "biases": [np.zeros_like(b) for b in made.biases],
        }
    )
    mean = [NumpyPolicy(flat, plant, margin=m).predict(obs)[0].mean() for m in (0.0, 0.5, 0.7)]
    assert mean[0] <= mean[1] < mean[2]
    assert NumpyPolicy(made, plant).margin == 0.0
    tight = tighten(obs, plant.spec, 0.5)  # all that a margin does: there is no floor in prefill
    np.testing.assert_array_equal(
        NumpyPolicy(made, plant, margin=0.5).predict(obs)[0],
        NumpyPolicy(made, plant).predict(tight)[0],
    )
    with pytest.raises(BiscaleError, match="below 1 of the bound"):
        NumpyPolicy(made, plant, margin=1.0)


def test_a_margin_in_decode_is_a_floor_under_the_networks_clock():
    """The lowest clock whose next iteration takes at most (1 - m) of the bound; never less."""
    plant = Plant(PlantSettings.of("decode"))
    spec, rng = plant.spec, np.random.default_rng(0)
    rows = (rng.random((300, spec.dim)) * np.minimum(spec.high, 2.0)).astype(np.float32)
    free = NumpyPolicy(network("decode"), plant).predict(rows)[0]
    before = free
    for margin in (0.2, 0.5, 0.9):
        policy = NumpyPolicy(network("decode"), plant, margin=margin)
        clocks = policy.predict(rows)[0]
        bound = rows.copy()
        bound[:, spec.index("slo")] *= np.float32(1.0 - margin)
        floor = FeatureMap("decode", spec)(bound, *policy._nominal).rule
        assert np.array_equal(clocks[:, 0], np.maximum(free[:, 0], floor))
        assert np.all(clocks >= before)
        before = clocks
    assert np.any(before > free)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spec_id": "prefill-v0"}, "was made for observation 'prefill-v0'"),
        ({"feature_id": "prefill-features-v0"}, "was made for 'prefill-features-v0'"),
    ],
)
def test_made_for_something_else_is_refused(tmp_path, plant, changes, words):
    network(**changes).save(tmp_path / "a.npz")
    with pytest.raises(BiscaleError, match=words):
        NumpyPolicy.load(tmp_path / "a.npz", plant)


def test_corrupt_missing_or_wrong_phase_is_one_sentence(tmp_path, plant):
    good = tmp_path / "a.npz"
    network().save(good)
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:300])
    (tmp_path / "text.npz").write_text("not a checkpoint")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name in ("cut.npz", "text.npz", "other.npz"):
        with pytest.raises(BiscaleError, match="cannot be read"):
            load_network(tmp_path / name)
    with pytest.raises(BiscaleError, match="does not exist"):
        load_network(tmp_path / "missing.npz")
    with pytest.raises(BiscaleError, match="is for prefill, but the environment is decode"):
        NumpyPolicy.load(good, Plant(PlantSettings.of("decode")))
    broken = network()
    broken.weights[0][0, 0] = np.nan
    broken.save(tmp_path / "nan.npz")
    with pytest.raises(BiscaleError, match="not finite"):
        load_network(tmp_path / "nan.npz")
    with pytest.raises(BiscaleError, match="wrong phase"):
        NumpyPolicy(network(), plant).predict(np.zeros((1, 5), np.float32))


@pytest.mark.slow
def test_torch_is_not_imported(tmp_path):
    network().save(tmp_path / "a.npz")
    code = (
        "import sys, pathlib, agents; from biscale_env.envs.plant import Plant, PlantSettings\n"
        "plant = Plant(PlantSettings.of('prefill'))\n"
        f"agents.load_agent(pathlib.Path({str(tmp_path / 'a.npz')!r}), plant)\n"
        "print(json.dumps([m for m in ('torch', 'stable_baselines3') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import json\n" + code], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_decision_takes_at_most_100_microseconds(phase):
    plant = Plant(PlantSettings.of(phase))
    policy = NumpyPolicy(network(phase, price=10.0), plant)
    obs = some_observations(plant, 1)
    policy.predict(obs)
    spent = []
    for _ in range(3000):
        start = time.perf_counter()
        policy.predict(obs)
        spent.append(time.perf_counter() - start)
    assert np.median(spent) <= 100e-6
