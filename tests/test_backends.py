"""accelerate, pure and describe: classes are swapped, and all else stays what it was."""

import ast
import copy
import io
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import compiled
from equivalence import VOCAB, assert_close, small_model, tokens
from torch import nn

import backends
from backends import cpu_library, fingerprints
from model import ATTENTIONS, GPT, MLP, Attend, RMSNorm
from nanokv.config import UserError
from nanokv.loss import LanguageModelLoss

ROOT = Path(__file__).parents[1]
WIDE = {"n_embd": 64, "n_head": 4}


def wrapped(**knobs) -> LanguageModelLoss:
    return LanguageModelLoss(small_model(**WIDE, **knobs))


def both() -> tuple[GPT, GPT]:
    """An accelerated model, and the same pure."""
    model = small_model(**WIDE)
    return backends.accelerate(copy.deepcopy(model)), model


def types(module: nn.Module) -> list[type]:
    return [type(m) for m in module.modules()]


@pytest.fixture(autouse=True)
def auto(monkeypatch):
    monkeypatch.delenv("NANOKV_BACKEND", raising=False)


@compiled
def test_classes_are_swapped_and_nothing_else():
    loss = wrapped()
    before, names, own = types(loss), list(loss.state_dict()), [set(vars(m)) for m in loss.modules()]
    assert backends.accelerate(loss) is loss
    for piece in backends.pieces():
        assert piece.pure not in types(loss) and piece.fast in types(loss)
        assert issubclass(piece.fast, piece.pure)
    assert list(loss.state_dict()) == names and [set(vars(m)) for m in loss.modules()] == own
    assert backends.accelerate(loss) is loss
    assert backends.pure(loss) is loss and types(loss) == before


@compiled
def test_a_model_in_bf16_is_decoded_in_C_and_nothing_else():
    model = backends.accelerate(small_model(torch.bfloat16))
    assert backends.describe(model) == "backend cpu: decoding in C (1 thread)" and type(model.norm) is RMSNorm
    assert backends.pure(model).__class__ is GPT


@compiled
def test_the_line_at_start_up(monkeypatch):
    loss = wrapped()
    assert backends.describe(loss) == "backend none: torch"
    line = backends.describe(backends.accelerate(loss))
    assert line == "backend cpu: norm, attention, mlp, loss, decoding in C (1 thread)"
    assert backends.describe(backends.pure(loss)) == "backend none: torch"
    monkeypatch.setitem(fingerprints.table(), "model.Attend.forward", "other")
    fingerprints.has_known_source.cache_clear()
    line = backends.describe(backends.accelerate(loss))
    assert line.endswith("; attention, decoding: torch (its code was edited)")
    assert Attend in types(loss)
    monkeypatch.undo()
    fingerprints.has_known_source.cache_clear()


@compiled
def test_without_OpenMP_threads_of_torch_train_and_C_decodes(monkeypatch):
    monkeypatch.setattr(cpu_library, "has_openmp", lambda: False)
    assert backends.describe(backends.accelerate(wrapped())).endswith("loss, decoding in C (1 thread)")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    loss = backends.accelerate(wrapped())
    reason = "on one thread, without OpenMP, C is slower"
    expected = f"backend cpu: decoding in C (1 thread); norm, attention, mlp, loss: torch ({reason})"
    assert backends.describe(loss) == expected and not {RMSNorm, Attend, MLP} - set(types(loss))


def test_what_NANOKV_BACKEND_says(monkeypatch):
    monkeypatch.setenv("NANOKV_BACKEND", "none")
    loss = wrapped()
    before = types(loss)
    assert backends.describe(backends.accelerate(loss)) == "backend none: torch" and types(loss) == before
    monkeypatch.setenv("NANOKV_BACKEND", "cuda")
    line = backends.describe(backends.accelerate(loss))
    assert line == "backend cuda: torch (no kernels of this backend yet)" and types(loss) == before
    monkeypatch.setenv("NANOKV_BACKEND", "cpuu")
    with pytest.raises(UserError, match="NANOKV_BACKEND must be one of auto, none, cpu, cuda, not 'cpuu'"):
        backends.accelerate(loss)
    monkeypatch.setenv("NANOKV_BACKEND", "cpu")
    assert "fp32 or bf16" in backends.describe(backends.accelerate(loss.double())) and types(loss) == before
    assert "without autocast" in backends.describe(backends.accelerate(loss.float(), torch.bfloat16))
    monkeypatch.setattr(cpu_library, "why_not", lambda: "no C compiler: gcc is not installed")
    line = backends.describe(backends.accelerate(loss.float()))
    assert line == "backend cpu: torch (no C compiler: gcc is not installed)" and types(loss) == before


def test_only_exactly_known_classes_are_swapped():
    class Doubled(RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    model = small_model(**WIDE)
    model.norm.__class__ = Doubled
    expected = model(tokens(1, 9))[0]
    backends.accelerate(model)
    assert type(model.norm) is Doubled
    assert_close(model(tokens(1, 9))[0], expected)


def same_loss(a: nn.Module, b: nn.Module) -> None:
    idx, targets = tokens(2, 20), tokens(2, 20, seed=1)
    assert_close(a(idx, targets), b(idx, targets))


def test_copies_and_pickles():
    loss = backends.accelerate(wrapped())
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert types(other) == types(loss)
        same_loss(other, loss)
        with torch.no_grad():
            other.model.norm.weight.mul_(2)
        assert not torch.allclose(other(*[tokens(1, 9)] * 2), loss(*[tokens(1, 9)] * 2))
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    same_loss(torch.load(file, weights_only=False), loss)
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer)(*[__import__('torch').arange(9)[None]] * 2))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, input=pickle.dumps(loss), capture_output=True)
    assert done.stdout.startswith(b"tensor("), done.stderr.decode()


def test_weights_that_are_loaded_or_moved():
    fast, slow = both()
    other = small_model(**WIDE, seed=1)
    fast.load_state_dict(other.state_dict())
    assert_close(fast(tokens(1, 9))[0], other(tokens(1, 9))[0])
    fast.load_state_dict({k: v.t().contiguous().t() for k, v in slow.state_dict().items()}, assign=True)
    assert_close(fast(tokens(1, 9))[0], slow(tokens(1, 9))[0])
    fast, slow = both()
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(fast.to(dtype)(tokens(1, 9))[0], slow.to(dtype)(tokens(1, 9))[0])
    assert fast.to("meta")(tokens(1, 9).to("meta"))[0].shape == (1, 9, VOCAB)


def test_hooks_and_patches_hold(monkeypatch):
    fast, slow = both()
    idx = tokens(1, 9)
    kinds = ("layers.0.mlp", "layers.0.mlp.up_proj", "layers.0.self_attn.attend", "norm", "layers.1", "lm_head")
    before = slow(idx)[0]
    for name in kinds:
        handles = [m.get_submodule(name).register_forward_hook(lambda module, args, y: 1.5 * y) for m in (fast, slow)]
        assert_close(fast(idx)[0], slow(idx)[0])
        assert not torch.allclose(fast(idx)[0], before)
        for handle in handles:
            handle.remove()
    fast.norm.forward = slow.norm.forward = lambda x: -x
    assert_close(fast(idx)[0], slow(idx)[0])
    del fast.norm.forward, slow.norm.forward
    for cls in (RMSNorm, Attend, MLP):  # in the class, after the swap
        with monkeypatch.context() as patch:
            real = cls.forward
            patch.setattr(cls, "forward", lambda self, *args, real=real: 1.5 * real(self, *args))
            assert_close(fast(idx)[0], slow(idx)[0])
            assert not torch.allclose(fast(idx)[0], before)
    assert_close(fast(idx)[0], before)


def test_parametrized_weights_and_adapters():
    fast, slow = both()

    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    class LoRA(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(64, 2), nn.Linear(2, base.weight.size(0))

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    for model in (fast, slow):
        nn.utils.parametrize.register_parametrization(model.layers[0].mlp.gate_proj, "weight", Doubled())
        nn.utils.parametrize.register_parametrization(model.norm, "weight", Doubled())
        torch.manual_seed(0)
        model.layers[1].mlp.up_proj = LoRA(model.layers[1].mlp.up_proj)
    losses = [model(tokens(1, 9), tokens(1, 9))[1] for model in (fast, slow)]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    adapters = [model.layers[1].mlp.up_proj for model in (fast, slow)]
    assert_close(adapters[0].down.weight.grad, adapters[1].down.weight.grad)


def test_transforms_of_torch():
    fast, slow = both()
    weights, idx = dict(slow.named_parameters()), tokens(3, 9)

    def loss(model):
        return lambda w, i: torch.func.functional_call(model, w, (i[None], i[None]))[1]

    for transform in (
        lambda f: torch.func.vmap(f, in_dims=(None, 0))(weights, idx),
        lambda f: torch.func.grad(f)(weights, idx[0])["norm.weight"],
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))(weights, idx)["norm.weight"],
    ):
        assert_close(transform(loss(fast)), transform(loss(slow)))
    parts = [nn.Sequential(m.layers[0].mlp, m.norm) for m in (fast, slow)]
    x = torch.randn(2, 5, 64)
    assert_close(*(torch.func.jvp(part, (x,), (x + 1,))[1] for part in parts), 1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracing_compiling_and_exporting():
    fast, slow = both()
    fast, slow = (nn.Sequential(m.layers[0].mlp, m.norm) for m in (fast, slow))
    x, other = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    fast.requires_grad_(False)
    for made in (
        torch.jit.trace(fast, x),
        torch.compile(fast, fullgraph=True, backend="eager"),
        torch.export.export(fast, (x,)).module(),
    ):
        assert_close(made(other), slow(other))
    whole = backends.accelerate(wrapped())
    step = torch.compile(whole, fullgraph=True, backend="eager")
    same_loss(step, backends.pure(copy.deepcopy(whole)))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_fully_shard_afterwards(attention, tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rank", rank=0, world_size=1)
    try:
        knobs = {"attention": attention} | ({"n_kv_head": 2} if attention == "gqa" else {})
        slow = LanguageModelLoss(small_model(**WIDE, **knobs))
        fast = backends.accelerate(copy.deepcopy(slow))
        for layer in fast.model.layers:
            fully_shard(layer)
        fully_shard(fast)
        losses = [loss(tokens(2, 20), tokens(2, 20, seed=1)) for loss in (fast, slow)]
        assert_close(*losses)
        for loss in losses:
            loss.backward()
        for a, b in zip(fast.parameters(), slow.parameters(), strict=True):
            assert_close(a.grad.full_tensor(), b.grad, 1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_the_backends_know_the_code_as_it_is():
    """If this fails: let the named class follow the change, then renew the fingerprints."""
    for piece in backends.pieces():
        for name in fingerprints.edited(piece.stands_for):
            update = f"{piece.fast.__module__}.{piece.fast.__name__}"
            pytest.fail(f"{name} changed: update {update}, then run `python -m backends.fingerprints`")
    used = {name for piece in backends.pieces() for name in piece.stands_for}
    assert fingerprints.table().keys() == used, "run `python -m backends.fingerprints`"


SOURCE = """
def f(self, x, *, y=(1, 2)):
    '''What it does.'''
    # why
    if x:  # where
        return f(x, "a", [3])
    return f"{x!r:>{y}} and {{braces}}" + 'b'
"""
SAME = [
    SOURCE.replace("'''What it does.'''", "'''Other words.'''"),
    SOURCE.replace("    '''What it does.'''\n", ""),
    SOURCE.replace("    # why\n", "\n\n").replace("  # where", ""),
    SOURCE.replace('f(x, "a", [3])', 'f(\n            x,\n            "a",\n            [3],\n        )'),
    textwrap.indent(SOURCE, "    "),
]
OTHER = [
    SOURCE.replace('    return f"', '        return f"'),
    SOURCE.replace("(1, 2)", "(1, 3)"),
    SOURCE.replace('"a"', '"b"'),
    SOURCE.replace("!r", "!s"),
    SOURCE.replace(" and {{", " or {{"),
    SOURCE.replace("[3]", "3"),
]


def test_tokens_are_of_the_code_not_of_its_looks():
    def code(source):
        return fingerprints.outline(ast.parse(textwrap.dedent(source)))

    assert all(code(source) == code(SOURCE) for source in SAME)
    assert all(code(source) != code(SOURCE) for source in OTHER)
    assert code("x = (a,)\n") != code("x = (a)\n") and code("f(a, b,)\n") == code("f(a, b)\n")
    assert code("def f():\n    x = 'a'\n") != code("def f():\n    x = 'b'\n")
    # so that a table from one version of Python serves all others
    assert fingerprints.fingerprint(RMSNorm.forward.__code__) == fingerprints.table()["model.RMSNorm.forward"]
    assert fingerprints.fingerprint(None) == "" != fingerprints.fingerprint(small_model.__code__)
