"""An oracle's plan found before is read, not solved; everything it depends on is in its key."""

import json
from dataclasses import replace

import numpy as np
import pytest
from oracle_helpers import plant_of

from biscale_env.traces import generate
from controllers.oracle import kept_plans
from controllers.oracle.kept_plans import kept_oracle, plan_key
from controllers.oracle.make import make_oracle

TRACE = generate("azure-conv-like", rate_rps=1.0, duration_s=20.0, seed=0)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "oracle-plans"


@pytest.fixture
def no_search(monkeypatch):
    def refuse(*_):
        raise AssertionError("solved again")

    return lambda: monkeypatch.setattr(kept_plans, "make_oracle", refuse)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_plan_comes_back_to_the_last_bit(phase, no_search):
    plant = plant_of(phase, drain=True)
    first, told = kept_oracle(plant, TRACE, 0.99)
    no_search()
    again, same = kept_oracle(plant_of(phase, drain=True, actuation_delay_s=0.3), TRACE, 0.99)
    np.testing.assert_array_equal(first.plan_mhz, again.plan_mhz)
    np.testing.assert_equal(told, same)
    renamed = replace(TRACE, name="other", source="elsewhere")
    np.testing.assert_equal(kept_oracle(plant, renamed, 0.99)[1], told)


def test_what_is_kept_is_what_the_oracle_says():
    plant = plant_of("prefill", drain=True)
    (_, told), (_, plain) = kept_oracle(plant, TRACE, 0.99), make_oracle(plant, TRACE, 0.99)
    told, plain = ({k: v for k, v in i.items() if k != "seconds"} for i in (told, plain))
    np.testing.assert_equal(told, plain)


@pytest.mark.parametrize("text", ["", "[]", '{"plan_mhz": [], "info": {}}',
                                  '{"plan_mhz": [NaN], "info": {}}',
                                  '{"plan_mhz": [990.0], "info": {"replay_j": 1.0}}'])  # fmt: skip
def test_a_damaged_file_is_solved_again(text, folder):
    plant = plant_of("prefill", drain=True)
    _, told = kept_oracle(plant, TRACE, 0.99)
    (path,) = folder.rglob("*.json")
    path.write_text(text)
    _, again = kept_oracle(plant, TRACE, 0.99)
    assert again["replay_j"] == told["replay_j"]
    assert json.loads(path.read_text())["info"]["replay_j"] == told["replay_j"]


def test_everything_that_a_plan_depends_on_is_in_its_key():
    plant, more = plant_of("prefill", drain=True), {"drain": True}
    keys = [
        plan_key(plant, TRACE, 0.99, -1),
        plan_key(plant, TRACE, 0.95, -1),
        plan_key(plant, TRACE, None, -1),
        plan_key(plant, TRACE, 0.99, 0),
        plan_key(plant, replace(TRACE, duration_s=21.0), 0.99, -1),
        plan_key(plant, TRACE.scaled_to(0.5, 0), 0.99, -1),
        *(
            plan_key(plant_of("prefill", **more | change), TRACE, 0.99, -1)
            for change in (
                {"drain": False},
                {"slo": "mlperf-server"},
                {"token_budget": 1000},
                {"idle": "parked"},
                {"violation_weight": 3.0},
                {"tp": 8},
                {"gpu": "a100-sxm"},
                {"llm": "llama-3.1-8b", "tp": 1},
            )
        ),
        plan_key(plant_of("decode", **more), TRACE, 0.99, -1),
    ]
    assert len(set(keys)) == len(keys)
