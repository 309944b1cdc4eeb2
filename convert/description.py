"""What a conversion will write, before it writes: tensors by kind and precision, sizes, and what the work needs."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.checkpoint.names import MTP_PREFIX

from .measures import readable_size
from .outputs import Output, Outputs
from .recipes.kinds import Kind, kind_of
from .recipes.precisions import shown_precision
from .settings import DType

_HEAD = ("", "stored as", "tensors", "weights", "size", "share")
_TENSOR_HEAD = ("tensor", "shape", "stored as", "size")


@dataclass(frozen=True, slots=True)
class Row:
    """The tensors of one kind that are stored alike; `quantization` None for those that are not packed."""

    kind: Kind
    quantization: Quantization | None
    dtype: DType
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor to write, by its MLX name."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    quantization: Quantization | None
    dtype: DType
    nbytes: int


@dataclass(frozen=True, slots=True)
class Description:
    """What a conversion writes and needs. All sizes are in bytes.

    Attributes:
        source: the folder that is read.
        recipe: its name; None when no matrix is packed.
        dtype: of what is not packed, and of scales and biases.
        tensors: every tensor in the order of writing. Norms whose factors the dtype rounds come twice: rounded for
            every reader, and exact beside them.
        nbytes: all tensors of the output.
        parameters: the weights that they hold, each counted once.
        memory: an upper estimate of what the work takes above the bare process: a piece of the model for each core of
            this machine, with a calibration a layer of the model and what enters it too, and of verifying, where that
            takes more, the same of source and output.
        disk: what the target's disk needs, with the files that travel along.
        remarks: sentences on what the converter chose by itself.
        download: what of a Hub repository is not on this machine yet. It goes into the Hub's cache, or when it is
            streamed to the target's disk, and is then the most that shards take there at a time.
    """

    source: Path
    recipe: str | None
    dtype: DType
    tensors: tuple[TensorRow, ...]
    nbytes: int
    parameters: int
    memory: int
    disk: int
    remarks: tuple[str, ...]
    download: int = 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters

    @property
    def text_bits(self) -> float:
        """Bits a weight of all but vision and MTP, without what is stored beside them once more exactly."""
        weights: dict[str, TensorRow] = {}
        for tensor in self.tensors:
            if tensor.kind is not Kind.VISION and not tensor.name.startswith(MTP_PREFIX):
                weights.setdefault(tensor.name, tensor)
        count = sum(prod(tensor.shape) for tensor in weights.values())
        return 8 * sum(tensor.nbytes for tensor in weights.values()) / count

    @property
    def rows(self) -> tuple[Row, ...]:
        """Tensors by kind and precision, kinds in the order of `Kind`, exact copies of norms as a row of their own."""
        groups: dict[tuple[Kind, Quantization | None, DType], list[TensorRow]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.kind, tensor.quantization, tensor.dtype), []).append(tensor)
        rows = [
            Row(*key, len(group), sum(prod(tensor.shape) for tensor in group), sum(tensor.nbytes for tensor in group))
            for key, group in groups.items()
        ]
        order = list(Kind)
        return tuple(sorted(rows, key=lambda row: order.index(row.kind)))

    def table(self, *, tensors: bool = False) -> str:
        """The rows as a table, with totals and needs below; with `tensors`, every tensor too."""
        title = "Nothing is packed" if self.recipe is None else f"Recipe {self.recipe}"
        rows = [_cells(row, self.nbytes) for row in self.rows]
        lines = [f"{title}; unpacked weights in {self.dtype}", "", *_columns(_HEAD, rows, left=2)]
        size, bits = readable_size(self.nbytes), f"{self.bits_per_weight:.3f} bits per weight"
        if any(tensor.kind in (Kind.VISION, Kind.MTP) for tensor in self.tensors):
            bits += f", {self.text_bits:.3f} without vision and MTP"
        memory = f"up to {readable_size(self.memory)} of memory"
        disk = f"{readable_size(self.disk)} of disk"
        if self.download:
            disk += f" for the output and {readable_size(self.download)} for the download"
        lines += [
            "",
            f"Total  {self.parameters:,} weights in {size}, {bits}",
            f"Needs  {memory}, {disk}",
            *self.remarks,
        ]
        if tensors:
            lines += ["", *_columns(_TENSOR_HEAD, map(_tensor_cells, self.tensors), left=3)]
        return "\n".join(lines)

    def markdown(self) -> str:
        """The rows as a model card shows them, with a sentence before them."""
        if self.recipe is None:
            return f"The weights are stored in {self.dtype}."
        lines = [
            f"Quantized with the recipe {self.recipe} to {self.bits_per_weight:.3f} bits per weight, "
            f"{readable_size(self.nbytes)} in all. `config.json` lists the precision of every module.",
            "",
            _markdown_row(_HEAD),
            "|---|---|" + "---:|" * (len(_HEAD) - 2),
        ]
        return "\n".join([*lines, *(_markdown_row(_cells(row, self.nbytes)) for row in self.rows)])


def described(
    source: Path,
    outputs: Outputs,
    *,
    recipe: str | None,
    memory: int,
    extra_files: int,
    remarks: tuple[str, ...] = (),
    download: int = 0,
) -> Description:
    """The description of `outputs`, which take `memory` bytes of it to write, with `extra_files` bytes that are copied
    and `download` bytes yet to come."""
    tensors = tuple(_tensor(output) for output in outputs.all)
    return Description(
        source=source,
        recipe=recipe,
        dtype=outputs.dtype,
        tensors=tensors,
        nbytes=outputs.nbytes,
        parameters=sum(prod(shape) for shape in {tensor.name: tensor.shape for tensor in tensors}.values()),
        memory=memory,
        disk=outputs.file_bytes + extra_files,
        remarks=remarks,
        download=download,
    )


def _tensor(output: Output) -> TensorRow:
    spec = output.target.spec
    return TensorRow(output.name, kind_of(spec), spec.shape, output.quantization, output.dtype, output.nbytes)


def _cells(row: Row, total: int) -> tuple[str, ...]:
    return (
        row.kind.value,
        shown_precision(row.quantization, row.dtype),
        f"{row.tensors:,}",
        f"{row.parameters:,}",
        readable_size(row.nbytes),
        f"{row.nbytes / total:.1%}",
    )


def _tensor_cells(tensor: TensorRow) -> tuple[str, ...]:
    shape = " × ".join(str(size) for size in tensor.shape)
    return tensor.name, shape, shown_precision(tensor.quantization, tensor.dtype), readable_size(tensor.nbytes)


def _markdown_row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _columns(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, left: int) -> list[str]:
    """Lines of a table, its first `left` columns flush left and the others flush right."""
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        padded = [text.ljust(width) for text, width in zip(row[:left], widths[:left], strict=True)]
        padded += [text.rjust(width) for text, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(padded).rstrip())
    return lines
