"""Log-probs of labels from hidden states, forward and backward, beside eager code that makes all logits."""

import torch

from bench.bench_logprob import DEVICE, eager
from bench.common import Case, rows, run
from rlhf_fast import linear_logprobs

SIZES = [(512, 128, 32_000), (512, 128, 151_936)] if DEVICE == "cpu" else [(8192, 4096, 151_936)]


def eager_linear(hidden, weight, labels):
    return eager(torch.nn.functional.linear(hidden, weight).float(), labels)


def gradients(function):
    def both(hidden, weight, labels):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        function(*leaves, labels).sum().backward()
        return [leaf.grad for leaf in leaves]

    return both


def case(size, dtype):
    tokens, width, vocab = size

    def inputs(generator):
        hidden = torch.randn(tokens, width, generator=generator).to(dtype).to(DEVICE)
        weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype).to(DEVICE)
        return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator).to(DEVICE)

    name = f"log-probs from hidden states, forward + backward {str(dtype)[6:]}"
    contenders = {"rlhf_fast": gradients(linear_logprobs), "eager": gradients(eager_linear)}
    return Case(name, "x".join(map(str, size)), inputs, contenders, 0.1 if dtype == torch.bfloat16 else 1e-4)


CASES = [case(size, dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)]


@rows(CASES)
def bench_linear_logprobs(benchmark, case, who):
    run(benchmark, case, who)
