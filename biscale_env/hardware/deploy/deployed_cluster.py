"""A deployment as the cluster simulator knows one."""

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_settings import ClusterSettings
from biscale_env.hardware.deploy.deployment_file import Deployment

OF_ONE_KIND = ("gpu", "llm", "model", "dtype", "ep", "slo", "token_budget", "kv_watermark", "idle")


def cluster_settings(deployment: Deployment) -> ClusterSettings:
    """The cluster that holds these instances: their kind, on all GPUs of the deployment.

    Raises:
        BiscaleError: instances differ in more than TP and batch limits; the simulator has
            instances of one kind.
    """
    specs = {name: deployment.spec(name) for name in deployment.instances}
    first = next(iter(specs.values()))
    for name, spec in specs.items():
        different = [key for key in OF_ONE_KIND if getattr(spec, key) != getattr(first, key)]
        if different:
            raise BiscaleError(
                f"instance '{name}' has another {different[0]}: the cluster simulator has "
                "instances of one kind"
            )
    sizes = {p: specs[deployment.of_phase(p)[0]].max_seqs for p in ("prefill", "decode")}
    return ClusterSettings.of(
        gpus=sum(len(one.gpus) for one in deployment.instances.values()),
        prefill_max_seqs=sizes["prefill"],
        decode_max_seqs=sizes["decode"],
        actuation_delay_s=deployment.bounds.delay_s,
        prefill_router=deployment.router.prefill,
        decode_router=deployment.router.decode,
        **{key: getattr(first, key) for key in OF_ONE_KIND},
    )
