"""Fused operations for RLHF in PyTorch, on CPU and CUDA, and (in rlhf_fast.train) the three training stages wired on them."""

import torch  # before _C, which finds libtorch through it

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    raise ImportError(
        f"rlhf_fast needs torch 2.10 or later, and this is torch {torch.__version__}: pip install -U torch"
    )
try:
    from rlhf_fast import _C
except ImportError as error:
    raise ImportError(
        f"rlhf_fast's compiled part, rlhf_fast._C, did not load ({error}). It is never replaced by eager PyTorch. "
        "In a source checkout, build it: pip install --no-build-isolation . (needs a C++17 compiler). Otherwise reinstall the "
        "wheel for this Python version, and import from outside the source folder."
    ) from error

from rlhf_fast.adapters import patch, unpatch
from rlhf_fast.ops import (
    dpo_loss,
    gae,
    gather_logprobs,
    group_advantages,
    kl_penalty,
    linear_logprobs,
    linear_ppo_loss,
    masked_mean,
    masked_whiten,
    ppo_loss_from_logits,
    ppo_policy_loss,
    ppo_value_loss,
    reward_pair_loss,
    shape_rewards,
)

__version__ = _C.build_info()["version"]


def build_info() -> dict:
    """How the compiled part was built: version, compiler, CUDA version and architectures, and the CPU level in use here.

    >>> build_info()["cpu_level"]  # doctest: +SKIP
    'x86-64-v3'
    """
    return {**_C.build_info(), "torch": torch.__version__}


__all__ = [
    "__version__",
    "build_info",
    "dpo_loss",
    "gae",
    "gather_logprobs",
    "group_advantages",
    "kl_penalty",
    "linear_logprobs",
    "linear_ppo_loss",
    "masked_mean",
    "masked_whiten",
    "patch",
    "ppo_loss_from_logits",
    "ppo_policy_loss",
    "ppo_value_loss",
    "reward_pair_loss",
    "shape_rewards",
    "unpatch",
]
