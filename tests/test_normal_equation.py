"""The normal equation: forms, dtypes, shapes, gradients, streaming, and what is refused."""

import math
import pickle
import subprocess
import sys
import textwrap

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from malmen_repro import normal_equation as ne
from malmen_repro.facts import MalmenError
from malmen_repro.normal_equation import (
    KeyShapeError,
    NonFiniteError,
    NormalEquationError,
    RegularizationError,
    SingularGramError,
    StreamingNormalEquation,
    aggregate,
    factorize,
    residuals,
)

SHAPES = [(1, 1, 1), (1, 7, 3), (7, 1, 3), (5, 8, 3), (8, 8, 8), (8, 8, 2), (9, 8, 1), (200, 8, 5)]
SHAPES += [(31, 32, 4), (33, 32, 4)]
NARROW = ["float32", "bfloat16", "float16"]
ONE = torch.tensor(1.0, dtype=torch.float64)
LAMBDAS = [1e-6, 1e-3, 1.0, 1e3, 1e6]
LAYER = "transformer.h.9.mlp.c_proj"


def tokens(n, d, value_size, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64)
    differences = torch.randn(n, value_size, generator=generator, dtype=torch.float64)
    return keys.to(dtype), differences.to(dtype)


def reference(keys, differences, regularization):
    "Least squares on K above √λ I: no Gram matrix, another route than the code's."
    d = keys.shape[1]
    above = torch.cat([keys.double(), math.sqrt(regularization) * torch.eye(d, dtype=torch.float64)])
    right = torch.cat([differences.double(), torch.zeros(d, differences.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(above, right, driver="gelsd").solution.T


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "The matrices are tiny: more threads only wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shapes_unchecked():
    "The import hook would stop wrong shapes and types before the code's own errors could speak, as for a user they do."
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class TestShift:
    @pytest.mark.parametrize("n, d, value_size", SHAPES)
    @pytest.mark.parametrize("regularization", LAMBDAS)
    @pytest.mark.parametrize("form", ["auto", "primal", "dual"])
    def test_least_squares(self, n, d, value_size, regularization, form):
        keys, differences = tokens(n, d, value_size)
        shift = factorize(keys, regularization, form=form).shift(differences)
        assert shift.shape == (value_size, d) and shift.dtype == torch.float64
        # The form on the larger side, when forced, has eigenvalues that are λ and nothing else.
        tolerance = 1e-8 if regularization >= 1e-3 else 1e-6
        assert relative(shift, reference(keys, differences, regularization)) < tolerance

    @pytest.mark.parametrize("n, d, value_size", SHAPES)
    def test_auto_takes_the_smaller_side(self, n, d, value_size):
        factor = factorize(tokens(n, d, value_size)[0], 1.0)
        assert factor.form == ("dual" if n < d else "primal")
        assert factor.cholesky.shape == (min(n, d),) * 2 and factor.cholesky.dtype == torch.float64

    @pytest.mark.parametrize("n, d, value_size", SHAPES)
    def test_aggregate_is_the_factor_s_shift(self, n, d, value_size):
        keys, differences = tokens(n, d, value_size)
        torch.testing.assert_close(aggregate(keys, differences, 0.3), factorize(keys, 0.3).shift(differences))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("n", [20, 64, 300])
    def test_narrow_inputs_are_solved_in_float64(self, dtype, n):
        keys, differences = tokens(n, 64, 5, dtype=dtype)
        shift = aggregate(keys, differences, 1e-3)
        assert shift.dtype == torch.float32
        assert relative(shift, reference(keys, differences, 1e-3)) < 2e-7

    def test_one_wide_input_makes_the_answer_wide(self):
        keys, differences = tokens(5, 8, 3)
        assert aggregate(keys.float(), differences, 1.0).dtype == torch.float64
        assert aggregate(keys, differences.bfloat16(), 1.0).dtype == torch.float64

    @pytest.mark.parametrize("n", [20, 100, 2000])
    @pytest.mark.parametrize("regularization, tolerance", [(1e-4, 1e-3), (1e-2, 1e-5), (1.0, 1e-6)])
    def test_ill_conditioned_keys(self, n, regularization, tolerance):
        "A common mean and a spectrum over four decades, in float32: condition numbers up to 1e12."
        keys, differences = tokens(n, 100, 4)
        keys = (keys * torch.logspace(0, -4, 100).double()) @ tokens(100, 100, 1, seed=1)[0] + 30.0
        keys, differences = keys.float(), differences.float()
        shift, best = aggregate(keys, differences, regularization), reference(keys, differences, regularization)
        assert relative(shift, best) < tolerance

    def test_the_same_key_many_times(self):
        keys, differences = tokens(1, 6, 2)
        many = aggregate(keys.expand(50, -1), differences.expand(50, -1), 1.0)
        torch.testing.assert_close(many, aggregate(keys, differences, 1.0 / 50))

    @pytest.mark.parametrize("n", [4, 20])
    def test_limits_of_the_regularisation(self, n):
        keys, differences = tokens(n, 8, 3)
        assert aggregate(keys, differences, 1e12).norm() < 1e-9
        if n < 8:  # the shortest exact shift
            shortest = (torch.linalg.pinv(keys) @ differences).T
            torch.testing.assert_close(aggregate(keys, differences, 1e-14), shortest)
        else:
            best = torch.linalg.lstsq(keys, differences).solution.T
            torch.testing.assert_close(aggregate(keys, differences, 0.0), best)

    @pytest.mark.parametrize("n", [4, 20])
    @pytest.mark.parametrize("number", [1, 1.0, *(torch.tensor(1.0, dtype=getattr(torch, x)) for x in NARROW), ONE])
    def test_regularisation_as_number_or_tensor(self, n, number):
        keys, differences = tokens(n, 8, 3)
        torch.testing.assert_close(aggregate(keys, differences, number), aggregate(keys, differences, 1.0))
        assert factorize(keys, number).regularization == 1.0

    def test_blocks_do_not_matter(self, monkeypatch):
        keys, differences = tokens(50, 8, 3)
        before = aggregate(keys, differences, 1.0)
        blocks = ne._blocks
        monkeypatch.setattr(ne, "_blocks", lambda *matrices: blocks(*matrices, rows=7))
        torch.testing.assert_close(aggregate(keys, differences, 1.0), before)

    def test_inputs_are_left_alone(self):
        keys, differences = tokens(5, 8, 3)
        copies = keys.clone(), differences.clone()
        aggregate(keys, differences, 1.0)
        assert torch.equal(keys, copies[0]) and torch.equal(differences, copies[1])

    def test_no_values_and_strided_views(self):
        keys, differences = tokens(10, 16, 6)
        assert aggregate(keys, differences[:, :0], 1.0).shape == (0, 16)
        torch.testing.assert_close(
            aggregate(keys.T.contiguous().T, differences[:, ::2], 1.0), aggregate(keys, differences, 1.0)[::2]
        )


class TestGradients:
    @pytest.mark.parametrize("n, d, value_size", [(1, 1, 1), (1, 5, 2), (5, 1, 2), (3, 5, 2), (4, 4, 4), (7, 4, 2)])
    @pytest.mark.parametrize("regularization", [0.01, 50.0])
    def test_gradcheck(self, n, d, value_size, regularization):
        inputs = (*tokens(n, d, value_size), torch.tensor(regularization, dtype=torch.float64))
        keys, differences, regularization = (x.requires_grad_() for x in inputs)
        assert torch.autograd.gradcheck(aggregate, (keys, differences, regularization))
        inputs = keys, differences, regularization.detach().log().requires_grad_()
        assert torch.autograd.gradcheck(lambda k, v, x: aggregate(k, v, x.exp()), inputs)

    @pytest.mark.parametrize("n", [3, 5, 9])
    def test_without_regularisation(self, n):
        keys, differences = tokens(max(n, 5), 5, 2)
        zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
        loss = aggregate(keys, differences, zero).square().sum()
        (gradient,) = torch.autograd.grad(loss, zero)
        step = 1e-6
        forward = aggregate(keys, differences, step).square().sum()
        assert abs((forward - loss) / step - gradient) < 1e-3 * abs(gradient)

    @pytest.mark.parametrize("n", [3, 20])
    def test_dtypes_of_gradients_are_the_inputs(self, n):
        keys, differences = tokens(n, 8, 2)
        keys, differences = keys.float().requires_grad_(), differences.bfloat16().requires_grad_()
        regularization = torch.tensor(0.5, requires_grad=True)
        aggregate(keys, differences, regularization).sum().backward()
        assert keys.grad.dtype == torch.float32 and differences.grad.dtype == torch.bfloat16
        assert regularization.grad.dtype == torch.float32 and regularization.grad.shape == ()

    @pytest.mark.parametrize("n", [3, 20])
    def test_only_what_is_asked_for(self, n):
        keys, differences = tokens(n, 8, 2)
        aggregate(keys, differences.requires_grad_(), 1.0).sum().backward()
        assert differences.grad is not None and keys.grad is None
        assert not aggregate(keys, differences.detach(), 1.0).requires_grad

    def test_not_differentiable_twice(self):
        keys, differences = tokens(3, 8, 2)
        differences.requires_grad_()
        loss = aggregate(keys, differences, 1.0).square().sum()
        (gradient,) = torch.autograd.grad(loss, differences, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    @pytest.mark.parametrize("n, d, value_size", SHAPES)
    @pytest.mark.parametrize("form", ["primal", "dual"])
    @pytest.mark.parametrize("regularization", [1e-2, 1.0, 1e2])
    def test_factor_agrees_with_autograd(self, n, d, value_size, form, regularization):
        keys, differences = tokens(n, d, value_size)
        log_lambda = torch.tensor(regularization, dtype=torch.float64).log().requires_grad_()
        gradient = torch.randn(value_size, d, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        differences.requires_grad_()
        identity = torch.eye(d, dtype=torch.float64)
        plain = differences.T @ keys @ torch.linalg.inv(keys.T @ keys + log_lambda.exp() * identity)
        wanted = torch.autograd.grad((plain * gradient).sum(), [differences, log_lambda])
        factor = factorize(keys, regularization, form=form)
        shift = factor.shift(differences.detach())
        for_differences = factor.value_difference_gradients(gradient)
        torch.testing.assert_close(for_differences, wanted[0], rtol=1e-7, atol=1e-9)
        for given_gradients in (None, for_differences):
            ours = factor.log_regularization_gradient(gradient, shift, differences.detach(), given_gradients)
            torch.testing.assert_close(ours, wanted[1], rtol=1e-7, atol=1e-8)

    def test_given_gradients_need_no_solve(self, monkeypatch):
        keys, differences = tokens(5, 8, 3)
        factor, gradient = factorize(keys, 0.5), torch.randn(3, 8).double()
        shift, for_differences = factor.shift(differences), factor.value_difference_gradients(gradient)
        monkeypatch.setattr(torch, "cholesky_solve", None)
        factor.log_regularization_gradient(gradient, shift, differences, for_differences)

    @pytest.mark.parametrize("n", [20, 100])
    def test_float32_is_good_to_float32(self, n):
        keys, differences = tokens(n, 64, 5)
        gradient = torch.randn(5, 64).double()
        narrow, wide = factorize(keys.float(), 1.0), factorize(keys.float().double(), 1.0)
        ours = narrow.value_difference_gradients(gradient.float())
        assert ours.dtype == torch.float32
        assert relative(ours, wide.value_difference_gradients(gradient.float().double())) < 1e-7
        theirs = wide.log_regularization_gradient(gradient, wide.shift(differences), differences)
        mine = narrow.log_regularization_gradient(
            gradient.float(), narrow.shift(differences.float()), differences.float(), ours
        )
        assert relative(mine, theirs) < 1e-5

    def test_factor_holds_no_graph(self):
        keys, _ = tokens(5, 8, 3)
        factor = factorize(keys.requires_grad_(), torch.tensor(1.0, requires_grad=True))
        assert not factor.keys.requires_grad and not factor.cholesky.requires_grad


class TestSingular:
    @pytest.mark.parametrize("form", ["auto", "primal", "dual"])
    def test_fewer_tokens_than_dimensions_without_regularisation(self, form):
        with pytest.raises(SingularGramError) as caught:
            factorize(tokens(3, 8, 2)[0], 0.0, form=form, layer=LAYER)
        error = caught.value
        assert (error.layer, error.n, error.d, error.regularization, error.condition) == (LAYER, 3, 8, 0.0, math.inf)
        for part in (LAYER, "n = 3", "d = 8", "λ = 0", "condition number about inf", "larger λ"):
            assert part in str(error)

    def test_is_caught_as_many_things_and_survives_pickling(self):
        error = SingularGramError(None, 3, 8, 0.0, 1e20)
        assert isinstance(error, NormalEquationError) and isinstance(error, MalmenError)
        assert isinstance(error, ArithmeticError)
        assert str(pickle.loads(pickle.dumps(error))) == str(error) and "the normal equation" in str(error)

    @pytest.mark.parametrize("seed", range(100))
    def test_a_lucky_cholesky_is_caught(self, seed):
        "Two equal entries in every key, hidden by a rotation: singular but for rounding, whatever the pivot's sign."
        keys, differences = tokens(50, 6, 2, seed=seed)
        keys[:, 5] = keys[:, 0]
        rotation = torch.linalg.qr(tokens(6, 6, 1, seed=seed + 1000)[0]).Q
        with pytest.raises(SingularGramError) as caught:
            aggregate(keys @ rotation, differences, 0.0, layer=LAYER)
        assert caught.value.condition > 1e13
        aggregate(keys @ rotation, differences, 1e-6)

    @pytest.mark.parametrize("exponent", range(1, 20))
    def test_either_refused_or_right(self, exponent):
        "Keys of ever worse condition: the answer is good to three digits, or there is none."
        keys, differences = tokens(60, 12, 3)
        left, _, right = torch.linalg.svd(keys, full_matrices=False)
        keys = left * torch.logspace(0, -exponent / 2, 12).double() @ right
        truth = (torch.linalg.pinv(keys, rtol=0) @ differences).T
        try:
            shift = aggregate(keys, differences, 0.0)
        except SingularGramError as error:
            assert error.condition > 1e12 and exponent >= 12
        else:
            assert exponent <= 13 and relative(shift, truth) < 5e-3

    def test_a_tiny_regularisation_does_not_hide_it(self):
        keys, differences = tokens(50, 6, 2)
        keys[:, 5] = keys[:, 0]
        with pytest.raises(SingularGramError):
            aggregate(keys, differences, 1e-14)
        with pytest.raises(SingularGramError):  # but in the dual form it would do no harm: see test_limits
            factorize(tokens(3, 8, 2)[0], 1e-16, form="primal")

    def test_zero_keys(self):
        keys, differences = torch.zeros(9, 4), torch.randn(9, 2)
        assert torch.equal(aggregate(keys, differences, 1.0), torch.zeros(2, 4))
        with pytest.raises(SingularGramError, match="inf"):
            aggregate(keys, differences, 0.0)

    @pytest.mark.parametrize("n", [3, 30])
    def test_overflow_in_the_gram_matrix(self, n):
        keys, differences = tokens(n, 8, 2)
        with pytest.raises(SingularGramError):
            aggregate(keys * 1e200, differences, 1.0)

    def test_streaming(self):
        for n in (0, 3, 8, 30):
            keys, differences = tokens(30, 8, 2)
            keys[:, 7] = keys[:, 0]
            stream = StreamingNormalEquation(8, 2, layer=LAYER).add(keys[:n], differences[:n])
            if n:
                with pytest.raises(SingularGramError, match=LAYER) as caught:
                    stream.solve(0.0)
                assert caught.value.n == n
                with pytest.raises(SingularGramError, match="another"):
                    stream.solve(0.0, layer="another")

    def test_condition_number(self):
        gram = torch.diag(torch.tensor([1.0, 3.0, 9.0]))
        assert ne.condition_number(gram, 1.0) == pytest.approx(5.0)
        assert ne.condition_number(torch.zeros(2, 2), 0.0) == math.inf
        assert ne.condition_number(torch.full((2, 2), math.nan), 1.0) == math.inf

    @pytest.mark.parametrize("size", [1, 2, 10, 100])
    @pytest.mark.parametrize("exponent", [0, 4, 8, 11])
    def test_estimated_condition(self, size, exponent):
        "At least the truth up to a small factor, at most the truth times the size."
        rotation = torch.linalg.qr(tokens(size, size, 1)[0]).Q
        gram = rotation * torch.logspace(0, -exponent, size).double() @ rotation.T
        estimate = ne._estimated_condition(torch.linalg.cholesky(gram), gram.trace().item())
        truth = torch.linalg.cond(gram).item()
        assert truth / 3 < estimate < 1.01 * size * truth


class TestRefused:
    @pytest.mark.parametrize("value", [-1.0, -1e-30, math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("as_tensor", [False, True])
    def test_regularisation(self, value, as_tensor):
        keys, differences = tokens(3, 8, 2)
        value = torch.tensor(value, dtype=torch.float64) if as_tensor else value
        stream = StreamingNormalEquation(8, 2).add(keys, differences)
        full = StreamingNormalEquation(8, 2).add(*tokens(30, 8, 2))
        for attempt in (
            lambda: aggregate(keys, differences, value, layer=LAYER),
            lambda: factorize(keys, value, layer=LAYER),
            lambda: stream.solve(value, layer=LAYER),
            lambda: full.solve(value, layer=LAYER),
        ):
            with pytest.raises(RegularizationError, match=LAYER):
                attempt()

    def test_regularisation_of_many_numbers(self, shapes_unchecked):
        keys, differences = tokens(3, 8, 2)
        with pytest.raises(RegularizationError, match=r"\(1,\)"):
            aggregate(keys, differences, torch.ones(1))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, value):
        keys, differences = tokens(6, 8, 2)
        bad_keys, bad_differences = keys.clone(), differences.clone()
        bad_keys[4, 1] = bad_differences[2, 0] = value
        factor, stream = factorize(keys, 1.0, layer=LAYER), StreamingNormalEquation(8, 2, layer=LAYER)
        for attempt, message in (
            (lambda: aggregate(bad_keys, differences, 1.0, layer=LAYER), "keys .*row 4"),
            (lambda: aggregate(keys, bad_differences, 1.0, layer=LAYER), "value differences .*row 2"),
            (lambda: factorize(bad_keys, 1.0, layer=LAYER), "keys .*row 4"),
            (lambda: factor.shift(bad_differences), "value differences .*row 2"),
            (lambda: factor.value_difference_gradients(torch.full((2, 8), value)), "shift gradients .*row 0"),
            (lambda: stream.add(bad_keys, differences), "keys .*row 4"),
            (lambda: stream.add(keys, bad_differences), "value differences .*row 2"),
        ):
            with pytest.raises(NonFiniteError, match=f"layer '{LAYER}': {message}"):
                attempt()
        assert stream.tokens == 0 and stream.waiting == 0  # what was refused left no trace
        with pytest.raises(NonFiniteError):
            residuals(torch.zeros(2, 8), bad_keys, differences)

    def test_shapes(self, shapes_unchecked):
        keys, differences = tokens(6, 8, 2)
        factor, stream = factorize(keys, 1.0, layer=LAYER), StreamingNormalEquation(8, 2, layer=LAYER)
        for attempt, message in (
            (lambda: aggregate(keys, differences[:5], 1.0, layer=LAYER), "6 keys but 5 value differences"),
            (lambda: aggregate(keys[0], differences, 1.0, layer=LAYER), r"keys must have shape .*got \(8,\)"),
            (lambda: aggregate(keys, differences[None], 1.0, layer=LAYER), r"value differences must have shape"),
            (lambda: aggregate(keys.long(), differences, 1.0, layer=LAYER), "floating point, got torch.int64"),
            (lambda: ne._check_pair(keys.to("meta"), differences, LAYER), "keys are on meta, value differences on cpu"),
            (lambda: factor.shift(differences[:5]), "6 keys but 5"),
            (lambda: factor.value_difference_gradients(torch.zeros(2, 7)), r"\(tokens, 8\), got \(2, 7\)"),
            (lambda: stream.add(keys[:, :7], differences), r"\(tokens, 8\), got \(6, 7\)"),
            (lambda: stream.add(keys, differences[:, :1]), r"\(tokens, 2\), got \(6, 1\)"),
            (lambda: stream.add(keys[:4], differences), "4 keys but 6"),
            (lambda: stream.merge(StreamingNormalEquation(8, 3)), r"\(8, 2\) can't take in \(8, 3\)"),
        ):
            with pytest.raises(KeyShapeError, match=message) as caught:
                attempt()
            assert LAYER in str(caught.value) and isinstance(caught.value, ValueError)
        with pytest.raises(KeyShapeError):
            residuals(torch.zeros(2, 7), keys, differences)
        with pytest.raises(ValueError, match="'auto', 'primal' or 'dual'"):
            factorize(keys, 1.0, form="triple")

    def test_shapes_are_checked_by_the_signature(self):
        keys, differences = tokens(6, 8, 2)
        with pytest.raises(jaxtyping.TypeCheckError):
            aggregate(keys, differences[:5], 1.0)

    @pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
    def test_nothing_to_aggregate(self, shape):
        with pytest.raises(KeyShapeError, match="nothing to aggregate"):
            factorize(torch.zeros(shape), 1.0)
        with pytest.raises(KeyShapeError, match="nothing to aggregate"):
            aggregate(torch.zeros(shape), torch.zeros(shape[0], 2), 1.0)
        with pytest.raises(KeyShapeError, match=f"{LAYER}.*no tokens"):
            StreamingNormalEquation(8, 2, layer=LAYER).solve(1.0)


def cut(keys, differences, places):
    places = [0, *sorted(places), len(keys)]
    return [(keys[a:b], differences[a:b]) for a, b in zip(places, places[1:], strict=False)]


class TestStreaming:
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_any_cut_any_order_any_tree(self, data):
        n, d, value_size = (data.draw(st.integers(1, top)) for top in (40, 12, 4))
        keys, differences = tokens(n, d, value_size, seed=data.draw(st.integers(0, 9)), dtype=torch.float32)
        regularization = data.draw(st.sampled_from([1e-3, 1.0, 1e3]))
        parts = cut(keys, differences, data.draw(st.lists(st.integers(0, n), max_size=8)))
        parts = data.draw(st.permutations(parts))
        streams = []
        while parts:  # some parts into each stream
            stream = StreamingNormalEquation(d, value_size)
            for _ in range(data.draw(st.integers(1, len(parts)))):
                stream.add(*parts.pop())
                assert stream.waiting < d
            streams.append(stream)
        while len(streams) > 1:  # two at a time, until one is left
            other = streams.pop(data.draw(st.integers(0, len(streams) - 1)))
            streams[data.draw(st.integers(0, len(streams) - 1))] += other
        (stream,) = streams
        shift, whole = stream.solve(regularization), aggregate(keys, differences, regularization)
        assert stream.tokens == n and shift.dtype == torch.float32 and shift.shape == whole.shape
        assert relative(shift, whole) < 1e-6
        torch.testing.assert_close(stream.gram, keys.double().T @ keys.double())
        torch.testing.assert_close(stream.cross, keys.double().T @ differences.double())
        assert relative(stream.solve(regularization), whole) < 1e-6  # and once more, the rows being folded now

    @pytest.mark.parametrize("n", [7, 8, 9, 100])
    @pytest.mark.parametrize("chunk", [1, 3, 8, 100])
    def test_around_the_key_size(self, n, chunk):
        keys, differences = tokens(n, 8, 3)
        stream = StreamingNormalEquation(8, 3)
        for k, d in zip(keys.split(chunk), differences.split(chunk), strict=True):
            stream.add(k, d)
        assert (stream._sums is None) == (n < 8)  # the dual form until then
        assert relative(stream.solve(0.1), aggregate(keys, differences, 0.1)) < 1e-12

    def test_solving_uses_nothing_up(self):
        keys, differences = tokens(30, 8, 3)
        stream = StreamingNormalEquation(8, 3)
        for end in range(5, 31, 5):
            stream.add(keys[end - 5 : end], differences[end - 5 : end])
            assert relative(stream.solve(1.0), aggregate(keys[:end], differences[:end], 1.0)) < 1e-12

    def test_buffers_may_be_used_again(self):
        keys, differences = tokens(3, 8, 2)
        stream = StreamingNormalEquation(8, 2).add(keys, differences)
        before = stream.solve(1.0)
        keys.zero_(), differences.zero_()
        assert torch.equal(stream.solve(1.0), before)

    def test_a_sum_that_was_handed_out_stays(self):
        keys, differences = tokens(30, 8, 2)
        stream = StreamingNormalEquation(8, 2).add(keys, differences)
        gram, before = stream.gram, stream.gram.clone()
        stream.add(keys, differences)
        assert torch.equal(gram, before) and not torch.equal(stream.gram, before)

    @pytest.mark.parametrize("n, m", [(0, 5), (3, 2), (3, 30), (30, 3)])
    def test_sums_that_were_kept_go_on(self, n, m):
        keys, differences = tokens(n + m, 8, 2)
        stream = StreamingNormalEquation(8, 2, layer=LAYER).add(keys[:n], differences[:n])
        again = StreamingNormalEquation.from_sums(stream.gram, stream.cross, stream.tokens, layer=LAYER)
        assert (again.tokens, again.waiting, again.layer) == (n, 0, LAYER)
        again.add(keys[n:], differences[n:])
        assert relative(again.solve(1.0), aggregate(keys, differences, 1.0)) < 1e-12

    @pytest.mark.parametrize("n, m", [(3, 2), (3, 30), (30, 3), (30, 30), (0, 5), (5, 0), (0, 30)])
    def test_merge_leaves_the_other_alone(self, n, m):
        keys, differences = tokens(n + m, 8, 2)
        left = StreamingNormalEquation(8, 2).add(keys[:n], differences[:n])
        right = StreamingNormalEquation(8, 2).add(keys[n:], differences[n:])
        assert left.merge(right) is left
        left.add(keys, differences)
        assert right.tokens == m and left.tokens == 2 * (n + m)
        if m:
            assert relative(right.solve(1.0), aggregate(keys[n:], differences[n:], 1.0)) < 1e-12

    @pytest.mark.parametrize("n", [3, 30])
    def test_merge_with_itself(self, n):
        keys, differences = tokens(n, 8, 2)
        stream = StreamingNormalEquation(8, 2).add(keys, differences)
        stream += stream
        assert stream.tokens == 2 * n
        assert relative(stream.solve(2.0), aggregate(keys, differences, 1.0)) < 1e-12

    @pytest.mark.parametrize("n", [3, 30])
    def test_dtypes(self, n):
        keys, differences = tokens(n, 8, 2)
        narrow = StreamingNormalEquation(8, 2).add(keys.bfloat16(), differences.float())
        assert narrow.solve(1.0).dtype == torch.float32
        narrow.add(keys, differences.half())
        assert narrow.solve(1.0).dtype == torch.float64
        assert StreamingNormalEquation(8, 2).merge(narrow).dtype == torch.float64

    def test_no_graph_is_kept(self):
        keys, differences = tokens(30, 8, 2)
        stream = StreamingNormalEquation(8, 2).add(keys.requires_grad_(), differences.requires_grad_())
        assert not stream.gram.requires_grad and not stream.solve(1.0).requires_grad

    def test_empty_sums(self):
        stream = StreamingNormalEquation(8, 2)
        assert torch.equal(stream.gram, torch.zeros(8, 8).double()) and stream.cross.shape == (8, 2)
        assert stream.add(torch.zeros(0, 8), torch.zeros(0, 2)).tokens == 0


class OneOfTwo:
    "An accelerator in which the other process holds what `other` holds."

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, other):
        facts = torch.tensor([other.tokens, int(other.dtype == torch.float64)])
        self.theirs = iter([other.gram, other.cross, facts])

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return tensor + next(self.theirs)


class TestProcesses:
    def test_one_process(self):
        from accelerate import Accelerator

        keys, differences = tokens(5, 8, 2)
        stream = StreamingNormalEquation(8, 2).add(keys, differences)
        total = stream.reduce(Accelerator(cpu=True))
        assert total is not stream and torch.equal(total.solve(1.0), stream.solve(1.0))
        total.add(keys, differences)
        assert stream.tokens == 5

    @pytest.mark.parametrize("n", [0, 2, 5, 9, 30])
    def test_two_processes(self, n):
        keys, differences = tokens(30, 8, 2)
        here = StreamingNormalEquation(8, 2).add(keys[:n].float(), differences[:n].float())
        dtype = torch.float64 if n % 2 else torch.float32
        there = StreamingNormalEquation(8, 2).add(keys[n:].to(dtype), differences[n:].to(dtype))
        total = here.reduce(OneOfTwo(there))
        assert total.tokens == 30 and total.solve(1.0).dtype == dtype
        assert relative(total.solve(1.0), aggregate(keys, differences, 1.0)) < 1e-6
        assert here.tokens == n

    def test_two_real_processes(self, tmp_path):
        script = tmp_path / "share.py"
        script.write_text(
            textwrap.dedent(
                f"""
                import sys, torch, torch.distributed as dist
                torch.set_num_threads(1)
                import os
                rank = int(sys.argv[1])
                os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                                  MASTER_PORT="0", ACCELERATE_USE_CPU="true")
                dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
                from accelerate import Accelerator
                from malmen_repro.normal_equation import StreamingNormalEquation, aggregate
                accelerator = Accelerator(cpu=True)
                assert accelerator.num_processes == 2, accelerator.state
                torch.manual_seed(0)
                keys, differences = torch.randn(30, 8), torch.randn(30, 2)
                mine = slice(0, 3) if rank == 0 else slice(3, 30)
                total = StreamingNormalEquation(8, 2).add(keys[mine], differences[mine]).reduce(accelerator)
                assert total.tokens == 30
                torch.testing.assert_close(total.solve(1.0), aggregate(keys, differences, 1.0))
                dist.destroy_process_group()
                print("agreed")
                """
            )
        )
        runs = [
            subprocess.Popen([sys.executable, script, rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in "01"
        ]
        for run in runs:
            out, err = run.communicate(timeout=120)
            assert run.returncode == 0 and "agreed" in out, err


class TestResiduals:
    def test_by_hand(self):
        keys, differences = tokens(5, 4, 3)
        shift = torch.randn(3, 4).double()
        wanted = [((shift @ k - d).norm() / d.norm()).item() for k, d in zip(keys, differences, strict=True)]
        torch.testing.assert_close(residuals(shift, keys, differences), torch.tensor(wanted).double())

    def test_no_shift_and_the_exact_shift(self):
        keys, differences = tokens(3, 8, 2)
        assert residuals(torch.zeros(2, 8), keys, differences).eq(1).all()
        assert residuals(aggregate(keys, differences, 1e-13), keys, differences).max() < 1e-10

    def test_nothing_wanted(self):
        keys, differences = tokens(3, 8, 2)
        differences[1] = 0
        for shift in (torch.zeros(2, 8), torch.ones(2, 8)):
            missed = residuals(shift, keys, differences)
            assert missed.isnan().tolist() == [False, True, False] and missed.nanmean().isfinite()

    def test_dtype_and_size(self):
        keys, differences = tokens(5000, 4, 2, dtype=torch.bfloat16)
        missed = residuals(torch.ones(2, 4), keys, differences)
        assert missed.shape == (5000,) and missed.dtype == torch.float32
        assert residuals(torch.ones(2, 4), keys[:0], differences[:0]).shape == (0,)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(1, 30), st.integers(1, 10), st.floats(-4, 4))
    def test_the_shift_is_the_best(self, n, d, log_lambda):
        "No other shift does better in the least-squares problem that it solves."
        keys, differences = tokens(n, d, 2)
        regularization = math.exp(log_lambda)

        def cost(shift):
            return ((keys @ shift.T - differences).square().sum() + regularization * shift.square().sum()).item()

        shift = aggregate(keys, differences, regularization)
        for seed in range(5):
            other = shift + 1e-2 * torch.randn(2, d, generator=torch.Generator().manual_seed(seed)).double()
            assert cost(shift) <= cost(other)
