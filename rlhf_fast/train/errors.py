"""The one exception that means: the input is at fault, and here is what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave: a path, a data row, a config key, a model directory.

    The message is one line that says what came, what is needed and what to do. The command line prints it as
    `rlhf-fast: error: <message>` and exits with code 2; no traceback, nothing written.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class NotFinite(UserError):
    """A number that is NaN or infinite, found before it reached a weight.

    row: which row of `tensors` [B, ...] holds it, where that is known; texts: its prompt and reply, where they are known;
    part: which part of the batch the row is of, where a batch has several.
    `finite.keeping` writes them down.
    """

    def __init__(
        self,
        message: str,
        *,
        row: int | None = None,
        tensors: Mapping[str, Any] | None = None,
        texts: Mapping[str, str] | None = None,
        part: str | None = None,
    ) -> None:
        super().__init__(message)
        self.row, self.tensors, self.texts, self.part = row, dict(tensors or {}), dict(texts or {}), part
