"""Stages killed with SIGKILL again and again, until they are finished: do they end with the bits of one that was left in peace?

    python -m tests.train.kill --kills 1000           all stages, a new seed
    python -m tests.train.kill --kills 100 --seed 7 --stages ppo

Half of the kills come at a random moment, half at a random file operation of the process (opening, renaming, removing, making
a directory), so that every gap between two of them is hit. Compared are all files but TensorBoard's and the report, clocks
apart, and the state at the end: optimizer, counters, random states. Prints one table, and exits 1 where anything differed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import torch.utils.tensorboard

from rlhf_fast import demo
from rlhf_fast.train import dpo, ppo, record, reward, run, sft
from rlhf_fast.train.checkpoint import digest
from rlhf_fast.train.config import from_dict
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.model import quiet_transformers
from tests.train import tiny

CLOCKS = {"seconds", "cpu_seconds", "tokens_per_second", "eps", "started", "resumed_at", "saving"}
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
FINISHED, REFUSED, CRASHED = 0, 2, 1

SFT = {
    "num_train_epochs": 2,
    "max_response_tokens": 16,
    "batch_size": 8,
    "micro_batch_size": 5,
    "learning_rate": 1e-2,
    "logging_steps": 3,
}
REWARD = SFT | {"normalize_samples": 12, "learning_rate": 1e-3}
PPO = {
    "batch_size": 12,
    "total_episodes": 60,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "response_length": 6,
    "learning_rate": 1e-3,
    "kl_target": 0.05,
    "kl_horizon": 100,
    "reward_scaling": True,
    "ptx_coef": 0.5,
    "ema_decay": 0.8,
}
SHARED = {"heldout_fraction": 0.2, "save_every": 0.0}
MODEL = {"vocab_size": 280, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "context_length": 64}


# ------------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class World:
    """Inputs that all processes share. A stage writes to the directory `out` of its working directory."""

    place: Path

    @property
    def files(self) -> dict[str, Any]:
        return SHARED | {"data": str(self.place / "pairs.jsonl"), "output_dir": "out"}

    def stage(self, name: str, **changes: Any) -> Callable[[], Path]:
        """A function that trains the stage, with `changes` of its config."""
        base, trained = str(self.place / "base"), {n: str(self.place / n / "out") for n in ("sft", "reward")}
        if name == "sft":
            config = from_dict(sft.SFTConfig, self.files | SFT | {"model": base} | changes)
            return lambda: sft.train(config)
        if name == "reward":
            config = from_dict(reward.RewardConfig, self.files | REWARD | {"model": trained["sft"]} | changes)
            return lambda: reward.train(config)
        if name == "dpo":
            config = from_dict(dpo.DPOConfig, self.files | SFT | {"model": trained["sft"]} | changes)
            return lambda: dpo.train(config)
        if name in ("ppo", "grpo", "lora"):
            models = {"model": trained["sft"], "reward_model": trained["reward"]}
            kinds = {"grpo": {"advantage": "grpo", "group_size": 3}, "lora": {"lora_rank": 3}}
            config = from_dict(ppo.PPOConfig, self.files | PPO | kinds.get(name, {}) | models | changes)
            return lambda: ppo.train(config)
        if name == "run":
            parts = {"sft": SFT, "reward": REWARD, "ppo": PPO | {"total_episodes": 24}}
            config = from_dict(run.RunConfig, self.files | MODEL | parts | changes)
            return lambda: run.run(config)
        return lambda: small_demo(**changes)


STAGES = ("sft", "reward", "ppo", "grpo", "lora", "dpo", "run", "demo")


def small_demo(**changes: Any) -> Path:
    demo.DEMONSTRATIONS, demo.PAIRS = 60, 40
    demo.SHARED = demo.SHARED | {"eval_prompts": 10, "save_every": 0.0}
    demo.SFT = demo.SFT | {"num_train_epochs": 1, "batch_size": 16, "logging_steps": 3}
    demo.REWARD = demo.REWARD | {"num_train_epochs": 1, "batch_size": 16, "normalize_samples": 12, "logging_steps": 3}
    demo.PPO = demo.PPO | {"total_episodes": 32, "batch_size": 16, "num_ppo_epochs": 1}
    return demo.run_demo(demo.DemoConfig(**{"output_dir": "out"} | changes))


# ---------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class End:
    """How a process ended: FINISHED, REFUSED (UserError), CRASHED, or minus the signal; what it printed; its file events."""

    code: int
    text: str
    events: int = 0


def child(train: Callable[[], Path], place: Path, *, event: int = 0, after: float | None = None) -> End:
    """Train in a forked process, in the directory `place`; it is killed at its n-th file event, or after so many seconds."""
    place.mkdir(parents=True, exist_ok=True)
    output, counted = place / "output.txt", place / "events.txt"
    counted.unlink(missing_ok=True)
    output.write_text("")  # it may be killed before it has opened this
    pid = os.fork()
    if pid == 0:
        code = CRASHED
        try:
            os.chdir(place)
            sys.stdout = sys.stderr = output.open("w", buffering=1)
            os.dup2(sys.stderr.fileno(), 2)
            count = count_events(kill_at=event)
            record_final_state()
            train()
            counted.write_text(str(count[0]))
            code = FINISHED
        except UserError as error:
            print(f"rlhf-fast: error: {error}", file=sys.stderr)
            code = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if after is not None:
        deadline = time.monotonic() + after
        while time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            time.sleep(min(0.002, max(0.0, deadline - time.monotonic())))
        else:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
    else:
        _, status = os.waitpid(pid, 0)
    events = int(counted.read_text()) if counted.exists() else 0
    return End(os.waitstatus_to_exitcode(status), output.read_text(errors="replace"), events)


def count_events(kill_at: int) -> list[int]:
    """Count this process's file operations below `out`, and kill it just before one of them."""
    count, here = [0], str(Path.cwd())

    def hook(name: str, arguments: tuple) -> None:
        if name not in FILE_EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if path.startswith(("out", f"{here}/out")):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def record_final_state() -> None:
    """Make `finish` leave the state it found in `final/<stage>`, outside of the stage's directory."""
    finish = record.Stage.finish

    def spy(stage: record.Stage, results: Any) -> None:
        place = Path("final") / stage.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        (place / "state.json").write_text(json.dumps(stage.state.save(place)))
        finish(stage, results)

    record.Stage.finish = spy


# ------------------------------------------------------------------------------------------------------ results


def result(place: Path) -> dict[str, Any]:
    """What a finished process left, by file: digests, and JSON without clocks."""
    found = {}
    for path in sorted([*(place / "out").rglob("*"), *(place / "final").rglob("*")]):
        name = str(path.relative_to(place))
        if path.is_dir() or "tensorboard" in name or path.stem == "report" or ".damaged" in name:
            continue
        if path.name in ("stage.json", "state.json"):
            found[name] = without_clocks(json.loads(path.read_text()))
        elif path.name == "log.jsonl":
            found[name] = [without_clocks(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = digest(path)
    return found


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_clocks(inner) for name, inner in value.items() if name not in CLOCKS}
    return value


def difference(got: dict[str, Any], want: dict[str, Any]) -> str:
    """The files in which two results differ, or an empty text."""
    return ", ".join(name for name in sorted({*got, *want}) if got.get(name, "absent") != want.get(name, "absent"))


def where_killed(out: Path) -> str:
    """What a process was at, by what it left."""
    places = [place for place in (out, *out.glob("*/")) if (place / "checkpoints").is_dir()]
    if not places:
        return "before or between stages"
    if any(
        any(place.glob(f"checkpoints/.*.partial-*/{file}")) for place in places for file in ("optimizer*", "manifest*")
    ):
        return "writing a checkpoint"
    if any((place / "stage.json").exists() for place in places):
        return "removing checkpoints"
    if any((place / "config.json").exists() or any(place.glob(".model*")) for place in places):
        return "writing the result"
    return "training" if any(any(place.glob("checkpoints/step-*")) for place in places) else "before a checkpoint"


# -------------------------------------------------------------------------------------------------------- kills


@contextlib.contextmanager
def made(directory: Path | None = None) -> Iterator[World]:
    """A world in a temporary directory, its SFT and reward stages trained, each in a process of its own."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=directory or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)) as name:
        world = World(Path(name))
        tiny.write_pairs(world.place / "pairs.jsonl")
        with quiet_transformers():
            tiny.save_base(world.place / "base")
        for stage in ("sft", "reward"):
            if (end := child(world.stage(stage), world.place / stage)).code != FINISHED:
                raise RuntimeError(end.text)
        yield world


@dataclass(frozen=True)
class Peaceful:
    """A run that nobody disturbed: what it left, its file events and its seconds."""

    result: dict[str, Any]
    events: int
    seconds: float


def in_peace(world: World, stage: str) -> Peaceful:
    place, start = world.place / "peace" / stage, time.monotonic()
    end = child(world.stage(stage), place)
    if end.code != FINISHED:
        raise RuntimeError(end.text)
    return Peaceful(result(place), end.events, time.monotonic() - start)


def ordeal(
    world: World, stage: str, peaceful: Peaceful, rng: random.Random, kills: int, event: int = 0
) -> tuple[list[str], str]:
    """One run, killed up to `kills` times, first at file event `event` if given -> where it was killed, what was wrong."""
    place, train, killed = world.place / f"ordeal-{stage}", world.stage(stage), []
    shutil.rmtree(place, ignore_errors=True)
    while True:
        plan: dict[str, Any] = {}
        if len(killed) < kills:
            at_event = rng.random() < 0.5 or (event and not killed)
            # Within half a run: what is continued has less than a whole one before it, and is to be killed again and again.
            plan = (
                {"event": rng.randint(1, max(1, peaceful.events // 2))}
                if at_event
                else {"after": rng.uniform(0, peaceful.seconds / 2)}
            )
            if event and not killed:
                plan = {"event": event}
        end = child(train, place, **plan)
        if end.code == -signal.SIGKILL:
            killed.append(where_killed(place / "out"))
        elif end.code != FINISHED:
            return killed, f"cannot be continued after {plan}: {end.text[-2000:]}"
        elif "rounded differently" in end.text:
            return killed, f"takes this machine for another one: {end.text}"
        else:
            return killed, difference(result(place), peaceful.result)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.train.kill", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", default=str(time.time_ns() % 10**9))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--most", type=int, default=6, help="kills of one run")
    given = parser.parse_args()

    started, rng = time.monotonic(), random.Random(given.seed)
    rows, failures = {stage: collections.Counter() for stage in given.stages}, []
    with made() as world, contextlib.suppress(KeyboardInterrupt):  # Ctrl-C shows what was done until then
        peaceful = {stage: in_peace(world, stage) for stage in given.stages}
        while (done := sum(row["kills"] for row in rows.values())) < given.kills:
            stage = min(rows, key=lambda name: rows[name]["kills"])
            killed, wrong = ordeal(world, stage, peaceful[stage], rng, min(given.most, given.kills - done))
            rows[stage].update(killed)
            rows[stage].update({"kills": len(killed), "runs": 1, "wrong": bool(wrong)})
            if wrong:
                failures.append(f"{stage}, killed {', '.join(killed)}: {wrong}")
                print(failures[-1], file=sys.stderr, flush=True)
    places = sorted({name for row in rows.values() for name in row} - {"kills", "runs", "wrong"})
    print(f"seed {given.seed}; kills by what the process was at")
    for name in ("kills", *places, "runs", "wrong"):
        numbers = [row[name] for row in rows.values()]
        if name == "kills":
            print(f"{'':<26}{''.join(f'{stage:>8}' for stage in rows)}{'all':>8}")
        title = {"runs": "runs finished", "wrong": "not the same bits"}.get(name, name)
        print(f"{title:<26}{''.join(f'{number:>8}' for number in numbers)}{sum(numbers):>8}")
    print(f"{time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
