"""Fewer tokens: dropped and filled from their neighbours, or averaged over blocks."""

from __future__ import annotations

import torch

from experiments.token_reduction import average_tokens, drop_tokens, tokens_kept


def test_dropped_tokens_are_filled_from_their_nearest_kept_neighbour():
    x = torch.arange(9.0).reshape(1, 9, 1)
    assert torch.equal(drop_tokens(x, 9, (3, 3)), x)
    for keep in (1, 4):
        filled = drop_tokens(x, keep, (3, 3), seed=2)[0, :, 0]
        kept = filled.unique().long()
        assert len(kept) == keep
        for place in range(9):
            here = torch.tensor(divmod(place, 3)).double()
            distance = [(torch.tensor(divmod(int(k), 3)) - here).norm() for k in kept]
            chosen = int((kept == int(filled[place])).nonzero())
            assert distance[chosen] == min(distance)


def test_averaged_tokens_are_the_means_of_their_blocks_also_at_the_edge():
    x = torch.arange(9.0).reshape(1, 9, 1)
    expected = [2, 2, 3.5, 2, 2, 3.5, 6.5, 6.5, 8]
    assert average_tokens(x, 2, (3, 3))[0, :, 0].tolist() == expected
    assert tokens_kept(2, (3, 3)) == 4 and tokens_kept(2, (16, 16)) == 64
