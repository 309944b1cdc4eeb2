"""How a model is divided among ranks: which part of each tensor one of them holds, by the tensor's role.

Tensor parallelism as Megatron-LM does it (Shoeybi et al., 2019): what a layer's first matrices give is divided by heads
or along the intermediate axis, its last matrix takes that part in, and one sum over the ranks completes each half of a
layer. Norms, routers, the vision tower and the MTP layer are whole on each rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mlx_qwen.checkpoint.layout import Target
from mlx_qwen.checkpoint.names import MTP_PREFIX, Role, TensorSpec
from mlx_qwen.checkpoint.slices import Cut, Span
from mlx_qwen.config import TextConfig
from mlx_qwen.errors import ShardingError

MOST_RANKS = 64
_WHOLE_ROLES = (Role.VISION, Role.ROUTER, Role.SHIFTED_NORM, Role.PLAIN_NORM)


@dataclass(frozen=True, slots=True)
class Share:
    """What rank `rank` of `count` holds of a language model, whose sizes `whole` are.

    Key heads of attention and of Gated DeltaNet are repeated where there are more ranks than these. With `layers` it is
    these decoder layers, whole, instead of a part of each: see `mlx_qwen.model.pipeline`.
    """

    whole: TextConfig
    rank: int = 0
    count: int = 1
    layers: Span | None = None

    @property
    def text(self) -> TextConfig:
        """The sizes of one rank's part; those of the residual stream and the vocabulary stay."""
        whole, n, moe = self.whole, self.count, self.whole.moe
        if self.layers is not None:
            own = slice(*self.layers)
            kinds, sparse = whole.layer_types[own], whole.sparse_layers[own]
            return replace(whole, num_hidden_layers=len(kinds), layer_types=kinds, sparse_layers=sparse)
        if moe is not None:
            moe = replace(
                moe,
                moe_intermediate_size=moe.moe_intermediate_size // n,
                shared_expert_intermediate_size=moe.shared_expert_intermediate_size // n,
            )
        return replace(
            whole,
            num_attention_heads=whole.num_attention_heads // n,
            num_key_value_heads=max(whole.num_key_value_heads // n, 1),
            linear_num_key_heads=max(whole.linear_num_key_heads // n, 1),
            linear_num_value_heads=whole.linear_num_value_heads // n,
            intermediate_size=whole.intermediate_size // n,
            moe=moe,
        )

    @property
    def label(self) -> str:
        """What tells this share's states from those of others; nothing for the whole."""
        layers = "" if self.layers is None else f"-layers{self.layers[0]}to{self.layers[1]}"
        return f"-{self.rank}of{self.count}{layers}" if self.count > 1 else ""

    def cut(self, spec: TensorSpec) -> Cut | None:
        """The part of a tensor that this rank holds; None for all of it, no rows for what another rank adds."""
        if self.count == 1 or self.layers is not None or spec.role in _WHOLE_ROLES or spec.name.startswith(MTP_PREFIX):
            return None
        module = spec.name.removesuffix(".weight")
        if spec.role in (Role.EMBEDDING, Role.HEAD):
            return Cut("rows", (self.part(self.whole.vocab_size),))
        place, _, name = module.rpartition("linear_attn.")
        if place:
            return self._gated_delta(name)
        place, _, name = module.rpartition("self_attn.")
        return self._attention(name) if place else self._feed_forward(spec, module)

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """The shape of the part of a tensor that this rank holds."""
        cut = self.cut(spec)
        return spec.shape if cut is None else cut.shape(spec.shape, is_expert=spec.role is Role.EXPERT)

    def part(self, size: int) -> Span:
        """This rank's run of `size` rows or columns that all ranks divide evenly."""
        each = size // self.count
        return self.rank * each, (self.rank + 1) * each

    def _heads(self, heads: int) -> Span:
        """This rank's run of key heads, one that others hold too where there are fewer than ranks."""
        if heads >= self.count:
            return self.part(heads)
        own = self.rank * heads // self.count
        return own, own + 1

    def _attention(self, name: str) -> Cut:
        text = self.whole
        if name.startswith("o_proj"):
            if name.endswith(".bias"):
                return Cut("rows", ((0, text.hidden_size if self.rank == 0 else 0),))
            return Cut("columns", (_scaled(self.part(text.num_attention_heads), text.head_dim),))
        if name.startswith("q_proj"):
            return Cut("rows", (_scaled(self.part(text.num_attention_heads), 2 * text.head_dim),))
        return Cut("rows", (_scaled(self._heads(text.num_key_value_heads), text.head_dim),))

    def _gated_delta(self, name: str) -> Cut:
        text = self.whole
        keys, values = self._heads(text.linear_num_key_heads), self.part(text.linear_num_value_heads)
        key_rows, value_rows = _scaled(keys, text.linear_key_head_dim), _scaled(values, text.linear_value_head_dim)
        if name == "out_proj":
            return Cut("columns", (value_rows,))
        if name in ("in_proj_qkv", "conv1d"):
            k, v = text.linear_key_dim, 2 * text.linear_key_dim
            return Cut("rows", (key_rows, _moved(key_rows, k), _moved(value_rows, v)))
        if name == "in_proj_qkvz":
            sizes = (text.linear_key_head_dim,) * 2, (text.linear_value_head_dim,) * 2
            return Cut("rows", self._by_key_head(keys, values, *sizes))
        if name == "in_proj_ba":
            return Cut("rows", self._by_key_head(keys, values, (), (1, 1)))
        return Cut("rows", (value_rows if name == "in_proj_z" else values,))

    def _by_key_head(
        self, keys: Span, values: Span, of_key: tuple[int, ...], of_value: tuple[int, ...]
    ) -> tuple[Span, ...]:
        """Rows where those of each key head, `of_key`, stand before those of its value heads, `of_value` a head."""
        per_key = self.whole.linear_num_value_heads // self.whole.linear_num_key_heads
        rows = sum(of_key) + per_key * sum(of_value)
        spans: list[Span] = []
        for head in range(*keys):
            own = max(values[0] - head * per_key, 0), min(values[1] - head * per_key, per_key)
            place = head * rows
            spans += [(place, place + sum(of_key))] if of_key else []
            place += sum(of_key)
            for size in of_value:
                spans.append(_moved(_scaled(own, size), place))
                place += per_key * size
        return tuple(spans)

    def _feed_forward(self, spec: TensorSpec, module: str) -> Cut:
        name = module.rpartition(".")[2]
        if name == "down_proj":
            return Cut("columns", (self.part(spec.shape[-1]),))
        return Cut("rows", (self.part(spec.shape[-2]),))


def check_ranks(text: TextConfig, count: int) -> None:
    """Raises ShardingError where `count` ranks do not divide a model of these sizes, with the counts that would."""
    undivided = _undivided(text, count)
    if undivided:
        said = ", ".join(f"{name} {size}" for name, size in undivided)
        raise ShardingError(
            f"{count} ranks do not divide this model evenly: {said}. Start {_counts(possible_ranks(text))}."
        )


def check_groups(text: TextConfig, targets: Iterable[Target], count: int) -> None:
    """Raises ShardingError where `count` ranks would cut through groups of packed weights, with the counts that do."""
    packed = [target for target in targets if target.quantization is not None]
    split = next((target for target in packed if _splits(text, target, count)), None)
    if split is None:
        return
    assert split.quantization is not None, "only packed matrices have groups"
    do = [n for n in possible_ranks(text) if not any(_splits(text, target, n) for target in packed)]
    columns, group = split.spec.shape[-1], split.quantization.group_size
    raise ShardingError(
        f"{count} ranks would cut the {columns} columns of {split.spec.name} every {columns // count}, through groups "
        f"of {group} that share a scale. Start {_counts(do)}, or convert the model with smaller groups."
    )


def possible_ranks(text: TextConfig) -> list[int]:
    """The numbers of ranks, from 2 up to 64, that divide a model of these sizes evenly."""
    return [count for count in range(2, MOST_RANKS + 1) if not _undivided(text, count)]


def _undivided(text: TextConfig, count: int) -> list[tuple[str, int]]:
    """The sizes that `count` ranks do not divide, with their names in the config."""
    divided = {"vocab_size": text.vocab_size}
    repeated = {}
    if "full_attention" in text.layer_types:
        divided["num_attention_heads"] = text.num_attention_heads
        repeated["num_key_value_heads"] = text.num_key_value_heads
    if "linear_attention" in text.layer_types:
        repeated["linear_num_key_heads"] = text.linear_num_key_heads
        divided["linear_num_value_heads"] = text.linear_num_value_heads
    if not all(text.sparse_layers):
        divided["intermediate_size"] = text.intermediate_size
    if text.moe is not None:
        divided["moe_intermediate_size"] = text.moe.moe_intermediate_size
        divided["shared_expert_intermediate_size"] = text.moe.shared_expert_intermediate_size
    bad = [(name, size) for name, size in divided.items() if size % count]
    return bad + [(name, heads) for name, heads in repeated.items() if heads % count and count % heads]


def _splits(text: TextConfig, target: Target, count: int) -> bool:
    assert target.quantization is not None, "asked of packed matrices"
    cut = Share(text, 0, count).cut(target.spec)
    return cut is not None and cut.axis == "columns" and cut.size % target.quantization.group_size > 0


def _counts(counts: list[int]) -> str:
    """ "2, 4 or 8 ranks", or what to do where no number divides the model."""
    if not counts:
        return "one: no number of ranks divides it"
    *most, last = map(str, counts)
    return f"{', '.join(most)} or {last} ranks" if most else f"{last} ranks"


def _scaled(span: Span, size: int) -> Span:
    return span[0] * size, span[1] * size


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by
