"""A controller from outside, as a user would write it: one file, twenty lines, nothing else."""

import numpy as np

from controllers import Controller


class QueueRule(Controller):
    """A low clock while nothing waits, else the highest."""

    TUNABLE = {"low_mhz": (900.0, 1200.0, 1500.0)}  # noqa: RUF012 - as short as a user writes it

    def __init__(self, context, low_mhz: float = 1200.0):
        super().__init__(context)
        self.low_mhz = low_mhz

    def decide(self, x, memory, deterministic):
        waiting = x[:, self.context.spec.index("oldest_wait")] > 0
        return np.where(waiting, self.context.clocks.freq_max_mhz, self.low_mhz), memory


class Plain:
    """Nothing but ``predict`` as Stable-Baselines3 has it."""

    phases = "decode"

    def __init__(self, action=0.0):
        self.action = float(action)

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return np.full((*observation.shape[:-1], 1), self.action, dtype=np.float32), state


def make_plain(context, gain: int = 1):
    """A function that makes a policy."""
    return Plain(0.1 * gain if context.phase == "prefill" else 0.2 * gain)


class Mute:
    """No policy."""


NUMBER = 3
