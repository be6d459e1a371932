"""Attention for packs on a CPU, put under stock models through transformers' attention interface.

H query heads, K key heads, G = H / K, T tokens of the pack, D head size, W width of a tile.

A pack's mask is a tree of segments (layout.py). Every segment is cut into tiles of at most W tokens; a tile of
queries sees the tiles on its way to the root in full, and itself causally. Tiles that see equally many are computed
together, in batched products over tiles and key heads, so that the number of operations does not grow with the
number of documents, and no [T, T] is ever made.

Exponentials are taken against 0 and not against the row's maximum, which would cost as much as the product: floating
-point numbers have room for scores of +-80 either way. Where a model's scores are larger (the sums tell), the
maximum is found and everything done again. The backward pass makes the probabilities again from the saved
log-sum-exp. Three more columns in the product subtract it (its high and its low half, so that nothing is lost in
bfloat16) and hide what pads a tile.

Accelerators have their own kernels: flex_attention.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.models.layout import PackLayout

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
    batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: Tensor | None = None, **kw: Any
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
        layout = _layout_of_positions(position_ids, total)
    tiling = _Tiling.of(layout, sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Seen as [T, heads, D], the way projections wrote them.
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _PackedAttention.apply(q, k, v, tiling, scale, softcap)[None], None


def _layout_of_positions(position_ids: Tensor | None, total: int) -> PackLayout:
    if position_ids is None:
        return PackLayout.of_lengths([total])
    known: PackLayout | None = getattr(position_ids, "_tunesmith_layout", None)  # every layer asks again
    if known is not None and known.num_tokens == total:
        return known
    starts = (position_ids.reshape(-1, total)[0].diff(prepend=position_ids.new_tensor([-2])) != 1).nonzero()
    bounds = [*starts[:, 0].tolist(), total]
    layout = PackLayout.of_lengths([end - start for start, end in zip(bounds, bounds[1:], strict=False)])
    position_ids._tunesmith_layout = layout  # type: ignore[attr-defined]
    return layout


# --- the mask as tiles


@dataclass(frozen=True)
class _Group:
    """n tiles of queries that see m + 1 tiles of keys each, the last of which is the tile itself.

    tiles [n]: which; seen [n * (m + 1)]: of each the tiles it sees, from the root; hidden: pairs out of the
    sliding window, as a bool mask [n, 1, 1, W, (m + 1) * W], or None."""

    tiles: Tensor
    seen: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class _Tiling:
    """tokens [N, W]: the token in each place of each tile, T where there is none. groups: what sees what."""

    num_tokens: int
    width: int
    tokens: Tensor
    groups: tuple[_Group, ...]

    @cached_property
    def places(self) -> Tensor:
        """[T] the place of each token among the N * W."""
        flat = self.tokens.flatten()
        places = torch.empty(self.num_tokens + 1, dtype=torch.int64)
        places[flat] = torch.arange(len(flat))
        return places[:-1]

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
        tokens = torch.full((len(ways), width), total)
        for tile, (start, end, _) in enumerate(ways):
            tokens[tile, : end - start] = torch.arange(start, end)
        positions = torch.cat([layout.position_ids, torch.tensor([-1])])[tokens]
        by_count: dict[int, list[tuple[int, list[int]]]] = {}
        for tile, (_, _, above) in enumerate(ways):
            first = int(positions[tile, 0])
            if window is not None:
                above = [t for t in above if first - int(positions[t].max()) < window]
            by_count.setdefault(len(above), []).append((tile, [*above, tile]))
        groups = []
        for count, members in sorted(by_count.items()):
            step = max(1, _CHUNK_CELLS // ((count + 1) * width**2))
            for at in range(0, len(members), step):
                tiles = torch.tensor([tile for tile, _ in members[at : at + step]])
                seen = torch.tensor([seen for _, seen in members[at : at + step]])
                hidden = None
                if window is not None:
                    apart = positions[tiles][:, :, None] - positions[seen].flatten(1)[:, None]
                    hidden = (apart >= window)[:, None, None]
                groups.append(_Group(tiles, seen.flatten(), hidden if window and hidden.any() else None))  # type: ignore[union-attr]
        return cls(total, width, tokens, tuple(groups))


# A tile: its first token, the one after its last, and the tiles between the root and it.
_Way = tuple[int, int, list[int]]


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
            ways.append((segment.start + length * i // count, segment.start + length * (i + 1) // count, above))
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
        output, log_sum = pack.forward(query, key, value)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.pack = pack
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *ctx.pack.backward(grads[0], *ctx.saved_tensors), None, None, None


@dataclass(frozen=True)
class _Pack:
    """One attention layer over one pack: query [T, H, D], key and value [T, K, D].

    E = D + 3: what is multiplied carries three more columns."""

    tiling: _Tiling
    scale: float
    softcap: float | None
    heads: int
    key_heads: int

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output [T, H, D] and the logarithm of each query's sum of exponentials [T, H, 1] float32."""
        keys, values = self._key_tiles(_key_columns(key)), self._key_tiles(value)
        queries = _query_columns(query, None)
        outputs: list[Tensor] = []
        sums: list[Tensor] = []
        for group in self.tiling.groups:
            q, k, v = self._rows(queries, group), _seen(keys, group), _seen(values, group)
            weights, _ = self._exponentials(q, k, group)
            total = weights.sum(-1, keepdim=True, dtype=torch.float32)
            shift = 0.0
            if not bool(((total > 1e-20) & (total < 1e30)).all()):
                shift = self._row_maxima(q, k, group)
                weights, _ = self._exponentials(_shifted(q, shift / -self.scale), k, group)
                total = weights.sum(-1, keepdim=True, dtype=torch.float32)
            outputs.append(self._tokens_first(torch.bmm(weights, v).div_(total), self.heads))
            sums.append(self._tokens_first(total.log_().add_(shift), self.heads))
        return self._at_tokens(outputs), self._at_tokens(sums)

    def backward(
        self, doutput: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value. The softmax's is p (dp - sum(p dp)), and sum(p dp) is
        sum(output doutput) over a row (Dao et al. 2022, arXiv:2205.14135, algorithm 4)."""
        size = query.shape[-1]
        dots = (output * doutput).sum(-1, keepdim=True, dtype=torch.float32)
        queries, doutputs = _query_columns(query, log_sum / -self.scale), _query_columns(doutput, -dots)
        keys, values = self._key_tiles(_key_columns(key)), self._key_tiles(_key_columns(value, hide=0.0))
        dqueries: list[Tensor] = []
        dkeys = torch.zeros_like(keys[..., :size], dtype=torch.float32)
        dvalues = torch.zeros_like(dkeys)
        for group in self.tiling.groups:
            q, dout = self._rows(queries, group), self._rows(doutputs, group)
            k, v = _seen(keys, group), _seen(values, group)
            weights, slope = self._exponentials(q, k, group)
            _add_seen(dvalues, group, torch.bmm(weights.mT, dout[..., :size]))
            dscores = weights.mul_(torch.bmm(dout, v.mT))
            if slope is not None:
                dscores = dscores.mul_(slope)
            _add_seen(dkeys, group, torch.bmm(dscores.mT, q[..., :size]))
            dqueries.append(self._tokens_first(torch.bmm(dscores, k[..., :size]), self.heads))
        dquery = self._at_tokens(dqueries).mul_(self.scale)
        dkey, dvalue = (self._key_tokens(d, query.dtype) for d in (dkeys.mul_(self.scale), dvalues))
        return dquery, dkey, dvalue

    # tiles of queries: [n * K, G * W, E], so that one product serves all query heads of a key head

    def _rows(self, x: Tensor, group: _Group) -> Tensor:
        """[T + 1, H, E] -> the tiles of a group."""
        tokens = self.tiling.tokens[group.tiles].flatten()
        tiles = x.index_select(0, tokens).view(len(group.tiles), -1, self.key_heads, self._per_key, x.shape[-1])
        return tiles.permute(0, 2, 3, 1, 4).reshape(-1, self._per_key * self.tiling.width, x.shape[-1])

    def _tokens_first(self, tiles: Tensor, heads: int) -> Tensor:
        """Tiles of a group -> [n, W, H, D]."""
        return tiles.view(-1, heads, self.tiling.width, tiles.shape[-1]).transpose(1, 2)

    def _at_tokens(self, tiles: list[Tensor]) -> Tensor:
        """The groups' [n, W, H, D] -> [T, H, D]."""
        places = self._places_in_groups
        return torch.cat(tiles).flatten(0, 1).index_select(0, places)

    @property
    def _places_in_groups(self) -> Tensor:
        """[T] the place of each token when the groups' tiles lie one after another."""
        known: Tensor | None = self.tiling.__dict__.get("_places_in_groups")
        if known is None:
            order = torch.cat([group.tiles for group in self.tiling.groups])
            rank = torch.empty_like(order)
            rank[order] = torch.arange(len(order))
            tile, place = self.tiling.places // self.tiling.width, self.tiling.places % self.tiling.width
            known = self.tiling.__dict__["_places_in_groups"] = rank[tile] * self.tiling.width + place
        return known

    # tiles of keys: [N, K, W, E]

    def _key_tiles(self, x: Tensor) -> Tensor:
        """[T (+ 1), K, E] -> all tiles."""
        tokens = self.tiling.tokens.flatten()
        if len(x) == self.tiling.num_tokens:  # what pads a tile is never seen
            tokens = tokens.clamp(max=len(x) - 1)
        tiles = x.index_select(0, tokens).view(-1, self.tiling.width, self.key_heads, x.shape[-1])
        return tiles.transpose(1, 2).contiguous()

    def _key_tokens(self, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        """All tiles [N, K, W, D] -> [T, K, D]."""
        return tiles.to(dtype).transpose(1, 2).flatten(0, 1).index_select(0, self.tiling.places)

    @property
    def _per_key(self) -> int:
        return self.heads // self.key_heads

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
        cells = scores.view(-1, self.key_heads, self._per_key, width, scores.shape[-1])
        own = cells[..., -width:]
        if value == 0:
            own.tril_()
        else:
            own.masked_fill_(torch.ones(width, width, dtype=torch.bool).triu_(1), value)
        if group.hidden is not None:
            cells.masked_fill_(group.hidden, value)


def _seen(tiles: Tensor, group: _Group) -> Tensor:
    """Keys of all tiles [N, K, W, E] -> those each tile of the group sees [n * K, (m + 1) * W, E]."""
    heads, width, size = tiles.shape[1:]
    seen = tiles.index_select(0, group.seen)
    if len(group.seen) == len(group.tiles):
        return seen.flatten(0, 1)
    return seen.view(len(group.tiles), -1, heads, width, size).transpose(1, 2).reshape(-1, seen.shape[0] // len(group.tiles) * width, size)  # fmt: skip


def _add_seen(total: Tensor, group: _Group, part: Tensor) -> None:
    """The reverse of `_seen`: adds [n * K, (m + 1) * W, D] to [N, K, W, D] float32."""
    heads, width, size = total.shape[1:]
    tiles = part.view(len(group.tiles), heads, -1, width, size).transpose(1, 2)
    total.index_add_(0, group.seen, tiles.flatten(0, 1).float())


def _query_columns(x: Tensor, column: Tensor | None) -> Tensor:
    """[T, H, D] -> [T + 1, H, E]: a number a row (float32 [T, H, 1]) in two columns, high half and low half,
    a column of ones, and a row of zeros for what pads a tile."""
    total, heads, size = x.shape
    wide = x.new_zeros(total + 1, heads, size + 3)
    wide[:total, :, :size] = x
    wide[..., -1] = 1
    if column is not None:
        wide[:total, :, size : size + 1] = column
        if x.dtype != torch.float32:
            wide[:total, :, size + 1 : size + 2] = column - wide[:total, :, size : size + 1].float()
    return wide


def _key_columns(x: Tensor, hide: float = _HIDDEN) -> Tensor:
    """[T, K, D] -> [T + 1, K, E], to be multiplied by `_query_columns`: ones for the halves, and in the last
    column what is added to a score: nothing, or for what pads a tile so little that its exponential is 0."""
    total, heads, size = x.shape
    wide = x.new_zeros(total + 1, heads, size + 3)
    wide[:total, :, :size] = x
    wide[:total, :, size : size + 2] = 1
    wide[total, :, -1] = hide
    return wide


def _shifted(q: Tensor, column: Tensor) -> Tensor:
    """Tiles of queries with a number a row (float32) in the two columns kept for it."""
    q = q.clone()
    q[..., -3:-2] = column
    q[..., -2:-1] = column - q[..., -3:-2].float()
    return q


def _soft_capped(q: Tensor, k: Tensor, cap: float, scale: float) -> tuple[Tensor, Tensor]:
    """cap tanh(s / cap) in float32 and its derivative; the extra columns stay outside of the tanh."""
    size = q.shape[-1] - 3
    tanh = torch.bmm(q[..., :size], k[..., :size].mT).float().mul_(scale / cap).tanh_()
    slope = 1 - tanh.square()
    rest = torch.bmm(q[..., size:].float(), k[..., size:].mT.float()).mul_(scale)
    return tanh.mul_(cap).add_(rest), slope


def uses_sdpa(model: Any) -> bool:
    """Whether transformers chose sdpa, which this stands in for."""
    return getattr(model.config, "_attn_implementation", None) == "sdpa"
