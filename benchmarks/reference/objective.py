"""What training minimises, and the same losses on held-out text, over the one decoder of `slipstream.models`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.reference.corpus import Batch, TokenSequence, make_batch
from slipstream.models.checkpoint import expected_shapes
from slipstream.models.config import ModelConfig
from slipstream.models.decoder import arrange, causal_decode, logits_of, rotary_tables

LOAD_BALANCE_WEIGHT = 0.01
ROUTER_Z_WEIGHT = 1e-4
PROMPT_WEIGHT = 0.1
"""Weight of a prompt token where the loss is on answers."""

_EVALUATION_ROWS = 16
_INITIAL_STD = 0.02


class HeldOutLoss(msgspec.Struct, frozen=True, kw_only=True):
    """Mean cross-entropy in nats a token: over answers (their end token included), and over whole records."""

    answers: float
    whole_text: float


class Forward(msgspec.Struct, frozen=True):
    """Logits [B, T, V]; per layer the router's logits [B * T, E] and the experts used [B * T, K] (dense: none)."""

    logits_BTV: Tensor
    router_logits: list[Tensor]
    expert_ids: list[Tensor]


def initial_weights(config: ModelConfig, *, seed: int) -> dict[str, Tensor]:
    """Fresh weights: normal of 0.02, the products that end a residual branch divided by sqrt(2 * layers)."""
    generator = torch.Generator().manual_seed(seed)
    residual_std = _INITIAL_STD / math.sqrt(2 * config.num_layers)
    weights = {}
    for name, shape in expected_shapes(config):
        std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else _INITIAL_STD
        weights[name] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * std
    return weights


def forward(config: ModelConfig, weights: Mapping[str, Tensor], ids_BT: Tensor) -> Forward:
    """Causal forward on the device of `ids_BT`, differentiable in `weights` (fp32), with what the routers said.

    `decode` returns which experts were used; the logits behind that choice are caught where they are computed, at the
    product with a router's own matrix, so that the decoder stays the single definition.
    """
    cos, sin = rotary_tables(config)
    decoder = arrange(config, weights, dtype=None)._replace(rotary=(cos.to(ids_BT.device), sin.to(ids_BT.device)))
    routers = {id(layer.router) for layer in decoder.layers if layer.router is not None}
    router_logits: list[Tensor] = []

    def linear(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
        out = functional.linear(x_TD, weight_ND)
        if id(weight_ND) in routers:
            router_logits.append(out)
        return out

    hidden_TD, expert_ids_TLK = causal_decode(decoder, ids_BT, linear=linear)
    logits_BTV = logits_of(decoder, hidden_TD, linear).view(*ids_BT.shape, -1)
    return Forward(logits_BTV, router_logits, [] if expert_ids_TLK is None else list(expert_ids_TLK.unbind(1)))


def training_loss(
    config: ModelConfig, weights: Mapping[str, Tensor], batch: Batch, *, prompt_weight: float
) -> tuple[Tensor, Tensor]:
    """What to minimise (a scalar with a graph), and its cross-entropy part in nats a token (without)."""
    out = forward(config, weights, batch.ids_BT)
    token_weights = loss_weights(batch, prompt_weight=prompt_weight)
    text_loss = (_token_losses(out.logits_BTV, batch.ids_BT) * token_weights).sum() / token_weights.sum()
    total = text_loss
    is_token = (_positions(batch) < batch.lengths_B[:, None]).flatten()
    for router_logits_TE, expert_ids_TK in zip(out.router_logits, out.expert_ids, strict=True):
        real_logits, real_ids = router_logits_TE[is_token], expert_ids_TK[is_token]
        total = total + LOAD_BALANCE_WEIGHT / config.num_layers * load_balance_loss(real_logits, real_ids)
        total = total + ROUTER_Z_WEIGHT / config.num_layers * router_z_loss(real_logits)
    return total, text_loss.detach()


def loss_weights(batch: Batch, *, prompt_weight: float) -> Tensor:
    """Weight [B, T - 1] of predicting tokens 1, 2, ..: 1 for the answer, `prompt_weight` before it, 0 for padding."""
    positions = _positions(batch)[:, 1:]
    weights = torch.where(positions < batch.answer_starts_B[:, None], prompt_weight, 1.0)
    return torch.where(positions < batch.lengths_B[:, None], weights, 0.0)


def load_balance_loss(router_logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """E * sum over experts of (share of assignments * mean probability): 1 when balanced, E when one takes all.

    Source: Fedus et al., "Switch Transformers", 2021, section 2.2, with top-k assignments counted as shares.
    """
    num_experts = router_logits_TE.shape[-1]
    shares_E = functional.one_hot(expert_ids_TK, num_experts).float().mean(dim=(0, 1))
    return num_experts * (shares_E * router_logits_TE.softmax(dim=-1).mean(dim=0)).sum()


def router_z_loss(router_logits_TE: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the router's logits: keeps them small. Source: Zoph et al., "ST-MoE", 2022."""
    return router_logits_TE.logsumexp(dim=-1).square().mean()


@torch.no_grad()
def held_out_loss(
    config: ModelConfig, weights: Mapping[str, Tensor], sequences: Sequence[TokenSequence], *, device: torch.device
) -> HeldOutLoss:
    """Losses pooled over the tokens of these sequences."""
    answers = whole = torch.zeros(2, dtype=torch.float64, device=device)
    by_length = sorted(sequences, key=lambda one: len(one.ids))
    for start in range(0, len(by_length), _EVALUATION_ROWS):
        batch = to_device(make_batch(by_length[start : start + _EVALUATION_ROWS]), device)
        losses = _token_losses(forward(config, weights, batch.ids_BT).logits_BTV, batch.ids_BT).double()
        answers = answers + _sum_and_count(losses, loss_weights(batch, prompt_weight=0.0))
        whole = whole + _sum_and_count(losses, loss_weights(batch, prompt_weight=1.0))
    return HeldOutLoss(answers=float(answers[0] / answers[1]), whole_text=float(whole[0] / whole[1]))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on a device."""
    return Batch(batch.ids_BT.to(device), batch.lengths_B.to(device), batch.answer_starts_B.to(device))


def _token_losses(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Cross-entropy [B, T - 1] of each next token."""
    losses = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids_BT), -1)


def _positions(batch: Batch) -> Tensor:
    return torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)[None]


def _sum_and_count(losses: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([(losses * weights).sum(), weights.double().sum()])
