"""What the adapters of all frameworks share: the passes over the batches, the Grams, and the way back into the model.

An adapter describes its model by a `Model` and each weight by a `WeightLayer`; `capture`, `apply` and `quantize` do the
rest. This package imports no framework, and nothing else in `comq_np` imports it.

Examples
--------
An adapter of a framework whose models are lists of matrices, one multiplied after the other:

>>> import comq_np, numpy as np, os, tempfile
>>> from comq_np import adapter
>>> class Matrix(adapter.WeightLayer):
...     kind, has_bias = "linear", False
...     def __init__(self, model, number):
...         self.model, self.names = model, [str(number)]
...         self.geometry = self.shape = model[number].shape
...     def arrays(self):
...         return self.model[int(self.name)].astype(np.float32), None
...     def rows(self, x):
...         yield x
...     def write(self, W, bias_shift, q):
...         self.model[int(self.name)] = W
>>> class Product(adapter.Model):
...     needs, skipped = "a matrix", {}
...     def __init__(self, model):
...         self.model, self.layers = model, [Matrix(model, number) for number in range(len(model))]
...     def digest(self):
...         return repr([W.tolist() for W in self.model])
...     def run(self, batch, observe, wanted):
...         for layer, W in zip(self.layers, self.model):
...             observe(layer, batch)
...             batch = batch @ W
>>> rng = np.random.default_rng(0)
>>> model = [rng.normal(size=(4, 3)), rng.normal(size=(3, 2))]
>>> reports = adapter.quantize(Product(model), [rng.normal(size=(20, 4))], 3)
>>> list(reports), [len(np.unique(column)) <= 8 for column in model[0].T]
(['0', '1'], [True, True, True])
"""

from __future__ import annotations

from comq_np.adapter.apply import apply, quantize
from comq_np.adapter.capture import Path, capture
from comq_np.adapter.inputs import ActivationBits, ActivationOptions
from comq_np.adapter.interface import Forward, Model, Observe, Select, WeightLayer, Weights
from comq_np.adapter.sensitivity import sensitivities
from comq_np.adapter.sequential import quantize_in_sequence

__all__ = [
    "ActivationBits",
    "ActivationOptions",
    "Forward",
    "Model",
    "Observe",
    "Path",
    "Select",
    "WeightLayer",
    "Weights",
    "apply",
    "capture",
    "quantize",
    "quantize_in_sequence",
    "sensitivities",
]
