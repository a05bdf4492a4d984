"""Exact resume: what changes while a stage trains, written to disk between two updates and read back.

A stage that is killed and started again ends with the same bits as one that was not: weights and log, clocks apart. What
is not saved is made again from the same inputs, whose digests are compared. Until a stage is finished, it keeps in
`output_dir/checkpoints` the newest few

    step-000120/            whole, or not there: written beside, flushed, renamed
      NAME.safetensors      each trained model; of one with an adapter, what is trained
      optimizer.safetensors
      state.json            step, counters, random states, clocks; stage, config and inputs that they belong to
      log.jsonl             the log up to here
      manifest.json         size and SHA-256 of each of these files
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_fast.train import distributed, fsdp, zero
from rlhf_fast.train.checkpoint import (
    LOCK,
    SUMMARY,
    claim_output,
    digest,
    discard,
    locked,
    numbered,
    read_json,
    remove_partials,
    to_json,
    write_directory,
)
from rlhf_fast.train.config import flatten, to_dict
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.loop import Means, say
from rlhf_fast.train.rows import is_hub

if TYPE_CHECKING:
    from rlhf_fast.train.loop import StageConfig

PLACE, FORMAT = "checkpoints", 1
STATE, LOG, MANIFEST, OPTIMIZER = "state.json", "log.jsonl", "manifest.json", "optimizer"
STEP = re.compile(r"step-(\d{6,})")
DAMAGED = ".damaged"
SHOWN = 5

# Keys in which a run may differ from the one it continues. Of data and models the content is compared, not the path;
# the others touch no weight. Everything else is refused: a longer run, for one, would have had another learning rate.
FREE = {
    "output_dir",
    "data",
    "model",
    "reward_model",
    "chat_template",
    "ptx_data",
    "resume",
    "save_every",
    "keep_checkpoints",
    "logging_steps",
    "report_to",
    "num_sample_generations",
    "checks",
}
FREE_ON_MACHINE = {"device", "threads"}  # what they lead to is compared
# These add up the same numbers in another order: allowed, so that a run may go on with less memory, and said.
ROUNDING = {"micro_batch_size", "micro_batch_tokens", "rollout_micro_batch_size", "full_logits"}


class Damaged(UserError):
    """A checkpoint that cannot be used, where an older one may."""


# ------------------------------------------------------------------------------------------------------- state


@dataclass
class State:
    """All that changes while a stage trains, and what it trains on.

    so_far: the stage's own counters and results, as JSON knows them. inputs: the rows that the loop reads, by a name that
    an error message can use.
    """

    models: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    order: torch.Generator
    so_far: SimpleNamespace
    inputs: Mapping[str, object]
    means: Means = field(default_factory=Means)
    step: int = 0

    def digests(self) -> dict[str, str]:
        """Of the inputs."""
        return {name: hashlib.sha256(repr(rows).encode()).hexdigest() for name, rows in self.inputs.items()}

    def files(self) -> list[str]:
        return [f"{name}.safetensors" for name in (*self.models, OPTIMIZER)]

    def save(self, directory: Path | None, others: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Write the tensors to `directory` and return the rest. others: the random states of the other processes.

        None: give the main process the shares of this one, where models are sharded.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        moments = zero.state(self.optimizer)
        tensors = {f"{i}.{name}": x for i, values in moments.items() for name, x in values.items()}
        tensors = {name: x if distributed.is_share(x) else torch.as_tensor(x) for name, x in tensors.items()}
        for file, content in zip(self.files(), [*map(_tensors_of, self.models.values()), tensors], strict=True):
            whole = fsdp.full_state(content) if fsdp.on() or zero.on() else content
            if directory is None:
                continue
            try:
                save_file(_on_host(whole), directory / file)
            except SafetensorError as error:
                raise UserError(f"checkpoint {directory / file} cannot be written: {error}") from None
        idle = [i for i in range(len(zero.parameters(self.optimizer))) if i not in moments]
        state = {"step": self.step, "so_far": vars(self.so_far), "means": self.means.state()}
        state |= {"parameters_without_gradient": idle, "random": _random_states(self.order)}
        return state | ({"random_of_others": list(others)} if others else {})

    def load(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """Undo `save`. Damaged: names, shapes or types are not those of this state, which may then be half loaded.

        UserError if other than as many processes left it: each has random states of its own.
        """
        randoms = [saved["random"], *saved.get("random_of_others", [])]
        if len(randoms) != distributed.count():
            raise UserError(
                f"{directory} was left by {len(randoms)} processes and {distributed.count()} are here; start as many again"
            )
        for file, model in zip(self.files(), self.models.values(), strict=False):
            own = _tensors_of(model)
            stored = _read_tensors(directory / file, own)
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(fsdp.like(tensor, stored[name]))
        zero.refresh(list(self.models.values()))
        self._load_optimizer(directory / self.files()[-1], saved["parameters_without_gradient"])
        initial, found = vars(self.so_far), saved["so_far"]
        if {name: type(value) for name, value in found.items()} != {name: type(x) for name, x in initial.items()}:
            raise Damaged(f"{STATE} does not hold the counters {', '.join(initial)}")
        initial.update(found)
        self.means.restore(saved["means"], next(next(iter(self.models.values())).parameters()).device)
        self.step = saved["step"]
        _set_random_states(randoms[distributed.rank()], self.order)

    def _load_optimizer(self, path: Path, idle: Sequence[int]) -> None:
        trained = {i: p for i, p in enumerate(zero.parameters(self.optimizer)) if i not in idle}
        if not isinstance(self.optimizer, torch.optim.AdamW):
            self._load_bytes(path, trained)
            return
        expected = {f"{i}.step": torch.zeros(()) for i in trained}
        expected |= {f"{i}.{name}": p for i, p in trained.items() for name in ("exp_avg", "exp_avg_sq")}
        stored = _read_tensors(path, expected)
        # Copied, because a tensor of a safetensors file may be the mapped file itself, aligned as it happens.
        own = {
            name: torch.empty_like(x, requires_grad=False).copy_(fsdp.like(x, stored[name]))
            for name, x in expected.items()
        }
        state = {i: {name: own[f"{i}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")} for i in trained}
        zero.load(self.optimizer, state)

    def _load_bytes(self, path: Path, trained: Mapping[int, nn.Parameter]) -> None:
        """The state of an 8-bit optimizer: bytes and the scales of their blocks, whose shapes only it knows."""
        stored: dict[int, dict[str, Any]] = {i: {} for i in trained}
        for name, tensor in _read_file(path).items():
            number, _, kind = name.partition(".")
            if int(number) not in stored:
                raise Damaged(f"{path.name} holds a moment of parameter {number}, which has none")
            own = tensor.clone().to(trained[int(number)].device)
            stored[int(number)][kind] = int(own) if kind == "step" else own
        for i, values in stored.items():
            if any(values.get(kind) is None or values[kind].shape != trained[i].shape for kind in ("state1", "state2")):
                raise Damaged(f"{path.name} has no moments of the shape of parameter {i}")
            self.optimizer.state[trained[i]] = values


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained and buffers, by name, tied ones once. The others come from the model's directory."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | dict(model.named_buffers())


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As a safetensors file takes them: contiguous, and none in the memory of another, as views of one buffer would be."""
    host, taken = {}, set()
    for name, tensor in tensors.items():
        x = tensor.detach().cpu().contiguous()
        place = x.untyped_storage().data_ptr()
        host[name] = x.clone() if place in taken else x
        taken.add(place)
    return host


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise Damaged(f"{path.name} is not a safetensors file: {error}") from None


def _read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored = _read_file(path)
    if stored.keys() != expected.keys():
        wrong = sorted(stored.keys() ^ expected.keys())
        raise Damaged(f"{path.name} holds other tensors than this model, {wrong[0]} for one")
    for name, tensor in expected.items():
        got, own = stored[name], (tensor.dtype, tuple(tensor.shape))
        if (got.dtype, tuple(got.shape)) != own:
            raise Damaged(f"{path.name}: {name} is {got.dtype} {tuple(got.shape)}, not {own[0]} {own[1]}")
    return stored


def _random_states(order: torch.Generator) -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "order": _hex(order.get_state().numpy()),
        "torch": _hex(torch.get_rng_state().numpy()),
        "cuda": [_hex(state.numpy()) for state in cuda],
        "python": [version, _hex(np.array(words, dtype=np.uint32)), gauss],
        "numpy": [kind, _hex(keys), *rest],
    }


def _set_random_states(saved: Mapping[str, Any], order: torch.Generator) -> None:
    order.set_state(torch.from_numpy(_array(saved["order"], np.uint8)))
    torch.set_rng_state(torch.from_numpy(_array(saved["torch"], np.uint8)))
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([torch.from_numpy(_array(state, np.uint8)) for state in saved["cuda"]])
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(_array(words, np.uint32).tolist()), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, _array(keys, np.uint32), *rest))


def _hex(state: np.ndarray) -> str:
    return state.tobytes().hex()


def _array(text: str, kind: type) -> np.ndarray:
    return np.frombuffer(bytearray.fromhex(text), dtype=kind)


# ------------------------------------------------------------------------------------------------ what may differ


def claim(name: str, config: StageConfig) -> tuple[Path, bool]:
    """The directory to write to, not made yet, and whether this stage is finished there.

    Of several processes the main one looks, once all are found. UserError if the directory holds anything but this stage,
    begun or finished with this config and these data.
    """
    fsdp.check()
    zero.check(config)
    distributed.join(config.device, config.dtype)
    return distributed.from_main(lambda: _claim(name, config))


def _claim(name: str, config: StageConfig) -> tuple[Path, bool]:
    out = Path(config.output_dir)
    if not config.resume:
        return claim_output(out), False
    if (out / SUMMARY).is_file():
        summary = read_json(out / SUMMARY)
        if not isinstance(summary, dict) or summary.get("stage") != name:
            return claim_output(out), False
        if not all(isinstance(summary.get(key), dict) for key in ("config", "inputs")):
            raise UserError(f"{out / SUMMARY} does not say with what config and inputs it was made; remove {out}")
        compare({"config": to_dict(config), "inputs": sources(config)}, summary, out)
        tidy(out)
        say(f"{name}: finished in {out}, nothing is left to do")
        return out, True
    return (out if _begun(out) else claim_output(out)), False


def sources(config: StageConfig) -> dict[str, str]:
    """Digests of the data, the chat template and the models that a config names; what is no file stands for itself."""
    models = {key: getattr(config, key, None) for key in ("model", "reward_model")}
    try:
        data = config.data if is_hub(config.data) else digest(config.data)
        template = digest(config.chat_template) if config.chat_template else ""
        found = {"data": data, "chat_template": template}
        return found | {key: _model_digest(name) for key, name in models.items() if name}
    except OSError as error:
        raise UserError(f"{error.filename or config.data} cannot be read: {error.strerror}") from None


def _model_digest(name: str) -> str:
    kinds = ("*.safetensors", "chat_template.jinja")
    files = [file for kind in kinds for file in sorted(Path(name).glob(kind))] if Path(name).is_dir() else []
    return " ".join(map(digest, files)) or name


def _begun(out: Path) -> bool:
    """Whether `out` holds the checkpoints of a stage and nothing strange among them."""
    place = out / PLACE
    ours = re.compile(rf"{STEP.pattern}({re.escape(DAMAGED)}.*)?|\..+")
    return place.is_dir() and all(ours.fullmatch(path.name) for path in place.iterdir())


def compare(now: Mapping[str, Any], saved: Mapping[str, Any], where: Path) -> None:
    """UserError, naming what differs, unless a run that is now `now` ends as the one that left `saved` would have."""
    config, before = flatten(now["config"]), flatten(saved["config"])
    keys = differing(config, before)
    if refused := [key for key, kind in keys.items() if kind != "rounding"]:
        listing = ", ".join(f"{key} (was {before.get(key)}, now {config.get(key)})" for key in refused[:SHOWN])
        listing += f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        raise UserError(
            f"{where} belongs to a run with another config: {listing}. Set it back, or give a new output_dir"
        )
    for name, value in now.get("inputs", {}).items():
        if saved["inputs"].get(name) != value:
            raise UserError(
                f"{where} belongs to a run that began with other inputs: '{name}' has changed since. "
                "Restore it, or give a new output_dir"
            )
    notes = [f"{key} {before[key]} -> {config[key]}" for key in keys]
    machine, then = now.get("machine", {}), saved.get("machine", {})
    other = [name for name in {**then, **machine} if then.get(name) != machine.get(name)] if machine else []
    notes += [f"{name} {then.get(name)} -> {machine.get(name)}" for name in other]
    if notes:
        say(f"{where}: {', '.join(notes)}: from here on sums may be rounded differently than without the interruption")


def differing(config: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, str]:
    """Keys of two flat configs that differ and matter -> "result" or "rounding"."""
    names = {key: key.rpartition(".")[2] for key in {**config, **before}}
    changed = [key for key in names if key not in config or key not in before or config[key] != before[key]]
    return {
        key: "rounding" if names[key] in ROUNDING else "result"
        for key in changed
        if names[key] not in FREE | FREE_ON_MACHINE
    }


# ------------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Record:
    """What a stage has left beside its state: when it began, the time it took, where it was continued, its log."""

    started: str
    resumed_at: list[int]
    seconds: float
    cpu_seconds: float
    log: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.started, str) or not isinstance(self.resumed_at, list):
            raise TypeError("'started' or 'resumed_at' has another type")
        if not math.isfinite(self.seconds + self.cpu_seconds):
            raise ValueError("no clock reads like that")


CLOCKS = tuple(field.name for field in dataclasses.fields(Record) if field.name != "log")


class Checkpoints:
    """The checkpoints of one stage, below its directory `out`; the newest `keep` stay.

    origin: stage, config, inputs and machine, as `compare` takes them.
    """

    def __init__(self, out: Path, state: State, origin: Mapping[str, Any], keep: int) -> None:
        self._out, self._place, self._state, self._origin, self._keep = out, out / PLACE, state, origin, keep

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes away. UserError if one is here, or has finished the stage since it was claimed."""
        self._out.mkdir(parents=True, exist_ok=True)
        with locked(self._out / LOCK):
            if (self._out / SUMMARY).exists():
                raise UserError(f"{self._out} has meanwhile been finished by another process")
            self._place.mkdir(exist_ok=True)
            yield

    def restore(self) -> Record | None:
        """Take the state from the newest whole checkpoint -> what else it holds; None where there is no checkpoint.

        Damaged ones that are passed over keep their content under another name. UserError if none is whole, or if the
        one that is belongs to another run.
        """
        flaws: dict[Path, Damaged] = {}
        for place in reversed(steps(self._place)):
            try:
                saved = self._read(place)
            except Damaged as flaw:
                flaws[place] = flaw
                continue
            for damaged, flaw in flaws.items():
                aside = next(path for path in numbered(damaged.with_name(damaged.name + DAMAGED)) if not path.exists())
                damaged.rename(aside)
                say(f"checkpoint {damaged} is damaged ({flaw}); kept as {aside.name}, an older one is used")
            return saved
        if flaws:
            listing = "; ".join(f"{place.name}: {flaw}" for place, flaw in flaws.items())
            raise UserError(f"no checkpoint in {self._place} is whole: {listing}. Remove {self._out} to start anew")
        return None

    def _read(self, place: Path) -> Record:
        """Load a checkpoint after everything in it has been checked."""
        try:
            self._verify(place)
            saved = json.loads((place / STATE).read_text(encoding="utf-8"))
            if saved["stage"] != self._origin["stage"]:
                raise Damaged(f"it belongs to stage '{saved['stage']}'")
            if place.name != f"step-{saved['step']:06d}":
                raise Damaged(f"it was written as step {saved['step']}")
            compare(self._origin, saved, place)
            record = Record(**{name: saved[name] for name in CLOCKS}, log=(place / LOG).read_bytes())
            self._state.load(place, saved)
            return record
        except UserError:
            raise
        except OSError as error:
            raise Damaged(f"{Path(error.filename or place).name} cannot be read: {error.strerror or error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError, IndexError) as error:
            # The digests agree, so someone has edited it: JSON of another form, random states that are none.
            raise Damaged(f"{STATE} is not what this version writes ({type(error).__name__}: {error})") from None

    def _verify(self, place: Path) -> None:
        try:
            manifest = json.loads(_file(place / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise Damaged(f"its format is {manifest['format']}, this version reads {FORMAT}")
            files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, Damaged):
                raise
            raise Damaged(f"{MANIFEST} cannot be understood ({type(error).__name__}: {error})") from None
        expected = {*self._state.files(), STATE, LOG}
        if files.keys() != expected:
            raise Damaged(f"{MANIFEST} lists other files than {', '.join(sorted(expected))}")
        for name, (size, sha256) in files.items():
            if (found := _file(place / name).stat().st_size) != size:
                raise Damaged(f"{name} has {found} bytes instead of {size}")
            if digest(place / name) != sha256:
                raise Damaged(f"the content of {name} has changed since it was written")

    def save(self, record: Record) -> None:
        """Write a checkpoint of the state, and remove those no longer needed. All processes call it, the main one writes."""
        _, *others = distributed.gathered(_random_states(self._state.order)) if distributed.count() > 1 else [None]
        if not distributed.is_main():
            self._state.save(None)
            return
        with write_directory(self._place / f"step-{self._state.step:06d}") as partial:
            clocks = {name: getattr(record, name) for name in CLOCKS}
            saved = {**self._origin, **clocks, **self._state.save(partial, others)}
            (partial / STATE).write_text(to_json(saved), encoding="utf-8")
            (partial / LOG).write_bytes(record.log)
            files = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in partial.iterdir()}
            (partial / MANIFEST).write_text(to_json({"format": FORMAT, "files": files}), encoding="utf-8")
        for old in steps(self._place)[: -self._keep]:
            discard(old)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise Damaged(f"{path.name} is {'not a file' if path.exists() else 'missing'}")
    return path


def steps(place: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    found = {path: STEP.fullmatch(path.name) for path in place.iterdir()}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))


def tidy(out: Path) -> None:
    """Remove what is left of a process that was killed when all was finished."""
    if (out / LOCK).exists() or (out / PLACE).exists():
        with contextlib.suppress(UserError), locked(out / LOCK):
            clear(out)


def clear(out: Path) -> None:
    """Remove the checkpoints of a finished stage; what was set aside as damaged stays."""
    place = out / PLACE
    if not place.is_dir() or not _begun(out):
        return
    remove_partials(place)
    for path in steps(place):
        discard(path)
    with contextlib.suppress(OSError):  # not empty
        place.rmdir()
