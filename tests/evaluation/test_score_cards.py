"""Suites, scores, cards, their verification and the leaderboard, from figures made by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from agents.policy.numpy_policy import load_network
from biscale_env.config import list_names
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.agent_table import ScoredPoint
from biscale_env.evaluation.suite.benchmark import training_costs
from biscale_env.evaluation.suite.card_page import card_text, cards_html, training_words
from biscale_env.evaluation.suite.entrants import Entrant, entrants_of
from biscale_env.evaluation.suite.leaderboard import EMPTY, leaderboard_markdown
from biscale_env.evaluation.suite.score_card import (
    ScoreCard,
    TaskResult,
    TrainingCost,
    Unscored,
    read_card,
    without_folders,
    write_card,
)
from biscale_env.evaluation.suite.scoring import ScoredTask, _better, aggregate, aggregates
from biscale_env.evaluation.suite.tasks import BenchmarkSuite, load_suite
from biscale_env.evaluation.suite.verification import arithmetic_faults, differences, sample_of
from biscale_env.policies.checkpoint_source import SHIPPED

FROZEN = {
    "core": (1, "7fab6befbc2c401a79e0ef149ae04081b92f74558b40791165ad171afea4e9db"),
    "full": (1, "b4f164aa1110cdb1eeeeb4f2da153e9c5d3314b03f5db327b3f328ed93f6dd93"),
}
SUITE = BenchmarkSuite(
    name="hand",
    version=1,
    base={"duration_s": 60},
    oracle_seeds={"prefill": 1, "decode": 1},
    splits={
        "in distribution": ({"name": "a"}, {"name": "b", "tiers": ["prefill"]}),
        "held out": ({"name": "c", "changes": {"load": 0.5}},),
    },
)


def scored(task, split, ratio, bound=0.6, met=True, better=0.5, seeds=1):
    score = (1 - ratio) / (1 - bound) if met else 0.0
    result = TaskResult(
        task=task, split=split, score=score, seed_scores=(score,) * seeds, met=met,
        energy_ratio=ratio, own_ratio=0.8, bound_ratio=bound, bound_of="bound",
        attainment=0.995 if met else 0.98, target=0.99, better=better, tuned=True,
        settings=("margin=0.2",), decision_median_s=1e-5, decision_p99_s=None,
    )  # fmt: skip
    each = (np.full(seeds, score), np.full((50, seeds), score))
    return ScoredTask(
        result,
        ScoredPoint(*each),
        ScoredPoint(np.full(seeds, better), np.full((50, seeds), better)),
    )


def tasks_by_hand(missed=None):
    rows = [
        ("prefill/a", "in distribution", 0.8),
        ("prefill/b", "in distribution", 0.7),
        ("prefill/c", "held out", 0.9),
        ("decode/a", "in distribution", 0.6),
        ("decode/c", "held out", 1.1),
    ]
    return [scored(*row, met=row[0] != missed) for row in rows]


def card_of(found, policy="mine", **other):
    keys = {
        "suite": SUITE.name, "suite_version": SUITE.version, "suite_digest": SUITE.digest,
        "policy": policy, "build": policy, "scores": aggregates(found),
        "results": tuple(one.result for one in found),
        "provenance": {"time_utc": "now", "command": ["biscale"], "git_revision": None,
                       "python": "3"},
    }  # fmt: skip
    return ScoreCard(**keys | other)


def test_shipped_suites_are_frozen():
    """A change of any task must raise the version, and this digest with it."""
    assert set(list_names("benchmark")) == set(FROZEN)
    for name, (version, digest) in FROZEN.items():
        suite = load_suite(name)
        assert (suite.version, suite.digest) == (version, digest)


def test_judged_workloads_are_those_of_nothing_else():
    """Training takes numbers from 0 and 5,000, tuning from 1,000,003, ablations from 2,000,000."""
    for name in FROZEN:
        for task in load_suite(name).tasks():
            if task.scenario.trace is None:
                assert min(task.scenario.choices) >= 3_000_000


def test_a_digest_tells_tasks_not_comments():
    assert SUITE.digest == SUITE.model_copy(update={"about": "other words"}).digest
    for change in (
        {"base": {"duration_s": 61}},
        {"version": 2},
        {"by_tier": {"decode": {"tp": 8}}},
    ):
        assert SUITE.digest != SUITE.model_copy(update=change).digest


def test_tasks_by_tier_and_in_samples():
    assert [t.key for t in SUITE.tasks("prefill")] == ["prefill/a", "prefill/b", "prefill/c"]
    assert [t.key for t in SUITE.tasks("decode")] == ["decode/a", "decode/c"]
    assert SUITE.tasks("decode")[1].scenario.load == 0.5
    part = SUITE.only({"decode/c", "prefill/b"})
    assert [t.key for t in part.tasks()] == ["prefill/b", "decode/c"]
    of_whole = {t.key: t.scenario for t in SUITE.tasks()}
    assert all(t.scenario == of_whole[t.key] for t in part.tasks())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: SUITE.tasks("cluster"),
            "a tier of clusters: suite .* has prefill",
        ),
        (lambda: SUITE.tasks("prefil"), "unknown tier 'prefil'"),
        (lambda: load_suite("cor"), "unknown suite 'cor'; known: core, full"),
        (lambda: entrants_of(["x=mpc", "x=slack"]), "two policies are called 'x'"),
        (lambda: entrants_of(["max=mpc"]), "two policies are called 'max'"),
        (lambda: entrants_of([]), "needs a policy"),
        (lambda: entrants_of(["nosuch"]), "nosuch"),
    ],
)
def test_mistakes_are_one_sentence(call, words):
    with pytest.raises(BiscaleError, match=words):
        call()


def test_entrants_are_told_apart_by_training_seed():
    (agent,) = entrants_of(["agent"])
    assert {c.phases[0]: c.build for c in agent.candidates} == {
        p: str(SHIPPED / f"{p}.npz") for p in ("prefill", "decode")
    }
    assert all(c.training_seed >= 0 for c in agent.candidates)
    assert [e.label for e in entrants_of(["mpc", "wide=mpc:margin=0.3"])] == ["mpc", "wide"]


def test_training_costs_are_those_of_the_dearest_seed_and_unknown_where_one_does_not_say(tmp_path):
    network = load_network(SHIPPED / "decode.npz")
    for seed, minutes in ((0, 1.25), (1, 3.5), (2, None)):
        told = {} if minutes is None else {"cpu_minutes": minutes}
        card = {"algo": "ppo", "seed": seed, "steps": 100 + seed} | told
        (tmp_path / f"seed-{seed}").mkdir()
        replace(network, card=card).save(tmp_path / f"seed-{seed}" / "best.npz")
    two = Entrant("two", "x", entrants_of([f"x={tmp_path}"])[0].candidates[:2])
    (cost,) = training_costs(two)
    assert cost == TrainingCost(
        tier="decode", algorithm="ppo", env_steps=101, seeds=(0, 1), cpu_minutes=3.5
    )
    (whole,) = training_costs(entrants_of([f"x={tmp_path}"])[0])
    assert (whole.seeds, whole.cpu_minutes) == ((0, 1, 2), None)
    assert training_costs(entrants_of(["mpc"])[0]) == ()


def test_the_score_is_the_mean_of_the_middle_half_and_misses_are_named():
    found = tasks_by_hand(missed="prefill/b")[:3]
    whole = aggregate("prefill", "all", found)
    values = sorted((0.2 / 0.4, 0.0, 0.1 / 0.4))
    assert whole.score.estimate == pytest.approx(np.mean(values))  # trimming 3 values takes none
    assert whole.mean == pytest.approx(np.mean(values))
    assert whole.missed == ("prefill/b",)
    four = [scored(f"prefill/{i}", "s", ratio) for i, ratio in enumerate((0.6, 0.7, 0.8, 1.4))]
    assert aggregate("prefill", "all", four).score.estimate == pytest.approx((0.75 + 0.5) / 2)
    assert aggregate("prefill", "all", four).mean == pytest.approx((1.0 + 0.75 + 0.5 - 1.0) / 4)


def test_a_probability_has_its_interval_within_0_and_1():
    """Resampled windows in which the policy is better in up to 1.2 of all, by linearity."""
    one = scored("prefill/a", "s", 0.8, better=0.95)
    moved = np.linspace(0.7, 1.2, 50)[:, None]
    found = aggregate("prefill", "all", [one._replace(better=ScoredPoint(np.array([0.95]), moved))])
    assert found.better.estimate == 0.95
    assert found.better.high == 1.0
    assert found.better.low == pytest.approx(0.7, abs=0.03)


def test_there_is_no_whole_over_tiers_of_other_training_seeds():
    found = [scored("prefill/a", "s", 0.8, seeds=3), scored("decode/a", "s", 0.8)]
    assert [(a.tier, a.split) for a in aggregates(found)] == [
        ("prefill", "all"), ("prefill", "s"), ("decode", "all"), ("decode", "s"),
    ]  # fmt: skip
    assert aggregates(tasks_by_hand())[0].tier == "all"


def test_who_misses_the_slo_does_not_improve():
    windows = ScoredPoint(np.array([0.9]), np.full((5, 1), 0.8))
    yes, no = np.array([True]), np.array([False])
    assert _better(windows, yes, True).nominal == 0.9
    assert _better(windows, yes, True).resampled[0] == 0.8
    assert _better(windows, no, True).nominal == 0.0
    assert _better(windows, yes, False).nominal == 1.0
    assert _better(windows, no, False).nominal == 0.5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/me/runs/a.json", "a.json"),
        ("checkpoint /srv/x y/ (z)", "checkpoint x y/ (z)"),
        (
            "checkpoint /srv/agents/prefill.npz (prefill.npz)",
            "checkpoint prefill.npz (prefill.npz)",
        ),
        ("mine=/srv/mine.py:Rule", "mine=mine.py:Rule"),
        (r"C:\Users\me\mine.py:Rule", "mine.py:Rule"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("model h100-sxm/llama-3.3-70b (prefill-bf16-tp4)", None),
        ("configs/mine.yaml", None),
        ("at load 0.5 / 2", None),
    ],
)
def test_a_published_card_names_files_not_folders(text, told):
    found = without_folders({text: [text, {"n": 1, "s": (text,)}], "none": None})
    wanted = text if told is None else told
    assert found == {wanted: [wanted, {"n": 1, "s": [wanted]}], "none": None}


def test_a_card_comes_back_from_its_file(tmp_path):
    card = card_of(tasks_by_hand(missed="decode/a"))
    write_card(card, tmp_path / "card.json")
    assert read_card(tmp_path / "card.json") == card
    assert arithmetic_faults(card, SUITE) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a mapping"),
        ('{"card_format": 0}', "card_format is 0"),
        ('{"card_format": 1, "suit": "core"}', "suit"),
    ],
)
def test_what_is_no_card_is_one_sentence(content, words, tmp_path):
    path = tmp_path / "card.json"
    path.write_text(content)
    with pytest.raises(BiscaleError, match=words):
        read_card(path)


def changed(card, change):
    data = card.model_dump(mode="json")
    change(data)
    return ScoreCard.model_validate(json.loads(json.dumps(data)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["results"][0].update(score=0.9, seed_scores=[0.9]), "its figures give 0.5"),
        (lambda d: d["results"][0].update(score=0.9), "mean of its training seeds"),
        (lambda d: d["results"][0].update(attainment=0.9), "does not say met=True"),
        (lambda d: d["scores"][0]["score"].update(estimate=0.99), "does not follow"),
        (lambda d: d["scores"][1].update(missed=["prefill/a"]), "does not follow"),
        (lambda d: d["results"].pop(1), "not those of the suite: see 'prefill/b'"),
        (lambda d: d.update(suite_digest="0"), "other tasks"),
        (lambda d: d.update(suite_version=2), "other tasks"),
    ],
)
def test_a_card_that_was_edited_does_not_hold(change, words):
    faults = arithmetic_faults(changed(card_of(tasks_by_hand()), change), SUITE)
    assert words in "; ".join(faults)


def test_a_sample_takes_tiers_in_turn_and_depends_on_its_seed():
    card = card_of(tasks_by_hand())
    tiers = [r.task.partition("/")[0] for r in sample_of(card, 4, 0)]
    assert tiers == ["prefill", "decode", "prefill", "decode"]
    assert len(sample_of(card, 99, 0)) == len(card.results)
    assert len({tuple(r.task for r in sample_of(card, 2, seed)) for seed in range(20)}) > 1


def test_figures_that_do_not_come_out_again_are_named():
    told = [one.result for one in tasks_by_hand()]
    assert differences(told, told) == []
    (other,) = differences(told, [told[0].model_copy(update={"energy_ratio": 0.81}), *told[1:]])
    assert other == "prefill/a: energy_ratio is 0.8000 on the card, 0.8100 here"
    assert "prefill/a: it cannot be scored here" in differences(told, told[1:])


def test_the_leaderboard_ranks_by_misses_first_and_names_them():
    assert leaderboard_markdown([]) == EMPTY
    cost = TrainingCost(tier="prefill", algorithm="ppo", env_steps=2_500_000, seeds=(1,))
    text = leaderboard_markdown(
        [
            card_of(tasks_by_hand(missed="prefill/a"), "bold", training=(cost,)),
            card_of(tasks_by_hand(), "careful"),
        ]
    )
    prefill = text[text.index("**prefill**") : text.index("**decode**")]
    rows = [line.split("|")[1].strip() for line in prefill.splitlines() if line.startswith("| ")]
    assert rows == ["policy", "careful", "bold"]
    assert "- bold misses the SLO of prefill/a." in prefill
    assert "2.5 million steps (ppo)" in prefill
    for minutes, shown in ((0.123, "0.12"), (9.8, "9.8"), (17.36, "17"), (123.4, "123")):
        timed = cost.model_copy(update={"cpu_minutes": minutes})
        words = training_words(card_of(tasks_by_hand(), "timed", training=(timed,)))
        assert words == f"prefill: 2.5 million steps, {shown} CPU minutes (ppo)"
    assert "2.5 million" not in text[text.index("**decode**") :]
    other = card_of(tasks_by_hand(), "late", suite_version=2)
    assert leaderboard_markdown([card_of(tasks_by_hand()), other]).count("### hand v") == 2


def test_page_and_text_name_what_is_missed():
    unscored = (Unscored(task="prefill/d", reason="max clock <misses>"),)
    card = card_of(tasks_by_hand(missed="decode/a"), unscored=unscored)
    page, text = cards_html([card]), card_text(card)
    assert "decode/a: 98.00 % of the requests" in page
    assert "max clock &lt;misses&gt;" in page
    assert "://" not in page
    assert "missed: decode/a: 98.00 % of 99.00 %" in text
    assert "without a score: prefill/d" in text
    assert "SLO missed in 1 of 5" in text
