"""The recipe of the reference target: text, order of batches, losses, and a run that goes on where it stopped."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from benchmarks.reference import corpus, objective, run, training
from benchmarks.reference.corpus import BatchOrder, Record, TokenSequence
from benchmarks.reference.run_state import load_state, new_state, save_state
from slipstream.errors import CheckpointError, ConfigError
from slipstream.models.checkpoint import load_checkpoint
from slipstream.models.config import ModelConfig
from slipstream.models.decoder import causal_logits

CPU = torch.device("cpu")


def small_config() -> ModelConfig:
    """Two layers of four experts over the shipped vocabulary."""
    config = run.tiny_size().config
    return msgspec.structs.replace(config, hidden_size=16, intermediate_size=16, head_dim=8)


def sequences(lengths: list[int], *, answer_start: int = 3) -> list[TokenSequence]:
    return [TokenSequence(np.arange(3, 3 + length, dtype=np.int32), answer_start) for length in lengths]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Query sets of 40 short records each, two of them held out by the shipped list."""
    held_out = sorted(corpus.read_held_out_ids())
    starts = {"gsm8k": "gsm8k", "wikisql": "wikisql", "python_docstring": "pydoc", "sgd_dialog": "sgd"}
    directory = tmp_path / "queries"
    directory.mkdir()
    for name, start in starts.items():
        ids = [one for one in held_out if one.startswith(start)][:2] + [f"{start}-new{n}-0" for n in range(38)]
        with gzip.open(directory / f"{name}.jsonl.gz", "wt", encoding="utf-8") as lines:
            for number, record_id in enumerate(ids):
                row = {"id": record_id, "domain": name, "prompt": f"What is {number}?", "response": f"It is {name}."}
                lines.write(json.dumps(row) + "\n")
    return directory


def request(data: Path, directory: Path, *, num_steps: int = 12) -> run.RunRequest:
    size = msgspec.structs.replace(
        run.tiny_size(), config=small_config(), batch_tokens=128, num_steps=num_steps, checkpoint_every_steps=5
    )
    return run.RunRequest(size=size, data=data, directory=directory)


def test_long_instruction_lines_become_the_trained_ones_and_long_records_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "Please generate code based on the following doc:\nAdd.", "response": "def add(): ..."},
        {"id": "b", "prompt": "x", "response": "y" * (corpus.MAX_RECORD_CHARS - 1)},
        {"id": "c", "prompt": "x", "response": None},
    ]
    with gzip.open(tmp_path / "some.jsonl.gz", "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    records = corpus.read_records(tmp_path, "some")
    assert [one.id for one in records] == ["a"]
    assert records[0].text == "<|user|>Write Python. Add.<|assistant|>def add(): ...<|endoftext|>"


def test_other_turns_of_a_held_out_dialogue_and_copies_of_held_out_text_are_not_trained_on() -> None:
    def record(record_id: str, text: str) -> Record:
        return Record(id=record_id, prompt=text, response="r")

    records = [record("d1-01", "a"), record("d1-02", "b"), record("d2-01", "a"), record("d2-02", "c")]
    kept, held_out = corpus.split(records, {"d1-01"}, has_groups=True)
    assert [one.id for one in held_out] == ["d1-01"]
    assert [one.id for one in kept] == ["d2-02"]
    kept, _ = corpus.split(records, {"d1-01"}, has_groups=False)
    assert [one.id for one in kept] == ["d1-02", "d2-02"]


def test_no_set_of_the_mix_has_a_non_commercial_licence_and_shares_sum_to_one() -> None:
    assert not [one for one in corpus.QUERY_SETS if "NC" in one.licence or not one.licence]
    assert math.isclose(sum(one.share for one in corpus.QUERY_SETS), 1.0)


def test_missing_data_names_the_files_and_the_option(tmp_path: Path) -> None:
    tokenizer = corpus.load_tokenizer(corpus.REFERENCE / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"gsm8k\.jsonl\.gz.*--data DIRECTORY"):
        corpus.read_corpus(tmp_path, tokenizer)


def test_an_epoch_takes_every_sequence_once_in_batches_within_the_budget() -> None:
    lengths = {one.name: [4 + (7 * n) % 23 for n in range(50)] for one in corpus.QUERY_SETS}
    order = BatchOrder({name: sequences(each) for name, each in lengths.items()}, seed=1, batch_tokens=64)
    seen: list[int] = []
    while len(seen) < 50:
        before = order.taken["gsm8k"]
        batch = order.next()
        assert batch.ids_BT.numel() <= 64
        if order.taken["gsm8k"] > before:
            seen += batch.lengths_B.tolist()
    assert sorted(seen) == sorted(lengths["gsm8k"])


def test_batches_go_on_in_the_same_order_after_a_restart() -> None:
    texts = {one.name: sequences([4 + n % 9 for n in range(20)]) for one in corpus.QUERY_SETS}
    order = BatchOrder(texts, seed=3, batch_tokens=32)
    for _ in range(60):  # several epochs of every set
        order.next()
    restarted = BatchOrder(texts, seed=3, batch_tokens=32, taken=dict(order.taken))
    for _ in range(60):
        assert torch.equal(order.next().ids_BT, restarted.next().ids_BT)


def test_loss_weights_are_one_on_answers_less_on_prompts_and_none_on_padding() -> None:
    batch = corpus.make_batch(sequences([6, 4]))
    weights = objective.loss_weights(batch, prompt_weight=0.1)
    assert torch.allclose(weights, torch.tensor([[0.1, 0.1, 1, 1, 1], [0.1, 0.1, 1, 0, 0]]))


def test_load_balance_loss_is_one_when_balanced_and_the_number_of_experts_when_one_takes_all() -> None:
    balanced = objective.load_balance_loss(torch.zeros(4, 4), torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]]))
    assert balanced.item() == pytest.approx(1.0)
    logits = torch.tensor([[50.0, 0, 0, 0]]).repeat(3, 1)
    assert objective.load_balance_loss(logits, torch.zeros(3, 1, dtype=torch.int64)).item() == pytest.approx(4.0)
    assert objective.router_z_loss(torch.zeros(3, 4)).item() == pytest.approx(math.log(4) ** 2)


def test_the_training_forward_is_the_decoder_and_catches_every_routers_logits() -> None:
    target = load_checkpoint(corpus.REFERENCE)
    weights = {name: tensor.float() for name, tensor in target.weights.items()}
    ids_BT = torch.arange(24).view(2, 12) + 40
    with torch.no_grad():
        out = objective.forward(target.config, weights, ids_BT)
        expected = causal_logits(target.config, weights, ids_BT)
    assert torch.equal(out.logits_BTV, expected)
    assert len(out.router_logits) == len(out.expert_ids) == target.config.num_layers
    for logits_TE, ids_TK in zip(out.router_logits, out.expert_ids, strict=True):
        assert torch.equal(logits_TE.topk(target.config.experts_per_token).indices, ids_TK)


def test_gradients_reach_experts_and_routers_and_agree_with_finite_differences() -> None:
    config = msgspec.structs.replace(small_config(), vocab_size=32)
    generator = torch.Generator().manual_seed(0)
    # Ten times the usual spread: router decisions stand far enough apart that a small step changes none.
    fresh = objective.initial_weights(config, seed=0)
    weights = {name: (tensor * 10 if tensor.dim() > 1 else tensor).double() for name, tensor in fresh.items()}
    weights = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    batch = corpus.make_batch(sequences([12, 9]))
    total, _ = objective.training_loss(config, weights, batch, prompt_weight=0.1)
    total.backward()
    for suffix in ("mlp.gate.weight", "mlp.experts.1.down_proj.weight", "self_attn.q_proj.weight"):
        leaf = weights[f"model.layers.0.{suffix}"]
        assert leaf.grad is not None
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        step = 1e-5
        values = []
        for sign in (1, -1):
            moved = weights | {f"model.layers.0.{suffix}": leaf.detach() + sign * step * direction}
            with torch.no_grad():
                values.append(objective.training_loss(config, moved, batch, prompt_weight=0.1)[0].item())
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx((leaf.grad * direction).sum().item(), rel=1e-3, abs=1e-6)


def test_padding_changes_no_loss() -> None:
    config = small_config()
    weights = objective.initial_weights(config, seed=0)
    short = sequences([5])
    alone = objective.held_out_loss(config, weights, short, device=CPU)
    ids_BT = corpus.make_batch([*short, *sequences([30])])
    padded = msgspec.structs.replace(ids_BT, lengths_B=torch.tensor([5, 0]), answer_starts_B=torch.tensor([3, 3]))
    _, loss = objective.training_loss(config, weights, padded, prompt_weight=1.0)
    assert loss.item() == pytest.approx(alone.whole_text, rel=1e-5)


def test_the_learning_rate_warms_up_stays_and_falls_to_two_percent(data: Path, tmp_path: Path) -> None:
    plan = run.run(request(data, tmp_path / "out", num_steps=1), device=CPU).state.plan
    plan = msgspec.structs.replace(plan, num_steps=1000, num_warm_up_steps=10, peak_learning_rate=1.0)
    assert training.learning_rate(plan, 0) == pytest.approx(0.1)
    assert training.learning_rate(plan, 9) == training.learning_rate(plan, 540) == 1.0
    assert training.learning_rate(plan, 775) == pytest.approx(0.5)
    assert training.learning_rate(plan, 999) == pytest.approx(0.02)


def test_a_run_cut_off_after_a_checkpoint_ends_with_the_same_losses_and_weights(data: Path, tmp_path: Path) -> None:
    whole = run.run(request(data, tmp_path / "whole"), device=CPU)
    broken = request(data, tmp_path / "broken")
    tokenizer = corpus.load_tokenizer(corpus.REFERENCE / "tokenizer.json")
    text = corpus.read_corpus(data, tokenizer)
    broken.directory.mkdir()
    plan = load_state(tmp_path / "whole" / training.STATE_FILE, device=CPU).plan
    cut = new_state(plan, objective.initial_weights(plan.config, seed=0), device=CPU)
    order = BatchOrder(text.training, seed=0, batch_tokens=128)
    written = []
    for step in range(1, 8):
        written.append(training.StepLoss(step, training.train_step(cut, order)))
        if step == 5:
            save_state(broken.directory / training.STATE_FILE, cut)
    lines = b"".join(msgspec.json.encode(one) + b"\n" for one in written)
    (broken.directory / training.LOSSES_FILE).write_bytes(lines + b'{"step":8,"lo')  # killed within a line
    resumed = run.run(broken, device=CPU)
    losses = [training.read_losses(tmp_path / name / training.LOSSES_FILE) for name in ("whole", "broken")]
    assert [one.step for one in losses[0]] == list(range(1, 13))
    assert losses[0] == losses[1]
    assert whole.digest == resumed.digest == run.run(broken, device=CPU).digest  # the last one: nothing left to do


def test_a_state_of_another_run_or_none_at_all_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    asked = request(data, tmp_path / "out", num_steps=2)
    run.run(asked, device=CPU)
    with pytest.raises(ConfigError, match="--out"):
        run.run(msgspec.structs.replace(asked, seed=1), device=CPU)
    (asked.directory / training.STATE_FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no saved training run"):
        run.run(asked, device=CPU)


def test_the_model_directory_loads_as_a_target_and_its_card_names_data_and_losses(data: Path, tmp_path: Path) -> None:
    asked = request(data, tmp_path / "out", num_steps=2)
    done = run.run(asked, device=CPU)
    directory = asked.directory / "model"
    checkpoint = load_checkpoint(directory)
    assert checkpoint.digest == done.digest
    assert checkpoint.config == done.state.plan.config
    shipped = {path.name for path in corpus.REFERENCE.iterdir()}
    assert {path.name for path in directory.iterdir()} == shipped
    card = (directory / "README.md").read_text(encoding="utf-8")
    for query_set in corpus.QUERY_SETS:
        assert query_set.name in card
        assert query_set.licence in card
        assert f"{done.after[query_set.name].answers:.2f}" in card


def test_a_tokenizer_of_ones_own_keeps_the_special_tokens_and_gives_text_back(data: Path, tmp_path: Path) -> None:
    tokenizer = corpus.train_tokenizer(data, vocab_size=300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = corpus.load_tokenizer(tmp_path / "tokenizer.json")
    ids = loaded.encode("<|user|>What is 3? ünï<|assistant|>").ids
    assert ids[0] == corpus.USER
    assert ids[-1] == corpus.ASSISTANT
    assert loaded.decode(ids) == "What is 3? ünï"
