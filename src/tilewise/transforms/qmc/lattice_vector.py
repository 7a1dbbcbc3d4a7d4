"""The default generating vector; written by tools/make_lattice.py."""

LOG2_POINTS = 20
VECTOR = (1,)
