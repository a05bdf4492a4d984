"""Log-probabilities over a kept set of tokens: the kernels behind `gather_logprobs(..., kept=...)`."""

import torch
from torch import Tensor

from rlhf_fast.ops import _logits
from rlhf_fast.ops._common import Kernel, register

kept_logprobs = Kernel("kept_logprobs")
_backward = Kernel("kept_logprobs_backward")
_backward_inplace = Kernel("kept_logprobs_backward_inplace")


def keep_only(z: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """z [..., V] with -inf off the ids of kept [..., K], in plain torch. A row whose label is not kept gets no gradient."""
    vocab = z.shape[-1]
    inside = torch.zeros(
        (*z.shape[:-1], vocab + 1), dtype=torch.bool, device=z.device
    )  # the last column takes the padding
    inside = inside.scatter(-1, kept.long().where(kept >= 0, vocab), True)[..., :vocab]
    has_label = (kept == labels.unsqueeze(-1)).any(-1, keepdim=True)
    return torch.where(has_label, z, z.detach()).masked_fill(~inside, -torch.inf)


register(
    "kept_logprobs",
    lambda logits, labels, *rest: _logits.fake_outputs(logits, labels, rest[-2]),
    hidden=1,
    differentiable=1,
    setup_context=_logits.setup_context,
    backward=_logits.formula(_backward, _backward_inplace, inputs=11),
    function="gather_logprobs",
)
register("kept_logprobs_backward", lambda grad_logprobs, grad_entropy, logits, *rest: logits.new_empty(logits.shape))
register("kept_logprobs_backward_inplace", lambda *args: None)
