"""GAE, beside the loop over t in torch that verl, NeMo-RL and AReaL run on the CPU."""

import torch

from bench import peer_ops
from bench.common import Case, rows, run
from rlhf_fast import gae

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def torch_loop(rewards, values, mask, gamma=1.0, lam=0.95):
    """The recursion of verl's compute_gae_advantage_return without its whitening: one step of a few small kernels a column."""
    kept = mask.float()
    next_value, advantage, columns = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        m, value = kept[:, t], values[:, t]
        step = rewards[:, t] + gamma * next_value - value + gamma * lam * advantage
        next_value = value * m + (1 - m) * next_value
        advantage = step * m + (1 - m) * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages * kept, (advantages + values) * kept


def case(name, b, t, contenders):
    def inputs(generator):
        rewards, values = (torch.randn(b, t, generator=generator).to(DEVICE) for _ in range(2))
        # Whitened padding is something else to each.
        lengths = torch.randint(1, t + 1, (b, 1), generator=generator) if name == "gae" else torch.tensor(t)
        return rewards, values, (torch.arange(t).expand(b, t) < lengths).to(DEVICE)

    return Case(name, f"{b}x{t}", inputs, contenders, 1e-3, 17 * b * t)


LOOP = {"rlhf_fast": gae, "torch loop": torch_loop}
CASES = [case("gae", b, t, LOOP) for b, t in ((4, 16), (256, 2048), (1024, 8192))]
if peers := peer_ops.found(peer_ops.WHITENED_GAE):
    CASES += [case("gae, whitened", 256, 2048, {"rlhf_fast": peer_ops.whitened_gae, **peers})]


@rows(CASES)
def bench_gae(benchmark, case, who):
    run(benchmark, case, who)
