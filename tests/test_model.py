"""model.py against slow loops written from the paper, edits of it against loops with the same edit,
sizes by hand, and properties that must hold."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call

import model
from model import (GPT, GPTConfig, MoE, Routing, Rows, SparseMLP, attend, mlp_of, of_each,
                   sort_by_expert)

SPARSE = ('moe', 'aoe')
# who scores x how the gate is made; the other router; scores from a part of C_i alone
VARIANTS = ({'mlp': 'moe'}, {'mlp': 'moe', 'factorised': True}, {'mlp': 'moe', 'router': 'large'},
            {'mlp': 'aoe'}, {'mlp': 'aoe', 'factorised': False}, {'mlp': 'aoe', 'd_judge': 3})
ALL = ({'mlp': 'dense'}, *VARIANTS)
RULES = ({}, {'select': 'top_p'}, {'select': 'expert_choice', 'capacity_factor': 1.5})
IN_FLOAT32 = {'dtype': torch.float32}    # where F.grouped_mm takes the place of a loop
needs_grouped_mm = pytest.mark.skipif(not hasattr(F, 'grouped_mm'), reason='PyTorch is too old')


def small_config(mlp, **changes):
    return GPTConfig(**{'mlp': mlp, 'vocab_size': 11, 'block_size': 8, 'n_layer': 2, 'n_head': 2,
                        'n_embd': 16, 'n_expert': 5, 'top_k': 2, 'd_ffn': 24} | changes)


def layer(mlp, dtype=torch.float64, **changes):
    """A layer alone, with weights large enough to tell experts apart."""
    torch.manual_seed(0)
    module = mlp_of(small_config(mlp, **changes)).to(dtype)
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


def look_slowly(m, x, i):
    """What the first matrix of expert i's gate finds in one token x (D,)."""
    return x @ (m.w_down if m.config.factorised else m.w_g)[i]


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
    capacity = max(1, int(c.capacity_factor * T / E + 0.5))
    for i in range(E):
        for t in sorted(range(T), key=lambda t: -q[t][i])[:capacity]:
            sets[t].add(i)
    return sets


def softmax_slowly(p_t, among, i):
    return p_t[i].exp() / sum(p_t[j].exp() for j in among)


def auxiliary_slowly(c, p, sets):
    """From scores p (T lists of E) and the sets of chosen experts: Eq. 2, 6 and 8."""
    T, E = len(p), len(p[0])
    q = torch.stack([torch.stack([softmax_slowly(p_t, range(E), i) for i in range(E)])
                     for p_t in p])
    f = [sum(i in chosen for chosen in sets) / T for i in range(E)]
    balance = E * sum(f[i] * q[:, i].sum() / T for i in range(E))
    return c.aux_weight * balance - c.conf_weight * (q * q.log()).sum() / T


def layer_slowly(m, x, look=look_slowly, route=route_slowly, choose=choose_slowly,
                 norm=lambda C: (C * C).sum().sqrt(), weigh=softmax_slowly,
                 auxiliary=auxiliary_slowly, residual=0):
    """(h, aux_loss, p, sets) of tokens x (T, D)."""
    c, E = m.config, m.config.n_expert
    if c.mlp == 'moe':
        p, look = [route(m, token) for token in x], look_slowly
    else:
        p = [[norm(look(m, token, i)[:c.d_judge]) for i in range(E)] for token in x]
    sets = choose(m, p)
    rows = []
    for token, p_t, chosen in zip(x, p, sets):
        h = residual * token
        among = chosen if c.weigh_among == 'chosen' else range(E)
        for i in chosen:
            g = look(m, token, i) @ m.w_up[i] if c.factorised else token @ m.w_g[i]
            h = h + weigh(p_t, among, i) * ((silu(g) * (token @ m.w_p[i])) @ m.w_o[i])
        rows.append(h)
    return torch.stack(rows), auxiliary(c, p, sets), p, sets


def gradients(m, x, h, aux_loss):
    """By name, of the parameters and x, of a sum over h and aux_loss."""
    cotangent = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).to(h.dtype)
    leaves = dict(m.named_parameters()) | {'x': x}
    found = torch.autograd.grad((h * cotangent).sum() + aux_loss, leaves.values(),
                                allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found))


def assert_equals_the_loop(m, T, **edits):
    """Values, choices and all gradients, for T tokens."""
    x = some_tokens(T, dtype=m.w_p.dtype)
    distance = 1e-9 if x.dtype == torch.float64 else 1e-4
    h, routing = m(x)
    fast = {'h': h} | gradients(m, x, h, routing.aux_loss) | routing._asdict()
    slow_h, aux_loss, p, sets = layer_slowly(m, x, **edits)
    slow = {'h': slow_h, 'aux_loss': aux_loss, 'scores': torch.stack([*map(torch.stack, p)])}
    for name, expected in (slow | gradients(m, x, slow_h, aux_loss)).items():
        torch.testing.assert_close(fast[name], expected, rtol=distance, atol=distance,
                                   msg=lambda text, name=name: f'{name}: {text}')
    assert [set(row.tolist()) - {-1} for row in routing.chosen] == sets
    return h, routing


@pytest.mark.parametrize('rule', (*RULES, {'weigh_among': 'all'}, IN_FLOAT32,
                                  {'select': 'top_p', 'weigh_among': 'all'}), ids=str)
@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_a_layer_equals_a_loop_over_tokens_and_experts(variant, rule):
    m = layer(aux_weight=0.3, conf_weight=0.2, **variant, **rule)
    h, routing = assert_equals_the_loop(m, 10)
    assert ((routing.chosen == -1) == (routing.weights == 0)).all()
    if m.config.weigh_among == 'chosen':
        somebody = (routing.chosen >= 0).any(1).to(h.dtype)
        torch.testing.assert_close(routing.weights.sum(1), somebody)


# of 40 tokens an expert gets more than 16 rows; of 1 token most get none
@pytest.mark.parametrize('E, top_k, T', ((1, 1, 40), (2, 1, 40), (3, 3, 6), (16, 1, 1), (16, 3, 8)))
@pytest.mark.parametrize('rule', (*RULES, IN_FLOAT32), ids=str)
@pytest.mark.parametrize('mlp', SPARSE)
def test_any_number_of_experts_and_tokens(mlp, rule, E, top_k, T):
    assert_equals_the_loop(layer(mlp, n_expert=E, top_k=top_k, aux_weight=0.3, **rule), T)


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_derivatives_and_their_derivatives_are_those_of_finite_differences(variant):
    changes = {'n_embd': 4, 'n_head': 1, 'n_expert': 3, 'd_ffn': 8, 'd_low': 4, 'd_judge': 2}
    m = layer(**changes | variant)
    names, parameters = zip(*m.named_parameters())

    def h(x, *values):
        return functional_call(m, dict(zip(names, values)), (x,))[0]
    inputs = (some_tokens(5, 4), *parameters)
    assert torch.autograd.gradcheck(h, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(h, inputs, fast_mode=True)


# capacity_factor * T / E is 0.018, 1.26, 1.62, 8.82, 178.2
@pytest.mark.parametrize('factor, capacity', ((0.01, 1), (0.7, 1), (0.9, 2), (4.9, 9), (99.0, 9)))
def test_expert_choice_rounds_its_capacity_to_what_can_be(factor, capacity):
    m = layer('moe', select='expert_choice', capacity_factor=factor)
    _, routing = assert_equals_the_loop(m, 9)
    assert all((routing.chosen == i).sum() == capacity for i in range(5))


# -----------------------------------------------------------------------------
# What a reader may edit: where, the new function, and the loop with that edit.

OF_ALL, ROUTE, EXPERTS = model.of_all, MoE.route, SparseMLP.experts
EDITS = {
    'look': (model, 'of_all', lambda w, x: OF_ALL(w, x).tanh(),
             {'look': lambda m, x, i: look_slowly(m, x, i).tanh()}),
    'norm': (model, 'norm', lambda C: C.abs().sum(-1), {'norm': lambda C: sum(c.abs() for c in C)}),
    'route': (MoE, 'route', lambda m, x: ROUTE(m, x).tanh(),
              {'route': lambda m, x: [p_i.tanh() for p_i in route_slowly(m, x)]}),
    'choose': (SparseMLP, 'choose', lambda m, p: p.topk(3).indices[:, 1:], {
        'choose': lambda m, p: [set(sorted(range(5), key=lambda i: -s[i])[1:3]) for s in p]}),
    'weigh': (SparseMLP, 'weigh', lambda m, p, I: p.gather(1, I).sigmoid(),
              {'weigh': lambda p_t, among, i: torch.sigmoid(p_t[i])}),
    'experts': (SparseMLP, 'experts', lambda m, x, *rest: EXPERTS(m, x, *rest) + 3 * x,
                {'residual': 3}),
    'auxiliary_loss': (SparseMLP, 'auxiliary_loss',
                       lambda m, p, I: m.config.aux_weight * p.logsumexp(1).square().mean(),
                       {'auxiliary': lambda c, p, sets: c.aux_weight * sum(
                           sum(a.exp() for a in p_t).log() ** 2 for p_t in p) / len(p)})}


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
@pytest.mark.parametrize('edit', EDITS)
def test_an_edit_of_part_1_takes_effect(edit, variant, monkeypatch):
    where, name, new, by_loop = EDITS[edit]
    monkeypatch.setattr(where, name, new)
    assert_equals_the_loop(layer(aux_weight=0.3, **variant), 10, **by_loop)


@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize('rule', (*RULES, {'weigh_among': 'all'}), ids=str)
@pytest.mark.parametrize('mlp', SPARSE)
def test_an_edited_score_of_few_digits_is_weighed_in_float32(mlp, rule, dtype, monkeypatch):
    """As `p = C.abs().sum(-1)` has under autocast."""
    monkeypatch.setattr(model, 'norm', lambda C: C.abs().sum(-1).to(dtype) / 8)
    monkeypatch.setattr(MoE, 'route', lambda m, x: ROUTE(m, x).to(dtype))
    m = layer(mlp, torch.float32, aux_weight=0.3, conf_weight=0.2, **rule)
    x = some_tokens(20, dtype=torch.float32)
    h, (p, I, w, aux_loss) = m(x)
    assert p.dtype == dtype and {h.dtype, w.dtype, aux_loss.dtype} == {torch.float32}
    sets, exact = [set(row.tolist()) - {-1} for row in I], p.double()
    for p_t, chosen, row, weights in zip(exact, sets, I.tolist(), w.tolist()):
        among = range(5) if rule == {'weigh_among': 'all'} else chosen
        expected = [softmax_slowly(p_t, among, i).item() if i >= 0 else 0 for i in row]
        assert weights == pytest.approx(expected, rel=1e-5)
    expected = auxiliary_slowly(m.config, exact, sets).item()
    assert aux_loss.item() == pytest.approx(expected, rel=1e-5)
    assert all(grad.isfinite().all() for grad in gradients(m, x, h, aux_loss).values())


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_any_token_may_have_nobody(variant):
    for select, share in itertools.product(('top_k', 'top_p'), (0.0, 0.5, 1.0)):
        m = layer(select=select, n_expert=4, aux_weight=0.3, **variant)
        torch.manual_seed(0)
        nobody = torch.rand(20, 4 if select == 'top_p' else 2) < share
        m.choose = lambda p, m=m, nobody=nobody: type(m).choose(m, p).masked_fill(nobody, -1)
        h, routing = assert_equals_the_loop(m, 20, choose=lambda m, p: [
            set(row.tolist()) - {-1} for row in m.choose(torch.stack([*map(torch.stack, p)]))])
        dropped = (routing.chosen < 0).all(1)
        assert not h[dropped].any() and h[~dropped].all()
        assert dropped.any() == (share > 0) and dropped.all() == (share == 1)


# -----------------------------------------------------------------------------
# Part 3

@pytest.mark.parametrize('K, share', ((2, 0), (2, 0.7), (4, 0), (4, 0.7)))
def test_rows_hold_every_pair_once_in_the_part_of_its_expert(K, share):
    torch.manual_seed(0)
    I = torch.rand(300, 4).argsort(1)[:, :K]
    I[(I == 1) | (torch.rand(300, K) < share)] = -1                # expert 1 gets none
    w = torch.rand(300, K).masked_fill(I < 0, 0)
    rows = sort_by_expert(I, w, 4)
    somebody = int((I >= 0).sum())                                 # with a place for every expert
    N = 16 * (math.ceil((somebody if K == 4 else 300 * K) / 16) + 4)           # nobody gets no row
    assert len(rows.token) == len(rows.pair) == len(rows.weight) == N == rows.ends[-1]
    ends = [0, *rows.ends.tolist()]
    assert all(end % 16 == 0 and start < end for start, end in zip(ends, ends[1:]))
    expert = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(zip(ends, ends[1:]))])
    assert torch.equal(rows.pair, 4 * rows.token + expert)
    counting = rows.weight != 0
    assert counting.sum() == somebody and rows.ends.dtype == torch.int32
    found = dict(zip(rows.pair[counting].tolist(), rows.weight[counting].tolist()))
    assert found == {4 * t + I[t, k].item(): w[t, k].item()
                     for t, k in itertools.product(range(300), range(K)) if I[t, k] >= 0}


@pytest.mark.parametrize('m, n', ((8, 8), (4, 8), (1, 8), (8, 1), (8, 4), (3, 5)))
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float64))
def test_each_row_meets_the_matrix_of_its_expert(m, n, dtype, monkeypatch):
    calls, original = [], getattr(F, 'grouped_mm', None)
    if original:
        monkeypatch.setattr(F, 'grouped_mm', lambda *a, **k: calls.append(1) or original(*a, **k))
    torch.manual_seed(0)
    x, w = torch.randn(64, m, requires_grad=True), torch.randn(3, m, n, requires_grad=True)
    cotangent, ends = torch.randn(64, n), torch.tensor([16, 32, 64], dtype=torch.int32)
    y = of_each(w.to(dtype), x.to(dtype), Rows(None, None, None, ends))
    expected = torch.cat([x[:16] @ w[0], x[16:32] @ w[1], x[32:] @ w[2]])
    distance = 0.02 if dtype == torch.bfloat16 else 1e-6
    for a, b in zip(*((out.float(), *torch.autograd.grad(out, (x, w), cotangent.to(out.dtype)))
                      for out in (y, expected))):
        assert (a - b).norm() <= distance * b.norm()
    assert bool(calls) == (m == n == 8 and dtype != torch.float64 and original is not None)


@needs_grouped_mm
@pytest.mark.parametrize('recompute', (False, True))
@pytest.mark.parametrize('variant', ALL, ids=str)
def test_a_bfloat16_step_reads_no_number_from_the_device(variant, recompute):
    """Fake tensors have no numbers: whatever would wait for a GPU to learn one fails on them."""
    changes = {'n_embd': 32, 'd_ffn': 48, 'aux_weight': 0.3, 'recompute': recompute} | variant
    with FakeTensorMode():
        gpt = GPT(small_config(**changes))
        idx = torch.zeros(4, 8, dtype=torch.int64)
        with torch.autocast('cpu', torch.bfloat16):
            _, loss, routing = gpt(idx, idx)
        (loss + routing.aux_loss.sum()).backward()
        assert all(p.grad.shape == p.shape for p in gpt.parameters())
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.slow
@needs_grouped_mm
@pytest.mark.parametrize('changes, dtype', (
    *itertools.product(ALL, (torch.bfloat16,)), ({'mlp': 'aoe'}, torch.float32),
    ({'mlp': 'aoe', 'recompute': True}, torch.bfloat16)), ids=str)
def test_a_training_step_compiles_in_bfloat16_into_one_graph(changes, dtype):
    torch.manual_seed(0)
    torch.compiler.reset()
    gpt = GPT(small_config(**{'n_embd': 32, 'd_ffn': 48, 'aux_weight': 0.01} | changes))
    idx = torch.randint(11, (16, 8))
    # aot_eager needs no C++ compiler
    compiled = torch.compile(gpt, fullgraph=dtype == torch.bfloat16, backend='aot_eager')
    results = []
    for forward in (gpt, compiled):
        with torch.autocast('cpu', dtype, enabled=dtype == torch.bfloat16):
            _, loss, routing = forward(idx, idx)
        grads = torch.autograd.grad(loss + routing.aux_loss.sum(), gpt.parameters())
        results.append((loss.item(), torch.cat([grad.flatten() for grad in grads])))
    losses, grads = zip(*results)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)         # as far as bfloat16 goes
    assert torch.cosine_similarity(*grads, dim=0) > 0.999


@pytest.mark.parametrize('variant', ALL, ids=str)
def test_bfloat16_by_autocast_or_of_the_whole_model_stays_close_to_float32(variant):
    torch.manual_seed(0)
    gpt = GPT(small_config(**{'n_embd': 64, 'd_ffn': 96, 'aux_weight': 0.3} | variant))
    idx = torch.randint(11, (4, 8))
    exact = gpt(idx, idx)[1]
    inputs = []
    gpt.blocks[0].mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        _, rough, routing = gpt(idx, idx)
    assert inputs == [torch.bfloat16]                              # cast once, for all matmuls
    if variant['mlp'] != 'dense':
        assert {field.dtype for field in routing} == {torch.float32, torch.int64}
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
# The GPT

@pytest.mark.parametrize('variant', ALL, ids=str)
def test_computing_again_changes_nothing_but_memory(variant):
    """With dropout, which has to be the same again."""
    torch.manual_seed(0)
    gpt = GPT(small_config(**variant, dropout=0.3, aux_weight=0.3, conf_weight=0.2))
    idx, entered, results, kept = torch.randint(11, (4, 8)), [], [], ([], [])
    gpt.blocks[1].mlp.register_forward_pre_hook(lambda *_: entered.append(1))
    for gpt.config.recompute, sizes in zip((False, True), kept):   # sizes: numbers, for backward
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            logits, loss, routing = gpt(idx, idx)
        grads = torch.autograd.grad(loss + routing.aux_loss.sum(), gpt.parameters())
        results.append((logits, loss, *routing, *grads))
    assert len(entered) == 3 and sum(kept[1]) < 0.5 * sum(kept[0])          # once, and twice
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize('changes', (*ALL, {'mlp': 'aoe', 'select': 'top_p'}), ids=str)
def test_logits_do_not_depend_on_later_tokens(changes):
    torch.manual_seed(0)
    gpt = GPT(small_config(**changes)).double()
    idx = torch.randint(11, (1, 8))
    logits = gpt(idx)[0]
    for t in range(1, 8):
        other = gpt((idx + (torch.arange(8) >= t)) % 11)[0]        # other tokens from t on
        torch.testing.assert_close(other[0, :t], logits[0, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(other[0, t:], logits[0, t:])


def test_a_token_whose_norms_are_all_the_same_has_finite_gradients():
    m = layer('aoe', aux_weight=0.1)
    m.w_down.data = m.w_down.data[:1].repeat(5, 1, 1)
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
            assert h.isfinite().any(1).sum() == 5
    for p in m.parameters():
        torch.nn.init.constant_(p, math.inf)
    m(x)                                                           # no crash


@pytest.mark.parametrize('mlp', ('dense', *SPARSE))
def test_the_model_stacks_the_facts_of_its_layers_and_adds_nothing_to_the_loss(mlp):
    torch.manual_seed(0)
    gpt, idx = GPT(small_config(mlp, aux_weight=0.01)), torch.randint(11, (4, 8))
    found = []
    for block in gpt.blocks:
        block.mlp.register_forward_hook(lambda _, args, output: found.append(output[1]))
    logits, loss, routing = gpt(idx, idx)
    assert logits.shape == (4, 8, 11) and gpt(idx)[1] is None
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), idx.flatten()))
    if mlp == 'dense':
        assert all(field.numel() == 0 for field in routing) and routing.aux_loss.sum() == 0
        return
    assert routing.scores.shape == (2, 32, 5) and (routing.aux_loss > 0).all()
    assert routing.chosen.shape == routing.weights.shape == (2, 32, 2)
    for name, field, layers in zip(Routing._fields, routing, zip(*found[:2])):
        assert torch.equal(field, torch.stack(layers))
        assert field.requires_grad == (name == 'aux_loss')


def test_the_model_by_hand():
    gpt = GPT(small_config('dense')).double()
    for p in gpt.parameters():
        p.data.normal_(std=0.4, generator=torch.Generator().manual_seed(2))
    gpt.embedding.weight.data *= 0.01                              # so small that eps matters
    idx = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    turn = torch.exp(1j * torch.arange(8)[:, None] * 10000 ** (-torch.arange(4) / 4))

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + 2 ** -23).sqrt() * module.weight
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
    assert {m.eps for m in gpt.modules() if isinstance(m, torch.nn.RMSNorm)} == {2 ** -23}
    torch.testing.assert_close(gpt(idx[None])[0][0], expected, rtol=1e-5, atol=1e-8)


def attend_slowly(q, k, v):
    scores = (q @ k.mH).real / math.sqrt(v.shape[-1])              # of complex numbers: rotary
    return scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize('S', (8, 300))                            # float32 on a CPU, or not
def test_attention_is_a_softmax_over_what_came_before(S):
    q, k, v = torch.randn(3, 1, 2, S, 4)
    torch.testing.assert_close(attend(q, k, v, 0.0), attend_slowly(q, k, v))
    q, k, v = (a.bfloat16() for a in (q, k, v))
    exact = attend(q.float(), k.float(), v.float(), 0.0)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(attend(q, k, v, 0.0).float(), exact) == (S < 256)


def test_dropout_is_of_embeddings_of_attention_and_of_what_joins_the_residual(monkeypatch):
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'dropout', lambda x, p, training, _: calls.append(p * training) or x)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda *qkv, dropout_p, is_causal: (
        calls.append(dropout_p) or attention(*qkv, is_causal=is_causal)))
    for training, S in itertools.product((True, False), (8, 300)):
        calls.clear()
        gpt = GPT(small_config('aoe', dropout=0.3, block_size=S)).train(training)
        gpt(torch.zeros(1, S, dtype=torch.int64))
        assert calls == [0.3 * training] * (1 + 2 * 3)


# -----------------------------------------------------------------------------
# Sizes

@pytest.mark.parametrize('d_low, d_judge', ((None, None), (6, None), (None, 5), (6, 5)))
def test_keys_that_are_none_get_what_fits_and_those_of_no_use_become_none(d_low, d_judge):
    low, whole_judge = d_low or 8, d_judge or 8
    for changes, expected in (
            ({'mlp': 'dense', 'factorised': True}, (False, None, None)),
            ({'mlp': 'dense', 'router': 'large'}, (False, None, None)),
            ({'mlp': 'moe'}, (False, None, None)),
            ({'mlp': 'moe', 'factorised': True}, (True, low, None)),
            ({'mlp': 'moe', 'router': 'large'}, (False, low, None)),
            ({'mlp': 'aoe'}, (True, low, d_judge or low)),
            ({'mlp': 'aoe', 'factorised': False, 'router': 'large'}, (False, None, whole_judge))):
        c = small_config(**changes, d_low=d_low, d_judge=d_judge)
        assert (c.factorised, c.d_low, c.d_judge) == expected


def test_default_sizes():
    assert GPTConfig(n_embd=32).d_ffn == 128
    for D, d_ffn, d_judge in ((4, 16, 4), (16, 64, 8), (64, 256, 8), (96, 384, 16), (192, 768, 32),
                              (768, 3072, 128), (192, 20, 20)):    # about D / 6, if there are
        assert GPTConfig(n_embd=D, n_head=1, d_ffn=d_ffn, factorised=False).d_judge == d_judge
    for D, d_ffn in itertools.product(range(96, 1100, 80), range(96, 4200, 80)):
        away = {}                        # from a third: each d_low that gives an expert moe's size
        for d_low in range(8, D + 1, 8):
            d_wide = model.width_of_equal_size(D, d_ffn, d_low)
            if abs((d_low * (D + d_wide) + 2 * D * d_wide) / (3 * D * d_ffn) - 1) <= 0.01:
                away[d_low] = abs(d_low - min(D, d_ffn) / 3)
        assert away[GPTConfig(n_embd=D, d_ffn=d_ffn, n_head=1).d_low] == min(away.values())
    for D, d_ffn, d_low in ((96, 24, 8), (96, 112, 32), (16, 24, 8)):          # none has its size
        assert GPTConfig(n_embd=D, d_ffn=d_ffn).d_low == d_low
    # the paper's shapes; of its 6470 the nearest multiple of 8
    assert GPTConfig(n_head=12, n_embd=768, d_ffn=3072, d_low=256).d_wide == 3840
    assert GPTConfig(n_head=20, n_embd=1280, d_ffn=5120, d_low=400).d_wide == 6472


def test_parameters_and_flops_by_hand():
    D, S, V, L, E, K, d, d_low, wide = 16, 8, 11, 2, 5, 2, 24, 8, 24           # Eq. 5: 23.2
    norms, around = (2 * L + 1) * D, L * 4 * D * D + V * D         # attention, and embedding = head
    whole, down, rest = 3 * D * d, D * d_low, d_low * wide + 2 * D * wide      # of an expert
    judge, R, large = 3, D * E, 30 * (D + E)                       # nearly E d_low D
    # a layer's MLP: all numbers, those that a token meets, and those that it meets once more
    for changes, total, active, again in (
            ({'mlp': 'dense'}, K * whole, K * whole, 0),
            ({'mlp': 'moe'}, R + E * whole, R + K * whole, 0),
            ({'mlp': 'moe', 'factorised': True}, R + E * (down + rest), R + K * (down + rest), 0),
            ({'mlp': 'moe', 'router': 'large'}, large + E * whole, large + K * whole, 0),
            ({'mlp': 'aoe'}, E * (down + rest), E * down + K * rest, 0),
            ({'mlp': 'aoe', 'd_judge': judge}, E * (down + rest), E * down + K * rest, 0),
            ({'mlp': 'aoe', 'factorised': False, 'd_judge': judge}, E * whole,
             (E - K) * D * judge + K * whole, K * D * judge),
            ({'mlp': 'moe', 'select': 'top_p'}, R + E * whole, R + E * whole, 0),
            ({'mlp': 'moe', 'select': 'expert_choice', 'capacity_factor': 1.5},
             R + E * whole, R + 3 * whole // 2, 0),
            ({'mlp': 'aoe', 'factorised': False, 'd_judge': judge, 'select': 'expert_choice',
              'capacity_factor': 99.0}, E * whole, E * whole, E * D * judge)):
        gpt = GPT(small_config(**changes))
        assert gpt.total_parameters() == norms + around + L * total, changes
        assert gpt.active_parameters() == norms + around + L * active, changes
        multiplied = around + L * (active + again)
        assert gpt.flops_per_token() == 6 * multiplied + 12 * L * S * D, changes


def test_initialisation():
    torch.manual_seed(0)
    for variant, router_std in itertools.product(ALL, (0.02, 0.7)):
        gpt = GPT(GPTConfig(**{'vocab_size': 84, 'n_layer': 3, 'n_embd': 128, 'd_ffn': 256,
                               'router_std': router_std} | variant))
        keep = 128 ** -0.5                                         # of 128 rows; w_up: d_low rows
        stds = {'w_g': keep, 'w_p': keep, 'w_down': keep, 'router_in': keep, 'w_up': 40 ** -0.5,
                'w_o': 0.02 / 6 ** 0.5, 'out': 0.02 / 6 ** 0.5, 'router': router_std}
        for name, p in gpt.named_parameters():
            if p.dim() == 1:
                assert (p == 1).all()
            else:
                last = name.removesuffix('.weight').rsplit('.', 1)[-1]
                std, rel = stds.get(last, 0.02), 0.1 if last == 'router' else 0.03
                assert p.std().item() == pytest.approx(std, rel=rel) and abs(p.mean()) < 0.1 * std


# -----------------------------------------------------------------------------
# Generation, and refusals

@pytest.mark.parametrize('changes', (*ALL, {'mlp': 'aoe', 'select': 'expert_choice'}), ids=str)
def test_generation(changes):
    torch.manual_seed(0)
    gpt = GPT(small_config(**changes, dropout=0.5))                # which generating switches off
    for block in gpt.blocks:
        torch.nn.init.normal_(block.attention.out.weight)          # what was before matters
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    greedy = gpt.generate(idx, 9, temperature=0)
    expected = idx
    for _ in range(9):                                             # past the context of 8
        last = gpt(expected[:, -8:])[0][:, -1]
        expected = torch.cat([expected, last.argmax(-1, keepdim=True)], 1)
    assert greedy.tolist() == expected.tolist() == gpt.generate(idx, 9, vocab_top_k=1).tolist()
    one, same, other = (gpt.generate(idx, 9, **seed).tolist()
                        for seed in ({}, {'seed': 1337}, {'seed': 2}))
    assert one == same != other
    assert gpt.generate(idx, 20, temperature=9.0, vocab_size=7, vocab_top_k=99).max() < 7
    with pytest.raises(ValueError, match='got none'):
        gpt.generate(idx[:, :0], 1)
    with pytest.raises(ValueError, match='at most 8 tokens, got 12'):
        gpt(greedy)


def test_the_temperature_and_the_vocabulary_bound_are_respected():
    torch.manual_seed(0)
    gpt = GPT(small_config('moe'))
    gpt.embedding.weight.data *= 20                                # decided predictions
    idx = torch.zeros(2000, 1, dtype=torch.int64)
    p = (gpt(idx[:1])[0][0, -1] / 1.5).softmax(-1)
    kept = p.topk(3)
    drawn = gpt.generate(idx, 1, temperature=1.5, vocab_top_k=3)[:, 1].bincount(minlength=11)
    expected = torch.zeros(11).scatter(0, kept.indices, kept.values / kept.values.sum())
    assert (drawn / 2000 - expected).abs().max() < 0.04 and drawn.count_nonzero() == 3


OUT_OF_RANGE = (                         # key and value
    *itertools.product(('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_expert',
                        'top_k', 'd_ffn', 'd_low', 'd_judge', 'capacity_factor'),
                       (0, -4, 2**31, math.nan)),
    *itertools.product(('mlp', 'router', 'select', 'weigh_among'), ('none', None)),
    *itertools.product(('aux_weight', 'conf_weight', 'router_std'), (-1e-9, math.inf, math.nan)),
    *itertools.product(('top_p', 'dropout'), (-1e-9, 1.1, math.nan)), ('top_p', 0), ('dropout', 1))


@pytest.mark.parametrize('changes, key', (
    *(({key: value}, key) for key, value in OUT_OF_RANGE), ({'d_low': -1, 'mlp': 'dense'}, 'd_low'),
    ({'top_k': 6}, 'top_k'), ({'n_embd': 18}, 'n_embd'), ({'d_low': 17}, 'd_low'),
    ({'mlp': 'moe', 'router': 'large', 'd_low': 17}, 'd_low'), ({'d_ffn': 1}, 'd_low'),
    ({'d_judge': 9}, 'd_judge'), ({'factorised': False, 'd_judge': 17}, 'd_judge'),
    ({'factorised': False, 'd_ffn': 4, 'd_judge': 5}, 'd_judge')), ids=str)
def test_a_model_that_cannot_be_is_refused_in_a_line(changes, key):
    value = changes.get(key, 8)                                    # 8: a default
    with pytest.raises(ValueError, match=rf'\A{key}: expected .*, got {value!r}\Z'):
        small_config(**{'mlp': 'aoe'} | changes)


def test_what_is_just_within_the_bounds_is_not_refused():
    for changes in ({'top_k': 5}, {'n_embd': 20}, {'d_low': 16, 'd_judge': 16}, {'top_p': 1},
                    {'aux_weight': 1e9, 'router_std': 0, 'capacity_factor': 1e-9}, {'d_ffn': 7},
                    {'factorised': False, 'd_judge': 16}, {'mlp': 'moe', 'd_low': 99},
                    {'factorised': False, 'd_ffn': 4, 'd_judge': 4, 'd_low': 99}):
        logits = GPT(small_config(**{'mlp': 'aoe'} | changes))(torch.zeros(2, 8).long())[0]
        assert logits.isfinite().all()
    I = layer('moe', select='top_p', top_p=1e-3).choose(torch.randn(9, 5))
    assert (I >= 0).sum(1).tolist() == [1] * 9
    with pytest.raises(ValueError, match='^vocab_size: expected .*, got None'):
        GPT(small_config('aoe', vocab_size=None))
