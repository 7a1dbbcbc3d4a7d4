"""ChunkLLM: which chunks are read is decided when a chunk ends, and holds until the next one does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tilewise.attention.api import attend
from tilewise.attention.gates.chunks import ChunkAdapters, hidden_keys
from tilewise.attention.gates.sizes import check_sizes, positive
from tilewise.attention.method import Method
from tilewise.attention.plans import Pass, Plan
from tilewise.attention.recipes.dhsa import parents, pieces
from tilewise.tiles import NONE, Causal, Partial, TileMap, Tiling, Visibility

TILE = 32  # tokens computed together: a fixed size, so that the length of a later chunk changes no earlier rounding


@dataclass(eq=False)
class ChunkState:
    """What decoding carries from token to token, for one layer and one sequence.

    Attributes:
        length: tokens so far. starts: where chunks begin, the running one last.
        keys: mean features of complete chunks `[1, C, H_kv D]`. running: sum of the running chunk's key features
        `[1, H_kv D]`. recent: features of the last keys, as many as the chunk adapter sees, `[1, W, H_kv D]`.
        chosen: complete chunks that are read, int64 `[K]`. refreshes: how often a choice was made.
    """

    length: int
    starts: list[int]
    keys: Tensor
    running: Tensor
    recent: Tensor
    chosen: Tensor
    refreshes: int = 0


@dataclass(frozen=True)
class ChunkLLM(Method):
    """Chunk selection refreshed at chunk ends only (Ouyang et al., 2025, arXiv 2510.02361).

    `ChunkAdapters`, trained beside the frozen model by `chunk_lesson` and `chunk_loss`, tell where a chunk ends and
    how much complete chunks matter to a token. When a chunk ends, its last token's query chooses the `top_k`
    complete chunks that the tokens of the next chunk read, beside their own chunk. Tokens of a chunk look at much
    the same chunks, so this costs little recall and saves all other choices. All heads read the same chunks.

    A prompt is read in the same way, all at once: `plan` gives it as tiles of chunks by chunks. Token by token,
    `start` and `step` do the same with a `ChunkState`, whose `refreshes` counts the choices, and so does a patched
    model that is told to decode with it, `patch(model, methods, decode=methods)`. Made for causal masks; under
    others, chunks that a mask shows ahead can be chosen as well.

    Differs from the paper: ends are told from the layer's own keys, as a method sees no hidden states, so layers
    may cut differently where the authors' bottom layer cuts for all; a chunk's key is the mean of its tokens' keys
    before the adapter; a chunk ends at `longest` tokens at the latest.

    Args:
        adapters: of the layer. top_k: complete chunks that are read. threshold: probability above which a chunk
        ends.
        longest: tokens. every: choose anew for every token, among the chunks complete by then: the control; it
        reads prompts only.
        state: what decoding goes on from, filled in by `with_state`.

    How many chunks there are is known once the adapters ran, so a graph of `torch.compile` can hold a plan made
    before, but not the choice. Raises ValueError for that, for other settings, for several queries that are not a
    whole prompt, for one without the state of the tokens before it, and when the adapters are for other sizes.
    """

    adapters: ChunkAdapters
    top_k: int = 16
    threshold: float = 0.5
    longest: int = 256
    every: bool = False
    state: ChunkState | None = field(default=None, repr=False, compare=False)
    modes = ("train", "prefill", "decode")
    carries = True
    reads = "q, k, trained weights"
    needs = "trained adapters"

    def __post_init__(self) -> None:
        positive(top_k=self.top_k, longest=self.longest)
        if not isinstance(self.adapters, ChunkAdapters):
            raise TypeError(
                f"adapters must be the ChunkAdapters of a layer, got {type(self.adapters).__name__}"
            )
        if not isinstance(self.threshold, (int, float)) or not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold!r}")

    def plan(self, q: Tensor, k: Tensor, view: Visibility, scale: float) -> Plan:
        n = k.shape[2]
        check_sizes(self.adapters, q, k)
        if q.shape[2] == 1 < n:
            return self._plan_next(n, view)
        if q.shape[2] != n:
            raise ValueError(
                f"ChunkLLM reads whole prompts, or with a state one token: {q.shape[2]} queries, {n} keys"
            )
        if torch.compiler.is_compiling():
            raise ValueError(
                "ChunkLLM cannot be compiled, as it cuts where its adapters say; make a plan before and give attend"
                " that"
            )
        if not n:
            return Plan((Pass(view),), view)
        bounds, keys = self._cut(k, view)
        chunks = Tiling.from_bounds(bounds)
        means = chunks.mean(keys.unsqueeze(1))[0][:, 0]
        queries = self.adapters.features(q, view.q_pos)
        own = torch.arange(bounds.shape[-1] - 1, device=q.device)
        if self.every:
            rows, mine = Tiling(1), chunks.ids(n, q.device)[:, 0]  # [b, n]
        else:  # the last token of the chunk before chooses; the first chunk has none before it
            rows, mine = chunks, own.unsqueeze(0)
            queries = queries.gather(
                1, (bounds[:, 0, :-1, None] - 1).clamp(min=0).expand(-1, -1, queries.shape[2])
            )
        with torch.no_grad():
            scores = self.adapters.scores(queries, means).unsqueeze(1)
        seen = (view.tiles(rows, chunks) != NONE).any(1, keepdim=True)
        running = (own == mine.unsqueeze(-1)).unsqueeze(1)
        keep = best(scores, seen & ~running, self.top_k) | running
        finer = pieces(bounds, n, TILE, equal=False)
        columns = Tiling(TILE, finer)
        keep = keep.gather(3, parents(bounds, finer).unsqueeze(2).expand(-1, -1, keep.shape[2], -1))
        if not self.every:
            rows = columns
            keep = keep.gather(2, parents(bounds, finer).unsqueeze(3).expand(-1, -1, -1, keep.shape[3]))
        return Plan((Pass(view, TileMap(keep, rows, columns)),), view)

    def chunks(self, k: Tensor, view: Visibility) -> Tensor:
        """Where the keys are cut, int64 `[B, 1, C + 1]`; chunks at the end may be empty."""
        return self._cut(k, view)[0]

    def _plan_next(self, n: int, view: Visibility) -> Plan:
        """The plan of the token n - 1: the chosen chunks and the running one."""
        state = self.state
        if state is None or self.every or state.length != n - 1:
            has = "none" if state is None else f"that of {state.length}"
            raise ValueError(
                f"ChunkLLM decodes with the state of the {n - 1} tokens before, and without every=True; it has"
                f" {has}"
            )
        chunks = Tiling.from_bounds(torch.tensor([*state.starts, n], device=view.pos.device))
        keep = torch.zeros(1, 1, 1, len(state.starts), dtype=torch.bool, device=view.pos.device)
        keep[..., -1] = True
        keep[..., state.chosen] = True
        return Plan((Pass(view, TileMap(keep, Tiling(1), chunks)),), view)

    def with_state(self, state: ChunkState | None) -> ChunkLLM:
        return replace(self, state=state)

    def start(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ChunkState]:
        """Read a prompt under a causal mask: the output `[1, H_q, N, D_v]` and the state behind it, N >= 1.

        Raises ValueError for more than one sequence: they end chunks at different times.
        """
        view = Causal().bind(k.shape[2], k.shape[2], device=k.device)
        state = self.carry(q, k, view, None)
        return _out(attend(q, k, v, self, mask="causal")), state

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: ChunkState) -> Tensor:
        """One token more: `q [1, H_q, 1, D]` and all keys and values, its own last. Changes the state.

        Returns `[1, H_q, 1, D_v]`: attention over the chosen chunks and the running one.
        """
        out = attend(q, k, v, self.with_state(state), mask="causal")
        self.carry(q, k, Causal().bind(1, k.shape[2], device=k.device), state)
        return _out(out)

    def carry(self, q: Tensor, k: Tensor, view: Visibility, state: ChunkState | None) -> ChunkState:
        """The state behind a whole prompt, or changed by one token more. Raises ValueError for several sequences,
        for padding, and when tokens are missing in between."""
        n = k.shape[2]
        if (
            k.shape[0] != 1
            or not n
            or not torch.equal(view.k_pos.flatten(), torch.arange(n, device=k.device))
        ):
            raise ValueError(
                f"a state is that of one sequence of at least one token, without padding, got {list(k.shape)}"
            )
        if state is not None and state.length + 1 == n:
            new = self.adapters.features(k[:, :, -1:], view.k_pos[..., -1:])
            state.running = state.running + new[:, 0]
            state.recent = torch.cat([state.recent, new], 1)[:, -self.adapters.window :]
        elif q.shape[2] == n:
            state = self._begin(q, k, view)
        else:
            raise ValueError(
                f"a state goes on token by token, this is token {n} after {state and state.length}"
            )
        state.length = n
        self._close(q[:, :, -1:], n, state)
        return state

    def _begin(self, q: Tensor, k: Tensor, view: Visibility) -> ChunkState:
        """The state before the last token of a prompt may end its chunk."""
        bounds, keys = self._cut(k, view)
        starts = bounds[0, 0, :-1].tolist()
        state = ChunkState(
            k.shape[2],
            starts,
            keys[:, :0],
            keys[:, starts[-1] :].sum(1),
            keys[:, -self.adapters.window :],
            torch.zeros(0, dtype=torch.int64, device=k.device),
        )
        if len(starts) > 1:
            state.keys = Tiling.from_bounds(bounds).mean(keys.unsqueeze(1))[0][:, 0, :-1]
            last = slice(starts[-1] - 1, starts[-1])
            self._refresh(self.adapters.features(q[:, :, last], view.q_pos[..., last]), state)
            state.refreshes = len(starts) - 1
        return state

    def _close(self, q: Tensor, n: int, state: ChunkState) -> None:
        """End the running chunk with the token n - 1, whose query is `q`, if it ends there; then choose anew."""
        with torch.no_grad():
            logit = self.adapters.ends(state.recent)[0, -1]
        length = n - state.starts[-1]
        if not (length >= self.longest or bool(logit.sigmoid() > self.threshold)):
            return
        state.keys = torch.cat([state.keys, (state.running / length).unsqueeze(1)], 1)
        state.running = torch.zeros_like(state.running)
        state.starts.append(n)
        self._refresh(self.adapters.features(q, torch.full((1, 1, 1), n - 1, device=q.device)), state)

    @torch.no_grad()
    def _refresh(self, query: Tensor, state: ChunkState) -> None:
        scores = self.adapters.scores(query, state.keys)[0, 0]
        state.chosen = scores.topk(min(self.top_k, len(scores))).indices.sort().values
        state.refreshes += 1

    def _cut(self, k: Tensor, view: Visibility) -> tuple[Tensor, Tensor]:
        """Bounds of the chunks int64 `[B, 1, C + 1]`, and key features `[B, N, H_kv D]`."""
        n = k.shape[2]
        keys = self.adapters.features(k, view.k_pos, hidden_keys(view))
        with torch.no_grad():
            ends = self.adapters.ends(keys)[:, : n - 1].sigmoid() > self.threshold
        at = torch.arange(1, n, device=k.device).expand_as(ends).masked_fill(~ends, n).sort(-1).values
        at = at[:, : int(ends.sum(-1).max()) if n > 1 else 0]
        bounds = pad(pad(at, (1, 0), value=0), (0, 1), value=n).unsqueeze(1)
        return pieces(bounds, n, self.longest, equal=False), keys


def _out(found: Tensor | Partial) -> Tensor:
    return found.out if isinstance(found, Partial) else found


def best(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """The `count` best of each row of `among`, bool as `scores`."""
    among = among.expand_as(scores)
    ranked = scores.masked_fill(~among, -torch.inf)
    top = ranked.topk(min(count, scores.shape[-1]), -1).indices
    return torch.zeros_like(among).scatter(-1, top, True) & among
