"""Log-probs (and entropy) of labels from logits, beside what eager PyTorch code does."""

import torch

from bench import peer_ops
from bench.common import Case, backward, rows, run, wide
from rlhf_fast import gather_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (
    [(4, 16, 82), (8, 64, 32_000), (1, 1024, 50_257), (1, 256, 151_936)]
    if DEVICE == "cpu"
    else [(4, 16, 82), (1, 8192, 32_000), (1, 8192, 50_257), (1, 8192, 151_936)]
)


def eager(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def eager_entropy(logits, labels):
    log_p = wide(logits).log_softmax(-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def eager_entropy_of_some(logits, labels):
    log_p = wide(logits).log_softmax(-1)
    p = log_p.exp()
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(p * log_p.masked_fill(p == 0, 0)).sum(-1)


def case(name, size, dtype, contenders, passes, some=False):
    b, t, v = size

    def inputs(generator):
        logits = (torch.randn(b, t, v, generator=generator) * 3).to(dtype).to(DEVICE)
        labels = torch.randint(0, v, (b, t), generator=generator).to(DEVICE)
        if some:  # as of constrained decoding, or of a vocabulary padded to a round size
            logits[..., v // 2 :] = -torch.inf
            labels %= v // 2
        return logits, labels

    kind = str(dtype)[6:]
    moved = passes * b * t * v * dtype.itemsize
    return Case(f"{name} {kind}", f"{b}x{t}x{v}", inputs, contenders, 0.1 if dtype == torch.bfloat16 else 1e-4, moved)


def ours_entropy(logits, labels):
    return gather_logprobs(logits, labels, with_entropy=True)


def inplace(logits, labels):
    return gather_logprobs(logits, labels, inplace_backward=True)


LOGPROBS, ENTROPY = peer_ops.found(peer_ops.LOGPROBS), peer_ops.found(peer_ops.ENTROPY)
CASES = []
for size in SIZES:
    # What the compiler makes takes half a minute a case. On the CPU peers loop, and the whole table takes long enough.
    compiled = {"torch.compile": torch.compile(eager)} if size[-1] == 50_257 else {}
    if size[-1] == 50_257:
        contenders = {"rlhf_fast": ours_entropy, "eager": eager_entropy_of_some}
        CASES.append(case("logprobs + entropy, half of V at -inf", size, torch.float32, contenders, 1, some=True))
    peers = size[-1] == 50_257 or (DEVICE == "cuda" and size[-1] > 82)
    others = compiled | (LOGPROBS if peers else {})
    for dtype in (torch.float32, torch.bfloat16):
        both = {
            "rlhf_fast": ours_entropy,
            "eager": eager_entropy,
            **(ENTROPY if peers else {}),
        }
        CASES += [
            case("logprobs", size, dtype, {"rlhf_fast": gather_logprobs, "eager": eager, **others}, 1),
            case("logprobs + entropy", size, dtype, both, 1),
            case(
                "logprobs, forward + backward",
                size,
                dtype,
                {
                    "rlhf_fast": backward(gather_logprobs),
                    "eager": backward(eager),
                    **{who: backward(function) for who, function in others.items()},
                },
                3,
            ),
            case(
                "logprobs, forward + in-place backward",
                size,
                dtype,
                {"rlhf_fast": backward(inplace, copy=True), "eager": backward(eager, copy=True)},
                3,
            ),
        ]


@rows(CASES)
def bench_gather_logprobs(benchmark, case, who):
    run(benchmark, case, who)
