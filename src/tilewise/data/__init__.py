"""Texts and retrieval tasks to measure a model with, sub-words, word vectors; importing this imports no torch."""

from tilewise.data.tasks import Example, copying, far, passkey, recall

__all__ = ["Example", "copying", "far", "passkey", "recall"]
