"""Reference controllers: policies on the observation alone.

The oracles are the exception: they know the future.
"""

from controllers.base import Controller, LatencyModel, PolicyContext, context_of
from controllers.registry import default_policies, make_policy, policy_names, policy_tunables

__all__ = [
    "Controller",
    "LatencyModel",
    "PolicyContext",
    "context_of",
    "default_policies",
    "make_policy",
    "policy_names",
    "policy_tunables",
]
