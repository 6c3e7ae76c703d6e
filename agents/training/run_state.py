"""What a training run consists of besides the weights in SB3's zip, and how it is put back.

Environment (episodes under way, reward normaliser, multipliers, running attainment, generators),
evaluations so far, what SB3 remembers between rollouts, and the global generators. It is stored as
one more member of SB3's own zip, which SB3 ignores, so that weights and state are of one moment.
"""

import copy
import pickle
import random
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.training.progress.callbacks import Evaluate, Lagrangian
from agents.training.train_config import AgentConfig
from agents.training.worlds.training_env import AgentVecEnv
from biscale_env.core.errors import BiscaleError

MEMBER = "biscale_run_state.pkl"
FORMAT = 1
# what SB3's algorithms remember between two rollouts, as far as each has it
MEMORY = (
    "num_timesteps",
    "_n_updates",
    "_episode_num",
    "_current_progress_remaining",
    "_last_obs",
    "_last_episode_starts",
    "_last_original_obs",
    "_last_lstm_states",
    "rounds",  # samples of policy iteration
)


@dataclass
class TrainingRun:
    """A training run that is set up.

    Attributes:
        folder: its directory.
        config: its config.
        env: the training environment.
        model: the SB3 model.
        lagrangian: moves the multipliers.
        evaluate: evaluates and saves.
        state: what a resumed run goes on from; None at a fresh start.
        began_s: processor time of this process when the run was set up.
    """

    folder: Path
    config: AgentConfig
    env: AgentVecEnv
    model: Any
    lagrangian: Lagrangian
    evaluate: Evaluate
    state: "RunState | None" = None
    began_s: float = 0.0

    @property
    def cpu_s(self) -> float | None:
        """Processor time so far, s; what was thrown away by an interruption does not count.

        None for a run that was begun by a version that did not keep it.
        """
        earlier = 0.0 if self.state is None else self.state.cpu_s
        return None if earlier is None else earlier + time.process_time() - self.began_s


@dataclass(frozen=True)
class RunState:
    """A moment of a run, without the weights.

    Attributes:
        env: of the environment.
        evaluate: of the evaluations.
        path: multipliers so far.
        memory: what SB3 remembers.
        generators: of Python, NumPy and torch, and that of the action space.
        cpu_s: processor time so far; None where it is not known.
    """

    env: dict[str, Any]
    evaluate: dict[str, Any]
    path: list[Any]
    memory: dict[str, Any]
    generators: dict[str, Any]
    cpu_s: float | None = None

    @classmethod
    def of(cls, run: TrainingRun) -> "RunState":
        """The present moment of a run; between two rollouts, or it cannot be gone on from."""
        memory = {k: copy.deepcopy(v) for k, v in vars(run.model).items() if k in MEMORY}
        return cls(
            run.env.state(),
            run.evaluate.state(),
            list(run.lagrangian.path),
            memory,
            _generators(run.model),
            run.cpu_s,
        )

    def restore(self, run: TrainingRun) -> None:
        """Put everything back but the generators."""
        run.env.restore(self.env)
        run.evaluate.restore(self.evaluate)
        run.lagrangian.path = list(self.path)
        vars(run.model).update(copy.deepcopy(self.memory))

    def restore_generators(self, run: TrainingRun) -> None:
        """Put the generators back, which are shared with everything else in the process."""
        import torch

        g = self.generators
        random.setstate(g["python"])
        np.random.set_state(g["numpy"])  # noqa: NPY002 - SB3 uses NumPy's global generator
        torch.set_rng_state(g["torch"])
        if g["cuda"]:
            torch.cuda.set_rng_state_all(g["cuda"])
        run.model.action_space.np_random.bit_generator.state = g["action_space"]

    def append_to(self, zip_path: Path) -> None:
        """Add it to an SB3 zip."""
        with zipfile.ZipFile(zip_path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            file.writestr(MEMBER, pickle.dumps({"format": FORMAT, **vars(self)}))


def _generators(model: Any) -> dict[str, Any]:
    import torch

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - SB3 uses NumPy's global generator
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if str(model.device) != "cpu" else [],
        "action_space": dict(model.action_space.np_random.bit_generator.state),
    }


def read_state(path: Path) -> RunState:
    """State of a run from its ``last.zip``.

    Raises:
        BiscaleError: not a whole zip, or one of another version, which cannot be resumed.
    """
    try:
        with zipfile.ZipFile(path) as file:
            known = MEMBER in file.namelist()
            stored = pickle.loads(file.read(MEMBER)) if known else {}
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise BiscaleError(f"checkpoint {path} cannot be loaded: {error}") from None
    if stored.pop("format", None) != FORMAT:
        raise BiscaleError(
            f"{path} was written by another version, which this one cannot resume: train again in "
            "another directory"
        )
    return RunState(**stored)


class Keeper:
    """Remembers the last moment from which a run can be resumed.

    On-policy algorithms remember weights and state at the start of every rollout: an interruption
    in the middle of one goes back to it. Off-policy ones are stored as they are.
    """

    def __init__(self, run: TrainingRun) -> None:
        """Remember nothing yet."""
        self._run = run
        self._moment: tuple[RunState, Any] | None = None

    def remember(self) -> None:
        """Remember the present moment."""
        run = self._run
        if run.config.resumes_exactly:
            self._moment = RunState.of(run), copy.deepcopy(run.model.get_parameters())

    def last(self) -> RunState | None:
        """Take the run back to the last moment; None where there is none.

        Weights and state of the run are then of that moment.
        """
        run = self._run
        if not run.config.resumes_exactly:
            return RunState.of(run) if run.model.num_timesteps else None
        if self._moment is None:
            return None
        state, weights = self._moment
        run.model.set_parameters(weights)
        state.restore(run)
        return state
