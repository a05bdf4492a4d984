"""NaN and infinity, put into every place they can come from: the run stops, names tensor and row, and keeps the batch."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from rlhf_fast.train import dpo, loop, ppo, replies, reward, rollout, sft
from rlhf_fast.train.errors import NotFinite, UserError
from rlhf_fast.train.finite import check_finite, keeping
from rlhf_fast.train.model import load_policy, reward_from_policy

LENGTH = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("finite")
    tiny.save_base(root / "base")
    tiny.write_pairs(root / "pairs.jsonl")
    torch.manual_seed(0)
    model, tokenizer = reward_from_policy(root / "base")
    model.save_pretrained(root / "reward")
    tokenizer.save_pretrained(root / "reward")
    return root


def run_stage(stage, files, out, **changes):
    configs = {"sft": sft.SFTConfig, "reward": reward.RewardConfig, "dpo": dpo.DPOConfig, "ppo": ppo.PPOConfig}
    chosen = {"model": str(files / "base"), "data": str(files / "pairs.jsonl"), "output_dir": str(out)}
    chosen |= {"heldout_fraction": 0.2, "batch_size": 8, "checks": False}
    if stage == "ppo":
        chosen |= {"reward_model": str(files / "reward"), "total_episodes": 24, "response_length": LENGTH}
        chosen |= {"missing_eos": "none"}
    else:
        chosen |= {"max_response_tokens": 16}
    train = {"sft": sft.train, "reward": reward.train, "dpo": dpo.train, "ppo": ppo.train}[stage]
    return train(configs[stage](**(chosen | changes)))


def stopped(stage, files, out, words, **changes):
    """Message, facts and tensors of a stage that had to stop; no weight may have been written."""
    with pytest.raises(NotFinite, match=words) as caught:
        run_stage(stage, files, out, **changes)
    assert not (out / "stage.json").exists() and not (out / "model.safetensors").exists()
    (directory,) = (out / "not-finite").iterdir()
    assert str(directory) in str(caught.value) and "nothing was updated" in str(caught.value)
    facts = json.loads((directory / "batch.json").read_text())
    tensors = load_file(directory / "batch.safetensors")
    assert facts["config"]["output_dir"] == str(out) and set(facts["tensors"]) == set(tensors)
    assert facts["row"] == caught.value.row
    return str(caught.value), facts, tensors


def poison(monkeypatch, module, name, change):
    """Let a function of a module return something else after its `change` of what it returned."""
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: change(original(*a, **k)))


# ------------------------------------------------------------------------------------------- where it can come from


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["scores", "values"])
def test_what_other_models_say(files, tmp_path, monkeypatch, name, number):
    function = {"scores": "sequence_scores", "values": "token_values"}[name]

    def change(result):
        result = result.clone()
        result[3, ...] = number
        return result

    poison(monkeypatch, rollout, function, change)
    message, facts, tensors = stopped("ppo", files, tmp_path / "ppo", f"ppo update 1: the {name} are not finite")
    row = facts["row"]
    assert f"in row {row} (prompt {facts['prompt'][:40]!r}, reply" in message and facts["reply"] is not None
    assert facts["tensors"][name]["rows"] == [row] and not tensors[name][row].isfinite().all()
    assert {"ids", "mask", "response_mask", "logprobs", "ref_logprobs"} <= set(tensors)
    prompt = load_policy(files / "base")[1].decode(tensors["ids"][row][tensors["mask"][row]][1:])
    assert prompt.startswith(facts["prompt"])


def test_advantages(files, tmp_path, monkeypatch):
    def change(result):
        advantages, returns = result
        advantages = advantages.clone()
        advantages[5, 0] = float("nan")
        return advantages, returns

    poison(monkeypatch, rollout, "gae", change)
    message, facts, _ = stopped(
        "ppo", files, tmp_path / "ppo", "the advantages are not finite", whiten_advantages=False
    )
    assert facts["row"] == 5 and "(nan at place 0)" in message


def test_a_reward_function(files, tmp_path):
    def careless(samples):
        return [float("nan") if i == 2 else 1.0 for i in range(len(samples))]

    config = {"model": str(files / "base"), "data": str(files / "pairs.jsonl"), "output_dir": str(tmp_path / "ppo")}
    config |= {"heldout_fraction": 0.2, "batch_size": 8, "response_length": LENGTH, "checks": False}
    with pytest.raises(
        NotFinite, match=r"ppo update 1: the reward function gave a score .* \(nan\) in row 2 \(prompt 'say"
    ):
        ppo.train(ppo.PPOConfig(**config), reward=careless)
    (directory,) = (tmp_path / "ppo" / "not-finite").iterdir()
    assert load_file(directory / "batch.safetensors")["scores"].isnan().tolist() == [False, False, True] + [False] * 5


class Poisoned:
    """A word whose embedding is NaN: only the rows that hold it are broken. Set before training, after loading."""

    def __init__(self, monkeypatch, module, loader, word=" today"):
        self.word = word
        original = getattr(module, loader)

        def load(*arguments, **options):
            model, tokenizer = original(*arguments, **options)
            (token,) = tokenizer.encode(word, add_special_tokens=False)[-1:]
            with torch.no_grad():
                model.get_input_embeddings().weight[token] = float("nan")
            return model, tokenizer

        monkeypatch.setattr(module, loader, load)


def one_odd_row(files, path, field, word):
    """Pairs of which the eleventh alone says `word`."""
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        for key in ("chosen", "rejected"):
            row[key] = row[key].replace(" today", "") + (word if (i == 10 and key == field) else "")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), rows[10]["prompt"]


@pytest.mark.parametrize("micro_batch_size", [0, 3])
def test_a_row_of_the_fine_tuning_data(files, tmp_path, monkeypatch, micro_batch_size):
    Poisoned(monkeypatch, sft, "load_policy")
    data, prompt = one_odd_row(files, tmp_path / "odd.jsonl", "chosen", " today")
    message, facts, tensors = stopped(
        "sft",
        files,
        tmp_path / "sft",
        r"sft step \d+: the loss is nan in row",
        data=data,
        micro_batch_size=micro_batch_size,
    )
    assert facts["prompt"] == prompt and repr(prompt) in message
    tokenizer = load_policy(files / "base")[1]
    assert prompt in tokenizer.decode(tensors["ids"][facts["row"]])


def test_a_pair_of_the_reward_model(files, tmp_path, monkeypatch):
    Poisoned(monkeypatch, reward, "reward_from_policy")
    data, prompt = one_odd_row(files, tmp_path / "odd.jsonl", "rejected", " today")
    _, facts, tensors = stopped(
        "reward", files, tmp_path / "reward", r"reward step \d+: the loss is nan in row", data=data
    )
    assert facts["prompt"] == prompt
    assert " today" in load_policy(files / "base")[1].decode(tensors["rejected_ids"][facts["row"]])


def test_the_logits_of_the_policy(files, tmp_path, monkeypatch):
    """The sampler would have refused the whole batch without a name, or on a GPU ended the process."""
    Poisoned(monkeypatch, ppo, "load_policy", " hill")
    rows = [{"prompt": f"say {i} cat" + (" hill" if i == 12 else "")} for i in range(24)]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, facts, tensors = stopped(
        "ppo", files, tmp_path / "ppo", "the policy's logits are not finite in row", data=str(data), total_episodes=48
    )
    assert facts["prompt"] == "say 12 cat hill" and {"query_ids", "query_mask"} == set(tensors)


def ptx_file(path, odd):
    """Written replies of which the one to `say 7` alone says "hill", or none."""
    rows = [{"prompt": f"say {i}", "response": " a hill" if i == odd else " a cat"} for i in range(12)]
    return str(tiny.write_rows(path, rows))


def test_a_written_reply_of_the_pretraining_mix(files, tmp_path, monkeypatch):
    """The gradient of the policy is broken by a reply that no rollout holds."""
    token = load_policy(files / "base")[1].encode(" hill", add_special_tokens=False)[-1]
    read = replies.reply_logprobs

    def logprobs(model, examples, *options):
        found, entropies = read(model, examples, *options)
        rows = torch.tensor([token in example.ids for example in examples])
        return Explode.apply(found, rows), entropies

    monkeypatch.setattr(replies, "reply_logprobs", logprobs)
    options = {"ptx_coef": 1.0, "heldout_fraction": 0.0, "micro_batch_size": 3, "total_episodes": 48}
    _, facts, tensors = stopped(
        "ppo",
        files,
        tmp_path / "ppo",
        r"ppo update \d: the gradient of policy parameter \S+ is not finite in ptx row \d \(prompt 'say 7', reply ' a hill",
        ptx_data=ptx_file(tmp_path / "ptx.jsonl", odd=7),
        **options,
    )
    assert facts["part"] == "ptx" and facts["reply"] == " a hill"
    assert token in tensors["ptx_ids"][facts["row"]] and len(tensors["ptx_ids"]) == 8
    assert not any(token in row for row in tensors["ptx_ids"][: facts["row"]])  # the first of them
    assert {"ptx_mask", "advantages"} <= set(tensors)


def test_with_a_pretraining_mix_a_rollout_is_still_named(files, tmp_path, monkeypatch):
    read = ppo.token_values
    monkeypatch.setattr(ppo, "token_values", lambda *a: Explode.apply(read(*a), a[1][:, 0] >= 0))
    data = ptx_file(tmp_path / "ptx.jsonl", odd=None)
    _, facts, tensors = stopped("ppo", files, tmp_path / "ppo", r"is not finite in row \d", ptx_data=data, ptx_coef=1.0)
    assert "part" not in facts and facts["prompt"].startswith("say") and "ptx_ids" in tensors


class Explode(torch.autograd.Function):
    """The identity, with a gradient that is not finite for the rows that hold a number."""

    @staticmethod
    def forward(context, x, rows):
        context.rows = rows
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        return gradient.masked_fill(context.rows[:, None], float("inf")), None


def test_a_gradient_while_the_loss_is_finite(files, tmp_path, monkeypatch):
    marked = {}
    read = ppo.token_values

    def values(model, ids, mask, length):
        token = marked.setdefault("token", ids[0, -1].item())
        rows = (ids[:, -length:] == token).any(1)
        return Explode.apply(read(model, ids, mask, length), rows)

    monkeypatch.setattr(ppo, "token_values", values)
    _, facts, tensors = stopped(
        "ppo", files, tmp_path / "ppo", r"ppo update 1: the gradient of value parameter \S+ is not finite in row"
    )
    assert marked["token"] in tensors["ids"][facts["row"]] and "reply" in facts
    assert facts["tensors"]["advantages"]["rows"] == []


def test_steps_that_are_too_large_end_in_the_same_way(files, tmp_path):
    for stage in ("sft", "reward", "dpo", "ppo"):
        message, _, _ = stopped(
            stage, files, tmp_path / stage, rf"{stage} (step|update) \d+: the ", learning_rate=1e30, max_grad_norm=0.0
        )
        assert message.endswith(loop.NOT_FINITE_ADVICE) and "\n" not in message


# ------------------------------------------------------------------------------------------------------ small parts


def test_finite_tensors_pass_and_the_first_broken_one_is_named():
    good = {"a": torch.zeros(3, 2), "b": torch.ones(3)}
    check_finite(good)
    broken = {"a": torch.zeros(3, 2), "b": torch.tensor([1.0, float("-inf"), float("nan")])}
    with pytest.raises(NotFinite, match=r"the b are not finite \(-inf\)") as caught:
        check_finite(broken, beside={"ids": torch.arange(3)})
    assert caught.value.row == 1 and set(caught.value.tensors) == {"a", "b", "ids"}


def test_two_batches_of_one_step_are_both_kept_and_other_errors_pass(tmp_path):
    config = sft.SFTConfig(model="m", data="d", output_dir=str(tmp_path))
    for _ in range(2):
        with pytest.raises(NotFinite), keeping(tmp_path, "sft step 3", ["p"], config):
            check_finite({"x": torch.full((1,), float("nan"))})
    assert sorted(path.name for path in (tmp_path / "not-finite").iterdir()) == ["sft-step-3", "sft-step-3-2"]
    with pytest.raises(UserError, match=r"^other$"), keeping(tmp_path, "sft step 4", ["p"], config):
        raise UserError("other")
