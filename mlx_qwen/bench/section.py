"""What a section of a benchmark hands back, and how sections are printed and kept."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_qwen.bench.machine import machine_facts, machine_line
from mlx_qwen.bench.table import Table


@dataclass(frozen=True, slots=True)
class Section:
    """Markdown for people, and the same as JSON types."""

    text: str
    data: object


def section_of(results: Sequence[Table | str], data: object = None) -> Section:
    """A section of tables and plain paragraphs; without `data` the tables themselves are kept."""
    text = "\n".join(str(result) for result in results)
    kept = [result if isinstance(result, str) else asdict(result) for result in results]
    return Section(text, kept if data is None else data)


def print_sections(
    sections: Iterable[tuple[str, Callable[[], Section]]],
    show: Callable[[str], None],
    *,
    json_file: Path | None = None,
    markdown: Path | None = None,
) -> None:
    """Measure the sections in turn and hand `show` the machine's facts, then each section's text as it is done.

    Args:
        sections: a name for each in the JSON file, and what measures it.
        json_file: gets the facts and every section's data.
        markdown: gets all that was shown.
    """
    facts = machine_facts()
    lines = [machine_line(facts), ""]
    show("\n".join(lines))
    results: dict[str, object] = {}
    for name, measure in sections:
        section = measure()
        results[name] = section.data
        lines.append(section.text)
        show(section.text)
    if markdown is not None:
        markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": facts, **results}, indent=2) + "\n", encoding="utf-8")
