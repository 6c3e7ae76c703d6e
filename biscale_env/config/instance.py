"""`InstanceSpec`: what one instance of an engine is, said once.

GPU, LLM, fitted model, tensor parallelism, number format, engine limits and SLO. Everything that
simulates, controls, emulates or measures an instance takes this object; child processes get it as a
YAML file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self

import yaml
from pydantic import AfterValidator, Field, model_validator

from biscale_env.config.hardware import Dtype, load_llm
from biscale_env.config.loader import Config, configs_dir, load_yaml, validate
from biscale_env.core.files import write_whole

# Assumed: the middle of the 10 to 100 ms that a clock change takes on Hopper (arXiv 2502.20075), as
# the nominal actuation delay. How long a driver takes from a parked clock is not published.
PARKED_RAMP_S: Final = 0.05
DEFAULT_GPU: Final = "h100-sxm"
DEFAULT_LLM: Final = "llama-3.3-70b"
DEFAULT_MODEL: Final = f"{DEFAULT_GPU}/{DEFAULT_LLM}"
# Models that are moved to a pair of GPU and LLM that has none: the first with the TP and dtype.
TO_MOVE: Final = (DEFAULT_MODEL, f"{DEFAULT_GPU}/qwen3-32b")
MAX_SEQS_LIMIT: Final = 4096  # requests of a batch that the simulator has room for
IdleRule = Literal["last-clock", "parked"]


def _known_cache(text: str) -> str:
    kind, colon, tokens = text.partition(":")
    sized = kind == "lru" and tokens.isascii() and tokens.isdigit() and int(tokens) > 0
    if text not in ("off", "lru", "infinite") and not (colon and sized):
        raise ValueError("a prefix cache is off, lru, lru:<tokens> or infinite")
    return text


PrefixCacheRule = Annotated[str, AfterValidator(_known_cache)]
_FILES: Final = {"gpu": "gpus", "llm": "llms", "model": "models", "slo": "slos"}


class InstanceSpec(Config):
    """One instance: hardware, weights, engine limits and the SLO it is held to.

    ``gpu`` and ``llm`` choose the fitted model, ``<gpu>/<llm>``, where it is shipped. Where it is
    not, or ``model`` names another one, all that is physical follows GPU and LLM: KV capacity,
    power cap, clock range, grid and levels, counted work; see :mod:`biscale_env.models.transfer`
    for what is kept of the fit.

    Attributes:
        gpu: name of a GPU description (``configs/gpus``) or a YAML file; None: the model's.
        llm: name of an LLM description (``configs/llms``) or a YAML file; None: the model's.
        model: name of a fitted model (``configs/models``, e.g. ``h100-sxm/llama-3.3-70b``), a
            folder of coefficient files, or one; None: the one of ``gpu`` and ``llm``.
        tp: GPUs of the instance (tensor parallel degree).
        ep: groups that the experts of a mixture of experts are spread over (vLLM's expert parallel:
            1 or ``tp``).
        dtype: ``bf16``, ``fp8`` or ``mxfp4``; not given: the one that the LLM is published in.
        token_budget: new tokens per prefill batch; 2048 is vLLM's long-time default for chunked
            prefill.
        max_seqs: requests per batch. Assumed: 512, the edge of the fitted domain; the KV cache, not
            this cap, then limits a decode batch.
        kv_watermark: fraction of KV kept free on admission; 0.01 as in vLLM.
        slo: name of an SLO (``configs/slos``) or a YAML file.
        idle: what the instance draws while nothing runs. ``last-clock``: the idle power at the
            clock it has. ``parked``: ``parked_power_w`` whatever the clock, as where the driver
            (``CUDA_DISABLE_PERF_BOOST``, from driver 580 on) or a parking policy lowers it; the
            first ``parked_ramp_s`` of work after a wait then run at the GPU's lowest clock.
        parked_power_w: power of one GPU while parked, W; None: the fitted model's idle power at the
            lowest clock.
        parked_ramp_s: how long work runs at the lowest clock after a wait, s.
        prefix_cache: prefix cache of a prefill instance. ``off``: every prompt is computed whole.
            ``lru``: its KV room keeps the blocks that were used last, ``lru:100000`` so many
            tokens of them; ``infinite``: nothing is ever given up. Without meaning for traces that
            do not say what their prompts share.
    """

    gpu: str | None = None
    llm: str | None = None
    model: str | None = None
    tp: int = Field(default=4, gt=0)
    ep: int = Field(default=1, gt=0)
    dtype: Dtype = "bf16"
    token_budget: int = Field(default=2048, gt=0)
    max_seqs: int = Field(default=512, gt=0, le=MAX_SEQS_LIMIT)
    kv_watermark: float = Field(default=0.01, ge=0, lt=1)
    slo: str = "biscale"
    idle: IdleRule = "last-clock"
    parked_power_w: float | None = Field(default=None, ge=0)
    parked_ramp_s: float = Field(default=PARKED_RAMP_S, ge=0)
    prefix_cache: PrefixCacheRule = "lru"

    def prefix_cache_tokens(self, kv_capacity_tokens: int) -> int | None:
        """Room of the prefix cache, tokens; 0: there is none, None: it gives nothing up.

        Args:
            kv_capacity_tokens: KV room of the instance, which a cache cannot exceed.
        """
        kind, _, tokens = self.prefix_cache.partition(":")
        if kind == "infinite":
            return None
        if kind == "off":
            return 0
        return min(int(tokens), kv_capacity_tokens) if tokens else kv_capacity_tokens

    @model_validator(mode="before")
    @classmethod
    def _fill_in_dtype(cls, data: Any) -> Any:
        return with_published_dtype(data)

    @property
    def family(self) -> str:
        """The fitted model: ``model``, else ``<gpu>/<llm>`` if shipped, else one to be moved."""
        if self.model is not None:
            return self.model
        wanted = f"{self.gpu or DEFAULT_GPU}/{self.llm or DEFAULT_LLM}"
        if _is_shipped("model", wanted):
            return wanted
        shipped = configs_dir() / _FILES["model"]
        file = f"decode-{self.dtype}-tp{self.tp}.yaml"
        found = (name for name in TO_MOVE if (shipped / name / file).is_file())
        return next(found, DEFAULT_MODEL)

    @classmethod
    def of(cls, **values: Any) -> "InstanceSpec":
        """An instance with some values given; mistakes raise BiscaleError naming the key."""
        return validate(values, cls, "instance")

    def changed(self, **values: Any) -> "InstanceSpec":
        """A copy with some values changed, validated anew.

        With another LLM the number format is the one that it is published in, unless this one's was
        chosen to be another than the published one.
        """
        data = self.model_dump(exclude_unset=True)
        if self.takes_format_of(values):
            data.pop("dtype", None)
        return self.of(**{**data, **values})

    def takes_format_of(self, values: Mapping[str, Any]) -> bool:
        """Whether changed values bring an LLM whose published number format comes with it."""
        if values.get("llm") in (None, self.llm) or values.get("dtype") is not None:
            return False
        return self.dtype == load_llm(self.llm or DEFAULT_LLM).dtype

    def to_yaml(self, path: str | Path) -> Path:
        """Write the description to a YAML file, for a child process or for later.

        Files that it names are written as absolute paths, so that it can be read from anywhere.

        Raises:
            OSError: the file cannot be written.
        """
        data = self.model_dump(mode="json")
        data |= {key: _absolute(kind, data[key], Path()) for key, kind in _FILES.items()}
        write_whole(path, yaml.safe_dump(data, sort_keys=False))
        return Path(path)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "InstanceSpec":
        """Read a description; files that it names may lie beside it.

        Raises:
            BiscaleError: not readable, not YAML, an unknown key or an impossible value.
        """
        spec = load_yaml(Path(path), cls)
        folder = Path(path).resolve().parent
        found = {key: _absolute(kind, getattr(spec, key), folder) for key, kind in _FILES.items()}
        return spec.changed(**found)


def with_published_dtype(data: Any) -> Any:
    """Where keys name an LLM and no number format: with the one that it is published in."""
    named = isinstance(data, dict) and isinstance(data.get("llm"), str)
    if not named or data.get("dtype") is not None:
        return data
    name = data["llm"]
    known = _is_shipped("llm", name) or Path(name).is_file()
    return {**data, "dtype": load_llm(name).dtype} if known else data


def _is_shipped(key: str, name: str) -> bool:
    """Whether a name is that of a shipped description or model, not a path."""
    shipped = configs_dir() / _FILES[key]
    return (shipped / name).is_dir() or (shipped / f"{name}.yaml").is_file()


def _absolute(kind: str, name: str | None, folder: Path) -> str | None:
    """Absolute path of a file or folder that ``name`` means relative to ``folder``, else itself."""
    shipped = configs_dir() / kind
    if name is None or (shipped / name).is_dir() or (shipped / f"{name}.yaml").is_file():
        return name
    path = folder / name
    return str(path.resolve()) if path.exists() else name


class WithInstance(Config):
    """A configuration of something that happens on one instance.

    The keys of :class:`InstanceSpec` may stand beside its own: ``tp: 8`` is ``instance: {tp: 8}``.

    Attributes:
        instance: GPU, LLM, fitted model, TP, dtype, engine limits and SLO.
    """

    FLAT: ClassVar[tuple[str, ...]] = ("instance",)

    instance: InstanceSpec = InstanceSpec()

    @model_validator(mode="before")
    @classmethod
    def _gather_instance(cls, data: Any) -> Any:
        return _gathered(data) if isinstance(data, dict) else data

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some values changed; keys of the instance may be among them.

        As pydantic's own it trusts the values; :meth:`changed` validates them.
        """
        if flat := {k: v for k, v in (update or {}).items() if k in InstanceSpec.model_fields}:
            rest = {k: v for k, v in (update or {}).items() if k not in flat}
            instance = rest.get("instance", self.instance).model_copy(update=flat)
            update = {**rest, "instance": instance}
        return super().model_copy(update=update, deep=deep)

    def changed(self, **values: Any) -> Self:
        """A copy with some values changed, validated anew.

        Raises:
            BiscaleError: an unknown key or an impossible value.
        """
        data = self.model_dump()
        if self.instance.takes_format_of(values):
            del data["instance"]["dtype"]
        return validate({**data, **values}, type(self), type(self).__name__)

    @property
    def tp(self) -> int:
        """GPUs of the instance."""
        return self.instance.tp

    @property
    def dtype(self) -> Dtype:
        """``bf16`` or ``fp8``."""
        return self.instance.dtype

    @property
    def slo(self) -> str:
        """Name of the SLO, or its YAML file."""
        return self.instance.slo

    @property
    def idle(self) -> IdleRule:
        """What an idle instance draws: ``last-clock`` or ``parked``."""
        return self.instance.idle

    @property
    def token_budget(self) -> int:
        """New tokens per prefill batch."""
        return self.instance.token_budget

    @property
    def max_seqs(self) -> int:
        """Requests per batch."""
        return self.instance.max_seqs


def _gathered(data: dict[str, Any]) -> dict[str, Any]:
    """The same data with the keys of an instance moved into it; they win over those inside."""
    flat = {key: value for key, value in data.items() if key in InstanceSpec.model_fields}
    if not flat:
        return data
    given = data.get("instance", {})
    base = given.model_dump() if isinstance(given, InstanceSpec) else given
    rest = {key: value for key, value in data.items() if key not in flat}
    return {**rest, "instance": {**base, **flat} if isinstance(base, dict) else base}
