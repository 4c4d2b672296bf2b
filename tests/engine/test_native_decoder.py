"""Own kernels compute what transformers' models compute, and every row's bits are a function of its own sequence."""

from __future__ import annotations

import ctypes
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import slipstream_kernels
from slipstream.engine.native_decoder import NativeDecoder
from slipstream.engine.plan import BLOCK_TOKENS, Move
from slipstream.models.checkpoint import Checkpoint, load_checkpoint
from slipstream.models.config import Family
from slipstream.models.decoder import arrange, causal_logits
from slipstream_kernels import build, isa
from slipstream_kernels.decoder import LONGEST_ROUNDED
from tests.families import FAMILIES, SIZES, VOCAB_SIZE, random_checkpoint
from tests.plans import Rows, blocks_for, plan_of, random_tree

SHARED_MODELS = Path(__file__).parents[3] / "shared" / "models"
REFERENCE = Path(__file__).parents[2] / "deploy" / "models" / "mix-moe-11m"
NUM_BLOCKS = 64


pytestmark = pytest.mark.usefixtures("compiled_kernels")


def native(checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, packs_int8: bool = False) -> NativeDecoder:
    weights = arrange(checkpoint.config, checkpoint.weights, dtype=dtype)
    return NativeDecoder(weights, num_blocks=NUM_BLOCKS, num_node_slots=64, max_rows=256, packs_int8=packs_int8)


def random_ids(seed: int, length: int, vocab_size: int = VOCAB_SIZE) -> tuple[int, ...]:
    return tuple(int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, length))


def scattered(seed: int, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Blocks for sequences of these lengths, in no order."""
    free = iter(np.random.default_rng(seed).permutation(NUM_BLOCKS).tolist())
    return [tuple(itertools.islice(free, blocks_for(length))) for length in lengths]


def logits(decoder: NativeDecoder, *sequences: Rows) -> torch.Tensor:
    return decoder.forward(plan_of(sequences)).logits_XV.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_of_unequal_lengths_equal_the_model(
    tmp_path: Path, family: Family, size: str, dtype: torch.dtype
) -> None:
    checkpoint = load_checkpoint(random_checkpoint(family, tmp_path, size=size))
    lengths = (1, 16, 33, 90)
    ids = [random_ids(length, length + 1) for length in lengths]
    blocks = scattered(0, [length + 1 for length in lengths])
    decoder = native(checkpoint, dtype=dtype)
    weights = {name: tensor.to(dtype) for name, tensor in checkpoint.weights.items()}
    prompts = [Rows(token_ids=some[:-1], blocks=where) for some, where in zip(ids, blocks, strict=True)]
    steps = [Rows(token_ids=one, blocks=at, start=len(one) - 1) for one, at in zip(ids, blocks, strict=True)]
    prefilled, decoded = logits(decoder, *prompts).split(lengths), logits(decoder, *steps)
    for some, before, after in zip(ids, prefilled, decoded, strict=True):
        expected = causal_logits(checkpoint.config, weights, torch.tensor([some]))[0]
        torch.testing.assert_close(before, expected[:-1], rtol=0, atol=1e-4)
        torch.testing.assert_close(after, expected[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["stories260k", "tinystories-656k", "mix-moe-11m", "mix-dense-6m"])
def test_logits_of_real_checkpoints_equal_transformers(name: str) -> None:
    """Prefill and decode in one batch of unequal lengths, fp32 on both sides."""
    directory = REFERENCE if name == REFERENCE.name else SHARED_MODELS / name
    if not directory.is_dir():
        pytest.skip(f"{name} is not beside this checkout")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    checkpoint = load_checkpoint(directory)
    decoder = native(checkpoint)
    ids = [random_ids(length, length, checkpoint.config.vocab_size) for length in (7, 64, 150)]
    blocks = scattered(1, [len(some) for some in ids])
    logits(decoder, *(Rows(token_ids=one[: len(one) // 2], blocks=at) for one, at in zip(ids, blocks, strict=True)))
    rest = [Rows(token_ids=one, blocks=at, start=len(one) // 2) for one, at in zip(ids, blocks, strict=True)]
    got = logits(decoder, *rest).split([len(one) - len(one) // 2 for one in ids])
    for some, mine in zip(ids, got, strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([some])).logits[0, len(some) // 2 :]
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_a_decoder_rounded_to_int8_says_nearly_the_same() -> None:
    checkpoint = load_checkpoint(REFERENCE)
    weights = arrange(checkpoint.config, checkpoint.weights, dtype=None)
    ids = random_ids(1, 96, checkpoint.config.vocab_size)
    rows = Rows(token_ids=ids, blocks=scattered(1, [96])[0])
    exact, rounded = (
        logits(NativeDecoder(weights, num_blocks=NUM_BLOCKS, num_node_slots=0, max_rows=96, packs_int8=one), rows)
        for one in (False, True)
    )
    difference = (exact - rounded).abs()
    assert difference.max() > 0
    assert difference.mean() < 0.1 * exact.std()


def test_a_matrix_too_long_to_be_rounded_is_refused() -> None:
    checkpoint = load_checkpoint(REFERENCE)
    weights = arrange(checkpoint.config, checkpoint.weights, dtype=None)
    too_long = msgspec.structs.replace(checkpoint.config, intermediate_size=LONGEST_ROUNDED + 1)
    with pytest.raises(ValueError, match="a matrix has 132105 inputs, expected at most 132104 to round it to int8"):
        NativeDecoder(weights._replace(config=too_long), num_blocks=1, num_node_slots=0, max_rows=1, packs_int8=True)


def test_weights_lie_behind_a_cache_of_any_size_or_the_error_says_that_it_does_not_fit() -> None:
    checkpoint = load_checkpoint(REFERENCE)
    weights = arrange(checkpoint.config, checkpoint.weights, dtype=None)
    rows = Rows(token_ids=random_ids(1, 96, checkpoint.config.vocab_size), blocks=scattered(1, [96])[0])
    small, large = (
        logits(NativeDecoder(weights, num_blocks=number, num_node_slots=0, max_rows=96), rows)
        for number in (NUM_BLOCKS, 2_000)  # 4 and 131 MB
    )
    assert torch.equal(small, large)
    with pytest.raises(MemoryError, match="a cache of 2147483647 blocks and 96 rows does not fit in memory"):
        NativeDecoder(weights, num_blocks=2**31 - 1, num_node_slots=0, max_rows=96)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_whose_logits_nobody_wants_change_nothing_for_the_others(tmp_path: Path, family: Family) -> None:
    """They are spared the last layer behind its keys and values, which later rows read."""
    decoder = native(load_checkpoint(random_checkpoint(family, tmp_path)))
    ids = random_ids(5, 40)
    blocks = scattered(5, [40, 40])
    whole = decoder.forward(plan_of([Rows(token_ids=ids, blocks=blocks[0])]))
    expected, experts_TLK = whole.logits_XV.clone(), whole.expert_ids_TLK
    experts_TLK = None if experts_TLK is None else experts_TLK.copy()
    for start, wanted in ((0, ()), (15, (9, 0, 4)), (25, (14,))):
        end = {0: 15, 15: 25, 25: 40}[start]
        plan = plan_of([Rows(token_ids=ids[:end], blocks=blocks[1], start=start)])
        plan = msgspec.structs.replace(plan, logit_rows_X=np.array(wanted, np.int32))
        output = decoder.forward(plan)
        assert torch.equal(output.logits_XV, expected[[start + row for row in wanted]])
        if experts_TLK is not None and output.expert_ids_TLK is not None:
            spared = sorted(set(range(end - start)) - set(wanted))
            assert (output.expert_ids_TLK[spared, -1] == -1).all()
            own_TLK = experts_TLK[start:end].copy()
            own_TLK[spared, -1] = -1
            np.testing.assert_array_equal(output.expert_ids_TLK, own_TLK)


def assert_bits_are_a_rows_own(make: Callable[[], NativeDecoder], ids: tuple[int, ...], vocab_size: int) -> None:
    """One sequence, computed whole, in chunks, token by token, in company, by threads, and as a path of trees."""
    length = len(ids)
    mine, theirs = scattered(2, [length, 200])
    decoder = make()
    whole = logits(decoder, Rows(token_ids=ids, blocks=mine))
    company = Rows(token_ids=random_ids(3, 100, vocab_size), blocks=theirs)
    for num_threads, chunk in ((1, 1), (1, 7), (2, 16), (2, length)):
        slipstream_kernels.set_num_threads(num_threads)
        ends = range(chunk, length + chunk, chunk)
        parts = [Rows(token_ids=ids[:end], blocks=mine, start=end - chunk) for end in ends]
        assert torch.equal(torch.cat([logits(decoder, part) for part in parts]), whole)
    assert torch.equal(logits(decoder, company, Rows(token_ids=ids, blocks=mine))[-length:], whole)
    for committed in (1, 15, 16, 40, length - 1):
        assert_path_of_a_tree_equals(decoder, ids, mine, committed, whole, vocab_size)


def assert_path_of_a_tree_equals(
    decoder: NativeDecoder,
    ids: tuple[int, ...],
    blocks: tuple[int, ...],
    committed: int,
    whole: torch.Tensor,
    vocab_size: int,
) -> None:
    """A tree with the true continuation hidden among other branches; its path is then kept and goes on."""
    depth = min(9, len(ids) - committed)
    wrong, parents = random_tree(np.random.default_rng(committed), num_nodes=20, vocab_size=vocab_size)
    nodes = (*wrong, *ids[committed : committed + depth])
    chain = [-1, *range(len(wrong), len(wrong) + depth - 1)]
    tree = Rows(
        token_ids=ids[:committed],
        blocks=blocks,
        start=committed - 1,
        nodes=nodes,
        parents=(*parents, *chain),
        first_node_slot=5,
    )
    rows = logits(decoder, tree)
    assert torch.equal(rows[0], whole[committed - 1])
    assert torch.equal(rows[1 + len(wrong) :], whole[committed : committed + depth])
    slots = range(5 + len(wrong), 5 + len(wrong) + depth)
    positions = range(committed, committed + depth)
    decoder.keep([Move(s, blocks[p // BLOCK_TOKENS], p % BLOCK_TOKENS) for s, p in zip(slots, positions, strict=True)])
    if committed + depth < len(ids):
        after = Rows(token_ids=ids[: committed + depth + 1], blocks=blocks, start=committed + depth)
        assert torch.equal(logits(decoder, after)[0], whole[committed + depth])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("instructions", build.INSTRUCTION_SETS)
def test_bits_are_a_rows_own_on_the_reference_target(instructions: str, dtype: torch.dtype) -> None:
    if instructions not in slipstream_kernels.supported_sets():
        pytest.skip(f"this processor has no {instructions}")
    slipstream_kernels.use_instruction_set(instructions)
    checkpoint = load_checkpoint(REFERENCE)
    vocab_size = checkpoint.config.vocab_size
    assert_bits_are_a_rows_own(lambda: native(checkpoint, dtype=dtype), random_ids(4, 60, vocab_size), vocab_size)


@pytest.mark.parametrize(
    ("dtype", "packs_int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_a_rows_own_in_every_family(
    tmp_path: Path, family: Family, dtype: torch.dtype, packs_int8: bool
) -> None:
    checkpoint = load_checkpoint(random_checkpoint(family, tmp_path, size="odd"))
    assert_bits_are_a_rows_own(
        lambda: native(checkpoint, dtype=dtype, packs_int8=packs_int8), random_ids(5, 60), VOCAB_SIZE
    )


MUTANTS = {
    "the order of a product depends on the number of rows": (
        "matmul.cpp",
        [
            ("vector(v) << 16)", "vector(v) << 16 * (kRows <= 2) & (kRows > 2 ? kOddHalf : ~Words{}))"),
            ("accumulate(half, x, i, sums)", "accumulate(half, x, i + (kRows > 2), sums)"),
            ("vector(v) & mask)", "vector(v) << 16 * (kRows > 2) & (kRows > 2 ? ~Words{} : mask))"),
            ("accumulate(half, x, i + 1, sums)", "accumulate(half, x, i + (kRows <= 2), sums)"),
        ],
    ),
    "the order of a row's parts depends on the number of rows": (
        "tiles.cpp",
        [
            (
                "part(0, o) + (part(1, o) + part(2, o))",
                "(number > 1 ? part(2, o) + part(1, o) + part(0, o) : part(0, o) + part(1, o) + part(2, o))",
            )
        ],
    ),
    "a rounded row takes the scale of another": (
        "inputs.cpp",
        [("scales_[place] = scale", "scales_[place / 2] = scale")],
    ),
    "ancestors are summed from the deepest up": (
        "attention.cpp",
        [
            (
                "for (int a = 0; a < row.num_ancestors; ++a) {",
                "for (int a = row.num_ancestors - 1; a >= 0; --a) {",
            )
        ],
    ),
    "an ancestor of another branch is visible": (
        "attention.cpp",
        [("from[rows[q]->ancestors[a]]", "from[rows[q]->ancestors[a] - (a > 0)]")],
    ),
    "a row sees as many positions as the one beside it": (
        "attention.cpp",
        [("exponentials(rows[q]->num_positions()", "exponentials(rows[0]->num_positions()")],
    ),
}


def built_with(tmp_path: Path, file: str, replacements: Sequence[tuple[str, str]]) -> ctypes.CDLL:
    """The kernels with lines replaced, in a library of their own."""
    sources = tmp_path / "csrc"
    shutil.copytree(build.CSRC, sources)
    text = (sources / file).read_text()
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (sources / file).write_text(text)
    return ctypes.CDLL(str(build.build(sources, cache=tmp_path)))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_kernel_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    file = MUTANTS[mutant][0]
    # Where tiles are made, floats are not multiplied one by one; elsewhere there are no tiles.
    sets = [name for name in slipstream_kernels.supported_sets() if name != "amx" or file != "matmul.cpp"]
    if file == "tiles.cpp" and sets[0] != "amx":
        pytest.skip("this processor has no amx")
    monkeypatch.setattr(build, "instruction_sets", lambda: (sets[0],))
    library = built_with(tmp_path, *MUTANTS[mutant])
    monkeypatch.setattr(isa, "library", lambda: library)
    slipstream_kernels.use_instruction_set(sets[0])
    checkpoint = load_checkpoint(REFERENCE)
    vocab_size = checkpoint.config.vocab_size
    packs_int8 = file == "inputs.cpp"
    with pytest.raises(AssertionError, match="equal"):
        assert_bits_are_a_rows_own(
            lambda: native(checkpoint, packs_int8=packs_int8), random_ids(4, 60, vocab_size), vocab_size
        )
