"""Rewards that know nothing: controls for `reward_funcs`."""

import hashlib


def coin(response: str, gold: str) -> float:
    """1 or 0 by a hash of the text, so that a resumed run draws the same."""
    return float(hashlib.blake2b(response.encode()).digest()[0] % 2)
