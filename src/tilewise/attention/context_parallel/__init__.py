"""Attention over a sequence that several ranks hold: ring, TokenRing and their hybrid."""
