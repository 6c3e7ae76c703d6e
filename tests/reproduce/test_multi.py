"""Many agents compared: decisions at intervals, tuning of both phases at once, the table."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cli_in_process import caller

pytest.importorskip("pettingzoo")

from agents.multi.multi_config import ClusterScenario
from agents.policy.numpy_policy import load_network
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.whole_run import run_cluster
from biscale_env.jobs.workers import Workers
from biscale_env.policies import resolve_policy
from biscale_env.policies.checkpoint_source import SHIPPED
from biscale_env.reproduce.multi import (
    CellBench,
    MultiCell,
    MultiPlan,
    compare_multi,
    multi_markdown,
    workloads_of,
)
from biscale_env.reproduce.multi_systems import (
    PhaseSetting,
    ladder,
    least_careful_of_both,
    of_run,
    run_choice,
)

CHAT = ClusterScenario(name="chat", loads=(0.6,))


def test_decisions_at_intervals_are_those_of_the_environment() -> None:
    """The same agents in a run and in the PettingZoo form: the same energy, request by request."""
    env = CHAT.make_env(0.1, 4.0, rate_rps=20.0)
    plant = env.options.plant
    policies = {p: resolve_policy("agent", plant.plant(p, 4)) for p in ("prefill", "decode")}
    trace = env.options.source.workload(2)
    run = run_cluster(plant, env.placement, trace, policies=policies, interval_s=0.1)
    seen, _ = env.reset(options={"workload": 2})
    while env.agents:
        actions = {}
        for agent in env.agents:
            policy = policies[agent.partition("_")[0]]
            actions[agent] = policy.predict(seen[agent])[0]
        seen, _, _, _, _ = env.step(actions)
    assert env.cluster is not None
    assert run.energy.total_j == pytest.approx(env.cluster.energies().total_j, rel=1e-12)
    assert len(run.requests) == len(trace)
    fast = run_cluster(plant, env.placement, trace)
    assert run.energy.total_j < 0.9 * fast.energy.total_j


def test_both_phases_are_tuned_to_their_first_rung_that_holds() -> None:
    for first_p, first_d in product(range(6), range(4)):  # beyond the last: none holds
        asked: list[dict[str, int]] = []

        def holds(
            at: Any, p: int = first_p, d: int = first_d, told: list[Any] = asked
        ) -> dict[str, bool]:
            told.append(dict(at))
            return {"prefill": at["prefill"] >= p, "decode": at["decode"] >= d}

        found, met = least_careful_of_both({"prefill": 5, "decode": 3}, holds)
        assert found == {"prefill": min(first_p, 4), "decode": min(first_d, 2)}
        assert met == {"prefill": first_p < 5, "decode": first_d < 3}
        assert len(asked) <= 3


def test_ladders_rise_in_care() -> None:
    plant = CHAT.make_env(0.1, 4.0, rate_rps=20.0).options.plant.plant("decode", 4)
    clocks = [float(s.value) for s in ladder("static", "decode", plant)]
    assert clocks == sorted(clocks)
    assert clocks[-1] == plant.clocks.freq_max_mhz
    margins = [float(s.value) for s in ladder("tier2", "decode", plant)]
    assert margins == sorted(margins)
    prices = [str(s.value) for s in ladder("independent", "decode", plant)]
    assert prices[0] == "agent:price=2.5"
    assert prices[-1] == "agent:price=100.0,margin=0.5"
    with pytest.raises(BiscaleError, match="unknown system"):
        ladder("tier3", "decode", plant)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_prices_are_those_that_the_network_was_trained_on(phase, tmp_path) -> None:
    shipped = load_network(SHIPPED / f"{phase}.npz")
    config = dict(shipped.card["config"], price=[0.2, 30.0])
    replace(shipped, card={"config": config}).save(tmp_path / "other.npz")
    plant = CHAT.make_env(0.1, 4.0, rate_rps=20.0).options.plant.plant(phase, 4)
    for system, agent, (low, high) in (
        ("independent", None, shipped.card["config"]["price"]),
        ("shared", str(tmp_path / "other.npz"), (0.2, 30.0)),
    ):
        names = [str(rung.value) for rung in ladder(system, phase, plant, agent)]
        prices = [float(re.search(r"price=([0-9.]+)", name).group(1)) for name in names]
        assert low < prices[0] < 3 * low
        assert prices[-1] == high
        assert prices == sorted(prices)


def test_tuning_and_judgement_share_no_workload() -> None:
    plan = MultiPlan(window_s=5.0, n_tune=2, n_judged=2)
    cell = MultiCell("chat", CHAT)
    parts = [workloads_of(cell, plan, judged, 20.0) for judged in (False, True)]
    digests = {w.sha256 for part in parts for w in part}
    assert len(digests) == 4
    again = workloads_of(cell, plan, True, 20.0)
    assert [w.sha256 for w in again] == [w.sha256 for w in parts[1]]


def test_a_choice_of_rules_and_clocks_is_what_the_cluster_runs() -> None:
    env = CHAT.make_env(0.1, 4.0, rate_rps=20.0)
    trace = env.options.source.workload(0)
    plant, placement = env.options.plant, env.placement
    slow = {p: PhaseSetting("static", 1200.0) for p in ("prefill", "decode")}
    rules = {p: PhaseSetting("rule", 0.2) for p in ("prefill", "decode")}
    energies = [
        run_choice(plant, placement, trace, choice, 0.1).energy.total_j for choice in (slow, rules)
    ]
    at_max = run_cluster(plant, placement, trace).energy.total_j
    assert max(energies) < at_max
    assert energies[0] != energies[1]


@pytest.mark.slow
def test_the_comparison_end_to_end() -> None:
    plan = MultiPlan(window_s=10.0, n_tune=1, n_judged=2)
    cell = MultiCell("chat", CHAT)
    systems = ["max", "tier2", "independent"]
    frame = compare_multi([cell], systems, plan, None, Workers.of(1, None), lambda done, of: None)
    assert len(frame) == 6
    table = multi_markdown(frame, 0.99)
    assert "BiScale's tier 2" in table
    assert "chat, " in table
    bench = CellBench(cell, plan)
    assert frame["rate_rps"].iloc[0] == bench.rate_rps
    at_max = frame[frame["policy"] == "max"]["energy_j"].sum()
    assert frame[frame["policy"] == "tier2"]["energy_j"].sum() < at_max


def test_a_missed_bound_is_struck_through() -> None:
    base = {"split": "x", "service": "x", "seed": 0, "setting": "s", "rate_rps": 1.0}
    sums = {"prefill_j": 1e6, "decode_j": 1e6, "requests": 100.0, "late_ttft": 0.0}
    rows = [
        {**base, **sums, "policy": policy, "day": day, "energy_j": joules, "late_tpot": late}
        for policy, joules, late in (("max", 4e6, 0.0), ("tier2", 2e6, 0.0), ("shared", 1e6, 2.0))
        for day in range(3)
    ]
    table = multi_markdown(pd.DataFrame(rows), 0.99)
    assert "~~3.00~~" in table
    assert "| 6.00 | 0.500 |" in table
    assert "-50.0 [-50.0, -50.0]" in table
    assert np.char.count(table, "~~") == 2


def test_mistakes(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    with pytest.raises(BiscaleError, match=r"holds no prefill\.npz"):
        of_run(tmp_path)
    call = caller(capsys, monkeypatch, tmp_path, "reproduce", "multi")
    for options, words in (
        (["--systems", "tier3"], "unknown system 'tier3'"),
        (["--windows", "0"], "--windows must be at least 1"),
        (["--agent", "nothing"], "holds no prefill.npz"),
        (["--systems", "max,shared"], "no shared agents are shipped"),
    ):
        code, _, error = call(*options)
        assert code == 2
        assert words in error


def test_without_shared_agents_the_other_systems_are_compared(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    asked = []

    def compare(cells: Any, systems: Any, plan: Any, agents: Any, *more: Any) -> pd.DataFrame:
        asked.append((list(systems), agents))
        raise BiscaleError("enough")

    monkeypatch.setattr("biscale_env.reproduce.multi.compare_multi", compare)
    for phase in ("prefill", "decode"):
        (tmp_path / f"{phase}.npz").touch()
    call = caller(capsys, monkeypatch, tmp_path, "reproduce", "multi")
    for options in ([], ["--agent", "."]):
        assert call(*options)[2] == "biscale: enough\n"
    alone, with_shared = asked
    assert alone == (["max", "static", "tier2", "independent", "independent-each"], None)
    assert with_shared == (
        [*alone[0], "shared"],
        {"prefill": "prefill.npz", "decode": "decode.npz"},
    )


@pytest.mark.slow
def test_asked_before_every_iteration_a_policy_decides_as_tier_2_does() -> None:
    """The same law through ``predict`` and compiled: clocks, and so energies, agree."""
    scenario = ClusterScenario(name="x", placement="three-prefill-16", profile="azure-conv-like")
    bench = CellBench(MultiCell("x", scenario, 0.75), MultiPlan(window_s=20.0))
    work = workloads_of(bench.cell, bench.plan, True, bench.rate_rps)[:2]
    energies = {}
    for name, kind, values in (
        ("compiled", "rule", {"prefill": 0.0, "decode": 0.0}),
        ("asked", "each", {"prefill": "mpc:margin=0", "decode": "slack:margin=0"}),
        ("at intervals", "policy", {"prefill": "mpc:margin=0", "decode": "slack:margin=0"}),
    ):
        choice = {phase: PhaseSetting(kind, value) for phase, value in values.items()}
        runs = bench.run(choice, work)
        energies[name] = np.array([[r.energy.prefill_j, r.energy.decode_j] for r in runs])
    np.testing.assert_allclose(energies["asked"][:, 1], energies["compiled"][:, 1], rtol=0.01)
    np.testing.assert_allclose(energies["asked"][:, 0], energies["compiled"][:, 0], rtol=0.02)
    assert (energies["at intervals"][:, 0] > 1.05 * energies["compiled"][:, 0]).all()
    mixed = {"prefill": PhaseSetting("each", "mpc"), "decode": PhaseSetting("policy", "slack")}
    with pytest.raises(BiscaleError, match="not both"):
        bench.run(mixed, work)
