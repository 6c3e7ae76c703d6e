"""From a name to a policy of the coarse loop (``BiScale/Cluster-v1``).

``ilp:0.3`` (BiScale's integer programme with its headroom), ``largest`` (DistServe's placement),
``agent:price=3`` (the shipped learned one), a run directory of ``biscale train cluster`` or its
``.npz``, or ``module:Class`` (:mod:`biscale_env.policies.coarse_classes`).
"""

from pathlib import Path
from typing import Final

from agents.coarse.coarse_agent import CoarseAgent
from agents.coarse.coarse_checkpoint import load_coarse
from biscale_env.config.loader import nearest
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import ClusterEnv
from biscale_env.policies.checkpoint_source import SHIPPED, checkpoint_in, names_checkpoint
from biscale_env.policies.coarse_classes import coarse_from_class
from biscale_env.policies.policy_source import AGENT, is_class_name, split_name
from controllers.placement.coarse_rules import RULES, CoarsePolicy, IlpRule
from controllers.placement.load_plans import LoadPlans
from controllers.registry import check_parameters, parse_parameters

SHIPPED_COARSE: Final = SHIPPED / "cluster.npz"


def resolve_coarse(name: str, env: ClusterEnv) -> CoarsePolicy:
    """Make a policy of the coarse loop by name.

    Args:
        name: in the syntax of :mod:`biscale_env.policies`.
        env: the environment, unwrapped; the rules measure its capacity table at the first call and
            keep it.

    Raises:
        BiscaleError: no such policy, an unknown parameter or an impossible value.
    """
    base, rest = split_name(name, {*RULES, AGENT})
    if base in RULES:
        maker = RULES[base]
        free = ["alpha"] if maker is IlpRule else []
        given = parse_parameters(name, rest, "alpha" if free else None)
        made: CoarsePolicy = maker(
            LoadPlans.of_env(env), **check_parameters(maker, name, given, free)
        )
        return made
    if is_class_name(base):
        return coarse_from_class(name, base, rest, env)
    if base != AGENT and not names_checkpoint(base):
        known = [*RULES, AGENT]
        raise BiscaleError(
            f"unknown coarse policy '{name}': did you mean '{nearest(base, known)}'? Known are "
            f"{', '.join(known)}, checkpoints of biscale train cluster and module:Class"
        )
    given = parse_parameters(name, rest, "price")
    checked = check_parameters(CoarseAgent, name, given, ["price"])
    return CoarseAgent(load_coarse(coarse_checkpoint(base)), env, **checked)


def coarse_checkpoint(base: str) -> Path:
    """File of a checkpoint: the shipped one, a run directory's best, or the file itself.

    Raises:
        BiscaleError: there is none.
    """
    if base != AGENT:
        return checkpoint_in(base)
    if not SHIPPED_COARSE.is_file():
        raise BiscaleError(
            "no agent is shipped for the cluster: train one with 'biscale train cluster'"
        )
    return SHIPPED_COARSE
