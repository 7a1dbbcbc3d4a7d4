"""A method that no paper has named: stages put together, and what each of them is worth."""

from dataclasses import replace

import torch

import tilewise
from tilewise.attention import Antidiagonal, First, MeanPool, Own, Pooled, SegmentSort, Tiles, TopK, TrueMass

torch.manual_seed(0)
n, dim, tile = 2048, 64, 64

# A text with needles: each stretch of queries looks for three single keys somewhere before it; the rest is noise,
# seen in passing.
q, k, v = torch.randn(3, 1, 2, n, dim)
for start in range(tile, n, tile):
    sought = k[0, :, torch.randint(start, (3,))]  # [heads, 3, dim]
    q[0, :, start : start + tile] += sought.sum(1, keepdim=True)
exact = tilewise.attend(q, k, v, mask="causal")

base = Tiles(score=MeanPool(), select=TopK(6), tile=(tile, tile), always=(First(), Own()))
methods = {
    "a mean key speaks for each tile": base,
    "antidiagonals": replace(base, score=Antidiagonal(stride=8)),
    "antidiagonals, important keys first": replace(
        base, score=Antidiagonal(stride=8), order=SegmentSort(segment=256, probe=64)
    ),
    "true attention mass (the oracle)": replace(base, score=TrueMass()),
}
print("6 tiles for each row of tiles, chosen by\n")
print(f"{'':<38} density   choice looks at   error, rest skipped   rest pooled")
for name, method in methods.items():
    errors = []
    for chosen in (method, replace(method, rest=Pooled())):
        out = tilewise.attend(q, k, v, chosen, mask="causal")
        errors.append(float((out - exact).norm() / exact.norm()))
    density = tilewise.attention.plan(method, q, k, mask="causal").density
    print(f"{name:<38} {density:7.1%}   {method.lookahead:<15} {errors[0]:19.1%} {errors[1]:13.1%}")
