"""Quantize the layers of ONNX models with comq_np: capture, solve, apply."""

from __future__ import annotations

from comq_onnx.commands import apply, capture, quantize

__all__ = ["apply", "capture", "quantize"]
