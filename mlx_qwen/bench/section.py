"""What a section of the benchmark hands back: text to print and data to keep."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

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
