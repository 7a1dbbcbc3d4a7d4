"""Mixers and operators that work on modes: of grids, meshes and fields."""
