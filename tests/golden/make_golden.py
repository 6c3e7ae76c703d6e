"""Writes the golden trajectories.

``python tests/golden/make_golden.py`` after an *intended* change of dynamics, reward or
observation.

Such a change also raises the version of the environment ids (and of the ObservationSpec, if the
vector changed); the diff of the golden files shows reviewers what moved. Coefficients are stored in
the files, so a new fit moves nothing here.
"""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "helpers"))

from reference_sim import Settings  # noqa: E402
from sim_support import COEFFICIENTS, compiled, workload  # noqa: E402

from biscale_env.contract import spec_for  # noqa: E402
from biscale_env.models.physics import Coefficients  # noqa: E402

STEPS = 60
CASES: dict[str, dict[str, Any]] = {
    "prefill": {"phase": "prefill", "rate": 5.0, "settings": {"slo_s": 0.6, "end_s": 20.0}},
    "prefill-interval": {
        "phase": "prefill",
        "rate": 8.0,
        "settings": {"min_interval_s": 0.3, "delay_s": 0.2, "token_budget": 512, "end_s": 20.0},
    },
    "decode": {"phase": "decode", "rate": 20.0, "settings": {"slo_s": 0.1, "end_s": 20.0}},
    "decode-tight": {
        "phase": "decode",
        "rate": 20.0,
        "settings": {"slo_s": 0.05, "kv_capacity": 6000, "max_seqs": 8, "end_s": 20.0},
    },
    "prefill-parked": {
        "phase": "prefill",
        "rate": 4.0,
        "settings": {"parked": 1, "parked_w": 100.0, "parked_ramp_s": 0.05, "end_s": 20.0},
    },
}


def digest(data: Any) -> str:
    """Hash of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def made(rate: float, end_s: float) -> list[tuple[float, int, int]]:
    """A workload that depends on nothing but arithmetic: quasi-random lengths and gaps."""
    rows, t = [], 0.0
    for k in range(int(rate * end_s)):
        u, v, w = (
            (k + 1) * x % 1.0 for x in (0.6180339887498949, 0.7548776662466927, 0.5698402909980532)
        )
        t += 2.0 * u / rate
        if t < end_s:
            rows.append((t, 20 + int(2500 * v * v), 2 + int(60 * w)))
    return rows


def inputs(name: str) -> dict[str, Any]:
    """Everything that a trajectory follows from."""
    case = CASES[name]
    settings = asdict(Settings(**case["settings"]))
    if not settings["parked"]:  # not known to the files that were made before it
        settings = {k: v for k, v in settings.items() if not k.startswith("parked")}
    if not settings["classes"]:  # likewise
        settings = {k: v for k, v in settings.items() if not k.startswith("class")}
    actions = [float(np.float32(np.sin(0.7 * k) if k % 5 else 1.0)) for k in range(STEPS)]
    return {
        "phase": case["phase"],
        "observation": spec_for(case["phase"]).id,
        "settings": settings,
        "coefficients": COEFFICIENTS._asdict(),
        "requests": made(case["rate"], settings["end_s"]),
        "actions": actions,
    }


def play(given: dict[str, Any]) -> dict[str, Any]:
    """Run the compiled simulator over stored inputs."""
    settings = Settings(**given["settings"])
    trace = workload([tuple(r) for r in given["requests"]], settings.end_s)
    batch = compiled(given["phase"], Coefficients(**given["coefficients"]), settings, trace)
    steps, observations = [], [batch.obs[0].tolist()]
    for k, action in enumerate(given["actions"]):
        batch.step(np.array([action], dtype=np.float32))
        st = batch.states[0]
        steps.append(
            [
                float(st["time_s"]),
                float(st["step_energy_j"]),
                float(batch.reward[0]),
                int(st["step_violations"]),
            ]
        )
        if k % 10 == 9:
            observations.append(batch.obs[0].tolist())
    return {
        "time_s, energy_j, reward, violations": steps,
        "observations of every tenth step": observations,
    }


def golden(name: str) -> dict[str, Any]:
    """Content of one golden file."""
    given = inputs(name)
    return {
        "made by": "tests/golden/make_golden.py",
        "inputs_digest": digest(given),
        "inputs": given,
        "outputs": play(given),
    }


def main() -> None:
    """Write all files."""
    for name in CASES:
        text = json.dumps(golden(name), indent=None, separators=(",", ":")).replace("],[", "],\n[")
        (HERE / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
