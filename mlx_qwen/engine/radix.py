"""A radix tree: values by sequences of numbers, found by any sequence that one of those begins."""

from collections.abc import Iterator, Sequence
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Key: TypeAlias = Sequence[int] | npt.NDArray[np.int64]


class Node(Generic[T]):
    """A place in the tree: the numbers from its parent to here, and the value of all of them, where one is held."""

    __slots__ = ("children", "edge", "length", "parent", "value")

    def __init__(self, edge: npt.NDArray[np.int64], parent: "Node[T] | None" = None) -> None:
        self.edge = edge
        self.parent = parent
        self.length: int = len(edge) + (parent.length if parent else 0)
        self.children: dict[int, Node[T]] = {}
        self.value: T | None = None

    def below(self, *, first: bool = False) -> "Iterator[tuple[Node[T], T]]":
        """Every node under this one that holds a value; with `first` only the first on each way down."""
        waiting = [*self.children.values()]
        while waiting:
            node = waiting.pop()
            if node.value is not None:
                yield node, node.value
            if node.value is None or not first:
                waiting += node.children.values()


class RadixTree(Generic[T]):
    """Nodes that hold values, and nodes at which the ways to them part; there are no others."""

    def __init__(self) -> None:
        self.root: Node[T] = Node(np.empty(0, np.int64))

    def matched(self, key: Key) -> tuple[list[Node[T]], int]:
        """The nodes whose numbers all begin `key`, the root first, and how far any way goes along with it."""
        ids = np.asarray(key, np.int64)
        way = [self.root]
        while True:
            node = way[-1]
            child = node.children.get(int(ids[node.length])) if node.length < len(ids) else None
            if child is None:
                return way, node.length
            shared = _shared(child.edge, ids[node.length :])
            if shared < len(child.edge):
                return way, node.length + shared
            way.append(child)

    def placed(self, key: Key) -> Node[T]:
        """The node of `key`, made if need be: a value is to be put there."""
        ids = np.array(key, np.int64)
        way, shared = self.matched(ids)
        node = way[-1]
        if shared > node.length:
            lower = node.children[int(ids[node.length])]
            node = _linked(Node(lower.edge[: shared - node.length], node))
            _hang(lower, lower.edge[len(node.edge) :], node)
        return node if node.length == len(ids) else _linked(Node(ids[node.length :], node))


def _linked(node: Node[T]) -> Node[T]:
    assert node.parent is not None, "only the root has no parent"
    node.parent.children[int(node.edge[0])] = node
    return node


def _hang(node: Node[T], edge: npt.NDArray[np.int64], parent: Node[T]) -> None:
    node.edge, node.parent = edge, parent
    _linked(node)


def _shared(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> int:
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    return int(differs.argmax()) if differs.any() else length


def forget(node: Node[T]) -> None:
    """Drop the value of a node of a tree, and the nodes that only led to it."""
    node.value = None
    while node.parent is not None and node.value is None and len(node.children) < 2:
        above = node.parent
        del above.children[int(node.edge[0])]
        for child in node.children.values():
            _hang(child, np.concatenate([node.edge, child.edge]), above)
        node = above
