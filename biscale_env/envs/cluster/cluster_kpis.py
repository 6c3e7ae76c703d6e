"""Key figures of an episode of the coarse loop."""

from collections.abc import Sequence

import numpy as np

from biscale_env.config import Slo
from biscale_env.config.slo import within
from biscale_env.envs.cluster.whole_run import Window


def cluster_kpis(windows: Sequence[Window], slo: Slo, unfinished: int) -> dict[str, float]:
    """Key figures of some windows, one after the other.

    Args:
        windows: of one episode.
        slo: bounds.
        unfinished: requests in flight after the last of them.

    Returns:
        ``energy_j`` of all GPUs, ``duration_s``; ``tokens`` (output tokens made) and
        ``energy_per_token_j``; ``attainment``: fraction of the finished requests within both
        bounds; ``requests_finished``, ``requests_unfinished``; ``ttft_p99_s``, ``tpot_p99_s``.
        NaN where nothing was finished.
    """
    done = np.concatenate([window.finished for window in windows])
    energy_j = float(sum(window.energy.total_j for window in windows))
    made = float(sum(window.produced_tokens for window in windows))
    ttft_s = done["first_token_s"] - done["arrival_s"]
    intervals = done["output_tokens"] - 1
    decode_s = done["finish_s"] - done["first_token_s"]
    kept = within(ttft_s, slo.ttft_s) & within(decode_s, slo.tpot_s * intervals)
    tpot_s = decode_s[intervals > 0] / intervals[intervals > 0]
    return {
        "energy_j": energy_j,
        "duration_s": float(sum(window.duration_s for window in windows)),
        "tokens": made,
        "energy_per_token_j": energy_j / made if made else float("nan"),
        "attainment": float(kept.mean()) if len(done) else float("nan"),
        "requests_finished": float(len(done)),
        "requests_unfinished": float(unfinished),
        "ttft_p99_s": float(np.quantile(ttft_s, 0.99)) if len(done) else float("nan"),
        "tpot_p99_s": float(np.quantile(tpot_s, 0.99)) if len(tpot_s) else float("nan"),
    }
