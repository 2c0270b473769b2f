"""GPTQ of other libraries, called as they call it themselves: weights and Gram in, dequantized weights out.

`quality.py` runs them beside the recipes. Each gets one scale and zero point a column, from the span of its weights,
descending diag G as the order and 1 % damping.
"""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import numpy.typing as npt

import comq_np

Float64 = npt.NDArray[np.float64]

DAMPING = 0.01
#: Packages that a peer needs.
PACKAGES = {"ort_gptq": ("onnxruntime", "onnx", "onnx_ir"), "keras_gptq": ("keras",)}
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


def ort_gptq(W: Float64, gram: comq_np.Gram, bits: int) -> Float64:
    """ONNX Runtime's ``onnxruntime.quantization.neural_compressor.weight_only.gptq``."""
    from onnxruntime.quantization.neural_compressor.weight_only import gptq

    found: Float64 = gptq(  # overwrites both of its inputs
        W.copy(), hessian(gram), num_bits=bits, group_size=-1, scheme="asym", percdamp=DAMPING, actorder=True
    )
    return found


def keras_gptq(W: Float64, gram: comq_np.Gram, bits: int) -> Float64:
    """Keras' ``keras.src.quantizers.gptq.gptq_quantize_matrix`` on the matrix that ``GPTQ`` in that file gives it."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    from keras import ops
    from keras.src.quantizers import gptq, quantizers

    H = hessian(gram)
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
    return ops.convert_to_numpy(Wq).T.astype(np.float64)


PEERS = {"ort_gptq": ort_gptq, "keras_gptq": keras_gptq}
