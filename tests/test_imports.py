"""What is imported when, and from where: seen from fresh processes, and from the imports in the source."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import subprocess
import sys

import pytest

import comq_np

PACKAGE = pathlib.Path(comq_np.__file__).parent
FRAMEWORKS = ("torch", "keras", "tensorflow", "jax", "onnx", "onnxruntime", "transformers", "dask", "distributed")

#: Modules in layers: each may import from those before it only, apart from the lazy names of __init__.
LAYERS = [
    {"version", "checks", "table", "signals", "chunks", "digests", "heaps"},
    {"kernels", "parallel", "packing", "knapsack", "widths", "gram", "counts", "hdf5", "durable"},
    {"reader", "orders"},
    {"writing"},
    {"activations"},
    {"channels", "grid", "recipes", "cross", "modalities", "sphere", "convolution", "layouts", "cuda"},
    {"crossgram", "result", "problem", "exact"},
    {"planning"},
    {"descent", "feedback", "certify", "bitsplit"},
    {"teams"},
    {"starts", "judge", "proof", "parts"},
    {"backend", "host"},
    {"gpu", "diagonal"},
    {"memory"},
    {"minimise", "backends"},
    {"shrinkage", "planes"},
    {"solver"},
    {"gramfile"},
    {"calibration", "quantized"},
    {"store"},
    {"tasks"},
    {"schedule"},
    {"crew", "cluster"},
    {"merge", "pipeline", "verify"},
    {"allocation"},
    {"demo", "adapter"},
    {"cli"},
]


def loaded_after(code):
    """Top-level modules loaded in a fresh process after `code`."""
    code += "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_loads_no_framework_and_no_h5py():
    assert not loaded_after("import comq_np; comq_np.solve([1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]])") & {
        *FRAMEWORKS,
        "h5py",
        "tqdm",
    }


def test_the_files_load_no_framework():
    loaded = loaded_after("import comq_np; comq_np.quantize_file; import comq_np.cli, comq_np.demo.runner")
    assert "h5py" in loaded
    assert not loaded & set(FRAMEWORKS)


def imports_of(path):
    """Full names of the modules that a source file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def own(name):
    """Module of ours that `comq_np.MODULE...` names."""
    parts = name.split(".")
    return parts[1] if parts[0] == "comq_np" and len(parts) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_one_way(path):
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    level = next(k for k, layer in enumerate(LAYERS) if module in layer)
    below = set().union(*LAYERS[:level], {module} & {"demo", "gpu", "adapter"})
    assert {own(name) for name in imports_of(path)} - {None} <= below


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_only_one_module_imports_h5py(path):
    assert ("h5py" in {name.partition(".")[0] for name in imports_of(path)}) == (path.stem == "hdf5")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_only_one_module_imports_numba_cuda(path):
    found = {name for name in imports_of(path) if name.startswith("numba.cuda")}
    assert bool(found) == (path.stem == "cuda")


def test_the_import_does_without_what_takes_longer_than_it():
    """SciPy's optimizers take 0.3 s, of which only nonlinear shrinkage has any use."""
    code = "import comq_np, sys; assert not {'scipy.optimize', 'dask', 'torch', 'tqdm.auto'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_small_problems_and_the_cpu_do_without_numba_cuda():
    code = "import comq_np, sys; comq_np.solve([1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]])"
    code += "\nimport numpy as np; comq_np.solve(np.ones((520, 520)), np.eye(520), recipe='rtn', backend='cpu')"
    code += "\nassert not [name for name in sys.modules if name.startswith('numba.cuda.cudadrv')]"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["comq_torch", "comq_keras", "comq_onnx"])
def test_adapters_use_public_names_only(package):
    from comq_np import adapter

    public = {*comq_np.__all__, "adapter", *(f"adapter.{name}" for name in adapter.__all__)}
    for path in pathlib.Path(importlib.util.find_spec(package).origin).parent.rglob("*.py"):
        for name in imports_of(path):
            if name.startswith("comq_np."):
                assert name.removeprefix("comq_np.") in public, f"{path.name} imports {name}"
