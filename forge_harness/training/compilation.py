"""What a step through torch.compile needs: an order of additions, and a C++ compiler."""

from __future__ import annotations

from types import TracebackType

import torch

from forge_harness.errors import ConfigError


class Compiled:
    """A context for compiled forward and backward passes.

    Inductor's embedding backward adds atomically, in any order, unless torch is told to be
    deterministic.

    Raises:
        ConfigError: Inductor found no C++ compiler.
    """

    def __enter__(self) -> None:
        self._before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        torch.use_deterministic_algorithms(self._before)
        # Its class is a private one of Inductor's, and it arrives wrapped in others.
        if error is not None and "InvalidCxxCompiler" in str(error):
            raise ConfigError(
                "compile needs a C++ compiler, and torch found none that works; install g++ or "
                "name one in the environment variable CXX, or leave compile out.",
                key="compile",
            ) from error
