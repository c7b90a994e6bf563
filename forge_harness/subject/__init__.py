"""What is validated: capability protocols, the loader and the reference subject."""

from __future__ import annotations

from forge_harness.subject.loader import LoadedSubject, load_subject
from forge_harness.subject.protocols import CAPABILITIES, capabilities_of, methods_of

__all__ = ["CAPABILITIES", "LoadedSubject", "capabilities_of", "load_subject", "methods_of"]
