"""How long until the iteration begins that a record is about.

With asynchronous scheduling an engine forms a batch while the one before it still runs: its record
comes early, and the state that it tells will hold when that one has ended. The time until then is
predicted by the instance's model, from the work and the clock of the batches that run, and
corrected by how the latest predictions compare with what the engine then measured.
"""

from collections import deque
from typing import Any

import numpy as np

from biscale_env.core.jit import compiled
from biscale_env.envs.plant import Plant
from biscale_env.hardware.engines.hook.engine_record import EngineRecord
from biscale_env.models import COEFFICIENT_DTYPE
from biscale_env.sim.clock import under_cap
from biscale_env.sim.state import PARAMS_DTYPE

MEMORY = 0.1  # weight of the newest ratio of measured to predicted duration (chosen)
RATIOS = (0.2, 5.0)  # bounds of a ratio: one odd iteration is no other machine (chosen)
REMEMBERED = 8  # records kept; engines run two iterations ahead at most


@compiled
def _duration_s(
    c: Any, p: Any, tokens: float, attn_work: float, cached: float, n_seq: float, freq_ghz: float
) -> float:
    """Duration of an iteration at a clock, under the power cap, s."""
    return under_cap(c, p, tokens, attn_work, cached, n_seq, freq_ghz)[1]


class _Formed:
    """An iteration that was announced, and its predicted duration once it is asked for."""

    def __init__(self, record: EngineRecord, freq_mhz: float) -> None:
        self.counter = record.counter_id
        self.record, self.freq_mhz = record, freq_mhz
        self.duration_s = 0.0


class LeadPredictor:
    """Predicts the lead of every record of one instance.

    Attributes:
        ratio: measured durations relative to those of the model, a running mean.
    """

    def __init__(self, plant: Plant) -> None:
        """Prepare for the model of an instance, and compile."""
        self._coefs: Any = np.array([tuple(plant.model.member(-1))], dtype=COEFFICIENT_DTYPE)[0]
        self._params: Any = np.asarray(plant.params(-1, np.inf), dtype=PARAMS_DTYPE)[()]
        self._formed: deque[_Formed] = deque(maxlen=REMEMBERED)
        self.ratio = 1.0
        self._predict(_Formed(EngineRecord(), plant.clocks.freq_max_mhz))

    def lead_s(self, record: EngineRecord, freq_mhz: float) -> float:
        """Time from the state of a record to the begin of its iteration, s; 0 where it is now.

        Costs next to nothing while iterations are not announced early.

        Args:
            record: of the engine, in order.
            freq_mhz: clock in effect.
        """
        detail, lead_s = record.detail, 0.0
        if detail is not None and detail.ahead > 0:
            self._learn(record.counter_id - 1 - detail.ahead, record.wall_time)
            first = record.counter_id - detail.ahead
            running = [self._predict(f) * self.ratio for f in self._formed if f.counter >= first]
            unheard = max(detail.ahead - len(running), 0)  # the newest record wins, some are lost
            since_s = detail.running_since_s or detail.time_s
            left_s = sum(running) + unheard * record.wall_time - (detail.time_s - since_s)
            lead_s = max(left_s, 0.0)
        self._formed.append(_Formed(record, freq_mhz))
        return lead_s

    def _learn(self, counter: int, measured_s: float) -> None:
        """Compare the duration of an iteration that has ended with its prediction."""
        for formed in self._formed:
            if formed.counter == counter and measured_s > 0.0 < formed.duration_s:
                ratio = min(max(measured_s / formed.duration_s, RATIOS[0]), RATIOS[1])
                self.ratio += MEMORY * (ratio - self.ratio)

    def _predict(self, formed: _Formed) -> float:
        """Duration of an iteration by the model, s."""
        if formed.duration_s:
            return formed.duration_s
        s, detail = formed.record.scheduled_requests, formed.record.detail
        new = float(s.sum_prefill_tokens)
        again = float(detail.recompute_tokens) if detail else 0.0
        n = max(s.num_prefill_requests, 1)
        pairs = new * (0.5 * new + s.sum_prefill_kv_tokens) / n
        formed.duration_s = _duration_s(
            self._coefs,
            self._params,
            new + again + s.num_decode_requests,
            pairs,
            float(s.sum_decode_kv_tokens),
            float(s.num_prefill_requests + s.num_decode_requests),
            formed.freq_mhz / 1e3,
        )
        return formed.duration_s
