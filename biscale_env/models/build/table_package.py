"""The package of kernel tables (`aiconfigurator-core`, optional extra): an LLM looked up in it.

The LLM is handed over as a Hugging Face configuration written from its geometry; sliding windows,
which the package knows for few architectures, are put in as attention kernels of their own.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from biscale_env.config.hardware import Gpu, Llm
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.models.build.grid import WorkPoint
from biscale_env.models.build.partition import Partition

PACKAGE: Final = "aiconfigurator_core"
SYSTEMS: Final = {
    "a100-sxm": "a100_sxm",
    "b200-sxm": "b200_sxm",
    "b300-sxm": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "h100-sxm": "h100_sxm",
    "h200-sxm": "h200_sxm",
    "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
"""GPU description to the package's name of the same GPU."""
ENGINES: Final = ("vllm", "trtllm", "sglang")  # in order of preference
# number format to the package's names: GEMMs, experts (first that has tables), KV cache
FORMATS: Final = {
    "bf16": ("bfloat16", ("bfloat16",), "bfloat16"),
    "fp8": ("fp8", ("fp8", "fp8_block"), "fp8"),
    "mxfp4": ("bfloat16", ("w4a16_mxfp4",), "bfloat16"),
}


def tables_installed() -> bool:
    """Whether the optional extra is there."""
    return find_spec(PACKAGE) is not None


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing that the package logs reaches the user: what matters is raised or in the table."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def hub_config(llm: Llm) -> dict[str, Any]:
    """Hugging Face configuration of an LLM, in the terms that the package reads."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": llm.hidden,
        "intermediate_size": llm.intermediate or llm.expert_intermediate,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.kv_heads,
        "head_dim": llm.head_dim,
        "vocab_size": llm.vocabulary,
        "max_position_embeddings": llm.max_context,
        "tie_word_embeddings": llm.tied_embeddings,
    }
    if llm.experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": llm.experts,
            "num_experts_per_tok": llm.experts_per_token,
            "moe_intermediate_size": llm.expert_intermediate,
        }
    if llm.kv_lora_rank:
        config |= {
            "architectures": ["DeepseekV3ForCausalLM"],
            "kv_lora_rank": llm.kv_lora_rank,
            "qk_rope_head_dim": llm.qk_rope_head_dim,
            "v_head_dim": llm.head_dim,
            "n_routed_experts": llm.experts,
            "first_k_dense_replace": llm.dense_layers,
        }
    return config


@dataclass(frozen=True)
class _Way:
    """One way to look an LLM up.

    Attributes:
        experts: the package's name of the experts' number format.
        halves: kernels that a full attention layer beside windowed ones counts as.
    """

    experts: str
    halves: int = 1


def _ways(llm: Llm, part: Partition) -> list[_Way]:
    """What to try, best first."""
    kv_heads = -(-llm.kv_heads // part.tp)
    halves = [h for h in (1, 2, 4) if h == 1 or (llm.window_layers and kv_heads % h == 0)]
    return [_Way(experts, h) for h in halves for experts in FORMATS[part.dtype][1]]


@dataclass(frozen=True)
class TableEngine:
    """A compiled LLM of the package on one GPU."""

    handle: Any
    kernels: dict[str, int]  # phase: how many kernels it lists
    name: str

    def times(self, point: WorkPoint) -> list[tuple[str, float, float, str]]:
        """(kernel, ms, energy, source) of one iteration."""
        if point.context:
            return list(
                self.handle.evaluate_generation_ops(
                    list(range(self.kernels["decode"])), batch_size=point.batch, s=point.context
                )
            )
        return list(
            self.handle.evaluate_context_ops(
                list(range(self.kernels["prefill"])),
                batch_size=point.batch,
                s=point.new_tokens,
                prefix=point.prefix,
            )
        )


def _windowed(model: Any, llm: Llm, tp: int, halves: int) -> None:
    """Replace the attention kernels by those of full and of windowed layers.

    Where the tables lack so many heads, a full layer counts as ``halves`` kernels of fewer.
    """
    kernels = import_module(f"{PACKAGE}.sdk.operations")
    kv, compute = model.config.kvcache_quant_mode, model.config.fmha_quant_mode
    for phase, ops in (("context", model.context_ops), ("generation", model.generation_ops)):
        name = f"{phase}_attention"
        ops[:] = [op for op in ops if op._name != name]
        for layers, window, cut in (
            (llm.layers - llm.window_layers, 0, halves),
            (llm.window_layers, llm.window_tokens, 1),
        ):
            heads = (llm.heads // tp // cut, -(-llm.kv_heads // tp) // cut)
            shape = {"window_size": window, "head_size": llm.head_dim}
            if layers and phase == "context":
                kernel = kernels.ContextAttention(name, layers * cut, *heads, kv, compute, **shape)
                ops.append(kernel)
            elif layers:
                ops.append(kernels.GenerationAttention(name, layers * cut, *heads, kv, **shape))


def _compiled(llm: Llm, system: str, engine: str, part: Partition, way: _Way) -> TableEngine:
    """The LLM on the package's engine; raises whatever the package raises."""
    core, sdk = import_module(PACKAGE), import_module(f"{PACKAGE}.sdk.engine")
    models = import_module(f"{PACKAGE}.sdk.models")
    builders = import_module(f"{PACKAGE}.sdk.config_builders")
    database = import_module(f"{PACKAGE}.sdk.perf_database").get_database(system, engine, "current")
    if database is None:
        raise ValueError(f"no tables of {engine}")
    gemm, _, kv = FORMATS[part.dtype]
    config = builders.build_model_config(
        tp_size=part.tp,
        pp_size=1,
        attention_dp_size=1,
        moe_tp_size=part.tp // part.ep,
        moe_ep_size=part.ep,
        gemm_quant_mode=gemm,
        moe_quant_mode=way.experts,
        kvcache_quant_mode=kv,
        fmha_quant_mode="bfloat16",
    )
    with tempfile.TemporaryDirectory() as folder:
        write_whole(Path(folder, "config.json"), json.dumps(hub_config(llm)))
        builders.apply_nextn(config, 0)
        model = models.get_model(folder, config, engine)
        if llm.window_layers and not llm.kv_lora_rank:
            _windowed(model, llm, part.tp, way.halves)
        spec = sdk.build_engine_spec_json(
            model, model_path=folder, system=system, backend=engine,
            backend_version=database.version, kv_block_size=None, systems_path=None, nextn=0,
            database=database,
        )  # fmt: skip
        handle = sdk.EngineHandle(bytes(core.engine_spec_bincode_from_json(spec)))
    kernels = {"prefill": len(model.context_ops), "decode": len(model.generation_ops)}
    name = f"{engine} {database.version}"
    if way.halves > 1:
        name += f", full attention as {way.halves} kernels with fewer heads each"
    return TableEngine(handle, kernels, name)


def first_engine(llm: Llm, gpu: Gpu, part: Partition) -> TableEngine:
    """The first engine and expert format that have tables for this LLM.

    Raises:
        BiscaleError: none has.
    """
    reasons = []
    for engine in ENGINES:
        for way in _ways(llm, part):
            try:
                found = _compiled(llm, SYSTEMS[gpu.name], engine, part, way)
                for probe in (WorkPoint(1, 1024, 0, 0), WorkPoint(8, 0, 0, 1024)):
                    found.times(probe)
            except Exception as error:  # the package raises many kinds: no table is one of them
                reasons.append(f"{engine}: {str(error).splitlines()[0][:120]}")
            else:
                return found
    raise BiscaleError(
        f"the kernel tables have nothing for {llm.name} in {part.dtype} at {part.label} on "
        f"{gpu.name} ({reasons[0]}): build it with --roofline"
    )
