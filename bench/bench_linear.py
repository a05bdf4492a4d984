"""Log-probs of labels and the policy loss from hidden states, forward and backward, beside eager code that makes all logits."""

import torch

from bench import peer_ops
from bench.bench_logprob import DEVICE, eager
from bench.bench_ppo_loss import eager_policy
from bench.common import Case, rows, run, wide
from rlhf_fast import linear_logprobs, linear_ppo_loss, ppo_policy_loss

SIZES = [(512, 128, 32_000), (512, 128, 151_936)] if DEVICE == "cpu" else [(8192, 4096, 151_936)]


def eager_linear(hidden, weight, labels):
    return eager(wide(torch.nn.functional.linear(hidden, weight)), labels)


def one_call(hidden, weight, labels, old_logprobs, advantages):
    tokens = (t.unsqueeze(0) for t in (labels, old_logprobs, advantages))
    return linear_ppo_loss(hidden.unsqueeze(0), weight, *tokens)[0]


def two_calls(hidden, weight, labels, *tokens):
    return ppo_policy_loss(*(t.unsqueeze(0) for t in (linear_logprobs(hidden, weight, labels), *tokens)))[0]


def eager_loss(hidden, weight, labels, *tokens):
    tokens = (eager_linear(hidden, weight, labels), *tokens, torch.ones_like(labels))
    return eager_policy(*(t.unsqueeze(0) for t in tokens))[0]


def gradients(function):
    def both(hidden, weight, *rest):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        function(*leaves, *rest).sum().backward()
        return [leaf.grad for leaf in leaves]

    return both


def case(size, dtype, what, contenders):
    tokens, width, vocab = size

    def inputs(generator):
        hidden = torch.randn(tokens, width, generator=generator).to(dtype).to(DEVICE)
        weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype).to(DEVICE)
        labels = torch.randint(0, vocab, (tokens,), generator=generator).to(DEVICE)
        if what == "log-probs":
            return hidden, weight, labels
        old_logprobs = linear_logprobs(hidden, weight, labels) + 0.1
        return hidden, weight, labels, old_logprobs, torch.randn(tokens, generator=generator).to(DEVICE)

    name = f"{what} from hidden states, forward + backward {str(dtype)[6:]}"
    contenders = {who: gradients(function) for who, function in contenders.items()}
    return Case(name, "x".join(map(str, size)), inputs, contenders, 0.1 if dtype == torch.bfloat16 else 1e-4)


LOGPROBS = {"rlhf_fast": linear_logprobs, "eager": eager_linear}
PEERS = peer_ops.found(peer_ops.LINEAR)
LOSSES = {"rlhf_fast": one_call, "our two calls": two_calls, "eager": eager_loss}
CASES = []
for size in SIZES:
    for dtype in (torch.float32, torch.bfloat16):
        # On a GPU some take 16-bit numbers alone. On the CPU bench.linear_peers sees the larger vocabulary, and memory.
        peers = dtype == torch.bfloat16 if DEVICE == "cuda" else size[-1] == 32_000
        CASES += [
            case(size, dtype, "log-probs", LOGPROBS | (PEERS if peers else {})),
            case(size, dtype, "policy loss", LOSSES),
        ]


@rows(CASES)
def bench_linear_logprobs(benchmark, case, who):
    run(benchmark, case, who)
