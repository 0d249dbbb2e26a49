"""The hyper-network: moments under any cut and order, the block's equation and start, sharing, logarithms, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from malmen_repro.facts import MalmenError
from malmen_repro.hypernetwork import HyperNetwork, HyperNetworkError, LowRankBlock, RunningMoments
from malmen_repro.keys_and_gradients import KeysAndGradients


def moments(chunks, size, layers=1, layer=0):
    found = RunningMoments(layers, size)
    for chunk in chunks:
        found.update(chunk, layer)
    return found


def network(**options):
    torch.manual_seed(0)
    return HyperNetwork(**{"key_size": 6, "value_size": 4, "layers": 3, "rank": 2, **options})


def tokens(count=20, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, 6, generator=generator, dtype=dtype) * 3 + 1
    return KeysAndGradients(keys, torch.randn(count, 4, generator=generator, dtype=dtype) * 1e-5)


def assert_same_moments(a, b, rtol=1e-9):
    for name in ("count", "mean", "squares"):
        x, y = getattr(a, name), getattr(b, name)
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-12 * float(y.abs().max() + 1))


# --- moments

finite = st.floats(-1e4, 1e4, width=32)
matrices = st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(finite, min_size=n, max_size=n), min_size=1))


@settings(max_examples=150, deadline=None)
@given(matrices, st.data())
def test_any_cut_in_any_order_gives_the_moments_of_the_whole(rows, data):
    rows = torch.tensor(rows, dtype=torch.float64)
    shuffled = rows[torch.tensor(data.draw(st.permutations(range(len(rows)))))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)))))  # repeated cuts make empty chunks
    found = moments(shuffled.tensor_split(cuts), rows.shape[1])
    scale = float(rows.abs().max() ** 2 * len(rows) + 1)
    assert found.count.item() == len(rows)
    torch.testing.assert_close(found.mean[0], rows.mean(0), rtol=1e-9, atol=1e-10)
    squares = (rows - rows.mean(0)).square().sum(0)
    torch.testing.assert_close(found.squares[0], squares, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
def test_chunks_of_one_size(size):
    rows = torch.randn(101, 5, dtype=torch.float64) * torch.logspace(-8, 4, 5) + 3
    found = moments(rows.split(size), 5)
    torch.testing.assert_close(found.squares[0] / found.count[0], rows.var(0, correction=0), rtol=1e-6, atol=0)


def test_a_large_offset_does_not_cancel():
    rows = torch.randn(1000, 3, dtype=torch.float64) * 1e-3 + 1e5
    found = moments(rows.split(7), 3)
    torch.testing.assert_close(found.squares[0] / 1000, rows.var(0, correction=0), rtol=1e-6, atol=0)


def test_gradients_far_below_any_epsilon_are_normalised():
    rows = torch.randn(500, 3) * 1e-12
    normalised = moments([rows], 3)(rows, 0)
    torch.testing.assert_close(normalised.std(0, correction=0), torch.ones(3), rtol=1e-4, atol=0)


def test_one_row_is_legal_and_finite():
    found = moments([torch.tensor([[3.0, -1.0]])], 2)
    assert found.count.item() == 1 and found.mean.tolist() == [[3.0, -1.0]] and found.squares.tolist() == [[0.0, 0.0]]
    assert found(torch.tensor([[5.0, 5.0]]), 0).tolist() == [[0.0, 0.0]]
    found.update(torch.tensor([[5.0, -1.0]]), 0)
    assert found.squares.tolist() == [[2.0, 0.0]]


def test_no_row_changes_nothing():
    found = moments([torch.randn(5, 2)], 2)
    before = {name: tensor.clone() for name, tensor in found.state_dict().items()}
    found.update(torch.empty(0, 2), 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in found.state_dict().items())


def test_before_any_token_rows_pass_unchanged():
    rows = torch.randn(4, 3)
    assert torch.equal(RunningMoments(1, 3)(rows, 0), rows)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e6, 1e-20])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_constant_feature_is_switched_off(value, size):
    rows = torch.full((100, 2), value)
    rows[:, 1] = torch.randn(100)
    found = moments(rows.split(size), 2)
    assert found.scale(0)[0] == 0 and found.scale(0)[1] > 0
    assert found(torch.full((1, 2), 1e6), 0)[0, 0] == 0


def test_layers_keep_their_own_moments():
    a, b = torch.randn(10, 2), torch.randn(20, 2) + 5
    both = RunningMoments(3, 2)
    both.update(a, 0)
    both.update(b, 2)
    assert both.count.tolist() == [10, 0, 20]
    torch.testing.assert_close(both.mean[0], a.double().mean(0))
    torch.testing.assert_close(both.mean[2], b.double().mean(0))
    assert torch.equal(both(a, 1), a)


def test_looking_does_not_move_the_moments():
    found = moments([torch.randn(9, 2)], 2)
    before = {name: tensor.clone() for name, tensor in found.state_dict().items()}
    for mode in (True, False):
        found.train(mode)
        found(torch.randn(50, 2), 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_float64_and_rows_keep_their_dtype(dtype):
    rows = torch.randn(9, 2, dtype=dtype)
    found = moments([rows], 2)
    assert all(tensor.dtype == torch.float64 for tensor in found.state_dict().values())
    normalised = found(rows, 0)
    assert normalised.dtype == dtype
    torch.testing.assert_close(normalised.mean(0), torch.zeros(2, dtype=dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(normalised.std(0, correction=0), torch.ones(2, dtype=dtype))


def test_moments_survive_saving():
    found, again = moments([torch.randn(9, 2)], 2), RunningMoments(1, 2)
    again.load_state_dict(found.state_dict())
    assert_same_moments(again, found, rtol=0)


def test_moments_need_no_gradient():
    rows = torch.randn(9, 2, requires_grad=True)
    found = moments([rows], 2)
    assert not any(tensor.requires_grad for tensor in found.state_dict().values()) and not list(found.parameters())
    found(rows, 0).sum().backward()
    torch.testing.assert_close(rows.grad, found.scale(0).float().expand(9, 2))


# --- the block


def random_block(dtype=torch.float64):
    torch.manual_seed(0)
    block = LowRankBlock(size=5, rank=3, layers=2).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    return block


@pytest.mark.parametrize("layer", [0, 1])
def test_the_block_is_mends_equation_three(layer):
    block, z = random_block(), torch.randn(7, 5, dtype=torch.float64)
    s, o = block.scale[layer], block.offset[layer]
    for row, h in zip(z, block(z, layer), strict=True):
        expected = row + torch.relu(s * (block.up @ block.down @ row + block.bias) + o)
        torch.testing.assert_close(h, expected)


def test_the_block_differs_from_the_released_codes():
    block, z = random_block(), torch.randn(7, 5, dtype=torch.float64)
    other = z + block.scale[0] * torch.relu(z @ block.down.T @ block.up.T + block.bias) + block.offset[0]
    assert not torch.allclose(block(z, 0), other)


def test_the_blocks_gradients():
    block, z = random_block(), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    parameters = [z, *block.parameters()]
    assert torch.autograd.gradcheck(lambda z, *_: block(z, 1), parameters)


def test_identity_at_the_start_and_yet_a_gradient():
    block, z = LowRankBlock(5, 3, 2), torch.randn(7, 5)
    assert torch.equal(block(z, 0), z) and torch.equal(block(z, 1), z)
    block(z, 1).sum().backward()
    assert block.up.grad.norm() > 0 and block.bias.grad.norm() > 0 and block.offset.grad[1].norm() > 0
    assert block.down.grad.norm() == 0  # U = 0 stands between V and the output
    assert (block.offset.grad[0] == 0).all() and (block.scale.grad == 0).all()


def test_shapes_and_start_of_the_parameters():
    block = LowRankBlock(size=5, rank=3, layers=2)
    shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    assert shapes == {"down": (3, 5), "up": (5, 3), "bias": (5,), "scale": (2, 5), "offset": (2, 5)}
    assert (block.up == 0).all() and (block.bias == 0).all() and (block.scale == 1).all() and (block.offset == 0).all()
    assert block.down.std() > 0


# --- the network


def test_a_new_network_normalises_and_nothing_else():
    net, cached = network(), tokens()
    net.update(cached, 1)
    keys, gradients = net(cached, 1)
    assert keys.shape == (20, 6) and gradients.shape == (20, 4)
    assert torch.equal(keys, net.keys(cached.keys, 1))
    assert torch.equal(gradients, net.gradients(cached.value_gradients, 1))
    for out in (keys, gradients):
        torch.testing.assert_close(out.mean(0), torch.zeros(out.shape[1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(out.std(0, correction=0), torch.ones(out.shape[1]), rtol=1e-4, atol=0)


def test_before_any_token_a_new_network_is_the_identity():
    cached = tokens()
    keys, gradients = network()(cached, 0)
    assert torch.equal(keys, cached.keys) and torch.equal(gradients, cached.value_gradients)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_blocks_follow_each_other(blocks):
    net, cached = network(blocks=blocks), tokens()
    net.update(cached, 0)
    with torch.no_grad():
        for parameter in net.blocks.parameters():
            parameter.normal_(std=0.3)
    z = torch.cat([net.keys(cached.keys, 0), net.gradients(cached.value_gradients, 0)], dim=1)
    for block in net.blocks:
        z = block(z, 0)
    assert len(net.blocks) == blocks and torch.equal(torch.cat(net(cached, 0), dim=1), z)


def test_every_token_goes_its_own_way():
    net, cached = network(), tokens()
    net.update(cached, 2)
    with torch.no_grad():
        for parameter in net.blocks.parameters():
            parameter.normal_(std=0.3)
    whole = net(cached, 2)
    for size in (1, 3, 19):
        parts = [net(cached.rows(i, i + size), 2) for i in range(0, 20, size)]
        for joined, expected in zip(map(torch.cat, zip(*parts, strict=True)), whole, strict=True):
            torch.testing.assert_close(joined, expected, rtol=1e-5, atol=1e-6)


def test_layers_share_the_weights_and_keep_what_is_theirs():
    net, cached = network(), tokens()
    for layer in range(3):
        net.update(cached, layer)
    with torch.no_grad():
        net.blocks[0].up.normal_()
        net.blocks[0].offset[1] = 1.0
    outputs = [torch.cat(net(cached, layer), dim=1) for layer in range(3)]
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
    outputs[1].square().sum().backward()
    block = net.blocks[0]
    assert block.down.grad.norm() > 0 and block.scale.grad[1].norm() > 0
    assert (block.scale.grad[[0, 2]] == 0).all() and (block.offset.grad[[0, 2]] == 0).all()


def test_update_reaches_both_normalisers_of_one_layer():
    net = network()
    net.update(tokens(7), 1)
    assert net.keys.count.tolist() == net.gradients.count.tolist() == [0, 7, 0]


@pytest.mark.parametrize(("d", "v", "layers", "rank", "blocks"), [(6, 4, 3, 2, 2), (10, 1, 1, 7, 1)])
def test_the_number_of_parameters(d, v, layers, rank, blocks):
    net = HyperNetwork(d, v, layers, rank, blocks)
    expected = blocks * (2 * rank * (d + v) + (d + v) + 2 * layers * (d + v)) + 2 * layers
    assert sum(parameter.numel() for parameter in net.parameters()) == expected


def test_the_papers_defaults():
    with torch.device("meta"):
        net = HyperNetwork(16384, 4096, 6)
    assert len(net.blocks) == 2 and net.blocks[0].down.shape == (1920, 20480)
    small = network()
    torch.testing.assert_close(small.log_learning_rate.exp(), torch.full((3,), 1e-6))
    torch.testing.assert_close(small.log_regularization.exp(), torch.ones(3))


def test_the_logarithms_slope():
    net = network(learning_rate=1e-3, regularization=0.5)
    for log in (net.log_learning_rate, net.log_regularization):
        value = log.exp()
        value.retain_grad()
        (value**2).sum().backward()
        torch.testing.assert_close(log.grad, value.detach() * value.grad)


def test_a_step_of_adam_is_relative():
    net = network(learning_rate=1e-6)
    optimizer = torch.optim.Adam([net.log_learning_rate], lr=0.01)
    net.log_learning_rate.exp().sum().backward()
    optimizer.step()
    torch.testing.assert_close(net.log_learning_rate.exp(), torch.full((3,), 1e-6 * math.exp(-0.01)), rtol=1e-3, atol=0)


def test_no_regularisation_stays_none():
    assert network(regularization=0.0).log_regularization.exp().tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"key_size": 0},
        {"value_size": -1},
        {"layers": 0},
        {"rank": 0},
        {"blocks": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -1e-6},
        {"learning_rate": math.nan},
        {"regularization": -1.0},
        {"regularization": math.nan},
    ],
)
def test_what_cannot_be_built_is_named(options):
    ((name, value),) = options.items()
    with pytest.raises(HyperNetworkError, match=f"{name}={value}"):
        network(**options)
    assert issubclass(HyperNetworkError, MalmenError) and issubclass(HyperNetworkError, ValueError)


def test_a_network_survives_saving(tmp_path):
    net, cached = network(), tokens()
    net.update(cached, 0)
    with torch.no_grad():
        net.blocks[1].up.normal_()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    again = network()
    again.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert all(torch.equal(a, b) for a, b in zip(net(cached, 0), again(cached, 0), strict=True))


def test_float64_all_the_way():
    torch.set_default_dtype(torch.float64)
    try:
        net, cached = network(), tokens(dtype=torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    net.update(cached, 0)
    assert all(out.dtype == torch.float64 for out in net(cached, 0))


@pytest.mark.parametrize("mine", [torch.float32, torch.float64])
@pytest.mark.parametrize("theirs", [torch.float32, torch.float64])
def test_outputs_come_in_the_networks_dtype_whatever_the_tokens(mine, theirs):
    net, cached = network().to(mine), tokens(dtype=theirs)
    net.update(cached, 0)
    assert all(out.dtype == mine for out in net(cached, 0))


@pytest.mark.parametrize("options", [{"rank": 10**9}, {"blocks": 10**6}, {"learning_rate": 1e-60}, {"layers": 2**40}])
def test_what_no_machine_could_hold_is_refused_before_it_is_made(options):
    with pytest.raises(HyperNetworkError, match=next(iter(options))):
        network(**options)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_token_that_is_no_number_does_not_spoil_the_statistics(wrong):
    moments = RunningMoments(1, 3)
    moments.update(torch.randn(5, 3), 0)
    before = {name: value.clone() for name, value in moments.state_dict().items()}
    with pytest.raises(HyperNetworkError, match="not finite"):
        moments.update(torch.tensor([[1.0, wrong, 2.0]]), 0)
    assert all(torch.equal(value, before[name]) for name, value in moments.state_dict().items())
