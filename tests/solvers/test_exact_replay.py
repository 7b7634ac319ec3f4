"""Every bound of a tiny certificate, derived again in rational arithmetic.

Weights, multipliers and stored numbers are floats, that is, rationals. Eigenvalues are enclosed by
exact LDL^T tests of definiteness, square roots by integer roots, and the slopes of the GELU by
series with a bound on their rest. The stored number must not be below what is derived.
"""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from common.certificate import Certificate
from common.models import LayerConfig, LipschitzTransformer
from common.norms import certified_top, round_up, spectral_norm_bound, weighted_gram
from solvers.bounds import TightenSettings, certify, mlp_form
from solvers.bounds.attention_proof import Heads, attention_bound, split_heads
from solvers.bounds.ellipsoid import Ellipsoid
from solvers.bounds.enclosure import Enclosure
from solvers.bounds.mlp_proof import mlp_bound, part
from solvers.bounds.slopes import sector_interval, slope_interval
from solvers.bounds.stream_proof import Stream, advance, local_tensors

Matrix = list[list[Fraction]]
BuildModel = Callable[..., LipschitzTransformer]

TERMS = 40  # of every series
ROOT_BITS = 120
CLOSE = Fraction(1, 10**13)  # first guess of an enclosure's half width, relative
TIGHT = Fraction(1, 10**8)  # an ellipsoid larger by this is not inside the proved one
LOOSEST = 1e-8  # margins must stay far below what tightening gains
MARGIN_USED = 0.05  # share of the rounding margin that real rounding may take here
TINY = {"vocab_size": 5, "width": 4, "layers": 2, "heads": 2, "mlp_width": 6, "context": 4}
SETTINGS = TightenSettings(max_evals=2)


def exact(tensor: Tensor) -> Matrix:
    """Return a matrix (a vector as one row) of the exact values of floats."""
    rows = tensor.double().tolist()
    rows = rows if tensor.ndim == 2 else [rows]
    return [[Fraction(value) for value in row] for row in rows]


def transpose(a: Matrix) -> Matrix:
    """Return the transpose."""
    return [list(column) for column in zip(*a, strict=True)]


def times(a: Matrix, b: Matrix) -> Matrix:
    """Return the product of two matrices."""
    columns = transpose(b)
    return [
        [sum((x * y for x, y in zip(r, c, strict=True)), Fraction(0)) for c in columns] for r in a
    ]


def plus(a: Matrix, b: Matrix, factor: Fraction = Fraction(1)) -> Matrix:
    """Return ``a + factor * b``."""
    return [[x + factor * y for x, y in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]


def scaled(a: Matrix, factors: Sequence[Fraction]) -> Matrix:
    """Return the matrix with its rows multiplied."""
    return [[factor * x for x in row] for factor, row in zip(factors, a, strict=True)]


def eye(size: int, value: Fraction = Fraction(1)) -> Matrix:
    """Return a multiple of the identity."""
    return [[value if i == j else Fraction(0) for j in range(size)] for i in range(size)]


def is_definite(a: Matrix) -> bool:
    """Return whether a symmetric matrix is positive definite, by LDL^T without rounding."""
    rows = [list(row) for row in a]
    for i, pivot in enumerate(rows):
        if pivot[i] <= 0:
            return False
        for row in rows[i + 1 :]:
            factor = row[i] / pivot[i]
            for j in range(i, len(row)):
                row[j] -= factor * pivot[j]
    return True


def top(a: Matrix) -> tuple[Fraction, Fraction]:
    """Enclose the largest eigenvalue of a symmetric rational matrix (lower, upper)."""
    size = len(a)
    guess = torch.tensor([[float(x) for x in row] for row in a], dtype=torch.float64)
    value, width = Fraction(float(torch.linalg.eigvalsh(guess)[-1])), CLOSE
    scale = max(abs(value), Fraction(1, 10**30))
    while not is_definite(plus(eye(size, value + width * scale), a, Fraction(-1))):
        width *= 4
    upper = value + width * scale
    while is_definite(plus(eye(size, value - width * scale), a, Fraction(-1))):
        width *= 4
    return value - width * scale, upper


def root(value: Fraction) -> tuple[Fraction, Fraction]:
    """Enclose a square root (lower, upper)."""
    shift = 1 << (2 * ROOT_BITS)
    lower = math.isqrt(value.numerator * shift // value.denominator)
    return Fraction(lower, 1 << ROOT_BITS), Fraction(lower + 1, 1 << ROOT_BITS)


def norm(a: Matrix) -> Fraction:
    """Return an upper bound on the spectral norm, above it by about 1e-13."""
    return root(top(times(transpose(a), a))[1])[1]


def exp_minus_one() -> tuple[Fraction, Fraction]:
    """Enclose exp(-1): partial sums of an alternating series."""
    partial = Fraction(0)
    for k in range(TERMS):
        partial += Fraction((-1) ** k, math.factorial(k))
    return partial, partial + Fraction(1, math.factorial(TERMS))


def pi() -> tuple[Fraction, Fraction]:
    """Enclose pi by Machin's formula."""

    def arctan(inverse: int) -> tuple[Fraction, Fraction]:
        terms = [Fraction((-1) ** k, (2 * k + 1) * inverse ** (2 * k + 1)) for k in range(TERMS)]
        total = sum(terms, Fraction(0))
        return total, total + abs(terms[-1])

    (low5, high5), (low239, high239) = arctan(5), arctan(239)
    return 16 * low5 - 4 * high239, 16 * high5 - 4 * low239


@functools.cache
def gelu_top() -> tuple[Fraction, Fraction]:
    """Enclose the largest slope of the GELU, ``1/2 + erf(1)/2 + exp(-1)/sqrt(pi)``."""
    low_root, high_root = root(pi()[0])[0], root(pi()[1])[1]
    terms = [Fraction((-1) ** k, math.factorial(k) * (2 * k + 1)) for k in range(TERMS)]
    series = sum(terms, Fraction(0))
    low, high = exp_minus_one()
    half = Fraction(1, 2)
    lower = half + (series + low) / high_root
    return lower, half + (series + abs(terms[-1]) + high) / low_root


def slopes(divisor: float, *, sector: bool) -> tuple[Fraction, Fraction]:
    """Return rationals around the slopes (or ``phi(z)/z``) of the GELU over its divisor."""
    if sector:
        return Fraction(0), 1 / Fraction(divisor)
    high = gelu_top()[1]
    return (1 - high) / Fraction(divisor), high / Fraction(divisor)


def k_form(model: LipschitzTransformer, index: int, lambda_N: Tensor, *, sector: bool) -> Matrix:
    """Return ``[[G^T L G, C^T], [C, B L^-1 B^T]]`` of an MLP block, from the stored weights."""
    layer, mlp = model.config.layer(index // 2), model.layers[index // 2].mlp
    up, down, a = exact(mlp.up.weight), exact(mlp.down.weight), Fraction(layer.mlp_residual)
    low, high = slopes(layer.gelu_divisor, sector=sector)
    multipliers = exact(lambda_N)[0]
    identity = eye(len(down), 1 - a)
    c = plus(identity, times(down, up), a * (low + high) / 2)
    reach = a * (high - low) / 2
    b = [[reach * x for x in row] for row in down]
    x = times(transpose(up), scaled(up, multipliers))
    y = times(b, scaled(transpose(b), [1 / value for value in multipliers]))
    lower = [row + other for row, other in zip(c, y, strict=True)]
    return [row + other for row, other in zip(x, transpose(c), strict=True)] + lower


@pytest.fixture(scope="module")
def proof(build_model: BuildModel) -> tuple[LipschitzTransformer, Certificate]:
    """Return a tiny model of the published architecture with a certificate."""
    model = build_model(norm=1.3, **TINY)
    return model, certify(model, settings=SETTINGS)


def test_the_enclosures_hold() -> None:
    """Oracle: known digits of pi and e, and the slope table of bound_tightening 1.1."""
    for (low, high), value in (
        (pi(), Fraction("3.14159265358979323846264338327950288")),
        (exp_minus_one(), Fraction("0.36787944117144232159552377016146087")),
        (gelu_top(), Fraction("1.128904145185155")),
    ):
        assert low < high
        assert abs(low - value) < Fraction(1, 10**14)
        assert high - low < Fraction(1, 10**25)
    assert is_definite([[Fraction(2), Fraction(1)], [Fraction(1), Fraction(1)]])
    assert not is_definite([[Fraction(1), Fraction(1)], [Fraction(1), Fraction(1)]])
    low, high = top([[Fraction(2), Fraction(1)], [Fraction(1), Fraction(2)]])
    assert low <= 3 <= high


def test_slope_intervals_hold_the_exact_ones() -> None:
    """Oracle: rational enclosures; the widening must not be large either."""
    for interval, is_sector in ((slope_interval, False), (sector_interval, True)):
        low, high = interval("gelu", 1.1289)
        exact_low, exact_high = slopes(1.1289, sector=is_sector)
        assert Fraction(low) <= exact_low
        assert exact_high <= Fraction(high)
        assert float(Fraction(high) - exact_high) < 1e-11


@pytest.fixture(scope="module")
def streams(proof: tuple[LipschitzTransformer, Certificate]) -> list[Stream]:
    """Return the tokens and changes before each block and at the end, as the checker has them."""
    model, certificate = proof
    found = [Stream.start(model.config.width, certificate.radius)]
    for block in certificate.blocks:
        own = certificate.block_multipliers(block.index)
        state = model.state_dict()
        after = advance(model.config, state, block.index, found[-1], own)[1]
        found.append(after.at(block.radius_out, block.naive_radius_out))
    return found


def _factor(ellipsoid: Ellipsoid) -> Matrix:
    power = Fraction(2) ** ellipsoid.exponent
    return [[power * x for x in row] for row in exact(ellipsoid.factor_CC)]


def _covers(ellipsoid: Ellipsoid, shape: Matrix) -> bool:
    """Return whether ``F F^T > S`` exactly: the ellipsoid holds that of the shape S."""
    factor = _factor(ellipsoid)
    return is_definite(plus(times(factor, transpose(factor)), shape, Fraction(-1)))


def _inverse(a: Matrix) -> Matrix:
    size = len(a)
    rows = [row + other for row, other in zip(a, eye(size), strict=True)]
    for i in range(size):
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(size):
            if j != i:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    return [row[size:] for row in rows]


@pytest.mark.parametrize("index", [1, 3])
def test_mlp_blocks(proof: tuple[LipschitzTransformer, Certificate], index: int) -> None:
    """Oracle: exact definiteness of ``bound I - K`` with K from the stored weights."""
    model, certificate = proof
    lambda_N = certificate.block_multipliers(index)["lambda"]
    mlp, layer = model.layers[index // 2].mlp, model.config.layer(index // 2)
    bound = Fraction(mlp_bound(mlp_form(mlp.up.weight, mlp.down.weight, layer), lambda_N)[0])
    lower, upper = top(k_form(model, index, lambda_N, sector=False))
    assert upper <= bound
    assert float(bound / lower) < 1 + LOOSEST
    naive = _naive_mlp(model, index)
    assert naive <= Fraction(certificate.blocks[index].naive)
    assert float(Fraction(certificate.blocks[index].naive) / naive) < 1 + LOOSEST
    assert min(upper, naive) <= Fraction(certificate.blocks[index].tightened)


def _naive_mlp(model: LipschitzTransformer, index: int) -> Fraction:
    layer, mlp = model.config.layer(index // 2), model.layers[index // 2].mlp
    a, steepest = Fraction(layer.mlp_residual), slopes(layer.gelu_divisor, sector=False)[1]
    return (1 - a) + a * steepest * norm(exact(mlp.up.weight)) * norm(exact(mlp.down.weight))


def _shift(
    model: LipschitzTransformer, index: int, inner: Ellipsoid, own: dict[str, Tensor]
) -> Fraction:
    """Return the s that ``mlp_image`` takes; any s is sound for which ``s I > U``."""
    up = Enclosure.exact(model.layers[index // 2].mlp.up.weight)
    rows = (up @ inner.enclosed).scaled(own["lambda"].sqrt()[:, None]).mT
    return Fraction(round_up(max(rows.gram().top(), 0.0) + float(own["excess"])))


@pytest.mark.parametrize("name", ["stream", "domain"])
@pytest.mark.parametrize("index", [1, 3])
def test_mlp_images(
    proof: tuple[LipschitzTransformer, Certificate],
    streams: list[Stream],
    index: int,
    name: str,
) -> None:
    """Oracle: ``s T`` of ``mlp_image`` by an exact inverse, for its s, if exactly ``s I > U``."""
    model, certificate = proof
    sector, own = name == "domain", part(certificate.block_multipliers(index), name)
    before, after = streams[index : index + 2]
    inner = before.tokens.domain if sector else before.changes
    result = after.tokens.domain if sector else after.changes
    k = k_form(model, index, own["lambda"], sector=sector)
    width = model.config.width
    factor = exact(inner.factor_CC)
    gram, c, y = (
        [r[i] for r in k[j]]
        for i, j in (
            (slice(width), slice(width)),
            (slice(width), slice(width, None)),
            (slice(width, None), slice(width, None)),
        )
    )
    u = times(times(transpose(factor), gram), factor)
    shift = _shift(model, index, inner, own)
    assert shift > top(u)[1]
    moved = times(c, factor)
    room = plus(eye(width, shift), u, Fraction(-1))
    assert is_definite(room)
    shape = plus(times(times(moved, _inverse(room)), transpose(moved)), y)
    power = Fraction(4) ** inner.exponent * shift
    assert _covers(result, [[power * x for x in row] for row in shape])
    assert not _covers(result, [[power * (1 + TIGHT) * x for x in row] for row in shape])


@pytest.mark.parametrize("index", [0, 2])
def test_attention_blocks(
    proof: tuple[LipschitzTransformer, Certificate], streams: list[Stream], index: int
) -> None:
    """Oracle: the three paths of ``_forms`` with exact norms, forms and eigenvalues."""
    model, certificate = proof
    layer, tokens = model.config.layer(index // 2), streams[index].tokens
    heads = split_heads(local_tensors(model.state_dict(), index), layer)
    multipliers = certificate.block_multipliers(index)
    found = attention_bound(heads, layer, tokens.domain, multipliers)
    output, change, rest = _forms(heads, layer, tokens.domain, multipliers)
    derived = (top(output)[1] + top(change)[1] + rest) / 2
    assert derived <= Fraction(found)
    assert found / float(derived) < 1 + LOOSEST
    a, factor = Fraction(layer.attn_residual), Fraction(layer.attn_factor)
    block = certificate.blocks[index]
    assert (1 - a) + a * factor * min(derived, Fraction(block.components["lipschitz"])) <= Fraction(
        block.tightened
    )


def _forms(
    heads: Heads, layer: LayerConfig, domain: Ellipsoid, multipliers: dict[str, Tensor]
) -> tuple[Matrix, Matrix, Fraction]:
    """Return the output form, the form in the token's own change, and the rest, for unit changes.

    Squared norms of keys enter through exact upper bounds, so all of it is an upper bound.
    """
    scale, tokens = Fraction(layer.softmax_scale) / layer.head_dim, _factor(domain)
    weights = {name: exact(values)[0] for name, values in multipliers.items()}
    width = heads.o.shape[1]
    output, change, seen_by = (eye(width, Fraction(0)) for _ in range(3))
    for h in range(layer.heads):
        o, v, q = exact(heads.o[h]), exact(heads.v[h]), exact(heads.q[h])
        k = exact(heads.k[h // layer.group])
        path = times(o, v)
        output = plus(output, times(path, transpose(path)), 1 / weights["value"][h])
        mixed, query, key = (weights[name][h] for name in ("mixed", "query", "key"))
        reach, seen = times(k, tokens), times(path, tokens)
        reach_square = top(times(reach, transpose(reach)))[1]
        moved_square = top(times(k, transpose(k)))[1]
        plain = scale * (reach_square * (1 + mixed) / (4 * query) + moved_square / key)
        output = plus(output, times(seen, transpose(seen)), plain)
        cross = times(seen, transpose(reach))
        factor = scale * (1 + 1 / mixed) / (4 * query)
        output = plus(output, times(cross, transpose(cross)), factor)
        change = plus(change, times(transpose(q), q), scale * query)
        held = times(q, tokens)
        seen_by = plus(seen_by, times(transpose(held), held), scale * key)
    return output, change, sum(weights["value"], Fraction(0)) + top(seen_by)[1]


def test_head_domain_and_totals(
    proof: tuple[LipschitzTransformer, Certificate], streams: list[Stream]
) -> None:
    """Oracle: exact rows, row differences, norms, and the products of the stored factors."""
    model, certificate = proof
    head, embedding = exact(model.head.weight), exact(model.embedding.weight)
    assert norm(head) <= Fraction(certificate.head_norm)
    pairs = [sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) for a, b in combinations(head, 2)]
    assert max(pairs) <= Fraction(certificate.pair_norm) ** 2
    assert max(sum(x * x for x in row) for row in embedding) <= Fraction(certificate.radius) ** 2
    ratio = Fraction(certificate.width, certificate.vocab_size)
    products = {}
    for name in ("naive", "tightened"):
        products[name] = Fraction(certificate.head_norm)
        for block in certificate.blocks:
            products[name] *= Fraction(certificate.constant(block, name))
    assert products["naive"] ** 2 * ratio <= Fraction(certificate.naive) ** 2
    seen = norm(times(head, _factor(streams[-1].changes)))
    smaller = min(products["tightened"], seen)
    assert smaller**2 * ratio <= Fraction(certificate.tightened) ** 2
    assert float(Fraction(certificate.tightened) ** 2 / (smaller**2 * ratio)) < 1 + LOOSEST
    for before, after in pairwise(certificate.blocks):
        assert Fraction(before.radius_out) == Fraction(after.radius_in)


@pytest.mark.parametrize("seed", range(4))
def test_norms_and_how_much_of_the_margin_rounding_takes(seed: int) -> None:
    """Oracle: the exact norm; the error of forming and factoring against what was allowed for."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    lower, upper = top(times(transpose(exact(w)), exact(w)))
    assert upper <= Fraction(spectral_norm_bound(w)) ** 2
    assert spectral_norm_bound(w) ** 2 < (1 + LOOSEST) * float(lower)
    gram, error = weighted_gram(w)
    away = plus(exact(gram), times(transpose(exact(w)), exact(w)), Fraction(-1))
    rounded = root(sum((x * x for row in away for x in row), Fraction(0)))[1]
    assert float(rounded) <= error
    assert float(rounded) < MARGIN_USED * error
    bound, margin = certified_top(gram, error)
    assert upper <= Fraction(bound)
    assert 0 < margin < LOOSEST
