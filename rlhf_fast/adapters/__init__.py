"""Other libraries' functions, with their names, arguments and semantics, on the ops; and `patch`, which puts them in place.

One module a library. Each works without the library: its functions can be imported and called by themselves.
"""

from rlhf_fast.adapters._patch import patch, unpatch

__all__ = ["patch", "unpatch"]
