"""What an engine runs: its target and its drafters, sized by its limits and ready before they are used."""

from __future__ import annotations

from slipstream.drafting.chain import ChainDrafter
from slipstream.drafting.economy import Economy
from slipstream.drafting.merge import DraftingOptions, MergedDrafter
from slipstream.engine.decoders import OpenDecoder
from slipstream.engine.plan import BLOCK_TOKENS, PagedDecoder
from slipstream.engine.probing import open_step_cost
from slipstream.engine.scheduler import EngineLimits
from slipstream.errors import ArtifactRejected
from slipstream.models.checkpoint import Checkpoint


def open_target(target: Checkpoint, limits: EngineLimits, *, device: str, decoders: OpenDecoder) -> PagedDecoder:
    """The target's decoder, with room for the largest step and the nodes of every request's tree."""
    num_nodes = limits.max_running_requests * limits.num_draft_tokens
    return decoders(
        target,
        num_blocks=limits.num_blocks,
        num_node_slots=num_nodes,
        # A prefilling sequence may get a block's worth of rows when decoding takes the whole budget.
        max_rows=max(limits.max_step_tokens, limits.max_running_requests) + num_nodes + BLOCK_TOKENS,
        device=device,
    )


def open_chain(
    draft: Checkpoint,
    *,
    version: int,
    limits: EngineLimits,
    max_context_tokens: int,
    device: str,
    window: int | None = None,
    packs_int8: bool = False,
) -> ChainDrafter:
    """A draft model, loaded and run once; raises ArtifactRejected if it cannot run.

    See ChainDrafter for `window`, `open_decoder` for `packs_int8`.
    """
    try:
        drafter = ChainDrafter(
            draft,
            version=version,
            num_slots=limits.max_running_requests,
            max_context_tokens=max_context_tokens,
            max_catch_up_tokens=limits.max_step_tokens,
            device=device,
            window=window,
            packs_int8=packs_int8,
        )
        drafter.warm()
    except (RuntimeError, MemoryError, IndexError, ValueError) as error:
        raise ArtifactRejected(f"draft version {version} cannot run: {error}", reason="format") from error
    return drafter


def open_merged(options: DraftingOptions, target: PagedDecoder, limits: EngineLimits) -> MergedDrafter:
    """All drafters of a target that serves nobody yet; measures what its steps cost if a budget needs to know."""
    return MergedDrafter(
        options,
        vocab_size=target.config.vocab_size,
        num_slots=limits.max_running_requests,
        max_nodes=limits.num_draft_tokens,
        economy=None if options.fixed_nodes else Economy(open_step_cost(target, limits)),
    )
