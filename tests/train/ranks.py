"""Several processes that find each other as `accelerate launch` lets them, forked from the test that starts them."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_fast.train import distributed
from rlhf_fast.train.errors import UserError

LONGEST = 120  # seconds, after which a process that waits for another in vain is ended


def together(work: Callable[[], Any], place: Path, count: int = 2) -> list[Any]:
    """What `work` returns in each of `count` processes, or the UserError that it raises there; run in the directory `place`."""
    place.mkdir(parents=True, exist_ok=True)
    port = free_port()
    children = [_fork(work, place, rank, count, port) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError("\n".join((place / f"output-{rank}.txt").read_text() for rank in range(count)))
    return [pickle.loads((place / f"result-{rank}").read_bytes()) for rank in range(count)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _fork(work: Callable[[], Any], place: Path, rank: int, count: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    signal.alarm(LONGEST)
    try:
        os.chdir(place)
        with Path(f"output-{rank}.txt").open("w", buffering=1) as output:
            sys.stdout = sys.stderr = output
            code = _work(work, rank, count, port)
    finally:
        os._exit(code)


def _work(work: Callable[[], Any], rank: int, count: int, port: int) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        try:
            result = work()
            distributed.leave()
        except UserError as error:
            result = error
        Path(f"result-{rank}").write_bytes(pickle.dumps(result))
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
