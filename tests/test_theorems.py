"""Theorems 1 and 2 by central differences and gradcheck, on the code that is used and not on formulas beside it."""

import math

import numpy as np
import pytest
import torch

from malmen_repro.normal_equation import aggregate, factorize

SIZES = [(4, 6, 3), (6, 6, 6), (9, 6, 3), (1, 5, 2), (12, 3, 2)]
STEPS = np.logspace(-2.3, -1.3, 5)


def g(shift):
    "A function of the shift with a third derivative: the shift is linear in the value differences."
    return (2 * shift).sin().sum() + shift.pow(4).mean()


def g_gradient(shift):
    return 2 * (2 * shift).cos() + 4 * shift.pow(3) / shift.numel()


def slope_and_error(function, x, direction, derivative):
    "Slope of error against step, and the error that is left once the step is small."

    def error(h):
        central = (function(x + h * direction) - function(x - h * direction)) / (2 * h)
        return abs(central.item() - derivative.item()) / abs(derivative.item())

    slope = np.polyfit(np.log(STEPS), np.log([error(h) for h in STEPS]), 1)[0]
    return slope, min(error(h) for h in (1e-6, 1e-5, 1e-4))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "The matrices are tiny: more threads only wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=SIZES, ids=str)
def problem(request):
    n, d, value_size = request.param
    generator = torch.Generator().manual_seed(n * d)
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64)
    differences = torch.randn(n, value_size, generator=generator, dtype=torch.float64)
    direction = torch.randn(n, value_size, generator=generator, dtype=torch.float64)
    return keys, differences, direction / direction.norm()


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_theorem_1(problem, form):
    keys, differences, direction = problem
    factor = factorize(keys, 0.7, form=form)
    gradient = factor.value_difference_gradients(g_gradient(factor.shift(differences)))
    found = slope_and_error(lambda x: g(factor.shift(x)), differences, direction, (gradient * direction).sum())
    assert found[0] == pytest.approx(2, abs=0.1) and found[1] < 1e-6


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("regularization", [0.1, 1.0, 10.0])
def test_theorem_2_in_log_lambda(problem, form, regularization):
    keys, differences, _ = problem
    factor = factorize(keys, regularization, form=form)
    shift = factor.shift(differences)
    derivative = factor.log_regularization_gradient(g_gradient(shift), shift, differences)

    def function(x):
        return g(factorize(keys, x.exp(), form=form).shift(differences))

    log_lambda, one = torch.tensor(regularization).double().log(), torch.tensor(1.0).double()
    found = slope_and_error(function, log_lambda, one, derivative)
    assert found[0] == pytest.approx(2, abs=0.1) and found[1] < 1e-6


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("regularization", [1e-3, 1.0, 1e3])
def test_two_formulas_for_log_lambda(problem, form, regularization):
    "−⟨∇_D, D − K Sᵀ⟩ = −λ⟨∇_S C⁻¹, S⟩ = −λ tr(∇_S C⁻² Kᵀ D)."
    keys, differences, _ = problem
    factor = factorize(keys, regularization, form=form)
    shift = factor.shift(differences)
    gradient = g_gradient(shift)
    inverse = torch.linalg.inv(keys.T @ keys + regularization * torch.eye(keys.shape[1], dtype=torch.float64))
    ours = factor.log_regularization_gradient(gradient, shift, differences)
    torch.testing.assert_close(ours, -regularization * (gradient @ inverse * shift).sum(), rtol=1e-7, atol=1e-10)
    traced = torch.trace(gradient @ inverse @ inverse @ keys.T @ differences)
    torch.testing.assert_close(ours, -regularization * traced, rtol=1e-7, atol=1e-10)


def test_the_slip_in_algorithm_2():
    "−tr(M S) has no shape unless the layer is square, and then is another number than −tr(M Sᵀ)."
    torch.manual_seed(0)
    for d, value_size in ((6, 3), (6, 6)):
        keys, differences = torch.randn(4, d).double(), torch.randn(4, value_size).double()
        regularization = torch.tensor(0.7).double().requires_grad_()
        shift = aggregate(keys, differences, regularization)
        (wanted,) = torch.autograd.grad(g(shift), regularization)
        inverse = torch.linalg.inv(keys.T @ keys + 0.7 * torch.eye(d, dtype=torch.float64))
        m, shift = g_gradient(shift.detach()) @ inverse, shift.detach()
        torch.testing.assert_close(-torch.trace(m @ shift.T), wanted)
        if d == value_size:
            assert abs(-torch.trace(m @ shift) - wanted) > 0.1 * abs(wanted)
        else:
            with pytest.raises(RuntimeError, match="shapes"):
                m @ shift


def test_keys_corollary(problem):
    "∇_K = D M − K (Mᵀ S + Sᵀ M)."
    keys, differences, _ = problem
    keys = keys.clone().requires_grad_()
    shift = aggregate(keys, differences, 0.7)
    (ours,) = torch.autograd.grad(g(shift), keys)
    keys, shift = keys.detach(), shift.detach()
    m = g_gradient(shift) @ torch.linalg.inv(keys.T @ keys + 0.7 * torch.eye(keys.shape[1], dtype=torch.float64))
    torch.testing.assert_close(ours, differences @ m - keys @ (m.T @ shift + shift.T @ m))
    direction = torch.ones_like(keys) / keys.numel() ** 0.5
    found = slope_and_error(lambda x: g(aggregate(x, differences, 0.7)), keys, direction, (ours * direction).sum())
    assert found[0] == pytest.approx(2, abs=0.1) and found[1] < 1e-6


def test_gradcheck_of_log_lambda(problem):
    keys, differences, _ = problem
    inputs = keys.requires_grad_(), differences.requires_grad_(), torch.tensor(math.log(0.7)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda k, d, x: aggregate(k, d, x.exp()), inputs)
