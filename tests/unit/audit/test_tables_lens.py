"""The tables lens against planted tables: rows that no sample reads, a hot row, what multiplex would mix up, readers that look the same way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament import audit
from lineament.audit.run import AuditOptions
from lineament.modules import collision_report, multiplex, reader_overlap

SIZES = (400, 60, 5)


class Net(nn.Module):
    """Two tables and a bag of histories; the second table's reader is the first's."""

    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(SIZES[0], 6), nn.Embedding(SIZES[1], 6)
        self.history, self.spare = nn.EmbeddingBag(SIZES[2], 4, padding_idx=0), nn.Embedding(9, 6)
        self.out = nn.Linear(16, 2)
        with torch.no_grad():
            self.out.weight[:, 6:12] = self.out.weight[:, :6]

    def forward(self, x):
        read = [self.user(x[:, 0]), self.item(x[:, 1]), self.history(x[:, 2:])]
        return self.out(torch.cat(read, 1))


def data(count: int = 300):
    generator = torch.Generator().manual_seed(0)
    user = torch.randint(100, (count,), generator=generator)
    user[:90] = 7
    item = torch.randint(60, (count,), generator=generator)
    history = torch.randint(5, (count, 3), generator=generator)
    return torch.cat([user[:, None], item[:, None], history], 1), torch.arange(count) % 2


def looked(tmp_path, net, x, y, **options):
    return audit(net, (x, y), out=tmp_path / "r", **options)


def test_rows_reads_and_readers_are_those_of_the_data(tmp_path):
    torch.manual_seed(0)
    (x, y), net = data(), Net()
    found = looked(tmp_path, net, x, y, lenses=["tables"])["tables"]
    tables = {t["name"]: t for t in found.numbers["tables"]}
    assert list(tables) == ["user", "item", "history"] and found.numbers["unread"] == ["spare"]
    for name, ids in (("user", x[:, 0]), ("item", x[:, 1]), ("history", x[:, 2:][x[:, 2:] > 0])):
        values, counts = ids.unique(return_counts=True)
        got = tables[name]
        assert (got["seen"], got["reads"]) == (len(values), ids.numel())
        assert got["unseen"][0] == pytest.approx(int((counts == 1).sum()) / ids.numel())
    assert tables["user"]["hottest"] == 7 and tables["user"]["hot"] == pytest.approx(
        (x[:, 0] == 7).float().mean()
    )
    assert {f.key for f in found.findings} == {"rows not read", "hot row"}
    ((first, second, overlap),) = found.numbers["overlaps"]
    assert {first, second} == {"user", "item"}
    weight = net.out.weight[:, :6]
    assert overlap == pytest.approx(reader_overlap(weight, weight), rel=0.15)  # random sums of two outputs


def test_what_would_be_mixed_up_is_what_multiplex_mixes_up(tmp_path):
    (x, y), net = data(), Net()
    shared = looked(tmp_path, net, x, y, lenses=["tables"])["tables"].numbers["shared"]
    ids = {"user": x[:, 0], "item": x[:, 1], "history": x[:, 2:][x[:, 2:] > 0]}
    for fraction, rows, told in shared:
        made = multiplex(net_ := Net(), fraction=fraction)
        assert made.rows == rows
        found = collision_report(net_.user.table, ids)
        assert told["merged"] == found.merged and told["between"] == found.between


def test_reports_have_it_where_ids_are_read_and_only_there(tmp_path):
    (x, y), net = data(80), Net()
    net.spare = None
    multiplex(net)
    embedding = AuditOptions(task="embedding")
    names = [s.name for s in looked(tmp_path, net, x, y, options=embedding).sections]
    assert names == ["embeddings", "tables", "export"]
    plain = nn.Sequential(nn.Linear(5, 2))
    again = audit(plain, (x.float(), y), out=tmp_path / "p", lenses=["tables"])["tables"]
    assert again.status == "skipped" and "no nn.Embedding" in again.sentence


def test_ids_in_columns_of_a_table_are_ids(tmp_path):
    """A file's columns are real numbers; a network whose tables read them takes whole ones for ids."""
    (x, y), net = data(80), Net()
    found = audit(net, (x.float(), y), out=tmp_path / "f", lenses=["tables"])["tables"]
    assert found.numbers["tables"][0]["reads"] == 80
