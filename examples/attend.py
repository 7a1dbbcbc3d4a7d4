"""The operator: one call, several methods, and what each one computed, gained and lost."""

import time

import torch

import tilewise
from tilewise.attention import MoBA, PBSAttention, SinkWindow, XAttention

torch.manual_seed(0)
n, heads, kv_heads, dim = 4096, 4, 2, 64

# Random vectors attend to everything alike, which no method can do for less. Here the sequence has 16 chapters with
# a subject each, and its tokens look for their subject.
subjects = torch.randn(16, dim).repeat_interleave(n // 16, 0)
q = torch.randn(1, heads, n, dim) + subjects
k, v = torch.randn(1, kv_heads, n, dim) + subjects, torch.randn(1, kv_heads, n, dim)


def timed(method=None):
    tilewise.attend(q, k, v, method, mask="causal")  # the first call of anything is slow
    start = time.perf_counter()
    out = tilewise.attend(q, k, v, method, mask="causal")
    return out, 1000 * (time.perf_counter() - start)


exact, ms = timed()
print(f"{'method':<66} tiles      time  of it to choose   error")
print(f"{'dense':<66}  100% {ms:6.0f} ms")
for method in (SinkWindow(4, 256), MoBA(64, 6), XAttention(8, 0.9), PBSAttention(256, 0.9)):
    plan = tilewise.attention.plan(method, q, k, mask="causal")
    out, ms = timed(method)
    error = float((out - exact).norm() / exact.norm())
    print(f"{method!s:<66} {plan.density:5.0%} {ms:6.0f} ms {1000 * plan.seconds:13.0f} ms {error:7.1%}")

print("\nWhich engine runs, and why the others do not:")
print(tilewise.explain(q, k, v, XAttention(), mask="causal"))
