"""What an update of our PPO costs beside one of TRL 1.12, the last TRL with PPO: python -m bench.ppo_update [--vocab 82 32000]

Both train the same tiny Llamas on the same prompts with the same settings, each in a process of its own, one thread. Every reply
has all its tokens, because the end and padding tokens get ids that the models do not have. CPU-seconds are the median over some
updates after a warm-up; growth is that of the peak over the contender's own run with the smallest vocabulary.

Needs `make peers`. Writes bench/results/ppo-update.json and .md. A contender that fails, for want of memory too, is in both.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import contenders

OURS, PEER = "rlhf_fast", "trl-1.12"
CPU = "cpu_seconds"
VOCABULARIES = [82, 32_000, 151_936]
SETTINGS = {
    "batch": 32,
    "prompt_tokens": 16,
    "response_tokens": 64,
    "ppo_epochs": 4,
    "minibatches": 1,
    "hidden": 64,
    "layers": 2,
    "heads": 4,
    "threads": 1,
    "warm_up": 1,
}
SHARED = {"learning_rate": 3e-6, "weight_decay": 0.0, "temperature": 0.7, "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95}
SHARED |= {"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}


# --------------------------------------------------------------------------------------------- what both begin with


def save_models(directory: Path, s: dict) -> None:
    """A policy and a reward model with random weights, and a tokenizer of V words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    words = special + [f"w{i}" for i in range(s["vocab"] - len(special))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **marks)
    config = LlamaConfig(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        intermediate_size=176,
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory / "policy")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(directory / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(directory / name)


def prompts(s: dict) -> list[list[int]]:
    import torch

    draw = torch.Generator().manual_seed(1)
    shape = ((s["warm_up"] + s["updates"]) * s["batch"], s["prompt_tokens"])
    return torch.randint(3, s["vocab"], shape, generator=draw).tolist()


def take_away_ends(tokenizer) -> None:
    """New end and padding tokens, of ids from V on: no reply ends early, on either side."""
    tokenizer.add_special_tokens({"eos_token": "<never>", "pad_token": "<nowhere>"})


# ------------------------------------------------------------------------------------------------------ contenders


def ours(directory: Path, s: dict) -> tuple[contenders.Laps, list[dict]]:
    import torch

    from rlhf_fast.train import loop, ppo

    config = ppo.PPOConfig(
        **SHARED,
        model=str(directory / "policy"),
        reward_model=str(directory / "reward"),
        data="",
        output_dir="",
        response_length=s["response_tokens"],
        batch_size=s["batch"],
        num_ppo_epochs=s["ppo_epochs"],
        num_mini_batches=s["minibatches"],
        missing_eos="none",
        lr_schedule="linear",
        max_grad_norm=0.0,
    )
    order = loop.seed_everything(0)
    models = ppo.load_models(config, None, torch.device("cpu"))
    loop.use_threads(s["threads"], parameters=models.policy.num_parameters(), device=torch.device("cpu"))
    take_away_ends(models.tokenizer)
    optimizer = loop.adamw([models.policy, models.value], weight_decay=config.weight_decay, epsilon=config.adam_epsilon)
    queries, updates = prompts(s), s["warm_up"] + s["updates"]
    laps, logs = contenders.Laps(), []
    laps.start()
    for update, rows in enumerate(ppo.prompt_batches(len(queries), s["batch"], updates, order, []), 1):
        rate = loop.learning_rate(update, updates, peak=config.learning_rate, schedule=config.lr_schedule)
        chosen = [queries[row] for row in rows]
        texts = [" ".join(models.tokenizer.convert_ids_to_tokens(ids)) for ids in chosen]
        batch = ppo.collect(models, texts, chosen, config.kl_coef, config)
        stats = ppo.optimize(batch, models, optimizer, config, order, rate=rate, where=f"update {update}")
        logs.append(ppo.describe(batch, config.kl_estimator) | stats)
        laps.lap()
        assert set(batch.scored.rollout.response_lengths) == {s["response_tokens"]}
    assert {int(state["step"]) for state in optimizer.state.values()} == {steps(s)}
    return laps, logs


def clock(laps: contenders.Laps):
    """A callback of a trainer of TRL's that takes a lap for each of its steps."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            laps.start()

        def on_step_end(self, *args, **kwargs):
            laps.lap()

    return Clock()


def trl(directory: Path, s: dict) -> tuple[contenders.Laps, list[dict]]:
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(s["threads"])
    torch.manual_seed(0)
    laps = contenders.Laps()
    tokenizer = AutoTokenizer.from_pretrained(directory / "policy", padding_side="left")
    take_away_ends(tokenizer)
    policy, reference = (AutoModelForCausalLM.from_pretrained(directory / "policy") for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(directory / "reward", num_labels=1) for _ in range(2)
    )
    config = PPOConfig(
        **SHARED,
        output_dir=str(directory / "out"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        response_length=s["response_tokens"],
        per_device_train_batch_size=s["batch"],
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=s["batch"],
        num_ppo_epochs=s["ppo_epochs"],
        num_mini_batches=s["minibatches"],
        total_episodes=(s["warm_up"] + s["updates"]) * s["batch"],
        adam_epsilon=1e-5,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"input_ids": prompts(s)})
    trainer = PPOTrainer(
        config,
        tokenizer,
        policy,
        reference,
        reward,
        train_dataset=rows,
        value_model=value,
        data_collator=DataCollatorWithPadding(tokenizer),
        eval_dataset=rows.select(range(s["batch"])),
        callbacks=[clock(laps)],
    )
    trainer.train()
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {steps(s)}
    return laps, [line for line in trainer.state.log_history if "objective/kl" in line]


def steps(s: dict) -> int:
    return (s["warm_up"] + s["updates"]) * s["ppo_epochs"] * s["minibatches"]


def contend(name: str, s: dict) -> contenders.Result:
    with TemporaryDirectory() as directory:
        save_models(Path(directory), s)
        start = contenders.forget_peak()
        laps, logs = {OURS: ours, PEER: trl}[name](Path(directory), s)
    distributions = ["torch", "transformers", *(["trl", "accelerate"] if name == PEER else [])]
    return laps.after(s["warm_up"]) | {
        "peak_bytes": contenders.memory("VmHWM"),
        "start_bytes": start,
        "first_update": {key: float(logs[0][key]) for key in ("objective/kl", "val/num_eos_tokens", *AGREE)},
        "versions": {name: importlib.metadata.version(name) for name in distributions},
    }


# What the first update reports has to come out alike, to this relative difference: each side sampled its own replies.
AGREE = {"policy/entropy_avg": 0.01, "objective/entropy": 0.02, "loss/value_avg": 0.3}


def check(results: dict[str, contenders.Result]) -> None:
    """Exit if both ran and did not do the same work."""
    ran = [result["first_update"] for result in results.values() if "failed" not in result]
    for first in ran:
        if first["val/num_eos_tokens"] or abs(first["objective/kl"]) > 1e-3:
            sys.exit(f"the first update should have no end token and a KL of 0: {first}")
        for name, tolerance in AGREE.items():
            if abs(first[name] - ran[0][name]) > tolerance * abs(ran[0][name]):
                sys.exit(f"the contenders disagree on {name} of the first update: {first[name]} and {ran[0][name]}")


# ------------------------------------------------------------------------------------------------------ the table


def render(result: contenders.Result) -> str:
    s, found = result["settings"], result["contenders"]
    smallest = min(found, key=int)
    lines = [
        f"{result['machine']}, {s['threads']} thread, {contenders.versions(found)}",
        f"commit {result['commit']}",
        "",
        f"Llama of {s['layers']} layers, width {s['hidden']}, tied embeddings, float32; B = {s['batch']} prompts of "
        f"{s['prompt_tokens']} tokens, replies of exactly T = {s['response_tokens']}; {s['ppo_epochs']} epochs of "
        f"{s['minibatches']} minibatch, the batch in one forward pass; AdamW, no clipping of gradients. Median of "
        f"{' / '.join(f'{len(pair[OURS].get(CPU, []))} at V = {int(v):,}' for v, pair in found.items())} updates after "
        f"{s['warm_up']} for warm-up, least and most in brackets; growth of the peak over V = {int(smallest):,}.",
        "",
    ]
    rows = []
    for vocab, pair in found.items():
        for name in (OURS, PEER):
            one, base = pair[name], found[smallest][name]
            if "failed" in one:
                rows.append([f"{int(vocab):,}", name, f"{one['failed']} (limit {one['memory_gib']} GiB)", *["-"] * 5])
                continue
            cpu, wall = (contenders.median(one[key]) for key in (CPU, "wall_seconds"))
            ratio = f"{contenders.median(pair[PEER][CPU]) / cpu:.2f}x" if "failed" not in pair[PEER] else "-"
            growth = None if "failed" in base else (one["peak_bytes"] - base["peak_bytes"]) / contenders.MB
            rows.append(
                [
                    f"{int(vocab):,}",
                    name,
                    f"{cpu:.2f} ({contenders.spread(one[CPU])})",
                    f"{wall:.2f}",
                    ratio if name == OURS else "",
                    f"{one['peak_bytes'] / contenders.MB:.0f}",
                    "-" if growth is None else f"{growth:.0f}",
                    share(pair, found[smallest]) if name == OURS and vocab != smallest else "",
                ]
            )
    columns = ["V", "trainer", "CPU-s an update", "wall s", "TRL's / ours", "peak MB", "growth MB", "of TRL's"]
    return "\n".join([*lines, contenders.table(columns, rows)])


def share(pair: dict[str, contenders.Result], base: dict[str, contenders.Result]) -> str:
    if any("failed" in one for one in (*pair.values(), *base.values())):
        return "-"
    ours, theirs = (pair[name]["peak_bytes"] - base[name]["peak_bytes"] for name in (OURS, PEER))
    return f"{ours / theirs:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ppo_update", description=__doc__.splitlines()[0])
    parser.add_argument("--contender", nargs=3, metavar=("NAME", "SETTINGS", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES, help="vocabularies (default: all)")
    parser.add_argument("--updates", type=int, default=5, help="updates measured; 3 at most from V = 100,000 on")
    parser.add_argument("--memory-gib", type=float, default=18.0, help="limit for each process (default: 18)")
    parser.add_argument("--name", default="ppo-update", help="of the files in bench/results (default: ppo-update)")
    options = parser.parse_args()
    if options.contender:
        name, settings, file = options.contender
        Path(file).write_text(json.dumps(contend(name, json.loads(settings))))
        return
    pythons = {OURS: sys.executable, PEER: contenders.peer_python(PEER)}
    found: dict[str, dict[str, contenders.Result]] = {}
    for vocab in sorted(options.vocab):
        updates = min(options.updates, 3) if vocab >= 100_000 else options.updates
        settings = SETTINGS | {"vocab": vocab, "updates": updates}
        found[str(vocab)] = {
            name: contenders.run("bench.ppo_update", name, settings, python=python, memory_gib=options.memory_gib)
            for name, python in pythons.items()
        }
        check(found[str(vocab)])
    result = {
        "machine": contenders.machine(),
        "commit": contenders.commit(),
        "settings": SETTINGS | SHARED,
        "contenders": found,
    }
    contenders.write(options.name, result, render(result))


if __name__ == "__main__":
    main()
