"""GAE, beside the loop over t in torch that verl, NeMo-RL and OpenRLHF run on the CPU."""

import torch

from bench.common import Case, rows, run
from rlhf_fast import gae
from rlhf_fast.ops.gae import gae_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(b, t):
    def inputs(generator):
        rewards, values = (torch.randn(b, t, generator=generator).to(DEVICE) for _ in range(2))
        lengths = torch.randint(1, t + 1, (b, 1), generator=generator)
        return rewards, values, (torch.arange(t) < lengths).to(DEVICE)

    return Case("gae", f"{b}x{t}", inputs, {"rlhf_fast": gae, "torch loop": gae_reference}, 1e-3, 17 * b * t)


@rows([case(b, t) for b, t in ((4, 16), (256, 2048), (1024, 8192))])
def bench_gae(benchmark, case, who):
    run(benchmark, case, who)
