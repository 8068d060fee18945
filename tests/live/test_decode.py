"""Speculative text is the target's own text, whatever the policy, the drafter, the batch, and where it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from live.decode import SpeculativeDecoder
from live.pair import Pair, encode_prompt
from policies.errors import UserError
from policies.registry import load_policy
from sim.replay import replay
from tests.tiny_pair import DOMAINS
from traces.recording import open_recording

LIMIT = 32
POLICIES = (
    "autoregressive", "chain(k=4)", "static", "static(tree=medusa)", "eagle3",
    "eagle3(total_tokens=9, depth=3, top_k=4)", "heterospec(thresholds_=[2.0, 4.0, 6.0, 8.0], depth=4)",
)  # fmt: skip
EVERY_THIRD = '''
from policies.contract import Expansion, Policy
from policies.registry import policy

@policy("every_third", paper="")
class EveryThird(Policy):
    """Drafts in every third cycle only, so that the draft has several cycles to catch up on."""
    depth: int = 3
    def expand(self, tree, cycle, state):
        if tree.levels == self.depth:
            return None
        return Expansion(tree.frontier(2).masked_fill((cycle.number % 3 != 2)[:, None], -1), 3)
    def select(self, tree, cycle, state):
        return tree.exists
'''


@pytest.fixture(scope="module")
def prompts(pair64: Pair) -> list[list[int]]:
    texts = [text for texts in DOMAINS.values() for text in texts]
    return [encode_prompt(pair64.tokenizer, [{"role": "user", "content": text}]) for text in texts]


@pytest.fixture(scope="module")
def told(pair64: Pair, prompts: list[list[int]]) -> list[list[int]]:
    """What ``model.generate`` says, one prompt at a time."""
    return [generate(pair64, prompt, LIMIT) for prompt in prompts]


def generate(pair: Pair, prompt: list[int], limit: int) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": limit, "pad_token_id": 0}
    return pair.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def decoder(pair: Pair, name: str, spec: str, context_limit: int | None = None) -> SpeculativeDecoder:
    limit = context_limit or pair.context_limit
    return SpeculativeDecoder(pair.target(), pair.networks[name], load_policy(spec), pair.end_tokens, context_limit=limit)


def test_prompts_and_texts_are_ragged(prompts, told, pair64):
    assert len({len(prompt) for prompt in prompts}) > 3
    ended = [text[-1] in pair64.end_tokens for text in told]
    assert any(ended) and not all(ended)


@pytest.mark.parametrize("name", ["eagle3", "draft"])
@pytest.mark.parametrize("spec", POLICIES)
def test_text_equals_generate(pair64, prompts, told, name, spec):
    done = decoder(pair64, name, spec).generate(prompts, LIMIT)
    assert done.tokens == told
    if spec != "autoregressive":
        assert sum(done.cycles) < sum(len(text) - 1 for text in told)  # the drafters are accepted at times


@pytest.mark.parametrize(("name", "spec"), [("eagle3", "eagle3(depth=4)"), ("draft", "static")])
def test_a_batch_decodes_as_its_rows_do_alone(pair64, prompts, name, spec):
    """The same cycles with the same kept nodes, while rows of the batch end and leave."""
    run = decoder(pair64, name, spec)

    def cycles(some: list[list[int]]) -> list[list[tuple]]:
        logs = [[] for _ in some]

        def note(step) -> None:
            for place, row in enumerate(step.row.tolist()):
                count = int(step.done.kept.count[place]) + 1
                kept, path = step.done.kept.token[place, :count].tolist(), step.done.walk.path[place]
                logs[row].append((int(step.cycle.position[place]), kept, path[path >= 0].tolist(), int(step.gained[place])))

        run.generate(some, LIMIT, on_step=note)
        return logs

    assert cycles(prompts[:4]) == [cycles([prompt])[0] for prompt in prompts[:4]]


@pytest.mark.parametrize("name", ["eagle3", "draft"])
def test_limits_are_kept_per_prompt(pair64, prompts, told, name):
    limits = [1, 2, 5, 9, 30, 3]
    done = decoder(pair64, name, "eagle3(depth=5)").generate(prompts, limits)
    assert done.tokens == [text[:limit] for text, limit in zip(told, limits, strict=True)]
    assert done.cycles[0] == 0


def test_streaming_tells_every_token_once(pair64, prompts, told):
    told_so_far = [[] for _ in prompts]

    def first(tokens) -> None:
        for row, token in enumerate(tokens.tolist()):
            told_so_far[row].append(token)

    def step(step) -> None:
        for row, tokens, count in zip(step.row.tolist(), step.tokens.tolist(), step.gained.tolist(), strict=True):
            told_so_far[row] += tokens[:count]

    decoder(pair64, "eagle3", "chain(k=3)").generate(prompts, LIMIT, on_step=step, on_first=first)
    assert told_so_far == told


def test_nothing_stays_on_the_model(pair64, prompts):
    """Hooks hang on the target while a text is decoded, and are gone behind it, however it ended."""

    def hooked() -> bool:
        return any(module._forward_pre_hooks or module._forward_hooks for module in pair64.model.modules())

    def interrupt(step) -> None:
        assert hooked()
        raise KeyboardInterrupt

    run = decoder(pair64, "eagle3", "chain(k=2)")
    run.generate(prompts[:1], 5)
    assert not hooked()
    with pytest.raises(KeyboardInterrupt):
        run.generate(prompts[:1], 5, on_step=interrupt)
    assert not hooked()


def test_streams_are_of_ones_own_passes(pair64, prompts):
    """What others run on the model meanwhile is not kept, nor what a pass has left that failed."""
    target = decoder(pair64, "eagle3", "chain(k=2)").target
    last = pair64.model.model.layers[-1]
    with target.streams.hanging():
        pair64.model(torch.tensor([prompts[0]]))
        assert not target.streams._found
        handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            target.prefill(torch.tensor([prompts[0]]))
        handle.remove()
        assert not target.streams._found


@pytest.mark.parametrize("name", ["eagle3", "draft"])
def test_text_stops_where_the_context_ends(pair64, prompts, told, name):
    """Trees are cut so that no node lies outside the context; the last token need not be run."""
    prompt, text = prompts[5], told[5]
    for room in (1, 2, 6):
        done = decoder(pair64, name, "eagle3", len(prompt) + room).generate([prompt, prompt[:3]], LIMIT)
        assert done.tokens[0] == text[: room + 1]
    long = (prompts[3] * 30)[:250]
    done = decoder(pair64, name, "eagle3").generate([long], LIMIT)
    assert done.tokens[0] == generate(pair64, long, 7)[:7] and len(long) + 6 == pair64.context_limit


def test_prompts_that_cannot_be_decoded(pair64, prompts):
    run = decoder(pair64, "draft", "chain(k=2)")
    with pytest.raises(UserError, match="prompt 1 is empty"):
        run.generate([prompts[0], []], 4)
    with pytest.raises(UserError, match="shorten it"):
        run.generate([[5] * 256], 4)
    with pytest.raises(UserError, match="1 or more"):
        run.generate(prompts[:1], 0)
    with pytest.raises(UserError, match="must be fitted"):
        decoder(pair64, "draft", "heterospec")


@pytest.mark.parametrize("name", ["eagle3", "draft"])
def test_a_draft_that_runs_seldom_catches_up(pair64, prompts, told, name, tmp_path: Path, tiny_recording: Path):
    """Lazy catch-up over several cycles: still the target's text, and still what replay says, cycle by cycle."""
    (tmp_path / "mine.py").write_text(EVERY_THIRD)
    spec = f"{tmp_path / 'mine.py'}:EveryThird"
    run = decoder(pair64, name, spec)
    done = run.generate(prompts, LIMIT)
    assert done.tokens == told
    recording = open_recording(tiny_recording)
    log = replay(recording, load_policy(spec), name, keep_trees=True)
    assert log.coverage == 1.0
    seen = []
    for sequence, length in enumerate(recording.length.tolist()):
        prompt = recording.prompt_tokens(sequence).tolist()
        run.generate([prompt], length, on_step=lambda step: seen.append((step.done.kept.token[0].tolist(), int(step.gained[0]))))
    recorded = [([t for t in kept if t >= 0], n) for kept, n in zip(log.kept_tokens.tolist(), log.emitted.tolist(), strict=True)]
    assert seen == recorded
    assert (log.catch_up.max() > 3) and int(log.accepted.sum()) > 0


def test_state_that_outlives_a_request_goes_on(pair64, prompts):
    """Scope "stream": what one request taught, the next one knows."""
    from policies.chain import Chain

    class Counting(Chain):
        scope = "stream"

        def init(self, rows, key):
            return {"cycles": torch.zeros(1, dtype=torch.int64)}

        def observe(self, outcome, cycle, state):
            return {"cycles": state["cycles"] + 1}

    run = SpeculativeDecoder(pair64.target(), pair64.networks["draft"], Counting(k=2), pair64.end_tokens)
    cycles = [run.generate([prompt], 8).cycles[0] for prompt in prompts[:3]]
    assert run.state["cycles"].tolist() == [sum(cycles)]


@pytest.mark.parametrize("name", ["eagle3", "draft"])
def test_a_policy_may_look_at_what_gave_the_root(pair64, prompts, told, name):
    from policies.chain import Chain

    seen: dict[tuple[int, int], tuple[float, float]] = {}

    class Looking(Chain):
        def expand(self, tree, cycle, state):
            for at in zip(cycle.sequence.tolist(), cycle.position.tolist(), strict=True):
                row = len(cycle.sequence) - len(cycle.sequence[cycle.sequence >= at[0]])
                seen[at] = float(cycle.root_entropy[row]), float(cycle.root_logprob[row])
            return super().expand(tree, cycle, state)

    SpeculativeDecoder(pair64.target(), pair64.networks[name], Looking(k=2), pair64.end_tokens).generate(prompts, LIMIT)
    assert len({text for text, _ in seen}) == len([text for text in told if len(text) > 1])
    for (text, position), (entropy, logprob) in seen.items():
        before = torch.tensor([[*prompts[text], *told[text][:position]]])
        with torch.inference_mode():
            wanted = torch.log_softmax(pair64.model(before).logits[0, -1], dim=-1)
        assert abs(entropy + float((wanted.exp() * wanted).sum())) < 1e-6
        assert abs(logprob - float(wanted[told[text][position]])) < 1e-6
