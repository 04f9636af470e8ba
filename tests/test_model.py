"""model.py is compared with slow loops written from the paper, edits of it with loops that have the
same edit, and sizes with a count by hand. Other tests check properties that must hold."""

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
# a router or the experts score, with whole or factorised gates; the last two have a w_judge
VARIANTS = ({'mlp': 'moe'}, {'mlp': 'moe', 'factorised': True}, {'mlp': 'moe', 'router': 'large'},
            {'mlp': 'aoe'}, {'mlp': 'aoe', 'factorised': False}, {'mlp': 'aoe', 'd_judge': 3},
            {'mlp': 'aoe', 'tied': False, 'd_judge': 3},
            {'mlp': 'aoe', 'tied': False, 'd_judge': 3, 'factorised': False})
ALL = ({'mlp': 'dense'}, *VARIANTS)
RULES = ({}, {'select': 'top_p'}, {'select': 'expert_choice', 'capacity_factor': 1.5})
IN_FLOAT32 = {'dtype': torch.float32}    # F.grouped_mm replaces a loop in it
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
# Algorithms 1 and 2, for one token and one expert at a time. An argument is what an edit changes.

def silu(g):
    return g * torch.sigmoid(g)


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


def layer_slowly(m, x, multiply=torch.matmul, route=route_slowly, choose=choose_slowly,
                 norm=lambda C: (C * C).sum().sqrt(), weigh=softmax_slowly,
                 auxiliary=auxiliary_slowly, residual=0):
    """(h, aux_loss, p, sets) of tokens x (T, D). `multiply` is what scores an expert."""
    c, E = m.config, m.config.n_expert
    if c.mlp == 'moe':
        p, multiply = [route(m, token) for token in x], torch.matmul
    else:
        judge = m.w_judge if not c.tied else m.w_down if c.factorised else m.w_g
        p = [[norm(multiply(token, judge[i])[:c.d_judge]) for i in range(E)] for token in x]
    sets = choose(m, p)
    rows = []
    for token, p_t, chosen in zip(x, p, sets):
        h = residual * token
        among = chosen if c.weigh_among == 'chosen' else range(E)
        for i in chosen:
            if c.factorised:             # the gate continues from the score, or it starts anew
                g = (multiply if c.tied else torch.matmul)(token, m.w_down[i]) @ m.w_up[i]
            else:
                g = token @ m.w_g[i]
            h = h + weigh(p_t, among, i) * ((silu(g) * (token @ m.w_p[i])) @ m.w_o[i])
        rows.append(h)
    return torch.stack(rows), auxiliary(c, p, sets), p, sets


def gradients(m, x, h, aux_loss):
    """{name: gradient} for the parameters and x, of a weighted sum of h plus aux_loss."""
    cotangent = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).to(h.dtype)
    leaves = dict(m.named_parameters()) | {'x': x}
    found = torch.autograd.grad((h * cotangent).sum() + aux_loss, leaves.values(),
                                allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found))


def assert_equals_the_loop(m, T, **edits):
    """Compare values, choices and all gradients for T tokens."""
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


# with 40 tokens an expert gets more than 16 rows, and with one token most experts get none
@pytest.mark.parametrize('E, top_k, T', ((1, 1, 40), (2, 1, 40), (3, 3, 6), (16, 1, 1), (16, 3, 8)))
@pytest.mark.parametrize('rule', (*RULES, IN_FLOAT32), ids=str)
@pytest.mark.parametrize('mlp', SPARSE)
def test_any_number_of_experts_and_tokens(mlp, rule, E, top_k, T):
    assert_equals_the_loop(layer(mlp, n_expert=E, top_k=top_k, aux_weight=0.3, **rule), T)


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_first_and_second_derivatives_are_those_of_finite_differences(variant):
    changes = {'n_embd': 4, 'n_head': 1, 'n_expert': 3, 'd_ffn': 8, 'd_low': 4, 'd_judge': 2}
    m = layer(**changes | variant, aux_weight=0.3)
    names, parameters = zip(*m.named_parameters())

    def outputs(x, *values):
        h, routing = functional_call(m, dict(zip(names, values)), (x,))
        return h, routing.aux_loss
    inputs = (some_tokens(5, 4), *parameters)
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, inputs, fast_mode=True)


# capacity_factor * T / E is 0.018, 1.62, 178.2
@pytest.mark.parametrize('factor, capacity', ((0.01, 1), (0.9, 2), (99.0, 9)))
def test_expert_choice_rounds_its_capacity(factor, capacity):
    m = layer('moe', select='expert_choice', capacity_factor=factor)
    assert all((m(some_tokens(9))[1].chosen == i).sum() == capacity for i in range(5))


# -----------------------------------------------------------------------------
# For each function that a reader may edit: where it is, a new one, and the loop with that edit.

OF_ALL, ROUTE, EXPERTS = model.of_all, MoE.route, SparseMLP.experts
EDITS = {
    'of_all': (model, 'of_all', lambda w, x: OF_ALL(w, x).tanh(),
               {'multiply': lambda x, w: (x @ w).tanh()}),
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


@pytest.mark.parametrize('rule', (*RULES, {'weigh_among': 'all'}), ids=str)
@pytest.mark.parametrize('mlp', SPARSE)
def test_an_edited_score_in_bfloat16_is_weighed_in_float32(mlp, rule, monkeypatch):
    """Under autocast an edit such as `p = C.abs().sum(-1)` is in bfloat16."""
    monkeypatch.setattr(model, 'norm', lambda C: C.abs().sum(-1).bfloat16() / 8)
    monkeypatch.setattr(MoE, 'route', lambda m, x: ROUTE(m, x).bfloat16())
    m = layer(mlp, torch.float32, aux_weight=0.3, conf_weight=0.2, **rule)
    h, (p, I, w, aux_loss) = m(some_tokens(20, dtype=torch.float32))
    assert p.dtype == torch.bfloat16 and {h.dtype, w.dtype, aux_loss.dtype} == {torch.float32}
    sets, exact = [set(row.tolist()) - {-1} for row in I], p.double()
    for p_t, chosen, row, weights in zip(exact, sets, I.tolist(), w.tolist()):
        among = range(5) if rule == {'weigh_among': 'all'} else chosen
        expected = [softmax_slowly(p_t, among, i).item() if i >= 0 else 0 for i in row]
        assert weights == pytest.approx(expected, rel=1e-5)
    expected = auxiliary_slowly(m.config, exact, sets).item()
    assert aux_loss.item() == pytest.approx(expected, rel=1e-5)


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


@pytest.mark.parametrize('m, n', ((8, 8), (4, 8), (1, 8), (8, 1), (3, 5)))
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float64))
def test_each_row_meets_the_matrix_of_its_expert(m, n, dtype):
    torch.manual_seed(0)
    x, w = torch.randn(64, m, requires_grad=True), torch.randn(3, m, n, requires_grad=True)
    cotangent, ends = torch.randn(64, n), torch.tensor([16, 32, 64], dtype=torch.int32)
    y = of_each(w.to(dtype), x.to(dtype), Rows(None, None, None, ends))
    expected = torch.cat([x[:16] @ w[0], x[16:32] @ w[1], x[32:] @ w[2]])
    distance = 0.02 if dtype == torch.bfloat16 else 1e-6
    for a, b in zip(*((out.float(), *torch.autograd.grad(out, (x, w), cotangent.to(out.dtype)))
                      for out in (y, expected))):
        assert (a - b).norm() <= distance * b.norm()


@needs_grouped_mm
@pytest.mark.parametrize('recompute', (False, True))
@pytest.mark.parametrize('variant', ALL, ids=str)
def test_a_bfloat16_step_reads_no_number_from_the_device(variant, recompute):
    """Fake tensors have no numbers, so code fails on them if it would wait for one from a GPU."""
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
def test_bfloat16_stays_close_to_float32(variant):
    """Under autocast, and where the whole model is in bfloat16."""
    torch.manual_seed(0)
    gpt = GPT(small_config(**{'n_embd': 64, 'd_ffn': 96, 'aux_weight': 0.3} | variant))
    idx = torch.randint(11, (4, 8))
    exact = gpt(idx, idx)[1]
    with torch.autocast('cpu', torch.bfloat16):
        _, rough, routing = gpt(idx, idx)
    if variant['mlp'] != 'dense':
        assert {field.dtype for field in routing} == {torch.float32, torch.int64}
    grads = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, gpt.parameters())])
             for loss in (exact, rough)]
    assert torch.cosine_similarity(*grads, dim=0) > 0.95           # a token or two change experts
    for loss in (rough, gpt.bfloat16()(idx, idx)[1]):
        assert loss.item() == pytest.approx(exact.item(), abs=0.02) and loss.dtype == torch.float32


# -----------------------------------------------------------------------------
# The GPT

@pytest.mark.parametrize('variant', ALL, ids=str)
def test_recomputing_changes_nothing_but_memory(variant):
    """Dropout has to be the same again."""
    torch.manual_seed(0)
    gpt = GPT(small_config(**variant, dropout=0.3, aux_weight=0.3, conf_weight=0.2))
    idx, calls, results, kept = torch.randint(11, (4, 8)), [], [], ([], [])
    gpt.blocks[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for gpt.config.recompute, sizes in zip((False, True), kept):   # sizes of what is kept
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            logits, loss, routing = gpt(idx, idx)
        grads = torch.autograd.grad(loss + routing.aux_loss.sum(), gpt.parameters())
        results.append((logits, loss, *routing, *grads))
    assert len(calls) == 3 and sum(kept[1]) < 0.5 * sum(kept[0])
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


@pytest.mark.parametrize('mlp', SPARSE)
def test_the_model_stacks_the_routings_of_its_layers_and_adds_nothing_to_the_loss(mlp):
    torch.manual_seed(0)
    gpt, idx, found = GPT(small_config(mlp, aux_weight=0.01)), torch.randint(11, (4, 8)), []
    for block in gpt.blocks:
        block.mlp.register_forward_hook(lambda _, args, output: found.append(output[1]))
    logits, loss, routing = gpt(idx, idx)
    assert logits.shape == (4, 8, 11) and (routing.aux_loss > 0).all()
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), idx.flatten()))
    for name, field, layers in zip(Routing._fields, routing, zip(*found)):
        assert torch.equal(field, torch.stack(layers))
        assert field.requires_grad == (name == 'aux_loss')


def test_the_model_by_hand():
    gpt = GPT(small_config('dense')).double()
    for p in gpt.parameters():
        p.data.normal_(std=0.4, generator=torch.Generator().manual_seed(2))
    gpt.embedding.weight.data *= 0.01                              # eps matters for small numbers
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


@pytest.mark.parametrize('S', (8, 300))                            # below 256 it is in float32
def test_attention_is_a_softmax_over_earlier_positions(S):
    q, k, v = torch.randn(3, 1, 2, S, 4)
    torch.testing.assert_close(attend(q, k, v, 0.0), attend_slowly(q, k, v))


def test_dropout_is_applied_to_embeddings_attention_and_the_two_additions(monkeypatch):
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

def test_keys_of_no_use_become_none():
    """Else runs that compute the same would have different recipes."""
    for changes, expected in (
            ({'mlp': 'dense', 'factorised': True}, (False, None, None, True)),
            ({'mlp': 'moe'}, (False, None, None, True)),
            ({'mlp': 'moe', 'router': 'large'}, (False, 6, None, True)),
            ({'mlp': 'aoe'}, (True, 6, 5, True)),
            ({'mlp': 'aoe', 'tied': False}, (True, 6, 5, False)),
            ({'mlp': 'aoe', 'factorised': False}, (False, None, 5, True))):
        c = small_config(**{'tied': changes['mlp'] == 'aoe'} | changes, d_low=6, d_judge=5)
        assert (c.factorised, c.d_low, c.d_judge, c.tied) == expected


def test_default_sizes():
    assert GPTConfig(n_embd=32).d_ffn == 128
    for D, d_ffn, d_judge in ((16, 64, 8), (96, 384, 16), (768, 3072, 128), (192, 20, 20)):
        c = GPTConfig(n_embd=D, n_head=1, d_ffn=d_ffn, factorised=False)
        assert c.d_judge == d_judge and c.d_wide == d_ffn
    for D, d_ffn, d_low in ((64, 256, 24), (96, 384, 32), (128, 512, 40), (256, 1024, 88),
                            (96, 24, 8), (96, 112, 32), (16, 24, 8)):   # the last three fit worse
        assert GPTConfig(n_embd=D, d_ffn=d_ffn).d_low == d_low
    # the shapes of the paper, whose 6470 is not a multiple of 8
    assert GPTConfig(n_head=12, n_embd=768, d_ffn=3072, d_low=256).d_wide == 3840
    assert GPTConfig(n_head=20, n_embd=1280, d_ffn=5120, d_low=400).d_wide == 6472


@pytest.mark.parametrize('variant', VARIANTS[3:], ids=str)
def test_an_expert_of_aoe_has_the_size_of_one_of_moe(variant):
    """w_judge counts, too: (D, d_judge) numbers of an expert."""
    for d_judge in (8, 32 if variant.get('tied', True) else 48):   # d_low is 32
        m = mlp_of(GPTConfig(**variant | {'n_embd': 96, 'd_ffn': 384, 'd_judge': d_judge}))
        assert sum(p.numel() for p in m.parameters()) == pytest.approx(8 * 3 * 96 * 384, rel=0.01)


def test_parameters_and_flops_by_hand():
    D, S, V, L, E, K, d, d_low, wide = 16, 8, 11, 2, 5, 2, 24, 8, 24           # Eq. 5: 23.2
    norms, around = (2 * L + 1) * D, L * 4 * D * D + V * D         # attention, and embedding = head
    whole, down, rest = 3 * D * d, D * d_low, d_low * wide + 2 * D * wide      # of an expert
    judge, R, large = 3, D * E, 30 * (D + E)                       # large is nearly E d_low D
    # of a layer's MLP: all numbers, those that a token meets, and those that it meets a second time
    for changes, total, active, again in (
            ({'mlp': 'dense'}, K * whole, K * whole, 0),
            ({'mlp': 'moe'}, R + E * whole, R + K * whole, 0),
            ({'mlp': 'moe', 'factorised': True}, R + E * (down + rest), R + K * (down + rest), 0),
            ({'mlp': 'moe', 'router': 'large'}, large + E * whole, large + K * whole, 0),
            ({'mlp': 'aoe'}, E * (down + rest), E * down + K * rest, 0),
            ({'mlp': 'aoe', 'd_judge': judge}, E * (down + rest), E * down + K * rest, 0),
            ({'mlp': 'aoe', 'factorised': False, 'd_judge': judge}, E * whole,
             (E - K) * D * judge + K * whole, K * D * judge),
            ({'mlp': 'aoe', 'tied': False, 'd_judge': judge}, E * (D * judge + down + rest),
             E * D * judge + K * (down + rest), 0),
            ({'mlp': 'aoe', 'tied': False, 'factorised': False, 'd_judge': judge},
             E * (D * judge + whole), E * D * judge + K * whole, 0),
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
        keep = 128 ** -0.5                                         # they have D = 128 rows
        stds = {'w_g': keep, 'w_p': keep, 'w_down': keep, 'router_in': keep, 'w_judge': keep,
                'w_up': gpt.config.d_low and gpt.config.d_low ** -0.5,
                'w_o': 0.02 / 6 ** 0.5, 'out': 0.02 / 6 ** 0.5, 'router': router_std}
        for name, p in gpt.named_parameters():
            if p.dim() == 1:
                assert (p == 1).all()
            else:
                last = name.removesuffix('.weight').rsplit('.', 1)[-1]
                std, rel = stds.get(last, 0.02), 0.1 if p.numel() < 5000 else 0.03
                assert p.std().item() == pytest.approx(std, rel=rel) and abs(p.mean()) < 0.1 * std


# -----------------------------------------------------------------------------
# Generation, and refusals

@pytest.mark.parametrize('changes', (*ALL, {'mlp': 'aoe', 'select': 'expert_choice'}), ids=str)
def test_generation(changes):
    torch.manual_seed(0)
    gpt = GPT(small_config(**changes, dropout=0.5))                # generate switches it off
    for block in gpt.blocks:
        torch.nn.init.normal_(block.attention.out.weight)          # so that the context matters
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
    with pytest.raises(ValueError, match='at most 8 tokens, got 12'):
        gpt(greedy)


def test_tokens_are_drawn_by_temperature_from_the_likeliest():
    torch.manual_seed(0)
    gpt = GPT(small_config('moe'))
    gpt.embedding.weight.data *= 20                                # decided predictions
    idx = torch.zeros(2000, 1, dtype=torch.int64)
    p = (gpt(idx[:1])[0][0, -1] / 1.5).softmax(-1)
    kept = p.topk(3)
    drawn = gpt.generate(idx, 1, temperature=1.5, vocab_top_k=3)[:, 1].bincount(minlength=11)
    expected = torch.zeros(11).scatter(0, kept.indices, kept.values / kept.values.sum())
    assert (drawn / 2000 - expected).abs().max() < 0.04 and drawn.count_nonzero() == 3


@pytest.mark.parametrize('changes, key', (
    ({'n_layer': 0}, 'n_layer'), ({'d_ffn': -4}, 'd_ffn'), ({'mlp': 'none'}, 'mlp'),
    ({'select': 'best'}, 'select'), ({'aux_weight': math.nan}, 'aux_weight'),
    ({'top_p': 0}, 'top_p'), ({'dropout': 1}, 'dropout'), ({'top_k': 6}, 'top_k'),
    ({'n_embd': 18}, 'n_embd'), ({'d_low': 17}, 'd_low'), ({'d_ffn': 1}, 'd_low'),
    ({'d_judge': 9}, 'd_judge'), ({'tied': False, 'd_judge': 17}, 'd_judge'),
    ({'factorised': False, 'd_ffn': 4, 'd_judge': 5}, 'd_judge')), ids=str)
def test_an_impossible_model_is_refused_in_one_line(changes, key):
    value = changes.get(key, 8)                                    # 8 is a default
    with pytest.raises(ValueError, match=rf'\A{key}: expected .*, got {value!r}\Z'):
        small_config(**{'mlp': 'aoe'} | changes)
