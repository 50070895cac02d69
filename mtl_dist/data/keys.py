"""Random generators by key: every draw is a function of what it is for, never of the process that draws it."""

import hashlib

import numpy as np
from numpy.random.bit_generator import ISeedSequence


class _Digest(ISeedSequence):
    """Seeds a bit generator with the bits of a digest: 256, as many as PCG64 asks for."""

    def __init__(self, digest: bytes):
        self.digest = digest

    def generate_state(self, n_words: int, dtype=np.uint32) -> np.ndarray:
        """Return the first words of it."""
        return np.frombuffer(self.digest, dtype, n_words)


def generator(*key: object) -> np.random.Generator:
    """Return a fresh generator for a key such as (seed, task, epoch, clip id, purpose).

    Equal keys give equal draws on every machine; different keys give independent ones (256-bit BLAKE2b of the key's
    text seeds a PCG64 generator).
    """
    text = "\x1f".join(map(str, key)).encode()
    return np.random.Generator(
        np.random.PCG64(_Digest(hashlib.blake2b(text, digest_size=32).digest()))
    )
