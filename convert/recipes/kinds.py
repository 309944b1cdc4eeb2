"""What a matrix does in the network: recipes, tables and error reports speak of these kinds."""

from enum import Enum

from mlx_qwen.checkpoint.names import MTP_PREFIX, Role, TensorSpec


class Kind(Enum):
    """A kind of tensor, named as tables show it. Recipes pack every kind but the last two."""

    EMBEDDING = "embedding"
    HEAD = "output head"
    ATTENTION_IN = "attention q, k, v"
    ATTENTION_OUT = "attention output"
    LINEAR_IN = "linear attention input"
    LINEAR_OUT = "linear attention output"
    MLP = "MLP"
    EXPERT = "experts"
    SHARED_EXPERT = "shared expert"
    ROUTER = "router"
    MTP = "MTP layer"
    VISION = "vision tower"
    EXACT = "norms, convolutions, decay"

    @property
    def is_matrix(self) -> bool:
        """Whether recipes pack tensors of this kind."""
        return self not in (Kind.VISION, Kind.EXACT)


_BY_ROLE = {
    Role.EMBEDDING: Kind.EMBEDDING,
    Role.HEAD: Kind.HEAD,
    Role.EXPERT: Kind.EXPERT,
    Role.ROUTER: Kind.ROUTER,
    Role.VISION: Kind.VISION,
}
_LINEAR = {
    ".self_attn.o_proj.": Kind.ATTENTION_OUT,
    ".self_attn.": Kind.ATTENTION_IN,
    ".linear_attn.out_proj.": Kind.LINEAR_OUT,
    ".linear_attn.": Kind.LINEAR_IN,
    ".shared_expert.": Kind.SHARED_EXPERT,
    ".mlp.": Kind.MLP,
}


_VISION_LAYERS = (".attn.qkv.weight", ".attn.proj.weight", ".linear_fc1.weight", ".linear_fc2.weight")


def kind_of(spec: TensorSpec) -> Kind:
    """The kind of a tensor in MLX layout. All matrices of the MTP layer are one kind, whatever they do there."""
    if spec.role not in (Role.LINEAR, *_BY_ROLE):
        return Kind.EXACT
    if spec.name.startswith(MTP_PREFIX):
        return Kind.MTP
    if spec.role in _BY_ROLE:
        return _BY_ROLE[spec.role]
    return next(kind for part, kind in _LINEAR.items() if part in spec.name)


def can_pack(spec: TensorSpec) -> bool:
    """Whether a tensor can be packed on request: what recipes pack, and the vision tower's linear layers."""
    kind = kind_of(spec)
    return kind.is_matrix or (kind is Kind.VISION and spec.name.endswith(_VISION_LAYERS))


def joined_with(name: str) -> str:
    """What the matrices share that the loader joins into one where their precision is equal: q, k and v, gate and up.

    Two matrices are joined exactly if this is the same string; it is `name` itself for a matrix that stands alone.
    """
    for partners in _JOINED:
        for partner in partners:
            if name.endswith(partner):
                return name.removesuffix(partner) + partners[0]
    return name


_JOINED = (
    ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ("linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight"),
    ("gate_proj.weight", "up_proj.weight"),
    ("mlp.gate.weight", "mlp.shared_expert_gate.weight"),
)
