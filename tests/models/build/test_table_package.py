"""What the package of kernel tables is handed, and that nothing of it leaks."""

import logging

import numpy as np
import pytest

from biscale_env.config import list_names, load_gpu, load_llm
from biscale_env.core.errors import BiscaleError
from biscale_env.models.build.grid import WorkPoint
from biscale_env.models.build.hf_config import llm_of
from biscale_env.models.build.partition import Partition
from biscale_env.models.build.table_package import (
    SYSTEMS,
    first_engine,
    hub_config,
    quiet,
    tables_installed,
)

needs_tables = pytest.mark.skipif(not tables_installed(), reason="extra `tables` not installed")
UNTOLD = {"name", "sources", "dtype", "parameters", "window_tokens", "window_layers"}
MLA = {"qk_nope_head_dim": 128, "q_lora_rank": 1536, "n_shared_experts": 1}


@pytest.mark.parametrize("name", list_names("llms"))
def test_the_configuration_that_is_written_reads_back_as_the_same_shape(name):
    llm = load_llm(name)
    written = hub_config(llm) | (MLA if llm.kv_lora_rank else {})
    back = llm_of(written, name, "written")
    assert back.model_dump(exclude=UNTOLD) == llm.model_dump(exclude=UNTOLD)
    assert back.parameters == pytest.approx(llm.parameters, rel=0.01)


def test_every_described_gpu_has_tables():
    assert set(SYSTEMS) == set(list_names("gpus"))


def test_logging_is_as_before_even_after_a_mistake(caplog):
    def noisy():
        with quiet():
            logging.getLogger("anybody").critical("noise")
            raise ValueError("inside")

    before = logging.root.manager.disable
    with pytest.raises(ValueError, match="inside"):
        noisy()
    assert logging.root.manager.disable == before
    assert not caplog.records
    logging.getLogger("anybody").critical("heard")
    assert [r.message for r in caplog.records] == ["heard"]


@needs_tables
def test_layers_are_shared_by_full_and_windowed_attention():
    """A window longer than any context changes nothing; halving it saves time."""
    llm = load_llm("gemma-3-12b")
    gpu, part, point = load_gpu("h100-sxm"), Partition("bf16", 1), WorkPoint(16, 0, 0, 8192)

    def attention_ms(model):
        with quiet():
            return sum(
                ms
                for name, ms, *_ in first_engine(model, gpu, part).times(point)
                if name.endswith("attention")
            )

    mixed = attention_ms(llm)
    few = attention_ms(llm.model_copy(update={"window_layers": 8}))
    many = attention_ms(llm.model_copy(update={"window_layers": 47}))
    assert many < mixed < few
    slope = (few - mixed) / 32
    assert (mixed - many) / 7 == pytest.approx(slope, rel=1e-6)  # linear in layers
    assert mixed == pytest.approx(few - 32 * slope)


@needs_tables
def test_kernels_share_the_work_of_more_gpus():
    llm, gpu = load_llm("llama-3.3-70b"), load_gpu("h200-sxm")
    point = WorkPoint(1, 8192, 0, 0)
    with quiet():
        found = {
            tp: {n: ms for n, ms, *_ in first_engine(llm, gpu, Partition("bf16", tp)).times(point)}
            for tp in (2, 4, 8)
        }
    gemm = np.array([sum(v for k, v in f.items() if k.endswith("gemm")) for f in found.values()])
    assert np.allclose(gemm[0] / gemm, [1, 2, 4], rtol=0.1)
    assert all(f["context_ar_1"] > 0 for f in found.values())


@needs_tables
def test_the_reason_of_the_preferred_engine_is_told():
    odd = load_llm("qwen3-8b").model_copy(update={"head_dim": 40})
    with quiet(), pytest.raises(BiscaleError, match=r"\(vllm: .*\): build it with --roofline"):
        first_engine(odd, load_gpu("a100-sxm"), Partition("bf16", 1))
