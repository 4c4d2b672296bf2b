"""The distillation loss by hand, and a student that learns, stops and goes on as if it had not."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch

from slipstream.errors import CheckpointError
from slipstream.learning.distillation import (
    DistillationBatch,
    Student,
    distillation_loss,
    generated_logits,
    is_trainable,
    make_batch,
)
from slipstream.models.checkpoint import load_checkpoint
from slipstream.models.decoder import causal_logits, initial_draft
from slipstream.records import Observation, pack_floats, pack_ids, unpack_ids
from tests.observed import VOCAB_SIZE, observation


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def batch_of(target: list[list[float]], top_ids: list[list[int]]) -> DistillationBatch:
    probs = torch.tensor(target)
    return DistillationBatch(
        torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0]), torch.tensor(top_ids), probs, 1 - probs.sum(-1)
    )


def test_loss_is_cross_entropy_over_the_kept_tokens_and_one_bucket_for_the_rest() -> None:
    # Draft probabilities 0.5, 0.25, 0.125, 0.125; the target keeps tokens 0 and 2 with 0.6 and 0.3, 0.1 is left.
    logits_GV = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log() + 7.0
    loss = distillation_loss(logits_GV, batch_of([[0.6, 0.3]], [[0, 2]]))
    expected = -(0.6 * math.log(0.5) + 0.3 * math.log(0.125) + 0.1 * math.log(0.375))
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_loss_is_least_where_the_draft_is_the_target() -> None:
    target_probs = torch.tensor([[0.6, 0.05, 0.3, 0.05]])
    batch = batch_of([[0.6, 0.3]], [[0, 2]])
    least = float(distillation_loss(target_probs.log(), batch))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = target_probs.log() + 0.3 * torch.randn(1, 4, generator=generator)
        assert float(distillation_loss(other, batch)) > least - 1e-6


def test_loss_and_gradient_stay_finite_when_the_draft_is_sure_of_the_kept_tokens() -> None:
    logits_GV = torch.tensor([[60.0, 0.0, 59.0, -60.0]], requires_grad=True)
    loss = distillation_loss(logits_GV, batch_of([[0.6, 0.3]], [[0, 2]]))
    loss.backward()
    assert logits_GV.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(logits_GV.grad).all()


def test_batch_pairs_every_generated_token_with_the_position_before_it() -> None:
    observations = [observation("a", num_tokens=3), observation("b", num_tokens=7)]
    batch = make_batch(observations)
    emitted = [token for one in observations for token in unpack_ids(one.output_ids).tolist()]
    assert batch.ids_BT.shape == (2, 11)
    assert batch.ids_BT.flatten()[batch.sources_G + 1].tolist() == emitted
    assert batch.top_ids_GN[:, 0].tolist() == emitted
    assert batch.rest_probs_G.tolist() == pytest.approx([0.04] * 10, abs=1e-3)


def test_generated_logits_are_those_of_the_whole_decoder() -> None:
    config, weights = initial_draft(VOCAB_SIZE, seed=1)
    batch = make_batch([observation("a", num_tokens=3), observation("b", num_tokens=7)])
    whole = causal_logits(config, weights, batch.ids_BT).flatten(0, 1)[batch.sources_G]
    assert torch.allclose(generated_logits(config, weights, batch), whole, atol=1e-5)


def test_long_sequences_lose_the_start_of_the_prompt_and_no_generated_token() -> None:
    long = msgspec.structs.replace(observation("a", num_tokens=30), prompt_ids=pack_ids([5] * 900), first_position=900)
    batch = make_batch([long])
    assert batch.ids_BT.shape == (1, 384)
    assert len(batch.sources_G) == 30


@pytest.mark.parametrize(
    "damage",
    [
        {"output_ids": pack_ids([VOCAB_SIZE] * 12)},
        {"top_ids": pack_ids([-1] * 48)},
        {"prompt_ids": b""},
        {"top_logprobs": pack_floats([math.nan] * 48, bits=16)},
        {"top_logprobs": pack_floats([math.inf] * 48, bits=16)},
    ],
)
def test_an_observation_that_would_break_training_is_not_trainable(damage: dict[str, bytes]) -> None:
    assert is_trainable(observation("a"), vocab_size=VOCAB_SIZE)
    broken: Observation = msgspec.structs.replace(observation("a"), **damage)
    assert not is_trainable(broken, vocab_size=VOCAB_SIZE)


def new_student() -> Student:
    return Student(*initial_draft(VOCAB_SIZE, seed=0), learning_rate=3e-3)


def test_a_student_learns_the_rule_of_its_target() -> None:
    student = new_student()
    for step in range(60):
        student.train_step(make_batch([observation(f"train-{step}-{row}") for row in range(4)]))
    held_out = make_batch([observation(f"held-out-{row}") for row in range(10)])
    logits_GV = generated_logits(student.config, student.weights, held_out)
    assert (logits_GV.argmax(-1) == held_out.top_ids_GN[:, 0]).float().mean() > 0.9


def test_a_restored_student_goes_on_exactly_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    batches = [make_batch([observation(f"train-{step}")]) for step in range(8)]
    straight, first_half = new_student(), new_student()
    for batch in batches:
        straight.train_step(batch)
    for batch in batches[:4]:
        first_half.train_step(batch)
    first_half.save(tmp_path / "student.safetensors", version=7)
    second_half, version = Student.restore(tmp_path / "student.safetensors", learning_rate=3e-3)
    for batch in batches[4:]:
        second_half.train_step(batch)
    assert (version, second_half.num_steps) == (7, 8)
    assert all(torch.equal(second_half.weights[name], tensor) for name, tensor in straight.weights.items())


def test_a_damaged_student_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    new_student().save(path, version=1)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="no saved student"):
        Student.restore(path, learning_rate=3e-3)


def test_a_snapshot_loads_with_the_digest_it_reported(tmp_path: Path) -> None:
    digest = new_student().snapshot(tmp_path)
    assert load_checkpoint(tmp_path).digest == digest


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    student = new_student()
    good = make_batch([observation("a")])
    bad = DistillationBatch(
        good.ids_BT, good.sources_G, good.top_ids_GN, good.top_probs_GN * math.nan, good.rest_probs_G
    )
    before = {name: tensor.clone() for name, tensor in student.weights.items()}
    assert math.isnan(student.train_step(bad))
    assert all(torch.equal(student.weights[name], tensor) for name, tensor in before.items())
