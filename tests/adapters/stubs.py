"""Stand-ins for what a library imports and this machine cannot have: packages that need a GPU, and NeMo-RL's loggers.

A package that is installed is left alone. The stand-ins let a module be imported; what is taken from them does nothing, but for
flash-attn's padding, which transformers has in plain PyTorch.
"""

import importlib.machinery
import importlib.util
import sys
from unittest.mock import MagicMock

NAMES = {
    "openrlhf": "flash_attn flash_attn.bert_padding flash_attn.utils flash_attn.utils.distributed vllm vllm.inputs vllm.utils",
    "nemo_rl": "pynvml mlflow swanlab wandb matplotlib uvicorn fastapi prometheus_client prometheus_client.parser "
    "prometheus_client.samples",
}


def stub(library: str) -> None:
    names = NAMES.get(library, "").split()
    missing = [name for name in names if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in missing:
        module = MagicMock(name=name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        sys.modules[name] = module
    if "flash_attn.bert_padding" in missing:
        import transformers.modeling_flash_attention_utils as padding

        sys.modules["flash_attn.bert_padding"].unpad_input = padding._unpad_input
        sys.modules["flash_attn.bert_padding"].pad_input = padding._pad_input
        sys.modules["flash_attn.bert_padding"].index_first_axis = lambda x, indices: x[indices]
        sys.modules["flash_attn.bert_padding"].rearrange = lambda x, pattern: x.flatten(0, 1)  # the one pattern in use
