"""Hugging Face configurations: published totals, what is left unsaid, and what cannot be read."""

import json

import pytest

from biscale_env.config import list_names, load_llm
from biscale_env.core.errors import BiscaleError
from biscale_env.models.build.hf_config import FAMILIES, llm_of, read_hub_config
from biscale_env.models.build.llm_names import find_llm, short_name

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
GEMMA_12B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "sliding_window": 1024,
    },
}
# billions: total, active; as published
PUBLISHED = {
    "llama-3.1-8b": (8.03, 8.03),
    "llama-3.3-70b": (70.55, 70.55),
    "llama-3.1-405b": (405.9, 405.9),
    "qwen3-8b": (8.2, 8.2),
    "qwen3-14b": (14.8, 14.8),
    "qwen3-32b": (32.8, 32.8),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235.0, 22.0),
    "gpt-oss-20b": (20.9, 3.6),
    "gpt-oss-120b": (116.8, 5.1),
    "gemma-3-12b": (11.77, 11.77),
    "mixtral-8x7b": (46.7, 12.9),
    "deepseek-v3": (671.0, 37.0),
}


def changed(**keys):
    return {**LLAMA_8B, **keys}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_llms_have_their_published_parameters(name):
    llm = load_llm(name)
    total, active = PUBLISHED[name]
    assert llm.parameters / 1e9 == pytest.approx(total, rel=0.01)
    own = llm.active_parameters
    if name.startswith("gpt-oss"):  # its card leaves out the embedding table
        own -= llm.vocabulary * llm.hidden
    assert own / 1e9 == pytest.approx(active, rel=0.02)


def test_every_shipped_llm_is_checked_against_a_published_total():
    assert set(list_names("llms")) == set(PUBLISHED)


def test_a_config_json_becomes_the_shipped_description():
    made, shipped = llm_of(LLAMA_8B, "llama-3.1-8b", "here"), load_llm("llama-3.1-8b")
    assert made.parameters == pytest.approx(shipped.parameters, rel=1e-3)
    exclude = {"parameters", "sources"}
    assert made.model_dump(exclude=exclude) == shipped.model_dump(exclude=exclude)


def test_a_language_model_inside_another_configuration():
    made, shipped = llm_of(GEMMA_12B, "gemma-3-12b", "here"), load_llm("gemma-3-12b")
    assert (made.window_tokens, made.window_layers) == (1024, 40)
    assert made.tied_embeddings
    assert made.parameters == pytest.approx(shipped.parameters, rel=1e-3)
    assert made.kv_bytes_per_token("bf16") == shipped.kv_bytes_per_token("bf16")


@pytest.mark.parametrize(
    ("keys", "window", "layers"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, 4096, 32),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, 0, 0),
        ({"architectures": ["Gemma2ForCausalLM"], "sliding_window": 4096}, 4096, 16),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096}, 0, 0),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 4096,
                "use_sliding_window": True,
                "max_window_layers": 28,
            },
            4096,
            4,
        ),
        (
            {
                "architectures": ["Gemma3ForCausalLM"],
                "sliding_window": 512,
                "layer_types": ["sliding_attention"] * 20 + ["full_attention"] * 12,
            },
            512,
            20,
        ),
        ({"sliding_window": 4096}, 0, 0),  # Llama knows no window
    ],
)
def test_windows_by_architecture(keys, window, layers):
    llm = llm_of(changed(**keys), "x", "here")
    assert (llm.window_tokens, llm.window_layers) == (window, layers)


def test_dense_layers_among_experts():
    moe = changed(
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=1024,
    )
    every = llm_of(moe, "x", "here")
    second = llm_of({**moe, "decoder_sparse_step": 2}, "x", "here")
    assert (every.dense_layers, every.intermediate) == (0, 0)
    assert (second.dense_layers, second.intermediate) == (16, 14336)
    expert_layer = 16 * (3 * 4096 * 1024 + 4096)
    dense_layer = 3 * 4096 * 14336
    assert second.parameters - every.parameters == 16 * (dense_layer - expert_layer)


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
        ),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_number_format_of_a_checkpoint(quantization, dtype):
    assert llm_of(changed(quantization_config=quantization), "x", "here").dtype == dtype


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            changed(architectures=["MambaForCausalLM"]),
            "architecture 'MambaForCausalLM' is not known",
        ),
        (changed(architectures=[]), "architecture 'none' is not known"),
        ({k: v for k, v in LLAMA_8B.items() if k != "hidden_size"}, "key 'hidden_size' is missing"),
        (changed(num_hidden_layers="many"), "num_hidden_layers must be a whole number"),
        (changed(num_hidden_layers=-1), "num_hidden_layers must be a whole number"),
        (changed(quantization_config={"quant_method": "awq"}), "weights in 'awq' are not modelled"),
        (changed(architectures=["MixtralForCausalLM"]), "key 'num_experts' is missing"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(data, message):
    with pytest.raises(BiscaleError) as error:
        llm_of(data, "x", "here.json")
    assert message in str(error.value)
    assert "here.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_a_folder_and_their_mistakes(tmp_path):
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    assert read_hub_config(folder).name == "my-model"
    assert read_hub_config(folder / "config.json") == read_hub_config(folder)
    assert find_llm(str(folder)) == read_hub_config(folder)
    for text, message in (("{", "not JSON"), ("[1]", "must hold an object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(BiscaleError, match=message):
            read_hub_config(folder)
    with pytest.raises(BiscaleError, match="cannot read"):
        read_hub_config(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("hub_name", "short"),
    [
        ("Qwen/Qwen3-14B", "qwen3-14b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-32B-FP8", "qwen3-32b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b"),
        ("google/gemma-3-12b-it", "gemma-3-12b"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
    ],
)
def test_names_of_the_hub(hub_name, short):
    assert short_name(hub_name) == short
    assert find_llm(hub_name) == load_llm(short)


def test_an_unknown_name_is_told_what_is_known():
    with pytest.raises(BiscaleError, match=r"config\.json.*nearest name is 'qwen3-14b'"):
        find_llm("Qwen/Qwen9-14B")


def test_every_architecture_that_is_listed_can_be_read():
    for name, family in FAMILIES.items():
        data = changed(architectures=[name], num_experts=8, num_experts_per_tok=2)
        llm = llm_of(
            {"architectures": [name], family.nested: data} if family.nested else data, "x", "y"
        )
        assert bool(llm.experts) == family.experts
        assert llm.tied_embeddings == family.tied
