"""Networks and recorded policies on the trainer's held-out workloads, each at its best setting."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from agents.offline.recorded import MakePolicy
from agents.policy.feature_parts import Floats32
from agents.policy.numpy_policy import Network, NumpyPolicy
from agents.training.heldout import SHORTFALL_PRICE, HeldOut, HeldoutMetrics
from agents.training.train_config import AgentConfig
from agents.training.worlds.mixture import WorkloadGroup


class TriedSetting(NamedTuple):
    """Free parameters of a network; None: it takes no price."""

    price: float | None
    margin: float


def settings_of(config: AgentConfig) -> list[TriedSetting]:
    """What is tried: margins without a price, else prices of the range, and those with margins."""
    margins = config.margins or (0.0,)
    if config.price is None:
        return [TriedSetting(None, m) for m in margins]
    prices = np.geomspace(*config.price, config.evaluation.prices)
    return [TriedSetting(float(p), m) for m in margins for p in prices]


class NetworkOnRows(NumpyPolicy):
    """A network on the rows of the held-out evaluation, each in its own group's plant."""

    def __init__(self, network: Network, held_out: HeldOut) -> None:
        """Bind the network to the rows."""
        super().__init__(network, held_out.plant)
        self._nominal = held_out.nominal

    def at(self, setting: TriedSetting) -> Callable[[Floats32, bool], Floats32]:
        """What acts on the rows at a setting."""

        def act(obs: Floats32, start: bool) -> Floats32:
            self.price, self.margin = setting
            return self.predict(obs)[0][:, 0]

        return act


class Score(NamedTuple):
    """Result of a policy on the held-out workloads.

    Attributes:
        metrics: per group, at the cheapest setting that meets the group's target.
        score: mean energy ratio plus a penalty on missing attainment, lower is better.
        setting: the best common one.
    """

    metrics: HeldoutMetrics
    score: float
    setting: Any


def best_score(
    held_out: HeldOut, tried: Mapping[Any, Callable[[Floats32, bool], Floats32]]
) -> Score:
    """Run every setting; per group the best one counts, as while agents are trained.

    Args:
        held_out: the workloads, with their targets.
        tried: what acts, by setting.
    """
    found = [held_out(act) for act in tried.values()]
    energy = np.stack([m.energy_ratio for m in found])
    attained = np.stack([m.attainment for m in found])
    value = energy + SHORTFALL_PRICE * np.maximum(held_out.targets - attained, 0.0)
    at, groups = value.argmin(axis=0), np.arange(energy.shape[1])
    metrics = HeldoutMetrics(energy[at, groups], attained[at, groups])
    common = list(tried)[int(value.mean(axis=1).argmin())]
    return Score(metrics, metrics.score(held_out.targets), common)


class PoliciesOnRows:
    """A recorded policy on the rows, made once per group for the group's own plant."""

    def __init__(
        self, name: str, groups: Sequence[WorkloadGroup], held_out: HeldOut, make: MakePolicy
    ) -> None:
        """Make the policies.

        Args:
            name: of the policy.
            groups: families at loads.
            held_out: whose rows these are, as many per group.
            make: a policy by name for a plant.
        """
        per_group = len(held_out.nominal.coefs) // len(groups)
        self._parts = [
            (make(name, group.plant), slice(k * per_group, (k + 1) * per_group))
            for k, group in enumerate(groups)
        ]

    def __call__(self, obs: Floats32, start: bool) -> Floats32:
        """Actions (n,) of encoded observations (n, dim)."""
        return np.concatenate([np.ravel(one.predict(obs[at])[0]) for one, at in self._parts])
