"""Quantize the layers of PyTorch models with comq_np: capture, solve, apply."""

from __future__ import annotations

from comq_torch.apply import apply, quantize
from comq_torch.capture import capture
from comq_torch.sensitivity import sensitivities

__all__ = ["apply", "capture", "quantize", "sensitivities"]
