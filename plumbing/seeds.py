"""Seeded randomness: a generator for each purpose."""

import numpy as np
import torch


def generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator for one purpose: different (seed, *stream) give independent numbers."""
    state = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2 ** 63)
