"""vLLM cannot be had without a GPU: a small engine of the same interface stands in for it, which records what it is asked."""

import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from rlhf_fast.train import engine, loop, lora, ppo, sft
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.generate import generate, stop_ids
from rlhf_fast.train.model import load_policy


class Parameters:
    def __init__(self, **settings):
        self.__dict__ |= settings


class Engine:
    """Samples with a model of its own, one token after the other; its weights come through `load_weights` alone."""

    made: ClassVar[list] = []

    def __init__(self, model, **settings):
        self.settings, self.asked, self.cleared = settings, [], 0
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, settings["dtype"])).eval()
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load))
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker)
        self.made.append(self)

    def _load(self, weights):
        missing, strange = self._model.load_state_dict(dict(weights), strict=False)
        assert not strange and set(missing) <= {"lm_head.weight"}
        self._model.tie_weights()

    def reset_prefix_cache(self):
        self.cleared += 1

    @torch.no_grad()
    def generate(self, prompts, settings, use_tqdm):
        self.asked.append(list(zip(prompts, settings, strict=True)))
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=self._reply(prompt["prompt_token_ids"], asked))])
            for prompt, asked in zip(prompts, settings, strict=True)
        ]

    def _reply(self, prompt, asked):
        random, ids = torch.Generator().manual_seed(asked.seed), list(prompt)
        while len(ids) < len(prompt) + asked.max_tokens:
            logits = self._model(torch.tensor([ids])).logits[0, -1]
            chances = (logits / asked.temperature).softmax(-1)
            ids.append(int(torch.multinomial(chances, 1, generator=random)))
            if ids[-1] in asked.stop_token_ids:
                break
        return tuple(ids[len(prompt) :])


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = Engine, Parameters
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    Engine.made.clear()
    return module


def sampler(base, policy):
    return engine.VLLM(base, policy, dtype="float32", memory=0.2, context=32)


PROMPTS = [[1, 5], [1, 6, 7, 8], [1, 9, 9]]


def test_replies_have_the_form_of_those_of_transformers(base, vllm):
    model, tokenizer = load_policy(base)
    options = {"max_new_tokens": 9, "temperature": 0.7, "batch_size": 3, "engine": sampler(base, model)}
    torch.manual_seed(1)
    got = generate(model, tokenizer, PROMPTS, **options)
    plain = generate(model, tokenizer, PROMPTS, **options | {"engine": None})
    assert got.query_ids.equal(plain.query_ids) and got.query_mask.equal(plain.query_mask)
    for row, mask, finished in zip(got.response_ids, got.response_mask, got.finished, strict=True):
        length = int(mask.sum())
        assert mask.equal(torch.arange(len(mask)) < length) and 0 < length <= 9
        assert finished == (row[length - 1] == tokenizer.eos_token_id) and finished == (length < 9)
        assert (row[length:] == tokenizer.pad_token_id).all()
    asked = Engine.made[0].asked[0]
    assert [prompt["prompt_token_ids"] for prompt, _ in asked] == PROMPTS
    settings = vars(asked[0][1])
    assert settings.pop("seed") != asked[1][1].seed
    assert settings == {
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "stop_token_ids": [tokenizer.eos_token_id],
        "ignore_eos": True,
        "detokenize": False,
    }
    torch.manual_seed(1)
    assert generate(model, tokenizer, PROMPTS, **options).response_ids.equal(got.response_ids)


def test_replies_end_where_they_do_with_transformers(base, vllm):
    model, tokenizer = load_policy(base)
    options = {"max_new_tokens": 40, "temperature": 1.5, "batch_size": 3, "engine": sampler(base, model)}
    torch.manual_seed(0)
    stop = stop_ids(tokenizer, "}")
    got = generate(model, tokenizer, PROMPTS * 8, **options, stop=stop)
    for row, mask, finished in zip(got.response_ids, got.response_mask, got.finished, strict=True):
        assert finished == bool(torch.isin(row, torch.tensor(stop)).any()) == (row[mask.sum() - 1].item() in stop)
        assert not torch.isin(row[: mask.sum() - 1], torch.tensor(stop)).any()
    assert {row[mask.sum() - 1].item() for row, mask in zip(got.response_ids, got.response_mask, strict=True)} > set(
        stop
    )
    endless = generate(model, tokenizer, PROMPTS, **options, stop=stop_ids(tokenizer, None))
    assert endless.response_mask.all() and endless.response_mask.shape == (3, 40) and not endless.finished.any()
    assert [vars(asked[0][1])["stop_token_ids"] for asked in Engine.made[0].asked] == [stop, []]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_it_samples_with_the_weights_of_the_moment(tmp_path, vllm, architecture, lora_rank):
    if lora_rank:
        pytest.importorskip("peft")
    base = tiny.save_base(tmp_path / "base", architecture)
    model, tokenizer = load_policy(base)
    loop.made_trainable(model, sft.SFTConfig(model="", data="", output_dir="", lora_rank=lora_rank))
    options = {"max_new_tokens": 9, "temperature": 0.7, "batch_size": 3, "engine": sampler(base, model)}
    generate(model, tokenizer, PROMPTS, **options)
    with torch.no_grad():
        for parameter in lora.trained(model):
            parameter.add_(0.2 * torch.randn_like(parameter))
    generate(model, tokenizer, PROMPTS, **options)
    own = Engine.made[0]
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        torch.testing.assert_close(own._model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert own.cleared == 2


def test_ppo_samples_with_it_and_makes_log_probs_itself(tmp_path, base, vllm, monkeypatch):
    monkeypatch.setattr(engine, "check", lambda device, where: None)  # there is no GPU here
    data = str(tiny.write_pairs(tmp_path / "pairs.jsonl"))
    options = {
        "batch_size": 8,
        "total_episodes": 16,
        "response_length": 6,
        "missing_eos": "none",
        "learning_rate": 1e-2,
    }
    places = {"model": str(base), "data": data, "output_dir": str(tmp_path / "out"), "heldout_fraction": 0.2}
    asked = ppo.PPOConfig(**places, **options, generation="vllm", vllm_memory=0.4)
    log = tiny.read_log(ppo.train(asked, reward=tiny.count_letters))
    (own,) = Engine.made
    assert len(own.asked) == len(log) == 2 and len(own.asked[0]) == 8
    assert own.settings["gpu_memory_utilization"] == 0.4 and own.settings["generation_config"] == "vllm"
    assert log[0]["objective/kl"] == pytest.approx(0, abs=1e-5) and log[1]["objective/kl"] != 0


def test_a_vocabulary_that_grew_is_refused(tmp_path, vllm):
    made, words = tiny.model("llama"), tiny.tokenizer()
    words.pad_token = words.eos_token
    made.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    policy, _ = load_policy(tmp_path / "base")
    policy.resize_token_embeddings(len(words) + 1)
    with pytest.raises(UserError, match="once it has a pad token, which vLLM cannot be given; fine-tune it with sft"):
        sampler(tmp_path / "base", policy)


def test_where_it_cannot_be_used_that_is_said(monkeypatch):
    with pytest.raises(UserError, match="'generation' vllm needs vLLM, which is not installed: pip install vllm"):
        engine.check(torch.device("cuda"), "ppo")
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="needs a GPU, the device is cpu; use transformers"):
        engine.check(torch.device("cpu"), "ppo")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="is for one process, 2 were started"):
        engine.check(torch.device("cuda"), "ppo")
