"""The instance that engines are taken for unless something else is said."""

from biscale_env.config import InstanceSpec

ENGINE_MAX_SEQS = 256  # requests per batch: vLLM's default
ENGINE_INSTANCE = InstanceSpec(max_seqs=ENGINE_MAX_SEQS)
