"""Networks in ONNX files as policies: what they may answer, what is refused, one row and many."""

import numpy as np
import pytest
from controllers_cases import context, recorded

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.input_digests import policy_inputs
from biscale_env.policies import phases_of, policy_settings, resolve_policy
from biscale_env.policies.policy_source import split_name

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
DIM = {"prefill": 63, "decode": 21}


def write(path, weights, rows="n", op=None, bias=None):
    """A file that answers ``observation @ weights``, with an operator on top where one is given."""
    helper, kind = onnx.helper, onnx.TensorProto
    last = "linear" if op else "action"
    nodes = [helper.make_node("MatMul", ["observation", "w"], ["product"])]
    nodes.append(helper.make_node("Add", ["product", "b"], [last]))
    if op:
        nodes.append(helper.make_node(op, [last], ["action"], **({"axis": 1, "keepdims": 0})))
    bias = np.zeros(weights.shape[1]) if bias is None else np.asarray(bias)
    made = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("observation", kind.FLOAT, [rows, weights.shape[0]])],
        [helper.make_tensor_value_info("action", kind.INT64 if op else kind.FLOAT, None)],
        [
            onnx.numpy_helper.from_array(weights.astype(np.float32), "w"),
            onnx.numpy_helper.from_array(bias.astype(np.float32), "b"),
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return str(path)


@pytest.mark.parametrize("phase", DIM)
@pytest.mark.parametrize("rows", ["n", 1])
def test_a_clock_is_clipped_and_comes_row_by_row(phase, rows, tmp_path):
    weights = np.random.default_rng(0).normal(size=(DIM[phase], 1))
    path = write(tmp_path / "mine.onnx", weights, rows)
    assert phases_of(path) == (phase,)
    assert policy_settings(path, phase) == []
    policy, seen = resolve_policy(path, context(phase)), recorded(phase, 5)
    found, state = policy.predict(seen, deterministic=True)
    assert state is None
    np.testing.assert_allclose(found, np.clip(seen @ weights, -1, 1), atol=1e-5)
    assert found.dtype == np.float32
    one, _ = policy.predict(seen[2])
    assert one.shape == (1,)
    np.testing.assert_allclose(one, found[2], atol=1e-6)


@pytest.mark.parametrize("op", [None, "ArgMax"])
def test_scores_and_numbers_of_levels_are_clocks(op, tmp_path):
    c = context("decode")
    n = len(c.clocks.levels_mhz)
    weights = np.random.default_rng(1).normal(size=(21, n))
    seen = recorded("decode", 9)
    found, _ = resolve_policy(write(tmp_path / "q.onnx", weights, op=op), c).predict(seen)
    levels = np.asarray(c.clocks.levels_mhz)[np.argmax(seen @ weights, axis=1)]
    np.testing.assert_allclose(c.clocks.to_freq_mhz(found[:, 0]), levels)
    assert len(set(levels)) > 1


@pytest.mark.parametrize(
    ("shape", "op", "bias", "words"),
    [
        ((4, 1), None, None, r"shape \['n', 4\], but observations are float32, \(n, 63\)"),
        ((21, 3), None, None, "answers with 3 values per observation"),
        ((21, 9), "ArgMax", [0] * 8 + [1], "clock level 8, but this GPU has 7"),
        ((63, 1), None, None, "is for prefill, not for decode"),
    ],
)
def test_a_network_that_does_not_fit_is_one_sentence(shape, op, bias, words, tmp_path):
    path = write(tmp_path / "mine.onnx", np.zeros(shape), op=op, bias=bias)
    with pytest.raises(BiscaleError, match=words) as caught:
        resolve_policy(path, context("decode"))
    assert "\n" not in str(caught.value)


def test_files_that_are_none_and_parameters_are_one_sentence(tmp_path):
    path = tmp_path / "mine.onnx"
    with pytest.raises(BiscaleError, match="there is no ONNX file at"):
        phases_of(str(path))
    path.write_bytes(b"no protobuf")
    with pytest.raises(BiscaleError, match="cannot be read as ONNX"):
        phases_of(str(path))
    with pytest.raises(BiscaleError, match="takes no parameters"):
        phases_of(f"{path}:margin=0.1")


def test_its_digest_is_kept_with_the_results(tmp_path):
    one, two = (write(tmp_path / f"{k}.onnx", np.full((21, 1), k)) for k in (0, 1))
    (first,), (second,) = (policy_inputs(p, "decode").values() for p in (one, two))
    assert first != second


def test_its_name_is_cut_like_that_of_other_files():
    assert split_name("a:b/mine.onnx", ()) == ("a:b/mine.onnx", "")
    assert split_name("runs/mine.onnx:margin=0.1", ()) == ("runs/mine.onnx", "margin=0.1")
