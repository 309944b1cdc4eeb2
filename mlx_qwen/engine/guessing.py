"""Who guesses the next tokens of each row of a batch, and how many."""

from collections.abc import Sequence as Listed
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen.engine.costs import Costs
from mlx_qwen.engine.depth import DRAFT_COST, MOST_DRAFTS, Chooser, Drafts, stated_costs
from mlx_qwen.engine.draft import MTPDrafter
from mlx_qwen.engine.lookup import Lookup
from mlx_qwen.engine.sequence import Drafter, Sequence, Unread
from mlx_qwen.model import Model
from mlx_qwen.model.state import State

LOOKUP = "lookup"


class Plan(NamedTuple):
    """What is guessed of one row: `copied` tokens, or `depth` of them by `drafter`; `drafts` notes how it went."""

    depth: int
    drafts: Drafts
    drafter: Drafter | None = None
    copied: Listed[int] = ()


class Guessing:
    """The plans of all rows for one pass."""

    def __init__(self, rows: Listed[Sequence], plans: Listed[Plan]) -> None:
        self._rows, self._plans = rows, plans
        self.depths = [plan.depth for plan in plans]
        self.depth = max(self.depths)

    @property
    def name(self) -> str:
        """By what the cost of the pass is remembered: who makes its guesses."""
        names = {LOOKUP if plan.drafter is None else plan.drafter.name for plan in self._plans if plan.depth}
        return " and ".join(sorted(names))

    def guesses(self, unread: Unread) -> mx.array:
        """Guesses int [B, depth], whose first ones of each row count, as many as it has planned."""
        served = self._served()
        if len(served) == 1 and len(served[0][1]) == len(self._plans):
            return served[0][0].propose(unread, served[0][1], self.depth)
        rows = [mx.array([*plan.copied, *[0] * (self.depth - len(plan.copied))]) for plan in self._plans]
        for drafter, serving in served:
            depth = max(self._plans[i].depth for i in serving)
            made = mx.pad(drafter.propose(unread, serving, depth), [(0, 0), (0, self.depth - depth)])
            for place, i in enumerate(serving):
                rows[i] = made[place]
        return mx.stack([row.astype(unread.tokens.dtype) for row in rows])

    def settled(self, right: Listed[int]) -> None:
        """Note how many of each row's guesses were right."""
        for plan, count in zip(self._plans, right, strict=True):
            plan.drafts.saw(plan.depth, count)
        for drafter, serving in self._served():
            drafter.kept([self._rows[i] for i in serving], [right[i] for i in serving])

    def _served(self) -> list[tuple[Drafter, list[int]]]:
        """Every drafter that guesses, with the numbers of its rows."""
        found: list[tuple[Drafter, list[int]]] = []
        for i, plan in enumerate(self._plans):
            if plan.drafter is None or not plan.depth:
                continue
            for drafter, serving in found:
                if drafter is plan.drafter:
                    serving.append(i)
                    break
            else:
                found.append((plan.drafter, [i]))
        return found


class Guessers:
    """Plans the guesses of a model's batches, and knows what its passes cost."""

    def __init__(self, model: Model) -> None:
        self.mtp: Drafter | None = MTPDrafter(model) if model.mtp is not None else None
        self.costs = Costs()
        self._choosers: dict[tuple[int, str], Chooser] = {}

    def planned(self, state: State, rows: Listed[Sequence]) -> Guessing:
        """What to guess of each row, none of which is at its last token."""
        looking = any(row.lookup is not None for row in rows)
        costs = self.costs.of(len(rows), LOOKUP, draft=0) if looking else None
        plans = [None if row.lookup is None else _copying(row, row.lookup, costs) for row in rows]
        rest = [i for i, plan in enumerate(plans) if plan is None]
        for i, depth in zip(rest, self._depths(state, [rows[i] for i in rest], len(rows)), strict=True):
            plans[i] = Plan(depth, rows[i].drafts, self._drafter(rows[i]))
        return Guessing(rows, [plan for plan in plans if plan is not None])

    def _drafter(self, row: Sequence) -> Drafter | None:
        return self.mtp if row.draft_model is None else row.draft_model

    def _depths(self, state: State, rows: Listed[Sequence], batch: int) -> list[int]:
        """The depth of each row: as its own drafts say, and of those that are measured the one that pays for all."""
        depths: list[int] = []
        measured: dict[int, int] = {}
        for i, row in enumerate(rows):
            drafter, room = self._drafter(row), _room(row)
            room = min(room, drafter.room(state, row)) if drafter is not None and room > 0 else 0
            costs = None if row.vocabulary is None else stated_costs(_draft_cost(drafter, row))
            depths.append(row.drafts.depth(room, costs) if room > 0 and not row.drafts.is_measured else 0)
            if row.drafts.is_measured and room > 0:
                measured[i] = room
        if measured:
            best = self._shared([rows[i] for i in measured], batch, max(depths))
            for i, room in measured.items():
                depths[i] = min(best, room)
        return depths

    def _shared(self, rows: Listed[Sequence], batch: int, least: int) -> int:
        """The depth that gives most tokens by the clock, for `rows` of a batch whose others guess `least` tokens."""
        drafter = self._drafter(rows[0])
        name = getattr(drafter, "name", "")
        costs = self.costs.of(batch, name, draft=max(_draft_cost(drafter, row) for row in rows))
        if costs is None:
            return 0
        each = [row.drafts.expected() for row in rows]
        tokens = [batch - len(rows) + sum(per) for per in zip(*each, strict=True)]
        paid = [costs[max(depth, least)] for depth in range(MOST_DRAFTS + 1)]
        return self._choosers.setdefault((batch, name), Chooser(both_ways=True)).pick(tokens, paid)


def _room(row: Sequence) -> int:
    """How many guesses could be written: the pending token and the one behind the guesses are the model's own."""
    return row.max_tokens - len(row.written) - 2


def _draft_cost(drafter: Drafter | None, row: Sequence) -> float:
    return DRAFT_COST if drafter is None else row.draft_cost(drafter.head_share)


def _copying(row: Sequence, lookup: Lookup, costs: Listed[float] | None) -> Plan | None:
    """A plan to copy what stood behind the text's end before; None where it stood nowhere, or where that never pays."""
    lookup.saw(row.text(lookup.length, row.length))
    room = min(_room(row), MOST_DRAFTS)
    if room <= 0 or row.pending is None or not lookup.guess(1):
        return None
    # Only here the host waits for the token, and only where the text before it was there before.
    lookup.saw([row.pending.known()])
    copied = lookup.guess(room)
    depth = lookup.drafts.depth(len(copied), costs if lookup.drafts.is_measured else None)
    return Plan(depth, lookup.drafts, None, copied[:depth]) if depth else None
