"""model.py against slow loops written from the paper, edits of it against loops with the same edit,
sizes by hand, and properties that must hold."""

import itertools
import math
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import model
from conftest import ROOT
from model import GPT, MLPS, PAD, GPTConfig, Routing, Rows, attend, of_each, sort_by_expert

SPARSE = ('moe', 'aoe')
# who scores x how the gate is made, and the other router
VARIANTS = ({'mlp': 'moe'}, {'mlp': 'moe', 'factorised': True}, {'mlp': 'moe', 'router': 'large'},
            {'mlp': 'aoe'}, {'mlp': 'aoe', 'factorised': False})
RULES = ({}, {'select': 'top_p'}, {'select': 'expert_choice', 'capacity_factor': 1.5},
         {'weigh_among': 'all'}, {'select': 'top_p', 'weigh_among': 'all'})
needs_grouped_mm = pytest.mark.skipif(not hasattr(F, 'grouped_mm'),
                                      reason='this PyTorch has no F.grouped_mm')


def small_config(mlp, **changes):
    return GPTConfig(**{'mlp': mlp, 'vocab_size': 11, 'block_size': 8, 'n_layer': 2, 'n_head': 2,
                        'n_embd': 16, 'n_expert': 5, 'top_k': 2, 'd_ffn': 24} | changes)


def layer(mlp, dtype=torch.float64, mlps=MLPS, **changes):
    """A layer alone, with weights large enough to tell experts apart."""
    torch.manual_seed(0)
    module = mlps[mlp](small_config(mlp, **changes)).to(dtype)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


def some_tokens(T, D=16, dtype=torch.float64):
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


# -----------------------------------------------------------------------------
# Algorithms 1 and 2, one token and one expert at a time. What an edit of model.py changes, and
# nothing else, is an argument.

def silu(g):
    return g * torch.sigmoid(g)


def l2(C):
    return sum(c * c for c in C).sqrt()


def look_slowly(m, x, i):
    """What expert i finds in one token x (D,): x Wdown_i, or what the columns that judge find."""
    c = m.config
    if c.factorised:
        return x @ m.w_down[:, c.d_low * i:c.d_low * (i + 1)]
    return x @ m.w_g[i][:, :c.d_judge]


def route_slowly(m, x):
    x = silu(x @ m.router_in) if m.config.router == 'large' else x
    return list(x @ m.router)


def choose_slowly(m, p):
    """For each token the set of its experts, from scores p: T lists of E numbers."""
    T, E, c = len(p), len(p[0]), m.config
    q = [[softmax_slowly(p_t, range(E), i).item() for i in range(E)] for p_t in p]
    best = [sorted(range(E), key=lambda i: -scores[i]) for scores in q]
    if c.select == 'top_k':
        return [set(order[:c.top_k]) for order in best]
    sets = [set() for _ in range(T)]
    if c.select == 'top_p':
        for scores, order, chosen in zip(q, best, sets):
            for i in order:
                if sum(scores[j] for j in chosen) < c.top_p:
                    chosen.add(i)
        return sets
    capacity = max(1, round(c.capacity_factor * T / E))
    for i in range(E):
        for t in sorted(range(T), key=lambda t: -q[t][i])[:capacity]:
            sets[t].add(i)
    return sets


def softmax_slowly(p_t, among, i):
    return p_t[i].exp() / sum(p_t[j].exp() for j in among)


def balance_slowly(p, f):
    """E sum_i f_i P_i of Eq. 2, by the scores p (T lists of E) and the loads f (E)."""
    q = [[softmax_slowly(p_t, range(len(f)), i) for i in range(len(f))] for p_t in p]
    return len(f) * sum(f[i] * sum(q_t[i] for q_t in q) / len(q) for i in range(len(f)))


def layer_slowly(m, x, look=look_slowly, route=route_slowly, norm=l2, choose=choose_slowly,
                 weigh=softmax_slowly, balance=balance_slowly, activation=silu, residual=0):
    """(h, aux_loss, p, sets) of tokens x (T, D)."""
    c, E, T = m.config, m.config.n_expert, len(x)
    if c.mlp == 'moe':
        p, look = [route(m, token) for token in x], look_slowly
    else:
        p = [[norm(look(m, token, i)) for i in range(E)] for token in x]
    sets = choose(m, p)
    rows = []
    for token, p_t, chosen in zip(x, p, sets):
        h = residual * token
        among = chosen if c.weigh_among == 'chosen' else range(E)
        for i in chosen:
            g = look(m, token, i) @ m.w_up[i] if c.factorised else token @ m.w_g[i]
            h = h + weigh(p_t, among, i) * ((activation(g) * (token @ m.w_p[i])) @ m.w_o[i])
        rows.append(h)
    f = [sum(i in chosen for chosen in sets) / T for i in range(E)]
    q = [torch.stack([softmax_slowly(p_t, range(E), i) for i in range(E)]) for p_t in p]
    confidence = -sum((q_t * q_t.log()).sum() for q_t in q) / T
    aux_loss = c.aux_weight * balance(p, f) + c.conf_weight * confidence
    return torch.stack(rows), aux_loss, p, sets


def gradients(m, x, h, aux_loss):
    """By name, of the parameters and x, of a sum over h and aux_loss."""
    cotangent = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).to(h.dtype)
    leaves = dict(m.named_parameters()) | {'x': x}
    found = torch.autograd.grad((h * cotangent).sum() + aux_loss, leaves.values(),
                                allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found))


def assert_equals_the_loop(m, x, **edits):
    """Values, choices and all gradients, and with or without recomputing not a bit changes."""
    results = []
    for m.config.recompute in (True, False):
        h, routing = m(x)
        results.append({'h': h} | gradients(m, x, h, routing.aux_loss) | routing._asdict())
    h, aux_loss, p, sets = layer_slowly(m, x, **edits)
    slow = {'h': h, 'aux_loss': aux_loss, 'scores': torch.stack([*map(torch.stack, p)]).detach()}
    for name, expected in (slow | gradients(m, x, h, aux_loss)).items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-9, atol=1e-10,
                                   msg=lambda text, name=name: f'{name}: {text}')
    assert [set(row.tolist()) - {-1} for row in routing.chosen] == sets
    assert all(torch.equal(a, results[1][name]) for name, a in results[0].items())
    return h, routing


@pytest.mark.parametrize('rule', RULES, ids=str)
@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_a_layer_equals_a_loop_over_tokens_and_experts(variant, rule):
    m = layer(aux_weight=0.3, conf_weight=0.2, **variant, **rule)
    h, routing = assert_equals_the_loop(m, some_tokens(10))
    assert ((routing.chosen == -1) == (routing.weights == 0)).all()
    if m.config.weigh_among == 'chosen':
        somebody = (routing.chosen >= 0).any(1).double()
        torch.testing.assert_close(routing.weights.sum(1), somebody)


# of 40 tokens an expert gets more than PAD rows; of 1 token most get none
@pytest.mark.parametrize('E, top_k, T', ((1, 1, 40), (2, 1, 40), (3, 3, 6), (16, 1, 1), (16, 3, 8)))
@pytest.mark.parametrize('rule', RULES[:3], ids=str)
@pytest.mark.parametrize('variant', VARIANTS[:1] + VARIANTS[3:], ids=str)
def test_any_number_of_experts_and_tokens(variant, rule, E, top_k, T):
    m = layer(n_expert=E, top_k=top_k, aux_weight=0.3, **variant, **rule)
    assert_equals_the_loop(m, some_tokens(T))


@pytest.mark.parametrize('mlp', SPARSE)
def test_any_token_may_have_nobody(mlp):
    """None, some or all of them, under any rule; h is 0 for nobody's."""
    for select, share in itertools.product(('top_k', 'top_p'), (0.0, 0.5, 1.0)):
        m = layer(mlp, select=select, n_expert=4, d_ffn=23 if mlp == 'moe' else 24)
        torch.manual_seed(0)
        nobody = torch.rand(20, 4 if select == 'top_p' else 2) < share
        m.choose = lambda p, m=m, nobody=nobody: type(m).choose(m, p).masked_fill(nobody, -1)
        h, routing = assert_equals_the_loop(m, some_tokens(20), choose=lambda m, p: [
            set(row.tolist()) - {-1} for row in m.choose(torch.stack([*map(torch.stack, p)]))])
        assert not h[(routing.chosen < 0).all(1)].any()


@pytest.mark.parametrize('rule', RULES[:3], ids=str)
@pytest.mark.parametrize('variant', ({'mlp': 'dense'}, *VARIANTS), ids=str)
def test_a_batch_may_be_empty(variant, rule):
    for dtype in (torch.float32, torch.float64):
        m, x = layer(dtype=dtype, **variant, **rule), some_tokens(0, dtype=dtype)
        h, routing = m(x)
        h.sum().backward()
        assert h.shape == x.grad.shape == (0, 16)
        assert not any(p.grad.any() for p in m.parameters() if p.grad is not None)


# -----------------------------------------------------------------------------
# What a reader may edit: an old text of model.py, the new one, and the loop with that edit.

def above_the_mean(m, p):
    best = choose_slowly(m, p)
    mean = sum(p_t[i] for p_t, chosen in zip(p, best) for i in chosen) / (2 * len(p))
    return [{i for i in chosen if p_t[i] > mean} for p_t, chosen in zip(p, best)]


EDITS = {
    'look': ('self.look_through(self.first_step(), x) ',
             'self.look_through(self.first_step(), x).tanh()',
             {'look': lambda m, x, i: look_slowly(m, x, i).tanh()}),
    'norm': ('torch.linalg.vector_norm(C, dim=-1, dtype=',
             'torch.linalg.vector_norm(C, 1, -1, dtype=',
             {'norm': lambda C: sum(c.abs() for c in C)}),
    'route': ('return at_least_float32(x) @ at_least_float32(self.router)',
              'return (x @ self.router).tanh()',
              {'route': lambda m, x: [p_i.tanh() for p_i in route_slowly(m, x)]}),
    'choose': ('p.topk(self.config.top_k).indices  ',
               'p.topk(self.config.top_k + 1).indices[:, 1:]', {
                   'choose': lambda m, p: [set(sorted(range(5), key=lambda i: -p_t[i])[1:3])
                                           for p_t in p]}),
    'choose nobody': (
        'return p.topk(self.config.top_k).indices  ',
        'best = p.topk(2); return best.indices.masked_fill(best.values <= best.values.mean(), -1)',
        {'choose': above_the_mean}),
    'weigh': ('return w.masked_fill(nobody, 0)', 'return p.gather(1, I).sigmoid()',
              {'weigh': lambda p_t, among, i: torch.sigmoid(p_t[i])}),
    'experts': ('y.new_zeros(x.shape).scatter_add(0, token, y)', '(3 * x).scatter_add(0, token, y)',
                {'residual': 3}),
    'out': ('F.silu(g)', 'F.relu(g)', {'activation': torch.relu}),
    'auxiliary_loss': ('self.config.aux_weight * E * (f * P).sum()',
                       'self.config.aux_weight * E * p.logsumexp(1).square().mean()',
                       {'balance': lambda p, f: 5 * sum(sum(a.exp() for a in p_t).log() ** 2
                                                        for p_t in p) / len(p)}),
}


def edited(*old_and_new):
    """model.py with another text in one place, as a module of its own."""
    with open(os.path.join(ROOT, 'model.py'), encoding='utf-8') as file:
        text = file.read()
    assert text.count(old_and_new[0]) == 1
    module = types.ModuleType('edited')
    sys.modules['edited'] = module                                 # where dataclasses look it up
    exec(text.replace(*old_and_new), vars(module))
    return module


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
@pytest.mark.parametrize('edit', EDITS)
def test_an_edit_of_part_1_takes_effect(edit, variant):
    old, new, by_loop = EDITS[edit]
    m = layer(mlps=edited(old, new).MLPS, aux_weight=0.3, **variant)
    h, routing = assert_equals_the_loop(m, some_tokens(20), **by_loop)
    if edit == 'choose nobody':
        assert 10 < (routing.chosen < 0).sum() < 30


@pytest.mark.parametrize('variant, edit', (
    ({'mlp': 'moe', 'router': 'large'}, ('F.silu(x @ self.router_in)',
                                         'F.dropout(F.silu(x @ self.router_in), 0.3)')),
    ({'mlp': 'aoe'}, ('return C, norm(C)', 'C = C + torch.randn_like(C); return C, norm(C)')),
    ({'mlp': 'aoe'}, ('F.silu(g) * u', 'F.dropout(F.silu(g) * u, 0.3)'))), ids=str)
def test_random_numbers_in_what_is_computed_again_give_right_gradients(variant, edit):
    m = layer(mlps=edited(*edit).MLPS, aux_weight=0.3, recompute=True, **variant)

    def loss():
        torch.manual_seed(3)
        h, routing = m(some_tokens(20))
        return h.square().mean() + routing.aux_loss
    for name, p in m.named_parameters():                           # uphill and downhill from here
        values, (grad,) = [], torch.autograd.grad(loss(), p)
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                p += step * grad / grad.norm()
            values.append(loss().item())
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(grad.norm().item(), rel=1e-4), name


# -----------------------------------------------------------------------------
# Part 3, and what is computed again

@pytest.mark.parametrize('leave_out, share', ((False, 0), (False, 0.7), (True, 0), (True, 0.7)))
def test_rows_hold_every_pair_once_in_the_part_of_its_expert(leave_out, share):
    torch.manual_seed(0)
    I = torch.rand(300, 3).topk(2).indices
    I += I > 0                                                     # expert 1 of 4 gets none
    I[torch.rand(300, 2) < share] = -1
    w = torch.rand(300, 2).masked_fill(I < 0, 0)
    rows = sort_by_expert(I, w, 4, leave_out)
    P = PAD * (math.ceil((int((I >= 0).sum()) if leave_out else 600) / PAD) + 4)
    assert len(rows.token) == len(rows.pair) == len(rows.weight) == P == rows.ends[-1]
    ends = [0, *rows.ends.tolist()]
    assert all(end % PAD == 0 and start < end for start, end in zip(ends, ends[1:]))
    for t, k in itertools.product(range(300), range(2)):
        i = I[t, k].item()
        mine = (rows.pair == 4 * t + i) & (rows.weight != 0)
        if i >= 0:
            row = mine.nonzero().item()                            # the one
            assert ends[i] <= row < ends[i + 1] and rows.token[row] == t
            assert rows.weight[row] == w[t, k]
    assert rows.weight.count_nonzero() == (I >= 0).sum()


@pytest.mark.parametrize('m, n', ((8, 8), (4, 8), (1, 8), (8, 1), (3, 5)))
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float64))
def test_each_row_meets_the_matrix_of_its_expert(m, n, dtype, monkeypatch):
    calls, original = [], getattr(F, 'grouped_mm', None)
    if original:
        monkeypatch.setattr(F, 'grouped_mm', lambda *a, **k: calls.append(1) or original(*a, **k))
    torch.manual_seed(0)
    x, w = torch.randn(64, m, requires_grad=True), torch.randn(3, m, n, requires_grad=True)
    cotangent = torch.randn(64, n)
    ends = torch.tensor([16, 32, 64], dtype=torch.int32)
    y = of_each(w.to(dtype), x.to(dtype), Rows(None, None, None, ends))
    expected = torch.cat([x[:16] @ w[0], x[16:32] @ w[1], x[32:] @ w[2]])
    results = [(a.float(), *torch.autograd.grad(a, (x, w), cotangent.to(a.dtype)))
               for a in (y, expected)]
    distance = 0.02 if dtype == torch.bfloat16 else 1e-6
    for a, b in zip(*results):
        assert (a - b).norm() <= distance * b.norm()
    whole = m * dtype.itemsize % 16 == n * dtype.itemsize % 16 == 0
    assert bool(calls) == bool(original and whole and dtype != torch.float64)


@needs_grouped_mm
@pytest.mark.parametrize('dtype, distance', ((torch.float32, 1e-5), (torch.bfloat16, 0.02)))
@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_the_grouped_matmul_gives_what_the_loop_gives(variant, dtype, distance, monkeypatch):
    calls, original = [], F.grouped_mm
    monkeypatch.setattr(F, 'grouped_mm', lambda *a, **k: calls.append(1) or original(*a, **k))
    results = []
    for loop in (False, True):
        if loop:
            monkeypatch.setattr(model, 'has_grouped_mm', lambda x, w: False)
        m, x = layer(dtype=torch.float32, **variant), some_tokens(40, dtype=torch.float32)
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            h, routing = m(x)
        results.append({'h': h.float()} | gradients(m, x, h.float(), routing.aux_loss))
        assert len(calls) == 3
        assert routing.scores.dtype == routing.weights.dtype == torch.float32
        assert routing.aux_loss.dtype == torch.float32
    for name, a in results[0].items():
        assert (a - results[1][name]).norm() <= distance * a.norm(), name


@pytest.mark.parametrize('recompute', (False, True))
@pytest.mark.parametrize('variant', ({'mlp': 'dense'}, *VARIANTS), ids=str)
def test_second_derivatives(variant, recompute):
    inner = {'d_low': 2} if variant != VARIANTS[-1] else {'d_judge': 2}
    m = layer(n_embd=4, n_head=1, n_expert=3, d_ffn=8, recompute=recompute, **variant, **inner)
    names, parameters = zip(*m.named_parameters())

    def h(x, *values):
        return torch.func.functional_call(m, dict(zip(names, values)), (x,))[0]
    assert torch.autograd.gradgradcheck(h, (some_tokens(5, 4), *parameters), fast_mode=True)


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_of_what_is_as_wide_as_an_expert_backward_keeps_u_and_x_wg(variant):
    T, D, width = 64, 64, {}
    for recompute in (False, True):
        m = layer(dtype=torch.float32, n_embd=D, d_ffn=104, recompute=recompute, **variant)
        x, kept = some_tokens(T, D, torch.float32), {}
        known = {t.data_ptr() for t in (x, *m.parameters())}

        def pack(t, kept=kept, known=known):
            if t.data_ptr() not in known:
                kept[t.untyped_storage().data_ptr()] = t
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            m(x)
        d, P = m.w_p.shape[2], PAD * (2 * T // PAD + 5)
        wide = [t for t in kept.values() if t.shape == (P, d)]
        rest = sum(t.untyped_storage().nbytes() for t in kept.values()) - 4 * P * d * len(wide)
        width[recompute] = len(wide)
    assert width[True] == (1 if m.config.factorised else 2) < width[False]
    # C_i where the gate is factorised, and 64 bytes a row for indices, weights and scores
    assert rest <= P * (64 + (4 * m.config.d_low if m.config.factorised else 0))


@needs_grouped_mm
@pytest.mark.parametrize('variant', ({'mlp': 'dense'}, *VARIANTS), ids=str)
def test_a_bfloat16_step_reads_no_number_from_the_device(variant):
    """Meta tensors have no numbers: whatever would wait for a GPU to learn one fails on them."""
    changes = {'n_embd': 32, 'd_ffn': 48, 'aux_weight': 0.3, 'recompute': True} | variant
    with FakeTensorMode():                                         # meta tensors that say 'cpu'
        gpt = GPT(small_config(**changes))
        idx = torch.zeros(4, 8, dtype=torch.int64)
        with torch.autocast('cpu', torch.bfloat16):
            _, loss, routing = gpt(idx, idx)
        (loss + routing.aux_loss.sum()).backward()
        assert all(p.grad.shape == p.shape for p in gpt.parameters())
        with pytest.raises(DataDependentOutputException):
            loss.item()
        if variant['mlp'] != 'dense':                              # how many pairs depends on p
            with pytest.raises(DataDependentOutputException):
                GPT(small_config(**changes, select='top_p'))(idx)


@pytest.mark.slow
@needs_grouped_mm
@pytest.mark.parametrize('changes, dtype', (
    *itertools.product(({'mlp': 'dense'}, *VARIANTS), (torch.bfloat16,)),
    ({'mlp': 'aoe', 'recompute': False}, torch.bfloat16), ({'mlp': 'aoe'}, torch.float32)), ids=str)
def test_a_training_step_compiles_in_bfloat16_into_one_graph(changes, dtype):
    torch.manual_seed(0)
    torch.compiler.reset()
    gpt = GPT(small_config(**{'n_embd': 32, 'd_ffn': 48, 'aux_weight': 0.01, 'recompute': True}
                           | changes))
    idx = torch.randint(11, (16, 8))
    losses, grads = [], []
    # aot_eager needs no C++ compiler
    compiled = torch.compile(gpt, fullgraph=dtype == torch.bfloat16, backend='aot_eager')
    for forward in (gpt, compiled):
        with torch.autocast('cpu', dtype, enabled=dtype == torch.bfloat16):
            _, loss, routing = forward(idx, idx)
        found = torch.autograd.grad(loss + routing.aux_loss.sum(), gpt.parameters())
        losses.append(loss.item())
        grads.append(torch.cat([grad.flatten() for grad in found]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)         # as far as bfloat16 goes
    assert torch.cosine_similarity(*grads, dim=0) > 0.999


@pytest.mark.parametrize('variant', ({'mlp': 'dense'}, *VARIANTS), ids=str)
def test_bfloat16_by_autocast_or_of_the_whole_model_stays_close_to_float32(variant):
    torch.manual_seed(0)
    gpt = GPT(small_config(**{'n_embd': 64, 'd_ffn': 96} | variant))
    idx = torch.randint(11, (4, 8))
    exact = gpt(idx, idx)[1]
    inputs = []
    gpt.blocks[0].mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        rough = gpt(idx, idx)[1]
    assert inputs == [torch.bfloat16]                              # cast once, for all matmuls
    grads = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, gpt.parameters())])
             for loss in (exact, rough)]
    assert torch.cosine_similarity(*grads, dim=0) > 0.95           # a token or two change experts
    rougher = gpt.bfloat16()(idx, idx)[1]
    rougher.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in gpt.parameters())
    for loss in (rough, rougher):
        assert loss.item() == pytest.approx(exact.item(), abs=0.02) and loss.dtype == torch.float32
    assert gpt.generate(idx, 2).shape == (4, 10)


# -----------------------------------------------------------------------------
# Properties

@pytest.mark.parametrize('changes', ({'mlp': 'dense'}, *VARIANTS, {'mlp': 'moe', 'select': 'top_p'},
                                     {'mlp': 'aoe', 'select': 'top_p'}), ids=str)
def test_logits_do_not_depend_on_later_tokens(changes):
    torch.manual_seed(0)
    gpt = GPT(small_config(**changes)).double()
    idx = torch.randint(11, (1, 8))
    logits = gpt(idx)[0]
    for t in range(1, 8):
        other = gpt((idx + (torch.arange(8) >= t)) % 11)[0]        # other tokens from t on
        torch.testing.assert_close(other[0, :t], logits[0, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(other[0, t:], logits[0, t:])


@pytest.mark.parametrize('mlp', SPARSE)
def test_expert_choice_lets_later_tokens_decide_over_earlier_ones_and_does_not_generate(mlp):
    torch.manual_seed(0)
    gpt = GPT(small_config(mlp, select='expert_choice', capacity_factor=1.0)).double()
    for p in gpt.parameters():
        p.data *= 10
    idx = torch.randint(11, (1, 8))
    others = [torch.cat([idx[:, :4], torch.randint(11, (1, 4))], 1) for _ in range(10)]
    assert not all(torch.allclose(gpt(other)[0][0, :4], gpt(idx)[0][0, :4]) for other in others)
    with pytest.raises(ValueError, match='select: expected top_k or top_p, got expert_choice'):
        gpt.generate(idx, 1)


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))  # grouped_mm and the loop
@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_an_expert_without_tokens_gets_zero_gradients(variant, dtype):
    m = layer(dtype=dtype, **variant)
    m(some_tokens(1, dtype=dtype))[0].sum().backward()             # one token: 2 of 5 experts
    for w in (m.w_p, m.w_o, m.w_up if m.config.factorised else m.w_g):
        idle = [i for i in range(5) if not w.grad[i].any()]
        assert len(idle) == 3 or variant == VARIANTS[-1] and w is m.w_g
    assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)


def test_a_token_whose_norms_are_all_the_same_has_finite_gradients():
    m = layer('aoe', aux_weight=0.1)
    m.w_down.data = m.w_down.data[:, :8].repeat(1, 5)
    for x in (some_tokens(2), some_tokens(2) * 0):                 # all norms equal, and all zero
        h, routing = m(x)
        found = gradients(m, x, h, routing.aux_loss)
        assert h.isfinite().all() and all(grad.isfinite().all() for grad in found.values())


@pytest.mark.parametrize('rule', RULES[:3], ids=str)
@pytest.mark.parametrize('mlp', SPARSE)
def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other(mlp, rule):
    m = layer(mlp, **rule)
    for bad in (0, 2):
        x = some_tokens(6).detach()
        x[bad] = math.nan
        h = m(x)[0]
        assert not h[bad].isfinite().any()
        if m.config.select != 'expert_choice':                     # else the batch decides together
            assert h[[t for t in range(6) if t != bad]].isfinite().all()
    with torch.no_grad():
        for p in m.parameters():
            p.fill_(math.inf)
    m(x)                                                           # no crash


def test_the_loss_in_pieces_is_the_mean_over_all_tokens_that_count():
    torch.manual_seed(0)
    gpt = GPT(small_config('dense', block_size=700)).double()
    idx, targets = torch.randint(11, (2, 3, 700))                  # 2,100 tokens: two pieces
    for masked in (torch.zeros(3, 700), torch.rand(3, 700)):
        targets = targets.masked_fill(masked > 0.3, -100)
        logits, loss, _ = gpt(idx, targets)
        whole = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
        for a, b in zip(*(torch.autograd.grad(l, gpt.parameters(), retain_graph=True)
                          for l in (loss, whole))):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('mlp', SPARSE)
def test_the_model_stacks_the_facts_of_its_layers_and_adds_nothing_to_the_loss(mlp):
    torch.manual_seed(0)
    gpt, idx = GPT(small_config(mlp, aux_weight=0.01)), torch.randint(11, (4, 8))
    found = []
    for block in gpt.blocks:
        block.mlp.register_forward_hook(lambda _, args, output: found.append(output[1]))
    logits, loss, routing = gpt(idx, idx)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), idx.flatten()))
    assert routing.scores.shape == (2, 32, 5) and (routing.aux_loss > 0).all()
    assert routing.chosen.shape == routing.weights.shape == (2, 32, 2)
    for name, field, layers in zip(Routing._fields, routing, zip(*found)):
        assert torch.equal(field, torch.stack(layers))
        assert field.requires_grad == (name == 'aux_loss')


def test_dense_gives_the_same_things_in_the_same_order_with_nothing_in_the_routing():
    logits, loss, routing = GPT(small_config('dense'))(torch.zeros(1, 3, dtype=torch.int64))
    assert logits.shape == (1, 3, 11) and loss is None and isinstance(routing, Routing)
    assert all(field.numel() == 0 for field in routing) and routing.aux_loss.sum() == 0


def test_the_model_by_hand():
    gpt = GPT(small_config('dense')).double()
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.4, generator=torch.Generator().manual_seed(2))
    idx = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    turn = torch.exp(1j * torch.arange(8)[:, None] * 10000 ** (-torch.arange(4) / 4))

    def norm(x, module):
        return x / x.square().mean(-1, keepdim=True).sqrt() * module.weight
    x = gpt.embedding.weight[idx]
    for block in gpt.blocks:
        qkv = norm(x, block.norm_1) @ block.attention.qkv.weight.T
        q, k, v = qkv.view(8, 3, 2, 8).permute(1, 2, 0, 3)         # (n_head, S, head_dim)
        q, k = (torch.complex(a[..., :4], a[..., 4:]) * turn for a in (q, k))
        y = attend_slowly(q, k, v).transpose(0, 1).reshape(8, 16)
        x = x + y @ block.attention.out.weight.T
        n, m = norm(x, block.norm_2), block.mlp
        x = x + (silu(n @ m.w_g) * (n @ m.w_p)) @ m.w_o
    expected = norm(x, gpt.norm) @ gpt.embedding.weight.T
    torch.testing.assert_close(gpt(idx[None])[0][0], expected, rtol=1e-5, atol=1e-5)


def attend_slowly(q, k, v):
    scores = (q @ k.mH).real / math.sqrt(v.shape[-1])              # of complex numbers: rotary
    return scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize('S', (8, 300))                            # float32 on a CPU, or not
def test_attention_is_a_softmax_over_what_came_before(S):
    q, k, v = torch.randn(3, 1, 2, S, 4)
    torch.testing.assert_close(attend(q, k, v, 0.0), attend_slowly(q, k, v))
    assert (attend(q, k, v, 0.5) - attend(q, k, v, 0.0)).abs().max() > 0.1
    q, k, v = (a.bfloat16() for a in (q, k, v))
    exact = attend(q.float(), k.float(), v.float(), 0.0).bfloat16()
    assert torch.equal(attend(q, k, v, 0.0), exact) == (S < 256)


# -----------------------------------------------------------------------------
# Sizes

def test_the_switch_is_two_questions():
    assert [small_config(mlp).factorised for mlp in ('moe', 'aoe')] == [False, True]
    assert [GPTConfig(mlp='aoe', n_embd=D, n_head=1, factorised=False).d_judge
            for D in (16, 64, 96, 192, 768)] == [8, 8, 16, 32, 128]
    for mlp, factorised in itertools.product(SPARSE, (False, True)):
        names = dict(layer(mlp, factorised=factorised, d_ffn=40).named_parameters())
        gate = {'w_down', 'w_up'} if factorised else {'w_g'}
        router = {'router'} if mlp == 'moe' else set()
        assert set(names) == {'w_p', 'w_o'} | gate | router
        assert names['w_p'].shape[2] == (48 if factorised else 40)             # (Eq. 5: 44.8)


@pytest.mark.parametrize('n_embd, d_ffn', (
    *itertools.product((64, 96, 128, 192, 256, 384), (176, 256, 512, 1000)),
    (384, 1536), (768, 3072), (1280, 5120)))
def test_all_sparse_variants_have_the_size_of_moe_and_moe_the_active_one_of_dense(n_embd, d_ffn):
    def build(mlp, **changes):
        with torch.device('meta'):
            return GPT(GPTConfig(mlp=mlp, n_layer=3, n_embd=n_embd, d_ffn=d_ffn, vocab_size=84,
                                 **changes))
    moe, dense = build('moe'), build('dense')
    c = build('aoe').config
    assert c.d_low % 8 == 0 and c.d_wide % 8 == 0
    assert abs(c.d_low - n_embd / 3) <= n_embd / 4
    routers = 3 * n_embd * 8
    for variant in VARIANTS[1:]:
        other = build(**variant).total_parameters()
        if 'router' in variant:                                    # larger on purpose
            other -= 3 * 8 * c.d_low * n_embd
        assert abs(other / moe.total_parameters() - 1) < 0.01
    assert moe.active_parameters() - routers == dense.active_parameters()
    assert dense.active_parameters() == dense.total_parameters()


def test_d_wide_follows_equation_5_at_the_papers_shapes_and_d_low_keeps_the_size():
    assert GPTConfig(n_head=12, n_embd=768, d_ffn=3072, d_low=256).d_wide == 3840
    wide = GPTConfig(n_head=20, n_embd=1280, d_ffn=5120, d_low=400).d_wide
    assert wide == 6472                  # the paper's 6470, as a multiple of 8
    for D, d_ffn, d_low in ((96, 24, 8), (96, 32, 8), (96, 96, 40), (96, 384, 32),
                            (768, 3072, 256)):
        assert GPTConfig(n_embd=D, d_ffn=d_ffn, n_expert=12, top_k=3).d_low == d_low


def test_parameters_and_flops_by_hand():
    D, S, V, L, E, K, d, d_low = 16, 8, 11, 2, 5, 2, 24, 8
    norms, attention, head = (2 * L + 1) * D, L * 4 * D * D, V * D
    moe = GPT(small_config('moe'))
    assert moe.total_parameters() == norms + attention + head + L * (D * E + E * 3 * D * d)
    matrices = attention + head + L * (D * E + K * 3 * D * d)
    assert moe.active_parameters() == norms + matrices
    assert moe.flops_per_token() == 6 * matrices + 12 * L * S * D

    aoe = GPT(small_config('aoe'))
    wide = aoe.config.d_wide
    matrices = attention + head + L * (D * E * d_low + K * (d_low * wide + 2 * D * wide))
    assert aoe.active_parameters() == norms + matrices             # all E evaluate
    assert aoe.flops_per_token() == 6 * matrices + 12 * L * S * D

    factorised = GPT(small_config('moe', factorised=True))         # all C_i are found here, too
    assert factorised.active_parameters() == norms + matrices + L * D * E

    whole = GPT(small_config('aoe', factorised=False))
    matrices = attention + head + L * ((E - K) * D * d_low + K * 3 * D * d)
    assert whole.active_parameters() == norms + matrices
    assert whole.total_parameters() == moe.total_parameters() - L * D * E

    for select, of_E in (('top_p', E), ('expert_choice', 1)):
        active = GPT(small_config('moe', select=select, capacity_factor=1)).active_parameters()
        assert active == moe.active_parameters() + L * (of_E - K) * 3 * D * d


def test_initialisation():
    torch.manual_seed(0)
    config = {'vocab_size': 84, 'n_layer': 3, 'n_embd': 128, 'd_ffn': 256}
    rows = {'w_g': 128, 'w_p': 128, 'w_down': 128, 'w_up': 40, 'router_in': 128}   # d_low is 40
    for variant in ({'mlp': 'dense'}, *VARIANTS):
        gpt = GPT(GPTConfig(**config | variant))
        for name, p in gpt.named_parameters():
            last = name.rsplit('.', 1)[-1]
            if p.dim() == 1:
                assert (p == 1).all()
                continue
            std = rows[last] ** -0.5 if last in rows else 0.02
            if last == 'w_o' or 'attention.out' in name:
                std = 0.02 / math.sqrt(6)
            assert abs(p.mean().item()) < 0.1 * std
            assert p.std().item() == pytest.approx(std, rel=0.06 if last == 'router' else 0.03)


# -----------------------------------------------------------------------------
# Generation, and refusals

@pytest.mark.parametrize('mlp', MLPS)
def test_generation(mlp):
    torch.manual_seed(0)
    gpt = GPT(small_config(mlp, dropout=0.5))                      # which generating switches off
    for block in gpt.blocks:
        torch.nn.init.normal_(block.attention.out.weight)          # what was before matters
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    greedy = gpt.generate(idx, 20, temperature=0)
    expected = idx
    for _ in range(20):                                            # past the context of 8
        logits = gpt(expected[:, -8:])[0]
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert greedy.tolist() == expected.tolist()
    assert gpt.generate(idx, 20, vocab_top_k=1).tolist() == expected.tolist()
    one, same, other = (gpt.generate(idx, 30, seed=s).tolist() for s in (1, 1, 2))
    assert one == same != other
    assert gpt.generate(idx, 30, temperature=9.0, vocab_size=7).max() < 7
    with pytest.raises(ValueError, match='got none'):
        gpt.generate(idx[:, :0], 1)
    with pytest.raises(ValueError, match='at most 8 tokens, got 23'):
        gpt(greedy)


def test_the_temperature_and_the_vocabulary_bound_are_respected():
    torch.manual_seed(0)
    gpt = GPT(small_config('moe'))
    with torch.no_grad():
        gpt.embedding.weight *= 20                                 # decided predictions
    idx = torch.zeros(2000, 1, dtype=torch.int64)
    p = (gpt(idx[:1])[0][0, -1] / 1.5).softmax(-1)
    kept = p.topk(3)
    drawn = gpt.generate(idx, 1, temperature=1.5, vocab_top_k=3, seed=0)[:, 1]
    drawn = torch.bincount(drawn, minlength=11)
    assert drawn.sum() == drawn[kept.indices].sum() == 2000
    torch.testing.assert_close(drawn[kept.indices] / 2000, kept.values / kept.values.sum(),
                               atol=0.04, rtol=0)


@pytest.mark.parametrize('changes, says', (
    ({'n_embd': 30, 'n_head': 4}, 'n_embd'), ({'top_k': 6}, 'top_k'), ({'mlp': 'mlp'}, 'mlp'),
    ({'d_low': 24}, 'd_low'), ({'n_layer': 0}, 'n_layer'), ({'dropout': 1.0}, 'dropout'),
    ({'aux_weight': -1.0}, 'aux'), ({'top_p': 0.0}, 'top_p'),
    ({'capacity_factor': math.nan}, 'capacity_factor'), ({'conf_weight': math.inf}, 'conf_weight'),
    ({'d_ffn': 2}, 'd_low'), ({'factorised': False, 'd_ffn': 4, 'd_judge': 8}, 'd_judge'),
    ({'factorised': False, 'd_low': 8}, 'd_low'),
))
def test_a_model_that_cannot_be_is_refused(changes, says):
    with pytest.raises(ValueError, match=f'^{says}.*: expected .*, got '):
        small_config(**{'mlp': 'aoe'} | changes)
    with pytest.raises(ValueError, match='^vocab_size: expected .*, got None'):
        GPT(small_config('aoe', vocab_size=None))
