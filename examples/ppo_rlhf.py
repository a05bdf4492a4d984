"""PPO for RLHF in one file, in the manner of CleanRL: python examples/ppo_rlhf.py

A tiny random policy learns to please a random reward model, held near its start by a KL penalty. No download, half a minute on
one core. ppo_rlhf.diff beside it puts the same training on rlhf_fast; the curves are the same:

    git apply examples/ppo_rlhf.diff
"""

import argparse
import copy
from dataclasses import dataclass, fields

import torch
from torch import nn

END = 0


@dataclass
class Args:
    seed: int = 0
    updates: int = 50
    batch_size: int = 64
    epochs: int = 2
    minibatches: int = 2
    prompt_length: int = 4
    response_length: int = 16
    vocab: int = 64
    hidden: int = 64
    learning_rate: float = 1e-3
    kl_coef: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1


class Model(nn.Module):
    """A causal transformer with a head for tokens and one for values."""

    def __init__(self, args: Args):
        super().__init__()
        self.token = nn.Embedding(args.vocab, args.hidden)
        self.place = nn.Embedding(args.prompt_length + args.response_length, args.hidden)
        layer = nn.TransformerEncoderLayer(args.hidden, 4, 4 * args.hidden, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(args.hidden, args.vocab, bias=False)
        self.value = nn.Linear(args.hidden, 1)

    def forward(self, ids):
        length = ids.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.body(self.token(ids) + self.place.weight[:length], mask=causal, is_causal=True)
        return self.head(x), self.value(x).squeeze(-1)


@torch.no_grad()
def generate(model, ids, length):
    for _ in range(length):
        ids = torch.cat([ids, model(ids)[0][:, -1].softmax(-1).multinomial(1)], 1)
    return ids


def evaluate(model, ids, start):
    """Log-prob, entropy and value at each response token."""
    logits, values = model(ids)
    logits, tokens = logits[:, start - 1 : -1], ids[:, start:]
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logprobs, entropy, values[:, start - 1 : -1]


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def gae(rewards, values, mask, gamma, lam):
    values, last, reversed_advantages = values * mask, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + gamma * next_values - values[:, t] + gamma * lam * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], 1)
    returns = advantages + values
    mean, count = masked_mean(advantages, mask), mask.sum()
    var = masked_mean((advantages - mean) ** 2, mask) * count / (count - 1)
    return (advantages - mean) * torch.rsqrt(var + 1e-8) * mask, returns


def train(args: Args) -> list[dict[str, float]]:
    torch.manual_seed(args.seed)
    policy, taste = Model(args), torch.randn(args.vocab)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), args.learning_rate, weight_decay=0.0)
    start, history = args.prompt_length, []
    for _ in range(args.updates):
        prompts = torch.randint(1, args.vocab, (args.batch_size, start))
        with torch.no_grad():
            ids = generate(policy, prompts, args.response_length)
            response = ids[:, start:]
            ended = response == END
            mask = ended.cumsum(1) - ended.int() == 0  # up to the first end token
            old_logprobs, entropy, old_values = evaluate(policy, ids, start)
            ref_logprobs, _, _ = evaluate(reference, ids, start)
            scores = (taste[response] * mask).sum(1) / mask.sum(1)
            kl = old_logprobs - ref_logprobs
            rewards = -args.kl_coef * kl * mask
            rewards[torch.arange(len(rewards)), mask.sum(1) - 1] += scores
            advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)
        for _ in range(args.epochs):
            for i in torch.randperm(args.batch_size).chunk(args.minibatches):
                logprobs, _, values = evaluate(policy, ids[i], start)
                ratio = torch.exp(logprobs - old_logprobs[i])
                clipped_ratio = ratio.clamp(1 - args.clip, 1 + args.clip)
                policy_loss = masked_mean(torch.max(-advantages[i] * ratio, -advantages[i] * clipped_ratio), mask[i])
                clipped = old_values[i] + (values - old_values[i]).clamp(-args.value_clip, args.value_clip)
                errors = torch.max((values - returns[i]) ** 2, (clipped - returns[i]) ** 2)
                value_loss = 0.5 * masked_mean(errors, mask[i])
                loss = policy_loss + args.value_coef * value_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
        row = {"score": scores.mean(), "kl": (kl * mask).sum(1).mean(), "entropy": masked_mean(entropy, mask)}
        row |= {"policy_loss": policy_loss, "value_loss": value_loss, "length": mask.sum(1).float().mean()}
        history.append({name: float(value.detach()) for name, value in row.items()})
        print("  ".join(f"{name} {value:7.4f}" for name, value in history[-1].items()), flush=True)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in fields(Args):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    train(Args(**vars(parser.parse_args())))
