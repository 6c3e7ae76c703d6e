"""The attainment that a controller is tuned to, and the one it is judged by.

One rule for everybody, learned agents too.

(What an agent aims at *while it is trained* is its own affair, as a margin is that of a rule:
``agents.training.train_config.Constraint``, by default with half the reserve that tuning keeps at
P99.)

Both are the SLO's own wherever max clock leaves room for it. Where max clock itself has none to
give, nobody can be asked for more than max clock attains less a small allowance: otherwise only
"always the highest clock" is left, and the table shows no controller at all.
"""

# fraction of the allowed misses that tuning keeps free, since other data will differ (assumed)
RESERVE = 0.2
# of the allowed misses, that a controller may lose to max clock (assumed): 0.1 points of attainment
# at P99
ALLOWANCE = 0.1


def tuning_target(slo_attainment: float, best: float) -> float:
    """Attainment that tuning aims at on the tuning workloads.

    Args:
        slo_attainment: fraction of requests that the SLO asks for.
        best: what max clock attains on the tuning workloads.
    """
    allowed = 1.0 - slo_attainment
    return min(slo_attainment + RESERVE * allowed, best - ALLOWANCE * allowed)


def judged_target(slo_attainment: float, best: float) -> float:
    """Attainment that a controller is judged by on the evaluated workloads.

    Args:
        slo_attainment: fraction of requests that the SLO asks for.
        best: what max clock attains on the evaluated workloads; the SLO's own holds wherever that
            meets it, and where it is unknown (NaN).
    """
    if not best < slo_attainment * (1 - 1e-12):
        return slo_attainment
    return best - ALLOWANCE * (1.0 - slo_attainment)
