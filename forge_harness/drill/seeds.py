"""Where seeded defects come from: the shipped ones, or a module of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from forge_harness.drill import defects as shipped
from forge_harness.drill.defect import Benign, Defect
from forge_harness.errors import UsageError
from forge_harness.subject.loader import REFERENCE_SPEC, load_module


@dataclass(frozen=True, slots=True)
class Seeds:
    """Seeded defects and sound variants of one module."""

    where: str
    """Module, or absolute path of a file; `<where>:<id>` names a subject."""
    defects: Mapping[str, Defect]
    benign: Mapping[str, Benign]

    def subject_of(self, name: str) -> str:
        """Returns how a defect or a variant is named as a subject."""
        return f"{self.where}:{name}"


def load_seeds(where: str | None = None) -> Seeds:
    """Returns the seeds of a module, the shipped ones when None.

    Args:
        where: Module, or path of a Python file, with a sequence `DEFECTS`, perhaps one `BENIGN`,
            and `__getattr__ = subjects_of(DEFECTS, BENIGN)`.

    Raises:
        SubjectError: The module cannot be imported.
        UsageError: It holds no seeds, two of one id, some that cannot be loaded by name, or a
            variant for which no check would be run.
    """
    if where is None:
        return Seeds(shipped.__name__, shipped.all_defects(), shipped.all_benign())
    module, location = load_module(where)
    defects, benign = (list(getattr(module, name, ())) for name in ("DEFECTS", "BENIGN"))
    if not defects or not all(isinstance(each, Defect) for each in defects):
        raise UsageError(
            f"{where!r} has no seeded defects; expected a sequence DEFECTS of "
            "forge_harness.drill.defect.Defect."
        )
    if not all(isinstance(each, Benign) for each in benign):
        raise UsageError(f"BENIGN of {where!r} holds what is no forge_harness.drill.defect.Benign.")
    _refuse_names([*defects, *benign], where, module)
    _refuse_idle(benign, defects, where)
    return Seeds(location, {d.id: d for d in defects}, {b.id: b for b in benign})


def _refuse_names(seeds: Sequence[Defect | Benign], where: str, module: ModuleType) -> None:
    ids = [seed.id for seed in seeds]
    for seed in seeds:
        if ids.count(seed.id) > 1 or seed.id == REFERENCE_SPEC:
            what = f"Two seeds of {where!r} are" if seed.id != REFERENCE_SPEC else "A seed is"
            raise UsageError(f"{what} called {seed.id!r}; give one another id.")
        if getattr(module, seed.id, None) is not seed.subject:
            raise UsageError(
                f"Seed {seed.id!r} of {where!r} cannot be loaded by name; end the module with "
                "`__getattr__ = subjects_of(DEFECTS, BENIGN)` (forge_harness.drill.seeds)."
            )


def _refuse_idle(benign: Iterable[Benign], defects: Iterable[Defect], where: str) -> None:
    """Only checks that have seeds are run: a variant for others would accuse nobody, unrun."""
    checks = {defect.check for defect in defects}
    names = checks | {check.partition(".")[0] for check in checks}
    for variant in benign:
        for name in variant.checks or ("",):
            if name not in names:
                raise UsageError(
                    f"Sound variant {variant.id!r} of {where!r} names {name!r}, for which there is "
                    f"no seeded defect; expected checks or suites of {sorted(names)}."
                )


def subjects_of(*groups: Iterable[Defect | Benign]) -> Callable[[str], object]:
    """Returns the `__getattr__` of a module of seeds: its ids are names of subjects."""
    subjects = {seed.id: seed.subject for group in groups for seed in group}

    def attribute(name: str) -> object:
        if name in subjects:
            return subjects[name]
        raise AttributeError(f"no seed is called {name!r}")

    return attribute
