"""ML-KEM-768 (FIPS 203) with chosen randomness, for known answers: libraries offer encapsulation with their own only.

It is slow and not constant-time. `make_formats.py` compares its key pair and its shared secret with those of a library.
"""

import hashlib
from collections.abc import Iterator

N, Q, K, ETA, DU, DV = 256, 3329, 3, 2, 10, 4

Poly = list[int]


def _bit_reversed(value: int) -> int:
    return int(f"{value:07b}"[::-1], 2)


ZETAS = [pow(17, _bit_reversed(i), Q) for i in range(128)]
GAMMAS = [pow(17, 2 * _bit_reversed(i) + 1, Q) for i in range(128)]


# --- encoding (section 4.2) -------------------------------------------------------------------------------------------


def encode(values: Poly, bits: int) -> bytes:
    number = sum(value << (bits * place) for place, value in enumerate(values))
    return number.to_bytes(32 * bits, "little")


def decode(data: bytes, bits: int) -> Poly:
    number = int.from_bytes(data, "little")
    mask = (1 << bits) - 1
    modulus = Q if bits == 12 else 1 << bits
    return [(number >> (bits * place) & mask) % modulus for place in range(N)]


def compress(values: Poly, bits: int) -> Poly:
    return [((value << bits) + Q // 2) // Q % (1 << bits) for value in values]


def decompress(values: Poly, bits: int) -> Poly:
    return [(value * Q + (1 << (bits - 1))) >> bits for value in values]


# --- sampling (section 4.2.2) -----------------------------------------------------------------------------------------


def sample_uniform(seed: bytes) -> Poly:
    stream = hashlib.shake_128(seed).digest(3 * 1365)
    found: Poly = []
    for start in range(0, len(stream), 3):
        a, b, c = stream[start : start + 3]
        found += [value for value in (a + 256 * (b % 16), b // 16 + 16 * c) if value < Q]
    return found[:N]


def noise(seed: bytes, first: int) -> Iterator[Poly]:
    """PRF and SamplePolyCBD with eta 2, for the counters from `first` on."""
    while True:
        number = int.from_bytes(hashlib.shake_256(seed + bytes([first])).digest(64 * ETA), "little")
        bits = [number >> place & 1 for place in range(4 * N)]
        yield [(bits[4 * i] + bits[4 * i + 1] - bits[4 * i + 2] - bits[4 * i + 3]) % Q for i in range(N)]
        first += 1


# --- the number-theoretic transform (section 4.3) ---------------------------------------------------------------------


def ntt(values: Poly) -> Poly:
    f, index, length = list(values), 1, 128
    while length >= 2:
        for start in range(0, N, 2 * length):
            for j in range(start, start + length):
                t = ZETAS[index] * f[j + length]
                f[j], f[j + length] = (f[j] + t) % Q, (f[j] - t) % Q
            index += 1
        length //= 2
    return f


def inverse_ntt(values: Poly) -> Poly:
    f, index, length = list(values), 127, 2
    while length <= 128:
        for start in range(0, N, 2 * length):
            for j in range(start, start + length):
                t = f[j]
                f[j], f[j + length] = (t + f[j + length]) % Q, ZETAS[index] * (f[j + length] - t) % Q
            index -= 1
        length *= 2
    return [value * 3303 % Q for value in f]


def add(*polys: Poly) -> Poly:
    return [sum(values) % Q for values in zip(*polys, strict=True)]


def multiply(a: Poly, b: Poly) -> Poly:
    product: Poly = []
    for i in range(128):
        (a0, a1), (b0, b1) = a[2 * i : 2 * i + 2], b[2 * i : 2 * i + 2]
        product += [(a0 * b0 + a1 * b1 * GAMMAS[i]) % Q, (a0 * b1 + a1 * b0) % Q]
    return product


def dot(left: list[Poly], right: list[Poly]) -> Poly:
    return add(*(multiply(a, b) for a, b in zip(left, right, strict=True)))


def matrix(rho: bytes) -> list[list[Poly]]:
    return [[sample_uniform(rho + bytes([j, i])) for j in range(K)] for i in range(K)]


# --- the scheme (sections 5 and 6) ------------------------------------------------------------------------------------


def public_key(seed: bytes) -> bytes:
    """ML-KEM.KeyGen_internal: the encapsulation key of a seed d | z of 64 bytes."""
    digest = hashlib.sha3_512(seed[:32] + bytes([K])).digest()
    rho, sigma = digest[:32], digest[32:]
    polys = noise(sigma, 0)
    s = [ntt(next(polys)) for _ in range(K)]
    e = [ntt(next(polys)) for _ in range(K)]
    t = [add(dot(row, s), error) for row, error in zip(matrix(rho), e, strict=True)]
    return b"".join(encode(one, 12) for one in t) + rho


def encapsulate(public: bytes, message: bytes) -> tuple[bytes, bytes]:
    """ML-KEM.Encaps_internal: (shared secret, ciphertext) for 32 chosen random bytes."""
    digest = hashlib.sha3_512(message + hashlib.sha3_256(public).digest()).digest()
    shared, coins = digest[:32], digest[32:]
    t = [decode(public[384 * i : 384 * (i + 1)], 12) for i in range(K)]
    transposed = list(zip(*matrix(public[-32:]), strict=True))
    polys = noise(coins, 0)
    y = [ntt(next(polys)) for _ in range(K)]
    u = [add(inverse_ntt(dot(list(row), y)), next(polys)) for row in transposed]
    text = decompress(decode(message, 1), 1)
    v = add(inverse_ntt(dot(t, y)), next(polys), text)
    sealed = b"".join(encode(compress(one, DU), DU) for one in u) + encode(compress(v, DV), DV)
    return shared, sealed


def message(seed: bytes, ciphertext: bytes) -> bytes:
    """K-PKE.Decrypt: the random bytes that were chosen for a ciphertext, to the key pair of a seed d | z."""
    polys = noise(hashlib.sha3_512(seed[:32] + bytes([K])).digest()[32:], 0)
    s = [ntt(next(polys)) for _ in range(K)]
    u = [decompress(decode(ciphertext[320 * i : 320 * (i + 1)], DU), DU) for i in range(K)]
    v = decompress(decode(ciphertext[320 * K :], DV), DV)
    masked = inverse_ntt(dot(s, [ntt(one) for one in u]))
    return encode(compress([(a - b) % Q for a, b in zip(v, masked, strict=True)], 1), 1)
