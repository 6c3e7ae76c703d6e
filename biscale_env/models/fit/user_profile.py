"""`biscale fit --profile TABLE.csv`: coefficient files from measurements of one's own hardware.

A table of whole iterations cannot tell apart terms of equal form: host time from the constant part
of communication, static from busy power. Their sums are fitted; how they are shared stays near the
start model. A table of shards (``scope``, as `biscale profile` writes it) knows nothing of
all-reduce and host: both are left out while it is fitted, and come from the start model afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import least_squares, lsq_linear

from biscale_env.config import configs_dir
from biscale_env.config.loader import find_named
from biscale_env.core.errors import BiscaleError
from biscale_env.models import physics
from biscale_env.models.coefficient import Coefficient, dump_fitted, rounded
from biscale_env.models.coefficient_files import ModelFile, find_file, stem
from biscale_env.models.ensemble_table import table_text
from biscale_env.models.fit.latency import LATENCY_FIELDS, WORK_FIELD, Rows, mape, predict_s, refine
from biscale_env.models.fit.linear_energy import (
    ENERGY_NAMES,
    SCALE,
    LinearSystem,
    energy_columns,
    remainder,
)
from biscale_env.models.fit.llm_files import domain_of
from biscale_env.models.fit.profile_table import ONE_GPU_LACKS, ProfileTable, read_profile, sha256
from biscale_env.models.geometry import counted_work
from biscale_env.models.gpu_layer import ensemble_path
from biscale_env.models.iteration_model import DEFAULT_NAME, IterationModel, read_model
from biscale_env.models.physics import Coefficients

Floats = NDArray[np.float64]
LATENCY_SIGMA = (
    20.0  # hardly any pull towards the start: it only settles what the table cannot tell apart
)
ENERGY_PULL = 30.0  # standard deviation of an energy around its start, relative: settles ties only
FREQUENCY_FIELDS = ("core_share", "stream_knee_ghz")
VOLTAGE_FIELDS = ("v_knee_ghz", "v_slope_per_ghz")
VOLTAGE_BOUNDS = ((0.3, 0.0), (1.9, 3.0))
MIN_ROWS = 12
MIN_CLOCKS = (
    3  # clocks from which frequency behaviour is fitted; with fewer it is kept from the start
)
BOOTSTRAPS = 64


@dataclass(frozen=True)
class UserFit:
    """A fitted table.

    Attributes:
        content: coefficient file.
        members: bootstrap ensemble, one row per member.
        latency_mape: error on held-out rows.
        power_mape: error on held-out rows; NaN without power.
        descriptions: file name to text of the GPU and the LLM where they are not shipped ones; they
            lie beside the coefficient file, which names them.
    """

    content: ModelFile
    members: pd.DataFrame
    latency_mape: float
    power_mape: float
    descriptions: dict[str, str]

    def files(self, path: Path) -> dict[str, str]:
        """File name to text for a coefficient file at ``path``, its ensemble, its GPU and LLM."""
        comment = (
            "Bootstrap members: the table resampled, everything refitted; delays as in the start "
            "model"
        )
        text = table_text(comment, {str(name): self.members[name] for name in self.members})
        own = {path.name: dump_fitted(self.content), ensemble_path(path).name: text}
        if clash := set(own) & set(self.descriptions):
            raise BiscaleError(
                f"{min(clash)} is the name of the coefficient file and of a GPU or LLM: rename one"
            )
        return {**own, **self.descriptions}


@dataclass(frozen=True)
class StartModel:
    """Where a fit starts.

    Attributes:
        model: coefficients of the base model, moved to the new GPU and LLM.
        gpu: how the new file names its GPU.
        llm: how it names its LLM.
        descriptions: file name to text of those that are not shipped.
    """

    model: IterationModel
    gpu: str
    llm: str
    descriptions: dict[str, str]


def _named_in(kind: str, name: str, beside: Path) -> tuple[str, dict[str, str]]:
    """How a new coefficient file names a description, and its text if it is not a shipped one."""
    path = find_named(kind, name, beside)
    if path.parent == configs_dir() / kind:
        return path.stem, {}
    return path.name, {path.name: path.read_text(encoding="utf-8")}


def start_model(
    table: ProfileTable, base: str, gpu: str | None = None, llm: str | None = None
) -> StartModel:
    """The base model of the same phase that is nearest to the table's configuration.

    Args:
        table: what is fitted.
        base: model family.
        gpu: GPU that the table was measured on; None: that of the base model.
        llm: LLM that ran; None: that of the base model.

    Raises:
        BiscaleError: an unknown GPU or LLM, or a base without such a phase.
    """
    for dtype in (table.dtype, "bf16"):
        for tp in sorted((1, 2, 4, 8, 16), key=lambda n: abs(np.log2(n / table.tp))):
            try:
                path = find_file(base, table.phase, dtype, tp)
                fitted = read_model(table.phase, tp, dtype, base).content
            except BiscaleError:
                continue
            model = read_model(table.phase, tp, dtype, base, gpu, llm)
            gpu_name, gpu_text = _named_in("gpus", gpu or fitted.gpu, path.parent)
            llm_name, llm_text = _named_in("llms", llm or fitted.llm, path.parent)
            return StartModel(model, gpu_name, llm_name, {**gpu_text, **llm_text})
    raise BiscaleError(f"model '{base}' has no {table.phase} model to start the fit from")


def _need(table: ProfileTable, column: str, path: Path) -> None:
    if column not in table.rows:
        raise BiscaleError(f"{path}: column {column} is missing; a fit needs it on every row")


def _join_power(table: ProfileTable, power: list[ProfileTable]) -> ProfileTable | None:
    """Rows with measured power for this configuration: from the power table if there is one."""
    if not power:
        return table if "power_w" in table.rows else None
    same = [t for t in power if (t.phase, t.tp, t.dtype) == (table.phase, table.tp, table.dtype)]
    return same[0] if same else None


def _clocks(table: ProfileTable) -> Floats:
    return table.column("freq_mhz") * 1e-3


def _fit_latency(start: Coefficients, table: ProfileTable, rows: Rows) -> Coefficients:
    clocks = _clocks(table)
    fields: Sequence[str] = (*LATENCY_FIELDS, WORK_FIELD[table.phase], "host0_s", "host_s_per_seq")
    if len(np.unique(np.round(clocks, 2))) >= MIN_CLOCKS:
        fields = (*fields, *FREQUENCY_FIELDS)
    found = refine(start, fields, table, rows, clocks, LATENCY_SIGMA)
    if found.host_s_per_seq <= 0.0:
        return found
    # how much of the time per request is the host's, no table tells: the energy per request is kept
    per_request = start.p_seq_w * start.host_s_per_seq
    return found._replace(p_seq_w=per_request / found.host_s_per_seq)


def _energies(
    c: Coefficients, start: Coefficients, table: ProfileTable, time: Floats, rows: Rows
) -> Coefficients:
    """Energy coefficients for a given voltage curve.

    Linear, bounded below by zero, weakly pulled to the start.
    """
    w, f = table.work, _clocks(table)
    tokens, attn_work, cached, n_seq = (axis[rows] for axis in w.as_tuple())

    def power(k: Coefficients) -> Floats:
        t = time[rows]
        return np.asarray(
            physics.iteration_energy_j(k, tokens, attn_work, cached, n_seq, t, f[rows]) / t
        )

    watts = energy_columns(power, c)
    target = table.column("power_w")[rows]
    system = LinearSystem(list(watts), (target - remainder(power, c)).tolist(), target.tolist())
    for i, name in enumerate(ENERGY_NAMES):
        mean = max(getattr(start, name) / SCALE.get(name, 1.0), 1e-3)
        system.add(np.eye(len(ENERGY_NAMES))[i], mean, ENERGY_PULL * mean * np.sqrt(len(target)))
    matrix, right = system.weighted()
    x = np.maximum(
        lsq_linear(matrix, right, bounds=(0.0, np.inf), method="bvls", tol=1e-13).x, 0.0
    )  # -1e-15 does occur
    return c._replace(
        **{n: float(v) * SCALE.get(n, 1.0) for n, v in zip(ENERGY_NAMES, x, strict=True)}
    )


def _fit_power(
    c: Coefficients, start: Coefficients, table: ProfileTable, rows: Rows
) -> Coefficients:
    """Voltage curve and energies.

    The energies are solved exactly inside the search over the curve.
    """
    f, target = _clocks(table), table.column("power_w")
    time = table.column("latency_s") if "latency_s" in table.rows else predict_s(c, table, f)

    def fitted(q: Floats) -> Coefficients:
        return _energies(
            c._replace(v_knee_ghz=float(q[0]), v_slope_per_ghz=float(q[1])),
            start,
            table,
            time,
            rows,
        )

    def residual(q: Floats) -> Floats:
        return (_power(fitted(q), table, time, f) / target - 1.0)[rows]

    if len(np.unique(np.round(f, 2))) < MIN_CLOCKS:
        return _energies(c, start, table, time, rows)
    q0 = np.array([getattr(start, n) for n in VOLTAGE_FIELDS])
    q = least_squares(
        residual, q0, bounds=VOLTAGE_BOUNDS, diff_step=1e-4, xtol=1e-10, ftol=1e-10, max_nfev=60
    ).x
    return fitted(q)


def _power(c: Coefficients, table: ProfileTable, time: Floats, f: Floats) -> Floats:
    w = table.work
    return np.asarray(physics.iteration_energy_j(c, *w.as_tuple(), time, f) / time)


def _coefficient(
    name: str, value: float, model: IterationModel, moved: set[str], path: Path
) -> Coefficient:
    value = rounded(value)
    if name in moved:
        return Coefficient(value=value, provenance="measured", source=f"fitted to {path.name}")
    if name in counted_work(model.llm, model.tp, model.content.dtype):
        shape = f"counted from the shape of {model.llm.name} and the tensor parallel degree"
        return Coefficient(value=value, provenance="derived", source=shape)
    old = model.content.coefficients[name]
    return Coefficient(
        value=value, provenance=old.provenance, source=f"kept from {model.name}: {old.source}"
    )


def fit_table(
    table: ProfileTable, power: ProfileTable | None, begin: StartModel, path: Path, name: str
) -> UserFit:
    """Fit one configuration.

    Args:
        table: rows with ``latency_s`` and ``freq_mhz``.
        power: rows with ``power_w``, or None to keep the energy coefficients of the start.
        begin: where the fit starts: base model, GPU and LLM.
        path: the file, for messages and provenance.
        name: name of the new model family.
    """
    model = begin.model
    whole = model.coefficients._replace(
        **counted_work(model.llm, table.tp, table.dtype), p_cap_w=model.gpu.power_cap_w
    )
    start = whole._replace(**ONE_GPU_LACKS) if table.shard else whole
    held_out = table.held_out()
    c = _fit_latency(start, table, ~held_out)
    power_mape = float("nan")
    if power is not None:
        c = _fit_power(c, start, power, ~power.held_out())
        watts = np.asarray(physics.power_w(c, *power.work.as_tuple(), _clocks(power)))
        power_mape = mape(watts[power.held_out()], power.column("power_w")[power.held_out()])
    latency_mape = mape(
        predict_s(c, table, _clocks(table))[held_out], table.column("latency_s")[held_out]
    )
    record = {
        "profile": path.name,
        "profile_sha256": sha256(path),
        "split": "rows sorted by work and clock, three of every ten held out",
        "train_points": int((~held_out).sum()),
        "held_out_points": int(held_out.sum()),
        "held_out_mape": rounded(latency_mape, 4),
        "power_held_out_mape": rounded(power_mape, 4) if power is not None else "no power measured",
    }
    if table.shard:
        record["scope"] = (
            f"one shard on one GPU; all-reduce, its energy and host time are those of {model.name}"
        )
    kept = _kept_of(whole) if table.shard else {}
    moved = {
        n for n in Coefficients._fields if n not in kept and getattr(c, n) != getattr(start, n)
    }
    content = _content(c._replace(**kept), moved, table, begin, path, name, record)
    members = _bootstrap(c, start, table, power, moved, model)
    return UserFit(content, members, latency_mape, power_mape, begin.descriptions)


def _kept_of(whole: Coefficients) -> dict[str, float]:
    """What a table of shards cannot tell, as the start model has it."""
    return {n: getattr(whole, n) for n in (*ONE_GPU_LACKS, "e_link_j")}


def _content(
    c: Coefficients,
    moved: set[str],
    table: ProfileTable,
    begin: StartModel,
    path: Path,
    name: str,
    record: dict[str, object],
) -> ModelFile:
    clocks, model = table.column("freq_mhz"), begin.model
    return ModelFile(
        name=name,
        phase=table.phase,
        dtype=table.dtype,
        tp=table.tp,
        ep=table.ep,
        gpu=begin.gpu,
        llm=begin.llm,
        coefficients={
            n: _coefficient(n, v, model, moved, path)
            for n, v in zip(Coefficients._fields, c, strict=True)
        },
        box=domain_of(table, float(clocks.min()), float(clocks.max())),
        delay_s=model.content.delay_s,
        fit=record,
    )


def _bootstrap(
    c: Coefficients,
    start: Coefficients,
    table: ProfileTable,
    power: ProfileTable | None,
    moved: set[str],
    model: IterationModel,
) -> pd.DataFrame:
    """Refit on resampled rows, from the fitted coefficients on.

    Voltage curve and energies from resampled power rows.
    """
    rng = np.random.default_rng(0)
    rows = []
    for k in range(BOOTSTRAPS):
        pick = np.sort(rng.integers(0, len(table.rows), len(table.rows)))
        member = _fit_latency(c, table, pick)
        if power is not None:
            member = _fit_power(
                member, start, power, np.sort(rng.integers(0, len(power.rows), len(power.rows)))
            )
        delay = model.delay_s(k % model.n_members) if model.n_members else model.content.delay_s
        rows.append(
            {"delay_s": delay} | {n: getattr(member, n) for n in Coefficients._fields if n in moved}
        )
    return pd.DataFrame(rows)


def fit_user(
    profile: Path,
    power: Path | None = None,
    base: str = DEFAULT_NAME,
    name: str = "",
    gpu: str | None = None,
    llm: str | None = None,
) -> list[UserFit]:
    """Fit every configuration of a user's profile table.

    Args:
        profile: table with ``latency_s`` and ``freq_mhz`` (see `fit_tables.read_profile`), perhaps
            with ``power_w``.
        power: a second table with ``power_w`` and ``freq_mhz``; its latency is optional.
        base: model family in which the fit starts and which supplies what was not measured.
        name: name of the new family; by default the stem of the profile file.
        gpu: GPU that the table was measured on, name or YAML file; None: that of the base.
        llm: LLM that ran, name or YAML file; None: that of the base.

    Raises:
        BiscaleError: a bad table, a missing column, or too few rows.
    """
    power_tables = read_profile(power) if power else []
    fits = []
    for table in read_profile(profile):
        what = stem(table.phase, table.dtype, table.tp, table.ep)
        for column in ("latency_s", "freq_mhz"):
            _need(table, column, profile)
        if len(table.rows) < MIN_ROWS:
            raise BiscaleError(
                f"{profile}: {what} has {len(table.rows)} rows; a fit needs at least {MIN_ROWS}"
            )
        joined = _join_power(table, power_tables)
        if joined is not None:
            if joined.shard != table.shard:
                raise BiscaleError(
                    f"{profile} and {power} must both hold whole iterations or both hold shards "
                    f"of {what}"
                )
            for column in ("power_w", "freq_mhz"):
                _need(joined, column, power or profile)
        begin = start_model(table, base, gpu, llm)
        fits.append(fit_table(table, joined, begin, profile, name or profile.stem))
    return fits
