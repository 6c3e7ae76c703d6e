"""A second GPU and a second LLM, for tests that everything physical follows the description.

Two ways to it: ``TOY`` puts them under the shipped model, ``toy_family`` writes a fitted family of
its own that names them, as `biscale fit --profile --gpu --llm` does.
"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from biscale_env.config import InstanceSpec, load_gpu, load_llm
from biscale_env.models.coefficient import dump_fitted
from biscale_env.models.coefficient_files import stem
from biscale_env.models.gpu_layer import ensemble_path
from biscale_env.models.iteration_model import read_model
from biscale_env.models.physics import Coefficients

DATA = Path(__file__).resolve().parent.parent / "data"
TOY_GPU = str(DATA / "toy-40gb.yaml")
TOY_LLM = str(DATA / "toy-9b.yaml")
TOY_MODEL = "h100-sxm/qwen3-32b"  # the shipped family that they are put under; it has TP 2 and 4
TOY = {"gpu": TOY_GPU, "llm": TOY_LLM, "model": TOY_MODEL}
MEMBERS = 3


def toy_spec(**changes: object) -> InstanceSpec:
    """An instance of the second GPU and LLM under the shipped model."""
    return InstanceSpec.of(**(TOY | {"tp": 2} | changes))


def toy_family(folder: Path, tps: tuple[int, ...] = (2, 4)) -> Path:
    """Write coefficient files, ensembles and descriptions of a family of its own; its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (TOY_GPU, TOY_LLM):
        shutil.copy(file, folder)
    for phase in ("prefill", "decode"):
        for tp in tps:
            model = read_model(phase, tp, name=TOY_MODEL, gpu=TOY_GPU, llm=TOY_LLM)
            named = {"name": "toy", "gpu": Path(TOY_GPU).name, "llm": Path(TOY_LLM).name}
            path = folder / f"{stem(phase, 'bf16', tp)}.yaml"
            path.write_text(dump_fitted(model.content.model_copy(update=named)))
            rows = [model.member(k)._asdict() for k in range(MEMBERS)]
            varied = {n for n in Coefficients._fields if np.ptp([r[n] for r in rows]) > 0}
            table = pd.DataFrame([{k: r[k] for k in sorted(varied)} for r in rows])
            table["delay_s"] = [model.delay_s(k) for k in range(MEMBERS)]
            ensemble_path(path).write_text(table.to_csv(index=False))
    return folder


def follows_toy(plant: object) -> None:
    """Assert that memory, cap, clocks and levels of a plant are those of the second GPU."""
    gpu, llm = load_gpu(TOY_GPU), load_llm(TOY_LLM)
    s = plant.settings.instance
    assert plant.gpu == gpu
    assert plant.llm == llm
    assert plant.kv_capacity_tokens == llm.kv_capacity_tokens(gpu, s.tp, s.dtype)
    assert {plant.model.member(k).p_cap_w for k in (-1, 0)} == {gpu.power_cap_w}
    assert plant.clocks.levels_mhz == gpu.control_levels_mhz
    assert (plant.clocks.freq_min_mhz, plant.clocks.freq_max_mhz) == (300, 1200)
    assert plant.clocks.freq_step_mhz == gpu.freq_step_mhz


def on_toy_grid(freq_mhz: object) -> bool:
    """Whether all clocks are ones that the second GPU can run, up to the rounding of float32."""
    steps = (np.asarray(freq_mhz, dtype=np.float64) - 300.0) / 25.0
    return bool(
        np.all((np.abs(steps - np.rint(steps)) < 1e-3) & (steps > -1e-3) & (steps < 36.001))
    )
