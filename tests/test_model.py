"""model.py against slow loops written from the paper, its plain way against its fast one, edits of
it against loops with the same edit, hand-computed cases and properties that must hold."""

import itertools
import math
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from conftest import ROOT
from model import (GPT, MLP, MLPS, GPTConfig, MoE, Routing, count, entropy, grouped_mm, rotate,
                   sort_by_expert)

SPARSE = ('moe', 'aoe')
# who scores x how the gate is made, the large router of Table 2, and Switch's weights
VARIANTS = ({'mlp': 'moe'}, {'mlp': 'moe', 'factorised': True}, {'mlp': 'moe', 'router': 'large'},
            {'mlp': 'aoe'}, {'mlp': 'aoe', 'factorised': False},
            {'mlp': 'moe', 'weigh_among': 'all'},
            {'mlp': 'aoe', 'factorised': False, 'weigh_among': 'all'})
RULES = ({}, {'select': 'top_p'}, {'select': 'expert_choice', 'capacity_factor': 1.5})


def small_config(mlp, **changes):
    return GPTConfig(**{'mlp': mlp, 'vocab_size': 11, 'block_size': 8, 'n_layer': 2, 'n_head': 2,
                        'n_embd': 16, 'n_expert': 5, 'top_k': 2, 'd_ffn': 24} | changes)


def layer(mlp, plain=False, mlps=MLPS, **changes):
    """A layer alone, in float64, with weights large enough to tell experts apart."""
    torch.manual_seed(0)
    module = mlps[mlp](small_config(mlp, plain=plain, **changes)).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


def down(m, i):
    """Wdown_i (D, d_low); of a gate that is not factorised, the columns that judge."""
    if not m.config.factorised:
        return m.w_g[i][:, :8]
    return m.w_down[:, 8 * i:8 * i + 8]


def l2(C):
    return sum(c * c for c in C).sqrt()


def scores_slowly(m, x, norm=l2):
    """p of one token x (D,), a list of E numbers."""
    if m.config.mlp == 'moe':
        x = F.silu(x @ m.router_in) if m.config.router == 'large' else x
        return list(x @ m.router)
    return [norm(x @ down(m, i)) for i in range(5)]


def choose_slowly(m, p):
    """For each token the set of its experts, from scores p: T lists of E numbers."""
    q = [[math.exp(a - max(scores)) for a in scores]
         for scores in [[a.item() for a in scores] for scores in p]]
    q = [[a / sum(scores) for a in scores] for scores in q]
    T, E, c = len(q), len(q[0]), m.config
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
    for i in range(E):
        column = [scores[i] for scores in q]
        for t in sorted(range(T), key=lambda t: -column[t])[:round(c.capacity_factor * T / E)]:
            sets[t].add(i)
    return sets


def softmax_slowly(p_t, among, i):
    return p_t[i].exp() / sum(p_t[j].exp() for j in among)


def balance_slowly(p, f):
    """E sum_i f_i P_i of Eq. 2, by the scores p (T lists of E) and the loads f (E)."""
    q = [[softmax_slowly(p_t, range(5), i) for i in range(5)] for p_t in p]
    return 5 * sum(f[i] * sum(q_t[i] for q_t in q) / len(q) for i in range(5))


def silu(g):
    return g * torch.sigmoid(g)


def layer_slowly(m, x, scores=scores_slowly, choose=choose_slowly, weigh=softmax_slowly,
                 balance=balance_slowly, activation=silu):
    """(h, aux_loss) of tokens x (T, D): Algorithms 1 and 2 with one token and expert at a time."""
    p = [scores(m, token) for token in x]
    sets, E, T = choose(m, p), 5, len(x)
    rows = []
    for token, p_t, chosen in zip(x, p, sets):
        h = torch.zeros(16, dtype=torch.float64)
        among = chosen if m.config.weigh_among == 'chosen' else range(E)
        for i in chosen:
            g = token @ (down(m, i) @ m.w_up[i] if m.config.factorised else m.w_g[i])
            y = (activation(g) * (token @ m.w_p[i])) @ m.w_o[i]
            h = h + weigh(p_t, among, i) * y
        rows.append(h)
    f = [sum(i in chosen for chosen in sets) / T for i in range(E)]
    q = [[softmax_slowly(p_t, range(E), i) for i in range(E)] for p_t in p]
    confidence = -sum(a * a.log() for q_t in q for a in q_t) / T
    aux_loss = m.config.aux_weight * balance(p, f) + m.config.conf_weight * confidence
    return torch.stack(rows), aux_loss


def gradients(m, x, h, aux_loss):
    """By name, of the parameters and x, of a sum over h and aux_loss."""
    cotangent = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).to(h.dtype)
    leaves = dict(m.named_parameters()) | {'x': x}
    total = (h * cotangent).sum() + aux_loss
    return dict(zip(leaves, torch.autograd.grad(total, leaves.values(), allow_unused=True)))


def assert_equal(a, b, **tolerance):
    """(h, gradients) of two layers."""
    torch.testing.assert_close(a[0], b[0], **tolerance)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], msg=name, **tolerance)


@pytest.mark.parametrize('rule', RULES, ids=str)
@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_the_plain_layer_equals_a_loop_over_tokens_and_experts(variant, rule):
    m = layer(plain=True, aux_weight=0.3, conf_weight=0.2, **variant, **rule)
    x = torch.randn(10, 16, dtype=torch.float64, requires_grad=True)
    (h, routing), (slow_h, slow_loss) = m(x), layer_slowly(m, x)
    assert routing.aux_loss.item() == pytest.approx(slow_loss.item())
    assert_equal((h, gradients(m, x, h, routing.aux_loss)),
                 (slow_h, gradients(m, x, slow_h, slow_loss)), rtol=1e-9, atol=1e-10)
    for t, chosen in enumerate(choose_slowly(m, [scores_slowly(m, token) for token in x])):
        assert set(routing.chosen[t].tolist()) - {-1} == chosen
        assert ((routing.chosen[t] == -1) == (routing.weights[t] == 0)).all()
    torch.testing.assert_close(routing.scores, torch.stack(
        [torch.stack(scores_slowly(m, token)) for token in x]).detach())
    if m.config.weigh_among == 'chosen':
        torch.testing.assert_close(routing.weights.sum(1), (routing.chosen >= 0).any(1).double())


@pytest.mark.parametrize('losses', ({}, {'aux_weight': 0.3}, {'conf_weight': 0.2}), ids=str)
@pytest.mark.parametrize('top_k, tokens', ((1, 6), (2, 6), (2, 150), (5, 6)))   # 150: with padding
@pytest.mark.parametrize('rule', RULES, ids=str)
@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_fast_equals_plain_in_values_and_every_gradient(variant, rule, top_k, tokens, losses):
    results = []
    x = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
    for plain in (True, False):
        m = layer(plain=plain, top_k=top_k, **variant, **rule, **losses)
        h, routing = m(x)
        results.append((h, gradients(m, x, h, routing.aux_loss), routing))
    plain, fast = results
    assert_equal(plain, fast, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(plain[2], fast[2])


@pytest.mark.parametrize('dtype, distance', ((torch.float32, 1e-5), (torch.bfloat16, 0.02)))
@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_fast_equals_plain_through_the_grouped_matmul(variant, dtype, distance, monkeypatch):
    if not hasattr(F, 'grouped_mm'):
        pytest.skip('this PyTorch has no F.grouped_mm')
    calls, original = [], F.grouped_mm
    monkeypatch.setattr(F, 'grouped_mm', lambda *a, **k: calls.append(1) or original(*a, **k))
    results = []
    x = torch.randn(150, 16, requires_grad=True)
    for plain in (True, False):
        m = layer(plain=plain, **variant).float()
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            h, routing = m(x)
        h = h.float()
        results.append({'h': h} | gradients(m, x, h, routing.aux_loss))
        assert bool(calls) != plain
    for name, a in results[0].items():
        assert (a - results[1][name]).norm() <= distance * a.norm(), name


# What a reader may edit, by the rows of the README's table: an old text of model.py, the new one,
# and the loop with that edit. Both ways, moe and aoe, have to follow.
def second_to_third(m, p):
    return [set(sorted(range(5), key=lambda i: -p_t[i])[1:3]) for p_t in p]


def above_the_mean(m, p):
    best = choose_slowly(m, p)
    mean = sum(p_t[i] for p_t, chosen in zip(p, best) for i in chosen) / (2 * len(p))
    return [{i for i in chosen if p_t[i] > mean} for p_t, chosen in zip(p, best)]


def log_sum_exp(p, f):
    return 5 * sum(sum(a.exp() for a in p_t).log() ** 2 for p_t in p) / len(p)


EDITS = {
    'choose': ('p.topk(self.config.top_k).indices  ',
               'p.topk(self.config.top_k + 1).indices[:, 1:]',
               {'choose': second_to_third}),
    'choose nobody': (
        'return p.topk(self.config.top_k).indices  ',
        'best = p.topk(2); return best.indices.masked_fill(best.values <= best.values.mean(), -1)',
        {'choose': above_the_mean}),
    'weigh': ('return w.masked_fill(I < 0, 0)', 'return p.gather(1, somebody).sigmoid()',
              {'weigh': lambda p_t, among, i: torch.sigmoid(p_t[i])}),
    'routing': ('self.config.aux_weight * E * (f * P).sum()',
                'self.config.aux_weight * E * p.logsumexp(1).square().mean()',
                {'balance': log_sum_exp}),
    'norm': ('torch.linalg.vector_norm(C, dim=-1, dtype=',
             'torch.linalg.vector_norm(C, 1, -1, dtype=',
             {'scores': lambda m, x: scores_slowly(m, x, norm=lambda C: sum(c.abs() for c in C))}),
    'route': ('return at_least_float32(x) @ at_least_float32(self.router)',
              'return (x @ self.router).tanh()',
              {'scores': lambda m, x: [a.tanh() if m.config.mlp == 'moe' else a
                                       for a in scores_slowly(m, x)]}),
    'experts': ('F.silu(gate)', 'F.relu(gate)', {'activation': torch.relu}),
}


@pytest.mark.parametrize('tokens', (1, 70, 300))
@pytest.mark.parametrize('mlp', SPARSE)
def test_any_token_may_have_nobody(mlp, tokens):
    """All, none or some of them, under any rule: fast equals plain, and h is 0 for nobody's."""
    for select, share in itertools.product(('top_k', 'top_p'), (0.0, 0.02, 0.5, 1.0)):
        found = []
        for plain in (True, False):
            m = layer(mlp, plain, select=select, n_expert=4)
            torch.manual_seed(int(100 * share))
            nobody = torch.rand(tokens, 4 if select == 'top_p' else 2) < share
            m.choose = lambda p, m=m, nobody=nobody: type(m).choose(m, p).masked_fill(nobody, -1)
            x = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
            h, routing = m(x)
            assert not h[(routing.chosen < 0).all(1)].any()
            found.append((h, gradients(m, x, h, routing.aux_loss)))
        assert_equal(*found, rtol=1e-9, atol=1e-11)


def edited(old, new):
    """model.py with another text in one place, as a module of its own."""
    with open(os.path.join(ROOT, 'model.py'), encoding='utf-8') as file:
        text = file.read()
    assert text.count(old) == 1
    module = types.ModuleType('edited')
    sys.modules['edited'] = module                                 # where dataclasses look it up
    exec(text.replace(old, new), vars(module))
    return module


@pytest.mark.parametrize('plain', (False, True))
@pytest.mark.parametrize('variant', VARIANTS[:5], ids=str)
@pytest.mark.parametrize('edit', EDITS)
def test_an_edit_of_part_1_takes_effect(edit, variant, plain):
    old, new, by_loop = EDITS[edit]
    module = edited(old, new)
    m = layer(plain=plain, mlps=module.MLPS, aux_weight=0.3, **variant)
    x = torch.randn(60, 16, dtype=torch.float64, requires_grad=True)
    if edit == 'experts' and not plain:                            # part 3 has its own formula
        assert module.distance_of_both_ways(m.float()) > 0.1
        return
    (h, routing), (slow_h, slow_loss) = m(x), layer_slowly(m, x, **by_loop)
    assert_equal((h, gradients(m, x, h, routing.aux_loss)),
                 (slow_h, gradients(m, x, slow_h, slow_loss)), rtol=1e-9, atol=1e-10)
    if edit == 'choose nobody':
        assert 40 < (routing.chosen < 0).sum() < 80
    if edit != 'experts':
        assert module.distance_of_both_ways(m.float()) < 1e-3


@pytest.mark.parametrize('where, mlp', (('route', 'moe'), ('look', 'aoe')))
def test_random_numbers_in_what_is_computed_again_give_right_gradients(where, mlp):
    old, new = {'route': ('x = F.silu(x @ self.router_in)\n',
                          'x = F.silu(x @ self.router_in)\n'
                          '        x = F.dropout(x, 0.3)\n'),
                'look': ('        return C, norm(C)', '        C = C + torch.randn_like(C)\n'
                         '        return C, norm(C)')}[where]
    m = layer(mlp, mlps=edited(old, new).MLPS, aux_weight=0.3)
    x = torch.randn(20, 16, dtype=torch.float64)

    def loss():
        torch.manual_seed(3)
        h, routing = m(x)
        return h.square().mean() + routing.aux_loss
    for p in m.parameters():
        direction = torch.randn_like(p)
        expected = (torch.autograd.grad(loss(), p)[0] * direction).sum().item()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-6 * direction
                values.append(loss().item())
                p -= sign * 1e-6 * direction
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_rows_hold_every_pair_once_in_the_part_of_its_expert():
    torch.manual_seed(0)
    I = torch.rand(300, 4).topk(2).indices.clamp(max=2)            # expert 3 of 4 gets none
    I[:, 1] = (I[:, 0] + 1) % 3
    rows = sort_by_expert(I, 4, leave_out=False)
    ends = rows.ends.tolist()
    assert all(end % 9 == 0 for end in ends)                       # 600 pairs // 4 experts // 16
    assert ends[-1] == len(rows.token) == len(rows.expert) == 639  # the 9s that hold 600 + 4 * 8
    assert len(set(rows.row.flatten().tolist())) == 600
    for t, k in itertools.product(range(300), range(2)):
        row = rows.row[t, k]
        assert rows.token[row] == t and rows.expert[row] == I[t, k]
    for i, (start, end) in enumerate(zip([0, *ends], ends)):
        assert (rows.expert[start:end] == i).all()


@pytest.mark.parametrize('m, n', ((8, 8), (1, 8), (8, 1), (1, 1), (3, 5)))
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float64))
def test_a_grouped_matmul_of_any_width_is_a_matmul_for_each_group(m, n, dtype):
    torch.manual_seed(0)
    a, b, c = torch.randn(12, m), torch.randn(3, m, n), torch.randn(12, n)
    ends = torch.tensor([4, 4, 12], dtype=torch.int32)
    parts = slice(0, 4), slice(4, 4), slice(4, 12)
    product = grouped_mm(a.to(dtype), b.to(dtype), ends)
    gradient = grouped_mm(a.to(dtype).T, c.to(dtype), ends)
    expected = torch.cat([a[part] @ b[i] for i, part in enumerate(parts)])
    torch.testing.assert_close(product.float(), expected, rtol=0.02, atol=0.05)
    expected = torch.stack([a[part].T @ c[part] for part in parts])
    torch.testing.assert_close(gradient.float(), expected, rtol=0.02, atol=0.1)


@pytest.mark.skipif(not hasattr(F, 'grouped_mm'), reason='this PyTorch has no F.grouped_mm')
@pytest.mark.parametrize('losses', ({}, {'aux_weight': 0.3}), ids=str)
@pytest.mark.parametrize('changes', ({'mlp': 'dense'}, *VARIANTS), ids=str)
def test_a_bfloat16_step_reads_no_number_from_the_device(changes, losses):
    """Meta tensors have no numbers: whatever would wait for a GPU to learn one fails on them."""
    with FakeTensorMode():                                         # meta tensors that say 'cpu'
        model = GPT(small_config(**{'n_embd': 32, 'd_ffn': 48} | changes | losses))
        idx = torch.zeros(4, 8, dtype=torch.int64)
        with torch.autocast('cpu', torch.bfloat16):
            _, loss, routing = model(idx, idx)
        (loss + routing.aux_loss.sum()).backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())
        with pytest.raises(DataDependentOutputException):
            loss.item()
        if changes['mlp'] != 'dense':                              # how many pairs depends on p
            with pytest.raises(DataDependentOutputException):
                GPT(small_config(**changes, select='top_p'))(idx)


@pytest.mark.skipif(not hasattr(F, 'grouped_mm'), reason='this PyTorch has no F.grouped_mm')
@pytest.mark.parametrize('changes', (
    {'mlp': 'dense'}, *VARIANTS, {'mlp': 'aoe', 'aux_weight': 0.01}), ids=str)
def test_a_training_step_compiles_into_one_graph(changes):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = GPT(small_config(**{'n_embd': 32, 'd_ffn': 48} | changes))
    idx = torch.randint(11, (16, 8))
    losses, grads = [], []
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')   # without a C++ compiler
    for forward in (model, compiled):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            _, loss, routing = forward(idx, idx)
        (loss + routing.aux_loss.sum()).backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)         # as far as bfloat16 goes
    assert torch.cosine_similarity(*grads, dim=0) > 0.999


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_bfloat16_stays_close_to_float32(variant):
    torch.manual_seed(0)
    model = GPT(small_config(n_embd=64, **variant | {'d_ffn': 96}))
    idx = torch.randint(11, (16, 8))
    exact = model(idx, idx)
    with torch.autocast('cpu', torch.bfloat16):
        rough = model(idx, idx)
    assert abs(rough[1].item() - exact[1].item()) < 0.01
    grads = []
    for loss in (exact[1], rough[1]):
        model.zero_grad()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.99


@pytest.mark.parametrize('variant', VARIANTS[:5], ids=str)         # whose weights sum to 1
def test_identical_experts_equal_one_dense_mlp(variant):
    m = layer(**variant)
    with torch.no_grad():
        for w in (m.w_p, m.w_o, m.w_up if m.config.factorised else m.w_g):
            w.copy_(w[:1].expand_as(w))
        if m.config.factorised:
            m.w_down.copy_(m.w_down[:, :8].repeat(1, 5))
    dense = MLP(small_config('dense', top_k=1)).double()
    w_g = m.w_down[:, :8] @ m.w_up[0] if m.config.factorised else m.w_g[0]
    for name, w in (('w_g', w_g), ('w_p', m.w_p[0]), ('w_o', m.w_o[0])):
        setattr(dense, name, torch.nn.Parameter(w.detach().clone()))
    x = torch.randn(21, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x)[0], dense(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('changes', ({'mlp': 'dense'}, *VARIANTS, {'mlp': 'moe', 'select': 'top_p'},
                                     {'mlp': 'aoe', 'select': 'top_p'}), ids=str)
def test_logits_do_not_depend_on_later_tokens(changes):
    torch.manual_seed(0)
    model = GPT(small_config(**changes)).double()
    idx = torch.randint(11, (1, 8))
    logits = model(idx)[0]
    for t in range(1, 8):
        changed = idx.clone()
        changed[0, t:] = (changed[0, t:] + 1 + torch.randint(10, (8 - t,))) % 11
        other = model(changed)[0]
        torch.testing.assert_close(other[0, :t], logits[0, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(other[0, t:], logits[0, t:])


@pytest.mark.parametrize('mlp', SPARSE)
def test_expert_choice_lets_later_tokens_decide_over_earlier_ones_and_does_not_generate(mlp):
    torch.manual_seed(0)
    model = GPT(small_config(mlp, select='expert_choice', capacity_factor=1.0)).double()
    for p in model.parameters():
        p.data *= 10
    idx = torch.randint(11, (1, 8))
    changes = [torch.cat([idx[:, :4], torch.randint(11, (1, 4))], 1) for _ in range(10)]
    assert any(not torch.allclose(model(changed)[0][0, :4], model(idx)[0][0, :4])
               for changed in changes)
    with pytest.raises(ValueError, match='select: expected top_k or top_p, got expert_choice'):
        model.generate(idx, 1)


def test_the_switch_is_two_questions():
    assert [small_config(mlp).factorised for mlp in ('moe', 'aoe')] == [False, True]
    assert [GPTConfig(mlp='aoe', n_embd=D, n_head=1, factorised=False).d_judge
            for D in (16, 64, 96, 192, 768)] == [8, 8, 16, 32, 128]
    for mlp, factorised in itertools.product(SPARSE, (False, True)):
        for plain in (False, True):
            names = dict(layer(mlp, plain, factorised=factorised, d_ffn=40).named_parameters())
            gate = {'w_down', 'w_up'} if factorised else {'w_g'}
            router = {'router'} if mlp == 'moe' else set()
            assert set(names) == {'w_p', 'w_o'} | gate | router
            assert names['w_p'].shape[2] == (48 if factorised else 40)         # (Eq. 5: 44.8)


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
        if variant.get('router') == 'large':                       # larger on purpose
            other -= 3 * 8 * c.d_low * n_embd
        assert abs(other / moe.total_parameters() - 1) < 0.01
    assert moe.active_parameters() - routers == dense.active_parameters()
    assert dense.active_parameters() == dense.total_parameters()


def test_d_wide_follows_equation_5_at_the_papers_shapes():
    assert GPTConfig(n_head=12, n_embd=768, d_ffn=3072, d_low=256).d_wide == 3840
    wide = GPTConfig(n_head=20, n_embd=1280, d_ffn=5120, d_low=400).d_wide
    assert wide == 6472                  # the paper's 6470, as a multiple of 8


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
    matrices = attention + head + L * (D * E + D * E * d_low + K * (d_low * wide + 2 * D * wide))
    assert factorised.active_parameters() == norms + matrices

    whole = GPT(small_config('aoe', factorised=False))
    matrices = attention + head + L * ((E - K) * D * d_low + K * 3 * D * d)
    assert whole.active_parameters() == norms + matrices
    assert whole.total_parameters() == moe.total_parameters() - L * D * E


def test_initialisation_gives_all_variants_the_same_scale():
    torch.manual_seed(0)
    config = {'vocab_size': 84, 'n_layer': 3, 'n_embd': 128, 'd_ffn': 256}
    models = {mlp: GPT(GPTConfig(mlp=mlp, **config)) for mlp in MLPS}
    moe, aoe, dense = (models[mlp].blocks[1].mlp for mlp in ('moe', 'aoe', 'dense'))
    w_down = aoe.w_down.view(128, 8, -1).transpose(0, 1)           # (E, D, d_low)
    product = w_down @ aoe.w_up                                    # in the place of w_g
    assert moe.w_g.std().item() == pytest.approx(128 ** -0.5, rel=0.02)
    assert product.std().item() == pytest.approx(moe.w_g.std().item(), rel=0.03)
    for mlp in (moe, aoe, dense):
        assert mlp.w_p.std().item() == pytest.approx(128 ** -0.5, rel=0.02)
        assert mlp.w_o.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.02)
    for model in models.values():
        out = model.blocks[1].attention.out.weight
        assert out.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.02)


def test_aux_loss_by_hand():
    # Two tokens, two experts, K = 1. Both tokens have the router's scores (ln 3, 0).
    m = MoE(small_config('moe', n_expert=2, top_k=1, aux_weight=0.01))
    p, I = torch.tensor([[math.log(3), 0.0]] * 2), torch.tensor([[0], [0]])
    # f = (1, 0), P = (3/4, 1/4): a E sum f P = 0.01 * 2 * 3/4; a balanced f would give 0.01.
    assert m.routing(p, I, torch.ones(2, 1)).aux_loss.item() == pytest.approx(0.015)
    assert count(I, 2).tolist() == [2, 0]
    by_hand = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(entropy(p), torch.tensor([by_hand] * 2))


@pytest.mark.parametrize('mlp', SPARSE)
def test_aux_loss_stays_out_of_the_loss_and_balances(mlp):
    torch.manual_seed(0)
    model = GPT(small_config(mlp, aux_weight=0.01))
    idx = torch.randint(11, (4, 8))
    logits, loss, routing = model(idx, idx)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), idx.flatten()))
    assert (routing.aux_loss > 0).all()
    chooser = model.blocks[0].mlp.router if mlp == 'moe' else model.blocks[0].mlp.w_down
    before = routing.aux_loss[0].item()
    grad, = torch.autograd.grad(routing.aux_loss[0], chooser)
    with torch.no_grad():
        chooser -= 0.001 * grad / grad.norm()
    # load is a count, constant under a step this small, so P alone moves, and downhill
    assert model(idx)[2].aux_loss[0].item() < before


def test_the_loss_in_pieces_is_the_mean_over_all_tokens():
    torch.manual_seed(0)
    model = GPT(small_config('dense', block_size=700)).double()
    idx, targets = torch.randint(11, (2, 3, 700))                  # 2,100 tokens: two pieces
    logits, loss, _ = model(idx, targets)
    whole = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(l, model.parameters(), retain_graph=True)
                      for l in (loss, whole))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('mlp', SPARSE)
def test_the_model_stacks_the_facts_of_its_layers(mlp):
    torch.manual_seed(0)
    model = GPT(small_config(mlp))
    found = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, args, output: found.append(output[1]))
    routing = model(torch.randint(11, (4, 8)))[2]
    assert routing.scores.shape == (2, 32, 5) and routing.aux_loss.tolist() == [0, 0]
    assert routing.chosen.shape == routing.weights.shape == (2, 32, 2)
    for field, layers in zip(routing, zip(*found)):
        assert torch.equal(field, torch.stack(layers)) and not field.requires_grad


def test_dense_gives_the_same_things_in_the_same_order_with_nothing_in_the_routing():
    logits, loss, routing = GPT(small_config('dense'))(torch.zeros(1, 3, dtype=torch.int64))
    assert logits.shape == (1, 3, 11) and loss is None and isinstance(routing, Routing)
    assert all(field.numel() == 0 for field in routing) and routing.aux_loss.sum() == 0


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_an_expert_without_tokens_gets_zero_gradients(variant):
    m = layer(**variant)
    m(torch.randn(1, 16, dtype=torch.float64))[0].sum().backward()   # one token: 2 of 5 experts
    idle = [i for i in range(5) if not m.w_p.grad[i].any()]
    assert len(idle) == 3
    assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)


@pytest.mark.parametrize('plain', (False, True))
@pytest.mark.parametrize('aux_weight', (0.0, 0.1))
@pytest.mark.parametrize('norms', ('zero', 'equal'))
def test_a_token_whose_norms_are_all_the_same_has_finite_gradients(norms, aux_weight, plain):
    m = layer('aoe', plain, aux_weight=aux_weight)
    x = torch.randn(2, 16, dtype=torch.float64) * (norms == 'equal')
    if norms == 'equal':
        m.w_down.data = down(m, 0).repeat(1, 5)
    h, routing = m(x.requires_grad_())
    (h.square().sum() + routing.aux_loss).backward()
    assert torch.isfinite(h).all() and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())


@pytest.mark.parametrize('rule', RULES, ids=str)
@pytest.mark.parametrize('plain', (False, True))
@pytest.mark.parametrize('mlp', SPARSE)
def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other(mlp, plain, rule):
    m = layer(mlp, plain, **rule)
    x = torch.randn(6, 16, dtype=torch.float64)
    x[2] = math.nan
    h, routing = m(x)
    assert not h[2].isfinite().any()
    if 'select' not in rule:                                       # else the batch decides together
        assert h[[0, 1, 3, 4, 5]].isfinite().all()
    with torch.no_grad():
        for p in m.parameters():
            p.fill_(math.inf)
    m(x)                                                           # no crash


@pytest.mark.parametrize('changes', (
    {'mlp': 'dense'}, *VARIANTS, *({**variant, 'aux_weight': 0.1} for variant in VARIANTS),
    *({'mlp': mlp, 'select': 'top_p', 'conf_weight': 0.1} for mlp in SPARSE),
    *({'mlp': mlp, 'select': 'expert_choice'} for mlp in SPARSE)), ids=str)
def test_the_gradient_of_every_parameter_equals_a_finite_difference(changes):
    """Along a random direction of each parameter and along its steepest number, with aux_loss."""
    torch.manual_seed(0)
    model = GPT(small_config(**changes)).double()
    idx, targets = torch.randint(11, (2, 3, 8))

    def loss():
        _, cross_entropy, routing = model(idx, targets)
        return cross_entropy + routing.aux_loss.sum()
    loss().backward()
    h = 1e-6
    for name, p in model.named_parameters():
        steepest = torch.zeros_like(p)
        steepest.view(-1)[p.grad.abs().argmax()] = 1.0
        for direction in (torch.randn_like(p), steepest):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    p += sign * h * direction
                    ends.append(loss())
                    p -= sign * h * direction
            difference = ((ends[0] - ends[1]) / (2 * h)).item()
            expected = (p.grad * direction).sum().item()
            assert difference == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize('plain', (False, True))
@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_scores_are_float32_under_autocast(variant, plain):
    torch.manual_seed(0)
    m = layer(plain=plain, **variant).float()
    with torch.autocast('cpu', torch.bfloat16):
        h, routing = m(torch.randn(4, 16))
    assert all(routing[i].dtype == torch.float32 for i in (0, 2, 3))


def test_weights_are_a_softmax_over_the_chosen_alone():
    p, I = torch.tensor([[2.0, 9.0, 5.0, 1.0, 7.0]]), torch.tensor([[3, 0, -1]])
    by_hand = [[1 / (1 + math.e), math.e / (1 + math.e), 0.0]]
    torch.testing.assert_close(layer('moe').weigh(p, I), torch.tensor(by_hand))


def test_rotary_scores_depend_on_the_distance_alone():
    model = GPT(small_config('dense'))
    q, k = torch.randn(2, 1, 1, 1, 8)                              # the same at 8 positions
    q, k = (rotate(v.expand(1, 1, 8, 8), model.cos, model.sin)[0, 0] for v in (q, k))
    scores = q @ k.T
    for i, j in itertools.product(range(7), range(7)):
        torch.testing.assert_close(scores[i, j], scores[i + 1, j + 1])
    torch.testing.assert_close(q.norm(dim=1), q[0].norm().expand(8))
    assert not torch.allclose(scores[0, 0], scores[0, 3])


@pytest.mark.parametrize('mlp', MLPS)
def test_logits_with_a_past_equal_logits_without(mlp):
    torch.manual_seed(0)
    model = GPT(small_config(mlp)).double()
    idx = torch.randint(11, (2, 8))
    past = [[] for _ in model.blocks]
    ends = (0, 3, 4, 6, 8)                                         # one and two tokens at a time
    parts = [model(idx[:, a:b], past=past)[0] for a, b in zip(ends, ends[1:])]
    torch.testing.assert_close(torch.cat(parts, 1), model(idx)[0], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match='at most 8 tokens, got 9'):
        model(idx[:, :1], past=past)


@pytest.mark.parametrize('mlp', MLPS)
def test_generation(mlp):
    torch.manual_seed(0)
    model = GPT(small_config(mlp))
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    greedy = model.generate(idx, 20, temperature=0)
    expected, start = idx, 0
    for _ in range(20):                                            # past the context of 8
        logits = model(expected[:, start:])[0]                     # anew each time: no cache
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
        if logits.shape[1] == 8:
            start = expected.shape[1] - 4
    assert greedy.tolist() == expected.tolist()
    assert model.generate(idx, 20, vocab_top_k=1).tolist() == expected.tolist()
    longer = torch.randint(11, (1, 15))
    last = model(longer[:, -8:])[0][0, -1].argmax()
    assert model.generate(longer, 1, temperature=0)[0, -1] == last
    one, same, other = (model.generate(idx, 30, seed=s).tolist() for s in (1, 1, 2))
    assert one == same != other
    assert model.generate(idx, 30, temperature=9.0, vocab_size=7).max() < 7


def test_the_temperature_and_the_vocabulary_bound_are_respected():
    torch.manual_seed(0)
    model = GPT(small_config('moe'))
    with torch.no_grad():
        model.embedding.weight *= 20                               # decided predictions
    idx = torch.zeros(2000, 1, dtype=torch.int64)
    p = (model(idx[:1])[0][0, -1] / 1.5).softmax(-1)
    kept = p.topk(3)
    drawn = model.generate(idx, 1, temperature=1.5, vocab_top_k=3, seed=0)[:, 1]
    drawn = torch.bincount(drawn, minlength=11)
    assert drawn.sum() == drawn[kept.indices].sum() == 2000
    torch.testing.assert_close(drawn[kept.indices] / 2000, kept.values / kept.values.sum(),
                               atol=0.04, rtol=0)


@pytest.mark.parametrize('changes, says', (
    ({'n_embd': 30, 'n_head': 4}, 'n_embd'), ({'top_k': 6}, 'top_k'), ({'mlp': 'mlp'}, 'mlp'),
    ({'d_low': 24}, 'd_low'), ({'n_layer': 0}, 'n_layer'), ({'dropout': 1.0}, 'dropout'),
    ({'aux_weight': -1.0}, 'aux'),
    ({'factorised': False, 'd_ffn': 4, 'd_judge': 8}, 'd_judge'),
    ({'factorised': False, 'd_low': 8}, 'd_low'),
))
def test_a_model_that_cannot_be_is_refused(changes, says):
    with pytest.raises(ValueError, match=f'^{says}.*: expected .*, got '):
        small_config(**{'mlp': 'aoe'} | changes)
