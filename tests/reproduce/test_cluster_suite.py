"""Suites of whole clusters: frozen tasks, what becomes of rows, runs that go on."""

import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from biscale_env.cli import build
from biscale_env.config.loader import list_names, validate
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.suite.leaderboard import leaderboard_markdown
from biscale_env.evaluation.suite.score_card import read_card
from biscale_env.evaluation.suite.verification import arithmetic_faults
from biscale_env.jobs.workers import Workers
from biscale_env.reproduce.cluster_suite.cluster_benchmark import (
    ClusterRequest,
    run_cluster_benchmark,
)
from biscale_env.reproduce.cluster_suite.cluster_scoring import JudgedTask, cluster_cards
from biscale_env.reproduce.cluster_suite.cluster_tasks import ClusterSuite, load_cluster_suite
from biscale_env.reproduce.cluster_suite.suite_rows import judged_row

CORE_V1 = "930f7b7f7f6c"
TINY = ClusterSuite.model_validate(
    {
        "name": "tiny",
        "version": 1,
        "cluster": {
            "env": {"gpus": 16, "dtype": "fp8", "slo": "biscale", "freqs_mhz": [1980.0]},
            "profile": "gamma-sharegpt-like",
            "window_s": 300.0,
            "windows": 4,
            "mean_rps": 10.0,
            "seed": 1,
            "splits": {
                "held out": [
                    {
                        "name": "mid",
                        "service": "servegen-m-mid-fortnight",
                        "tune_days": [1],
                        "judged_days": [7, 8],
                    }
                ]
            },
        },
        "multi": {
            "window_s": 20.0,
            "grace_s": 20.0,
            "n_tune": 2,
            "n_judged": 3,
            "splits": {
                "held out": [
                    {
                        "name": name,
                        "placement": "default-16",
                        "profile": "gamma-sharegpt-like",
                        "load": load,
                    }
                    for name, load in (("chat", 0.7), ("calm", 0.4))
                ]
            },
        },
    }
)
PAIR = "pair=ecofreq+slack-plus"
RULE = """
import numpy as np

class Largest:
    def __init__(self, env, wrong: int = 0):
        self.index = len(env.placements) - 1 + wrong
    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        assert observation.shape and bool(episode_start[0]) == (state is None)
        return np.array(self.index), "remembered"
"""


def rows_of(task, energies, late=0, requests=1000.0):
    """Rows of entrants on a task; ``energies``: per label and unit."""
    made = []
    for label, values in energies.items():
        for k, energy_j in enumerate(values):
            told = {} if label == "bound" else {"requests": requests, "required": 0.99}
            if label == "late":
                told |= {"late_tpot": float(late)}
            made.append(judged_row(task, label, label, f"{k}", energy_j=energy_j, **told))
    return pd.DataFrame(made)


def test_the_shipped_tasks_are_frozen():
    """Another digest is another version: raise it in the file, and make the cards again."""
    suite = load_cluster_suite("core")
    assert (suite.version, suite.digest[:12]) == (1, CORE_V1)
    assert "clusters" not in list_names("benchmark")
    days = {task.what.service: task.what for task in suite.tasks("cluster")}
    assert all(not set(d.tune_days) & set(d.judged_days) for d in days.values())


def test_samples_and_mistakes():
    part = TINY.only({"multi/calm"})
    assert [task.key for task in part.tasks()] == ["multi/calm"]
    assert part.tasks() == [task for task in TINY.tasks() if task.key == "multi/calm"]
    with pytest.raises(BiscaleError, match="has no cluster tasks"):
        part.tasks("cluster")
    with pytest.raises(BiscaleError, match="unknown suite of clusters 'cor'; known: core"):
        load_cluster_suite("cor")
    again = TINY.model_dump()
    again["cluster"]["splits"]["held out"][0]["judged_days"] = [1]
    with pytest.raises(BiscaleError, match="day 1 is tuned on and judged"):
        validate(again, ClusterSuite, "tiny.yaml")
    again = TINY.model_dump()
    again["multi"]["splits"]["held out"][1]["name"] = "chat"
    with pytest.raises(BiscaleError, match="two tasks are called 'multi/chat'"):
        validate(again, ClusterSuite, "tiny.yaml")


def test_clocks_need_an_extra_and_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pettingzoo", None)
    with pytest.raises(BiscaleError, match=r"biscale-env\[marl\]"):
        ClusterRequest(TINY, ["tier2"], "multi").entrants()


def test_scores_by_hand():
    (task, _) = TINY.tasks("multi")
    energies = {
        "max": [100.0, 300.0],
        "bound": [200.0],
        "tier2": [60.0, 190.0],
        "half": [75.0, 225.0],
        "late": [50.0, 150.0],
    }
    judged = JudgedTask(task, rows_of(task.key, energies, late=11))
    assert judged.bound_ratio == 0.5
    assert judged.score("max").nominal[0] == 0.0
    assert judged.score("half").nominal[0] == pytest.approx(0.5)
    assert judged.score("tier2").nominal[0] == pytest.approx((1 - 250 / 400) / 0.5)
    assert judged.attainment("late") == pytest.approx(1 - 22 / 2000)
    assert not judged.met("late")
    assert judged.score("late").nominal[0] == 0.0
    assert judged.better("half").nominal[0] == 0.0
    assert judged.better("tier2").nominal[0] == 0.5
    assert judged.better("late").nominal[0] == 0.0
    # a policy that saves the same share of every unit has no interval
    assert np.ptp(judged.score("half").resampled) == pytest.approx(0.0)
    assert np.ptp(judged.score("tier2").resampled) > 0.0
    assert JudgedTask(task, rows_of(task.key, energies, late=10)).met("late")


def test_a_task_that_max_clock_misses_has_no_score():
    both = TINY.tasks("multi")
    sound = {"max": [100.0] * 3, "bound": [150.0], "tier2": [70.0] * 3}
    frames = [rows_of(both[0].key, sound), rows_of(both[1].key, sound)]
    frames[1].loc[frames[1]["policy"] == "max", "late_ttft"] = 100.0
    (card,) = cluster_cards(pd.concat(frames), TINY, both, {"tier2": "tier2"}, {})
    assert [one.task for one in card.results] == [both[0].key]
    assert "max clock itself misses the SLO (90.00%" in card.unscored[0].reason
    assert card.results[0].score == pytest.approx(0.6)
    with pytest.raises(BiscaleError, match="no task can be scored"):
        cluster_cards(frames[1], TINY, both[1:], {"tier2": "tier2"}, {})


@pytest.fixture(scope="module")
def clocks(tmp_path_factory):
    """A run of the tier of clocks."""
    pytest.importorskip("pettingzoo")
    folder = tmp_path_factory.mktemp("clocks") / "run"
    request = ClusterRequest(TINY, ["tier2", "static-best", "same=mpc+slack", PAIR], "multi")
    return folder, run_cluster_benchmark(request, folder, n_jobs=1)


@pytest.mark.slow
def test_clocks_are_scored_and_the_card_follows_from_its_figures(clocks):
    folder, paths = clocks
    cards = {path.stem: read_card(path) for path in paths}
    assert set(cards) == {"tier2", "static-best", "same", "pair"}
    for card in cards.values():
        assert arithmetic_faults(card, TINY) == []
        assert card.tiers == ["multi"]
        for one in card.results:
            assert 0.0 < one.score < 1.0
            assert one.bound_ratio < one.energy_ratio < 1.0
    assert cards["tier2"].results[0].better == 0.5
    # the same rules under another name are the same, to the bit
    for one, other in zip(cards["tier2"].results, cards["same"].results, strict=True):
        assert one == other
    assert cards["pair"].results[0].energy_ratio != cards["tier2"].results[0].energy_ratio
    assert (folder / "score-cards.html").is_file()
    table = leaderboard_markdown(list(cards.values()))
    assert "**multi**" in table
    assert "static-best" in table
    edited = cards["pair"].model_copy(update={"suite_digest": "0"})
    assert "other tasks" in arithmetic_faults(edited, TINY)[0]


@pytest.mark.slow
def test_a_run_goes_on_and_others_may_join_it(clocks, monkeypatch):
    from biscale_env.reproduce.cluster_suite import clock_tier

    folder, _ = clocks
    ran = []
    one = clock_tier.clock_rows

    def counted(*call):
        ran.append(call[2:4])
        return one(*call)

    watched = replace(clock_tier.CLOCKS, rows_of=counted)
    monkeypatch.setattr(clock_tier, "CLOCKS", watched)
    before = (folder / "pair.json").read_bytes()
    paths = run_cluster_benchmark(
        ClusterRequest(TINY, ["tier2", "max", PAIR], "multi"), folder, True, Workers(1)
    )
    assert ran == []
    again = json.loads((folder / "pair.json").read_bytes())
    assert {k: v for k, v in again.items() if k != "provenance"} == {
        k: v for k, v in json.loads(before).items() if k != "provenance"
    }
    assert read_card(paths[1]).results[0].score == 0.0
    run_cluster_benchmark(ClusterRequest(TINY, ["ecofreq"], "multi"), folder, True, Workers(1))
    assert ran == [("multi/chat", "ecofreq"), ("multi/calm", "ecofreq")]
    for policies, words in (
        (["pair=static:1200"], "'pair' is ecofreq\\+slack-plus: give static:1200 another name"),
        (["tier2=mpc+slack"], "two policies are called 'tier2'"),
        (["slack"], "'slack' does not run in prefill"),
        ([], "needs a policy"),
    ):
        with pytest.raises(BiscaleError, match=words):
            run_cluster_benchmark(ClusterRequest(TINY, policies, "multi"), folder, True, Workers(1))
    with pytest.raises(BiscaleError, match="holds a run already"):
        run_cluster_benchmark(ClusterRequest(TINY, ["tier2"], "multi"), folder)
    part = TINY.only({"multi/calm"})
    with pytest.raises(BiscaleError, match="is a run of other tasks"):
        run_cluster_benchmark(ClusterRequest(part, ["tier2"], "multi"), folder, True)
    (folder / "suite.json").write_text("{")
    with pytest.raises(BiscaleError, match=r"suite.json is damaged or cut off"):
        run_cluster_benchmark(ClusterRequest(TINY, ["tier2"], "multi"), folder, True)


@pytest.mark.slow
def test_placements_are_scored_and_a_class_may_choose_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rule.py").write_text(RULE)
    request = ClusterRequest(TINY, ["ilp", "largest", "mine=rule.py:Largest"], "cluster")
    paths = run_cluster_benchmark(request, tmp_path / "run", n_jobs=2)
    cards = {path.stem: read_card(path) for path in paths}
    for card in cards.values():
        assert arithmetic_faults(card, TINY) == []
        (one,) = card.results
        assert one.bound_ratio < one.energy_ratio < 1.0
        assert one.decision_median_s > 0.0
    assert cards["ilp"].results[0].tuned
    assert cards["ilp"].results[0].settings[0].startswith("alpha=")
    assert cards["ilp"].results[0].score > cards["largest"].results[0].score > 0.0
    (tmp_path / "rule.py").write_text(RULE + "# changed\n")
    with pytest.raises(BiscaleError, match=r"rule.py\) has changed since 'mine' was run"):
        run_cluster_benchmark(request, tmp_path / "run", True, 1)
    wrong = ClusterRequest(TINY, ["rule.py:Largest:wrong=1"], "cluster")
    with pytest.raises(BiscaleError, match="chose placement"):
        run_cluster_benchmark(wrong, tmp_path / "wrong", n_jobs=1)


@pytest.mark.slow
def test_the_command_verifies_what_it_wrote(tmp_path, monkeypatch):
    pytest.importorskip("pettingzoo")
    monkeypatch.chdir(tmp_path)
    one = TINY.only({"multi/chat"}).model_dump(mode="json")
    (tmp_path / "tiny.yaml").write_text(json.dumps(one))  # JSON is YAML
    say = ["--suite", "tiny.yaml", "--jobs", "1"]
    call = CliRunner().invoke
    done = call(build(), ["benchmark", "static-best", "--tier", "multi", "--out", "run", *say])
    assert done.exit_code == 0, done.output
    assert "static-best on tiny v1" in done.output
    done = call(build(), ["benchmark", "verify", "run/static-best.json", *say, "--out", "again"])
    assert done.exit_code == 0, done.output
    assert "run/static-best.json holds" in done.output
    card = json.loads((tmp_path / "run/static-best.json").read_text())
    ratio = card["results"][0]["energy_ratio"] + 0.1
    score = (1 - ratio) / (1 - card["results"][0]["bound_ratio"])
    card["results"][0] |= {"energy_ratio": ratio, "score": score, "seed_scores": [score]}
    for each in card["scores"]:
        each["score"]["estimate"] = score
    (tmp_path / "edited.json").write_text(json.dumps(card))
    done = call(build(), ["benchmark", "verify", "edited.json", *say, "--out", "edited"])
    assert isinstance(done.exception, BiscaleError)
    assert "energy_ratio is" in str(done.exception)


def test_the_pair_that_tuning_ends_with_holds_together(monkeypatch):
    """Prefill holds at 1 while decode is careful, but not with the decode it ends beside."""
    pytest.importorskip("pettingzoo")
    from biscale_env.reproduce.cluster_suite import clock_tier
    from biscale_env.reproduce.multi_systems import PhaseSetting

    tried = []

    class Bench:
        @staticmethod
        def run(choice, workloads):
            tried.append((choice["prefill"].value, choice["decode"].value))
            return tried[-1]

    def holds(pair):
        prefill, decode = pair
        return {"prefill": prefill >= (1 if decode >= 2 else 2), "decode": decode >= 1}

    monkeypatch.setattr(clock_tier, "holds_bounds", holds)
    rungs = {p: [PhaseSetting("rule", float(k)) for k in range(5)] for p in ("prefill", "decode")}
    chosen, held = clock_tier.tuned(rungs, Bench, [])
    assert held
    assert holds((chosen["prefill"].value, chosen["decode"].value)) == dict.fromkeys(rungs, True)
    assert tried[-1] == (chosen["prefill"].value, chosen["decode"].value), "it was run as it is"
    monkeypatch.setattr(clock_tier, "holds_bounds", lambda pair: {"prefill": False, "decode": True})
    chosen, held = clock_tier.tuned(rungs, Bench, [])
    assert not held
    assert chosen["prefill"].value == 4.0


def test_a_placement_has_one_tp_per_phase(tmp_path):
    pytest.importorskip("pettingzoo")
    from biscale_env.reproduce.cluster_suite.clock_tier import bench_of

    mixed = {
        "name": "mixed",
        "groups": [
            {"phase": "prefill", "tp": 4, "count": 1, "freq_mhz": 1980},
            {"phase": "decode", "tp": 4, "count": 1, "freq_mhz": 1980},
            {"phase": "decode", "tp": 8, "count": 1, "freq_mhz": 1980},
        ],
        "source": "test",
    }
    (tmp_path / "mixed.yaml").write_text(json.dumps(mixed))
    task = TINY.tasks("multi")[0].what.model_copy(
        update={"placement": str(tmp_path / "mixed.yaml")}
    )
    with pytest.raises(BiscaleError, match="several TP in a phase"):
        bench_of(TINY.multi, task)


@pytest.mark.parametrize(
    ("build", "prefill", "decode"),
    [
        ("tier2", "rule", "rule"),
        ("mpc+slack", "rule", "rule"),
        ("mpc-plus+slack-plus", "each", "each"),
        ("agent", "each", "each"),
        ("agft", "each", "each"),
        ("static:1200", "each", "each"),
        ("static-best", "static", "static"),
        ("max", "static", "static"),
    ],
)
def test_every_entrant_has_settings_that_rise_with_care(build, prefill, decode):
    pytest.importorskip("pettingzoo")
    from biscale_env.reproduce.cluster_suite.clock_tier import bench_of, rungs_of

    bench = bench_of(TINY.multi, TINY.tasks("multi")[0].what)
    for phase, kind in (("prefill", prefill), ("decode", decode)):
        rungs = rungs_of(build, phase, bench)
        assert {one.kind for one in rungs} == {kind}
        assert len(rungs) == len({one.value for one in rungs}) >= 1
        free = build not in ("agft", "static:1200", "max")
        assert (len(rungs) > 1) == free, rungs
        if kind == "rule":
            assert [one.value for one in rungs] == sorted(one.value for one in rungs)
            assert rungs[0].value == 0.0
