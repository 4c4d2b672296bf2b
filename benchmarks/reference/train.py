"""Train the reference target from scratch: `python -m benchmarks.reference.train [--quick] [--out DIR] [--minutes N]`.

Reads the query sets of `--data`, trains, and writes a Hugging Face directory with its model card to OUT/model. The same
command goes on where a killed run stopped. `--quick` proves both on a tiny configuration within two minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.reference.corpus import QUERIES, REFERENCE, load_tokenizer, read_corpus
from benchmarks.reference.evaluate import evaluate, loss_table, pick_device
from benchmarks.reference.quick import prove
from benchmarks.reference.run import Run, RunRequest, full_size, mean_answer_loss, run, tiny_size
from benchmarks.reference.training import LOSSES_FILE, read_losses
from benchmarks.report import RESULTS, Goal, finish, progress
from slipstream.errors import CheckpointError, ConfigError
from slipstream.models.checkpoint import load_checkpoint

SMALLEST_FALL_NATS = 2.0
"""Of the mean held-out loss on answers; fresh weights are at ln(vocabulary), 8.3 nats for 4,096."""


def report(done: Run, request: RunRequest, *, device: torch.device) -> int:
    """Print the held-out losses beside those of fresh weights and of the shipped target; returns the exit code."""
    columns = {"fresh weights": done.before, "this run": done.after}
    if not request.trains_tokenizer:  # nats a token compare only under one tokenizer
        shipped = load_checkpoint(REFERENCE)
        held_out = read_corpus(request.data, load_tokenizer(REFERENCE / "tokenizer.json"), most_records=1).held_out
        weights = {name: tensor.to(device, torch.float32) for name, tensor in shipped.weights.items()}
        columns[REFERENCE.name] = evaluate(shipped.config, weights, held_out, device=device)
    draw(request.directory / LOSSES_FILE)
    fall = mean_answer_loss(done.before) - mean_answer_loss(done.after)
    smallest = 0.5 if request.size.name == "tiny" else SMALLEST_FALL_NATS
    goals = [Goal(figure="fall of the held-out loss on answers, nats", value=fall, at_least=smallest)]
    figures = {f"{name} answers, nats": losses.answers for name, losses in done.after.items()}
    figures |= {goal.figure: goal.value for goal in goals} | {"training tokens": done.state.num_tokens}
    progress(f"the model is in {request.directory / 'model'}")
    return finish("reference", tables=[loss_table(columns)], figures=figures, goals=goals)


def draw(path: Path) -> None:
    """A picture of the training loss over the steps; left out, with a line, where matplotlib is not installed."""
    try:
        from matplotlib import pyplot  # noqa: PLC0415 - optional: a machine that only trains has torch alone
    except ImportError:
        progress("no picture: matplotlib is not installed")
        return
    losses = read_losses(path)
    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.plot([one.step for one in losses], [one.loss for one in losses], linewidth=0.6)
    axes.set(xlabel="step", ylabel="training loss, nats a weighted token", title="reference target")
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "reference.png", dpi=120)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="prove the recipe on a tiny configuration, and exit")
    parser.add_argument("--out", type=Path, default=RESULTS / "reference", metavar="DIR", help="state and model")
    parser.add_argument("--minutes", type=float, metavar="N", help="train about so long; default: 21.7 M tokens")
    parser.add_argument("--data", type=Path, default=QUERIES, metavar="DIRECTORY", help="query sets, NAME.jsonl.gz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-tokenizer", action="store_true", help="a new byte-level BPE, not the shipped one")
    parser.add_argument("--tiny", action="store_true", help="the tiny configuration and 80 steps")
    parsed = parser.parse_args(arguments)
    if parsed.minutes is not None and parsed.minutes <= 0:
        parser.error(f"--minutes is {parsed.minutes:g}, expected more than 0")
    return parsed


def main() -> int:
    """Run the recipe; returns the exit code (2: something cannot be read, 130: Ctrl-C)."""
    arguments = parse()
    try:
        if arguments.quick:
            return prove(arguments.data, seed=arguments.seed)
        request = RunRequest(
            size=tiny_size() if arguments.tiny else full_size(),
            data=arguments.data,
            directory=arguments.out,
            seed=arguments.seed,
            minutes=arguments.minutes,
            trains_tokenizer=arguments.train_tokenizer,
        )
        device = pick_device()
        # fp32 everywhere; on CUDA its products may use TF32, several times faster and precise enough to train.
        torch.set_float32_matmul_precision("high")
        return report(run(request, device=device), request, device=device)
    except (CheckpointError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        progress("stopped; the same command goes on from the last checkpoint")
        return 130


if __name__ == "__main__":
    sys.exit(main())
