"""Muon's update, and which parameter gets which optimizer."""

import pytest
import torch
from equivalence import small_model

from nanokv.optim import AdamW, Muon, make_optimizers, muon_update, newton_schulz


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_directions(shape):
    g = torch.randn(3, *shape)
    x = newton_schulz(g)
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    assert (u.mT @ x @ vh.mT).diagonal(dim1=1, dim2=2).min() > 0.5


def test_the_row_groups_of_a_matrix_are_updated_as_matrices_of_their_own():
    g = torch.randn(2, 20, 6)
    g[:, torch.arange(20) % 5 < 2] *= 1e-3
    keys, values = (part.reshape(2, -1, 6) for part in g.view(2, 4, 5, 6).split((2, 3), 2))
    parts = [newton_schulz(part).view(2, 4, -1, 6) for part in (keys, values)]
    torch.testing.assert_close(muon_update(g, (2, 3)), torch.cat(parts, 2).flatten(1, 2))
    torch.testing.assert_close(muon_update(keys, (8,)), newton_schulz(keys) * (8 / 6) ** 0.5)
    assert not torch.allclose(muon_update(g), muon_update(g, (2, 3)), atol=0.1)


def test_muon_updates_each_matrix_as_if_alone():
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(3)]
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.1)
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [
        Muon([{"params": together, "row_groups": ()}], **options),
        *(Muon([{"params": [p], "row_groups": ()}], **options) for p in alone),
    ]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn(6, 4)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q)


def test_adamw_is_torchs():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (5,), (3, 2))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = dict(lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
    optimizers = [
        cls([{"params": [a, b], "lr": 0.03}, {"params": [c], "weight_decay": 0.0}], **options)
        for cls, (a, b, c) in ((AdamW, ours), (torch.optim.AdamW, theirs))
    ]
    for step in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = None if step == 1 and p.ndim == 1 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_in_one_optimizer(optimizer, tied):
    model = small_model(attention="mla", tie_embeddings=tied)
    optimizers = make_optimizers(model, optimizer=optimizer)
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for o in optimizers for g in o.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim == 2}
