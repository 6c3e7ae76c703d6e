"""Notebooks run from top to bottom on a small setting and are stored without outputs."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.experiment.interactive import second_by_second
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.policies import resolve_policy
from biscale_env.traces import generate

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SAID = {  # what each prints
    "quickstart": "late",
    "anatomy_of_a_burst": "late",
    "fitted_models": "measured",
    "sweep_and_read": "results.parquet",
    "your_own_controller": "patient",
    "your_own_trace_llm_gpu": "on my-gpu with my-llm",
    "train_your_own_agent": "mine",
    "the_papers_table": "B, decode, BiScale",
    "simulation_to_hardware": "simulation against",
}


def test_there_are_notebooks():
    assert {n.stem for n in NOTEBOOKS} == set(SAID)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_short_and_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert len(cells) < 30
    for cell in cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, monkeypatch, tmp_path):
    monkeypatch.setenv("BISCALE_NOTEBOOK_MINUTES", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs
    )
    assert SAID[path.stem] in printed


def test_second_by_second_integrates_to_the_energy():
    plant = Plant(PlantSettings.of("prefill", actuation_delay_s=0.0, drain=True))
    trace = generate("azure-conv-like", rate_rps=1.5, duration_s=40.0, seed=1)
    run = rollout(resolve_policy("max", plant), plant, [trace], time_probe=False)[0]
    frame = second_by_second(run, step_s=0.001)
    busy_j = float(np.nansum(frame["power_w"]) * 0.001 * plant.settings.tp)
    assert busy_j == pytest.approx(run.totals["energy_j"] - run.totals["energy_idle_j"], rel=0.01)
    assert frame["busy"].mean() == pytest.approx(
        run.totals["busy_s"] / run.totals["duration_s"], rel=0.01
    )
