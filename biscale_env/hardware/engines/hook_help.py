"""How an engine is started so that it tells about its batches: what to say when none were told."""

from pathlib import Path

from biscale_env.hardware.emulation.emulate import all_records_endpoint
from biscale_env.hardware.engines.hook.sender import ALL_VARIABLE, NEWEST_VARIABLE
from biscale_env.hardware.loop.wire import record_endpoint

VLLM = "vllm serve MODEL ... --scheduler-cls biscale_hook.vllm_hook.BiscaleScheduler"
SGLANG = "python -m sglang.launch_server ... (its plug-in `biscale` comes with the hook)"
OTHERS = "or run `biscale hw bridge --phase {} --source ...` beside it"


def how_to_start_hook(phase: str, engine: str, sockets: Path) -> str:
    """The sentence that says how to start an engine with the hook.

    Args:
        phase: ``prefill`` or ``decode``.
        engine: its kind, as ``biscale replay --engine`` takes it.
        sockets: folder where its records are awaited.
    """
    variables = (
        f"{NEWEST_VARIABLE}={record_endpoint(sockets, phase)} "
        f"{ALL_VARIABLE}={all_records_endpoint(sockets, phase)}"
    )
    if engine == "emulated":
        return f"start `biscale hw emulate --sockets {sockets}`"
    if engine == "dynamo":
        return (
            f"run `biscale hw bridge --phase {phase} --source tcp://HOST:20380 --sockets {sockets}`"
        )
    command = SGLANG if engine == "sglang" else VLLM
    return (
        f"install the hook beside it (pip install ./packaging/engine-hook) and start it as "
        f"`{variables} {command}`, {OTHERS.format(phase)}"
    )
