"""People: those with wrong labels are as many as asked for, and no stranger is trained on."""

from __future__ import annotations

import numpy as np
import torch

from lineament.data import categorical_features, identities, movielens, orl_faces


def test_wrong_labels_are_another_persons_and_seeds_repeat():
    train, unseen = identities(20, 5, strangers=6, stranger_pictures=3, wrong=0.2, seed=3)
    other = train.targets != train.extras["true"]
    assert int(other.sum()) == 20 and len(unseen) == 18 and unseen.targets.bincount().tolist() == [3] * 6
    again = identities(20, 5, strangers=6, stranger_pictures=3, wrong=0.2, seed=3)[0]
    assert torch.equal(again.inputs, train.inputs) and torch.equal(again.targets, train.targets)
    clean = identities(20, 5, strangers=6, stranger_pictures=3, seed=3)[0]
    assert torch.equal(clean.targets, clean.extras["true"]) and torch.equal(clean.inputs, train.inputs)


def test_faces_are_split_by_person(tmp_path, monkeypatch):
    monkeypatch.delenv("LINEAMENT_DATA", raising=False)
    assert orl_faces() is None and movielens() is None
    y = np.repeat(np.arange(40, dtype=np.uint8), 10)
    x = np.broadcast_to(6 * y[:, None, None], (400, 112, 92)).astype(np.uint8)
    np.savez(tmp_path / "orl_faces.npz", x=x, y=y)
    train, unseen = orl_faces(24, data_folder=tmp_path, seed=1)
    shades = [set((part.inputs.mean((1, 2, 3)) * 255 / 6).round().int().tolist()) for part in (train, unseen)]
    assert len(train) == 240 and len(unseen) == 160 and not shades[0] & shades[1]
    assert unseen.targets.unique().tolist() == list(range(16)) and train.inputs.shape[1:] == (1, 28, 23)


def test_ratings_are_numbered_by_column(tmp_path):
    ratings = np.array([[7, 30, 3, 100], [9, 10, 2, 50], [7, 10, 5, 70]], np.int32)
    users = np.array([[7, 17, 1, 4], [9, 56, 0, 2]], np.int32)
    np.savez(
        tmp_path / "movielens_100k.npz", ratings=ratings, users=users, zipcodes=np.array(["90210", "10001"])
    )
    found = movielens(tmp_path)
    assert found.inputs.tolist() == [[0, 1, 1, 0, 4, 1], [1, 0, 0, 6, 2, 0], [0, 0, 1, 0, 4, 1]]
    assert found.targets.tolist() == [1, 0, 1] and found.extras["time"].tolist() == [100, 50, 70]
    generated = categorical_features(3000)
    assert 0.15 < float(generated.targets.double().mean()) < 0.45 and generated.inputs.amax(0)[-1] == 1
