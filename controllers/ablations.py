"""Named variants of the controllers for tables: what each extra is worth, one switch at a time.

Each variant is a policy name that :func:`controllers.make_policy` understands; the free margin is left to tuning.
"""

from biscale_env.errors import BiscaleError

PREFILL: dict[str, str] = {
    "MPC (paper)": "mpc",
    "MPC, the paper's greedy search": "mpc-greedy",
    "MPC + delay": "mpc:delay_aware=true",
    "MPC + give up": "mpc:give_up=true",
    "MPC + forecast": "mpc:forecast=4",
    "MPC + idle credit": "mpc:idle_credit=1",
    "MPC + delay, forecast": "mpc-plus",
    "MPC + everything": "mpc:delay_aware=true,forecast=4,idle_credit=1,give_up=true",
    "MPC, greedy, fitted predictors": "mpc-greedy:model=boosted",
}
DECODE: dict[str, str] = {
    "slack (paper)": "slack",
    "slack, no KV guard": "slack:kv_guard=2",
    "slack + energy floor": "slack:energy_floor=true",
    "slack + load floor": "slack:load_floor=true",
    "slack + fine clocks": "slack:fine=true",
    "slack + accumulated slack": "slack:accumulated=true",
    "slack + delay": "slack:delay_aware=true",
    "slack + fine, load floor": "slack:fine=true,load_floor=true",
    "slack + fine, load floor, accumulated": "slack-plus",
    "slack + everything": "slack:fine=true,load_floor=true,accumulated=true,delay_aware=true",
    "slack, fitted predictors": "slack:model=boosted",
}


def variants(phase: str) -> dict[str, str]:
    """Variants of a phase: name for the table -> policy name; the first is the paper's controller.

    Raises:
        BiscaleError: an unknown phase.
    """
    if phase not in ("prefill", "decode"):
        raise BiscaleError(f"unknown phase '{phase}': choose prefill or decode")
    return dict(PREFILL if phase == "prefill" else DECODE)
