"""Tiny random models and data for the tests of the stages: four architectures, one tokenizer, a handful of rows."""

import json
import random
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rlhf_fast.train.chat import CHATML, TURN, TURN_END
from rlhf_fast.train.data import train_tokenizer
from rlhf_fast.train.loop import StageConfig
from rlhf_fast.train.model import create_llama

CONTEXT = 64
WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "hill", "and", "was", "happy", "sad", "today"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
# Dropout is on wherever an architecture has it: the stages have to turn it off.
CONFIGS = {
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2),
    "llama": lambda v: LlamaConfig(vocab_size=v, intermediate_size=32, attention_dropout=0.1, **SIZES),
    "qwen2": lambda v: Qwen2Config(vocab_size=v, intermediate_size=32, num_key_value_heads=1, **SIZES),
    "gpt_neox": lambda v: GPTNeoXConfig(
        vocab_size=v, intermediate_size=32, hidden_dropout=0.1, attention_dropout=0.1, **SIZES
    ),
    "opt": lambda v: OPTConfig(vocab_size=v, ffn_dim=32, word_embed_proj_dim=16, dropout=0.1, **SIZES),
}


def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([" ".join(WORDS)] * 4, 280)


def model(architecture: str = "llama", seed: int = 0) -> torch.nn.Module:
    """A random model; its weights are large enough for every token to matter to every logit."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(CONFIGS[architecture](len(tokenizer())))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    return made


def save_base(directory: Path, architecture: str = "llama") -> Path:
    made, words = model(architecture), tokenizer()
    made.config.pad_token_id, made.config.eos_token_id = words.pad_token_id, words.eos_token_id
    made.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def write_pairs(path: Path, count: int = 40, seed: int = 0) -> Path:
    """`count` preference rows on distinct prompts; "happy" is preferred to "sad"."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        start = " ".join(rng.choices(WORDS[:10], k=rng.randint(1, 3)))
        rows.append({"prompt": f"say {i} {start}", "chosen": f" {start} happy", "rejected": f" {start} sad today"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stage_config(kind: type, tmp_path: Path, base: Path, *, pairs: int, **options) -> StageConfig:
    """Settings of a stage on `pairs` preference rows, written to tmp_path once."""
    data = tmp_path / "pairs.jsonl"
    if not data.exists():
        write_pairs(data, count=pairs)
    name = kind.__name__.removesuffix("Config").lower()
    places = {"model": str(base), "data": str(data), "output_dir": str(tmp_path / name)}
    return kind(**(places | {"heldout_fraction": 0.2, "logging_steps": 2} | options))


def read_log(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def count_letters(responses: list[str]) -> list[int]:
    """A judge that has nothing to do with any reward model."""
    return [len(set(text)) for text in responses]


def chat_tokenizer(end: str = TURN_END) -> PreTrainedTokenizerFast:
    """Words, the marks of ChatML as tokens, and its template; `end` is the end token."""
    made = train_tokenizer([" ".join(WORDS)] * 4, 290, turn_marks=(TURN, TURN_END))
    made.chat_template, made.eos_token = CHATML, end
    return made


def save_chat_base(directory: Path, end: str = TURN_END, context: int = 256) -> Path:
    """A random Llama whose tokenizer writes ChatML."""
    words = chat_tokenizer(end)
    made = create_llama(words, hidden_size=16, num_layers=2, num_heads=2, context_length=context, seed=0)
    made.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
