"""How an LLM is spread over the GPUs of an instance, and whether it can be."""

from dataclasses import dataclass

from biscale_env.config.hardware import Dtype, Gpu, Llm
from biscale_env.core.errors import BiscaleError
from biscale_env.models.build.grid import decode_points


@dataclass(frozen=True)
class Partition:
    """Number format and GPUs of one instance.

    Attributes:
        dtype: ``bf16``, ``fp8`` or ``mxfp4``.
        tp: GPUs (tensor parallel degree).
        ep: groups that the experts are spread over: 1, or ``tp`` as vLLM's expert parallelism,
            where attention stays tensor parallel over the same GPUs.
    """

    dtype: Dtype
    tp: int
    ep: int = 1

    @property
    def label(self) -> str:
        """For messages."""
        return f"TP {self.tp}" + (f", EP {self.ep}" if self.ep > 1 else "")


def check_partition(llm: Llm, gpu: Gpu, part: Partition) -> None:
    """Check that an LLM can be spread like this and that it fits.

    Raises:
        BiscaleError: heads or experts that do not divide, a number format that the LLM or the GPU
            does not have, weights or KV cache that do not fit.
    """
    _check_division(llm, part)
    if part.dtype == "mxfp4" and not llm.experts:
        raise BiscaleError(f"mxfp4 is a format of experts and {llm.name} has none: use bf16 or fp8")
    if part.dtype == "fp8" and not gpu.has_fp8:
        raise BiscaleError(f"{gpu.name} cannot multiply in fp8: use bf16")
    decode_points(llm.kv_capacity_tokens(gpu, part.tp, part.dtype), llm.max_context)


def _check_division(llm: Llm, part: Partition) -> None:
    if llm.heads % part.tp:
        raise BiscaleError(
            f"TP {part.tp} does not divide the {llm.heads} attention heads of {llm.name}: choose "
            f"{_divisors(llm.heads)}"
        )
    if llm.kv_heads % part.tp and part.tp % llm.kv_heads:
        raise BiscaleError(
            f"TP {part.tp} neither divides the {llm.kv_heads} key-value heads of {llm.name} nor is "
            f"a multiple of them: choose {_divisors(llm.kv_heads)} or a multiple"
        )
    if part.ep == 1:
        return
    if not llm.experts:
        raise BiscaleError(f"{llm.name} has no experts: leave EP at 1")
    if part.tp % part.ep:
        raise BiscaleError(
            f"EP {part.ep} does not divide the {part.tp} GPUs: choose 1 or {part.tp}"
        )
    if llm.experts % part.ep:
        raise BiscaleError(
            f"EP {part.ep} does not divide the {llm.experts} experts of {llm.name}: choose "
            f"{_divisors(llm.experts)}"
        )


def _divisors(n: int) -> str:
    return ", ".join(str(k) for k in range(1, min(n, 64) + 1) if n % k == 0)
