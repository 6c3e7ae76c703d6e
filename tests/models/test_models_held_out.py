"""What the fit says about what it was not shown: the committed records, and that they come back."""

import numpy as np
import pytest

from biscale_env.models.fit import held_out
from biscale_env.models.fit.gpu_evidence import evidence_dir, load_gpu_evidence
from biscale_env.models.fit.held_out import (
    HeldOutServer,
    leave_one_clock_out,
    leave_one_llm_out,
    read_held_out,
)
from biscale_env.models.fit.profile_table import sha256
from biscale_env.models.fit.report import (
    borrowed,
    clock_frame,
    family_frame,
    frame_markdown,
    kernel_frame,
    report_markdown,
    server_frame,
    summary_frame,
)
from biscale_env.models.iteration_model import load_model

RECORD = read_held_out("h100-sxm")


@pytest.mark.parametrize("gpu", ["h100-sxm", "b200-sxm"])
def test_records_are_of_today_s_evidence_and_leave_every_llm_out_once(gpu):
    record, ev = read_held_out(gpu), load_gpu_evidence(gpu)
    assert record is not None
    assert record["evidence_sha256"] == sha256(evidence_dir() / f"{gpu}.yaml")
    assert {r["server"] for r in record["servers"]} == {g.label for g in ev.serving.groups}
    assert {c["freq_mhz"] for c in record["clocks"]} == {p.freq_mhz for p in ev.kernels.points}


def test_targets_on_what_the_fit_was_not_shown():
    frame = summary_frame()
    assert len(frame) == 8
    assert set(frame["met"]) == {"met"}, frame.to_string()


def test_bands_hold_about_nine_of_ten_points_of_llms_left_out():
    assert RECORD is not None
    for what in ("itl", "power"):
        assert 0.85 <= RECORD[f"{what}_coverage"] <= 0.97


def test_no_record_where_nothing_was_measured():
    assert read_held_out("l40s") is None


def test_inside_by_hand():
    members = np.arange(101.0)[:, None] * np.ones(3)
    server = HeldOutServer(None, np.ones(3), np.ones(3), members, members)  # type: ignore[arg-type]
    assert held_out._inside(np.array([4.0, 5.0, 96.0]), server.itl_members_s) == 1


def test_a_clock_left_out_comes_back():
    found = {c.freq_mhz: c for c in leave_one_clock_out(load_gpu_evidence("h100-sxm"))}
    assert RECORD is not None
    for row in RECORD["clocks"]:
        assert found[row["freq_mhz"]].power_mape == pytest.approx(row["power_mape"], abs=2e-3)
        assert found[row["freq_mhz"]].points == row["kernels"]


@pytest.mark.slow
def test_an_llm_left_out_comes_back(monkeypatch):
    """Llama 3.1 8B alone: the same errors as in the record, which the whole loop made."""
    ev = load_gpu_evidence("h100-sxm")
    assert RECORD is not None
    wanted = next(r for r in RECORD["servers"] if r["server"].startswith("llama-3.1-8b"))
    monkeypatch.setattr(held_out, "sorted", lambda names: ["llama-3.1-8b"], raising=False)
    (found,) = leave_one_llm_out(ev, 2)
    assert found.record()["itl_mape"] == pytest.approx(wanted["itl_mape"], abs=2e-3)
    assert found.record()["power_mape"] == pytest.approx(wanted["power_mape"], abs=2e-3)


@pytest.mark.slow
def test_the_page_has_every_gpu_model_and_measurement():
    text = report_markdown()
    for gpu in ("h100-sxm", "b200-sxm", "a100-sxm", "l40s"):
        assert f"## {gpu}" in text
    assert len(kernel_frame("h100-sxm")) == len(load_gpu_evidence("h100-sxm").kernels.points)
    assert len(server_frame("h100-sxm")) == len(load_gpu_evidence("h100-sxm").serving.groups)
    assert "h100-sxm/llama-3.3-70b" in set(family_frame()["model"])
    assert "nothing of its own is measured" in borrowed(load_gpu_evidence("l40s"))
    assert borrowed(load_gpu_evidence("h100-sxm")) == "Nothing is borrowed from another GPU."


def test_clock_frame_by_hand():
    model = load_model("decode")
    work = (32.0, 0.0, 32_000.0, 32.0)
    frame = clock_frame(model, work)
    ratio = float(model.energy_j(*work, 1005) / model.energy_j(*work, 1980))
    row = frame[frame["clock, MHz"] == "1005"].iloc[0]
    assert row["energy against 1980 MHz"] == f"{ratio:.3f}"
    low, high = map(float, row["members, 5 to 95 %"].split(" to "))
    assert low < ratio < high
    assert (frame.iloc[:, -1] == "least energy").sum() == 1
    assert frame_markdown(frame).count("\n") == len(frame) + 1
