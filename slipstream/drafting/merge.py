"""One tree a request from several drafters, and the nodes that pay: what a replica drafts with.

Every step: choose the mode (`economy`, `modes`), draft chains with the draft model of each request's domain if the mode
says so, grow one tree a request from chains, Token Recycling and look-ups, and take the nodes that are worth their time
(`slipstream_kernels.merging`, one compiled call, which also counts what of the last trees came true: `survival`).
After every pass: take over what the target said into the Token Recycling matrix, and what the step cost and gave
(`economy`). So what is drafted, by whom and how much of it follows the traffic; output does not depend on it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import msgspec
import numpy as np

from slipstream.drafting.chain import ChainDrafter, put_together
from slipstream.drafting.drafter import DraftContext, LearnedRequest, Lesson, StepLoad
from slipstream.drafting.economy import LARGEST_BAR, Economy, Took
from slipstream.drafting.merged_survival import MergedSurvival
from slipstream.drafting.modes import Mode
from slipstream.drafting.recycling import RecyclingDrafter
from slipstream.drafting.recycling_artifact import StoredMatrix
from slipstream.drafting.survival import SurvivalModel
from slipstream.drafting.tree import DraftTree, trees_of
from slipstream.engine.sampling import shared_row
from slipstream.versions import DEFAULT_DOMAIN, NO_VERSION
from slipstream_kernels.adjacency import Adjacency
from slipstream_kernels.chain import ChainWorth
from slipstream_kernels.merging import DRAFTERS, NO_MATRIX, Chains, Estimates, Merger, Price, Wanted
from slipstream_kernels.recycling import DEFAULT_RULE
from slipstream_kernels.sampling import at_position

Source = Literal["chain", "recycling", "lookup", "pool"]

ALL_SOURCES: tuple[Source, ...] = ("chain", "recycling", "lookup", "pool")

# A draft model proposes two candidates for a place, Token Recycling eight.
_WINDOW_TRIALS = {"chain": 6_000, "lookup": 3_000, "pool": 3_000, "recycling": 24_000}
_MATCHING = ("lookup", "pool")

CATCH_UP_WINDOW = 64
"""Tokens of a text that a draft model reads when it drafts again after a while: trying it must not cost a prefill.

A few times as many where few requests draft (`chain`).
"""

_JUDGED_AT_ONCE = 256
"""Candidates judged before estimates are looked at again."""

_STEPS_BETWEEN_COSTS = 8
"""One in so many steps corrects the prediction of what steps cost."""

_STEPS_BETWEEN_LESSONS = 8
"""One in so many steps between rests is learned from while speculation is off."""

_DRAFT_TIME_SHARE = 0.1
"""What the newest drafting time counts for."""


class DraftingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which drafters take part, and what they may cost.

    `fixed_nodes` 0 leaves the number of nodes to the budget; n drafts up to n nodes a request in every step, whatever
    they cost. `pool_tokens` of past outputs are kept for look-ups. `max_tenants` gives so many tenants a Token
    Recycling matrix of their own, None one for all.
    """

    sources: tuple[Source, ...] = ALL_SOURCES
    fixed_nodes: int = 0
    max_chain_tokens: int = 8
    pool_tokens: int = 65_536
    max_tenants: int | None = None


class MergedDrafter:
    """Drafts with everything it has, within a budget; called by the engine's thread alone.

    `install_chain` and `install_matrix` replace a draft model or the matrix between two steps.
    """

    def __init__(
        self,
        options: DraftingOptions,
        *,
        vocab_size: int,
        num_slots: int,
        max_nodes: int,
        economy: Economy | None,
    ) -> None:
        """`economy` is needed unless the number of nodes is fixed. The compiled kernels must be available."""
        if (economy is None) != bool(options.fixed_nodes):
            raise ValueError("either fixed_nodes or an economy says how many nodes to draft; give one of them")
        self.options = options
        self.economy = economy
        self.greedy, self.sampled = _survival_model(), _survival_model()
        self.merged = MergedSurvival(), MergedSurvival()
        self._vocab_size = vocab_size
        self._chains: dict[str, ChainDrafter] = {}
        self._recycling = RecyclingDrafter(vocab_size, max_tenants=options.max_tenants)
        self._merger = Merger(
            num_slots=num_slots,
            max_nodes=max_nodes,
            vocab_size=vocab_size,
            pool_tokens=options.pool_tokens if "pool" in options.sources else 0,
            greedy=_estimates(self.greedy, self.merged[0]),
            sampled=_estimates(self.sampled, self.merged[1]),
            rule=DEFAULT_RULE,
            drafters=options.sources,
        )
        self._num_known = [0] * num_slots
        self._mode = Mode.OFF
        self._pass_s: dict[int, float] = {}
        self._was_level = True
        self._spared_s = self._listens_since = 0.0
        self._num_steps = 0
        self._num_rest_steps = 0
        self._num_judged = 0

    @property
    def version(self) -> int:
        """The draft version of the default domain; 0 without one."""
        chain = self._chains.get(DEFAULT_DOMAIN)
        return chain.version if chain else NO_VERSION

    @property
    def digest(self) -> str:
        """The digest of that version; empty without one."""
        chain = self._chains.get(DEFAULT_DOMAIN)
        return chain.digest if chain else ""

    @property
    def chains(self) -> dict[str, ChainDrafter]:
        """The draft models by domain."""
        return self._chains

    @property
    def recycling(self) -> RecyclingDrafter:
        """The Token Recycling matrix."""
        return self._recycling

    def calibration_error(self) -> float:
        """Mean of |predicted - real| survival over the nodes judged so far."""
        counts, predicted, accepted = np.hstack([one.curve.sums for one in self.merged])
        return float(np.abs(predicted - accepted).sum() / counts.sum()) if counts.sum() else 0.0

    def install_chain(self, domain: str, chain: ChainDrafter | None) -> None:
        """Draft for requests of a domain with this model; those of a domain without one get that of the default."""
        if chain is None:
            self._chains.pop(domain, None)
        else:
            self._chains[domain] = chain
        self._num_rest_steps = 0
        for model in (self.greedy, self.sampled):
            model.forget("chain")
        if self.economy is not None:
            self.economy.forget(Mode.CHAIN)

    def install_matrix(self, matrix: StoredMatrix, *, version: int) -> None:
        """Begin anew with this matrix."""
        self._recycling = RecyclingDrafter(
            self._vocab_size, start=matrix, version=version, max_tenants=self.options.max_tenants
        )

    @property
    def rests(self) -> bool:
        """Whether the coming pass goes without a draft and need not be asked about, nor learned from."""
        return self._num_rest_steps > 0

    def wants(self, load: StepLoad, *, can_draft: bool) -> bool:
        """Whether to draft for the coming pass; to be asked for every pass unless it rests, before `propose`.

        `can_draft` False: no request may have a draft in it.
        """
        started = time.perf_counter()
        has_chain = can_draft and "chain" in self.options.sources and bool(self._chains)
        has_floor = can_draft and self.options.sources != ("chain",)
        if self.economy is not None:
            self._mode = self.economy.choose(load, has_floor=has_floor, has_chain=has_chain)
        else:
            self._mode = Mode.CHAIN if has_chain else Mode.FLOOR if has_floor else Mode.OFF
        self._was_level = True
        self._spared_s = time.perf_counter() - started
        return self._mode is not Mode.OFF

    def propose(self, contexts: Sequence[DraftContext]) -> list[DraftTree]:
        """One tree per context, in order; NO_DRAFT where nothing is worth its cost."""
        price = self._price(contexts)
        chains, versions = None, [NO_VERSION] * len(contexts)
        if self._mode is Mode.CHAIN:
            chains, versions = self._draft_chains(contexts, price)
        matrices, places = self._matrices(contexts)
        wanted = [self._wanted(one, place) for one, place in zip(contexts, places, strict=True)]
        merged = self._merger.grow(wanted, matrices, price, chains=chains)
        for one in contexts:
            self._num_known[one.slot] = len(one.token_ids)
        self._take_in(merged.num_judged)
        if self.economy is not None:
            drafted_tokens = merged.expected_tokens - price.num_choosing
            self.economy.expect(num_nodes=len(merged.token_ids_X), drafted_tokens=drafted_tokens)
        return trees_of(merged.token_ids_X, merged.parents_X, merged.ends_B, drafter="merged", versions=versions)

    def finished(self, *, step_s: float, pass_s: float, num_tokens: int) -> None:
        """The step took so many seconds, its pass among them, and gave so many tokens."""
        if self.rests:
            self._num_rest_steps -= 1
        elif self.economy is not None:
            self.economy.settle(Took(step_s, pass_s, self._spared_s, num_tokens, is_usual=self._was_level))
            self._num_rest_steps = self.economy.rest()

    def listens(self) -> bool:
        """Whether this pass is to be learned from; asked once a pass. While speculation is off, few are."""
        if self.rests:
            return False
        self._listens_since = time.perf_counter()
        self._num_steps += 1
        is_nth = self._num_steps % _STEPS_BETWEEN_LESSONS == 0
        is_trying = self.economy is not None and self.economy.modes.is_trying
        return self._mode is not Mode.OFF or is_trying or is_nth

    def learn(self, lesson: Lesson) -> None:
        """Take over what the target said, and correct what passes cost."""
        if self.economy is not None and not self.rests:
            is_due = self._num_steps % _STEPS_BETWEEN_COSTS == 0 or self._mode is Mode.OFF
            self.economy.observe(lesson, is_due=is_due)
        if "recycling" in self.options.sources:
            self._recycle(lesson)
        for request in lesson.requests:
            if request.output_ids is not None:
                self._ended(request, request.output_ids)
        self._spared_s += time.perf_counter() - self._listens_since

    def release(self, slot: int) -> None:
        """The sequence in this slot has left."""
        self._merger.release(slot)
        self._num_known[slot] = 0
        for chain in self._chains.values():
            chain.release(slot)

    def _price(self, contexts: Sequence[DraftContext]) -> Price:
        max_nodes = sum(self._max_nodes(one) for one in contexts)
        if self.economy is None:
            return Price(np.ones(max_nodes + 1), 0.0, len(contexts))
        return self.economy.price(max_nodes)

    def _draft_chains(self, contexts: Sequence[DraftContext], price: Price) -> tuple[Chains, list[int]]:
        """The chains of all contexts, and the version that drafted each."""
        rows_of: dict[str, list[int]] = {}
        for row, context in enumerate(contexts):
            domain = context.domain if context.domain in self._chains else DEFAULT_DOMAIN
            if domain in self._chains:
                rows_of.setdefault(domain, []).append(row)
        versions = [NO_VERSION] * len(contexts)
        found: list[tuple[list[int], Chains]] = []
        for domain, rows in rows_of.items():
            drafter = self._chains[domain]
            found.append((rows, self._chains_of(drafter, [contexts[row] for row in rows], price)))
            for row in rows:
                versions[row] = drafter.version
        return put_together(found, len(contexts)), versions

    def _chains_of(self, drafter: ChainDrafter, contexts: Sequence[DraftContext], price: Price) -> Chains:
        """What one draft model drafts for its contexts."""
        width = self.options.max_chain_tokens
        started = time.perf_counter()
        chains = drafter.draft(
            contexts,
            max_tokens=min(width, self.options.fixed_nodes or width),
            worth=self._worth(price, num_drafting=len(contexts)),
        )
        if drafter.was_level:
            spent_s = time.perf_counter() - started
            key = len(contexts).bit_length()
            self._pass_s[key] = _towards(spent_s / int(chains.lengths_B.max()), self._pass_s.get(key))
        self._was_level &= drafter.was_level
        return chains

    def _worth(self, price: Price, *, num_drafting: int) -> ChainWorth:
        """When so many requests that draft together had better stop."""
        pass_s = self._pass_s.get(num_drafting.bit_length(), 0.0)
        pass_tokens = min(price.token_rate * pass_s, (LARGEST_BAR - price.min_survival) * num_drafting)
        estimates = (model.cells("chain").said[0] for model in (self.greedy, self.sampled))
        return ChainWorth(price.min_survival, pass_tokens, *estimates)

    def _matrices(self, contexts: Sequence[DraftContext]) -> tuple[list[Adjacency], list[int]]:
        """The matrices, and which of them each context drafts from."""
        if "recycling" in self.options.sources:
            return self._recycling.matrices_of([one.tenant for one in contexts])
        return [], [NO_MATRIX] * len(contexts)

    def _max_nodes(self, context: DraftContext) -> int:
        return min(context.max_nodes, self.options.fixed_nodes or context.max_nodes)

    def _wanted(self, context: DraftContext, matrix: int) -> Wanted:
        """The tree that a context wants."""
        token_ids, sampling = context.token_ids, context.sampling
        return Wanted(
            context.slot,
            new_ids=token_ids[self._num_known[context.slot] :],
            root=token_ids[-1],
            draw=at_position(shared_row(sampling), len(token_ids)),
            max_nodes=self._max_nodes(context),
            max_depth=context.max_depth,
            matrix=matrix,
            scope=_scope(context.tenant),
            stop_ids=sampling.stop_token_ids,
        )

    def _recycle(self, lesson: Lesson) -> None:
        """Rows of the matrix, or of each tenant's own, from what the target said of texts that may be learned from."""
        has_one_matrix = self.options.max_tenants is None
        if has_one_matrix and all(one.may_train for one in lesson.requests):
            self._recycling.observe_logits(lesson.row_ids_X, lesson.logits_XV)
            return
        owners = [("" if has_one_matrix else one.tenant) if one.may_train else None for one in lesson.requests]
        owners_X = np.repeat(np.array(owners, object), [one.num_rows for one in lesson.requests])
        for owner in dict.fromkeys(one for one in owners if one is not None):
            rows = np.flatnonzero(owners_X == owner)
            self._recycling.observe_logits(lesson.row_ids_X[rows], lesson.logits_XV[rows], tenant=owner)

    def _ended(self, request: LearnedRequest, output_ids: Sequence[int]) -> None:
        num_new = request.num_tokens - self._num_known[request.slot]
        self._take_in(self._merger.end(request.slot, output_ids[-num_new:] if num_new else ()))
        if "pool" in self.options.sources and request.may_train:
            self._merger.keep(_scope(request.tenant), output_ids)

    def _take_in(self, num_judged: int) -> None:
        """So many candidates were judged: make estimates anew once that is worth it."""
        self._num_judged += num_judged
        if self._num_judged < _JUDGED_AT_ONCE:
            return
        self._num_judged = 0
        for model in (self.greedy, self.sampled):
            for name in DRAFTERS:
                model.cells(name).refit_if_due()
        for merged in self.merged:
            merged.let_curve_fade()


def _towards(newest: float, mean: float | None) -> float:
    """The mean with the newest value taken in."""
    return newest if mean is None else mean + _DRAFT_TIME_SHARE * (newest - mean)


def _estimates(model: SurvivalModel, merged: MergedSurvival) -> Estimates:
    return Estimates([model.cells(name) for name in DRAFTERS], merged)


def _survival_model() -> SurvivalModel:
    return SurvivalModel(
        matching={name: trials for name, trials in _WINDOW_TRIALS.items() if name in _MATCHING},
        scoring={name: trials for name, trials in _WINDOW_TRIALS.items() if name not in _MATCHING},
    )


@lru_cache(maxsize=4096)
def _scope(tenant: str) -> int:
    """A number for a tenant that no other one has."""
    return int.from_bytes(hashlib.blake2b(tenant.encode(), digest_size=8).digest(), "little")
