import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What torch.compile keeps on disk knows an op by its forward schema: it would bring back the gradient of an earlier version.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

from rlhf_fast.ops import _common
from tests import emulate

# "cpu": the CPU kernels. "emulated": the CUDA kernels run on the CPU. "cuda": the CUDA kernels on a GPU.
DEVICES = ["cpu", "emulated", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """The torch device to put tensors on, with the ops routed to the kernels under test."""
    if request.param != "emulated":
        yield request.param
        return
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", os.environ.get("CUDA_ON_CPU_ORDER", "shuffled"))
    with _common.namespace(emulate.load()):
        yield "cpu"
