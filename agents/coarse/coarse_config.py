"""Configuration of the training of a coarse policy: ``configs/agents/cluster*.yaml``."""

from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
from pydantic import Field

from agents.coarse.service_days import ServiceDay, all_days
from biscale_env.config.loader import Config, load_named, load_yaml
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import ClusterEnv


class CoarseConfig(Config):
    """A training run of the coarse loop.

    Attributes:
        phase: always ``cluster``.
        env: options of ``BiScale/Cluster-v1``: hardware, SLO, tier 2, transitions, ...
        window_s: length of a window, s.
        windows: windows of a day.
        profile: workload profile of gaps and lengths.
        services: rate profiles.
        days: days of each that are learned from.
        validation_days: further days of each that say when to stop.
        mean_rps: mean load of a service, requests/s.
        measured_s: length of the windows in which costs are measured, s.
        price: penalties of a request that misses the SLO that tuning tries, from and to; unit:
            energy of a mean request.
        hidden: units of the hidden layer of the forecast.
        members: networks whose outputs are averaged.
        steps: of Adam, per network.
        learning_rate: of Adam.
        weight_decay: of Adam.
        residuals: equally likely loads that a forecast consists of.
        jump_share: part of them that is what any window may bring, whatever was before.
        tuning_days: days of training and validation, the last ones, on which the price is chosen.
        seed: of everything.
        evidence: where the values come from.
    """

    phase: Annotated[str, Field(pattern="^cluster$")] = "cluster"
    env: dict[str, Any] = Field(default_factory=dict)
    window_s: float = Field(default=600.0, gt=0)
    windows: int = Field(default=144, gt=1)
    profile: str = "gamma-sharegpt-like"
    services: tuple[str, ...] = Field(min_length=1)
    days: tuple[int, ...] = Field(min_length=1)
    validation_days: tuple[int, ...] = Field(min_length=1)
    mean_rps: float = Field(default=25.0, gt=0)
    measured_s: float = Field(default=300.0, gt=0)
    price: tuple[float, float] = (0.3, 30.0)
    hidden: int = Field(default=16, gt=0)
    members: int = Field(default=5, gt=0)
    steps: int = Field(default=600, gt=0)
    learning_rate: float = Field(default=5e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    residuals: int = Field(default=200, gt=1)
    jump_share: float = Field(default=0.1, ge=0, lt=1)
    tuning_days: int = Field(default=7, gt=0)
    seed: int = Field(default=0, ge=0)
    evidence: str = ""

    def make_env(self) -> ClusterEnv:
        """The environment, which takes any :class:`ServiceDay`.

        Raises:
            BiscaleError: an unknown option or an impossible value.
        """
        own = {"windows": self.windows, "window_s": self.window_s, "profile": self.profile}
        env = gym.make(
            "BiScale/Cluster-v1",
            disable_env_checker=True,
            rate_rps=self.mean_rps,
            **{**own, **self.env},
        ).unwrapped
        assert isinstance(env, ClusterEnv)
        return env

    def service_days(self, days: tuple[int, ...], seed: int) -> list[ServiceDay]:
        """Those days of every service; ``seed`` is that of gaps and lengths."""
        return all_days(self.services, days, self.mean_rps, self.profile, seed)


def load_coarse_config(name: str | Path | None) -> CoarseConfig:
    """Read a config by name or path; None: the shipped one.

    Raises:
        BiscaleError: no such config, an unknown key, or a value out of range.
    """
    path = Path(name or "cluster")
    if path.suffix in (".yaml", ".yml"):
        return checked(load_yaml(path, CoarseConfig))
    return checked(load_named("agents", str(path), CoarseConfig))


def checked(config: CoarseConfig) -> CoarseConfig:
    """The config, if no day is both learned from and held out.

    Raises:
        BiscaleError: one is.
    """
    both = sorted(set(config.days) & set(config.validation_days))
    if both:
        raise BiscaleError(f"day {both[0]} is in days and in validation_days: leave it in one")
    return config
