"""Dtypes that operators compute in."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over tokens: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
