"""Documents made from the code: the specification map and the schema of run.json.

`python -m forge_harness.report.documents docs` writes both; tests hold the committed ones current.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from forge_harness.errors import UsageError
from forge_harness.record import record_json_schema
from forge_harness.report.specification import SpecifiedFigure, specified

MAP_FILE, SCHEMA_FILE = "specification-map.md", "run-json.schema.json"
_HEAD = """# The specification, figure by figure

Every figure of the phase-5 integration validation report, the value it claims, and where a run of
this harness measures it. In a report each has our value, or *not measured*; `*` stands for any
text in the name of an evidence.

Made from `forge_harness/report/specification.toml`; change that file, then run
`python -m forge_harness.report.documents docs`.
"""


def specification_map() -> str:
    """Returns docs/specification-map.md."""
    blocks = [_HEAD, _summary()]
    for section in specified():
        number = f"{section.number}. " if section.number else ""
        lines = [f"## {number}{section.title}", "", "| figure | claimed | ours |", "|---|---|---|"]
        lines += [
            f"| {_cell(figure.label)} | {_cell(figure.claimed)} | {_source(figure)} |"
            for figure in section.figure
        ]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def run_schema() -> str:
    """Returns docs/run-json.schema.json."""
    return json.dumps(record_json_schema(), indent=2, sort_keys=True) + "\n"


def write_documents(directory: Path) -> list[Path]:
    """Writes both documents into a directory and returns their paths."""
    contents = {MAP_FILE: specification_map(), SCHEMA_FILE: run_schema()}
    for name, text in contents.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in contents]


def _summary() -> str:
    figures = [figure for section in specified() for figure in section.figure]
    without = sum(figure.reason is not None for figure in figures)
    return (
        f"{len(figures)} figures, {len(figures) - without} of them with a source in a run, "
        f"{without} with the reason why nothing measures them.\n"
    )


def _source(figure: SpecifiedFigure) -> str:
    if figure.check:
        names = " or ".join(f"`{name}`" for name in figure.evidence)
        return f"check `{figure.check}`" + (f", evidence {names}" if names else "")
    if figure.reason:
        return f"*not measured*: {_cell(figure.reason)}"
    return _cell(figure.source)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> None:
    """Writes the documents into the directory given."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise UsageError(f"Expected one directory, got {arguments!r}; give docs.")
    write_documents(Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
