"""The sequence encoder: a history of items, their vectors and the time between them becomes scores of the catalogue.

Causal self-attention as in SASRec (Kang & McAuley, ICDM 2018) with cross-entropy over the full catalogue (Klenitskiy &
Vasilev, RecSys 2023) and output embeddings tied to the input. An item is its id's embedding plus a projection of its
content vector; an item that no seen event holds has the projection alone, so it can be read and found at once.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mllm_srec.data.dataset import Histories, Queries
from mllm_srec.progress import Bar
from mllm_srec.store_files import atomic_write, fingerprint

VERSION = "1"
"""Changes whenever the same events would give another encoder."""
LENGTH = 100
"""Newest events that are read."""
WIDTH, HEADS, LAYERS, DROPOUT = 64, 2, 2, 0.2
GAPS = 14
"""Buckets of log2(1 + hours) since the event before; one more stands for "not known"."""
BLIND = 0.1
"""Share of training windows whose gaps are hidden, so that histories without times are read as well."""
UNNAMED = 0.1
"""Share of items per step that show their content alone, so that the projection can stand for an item that is new."""
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.01
AVERAGE = 0.99
"""The encoder is an exponential moving average of its weights by step, of fewer steps at first: as good as the best of
many epochs, after fewer, and the same from one look to the next."""
BATCH, LARGEST_BATCH = 64, 512
"""Windows per step: a 64th of them within these bounds."""
FULL_SOFTMAX, NEGATIVES = 10_000, 2048
"""Known items up to which the loss covers all of them, and items drawn per step above."""
ENCODED = 64
"""Histories encoded together: few, so that they are nearly of one length."""
CHECK_EVERY = 5
"""Epochs between two looks at validation."""

_HOUR = 3_600_000

Check = Callable[["SequenceEncoder", int], bool]
"""(encoder, epochs so far) -> whether to stop."""


class SequenceEncoder(nn.Module):
    """Fitted by `fit`; `queries` and `items` give the two sides of its inner product."""

    vectors: Tensor
    known: Tensor

    def __init__(self, vectors: np.ndarray, known: np.ndarray) -> None:
        """Args:
        vectors: float32 (I, D), the items' content.
        known: bool (I,), items that seen events hold.
        """
        super().__init__()
        self.register_buffer("vectors", torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32)), False)
        self.register_buffer("known", torch.from_numpy(np.ascontiguousarray(known)))
        self.name = nn.Embedding(len(known), WIDTH)
        self.content = nn.Linear(vectors.shape[1], WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.gap = nn.Embedding(GAPS + 1, WIDTH)
        for table in (self.name, self.position, self.gap):
            nn.init.normal_(table.weight, std=0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, DROPOUT, "gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self.bias = nn.Parameter(torch.zeros(len(known)))

    def embed(self, items: Tensor, named: Tensor | None = None) -> Tensor:
        """(N, WIDTH) of item positions (N,); `named` bool (I,) says whose ids count, by default the known items'."""
        counts = (self.known if named is None else named)[items, None]
        embedded: Tensor = self.name(items) * counts + self.content(self.vectors[items])
        return embedded

    def forward(self, items: Tensor, gaps: Tensor, lengths: Tensor, named: Tensor | None = None) -> Tensor:
        """(B, n, WIDTH): what stands at each event, from it and those before it.

        Args:
            items, gaps: int64 (B, n), padded at the end: no event sees what stands behind it.
            lengths: int64 (B,), events per row.
        """
        count = items.shape[1]
        different, place = torch.unique(items, return_inverse=True)
        embedded = self.embed(different, named)[place]
        back = (lengths[:, None] - 1 - torch.arange(count)).clamp(0, LENGTH - 1)
        hidden = self.dropout(embedded + self.position(back) + self.gap(gaps))
        mask = nn.Transformer.generate_square_subsequent_mask(count)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        normed: Tensor = self.norm(hidden)
        return normed

    @torch.no_grad()
    def queries(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """float32 (B, WIDTH + 1): each history's newest state and a one for the bias; zeros without events."""
        self.eval()
        of = Queries.of(histories)
        encoded = np.zeros((len(of), WIDTH + 1), dtype=np.float32)
        sizes = np.array([min(len(history), LENGTH) for history in of], dtype=np.int64)
        order = np.argsort(sizes, kind="stable")
        order = order[sizes[order] > 0]
        for start in range(0, len(order), ENCODED):
            rows = order[start : start + ENCODED]
            longest = int(sizes[rows].max())
            items = np.zeros((len(rows), longest), dtype=np.int64)
            gaps = np.full((len(rows), longest), GAPS, dtype=np.int64)
            for at, row in enumerate(rows.tolist()):
                size = sizes[row]
                items[at, :size] = of[row][-size:]
                if of.times is not None:
                    gaps[at, :size] = _gaps(of.times[row])[-size:]
            lengths = torch.from_numpy(sizes[rows])
            states = self(torch.from_numpy(items), torch.from_numpy(gaps), lengths)
            encoded[rows, :WIDTH] = states[torch.arange(len(rows)), lengths - 1].numpy()
            encoded[rows, WIDTH] = 1
        return encoded

    @torch.no_grad()
    def items(self) -> np.ndarray:
        """float32 (I, WIDTH + 1): item vectors and biases; score = query . item.

        An item that was never seen gets the mean bias of the others.
        """
        self.eval()
        vectors = self.name.weight * self.known[:, None] + self.content(self.vectors)
        mean = self.bias[self.known].mean() if self.known.any() else torch.zeros(())
        bias = torch.where(self.known, self.bias, mean)
        return torch.cat([vectors, bias[:, None]], 1).numpy()


def fit(
    histories: Histories,
    seen: np.ndarray,
    vectors: np.ndarray,
    epochs: int,
    seed: int,
    label: str = "retrieve",
    check: Check | None = None,
) -> SequenceEncoder:
    """An encoder of the events of mask `seen` (N,), after `epochs` epochs or when `check` says so.

    The same arguments give the same encoder (on one machine with one number of threads).
    """
    generator = np.random.default_rng(seed)
    item, gap, windows = _windows(histories, seen)
    popularity = np.bincount(item, minlength=len(histories.items))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SequenceEncoder(vectors, popularity > 0)
        averaged, steps = copy.deepcopy(encoder), 0
        averaged.vectors = encoder.vectors  # never changes: one copy is enough
        loss_of = _Loss(encoder, popularity)
        optimiser = torch.optim.AdamW(encoder.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        with Bar(f"{label}: sequence encoder, epochs", epochs) as bar:
            for epoch in range(1, epochs + 1):
                encoder.train()
                for batch in _batches(windows, generator):
                    loss = loss_of(*_padded(item, gap, batch, generator), generator)
                    optimiser.zero_grad()
                    torch.autograd.backward(loss)
                    optimiser.step()
                    steps += 1
                    _follow(averaged, encoder, min(AVERAGE, steps / (9 + steps)))
                bar.advance(1)
                if check and (epoch % CHECK_EVERY == 0 or epoch == epochs) and check(averaged, epoch):
                    break
    return averaged.eval()


@torch.no_grad()
def _follow(averaged: SequenceEncoder, encoder: SequenceEncoder, decay: float) -> None:
    for mean, newest in zip(averaged.parameters(), encoder.parameters(), strict=True):
        mean.lerp_(newest, 1 - decay)


class _Loss:
    """Mean cross-entropy of the next item over the known items; with many of them over a sample, corrected."""

    def __init__(self, encoder: SequenceEncoder, popularity: np.ndarray) -> None:
        self.encoder = encoder
        self.known = torch.from_numpy(np.flatnonzero(popularity))
        self.column = torch.zeros(len(popularity), dtype=torch.int64)
        self.column[self.known] = torch.arange(len(self.known))
        chance = popularity[popularity > 0] ** 0.75
        self.chance = chance / chance.sum()

    def __call__(self, items: Tensor, gaps: Tensor, lengths: Tensor, generator: np.random.Generator) -> Tensor:
        """items int64 (B, n + 1) hold the targets too; gaps (B, n) and lengths (B,) are of what is read."""
        named = self.encoder.known & torch.from_numpy(generator.random(len(self.encoder.known)) >= UNNAMED)
        states = self.encoder(items[:, :-1], gaps, lengths, named)
        inside = torch.arange(gaps.shape[1]) < lengths[:, None]
        states, targets = states[inside], items[:, 1:][inside]
        if len(self.known) <= FULL_SOFTMAX:
            logits = states @ self.encoder.embed(self.known, named).T + self.encoder.bias[self.known]
            return nn.functional.cross_entropy(logits, self.column[targets])
        drawn = generator.choice(len(self.chance), NEGATIVES, p=self.chance)
        return sampled_loss(
            states,
            targets,
            self.known[drawn],
            torch.from_numpy(np.log(NEGATIVES * self.chance[drawn])).float(),
            lambda of: (self.encoder.embed(of, named), self.encoder.bias[of]),
        )


def sampled_loss(
    states: Tensor,
    targets: Tensor,
    drawn: Tensor,
    log_expected: Tensor,
    outputs: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Mean of log(exp f(target) + sum over drawn items other than it of exp f(item) / expected) - f(target).

    The sum estimates the partition function without bias: an item drawn with probability q in each of n draws counts
    1 / (n q) (importance sampling; Bengio & Senécal, 2008).

    Args:
        states: (M, W). targets: int64 (M,). drawn: int64 (n,). log_expected: (n,), log(n q) of the drawn items.
        outputs: item positions (N,) -> their vectors (N, W) and biases (N,).
    """
    different, place = torch.unique(targets, return_inverse=True)
    vectors, bias = outputs(different)
    own = (states * vectors[place]).sum(1) + bias[place]
    vectors, bias = outputs(drawn)
    others = states @ vectors.T + (bias - log_expected)
    others = others.masked_fill(targets[:, None] == drawn, -torch.inf)
    return (torch.logaddexp(own, others.logsumexp(1)) - own).mean()


# Events as windows


def _windows(histories: Histories, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The seen events' items and gaps, flat by user, and windows [start, stop) of them, int64 (W, 2).

    A window is what is read, up to LENGTH events, and the target of its last; from the newest back, so that every event
    but a user's first is a target once.
    """
    owner = np.repeat(np.arange(len(histories.users)), np.diff(histories.offsets))[seen]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(histories.users)))])
    item = histories.item[seen].astype(np.int64)
    if histories.time is None:
        gap = np.full(len(item), GAPS, dtype=np.int64)
    else:
        gap = _gaps(histories.time[seen])
        gap[offsets[:-1][np.diff(offsets) > 0]] = GAPS
    windows = [
        (max(start, end - LENGTH - 1), end)
        for start, stop in pairwise(offsets.tolist())
        for end in range(stop, start + 1, -LENGTH)
    ]
    return item, gap, np.array(windows, dtype=np.int64).reshape(-1, 2)


def _gaps(times: np.ndarray) -> np.ndarray:
    """int64 (n,): buckets of the time since the event before, from ms; the first has none."""
    hours = np.diff(times).clip(0) / _HOUR
    buckets = np.minimum(np.log2(1 + hours).astype(np.int64), GAPS - 1)
    return np.concatenate([np.full(min(len(times), 1), GAPS, dtype=np.int64), buckets])


def _batches(windows: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """All windows once in random order; those of one batch are of like length, since padding costs as events do."""
    size = min(max(len(windows) // 64, BATCH), LARGEST_BATCH)
    order = generator.permutation(len(windows))
    lengths = windows[:, 1] - windows[:, 0]
    batches = []
    for start in range(0, len(order), 16 * size):
        part = order[start : start + 16 * size]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[at : at + size] for at in range(0, len(part), size)]
    for number in generator.permutation(len(batches)):
        yield windows[batches[number]]


def _padded(
    item: np.ndarray, gap: np.ndarray, windows: np.ndarray, generator: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Items (B, n + 1) with the targets, gaps (B, n) and lengths (B,) of what is read."""
    lengths = windows[:, 1] - windows[:, 0]
    at = np.minimum(windows[:, :1] + np.arange(lengths.max()), windows[:, 1:] - 1)
    gaps = gap[at[:, :-1]]
    gaps[generator.random(len(windows)) < BLIND] = GAPS
    return torch.from_numpy(item[at]), torch.from_numpy(gaps), torch.from_numpy(lengths - 1)


# Files


def made_of(histories: Histories, seen: np.ndarray, vectors: np.ndarray, seed: int) -> str:
    """Fingerprint of what an encoder depends on besides the number of epochs."""
    times = b"" if histories.time is None else histories.time[seen].tobytes()
    owner = np.repeat(np.arange(len(histories.users)), np.diff(histories.offsets))[seen]
    return fingerprint(
        VERSION, seed, len(histories.items), owner.tobytes(), histories.item[seen].tobytes(), times, vectors.tobytes()
    )


def write(encoder: SequenceEncoder, file: Path, mark: str, epochs: int) -> None:
    """Store the weights with what they were made of."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    vectors = fingerprint(encoder.vectors.numpy().tobytes())
    told = {"made_of": mark, "epochs": epochs, "vectors": vectors}
    atomic_write(file, save(tensors, {"encoder": json.dumps(told)}))  # one key: several would be in random order


def load(file: Path, vectors: np.ndarray, mark: str | None = None, epochs: int | None = None) -> SequenceEncoder | None:
    """The stored encoder; None if there is none, it is damaged, is of another catalogue or was made of something else.

    `mark` and `epochs` are not compared where they are None.
    """
    try:
        with safe_open(file, "pt") as stored:
            told = json.loads((stored.metadata() or {}).get("encoder", "{}"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except (FileNotFoundError, SafetensorError):
        return None
    if (mark is not None and told.get("made_of") != mark) or (epochs is not None and told.get("epochs") != epochs):
        return None
    if told.get("vectors") != fingerprint(np.ascontiguousarray(vectors, dtype=np.float32).tobytes()):
        return None
    encoder = SequenceEncoder(vectors, tensors["known"].numpy())
    encoder.load_state_dict(tensors)
    return encoder.eval()
