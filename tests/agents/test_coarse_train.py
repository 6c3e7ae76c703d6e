"""Training of the coarse policy from end to end, resumed, and from the command line."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from cli_in_process import caller
from test_coarse_parts import table

pytest.importorskip("torch")

from agents.coarse.coarse_agent import CoarseAgent
from agents.coarse.coarse_checkpoint import load_coarse
from agents.coarse.coarse_config import CoarseConfig, load_coarse_config
from agents.coarse.coarse_run import train_coarse
from agents.coarse.forecast_fit import examples, fit_forecast
from agents.coarse.window_costs import kinds_of, measure_costs
from biscale_env.core.errors import BiscaleError
from biscale_env.jobs.workers import Workers
from biscale_env.reproduce.coarse import (
    CoarseSplit,
    coarse_markdown,
    compare_coarse,
    energy_against,
)
from controllers.placement.load_plans import LoadPlans

SMALL = {
    "env": {"gpus": 6, "dtype": "fp8", "freqs_mhz": [1980.0]},
    "window_s": 20.0,
    "windows": 4,
    "services": ["servegen-m-large-fortnight"],
    "days": [0],
    "validation_days": [1],
    "mean_rps": 5.0,
    "measured_s": 10.0,
    "steps": 30,
    "members": 2,
    "tuning_days": 1,
}


@pytest.fixture(autouse=True)
def _made_up_table(monkeypatch):
    """Measuring a capacity table takes minutes and is tested elsewhere."""
    made = classmethod(lambda cls, env: cls(table(), env.plant.settings.gpus))
    monkeypatch.setattr(LoadPlans, "of_env", made)


def small(**changes):
    return CoarseConfig(**{**SMALL, **changes})


@pytest.mark.slow
def test_a_run_from_scratch_and_resumed_gives_the_same_bits(tmp_path):
    said: list[str] = []
    made = train_coarse(small(), tmp_path, False, Workers(1), said.append)
    assert any("forecast 2 of 2" in line for line in said)
    tuned = json.loads((tmp_path / "tuning.json").read_text())
    assert str(made.price) in tuned
    assert made.card["tuning"][0]["requests"] > 0
    first = (tmp_path / "best.npz").read_bytes()
    (tmp_path / "best.npz").unlink()
    said.clear()
    train_coarse(small(), tmp_path, True, Workers(1), said.append)
    assert not any("forecast" in line for line in said)  # it was kept
    assert (tmp_path / "best.npz").read_bytes() == first
    (tmp_path / "untuned.npz").unlink()
    again = train_coarse(small(), tmp_path, True, Workers(1), said.append)
    np.testing.assert_array_equal(again.forecast.weights, made.forecast.weights)
    np.testing.assert_array_equal(again.costs.power_w, made.costs.power_w)


def test_runs_that_may_not_be_resumed(tmp_path):
    with pytest.raises(BiscaleError, match="no training run to resume"):
        train_coarse(small(), tmp_path, True, Workers(1), print)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small().model_dump(mode="json")))
    with pytest.raises(BiscaleError, match="holds a training run already"):
        train_coarse(small(), tmp_path, False, Workers(1), print)
    with pytest.raises(BiscaleError, match=r"'mean_rps' was 5\.0 and is now 6\.0"):
        train_coarse(small(mean_rps=6.0), tmp_path, True, Workers(1), print)


@pytest.mark.slow
def test_measured_costs_rise_with_instances_and_load():
    """More decode instances draw more power and miss less; misses do not fall with the load."""
    env = small().make_env()
    kinds = [k for k in kinds_of(env, LoadPlans.of_env(env), 60.0) if k.tp == 2]
    costs = measure_costs(env, kinds, lambda done, number: None)
    one, two = (costs.number("decode", 2, n) for n in (1, 2))
    loads = np.array([2.0, 6.0, 25.0])
    (low_w, many), (high_w, few) = costs.at(one, loads), costs.at(two, loads)
    assert (low_w < high_w)[:2].all()
    assert many[0] == few[0] == 0.0
    assert many[2] > few[2]
    assert many[2] > 0.5


def test_the_forecast_learns_what_there_is_to_learn(monkeypatch):
    """Loads that swing to and fro around their mean: what went up comes down."""
    config = small(windows=144, window_s=600.0, steps=120, members=1, services=["x"])
    rng = np.random.default_rng(0)
    loads = 5.0 * np.exp(0.3 * rng.standard_normal((3, 144)))
    monkeypatch.setattr(
        "agents.coarse.service_days.ServiceDay.rates_rps", lambda day, n, s: loads[day.day]
    )
    made = fit_forecast(config, lambda line: None)
    seen, change = examples(config, [2])
    location, _ = made.location_and_spread(seen)
    assert np.corrcoef(location, change)[0, 1] > 0.5  # 0.71 is the best there is
    spans = made.location_and_spread(seen)[1]
    assert 0.1 < spans.mean() < 0.5


def test_days_of_training_are_no_held_out_days():
    with pytest.raises(BiscaleError, match="day 1 is in days and in validation_days"):
        load_coarse_config_of(small().model_dump(mode="json") | {"days": [0, 1]})
    split = CoarseSplit("same", ("servegen-m-large-fortnight",), (1, 2))
    with pytest.raises(BiscaleError, match="'same' has days of training"):
        compare_coarse(small(), ["ilp"], Workers(1), lambda d, n: None, [split])


def load_coarse_config_of(plain):
    from agents.coarse.coarse_config import checked

    return checked(CoarseConfig(**plain))


def test_the_shipped_config_keeps_its_second_week_apart():
    config = load_coarse_config(None)
    assert max(*config.days, *config.validation_days) < 7


@pytest.mark.slow
def test_policies_stand_beside_each_other_on_held_out_days(tmp_path):
    train_coarse(small(), tmp_path, False, Workers(1), lambda line: None)
    split = CoarseSplit("held out", ("servegen-m-mid-fortnight",), (2, 3))
    names = ["largest", "ilp:0.3", str(tmp_path)]
    frame = compare_coarse(small(), names, Workers(1), lambda d, n: None, [split])
    assert frame.groupby("policy").size().to_dict() == dict.fromkeys(names, 2)
    assert frame.groupby("day")["requests"].nunique().max() <= 3
    text = coarse_markdown(frame, "ilp:0.3", 0.99)
    assert text.count("held out") == 3
    env = small().make_env()
    assert isinstance(CoarseAgent(load_coarse(tmp_path / "best.npz"), env).price, float)


def test_energy_is_compared_day_by_day():
    rows = [
        {"policy": p, "service": "s", "day": d, "seed": 0, "energy_j": e * (d + 1)}
        for p, e in (("a", 9.0), ("b", 10.0))
        for d in range(5)
    ]
    found = energy_against(pd.DataFrame(rows), "a", "b", np.random.default_rng(0))
    assert tuple(found) == pytest.approx((-10.0, -10.0, -10.0))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--algo", "sac"], "takes no --algo"),
        (["--steps", "5"], "takes no --steps"),
        (["--seeds", "2"], "takes no --seeds"),
        (["--gpu", "h200-sxm"], "takes no gpu"),
        (["--resume"], "give it with --out"),
    ],
)
def test_mistakes_on_the_command_line(given, match, capsys, monkeypatch, tmp_path):
    code, _, error = caller(capsys, monkeypatch, tmp_path, "train", "cluster")(*given)
    assert code == 2
    assert match in " ".join(error.split())


def test_one_command_trains(capsys, monkeypatch, tmp_path):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small().model_dump(mode="json")))
    call = caller(capsys, monkeypatch, tmp_path, "train", "cluster")
    code, out, error = call("--config", "small.yaml", "--out", "run", "--seed", 3)
    assert code == 0, error
    assert "tuning days at price" in out
    assert load_coarse(tmp_path / "run" / "best.npz").card["config"]["seed"] == 3


@pytest.mark.slow
def test_one_command_makes_the_table(capsys, monkeypatch, tmp_path):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small().model_dump(mode="json")))
    train_coarse(small(), tmp_path / "run", False, Workers(1), lambda line: None)
    split = CoarseSplit("held out", ("servegen-m-mid-fortnight",), (2,))
    monkeypatch.setattr("biscale_env.reproduce.coarse.SPLITS", (split,))
    call = caller(capsys, monkeypatch, tmp_path, "reproduce", "coarse", "--jobs", "1")
    given = ["--agent", tmp_path / "run", "--config", "small.yaml", "--out", "table"]
    code, out, error = call(*given)
    assert code == 0, error
    assert "tuning days at headroom" in out
    frame = pd.read_csv(tmp_path / "table" / "coarse.csv")
    assert set(frame["split"]) == {"held out"}
    assert str(tmp_path / "run") in set(frame["policy"])
    assert (tmp_path / "table" / "coarse.md").read_text().strip() in out
