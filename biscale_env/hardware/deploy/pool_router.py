"""Which instance a request goes to: the simulator's own routers on what a router in front knows.

It keeps, per instance, the counts that the simulator's routers read: prompt tokens sent and not yet
prefilled; KV tokens of requests that run and of those on their way. Batches and KV that only the
engine knows are taken to be these.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from biscale_env.core.errors import BiscaleError
from biscale_env.core.jit import compiled
from biscale_env.envs.cluster.arrays import InstanceArrays
from biscale_env.envs.cluster.engine import NO_WORK
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.deploy.deployment_file import Deployment
from biscale_env.models import COEFFICIENT_DTYPE
from biscale_env.sim.cluster.layout import (
    CLUSTER_DTYPE,
    ROUTERS,
    Decodes,
    Floats,
    OfferedWork,
    Prefills,
)
from biscale_env.sim.cluster.routing import NOWHERE, route_decode, route_prefill

PHASES: Final = ("prefill", "decode")
PUT_ASIDE_S = 5.0  # how long an instance that refused a connection gets no more requests


@compiled
def pick_prefill(totals: Any, pool: Prefills, work: OfferedWork, now_s: float) -> int:
    """Number of the prefill instance for a request that arrives now; ``work`` is not looked at."""
    return route_prefill(totals, pool, work, now_s)


@compiled
def pick_decode(totals: Any, pool: Decodes, levels_ghz: Floats, prompt: int, now_s: float) -> int:
    """Number of the decode instance for a request whose prefill is done now."""
    return route_decode(totals, pool, levels_ghz, prompt, now_s)


@dataclass(frozen=True)
class InstanceLoad:
    """What the router knows of one instance.

    Attributes:
        phase: ``prefill`` or ``decode``.
        open: whether it gets new requests.
        requests: that it has now.
        tokens: prompt tokens to prefill, or KV tokens.
        routed: requests sent to it so far.
    """

    phase: str
    open: bool
    requests: int
    tokens: int
    routed: int


class PoolRouter:
    """Chooses instances and counts what they have."""

    def __init__(self, deployment: Deployment, seed: int = 0) -> None:
        """All instances open, nothing under way; speeds are taken as their numbers of GPUs.

        Args:
            deployment: instances and routers.
            seed: of weighted routing.

        Raises:
            BiscaleError: an instance makes no sense.
        """
        self.names = {phase: deployment.of_phase(phase) for phase in PHASES}
        self._state = np.zeros(1, dtype=CLUSTER_DTYPE)
        totals = self._state[0]
        totals["random"] = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        totals["router_prefill"] = ROUTERS.index(deployment.router.prefill)
        totals["router_decode"] = ROUTERS.index(deployment.router.decode)
        plants = {name: _plant(deployment, name) for name in deployment.instances}
        self.levels_ghz = np.array(plants[self.names["decode"][0]].clocks.levels_mhz) / 1e3
        self._arrays = {phase: self._pool(phase, plants) for phase in PHASES}
        self._prefills, self._decodes = (
            self._arrays["prefill"].prefills(),
            self._arrays["decode"].decodes(),
        )
        self._requests = {phase: np.zeros(len(self.names[phase]), np.int64) for phase in PHASES}
        self._warm_up()

    def _pool(self, phase: str, plants: Mapping[str, Plant]) -> InstanceArrays:
        arrays = InstanceArrays(phase, len(self.levels_ghz))
        for name in self.names[phase]:
            plant, i = plants[name], arrays.add(plants[name].settings.tp)
            arrays.coefs[i] = np.array(tuple(plant.model.member(-1)), dtype=COEFFICIENT_DTYPE)
            arrays.params[i] = plant.params(-1, np.inf)
            arrays.meta[i]["weight"] = float(plant.settings.tp)
            arrays.meta[i]["accepting"], arrays.meta[i]["retired_s"] = 1, np.inf
        return arrays

    def _warm_up(self) -> None:
        before = self._state.copy()
        pick_prefill(self._state[0], self._prefills, NO_WORK, 0.0)
        pick_decode(self._state[0], self._decodes, self.levels_ghz, 8, 0.0)
        self._state[:] = before

    # --- choices ---

    def choose(self, phase: str, prompt_tokens: int) -> str:
        """Instance for a request now; it counts there from now on until :meth:`leave`.

        Raises:
            BiscaleError: no instance of the phase is open.
        """
        now_s = time.monotonic()
        totals: Any = self._state[0]
        if phase == "prefill":
            i = int(pick_prefill(totals, self._prefills, NO_WORK, now_s))
        else:
            i = int(pick_decode(totals, self._decodes, self.levels_ghz, prompt_tokens, now_s))
        if i == NOWHERE:
            raise BiscaleError(f"no {phase} instance is open: the request is refused")
        arrays = self._arrays[phase]
        arrays.meta[i]["load_tokens"] += prompt_tokens
        arrays.meta[i]["routed"] += 1
        self._requests[phase][i] += 1
        arrays.states[i]["end"] += phase == "decode"
        return self.names[phase][i]

    def started(self, name: str, prompt_tokens: int) -> None:
        """A decode instance has sent the first token: the request runs there."""
        i, arrays = self._find(name)
        state = arrays.states[i]
        arrays.meta[i]["load_tokens"] -= prompt_tokens
        state["end"] -= 1
        state["batch"] += 1
        state["cached"] += prompt_tokens + 1

    def more(self, name: str, tokens: int) -> None:
        """A running request of a decode instance has made so many more tokens."""
        i, arrays = self._find(name)
        arrays.states[i]["cached"] += tokens

    def leave(self, name: str, prompt_tokens: int, made: int = 0) -> None:
        """A request is over at an instance, well or not.

        Args:
            name: the instance.
            prompt_tokens: as given to :meth:`choose`.
            made: tokens counted by :meth:`started` and :meth:`more`; 0: it never ran.
        """
        i, arrays = self._find(name)
        self._requests[arrays.phase][i] -= 1
        if not made:
            arrays.meta[i]["load_tokens"] -= prompt_tokens
            arrays.states[i]["end"] -= arrays.phase == "decode"
            return
        arrays.states[i]["batch"] -= 1
        arrays.states[i]["cached"] -= prompt_tokens + made

    # --- which are open ---

    def put_aside(self, name: str) -> None:
        """Send nothing to an instance for a while: it refused a connection."""
        i, arrays = self._find(name)
        arrays.meta[i]["ready_s"] = time.monotonic() + PUT_ASIDE_S

    def place(self, weights: Mapping[str, float]) -> None:
        """Open the named instances with these speeds; the others drain.

        Raises:
            BiscaleError: a phase would have no instance, or a name is not known.
        """
        for name in weights:
            self._find(name)
        for phase in PHASES:
            if not any(name in weights for name in self.names[phase]):
                raise BiscaleError(f"the placement leaves no {phase} instance open")
        for phase in PHASES:
            for i, name in enumerate(self.names[phase]):
                meta = self._arrays[phase].meta[i]
                meta["accepting"] = int(name in weights)
                meta["weight"] = max(weights.get(name, float(meta["weight"])), 1e-9)

    def loads(self) -> dict[str, InstanceLoad]:
        """What every instance has now."""
        found = {}
        for phase in PHASES:
            arrays = self._arrays[phase]
            for i, name in enumerate(self.names[phase]):
                meta = arrays.meta[i]
                cached = int(arrays.states[i]["cached"]) if phase == "decode" else 0
                found[name] = InstanceLoad(
                    phase,
                    bool(meta["accepting"] == 1),
                    int(self._requests[phase][i]),
                    int(meta["load_tokens"]) + cached,
                    int(meta["routed"]),
                )
        return found

    def _find(self, name: str) -> tuple[int, InstanceArrays]:
        for phase in PHASES:
            if name in self.names[phase]:
                return self.names[phase].index(name), self._arrays[phase]
        raise BiscaleError(f"the router knows no instance '{name}'")


def _plant(deployment: Deployment, name: str) -> Plant:
    phase = deployment.instances[name].phase
    return Plant(PlantSettings.of(phase, instance=deployment.spec(name)))
