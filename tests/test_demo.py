"""The networks of the demonstration against PyTorch, and a run of the whole of it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import math
import pathlib
from typing import NamedTuple

import numpy as np
import pytest
import torch

import comq_np
from comq_np.demo import networks, runner

CASES, BITS, RECIPES = ("cnn", "vit"), (4, 3, 2), ("rtn", "paper", "balanced")
METRICS = {"accuracy", "float_accuracy", "agreement", "relative_error", "seconds"}
NETWORKS = {network.name: network for network in networks.load_networks()}
DATASET = networks.load_images()
TRAINING = pathlib.Path(__file__).parents[1] / "benchmarks" / "train_demo_networks.py"


@pytest.fixture(params=CASES)
def network(request):
    return NETWORKS[request.param]


@pytest.fixture(scope="module")
def training():
    """Module that defined and trained the networks in PyTorch."""
    spec = importlib.util.spec_from_file_location("train_demo_networks", TRAINING)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torch_model(training, network):
    """Trained PyTorch model, and by layer name the modules that give the layers' outputs."""
    arrays = {name: torch.from_numpy(array) for name, array in network.arrays.items()}
    model = training.NETWORKS[network.name]().eval()
    if network.name == "vit":
        model.load_state_dict(arrays)
        return model, {name: module for name, module in model.named_modules() if name in network.layers}
    with torch.no_grad():
        for k, (conv, norm) in enumerate(zip(model.convs, model.norms, strict=True)):
            conv.weight.copy_(arrays[f"conv{k}.weight"])
            norm.bias.copy_(arrays[f"conv{k}.bias"])
            norm.weight.copy_(torch.sqrt(norm.running_var + norm.eps))
    model.head.load_state_dict({"weight": arrays["head.weight"], "bias": arrays["head.bias"]})
    return model, {**{f"conv{k}": norm for k, norm in enumerate(model.norms)}, "head": model.head}


def torch_run(training, network, images):
    """Logits of the PyTorch model, and the outputs of its layers with a row for each row of X, by name."""
    model, modules = torch_model(training, network)
    outputs = {}

    def keep(name):
        def hook(module, inputs, output):
            channels_last = output.movedim(1, -1) if output.ndim == 4 else output
            outputs[name] = channels_last.reshape(-1, channels_last.shape[-1]).numpy()

        return hook

    for name, module in modules.items():
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        return model(training.to_tensor(images)).numpy(), outputs


def test_data_is_complete():
    images, labels, calibration = DATASET
    assert images.shape == (6000, 28, 28)
    assert labels.shape == (6000,)
    assert calibration.shape == (512, 28, 28)
    assert {array.dtype for array in DATASET} == {np.dtype(np.uint8)}


@pytest.mark.parametrize(("name", "accuracy"), [("cnn", 0.89), ("vit", 0.86)])
def test_networks_are_as_good_as_trained(name, accuracy):
    logits = NETWORKS[name].logits(DATASET.test_images)
    assert logits.dtype == np.float32
    assert (logits.argmax(axis=1) == DATASET.test_labels).mean() >= accuracy


def test_networks_equal_pytorch(training, network):
    images = DATASET.test_images[:20]
    expected, _ = torch_run(training, network, images)
    np.testing.assert_allclose(network.logits(images), expected, rtol=1e-4, atol=1e-4)


def test_tap_gives_the_inputs_of_every_layer(training, network):
    images, inputs = DATASET.test_images[:3], {}
    network.logits(images, tap=lambda layer, X: inputs.setdefault(layer, X))
    _, outputs = torch_run(training, network, images)
    assert tuple(inputs) == network.layers
    assert set(outputs) == set(network.layers)
    for layer, X in inputs.items():
        assert len(X) == len(images)
        found = X.reshape(-1, X.shape[-1]) @ network.weight(layer) + network.bias(layer)
        np.testing.assert_allclose(found, outputs[layer], rtol=1e-4, atol=1e-4, err_msg=layer)


def test_batches_do_not_matter(network):
    images = DATASET.test_images[: networks.BATCH + 3]
    parts = [network.logits(images[:100]), network.logits(images[100:])]
    np.testing.assert_allclose(network.logits(images), np.concatenate(parts), rtol=1e-4, atol=1e-4)


def test_replacing_a_layer_by_itself_changes_nothing(network):
    images = DATASET.test_images[:3]
    replaced = {layer: (network.weight(layer), None) for layer in network.layers}
    np.testing.assert_array_equal(network.logits(images, replaced), network.logits(images))


def test_replaced_weights_and_bias_shift_are_used(network):
    images, shift = DATASET.test_images[:3], np.arange(10, dtype=np.float32)
    replaced = {"head": (0 * network.weight("head"), shift)}
    expected = np.broadcast_to(network.bias("head") + shift, (3, 10))
    np.testing.assert_array_equal(network.logits(images, replaced), expected)


class Run(NamedTuple):
    """What a run left behind."""

    folder: pathlib.Path
    printed: str
    rows: list[dict[str, object]]

    def value(self, metric, *key):
        names = ("case", "bits", "recipe", "metric")
        (found,) = (row["value"] for row in self.rows if tuple(row[name] for name in names) == (*key, metric))
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    printed, json_path = io.StringIO(), folder / "figures.json"
    with contextlib.redirect_stdout(printed):
        runner.run(output=folder / "made" / "here", json_path=json_path)
    return Run(folder / "made" / "here", printed.getvalue(), json.loads(json_path.read_text(encoding="utf-8")))


def test_run_prints_a_row_for_every_solve(run):
    lines = [line.split() for line in run.printed.splitlines()]
    header = next(line for line in lines if line[:3] == ["case", "bits", "recipe"])
    assert set(header[3:]) == METRICS
    for case, bits, recipe in itertools.product(CASES, BITS, RECIPES):
        assert sum(line[:3] == [case, str(bits), recipe] for line in lines) == 1
    assert f"comq verify {run.folder}/vit.calibration.h5 {run.folder}/vit.4bit.balanced.h5" in run.printed


def test_run_writes_every_figure(run):
    assert all(list(row) == ["case", "bits", "recipe", "metric", "value"] for row in run.rows)
    found = [(row["case"], row["bits"], row["recipe"], row["metric"]) for row in run.rows]
    assert sorted(found) == sorted(itertools.product(CASES, BITS, RECIPES, METRICS))
    for row in run.rows:
        assert isinstance(row["value"], float)
        assert math.isfinite(row["value"])
        assert 0 < row["value"] <= (1 if row["metric"] != "seconds" else 60)


@pytest.mark.parametrize("case", CASES)
def test_files_hold_what_was_reported(run, case):
    calibration = run.folder / f"{case}.calibration.h5"
    with comq_np.CalibrationFile(calibration) as file:
        assert tuple(file) == NETWORKS[case].layers
        assert {layer.kind for layer in file.values()} == ({"conv2d", "linear"} if case == "cnn" else {"linear"})
        first, second = (fold.count for fold in file["head"].gram.folds)
        assert first == second == len(DATASET.calibration_images) // 2
    for bits, recipe in itertools.product(BITS, RECIPES):
        layers = comq_np.verify_file(calibration, run.folder / f"{case}.{bits}bit.{recipe}.h5")
        assert [layer.name for layer in layers] == list(NETWORKS[case].layers)
        assert all(layer.matches for layer in layers)


def test_figures_are_those_of_the_files(run):
    replaced = runner.replacements(run.folder / "vit.3bit.paper.h5")
    guesses, exact = (NETWORKS["vit"].logits(DATASET.test_images, r).argmax(axis=1) for r in (replaced, None))
    assert run.value("accuracy", "vit", 3, "paper") == np.mean(guesses == DATASET.test_labels)
    assert run.value("float_accuracy", "vit", 3, "paper") == np.mean(exact == DATASET.test_labels)
    assert run.value("agreement", "vit", 3, "paper") == np.mean(guesses == exact)
    with comq_np.QuantizedFile(run.folder / "vit.3bit.paper.h5") as file:
        errors = [q.report.relative_error for q in file.values()]
    assert run.value("relative_error", "vit", 3, "paper") == pytest.approx(math.prod(errors) ** (1 / len(errors)))


@pytest.mark.parametrize(("case", "loss"), [("cnn", 0.005), ("vit", 0.010)])
def test_four_bits_cost_next_to_nothing(run, case, loss):
    key = (case, 4, "balanced")
    assert run.value("accuracy", *key) >= run.value("float_accuracy", *key) - loss


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES)
def test_balanced_is_better_than_rounding(run, case, bits):
    assert run.value("accuracy", case, bits, "balanced") > run.value("accuracy", case, bits, "rtn")
    assert run.value("relative_error", case, bits, "balanced") < run.value("relative_error", case, bits, "paper")


def test_run_says_what_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(comq_np.FileError, match="file: cannot be written"):
        runner.run(output=file, json_path=None)
    with pytest.raises(comq_np.FileError, match=r"figures\.json: cannot be written"):
        runner.run(output=tmp_path, json_path=tmp_path / "missing" / "figures.json")
