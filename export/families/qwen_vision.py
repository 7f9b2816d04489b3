"""The vision encoders of Qwen-VL as one traced module: patches and their grid in, image tokens out.

In: a transformers vision model, patches (N, C * T * P * P) and `image_grid_thw` (1, 3) of one picture.
Out: features (N / merge^2, hidden), and those of deepstack. Not here: the text model, preprocessing.

transformers computes positions, windows and interpolation from the grid outside of its graph, with loops over
numbers. Here they are tensor arithmetic on the patch's number, so that the graph takes any grid by itself.

Patches stay in the processor's order (blocks of merge x merge, blocks in reading order). Where transformers
sorts them by window and back, here a window layer gathers its windows, padded to full ones, and gathers back:
attention does not depend on the order of keys, and padding is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from export.fused import attend, quotient, rotate


@dataclass(frozen=True)
class _Windows:
    """How patches lie in W windows of S slots.

    `patches` (W, S): the patch of a slot, 0 for padding. `keep` (W, S) int32: 0 for padding. `slots` (W, S):
    their numbers. `rows`, `columns` (W, S): where they are in the picture. `home` (1, N): a patch's slot.
    """

    patches: torch.Tensor
    keep: torch.Tensor
    slots: torch.Tensor
    home: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


@dataclass(frozen=True)
class _Rope:
    """`cos`, `sin` (rows, D / 2) and the row of each patch (1, N)."""

    cos: torch.Tensor
    sin: torch.Tensor
    rows: torch.Tensor


class _Patches(nn.Module):
    """The patch convolution, whose kernel is a whole patch, as the product that it is."""

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.bias = convolution.bias
        self.weight: torch.Tensor
        self.register_buffer("weight", convolution.weight.flatten(1), persistent=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(1, N, C * T * P * P) -> (1, N, width)."""
        return nn.functional.linear(patches, self.weight, self.bias)


class QwenVision(nn.Module):
    """Qwen2-VL, Qwen2.5-VL (windows) and Qwen3-VL (learned positions, deepstack), by what `visual` has."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual, config = visual, visual.config
        self.merge = int(config.spatial_merge_size)
        self.deepstack = tuple(getattr(config, "deepstack_visual_indexes", ()))
        windows = getattr(config, "window_size", None)
        # in merged tokens a side, as transformers has it
        self.window = int(windows) // self.merge // int(config.patch_size) if windows else 0
        full = getattr(config, "fullatt_block_indexes", ()) if self.window else range(len(visual.blocks))
        self.windowed = tuple(index not in full for index in range(len(visual.blocks)))
        side, merge = max(self.window, 1), self.merge
        self.patch_embed = _Patches(visual.patch_embed.proj)
        self.slot_row: torch.Tensor
        self.slot_column: torch.Tensor
        self.slot_place: torch.Tensor
        # (S,) of each slot of a window: its token's row and column in the window, its place in the token
        token = torch.arange(side * side * merge * merge) // (merge * merge)
        place = torch.arange(side * side * merge * merge) % (merge * merge)
        self.register_buffer("slot_row", token // side, persistent=False)
        self.register_buffer("slot_column", token % side, persistent=False)
        self.register_buffer("slot_place", place, persistent=False)

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, C * T * P * P) float32, (1, 3) int64 -> (T, hidden) [, (layers, T, hidden)]."""
        height, width = image_grid_thw[0, 1], image_grid_thw[0, 2]
        patches = torch.arange(pixel_values.shape[0])
        row, column = self._coordinates(patches, width)
        hidden = self.patch_embed(pixel_values[None])
        if hasattr(self.visual, "pos_embed"):
            hidden = hidden + self._positions(row, column, height, width)
        windows = self._windows(patches, height, width) if any(self.windowed) else None
        if windows is None:
            rope = _Rope(*self._waves(row, column), patches[None])
        else:  # a table by slot serves both kinds of layers
            rope = _Rope(*self._waves(windows.rows.flatten(), windows.columns.flatten()), windows.home)
        stack = []
        for index, block in enumerate(self.visual.blocks):
            inside = windows if self.windowed[index] else None
            hidden = hidden + _attention(block.attn, block.norm1(hidden), rope, inside)
            hidden = hidden + block.mlp(block.norm2(hidden))
            if index in self.deepstack:
                merger = self.visual.deepstack_merger_list[self.deepstack.index(index)]
                stack.append(self._merged(merger, hidden))
        features = self._merged(self.visual.merger, hidden)
        return (features, torch.stack(stack)) if stack else (features,)

    def _coordinates(self, patches: torch.Tensor, width: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column (N,) of each patch in the picture's grid of patches."""
        token_row, token_column, place = self._token(patches, width)
        merge = self.merge
        return token_row * merge + quotient(place, merge), token_column * merge + place % merge

    def _token(
        self, patches: torch.Tensor, width: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row and column (N,) of a patch's token, and the patch's place in it."""
        block, wide = self.merge**2, quotient(width, self.merge)
        token = quotient(patches, block)
        return quotient(token, wide), token % wide, patches % block

    def _windows(self, patches: torch.Tensor, height: torch.Tensor, width: torch.Tensor) -> _Windows:
        side, merge, block = self.window, self.merge, self.merge**2
        high, wide = quotient(height, merge), quotient(width, merge)
        windows_wide = quotient(wide + (side - 1), side)
        count = (quotient(high + (side - 1), side) * windows_wide).item()
        torch._check(count >= 1)
        window = torch.arange(count)[:, None]
        row = quotient(window, windows_wide) * side + self.slot_row
        column = (window % windows_wide) * side + self.slot_column
        keep = (row < high) & (column < wide)
        source = (row * wide + column) * block + self.slot_place
        slots = window * (side * side * block) + torch.arange(side * side * block)
        token_row, token_column, place = self._token(patches, width)
        home = quotient(token_row, side) * windows_wide + quotient(token_column, side)
        home = home * (side * side) + (token_row % side) * side + token_column % side
        return _Windows(
            patches=torch.where(keep, source, 0),
            keep=keep.to(torch.int32),
            slots=slots,
            home=(home * block + place)[None],
            rows=row * merge + quotient(self.slot_place, merge),
            columns=column * merge + self.slot_place % merge,
        )

    def _waves(self, row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (rows, D / 2) by the model's rotary module, whose second half repeats the first."""
        cos, sin = self.visual.rotary_pos_emb(row, torch.stack((row, column), dim=-1))
        half = cos.shape[-1] // 2
        return cos[:, :half], sin[:, :half]

    def _positions(
        self, row: torch.Tensor, column: torch.Tensor, height: torch.Tensor, width: torch.Tensor
    ) -> torch.Tensor:
        """The learned square of positions (N, hidden), bilinear, corners on corners, as transformers does."""
        side = int(self.visual.num_grid_per_side)
        (top, bottom, down), (left, right, across) = (
            _taps(row, height, side), _taps(column, width, side)
        )  # fmt: skip
        rows, columns = (
            torch.stack((top, top, bottom, bottom), -1),
            torch.stack((left, right, left, right), -1),
        )
        up, back = 1 - down, 1 - across
        weights = torch.stack((up * back, up * across, down * back, down * across), dim=-1)
        return (self.visual.pos_embed(rows * side + columns) * weights[..., None]).sum(1)

    def _merged(self, merger: Any, hidden: torch.Tensor) -> torch.Tensor:
        """merge x merge patches as one token: (1, N, width) -> (T, hidden)."""
        joined = self.merge**2 * hidden.shape[-1]
        if hasattr(merger, "mlp"):
            return merger.mlp(merger.ln_q(hidden).reshape(1, -1, joined))[0]
        if merger.use_postshuffle_norm:
            hidden = merger.norm(hidden.reshape(1, -1, joined))
        else:
            hidden = merger.norm(hidden).reshape(1, -1, joined)
        return merger.linear_fc2(merger.act_fn(merger.linear_fc1(hidden)))[0]


def _taps(index: torch.Tensor, size: torch.Tensor, side: int) -> tuple[torch.Tensor, ...]:
    """Two places in a table of `side` for `index` (N,) of `size`, and the weight of the second."""
    place = index.float() * (side - 1) / torch.clamp(size - 1, min=1)
    low = place.floor()
    first = low.long()
    return first, torch.clamp(first + 1, max=side - 1), place - low


def _attention(attn: Any, hidden: torch.Tensor, rope: _Rope, windows: _Windows | None) -> torch.Tensor:
    """Attention of all patches, or of those of a window, (1, N, width) -> same."""
    heads, scale = int(attn.num_heads), float(attn.scaling)
    qkv = attn.qkv(hidden)
    rows, keep = rope.rows, None
    if windows is not None:
        qkv = nn.functional.embedding(windows.patches, qkv[0])  # (W, S, 3 * width)
        rows, keep = windows.slots, windows.keep
    query, key, value = qkv.chunk(3, dim=-1)
    query, key = (rotate(x, rows, rope.cos, rope.sin, heads) for x in (query, key))
    out = attend(query, key, value, heads=heads, scale=scale, keep=keep)
    if windows is not None:
        out = nn.functional.embedding(windows.home, out.flatten(0, 1))
    return attn.proj(out)
