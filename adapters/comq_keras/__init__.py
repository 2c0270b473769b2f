"""Quantize the layers of Keras models with comq_np: capture, solve, apply."""

from __future__ import annotations

from comq_keras.apply import apply, quantize
from comq_keras.capture import capture

__all__ = ["apply", "capture", "quantize"]
