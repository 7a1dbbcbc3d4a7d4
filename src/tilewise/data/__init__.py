"""Texts and retrieval tasks to measure a model with; nothing here imports torch."""

from tilewise.data.tasks import Example, copying, far, passkey, recall

__all__ = ["Example", "copying", "far", "passkey", "recall"]
