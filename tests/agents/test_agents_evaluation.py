"""What `biscale evaluate` makes of training seeds: tables, scores, splits, learning curves."""

import numpy as np
import pandas as pd
import pytest

from agents.training.progress.curves import draw, learning_curves, spread
from biscale_env.config.loader import list_names, load_named
from biscale_env.config.loader import validate as check
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment import robustness
from biscale_env.evaluation.report import agent_table
from biscale_env.evaluation.report.robustness_table import robustness_markdown
from biscale_env.evaluation.rollouts.scenarios import Scenario, load_scenario


def frame(agent, own=0.8, lost=5, max_lost=5, oracle=0.7, seeds=(0, 1), scenario="synthetic"):
    """Two workloads of 1000 requests; ``agent`` gives the energy ratio per training seed."""
    rows = []
    for policy, seed, ratio, late in [
        ("max", -1, 1.0, max_lost),
        ("static-hindsight", -1, 0.9, lost),
        ("mpc", -1, own, lost),
        ("oracle", -1, oracle, 10),
        *(("agent", s, a, lost) for s, a in zip(seeds, agent, strict=True)),
    ]:
        rows += [
            {
                "phase": "prefill", "scenario": scenario, "load": 0.75, "policy": policy,
                "training_seed": seed, "workload_seed": w, "ensemble_member": -1,
                "energy_ratio": ratio + 0.01 * w * (policy != "max"), "n_counted": 1000,
                "n_violations": late, "slo_attainment": 0.99,
            }
            for w in range(2)
            if policy != "oracle" or w == 0
        ]  # fmt: skip
    made = pd.DataFrame(rows)
    made["run_id"] = [f"{scenario}-{i}" for i in range(len(made))]
    return made.assign(variant="", output_tokens=1000.0, tp=4, dtype="bf16", slo="biscale")


def windows(results, share=(0.2, 0.3, 0.1, 0.25, 0.15)):
    """Five windows per run, each with its share of everything."""
    share = np.array(share)
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "window": np.arange(5.0), "begin_s": 120.0 * np.arange(5),
                    "energy_j": 500.0 * row.energy_ratio * share, "n_counted": 1000 * share,
                    "n_met": (1000 - row.n_violations) * share, "output_tokens": 1000 * share,
                    "copies": 1.0, "run_id": row.run_id,
                }
            )
            for row in results.itertuples()
        ]
    )  # fmt: skip


def point_cells(results, **options):
    """Cells of the only row, by heading."""
    (row,) = agent_table.point_rows(results, windows(results), "prefill", **options)
    return dict(zip(agent_table.HEAD, row, strict=True))


def test_the_shipped_seed_stands_in_the_table_and_all_seeds_beside_it():
    cells = point_cells(frame([0.75, 0.77]), shipped=1)
    assert cells["agent"] == "0.775 (99.50)"
    assert cells["agent - own"].startswith("-3.0 [")
    assert cells["gap closed"] == "30%"  # (0.80 - 0.77) / (0.80 - 0.70) on the oracle's workload
    assert cells["training seeds"] == "0.765 [0.755, 0.775]"
    assert cells["that hold"] == "2 of 2"
    everybody = point_cells(frame([0.75, 0.77]))
    assert everybody["agent"] == "0.765 (99.50)"


def test_a_policy_of_another_name_has_the_table_of_an_agent():
    """Same figures under its own heading; an agent that stands beside it is not mixed in."""
    results = frame([0.75, 0.77])
    plain = agent_table.markdown(results, windows(results), {"prefill": 1})
    mine = results.assign(policy=results["policy"].replace("agent", "mine"))
    beside = frame([0.4, 0.4])[lambda f: f["policy"] == "agent"]
    both = pd.concat([mine, beside])
    text = agent_table.markdown(both, windows(results), {"prefill": 1}, "mine")
    assert text == plain.replace("| agent ", "| mine ")
    for head in ("| mine |", "| mine - own |", "| mine - static |"):
        assert head in text


def test_a_missed_slo_is_struck_through_and_never_rounded_away():
    cells = point_cells(frame([0.75], lost=11, seeds=[0]))
    assert cells["agent"] == "~~0.755 (98.90?)~~"
    assert cells["that hold"] == "0 of 1"
    just = agent_table.Shown(0.5, 0.98999, False)
    assert str(just) == "~~0.500 (98.99)~~"


def test_scores_are_between_max_clock_and_oracle_and_leave_out_what_max_clock_misses():
    both = pd.concat([frame([0.75, 0.75]), frame([0.1, 0.1], max_lost=20, scenario="hopeless")])
    s = agent_table.scores(both, windows(both), "prefill")
    assert s["points"] == 1
    assert s["agent"].estimate == pytest.approx((1 - 0.755) / 0.3)
    assert s["own"].estimate == pytest.approx((1 - 0.805) / 0.3)
    assert s["better"].estimate == 1.0
    half = frame([0.9, 0.7])
    assert agent_table.scores(half, windows(half), "prefill")["better"].estimate == 0.5
    text = agent_table.markdown(both, windows(both), {"prefill": 0})
    assert "over the 1 points" in text
    assert text.count("| synthetic") == 1


@pytest.mark.parametrize("name", list_names("robustness"))
def test_shipped_conditions_are_scenarios(name):
    plan = load_named("robustness", name, robustness.Robustness)
    kept_apart = ["in distribution", "shifted", "unseen", "another LLM", "another GPU"]
    assert list(plan.splits) == kept_apart
    for condition in (c for part in plan.splits.values() for c in part):
        check(
            load_scenario(condition.scenario).model_dump() | condition.changes,
            Scenario,
            condition.name,
        )


def test_splits_stay_apart_in_the_table():
    both = pd.concat(
        [
            frame([0.75, 0.75], scenario="shifted: load 30 %"),
            frame([0.7, 0.7], scenario="unseen: code"),
        ]
    )
    text = robustness_markdown(both, windows(both))
    assert "| prefill | shifted | load 30 % |" in text
    assert "| prefill | unseen | code |" in text


def curve(folder, seed, scores):
    (folder / f"seed-{seed}").mkdir()
    rows = [f"{100 * k},{s},{s},0.99,{s + 0.1},0.98" for k, s in enumerate(scores)]
    head = "step,score,energy_ratio:a,attainment:a,energy_ratio:b,attainment:b"
    (folder / f"seed-{seed}" / "evaluations.csv").write_text("\n".join([head, *rows]) + "\n")


def test_learning_curves_show_the_spread_over_seeds(tmp_path):
    for seed, scores in enumerate([[0.9, 0.8], [0.9, 0.7], [0.9, 0.6, 0.5]]):
        curve(tmp_path, seed, scores)
    curves = learning_curves(tmp_path)
    assert curves["energy_ratio"].iloc[0] == pytest.approx(0.95)
    assert (curves["lowest_attainment"] == 0.98).all()
    s = spread(curves)
    assert s.loc[100, ["low", "median", "high"]].tolist() == pytest.approx([0.6, 0.7, 0.8])
    assert s["seeds"].tolist() == [3, 3, 1]
    pytest.importorskip("matplotlib")
    draw({"prefill": curves}, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")
    alone = learning_curves(tmp_path / "seed-2")
    assert alone["score"].tolist() == [0.9, 0.6, 0.5]
    assert set(alone["seed"]) == {0}
    with pytest.raises(BiscaleError, match="holds no seed-"):
        learning_curves(tmp_path / "nothing")


def test_matrix_of_training_seeds_by_workloads():
    assert np.allclose(
        agent_table.by_seed(frame([0.75, 0.77])[lambda f: f.policy == "agent"]),
        [[0.75, 0.76], [0.77, 0.78]],
    )
