"""The capability protocols, under the name users import them by.

They live in `forge_harness.protocols`, below the pipeline that implements them.
"""

from forge_harness.protocols import *  # noqa: F403 - a façade
