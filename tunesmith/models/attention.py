"""Attention for packs on a CPU, put under stock models through transformers' attention interface.

H query heads, K key heads, G = H / K, T tokens of the pack, D head size, W width of a tile.

A pack's mask is a tree of segments (layout.py). Every segment is cut into tiles of at most W tokens; a tile
of queries sees the tiles on its way to the root in full, and itself causally. Tiles that see equally many are
computed together, in batched products over tiles and key heads, so that the number of operations does not
grow with the number of documents, and no [T, T] is ever made.

Exponentials are taken against 0 and not against the row's maximum, which would cost as much as the product:
floating-point numbers have room for scores of +-80 either way. Where a model's scores are larger (the sums
tell), the maximum is found and everything done again. The backward pass makes the probabilities again from
the saved log-sum-exp. Three more columns in the product subtract it (its high and its low half, so that
nothing is lost in bfloat16) and hide what pads a tile.

Where native code serves (native/attention.cpp: bfloat16 on a processor that multiplies it, no soft-capping),
it computes the same without tiles. Accelerators have their own kernels: flex_attention.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.models.fused.linear import pass_dtype
from tunesmith.models.layout import PackLayout
from tunesmith.models.native import attention as native

NAME = "tunesmith_cpu"
_WIDTHS = (32, 64, 96, 128, 192, 256)
_TILE_COST = 3000  # of a tile, in cells of scores: what gathering and adding it costs
_CHUNK_CELLS = 2**20  # cells of scores a head that exist at once
_HIDDEN = -1e4  # a score's exponential is 0 below about -150
_LOG2_E = math.log2(math.e)


def use_packed_attention(model: Any) -> None:
    """Let a model that runs on the CPU with transformers' sdpa use this instead."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
    model.set_attn_implementation(NAME)


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    attention_mask: Tensor | None = None,
    **kw: Any,
) -> Tensor | None:
    """No mask for one pack, whose layout says it all; sdpa's for what sdpa computes (a cache, a padded
    batch)."""
    whole = attention_mask is None or bool(attention_mask.all())
    if batch_size == 1 and q_length == kv_length and whole:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kw)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: PackLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers' interface: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D].

    Without a `layout`, documents begin where positions begin again. A cache and a padded batch are the stock
    kernel's."""
    total = query.shape[2]
    if query.shape[0] != 1 or key.shape[2] != total or attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError("attention dropout inside packs is not supported; set attention_dropout to 0")
    if layout is None:
        layout = PackLayout.of_positions(position_ids, total)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Seen as [T, heads, D], the way projections wrote them. (Stock rotary embedding makes float32 of
    # bfloat16.)
    dtype = pass_dtype(query)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    if softcap is None and native.serves(q, k, v):
        return native.native_attention(q, k, v, layout, window=sliding_window, scale=scale)[None], None
    tiling = _Tiling.of(layout, sliding_window)
    output = _PackedAttention.apply(q, k, v, tiling, scale, softcap)  # type: ignore[no-untyped-call]
    return output[None], None


# --- the mask as tiles


@dataclass(frozen=True)
class _Group:
    """Tiles [start, end) of queries, which see m + 1 tiles of keys each, the last of which is the tile
    itself.

    seen [n * (m + 1)]: of each the tiles it sees, from the root; None for m = 0. hidden: pairs out of the
    sliding window, as a bool mask [n, 1, 1, W, (m + 1) * W], or None."""

    start: int
    end: int
    seen: Tensor | None
    hidden: Tensor | None


@dataclass(frozen=True)
class _Tiling:
    """N tiles of W tokens, in the order of `groups`.

    tokens [N, W]: the token in each place of each tile, any where there is none; places [T]: the place of
    each token among the N * W; pads: (tile, place) [2, X] of what is no token."""

    width: int
    tokens: Tensor
    places: Tensor
    pads: Tensor
    groups: tuple[_Group, ...]

    @cached_property
    def future(self) -> Tensor:
        """[W, W] bool: what lies behind the query in its own tile."""
        return torch.ones(self.width, self.width, dtype=torch.bool).triu_(1)

    @classmethod
    def of(cls, layout: PackLayout, window: int | None) -> _Tiling:
        """Of the widths, the one with the least to compute; kept with the layout for the other layers."""
        known: dict[int | None, _Tiling] = layout.__dict__.setdefault("_cpu_tilings", {})
        if window not in known:
            width, ways = min(((w, _ways(layout, w)) for w in _WIDTHS), key=lambda pair: _cost(*pair))
            known[window] = cls._build(layout, width, ways, window)
        return known[window]

    @classmethod
    def _build(cls, layout: PackLayout, width: int, ways: list[_Way], window: int | None) -> _Tiling:
        total = layout.num_tokens
        positions = layout.position_ids
        above = [way.above for way in ways]
        if window is not None:
            above = [
                [t for t in way.above if int(positions[way.start] - positions[ways[t].end - 1]) < window]
                for way in ways
            ]
        order = sorted(range(len(ways)), key=lambda tile: len(above[tile]))
        rank = {tile: i for i, tile in enumerate(order)}
        tokens = torch.full((len(ways), width), total)
        for i, tile in enumerate(order):
            start, end, _ = ways[tile]
            tokens[i, : end - start] = torch.arange(start, end)
        is_pad = tokens == total
        places = torch.empty(total, dtype=torch.int64)
        places[tokens[~is_pad]] = (~is_pad).flatten().nonzero()[:, 0]
        tokens.clamp_(max=total - 1)
        groups: list[_Group] = []
        while (start := groups[-1].end if groups else 0) < len(order):
            count = len(above[order[start]])
            end = start + max(1, _CHUNK_CELLS // ((count + 1) * width**2))
            end = next((i for i in range(start, min(end, len(order))) if len(above[order[i]]) != count), end)
            tiles = order[start : (end := min(end, len(order)))]
            seen = torch.tensor([[rank[t] for t in (*above[tile], tile)] for tile in tiles])
            hidden = None
            if window is not None:
                apart = positions[tokens[start:end]][:, :, None] - positions[tokens[seen]].flatten(1)[:, None]
                hidden = (apart >= window)[:, None, None] if bool((apart >= window).any()) else None
            groups.append(_Group(start, end, seen.flatten() if count else None, hidden))
        return cls(width, tokens, places, is_pad.nonzero().t(), tuple(groups))


class _Way(NamedTuple):
    """A tile: its first token, the one after its last, and the tiles between the root and it."""

    start: int
    end: int
    above: list[int]


def _ways(layout: PackLayout, width: int) -> list[_Way]:
    """The tiles of a layout for one width."""
    ways: list[_Way] = []
    open_segments: list[tuple[int, list[int]]] = []  # subtree's end, tiles from the root to the segment's end
    for segment in layout.segments:
        while open_segments and open_segments[-1][0] <= segment.start:
            open_segments.pop()
        above = open_segments[-1][1] if open_segments else []
        length = segment.end - segment.start
        count = -(-length // width)
        for i in range(count):
            start, end = (segment.start + length * j // count for j in (i, i + 1))
            ways.append(_Way(start, end, above))
            above = [*above, len(ways) - 1]
        if segment.subtree_end > segment.end:
            open_segments.append((segment.subtree_end, above))
    return ways


def _cost(width: int, ways: list[_Way]) -> int:
    return sum((len(above) + 1) * (width**2 + _TILE_COST) for _, _, above in ways)


# --- forward and backward


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tiling: _Tiling,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        pack = _Pack(tiling, scale, softcap, query.shape[1], key.shape[1])
        output, *tiles = pack.forward(query, key, value)
        ctx.save_for_backward(output, *tiles)
        ctx.pack = pack
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *ctx.pack.backward(grads[0], *ctx.saved_tensors), None, None, None


@dataclass(frozen=True)
class _Pack:
    """One attention layer over one pack.

    Tiles of queries are [N, H, W, E] and tiles of keys and values [N, K, W, E], with E = D + 3: the product
    carries three more columns."""

    tiling: _Tiling
    scale: float
    softcap: float | None
    heads: int
    key_heads: int

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query [T, H, D], key and value [T, K, D] -> output [T, H, D], and for the backward pass the tiles
        of queries (with the logarithm of their sums of exponentials in them), keys and values."""
        queries, keys, values = self._wide_tiles(query), self._wide_tiles(key), self._wide_tiles(value)
        size = query.shape[-1]
        self._set_query_columns(queries, None)
        self._set_key_columns(keys, _HIDDEN)
        self._set_key_columns(values, 0.0)
        outputs = query.new_empty(*queries.shape[:-1], size)
        sums = torch.empty(*queries.shape[:-1], 1, dtype=torch.float32, device=query.device)
        for group in self.tiling.groups:
            q, k, v = self._rows(queries, group), self._seen(keys, group), self._seen(values, group)
            output, total = self._rows(outputs, group), self._rows(sums, group)
            weights, _ = self._exponentials(q, k, group)
            torch.sum(weights, -1, keepdim=True, dtype=torch.float32, out=total)
            shift = None
            if not bool(((total > 1e-20) & (total < 1e30)).all()):
                shift = self._row_maxima(q, k, group)
                _set_halves(q, shift / -self.scale)
                weights, _ = self._exponentials(q, k, group)
                torch.sum(weights, -1, keepdim=True, dtype=torch.float32, out=total)
            torch.bmm(weights, v[..., :size], out=output)
            output.div_(total)
            total.log_()
            if shift is not None:
                total += shift
        self._set_query_columns(queries, sums.div_(-self.scale))
        return self._tokens(outputs), queries, keys, values

    def backward(
        self, doutput: Tensor, output: Tensor, queries: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value. The softmax's is p (dp - sum(p dp)), and sum(p dp) is
        sum(output doutput) over a row (Dao et al. 2022, arXiv:2205.14135, algorithm 4)."""
        size = doutput.shape[-1]
        dots = (output * doutput).sum(-1, keepdim=True, dtype=torch.float32).neg_()
        doutputs = self._wide_tiles(doutput)
        self._set_query_columns(doutputs, self._tiles(dots))
        dqueries = torch.empty_like(queries[..., :size], memory_format=torch.contiguous_format)
        dkeys, dvalues = (torch.zeros_like(keys[..., :size], dtype=torch.float32) for _ in range(2))
        for group in self.tiling.groups:
            q, dy = self._rows(queries, group), self._rows(doutputs, group)
            k, v = self._seen(keys, group), self._seen(values, group)
            weights, slope = self._exponentials(q, k, group)
            self._add_seen(dvalues, group, torch.bmm(weights.mT, dy[..., :size]))
            dscores = weights.mul_(torch.bmm(dy, v.mT))
            if slope is not None:
                dscores = dscores.mul_(slope)
            self._add_seen(dkeys, group, torch.bmm(dscores.mT, q[..., :size]))
            torch.bmm(dscores, k[..., :size], out=self._rows(dqueries, group))
        dquery = self._tokens(dqueries).mul_(self.scale)
        return dquery, *(self._tokens(d.to(output.dtype)) for d in (dkeys.mul_(self.scale), dvalues))  # type: ignore[return-value]

    # tokens to tiles and back

    def _tiles(self, x: Tensor) -> Tensor:
        """[T, heads, D] -> [N, heads, W, D]."""
        tiles = x.index_select(0, self.tiling.tokens.flatten())
        return tiles.view(-1, self.tiling.width, *x.shape[1:]).transpose(1, 2)

    def _wide_tiles(self, x: Tensor) -> Tensor:
        """[T, heads, D] -> [N, heads, W, E], of which the last three columns are yet to be written."""
        tiles = self._tiles(x)
        wide = x.new_empty(*tiles.shape[:-1], x.shape[-1] + 3)
        wide[..., :-3] = tiles
        return wide

    def _tokens(self, tiles: Tensor) -> Tensor:
        """[N, heads, W, D] -> [T, heads, D]."""
        return tiles.transpose(1, 2).flatten(0, 1).index_select(0, self.tiling.places)

    # the three columns: a number a row in two halves, and what hides a pad

    def _set_query_columns(self, queries: Tensor, numbers: Tensor | None) -> None:
        """Writes the numbers [N, H, W, 1] float32 (None for zeros), a column of ones, and zeros over what
        pads a tile."""
        if numbers is None:
            queries[..., -3:-1] = 0
        else:
            _set_halves(queries, numbers)
        queries[..., -1] = 1
        tile, place = self.tiling.pads
        queries[tile, :, place] = 0

    def _set_key_columns(self, keys: Tensor, hide: float) -> None:
        """Writes ones for the halves, and what is added to a score: nothing, or `hide` for what pads a
        tile."""
        keys[..., -3:-1] = 1
        keys[..., -1] = 0
        tile, place = self.tiling.pads
        keys[tile, :, place, -1] = hide

    # a group's share of the tiles

    def _rows(self, tiles: Tensor, group: _Group) -> Tensor:
        """A view [n * K, G * W, E] of [N, H, W, E], so that one product serves all query heads of a key
        head."""
        part = tiles[group.start : group.end]
        return part.view(part.shape[0] * self.key_heads, -1, tiles.shape[-1])

    def _seen(self, tiles: Tensor, group: _Group) -> Tensor:
        """[N, K, W, E] -> what each tile of the group sees [n * K, (m + 1) * W, E]."""
        if group.seen is None:
            return tiles[group.start : group.end].flatten(0, 1)
        heads, width, size = tiles.shape[1:]
        count = group.end - group.start
        seen = tiles.index_select(0, group.seen).view(count, -1, heads, width, size)
        return seen.transpose(1, 2).reshape(count * heads, -1, size)

    def _add_seen(self, total: Tensor, group: _Group, part: Tensor) -> None:
        """The reverse of `_seen`: adds [n * K, (m + 1) * W, D] to [N, K, W, D] float32."""
        heads, width, size = total.shape[1:]
        tiles = part.view(group.end - group.start, heads, -1, width, size)
        if group.seen is None:
            total[group.start : group.end] += tiles[:, :, 0]
        else:
            total.index_add_(0, group.seen, tiles.transpose(1, 2).flatten(0, 1).float())

    # scores

    def _exponentials(self, q: Tensor, k: Tensor, group: _Group) -> tuple[Tensor, Tensor | None]:
        """exp(scale q k^T) [n * K, G * W, (m + 1) * W] with zeros where nothing is seen, and the derivative
        that soft-capping puts on the scores (None without)."""
        slope = None
        if self.softcap is None:
            # Powers of two are cheaper than of e, and the factor is part of the product.
            scores = torch.baddbmm(q.new_zeros(1), q, k.mT, beta=0, alpha=self.scale * _LOG2_E).exp2_()
        else:
            scores, slope = _soft_capped(q, k, self.softcap, self.scale)
            scores = scores.exp_().to(q.dtype)
        self._hide(scores, group, 0.0)
        return scores, slope

    def _row_maxima(self, q: Tensor, k: Tensor, group: _Group) -> Tensor:
        """The largest score of each row [n * K, G * W, 1] float32."""
        if self.softcap is None:
            scores = torch.bmm(q, k.mT).float().mul_(self.scale)
        else:
            scores, _ = _soft_capped(q, k, self.softcap, self.scale)
        self._hide(scores, group, -math.inf)
        return scores.amax(-1, keepdim=True)

    def _hide(self, scores: Tensor, group: _Group, value: float) -> None:
        """Writes `value` where a query sees nothing."""
        width = self.tiling.width
        cells = scores.view(-1, self.key_heads, self.heads // self.key_heads, width, scores.shape[-1])
        own = cells[..., -width:]
        if value != 0:
            own.masked_fill_(self.tiling.future, value)
        elif group.seen is None:
            own.tril_()
        else:  # several times faster than tril_ inside a wider row; infinity times 0 would not be 0
            own.clamp_(max=1e30).mul_(~self.tiling.future)
        if group.hidden is not None:
            cells.masked_fill_(group.hidden, value)


def _set_halves(x: Tensor, numbers: Tensor) -> None:
    """Writes float32 numbers [..., 1] into columns -3 and -2 of x: the high half and what it leaves."""
    high = numbers.to(x.dtype)
    x[..., -3:-2] = high
    x[..., -2:-1] = numbers - high


def _soft_capped(q: Tensor, k: Tensor, cap: float, scale: float) -> tuple[Tensor, Tensor]:
    """cap tanh(s / cap) in float32 and its derivative; the extra columns stay outside of the tanh."""
    size = q.shape[-1] - 3
    tanh = torch.bmm(q[..., :size], k[..., :size].mT).float().mul_(scale / cap).tanh_()
    slope = 1 - tanh.square()
    rest = torch.bmm(q[..., size:].float(), k[..., size:].mT.float()).mul_(scale)
    return tanh.mul_(cap).add_(rest), slope
