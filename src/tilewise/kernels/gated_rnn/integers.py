"""Constraints over integers: a small solver for tile sizes, after ConstrINT (FlashRNN, Pöppel et al., 2024).

Terms are sums of products of variables with coefficients that are not negative. Constraints are `left <=
right` and `divisor | dividend`. Domains are narrowed until nothing changes: of an inequality a value stays
only if the least of the left can still lie below the most of the right; of a divisibility, only if some
values of the others fit. The search then splits the smallest domain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Domains = dict[str, tuple[int, ...]]
# Combinations that a divisibility looks through; with more it waits until domains are smaller.
ENUMERATED = 4096


@dataclass(frozen=True)
class Term:
    """A polynomial: how often each product of variables is counted, by the variables' sorted names."""

    products: tuple[tuple[tuple[str, ...], int], ...]

    def __add__(self, other: Term | int) -> Term:
        return _collect([*self.products, *_term(other).products])

    def __mul__(self, other: Term | int) -> Term:
        pairs = itertools.product(self.products, _term(other).products)
        return _collect([(tuple(sorted(x + y)), m * n) for (x, m), (y, n) in pairs])

    __radd__, __rmul__ = __add__, __mul__

    @property
    def names(self) -> frozenset[str]:
        """Of its variables."""
        return frozenset(itertools.chain.from_iterable(product for product, _ in self.products))

    def value(self, values: Mapping[str, int]) -> int:
        """With a value for each of its variables; grows with each of them."""
        return sum(count * math.prod(values[name] for name in product) for product, count in self.products)


def _term(x: Term | int) -> Term:
    if isinstance(x, Term):
        return x
    if not isinstance(x, int) or x < 0:
        raise ValueError(f"a coefficient must be an integer >= 0, got {x!r}")
    return Term((((), x),))


def _collect(products: Iterable[tuple[tuple[str, ...], int]]) -> Term:
    counts: dict[tuple[str, ...], int] = {}
    for product, count in products:
        counts[product] = counts.get(product, 0) + count
    return Term(tuple(counts.items()))


@dataclass
class Problem:
    """Variables with the values they may take, and what must hold of them."""

    domains: Domains = field(default_factory=dict)
    bounds: list[tuple[Term, Term]] = field(default_factory=list)
    divisions: list[tuple[Term, Term]] = field(default_factory=list)

    def variable(self, name: str, values: Iterable[int]) -> Term:
        """A new variable. Raises ValueError for a name that is taken, no values, or values below 1."""
        domain = tuple(sorted(set(values)))
        if name in self.domains or not domain or domain[0] < 1:
            raise ValueError(f"{name} must be a new name with some values, all >= 1, got {domain[:8]}")
        self.domains[name] = domain
        return Term((((name,), 1),))

    def at_most(self, left: Term | int, right: Term | int) -> None:
        """`left <= right` holds."""
        self.bounds.append((_term(left), _term(right)))

    def divides(self, divisor: Term | int, dividend: Term | int) -> None:
        """`dividend` is a multiple of `divisor`."""
        self.divisions.append((_term(divisor), _term(dividend)))

    def narrowed(self, domains: Domains | None = None) -> Domains | None:
        """Domains without values that no solution has, as far as the constraints tell one by one; None if one
        is empty."""
        now = dict(self.domains if domains is None else domains)
        changed = True
        while changed:
            changed = False
            for fits, constraints in ((_fits_bound, self.bounds), (_fits_division, self.divisions)):
                for left, right in constraints:
                    for name in left.names | right.names:
                        kept = tuple(v for v in now[name] if fits(left, right, {**now, name: (v,)}))
                        if not kept:
                            return None
                        changed |= len(kept) < len(now[name])
                        now[name] = kept
                    if not left.names | right.names and not fits(left, right, now):
                        return None
        return now

    def solutions(self, domains: Domains | None = None) -> Iterator[dict[str, int]]:
        """All of them."""
        now = self.narrowed(domains)
        if now is None:
            return
        open_names = [name for name, domain in now.items() if len(domain) > 1]
        if not open_names:
            yield {name: domain[0] for name, domain in now.items()}
            return
        name = min(open_names, key=lambda name: len(now[name]))
        for value in now[name]:
            yield from self.solutions({**now, name: (value,)})

    def best(self, cost: Callable[[Mapping[str, int]], float]) -> dict[str, int]:
        """The solution of least cost; of equal ones the one with the smallest values. Raises ValueError if
        there is none."""
        found = min(self.solutions(), key=lambda s: (cost(s), sorted(s.items())), default=None)
        if found is None:
            raise ValueError(f"no values of {', '.join(self.domains)} meet all constraints")
        return found


def _fits_bound(left: Term, right: Term, domains: Mapping[str, Sequence[int]]) -> bool:
    least = left.value({name: domains[name][0] for name in left.names})
    return least <= right.value({name: domains[name][-1] for name in right.names})


def _fits_division(divisor: Term, dividend: Term, domains: Mapping[str, Sequence[int]]) -> bool:
    names = sorted(divisor.names | dividend.names)
    if math.prod(len(domains[name]) for name in names) > ENUMERATED:
        return True
    for values in itertools.product(*(domains[name] for name in names)):
        taken = dict(zip(names, values))
        by = divisor.value(taken)
        if by and dividend.value(taken) % by == 0:
            return True
    return False
