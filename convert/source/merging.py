"""Merges an adapter into the plan of the model that it changes: what is read of a changed matrix is then the sum.

Nothing is computed before it is read, and then only the rows that are: in fp32, whatever both are stored in.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx

from mlx_qwen.checkpoint.layout import Plan, Pool, Source, Target, check_shapes
from mlx_qwen.checkpoint.matrices import unpacked
from mlx_qwen.checkpoint.names import Role, TensorSpec, tensor_specs, text_prefix
from mlx_qwen.checkpoint.settled import are_equal
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.errors import CheckpointError

from ..formats.encoded import Computed, Encoded, RowReader
from .adapters import Adapter, Pair

_EXPERT_PROJECTION = ".switch_mlp."
_SHARED = {"gate_proj": (0, 2), "up_proj": (1, 2), "down_proj": (0, 1)}


@dataclass(frozen=True, slots=True)
class _Factor:
    """A stored matrix, or its transpose, of which every `every`-th column from `first` on counts."""

    stored: TensorInfo
    transposed: bool = False
    first: int = 0
    every: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.stored.shape if len(self.stored.shape) == 2 else (0, 0)
        return (columns, rows) if self.transposed else (rows, columns // self.every)

    def rows(self, start: int, stop: int) -> mx.array:
        """Rows start:stop in fp32."""
        if self.transposed:
            return self.stored.read_columns(start, stop).astype(mx.float32).T
        return self.stored.read(start, stop).astype(mx.float32)[:, self.first :: self.every]


@dataclass(frozen=True, slots=True)
class _Change:
    """left [N, r] · right [r, K] · scale, to be added to a matrix [N, K]; then `magnitude` [N] is its rows' length."""

    left: _Factor
    right: _Factor
    scale: float
    magnitude: TensorInfo | None

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raise CheckpointError unless the matrix `name` of this shape can be changed so."""
        (rows, rank), (inner, columns) = self.left.shape, self.right.shape
        if self.magnitude is not None and self.magnitude.shape != shape[:1]:
            raise CheckpointError(
                f"{self.magnitude.name} in {self.magnitude.file} has shape {list(self.magnitude.shape)}, expected "
                f"{list(shape[:1])}, a length for each row of {name}. Such adapters are not merged here: merge it with "
                "`peft`."
            )
        if (rows, columns) != shape or rank != inner:
            raise CheckpointError(
                f"{self.left.stored.name} in {self.left.stored.file} changes a matrix {[rows, columns]}, expected "
                f"{list(shape)} as {name} is. The adapter belongs to another model."
            )

    def applied(self, values: mx.array, start: int, stop: int) -> mx.array:
        """Rows start:stop, which were `values` in fp32, as they are afterwards."""
        changed = values + self.scale * (self.left.rows(start, stop) @ self.right.rows(0, self.right.shape[0]))
        if self.magnitude is not None:
            lengths = self.magnitude.read(start, stop).astype(mx.float32)
            changed = changed * (lengths / mx.linalg.norm(changed, axis=1))[:, None]
        if mx.isfinite(values).all().item() and not mx.isfinite(changed).all().item():
            raise CheckpointError(
                f"{self.left.stored.file} is damaged: {self.left.stored.name} and its other factor hold NaN or "
                "infinite values, or make them. Download the adapter again."
            )
        return changed


def merged(plan: Plan, adapter: Adapter) -> Plan:
    """`plan` with the matrices of `adapter` changed; raises CheckpointError where it belongs to another model.

    A head that is tied to embeddings of which only one is changed becomes one of its own, as it is used in training.
    """
    plan, pool = _untied(plan, adapter), Pool(dict(adapter.whole))
    if not plan.has_head and _are_alike(plan, adapter):
        pool.left.discard(_ends(plan)[1])
    left = {*adapter.pairs, *(pair.name for pairs in adapter.experts.values() for pair in pairs)}
    targets = []
    for target in plan.targets:
        shift = target.spec.role is Role.SHIFTED_NORM and not adapter.is_mlx
        brought = pool.target(target.spec, shift=shift) or target
        changes = _changes(target.spec, adapter, left)
        targets.append(_changed(brought, changes) if changes else brought)
    unknown = sorted(left) + [pool.tensors[name].name for name in sorted(pool.left)]
    if unknown:
        raise CheckpointError(
            f"{adapter.folder} changes {len(unknown)} tensors that the model does not have, {unknown[0]} for one. The "
            "adapter belongs to another model, or is of a kind that is not merged here."
        )
    check_shapes(targets)
    return replace(plan, targets=tuple(targets))


def _untied(plan: Plan, adapter: Adapter) -> Plan:
    _, head = _ends(plan)
    touched = {*adapter.pairs, *adapter.whole}
    if plan.has_head or not _is_apart(plan, adapter, touched) or _are_alike(plan, adapter):
        return plan
    config = replace(plan.config, text=replace(plan.config.text, tie_word_embeddings=False))
    targets = {target.spec.name: target for target in plan.targets}
    spec = next(spec for spec in tensor_specs(config) if spec.name == head)
    targets[head] = replace(targets[_ends(plan)[0]], spec=spec)
    order = [spec.name for spec in tensor_specs(config) if spec.name in targets]
    return replace(plan, config=config, targets=tuple(targets[name] for name in order))


def _is_apart(plan: Plan, adapter: Adapter, touched: Collection[str]) -> bool:
    """Whether a change of these tensors is one of the embedding or of the head alone."""
    embedding, head = _ends(plan)
    return head in touched or (embedding in touched and not adapter.ties)


def _are_alike(plan: Plan, adapter: Adapter) -> bool:
    """Whether the adapter brings one whole matrix as both embedding and head."""
    a, b = (adapter.whole.get(name) for name in _ends(plan))
    return a is not None and are_equal(a, b) and not _is_apart(plan, adapter, adapter.pairs)


def _ends(plan: Plan) -> tuple[str, str]:
    """The names of embedding and head."""
    prefix = text_prefix(plan.config)
    return f"{prefix}model.embed_tokens.weight", f"{prefix}lm_head.weight"


def _changes(spec: TensorSpec, adapter: Adapter, left: set[str]) -> dict[int, _Change]:
    """The changes of a tensor by expert, 0 for what is no expert's; names that were used are taken from `left`."""
    pair = adapter.pairs.get(spec.name)
    experts = spec.shape[:1] if spec.role is Role.EXPERT else ()
    if pair is not None and len(spec.shape) == 2 + len(experts) and experts == pair.a.shape[:-2] == pair.b.shape[:-2]:
        left.discard(spec.name)
        if experts:
            return {i: _expert_of_mlx(pair, i) for i in range(spec.shape[0])}
        return {0: _change(pair, is_embedding="lora_embedding" in pair.name or spec.role is Role.EMBEDDING)}
    if not experts:
        return {}
    mlp, _, projection = spec.name.removesuffix(".weight").partition(_EXPERT_PROJECTION)
    found = {}
    for i in range(spec.shape[0]):
        name = f"{mlp}.experts.{i}.{projection}.weight"
        if name in adapter.pairs:
            left.discard(name)
            found[i] = _change(adapter.pairs[name], is_embedding=False)
    part, parts = _SHARED[projection]
    for pair in adapter.experts.get(f"{mlp}.experts", ()):
        factors = pair.rank * spec.shape[0]
        if (pair.a.shape, pair.b.shape) == ((factors, spec.shape[2]), (parts * spec.shape[1], factors)):
            left.discard(pair.name)
            found |= {i: _expert_of_peft(pair, spec, i, part) for i in range(spec.shape[0])}
    return found


def _change(pair: Pair, *, is_embedding: bool) -> _Change:
    """Of a module by itself. Embeddings have the inputs as rows."""
    if pair.is_mlx != is_embedding:
        # [K, r] and [r, N], or an embedding's [r, V] and [K, r].
        first, second = (pair.b, pair.a) if pair.is_mlx else (pair.a, pair.b)
        return _Change(_Factor(first, True), _Factor(second, True), pair.scale, pair.magnitude)
    first, second = (pair.a, pair.b) if pair.is_mlx else (pair.b, pair.a)
    return _Change(_Factor(first), _Factor(second), pair.scale, pair.magnitude)


def _expert_of_mlx(pair: Pair, index: int) -> _Change:
    return _Change(_Factor(pair.b.entry(index)), _Factor(pair.a.entry(index)), pair.scale, None)


def _expert_of_peft(pair: Pair, spec: TensorSpec, index: int, part: int) -> _Change:
    """Rows of the projection that stands at place `part` of those that share factors."""
    experts, rows, columns = spec.shape
    a = replace(pair.a, shape=(experts, pair.a.shape[0] // experts, columns)).entry(index)
    b = replace(pair.b, shape=(pair.b.shape[0] // rows, rows, pair.b.shape[1])).entry(part)
    return _Change(_Factor(b, first=index, every=experts), _Factor(a), pair.scale, None)


def _changed(target: Target, changes: dict[int, _Change]) -> Target:
    """The target with sources that are read as they are afterwards."""
    shape = target.spec.shape
    rows, columns = shape[-2:]
    experts = shape[0] if target.spec.role is Role.EXPERT else 1
    for change in changes.values():
        change.check(target.spec.name, (rows, columns))
    if target.stacked:
        sources = [
            Source(_computed(target, source, (rows, columns), (_reader(target, source, 0, changes.get(i)),)))
            for i, source in enumerate(target.sources)
        ]
    else:
        readers = tuple(_reader(target, target.sources[0], i * rows, changes.get(i)) for i in range(experts))
        sources = [Source(_computed(target, target.sources[0], shape, readers))]
    return Target(target.spec, tuple(sources))


def _computed(target: Target, source: Source, shape: tuple[int, ...], readers: tuple[RowReader, ...]) -> Computed:
    info, stored = source.tensor, source.matrix
    parts = [part for part in (info, target.scales, target.biases) if part is not None]
    is_plain = target.quantization is None and not isinstance(info, Encoded)
    nbytes = sum(part.nbytes for part in parts)
    if is_plain:
        nbytes = stored.nbytes * prod(shape) // prod(stored.shape)
    kind = Computed if is_plain else Encoded
    holders = frozenset(file for part in parts for file in part.files)
    return kind(info.name, info.file, info.dtype if is_plain else "F32", shape, 0, nbytes, readers, holders)


def _reader(target: Target, source: Source, offset: int, change: _Change | None) -> RowReader:
    """Reads rows of the matrix that begins at row `offset` of what is stored."""

    def read(start: int, stop: int) -> mx.array:
        values = _stored_rows(target, source, offset + start, offset + stop)
        return values if change is None else change.applied(values, start, stop)

    return read


def _stored_rows(target: Target, source: Source, start: int, stop: int) -> mx.array:
    """Rows start:stop of one source in fp32."""
    if target.quantization is not None:
        packed = [*_read_all(target, source, start, stop)]
        return unpacked(packed[0], packed[1], packed[2] if len(packed) > 2 else None, target.quantization)
    first = 0 if source.rows is None else source.rows[0]
    return source.matrix.read(first + start, first + stop).astype(mx.float32)


def _read_all(target: Target, source: Source, start: int, stop: int) -> Iterator[mx.array]:
    for info in (source.tensor, target.scales, target.biases):
        if info is not None:
            yield info.as_rows().read(start, stop)
