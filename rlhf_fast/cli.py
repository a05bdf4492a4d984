"""The command line, `rlhf-fast COMMAND`: flags and YAML become a config, a mistake becomes one line and exit code 2.

What a command needs is imported when the command is chosen, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rlhf_fast.train import distributed
from rlhf_fast.train.config import add_flags, build, closest, dump_yaml, foreign
from rlhf_fast.train.errors import UserError

STAGES = ("sft", "reward", "ppo", "dpo")  # what may run in several processes
OK, USER_ERROR, INTERRUPTED = 0, 2, 130
MACHINE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose every complaint is a UserError, with the nearest flag where one is unknown."""

    def __init__(self, command: Command, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"rlhf-fast {command.name}",
            usage=f"rlhf-fast {command.name} {command.usage}",
            description=description,
            epilog="\n".join(filter(None, [f"example:\n  {command.example}", epilog])),
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('rlhf-fast ')}: {message}")

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        namespace, unknown = self.parse_known_args(words)
        if unknown:
            self._refuse(unknown[0])
        return vars(namespace)

    def _refuse(self, word: str) -> NoReturn:
        name = self.prog.removeprefix("rlhf-fast ")
        if not word.startswith("-"):
            raise UserError(f"{name}: unexpected argument '{word}'; values follow a flag, as in --data FILE")
        flag = word.split("=")[0]
        known = {option.replace("-", "_"): option for action in self._actions for option in action.option_strings}
        hint = closest(flag.replace("-", "_"), known).replace("__", "--", 1)
        raise UserError(f"unknown flag {flag} of '{name}'{hint or f'; see rlhf-fast {name} --help'}")


# ---------------------------------------------------------------- commands


def demo(command: Command, words: Sequence[str]) -> None:
    from rlhf_fast.demo import DemoConfig, run_demo

    config = read_config(command, DemoConfig, words)
    conclude(run_demo(config))


def run(command: Command, words: Sequence[str]) -> None:
    from rlhf_fast.train import run as whole

    parser = config_parser(command, whole.RunConfig, epilog=whole.describe_from_scratch())
    flags = parser.parse(words)
    conclude(whole.run(whole.configure(flags.pop("config", None), flags)))


def sft(command: Command, words: Sequence[str]) -> None:
    from rlhf_fast.train.sft import SFTConfig, train

    run_stage(command, SFTConfig, train, words)


def reward(command: Command, words: Sequence[str]) -> None:
    from rlhf_fast.train.reward import RewardConfig, train

    run_stage(command, RewardConfig, train, words)


def ppo(command: Command, words: Sequence[str]) -> None:
    from rlhf_fast.train.ppo import PPOConfig, train

    run_stage(command, PPOConfig, train, words)


def evaluate(command: Command, words: Sequence[str]) -> None:
    from rlhf_fast.train.checkpoint import read_json
    from rlhf_fast.train.versus import RESULT, EvaluateConfig
    from rlhf_fast.train.versus import evaluate as compare

    path = compare(read_config(command, EvaluateConfig, words)) / RESULT
    result = read_json(path)
    share = {"value": result["win_rate"], "low": result["low"], "high": result["high"]}
    print("\n".join(headline({"win_rate": share})))
    print(f"judged by {result['judge']} on {result['pairs']} prompts: {path}")


def dpo(command: Command, words: Sequence[str]) -> None:
    from rlhf_fast.train.dpo import DPOConfig, train

    run_stage(command, DPOConfig, train, words)


def report(command: Command, words: Sequence[str]) -> None:
    parser = Parser(command, command.summary)
    parser.add_argument("directory", metavar="DIR", help="output directory of a run or of one stage")
    conclude(Path(parser.parse(words)["directory"]))


@dataclass(frozen=True)
class Command:
    """One word behind `rlhf-fast`."""

    name: str
    summary: str
    usage: str
    example: str
    execute: Callable[[Command, Sequence[str]], None]


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "demo",
            "See all stages work on an embedded toy world, with a judge that knows the truth. No data needed.",
            "[flags]",
            "rlhf-fast demo",
            demo,
        ),
        Command(
            "run",
            "Do everything for your preference file: SFT, reward model, PPO (or DPO), evaluation, report.",
            "--data FILE --output_dir DIR [--model DIR] [flags]",
            "rlhf-fast run --data pairs.jsonl --output_dir out",
            run,
        ),
        Command(
            "sft",
            "Stage 1: teach a language model the replies of your data.",
            "--model DIR --data FILE --output_dir DIR [flags]",
            "rlhf-fast sft --model gpt2 --data pairs.jsonl --output_dir out/sft",
            sft,
        ),
        Command(
            "reward",
            "Stage 2: train a reward model on preference pairs.",
            "--model DIR --data FILE --output_dir DIR [flags]",
            "rlhf-fast reward --model out/sft --data pairs.jsonl --output_dir out/reward",
            reward,
        ),
        Command(
            "ppo",
            "Stage 3: improve the SFT model against the reward model with PPO, GRPO or RLOO.",
            "--model DIR --reward_model DIR --data FILE --output_dir DIR [flags]",
            "rlhf-fast ppo --model out/sft --reward_model out/reward --data pairs.jsonl --output_dir out/ppo",
            ppo,
        ),
        Command(
            "dpo",
            "In place of stages 2 and 3: improve the SFT model on the preference pairs themselves with DPO.",
            "--model DIR --data FILE --output_dir DIR [flags]",
            "rlhf-fast dpo --model out/sft --data pairs.jsonl --output_dir out/dpo",
            dpo,
        ),
        Command(
            "evaluate",
            "Compare two policies on held-out prompts by any judge, the second alone or as the best of n.",
            "--before DIR --after DIR --data FILE --judge JUDGE --output_dir DIR [flags]",
            "rlhf-fast evaluate --before out/sft --after out/ppo --data pairs.jsonl --judge words:count --output_dir out/judged",
            evaluate,
        ),
        Command(
            "report",
            "Make report.html and report.json of a run anew from its files.",
            "DIR",
            "rlhf-fast report out",
            report,
        ),
    )
}


def run_stage(command: Command, cls: type, train: Callable[..., Path], words: Sequence[str]) -> None:
    parser = config_parser(command, cls)
    help = "print the memory and time it would take, from a few rows, and write nothing"
    if distributed.asked_for() > 1 and any(word in ("--dry_run", "--dry-run") for word in words):
        raise UserError(f"{command.name}: --dry-run looks at one process; start it without a launcher")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help=help)
    flags = parser.parse(words)
    dry_run = flags.pop("dry_run")
    config = build(cls, flags.pop("config", None), flags)
    directory = train(config, dry_run=dry_run)
    if not dry_run and distributed.is_main():
        dump_yaml(config, directory / "config.yaml")
        conclude(directory)
    distributed.leave()


def read_config(command: Command, cls: type, words: Sequence[str]) -> Any:
    flags = config_parser(command, cls).parse(words)
    return build(cls, flags.pop("config", None), flags)


def config_parser(command: Command, cls: type, epilog: str = "") -> Parser:
    names = foreign(cls)
    parser = Parser(command, command.summary, epilog + (names.help() if names else ""))
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file with any of the keys below; flags win",
    )
    add_flags(parser, cls)
    return parser


# ---------------------------------------------------------------- output


def conclude(directory: Path) -> None:
    """Write the report of a finished run or stage and print what it found and where it is."""
    from rlhf_fast.train.checkpoint import read_json
    from rlhf_fast.train.report import write_report

    page = write_report(directory)
    summary = read_json(page.with_suffix(".json"))
    print(f"\n{summary['verdict']['title']}")
    for line in headline(summary["headline"]):
        print(f"  {line}")
    print(f"report: {page}")


def headline(numbers: dict[str, Any]) -> list[str]:
    """The headline numbers as aligned lines of text; what was not measured is left out."""
    titles = {
        "win_rate": "win rate over SFT",
        "reward_accuracy": "reward-model accuracy",
        "preference_accuracy": "DPO's order of held-out pairs",
        "reward_agreement": "reward model agrees with judge",
    }
    lines = [
        f"{title:<31}{share['value']:.1%}  (95 % interval {share['low']:.1%} to {share['high']:.1%})"
        for key, title in titles.items()
        if (share := numbers.get(key))
    ]
    if numbers.get("kl") is not None:
        lines.append(f"{'KL to the SFT model':<31}{numbers['kl']:.2f} nats a reply")
    if numbers.get("seconds") is not None:
        lines.append(f"{'time in the stages':<31}{numbers['seconds']:.0f} s")
    return lines


def overview() -> str:
    """What `rlhf-fast --help` prints."""
    commands = "\n".join(f"  {command.name:<10}{command.summary}" for command in COMMANDS.values())
    examples = "\n".join(f"  {command.example}" for command in COMMANDS.values() if command.name in ("demo", "run"))
    return (
        "usage: rlhf-fast COMMAND [flags]\n\n"
        "Reinforcement learning from human feedback on one machine: fine-tuning, reward model, PPO, GRPO, RLOO, DPO.\n\n"
        f"commands:\n{commands}\n\n"
        f"examples:\n{examples}\n\n"
        "rlhf-fast COMMAND --help lists the flags of a command; rlhf-fast --version prints the version."
    )


# ---------------------------------------------------------------- entry point


def dispatch(words: Sequence[str]) -> None:
    """Carry out one command line. UserError for anything in it that cannot be carried out."""
    first, *rest = words or ["--help"]
    if first in ("-h", "--help", "help"):
        print(overview())
    elif first == "--version":
        import rlhf_fast

        print(f"rlhf-fast {rlhf_fast.__version__}")
    elif first in COMMANDS:
        if distributed.asked_for() > 1 and first not in STAGES:
            raise UserError(
                f"'{first}' runs in one process; launch {', '.join(STAGES)} with several, one after the other"
            )
        COMMANDS[first].execute(COMMANDS[first], rest)
    else:
        kind = "flag" if first.startswith("-") else "command"
        hint = closest(first, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        raise UserError(f"unknown {kind} '{first}'{hint}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `rlhf-fast`; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        dispatch(sys.argv[1:] if arguments is None else arguments)
        return OK
    except UserError as error:
        print(f"rlhf-fast: error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        print(f"rlhf-fast: error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("\nrlhf-fast: interrupted; the same command continues where it was", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
