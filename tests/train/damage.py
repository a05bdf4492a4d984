"""Checkpoints damaged in many ways: each gives one clear error, or an older one is used and named. Never other bits.

    python -m tests.train.damage --cases 2000         a new seed; every kind of damage in turn
    python -m tests.train.damage --cases 50 --seed 7 --kinds swapped truncated

A stage was killed when it had two checkpoints. A copy of what it left is damaged, or its config or inputs changed, and the stage
is started again in a process of its own. What counts: it ends with the bits of an undisturbed one, and says so where an older
checkpoint was used; or it is refused with one line that names what is wrong. Prints one table, and exits 1 at anything else.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf_fast.train import record, resume
from rlhf_fast.train.checkpoint import digest
from tests.train.kill import CRASHED, FINISHED, REFUSED, End, Peaceful, World, child, difference, in_peace, made, result

STAGES = ("sft", "reward", "ppo")
SAVES = 4  # whole checkpoints written before the kill


@dataclass
class Case:
    """What a killed stage left, to be damaged: its directory, its checkpoints, a source of chance."""

    world: World
    stage: str
    out: Path
    rng: random.Random
    changes: dict[str, Any] = field(default_factory=dict)  # of the config

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.out / "checkpoints").glob("step-*"))

    @property
    def newest(self) -> Path:
        return self.checkpoints[-1]

    def file(self, among: str = "*") -> Path:
        return self.rng.choice(sorted(self.newest.glob(among)))


Damage = Callable[[Case], None]
KINDS: dict[str, tuple[Damage, tuple[str, ...]]] = {}


def kind(*ends: str) -> Callable[[Damage], Damage]:
    """Register a kind of damage, and how a stage may end after it: "older", "same", "anew", or words of the error."""

    def register(function: Damage) -> Damage:
        KINDS[function.__name__.replace("_", " ")] = (function, ends)
        return function

    return register


# ------------------------------------------------------------------------------------------------- what disks do


@kind("older")
def deleted(case: Case) -> None:
    case.file().unlink()


@kind("older")
def emptied(case: Case) -> None:
    case.file().write_bytes(b"")


@kind("older", "same")  # JSON ends in a line feed that it does not need
def truncated(case: Case) -> None:
    path = case.file()
    size = path.stat().st_size
    os.truncate(path, case.rng.choice([size - 1, size // 2, case.rng.randrange(size)]))


@kind("older")
def grown(case: Case) -> None:
    path = case.file("*.[sjl]*")
    with path.open("ab") as file:
        file.write(case.rng.choice([b"\0", b"x", b'{"step": 1}\n', case.rng.randbytes(100)]))


@kind("older", "same")  # white space in the manifest matters to nobody
def bit_flipped(case: Case) -> None:
    path = case.file()
    content = bytearray(path.read_bytes())
    content[case.rng.randrange(len(content))] ^= 1 << case.rng.randrange(8)
    path.write_bytes(content)


@kind("older")
def block_lost(case: Case) -> None:
    """A block of zeros or of something else, as a bad sector or a file system after a power cut gives."""
    path = case.file()
    content = bytearray(path.read_bytes())
    start, length = case.rng.randrange(len(content)), case.rng.choice([16, 512, 4096])
    end = min(len(content), start + length)
    filler = (
        bytes(end - start) if case.rng.random() < 0.5 else bytes(case.rng.randrange(256) for _ in range(end - start))
    )
    content[start:end] = filler if filler != content[start:end] else b"\xff" * (end - start)
    path.write_bytes(content)


@kind("older")
def file_of_another_name(case: Case) -> None:
    path, other = case.rng.sample(sorted(case.newest.iterdir()), 2)
    shutil.copy(other, path)


@kind("older")
def swapped(case: Case) -> None:
    first, second = case.rng.sample(sorted(case.newest.iterdir()), 2)
    aside = case.newest / "aside"
    first.rename(aside), second.rename(first), aside.rename(second)


@kind("older", "same")  # a log may be the same in both
def file_of_the_older_checkpoint(case: Case) -> None:
    path = case.file()
    shutil.copy(case.checkpoints[-2] / path.name, path)


@kind("older")
def directory_in_place_of_a_file(case: Case) -> None:
    path = case.file()
    path.unlink()
    path.mkdir()


@kind("older")
def link_or_pipe_in_place_of_a_file(case: Case) -> None:
    path = case.file()
    path.unlink()
    if case.rng.random() < 0.5:
        os.mkfifo(path)
    else:
        path.symlink_to(case.rng.choice(["nowhere", path.name, "/dev/zero", "/"]))


@kind("older")
def checkpoint_emptied(case: Case) -> None:
    place = case.newest
    shutil.rmtree(place)
    if case.rng.random() < 0.5:
        place.mkdir()
    else:
        place.write_text("")


@kind("older", "same")  # renamed to an earlier step it is not looked at
def checkpoint_renamed(case: Case) -> None:
    case.newest.rename(case.newest.with_name(case.rng.choice(["step-000001", "step-000099", "step-123456789"])))


@kind("no checkpoint in .* is whole: step")
def checkpoints_exchanged(case: Case) -> None:
    first, second = case.checkpoints
    aside = first.with_name("aside")
    first.rename(aside), second.rename(first), aside.rename(second)


@kind("same")
def newest_removed(case: Case) -> None:
    shutil.rmtree(case.newest)


@kind("no checkpoint in .* is whole: step-.*; step-.* Remove out to start anew")
def both_damaged(case: Case) -> None:
    for place in case.checkpoints:
        path = case.rng.choice(sorted(place.iterdir()))
        if case.rng.random() < 0.5:
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2)


@kind("anew")
def all_checkpoints_removed(case: Case) -> None:
    for place in case.checkpoints:
        shutil.rmtree(place)


@kind("already holds files")
def place_of_checkpoints_removed(case: Case) -> None:
    shutil.rmtree(case.out / "checkpoints")
    if case.rng.random() < 0.5:
        (case.out / "checkpoints").write_text("")


@kind("already holds files")
def strange_things_among_them(case: Case) -> None:
    (case.out / "checkpoints" / case.rng.choice(["mine", "step-x", "step-1", "lock"])).write_text("mine")


@kind("same")
def log_damaged(case: Case) -> None:
    log = case.out / "log.jsonl"
    content = log.read_bytes()
    log.unlink()
    if case.rng.random() < 0.7:
        log.write_bytes(case.rng.choice([content[: case.rng.randrange(len(content))], case.rng.randbytes(50)]))


@kind("same")
def leftovers_of_killed_processes(case: Case) -> None:
    places = [case.out, case.out / "checkpoints"]
    for name in (".step-000003.partial-1", ".model.partial-22", ".stage.json.partial-333"):
        leftover = case.rng.choice(places) / name
        leftover.write_text("{") if case.rng.random() < 0.5 else leftover.mkdir()
        if leftover.is_dir():
            (leftover / "model.safetensors").write_bytes(b"half")
    (case.out / ".lock").write_text("1 on elsewhere")


@kind("same")
def half_written_result(case: Case) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (case.out / name).write_bytes(b"half")
    (case.out / "value").mkdir()
    (case.out / "value" / "model.safetensors").write_bytes(b"half")
    if case.stage != "ppo":
        shutil.rmtree(case.out / "value")


@kind("already holds files", "is not valid JSON")
def summary_of_something_else(case: Case) -> None:
    text = case.rng.choice(["", "{", "[]", "{}", "null", '{"stage": "dpo"}', '"\\ud800"'])
    (case.out / "stage.json").write_text(text)


# ---------------------------------------------------------------------------------------------- what people do


def renew_digest(path: Path) -> None:
    """Make the manifest agree with a file that was changed on purpose."""
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def edit_state(case: Case, change: Callable[[dict], Any]) -> None:
    path = case.newest / "state.json"
    state = json.loads(path.read_text())
    changed = change(state)
    path.write_text(json.dumps(state if changed is None else changed))
    renew_digest(path)


WRONG = (None, True, -1, 1e400, 3.5, "x", "", [], {}, [[]], {"a": 1}, [None], "\ud800")


@kind("older", "belongs to a run with another config", "began with other inputs")
def state_without_a_key(case: Case) -> None:
    def change(state: dict) -> None:
        target = state[case.rng.choice(["random", "inputs", "config", "so_far"])] if case.rng.random() < 0.5 else state
        names = sorted(
            set(target) - {"machine", "resume", "save_every", "keep_checkpoints", "device", "threads", "output_dir"}
        )
        names = [name for name in names if name not in ("data", "model", "reward_model", "logging_steps", *ROUNDING)]
        if names:
            del target[case.rng.choice(names)]
        else:
            del state["step"]

    edit_state(case, change)


ROUNDING = ("micro_batch_size", "full_logits")


@kind("older", "belongs to a run with another config", "began with other inputs")
def state_with_a_wrong_type(case: Case) -> None:
    def change(state: dict) -> None:
        name = case.rng.choice(["stage", "step", "config", "inputs", *resume.CLOCKS, "so_far", "means", "random"])
        inner = {"random": ["order", "torch", "python", "numpy"], "means": ["names", "rows"]}.get(name)
        target, key = (state[name], case.rng.choice(inner)) if inner and case.rng.random() < 0.7 else (state, name)
        kinds = int | float if name in ("seconds", "cpu_seconds") else type(target[key])
        fitting = [x for x in WRONG if not isinstance(x, kinds) and not (isinstance(x, list) and name == "means")]
        target[key] = case.rng.choice(fitting)

    edit_state(case, change)


@kind("older")
def state_that_is_no_object(case: Case) -> None:
    path = case.newest / "state.json"
    texts = ["", "{", "null", "[]", "3", '"x"', "[" * 100_000, "\xff\xfe", '{"step": 1}', '{"a": 1e999}', "9" * 5000]
    path.write_bytes(case.rng.choice(texts).encode("latin-1"))
    renew_digest(path)


@kind("older")
def state_of_another_stage(case: Case) -> None:
    edit_state(case, lambda state: state.update(stage=case.rng.choice(["sfd", "dpo", ""])))


@kind("older")
def state_of_another_step(case: Case) -> None:
    edit_state(case, lambda state: state.update(step=state["step"] + case.rng.choice([-2, -1, 1, 10**9])))


@kind("older")
def manifest_edited(case: Case) -> None:
    path = case.newest / "manifest.json"
    manifest = json.loads(path.read_text())
    name = case.rng.choice(sorted(manifest["files"]))
    entry = manifest["files"][name]
    changes = [
        lambda: manifest["files"].pop(name),
        lambda: manifest["files"].update({"../../pairs.jsonl": entry}),
        lambda: entry.update(bytes=entry["bytes"] + 1),
        lambda: entry.update(bytes=str(entry["bytes"])),
        lambda: entry.update(sha256=entry["sha256"][::-1]),
        lambda: entry.pop("sha256"),
        lambda: manifest.update(format=case.rng.choice([0, 2, None, "1", [1]])),
        lambda: manifest.update(files=case.rng.choice([None, [], {}, "x", 3])),
        lambda: manifest["files"].update({name: case.rng.choice([None, [], "x", 3])}),
        lambda: manifest.clear(),
    ]
    case.rng.choice(changes)()
    path.write_text(json.dumps(manifest))


@kind("older")
def manifest_that_is_no_object(case: Case) -> None:
    texts = ["", "{", "null", "[]", "3", '"x"', "[" * 100_000, "\xff\xfe", "{" + '"a":{' * 5000]
    (case.newest / "manifest.json").write_bytes(case.rng.choice(texts).encode("latin-1"))


@kind("older")
def tensors_of_another_form(case: Case) -> None:
    path = case.file("*.safetensors")
    tensors = load_file(path)
    name = case.rng.choice(sorted(tensors))
    x = tensors[name]
    changes = [
        lambda: tensors.pop(name),
        lambda: tensors.update({"another": x.clone()}),
        lambda: tensors.update({name + "_": tensors.pop(name)}),
        lambda: tensors.update({name: x.double()}),
        lambda: tensors.update({name: x.bfloat16()}),
        lambda: tensors.update({name: x.unsqueeze(0)}),
        lambda: tensors.update({name: torch.cat([x.flatten(), x.flatten()])}),
        lambda: tensors.update({name: x.flatten()[:0].clone()}),
        lambda: tensors.clear(),
    ]
    case.rng.choice(changes)()
    save_file(tensors, path)
    renew_digest(path)


@kind("older")
def no_tensors_at_all(case: Case) -> None:
    path = case.file("*.safetensors")
    headers = [b"", bytes(8), b"\xff" * 8, b"\2" + bytes(7) + b"{}", b"\2" + bytes(7) + b"[]", b"PK\3\4"]
    path.write_bytes(case.rng.choice([*headers, case.rng.randbytes(300)]))
    renew_digest(path)


# -------------------------------------------------------------------------------------- another config or input


@kind("belongs to a run with another config: {key} \\(was")
def config_changed(case: Case) -> None:
    choices = {
        "seed": 1,
        "split_seed": 1,
        "heldout_fraction": 0.3,
        "batch_size": 6,
        "learning_rate": 0.123,
        "lr_schedule": "constant",
        "weight_decay": 0.5,
        "adam_epsilon": 1e-3,
        "max_grad_norm": 0.5,
        "max_prompt_tokens": 40,
        "bad_rows": "skip",
    }
    choices |= {
        "sft": {"num_train_epochs": 3, "warmup_steps": 1, "max_response_tokens": 17, "train_on_prompt": True},
        "reward": {
            "num_train_epochs": 3,
            "warmup_steps": 1,
            "center_coef": 0.1,
            "normalize_samples": 0,
            "temperature": 1.0,
        },
        "ppo": {"total_episodes": 72, "kl_coef": 0.1, "gamma": 0.9, "lam": 0.5, "temperature": 1.0, "vf_coef": 0.2},
    }[case.stage]
    key = case.rng.choice(sorted(choices))
    case.changes[key] = choices[key]


@kind("same")
def config_changed_where_it_matters_to_no_weight(case: Case) -> None:
    choices = {"save_every": 1000.0, "keep_checkpoints": 5, "resume": True}
    key = case.rng.choice(sorted(choices))
    case.changes[key] = choices[key]


@kind("same")
def data_moved(case: Case) -> None:
    copy = case.out.parent / "moved.jsonl"
    shutil.copy(case.world.place / "pairs.jsonl", copy)
    case.changes["data"] = str(copy)


@kind("began with other inputs: 'data' has changed")
def data_changed(case: Case) -> None:
    lines = (case.world.place / "pairs.jsonl").read_text().splitlines()
    number = case.rng.randrange(len(lines))
    case.rng.choice(
        [
            lambda: lines.pop(number),
            lambda: lines.append(lines[number].replace("say", "tell")),
            lambda: lines.__setitem__(number, lines[number].replace("happy", "sad")),
        ]
    )()
    (case.out.parent / "changed.jsonl").write_text("\n".join(lines) + "\n")
    case.changes["data"] = str(case.out.parent / "changed.jsonl")


@kind("began with other inputs: '{key}' has changed")
def model_changed(case: Case) -> None:
    place, key = case.out.parent / "changed", "model"
    if case.stage == "ppo" and case.rng.random() < 0.5:
        key = "reward_model"
    shutil.copytree(case.world.place / {"sft": "base", "reward": "sft/out", "ppo": "sft/out"}[case.stage], place)
    if key == "reward_model":
        shutil.rmtree(place)
        shutil.copytree(case.world.place / "reward/out", place)
    weights = load_file(place / "model.safetensors")
    name = case.rng.choice(sorted(name for name in weights if "lm_head" not in name))
    weights[name].view(-1)[case.rng.randrange(weights[name].numel())] += 0.5
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    case.changes[key] = str(place)


@kind("same")
def model_moved(case: Case) -> None:
    place = case.out.parent / "moved"
    shutil.copytree(case.world.place / ("base" if case.stage == "sft" else "sft/out"), place)
    case.changes["model"] = str(place)


# --------------------------------------------------------------------------------------------------------- play


def kill_after(train: Callable[[], Path], saves: int) -> Callable[[], Path]:
    """The same, but the process dies as soon as it has written so many checkpoints."""

    def run() -> Path:
        save, count = record.Stage._save, [0]

        def spy(stage: record.Stage) -> None:
            save(stage)
            count[0] += 1
            if count[0] == saves:
                os.kill(os.getpid(), signal.SIGKILL)

        record.Stage._save = spy
        return train()

    return run


def leave_killed(world: World, stage: str) -> Path:
    """The working directory of a stage that was killed with two checkpoints in place."""
    place = world.place / "killed" / stage
    end = child(kill_after(world.stage(stage), SAVES), place)
    if end.code != -signal.SIGKILL or len(list((place / "out" / "checkpoints").glob("step-*"))) != 2:
        raise RuntimeError(end.text)
    return place


def play(world: World, stage: str, killed: Path, peaceful: Peaceful, name: str, rng: random.Random) -> tuple[str, str]:
    """Damage a copy and start the stage again -> how it ended ("older", "same", "anew", "refused"), what was wrong with that."""
    place = world.place / "damaged"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(killed, place, symlinks=True)
    case = Case(world, stage, place / "out", rng)
    damage, allowed = KINDS[name]
    damage(case)
    end = child(world.stage(stage, **case.changes), place)
    how = how_it_ended(end)
    if end.code == FINISHED:
        got, want = result(place), peaceful.result
        differs = difference(*map(without_config, (got, want))) if case.changes else difference(got, want)
        wrong = "" if how in allowed else f"{how} instead of {' or '.join(allowed)}"
        return how, wrong or (f"other bits in {differs}" if differs else "")
    message = end.text.strip().splitlines()[-1] if end.text.strip() else ""
    patterns = [words.format(key=next(iter(case.changes), "")) for words in allowed]
    good = end.code == REFUSED and message.startswith("rlhf-fast: error: ") and "Traceback" not in end.text
    if good and any(re.search(pattern, message) for pattern in patterns):
        return "refused", ""
    return how, f"ended with {end.code}, {end.text[-1500:]}"


def how_it_ended(end: End) -> str:
    if end.code != FINISHED:
        return "refused" if end.code == REFUSED else "crashed" if end.code == CRASHED else "killed"
    if "is damaged (" in end.text and "an older one is used" in end.text:
        return "older"
    return "same" if "continued after step" in end.text else "anew" if "it starts anew" in end.text else "silently anew"


def without_config(found: dict[str, Any]) -> dict[str, Any]:
    """A result but for the config that a summary states."""
    return {
        name: {key: inner for key, inner in value.items() if key not in ("config", "data")}
        if "stage.json" in name
        else value
        for name, value in found.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.train.damage", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", default=str(time.time_ns() % 10**9))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    given = parser.parse_args()

    started = time.monotonic()
    rows, failures = {name: collections.Counter() for name in given.kinds}, []
    with made() as world, contextlib.suppress(KeyboardInterrupt):  # Ctrl-C shows what was done until then
        peaceful = {stage: in_peace(world, stage) for stage in STAGES}
        killed = {stage: leave_killed(world, stage) for stage in STAGES}
        for number in range(given.cases):
            name, stage = given.kinds[number % len(given.kinds)], STAGES[number // len(given.kinds) % len(STAGES)]
            rng = random.Random(f"{given.seed} {number}")
            how, wrong = play(world, stage, killed[stage], peaceful[stage], name, rng)
            rows[name].update({"cases": 1, how: 1, "wrong": bool(wrong)})
            if wrong:
                failures.append(f"case {number}, {stage}, {name}: {wrong}")
                print(failures[-1], file=sys.stderr, flush=True)
    columns = {
        "cases": "cases",
        "older": "older used",
        "same": "newest used",
        "anew": "began anew",
        "refused": "refused",
    }
    print(f"seed {given.seed}; how a stage went on after each kind of damage")
    print(f"{'':<46}{''.join(f'{title:>13}' for title in columns.values())}{'wrong':>7}")
    rows["all"] = sum(rows.values(), collections.Counter())
    for name, row in rows.items():
        print(f"{name:<46}{''.join(f'{row[column]:>13}' for column in columns)}{row['wrong']:>7}")
    print(f"{time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
