"""The processed distribution is Hugging Face's; the token is the inverse CDF's; texts do not depend on who drafts."""

from __future__ import annotations

import pytest
import torch

from live.decode import SpeculativeDecoder
from live.decoding_plain import plain_decode
from live.pair import Pair, encode_prompt
from live.sampling import Sampler, inverse_cdf, measured, process
from policies.contract import Sampling
from policies.errors import UserError
from policies.philox import uniform
from policies.registry import load_policy
from tests.live.processors import by_hugging_face
from tests.tiny_pair import DOMAINS

SETTINGS = [
    Sampling(1.0),
    Sampling(0.3, seed=5),
    Sampling(1.0, top_k=3),
    Sampling(1.5, top_p=0.7),
    Sampling(0.8, top_k=9, top_p=0.9),
    Sampling(1.2, top_p=0.95, repetition_penalty=1.3),
    Sampling(0.7, top_k=5, repetition_penalty=0.8),
]


def by_rows(settings: list[Sampling]) -> Sampling:
    """One setting per row, as tensors."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    values = {name: [getattr(sampling, name) for sampling in settings] for name in names}
    kinds = dict.fromkeys(names, torch.float64) | {"top_k": torch.int64, "seed": torch.int64}
    return Sampling(**{name: torch.tensor(values[name], dtype=kinds[name]) for name in names})


def some_logits(rows: int, size: int = 40) -> torch.Tensor:
    logits = 3 * torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    return logits.masked_fill(logits < -6, -torch.inf)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_the_distribution_is_hugging_faces(sampling):
    logits = some_logits(50)
    tokens = torch.randint(0, 40, (50, 6), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(50, 40, dtype=torch.bool).scatter(1, tokens, True)
    wanted = by_hugging_face(logits, tokens, sampling)
    weight = process(logits, sampling, seen).weight
    found = weight / weight.sum(-1, keepdim=True)
    assert torch.equal(found > 0, wanted > 0) and torch.allclose(found, wanted, rtol=1e-12, atol=0)


def test_rows_may_differ():
    """Settings by row, at several places of each row, are those of each row alone."""
    logits = some_logits(7 * 3).reshape(7, 3, 40)
    mixed = by_rows(SETTINGS)
    seen = torch.rand(7, 1, 40) < 0.3
    found = process(logits, mixed, seen)
    for row, sampling in enumerate(SETTINGS):
        alone = process(logits[row], sampling, seen[row])
        assert torch.equal(found.weight[row], alone.weight) and torch.equal(found.cutoff[row], alone.cutoff)


def test_ties_at_top_k_stay_as_in_hugging_face():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    for k, kept in ((1, [1]), (2, [1, 2, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3, 4])):
        assert process(logits, Sampling(1.0, top_k=k)).weight[0].nonzero().flatten().tolist() == kept


def test_the_token_is_the_first_that_exceeds_u():
    weight = torch.tensor([0.0, 2.0, 0.0, 1.0, 5.0, 0.0], dtype=torch.float64)
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.374, 3), (0.375, 4), (1 - 2**-53, 4)):
        assert int(inverse_cdf(weight[None], torch.tensor([u], dtype=torch.float64))) == token
    weight = torch.rand(300, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = uniform(1, torch.arange(300), torch.zeros(300, dtype=torch.int64))
    for row, token in enumerate(inverse_cdf(weight, u).tolist()):
        total, wanted = 0.0, None
        for place, share in enumerate((weight[row] / weight[row].sum()).tolist()):
            total += share
            if wanted is None and total > float(u[row]):
                wanted = place
        assert token == wanted


def test_what_a_choice_was_like():
    weight = torch.tensor([0.1, 0.0, 0.2, 0.7], dtype=torch.float64).expand(5, -1)
    u = torch.tensor([0.01, 0.09, 0.12, 0.28, 0.99], dtype=torch.float64)
    token = inverse_cdf(weight, u)
    assert token.tolist() == [0, 0, 2, 2, 3]
    free = torch.full((5,), torch.inf, dtype=torch.float64)
    logprob, margin = measured(process(weight.log(), Sampling(1.0)), u, token)
    assert torch.allclose(logprob.exp(), torch.tensor([0.1, 0.1, 0.2, 0.2, 0.7], dtype=torch.float64))
    assert torch.allclose(margin, torch.tensor([0.09, 0.01, 0.02, 0.02, 0.69], dtype=torch.float64))
    sure = process(torch.tensor([[0.0, -torch.inf]], dtype=torch.float64), Sampling(1.0))
    assert measured(sure, u[:1], token[:1])[1].tolist() == [1.0]  # nothing else could be chosen
    assert (process(weight.log(), Sampling(1.0)).cutoff == free).all()


def test_a_cut_has_a_margin_too():
    logits = torch.tensor([[0.0, -1.0, -1.5, -9.0]], dtype=torch.float64)
    assert float(process(logits, Sampling(1.0, top_k=2)).cutoff) == pytest.approx(0.5)
    assert float(process(logits, Sampling(0.5, top_k=2)).cutoff) == pytest.approx(1.0)
    share = torch.softmax(logits, -1)[0].cumsum(0)
    for top_p in (0.3, 0.7, float(share[1]) - 1e-7, float(share[1]) + 1e-7):
        edges = [abs(float(edge) - top_p) for edge in share]
        gap = 1.0 if top_p < float(share[0]) else 0.5 if top_p < float(share[1]) else 7.5
        assert float(process(logits, Sampling(1.0, top_p=top_p)).cutoff) == pytest.approx(min(*edges, gap), abs=1e-12)
    assert float(process(logits, Sampling(1.0, top_p=0.9999999, top_k=4)).cutoff) < 1e-6 + float(1 - share[2])


def test_the_first_choice_of_greedy_rows_is_the_argmax():
    """Rows at temperature 0 and above in one batch."""
    logits = some_logits(4)[:, None]
    sampling = Sampling(torch.tensor([0.0, 1.0, 0.0, 2.0], dtype=torch.float64), seed=torch.tensor([0, 1, 2, 3]))
    prompts, counts = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    position = torch.zeros(4, 1, dtype=torch.int64)
    found = Sampler(sampling, torch.arange(4), prompts, counts, logits).choose(logits, position)
    assert found[[0, 2]].tolist() == logits[[0, 2]].argmax(-1).tolist()
    u = uniform(torch.tensor([1, 3]), torch.tensor([1, 3]), torch.zeros(2, dtype=torch.int64))
    for row, number in zip((1, 3), u, strict=True):
        weight = process(logits[row], Sampling((0, 1.0, 0, 2.0)[row])).weight
        assert found[row].tolist() == inverse_cdf(weight, number[None]).tolist()


# ---- texts -----------------------------------------------------------------------------------------------------------

POLICIES = ("autoregressive", "chain(k=4)", "static", "eagle3(total_tokens=12, depth=4, top_k=4)")


@pytest.fixture(scope="module")
def prompts(pair64: Pair) -> list[list[int]]:
    texts = [text for texts in DOMAINS.values() for text in texts]
    return [encode_prompt(pair64.tokenizer, [{"role": "user", "content": text}]) for text in texts]


def plain(pair: Pair, prompts: list[list[int]], sampling: Sampling, text: list[int] | None = None) -> list[list[int]]:
    return plain_decode(pair.target(), prompts, 24, pair.end_tokens, sampling=sampling, text=text)


@pytest.mark.parametrize("name", ["eagle3", "draft"])
@pytest.mark.parametrize("sampling", [SETTINGS[0], SETTINGS[4], SETTINGS[5], Sampling(0.0, repetition_penalty=1.4)], ids=str)
def test_every_policy_writes_the_same_text(pair64, prompts, sampling, name):
    wanted = plain(pair64, prompts, sampling)
    shorter = 0
    for spec in POLICIES:
        run = SpeculativeDecoder(pair64.target(), pair64.networks[name], load_policy(spec), pair64.end_tokens)
        done = run.generate(prompts, 24, sampling=sampling)
        assert done.tokens == wanted, spec
        shorter += sum(done.cycles) < sum(len(text) - 1 for text in wanted)
    assert shorter >= 2  # the drafters are accepted at times, so texts came about in different ways


def test_a_text_depends_on_its_number_and_the_seed_and_not_on_its_batch(pair64, prompts):
    whole = plain(pair64, prompts, Sampling(1.0, seed=3))
    for number in (1, 4):
        assert plain(pair64, [prompts[number]], Sampling(1.0, seed=3), [number]) == [whole[number]]
        run = SpeculativeDecoder(pair64.target(), pair64.networks["draft"], load_policy("chain(k=3)"), pair64.end_tokens)
        done = run.generate([prompts[number]], 24, sampling=Sampling(1.0, seed=3), text=torch.tensor([number]))
        assert done.tokens == [whole[number]]
        assert plain(pair64, [prompts[number]], Sampling(1.0, seed=3), [0]) != [whole[number]]
        assert plain(pair64, [prompts[number]], Sampling(1.0, seed=4), [number]) != [whole[number]]


def test_rows_of_a_batch_may_be_sampled_differently(pair64, prompts):
    run = SpeculativeDecoder(pair64.target(), pair64.networks["draft"], load_policy("static"), pair64.end_tokens)
    done = run.generate(prompts, 24, sampling=by_rows(SETTINGS[:6]))
    assert done.tokens == [plain(pair64, [prompts[row]], SETTINGS[row], [row])[0] for row in range(6)]


def test_greedy_with_a_penalty_is_hugging_faces(pair64, prompts):
    found = plain(pair64, prompts, Sampling(repetition_penalty=1.2))
    differs = 0
    for prompt, text, free in zip(prompts, found, plain(pair64, prompts, Sampling()), strict=True):
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, "repetition_penalty": 1.2}
        assert pair64.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist() == text
        differs += text != free
    assert differs


def test_a_forgotten_path_is_noticed(pair64, prompts, monkeypatch):
    """The check of the penalty can fail: without the drafted tokens' own penalty, the texts differ."""
    sampling = Sampling(0.0, repetition_penalty=1.4)
    wanted = plain(pair64, prompts, sampling)
    monkeypatch.setattr(Sampler, "on_paths", lambda self, tokens, sees: torch.zeros(1, 1, 1, dtype=torch.bool))
    run = SpeculativeDecoder(pair64.target(), pair64.networks["draft"], load_policy("static"), pair64.end_tokens)
    assert run.generate(prompts, 24, sampling=sampling).tokens != wanted


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=str)
def test_logits_that_are_not_numbers(pair64, prompts, monkeypatch, sampling):
    """A row stops where its logits break; the others never notice."""
    target, row = pair64.target(), 1
    real, calls, told = target.prefill, [], []

    def prefill(*args, **options):
        output = real(*args, **options)
        calls.append(len(output.logits))
        if len(calls) == 4:
            output.logits[1, 0, 7] = torch.nan
        return output

    wanted = plain(pair64, prompts[:3], sampling)
    monkeypatch.setattr(target, "prefill", prefill)
    found = plain_decode(target, prompts[:3], 24, (), sampling=sampling, on_nan=lambda *where: told.append(where))
    assert told == [(row, 3)] and len(found[row]) == 3
    for other in (0, 2):
        assert found[other][: len(wanted[other])] == wanted[other]
    calls.clear()
    with pytest.raises(UserError, match="token 3 behind prompt 1 are not numbers"):
        plain_decode(target, prompts[:3], 24, (), sampling=sampling)
