"""Killed, damaged, changed: a share of the two soak tests, and what they do not look at."""

import csv
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlhf_fast.train import loop, resume
from rlhf_fast.train.checkpoint import LOCK, locked
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.record import Stage
from rlhf_fast.train.resume import Checkpoints, Damaged, Record, State
from tests.train import damage, kill

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world():
    threads = torch.get_num_threads()
    with kill.made() as made:
        yield made
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def peaceful(world):
    return {stage: kill.in_peace(world, stage) for stage in (*damage.STAGES, "grpo", "dpo", "run")}


@pytest.fixture(scope="module")
def killed(world, peaceful):
    return {stage: damage.leave_killed(world, stage) for stage in damage.STAGES}


# --------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize(
    ("stage", "kills"), [("sft", 4), ("reward", 4), ("ppo", 4), ("grpo", 2), ("dpo", 2), ("run", 3)]
)
def test_killed_at_random_it_ends_with_the_same_bits(world, peaceful, stage, kills):
    first = peaceful[stage].events // 2
    killed, wrong = kill.ordeal(world, stage, peaceful[stage], random.Random(stage), kills, event=first)
    assert not wrong and len(killed) >= 1


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.97])
def test_killed_at_a_file_operation_it_ends_with_the_same_bits(world, peaceful, share):
    event = round(share * peaceful["sft"].events)
    killed, wrong = kill.ordeal(world, "sft", peaceful["sft"], random.Random(0), 1, event=event)
    assert (len(killed), wrong) == (1, "")


def test_what_was_interrupted_is_said_and_kept_in_the_summary(world, killed):
    place = copy_of(world, killed["sft"])
    end = kill.child(world.stage("sft"), place)
    assert "sft: continued after step 4 of 8, in out" in end.text
    summary = json.loads((place / "out" / "stage.json").read_text())
    assert summary["resumed_at"] == [4] and summary["saving"]["checkpoints"] == 4
    assert not (place / "out" / "checkpoints").exists()
    log = [json.loads(line) for line in (place / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in log] == sorted(line["seconds"] for line in log)


def test_tensorboard_shows_each_step_once(world, peaceful, killed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = copy_of(world, killed["ppo"])
    assert kill.child(world.stage("ppo"), place).code == kill.FINISHED

    def curve(directory):
        events = EventAccumulator(str(directory / "out" / "tensorboard")).Reload()
        return [(event.step, event.value) for event in events.Scalars("objective/kl")]

    assert curve(place) == curve(world.place / "peace" / "ppo") and len(curve(place)) == 5


def test_a_csv_file_and_the_replies_hold_each_step_once(world, peaceful, killed):
    place = copy_of(world, killed["ppo"])
    assert kill.child(world.stage("ppo", report_to="csv"), place).code == kill.FINISHED
    with (place / "out" / "log.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 2, 3, 4, 5]
    replies = (place / "out" / "completions.jsonl").read_bytes()
    assert replies and replies == (world.place / "peace" / "ppo" / "out" / "completions.jsonl").read_bytes()


def test_another_process_continues_what_one_left(world, peaceful):
    """Forked processes have more in common than those that a user starts: the order of sets, for one."""
    place, script = (
        world.place / "apart",
        (
            "import sys; from pathlib import Path; from tests.train import kill\n"
            "kill.torch.set_num_threads(1); kill.record_final_state()\n"
            "kill.World(Path(sys.argv[1])).stage('ppo')()"
        ),
    )
    assert kill.child(damage.kill_after(world.stage("ppo"), 2), place).code == -kill.signal.SIGKILL
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # unlike that of this process, and of what it forks
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    words = [sys.executable, "-c", script, str(world.place)]
    end = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    assert "continued after step 2 of 5" in end.stderr and "rounded" not in end.stderr
    got, want = (damage.without_config(found) for found in (kill.result(place), peaceful["ppo"].result))
    assert not kill.difference(*map(without_command, (got, want)))


def without_command(found):
    return {name: {**value, "command": ""} if isinstance(value, dict) else value for name, value in found.items()}


def copy_of(world, killed):
    place = world.place / "copy"
    damage.shutil.rmtree(place, ignore_errors=True)
    damage.shutil.copytree(killed, place)
    return place


# ------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", damage.KINDS)
def test_damage_is_noticed_and_gives_no_other_bits(world, peaceful, killed, name):
    stage = random.Random(name).choice(damage.STAGES)
    _, wrong = damage.play(world, stage, killed[stage], peaceful[stage], name, random.Random(1))
    assert not wrong


def test_a_checkpoint_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch, capsys):
    state, checkpoints = small(tmp_path)
    for state.step in (1, 2):
        checkpoints.save(RECORD)
    read = Path.read_text

    def refuse(path, *arguments, **keywords):
        if path.name == "state.json" and path.parent.name == "step-000002":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", refuse)
    checkpoints.restore()
    assert state.step == 1
    assert "step-000002 is damaged (state.json cannot be read: Permission denied)" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- what may differ


def test_a_finished_stage_is_left_alone(world, capsys):
    place = world.place / "sft" / "out"
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    config = {"output_dir": str(place)}
    assert world.stage("sft", **config, save_every=9.0)() == place
    assert capsys.readouterr().err == f"sft: finished in {place}, nothing is left to do\n"
    with pytest.raises(UserError, match=r"another config: learning_rate \(was 0.01, now 0.5\)"):
        world.stage("sft", **config, learning_rate=0.5)()
    with pytest.raises(UserError, match="began with other inputs: 'model' has changed since"):
        world.stage("sft", **config, model=str(place))()
    with pytest.raises(UserError, match=r"nowhere cannot be read: No such file or directory"):
        world.stage("sft", **config, data="nowhere")()
    with pytest.raises(UserError, match="already holds files"):
        world.stage("sft", **config, resume=False)()
    with pytest.raises(UserError, match="already holds files"):
        world.stage("reward", **config)()
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_what_is_left_of_a_process_that_was_killed_when_all_was_finished_goes(world, peaceful):
    for stage in ("sft", "run"):
        place = world.place / "late"
        damage.shutil.rmtree(place, ignore_errors=True)
        damage.shutil.copytree(world.place / "peace" / stage, place)
        (place / "out" / LOCK).write_text("1 on elsewhere")
        if stage == "sft":
            (place / "out" / "checkpoints" / "step-000008").mkdir(parents=True)
        assert kill.child(world.stage(stage), place).code == kill.FINISHED
        assert not (place / "out" / LOCK).exists() and not (place / "out" / "checkpoints").exists()


@pytest.mark.parametrize("summary", [{"stage": "sft"}, {"stage": "sft", "config": [], "inputs": {}}])
def test_a_summary_without_its_config_is_refused(world, tmp_path, summary):
    (tmp_path / "stage.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"stage.json does not say with what config and inputs it was made; remove"):
        world.stage("sft", output_dir=str(tmp_path))()


def test_a_killed_stage_is_not_continued_where_that_is_not_wanted(world, killed):
    end = kill.child(world.stage("sft", resume=False), copy_of(world, killed["sft"]))
    assert end.code == kill.REFUSED and "already holds files" in end.text


def test_less_memory_is_allowed_and_said(world, killed):
    end = kill.child(world.stage("sft", micro_batch_size=0, full_logits=True), copy_of(world, killed["sft"]))
    assert end.code == kill.FINISHED
    assert (
        "step-000004: micro_batch_size 5 -> 0, full_logits False -> True: from here on sums may be rounded" in end.text
    )


def test_another_machine_is_allowed_and_said(capsys):
    resume.compare(ORIGIN, ORIGIN, Path("out"))
    assert not capsys.readouterr().err
    resume.compare(ORIGIN | {"machine": {"threads": 2, "torch": "3"}}, ORIGIN, Path("out"))
    assert capsys.readouterr().err.startswith("out: threads 1 -> 2, torch None -> 3: from here on")


def test_only_keys_that_matter_count():
    before = {"seed": 1, "data": "a", "sft.logging_steps": 3, "ppo.micro_batch_size": 2, "gone": 1, "same": None}
    now = {"seed": 1, "data": "b", "sft.logging_steps": 4, "ppo.micro_batch_size": 4, "new": None, "same": None}
    assert resume.differing(now, before) == {"gone": "result", "new": "result", "ppo.micro_batch_size": "rounding"}


def test_every_key_that_may_differ_exists():
    from rlhf_fast.train.ppo import PPOConfig
    from rlhf_fast.train.sft import SFTConfig

    names = {field.name for cls in (PPOConfig, SFTConfig) for field in dataclasses.fields(cls)}
    assert names >= resume.FREE | resume.FREE_ON_MACHINE | resume.ROUNDING


def test_a_second_process_is_refused(world, killed):
    place = copy_of(world, killed["sft"])
    pid = os.fork()
    if pid == 0:
        with locked(place / "out" / LOCK):
            time.sleep(60)
        os._exit(0)
    try:
        while not (place / "out" / LOCK).is_file() or not (place / "out" / LOCK).read_text().startswith(str(pid)):
            time.sleep(0.01)
        end = kill.child(world.stage("sft"), place)
        assert end.code == kill.REFUSED and f"error: out is in use by process {pid} on " in end.text
    finally:
        os.kill(pid, kill.signal.SIGKILL)
        os.waitpid(pid, 0)
    assert kill.child(world.stage("sft"), place).code == kill.FINISHED


# ------------------------------------------------------------------------------------------------ a state alone

RECORD = Record("2026-01-01T00:00:00+00:00", [], 1.5, 2.5, b'{"step": 1}\n')
ORIGIN = {"stage": "sft", "config": {"seed": 0}, "inputs": {"data": "x"}, "machine": {"threads": 1}}


class Tied(nn.Module):
    """One tensor under two names, a buffer that is a view of another, a parameter that nothing reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(6.0), persistent=False)
        self.register_buffer("part", self.table[:3])
        self.unread = nn.Parameter(torch.ones(2))


def small(place, dtype=torch.float32):
    torch.manual_seed(3)
    model = Tied().to(dtype)
    optimizer = loop.adamw([model], weight_decay=0.1, epsilon=1e-5)
    so_far = SimpleNamespace(tokens=0, rate=0.5, results={}, waiting=[])
    state = State({"model": model}, optimizer, loop.seed_everything(3), so_far, {})
    (place / "checkpoints").mkdir(exist_ok=True)
    return state, Checkpoints(place, state, ORIGIN, keep=2)


def train(state, steps):
    model = state.models["model"]
    for _ in range(steps):
        x = torch.randn(4, 3, dtype=model.first.weight.dtype)
        loss = model.second(model.first(x).tanh()).square().mean()
        loss.backward()
        norms = loop.clip_and_step(
            state.optimizer, {"model": model}, {"loss": loss}, rate=0.1, max_grad_norm=1.0, where="here"
        )
        state.means.add(
            {"loss": loss, "norm": norms["model"], "odd": torch.tensor(float("nan")), "count": torch.tensor(3)}
        )
        state.so_far.tokens += random.randrange(100) + int(torch.randint(9, (), generator=state.order))
        state.so_far.rate += float(resume.np.random.rand())
        state.so_far.waiting.append(state.step)
        state.step += 1


def everything(state):
    tensors = [*state.models["model"].parameters(), *state.models["model"].buffers()]
    tensors += [value for values in state.optimizer.state_dict()["state"].values() for value in values.values()]
    draws = [
        random.random(),
        torch.rand(()).item(),
        resume.np.random.rand(),
        torch.rand((), generator=state.order).item(),
    ]
    draws += [random.gauss(0, 1), resume.np.random.randn()]
    return [x.detach().clone() for x in tensors], vars(state.so_far), state.step, str(state.means.take()), draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_state_comes_back_bit_for_bit(tmp_path, dtype):
    state, checkpoints = small(tmp_path, dtype)
    random.gauss(0, 1), resume.np.random.randn()  # both keep half of a pair
    train(state, 5)
    checkpoints.save(RECORD)
    train(state, 3)
    want = everything(state)

    again, checkpoints = small(tmp_path, dtype)
    assert checkpoints.restore() == RECORD
    assert again.models["model"].first.weight is again.models["model"].second.weight
    train(again, 3)
    got = everything(again)
    assert all(a.dtype == b.dtype and a.equal(b) for a, b in zip(got[0], want[0], strict=True)) and got[1:] == want[1:]


def test_a_parameter_without_a_gradient_has_no_moments_and_needs_none(tmp_path):
    state, checkpoints = small(tmp_path)
    train(state, 1)
    checkpoints.save(RECORD)
    saved = json.loads((tmp_path / "checkpoints" / "step-000001" / "state.json").read_text())
    assert len(saved["parameters_without_gradient"]) == 1
    checkpoints.restore()


def test_the_newest_are_kept(tmp_path):
    state, checkpoints = small(tmp_path)
    for state.step in range(1, 6):
        checkpoints.save(RECORD)
    assert [path.name for path in resume.steps(tmp_path / "checkpoints")] == ["step-000004", "step-000005"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000004", "step-000005"}


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    _, checkpoints = small(tmp_path)
    with pytest.raises(UserError, match=r"model.safetensors cannot be written: .*No space left on device"):
        checkpoints.save(RECORD)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_million_steps_are_in_order(tmp_path):
    for step in (999_999, 1_000_000, 12):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert [path.name for path in resume.steps(tmp_path)] == ["step-000012", "step-999999", "step-1000000"]


def test_damage_says_what_is_wrong(tmp_path):
    state, checkpoints = small(tmp_path)
    train(state, 1)
    checkpoints.save(RECORD)
    (tmp_path / "checkpoints" / "step-000001" / "optimizer.safetensors").unlink()
    words = r"no checkpoint in .* is whole: step-000001: optimizer.safetensors is missing. Remove .* to start anew"
    with pytest.raises(UserError, match=words):
        checkpoints.restore()
    assert (tmp_path / "checkpoints" / "step-000001").is_dir()
    assert issubclass(Damaged, UserError)


def test_checkpoints_are_written_where_one_is_due(tmp_path, monkeypatch):
    """After `save_every` seconds, or after a hundred times what the last took, whichever is longer."""
    clock = [0.0]
    data = tmp_path / "data"
    data.write_text("{}")
    monkeypatch.setattr("rlhf_fast.train.record.time.perf_counter", lambda: clock[0])
    saves = []

    def save(self, record):
        saves.append((self._state.step, clock[0]))
        clock[0] += 0.5

    monkeypatch.setattr(Checkpoints, "save", save)

    def times(every):
        saves.clear()
        place = tmp_path / str(every)
        place.mkdir()
        config = loop.StageConfig(model="m", data=str(data), output_dir="", save_every=every)
        with Stage("sft", config, place, 200, 1, torch.device("cpu"), {}, small(place)[0]) as stage:
            for _ in stage.steps(range(200)):
                clock[0] += 1.0
        return [step for step, _ in saves]

    assert times(30.0) == [30, 80, 130, 180]
    assert times(80.0) == [80, 160]
    assert times(0.0) == list(range(1, 201))
