"""Log-probs from slices of the vocabulary: by tiles of a linear layer (`linear_logprobs`), or one slice a rank.

A slice's statistics are a row's (max, sum of exp, sum of x exp, the label's logit), [rows, 4] in float64, the sums relative to
the maximum. They go on from slice to slice (`statistics_into`) or are combined in their order (`combine`); the gradient of a
slice follows from the `row_stats` of the whole. On the CPU slices that start at multiples of 2048 and go on in order give the
bits of `gather_logprobs` over all of V.
"""

import torch

from rlhf_fast.ops import _logits
from rlhf_fast.ops._common import Kernel, register


class SliceKernels:
    """The kernels, in the name of the public function that errors speak of."""

    def __init__(self, function: str):
        self.statistics = Kernel("logprob_slice_statistics", function)
        self.statistics_into = Kernel("logprob_slice_statistics_into", function)
        self.combine = Kernel("logprob_slices_combine", function)
        self.backward = Kernel("logprob_slice_backward", function)
        self.backward_inplace = Kernel("logprob_slice_backward_inplace", function)


def _fake_combine(partials, labels, *options):
    *_, with_entropy, wide = options
    like = partials.new_empty(0, dtype=torch.float64 if wide else torch.float32)
    return _logits.fake_outputs(like, labels, with_entropy)


register(
    "logprob_slice_statistics",
    lambda logits, labels, *rest: labels.new_empty((labels.numel(), 4), dtype=torch.float64),
)
register("logprob_slice_statistics_into", lambda *args: None)
register("logprob_slices_combine", _fake_combine)
register("logprob_slice_backward", lambda grad_logprobs, grad_entropy, logits, *rest: logits.new_empty(logits.shape))
register("logprob_slice_backward_inplace", lambda *args: None)
