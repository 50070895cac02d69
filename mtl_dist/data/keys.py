"""Random generators by key: every draw is a function of what it is for, never of the process that draws it."""

import hashlib

import numpy as np


def generator(*key: object) -> np.random.Generator:
    """Return a fresh generator for a key such as (seed, task, epoch, clip id, purpose).

    Equal keys give equal draws on every machine; different keys give independent ones (128-bit BLAKE2b of the key's
    text seeds a Philox counter generator).
    """
    text = "\x1f".join(str(part) for part in key).encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest, "little")))
