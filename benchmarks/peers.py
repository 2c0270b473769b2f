"""GPTQ of other libraries, called as they call it themselves: weights and matrix in, dequantized weights out.

`quality.py` and `speed.py` run them beside the recipes. Each gets one scale and zero point a column, from the span of
its weights, descending diag G as the order and 1 % damping, and computes in the type of its arguments.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import numpy.typing as npt

import comq_np

Float64 = npt.NDArray[np.float64]
#: float32 or float64.
Real = npt.NDArray[Any]

DAMPING = 0.01
#: Inputs whose weights `torch_gptq` rounds between two products, as many as GPTQ's authors do.
BLOCK = 128
#: Packages that a peer needs.
PACKAGES = {"ort_gptq": ("onnxruntime", "onnx", "onnx_ir"), "keras_gptq": ("keras", "torch"), "torch_gptq": ("torch",)}
#: Widths that `keras.quantizers.GPTQConfig` takes.
KERAS_BITS = (2, 3, 4, 8)


def missing(names: tuple[str, ...]) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def supports(peer: str, bits: int) -> bool:
    """Whether the peer, or a recipe, quantizes to so many bits."""
    return peer != "keras_gptq" or bits in KERAS_BITS


def hessian(gram: comq_np.Gram) -> Float64:
    """``2 X.T @ X / samples``, as GPTQ's own code scales it."""
    return gram.matrix * (2 / gram.count)


def ort_gptq(W: Real, H: Real, bits: int) -> Real:
    """ONNX Runtime's ``onnxruntime.quantization.neural_compressor.weight_only.gptq``."""
    from onnxruntime.quantization.neural_compressor.weight_only import gptq

    found: Real = gptq(  # overwrites both of its inputs
        W.copy(), H.copy(), num_bits=bits, group_size=-1, scheme="asym", percdamp=DAMPING, actorder=True
    )
    return found


def keras_gptq(W: Real, H: Real, bits: int) -> Real:
    """Keras' ``keras.src.quantizers.gptq.gptq_quantize_matrix`` on the matrix that ``GPTQ`` in that file gives it."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    from keras import ops
    from keras.src.quantizers import gptq, quantizers

    H = H.copy()
    diagonal = H.diagonal().copy()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    H[np.diag_indices_from(H)] = diagonal + DAMPING * diagonal.mean()
    weights, inverse, metric = (
        ops.convert_to_tensor(array.astype(np.float32)) for array in (W.T, np.linalg.inv(H), H.diagonal())
    )
    # Keras measures the span anew for every block of rows, but has room for the scale of one: the first, which is this.
    parameters = quantizers.compute_quantization_parameters(weights, bits=bits, per_channel=True)
    codes, *_ = gptq.gptq_quantize_matrix(
        weights,
        inverse,
        activation_order=True,
        order_metric=metric,
        compute_scale_zero=lambda _: parameters,
    )
    scale, zero_point, _ = parameters
    Wq = quantizers.dequantize_with_zero_point(ops.cast(codes, "float32"), scale, zero_point)
    return ops.convert_to_numpy(Wq).T.astype(W.dtype)


def torch_gptq(W: Real, H: Real, bits: int) -> Real:
    """GPTQ in plain PyTorch, from its paper: weights still to be rounded take up the errors of those that are.

    Weights are as PyTorch holds them, a row for each output channel. With the upper Cholesky factor U of ``inv(H)``, an
    error e in column i adds ``-e U_ik / U_ii`` to a later column k [1]_.

    .. [1] E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
       arXiv:2210.17323, algorithm 1.
    """
    import torch

    weights, matrix = torch.from_numpy(W).T.contiguous(), torch.from_numpy(H)
    low, high = weights.amin(1).clamp(max=0), weights.amax(1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale[scale == 0] = 1
    zero_point = torch.round(-low / scale)
    order = torch.argsort(matrix.diagonal(), descending=True)
    targets, matrix = weights[:, order], matrix[order][:, order]
    matrix.diagonal().add_(DAMPING * matrix.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)), upper=True)
    Wq = torch.empty_like(targets)
    for start in range(0, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        block, factor = targets[:, start:end].clone(), U[start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            codes = torch.clamp(torch.round(block[:, i] / scale) + zero_point, 0, 2**bits - 1)
            rounded = scale * (codes - zero_point)
            errors[:, i] = (block[:, i] - rounded) / factor[i, i]
            block[:, i + 1 :] -= torch.outer(errors[:, i], factor[i, i + 1 :])
            Wq[:, order[start + i]] = rounded
        targets[:, end:] -= errors @ U[start:end, end:]
    return Wq.T.numpy()


#: Those of libraries; `torch_gptq` is what `quality.py` has as the recipe `gptq`.
PEERS = {"ort_gptq": ort_gptq, "keras_gptq": keras_gptq}
