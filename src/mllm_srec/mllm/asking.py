"""Many questions behind one reading of each prefix: options are weighed in one packed tree, own words are written.

Every answer is what a prompt of its own would give: prefix + question + the words the answer begins with. The questions
are the same for all prefixes of a batch, so one layout serves them all, whatever the prefixes' lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mllm_srec.errors import ModelError
from mllm_srec.mllm.base import Answer, Picture, Prompt, Question, Request
from mllm_srec.mllm.packing import chunks, pack, padded_mask
from mllm_srec.mllm.rendering import Renderer

if TYPE_CHECKING:
    from mllm_srec.mllm.local import LocalMllm


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as tokens: all that stands between the prefix and the answer, and what each option adds."""

    segment: list[int]
    options: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens with the longest option, as they follow the prefix in a prompt of its own."""
        return len(self.segment) + max(map(len, self.options), default=0)

    @property
    def size(self) -> int:
        """Tokens in a packed row: the last token of an option foretells nothing that is asked for."""
        return len(self.segment) + sum(len(option) - 1 for option in self.options)


@dataclass(frozen=True)
class CachedPrefixes:
    """B prefixes in a cache, right-padded to P tokens."""

    cache: Any
    mask: torch.Tensor
    """int64 (B, P): 1 where a token of the prefix stands."""
    following: torch.Tensor
    """int64 (B,): position of what comes next, less than the number of tokens where a picture stands under M-RoPE."""


def ask(
    mllm: "LocalMllm", prefixes: Sequence[Prompt], questions: Sequence[Question], max_new_tokens: int
) -> list[list[Answer]]:
    """Every question to every prefix, in batches of `mllm.batch_size` prefixes, those with and without pictures apart.

    Own words are decoded greedily from the plain logits: penalties of the model's generation settings do not apply.

    Raises:
        ModelError: a prefix begins the answer; an option has no text, or is the beginning of another one; a prefix with
            its longest question and answer is longer than the model's context; the model's cache cannot be cut back to
            the prefix.
    """
    answers: list[list[Answer]] = [[] for _ in prefixes]
    if not questions:
        return answers
    # What follows the prefix is the model's own template: the same for nearly all prefixes, and told apart where not.
    groups: dict[tuple[bool, str, str], list[tuple[int, str]]] = {}
    for row, prefix in enumerate(prefixes):
        head, tail = mllm.renderer.split(Request(prefix, ()))
        text = head.rstrip(" ")  # spaces move to the question: tokens begin with them
        looking = any(isinstance(part, Picture) for part in prefix.parts)
        groups.setdefault((looking, head[len(text) :], tail), []).append((row, text))
    for (_, spaces, tail), members in groups.items():
        encoded = [encode_question(mllm.renderer, question, spaces, tail) for question in questions]
        longest = max(question.length + (0 if question.options else max_new_tokens) for question in encoded)
        for start in range(0, len(members), mllm.batch_size):
            batch = members[start : start + mllm.batch_size]
            pictures = [[part for part in prefixes[row].parts if isinstance(part, Picture)] for row, _ in batch]
            cached = read(mllm, [text for _, text in batch], pictures, longest)
            weighed = iter(weigh(mllm, cached, [question for question in encoded if question.options]))
            own_words = [question.segment for question in encoded if not question.options]
            at_once = max(1, mllm.batch_size // len(batch))
            written = (
                made
                for first in range(0, len(own_words), at_once)
                for made in write(mllm, cached, own_words[first : first + at_once], max_new_tokens)
            )
            for question in questions:
                made = [_chosen(question, values) for values in next(weighed)] if question.options else next(written)
                for (row, _), answer in zip(batch, made, strict=True):
                    answers[row].append(answer)
    return answers


def encode_question(renderer: Renderer, question: Question, spaces: str, tail: str) -> EncodedQuestion:
    """Tokens of a question; `spaces` ended the prefix, `tail` is the template's text behind the question.

    Raises:
        ModelError: an option has no text, or is the beginning of another one.
    """
    begun = renderer.lead + renderer.neutral(question.answer) if question.answer else ""
    asked = renderer.neutral(question.ask) + tail + begun
    if question.about:
        segment = renderer.ids(spaces + renderer.neutral(question.about)) + renderer.ids(asked)
    else:
        segment = renderer.ids(spaces + asked)
    lead = " " if question.answer else renderer.lead
    texts = [renderer.neutral(option) for option in question.options]
    options = [renderer.ids(lead + text) if text.strip() else [] for text in texts]
    if not all(options):
        raise ModelError(f"option number {options.index([])} of the question {question.ask.strip()!r} has no text")
    for (one, short), (other, long) in combinations(zip(question.options, options, strict=True), 2):
        shared = min(len(short), len(long))
        if short[:shared] == long[:shared]:
            raise ModelError(
                f"of the options {one!r} and {other!r} of the question {question.ask.strip()!r} one is the beginning "
                "of the other, and would always be the likelier: leave one out or reword it"
            )
    return EncodedQuestion(segment, options)


def read(
    mllm: "LocalMllm", texts: Sequence[str], pictures: Sequence[Sequence[Picture]], following: int
) -> CachedPrefixes:
    """Read a batch of prefixes once, `following` tokens at most to come; either every one has pictures or none."""
    inputs = mllm.on_device(mllm.renderer.encode(texts, pictures, "right"))
    mask = inputs["attention_mask"]
    mllm.renderer.check_length(int(mask.sum(1).max()) + following)
    positions = mllm.positions(inputs)
    cache, _ = mllm.fill_cache(inputs, positions)
    return CachedPrefixes(cache, mask, (positions * mask).amax(-1).view(-1, len(mask)).amax(0) + 1)


def weigh(mllm: "LocalMllm", cached: CachedPrefixes, questions: Sequence[EncodedQuestion]) -> list[np.ndarray]:
    """float32 (B, O_i) per question: log-likelihood of each option, summed over its tokens."""
    values = []
    for run in chunks([question.size for question in questions]):
        values += _weigh_packed(mllm, cached, [questions[i] for i in run])
    return values


def _weigh_packed(mllm: "LocalMllm", cached: CachedPrefixes, questions: Sequence[EncodedQuestion]) -> list[np.ndarray]:
    # An option's first token is foretold at its question's end, each further one at its predecessor, which stands in a
    # segment behind the question. `places` are the packed tokens that foretell something, each of them once;
    # `foretold_at` says for every token of every option which of them that is.
    segments: list[list[int]] = []
    parents: list[int] = []
    places: list[int] = []
    foretold_at: list[int] = []
    total = 0
    for question in questions:
        asked, end = len(segments), len(places)
        segments.append(question.segment)
        parents.append(-1)
        total += len(question.segment)
        places.append(total - 1)
        for option in question.options:
            inner = len(option) - 1
            foretold_at += [end, *range(len(places), len(places) + inner)]
            if inner:
                segments.append(option[:-1])
                parents.append(asked)
                places += range(total, total + inner)
                total += inner
    packed = pack(segments, parents)
    rows, device = len(cached.mask), mllm.device
    hidden = mllm.core(
        input_ids=packed.ids.expand(rows, -1).to(device),
        attention_mask=padded_mask(packed, cached.mask, mllm.model.dtype),
        position_ids=cached.following[:, None] + packed.place.to(device),
        cache=cached.cache,
        use_cache=True,
    ).last_hidden_state
    cached.cache.crop(-total)

    states = hidden[:, torch.tensor(places, device=device)]
    normalisers = mllm.normalisers(states.flatten(0, 1)).view(rows, -1)
    at = torch.tensor(foretold_at, device=device)
    tokens = [token for question in questions for option in question.options for token in option]
    wanted = torch.tensor(tokens, device=device).repeat(rows)
    logliks = mllm.own_logits(states[:, at].flatten(0, 1), wanted).view(rows, -1) - normalisers[:, at]
    of_options = torch.split(logliks, [len(option) for question in questions for option in question.options], 1)
    summed = torch.stack([part.sum(1) for part in of_options], 1).cpu()
    return [part.numpy() for part in torch.split(summed, [len(question.options) for question in questions], 1)]


def write(
    mllm: "LocalMllm", cached: CachedPrefixes, segments: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[Answer]]:
    """Greedy answers to every question behind every prefix, up to an end token or `max_new_tokens` tokens.

    One list of B answers per question. B times as many rows as questions are decoded at once, each behind its prefix's
    copy in the cache; the cache is left as it was.
    """
    prefixes, prefix_length = cached.mask.shape
    count, width = len(segments), max(map(len, segments))
    rows, device = prefixes * count, mllm.device
    if count > 1:
        cached.cache.batch_repeat_interleave(count)
    ends = torch.tensor(_end_ids(mllm), dtype=torch.long, device=device)
    lengths = torch.tensor([len(segment) for segment in segments], device=device).repeat(prefixes)
    padded = [[*segment, *[mllm.renderer.tokenizer.pad_token_id] * (width - len(segment))] for segment in segments]
    ids = torch.tensor(padded, device=device).repeat(prefixes, 1)
    new = (torch.arange(width, device=device) < lengths[:, None]).to(cached.mask.dtype)
    mask = cached.mask.repeat_interleave(count, 0)
    following = cached.following.repeat_interleave(count)
    written: list[list[int]] = [[] for _ in range(rows)]
    logliks: list[list[float]] = [[] for _ in range(rows)]
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        mask = torch.cat([mask, new], 1)
        hidden = mllm.core(
            input_ids=ids,
            attention_mask=mask,
            position_ids=following[:, None] + torch.arange(ids.shape[1], device=device),
            cache=cached.cache,
            use_cache=True,
        ).last_hidden_state[torch.arange(rows, device=device), lengths - 1]
        following = following + lengths
        logits = mllm.logits(hidden)
        chosen = logits.argmax(-1)
        told = mllm.own_logits(hidden, chosen) - logits.logsumexp(-1)
        ended |= torch.isin(chosen, ends)
        if ended.all():
            break
        for row, (token, value, over) in enumerate(zip(chosen.tolist(), told.tolist(), ended.tolist(), strict=True)):
            if not over:
                written[row].append(token)
                logliks[row].append(value)
        ids, lengths = chosen[:, None], torch.ones_like(lengths)
        new = torch.ones_like(ids, dtype=mask.dtype)
    cached.cache.crop(prefix_length - cached.cache.get_seq_length())
    if count > 1:
        cached.cache.batch_select_indices(torch.arange(0, rows, count, device=device))
    texts = mllm.renderer.tokenizer.batch_decode(written, skip_special_tokens=True)
    none = np.zeros(0, dtype=np.float32)
    answers = [
        Answer(text.strip(), float(np.mean(values, dtype=np.float32)) if values else 0.0, none)
        for text, values in zip(texts, logliks, strict=True)
    ]
    return [answers[number::count] for number in range(count)]


def _chosen(question: Question, logliks: np.ndarray) -> Answer:
    best = int(logliks.argmax())
    return Answer(question.options[best], float(logliks[best]), logliks)


def _end_ids(mllm: "LocalMllm") -> list[int]:
    of_model = mllm.model.generation_config.eos_token_id
    ids = {*(of_model if isinstance(of_model, list) else [of_model]), mllm.renderer.tokenizer.eos_token_id}
    return sorted(ids - {None})
