"""The demo's PPO, with log-probs and loss from hidden states and from whole logits in plain PyTorch: the same learning curve.

    python -m bench.learning_curve [--updates 20] [--seed 0] [--dtype float64]

runs the demo's SFT and reward stages once (about 40 s), then PPO twice from the same models, seeds and prompts. Prints the
largest difference of every logged metric. In float32 two ways to add up the same numbers differ in the last bits, after some
updates a sampled token falls the other way, and from there on the replies differ: --dtype float64 has no such luck in it.
"""

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from unittest import mock

import torch

from rlhf_fast import demo
from rlhf_fast.ops.ppo_loss_from_logits import ppo_loss_from_logits_reference
from rlhf_fast.train import ppo, reward, rollout, sft
from rlhf_fast.train.config import from_dict
from rlhf_fast.train.model import forward_inputs

CLOCKED = ("seconds", "cpu_seconds", "eps", "tokens_per_second")


def eager_logits(model, ids, mask, length):
    return model(**forward_inputs(model, ids[:, :-1], mask[:, :-1])).logits[:, -length:]


def eager_logprobs(model, ids, mask, length, *, temperature, response_mask, with_entropy=False, full_logits=False):
    table = (eager_logits(model, ids, mask, length) / temperature).log_softmax(-1)
    logprobs = table.gather(2, ids[:, -length:, None]).squeeze(2) * response_mask
    return (logprobs, -(table.exp() * table).sum(-1) * response_mask) if with_entropy else logprobs


def eager_ppo_loss(model, ids, mask, length, *tensors, full_logits=False, **options):
    logits = eager_logits(model, ids, mask, length)
    return ppo_loss_from_logits_reference(logits, ids[:, -length:], *tensors, **options)


@contextlib.contextmanager
def plain_torch():
    with (
        mock.patch.object(rollout, "response_logprobs", eager_logprobs),
        mock.patch.object(ppo, "response_ppo_loss", eager_ppo_loss),
    ):
        yield


def prepare(out: Path, seed: int) -> dict:
    """The demo up to its reward model -> the keys of its PPO stage."""
    demo.write_demonstrations(out / "demonstrations.jsonl", seed=seed, count=demo.DEMONSTRATIONS)
    tokenizer = demo.build_tokenizer()
    demo.save_model(out / "base", demo.build_model(tokenizer, seed=seed), tokenizer)
    shared = {k: v for k, v in demo.SHARED.items() if k != "eval_prompts"} | {"seed": seed}
    demonstrations = {"data": str(out / "demonstrations.jsonl")}
    first = {"model": str(out / "base"), "output_dir": str(out / "sft")}
    sft.train(from_dict(sft.SFTConfig, demo.SFT | shared | demonstrations | first))
    pairs = {"data": str(demo.write_pairs(out / "pairs.jsonl", out / "sft", seed=seed, count=demo.PAIRS))}
    second = {"model": str(out / "sft"), "output_dir": str(out / "reward")}
    reward.train(from_dict(reward.RewardConfig, demo.REWARD | shared | pairs | second))
    return demo.PPO | shared | pairs | {"model": str(out / "sft"), "reward_model": str(out / "reward")}


def curve(keys: dict, out: Path, updates: int, dtype: torch.dtype) -> list[dict]:
    config = from_dict(ppo.PPOConfig, keys | {"output_dir": str(out), "total_episodes": updates * keys["batch_size"]})
    load = ppo.load_models

    def in_dtype(*args):
        models = load(*args)
        for model in (models.policy, models.reference, models.value, models.reward):
            model.to(dtype)
        return models

    with mock.patch.object(ppo, "load_models", in_dtype):
        ppo.train(config)
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        out, dtype = Path(directory), getattr(torch, arguments.dtype)
        keys = prepare(out, arguments.seed)
        fused = curve(keys, out / "fused", arguments.updates, dtype)
        with plain_torch():
            eager = curve(keys, out / "eager", arguments.updates, dtype)
    print(f"\nlargest difference over {arguments.updates} updates, {arguments.dtype}")
    for name in fused[0]:
        if name not in CLOCKED:
            worst = max(range(len(fused)), key=lambda i, key=name: abs(fused[i][key] - eager[i][key]))
            difference = abs(fused[worst][name] - eager[worst][name])
            print(f"{name:32} {difference:9.2e}   at update {worst + 1}, {eager[worst][name]:.6g}")


if __name__ == "__main__":
    main()
