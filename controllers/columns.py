"""Columns of the physical observation by name, for compiled code: ``x[i, PREFILL.slo]``.

A projected quantity stands for its first batch: that of batch k is ``PREFILL.batch_tokens + k``.
"""

from typing import NamedTuple

from biscale_env.contract.observation import DECODE_SPEC, PREFILL_SPEC


class PrefillColumns(NamedTuple):
    """Columns of the prefill observation; units and meaning in the spec."""

    batch_tokens: int
    batch_attn: int
    batch_requests: int
    batch_completing: int
    batch_slack: int
    batch_slack_alive: int
    queue_requests: int
    queue_tokens: int
    oldest_wait: int
    arrival_rate_1s: int
    arrival_rate_10s: int
    arrival_rate_60s: int
    token_rate_10s: int
    freq_current: int
    freq_pending: int
    time_to_apply: int
    actuation_delay: int
    last_time: int
    last_power: int
    slo: int
    kv_backpressure: int


class DecodeColumns(NamedTuple):
    """Columns of the decode observation; units and meaning in the spec."""

    batch: int
    cached_tokens: int
    kv_use: int
    recompute_tokens: int
    waiting_requests: int
    waiting_tokens: int
    oldest_wait: int
    incoming_requests: int
    tpot_slack_min: int
    tpot_slack_mean: int
    arrival_rate_1s: int
    arrival_rate_10s: int
    arrival_rate_60s: int
    token_rate_10s: int
    freq_current: int
    freq_pending: int
    time_to_apply: int
    actuation_delay: int
    last_time: int
    last_power: int
    slo: int


PREFILL = PrefillColumns(*(PREFILL_SPEC.index(name) for name in PrefillColumns._fields))
DECODE = DecodeColumns(*(DECODE_SPEC.index(name) for name in DecodeColumns._fields))
