"""Policies as ONNX files, whatever library trained them; run by ONNX Runtime.

The first input takes the encoded observation of a phase, ``(n, dim)`` or ``(1, dim)`` float32; the
first output is a clock in [-1, 1] per row, the number of a clock level, or one score per level.
That is what the export of Stable-Baselines3 in its guide, of a Q network and of a plain ``torch``
module write.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import DECODE_SPEC, PREFILL_SPEC, Policy
from biscale_env.core.errors import BiscaleError
from controllers.base import Bools, PolicyContext
from controllers.registry import parse_parameters

SUFFIX: Final = ".onnx"
_PHASES: Final = {PREFILL_SPEC.dim: "prefill", DECODE_SPEC.dim: "decode"}


@dataclass(frozen=True)
class OnnxSource:
    """A policy in an ONNX file.

    Attributes:
        name: the whole name.
        path: the file.
    """

    name: str
    path: Path

    @classmethod
    def of(cls, name: str, base: str, rest: str) -> "OnnxSource":
        """The source of a name that was cut in parts.

        Raises:
            BiscaleError: parameters, which such a file does not take.
        """
        _no_parameters(name, parse_parameters(name, rest, None))
        return cls(name, Path(base))

    @property
    def phases(self) -> tuple[str, ...]:
        """The phase whose observation the file takes.

        Raises:
            BiscaleError: it cannot be read, or takes another observation.
        """
        return (_phase_of(_session(self.path), self.path),)

    def settings(self, phase: str) -> list[dict[str, Any]]:
        """None: nothing is free."""
        return []

    def make(self, context: PolicyContext, **params: Any) -> Policy:
        """The policy in a context.

        Raises:
            BiscaleError: it cannot be read, is for the other phase, or answers with something else
                than a clock.
        """
        _no_parameters(self.name, params)
        return OnnxPolicy(self.path, context)


def _no_parameters(name: str, params: Mapping[str, Any]) -> None:
    if params:
        raise BiscaleError(f"policy '{name}': an ONNX file takes no parameters")


def _session(path: Path) -> Any:
    """ONNX Runtime on one thread: the networks are small, and many run side by side."""
    try:
        import onnxruntime
    except ImportError:
        raise BiscaleError(f"{path} needs onnxruntime: install biscale-env[onnx]") from None
    if not path.is_file():
        raise BiscaleError(f"there is no ONNX file at {path}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime has a class of its own per status
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BiscaleError(f"{path} cannot be read as ONNX: {reason}") from None


def _phase_of(session: Any, path: Path) -> str:
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs)
        raise BiscaleError(
            f"{path} has {len(inputs)} inputs ({names}); a policy has one, the observation: wrap a "
            "recurrent one in a class with predict"
        )
    shape = inputs[0].shape
    if inputs[0].type != "tensor(float)" or len(shape) != 2 or shape[1] not in _PHASES:
        raise BiscaleError(
            f"{path} takes {inputs[0].type} of shape {shape}, but observations are float32, "
            f"(n, {PREFILL_SPEC.dim}) of prefill or (n, {DECODE_SPEC.dim}) of decode"
        )
    return _PHASES[shape[1]]


class OnnxPolicy:
    """``predict`` of an ONNX file."""

    def __init__(self, path: Path, context: PolicyContext) -> None:
        """Read the file and try it on one observation.

        Args:
            path: the file.
            context: gives phase and clocks.

        Raises:
            BiscaleError: it cannot be read, is for the other phase, or answers with something else
                than a clock.
        """
        self._session, self._path = _session(path), path
        phase = _phase_of(self._session, path)
        if phase != context.phase:
            raise BiscaleError(f"{path} is for {phase}, not for {context.phase}")
        first = self._session.get_inputs()[0]
        self._input, self._one_row = first.name, first.shape[0] == 1
        self._output = self._session.get_outputs()[0].name
        self._levels = context.clocks.to_action(np.asarray(context.clocks.levels_mhz))
        self.predict(np.zeros(context.spec.dim, dtype=np.float32))

    def predict(
        self,
        observation: NDArray[np.float32],
        state: Any = None,
        episode_start: Bools | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], Any]:
        """Choose clocks; see :class:`biscale_env.contract.Policy`."""
        rows = np.atleast_2d(np.asarray(observation, dtype=np.float32))
        parts = np.split(rows, len(rows)) if self._one_row else [rows]
        found = [self._session.run([self._output], {self._input: part})[0] for part in parts]
        actions = self._clocks(np.concatenate([np.asarray(one) for one in found]), len(rows))
        return actions.reshape(*np.shape(observation)[:-1], 1), state

    def _clocks(self, answer: NDArray[Any], n_rows: int) -> NDArray[np.float32]:
        """Actions (n, 1) of what the network answered.

        Raises:
            BiscaleError: it is neither a clock, a level nor a score per level.
        """
        each, n_levels = answer.size // n_rows, self._levels.size
        whole = np.issubdtype(answer.dtype, np.integer)
        if whole and each == 1:
            levels = answer.reshape(-1)
            if levels.min() < 0 or levels.max() >= n_levels:
                raise BiscaleError(
                    f"{self._path} answers with clock level {levels.max()}, but this GPU has "
                    f"{n_levels}"
                )
            return self._levels[levels, None].astype(np.float32)
        if not whole and each == 1:
            return np.clip(answer.reshape(-1, 1), -1.0, 1.0).astype(np.float32)
        if not whole and each == n_levels:
            best = np.argmax(answer.reshape(n_rows, n_levels), axis=1)
            return self._levels[best, None].astype(np.float32)
        raise BiscaleError(
            f"{self._path} answers with {each} values per observation, but a policy's first output "
            f"is one clock in [-1, 1], the number of a clock level or {n_levels} scores"
        )
