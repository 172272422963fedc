"""docs/stream.md is enough to read coded tokens: a decoder of numpy and the entropy coder alone."""

import zlib

import constriction
import numpy as np
import pytest
import torch
from test_codec import GRID, some_tokens

from lowrank_tokens.codec import Codec
from lowrank_tokens.stream import FORMS


class Decoder:
    """A reader by the rules of docs/stream.md, which imports nothing of the package."""

    def __init__(self, arrays, identity):
        self.arrays, self.identity = arrays, identity
        self.tables, at = {}, 0
        for level, most in enumerate(arrays["table_sizes"].tolist(), start=-24):
            own = arrays["tables"][at : at + most + 2]
            at += most + 2
            both = np.concatenate([own[:1], np.repeat(own[1:-1], 2), own[-1:]]) / 2**24
            self.tables[level] = most, constriction.stream.model.Categorical(both, perfect=False)

    def varint(self):
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at, value, shift = self.at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    def zigzag(self):
        value = self.varint()
        return -(value + 1) // 2 if value % 2 else value // 2

    def part(self, levels):
        levels = np.asarray(levels, dtype=np.int64)
        flat, out = levels.ravel(), np.zeros(levels.size, dtype=np.int64)
        for level in np.unique(flat[flat >= -22]):
            most, model = self.tables[int(level)]
            places = np.flatnonzero(flat == level)
            entries = self.coder.decode(model, len(places)).astype(np.int64)
            for i in np.flatnonzero(entries == 2 * most + 1):
                entries[i] += self.varint()
            out[places] = np.where(entries % 2, (entries + 1) // 2, -(entries // 2))
        return out.reshape(levels.shape)

    def on_grid(self, maps, grid):
        for axis, side in ((1, grid[0]), (2, grid[1])):
            fitted = maps.shape[axis]
            if side != fitted:
                p = np.arange(side) * fitted * 256 // side
                low = np.minimum(p >> 8, fitted - 1)
                w = (p & 255).reshape([-1 if i == axis else 1 for i in range(3)])
                high = maps.take(np.minimum(low + 1, fitted - 1), axis)
                maps = (maps.take(low, axis) * (256 - w) + high * w) >> 8
        return maps.reshape(len(maps), -1)

    def integers(self, name):
        return self.arrays[name].astype(np.int64)

    def decode(self, data):
        self.data, self.at = data, 9
        assert data[0] >> 4 == 1 and data[1:5] == self.identity[:4]
        assert int.from_bytes(data[5:9], "little") == zlib.crc32(data[:5] + data[9:])
        grid = self.varint(), self.varint()
        index, tokens = self.zigzag(), grid[0] * grid[1]
        factors = not data[0] & 1
        rank, first = (self.varint(), self.zigzag()) if factors else (0, 0)
        positions, values = [], []
        if data[0] & 2:
            positions = np.cumsum([self.varint() for _ in range(self.varint())])
            values = np.frombuffer(data, "<u2", len(positions), self.at).astype(np.uint32) << 16
            values, self.at = values.view(np.float32), self.at + 2 * len(positions)
        escapes = self.varint()
        words = np.frombuffer(data, "<u4", -1, self.at + escapes).astype(np.uint32)
        self.coder = constriction.stream.stack.AnsCoder(words)

        level = lambda units: (units + 8) >> 4  # noqa: E731
        statistics = self.part(level(self.on_grid(self.integers("statistics"), grid)))
        back = self.arrays.get("inverse", self.arrays["klt"])
        if factors:
            falls = self.part(np.full(max(rank - 1, 0), 29))
            offsets = self.part(np.full((2, rank), 30)).cumsum(1)
            sigma = first - np.concatenate([[0], falls.cumsum()])[:rank].astype(np.int64)
            bucket = np.searchsorted(self.arrays["starts"], np.arange(rank), side="right") - 1
            rows = self.integers("rows")
            shift = round(32 * np.log2(rows.shape[1] * rows.shape[2] / tokens))
            of_a = level(self.on_grid(rows, grid)[bucket].T + shift) + sigma + offsets[0]
            of_b = level(self.integers("columns")[bucket].T) + sigma + offsets[1]
            body = self.part(np.minimum(np.concatenate([of_a, of_b]), 28))
            q, upper = np.linalg.qr(body[:tokens].astype(float))
            z = q * np.sign(np.diag(upper)) @ body[tokens:].T
        else:
            offsets = self.part(np.full(tokens, 30)).cumsum()
            left, right = self.integers("spectrum_left"), self.integers("spectrum_right")
            maps = self.on_grid(np.moveaxis(left @ right >> 8, 2, 0), grid)
            z = self.part(np.minimum(level(maps - index) + offsets, 28)).T

        sides = []
        for n in grid:
            k = np.arange(n)
            side = np.cos(np.pi / n * (k + 0.5) * k[:, None]) * (2 / n) ** 0.5
            sides.append(side * np.where(k == 0, 0.5**0.5, 1)[:, None])
        inverse_dct = np.kron(*sides).T
        mean_step, log_step, log_std = self.arrays["scales"].tolist()
        mean, log = (inverse_dct @ (statistics.T * [mean_step, log_step])).T
        x = inverse_dct @ z * 2 ** (index / 64) @ back.T
        out = x * np.exp(log + log_std)[:, None] + mean[:, None]
        if data[0] & 2:
            out.reshape(-1)[positions] = values
        return out * 2.0 ** self.arrays.get("channel_exponents", np.zeros(1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", [GRID, (5, 3), (8, 12)])
@pytest.mark.parametrize("case", ["plain", "metric", "outliers"])
def test_an_independent_reader_of_the_documented_format_gives_the_same_tokens(form, grid, case):
    training, raw = some_tokens(24), some_tokens(1, grid, seed=1)[0]
    if case == "outliers":
        training, raw = (t.repeat(*[1] * (t.ndim - 1), 4) for t in (training, raw))
        training[..., 7] *= 1000
        raw[..., 7] *= 1000
        raw[2, 100] = 4000.0
    metric = torch.diag(torch.linspace(0.5, 2, 48)) if case == "metric" else None
    codec = Codec.fit([(training, GRID)], metric=metric)
    assert ("channel_exponents" in codec.tensors) == (case == "outliers")
    arrays = {
        name: (t.float() if t.dtype == torch.bfloat16 else t).numpy()
        for name, t in codec.tensors.items()
    }
    decoder = Decoder(arrays, bytes.fromhex(codec.identity))
    for step in (3.0, 0.3, 0.02):
        data = codec.encode(raw, grid, step=step, form=form)
        assert (codec.header(data).extremes is not None) == (case == "outliers")
        wanted = codec.decode(data).double().numpy()
        assert np.abs(decoder.decode(data) - wanted).max() < 1e-4 * np.abs(wanted).max()
