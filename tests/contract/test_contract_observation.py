"""The observation contract: names, bounds, encoding.

And a guard against changing it without raising its version.
"""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from biscale_env.contract import DECODE_SPEC, HORIZON, PREFILL_SPEC, ObservationSpec, spec_for
from biscale_env.core.errors import BiscaleError

SPECS = [PREFILL_SPEC, DECODE_SPEC]
KNOWN = {"prefill-v1": (63, "b4682a892ff57065"), "decode-v1": (21, "00f8b7e24476ce31")}


def fingerprint(spec: ObservationSpec) -> str:
    """What a checkpoint depends on.

    Order, names, units, scales, bounds (not the wording of a meaning).
    """
    rows = [f"{f.name}|{f.unit}|{f.scale!r}|{f.low!r}|{f.high!r}" for f in spec.features]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_a_changed_vector_needs_a_new_version(spec: ObservationSpec) -> None:
    """If this fails you changed what checkpoints and recordings mean.

    Raise the version and add its fingerprint here.
    """
    assert spec.id in KNOWN
    assert (spec.dim, fingerprint(spec)) == KNOWN[spec.id]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_names_and_bounds(spec: ObservationSpec) -> None:
    names = [f.name for f in spec.features]
    assert len(set(names)) == len(names) == spec.dim
    assert (spec.low < spec.high).all()
    assert (spec.scale > 0).all()
    assert all(f.unit and f.meaning and f.when for f in spec.features)
    assert [spec.index(n) for n in names] == list(range(spec.dim))
    assert spec_for(spec.name) is spec
    table = spec.markdown().splitlines()
    assert len(table) == spec.dim + 2
    assert all(f"`{n}`" in row for n, row in zip(names, table[2:], strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@given(data=some.data())
def test_encoding_and_reading_back(spec: ObservationSpec, data: some.DataObject) -> None:
    unit = np.array(data.draw(some.lists(some.floats(-2, 2), min_size=spec.dim, max_size=spec.dim)))
    obs = spec.encode(unit * spec.scale)
    assert obs.dtype == np.float32
    assert ((obs >= spec.low) & (obs <= spec.high)).all()
    for i, f in enumerate(spec.features):
        inside = min(max(unit[i], f.low), f.high) * f.scale
        assert float(spec.value(obs, f.name)) == pytest.approx(inside, rel=1e-6, abs=1e-6 * f.scale)
    both = np.stack([obs, obs])
    assert spec.value(both, spec.features[0].name).shape == (2,)


def test_horizon_reads_all_batches_in_order() -> None:
    physical = np.zeros(PREFILL_SPEC.dim)
    for name in ("batch_tokens", "batch_slack"):
        for k in range(HORIZON):
            physical[PREFILL_SPEC.index(f"{name}_{k}")] = k + 1
    obs = PREFILL_SPEC.encode(physical)
    for name in ("batch_tokens", "batch_slack"):
        np.testing.assert_allclose(
            PREFILL_SPEC.horizon(obs, name), np.arange(1, HORIZON + 1), rtol=1e-6
        )
        assert float(PREFILL_SPEC.value(obs, name)) == pytest.approx(1.0)
    assert PREFILL_SPEC.horizon(np.stack([obs] * 3), "batch_tokens").shape == (3, HORIZON)


def test_mistakes() -> None:
    with pytest.raises(BiscaleError, match=r"'prefill-v0'.*'prefill-v1'"):
        PREFILL_SPEC.check("prefill-v0", "model.zip")
    PREFILL_SPEC.check("prefill-v1", "model.zip")
    with pytest.raises(BiscaleError, match="phase"):
        spec_for("both")
