"""Other ways to see, pay and act, as Gymnasium wrappers over the environments of one instance."""

from biscale_env.wrappers.clock_actions import (
    DeltaAction,
    LevelAction,
    MhzAction,
    PowerCapAction,
)
from biscale_env.wrappers.compact_observation import CompactObservation, CompactVectorObservation
from biscale_env.wrappers.cost_step import CostStep, EnergyReward
from biscale_env.wrappers.history import History
from biscale_env.wrappers.last_step import LastStep
from biscale_env.wrappers.observation_parts import (
    DictObservation,
    NamedObservation,
    NamedVectorObservation,
    ObservationPart,
    Seen,
)
from biscale_env.wrappers.randomised_plant import RandomisedPlant
from biscale_env.wrappers.reward_terms import TERMS, NamedReward, RewardTerm
from biscale_env.wrappers.time_discount import TimeDiscount

__all__ = [
    "TERMS",
    "CompactObservation",
    "CompactVectorObservation",
    "CostStep",
    "DeltaAction",
    "DictObservation",
    "EnergyReward",
    "History",
    "LastStep",
    "LevelAction",
    "MhzAction",
    "NamedObservation",
    "NamedReward",
    "NamedVectorObservation",
    "ObservationPart",
    "PowerCapAction",
    "RandomisedPlant",
    "RewardTerm",
    "Seen",
    "TimeDiscount",
]
