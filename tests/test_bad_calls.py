"""Thousands of wrong calls, each refused with one line that names the argument; in child processes, so that a
crash names its call.

RLHF_FAST_BAD_CALLS=all makes every call of tests/bad_calls.py (`make fuzz`); the default is a fixed share of them.
"""

import json
import os
import subprocess
import sys

SHARES = 2
EVERY = 1 if os.environ.get("RLHF_FAST_BAD_CALLS") == "all" else 3
LEAST = 5_000  # distinct calls in all


def test_wrong_calls_are_refused_by_name(tmp_path):
    children = []
    for i in range(SHARES):
        command = [sys.executable, "-m", "tests.bad_calls", f"{i}/{SHARES}", str(EVERY)]
        with open(tmp_path / str(i), "w") as answers:
            children.append(subprocess.Popen(command, stdout=answers))
    calls, failures = set(), []
    for i, child in enumerate(children):
        code = child.wait()
        call, answered = None, True
        for line in (tmp_path / str(i)).read_text().splitlines():
            answer = json.loads(line)
            if "call" in answer:
                call, answered = answer["call"], False
                calls.add(call)
                continue
            answered = True
            if answer["complaint"] is not None:
                failures.append(f"{call}\n    {answer['complaint']}")
        if code != 0 or not answered:
            failures.append(f"the process ended with {code} in or after {call}")
    shown = "\n".join(failures[:20])
    assert not failures, f"{len(failures)} of {len(calls)} wrong calls:\n{shown}"
    assert len(calls) >= LEAST // EVERY
