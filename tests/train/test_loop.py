import io
import itertools
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from rlhf_fast.train import loop
from rlhf_fast.train.checkpoint import to_json
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.model import load_policy
from rlhf_fast.train.record import Progress, RunLog, Stage
from rlhf_fast.train.resume import State

LENGTHS = [(7 * i) % 40 + 1 for i in range(103)]


# ------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("generator", [None, 0])
def test_every_row_is_in_exactly_one_batch(generator):
    generator = None if generator is None else torch.Generator().manual_seed(generator)
    batches = loop.length_batches(LENGTHS, 8, generator)
    assert sorted(row for batch in batches for row in batch) == list(range(103))
    assert sorted(map(len, batches)) == [7] + [8] * 12


def test_batches_are_shuffled_and_yet_of_similar_length():
    first, second = (loop.length_batches(LENGTHS, 8, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert first == loop.length_batches(LENGTHS, 8, torch.Generator().manual_seed(0)) and first != second
    padding = sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in first) - sum(LENGTHS)
    assert padding < 0.15 * sum(LENGTHS)
    assert [max(LENGTHS[i] for i in batch) for batch in first] != sorted(
        max(LENGTHS[i] for i in batch) for batch in first
    )


def test_micro_batches_hold_the_rows_shortest_first():
    parts = loop.micro_batches([5, 3, 8, 1, 2], LENGTHS, 2)
    assert [len(part) for part in parts] == [2, 2, 1]
    flat = [LENGTHS[row] for part in parts for row in part]
    assert flat == sorted(flat)
    assert len(loop.micro_batches([5, 3, 8], LENGTHS, 0)) == 1


# -------------------------------------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load_policy(tiny.save_base(tmp_path_factory.mktemp("base")))


def test_the_encoder_fits_text_to_the_context_and_counts_what_it_cut(policy):
    encoder = loop.Encoder(*policy, max_prompt_tokens=100, max_response_tokens=8)
    assert encoder.max_prompt_tokens == tiny.CONTEXT - 8
    short, long = encoder.prompt("the cat"), encoder.prompt("the cat sat " * 60)
    assert short[0] == policy[1].bos_token_id and len(long) == tiny.CONTEXT - 8
    assert encoder.response(" ran")[-1] == policy[1].eos_token_id
    cut = encoder.response(" the cat sat on a mat" * 9)
    assert len(cut) == 8 and policy[1].eos_token_id not in cut
    assert (encoder.truncated_prompts, encoder.truncated_responses) == (1, 1)


def test_replies_longer_than_the_context_are_refused(policy):
    with pytest.raises(UserError, match="leave no room for a prompt in the model's context of 64 tokens"):
        loop.Encoder(*policy, max_prompt_tokens=10, max_response_tokens=64)


# ------------------------------------------------------------------------------------------------------ schedule


def test_the_rate_warms_up_and_falls_to_nearly_nothing():
    def rates(schedule, warmup_steps=0):
        return [loop.learning_rate(s, 10, peak=1.0, schedule=schedule, warmup_steps=warmup_steps) for s in range(1, 11)]

    assert rates("linear") == pytest.approx([1 - i / 10 for i in range(10)])
    assert rates("constant", 4) == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 6)
    assert rates("cosine") == pytest.approx([(1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)])
    warm = rates("linear", 4)
    assert warm[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and warm[-1] == pytest.approx(1 / 6)


def test_means_average_since_the_last_look():
    means = loop.Means()
    for value in (1.0, 3.0):
        means.add({"a": torch.tensor(value), "b": torch.tensor(2 * value, dtype=torch.float64)})
    assert means.take() == {"a": 2.0, "b": 4.0}
    means.add({"a": torch.tensor(7)})
    assert means.take() == {"a": 7.0}


def test_means_can_be_saved_and_restored_to_the_bit():
    means, again = loop.Means(), loop.Means()
    for value in (0.1, float("nan"), 1e-30, float("inf")):
        means.add({"a": torch.tensor(value), "b": torch.tensor(7), "c": torch.tensor(1 / 3, dtype=torch.bfloat16)})
        again.restore(json.loads(to_json(means.state())), torch.device("cpu"))
        assert str(again.state()) == str(means.state())
    for both in (means, again):
        both.add({"a": torch.tensor(0.2), "b": torch.tensor(1), "c": torch.tensor(0.5)})
    assert str(again.take()) == str(means.take())
    again.restore(loop.Means().state(), torch.device("cpu"))
    assert again.state() == {"names": [], "rows": []}


# ---------------------------------------------------------------------------------------------------------- step


def linear(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2)


def step(model, gradient, loss=1.0, max_grad_norm=1.0, rate=0.1):
    optimizer = loop.adamw([model], weight_decay=0.0, epsilon=1e-5)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    return loop.clip_and_step(
        optimizer,
        {"model": model},
        {"loss": torch.tensor(loss)},
        rate=rate,
        max_grad_norm=max_grad_norm,
        where="sft step 7",
    )


def test_a_step_clips_updates_and_clears():
    model, expected = linear(), linear()
    norms = step(model, 2.0)
    assert norms["model"].item() == pytest.approx(2 * math.sqrt(8))
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.1, eps=1e-5, weight_decay=0.0)
    for parameter in expected.parameters():
        parameter.grad = torch.full_like(parameter, 1 / math.sqrt(8))
    optimizer.step()
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.grad is None


def test_each_model_is_clipped_by_its_own_norm_and_zero_means_never():
    small, large = linear(0), linear(1)
    optimizer = torch.optim.SGD([*small.parameters(), *large.parameters()], lr=0.0)
    models = {"small": small, "large": large}
    for limit, expected in ((1.0, (0.1, 1 / math.sqrt(8))), (0.0, (0.1, 100.0))):
        starts = {name: [p.detach().clone() for p in model.parameters()] for name, model in models.items()}
        for model, gradient in ((small, 0.1), (large, 100.0)):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
        loop.clip_and_step(optimizer, models, {}, rate=1.0, max_grad_norm=limit, where="x")
        for (name, model), moved in zip(models.items(), expected, strict=True):
            for parameter, start in zip(model.parameters(), starts[name], strict=True):
                torch.testing.assert_close(
                    start - parameter.detach(), torch.full_like(start, moved), rtol=1e-3, atol=1e-3
                )


@pytest.mark.parametrize(
    ("gradient", "loss", "words"),
    [
        (1.0, math.nan, "the loss is nan"),
        (1.0, math.inf, "the loss is inf"),
        (math.nan, 1.0, "the gradient of model parameter weight is not finite"),
        (math.inf, 1.0, "the gradient of model parameter weight is not finite"),
        (3e38, 1.0, "the norm of the gradient is not finite"),
    ],
)
def test_what_is_not_finite_stops_before_the_update(gradient, loss, words):
    model, before = linear(), linear()
    with pytest.raises(UserError, match=f"sft step 7: {words}; nothing was updated"):
        step(model, gradient, loss)
    for mine, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert mine.equal(theirs)


# ------------------------------------------------------------------------------------------------------- process


def test_devices_are_checked():
    assert loop.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'gpu' is not known"):
        loop.pick_device("gpu")
    if not torch.cuda.is_available():
        assert loop.pick_device("auto") == torch.device("cpu")
        with pytest.raises(UserError, match="sees no GPU"):
            loop.pick_device("cuda:0")


def test_small_models_run_on_one_thread_unless_told_otherwise():
    before, cpu = torch.get_num_threads(), torch.device("cpu")
    try:
        for threads, parameters, expected in ((0, 100, 1), (2, 100, 2), (0, loop.SMALL_MODEL, loop.DEFAULT_THREADS)):
            loop.use_threads(threads, parameters=parameters, device=cpu)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_the_order_of_the_data_does_not_depend_on_what_was_sampled():
    first = loop.seed_everything(3)
    torch.rand(10)
    second = loop.seed_everything(3)
    assert torch.randperm(9, generator=first).equal(torch.randperm(9, generator=second))


def test_everything_random_is_seeded():
    def draws():
        loop.seed_everything(2**40 + 3)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draws() == draws()


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 0, 0, 1), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (0, 10, 0, 0.2775)],
)
def test_wilson_interval(successes, n, low, high):
    """Values of Newcombe 1998 / statsmodels `proportion_confint(method="wilson")`."""
    assert loop.wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


# -------------------------------------------------------------------------------------------------------- record


def test_the_log_is_strict_json_flushed_line_by_line_and_shown_by_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path)
    log.log(1, {"loss": 2.5, "odd": math.nan})
    lines = tiny.read_log(tmp_path)
    log.log(2, {"loss": 1.5, "odd": math.inf})
    log.close()
    assert lines == [{"step": 1, "loss": 2.5, "odd": "nan"}]
    assert tiny.read_log(tmp_path)[1] == {"step": 2, "loss": 1.5, "odd": "inf"}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]


def test_progress_without_a_terminal_prints_the_first_and_the_last_line():
    stream = io.StringIO()
    progress = Progress("sft", 5, stream)
    for done in range(1, 6):
        progress.update(done, f"loss {done}")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("sft  1/5") and lines[1].startswith("sft  5/5")
    assert lines[0].endswith("s left  loss 1") and lines[1].endswith("/s  0 s left  loss 5")


def test_progress_after_a_kill_counts_its_own_steps_for_the_speed(monkeypatch):
    clock, stream = [0.0], io.StringIO()
    monkeypatch.setattr("rlhf_fast.train.record.time.monotonic", lambda: clock[0])
    progress = Progress("sft", 10, stream, before=6)
    clock[0] = 2.0
    progress.update(8, "x")
    assert stream.getvalue() == "sft  8/10  1/s  2 s left  x\n"


def test_progress_on_a_terminal_shows_a_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    progress = Progress("sft", 2, stream)
    progress.update(2, "loss 1")
    progress.close()
    assert "2/2" in stream.getvalue() and "loss 1" in stream.getvalue()


def test_a_stage_writes_its_summary_last_and_only_when_it_finished(tmp_path):
    def stage(name):
        config = loop.StageConfig(model="m", data=str(tiny.write_pairs(tmp_path / "pairs")), output_dir=name, seed=5)
        model = linear()
        optimizer = loop.adamw([model], weight_decay=0.0, epsilon=1e-5)
        state = State({"model": model}, optimizer, torch.Generator(), SimpleNamespace(), {})
        return Stage("sft", config, tmp_path / name, 1, 42, torch.device("cpu"), {"rows_used": 3}, state)

    with stage("done") as run:
        run.log(1, {"loss": 1.0}, show=("loss",))
        assert not (tmp_path / "done" / "stage.json").exists()
        run.finish({"loss": 1.0})
    summary = json.loads((tmp_path / "done" / "stage.json").read_text())
    assert summary["stage"] == "sft" and summary["config"]["seed"] == 5 and summary["parameters"] == 42
    assert summary["data"] == {"rows_used": 3} and summary["results"] == {"loss": 1.0}
    assert set(summary["versions"]) == {"rlhf_fast", "torch", "transformers", "python", "build"}
    assert summary["started"].endswith("+00:00") and summary["seconds"] > 0 and summary["cpu_seconds"] > 0
    with pytest.raises(RuntimeError, match="stop"), stage("failed"):
        raise RuntimeError("stop")
    assert not (tmp_path / "failed" / "stage.json").exists()


@pytest.mark.parametrize("size", [0, 3])
def test_micro_batches_hold_so_many_tokens_and_no_fewer_than_they_could(size):
    rng = random.Random(0)
    for _ in range(200):
        prompts, replies = ([rng.randint(1, 20) for _ in range(30)] for _ in range(2))
        lengths = [a + b for a, b in zip(prompts, replies, strict=True)]
        rows, tokens = rng.sample(range(30), 20), rng.randint(20, 200)

        def padded(part, widths):
            return len(part) * sum(max(width[row] for row in part) for width in widths)

        for widths in ((), (prompts, replies)):
            parts = loop.micro_batches(rows, lengths, size, tokens, widths=widths)
            assert sorted(row for part in parts for row in part) == sorted(rows)
            kept = widths or (lengths,)
            assert all(len(part) == 1 or padded(part, kept) <= tokens for part in parts)
            assert all(len(part) <= (size or 20) for part in parts)
            if not size:  # no part has room for the row behind it
                assert all(padded([*a, b[0]], kept) > tokens for a, b in itertools.pairwise(parts))
    assert loop.micro_batches([2, 0, 1], [5, 1, 3], 0) == [[1, 2, 0]] and loop.micro_batches([], [], 0, 8) == []
