"""Policies of a comparison: those that have a name, and the optimum that is given the workload."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from biscale_env.contract import Policy
from biscale_env.envs.plant import Plant
from biscale_env.policies import policy_settings, resolve_policy
from biscale_env.policies.policy_source import ORACLE, PLANNED
from biscale_env.traces import Trace
from controllers.oracle.make import make_oracle, oracle_plant


@dataclass
class Hindsight:
    """The oracle's plan with the plant it is valid in (no actuation delay) and its bounds."""

    policy: Policy
    plant: Plant
    report: dict[str, float]

    def predict(self, *arguments: Any, **named: Any) -> Any:
        """The plan's next decision."""
        return self.policy.predict(*arguments, **named)


def build_policy(build: str, plant: Plant, traces: Sequence[Trace], member: int) -> Policy:
    """Make a policy of a comparison.

    Args:
        build: ``oracle``, or a name in the syntax of :mod:`biscale_env.policies`.
        plant: the instance.
        traces: the workloads that it will meet; only the oracle looks at them (and takes one).
        member: ensemble member of the plant, which is also the controllers' nominal model, as after
            profiling at home.

    Raises:
        BiscaleError: an unknown name or parameter, or an impossible value.
    """
    if build != ORACLE:
        return resolve_policy(build, plant, member)
    (trace,) = traces
    policy, report = make_oracle(plant, trace, plant.slo.attainment, member)
    return Hindsight(policy, oracle_plant(plant), report)


def settings_of(build: str, phase: str) -> list[dict[str, Any]]:
    """Settings that tuning tries; none where nothing is free, or chosen from the workload."""
    return [] if build in PLANNED else policy_settings(build, phase)
