"""Orders of nine tiles that differ in many places, by formula.

PGL(2, 8), the maps ``x -> (a x + b) / (c x + d)`` of the projective line over GF(8), moves its nine
points; two of its 504 elements that agree on three points are one. So any two differ on 7 points or
more, which is the most that so many permutations can have. With the field's automorphism, squaring,
it is PGammaL(2, 8): 1,512 permutations that differ in 6 or more.

A cyclic subgroup of order 9 moves every point to every place once. The set is listed coset after
coset of it, so that the first P have every tile at every place P/9 times, rounded up or down: no
single tile tells the order.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt

MOST = 1512
_INFINITY = 8  # the ninth point
_MODULUS = 0b1011  # x^3 + x + 1, by which GF(8)'s polynomials are reduced

Permutation = tuple[int, ...]


@lru_cache(maxsize=1)
def permutations_of_nine() -> npt.NDArray[np.int64]:
    """All 1,512, ``(1512, 9)``; any two of the first 504 differ in at least 7 places."""
    projective = sorted(set(_projective_maps()))
    squares = (*(_times(x, x) for x in range(_INFINITY)), _INFINITY)
    turned = [_after(each, square) for square in _powers(squares) for each in projective]
    cycle = next(each for each in projective if len(_powers(each)) == 9)
    listed: dict[Permutation, None] = {}
    for each in turned:
        for turn in _powers(cycle):
            listed.setdefault(_after(each, turn))
    return np.array(list(listed))


def _projective_maps() -> Iterator[Permutation]:
    field = range(_INFINITY)
    for a, b, c, d in product(field, repeat=4):
        if _times(a, d) != _times(b, c):
            yield tuple(_image(x, a, b, c, d) for x in range(_INFINITY + 1))


def _image(x: int, a: int, b: int, c: int, d: int) -> int:
    above, below = (a, c) if x == _INFINITY else (_times(a, x) ^ b, _times(c, x) ^ d)
    return _times(above, _inverse(below)) if below else _INFINITY


def _times(x: int, y: int) -> int:
    """In GF(8), whose elements are polynomials over GF(2) as bits."""
    product = 0
    for bit in range(3):
        if y >> bit & 1:
            product ^= x << bit
    for bit in (4, 3):
        if product >> bit & 1:
            product ^= _MODULUS << (bit - 3)
    return product


def _inverse(x: int) -> int:
    return next(y for y in range(1, _INFINITY) if _times(x, y) == 1)


def _after(second: Permutation, first: Permutation) -> Permutation:
    return tuple(second[place] for place in first)


def _powers(permutation: Permutation) -> list[Permutation]:
    """From the identity on, until it comes again."""
    powers = [tuple(range(len(permutation)))]
    while (following := _after(permutation, powers[-1])) != powers[0]:
        powers.append(following)
    return powers
