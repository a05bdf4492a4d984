"""The command line as a user meets it: help, mistakes, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rlhf_fast import cli
from rlhf_fast.train.checkpoint import save_model
from rlhf_fast.train.data import read_preferences
from rlhf_fast.train.run import configure, new_model

PAIRS = [{"prompt": f"Name colour {n}.", "chosen": f"Colour {n} is red.", "rejected": f"No {n}."} for n in range(40)]
COMMAND = [sys.executable, "-m", "rlhf_fast.cli"]
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    return str(path)


def call(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line."""
    try:
        code = cli.main(words)
    except SystemExit as leaving:  # argparse leaves this way after --help
        code = leaving.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def mistake(capsys, *words: str) -> str:
    """The message of a command line that has to end in one line on stderr and exit code 2."""
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("rlhf-fast: error: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix("rlhf-fast: error: ").rstrip("\n")


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_overview_has_a_sentence_for_each_command_and_an_example(capsys, words):
    code, out, _ = call(capsys, *words)
    assert code == 0
    for command in cli.COMMANDS.values():
        assert f"  {command.name} " in out and command.summary in out
    assert "rlhf-fast run --data pairs.jsonl --output_dir out" in out


def test_version(capsys):
    import rlhf_fast

    assert call(capsys, "--version") == (0, f"rlhf-fast {rlhf_fast.__version__}\n", "")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command_shows_its_example(capsys, name):
    code, out, _ = call(capsys, name, "--help")
    assert code == 0
    assert f"usage: rlhf-fast {name} " in out
    assert f"example:\n  {cli.COMMANDS[name].example}" in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "dpo"])
def test_help_of_a_stage_is_grouped_with_defaults_and_sources(capsys, name):
    out = " ".join(call(capsys, name, "--help")[1].split())
    assert "files: --model TEXT" in out
    assert "(required)" in out
    assert "default: 1.0" in out
    assert "source: arXiv 2403.17031" in out


def test_help_of_run_explains_how_to_reach_the_stages(capsys):
    out = call(capsys, "run", "--help")[1]
    assert "--ppo.KEY VALUE" in out
    assert "--ppo.learning_rate" in out.split("without --model")[1]


def test_help_does_not_import_what_only_training_needs():
    script = "import sys; from rlhf_fast.cli import main; main(['--help']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"transformers", "matplotlib", "tensorboard", "tokenizers"} & set(loaded)


# ---------------------------------------------------------------- mistakes


def test_unknown_command_and_flag_before_it(capsys):
    assert mistake(capsys, "stf") == "unknown command 'stf': did you mean 'sft'?"
    assert mistake(capsys, "--data", "x").startswith("unknown flag '--data'; the commands are demo, run, sft")


@pytest.mark.parametrize("flag", ["--learning_rat", "--learning-rat", "--learning_rat=3"])
def test_unknown_flag_gets_a_suggestion(capsys, flag):
    assert mistake(capsys, "sft", flag, "3").endswith("of 'sft': did you mean '--learning_rate'?")


def test_unknown_flag_of_a_stage_inside_run(capsys):
    message = mistake(capsys, "run", "--sft.learning_rat", "3")
    assert message == "unknown flag --sft.learning_rat of 'run': did you mean '--sft.learning_rate'?"


def test_unknown_flag_like_no_other(capsys):
    assert mistake(capsys, "sft", "--zzzzzz") == "unknown flag --zzzzzz of 'sft'; see rlhf-fast sft --help"


def test_flags_are_not_abbreviated(capsys):
    assert "unknown flag --learn" in mistake(capsys, "sft", "--learn", "3")


def test_argument_without_flag(capsys):
    assert "unexpected argument 'pairs.jsonl'" in mistake(capsys, "run", "pairs.jsonl")


def test_flag_without_value_and_of_wrong_type(capsys):
    assert "--data: expected one argument" in mistake(capsys, "run", "--data")
    assert "--seed: must be a whole number, got 'x'" in mistake(capsys, "run", "--seed", "x")


def test_missing_flags_are_all_named(capsys):
    message = mistake(capsys, "sft", "--model", "m")
    assert message.startswith("sft needs 'data' (") and "'output_dir' (" in message


def test_unknown_yaml_key_gets_a_suggestion(capsys, tmp_path, pairs):
    (tmp_path / "c.yaml").write_text("sft:\n  learning_rat: 3\n")
    message = mistake(
        capsys, "run", "--config", f"{tmp_path}/c.yaml", "--data", pairs, "--output_dir", f"{tmp_path}/out"
    )
    assert message == f"{tmp_path}/c.yaml: unknown key 'learning_rat' in sft: did you mean 'learning_rate'?"


@pytest.mark.parametrize(
    ("prepare", "words", "expected"),
    [
        (None, ["--data", "absent.jsonl"], "data file absent.jsonl does not exist"),
        (None, ["--data", "."], "is a directory"),
        ("", ["--data", "made"], "is empty"),
        ('{"prompt": "a"', ["--data", "made"], "line 1: not JSON"),
        ('{"prompt": "a", "chosen": "b"}', ["--data", "made"], "line 1: field 'rejected': missing"),
        (None, ["--config", "absent.yaml"], "config file absent.yaml does not exist"),
        ("seed: [", ["--config", "made"], "is not valid YAML"),
        ("sead: 1", ["--config", "made"], "unknown key 'sead' in run: did you mean 'seed'?"),
        (None, ["--sft.learning_rate", "0"], "sft: 'learning_rate' must be above 0, got 0.0"),
        (None, ["--ppo.gamma", "nan"], "ppo: 'gamma' must be a finite number, got nan"),
        (None, ["--ppo.num_mini_batches", "3", "--ppo.batch_size", "8"], "must be a multiple of 'num_mini_batches'"),
        (None, ["--ppo.advantage", "grpo", "--ppo.lam", "0.5"], "'lam' means nothing with advantage grpo"),
        (None, ["--algorithm", "dpo", "--dpo.label_smoothing", "0.7"], "'label_smoothing' must be below 0.5"),
        (None, ["--algorithm", "rlhf"], "must be one of ppo, dpo"),
        (None, ["--heldout_fraction", "0"], "'heldout_fraction' must be above 0"),
        (None, ["--vocab_size", "100"], "'vocab_size' must be at least 259"),
        (None, ["--hidden_size", "30"], "hidden_size 30 must be a multiple of"),
        (None, ["--context_length", "16"], "leave no room for a prompt"),
        (None, ["--device", "gpu"], "device 'gpu' is not known to torch"),
        (None, ["--model", "./absent"], "model absent is not a directory"),
        (None, ["--model", "empty"], "model empty has no config.json"),
        ("{}", ["--model", "half"], "model half has no .safetensors weights"),
        ("mine", ["--output_dir", "made"], "output directory made is a file"),
        ("mine", ["--output_dir", "half"], "output directory half already holds files"),
        ("mine", ["--output_dir", "made/deeper"], "output directory made/deeper cannot be made"),
    ],
)
def test_mistake_ends_in_one_line_and_nothing_is_written(
    capsys, tmp_path, monkeypatch, pairs, prepare, words, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if prepare is not None:
        (tmp_path / "half").mkdir()
        for name in ("made", "half/config.json"):
            (tmp_path / name).write_text(prepare)
    before = tree(tmp_path)
    flags = {"--data": pairs, "--output_dir": "out"} | dict(zip(words[::2], words[1::2], strict=True))
    assert expected in mistake(capsys, "run", *(word for pair in flags.items() for word in pair))
    assert tree(tmp_path) == before


def tree(directory) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def test_report_of_something_that_is_no_run(capsys, tmp_path):
    assert "does not exist" in mistake(capsys, "report", str(tmp_path / "none"))
    assert "is not a run" in mistake(capsys, "report", str(tmp_path))
    assert "DIR" in mistake(capsys, "report")


def test_full_disk_is_one_line(capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "out/sft/log.jsonl")

    monkeypatch.setattr(cli, "dispatch", full)
    assert mistake(capsys, "run") == "out/sft/log.jsonl: No space left on device"


def test_own_errors_are_not_hidden(monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "dispatch", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["run"])


# ---------------------------------------------------------------- success

TINY = """
vocab_size: 280
hidden_size: 16
num_layers: 1
num_heads: 2
context_length: 64
sft: {num_train_epochs: 1, max_response_tokens: 16}
reward: {num_train_epochs: 1, max_response_tokens: 16, normalize_samples: 8}
ppo: {total_episodes: 8, batch_size: 8, num_ppo_epochs: 1, response_length: 4, min_reward_accuracy: null}
"""


def test_run_ends_with_the_headline_and_the_report(capsys, tmp_path, pairs):
    (tmp_path / "tiny.yaml").write_text(TINY)
    out = tmp_path / "out"
    code, text, _ = call(capsys, "run", "--config", f"{tmp_path}/tiny.yaml", "--data", pairs, "--output-dir", str(out))
    assert code == 0
    for part in ("win rate over SFT", "reward-model accuracy", "KL to the SFT model", "95 % interval"):
        assert part in text
    assert text.endswith(f"report: {out / 'report.html'}\n") and (out / "report.html").is_file()

    (out / "report.html").unlink()
    assert call(capsys, "report", str(out))[:2] == (0, text)
    assert (out / "report.html").is_file()


def test_a_stage_saves_a_config_that_repeats_it(capsys, tmp_path, pairs):
    (tmp_path / "tiny.yaml").write_text(TINY)
    config = configure(tmp_path / "tiny.yaml", {"data": pairs, "output_dir": "unused"})
    model, tokenizer = new_model(config, read_preferences(pairs)[0])
    save_model(tmp_path / "base", model, tokenizer)
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["--model", str(tmp_path / "base"), "--data", pairs, "--output_dir", str(first), "--learning_rate", "1e-3"]
    code, text, _ = call(capsys, "sft", *words, "--heldout_fraction", "0.2", "--max_response_tokens", "16")
    assert code == 0 and text.endswith(f"report: {first / 'report.html'}\n")
    again = ["--config", str(first / "config.yaml"), "--output_dir", str(second)]
    assert call(capsys, "sft", *again)[0] == 0
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- as a process


def test_mistake_as_a_process(tmp_path):
    words = ["run", "--data", "absent", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, env=OFFLINE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rlhf-fast: error: data file absent does not exist\n"


def test_ctrl_c_is_one_line_and_keeps_what_is_finished(tmp_path, pairs):
    out = tmp_path / "out"
    words = ["run", "--data", pairs, "--output_dir", str(out), "--hidden_size", "16", "--num_heads", "2"]
    words += ["--sft.num_train_epochs", "5000", "--sft.logging_steps", "1"]
    process = subprocess.Popen(
        [*COMMAND, *words],
        stderr=subprocess.PIPE,
        text=True,
        env=OFFLINE,
        # What a shell starts in the background ignores Ctrl-C, and so would what it starts: these tests, and this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "sft" / "log.jsonl").is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "rlhf-fast: interrupted; the same command continues where it was"
    assert "Traceback" not in err
    assert (out / "base" / "model.safetensors").is_file() and not (out / "sft" / "stage.json").exists()
