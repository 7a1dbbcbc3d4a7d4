"""Products of spherical functions side by side: through the torus, by the exact table, and e3nn's full tensor
product.

    python benchmarks/gaunt.py [--quick]

Inputs of all degrees up to L, outputs up to 2 L, 512 features, float32. e3nn's full tensor product gives
more: one output for each path, antisymmetric ones too, where a Gaunt product sums them into one of each
degree. Both are what a layer of either kind computes. e3nn is raced where it is installed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import harness
import torch

from tilewise.convolution import gaunt_product, gaunt_table

FEATURES = 512


def full_product(degree: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """e3nn's full tensor product of all degrees up to L with themselves."""
    try:
        from e3nn import o3
    except ImportError as error:
        print(f"e3nn: not raced ({error})", flush=True)
        return None
    irreps = o3.Irreps.spherical_harmonics(degree)
    return o3.FullTensorProduct(irreps, irreps)


def products(degrees: list[int]) -> list[harness.Row]:
    rows, times = [], {}
    for degree in degrees:
        x, y = torch.randn(2, FEATURES, (degree + 1) ** 2)
        contenders: dict[str, Callable[[], object]] = {}
        full = full_product(degree)
        if full is not None:
            contenders["e3nn, full tensor product"] = partial(full, x, y)
        if degree <= 8:  # 81 x 81 x 289 numbers
            table = gaunt_table(degree, degree).float().flatten(1)
            size = (degree + 1) ** 2

            def contracted(table=table, size=size, x=x, y=y) -> torch.Tensor:
                return torch.bmm(y.unsqueeze(1), (x @ table).view(FEATURES, size, -1)).squeeze(1)

            contenders["exact table"] = contracted
        for engine in ("matrix", "fft"):
            contenders[engine] = partial(gaunt_product, x, y, engine=engine)
        found = harness.race(f"full product, L={degree}", contenders, {})
        times[degree] = {row.provider: row.ms for row in found}
        rows += found
    low, high = degrees[len(degrees) // 2], degrees[-1]
    for name in times[high]:
        if name in times[low]:
            power = math.log(times[high][name] / times[low][name]) / math.log(high / low)
            print(f"{name}: time grows with the power {power:.1f} from L={low} to {high}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few sizes, nothing saved")
    quick = parser.parse_args().quick
    if not harness.tests_pass("tests/convolution/test_gaunt.py"):
        raise SystemExit("tests/convolution/test_gaunt.py fails: no figures")
    torch.set_num_threads(2)
    rows = products([2, 4] if quick else [1, 2, 3, 4, 5, 6, 8, 10])
    if not quick:
        harness.save("gaunt", rows)


if __name__ == "__main__":
    main()
