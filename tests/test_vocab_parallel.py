"""Log-probs from a vocabulary spread over processes; what the ranks do together is in vocab_parallel_ranks.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast import gather_logprobs, vocab_parallel_logprobs
from tests import emulate

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree_with_the_whole(ranks):
    emulate.load()  # compiled here, once
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*launch, "-m", "tests.vocab_parallel_ranks"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def draw(*batch, vocab=50, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(*batch, vocab, generator=generator) * 3).to(dtype).to(device)
    return logits, torch.randint(0, vocab, batch, generator=generator).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_process_alone_has_the_bits_of_gather_logprobs(dtype, device):
    logits, labels = draw(2, 3, 2, vocab=2500, dtype=dtype, device=device)
    labels[0, 0, 0] = -100
    options = {
        "temperature": torch.rand(2, 3, 2).to(device) + 0.5,
        "softcap": 5.0,
        "mask": torch.rand(2, 3, 2).to(device),
    }
    for inplace in (False, True):
        results = []
        for function in (gather_logprobs, vocab_parallel_logprobs):
            leaf = logits.clone().requires_grad_()
            out = function(leaf, labels, with_entropy=True, inplace_backward=inplace, **options)
            torch.autograd.backward(out, [torch.ones_like(o) for o in out])
            results.append([*out, leaf.grad])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradcheck():
    logits, labels = draw(2, 3, vocab=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_logprobs(x, labels, temperature=0.7, with_entropy=True), logits.requires_grad_()
    )


def test_no_second_backward_over_an_in_place_gradient(device):
    logits, labels = draw(3, device=device)
    out = vocab_parallel_logprobs(logits.requires_grad_(), labels, inplace_backward=True)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"vocab_parallel_logprobs\(inplace_backward=True\): the first backward"):
        out.sum().backward()


def test_no_second_derivative():
    logits, labels = draw(3)
    logprobs = vocab_parallel_logprobs(logits.requires_grad_(), labels)
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="vocab_parallel_logprobs"):
        gradient.sum().backward()


def test_compiles_without_a_graph_break(device):
    logits, labels = draw(2, 3, device=device)
    results = []
    for function in (
        vocab_parallel_logprobs,
        torch.compile(vocab_parallel_logprobs, backend="aot_eager", fullgraph=True),
    ):
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = function(leaf, labels, with_entropy=True)
        (logprobs + entropy).sum().backward()
        results.append((logprobs, entropy, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


BAD = [
    ((None, [0]), {}, TypeError, "`logits` must be a tensor"),
    (([1.0], 0), {}, TypeError, "`labels` must be a tensor"),
    ((1.0, [0]), {}, ValueError, r"`logits` must be \[..., v\]"),
    (([[1.0, 2.0]], [0, 1]), {}, ValueError, r"`labels` has shape \[2\] but must have the shape of `logits`"),
    (([[1.0, 2.0]], [0.5]), {}, TypeError, "`labels` must be int64 or int32"),
    (([[1.0, 2.0]], [0]), {"group": 3}, TypeError, "`group` must be a process group or None, got int"),
    (([[1.0, 2.0]], [0]), {"vocab_start": -1}, ValueError, "`vocab_start` must be at least 0, got -1"),
    (([[1.0, 2.0]], [0]), {"vocab_start": 1.0}, TypeError, "`vocab_start` must be an integer"),
    (([[1.0, 2.0]], [0]), {"vocab_start": 3}, ValueError, r"must follow one another from 0 on, but are, .*, \[3, 5\)"),
    (([[1.0, 2.0]], [0]), {"temperature": 0}, ValueError, "`temperature` must be finite and above 0"),
    (([[1.0, 2.0]], [2]), {}, ValueError, r"`labels` holds 2 at flat position 0; a label must be in \[0, 2\)"),
    (([[[[[1.0, 2.0]]]]], [[[0]]]), {}, ValueError, r"`labels` has shape \[1, 1, 1\] but must have \[1, 1, 1, 1\]"),
]


@pytest.mark.parametrize(("args", "kwargs", "kind", "text"), BAD)
def test_bad_input_is_refused(args, kwargs, kind, text):
    logits, labels = args
    logits = torch.tensor(logits) if isinstance(logits, (list, float)) else logits
    labels = torch.tensor(labels) if isinstance(labels, list) else labels
    with pytest.raises(kind, match=f"^vocab_parallel_logprobs: .*{text}"):
        vocab_parallel_logprobs(logits, labels, **kwargs)
