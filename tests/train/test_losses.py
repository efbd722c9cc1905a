"""The cross-entropy in tiles is the plain one: losses, gradients, accuracy; in less memory."""

import pytest
import torch
import torch.nn.functional as F

from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.kernels import PackedWeight
from dgemma.nn.head import soft_cap
from dgemma.train.losses import chunked_cross_entropy, cross_entropy

N, D, V, CAP = 7, 5, 53, 3.0


def inputs(dtype=torch.float32, n=N, d=D, v=V):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, dtype=dtype)
    table = torch.randn(v, d, generator=generator, dtype=dtype)
    targets = torch.randint(v, (n,), generator=generator)
    observed = torch.where(torch.arange(n) % 2 == 0, targets, torch.randint(v, (n,), generator=generator))
    return (hidden.requires_grad_(), table.requires_grad_(), targets, observed,
            torch.rand(n, generator=generator, dtype=dtype) * 4,
            torch.rand(n, generator=generator, dtype=dtype))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("tile", [1, 8, 20, V])
def test_losses_and_gradients_are_those_of_plain_cross_entropy(tile, shifted):
    hidden, table, targets, observed, shift, weights = inputs()
    logits = soft_cap(hidden @ table.T, CAP)
    if shifted:
        logits = logits + F.one_hot(observed, V) * shift.unsqueeze(1)
    wanted = F.cross_entropy(logits, targets, reduction="none")
    (wanted * weights).sum().backward()
    gradients = hidden.grad, table.grad
    hidden.grad = table.grad = None
    extra = (observed, shift) if shifted else ()
    losses, predicted = chunked_cross_entropy(hidden, table, targets, CAP, *extra, most=tile * N)
    (losses * weights).sum().backward()
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close((hidden.grad, table.grad), gradients, atol=1e-5, rtol=0)
    assert torch.equal(predicted, (hidden @ table.T).argmax(1))


def test_gradients_are_numerically_right():
    hidden, table, targets, observed, shift, _ = inputs(torch.float64, n=3, d=2, v=7)
    assert torch.autograd.gradcheck(
        lambda h, t: chunked_cross_entropy(h, t, targets, CAP, observed, shift, most=6)[0], (hidden, table))


def test_whole_rows_give_the_same():
    hidden, table, targets, observed, shift, _ = inputs()
    whole = cross_entropy(soft_cap(hidden @ table.T, CAP), targets, observed, shift)
    torch.testing.assert_close(whole, chunked_cross_entropy(hidden, table, targets, CAP, observed, shift, most=40))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("tile", [1, 8, 20, V])
def test_over_a_frozen_table_the_gradient_is_the_same(tile, shifted):
    """It is summed up on the way there: with a trained table it comes from another formula."""
    hidden, table, targets, observed, shift, weights = inputs()
    extra = (observed, shift) if shifted else ()
    grads = []
    for frozen in (False, True):
        losses, _ = chunked_cross_entropy(hidden, table.detach() if frozen else table, targets, CAP, *extra,
                                          most=tile * N)
        grads.append(torch.autograd.grad((losses * weights).sum(), hidden)[0])
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-5)


def test_a_frozen_table_s_gradient_is_numerically_right():
    hidden, table, targets, observed, shift, _ = inputs(torch.float64, n=3, d=2, v=7)
    assert torch.autograd.gradcheck(
        lambda h: chunked_cross_entropy(h, table.detach(), targets, CAP, observed, shift, most=6)[0], (hidden,))


def test_a_sure_token_s_small_gradient_is_not_lost_in_rounding():
    """bfloat16, all but certain of the target: the gradient is a difference of nearly equal parts."""
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    table = torch.tensor([[12.0], [1.0], [1.0]], dtype=torch.bfloat16)
    chunked_cross_entropy(hidden, table, torch.tensor([0]), 30.0)[0].sum().backward()
    exact = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(soft_cap(exact @ table.double().T, 30.0), torch.tensor([0])).backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, atol=0, rtol=2e-2)


def test_a_frozen_table_gets_no_gradient():
    hidden, table, targets, *_ = inputs()
    chunked_cross_entropy(hidden, table.detach(), targets, CAP, most=40)[0].sum().backward()
    assert hidden.grad is not None and table.grad is None


def test_low_logits_do_not_underflow():
    """All logits of a row at the lower cap, and the row's mass in a tile that is not the first."""
    hidden = torch.ones(2, 1)
    table = torch.full((40, 1), -1e4)
    table[30] = 1e4
    losses, predicted = chunked_cross_entropy(hidden, table, torch.tensor([30, 3]), 30.0, most=8)
    torch.testing.assert_close(losses, torch.tensor([0.0, 60.0]))
    assert predicted.tolist() == [30, 30]


def test_under_autocast_it_is_what_autocast_makes_of_the_plain_way():
    hidden, table, targets, *_ = inputs(n=32, d=16, v=64)
    grads = []
    for tiles in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            if tiles:
                losses = chunked_cross_entropy(hidden, table, targets, CAP, most=32 * 20)[0]
            else:
                losses = F.cross_entropy(soft_cap(F.linear(hidden, table).float(), CAP), targets, reduction="none")
        losses.mean().backward()
        grads.append((losses.detach(), hidden.grad, table.grad))
        hidden.grad = table.grad = None
    torch.testing.assert_close(grads[0], grads[1], atol=2e-4, rtol=2e-2)
    assert grads[0][1].dtype == torch.float32


def test_a_packed_table_is_read_as_it_is():
    hidden, _, targets, *_ = inputs(d=32)
    table = torch.randn(V, 32, generator=torch.Generator().manual_seed(1)).half()
    packed = PackedWeight(table.view(torch.uint8), BLOCK_TYPES["F16"])
    plain = chunked_cross_entropy(hidden, table.float(), targets, CAP, most=40)[0]
    plain.sum().backward()
    wanted, hidden.grad = hidden.grad, None
    losses, _ = chunked_cross_entropy(hidden, packed, targets, CAP, most=40)
    losses.sum().backward()
    torch.testing.assert_close(losses, plain, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(hidden.grad, wanted, atol=2e-2, rtol=2e-2)


def test_memory_stays_far_below_all_logits():
    """Peak of what torch allocates: 512 tokens over 262144 would be 512 MB for the logits alone."""
    tokens, vocab, width = 512, 262_144, 16
    hidden = torch.randn(tokens, width, requires_grad=True)
    table = torch.randn(vocab, width)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        chunked_cross_entropy(hidden, table, torch.randint(vocab, (tokens,)), 30.0)[0].mean().backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak < 256 * 2**20
