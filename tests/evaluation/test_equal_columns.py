"""Columns of equal attainment and of members, and what tables and verdicts make of them."""

import math

import pandas as pd
import pytest
from curves_synthetic import SETTINGS, curve, keep, members, records, summary_of
from rich.console import Console

from biscale_env.evaluation.report import tables, verdicts
from biscale_env.evaluation.report.fold_table import (
    fold_means,
    matrix_markdown,
    ranges_markdown,
    winners_markdown,
)
from biscale_env.evaluation.report.page import write_report
from biscale_env.evaluation.runs.equal_columns import curve_of
from biscale_env.evaluation.runs.run_view import load_run


@pytest.fixture(scope="module")
def summary():
    return summary_of(records())


def at(summary, policy):
    return summary.set_index("policy").loc[policy]


def test_energy_is_interpolated_to_the_target(summary):
    # saver reaches 0.99 with a setting of its own
    assert at(summary, "saver")["equal_ratio"] == pytest.approx(0.72)
    # between 0.78 at 0.988 and 0.80 at 0.992 lies 0.79 at 0.990
    assert at(summary, "static-hindsight")["equal_ratio"] == pytest.approx(0.79)
    assert at(summary, "saver")["static_ratio"] == pytest.approx(0.72 / 0.79)
    assert at(summary, "max")["equal_ratio"] == 1.0


def test_a_curve_that_lies_above_gives_its_least_energy_and_says_so(summary):
    row = at(summary, "lenient")
    assert (row["equal_ratio"], row["equal_state"]) == (pytest.approx(0.85), "above")


def test_a_curve_that_does_not_reach_has_no_number_and_no_difference(summary):
    row = at(summary, "late")
    assert row["equal_state"] == "not reached"
    assert math.isnan(row["equal_ratio"])
    assert math.isnan(row["static_ratio"])
    assert row["energy_ratio"] < 0.7  # least of all as tuned, and still no claim


@pytest.mark.parametrize("turned", [False, True])
def test_over_members_ratios_are_formed_within_each_whatever_finished_first(turned):
    """Saver needs 0.72 of max clock in one plant and 0.9 in the other, at its own energies."""
    other = {
        "max": [(2.0, 0.998)],
        "static-hindsight": [(1.9, 0.990)],
        "saver": [(1.9, 0.996), (1.8, 0.990)],
    }
    first = {name: SETTINGS[name] for name in other}
    parts = [*records(settings=first, member=0), *records(settings=other, member=1)]
    summary = summary_of(parts[::-1] if turned else parts)
    row = at(summary, "saver")
    assert row["equal_ratio"] == pytest.approx((0.72 + 0.9) / 2)
    assert row["static_ratio"] == pytest.approx((0.72 / 0.79 + 1.8 / 1.9) / 2)
    assert row["equal_ratio_ci_low"] <= row["equal_ratio"] <= row["equal_ratio_ci_high"]
    assert at(summary, "max")["equal_ratio"] == 1.0


def test_a_curve_that_does_not_reach_in_one_member_has_no_number():
    late = {"max": [(2.0, 0.998)], "saver": [(1.0, 0.98)]}
    first = {name: SETTINGS[name] for name in late}
    summary = summary_of([*records(settings=first, member=0), *records(settings=late, member=1)])
    assert at(summary, "saver")["equal_state"] == "not reached"
    assert math.isnan(at(summary, "saver")["equal_ratio"])


def test_the_tuned_static_clock_has_the_curve_of_all_static_clocks(summary):
    static, best = at(summary, "static-hindsight"), at(summary, "static-best")
    assert best["equal_ratio"] == static["equal_ratio"]
    assert best["energy_ratio"] != static["energy_ratio"]


def test_windows_in_common_do_not_widen_a_ratio(summary):
    """Every window's energy wobbles by 20 % for all alike, which no ratio feels."""
    row = at(summary, "saver")
    assert row["equal_ratio_ci_high"] - row["equal_ratio_ci_low"] < 1e-6
    assert row["equal_ratio_not_reached"] == 0.0


def test_the_range_over_members_is_relative_to_max_clock_in_the_same_member(summary):
    low, high = at(summary, "saver")[["member_ratio_low", "member_ratio_high"]]
    assert (low, high) == (pytest.approx(0.76 * 0.91), pytest.approx(0.76 * 1.09))
    assert at(summary, "saver")["n_members"] == 5
    assert at(summary, "max")["member_ratio_high"] == 1.0


@pytest.mark.parametrize("turned", [False, True])
def test_the_range_of_several_training_seeds_is_that_of_their_mean(turned):
    settings = {"max": SETTINGS["max"], "saver": [(0.8, 0.996)]}
    dearer = {"saver": [(0.6, 0.996)]}
    parts = [*records(settings=settings), *records(settings=dearer, training_seed=7)]
    row = at(summary_of(parts[::-1] if turned else parts), "saver")
    assert row["member_ratio_low"] == pytest.approx(0.7 * 0.91)


def test_curve_of_kept_rows():
    rows = curve([(1.0, 0.99), (0.5, 0.98)])
    found = curve_of(rows)
    assert found.energy_j.shape == (2, 8)
    assert found.energy_j[1].sum() == pytest.approx(8 * 50.0)


def test_rows_that_reach_come_first_by_energy_at_equal_attainment(summary):
    order = tables.ordered(summary)["policy"].tolist()
    assert order[:3] == ["max", "saver", "static-hindsight"]
    assert order[-1] == "late"


def test_the_verdict_is_against_the_best_static_clock_in_hindsight(summary):
    text = verdicts.verdict(summary)
    assert text.startswith("At 99.00 % attainment saver needs least energy, 28.0 % below max clock")
    assert "8.9 % below the best static clock in hindsight" in text
    assert "not reached by any setting of late" in text
    assert "so not told apart" not in text


def test_a_difference_whose_interval_holds_one_is_not_told_apart(summary):
    wide = summary.assign(static_ratio_ci_low=0.8, static_ratio_ci_high=1.1)
    assert "(0.800 to 1.100 of its energy, so not told apart)" in verdicts.verdict(wide)


def test_without_any_curve_that_reaches_no_controller_is_named():
    some = {name: SETTINGS[name] for name in ("max", "static-hindsight", "late")}
    text = verdicts.verdict(summary_of(records(settings=some)))
    assert text == "No controller reaches the attainment that is asked for here."


def test_a_plain_table_compares_with_the_best_static_clock_too(summary):
    plain = summary.drop(columns=[c for c in summary if c.startswith("equal")])
    plain.loc[plain["policy"].eq("saver"), "target_met"] = True
    text = verdicts.verdict(plain[~plain["policy"].eq("late")])
    assert "Least energy while meeting the SLO: saver" in text
    assert "below the best static clock in hindsight" in text


def test_the_tables_say_what_the_load_is_a_share_of(summary):
    text = tables.summary_markdown(summary)
    assert (
        "Load: 90 % of the 40.0 requests/s that max clock serves within the SLO on the evaluated "
        "part of the trace; tuned at 90 % of the 22.0 requests/s that it serves on the tuning part."
    ) in text
    assert "| saver (tuned) | 0.720 | 0.911 |" in text
    assert "| lenient (tuned) | 0.850\u2009↑ |" in text
    assert "| late (tuned) | – | – |" in text
    assert "| 0.692–0.828 |" in text
    generated = summary.assign(one_trace=False)
    assert "serves within the SLO.\n" in tables.summary_markdown(generated)


def test_a_console_of_80_columns_shows_every_name_and_number(summary):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    tables.print_table(summary, console)
    text = console.export_text()
    assert "…" not in text
    assert "static-hindsight" in text
    assert "–: no setting reaches it" in text


def both(backward=None):
    """Forward and backward folds; the second one 0.02 dearer for the saver unless given."""
    dearer = {**SETTINGS, "saver": [(0.78, 0.996), (0.74, 0.990)]}
    return [*records(), *records("conv, halves exchanged", "backward", backward or dearer)]


def test_the_mean_over_folds_needs_both():
    means = fold_means(summary_of(both())).set_index("policy")
    row = means.loc["saver"]
    assert (row["equal_ratio_forward"], row["equal_ratio_backward"]) == (
        pytest.approx(0.72),
        pytest.approx(0.74),
    )
    assert row["equal_ratio"] == pytest.approx(0.73)
    assert row["folds"] == 2
    assert math.isnan(means.loc["late", "equal_ratio"])
    half = {**SETTINGS, "late": [(0.9, 0.995)]}
    means = fold_means(summary_of(both(half))).set_index("policy")
    assert math.isnan(means.loc["late", "equal_ratio"])
    assert means.loc["late", "equal_ratio_backward"] == pytest.approx(0.9)


def test_independent_folds_add_their_half_widths_as_squares():
    two = summary_of(both())
    two["equal_ratio_ci_low"], two["equal_ratio_ci_high"] = (
        two["equal_ratio"] - 0.03,
        two["equal_ratio"] + 0.04,
    )
    row = fold_means(two).set_index("policy").loc["saver"]
    assert row["equal_ratio_ci_low"] == pytest.approx(0.73 - math.hypot(0.03, 0.03) / 2)
    assert row["equal_ratio_ci_high"] == pytest.approx(0.73 + math.hypot(0.04, 0.04) / 2)


def test_the_matrix_shows_mean_and_folds_and_the_least_in_bold():
    text = matrix_markdown(summary_of(both()))
    assert "**prefill, idle at the last clock**" in text
    assert "| controller | conv, 90% |" in text
    assert "| saver | **0.730** (0.720 / 0.740) |" in text
    assert "| late | – / – |" in text
    assert "static-best" not in text


def test_one_half_alone_is_said_to_be_that_and_plans_stand_below():
    with_plan = {**SETTINGS, "oracle": [(0.69, 0.99)]}
    found = summary_of(records(settings=with_plan))
    text = matrix_markdown(found)
    assert "| saver | **0.720**, one half |" in text
    assert "| *oracle* | 0.690 |" in text
    assert matrix_markdown(found, "static_ratio").count("oracle") == 0
    assert "one half" not in matrix_markdown(found.assign(one_trace=False))


def test_who_wins_is_said_per_idle_rule():
    parked = [
        *records("conv, parked", idle="parked", settings={**SETTINGS, "lenient": [(0.71, 0.999)]})
    ]
    text = winners_markdown(summary_of([*records(), *parked]))
    assert "| phase | workload, load | idle at the last clock | idle at the same parked" in text
    row = next(line for line in text.splitlines() if line.startswith("| prefill | conv, 90%"))
    first, second = row.split("|")[3:5]
    assert first.strip().startswith("saver: 0.720 of max clock, 0.911 of best static; as tuned")
    assert second.strip().startswith("lenient: 0.710 of max clock")


def test_ranges_count_the_points_that_a_policy_reaches_in_every_fold():
    harder = {**SETTINGS, "saver": [(0.8, 0.999)], "late": [(0.9, 0.98)]}
    with_plan = {"oracle": [(0.69, 0.99)]}
    rows = [*records(settings={**SETTINGS, **with_plan}), *records("code", settings=harder)]
    summary = summary_of(rows)
    summary["workload"] = summary["scenario"]
    text = ranges_markdown(summary, {"prefill": ("saver", "late", "oracle")})
    assert text.splitlines()[0] == "| phase, idle GPUs | saver | late | oracle |"
    assert "| prefill, the last clock | 0.72–0.80 | – | 0.69–0.69 (1 of 2) |" in text


@pytest.mark.slow
def test_a_run_directory_gives_the_same_columns_and_a_page(tmp_path):
    run = load_run(keep(tmp_path / "run", both(SETTINGS)))
    assert len(run.curves) == 2 * 8 * sum(len(settings) for settings in SETTINGS.values())
    found = run.summary().query("fold == 'forward'").set_index("policy")
    # the synthetic requests miss, so the target is max clock's own less the allowance
    assert found.loc["max", "equal_state"] == "above"
    assert {"equal_ratio", "static_ratio", "member_ratio_low"} <= set(found.columns)
    again = load_run(run.path)
    pd.testing.assert_frame_equal(again.summary(), run.summary())
    page = write_report(run).read_text()
    assert "at the SLO’s attainment" in page
    assert "<h1>Clock control on conv</h1>" in page
    assert "over members" in page
    assert members(1.0, 0.1)["energy_j"].max() == pytest.approx(1.1)


@pytest.mark.slow
def test_a_run_that_goes_on_can_be_read(tmp_path):
    """Its result is written last: what stands there of a run without one is left out."""
    folder = keep(tmp_path / "run", both(SETTINGS))
    whole = load_run(folder)
    results = pd.read_parquet(folder / "results.parquet")
    newest = results["policy"].eq("saver")
    results[~newest].to_parquet(folder / "results.parquet")
    run = load_run(folder)
    without = set(results.loc[newest, "run_id"])
    assert without & set(whole.curves["run_id"])
    assert set(run.curves["run_id"]) == set(whole.curves["run_id"]) - without
    assert set(run.summary()["policy"]) == set(whole.summary()["policy"]) - {"saver"}
    assert {"equal_ratio", "member_ratio_low"} <= set(run.summary().columns)
