"""vLLM in place of `transformers.generate`, in this process and on this GPU, where it is installed.

It is given the policy's weights before it samples, and only token ids come back: log-probs are made anew by the policy that is
trained, so that a ratio of 1 means what it says whatever the engine rounds. The way to the engine's weights is that of TRL
1.16's colocate mode.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_fast.train import distributed
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.lora import merged_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_TOKENS = -1  # vLLM's word for no top-k
SEEDS = 2**31


def check(device: torch.device, where: str) -> None:
    """UserError where vLLM could not sample: not installed, no GPU, or several processes."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"{where}: 'generation' vllm needs vLLM, which is not installed: pip install vllm")
    if device.type != "cuda":
        raise UserError(f"{where}: 'generation' vllm needs a GPU, the device is {device}; use transformers")
    if distributed.asked_for() > 1:
        raise UserError(f"{where}: 'generation' vllm is for one process, {distributed.asked_for()} were started")


class VLLM:
    """A vLLM engine with the architecture of the model in `directory`; `memory` is the share of the GPU that it may take.

    context: the most tokens of prompt and reply together. UserError if `policy` has another vocabulary than the directory,
    as after a pad token was added to it.
    """

    def __init__(
        self, directory: str | Path, policy: PreTrainedModel, *, dtype: str, memory: float, context: int
    ) -> None:
        from transformers import AutoConfig

        stored, rows = AutoConfig.from_pretrained(directory), policy.get_input_embeddings().num_embeddings
        if stored.get_text_config().vocab_size != rows:
            raise UserError(
                f"model {directory} has {stored.get_text_config().vocab_size} tokens and {rows} once it has a pad token, which "
                "vLLM cannot be given; fine-tune it with sft first, whose result holds one"
            )
        # Otherwise the model lives in a process of its own, where its weights are out of reach.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        settings = {"dtype": dtype, "gpu_memory_utilization": memory, "max_model_len": context}
        self._llm: Any = LLM(model=str(directory), **settings, generation_config="vllm")

    def replies(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        stop: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> list[list[int]]:
        """Token ids of a reply to each of `prompts` by `model` as it is now, up to and including the first token of `stop`.

        Seeds are drawn from torch's global generator, a reply each.
        """
        from vllm import SamplingParams

        self._take(model)
        sampling = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        sampling |= {"top_k": top_k or ALL_TOKENS, "detokenize": False}
        # What vLLM takes for the end token is that of the files, which a chat template may have replaced.
        sampling |= {"stop_token_ids": list(stop), "ignore_eos": True}
        seeds = torch.randint(SEEDS, (len(prompts),)).tolist()
        settings = [SamplingParams(**sampling, seed=seed) for seed in seeds]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(asked, settings, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _take(self, model: PreTrainedModel) -> None:
        weights = merged_weights(model) or model.state_dict()
        if model.config.get_text_config().tie_word_embeddings:
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith("lm_head.")}
        runner = self._llm.llm_engine.model_executor.driver_worker.model_runner
        runner.model.load_weights(weights.items())
        self._llm.reset_prefix_cache()  # keys and values of the weights before
