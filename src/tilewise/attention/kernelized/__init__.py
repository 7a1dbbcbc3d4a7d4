"""Kernelised attention with relative positions, by fast Fourier transforms."""
