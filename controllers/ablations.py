"""Named variants of the controllers for tables.

What each extra is worth, one switch at a time, and what a wrong nominal model costs.

Each variant is a policy name that :func:`controllers.make_policy` understands; the free margin is
left to tuning unless it is given.
"""

from biscale_env.core.errors import BiscaleError

PREFILL: dict[str, str] = {
    "MPC (paper)": "mpc",
    "MPC, the paper's greedy search": "mpc-greedy",
    "MPC, no margin": "mpc:margin=0",
    "MPC + delay": "mpc:delay_aware=true",
    "MPC + give up": "mpc:give_up=true",
    "MPC + forecast": "mpc:forecast=4",
    "MPC + idle credit": "mpc:idle_credit=1",
    "MPC + idle clock": "mpc:idle_clock=1",
    "MPC + idle credit, idle clock": "mpc:idle_credit=1,idle_clock=0.5",
    "MPC + delay, forecast": "mpc:delay_aware=true,forecast=4",
    "MPC + delay, forecast tuned": "mpc-plus",
    "MPC + delay, forecast, idle credit, idle clock": (
        "mpc:delay_aware=true,forecast=4,idle_credit=1,idle_clock=0.5"
    ),
    "MPC + everything": "mpc:delay_aware=true,forecast=4,idle_credit=1,idle_clock=0.5,give_up=true",
}
DECODE: dict[str, str] = {
    "slack (paper)": "slack",
    "slack, no KV guard": "slack:kv_guard=2",
    "slack + energy floor": "slack:energy_floor=true",
    "slack + load floor": "slack:load_floor=true",
    "slack + fine clocks": "slack-plus",
    "slack + accumulated slack": "slack:accumulated=true",
    "slack + delay": "slack:delay_aware=true,hysteresis=0",
    "slack + delay, hysteresis": "slack:delay_aware=true",
    "slack + fine, load floor": "slack:fine=true,load_floor=true",
    "slack + fine, load floor, accumulated": "slack:fine=true,load_floor=true,accumulated=true",
    "slack + everything": "slack:fine=true,load_floor=true,accumulated=true,delay_aware=true",
}
# members of the model ensemble: consistent with the evidence, none is the plant's nominal model
OTHER_MEMBERS = (1, 2, 3, 4)
MODEL_BASED = {
    "prefill": ("mpc", "mpc-plus", "mpc-greedy", "throttllem"),
    "decode": ("slack", "slack-plus", "throttllem"),
}
# The paper's own controllers with the paper's own predictor. MPC over continuous clocks needs the
# formula itself, hence the greedy search. In decode trees answer too slowly to try fourteen margins
# on a million iterations: the margin is given (assumed).
TREES = {
    "prefill": ("mpc-greedy, fitted predictors", "mpc-greedy:model=boosted"),
    "decode": ("slack, fitted predictors, margin 0.1", "slack:model=boosted,margin=0.1"),
}


def variants(phase: str) -> dict[str, str]:
    """Variants of a phase: name for the table -> policy name; the first is the paper's controller.

    Raises:
        BiscaleError: an unknown phase.
    """
    if phase not in ("prefill", "decode"):
        raise BiscaleError(f"unknown phase '{phase}': choose prefill or decode")
    return dict(PREFILL if phase == "prefill" else DECODE)


def nominal_models(phase: str) -> dict[str, str]:
    """Controllers with other nominal models than the plant's: name -> policy name.

    The plant's own, fitted trees, and other members of the ensemble. The group is ``beliefs`` where
    policies are named.

    Raises:
        BiscaleError: an unknown phase.
    """
    if phase not in MODEL_BASED:
        raise BiscaleError(f"unknown phase '{phase}': choose prefill or decode")
    found = dict((TREES[phase],))
    for name in MODEL_BASED[phase]:
        found[name] = name
        found |= {f"{name}, member {member}": f"{name}:member={member}" for member in OTHER_MEMBERS}
    return found


beliefs = nominal_models  # the name of before
