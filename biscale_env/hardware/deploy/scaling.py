"""Who carries instance counts out: nobody, our router, Kubernetes, or Dynamo's graph.

Surplus instances drain first: the router sends them nothing more, and they are scaled away when
they are empty.
"""

import json
import subprocess
from collections.abc import Callable, Sequence
from typing import Protocol

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.deploy.deployment_file import Tier1Settings

KUBECTL_S = 30.0
Run = Callable[[Sequence[str]], None]


class Scaler(Protocol):
    """Sets how many instances a phase has."""

    def scale(self, phase: str, count: int) -> str:
        """Set a count; a sentence about it for the log.

        Raises:
            BiscaleError: it could not be set.
        """
        ...


class Advise:
    """Only says what should be."""

    def scale(self, phase: str, count: int) -> str:
        """Say it."""
        return f"advice: {count} {phase} instances"


def kubectl(arguments: Sequence[str]) -> None:
    """Run kubectl with the identity of this process.

    Raises:
        BiscaleError: it is missing, fails, or takes too long.
    """
    try:
        done = subprocess.run(
            ["kubectl", *arguments], capture_output=True, text=True, timeout=KUBECTL_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BiscaleError(f"kubectl {' '.join(arguments)}: {error}") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BiscaleError(f"kubectl {' '.join(arguments)}: {said[-1]}")


class KubernetesScale:
    """The scale subresource of a workload per phase."""

    def __init__(self, settings: Tier1Settings, run: Run = kubectl) -> None:
        self.settings, self._run = settings, run

    def scale(self, phase: str, count: int) -> str:
        """``kubectl scale``."""
        s = self.settings
        workload = s.workloads[phase]  # type: ignore[index]
        self._run(["-n", s.namespace, "scale", workload, f"--replicas={count}"])
        return f"{workload} in {s.namespace} has {count} replicas"


class DynamoScale:
    """Replicas of a service of a DynamoGraphDeployment, as Dynamo's own planner sets them."""

    def __init__(self, settings: Tier1Settings, run: Run = kubectl) -> None:
        self.settings, self._run = settings, run

    def scale(self, phase: str, count: int) -> str:
        """A merge patch of ``spec.services.NAME.replicas``."""
        s = self.settings
        service = s.workloads[phase]  # type: ignore[index]
        patch = json.dumps({"spec": {"services": {service: {"replicas": count}}}})
        graph = ["patch", "dynamographdeployment", str(s.graph), "--type=merge", "-p", patch]
        self._run(["-n", s.namespace, *graph])
        return f"service {service} of {s.graph} has {count} replicas"


def scaler_of(settings: Tier1Settings, run: Run = kubectl) -> Scaler:
    """What the settings name; with ``router`` nothing is scaled, instances open and close."""
    if settings.adapter == "kubernetes":
        return KubernetesScale(settings, run)
    if settings.adapter == "dynamo":
        return DynamoScale(settings, run)
    return Advise()
