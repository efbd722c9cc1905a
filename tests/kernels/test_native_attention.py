"""The C++ attention over bfloat16 keys, held to float64 on the same numbers."""

import pytest
import torch

from dgemma.kernels import native

pytestmark = pytest.mark.skipif(not native.can_attend(32), reason="no C++ kernels with bfloat16 instructions here")


def exact(query, blocks, group=1, bounds=None):
    """Softmax attention in float64 with an explicit mask."""
    keys, values = (torch.cat(side, dim=2).double() for side in zip(*blocks, strict=True))
    scores = query.double() @ keys.mT
    if bounds is not None:
        first, last, positions = bounds
        seen = (first.unsqueeze(2) <= positions.unsqueeze(1)) & (positions.unsqueeze(1) <= last.unsqueeze(2))
        scores = scores.masked_fill(~seen.repeat_interleave(group, dim=1).unsqueeze(1), -torch.inf)
    return (scores.softmax(-1) @ values).float()


def draw(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def close(ours, theirs):
    """The softmax's weights are rounded to bfloat16, 8 bits: half a unit of the last is 2^-9."""
    return (ours - theirs).norm() <= 2**-8 * theirs.norm()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("heads", "rows", "columns", "dim"), [
    (1, 1, [1], 32), (3, 7, [65], 32), (2, 64, [64], 64), (2, 70, [1, 63, 200], 96), (1, 130, [300], 256)])
def test_every_row_sees_every_column(heads, rows, columns, dim, threads):
    query = draw(2, heads, rows, dim, scale=dim**-0.5, seed=1)
    blocks = [(draw(2, heads, n, dim, seed=n), draw(2, heads, n, dim, seed=n + 1)) for n in columns]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert close(native.attend(query, blocks), exact(query, blocks))
    finally:
        torch.set_num_threads(before)


def test_a_part_of_a_page_is_read_as_it_lies():
    page = [draw(1, 2, 200, 64, seed=n) for n in (3, 4)]
    parts = [tuple(side[:, :, start:stop] for side in page) for start, stop in ((30, 200), (0, 70))]
    query = draw(1, 2, 9, 64, scale=0.125)
    assert torch.equal(native.attend(query, parts), native.attend(query, [tuple(map(torch.Tensor.contiguous, part))
                                                                          for part in parts]))


def test_rows_of_one_head_are_read_wherever_they_lie():
    """As a transposed projection gives them: torch counts any stride of a dimension of size 1 as contiguous."""
    query, page = draw(2, 1, 9, 64, scale=0.125), [draw(2, 40, 1, 64, seed=n).transpose(1, 2) for n in (3, 4)]
    assert page[0].is_contiguous() and page[0].stride(1) != page[0].stride(0)
    for stop in (40, 17):
        blocks = [tuple(side[:, :, :stop] for side in page)]
        assert close(native.attend(query, blocks), exact(query, blocks))


@pytest.mark.parametrize("reach", [5, 80, 1000])
def test_bounds_mask_columns_by_position(reach):
    batch, tokens, group, columns, dim = 2, 45, 3, 190, 64
    query = draw(batch, 2, tokens * group, dim, scale=dim**-0.5)
    blocks = [(draw(batch, 2, n, dim, seed=n), draw(batch, 2, n, dim, seed=n + 1)) for n in (100, 90)]
    positions = torch.arange(columns).repeat(batch, 1)
    positions[1, :30] = -1  # empty columns
    last = torch.arange(columns - tokens, columns).repeat(batch, 1)
    bounds = (last - reach).clamp(min=0), last, positions
    assert close(native.attend(query, blocks, group, bounds), exact(query, blocks, group, bounds))


def test_a_row_that_sees_nothing_gets_zeros():
    query, blocks = draw(1, 1, 4, 32), [(draw(1, 1, 70, 32, seed=1), draw(1, 1, 70, 32, seed=2))]
    positions = torch.arange(70).unsqueeze(0)
    first = torch.tensor([[0, 100, 0, 0]])
    out = native.attend(query, blocks, 1, (first, torch.full((1, 4), 1000), positions))
    assert (out[0, 0, 1] == 0).all() and out.isfinite().all() and (out[0, 0, 0] != 0).any()


def test_a_rows_result_does_not_depend_on_the_other_rows():
    query, blocks = draw(1, 2, 75, 64), [(draw(1, 2, 99, 64, seed=1), draw(1, 2, 99, 64, seed=2))]
    whole = native.attend(query, blocks)
    for row in (0, 8, 63, 64, 74):
        assert torch.equal(native.attend(query[:, :, row : row + 1], blocks), whole[:, :, row : row + 1])


def test_large_scores_neither_overflow_nor_lose_the_row():
    query = draw(1, 1, 9, 32, scale=30.0)
    blocks = [(draw(1, 1, 130, 32, seed=1, scale=30.0), draw(1, 1, 130, 32, seed=2))]
    ours = native.attend(query, blocks)
    assert ours.isfinite().all() and close(ours, exact(query, blocks))


@pytest.mark.parametrize("wrong", ["float32 query", "columns", "positions"])
def test_what_does_not_fit_is_refused(wrong):
    query, key = draw(1, 1, 4, 32), draw(1, 1, 8, 32)
    bounds = None
    if wrong == "float32 query":
        query = query.float()
    elif wrong == "columns":
        key = draw(1, 1, 8, 64)
    else:
        bounds = torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1, 7)
    with pytest.raises(ValueError, match="attention|fit"):
        native.attend(query, [(key, key)], 1, bounds)
