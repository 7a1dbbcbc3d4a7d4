"""Attention over a cache kept in pages: formats, shared prefixes, balanced decoding."""
