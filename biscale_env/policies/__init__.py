"""Policies by name: one syntax for commands, notebooks, hardware and users of the environments.

``base[:value][,key=value...]`` where the base is one of

============================ =======================================================
``mpc``, ``static:1200``     a controller that comes with the package
``agent:margin=0.1``         the shipped learned agent of the phase
``runs/p``, ``a/best.npz``   a run directory of ``biscale train``, its ``.npz`` or
                             ``.zip``, or a ``.zip`` of plain Stable-Baselines3
``mine.onnx``                a network of any library, see ``onnx_source``
``module:Class``             a class from outside; also ``file.py:Class``
a name                       an entry point of the group ``biscale.policies``
============================ =======================================================
"""

from biscale_env.policies.policy_source import PolicySource
from biscale_env.policies.resolver import (
    find_policy,
    known_policies,
    phases_of,
    policy_settings,
    resolve_policy,
    with_parameters,
)

__all__ = [
    "PolicySource",
    "find_policy",
    "known_policies",
    "phases_of",
    "policy_settings",
    "resolve_policy",
    "with_parameters",
]
