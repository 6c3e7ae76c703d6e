"""SLO classes of generated requests."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_env.traces.prompts.prompt_blocks import PromptBlocks
from biscale_env.traces.request_classes import RequestClasses
from biscale_env.traces.synthetic.profiles import WorkloadProfile


@dataclass(frozen=True)
class RequestClassShares:
    """Draws the class of every request, independent of arrivals and lengths.

    Attributes:
        names: names of the classes; empty where the profile has none.
        shares: their shares of all requests; what is left has no class.
        rng: random numbers.
    """

    names: tuple[str, ...]
    shares: NDArray[np.float64]
    rng: np.random.Generator

    @classmethod
    def of(cls, profile: WorkloadProfile, rng: np.random.Generator) -> "RequestClassShares":
        """Shares that a profile names."""
        shares = [one.share for one in profile.classes.values()]
        return cls(tuple(profile.classes), np.array(shares), rng)

    def _drawn(self, n: int) -> NDArray[np.int64]:
        number = np.searchsorted(np.cumsum(self.shares) + 1e-12, self.rng.random(n), side="right")
        return np.where(number < len(self.names), number, -1)

    def of_requests(self, n: int) -> RequestClasses | None:
        """Classes of ``n`` requests; None without classes."""
        return RequestClasses.of_codes(self.names, self._drawn(n)) if self.names else None

    def of_sessions(self, blocks: PromptBlocks) -> RequestClasses | None:
        """Classes of requests, the same for all of a session; None without classes."""
        if not self.names:
            return None
        return RequestClasses.of_codes(self.names, self._drawn(blocks.n_sessions)[blocks.session])
