"""Training by native.c's tape: losses and gradients as by torch's operators, and only where it applies."""

import shutil
from functools import partial

import pytest
import torch
from equivalence import CASES, VOCAB, assert_close, small_config, small_model
from test_native import CC
from torch import nn

from backends import cpu as native
from backends import tape
from model import ATTENTIONS, MLP, Block, GroupedQueryAttention, rope_angles
from nanokv.loss import Linear, RMSNorm

pytestmark = [
    pytest.mark.skipif(shutil.which(CC) is None, reason="no C compiler"),
    # where torch's BLAS is MKL, a product that is not found fails here
    pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has another BLAS"),
]
WIDE = {"n_embd": 64, "n_head": 4, "n_layer": 3}  # heads as wide as native.c wants them
OWN_WIDTHS = {"head_dim", "n_embd", "v_head_dim", "qk_nope_head_dim"}
TAPED = {
    name: WIDE | {"attention": "mha"} | knobs
    for name, knobs in CASES.items()
    if "record" in vars(ATTENTIONS[knobs["attention"]]) and not OWN_WIDTHS & knobs.keys()
}
TAPED |= {
    "mla-narrow-values": WIDE | {"attention": "mla", "v_head_dim": 16, "qk_nope_head_dim": 24},
    "mla-wide-values": WIDE | {"attention": "mla", "v_head_dim": 48, "kv_lora_rank": 9, "q_lora_rank": 7},
    "odd": WIDE | {"attention": "gqa", "n_kv_head": 2, "head_dim": 32, "n_embd": 50, "intermediate_size": 37},
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def batch(B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    idx = torch.randint(VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(B * T))
    return idx[:, :-1], idx[:, 1:].contiguous()


def used(model, B: int, T: int) -> bool:
    """Whether the tape computes a batch."""
    x = torch.zeros(B, T, model.config.n_embd)
    return tape.tape_of(model, x, rope_angles(torch.arange(T)[None], 4, 1e4)) is not None


def loss_and_gradients(model, B: int, T: int) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(*batch(B, T), want_logits=False)[1]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("knobs", TAPED.values(), ids=TAPED.keys())
@pytest.mark.parametrize("B, T", [(1, 90), (7, 32), (3, 130)])
def test_losses_and_gradients_are_those_of_the_operators(knobs, B, T):
    model = small_model(**knobs).train()
    assert used(model, B, T)
    ours, exact = loss_and_gradients(model, B, T), loss_and_gradients(model.double(), B, T)
    for a, b in zip(ours, exact, strict=True):
        assert_close(a / b.abs().max(), (b / b.abs().max()).float(), 1e-5)


@pytest.mark.parametrize("knobs", [{"attention": "gqa", "n_kv_head": 2}, {"attention": "mla"}])
def test_nothing_depends_on_the_number_of_threads_or_on_gradients(knobs, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)  # and with them how many sequences are taken at a time
        model = small_model(**WIDE, **knobs).train()
        assert used(model, 12, 16)
        results.append(loss_and_gradients(model, 12, 16))
        with torch.no_grad():
            results[-1].append(model(*batch(12, 16))[0])
        assert torch.equal(results[-1][-1], model(*batch(12, 16))[0].detach())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_accumulate():
    model = small_model(**WIDE).train()
    once = loss_and_gradients(model, 4, 16)[1:]
    model(*batch(4, 16), want_logits=False)[1].backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))


def test_what_is_not_finite_is_not_hidden():
    model = small_model(**WIDE).train()
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    assert all(t.isnan().any() for t in loss_and_gradients(model, 4, 16)[:4])


class OtherAttention(GroupedQueryAttention):
    def forward(self, x, rope, cache=None):
        return 2 * super().forward(x, rope, cache)


class OtherMLP(MLP):
    pass


class OtherBlock(Block):
    pass


class OtherLinear(Linear):
    pass


def hook(register: str):
    def change(model):
        getattr(model.layers[1].mlp.up_proj, register)(lambda *_: None)

    return change


def put(path: str, make):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make())

    return change


# what may be done to a model after its first step, and whether the tape is still good for it
CHANGES = {
    "attention": (lambda m: setattr(m.layers[1].self_attn, "__class__", OtherAttention), False),
    "mlp": (lambda m: setattr(m.layers[1].mlp, "__class__", OtherMLP), False),
    "block": (lambda m: setattr(m.layers[1], "__class__", OtherBlock), False),
    "linear": (lambda m: setattr(m.layers[1].mlp.up_proj, "__class__", OtherLinear), False),
    "other block": (put("layers.1", lambda: OtherBlock(small_config(**WIDE))), False),
    "other linear": (put("layers.1.mlp.up_proj", lambda: nn.Linear(64, 128)), False),
    "layer norm": (put("norm", lambda: nn.LayerNorm(64)), False),
    "no norm": (put("layers.0.input_layernorm", nn.Identity), False),
    "forward": (lambda m: setattr(m.layers[1], "forward", partial(Block.forward, m.layers[1])), False),
    "forward hook": (hook("register_forward_hook"), False),
    "forward pre-hook": (hook("register_forward_pre_hook"), False),
    "backward hook": (hook("register_full_backward_hook"), False),
    "backward pre-hook": (hook("register_full_backward_pre_hook"), False),
    "compiled": (lambda m: m.layers[0].compile(backend="eager"), False),
    "same kind of linear": (put("layers.1.mlp.down_proj", lambda: Linear(128, 64)), True),
    "same kind of norm": (put("norm", lambda: RMSNorm(64, 0.1)), True),
    "larger mlp": (put("layers.2.mlp", lambda: MLP(small_config(**WIDE, intermediate_size=999))), True),
    "eps": (lambda m: setattr(m.layers[1].input_layernorm, "eps", 0.5), True),
    "no qk-norm": (lambda m: setattr(m.layers[1].self_attn, "qk_norm", False), True),
    "frozen": (lambda m: m.layers.requires_grad_(False), True),
}


@pytest.mark.parametrize("change, good", CHANGES.values(), ids=CHANGES.keys())
def test_a_model_that_changes_is_computed_as_it_is(change, good, monkeypatch):
    model = small_model(**WIDE | {"n_layer": 4, "intermediate_size": 128}).train()
    loss_and_gradients(model, 4, 16)
    change(model)
    assert used(model, 4, 16) == good
    ours = loss_and_gradients(model, 4, 16)
    monkeypatch.setattr(tape, "tape_of", lambda *_: None)
    for a, b in zip(ours, loss_and_gradients(model, 4, 16), strict=True):
        assert_close(a / (1e-3 + b.abs().max()), b / (1e-3 + b.abs().max()), 1e-5)


def test_weights_of_widths_that_do_not_fit_are_torchs_to_refuse():
    model = small_model(**WIDE).train()
    model.layers[1].mlp.gate_proj = Linear(64, 8)
    model.layers[1].mlp.up_proj = Linear(64, 8)
    with pytest.raises(RuntimeError, match="shapes"):
        loss_and_gradients(model, 4, 16)


def test_it_is_not_used_where_nothing_is_gained_or_something_else_asked(threads):
    def model(**knobs):
        return small_model(**{**WIDE, **knobs}).train()

    assert used(model(), 4, 16)
    with torch.autocast("cpu"):
        assert not used(model(), 4, 16)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not used(model(), 4, 16)
    handle.remove()
    dropping = model(dropout=0.5)
    assert not used(dropping, 4, 16) and used(dropping.eval(), 4, 16)
    dropping.layers.train()
    assert not used(dropping, 4, 16)
    assert not used(model(n_head=8), 4, 16)  # heads of 8
    assert not used(model(intermediate_size=2000), 1, 4)  # more weights than numbers
    assert not used(model(), 1, 1025)
    threads(4)
    assert used(model(), 8, 16) and not used(model(), 6, 16) and not used(model(), 3, 16)


@pytest.mark.parametrize("knobs", [{"dropout": 0.5}, {"window": 8}])
def test_dropout_and_windows_are_those_of_the_operators(knobs, monkeypatch):
    model = small_model(**WIDE, **knobs).train()
    results = []
    for library in (native.library, lambda: None):
        monkeypatch.setattr(native, "library", library)
        torch.manual_seed(0)
        results.append(loss_and_gradients(model, 4, 16))
    for a, b in zip(*results, strict=True):
        assert_close(a / b.abs().max(), b / b.abs().max(), 1e-5)
