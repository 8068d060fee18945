"""What fails, fails by name, and everything else goes on."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from live import generate
from live.decode import SpeculativeDecoder
from live.pair import encode_prompt, load_pair
from policies.errors import UserError, run_command
from policies.registry import load_policy
from tests.tiny_pair import DOMAINS

TREE = "eagle3(total_tokens=9, depth=3, top_k=4)"
LIMIT = 20


@pytest.fixture(scope="module")
def prompts(pair64) -> list[list[int]]:
    texts = [text for texts in DOMAINS.values() for text in texts]
    return [encode_prompt(pair64.tokenizer, [{"role": "user", "content": text}]) for text in texts]


@pytest.fixture(scope="module")
def told(pair64, prompts) -> list[list[int]]:
    return decoder(pair64, "draft", "autoregressive").generate(prompts, LIMIT).tokens


def decoder(pair, name: str = "eagle3", spec: str = TREE) -> SpeculativeDecoder:
    return SpeculativeDecoder(pair.target(), pair.networks[name], load_policy(spec), pair.end_tokens)


def failing(call, when: int, error: Exception):
    """The call, which raises at its ``when``-th use and ever after."""
    used = [0]

    def wrapped(*args, **kwargs):
        used[0] += 1
        if used[0] >= when:
            raise error
        return call(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("name", ["eagle3", "draft"])
@pytest.mark.parametrize(("method", "when"), [("grow", 5), ("open", 3), ("advance", 1), ("advance", 3)])
def test_a_crashing_draft_does_not_harm_the_text(pair64, prompts, told, monkeypatch, name, method, when):
    run = decoder(pair64, name)
    network = run.drafter.network
    whole = run.generate(prompts, LIMIT)
    monkeypatch.setattr(network, method, failing(getattr(network, method), when, RuntimeError("the head lost its way\nhere")))
    done = run.generate(prompts, LIMIT)
    assert done.tokens == told == whole.tokens
    assert done.draft_error == "RuntimeError: the head lost its way" and 0 < done.plain <= max(done.cycles)
    assert sum(done.cycles) > sum(whole.cycles) and whole.draft_error is None and whole.plain == 0
    monkeypatch.undo()
    again = run.generate(prompts, LIMIT)  # the next request drafts anew
    assert again.tokens == told and again.cycles == whole.cycles and again.draft_error is None


@pytest.mark.parametrize("spec", [TREE, "ddd", "chain(k=3)", "threshold"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_draft_whose_numbers_are_none(pair64, prompts, told, monkeypatch, spec, rows):
    """Probabilities that are NaN do not harm the text, and are not blamed on the policy."""
    run = decoder(pair64, spec=spec)
    network, used = run.drafter.network, [0]
    grow = network.grow

    def poisoned(*args):
        found, used[0] = grow(*args), used[0] + 1
        return found._replace(logprob=torch.full_like(found.logprob, torch.nan)) if used[0] > 2 else found

    monkeypatch.setattr(network, "grow", poisoned)
    done = run.generate(prompts[:rows], LIMIT)
    assert done.tokens == told[:rows] and used[0] > 2 and not done.failed
    assert done.draft_error is None or "probabilities are not numbers (NaN)" in done.draft_error
    assert (done.plain > 0) == (done.draft_error is not None)


def test_a_users_own_mistake_is_no_crash(pair64, prompts, monkeypatch):
    run = decoder(pair64)
    network = run.drafter.network
    monkeypatch.setattr(network, "grow", failing(network.grow, 1, UserError("take another policy")))
    with pytest.raises(UserError, match="take another policy"):
        run.generate(prompts, LIMIT)


@pytest.mark.parametrize("when", [1, 3])
def test_nan_logits_fail_their_request_only(pair64, prompts, told, monkeypatch, when):
    """From its ``when``-th forward on, the target's numbers for the text of row 1 are NaN."""
    run, used = decoder(pair64), [0]
    call = run.target.run

    def poisoned(tokens, *args):
        logits, used[0] = call(tokens, *args), used[0] + 1
        if used[0] == when:
            logits[1] = torch.nan
        return logits

    monkeypatch.setattr(run.target, "run", poisoned)
    done = run.generate(prompts[:4], LIMIT)
    assert list(done.failed) == [1] and "prompt 1 are not numbers (NaN)" in done.failed[1]
    for row in (0, 2, 3):
        assert done.tokens[row] == told[row]
    assert done.tokens[1] == told[1][: len(done.tokens[1])] and len(done.tokens[1]) < len(told[1])
    assert bool(done.tokens[1]) == (when > 1)


def asked(tiny_pair, *options: str) -> list[str]:
    return ["the cat sat on the mat", "--target", tiny_pair.target, "--draft", tiny_pair.eagle3, "--dtype", "float64", *options]


def test_an_interrupt_shows_what_was_generated(tiny_pair, capsys, monkeypatch):
    generate.main(asked(tiny_pair, "--policy", TREE, "--max-new-tokens", "20"))
    whole = capsys.readouterr().out
    monkeypatch.setattr(SpeculativeDecoder, "step", failing(SpeculativeDecoder.step, 3, KeyboardInterrupt()))
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: generate.main(asked(tiny_pair, "--policy", TREE, "--max-new-tokens", "20")))
    shown = capsys.readouterr()
    assert stop.value.code == 130 and "interrupted" in shown.err and "Traceback" not in shown.err
    assert shown.out.strip() and whole.startswith(shown.out.rstrip("\n")) and len(shown.out) < len(whole)


@pytest.mark.parametrize(("error", "code"), [(torch.OutOfMemoryError("CUDA out of memory"), 2), (RuntimeError("oh"), None)])
def test_too_little_memory_for_one_prompt(tiny_pair, capsys, monkeypatch, error, code):
    """What was generated is shown, then the sentence; other errors stay what they are."""
    monkeypatch.setattr(SpeculativeDecoder, "step", failing(SpeculativeDecoder.step, 3, error))
    with pytest.raises(SystemExit if code else RuntimeError) as stop:
        run_command(lambda: generate.main(asked(tiny_pair, "--policy", TREE, "--max-new-tokens", "20")))
    shown = capsys.readouterr()
    assert shown.out.strip()
    if code:
        assert stop.value.code == code and "memory ran out with a single text" in shown.err and "Traceback" not in shown.err


def test_a_draft_of_another_tokenizer(tiny_pair, tmp_path: Path, refused):
    odd = shutil.copytree(tiny_pair.draft, tmp_path / "odd")
    whole = json.loads((odd / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    one, other = [token for token in vocabulary if len(token) == 1][:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (odd / "tokenizer.json").write_text(json.dumps(whole))
    options = ["hello", "--target", tiny_pair.target, "--draft", str(odd)]
    assert "tokenizer" in refused(lambda: generate.main(options))
    import live

    pair = load_pair(tiny_pair.target, [tiny_pair.draft], "float64")
    with pytest.raises(UserError, match="tokenizer"):
        pair.model.generate(torch.tensor([[5, 6]]), custom_generate=live.speculate(str(odd), "chain(k=2)"), max_new_tokens=3)


def test_chat_goes_on_with_what_was_said(tiny_pair, pair64, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a dog ran home\n\nadd 14 and 27\n"))
    generate.main(asked(tiny_pair, "--policy", TREE, "--max-new-tokens", "12", "--chat")[1:])
    told = capsys.readouterr().out
    messages, expected = [], ""
    for said in ("a dog ran home", "add 14 and 27"):
        messages.append({"role": "user", "content": said})
        tokens = decoder(pair64).generate([encode_prompt(pair64.tokenizer, messages)], 12).tokens[0]
        text = pair64.tokenizer.decode(tokens, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})
        expected += text + "\n"
    assert told == expected


def test_show_draws_every_cycle(tiny_pair, pair64, capsys):
    generate.main(asked(tiny_pair, "--policy", TREE, "--max-new-tokens", "12", "--show"))
    drawn = capsys.readouterr().err
    cycles = [line for line in drawn.splitlines() if line.startswith("cycle ")]
    accepted = [int(line.split(": ")[-1].split(" of ")[0]) for line in cycles]
    assert len(cycles) > 1 and any(accepted)
    assert sum(line.startswith("  + ") for line in drawn.splitlines()) == sum(accepted)
    assert sum(line.startswith("  - ") for line in drawn.splitlines()) == 8 * len(cycles) - sum(accepted)
    assert sum(line.startswith("  = ") for line in drawn.splitlines()) == len(cycles)


def test_generate_needs_something_to_answer(tiny_pair, refused):
    assert "--chat" in refused(lambda: generate.main(asked(tiny_pair)[1:]))
    assert "leave '-' out" in refused(lambda: generate.main(["-", *asked(tiny_pair, "--chat")[1:]]))
