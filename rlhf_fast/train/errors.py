"""The one exception that means: the input is at fault, and here is what to do about it."""


class UserError(ValueError):
    """A mistake in what the user gave: a path, a data row, a config key, a model directory.

    The message is one line that says what came, what is needed and what to do. The command line prints it as
    `rlhf-fast: error: <message>` and exits with code 2; no traceback, nothing written.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))
