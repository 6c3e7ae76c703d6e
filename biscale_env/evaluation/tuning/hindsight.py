"""Policies of a comparison: those that have a name, and the optimum that is given the workload."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from biscale_env.contract import Policy
from biscale_env.envs.plant import Plant
from biscale_env.policies import policy_settings, resolve_policy
from biscale_env.policies.policy_source import ORACLE, is_lookahead, is_planned
from biscale_env.traces import Trace
from controllers.oracle.kept_plans import kept_oracle
from controllers.oracle.lookahead import make_lookahead
from controllers.oracle.make import oracle_plant
from controllers.registry import check_parameters, parse_parameters


@dataclass
class Hindsight:
    """A plan with the plant it is valid in (the oracle's: no actuation delay) and its bounds."""

    policy: Policy
    plant: Plant
    report: dict[str, float]

    def predict(self, *arguments: Any, **named: Any) -> Any:
        """The plan's next decision."""
        return self.policy.predict(*arguments, **named)


def build_policy(build: str, plant: Plant, traces: Sequence[Trace], member: int) -> Policy:
    """Make a policy of a comparison.

    Args:
        build: ``oracle``, ``lookahead:seconds=...``, or a name in the syntax of
            :mod:`biscale_env.policies`.
        plant: the instance.
        traces: the workloads that it will meet; only the oracle looks at them (and takes one).
        member: ensemble member of the plant, which is also the controllers' nominal model, as after
            profiling at home.

    Raises:
        BiscaleError: an unknown name or parameter, or an impossible value.
    """
    if is_lookahead(build):
        params = lookahead_parameters(build)
        if not traces:
            return resolve_policy("max", plant, member)
        (trace,) = traces
        policy, report = make_lookahead(plant, trace, plant.slo.attainment, member, **params)
        return Hindsight(policy, plant, report)
    if build != ORACLE:
        return resolve_policy(build, plant, member)
    (trace,) = traces
    policy, report = kept_oracle(plant, trace, plant.slo.attainment, member)
    return Hindsight(policy, oracle_plant(plant), report)


def lookahead_parameters(build: str) -> dict[str, float]:
    """Parameters in a name ``lookahead:seconds=0.5``.

    Raises:
        BiscaleError: an unknown parameter or an impossible value.
    """
    given = parse_parameters(build, build.partition(":")[2], "seconds")
    return check_parameters(make_lookahead, build, given, ["seconds"])


def settings_of(build: str, phase: str) -> list[dict[str, Any]]:
    """Settings that tuning tries; none where nothing is free, or chosen from the workload."""
    return [] if is_planned(build) else policy_settings(build, phase)
