"""Options and constants shared by the prefill planners."""

from dataclasses import dataclass, fields

# arrivals are taken to come at least this often (assumed): no wait is expected to be longer
RARE_RPS = 1.0 / 60.0
FAR_S = 1e3  # deadline of a batch without one
NO_DEADLINE = 9.99  # encoded slacks from here on mean "none completes" (10 in the observation)


@dataclass(frozen=True)
class MpcOptions:
    """What is switched on; the defaults are the paper's controller.

    Attributes:
        margin: fraction of the SLO kept free before every deadline.
        give_up: drop expired deadlines: a request that cannot meet its deadline any more has none
            (the SLO is a quantile).
        forecast: arrivals to keep room for behind the queue, in units of those expected while it
            drains; 0: only what has arrived.
        delay_aware: the first part of the horizon runs at the clocks requested before.
        idle_credit: weight of the terminal cost: time not spent on the batches is spent idling at
            the energy-optimal clock.
        idle_clock: weight of the cost of waiting at the clock of the last batch of the queue: the
            instance keeps it until something arrives.
    """

    margin: float = 0.0
    give_up: bool = False
    forecast: float = 0.0
    delay_aware: bool = False
    idle_credit: float = 0.0
    idle_clock: float = 0.0

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(f.name for f in fields(cls))
