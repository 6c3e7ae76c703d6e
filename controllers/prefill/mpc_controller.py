"""What the prefill MPCs share: their parameters and their problem."""

from collections.abc import Mapping
from typing import Any, ClassVar

from controllers.base import MARGINS, Amount, Controller, Fraction, PolicyContext
from controllers.prefill.mpc_options import MpcOptions
from controllers.prefill.mpc_problem import MpcProblem


class MpcController(Controller):
    """Base of the MPCs; a subclass decides how :class:`MpcProblem` is solved.

    Class attributes:
        COUNTED: names of its counters.
    """

    phases: ClassVar[tuple[str, ...]] = ("prefill",)
    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = MARGINS
    COUNTED: ClassVar[tuple[str, ...]] = ("decisions", "solver_failures", "iterations")

    def __init__(
        self,
        context: PolicyContext,
        *,
        margin: Fraction = 0.0,
        give_up: bool = False,
        forecast: Amount = 0.0,
        delay_aware: bool = False,
        idle_credit: Amount = 0.0,
        idle_clock: Amount = 0.0,
    ) -> None:
        """Prepare the problem.

        Args:
            context: what it may know.
            margin: fraction of the SLO kept free before every deadline.
            give_up: drop expired deadlines.
            forecast: arrivals to keep room for, in units of those expected while the queue drains.
            delay_aware: the first part of the horizon runs at the clocks requested before.
            idle_credit: weight of the terminal cost.
            idle_clock: weight of the cost of waiting at the last clock.
        """
        super().__init__(context)
        options = MpcOptions(
            margin=margin,
            give_up=give_up,
            forecast=forecast,
            delay_aware=delay_aware,
            idle_credit=idle_credit,
            idle_clock=idle_clock,
        )
        self.problem = MpcProblem(context, options)
        self._counts = dict.fromkeys(self.COUNTED, 0)
        self.prepare()

    def prepare(self) -> None:
        """What a subclass needs besides the problem."""

    def stats(self) -> dict[str, float]:
        """Counters since it was made, those of :attr:`COUNTED`."""
        return dict(self._counts)
