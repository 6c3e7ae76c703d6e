"""Frozen experiments: which operating points they stand for."""

import pytest

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.comparison import compare_experiment
from biscale_env.evaluation.experiment.experiments import Experiment, load_experiment


def test_main_is_run_both_ways_and_under_both_idle_rules():
    points = load_experiment("main").scenarios()
    assert len(points) == len({(point.name, point.load) for point in points})
    names = {point.name for point in points}
    for trace in ("azure-conv", "azure-code"):
        assert {n for n in names if n.startswith(trace)} == {
            trace,
            f"{trace}, halves exchanged",
            f"{trace}, parked",
            f"{trace}, halves exchanged, parked",
        }
    assert {n for n in names if n.startswith("synthetic")} == {"synthetic", "synthetic, parked"}
    for point in points:
        assert point.workload == point.name.split(",")[0]
        assert (point.fold == "backward") == ("halves exchanged" in point.name)
        assert (point.idle == "parked") == ("parked" in point.name)


def test_one_idle_rule_may_be_asked_for():
    points = compare_experiment("main", {"idle": "parked"}).points
    assert {point.idle for point in points} == {"parked"}
    assert {point.name for point in points if point.trace is None} == {"synthetic"}


def test_quick_cuts_both_phases():
    points = compare_experiment("main", {}, quick=True).points
    for point in points:
        seconds = 120.0 if point.trace is None else 300.0
        assert (point.duration_s, point.decode_duration_s) == (seconds, seconds)


def test_presets_are_chosen_on_workloads_that_nothing_judges():
    judged = {(p.trace or p.profile, seed) for name in ("main", "full", "delay", "slo")
              for p in load_experiment(name).scenarios() for seed in p.choices}  # fmt: skip
    chosen = {
        (p.trace or p.profile, seed)
        for p in load_experiment("ablation").scenarios()
        for seed in p.choices
    }
    assert not judged & chosen
    assert all(p.trace is None for p in load_experiment("ablation").scenarios())


def test_a_wrong_rule_or_fold_is_one_sentence(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nworkloads: [synthetic]\nfolds: [sideways]\n")
    with pytest.raises(BiscaleError, match="folds"):
        load_experiment(str(path))
    fields = Experiment.model_fields
    assert fields["folds"].default == ("forward",)
    assert fields["idles"].default == (None,)
