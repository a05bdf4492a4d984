"""Random calls of every op against its float64 reference, outputs and gradients, on every device under test; and the same bits
on any number of threads, alone or in a batch, padded or packed.

RLHF_FAST_FUZZ=N draws N calls an op instead of the fixed share with a fixed seed; tests/fuzz.py (`make fuzz`) draws thousands.
"""

import os
import random

import pytest

from tests.cases import OPS
from tests.fuzz import examine_closely

CALLS = int(os.environ.get("RLHF_FAST_FUZZ", "120"))


@pytest.mark.parametrize("name", OPS)
def test_random_calls_match_the_reference(name, device, record_property):
    rng = random.Random(f"{name} {os.environ.get('RLHF_FAST_SEED', '0')}")
    worst = 0.0
    for number in range(CALLS):
        call = OPS[name].draw(rng)
        try:
            outcome = examine_closely(name, call, device, number)
        except AssertionError as error:
            raise AssertionError(f"call {number}, {name}({call}): {error}") from None
        worst = max(worst, outcome.output_error, outcome.gradient_error)
    record_property("worst_epsilons", worst)
