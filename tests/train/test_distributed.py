"""Two processes train what one trains, to rounding, in float64; they continue what they left, and only one of them writes.

With DeepSpeed in float32, in which it holds what it shares out.
"""

import csv
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from rlhf_fast.train import checks, distributed, dpo, fsdp, guard, loop, model, ppo, record, reward, rollout, sft, zero
from rlhf_fast.train.errors import UserError
from tests.train import kill
from tests.train.ranks import free_port, together

ROOT = Path(__file__).parents[2]
STAGES = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}
CLOSE = {"rel": 1e-7, "abs": 1e-9}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model, pairs of which the last batch is a single one, and a reward model."""
    place = tmp_path_factory.mktemp("world")
    tiny.save_base(place / "base")
    tiny.write_pairs(place / "pairs.jsonl", count=40)
    asked = config("reward", place, num_train_epochs=1)
    reward.train(dataclasses.replace(asked, output_dir=str(place / "judge")))
    return place


def config(stage, place, **options):
    kind = {"sft": sft.SFTConfig, "reward": reward.RewardConfig, "dpo": dpo.DPOConfig, "ppo": ppo.PPOConfig}[stage]
    own = {"max_response_tokens": 24, "num_train_epochs": 2, "logging_steps": 1, "batch_size": 7}
    if stage == "reward":
        own |= {"normalize_samples": 8}
    if stage == "ppo":
        own = {"response_length": 6, "batch_size": 8, "total_episodes": 24, "num_ppo_epochs": 2, "num_mini_batches": 2}
        own |= {"reward_model": str(place / "judge"), "missing_eos": "none", "min_reward_accuracy": None}
    places = {"model": str(place / "base"), "data": str(place / "pairs.jsonl"), "output_dir": "out"}
    return kind(**places | {"heldout_fraction": 0.2, "learning_rate": 1e-3, "checks": False} | own | options)


def exactly(stage, dtype):
    """Let the stage load its models in `dtype`, so that processes differ from one by nothing but the order of sums."""
    for name in ("load_policy", "reward_from_policy", "load_scalar_model"):
        if hasattr(STAGES[stage], name):
            setattr(STAGES[stage], name, functools.partial(widened, getattr(model, name), dtype))
    if stage == "ppo":
        ppo.roll_out = one_by_one


def widened(load, wanted, directory, **options):
    return load(directory, **options | {"dtype": wanted})


def one_by_one(models, prompts, queries, **options):
    """Replies that depend on their prompts alone, and on how many were given to it, whichever process gives them."""
    parts, given = [], Counter()
    for prompt, query in zip(prompts, queries, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(sum(map(ord, prompt)) + given[prompt])
            given[prompt] += 1
            replies = rollout.roll_out(models, [prompt], [query], **options)
        empty = torch.zeros(replies.response_mask.shape, dtype=torch.float64)
        parts.append(rollout.Scored(replies, empty[:, 0], empty, empty, None))
    return rollout.joined(parts, models.tokenizer.pad_token_id).rollout


def trained(stage, asked, dtype="float64"):
    """Train -> weights and random state at the end, processes, numbers that the optimizer keeps in this one."""
    exactly(stage, dtype)
    seen = {}
    finish = STAGES[stage].Stage.finish

    def spy(self, results):
        parameters = [p for m in self.state.models.values() for p in m.parameters()]
        seen["weights"] = [fsdp.full(p.detach()).numpy() for p in parameters]
        assert all(distributed.is_share(p) for p in parameters) == fsdp.on()
        kept = [x for moments in self.state.optimizer.state.values() for x in moments.values()]
        seen["kept"] = sum(x.numel() for x in kept if x.dim())
        finish(self, results)

    STAGES[stage].Stage.finish = spy
    STAGES[stage].train(asked)
    return seen["weights"], torch.rand(1).item(), distributed.count(), seen["kept"]


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
ZERO_1, ZERO_2 = (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage} for stage in "12")
INSTALLED = importlib.util.find_spec("deepspeed") is not None
# On a CPU it would compile what lets processes of one machine share memory, for a minute.
UNCOMPILED = "import deepspeed; deepspeed.ops.__compatible_ops__.clear()"
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="DeepSpeed is not installed")


ENVIRONMENTS = [
    pytest.param({}, id="whole"),
    pytest.param(FSDP, id="sharded"),
    pytest.param(ZERO_1, id="ZeRO 1", marks=needs_deepspeed),
    pytest.param(ZERO_2, id="ZeRO 2", marks=needs_deepspeed),
]
WHOLE_AND_SHARDED = pytest.mark.parametrize("environment", [{}, FSDP], ids=["whole", "sharded"])


def told(environment, work):
    """`work` in processes whose launcher was told so."""

    def there():
        os.environ |= environment
        if zero.asked() and INSTALLED:
            exec(UNCOMPILED)
        return work()

    return there


CASES = {
    "sft": ("sft", {}),
    "sft in micro-batches": ("sft", {"micro_batch_size": 2}),
    "sft in micro-batches of tokens": ("sft", {"micro_batch_tokens": 30}),
    "reward": ("reward", {}),
    "dpo": ("dpo", {}),
    "ipo": ("dpo", {"loss_type": "ipo", "micro_batch_size": 2}),
    "ppo": ("ppo", {"micro_batch_tokens": 36}),
    "ppo, minibatches that do not divide": ("ppo", {"batch_size": 9, "num_mini_batches": 3, "total_episodes": 27}),
    "ppo with an adapter": ("ppo", {"lora_rank": 2, "gradient_checkpointing": True}),
    "ppo with an adapter's average": ("ppo", {"lora_rank": 2, "ema_decay": 0.9}),
    "ppo-ptx and an average": ("ppo", {"ptx_coef": 2.0, "ema_decay": 0.9, "value_learning_rate": 3e-3}),
    "ppo-max": (
        "ppo",
        {
            "reward_scaling": True,
            "score_clip": 0.8,
            "advantage_clip": 0.5,
            "critic_warmup": 1,
            "rollout_micro_batch_size": 3,
            "micro_batch_tokens": 36,
        },
    ),
    "grpo": ("ppo", {"advantage": "grpo", "group_size": 4, "entropy_coef": 0.01}),
    "rloo": ("ppo", {"advantage": "rloo", "group_size": 4, "micro_batch_size": 3}),
}


# What is run with sharded models as well: each stage, and unequally many passes in the two processes.
SHARDED = {
    "sft in micro-batches of tokens",
    "reward",
    "ipo",
    "ppo-max",
    "ppo with an adapter's average",
}


def without_times(line):
    return {k: v for k, v in line.items() if k not in kill.CLOCKS}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(world, tmp_path, case):
    stage, options = CASES[case]
    if "lora_rank" in options:
        pytest.importorskip("peft")
    work = functools.partial(trained, stage, config(stage, world, **options))
    (alone,) = together(work, tmp_path / "one", count=1)
    log, files = [tiny.read_log(tmp_path / "one" / "out"), load_file(tmp_path / "one" / "out" / "model.safetensors")]
    assert len(log) > 2
    for name, environment in {"two": {}, "sharded": FSDP}.items() if case in SHARDED else {"two": {}}.items():
        first, second = together(told(environment, work), tmp_path / name)
        assert (alone[2], first[2], second[2]) == (1, 2, 2)
        for one, a, b in zip(alone[0], first[0], second[0], strict=True):
            assert (a == b).all()
            torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(one), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            load_file(tmp_path / name / "out" / "model.safetensors"), files, rtol=1e-6, atol=1e-8
        )
        for one, two in zip(log, tiny.read_log(tmp_path / name / "out"), strict=True):
            if stage == "dpo" and one is log[0]:  # before the first update every pair is a tie, which rounding decides
                one, two = ({k: v for k, v in x.items() if k != "rewards/accuracies"} for x in (one, two))
            assert without_times(two) == pytest.approx(without_times(one), **CLOSE)


# With DeepSpeed, whose weights and gradients are in float32: each stage, and unequally many passes in the two processes.
ZERO = {
    "sft in micro-batches of tokens": ZERO_2,
    "reward": ZERO_1,
    "dpo": ZERO_1,
    "ipo": ZERO_2,
    "ppo, minibatches that do not divide": ZERO_1,
    "ppo with an adapter's average": ZERO_2,
    "ppo-ptx and an average": ZERO_1,
    "ppo-max": ZERO_2,
    "grpo": ZERO_2,
    "rloo": ZERO_1,
}


@needs_deepspeed
@pytest.mark.parametrize("case", ZERO)
def test_two_processes_with_zero_train_what_one_trains(world, tmp_path, case):
    stage, options = CASES[case]
    if "lora_rank" in options:
        pytest.importorskip("peft")
    work = functools.partial(trained, stage, config(stage, world, **options), "float32")
    (alone,) = together(work, tmp_path / "one", count=1)
    first, second = together(told(ZERO[case], work), tmp_path / "two")
    for a, b in zip(first[0], second[0], strict=True):
        assert (a == b).all()
    weights, log = [], []
    for name in ("one", "two"):
        weights.append(load_file(tmp_path / name / "out" / "model.safetensors"))
        log.append([without_times(line) for line in tiny.read_log(tmp_path / name / "out")])
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-5)
    if stage == "dpo":  # before the first update every pair is a tie, which rounding decides
        log = [[{k: v for k, v in line.items() if "accuracies" not in k} for line in lines] for lines in log]
    for one, two in zip(*log, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    summary = json.loads((tmp_path / "two" / "out" / "stage.json").read_text())
    assert summary["sharding"] == f"ZeRO {ZERO[case]['ACCELERATE_DEEPSPEED_ZERO_STAGE']}"
    assert first[3] == pytest.approx(alone[3] / 2, rel=0.01) == second[3]


def test_ppo_draws_other_numbers_in_each_process(world, tmp_path):
    def work():
        drawn = []
        original = ppo.roll_out

        def spy(*arguments, **options):
            drawn.append((list(arguments[1]), torch.initial_seed()))
            return original(*arguments, **options)

        ppo.roll_out = spy
        ppo.train(config("ppo", world, seed=5))
        return drawn

    first, second = together(work, tmp_path)
    assert len(first) == len(second) == 3
    assert all(len(a) == len(b) == 4 and not set(a) & set(b) for (a, _), (b, _) in zip(first, second, strict=True))
    assert {seed for _, seed in first} == {5} and {seed for _, seed in second} == {5 + 100_003}
    assert [line["response/length"] > 0 for line in tiny.read_log(tmp_path / "out")]


EVERYTHING = {"ptx_coef": 0.5, "ema_decay": 0.8, "reward_scaling": True, "num_sample_generations": 3}


KILLED = {
    "sft": ("sft", {}, {}),
    "ppo": ("ppo", EVERYTHING, {}),
    "ppo with sharded models": ("ppo", EVERYTHING, FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}),
    "sft with ZeRO 1": ("sft", {}, ZERO_1),
    "ppo with ZeRO 2": ("ppo", EVERYTHING | {"critic_warmup": 1}, ZERO_2),
}


def skipped(cases):
    """`cases` by name, those that need DeepSpeed marked so."""
    return [pytest.param(name, marks=[needs_deepspeed] if "ZeRO" in name else []) for name in cases]


@pytest.mark.parametrize("case", skipped(KILLED))
def test_what_was_killed_continues_with_the_same_bits(world, tmp_path, case):
    stage, options, environment = KILLED[case]
    asked = config(stage, world, save_every=0.0, **options)
    train = STAGES[stage].train

    def killed():
        original, steps = loop.clip_and_step, []

        def last(*arguments, **options):
            steps.append(1)
            if len(steps) == 6:
                os._exit(0)  # both processes, in the middle of an update
            return original(*arguments, **options)

        loop.clip_and_step = last
        train(asked)

    def whole():
        train(asked)

    place = tmp_path / "killed"
    with pytest.raises(FileNotFoundError):
        together(told(environment, killed), place)
    assert list((place / "out" / "checkpoints").iterdir())
    with pytest.raises(UserError, match="was left by 2 processes and 1 are here; start as many again"):
        raise together(whole, place, count=1)[0]
    together(told(environment, whole), place)
    together(told(environment, whole), tmp_path / "peace")
    assert "continued after step" in (place / "output-0.txt").read_text()
    assert not (place / "output-1.txt").read_text()
    got, want = (kill.result(where) for where in (place, tmp_path / "peace"))
    assert not kill.difference(got, want) and "out/model.safetensors" in got


@pytest.mark.parametrize("environment", [{}, FSDP | BF16], ids=["whole", "sharded, in bfloat16"])
def test_a_guard_looks_once_and_all_stop_together(world, tmp_path, environment):
    """A judge that never says the same twice: both processes act on what the first one heard."""
    options = {"eval_every": 1, "guard": "stop", "total_episodes": 24, "checks": True}

    def work():
        guard.Guard.alarm = lambda self: "it fell" if len(self.history) == 3 else None
        heard = []

        def judge(samples):
            heard.append(1)
            return [float(os.getpid() % 97 - 10 * len(heard) + i) for i in range(len(samples))]

        ppo.train(config("ppo", world, **options), judge=judge)
        return len(heard)

    first, second = together(told(environment, work), tmp_path)
    assert first > 0 and second == 0
    looks = [json.loads(line) for line in (tmp_path / "out" / "looks.jsonl").read_text().splitlines()]
    assert [look["update"] for look in looks] == [0, 1, 2]
    kept, best = (load_file(tmp_path / "out" / place / "model.safetensors") for place in ("", "best"))
    assert kept.keys() == best.keys() and all(kept[name].equal(best[name]) for name in kept)


def test_one_process_tells_the_trackers_and_writes_replies(world, tmp_path):
    def work():
        opened, original = [], record.open_trackers

        def spy(*arguments):
            opened.append(arguments[0])
            return original(*arguments)

        record.open_trackers = spy
        ppo.train(config("ppo", world, report_to="csv,tensorboard", num_sample_generations=1))
        return opened

    assert together(work, tmp_path) == [["csv,tensorboard"], []]
    with (tmp_path / "out" / "log.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 2, 3]
    replies = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in replies] == [3] * 8  # of both processes


def test_a_tracker_that_cannot_begin_stops_all_processes(world, tmp_path):
    def work():
        def refuse(*arguments):
            raise UserError("wandb cannot begin")

        record.open_trackers = refuse
        sft.train(config("sft", world))

    assert list(map(str, together(work, tmp_path))) == ["wandb cannot begin"] * 2


@WHOLE_AND_SHARDED
def test_conversations_are_shared_as_texts_are(tmp_path, environment):
    tiny.save_chat_base(tmp_path / "base")
    turns = [[{"role": "user", "content": f"the cat {i}"}] for i in range(16)]
    replies = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    tiny.write_rows(tmp_path / "pairs.jsonl", [{"prompt": prompt, **replies} for prompt in turns])
    options = {"reward_model": None, "total_episodes": 8, "stop_token": "}"}
    asked = config("ppo", tmp_path, **options)
    outcomes = together(told(environment, lambda: str(ppo.train(asked, reward=tiny.count_letters))), tmp_path)
    assert outcomes == ["out", "out"]
    written = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert len(written) == 8 and all(row["prompt"].startswith("<|im_start|>user\nthe cat") for row in written)


def test_a_mistake_is_the_same_in_all_processes(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    errors = together(lambda: sft.train(config("sft", world)), tmp_path)
    assert all("already holds files" in str(error) for error in errors) and str(errors[0]) == str(errors[1])


def test_too_few_rows_for_the_processes_are_refused(world, tmp_path):
    errors = together(lambda: ppo.train(config("ppo", world, batch_size=2, num_mini_batches=2)), tmp_path)
    assert all("'batch_size' 2 leaves a process without a row: 2 processes" in str(error) for error in errors)


@pytest.mark.parametrize(
    ("environment", "options", "words"),
    [
        (FSDP | {"FSDP_VERSION": "1"}, {}, "FSDP version 1 was asked for and 2 is needed; give --fsdp_version 2"),
        (
            FSDP | {"FSDP_OFFLOAD_PARAMS": "true"},
            {},
            "fsdp_offload_params true was asked for and only false is supported",
        ),
        (
            FSDP | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"},
            {},
            "FSDP finds no Block in LlamaForCausalLM; name the class",
        ),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, {}, "must be true (as ZeRO 3) or false (as ZeRO 2)"),
        (FSDP, {"optimizer": "adamw_8bit"}, "'optimizer' adamw_8bit does not know the shares of FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM was asked for, and it is not supported"),
        (
            DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            {},
            "--use_fsdp --fsdp_version 2 shards weights as ZeRO 3",
        ),
        (
            DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"},
            {},
            "max_grad_norm of the stage is 1.0; give both the same",
        ),
        (DEEPSPEED, {"dtype": "bfloat16"}, "DeepSpeed is for weights in float32 and dtype is bfloat16"),
        (DEEPSPEED, {"optimizer": "adamw_8bit"}, "'optimizer' adamw_8bit does not know the shares of DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "mixed_precision fp16; it must be bf16"),
        (BF16, {"dtype": "bfloat16"}, "mixed_precision bf16 is for weights in float32 and dtype is bfloat16"),
    ],
)
def test_what_a_launcher_may_not_ask_for_is_refused(world, tmp_path, environment, options, words):
    errors = together(told(environment, lambda: sft.train(config("sft", world, **options))), tmp_path)
    assert all(words in str(error) for error in errors) and not (tmp_path / "out").exists()


def test_mixed_precision_is_bfloat16_over_weights_in_float32(world, tmp_path):
    """The loss is that in float32 to the rounding of bfloat16, and not the same, in one process and in two with shares."""
    losses = {}
    runs = [("float32", 1, {}), ("one", 1, BF16), ("shares", 2, BF16 | FSDP)]
    runs += [("zero", 2, BF16 | ZERO_2)] if INSTALLED else []
    for name, count, environment in runs:
        work = told(environment, lambda: str(sft.train(config("sft", world, checks=True))))
        assert together(work, tmp_path / name, count=count) == ["out"] * count
        weights = load_file(tmp_path / name / "out" / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        losses[name] = tiny.read_log(tmp_path / name / "out")[0]["loss"]
    assert losses["one"] == pytest.approx(losses["float32"], rel=2e-3) == losses["shares"]
    assert len({losses[name] for name in ("float32", "one", "shares")}) == 3
    assert losses.get("zero", losses["one"]) == pytest.approx(losses["one"], rel=1e-6)


def test_all_processes_hear_of_a_weight_that_is_not_finite_in_the_share_of_one(tmp_path):
    def work():
        distributed.join("cpu")
        shared = fsdp.spread(tiny.model())
        shares = shared.get_parameter("model.layers.1.mlp.up_proj.weight").detach().to_local()
        shares[0] = torch.nan if distributed.rank() == 1 else 0.0
        checks.check_weights({"model": shared})

    errors = together(told(FSDP, work), tmp_path)
    assert all("the weights of the model hold NaN or infinity in model.layers.1.mlp" in str(error) for error in errors)


def test_gradients_that_no_process_has_stay_absent_and_shares_are_summed(tmp_path):
    def work():
        distributed.join("cpu")
        layers = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in ("both", "one", "none")})
        layers["both"].weight.grad = torch.full((1, 1), 1.0 + distributed.rank())
        if distributed.is_main():
            layers["one"].weight.grad = torch.full((1, 1), 5.0)
        stats = {"loss": torch.tensor(0.25), "lowest": torch.tensor(-1.0 - distributed.rank())}
        stats |= {"here": torch.tensor(7.0)} if distributed.is_main() else {}
        sums = distributed.combined({"layers": layers}, stats, {"lowest": min})
        grads = {name: None if x.weight.grad is None else x.weight.grad.item() for name, x in layers.items()}
        return {name: value.item() for name, value in sums.items()}, grads

    for sums, grads in together(work, tmp_path):
        assert sums == {"loss": 0.5, "lowest": -2.0, "here": 7.0}
        assert grads == {"both": 3.0, "one": 5.0, "none": None}


def test_shares_are_of_about_the_same_size(monkeypatch):
    lengths, rows = [5, 90, 7, 80, 6, 70, 8], [0, 1, 2, 3, 4, 5, 6]
    assert distributed.share(rows, lengths) == rows
    shares = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "count", lambda: 2)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share(rows, lengths))
        assert distributed.stretch(7) == [slice(0, 3), slice(3, 7)][rank]
    assert sorted(shares[0] + shares[1]) == rows
    assert abs(sum(lengths[row] for row in shares[0]) - sum(lengths[row] for row in shares[1])) < 90


def test_joined_rollouts_are_the_rows_of_each(world):
    settings = config("ppo", world)
    models = ppo.load_models(settings, None, torch.device("cpu"))
    prompts = ["the cat", "a dog sat on the hill", "mat", "ran"]
    queries = [[1, *models.tokenizer.encode(prompt, add_special_tokens=False)] for prompt in prompts]
    replies = one_by_one(models, prompts, queries, response_length=6, temperature=0.7)
    options = {"temperature": 0.7, "missing_eos": "none", "missing_eos_penalty": 0.0, "micro_batch_size": 0}
    whole = rollout.score(replies, models, **options)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = one_by_one(models, prompts[rows], queries[rows], response_length=6, temperature=0.7)
        parts.append(rollout.score(part, models, **options))
    got = rollout.joined(parts, models.tokenizer.pad_token_id)
    assert got.rollout.samples == whole.rollout.samples and got.rollout.ids.equal(whole.rollout.ids)
    assert got.rollout.mask.equal(whole.rollout.mask) and got.rollout.finished.equal(whole.rollout.finished)
    for name in ("scores", "logprobs", "ref_logprobs", "values"):
        torch.testing.assert_close(getattr(got, name), getattr(whole, name))


# The first is its word for processes of one machine, which without GPUs find each other on the CPU.
@pytest.mark.parametrize(
    ("kind", "sharding"),
    [
        ("--multi_gpu", None),
        ("--use_fsdp --fsdp_version 2", "FSDP2"),
        pytest.param("--use_deepspeed --zero_stage 2 --gradient_clipping 1.0", "ZeRO 2", marks=needs_deepspeed),
    ],
)
def test_a_launcher_starts_a_stage_once_for_all(world, tmp_path, kind, sharding):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if importlib.util.find_spec("accelerate"):
        words = [sys.executable, "-m", "accelerate.commands.launch", *kind.split(), "--num_processes", "2"]
        port = ("--main_process_port", str(free_port()))
        words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *port]
    places = ["--model", world / "base", "--data", world / "pairs.jsonl", "--output_dir", tmp_path / "out"]
    flags = ["--heldout_fraction", "0.2", "--max_response_tokens", "24", "--batch_size", "8"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    program = tmp_path / "program.py"
    program.write_text(
        f"from rlhf_fast import cli\n{UNCOMPILED if 'deepspeed' in kind else ''}\nraise SystemExit(cli.main())\n"
    )
    command = [*words, program, "sft", *places, *flags]
    end = subprocess.run(map(str, command), env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert end.returncode == 0, end.stderr
    assert end.stdout.count("report:") == 1
    summary = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert (summary["processes"], summary.get("sharding")) == (2, None if "--standalone" in words else sharding)


def test_commands_of_one_process_say_so(monkeypatch, capsys):
    from rlhf_fast import cli

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["run", "--data", "x", "--output_dir", "y"]) == 2
    assert "'run' runs in one process; launch sft, reward, ppo, dpo with several" in capsys.readouterr().err
    assert cli.main(["sft", "--model", "x", "--data", "x", "--output_dir", "y", "--dry-run"]) == 2
    assert "--dry-run looks at one process" in capsys.readouterr().err


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_gradient_that_is_not_finite_stops_all_processes_at_the_same_update(world, tmp_path, environment):
    options = {"learning_rate": 1e30, "max_grad_norm": 0.0, "lr_schedule": "constant"}
    errors = together(told(environment, lambda: sft.train(config("sft", world, **options))), tmp_path)
    where = {str(error).split(":")[0] for error in errors}
    assert len(where) == 1 and where.pop().startswith("sft step ")
    assert all("nothing was updated and the batch is kept in" in str(error) for error in errors)
    assert all(" in row " in str(error) for error in errors)
    kept = sorted(path.name for path in (tmp_path / "out" / "not-finite").iterdir())
    assert len(kept) == 2 and kept[1] == f"{kept[0]}-process-1"
