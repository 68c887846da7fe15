"""Decoding in C: the same numbers as model.py, and never for a model that a step was not made for."""

import copy
import io
import os
import threading
from collections import Counter
from functools import partial

import pytest
import torch
from equivalence import BASE, CASES, assert_close, cached_logits, check_ragged, force_form, small_model, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import model as model_py
from backends import accelerate, cpu_checks, cpu_decode, cpu_library, pure
from model import MLP, RMSNorm
from nanokv.cache import CACHE_FORMATS, KVCache
from nanokv.quantization import INT4

pytestmark = [
    pytest.mark.usefixtures("c_backend"),
    pytest.mark.skipif(cpu_library.library() is None, reason="no C compiler"),
]

WINDOWS = [{"window": 1}, {"window": 5, "sink_tokens": 2}, {"window": 3, "window_pattern": "SL"}]
# Of logits in a format that rounds keys and values, against those of a pass without a cache
ROUNDED = {torch.bfloat16: 0.15, torch.float16: 0.02, torch.int8: 0.3, torch.float8_e4m3fn: 1.0, INT4: 2.5}
ODD = {
    "odd-gqa": dict(attention="gqa", n_embd=33, n_head=3, n_kv_head=1, head_dim=18, rotary_dim=6),
    "odd-mha": dict(attention="mha", n_embd=31, n_head=5, head_dim=7, rotary_dim=0, qk_norm=False),
    "odd-mla": dict(attention="mla", n_embd=33, n_head=3, kv_lora_rank=13, qk_rope_head_dim=6),
    "wide-mla": dict(attention="mla", kv_lora_rank=70, qk_rope_head_dim=10, qk_nope_head_dim=5, v_head_dim=33),
}
BOTH = [CASES["gqa"], CASES["mla-q-lora"]]
both = pytest.mark.parametrize("knobs", BOTH, ids=["gqa", "mla"])


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps that cpu_decode.c took, and the Steps that were made."""
    counts, run, make = Counter(), cpu_decode.Step.run, cpu_decode.Step.__init__

    def counted(self, *args):
        hidden = run(self, *args)
        counts["taken"] += hidden is not None
        return hidden

    def made(self, *args):
        make(self, *args)
        counts["made"] += 1

    monkeypatch.setattr(cpu_decode.Step, "run", counted)
    monkeypatch.setattr(cpu_decode.Step, "__init__", made)
    return counts


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.slow)])
def cores(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("knobs", [*CASES.values(), *ODD.values()], ids=[*CASES, *ODD])
def test_decoding_is_that_of_the_pure_model(knobs, rows, steps):
    """Compared with double precision: two results in fp32 may differ by twice what each is off."""
    model, idx = small_model(**knobs), tokens(rows, 50)
    exact = copy.deepcopy(model).double()(idx)[0]  # both come as near to it as fp32 does
    assert_close(cached_logits(model, idx, [40] + [1] * 10), exact)
    assert_close(cached_logits(accelerate(model), idx, [40] + [1] * 10), exact)
    assert steps == {"taken": 10, "made": 1}


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("knobs", [*BOTH, CASES["mqa"], *ODD.values()], ids=["gqa", "mla", "mqa", *ODD])
def test_decoding_by_several_cores(knobs, rows, cores, steps):
    """The context is long enough that keys are cut into shares, so that no core is idle."""
    model, idx = small_model(**knobs), tokens(rows, 210)
    expected = cached_logits(model, idx, [207] + [1] * 3)[:, 207:]
    assert_close(cached_logits(accelerate(model), idx, [207] + [1] * 3)[:, 207:], expected)
    assert steps == {"taken": 3, "made": 1}


@both
def test_results_repeat_bit_for_bit(knobs, cores):
    model, idx = accelerate(small_model(**knobs)), tokens(3, 150)
    first, second = (cached_logits(model, idx, [145] + [1] * 5) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("knobs", CASES.values(), ids=CASES)
@torch.no_grad()
def test_rows_of_unequal_length(knobs, steps):
    check_ragged(accelerate(small_model(**knobs)), [9, 3, 0, 1], [1, 1, 1])
    assert steps["taken"] == 3


@both
@pytest.mark.parametrize("spare", [0, 3])
@torch.no_grad()
def test_rings(knobs, spare, steps):
    """Up to sinks + window tokens, and beyond if no other slots are left, no mask is needed."""
    model, idx = small_model(**knobs, window=6, sink_tokens=2, window_pattern="SL"), tokens(2, 30)
    expected = model(idx)[0]
    cache = accelerate(model).new_cache(2, 30, spare=spare)
    assert_close(cached_logits(model, idx, [3] + [1] * 27, cache), expected)
    assert steps["taken"] == (5 if spare else 27)


@both
@torch.no_grad()
def test_endless_ragged_rings_and_rewinding(knobs, steps):
    model, prompts, rest = small_model(**knobs, window=8), tokens(3, 7), tokens(3, 20, seed=1)

    def decode(model: nn.Module) -> Tensor:
        cache = model.new_cache(3, 10)
        cache.expect([7, 2, 5])
        model(prompts, cache=cache)
        first = [model(token, cache=cache)[0] for token in rest[:, :2].split(1, 1)]
        cache.rewind([8, 3, 7])
        return torch.cat(first + [model(token, cache=cache)[0] for token in rest.split(1, 1)], 1)

    expected = decode(model)
    assert_close(decode(accelerate(model)), expected)
    assert steps["taken"] > 0


WIDE = {
    "wide-gqa": dict(attention="gqa", n_head=2, n_kv_head=1, head_dim=150),
    "wider-mla": dict(
        attention="mla", n_embd=28, n_head=7, qk_norm=True, kv_lora_rank=300, qk_rope_head_dim=34, qk_nope_head_dim=8
    ),
}
every_format = pytest.mark.parametrize("dtype", CACHE_FORMATS.values(), ids=CACHE_FORMATS)


def mirror(source: KVCache, other: KVCache) -> None:
    """Make the other cache hold what the source holds."""
    for a, b in zip(source.layers, other.layers, strict=True):
        for name, buffer in a.buffers.items():
            b.buffers[name].copy_(buffer)
    other.lengths.copy_(source.lengths)
    other.host_copy, other.first, other.peaks = list(source.host_lengths()), source.first, list(source.peaks)


@torch.no_grad()
def check_format(model: nn.Module, dtype: torch.dtype, rows: int = 2, steps: int = 8, prompt: int = 9, **cache) -> None:
    """Steps by the pure model, and each by C from the same cache: the same logits, and the same in the cache.

    Not always to the last digit: of a new token, a number at the edge of two codes may be rounded to either.
    """
    fast, idx = accelerate(copy.deepcopy(model)), tokens(rows, prompt + steps)
    ours, theirs = (m.new_cache(rows, prompt + steps, dtype, **cache) for m in (fast, model))
    model(idx[:, :prompt], cache=theirs)
    found = []
    for token in idx[:, prompt:].split(1, 1):
        mirror(theirs, ours)
        expected, logits = model(token, cache=theirs)[0], fast(token, cache=ours)[0]
        found.append((logits - expected).abs().max().item())
        assert ours.lengths.tolist() == theirs.lengths.tolist()
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            for name, x in a.buffers.items():
                y, exact = b.buffers[name], x.dtype == torch.float32
                same = (
                    (x - y).abs() <= 1e-5 * y.abs().clamp(min=1)
                    if exact
                    else x.view(torch.uint8) == y.view(torch.uint8)
                )
                assert (~same).sum() <= 3 + same.numel() // 500, name
    assert sorted(found)[steps // 2] < 1e-5 and max(found) < 0.1, found


@every_format
@pytest.mark.parametrize("knobs", [*CASES.values(), *ODD.values(), *WIDE.values()], ids=[*CASES, *ODD, *WIDE])
def test_every_cache_format_is_read_and_written(knobs, dtype, steps):
    check_format(small_model(**knobs), dtype)
    assert steps == {"taken": 8, "made": 1}


@every_format
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("knobs", BASE.values(), ids=BASE)
def test_every_cache_format_in_rings(knobs, window, dtype, steps):
    check_format(small_model(**knobs, **window), dtype)
    assert steps["taken"] == 8


@every_format
@both
def test_every_cache_format_over_blocks_of_keys_and_cores(knobs, dtype, cores, steps):
    check_format(small_model(**knobs, kv_conv=2), dtype, prompt=140, steps=2)
    assert steps["taken"] == 2


@every_format
@both
@torch.no_grad()
def test_rows_of_unequal_length_in_every_format(knobs, dtype):
    check_ragged(accelerate(small_model(**knobs)), [9, 3, 0, 1], [1, 1, 1], dtype, ROUNDED.get(dtype, 1e-5))


@every_format
@pytest.mark.parametrize("size", [0, 1e-25, 1e-4, 1e4])
@both
def test_codes_of_small_and_large_numbers(knobs, size, dtype, steps):
    """Without norms that would undo it; the last value vector is constant, so that its group has no range."""
    model = small_model(**knobs, qk_norm=False)
    for layer in model.layers:
        a = layer.self_attn
        last = a.kv_a_layernorm if knobs["attention"] == "mla" else a.v_proj
        for weight in [last.weight] + ([] if knobs["attention"] == "mla" else [a.k_proj.weight]):
            weight.data.mul_(size)
        a.o_proj.weight.data.mul_(1e-4 if size > 1 else 1)
    check_format(model, dtype)
    assert steps["taken"] == 8


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, INT4], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_what_is_not_finite_stays_in_its_row(value, dtype, steps):
    model, idx = accelerate(small_model()), tokens(2, 6)
    model.embed_tokens.weight[idx[0, 4]] = value
    logits = cached_logits(model, idx, [3, 1, 1, 1], model.new_cache(2, 6, dtype))
    assert logits[0, 4:].isnan().all() and logits[:, :4].isfinite().all() and logits[1].isfinite().all()
    assert steps["taken"] == 3


@both
@torch.no_grad()
def test_a_cache_in_float64_is_left_to_the_model(knobs, steps):
    model, idx = small_model(**knobs), tokens(2, 9)
    expected = cached_logits(model, idx, [4] + [1] * 5, model.new_cache(2, 9, torch.float64))
    accelerate(model)
    assert_close(cached_logits(model, idx, [4] + [1] * 5, model.new_cache(2, 9, torch.float64)), expected)
    assert not steps["taken"]


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("knobs", [*CASES.values(), *ODD.values()], ids=[*CASES, *ODD])
@torch.no_grad()
def test_weights_in_bf16(knobs, rows, steps):
    """No further from the numbers in double precision than torch is, whose hidden states are in bf16 everywhere."""
    model, idx = small_model(torch.bfloat16, **knobs), tokens(rows, 50)
    cache = partial(model.new_cache, rows, 50, torch.float32)
    exact = cached_logits(copy.deepcopy(model).double(), idx, [40] + [1] * 10, cache())
    torch_error, error = (
        (cached_logits(m, idx, [40] + [1] * 10, cache())[:, 40:] - exact[:, 40:]).square().mean()
        for m in (model, accelerate(copy.deepcopy(model)))
    )
    assert error <= torch_error and steps == {"taken": 10, "made": 1}
    assert accelerate(model)(idx[:, :1], cache=model.new_cache(rows, 1))[0].dtype == torch.bfloat16


# Ways to change a model, each a function of the model. All but the first two change its numbers.


def transposed(model):
    for linear in (model.layers[0].mlp.gate_proj, model.layers[1].self_attn.o_proj):
        linear.weight.data = linear.weight.data.t().contiguous().t()


def offset_views(model):
    for p in model.parameters():
        p.data = torch.cat([torch.ones(1), p.data.flatten()])[1:].view(p.shape)


def in_place(model):
    model.layers[0].mlp.down_proj.weight.mul_(2)


def new_data(model):
    model.layers[0].input_layernorm.weight.data = model.layers[0].input_layernorm.weight.data * 2


def replaced_parameter(model):
    model.layers[0].input_layernorm.weight = nn.Parameter(2 * model.layers[0].input_layernorm.weight)


def assigned(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["layers.0.input_layernorm.weight"] *= 2
    model.load_state_dict(state, assign=True)


def mixed_precision(model):
    model.norm.weight.data = model.norm.weight.data.bfloat16() * 2


def bfloat16(model):
    model.bfloat16()


def float64(model):
    model.double()


def bias(model):
    model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.ones(model.config.n_embd))


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized(model):
    parametrize.register_parametrization(model.layers[0].self_attn.o_proj, "weight", Twice())


def pruned(model):
    prune.l1_unstructured(model.layers[0].mlp.gate_proj, "weight", amount=0.5)


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a, self.b = torch.ones(2, base.in_features), torch.ones(base.out_features, 2) / base.in_features

    def forward(self, x):
        return self.base(x) + x @ self.a.mT @ self.b.mT


def lora(model):
    model.layers[1].mlp.up_proj = Lora(model.layers[1].mlp.up_proj)


def patched_forward(model):
    forward = model.layers[0].mlp.forward
    model.layers[0].mlp.forward = lambda x: 2 * forward(x)


class Halved(MLP):
    def forward(self, x):
        return super().forward(x) / 2


def subclass(model):
    model.layers[0].mlp.__class__ = Halved


def replaced_block(model):
    model.layers[0] = model.layers[1]


def fewer_layers(model):
    model.layers[0].forward = lambda x, *args: x


def epsilon(model):
    model.layers[0].post_attention_layernorm.eps = 0.5


def scale(model):
    model.layers[1].self_attn.attend.scale *= 2


def theta(model):
    model.config.rope_theta = 10.0


def shadowed_weight(model):
    norm = model.layers[0].input_layernorm
    norm.__dict__["weight"] = 2 * norm.weight


def expanded(model):
    force_form(model, absorbed=False)


CHANGES = [transposed, offset_views, in_place, new_data, replaced_parameter, assigned, mixed_precision, bfloat16]
CHANGES += [float64, bias, parametrized, pruned, lora, patched_forward, subclass, replaced_block, fewer_layers]
CHANGES += [epsilon, scale, theta, shadowed_weight, expanded]
PARTS = ["embed_tokens", "norm", "lm_head", "layers.0", "layers.0.input_layernorm", "layers.0.self_attn"]
PARTS += ["layers.0.self_attn.attend", "layers.1.self_attn.o_proj", "layers.1.mlp", "layers.1.mlp.up_proj"]


def hook(model, part, kind):
    module = model.get_submodule(part)
    if kind == "hook":
        module.register_forward_hook(lambda module, args, output: 1.5 * output)
    elif part == "embed_tokens":
        module.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    else:
        module.register_forward_pre_hook(lambda module, args: (1.5 * args[0] + 1, *args[1:]))


HOOKS = [partial(hook, part=part, kind=kind) for part in PARTS for kind in ("hook", "pre-hook")]
NAMES = [c.__name__ for c in CHANGES] + [f"{h.keywords['kind']}-{h.keywords['part']}" for h in HOOKS]


def decode(model, change, when, idx) -> Tensor:
    """Logits of decoding, with a change before it or in its middle."""
    if when == "before":
        change(model)
    cache = model.new_cache(len(idx), idx.size(1), dtype=torch.float32)
    logits = [model(idx[:, :4], cache=cache)[0]]
    for t in range(4, idx.size(1)):
        if t == 8 and when == "between":
            change(model)
        logits.append(model(idx[:, t : t + 1], cache=cache)[0])
    return torch.cat([part.double() for part in logits], 1)


@both
@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("change", [*CHANGES, *HOOKS], ids=NAMES)
@torch.no_grad()
def test_a_changed_model_is_decoded_as_changed(change, when, knobs, steps):
    knobs, idx = {**knobs, "tie_embeddings": False}, tokens(2, 13)
    expected, tolerance = decode(small_model(**knobs), change, when, idx), 0.1 if change is bfloat16 else 1e-5
    assert_close(decode(accelerate(small_model(**knobs)), change, when, idx), expected, tolerance)
    if when == "between":
        assert steps["taken"] >= 4  # as long as nothing was changed
        steps.clear()
        model = accelerate(small_model(**knobs))
        assert_close(decode(model, lambda model: None, when, idx), decode(pure(model), change, "never", idx))
        assert steps["taken"] == 9
    else:
        change(model := small_model(**knobs))  # before the classes are swapped
        assert_close(decode(accelerate(model), lambda model: None, when, idx), expected, tolerance)


@torch.no_grad()
def test_a_step_is_made_again_after_a_change(steps):
    model, idx = accelerate(small_model()), tokens(1, 20)
    cache = model.new_cache(1, 20)
    for t in range(20):
        if t == 5:
            handle = model.norm.register_forward_hook(lambda *args: None)
        if t == 12:
            handle.remove()
        model(idx[:, t : t + 1], cache=cache)
    assert steps["made"] == 2 and steps["taken"] >= 5 + 3


CLASS_PATCHES = [(RMSNorm, "forward"), (MLP, "forward"), (model_py.Block, "forward"), (nn.Embedding, "forward")]


@pytest.mark.parametrize("owner, name", CLASS_PATCHES, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("when", ["before", "between"])
@torch.no_grad()
def test_a_class_patched_is_not_passed_over(owner, name, when, monkeypatch):
    original, idx = getattr(owner, name), tokens(2, 13)

    def patch(model):
        monkeypatch.setattr(owner, name, lambda *args: 1.5 * original(*args))

    expected = decode(small_model(), patch, when, idx)
    monkeypatch.setattr(owner, name, original)
    assert_close(decode(accelerate(small_model()), patch, when, idx), expected)


@torch.no_grad()
def test_a_function_patched_is_not_passed_over(monkeypatch):
    original, idx = model_py.rotate, tokens(2, 13)

    def patch(model):
        monkeypatch.setattr(model_py, "rotate", lambda x, rope: original(x, rope[::-1]))

    expected = decode(small_model(), patch, "between", idx)
    monkeypatch.setattr(model_py, "rotate", original)
    assert_close(decode(accelerate(small_model()), patch, "between", idx), expected)


class OtherCache(KVCache):
    def advance(self, batch_size, T):
        return super().advance(batch_size, T) + 1


@torch.no_grad()
def test_other_caches_are_left_to_the_model(steps):
    model, idx = small_model(), tokens(2, 9)
    make = partial(OtherCache, model.config.kv_layouts(), 2, 9, torch.float32, "cpu")
    expected = cached_logits(model, idx, [1] * 9, make())
    assert_close(cached_logits(accelerate(model), idx, [1] * 9, make()), expected)
    assert not steps["taken"]


@both
@torch.no_grad()
def test_copies_have_steps_of_their_own(knobs, steps):
    model, idx = accelerate(small_model(**knobs)), tokens(2, 12)
    cached_logits(model, idx, [1] * 12)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        in_place(other)
        expected = cached_logits(pure(copy.deepcopy(other)), idx, [1] * 12)
        steps.clear()
        assert_close(cached_logits(other, idx, [1] * 12), expected)
        assert steps["taken"] == 12


@torch.no_grad()
def test_one_cache_is_not_mistaken_for_another(steps):
    """Two models may use one cache in turns, and a copy of a cache goes on alone."""
    a, b, idx = small_model(seed=1), small_model(seed=2), tokens(1, 12)

    def decode() -> Tensor:
        cache, logits = a.new_cache(1, 12), []
        for t in range(12):
            other = copy.deepcopy(cache)
            logits += [(b if t % 3 == 2 else a)(idx[:, t : t + 1], cache=cache)[0]]
            logits += [a(idx[:, t : t + 1], cache=other)[0]]
        return torch.cat(logits, 1)

    expected = decode()
    accelerate(a), accelerate(b)
    assert_close(decode(), expected)


@torch.no_grad()
def test_a_step_goes_with_its_cache():
    model = accelerate(small_model())
    before, cache = len(cpu_decode.STEPS), model.new_cache(1, 4)
    model(tokens(1, 1), cache=cache)
    assert len(cpu_decode.STEPS) == before + 1
    del cache
    assert len(cpu_decode.STEPS) == before


def test_gradients_are_recorded(steps):
    model = accelerate(small_model())
    model(tokens(1, 1), cache=model.new_cache(1, 4))[0].sum().backward()
    assert model.norm.weight.grad is not None and not steps["taken"]


@both
@torch.no_grad()
def test_modes_and_transforms_are_left_to_the_model(knobs, steps):
    model, idx = accelerate(small_model(**knobs)), tokens(2, 1)
    cache = model.new_cache(2, 20)

    def step(idx=idx):
        return model(idx, cache=cache)[0]

    with torch.autocast("cpu", torch.bfloat16):
        assert step().dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() > 0
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    step()
    handle.remove()
    step(idx.int())
    assert not steps["taken"]
    step()
    assert steps["taken"] == 1


@both
@torch.no_grad()
def test_what_does_not_fit_is_refused_as_by_the_model(knobs, steps):
    model = accelerate(small_model(**knobs))
    cache = model.new_cache(2, 3)
    model(tokens(2, 1), cache=cache)
    for bad in (-1, 61):
        with pytest.raises(IndexError):
            model(torch.tensor([[0], [bad]]), cache=cache)
        cache.rewind([1, 1])
    with pytest.raises(ValueError, match="does not fit"):
        model(tokens(1, 1), cache=cache)
    for _ in range(2):
        model(tokens(2, 5)[:, -1:], cache=cache)  # of another stride
    with pytest.raises(ValueError, match="too short"):
        model(tokens(2, 1), cache=cache)
    assert cache.lengths.tolist() == cache.host_lengths() == [3, 3] and steps["taken"] == 3


@both
def test_two_threads_with_a_cache_each(knobs):
    model, idx = accelerate(small_model(**knobs)), [tokens(2, 20, seed=seed) for seed in range(2)]
    expected = [cached_logits(model, rows, [1] * 20) for rows in idx]
    found = [None, None]

    def work(i):
        found[i] = cached_logits(model, idx[i], [1] * 20)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_decodes():
    """By model.py. With several threads, torch itself may wait for threads that a fork does not have."""
    model, idx = accelerate(small_model()), tokens(1, 6)
    expected = cached_logits(model, idx, [1] * 6)
    child = os.fork()
    if not child:
        same = torch.allclose(cached_logits(model, idx, [1] * 6), expected, atol=1e-5)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("rows", [1, 3, 128, 129])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_head(rows, tied):
    model, hidden = small_model(tie_embeddings=tied), torch.randn(rows, 1, 32)
    expected = model.head(hidden)
    assert_close(accelerate(model).head(hidden), expected)
    assert_close(model.head(hidden.mT.contiguous().mT), expected)
    assert model.head(hidden.requires_grad_()).requires_grad is False


@pytest.mark.parametrize("name", cpu_checks.PRIVATE)
def test_torch_has_the_private_functions(name):
    assert cpu_checks.find((name,)), f"torch.{name} is gone: cpu_checks.py needs another"
    assert cpu_checks.find(("_C._no_such_function",)) is None
