"""A random order of 0 to n-1 that needs no memory of size n: each place is computed by itself.

A Feistel network (Luby and Rackoff 1988) is a bijection whatever its round function is: a number is
halved into (left, right), and each round makes it (right, left xor f(right)), which can be undone.
It permutes all numbers of an even number of bits; where the result is n or more, it is applied
again until it is below n (cycle walking, Black and Rogaway 2002): a bijection of 0 to n-1 again.

A first reader may take it on trust: shuffled(range(n), n, key) is 0 to n-1 in an order of its own
for each key.
"""

import numpy as np

ROUNDS = 8


def shuffled(places: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """[m] int64: what stands at these places (each from 0 to n-1) of the order that belongs to
    `key`, non-negative integers such as (seed, epoch)."""
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))  # bits; the domain is below 4 n
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    values = _feistel(np.asarray(places).astype(np.uint64), half, keys)
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = values >> half, values & _low(half)
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & _low(half))
    return left << half | right


def _low(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's last step (Steele, Lea, Flood 2014): every bit out depends on every bit in."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
