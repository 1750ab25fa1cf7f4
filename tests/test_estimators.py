"""The four entropy estimators against plain NumPy and SciPy, known answers, invariances and bad input."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist, pdist, squareform
from scipy.special import digamma, gammaln, logsumexp

from entrodrop import estimators
from entrodrop.estimators import ESTIMATORS, bucket_entropy, knn_entropy, matrix_entropy, renyi_entropy

ALL = [pytest.param(f, id=name) for name, f in ESTIMATORS.items()]
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Threads that wait for each other on busy cores make small tensors several times slower"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# Oracles: slow and direct, float64 throughout

def shannon(p):
    p = p[p > 0]
    return -(p * np.log(p)).sum()


def bucket_oracle(z, bins):
    return sum(shannon(np.histogram(column, bins=bins)[0] / len(z)) for column in z.T)


def knn_oracle(z, k):
    n, d = z.shape
    r = np.sort(cdist(z, z), axis=1)[:, k]
    log_ball = d / 2 * np.log(np.pi) - gammaln(d / 2 + 1)
    return digamma(n) - digamma(k) + log_ball + d * np.log(r[r > 0]).mean()


def renyi_oracle(z, alpha):
    varies = np.ptp(z, axis=0) > 0
    standard = (z[:, varies] - z[:, varies].mean(0)) / z[:, varies].std(0)
    distances = pdist(standard)
    kernel = np.exp(-squareform(distances)**2 / (2 * np.median(distances)**2))
    return np.log(np.mean(kernel**(alpha - 1))) / (1 - alpha)


def released_oracle(z, alpha):
    "As the paper's released code has it: deviations of a sample, lower median of all distances with the diagonal"
    varies = np.ptp(z, axis=0) > 0
    standard = (z[:, varies] - z[:, varies].mean(0)) / z[:, varies].std(0, ddof=1)
    distances = squareform(pdist(standard))
    bandwidth = np.sort(distances, axis=None)[(distances.size - 1) // 2]
    return np.log(np.mean(np.exp(-distances**2 / (2 * bandwidth**2))**(alpha - 1))) / (1 - alpha)


def matrix_oracle(z, alpha):
    gram = z @ z.T
    p = np.linalg.eigvalsh(gram / np.trace(gram)).clip(min=0)
    return shannon(p) if alpha == 1 else np.log((p**alpha).sum()) / (1 - alpha)


def massive(*shape):
    z = normal(*shape)
    z[0, 0] = 1000 * z.abs().max()
    return z


def heavy_tailed(*shape):
    return torch.from_numpy(np.random.default_rng(0).standard_t(2, shape)).float()


def with_constants(*shape):
    z = normal(*shape)
    z[:, ::5] = .1
    return z


def with_duplicates(*shape):
    "A third of the tokens are copies of the first"
    z = normal(*shape)
    z[: shape[0] // 3] = z[0]
    return z


def released(z, alpha): return renyi_entropy(z, alpha, "released")


STATES = {
    "small": normal(64, 16), "wide": normal(256, 576), "more tokens": normal(300, 24), "more hidden": normal(40, 200),
    "massive activation": massive(128, 64), "heavy tailed": heavy_tailed(200, 48), "far from zero": normal(96, 32) + 50,
    "constant dimensions": with_constants(100, 30), "duplicates": with_duplicates(90, 12),
}
PARAMETERS = [
    (bucket_entropy, bucket_oracle, (2, 20, 80)), (knn_entropy, knn_oracle, (1, 5, 25)),
    (renyi_entropy, renyi_oracle, (.5, 2., 4.)), (released, released_oracle, (2., 4.)),
    (matrix_entropy, matrix_oracle, (.5, 1., 2., 5.)),
]


@pytest.mark.parametrize("z", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("estimator, oracle, parameter", [
    pytest.param(estimator, oracle, parameter, id=f"{estimator.__name__}-{parameter}")
    for estimator, oracle, parameters in PARAMETERS for parameter in parameters])
def test_agrees_with_oracle(estimator, oracle, parameter, z):
    expected = oracle(z.double().numpy(), parameter)
    assert estimator(z, parameter).item() == pytest.approx(expected, rel=1e-4, abs=0)


def test_the_two_readings_of_renyi_differ_by_less_than_a_percent_at_256_tokens_and_more_at_few():
    gaps = {}
    for tokens in (8, 256):
        z = normal(tokens, 48).double()
        gaps[tokens] = abs(renyi_entropy(z, reading="released").item() / renyi_entropy(z).item() - 1)
    assert 1e-4 < gaps[256] < .01 < gaps[8]
    with pytest.raises(ValueError, match="unknown reading 'paper'; choose pairs, released"):
        renyi_entropy(z, reading="paper")


def test_defaults_are_those_of_the_released_code():
    z = normal(64, 16)
    defaults = [(bucket_entropy, 20), (knn_entropy, 25), (renyi_entropy, 4.), (matrix_entropy, 1.)]
    for estimator, parameter in defaults: assert estimator(z).item() == estimator(z, parameter).item()


# Known answers

@pytest.mark.parametrize("d", [1, 2, 4, 8])
def test_knn_of_gaussian(d):
    z = 3 * normal(4096, d, seed=1)
    expected = d / 2 * math.log(2 * math.pi * math.e * 9)
    assert knn_entropy(z, 4).item() == pytest.approx(expected, rel=.03)


@pytest.mark.parametrize("k, r", [(1, [1] * 6), (2, [2, 1, 1, 1, 1, 2])])
def test_knn_of_points_on_a_line(k, r):
    z = torch.arange(6.).double()[:, None]
    expected = digamma(6) - digamma(k) + math.log(2) + np.log(r).mean()
    assert knn_entropy(z, k).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bins", [5, 20, 80])
def test_bucket_of_uniform(bins):
    assert bucket_entropy(uniform(8192, 6), bins).item() == pytest.approx(6 * math.log(bins), rel=.01)


def test_bucket_counted_by_hand():
    z = torch.tensor([[0., 5.], [1., 5.], [2., 6.], [4., 9.]])  # counts 1 1 1 1 and 2 1 0 1
    expected = math.log(4) + 1.5 * math.log(2)
    assert bucket_entropy(z, 4).item() == pytest.approx(expected, rel=1e-6)


def test_bucket_puts_the_maximum_into_the_last_bucket():
    z = torch.tensor([[0.], [.6], [1.], [1.]])
    assert bucket_entropy(z, 2).item() == pytest.approx(-.25 * math.log(.25) - .75 * math.log(.75), rel=1e-6)


def test_one_bucket_holds_no_information():
    assert bucket_entropy(normal(64, 4), 1).item() == 0


@pytest.mark.parametrize("alpha", [.5, 2., 4.])
def test_renyi_of_two_tokens(alpha):
    expected = math.log((1 + math.exp((1 - alpha) / 2)) / 2) / (1 - alpha)  # their distance is the median
    assert renyi_entropy(normal(2, 7).double(), alpha).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("alpha", [2., 4.])
def test_renyi_of_two_clusters_of_duplicates(alpha):
    z = torch.cat([torch.zeros(30, 4), torch.ones(20, 4)])
    expected = math.log((30**2 + 20**2) / 50**2) / (1 - alpha)
    assert renyi_entropy(z, alpha).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("alpha", [.5, 1., 2., 100.])
@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16)])
def test_matrix_of_orthogonal_tokens(shape, alpha):
    assert matrix_entropy(3 * torch.eye(*shape), alpha).item() == pytest.approx(math.log(16), rel=1e-9)


def test_matrix_of_known_eigenvalues():
    z = torch.diag(torch.tensor([3., 4.]))
    p = np.array([9, 16]) / 25
    assert matrix_entropy(z).item() == pytest.approx(shannon(p), rel=1e-9)
    assert matrix_entropy(z, 2).item() == pytest.approx(-math.log((p**2).sum()), rel=1e-9)


def test_matrix_is_continuous_at_alpha_one():
    z = normal(32, 8)
    around = [matrix_entropy(z, 1 + step).item() for step in (-1e-5, 0, 1e-5)]
    assert around[0] > around[1] > around[2]
    assert around == pytest.approx([around[1]] * 3, rel=1e-4)


# Invariances, with the maps applied in float64 so that they round nothing that matters

def affine(d, seed=5):
    scale = uniform(d, seed=seed).double() * 10 + .1
    return scale * torch.tensor([1., -1.]).repeat(d)[:d], 5 * normal(d, seed=seed, dtype=torch.float64)


def rotation(d):
    return torch.linalg.qr(normal(d, d, seed=6, dtype=torch.float64)).Q


def test_bucket_ignores_powers_of_two_exactly():
    z = normal(256, 24)
    assert bucket_entropy(z * 2.**torch.arange(-12, 12)) == bucket_entropy(z)


def test_bucket_ignores_affine_maps():
    z = normal(256, 24)
    scale, shift = affine(24)
    mapped = (z * scale + shift).float()
    assert not torch.equal(mapped, z)
    assert bucket_entropy(mapped).item() == pytest.approx(bucket_entropy(z).item(), rel=1e-3)


@pytest.mark.parametrize("alpha", [.5, 4.])
def test_renyi_ignores_affine_maps(alpha):
    z = normal(128, 24, dtype=torch.float64)
    scale, shift = affine(24)
    assert renyi_entropy(z * scale + shift, alpha).item() == pytest.approx(renyi_entropy(z, alpha).item(), rel=1e-9)


@pytest.mark.parametrize("a", [1e-30, .3, 7., 1e30])
def test_knn_grows_by_d_log_of_scale(a):
    z = normal(128, 24)
    grown = knn_entropy(a * z).item() - knn_entropy(z).item()
    assert grown == pytest.approx(24 * math.log(a), rel=1e-5)


def test_knn_ignores_rotation_and_shift():
    z = normal(128, 24, dtype=torch.float64)
    assert knn_entropy(z @ rotation(24) + affine(24)[1]).item() == pytest.approx(knn_entropy(z).item(), rel=1e-9)


@pytest.mark.parametrize("a", [1e-30, -.3, 7., 1e30])
@pytest.mark.parametrize("alpha", [.5, 1., 2.])
def test_matrix_ignores_scale(alpha, a):
    z = normal(64, 24)
    assert matrix_entropy(a * z, alpha).item() == pytest.approx(matrix_entropy(z, alpha).item(), rel=1e-5)


@pytest.mark.parametrize("estimator", [bucket_entropy, renyi_entropy, matrix_entropy])
@pytest.mark.parametrize("a", [2.**-900, 2.**900])
def test_scale_free_even_where_squares_overflow(estimator, a):
    z = normal(64, 24, dtype=torch.float64)
    assert estimator(a * z).item() == pytest.approx(estimator(z).item(), rel=1e-9)


def test_matrix_ignores_rotation():
    z = normal(64, 24, dtype=torch.float64)
    assert matrix_entropy(z @ rotation(24)).item() == pytest.approx(matrix_entropy(z).item(), rel=1e-9)


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("name", ["small", "massive activation", "duplicates"])
def test_ignores_order_of_tokens(estimator, name):
    z = STATES[name]
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(7))
    for states, rel in ((z, 1e-6), (z.double(), 1e-9)):
        assert estimator(states[order]).item() == pytest.approx(estimator(states).item(), rel=rel)


# Batches

def one_at_a_time(estimator, z):
    sequences = z.reshape(-1, *z.shape[-2:])
    return torch.stack([estimator(sequence) for sequence in sequences]).reshape(z.shape[:-2])


def small_batch(*lead):
    "Sequences of different scale, one of them with its tokens alike"
    z = normal(*lead, 30, 8) * torch.arange(1., 1 + math.prod(lead)).view(*lead, 1, 1)
    z.view(-1, 30, 8)[-1] = .1
    return z


def assert_same(actual, expected, rel=1e-6):
    assert actual.shape == expected.shape
    # torch.equal infinities count as close, NaN does not
    torch.testing.assert_close(actual, expected, rtol=rel, atol=1e-12)


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("lead", [(4,), (2, 3), (1, 2, 1, 3)])
def test_batch_equals_one_at_a_time(estimator, lead):
    z = small_batch(*lead)
    assert_same(estimator(z), one_at_a_time(estimator, z))
    assert estimator(z[(0,) * len(lead)]).shape == ()


@pytest.fixture
def part_sizes(monkeypatch):
    "Make every sequence cost so much that two fit a part; the sizes of the parts land in the list"
    sizes, original = [], estimators._per_sequence

    def two_at_a_time(f, z, cost):
        def recorded(part):
            sizes.append(len(part))
            return f(part)
        return original(recorded, z, 2**19)

    monkeypatch.setattr(estimators, "_per_sequence", two_at_a_time)
    return sizes


@pytest.mark.parametrize("estimator", ALL)
def test_parts_equal_one_at_a_time(estimator, part_sizes):
    z = small_batch(5, 1)
    actual = estimator(z)
    assert part_sizes == [2, 2, 1]
    assert_same(actual, one_at_a_time(estimator, z))


@pytest.mark.parametrize("cost, expected", [(1, [7]), (2**18, [4, 3]), (2**20, [1] * 7), (2**30, [1] * 7)])
def test_parts_hold_what_they_may_cost(cost, expected):
    sizes = []

    def first(part):
        sizes.append(len(part))
        return part[:, 0, 0]

    z = normal(7, 2, 3)
    assert torch.equal(estimators._per_sequence(first, z, cost), z[:, 0, 0])
    assert sizes == expected


# Tensors of all kinds

@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_more(estimator, dtype):
    z = normal(2, 64, 16).to(dtype)
    assert_same(estimator(z), estimator(z.float()), rel=1e-12)


@pytest.mark.parametrize("estimator", [knn_entropy, renyi_entropy])
def test_float64_is_not_rounded_to_float32(estimator):
    z = normal(64, 16, dtype=torch.float64)
    assert_same(estimator(z + 1e8), estimator(z), rel=1e-6)


def test_bucket_in_float64_sees_what_float32_cannot():
    z = uniform(64, 16).double()
    assert bucket_entropy(z + 1e8).item() == pytest.approx(bucket_entropy(z).item(), rel=1e-4)


@pytest.mark.parametrize("estimator, tokens", [(f, 40) for f in ESTIMATORS.values()] + [(renyi_entropy, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_result_is_float64_on_the_same_device(estimator, tokens, dtype, device):
    z = normal(3, tokens, 8).to(device, dtype)
    result = estimator(z)
    assert (result.dtype, result.device, result.shape) == (torch.float64, z.device, (3,))


VIEWS = {
    "transposed": lambda: normal(8, 40, 2).permute(2, 1, 0), "strided": lambda: normal(2, 80, 24)[:, ::2, 1::3],
    "leading dimensions swapped": lambda: normal(3, 2, 40, 8).transpose(0, 1),
    "expanded": lambda: normal(40, 8).expand(3, 40, 8),
}


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_are_read_like_copies(estimator, view):
    z = view()
    assert not z.is_contiguous()
    assert_same(estimator(z), estimator(z.contiguous()))


@pytest.mark.parametrize("estimator", ALL)
def test_states_of_a_model_in_training(estimator):
    z = normal(2, 40, 8)
    assert_same(estimator((z * torch.ones(8, requires_grad=True))).detach(), estimator(z))


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_input_is_left_alone(estimator, dtype):
    z = small_batch(3).to(dtype)
    z[1] = 0  # the values that are filled in for zeros must not land in the input
    before = z.clone()
    estimator(z)
    assert torch.equal(z, before)


# Degenerate states that have an entropy

@pytest.mark.parametrize("value", [0., .1, -1e-40, 3e38])
@pytest.mark.parametrize("shape", [(30, 7), (7, 30)])
def test_all_tokens_alike(shape, value):
    z = torch.full(shape, value)
    assert knn_entropy(z, 3).item() == -math.inf
    assert bucket_entropy(z).item() == 0
    for alpha in (.5, 4.): assert renyi_entropy(z, alpha).item() == pytest.approx(0, abs=1e-12)
    for alpha in (.5, 1., 2.): assert matrix_entropy(z, alpha).item() == pytest.approx(0, abs=1e-6)


def test_one_token():
    z = normal(1, 8)
    for estimator in (bucket_entropy, renyi_entropy, matrix_entropy):
        assert estimator(z).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"): knn_entropy(z, 1)


@pytest.mark.parametrize("estimator", [bucket_entropy, renyi_entropy])
def test_constant_dimensions_add_nothing(estimator):
    z = normal(64, 8, dtype=torch.float64)
    constant = torch.tensor([0., .1, 1e308], dtype=torch.float64).expand(64, 3)  # sums over the last one overflow
    assert_same(estimator(torch.cat([z, constant], -1)), estimator(z))


def test_zero_dimensions_add_nothing_to_matrix():
    z = normal(64, 8)
    assert_same(matrix_entropy(torch.cat([z, torch.zeros(64, 3)], -1)), matrix_entropy(z))


def test_knn_of_tokens_in_pairs():
    z = normal(20, 4).double().repeat(2, 1)
    assert knn_entropy(z, 1).item() == -math.inf
    assert knn_entropy(z, 2).item() == pytest.approx(knn_oracle(z.double().numpy(), 2), rel=1e-9)


def test_knn_reaches_the_farthest_token():
    z = normal(26, 4).double()
    assert knn_entropy(z).item() == pytest.approx(knn_oracle(z.double().numpy(), 25), rel=1e-9)


def test_renyi_with_most_tokens_alike_and_alpha_below_one():
    z = torch.cat([torch.zeros(30, 4), torch.ones(2, 4)])
    assert renyi_entropy(z, .5).item() == math.inf


def test_range_beyond_float32():
    z = torch.tensor([[-3e38, 1.], [3e38, 2.]])
    with pytest.raises(ValueError, match="overflows torch.float32; rescale them"): bucket_entropy(z)
    assert bucket_entropy(z.double()).item() == pytest.approx(2 * math.log(2), rel=1e-6)
    for estimator in (lambda z: knn_entropy(z, 1), renyi_entropy, matrix_entropy): assert estimator(z).isfinite()


def test_range_of_bfloat16_is_that_of_float32():
    z = torch.tensor([[-3e38], [3e38]], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="overflows torch.float32"): bucket_entropy(z)


# Input that has no answer

@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(estimator, bad):
    z = normal(2, 30, 4)
    z[1, 3, 2] = z[0, 0, 0] = bad
    with pytest.raises(ValueError, match="2 of 240 state values are NaN or infinite"): estimator(z)


@pytest.mark.parametrize("estimator", ALL)
def test_float16_overflow_says_what_to_do(estimator):
    with pytest.raises(ValueError, match="run it in bfloat16 or float32"): estimator((1e5 * normal(30, 4)).half())


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("shape", [(0, 4), (30, 0), (0, 30, 4), (2, 0, 30, 4), (30,), ()])
def test_bad_shapes(estimator, shape):
    with pytest.raises(ValueError, match=r"shape \(\.\.\., tokens, hidden\) with no empty dimension"):
        estimator(torch.zeros(shape))


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("z, got", [
    (torch.ones(30, 4, dtype=torch.int64), "torch.int64"), (torch.ones(30, 4, dtype=torch.bool), "torch.bool"),
    (torch.ones(30, 4, dtype=torch.complex64), "torch.complex64"), (np.ones((30, 4)), "float64"),
    ([[1., 2.]] * 30, "list")])
def test_not_a_floating_point_tensor(estimator, z, got):
    with pytest.raises(ValueError, match=f"must be a floating point tensor, got {got}"): estimator(z)


@pytest.mark.parametrize("tokens, k", [(25, 25), (3, 25), (3, 3), (1, 1)])
def test_too_few_tokens_for_k(tokens, k):
    with pytest.raises(ValueError, match=f"k={k} needs at least {k + 1} tokens, got {tokens}"):
        knn_entropy(normal(tokens, 4), k)


@pytest.mark.parametrize("estimator, name", [(bucket_entropy, "bins"), (knn_entropy, "k")])
@pytest.mark.parametrize("bad", [0, -1, 2.5, 20., "20", None, math.nan])
def test_bad_counts(estimator, name, bad):
    with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least 1, got {bad!r}"):
        estimator(normal(30, 4), bad)


@pytest.mark.parametrize("estimator, bad", [
    (f, bad) for f in (renyi_entropy, matrix_entropy) for bad in (0, -1, -.5, math.nan, math.inf, -math.inf)
] + [(renyi_entropy, 1), (renyi_entropy, 1.)])
def test_bad_alpha(estimator, bad):
    with pytest.raises(ValueError, match=f"alpha must be positive.*got {bad!r}$"): estimator(normal(30, 4), alpha=bad)


# Extremes at which a straightforward formula overflows, underflows or rounds

def test_renyi_below_alpha_one_with_a_massive_token():
    z = normal(64, 8)
    z[0] *= 1000
    standard = (z.double() - z.double().mean(0)) / z.double().std(0, correction=0)
    distances = pdist(standard.numpy())
    log_sum = logsumexp(.25 * squareform(distances)**2 / np.median(distances)**2)
    assert renyi_entropy(z, .5).item() == pytest.approx(2 * (log_sum - 2 * math.log(64)), rel=1e-6)


def test_matrix_of_one_direction_with_small_alpha():
    z = torch.outer(torch.arange(1., 33), torch.arange(1., 17))
    assert matrix_entropy(z, .1).item() == pytest.approx(0, abs=1e-9)


def test_matrix_with_large_alpha():
    assert matrix_entropy(torch.eye(32), 1000.).item() == pytest.approx(math.log(32), rel=1e-9)


@pytest.mark.parametrize("a", [1e-200, 1e200])
def test_knn_of_extreme_float64(a):
    z = normal(64, 8, dtype=torch.float64)
    assert knn_entropy(a * z, 4).item() == pytest.approx(knn_entropy(z, 4).item() + 8 * math.log(a), rel=1e-9)


@pytest.mark.parametrize("estimator, oracle", [(knn_entropy, knn_oracle), (renyi_entropy, renyi_oracle)])
def test_one_huge_token_leaves_the_others_apart(estimator, oracle):
    z = normal(64, 8)
    z[0] *= 1e8
    assert estimator(z, 4).item() == pytest.approx(oracle(z.double().numpy(), 4), rel=1e-4)


def test_bucket_does_not_depend_on_the_default_dtype():
    z, before = uniform(1000, 4), torch.get_default_dtype()
    expected = bucket_entropy(z)
    torch.set_default_dtype(torch.bfloat16)
    try: actual = bucket_entropy(z)
    finally: torch.set_default_dtype(before)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)


# Any finite float32 states, however extreme

LARGEST, TINIEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).smallest_subnormal)
values = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(-1, 1, width=32),
    st.sampled_from([0., -0., 1., -1., 1000., LARGEST, -LARGEST, TINIEST, -TINIEST]))


@st.composite
def any_states(draw):
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    z = draw(arrays(np.float32, shape, elements=values))
    if draw(st.booleans()): z = z[draw(arrays(np.int64, shape[0], elements=st.integers(0, shape[0] - 1)))]  # duplicates
    if draw(st.booleans()): z[:, draw(st.integers(0, shape[1] - 1))] = draw(values)
    return z


def number(estimator, z, parameter):
    "The entropy, once it is known to be a number and the states as they were"
    states = torch.from_numpy(z.copy())
    result = estimator(states, parameter).item()
    assert not math.isnan(result)
    np.testing.assert_array_equal(states.numpy(), z)
    return result


anything = settings(deadline=None, max_examples=100, derandomize=True)


@anything
@given(any_states(), st.sampled_from([1, 2, 20]))
def test_bucket_of_anything(z, bins):
    with np.errstate(over="ignore"): overflows = np.isinf(np.ptp(z, axis=0)).any()
    if overflows:
        with pytest.raises(ValueError, match="overflows"): number(bucket_entropy, z, bins)
    else:
        highest = z.shape[1] * math.log(min(bins, len(z)))
        assert 0 <= number(bucket_entropy, z, bins) <= highest + 1e-5


@anything
@given(any_states(), st.integers(1, 4))
def test_knn_of_anything(z, k):
    if len(z) <= k:
        with pytest.raises(ValueError, match=f"at least {k + 1} tokens"): number(knn_entropy, z, k)
        return
    entropy = number(knn_entropy, z, k)
    alike = np.unique(z, axis=0, return_counts=True)[1]
    assert entropy < math.inf
    if alike.min() > k: assert entropy == -math.inf
    if len(alike) == len(z) == k + 1: assert entropy > -math.inf  # the farthest two are never taken for duplicates


@anything
@given(any_states(), st.sampled_from([.5, 2., 4.]))
def test_renyi_of_anything(z, alpha):
    # a token's kernel with itself is 1, so the mean is at least 1/n
    highest = math.log(len(z)) / (alpha - 1) if alpha > 1 else math.inf
    assert -1e-9 <= number(renyi_entropy, z, alpha) <= highest + 1e-9


@anything
@given(any_states(), st.sampled_from([.5, 1., 2., 5.]))
def test_matrix_of_anything(z, alpha):
    assert -1e-9 <= number(matrix_entropy, z, alpha) <= math.log(min(z.shape)) + 1e-6
