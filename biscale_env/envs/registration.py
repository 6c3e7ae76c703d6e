"""Registration of the environment ids.

Any change of dynamics, reward or default scenario raises the version.
"""

import gymnasium as gym

ENV_IDS = {
    "BiScale/Prefill-v1": ("prefill", False),
    "BiScale/Decode-v1": ("decode", False),
    "BiScale/PrefillDiscrete-v1": ("prefill", True),
    "BiScale/DecodeDiscrete-v1": ("decode", True),
}


CLUSTER_ID = "BiScale/Cluster-v1"


def register_envs() -> None:
    """Register every id once; entry points are imported only when an environment is made."""
    for env_id, (phase, discrete) in ENV_IDS.items():
        if env_id in gym.registry:
            continue
        name = "PrefillEnv" if phase == "prefill" else "DecodeEnv"
        gym.register(
            env_id,
            entry_point=f"biscale_env.envs.single:{name}",
            vector_entry_point="biscale_env.envs.vector:make_" + phase,
            disable_env_checker=True,
            kwargs={"discrete": discrete},
        )
    if CLUSTER_ID not in gym.registry:
        gym.register(
            CLUSTER_ID,
            entry_point="biscale_env.envs.cluster.cluster_env:ClusterEnv",
            vector_entry_point="biscale_env.envs.cluster.cluster_vector:ClusterVectorEnv",
            disable_env_checker=True,
        )
