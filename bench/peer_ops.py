"""The functions of peers that do what one of our ops does, as contenders of the benchmarks, where they are installed.

`make peers` puts TRL, Liger and Apple's cut cross-entropy into build/peers/ops and verl into build/peers/verl-0.9; what the
running environment has itself comes first, as flash-attn, which must be built for its torch, has to. Nothing is installed for a
run. A peer is left out where its kernels need a GPU that is not there, and where it fails or disagrees on a small input.

    python -m bench.peer_ops        which of them are here, and why the others are not
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench import linear_peers
from bench.common import DEVICE, flat
from bench.contenders import ROOT
from rlhf_fast import gae, gather_logprobs, linear_logprobs

PLACES = [
    ROOT / "build/peers/ops",
    ROOT / f"build/peers/verl-0.9/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages",
]
sys.path += [str(place) for place in PLACES if place.is_dir()]
Maker = Callable[[], Callable]  # imports a peer; returns its function, of the inputs that ours takes


class Task(NamedTuple):
    """What ours and its peers do, and a small input to try them on."""

    name: str
    ours: Callable
    peers: dict[str, Maker]  # by the name of the distribution
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]


def flat_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


# ------------------------------------------------------------------------------------------- (logits, labels) -> log-probs


def trl_logprobs() -> Callable:
    """Its Triton kernel on a GPU, a loop over sequences without one."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def verl_logprobs() -> Callable:
    """flash-attn's kernel where that is installed, else a loop over the first dimension."""
    from verl.utils.torch_functional import logprobs_from_logits

    return lambda logits, labels: logprobs_from_logits(logits, labels, inplace_backward=False)


def flash_attn_logprobs() -> Callable:
    need_gpu()
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda logits, labels: -cross_entropy_loss(*flat_rows(logits, labels))[0].view(labels.shape)


def liger_logprobs() -> Callable:
    """Writes the gradient over the logits in its forward pass."""
    need_gpu()
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, labels: -liger_cross_entropy(*flat_rows(logits, labels), reduction="none").view(labels.shape)


def few_logits(draw):
    return torch.randn(3, 40, 300, generator=draw), torch.randint(0, 300, (3, 40), generator=draw)


LOGPROBS = Task(
    "log-probs",
    gather_logprobs,
    {
        "trl": trl_logprobs,
        "verl": verl_logprobs,
        "flash-attn": flash_attn_logprobs,
        "liger-kernel": liger_logprobs,
    },
    few_logits,
)


# ------------------------------------------------------------------------------- (logits, labels) -> log-probs and entropy


def trl_entropy() -> Callable:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


def verl_entropy() -> Callable:
    from verl.utils.torch_functional import entropy_from_logits

    logprobs = verl_logprobs()
    return lambda logits, labels: (logprobs(logits, labels), entropy_from_logits(logits))


ENTROPY = Task(
    "log-probs and entropy",
    lambda logits, labels: gather_logprobs(logits, labels, with_entropy=True),
    {"trl": trl_entropy, "verl": verl_entropy},
    few_logits,
)


# ---------------------------------------------------------------------------------- (hidden, weight, labels) -> log-probs


def verl_linear() -> Callable:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    fused = FusedLinearForPPO()
    return lambda hidden, weight, labels: fused(hidden, weight, labels)[0]


def liger_linear() -> Callable:
    need_gpu()
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return lambda *inputs: -LigerFusedLinearScaledCrossEntropyFunction.apply(*inputs)


def apple_linear() -> Callable:
    """Without the filter that leaves out small gradients, which no other contender leaves out."""
    need_gpu()
    from cut_cross_entropy import linear_cross_entropy

    return lambda *inputs: -linear_cross_entropy(*inputs, reduction="none", filter_eps=None)


def few_hidden_states(draw):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # all that some have a kernel for
    hidden, weight = torch.randn(64, 128, generator=draw), torch.randn(300, 128, generator=draw) / 8
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, 300, (64,), generator=draw)


LINEAR = Task(
    "log-probs from hidden states",
    linear_logprobs,
    {"trl": linear_peers.trl, "verl": verl_linear, "liger-kernel": liger_linear, "cut-cross-entropy": apple_linear},
    few_hidden_states,
)


# ------------------------------------------------------------------- (rewards, values, mask) -> whitened advantages, returns


def verl_gae() -> Callable:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    return lambda rewards, values, mask: compute_gae_advantage_return(rewards, values, mask.float(), 1.0, 0.95)


def whitened_gae(rewards, values, mask):
    return gae(rewards, values, mask, whiten=True)


def few_rewards(draw):
    """Without padding, where each has something else."""
    return *(torch.randn(3, 40, generator=draw) for _ in range(2)), torch.ones(3, 40, dtype=torch.bool)


WHITENED_GAE = Task("gae, whitened", whitened_gae, {"verl": verl_gae}, few_rewards)


# ---------------------------------------------------------------------------------------------------------- what is here


def need_gpu() -> None:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError("its kernels need a GPU, or TRITON_INTERPRET=1 and much time")


def found(task: Task, report: Callable[[str], None] = lambda line: None) -> dict[str, Callable]:
    """{"trl 1.16.0": function}: of the peers those that are here and do it, backward as well where they have a gradient."""
    inputs = [x.to(DEVICE) for x in task.inputs(torch.Generator().manual_seed(0))]
    want, here = outcome(task.ours, inputs), {}
    for name, make in task.peers.items():
        try:
            function = make()
            error = max((a - b).abs().max().item() for a, b in zip(outcome(function, inputs), want, strict=False))
            if not error < (0.05 if inputs[0].dtype == torch.bfloat16 else 1e-4):
                raise ArithmeticError(f"differs from ours by up to {error:.1e}")
            here[f"{name} {importlib.metadata.version(name)}"] = function
            line = f"differs from ours by up to {error:.1e}"
        except Exception as failure:  # whatever is wrong with it
            line = f"left out, {type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        report(f"{name}: {line}")
    return here


def outcome(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and, where there is one, the gradient of the first input, in float32."""
    first, *rest = (x.clone() for x in inputs)
    leaf = first.requires_grad_()
    result = function(leaf.view_as(leaf), *rest)  # some write over their input, which a leaf does not allow
    outputs = flat(result)
    if outputs[0].requires_grad:
        outputs += torch.autograd.grad(outputs[0].sum(), leaf)
    return [x.detach().float() for x in outputs]


if __name__ == "__main__":
    for task in (LOGPROBS, ENTROPY, LINEAR, WHITENED_GAE):
        found(task, lambda line, task=task: print(f"{task.name}: {line}"))
