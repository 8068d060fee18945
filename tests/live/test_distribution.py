"""What a draft says: ranked children, rounded to one step."""

from __future__ import annotations

import pytest
import torch

from live.distribution import DRAFT_STEP, IN_CACHE, log_probabilities, on_grid, ranked, ranked_in_one_piece


def test_numbers_are_rounded_to_the_nearest_step():
    numbers = torch.cat([-torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 60, torch.tensor([0.0, -63.9, 11.8])])
    nearest = (numbers.double() / DRAFT_STEP).round() * DRAFT_STEP
    assert torch.equal(on_grid(numbers.clone()).double(), nearest)
    far = on_grid(torch.tensor([-torch.inf, -64.00001, -100.3]))
    assert far[0] == -torch.inf and (far[1:].double() * 2**17 % 1 == 0).all()


def test_sums_along_a_path_do_not_depend_on_their_order():
    steps = on_grid(-torch.rand(1000, 24, generator=torch.Generator().manual_seed(1)) * 10)
    forwards, backwards = steps.cumsum(1)[:, -1], steps.flip(1).cumsum(1)[:, -1]
    assert torch.equal(forwards, backwards) and torch.equal(forwards.double(), steps.double().sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_children_are_ranked_before_they_are_rounded(dtype):
    logits = torch.tensor([0.0, 1e-6, -1.0, -1.0], dtype=dtype)  # the first two fall on one step
    found = ranked(logits, 4)
    assert found.index.tolist() == [1, 0, 2, 3] and found.logprob[0] == found.logprob[1]
    assert (found.logprob.double() / DRAFT_STEP % 1 == 0).all() and found.entropy.double() / DRAFT_STEP % 1 == 0
    assert (found.logprob - log_probabilities(logits)[found.index].float()).abs().max() <= DRAFT_STEP / 2


def test_one_child_is_the_first_of_several():
    logits = torch.randn(3, 5, 50, generator=torch.Generator().manual_seed(2)).mul(3).round()  # with ties
    one, more = ranked(logits, 1), ranked(logits, 4)
    assert torch.equal(one.index, more.index[..., :1]) and torch.equal(one.logprob, more.logprob[..., :1])
    assert torch.equal(one.entropy, more.entropy)


@pytest.mark.parametrize("count", [1, 4, 60])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_ranking_without_a_look_at_the_numbers_is_the_same_or_says_that_it_is_open(dtype, count):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 40, 50, generator=generator).mul(2).to(dtype)
    logits[0], logits[1, ::2] = logits[0].mul(3).round(), logits[1, ::2].sign()  # with ties, and with very many
    logits[2, :5] = torch.nan
    ids = torch.randperm(50, generator=generator)
    found, told = ranked(logits, count), ranked_in_one_piece(logits, count, True, ids)
    index, logprob, entropy, still_open = told.split([(told.shape[-1] - 2) // 2] * 2 + [1, 1], -1)
    settled = still_open[..., 0] == 0
    assert settled[0].all() and not settled[2, :5].any() and (count == 60 or not settled[1].all())
    assert torch.equal(index[settled].long(), ids[found.index][settled])
    assert torch.equal(logprob[settled].float(), found.logprob[settled])
    assert torch.equal(entropy[settled][:, 0].float(), found.entropy[settled])
    assert (ranked_in_one_piece(logits, count, False)[..., -2] == -1).all()


def many(entries: int) -> torch.Tensor:
    """Logits [N, entries] of more rows than a core's cache holds."""
    rows = IN_CACHE * torch.get_num_threads() // entries + 5
    return torch.randn(rows, entries, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 4


def one_by_one(logits: torch.Tensor, count: int) -> list[torch.Tensor]:
    rows = [ranked(row, count) for row in logits]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("dtype, near", [(torch.float32, DRAFT_STEP), (torch.float64, 0.0)])
def test_many_rows_are_as_each_alone(dtype, near, count):
    logits = many(512).to(dtype)
    logits[:7] = logits[:7].round()  # ties, in and behind the best
    logits[3, ::2] = -torch.inf
    found, alone = ranked(logits, count), one_by_one(logits, count)
    assert torch.equal(found.index, alone[0])
    assert ((found.logprob - alone[1]).abs() <= near).all()
    assert ((found.entropy - alone[2]).abs() <= near).all() and found.entropy.isfinite().all()
    assert (found.entropy.double() / DRAFT_STEP % 1 == 0).all()


def test_what_is_broken_among_many_rows_stays_broken():
    logits = many(512).float()
    logits[4, 17] = torch.nan
    logits[5, 18] = torch.inf
    found = ranked(logits, 3)
    assert found.entropy.isnan().nonzero().flatten().tolist() == [4, 5] and found.logprob.isnan().any(1).sum() == 2
