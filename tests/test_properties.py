"""Random calls of every op against its float64 reference, outputs and gradients, on every device under test.

RLHF_FAST_FUZZ=N draws N calls an op (`make fuzz`); the default is a fixed share with a fixed seed.
"""

import os
import random

import pytest

from tests.cases import OPS, check

CALLS = int(os.environ.get("RLHF_FAST_FUZZ", "120"))


@pytest.mark.parametrize("name", OPS)
def test_random_calls_match_the_reference(name, device, record_property):
    rng = random.Random(f"{name} {os.environ.get('RLHF_FAST_SEED', '0')}")
    worst = 0.0
    for number in range(CALLS):
        call = OPS[name].draw(rng)
        try:
            worst = max(worst, check(name, call, device))
        except AssertionError as error:
            raise AssertionError(f"call {number}, {name}({call}): {error}") from None
    record_property("worst_epsilons", worst)
