"""Kinds of ONNX nodes: Grams of what they get, and codes that compute what the dequantized weights do."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from requirements import require

import comq_np

require("onnx")

import onnx  # noqa: E402
from onnx import TensorProto  # noqa: E402
from onnx_models import CASES, FORMS, WORDS, Case, assert_same, expected, initializers, run, solved  # noqa: E402

import comq_onnx  # noqa: E402

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
BIASED = {name: case for name, case in CASES.items() if case.bias}


# Grams.


@cases
def test_grams_give_the_outputs_of_the_node(tmp_path, case):
    model, x = case.model()
    comq_onnx.capture(model, [x, x[::-1]], tmp_path / "c.h5")
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        layer = file["fc"]
    weights = initializers(model)
    np.testing.assert_array_equal(layer.weight, case.matrix(weights["fc.weight"]))
    alpha = case.attributes.get("alpha", 1)
    if case.bias:
        bias = weights["fc.bias"].reshape(layer.bias.shape)
        np.testing.assert_allclose(layer.bias, bias * case.attributes.get("beta", 1) / alpha, rtol=1e-6)
    model, _ = case.model(bias=np.zeros(case.columns, np.float32))
    axis = -1 if case.op in ("MatMul", "Gemm", "Gather") else 1
    y = np.moveaxis(np.concatenate([run(model, x), run(model, x[::-1])]), axis, -1).reshape(-1, case.columns) / alpha
    y = y.astype(np.float64).reshape(len(y), case.groups, -1).swapaxes(0, 1)
    assert layer.gram.count == y.shape[1]
    if case.op == "Gather":
        W = layer.weight.astype(np.float64)
        np.testing.assert_allclose(layer.gram.counts @ W**2, (y[0] ** 2).sum(0), rtol=1e-5)
        return
    W = layer.weight.astype(np.float64).reshape(case.groups, *layer.weight.shape[-2:])
    G, mean = (
        array.reshape(case.groups, *array.shape[-d:]) for array, d in ((layer.gram.matrix, 2), (layer.gram.mean, 1))
    )
    np.testing.assert_allclose(W.swapaxes(1, 2) @ G @ W, y.swapaxes(1, 2) @ y, rtol=1e-4, atol=1e-4 * (y**2).sum())
    np.testing.assert_allclose(mean[:, None] @ W, y.mean(1, keepdims=True), rtol=1e-4, atol=1e-5)


# The way back.


@cases
@pytest.mark.parametrize(("bits", "options"), [(4, {}), (2, {}), (8, {"symmetric": True}), (3, {"group_size": 4})])
def test_outputs_are_those_of_the_dequantized_weights(tmp_path, case, bits, options):
    q = solved(case, tmp_path / "q.h5", bits, **options)
    model, x = case.model()
    before = model.SerializeToString()
    for form in FORMS if case.op in ("MatMul", "Gemm") else FORMS[:1]:
        made = comq_onnx.apply(model, tmp_path / "q.h5", tmp_path / "new.onnx", format=form)
        assert model.SerializeToString() == before
        assert_same(run(made, x), expected(case, q))
        onnx.checker.check_model(tmp_path / "new.onnx", full_check=True)
        assert (tmp_path / "new.onnx").read_bytes() == made.SerializeToString()
        assert "fc.weight" not in initializers(made)
        floats = [array.size for array in initializers(made).values() if array.dtype == np.float32]
        assert max(floats) < math.prod(case.weight)


@pytest.mark.parametrize("case", BIASED.values(), ids=BIASED.keys())
def test_a_bias_shift_is_added(tmp_path, case):
    model, x = case.model()
    comq_onnx.capture(model, [x], tmp_path / "c.h5")
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", 2, fit_bias=True)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        q = file["fc"]
    assert np.abs(q.bias_shift).max() > 0.01
    for form in FORMS:
        found = run(comq_onnx.apply(model, tmp_path / "q.h5", format=form), x)
        assert_same(found, expected(case, q, q.bias_shift))
    # what the shift is for: the mean of the output stays
    axes = tuple(axis for axis in range(found.ndim) if axis != (1 if case.op.startswith("Conv") else found.ndim - 1))
    np.testing.assert_allclose(found.mean(axes), run(model, x).mean(axes), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"), [("conv2", {}), ("matmul", {"group_size": 2, "symmetric": True}), ("gather", {})]
)
def test_codes_scales_and_zero_points_are_those_of_the_file(tmp_path, name, options):
    q = solved(CASES[name], tmp_path / "q.h5", 4, **options)
    found = initializers(comq_onnx.apply(CASES[name].model()[0], tmp_path / "q.h5"))
    codes, scale, zero_point = (next(array for key, array in found.items() if word in key) for word in WORDS)
    if name == "gather":  # onnxruntime gathers bytes: each holds two codes, of the first and the second half of a row
        codes = np.concatenate([codes & 15, codes >> 4], axis=1)
    else:
        assert codes.dtype == zero_point.dtype == np.dtype("uint4")
    codes, zero_point = codes.astype(int), zero_point.astype(int)
    np.testing.assert_array_equal(scale.reshape(q.scale.shape), q.scale)
    np.testing.assert_array_equal(zero_point.reshape(q.zero_point.shape), q.zero_point)
    np.testing.assert_array_equal(CASES[name].matrix(codes[0] if name == "matmul" else codes), q.codes)


def test_packed_codes_are_those_of_the_file(tmp_path):
    case = Case("MatMul", (64, 3), (2, 64), bias=False)
    q = solved(case, tmp_path / "q.h5", 4, group_size=32)
    model, x = case.model()
    made = comq_onnx.apply(model, tmp_path / "q.h5", format="matmulnbits")
    (node,) = made.graph.node
    assert {one.name: one.i for one in node.attribute} == {"K": 64, "N": 3, "bits": 4, "block_size": 32}
    packed, scale, zero_point = (initializers(made)[name] for name in node.input[1:])
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(3, 64).T
    np.testing.assert_array_equal(codes, q.codes)
    np.testing.assert_array_equal(scale.reshape(3, 2).T, q.scale)
    np.testing.assert_array_equal(np.stack([zero_point & 15, zero_point >> 4]), q.zero_point)
    assert_same(run(made, x), expected(case, q))


@pytest.mark.parametrize(
    ("rows", "size", "block"),
    [(64, None, 64), (96, None, 32), (70, None, 32), (96, 48, 16), (300, 256, 128), (64, 8, 0)],
)
def test_blocks_divide_the_groups(tmp_path, rows, size, block):
    case = Case("Gemm", (rows, 3), (2, rows))
    q = solved(case, tmp_path / "q.h5", 4, group_size=size, recipe="rtn")
    model, x = case.model()
    made = comq_onnx.apply(model, tmp_path / "q.h5", format="matmulnbits")
    found = [one.i for node in made.graph.node for one in node.attribute if one.name == "block_size"]
    assert found[0] == (block or size)
    assert (made.graph.node[-1].op_type == "MatMulNBits") == bool(block)
    assert_same(run(made, x), expected(case, q))


@pytest.mark.parametrize("name", ["matmul", "conv2-groups", "transposed2", "gather", "gather-odd"])
@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(0, 9, "uint4"), (-3, 5, "uint8"), (20, 200, "uint8"), (-300, 300, "uint16"), (-(2**30), 2**30, "int32")],
)
def test_zero_points_beyond_the_codes_are_exact(tmp_path, name, low, high, kind):
    case = CASES[name]
    q = solved(case, tmp_path / "first.h5", 4)
    zero_point = np.random.default_rng(0).integers(low, high, q.zero_point.shape, endpoint=True).astype(np.int32)
    zero_point.flat[:2] = low, high
    q = dataclasses.replace(q, zero_point=zero_point)
    with comq_np.QuantizedWriter(tmp_path / "q.h5") as file:
        file.add("fc", q)
    model, x = case.model()
    for form in FORMS:
        made = comq_onnx.apply(model, tmp_path / "q.h5", format=form)
        assert_same(run(made, x), expected(case, q))
    codes = next(array for key, array in initializers(made).items() if ".codes" in key or ".packed" in key)
    assert str(codes.dtype) == ("uint8" if kind == "uint4" and name not in ("conv2-groups", "transposed2") else kind)


@pytest.mark.parametrize("bits", [2, 10])
def test_scales_of_float16(tmp_path, bits):
    for name in ("matmul", "gather", "conv1"):
        q = solved(CASES[name], tmp_path / f"{name}.h5", bits, scale_dtype="float16")
        model, x = CASES[name].model()
        for form in FORMS:
            assert_same(run(comq_onnx.apply(model, tmp_path / f"{name}.h5", format=form), x), expected(CASES[name], q))


def test_weights_of_float16_stay_such(tmp_path):
    case = CASES["matmul-none"]
    q = solved(case, tmp_path / "q.h5", 4)
    model, x = case.model(dtype=np.float16)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    comq_onnx.capture(model, [x], tmp_path / "c.h5")
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        np.testing.assert_allclose(file["fc"].gram.matrix, x.astype(float).T @ x, rtol=1e-3)
    wanted = x.astype(np.float32) @ q.dequantize().astype(np.float16).astype(np.float32)
    for form in FORMS:
        found = run(comq_onnx.apply(model, tmp_path / "q.h5", format=form), x)
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, wanted, atol=4e-3 * np.abs(wanted).max())


def test_the_file_shrinks(tmp_path):
    case = Case("MatMul", (256, 512), (2, 256))
    solved(case, tmp_path / "q.h5", 4, recipe="rtn")
    model, _ = case.model()
    for form, limit in (("qdq", 0.14), ("matmulnbits", 0.145)):
        comq_onnx.apply(model, tmp_path / "q.h5", tmp_path / "new.onnx", format=form)
        assert (tmp_path / "new.onnx").stat().st_size < limit * len(model.SerializeToString())
