"""Registration of the environment ids.

Any change of dynamics, reward or default scenario raises the version.
"""

from typing import Any

import gymnasium as gym

ENV_IDS = {
    "BiScale/Prefill-v1": ("prefill", False),
    "BiScale/Decode-v1": ("decode", False),
    "BiScale/PrefillDiscrete-v1": ("prefill", True),
    "BiScale/DecodeDiscrete-v1": ("decode", True),
}

# Decisions at least this far apart, s: 2 bounds of TPOT in decode, as the shipped agent decides,
# and a sixth of the bound of TTFT in prefill.
INTERVAL_IDS = {
    "BiScale/PrefillInterval-v1": ("prefill", 0.1),
    "BiScale/DecodeInterval-v1": ("decode", 0.2),
}

CLUSTER_ID = "BiScale/Cluster-v1"


def _register_phase(env_id: str, phase: str, kwargs: dict[str, Any]) -> None:
    if env_id in gym.registry:
        return
    name = "PrefillEnv" if phase == "prefill" else "DecodeEnv"
    gym.register(
        env_id,
        entry_point=f"biscale_env.envs.single:{name}",
        vector_entry_point="biscale_env.envs.vector:make_" + phase,
        disable_env_checker=True,
        kwargs=kwargs,
    )


def register_envs() -> None:
    """Register every id once; entry points are imported only when an environment is made."""
    for env_id, (phase, discrete) in ENV_IDS.items():
        _register_phase(env_id, phase, {"discrete": discrete})
    for env_id, (phase, interval_s) in INTERVAL_IDS.items():
        _register_phase(env_id, phase, {"min_decision_interval_s": interval_s})
    if CLUSTER_ID not in gym.registry:
        gym.register(
            CLUSTER_ID,
            entry_point="biscale_env.envs.cluster.cluster_env:ClusterEnv",
            vector_entry_point="biscale_env.envs.cluster.cluster_vector:ClusterVectorEnv",
            disable_env_checker=True,
        )
