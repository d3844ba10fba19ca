"""Fused ops as plain functions of plain tensors. They know nothing of the model above them."""

from kernels.reference import attention, linear_nll, rmsnorm, rope, swiglu

__all__ = ["attention", "linear_nll", "rmsnorm", "rope", "swiglu"]
