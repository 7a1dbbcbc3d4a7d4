"""Feed-forward layers of which each token computes a part."""

from tilewise.linear.routed import RoutedFFN
from tilewise.linear.spark import SparkFFN

__all__ = ["RoutedFFN", "SparkFFN"]
