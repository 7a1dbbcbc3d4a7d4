"""Local linear attention: a ridge regression around each query instead of a weighted mean (arXiv 2510.01450)."""

from tilewise.attention.local_linear.layer import LocalLinear, LocalLinearAttention, local_linear_attention

__all__ = ["LocalLinear", "LocalLinearAttention", "local_linear_attention"]
