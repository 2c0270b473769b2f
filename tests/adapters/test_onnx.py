"""ONNX models: which weights are layers, and models quantized whole; `test_onnx_nodes.py` has the kinds of nodes."""

from __future__ import annotations

import dataclasses
import re
import threading

import numpy as np
import pytest
from requirements import require
from sequences import assert_matched

import comq_np

require("onnx")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402
from onnx_models import CASES, FORMS, assert_same, expected, initializers, run, solved  # noqa: E402

import comq_onnx  # noqa: E402

# Graphs.


def file_of(path):
    with comq_np.CalibrationFile(path) as file:
        return dict(file.items()), file.skipped


def graph(text, weights=None, opset=21):
    """Model of this text, with weights of these shapes."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
        net {text}""")
    for name, shape in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    return model


def test_a_weight_of_several_nodes_is_one_layer(tmp_path):
    model = graph(
        "(float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, fc_weight) b = Relu(a) t = Transpose(fc_weight) "
        "y = Gemm<transB = 1>(b, t) }",
        {"fc_weight": (4, 4)},
    )
    x = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    comq_onnx.capture(model, [x], tmp_path / "c.h5")
    (layer,) = file_of(tmp_path / "c.h5")[0].values()
    W = initializers(model)["fc_weight"]
    between = np.maximum(x @ W, 0).astype(float)
    np.testing.assert_allclose(layer.gram.matrix, x.T.astype(float) @ x + between.T @ between, rtol=1e-5)
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", 3)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        Wq = file["fc"].dequantize()
    assert_same(run(comq_onnx.apply(model, tmp_path / "q.h5"), x), np.maximum(x @ Wq, 0) @ Wq)


@pytest.mark.parametrize("form", FORMS)
def test_whatever_else_uses_the_weight_gets_the_new_one(tmp_path, form):
    model = graph(
        "(float[N] x) => (float[N, 32] y) { i = Cast<to = 7>(x) e = Gather(table_weight, i) "
        "y = Gemm<transB = 1>(e, table_weight) }",
        {"table_weight": (32, 16)},
    )
    x = np.arange(32, dtype=np.float32)
    reports = comq_onnx.quantize(model, [x], 4, output=tmp_path / "new.onnx", format=form)
    assert list(reports) == ["table"]
    comq_onnx.capture(model, [x], tmp_path / "c.h5")
    assert file_of(tmp_path / "c.h5")[0]["table"].weight.shape == (16, 32)
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", 4)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        Wq = file["table"].dequantize()
    assert_same(run((tmp_path / "new.onnx").read_bytes(), x), Wq.T @ Wq)


def test_what_cannot_be_quantized_is_listed(tmp_path):
    model = graph(
        "(float[1, 4] x) => (float[1, 4] y) {"
        'a = MatMul(left_weight, x) b = Cast<to = 1>(cast_weight) c = MatMul(x, b) d = Einsum<equation = "ij,jk->ik">'
        "(x, einsum_weight) e = MatMul(x, cube_weight) f = Gemm<transA = 1>(x, gemm_weight) k = MatMul(x, fc_weight) "
        "z = com.microsoft.FusedMatMul(x, fused_weight) s = ReduceSum(x) q = Greater(s, zero) "
        "w = If(q) <then_branch = g1 () => (float[1, 4] o) { o = MatMul(x, inner_weight) }, "
        "else_branch = g2 () => (float[1, 4] o) { o = Relu(x) }> y = Sum(a, c, d, k, z, w) }",
        {
            **dict.fromkeys(("cast_weight", "einsum_weight", "fc_weight", "fused_weight", "inner_weight"), (4, 4)),
            "left_weight": (1, 1),
            "cube_weight": (2, 4, 4),
            "gemm_weight": (1, 4),
            "zero": (1,),
        },
    )
    comq_onnx.capture(model, [np.ones((1, 4), np.float32)], tmp_path / "c.h5")
    layers, skipped = file_of(tmp_path / "c.h5")
    assert list(layers) == ["fc"]
    for name, reason in {
        "left": "MatMul node: its constant is on the left.",
        "b": "MatMul node: its weight is computed by Cast.",
        "einsum": "Einsum node: an operator that is not supported.",
        "cube": "MatMul node: its weight has the shape (2, 4, 4).",
        "gemm": "Gemm node: it has transA, or an alpha of 0.",
        "fused": "FusedMatMul node: an operator that is not supported.",
        "inner": "MatMul node: it is in a sub-graph.",
    }.items():
        assert skipped.pop(name) == reason
    assert not skipped


@pytest.mark.parametrize("opset", [17, 21])
def test_weights_in_functions_and_for_subgraphs(tmp_path, opset):
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}, "local" : 1]>
        net (float[N, 8] x) => (float[N, 8] y) {{
            a = local.dense(x, fc_weight) s = ReduceSum(x) q = Greater(s, zero)
            b = If(q) <then_branch = g1 () => (float[N, 8] o) {{ o = MatMul(x, fc_weight) }},
                else_branch = g2 () => (float[N, 8] p) {{ p = Relu(x) }}>
            y = Sum(a, b)
        }}
        <opset_import: ["" : {opset}], domain: "local"> dense (x, w) => (z) {{ z = MatMul(x, w) }}"""
    )
    W = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(W, "fc_weight"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    x = np.random.default_rng(1).random((6, 8), np.float32)
    comq_onnx.capture(model, [x], tmp_path / "c.h5")
    layers, skipped = file_of(tmp_path / "c.h5")
    assert list(layers) == ["fc"]
    assert list(skipped.values()) == ["MatMul node: it is in a sub-graph."]
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", 3)
    with comq_np.QuantizedFile(tmp_path / "q.h5") as file:
        Wq = file["fc"].dequantize()
    assert_same(run(comq_onnx.apply(model, tmp_path / "q.h5"), x), 2 * x @ Wq)


def test_names_are_those_of_modules_where_an_exporter_has_left_them(tmp_path):
    model = graph(
        "(float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, a_weight) b = MatMul(a, val_1) c = Add(b_bias, b) "
        "d = MatMul(c, val_2) e = MatMul(d, val_3) y = MatMul(e, val_4) }",
        {**dict.fromkeys(("a_weight", "val_1", "val_2", "val_3", "val_4"), (4, 4)), "b_bias": (4,)},
        opset=18,
    )
    for node, name in zip(model.graph.node, ("n0", "n1", "n2", "n3", "n4", ""), strict=True):
        node.name = name
    scopes = str(["", "blocks.0", "blocks.0.fc", "matmul_3"])
    model.graph.node[3].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    comq_onnx.capture(model, [np.eye(4, dtype=np.float32)], tmp_path / "c.h5")
    layers = file_of(tmp_path / "c.h5")[0]
    assert list(layers) == ["a", "b", "blocks.0.fc", "n4", "val_4"]
    assert [name for name, layer in layers.items() if layer.bias is not None] == ["b"]
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", 4)
    made = comq_onnx.apply(model, tmp_path / "q.h5")  # the conversion to opset 21 does not lose names
    assert [one.version for one in made.opset_import if not one.domain] == [21]
    assert sum(node.op_type == "DequantizeLinear" for node in made.graph.node) == 5


def deep(count=4, width=6):
    """Model of several layers, two of which get the same input."""
    nodes = [f"a{k + 1} = MatMul(a{k}, w{k}_weight) " for k in range(count)]
    nodes[0] = "a0 = Relu(x) a1 = MatMul(a0, w0_weight) b = MatMul(a0, v_weight) "
    weights = {**{f"w{k}_weight": (width, width) for k in range(count)}, "v_weight": (width, width)}
    return graph(
        f"(float[N, {width}] x) => (float[N, {width}] y) {{ {' '.join(nodes)} y = Add(a{count}, b) }}", weights
    )


def test_several_passes_make_the_file_of_one(tmp_path, capsys):
    model = deep()
    batches = list(np.random.default_rng(0).normal(size=(3, 8, 6)).astype(np.float32))
    comq_onnx.capture(model, batches, tmp_path / "a.h5")
    one = comq_np.plan_calibration({"": (6, 6)}).passes[0]
    comq_onnx.capture(model, batches, tmp_path / "b.h5", memory=one.memory + one.gram_bytes, progress=True)
    assert "pass 2" in capsys.readouterr().err
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    with pytest.raises(comq_np.InputError, match="must be a list or a loader"):
        comq_onnx.capture(model, iter(batches), tmp_path / "d.h5", memory=one.memory + one.gram_bytes)


def test_layers_with_the_same_input_share_a_gram(tmp_path):
    comq_onnx.capture(deep(), [np.ones((5, 6), np.float32)], tmp_path / "c.h5")
    with comq_np.CalibrationFile(tmp_path / "c.h5") as file:
        assert file["v"].gram is file["w0"].gram
        assert file["w1"].gram is not file["w0"].gram


def test_only_chosen_layers_and_samples(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    select = lambda x, batch: x[batch["x"][:, 0] > 0]  # noqa: E731
    comq_onnx.capture(deep(), [{"x": x}], tmp_path / "c.h5", ["w[12]"], select=select)
    layers = file_of(tmp_path / "c.h5")[0]
    assert list(layers) == ["w1", "w2"]
    assert layers["w1"].gram.count == (x[:, 0] > 0).sum()


def test_another_model_does_not_go_on_with_a_capture(tmp_path):
    class StopError(Exception):
        pass

    class Stopping(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            if self.passes > 2:  # the digest of the first batch begins the first pass
                raise StopError
            return super().__iter__()

    model, x = deep(), np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    one = comq_np.plan_calibration({"": (6, 6)}).passes[0]
    memory = one.memory + one.gram_bytes
    with pytest.raises(StopError):
        comq_onnx.capture(model, Stopping([x]), tmp_path / "c.h5", memory=memory)
    other = deep()
    other.graph.initializer[0].raw_data = bytes(4 * 36)
    with pytest.raises(comq_np.FileError, match="the model"):
        comq_onnx.capture(other, [x], tmp_path / "c.h5", memory=memory)
    comq_onnx.capture(model, [x], tmp_path / "c.h5", memory=memory)
    comq_onnx.capture(model, [x], tmp_path / "whole.h5")
    assert (tmp_path / "c.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


@pytest.mark.parametrize("kind", ["path", "bytes", "external"])
def test_models_in_files_and_bytes(tmp_path, kind):
    model, x = deep(), np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    expected = comq_onnx.quantize(model, [x], 4, output=tmp_path / "expected.onnx")
    source = tmp_path / "model.onnx"
    onnx.save(model, source, save_as_external_data=kind == "external", location="w.data", size_threshold=0)
    if kind == "external":
        assert "w.data" in {path.name for path in tmp_path.iterdir()}
    given = source.read_bytes() if kind == "bytes" else source
    (tmp_path / "there").mkdir()
    output = tmp_path / "there" / "new.onnx"
    assert comq_onnx.quantize(given, [x], 4, output=output) == expected
    assert_same(run(output.read_bytes(), x), run((tmp_path / "expected.onnx").read_bytes(), x))


def test_much_data_has_a_file_of_its_own(tmp_path, monkeypatch):
    model, x = deep(width=32), np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    comq_onnx.quantize(model, [x], 4, output=tmp_path / "whole.onnx")
    monkeypatch.setattr("comq_onnx.model.OWN_FILE", 100)
    comq_onnx.quantize(model, [x], 4, output=str(tmp_path / "new.onnx"))
    assert (tmp_path / "new.onnx.data").stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "new.onnx")
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], run((tmp_path / "whole.onnx").read_bytes(), x))


# Wrong arguments.


@pytest.mark.parametrize("batch", [{"z": np.ones((2, 6))}, {}, (np.ones((2, 6)),) * 2])
def test_wrong_batches(tmp_path, batch):
    with pytest.raises(comq_np.InputError, match=r"^`batches` must hold the inputs \['x'\] of the model, got "):
        comq_onnx.capture(deep(), [batch], tmp_path / "c.h5")


def test_wrong_models(tmp_path):
    with pytest.raises(comq_np.InputError, match=r"must be a path, bytes or an onnx\.ModelProto, got 'int'"):
        comq_onnx.capture(3, [], tmp_path / "c.h5")
    with pytest.raises(comq_np.InputError, match="`model` must be an ONNX model"):
        comq_onnx.capture(b"no model", [], tmp_path / "c.h5")
    with pytest.raises(FileNotFoundError):
        comq_onnx.capture(tmp_path / "none.onnx", [], tmp_path / "c.h5")
    nothing = graph("(float[N] x) => (float[N] y) { y = Relu(x) }")
    with pytest.raises(comq_np.InputError, match=r"`model` must have a MatMul, .* node with a constant float weight"):
        comq_onnx.capture(nothing, [np.ones(2, np.float32)], tmp_path / "c.h5")


def test_what_apply_refuses(tmp_path):
    case = CASES["matmul-none"]
    model, x = case.model()
    q = solved(case, tmp_path / "real.h5", 4, zero_point="real")
    with pytest.raises(
        comq_np.InputError, match=r"^layer 'fc': must have whole zero points in an ONNX model, has real"
    ):
        comq_onnx.apply(model, tmp_path / "real.h5")
    q = solved(case, tmp_path / "q.h5", 4)
    with comq_np.QuantizedWriter(tmp_path / "shift.h5") as file:
        file.add("fc", dataclasses.replace(q, bias_shift=np.ones(5, np.float32)))
    with pytest.raises(comq_np.InputError, match=r"^layer 'fc': must have a bias of its own"):
        comq_onnx.apply(model, tmp_path / "shift.h5")
    with pytest.raises(comq_np.InputError, match=r"^`format` must be one of "):
        comq_onnx.apply(model, tmp_path / "q.h5", format="qoperator")
    with pytest.raises(comq_np.InputError, match=r"^layer 'fc': must be a layer of the model"):
        comq_onnx.apply(deep(), tmp_path / "q.h5")
    assert_same(run(comq_onnx.apply(model, tmp_path / "q.h5", names={"fc": "fc"}), x), expected(case, q))


def test_wrong_options_are_refused_before_the_model_runs(tmp_path):
    def batches():
        raise AssertionError
        yield

    for options in ({"recipe": "none"}, {"format": "none"}):
        with pytest.raises(comq_np.InputError):
            comq_onnx.quantize(deep(), batches(), 4, output=tmp_path / "new.onnx", **options)
    with pytest.warns(UserWarning, match="NoneExecutionProvider"):
        comq_onnx.capture(deep(), [np.ones((2, 6), np.float32)], tmp_path / "c.h5", providers=["NoneExecutionProvider"])
    assert not (tmp_path / "new.onnx").exists()


def test_a_model_that_does_not_convert(tmp_path):
    case = CASES["matmul"]
    solved(case, tmp_path / "q.h5", 4)
    model, _ = case.model(opset=18)
    model.graph.node.append(helper.make_node("NoSuchOp", ["x"], ["z"]))
    with pytest.raises(comq_np.InputError, match=r"^`model` must be of opset 21, or of one that converts to it: "):
        comq_onnx.apply(model, tmp_path / "q.h5")


def sequence():
    """Layers one after the other: two get the same input, one a sum that goes round another, one is behind an If."""
    text = """(float[N, 12] x) => (float[N, 6] y) {
        a = Gemm(x, a_weight, a_bias) b = Relu(a) c = MatMul(b, c_weight) d = Add(c, d_bias)
        t = Transpose(e_weight) e = Gemm<beta = 0.5>(b, t, e_bias) f = Tanh(d) g = Sum(e, f, b)
        s = ReduceSum(g) q = Greater(s, zero)
        h = If(q) <then_branch = g1 () => (float[N, 12] o) { o = Abs(g) },
            else_branch = g2 () => (float[N, 12] p) { p = Relu(g) }>
        i = MatMul(h, i_weight) y = Add(i_bias, i)
    }"""
    shapes = {"a_weight": (12, 12), "c_weight": (12, 12), "e_weight": (12, 12), "i_weight": (12, 6)}
    biases = {"a_bias": (12,), "d_bias": (12,), "e_bias": (12,), "i_bias": (6,), "zero": (1,)}
    rng = np.random.default_rng(2)
    mixing = rng.normal(size=(12, 12)).astype(np.float32)
    return graph(text, shapes | biases), list(rng.normal(size=(9, 32, 12)).astype(np.float32) @ mixing)


def run_within(model, names, batches):
    """Values of these names for each batch, in float64."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return [[value.astype(float) for value in session.run(names, {"x": x})] for x in batches]


@pytest.mark.parametrize("fit_bias", [False, True])
def test_in_sequence_each_layer_is_solved_for_the_outputs_of_the_float_model(tmp_path, fit_bias):
    model, batches = sequence()
    options = {"sequential": True, "fit_bias": fit_bias, "output": tmp_path / "new.onnx"}
    assert list(comq_onnx.quantize(model, batches, 3, **options)) == ["a", "c", "e", "i"]
    changed, weights = onnx.load(tmp_path / "new.onnx"), initializers(model)
    layers = {
        "x": ("a", weights["a_weight"], weights["a_bias"]),
        "b": ("d", weights["c_weight"], weights["d_bias"]),
        "b ": ("e", weights["e_weight"].T, weights["e_bias"] / 2),
        "h": ("y", weights["i_weight"], weights["i_bias"]),
    }
    for source, (output, W, bias) in layers.items():
        names = [source.strip(), output]
        if source == "x":
            own = exact = [x.astype(float) for x in batches]
            found = [outputs[0] for outputs in run_within(changed, [output], batches)]
        else:
            own, found = zip(*run_within(changed, names, batches), strict=True)
            exact = [outputs[0] for outputs in run_within(model, names[:1], batches)]
        assert_matched(W, bias, own, exact, np.concatenate(found), 3, fit_bias)


def test_in_sequence_only_chosen_layers_and_samples_count(tmp_path):
    model, batches = sequence()
    spoiled = [np.concatenate([x, np.full((8, 12), 1e3, np.float32)]) for x in batches]
    chosen = {"sequential": True, "layers": ["c", "i"], "bits": {"*": 3, "i": 5}}
    comq_onnx.quantize(model, spoiled, select=lambda x, _: x[:-8], output=tmp_path / "a.onnx", **chosen)
    onnx.save(model, tmp_path / "float.onnx", save_as_external_data=True, size_threshold=0)
    comq_onnx.quantize(tmp_path / "float.onnx", batches, output=tmp_path / "b.onnx", **chosen)
    one, other = (initializers(onnx.load(tmp_path / name)) for name in ("a.onnx", "b.onnx"))
    assert {name for name in one if "codes" in name} == {"c_weight.codes", "i_weight.codes"}
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=1e-4, atol=1e-5)


def test_what_a_sequence_refuses_writes_nothing(tmp_path):
    model, batches = sequence()
    before = threading.active_count()
    for more, message in (
        ({"memory": "1GiB"}, "`memory` must be None with `sequential`"),
        ({"sequential": 1}, "`sequential` must be True or False"),
        ({"zero_point": "real"}, "layer 'a': must have whole zero points in an ONNX model"),
        ({"batches": [*batches, np.full((4, 12), np.inf, np.float32)], "strict": True}, "layer 'a': batch 9: `X` must"),
    ):
        arguments = {"batches": batches, "bits": 3, "sequential": True, "output": tmp_path / "new.onnx", **more}
        with pytest.raises(comq_np.InputError, match=re.escape(message)):
            comq_onnx.quantize(model, **arguments)
    assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["b", "c"])
def test_what_is_no_tensor_may_not_be_on_the_way_where_a_sequence_is_cut(tmp_path, name):
    model = graph(
        "(float[N, 4] x) => (float[M, 4] y) { s = SplitToSequence<axis = 0>(x, two) f = SequenceAt(s, zero) "
        "a = MatMul(f, a_weight) b = MatMul(a, b_weight) t = SequenceInsert(s, b) "
        "u = ConcatFromSequence<axis = 0>(t) y = MatMul(u, c_weight) }",
        {"a_weight": (4, 4), "b_weight": (4, 4), "c_weight": (4, 4)},
    )
    numbers = {"two": np.array(2), "zero": np.array(0)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in numbers.items())
    options = {"output": tmp_path / "new.onnx", "sequential": True, "layers": ["a", name]}
    batches = [np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)] * 4
    if name == "b":  # what is cut off before the layers that are left
        assert list(comq_onnx.quantize(model, batches, **options)) == ["a", "b"]
    else:
        with pytest.raises(comq_np.InputError, match="`sequential` must be False where 's', which is no tensor, leads"):
            comq_onnx.quantize(model, batches, **options)


def test_a_long_chain_of_nodes(tmp_path):
    model = graph(
        "(float[N, 4] x) => (float[N, 4] y) { n0 = Relu(x) "
        + " ".join(f"n{k + 1} = Abs(n{k})" for k in range(2000))
        + " y = MatMul(n2000, a_weight) }",
        {"a_weight": (4, 4)},
    )
    batches = [np.eye(4, dtype=np.float32)]
    for sequential in (False, True):
        assert list(comq_onnx.quantize(model, batches, output=tmp_path / "a.onnx", sequential=sequential)) == ["a"]
