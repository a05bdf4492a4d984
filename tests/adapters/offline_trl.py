"""A pytest plugin in the place of the model hub: tiny random models and a small data set by the names that TRL's tests ask for.

peer_tests.py copies it beside TRL's tests. What is asked for beyond that fails as it does without a network. Tests of a version
near the installed one are loaded as well: what they import and it lacks fails where a test uses it.
"""

import ast
import importlib
import os
from pathlib import Path

import datasets
import trl
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

ORG = "trl-internal-testing"


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, with Qwen's special tokens and chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
    template = next((Path(trl.__file__).parent / "chat_templates").glob("qwen2_5.jinja"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template.read_text(), **marks)


def save(kind: type, name: str) -> None:
    folder = Path(os.environ["HF_HUB_CACHE"]) / f"models--{ORG}--{name}"
    snapshot = folder / "snapshots" / "0"
    words = tokenizer()
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        num_labels=1,
    )
    kind(config).save_pretrained(snapshot)
    words.save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")


def rows(config: str, n: int) -> dict[str, list]:
    style, _, kind = config.partition("_")
    part = {
        "prompt": [f"Question {i}, and how long is it?" for i in range(n)],
        "completion": [f"Answer {i}." for i in range(n)],
        "rejected": [f"No answer to {i}, none." for i in range(n)],
    }
    if style == "conversational":
        roles = {"prompt": "user", "completion": "assistant", "rejected": "assistant"}
        part = {name: [[{"role": roles[name], "content": text}] for text in texts] for name, texts in part.items()}
    whole, wrong = (
        [a + b for a, b in zip(part["prompt"], part[name], strict=True)] for name in ("completion", "rejected")
    )
    return {
        "prompt_only": {"prompt": part["prompt"]},
        "language_modeling": {"text" if style == "standard" else "messages": whole},
        "prompt_completion": {"prompt": part["prompt"], "completion": part["completion"]},
        "preference": {"prompt": part["prompt"], "chosen": part["completion"], "rejected": part["rejected"]},
        "implicit_prompt_preference": {"chosen": whole, "rejected": wrong},
        "unpaired_preference": {
            "prompt": part["prompt"],
            "completion": part["completion"],
            "label": [i % 2 == 0 for i in range(n)],
        },
    }[kind]


def load_dataset(path, name=None, split=None, streaming=False, **_):
    if path != f"{ORG}/zen" or streaming:
        raise ConnectionError(f"{path} is not at hand")
    found = DatasetDict({part: Dataset.from_dict(rows(name, n)) for part, n in (("train", 17), ("test", 2))})
    return found if split is None else found[split]


def imported(tests: Path) -> set[tuple[str, str]]:
    """(module, name) of what the tests import of TRL."""
    found = set()
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "trl":
                found |= {(node.module, alias.name) for alias in node.names}
    return found


def lacking(name: str):
    def absent(*_, **__):
        if name.startswith("is_"):
            return False
        raise NotImplementedError(f"this version of TRL has no {name}")

    return absent


for module, name in sorted(imported(Path("tests"))):
    try:
        home = importlib.import_module(module)
    except ImportError:
        continue
    if not hasattr(home, name):
        setattr(home, name, lacking(name))

if not Path(os.environ["HF_HUB_CACHE"]).exists():
    save(Qwen2ForCausalLM, "tiny-Qwen2ForCausalLM-2.5")
    save(Qwen2ForSequenceClassification, "tiny-Qwen2ForSequenceClassification-2.5")
datasets.load_dataset = load_dataset
