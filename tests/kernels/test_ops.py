"""Every op agrees with plain torch on odd shapes, and gives a row the same bits whatever else is computed with it."""

from __future__ import annotations

import itertools

import pytest
import torch

from slipstream_kernels import ops, reference, set_num_threads
from slipstream_kernels.reference import HeadCache, Places

ROWS = (1, 2, 3, 5, 6, 7, 9, 13, 33, 50)
DTYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("isa")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("outputs", "inner"), [(1, 2), (7, 16), (64, 64), (65, 34), (130, 172), (384, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_the_sum_over_the_inner_dimension(outputs: int, inner: int, dtype: torch.dtype) -> None:
    weight = random(outputs, inner, seed=1).to(dtype)
    packed = ops.PackedMatrix(weight)
    for num_rows in ROWS:
        x = random(num_rows, inner, seed=num_rows)
        exact = x.double() @ weight.double().T
        bound = 1e-6 * (x.double().abs() @ weight.double().abs().T)
        assert ((ops.matrix_product(x, packed) - exact).abs() <= bound).all()


@pytest.mark.parametrize("magnitude", [1.0, 1e-25, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_takes_all_bits_of_a_row(magnitude: float, dtype: torch.dtype) -> None:
    x = random(50, 172) / 10 * magnitude
    assert torch.equal(ops.matrix_product(x, ops.PackedMatrix(torch.eye(172).to(dtype))), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_what_is_not_finite_is_not_finite_and_harms_no_other_row(value: float, dtype: torch.dtype) -> None:
    packed = ops.PackedMatrix(random(65, 34, seed=1).to(dtype))
    x = random(9, 34)
    expected = ops.matrix_product(x, packed)
    x[4, 33] = value
    product = ops.matrix_product(x, packed)
    assert not product[4].isfinite().any()
    is_other = torch.arange(9) != 4
    assert torch.equal(product[is_other], expected[is_other])


ODD_SHAPES = pytest.mark.parametrize(("outputs", "inner"), [(2, 3), (7, 18), (65, 33), (130, 172)])


def rounded_matrix(
    outputs: int, inner: int, dtype: torch.dtype = torch.float32
) -> tuple[ops.PackedMatrix, torch.Tensor]:
    """A matrix packed as int8, and what it stands for then; outputs of many magnitudes, one of them zero."""
    weight = (random(outputs, inner, seed=1) * 10 ** random(outputs, 1, seed=2)).to(dtype)
    weight[outputs // 2] = 0
    scales = (weight.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-38)
    return ops.PackedMatrix(weight, packs_int8=True), ((weight.float() / scales).round() * scales).double()


@ODD_SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rounded_product_of_whole_numbers_is_that_of_integers_with_a_scale_for_every_output(
    outputs: int, inner: int, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16:
        inner += inner % 2
    packed, rounded = rounded_matrix(outputs, inner, dtype)
    for num_rows in ROWS:
        generator = torch.Generator().manual_seed(num_rows)
        x = torch.randint(-64, 65, (num_rows, inner), generator=generator).float()
        x[:, 0] = 64
        x *= 10 ** random(num_rows, 1, seed=num_rows)
        exact = x.double() @ rounded.T
        bound = 1e-6 * (x.double().abs() @ rounded.abs().T)
        assert ((ops.matrix_product(x, packed) - exact).abs() <= bound).all()


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 2e-36, 1e-40, 3e38])
@pytest.mark.parametrize("inner", [3, 18, 33, 172])
def test_a_row_is_rounded_to_the_nearest_64th_of_its_largest_magnitude(inner: int, magnitude: float) -> None:
    identity = ops.PackedMatrix(torch.eye(inner), packs_int8=True)
    x = random(9, inner)
    x = x / x.abs().amax(dim=1, keepdim=True) * magnitude
    step = x.abs().amax(dim=1, keepdim=True).double().clamp(min=64 * torch.finfo(torch.float32).tiny) / 64
    error = (ops.matrix_product(x, identity).double() - x.double()).abs()
    assert (error <= 0.50001 * step).all()


@pytest.mark.parametrize("weight", [1.0, -1.0])
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_a_rounded_product_of_nothing_but_extremes_does_not_saturate(value: float, weight: float) -> None:
    inner = 4_100
    packed = ops.PackedMatrix(torch.full((5, inner), weight), packs_int8=True)
    product = ops.matrix_product(torch.full((3, inner), value), packed)
    torch.testing.assert_close(product, torch.full((3, 5), inner * weight * value), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 32])
def test_a_rounded_product_of_what_is_not_finite_is_not_a_number_and_harms_no_other_row(
    value: float, place: int
) -> None:
    packed, _ = rounded_matrix(65, 33)
    x = random(9, 33)
    expected = ops.matrix_product(x, packed)
    expected[4] = float("nan")
    x[4, place] = value
    torch.testing.assert_close(ops.matrix_product(x, packed), expected, rtol=0, atol=0, equal_nan=True)


def test_a_rounded_product_of_zeros_is_zero() -> None:
    packed, _ = rounded_matrix(65, 33)
    assert (ops.matrix_product(torch.zeros(3, 33), packed) == 0).all()


@pytest.mark.parametrize("inner", [172, 650])
@pytest.mark.parametrize("packs_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_products_row_is_the_same_bits_among_any_rows_and_threads(
    dtype: torch.dtype, packs_int8: bool, inner: int
) -> None:
    packed = ops.PackedMatrix(random(200, inner, seed=1).to(dtype), packs_int8=packs_int8)
    x = random(50, inner, seed=2)
    alone = torch.cat([ops.matrix_product(x[row : row + 1], packed) for row in range(50)])
    for num_rows, num_threads in itertools.product(ROWS, (1, 2, 3)):
        set_num_threads(num_threads)
        assert torch.equal(ops.matrix_product(x[:num_rows], packed), alone[:num_rows])
        assert torch.equal(ops.matrix_product(x[-num_rows:].flip(0), packed).flip(0), alone[-num_rows:])


def test_bf16_and_fp32_weights_of_equal_value_give_equal_bits_but_in_tiles(isa: str) -> None:
    if isa == "amx":
        pytest.skip("tiles add up the parts of a row one by one")
    weight = random(70, 64).bfloat16()
    x = random(9, 64, seed=1)
    both = [ops.matrix_product(x, ops.PackedMatrix(matrix)) for matrix in (weight, weight.float())]
    assert torch.equal(*both)


@pytest.mark.parametrize(("hidden", "inner", "experts", "chosen"), [(32, 48, 4, 2), (72, 37, 5, 3), (64, 172, 1, 1)])
@pytest.mark.parametrize(
    ("dtype", "packs_int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_experts_agree_with_torch_and_a_rows_bits_are_its_own(
    hidden: int, inner: int, experts: int, chosen: int, dtype: torch.dtype, packs_int8: bool
) -> None:
    gate_up = [random(2 * inner, hidden, seed=e).to(dtype) / 8 for e in range(experts)]
    down = [random(hidden, inner, seed=100 + e).to(dtype) / 8 for e in range(experts)]
    packed = ops.PackedExperts(gate_up, down, packs_int8=packs_int8)
    x = random(23, hidden, seed=7)
    ids, weights = ops.route(x, random(experts, hidden, seed=8), chosen, normalizes=True)
    mixed = ops.expert_mlp(x, packed, ids, weights)
    expected = reference.expert_mlp(x, (gate_up, down), ids, weights)
    if packs_int8:
        assert ((mixed - expected).square().mean() / expected.square().mean()).sqrt() < 0.05
    else:
        torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
    for first, last in [(0, 1), (3, 10), (22, 23)]:
        part = slice(first, last)
        assert torch.equal(ops.expert_mlp(x[part], packed, ids[part], weights[part]), mixed[part])


def one_by_one(query: torch.Tensor, cache: HeadCache, places: Places) -> torch.Tensor:
    """The attention of every head of every row, each asked for alone."""
    num_rows, num_heads, _ = query.shape
    rows = []
    for row in range(num_rows):
        at = slice(row, row + 1)
        place = Places(
            places.sequences_T[at], places.block_tables_BC, places.num_committed_T[at], places.ancestors[row : row + 1]
        )
        heads = [ops.tree_attention(query[at, [head]].contiguous(), cache, place) for head in range(num_heads)]
        rows.append(torch.cat(heads, dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("num_heads", [1, 2, 5])
@pytest.mark.parametrize("size", [8, 16, 24, 64, 80, 128])
def test_attention_reads_blocks_then_ancestors(size: int, num_heads: int) -> None:
    tables = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(row))[:6] for row in range(9)])
    committed = torch.tensor([1, 15, 16, 17, 70, 95, 96, 33, 0])
    ancestors = [[], [2], [0, 1, 2, 3, 4, 5], [5], [], [3, 1], [], [4, 0, 2, 1, 3], [2, 5]]
    cache = HeadCache(random(10, size, 16), random(10, 16, size, seed=1), first_node_block=9)
    query = random(9, num_heads, size, seed=3)
    places = Places(torch.arange(9), tables, committed, ancestors)
    got = ops.tree_attention(query, cache, places)
    assert torch.equal(one_by_one(query, cache, places), got)
    torch.testing.assert_close(got, reference.tree_attention(query, cache, places), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_heads", [1, 2, 3])
@pytest.mark.parametrize("size", [8, 24, 64])
def test_attentions_row_is_the_same_bits_among_any_rows_of_its_sequence(size: int, num_heads: int) -> None:
    """Two prefilled chunks and two trees, whose node slots lie far apart and in no order."""
    committed = torch.tensor([*range(14, 20), 1, 2, 40, 40, 40, 40, 40, 33, 33, 33])
    ancestors = [[]] * 9 + [[50], [50, 3], [50, 3, 17], [50, 20]] + [[16], [0], [0, 47]]
    sequences = torch.tensor([0] * 6 + [1] * 2 + [2] * 5 + [3] * 3)
    tables = torch.tensor([[4, 1, 0], [2, 0, 0], [3, 5, 6], [8, 7, 9]])
    cache = HeadCache(random(14, size, 16), random(14, 16, size, seed=1), first_node_block=10)
    query = random(16, num_heads, size, seed=3)
    places = Places(sequences, tables, committed, ancestors)
    got = ops.tree_attention(query, cache, places)
    assert torch.equal(one_by_one(query, cache, places), got)
    torch.testing.assert_close(got, reference.tree_attention(query, cache, places), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [8, 20, 64])
def test_attention_gives_the_same_bits_wherever_a_key_lies(size: int) -> None:
    """Forty positions, the last ones once in blocks and once, one after the other, in node slots."""
    keys, values = random(40, size), random(40, size, seed=1)
    query = random(1, 3, size, seed=2)
    outputs = []
    for num_nodes in (0, 1, 3, 5, 8, 9, 24, 25, 40):
        committed = 40 - num_nodes
        slots = list(range(num_nodes - 1, -1, -1))  # slots in another order than positions
        places = [*range(committed), *(3 * 16 + slot for slot in slots)]
        lines = torch.full((2, 6 * 16, size), float("nan"))
        lines[0, places], lines[1, places] = keys, values
        keys_NdB, values_NBd = lines.view(2, 6, 16, size)
        cache = HeadCache(keys_NdB.transpose(1, 2).contiguous(), values_NBd, first_node_block=3)
        one = Places(torch.tensor([0]), torch.tensor([[0, 1, 2]]), torch.tensor([committed]), [slots])
        outputs.append(ops.tree_attention(query, cache, one))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert torch.isfinite(outputs[0]).all()


@pytest.mark.parametrize("size", [6, 16, 37, 256])
def test_norm_and_rotation_agree_with_torch(size: int) -> None:
    x, weight = random(5, size), random(size, seed=1)
    torch.testing.assert_close(ops.rms_norm(x, weight, epsilon=1e-6), reference.rms_norm(x, weight, epsilon=1e-6))
    even = size // 2 * 2
    angles = random(even // 2, seed=2).repeat(2)
    heads = x[:, :even].contiguous()
    turned = ops.rotate(heads, angles.cos(), angles.sin())
    torch.testing.assert_close(turned, reference.rotate(heads, angles.cos(), angles.sin()))


@pytest.mark.parametrize("normalizes", [True, False])
def test_routing_takes_the_best_experts_and_the_lowest_id_of_equals(normalizes: bool) -> None:
    router = random(8, 20)
    router[5] = router[2]  # equal logits for every row
    x = random(40, 20, seed=1)
    ids, weights = ops.route(x, router, 3, normalizes=normalizes)
    expected_ids, expected_weights = reference.route(x, router, 3, normalizes=normalizes)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)
    has_both = ((ids == 2).any(1) & (ids == 5).any(1)).nonzero()
    assert len(has_both) > 5
    assert not ((ids == 5).any(1) & ~(ids == 2).any(1)).any()


def test_exp_is_within_two_ten_millionths_and_zero_for_minus_infinity() -> None:
    x = torch.cat([torch.linspace(-87, 88, 20_001), torch.tensor([0.0, -0.0, 1e-30])])
    relative = (ops.exp(x).double() / x.double().exp() - 1).abs()
    assert relative.max() < 2e-7
    assert ops.exp(torch.tensor([-float("inf"), -100.0, -87.5])).tolist() == [0, 0, 0]
