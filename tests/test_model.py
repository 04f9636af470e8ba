"""model.py against slow loops written from the paper, hand-computed cases and properties that must hold."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, MLP, MLPS, AoE, MoE, Past, group_by_expert, norm_of_node, rotate

SPARSE = ('moe', 'aoe')


def small_config(mlp, **changes):
    return GPTConfig(**{'mlp': mlp, 'vocab_size': 11, 'block_size': 8, 'n_layer': 2, 'n_head': 2, 'n_embd': 16,
                        'n_expert': 5, 'top_k': 2, 'd_ffn': 24, 'd_low': 8} | changes)


def layer(mlp, **changes):
    """A sparse or dense layer alone, in float64, with weights large enough to tell experts apart."""
    torch.manual_seed(0)
    module = MLPS[mlp](small_config(mlp, **changes)).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


def down(m, i):
    """Wdown_i (D, d_low)."""
    d_low = m.w_up.shape[1]
    return m.w_down[:, i * d_low:(i + 1) * d_low]


def algorithm_1(m, x, K):
    """Routed MoE for one token x (D,), step by step, and the baselines of Table 2."""
    p = router_scores(m, x[None])[0]
    chosen = sorted(range(m.n_expert), key=lambda i: -p[i].item())[:K]
    total = sum(p[i].exp() for i in chosen)
    h = torch.zeros_like(x)
    for i in chosen:
        g, u = x @ (down(m, i) @ m.w_up[i] if m.factorised else m.w_g[i]), x @ m.w_p[i]
        h = h + p[i].exp() / total * ((g * torch.sigmoid(g) * u) @ m.w_o[i])
    return h


def algorithm_2(m, x, K):
    """AoE for one token x (D,), step by step."""
    C = [x @ down(m, i) for i in range(m.n_expert)]
    p = [sum(c * c for c in C_i).sqrt() for C_i in C]
    chosen = sorted(range(m.n_expert), key=lambda i: -p[i].item())[:K]
    total = sum(p[i].exp() for i in chosen)
    h = torch.zeros_like(x)
    for i in chosen:
        g, u = C[i] @ m.w_up[i], x @ m.w_p[i]
        h = h + p[i].exp() / total * ((g * torch.sigmoid(g) * u) @ m.w_o[i])
    return h


def aux_loss(m, x, scores):
    """L_aux of Eq. 2 and 6, with weight m.aux_weight, for tokens x (T, D) whose scores are lists of E numbers."""
    E, T = m.n_expert, len(x)
    total = 0
    for i in range(E):
        f = sum(i in sorted(range(E), key=lambda j: -p[j].item())[:m.top_k] for p in scores) / T
        P = sum(p[i].exp() / sum(q.exp() for q in p) for p in scores) / T
        total = total + f * P
    return m.aux_weight * E * total


def router_scores(m, x):
    hidden = x if m.router_in is None else F.silu(x @ m.router_in)
    return [list(h @ m.router) for h in hidden]


def activation_norms(m, x):
    return [[(token @ down(m, i)).square().sum().sqrt() for i in range(m.n_expert)] for token in x]


def choose_slowly(select, p, top_p=0.6, capacity_factor=1.5):
    """For each token the set of its experts, from scores p, T lists of E numbers."""
    q = [[math.exp(a - max(scores)) for a in scores] for scores in [[a.item() for a in scores] for scores in p]]
    q = [[a / sum(scores) for a in scores] for scores in q]
    T, E = len(q), len(q[0])
    if select == 'top_p':
        sets = []
        for scores in q:
            sets.append(set())
            for i in sorted(range(E), key=lambda i: -scores[i]):
                if sum(scores[j] for j in sets[-1]) < top_p:
                    sets[-1].add(i)
        return sets
    sets = [set() for _ in range(T)]
    for i in range(E):
        for t in sorted(range(T), key=lambda t: -q[t][i])[:round(capacity_factor * T / E)]:
            sets[t].add(i)
    return sets


@pytest.mark.parametrize('select', ('top_p', 'expert_choice'))
@pytest.mark.parametrize('tokens', (10, 150))
@pytest.mark.parametrize('mlp, options, scores', (('moe', {}, router_scores), ('moe', {'factorised': True}, router_scores),
                                                  ('aoe', {}, activation_norms)))
def test_other_selection_rules_equal_a_slow_loop(mlp, options, scores, select, tokens):
    m = layer(mlp, select=select, capacity_factor=1.5, conf_weight=0.2, **options)
    x = torch.randn(2, tokens // 2, 16, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    fast, routing = m(x)

    flat = x.flatten(0, 1)
    p = scores(m, flat)
    sets = choose_slowly(select, p)
    rows = []
    for token, p_t, chosen in zip(flat, p, sets):
        h = torch.zeros(16, dtype=torch.float64)
        for i in chosen:
            g, u = token @ (down(m, i) @ m.w_up[i] if m.factorised else m.w_g[i]), token @ m.w_p[i]
            h = h + p_t[i].exp() / sum(p_t[j].exp() for j in chosen) * ((g * torch.sigmoid(g) * u) @ m.w_o[i])
        rows.append(h)
    slow = torch.stack(rows).view_as(x)
    q = torch.stack([torch.stack(list(p_t)) for p_t in p]).softmax(-1)
    penalty = 0.2 * -(q * q.log()).sum(-1).mean()
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    assert routing.aux_loss.item() == pytest.approx(penalty.item())
    assert routing.experts_per_token.item() == pytest.approx(sum(map(len, sets)) / tokens)
    assert len(set(map(len, sets))) > 1                                         # tokens do get different numbers
    leaves = dict(m.named_parameters()) | {'x': x}
    a = torch.autograd.grad((fast * cotangent).sum() + routing.aux_loss, leaves.values())
    b = torch.autograd.grad((slow * cotangent).sum() + penalty, leaves.values())
    for name, fast_grad, slow_grad in zip(leaves, a, b):
        torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize('node', ('g', 'u', 'silu', 'product', 'output'))
@pytest.mark.parametrize('order', (1.0, 2.0, math.inf))
def test_the_pilot_chooses_by_the_norm_of_a_node_and_weights_by_the_router(node, order):
    m = layer('moe')
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    m.choose_by = norm_of_node(node, order)
    slow = []
    for token in x[0]:
        outputs, norms = [], []
        for i in range(5):
            g, u = token @ m.w_g[i], token @ m.w_p[i]
            silu = g / (1 + (-g).exp())
            nodes = {'g': g, 'u': u, 'silu': silu, 'product': silu * u, 'output': (silu * u) @ m.w_o[i]}
            outputs.append(nodes['output'])
            norms.append(max(abs(v) for v in nodes[node]) if order == math.inf else
                         sum(abs(v) ** order for v in nodes[node]) ** (1 / order))
        chosen = sorted(range(5), key=lambda i: -norms[i].item())[:2]
        p = token @ m.router
        slow.append(sum(p[i].exp() * outputs[i] for i in chosen) / sum(p[i].exp() for i in chosen))
    torch.testing.assert_close(m(x)[0][0], torch.stack(slow), rtol=1e-10, atol=1e-10)


def grouped_mm_calls(monkeypatch, allow):
    """A list that grows with each call of F.grouped_mm, which is taken away unless allowed."""
    calls = []
    if not allow:
        monkeypatch.delattr(F, 'grouped_mm', raising=False)
    elif not hasattr(F, 'grouped_mm'):
        pytest.skip('this PyTorch has no F.grouped_mm')
    else:
        original = F.grouped_mm
        monkeypatch.setattr(F, 'grouped_mm', lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


@pytest.mark.parametrize('aux_weight', (0.0, 0.3))
@pytest.mark.parametrize('top_k, tokens', ((1, 6), (2, 6), (2, 150), (5, 6)))       # 150: with padding
@pytest.mark.parametrize('mlp, options, algorithm, scores', (
    ('moe', {}, algorithm_1, router_scores),
    ('moe', {'factorised': True}, algorithm_1, router_scores),
    ('moe', {'router': 'large'}, algorithm_1, router_scores),
    ('aoe', {}, algorithm_2, activation_norms)))
@pytest.mark.parametrize('form, dtype, rtol, atol', (
    ('loop', torch.float64, 1e-10, 1e-12), ('F.grouped_mm', torch.float32, 1e-4, 1e-3)))
def test_layer_equals_the_algorithm_in_values_and_every_gradient(mlp, options, algorithm, scores, top_k, aux_weight,
                                                                 tokens, form, dtype, rtol, atol, monkeypatch):
    calls = grouped_mm_calls(monkeypatch, allow=form == 'F.grouped_mm')
    m = layer(mlp, top_k=top_k, aux_weight=aux_weight, **options).to(dtype)
    x = torch.randn(2, tokens // 2, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, tokens // 2, 16, dtype=dtype)
    leaves = dict(m.named_parameters()) | {'x': x}

    fast, routing = m(x)
    slow = torch.stack([torch.stack([algorithm(m, token, top_k) for token in sequence]) for sequence in x])
    torch.testing.assert_close(fast, slow, rtol=rtol, atol=atol)
    slow_aux = aux_loss(m, x.flatten(0, 1), scores(m, x.flatten(0, 1))) if aux_weight else torch.zeros(())
    assert routing.aux_loss.item() == pytest.approx(slow_aux.item(), rel=rtol)
    fast_grads = torch.autograd.grad((fast * weight).sum() + routing.aux_loss, leaves.values(), allow_unused=True)
    slow_grads = torch.autograd.grad((slow * weight).sum() + slow_aux, leaves.values(), allow_unused=True)
    for name, a, b in zip(leaves, fast_grads, slow_grads):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=name)
    assert bool(calls) == (form == 'F.grouped_mm')


def test_groups_hold_every_pair_once_in_the_part_of_its_expert():
    torch.manual_seed(0)
    chosen = torch.rand(300, 4).topk(2).indices.clamp(max=2)                    # expert 3 of 4 gets none
    chosen[:, 1] = (chosen[:, 0] + 1) % 3
    groups = group_by_expert(chosen, torch.bincount(chosen.flatten(), minlength=4))
    ends = groups.ends.tolist()
    assert all(end % 9 == 0 for end in ends)                                    # 600 pairs // 4 experts // 16
    assert ends[-1] == len(groups.token) == len(groups.expert) == 630           # (600 + 4 * 8) // 9 * 9
    assert len(set(groups.row.flatten().tolist())) == 600
    for t, k in itertools.product(range(300), range(2)):
        row = groups.row[t, k]
        assert groups.token[row] == t and groups.expert[row] == chosen[t, k]
    for i, (start, end) in enumerate(zip([0] + ends, ends)):
        assert (groups.expert[start:end] == i).all()


@pytest.mark.skipif(not hasattr(F, 'grouped_mm'), reason='this PyTorch has no F.grouped_mm')
@pytest.mark.parametrize('mlp, aux_weight', (('dense', 0.0), ('moe', 0.01), ('aoe', 0.0), ('aoe', 0.01)))
def test_a_training_step_compiles_into_one_graph(mlp, aux_weight):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = GPT(small_config(mlp, n_embd=32, d_ffn=48, aux_weight=aux_weight))
    idx = torch.randint(11, (16, 8))
    losses, grads = [], []
    for forward in (model, torch.compile(model, fullgraph=True, backend='aot_eager')):   # backend: without a C++ compiler
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            _, loss, routing = forward(idx, idx)
        (loss + routing.aux_loss.sum()).backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)                      # as far as bfloat16 goes
    assert torch.cosine_similarity(*grads, dim=0) > 0.999


@pytest.mark.parametrize('mlp', SPARSE)
def test_bfloat16_stays_close_to_float32(mlp):
    torch.manual_seed(0)
    model = GPT(small_config(mlp, n_embd=64, d_ffn=96))
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


@pytest.mark.parametrize('mlp', SPARSE)
def test_identical_experts_equal_one_dense_mlp(mlp):
    m = layer(mlp)
    with torch.no_grad():
        for w in (m.w_p, m.w_o, m.w_g if mlp == 'moe' else m.w_up):
            w.copy_(w[:1].expand_as(w))
        if mlp == 'aoe':
            m.w_down.copy_(m.w_down[:, :8].repeat(1, 5))
    dense = MLP(small_config('dense', top_k=1)).double()
    w_g = m.w_g[0] if mlp == 'moe' else m.w_down[:, :8] @ m.w_up[0]
    dense.w_g, dense.w_p, dense.w_o = (torch.nn.Parameter(w.detach().clone()) for w in (w_g, m.w_p[0], m.w_o[0]))
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x)[0], dense(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('mlp, select', (*((mlp, 'top_k') for mlp in MLPS), *((mlp, 'top_p') for mlp in SPARSE)))
def test_logits_do_not_depend_on_later_tokens(mlp, select):
    torch.manual_seed(0)
    model = GPT(small_config(mlp, select=select)).double()
    idx = torch.randint(11, (1, 8))
    logits = model(idx)[0]
    for t in range(1, 8):
        changed = idx.clone()
        changed[0, t:] = (changed[0, t:] + 1 + torch.randint(10, (8 - t,))) % 11
        other = model(changed)[0]
        torch.testing.assert_close(other[0, :t], logits[0, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(other[0, t:], logits[0, t:])


@pytest.mark.parametrize('mlp', SPARSE)
def test_expert_choice_lets_later_tokens_decide_over_earlier_ones_but_not_in_generation(mlp):
    torch.manual_seed(0)
    model = GPT(small_config(mlp, select='expert_choice', capacity_factor=1.0)).double()
    for p in model.parameters():
        p.data *= 10
    idx = torch.randint(11, (1, 8))
    changes = [torch.cat([idx[:, :4], torch.randint(11, (1, 4))], 1) for _ in range(10)]
    assert any(not torch.allclose(model(changed)[0][0, :4], model(idx)[0][0, :4]) for changed in changes)
    usual = GPT(small_config(mlp)).double()
    usual.load_state_dict(model.state_dict())
    assert torch.equal(model.generate(idx[:, :3], 5, temperature=0), usual.generate(idx[:, :3], 5, temperature=0))
    assert model.blocks[0].mlp.select == 'expert_choice'


@pytest.mark.parametrize('n_embd, d_ffn', (*itertools.product((64, 96, 128, 192, 256, 384), (176, 256, 512, 1000)),
                                           (384, 1536), (768, 3072), (1280, 5120)))
def test_aoe_has_the_parameters_of_moe_and_moe_the_active_ones_of_dense(n_embd, d_ffn):
    def build(mlp):
        with torch.device('meta'):
            return GPT(GPTConfig(mlp=mlp, n_layer=3, n_embd=n_embd, d_ffn=d_ffn, vocab_size=84))
    moe, aoe, dense = build('moe'), build('aoe'), build('dense')
    c = aoe.config
    assert c.d_low % 8 == 0 and c.d_wide % 8 == 0
    assert abs(c.d_low - n_embd / 3) <= n_embd / 4
    assert abs(aoe.total_parameters() / moe.total_parameters() - 1) < 0.01
    routers = 3 * n_embd * 8
    assert moe.active_parameters() - routers == dense.active_parameters() == dense.total_parameters()


def test_d_wide_follows_equation_5_at_the_papers_shapes():
    assert GPTConfig(n_head=12, n_embd=768, d_ffn=3072, d_low=256).d_wide == 3840
    wide = GPTConfig(n_head=20, n_embd=1280, d_ffn=5120, d_low=400).d_wide
    assert wide == 6472                      # the paper's 6470, as a multiple of 8


def test_parameters_and_flops_by_hand():
    D, S, V, L, E, K, d = 16, 8, 11, 2, 5, 2, 24
    norms, attention, head = (2 * L + 1) * D, L * 4 * D * D, V * D
    moe = GPT(small_config('moe'))
    assert moe.total_parameters() == norms + attention + head + L * (D * E + E * 3 * D * d)
    matrices = attention + head + L * (D * E + K * 3 * D * d)
    assert moe.active_parameters() == norms + matrices
    assert moe.flops_per_token() == 6 * matrices + 12 * L * S * D

    aoe = GPT(small_config('aoe'))
    d_low, d_wide = aoe.config.d_low, aoe.config.d_wide
    matrices = attention + head + L * (D * E * d_low + K * (d_low * d_wide + 2 * D * d_wide))   # all E evaluate
    assert aoe.active_parameters() == norms + matrices
    assert aoe.flops_per_token() == 6 * matrices + 12 * L * S * D


def test_initialisation_gives_all_variants_the_same_scale():
    torch.manual_seed(0)
    config = dict(vocab_size=84, n_layer=3, n_embd=128, d_ffn=256)
    models = {mlp: GPT(GPTConfig(mlp=mlp, **config)) for mlp in MLPS}
    moe, aoe, dense = (models[mlp].blocks[1].mlp for mlp in ('moe', 'aoe', 'dense'))
    w_down = aoe.w_down.view(128, 8, -1).transpose(0, 1)                        # (E, D, d_low)
    product = w_down @ aoe.w_up                                                 # (E, D, d_wide), in the place of w_g
    assert moe.w_g.std().item() == pytest.approx(128 ** -0.5, rel=0.02)
    assert product.std().item() == pytest.approx(moe.w_g.std().item(), rel=0.03)
    for mlp in (moe, aoe, dense):
        assert mlp.w_p.std().item() == pytest.approx(128 ** -0.5, rel=0.02)
        assert mlp.w_o.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.02)
    for model in models.values():
        assert model.blocks[1].attention.out.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.02)


def test_aux_loss_by_hand():
    # Two tokens, two experts, K = 1. Router scores: token 0 gets (ln 3, 0), token 1 gets (ln 3, 0) as well.
    m = MoE(small_config('moe', n_expert=2, top_k=1, aux_weight=0.01))
    scores = torch.tensor([[math.log(3), 0.0]] * 2)
    routing = m.routing(scores, load=torch.tensor([2, 0]))
    # f = (1, 0), P = (3/4, 1/4): a E sum f P = 0.01 * 2 * 3/4; a balanced f would give 0.01.
    assert routing.aux_loss.item() == pytest.approx(0.015)
    assert routing.load.tolist() == [1, 0]
    torch.testing.assert_close(routing.prob, torch.tensor([0.75, 0.25]))
    assert routing.ent_conf.item() == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


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


@pytest.mark.parametrize('mlp', SPARSE)
def test_routing_counts_what_happened(mlp):
    torch.manual_seed(0)
    model = GPT(small_config(mlp))
    routing = model(torch.randint(11, (4, 8)))[2]
    torch.testing.assert_close(routing.load.sum(1), torch.ones(2))
    torch.testing.assert_close(routing.prob.sum(1), torch.ones(2))
    assert routing.load.shape == routing.prob.shape == (2, 5)
    assert routing.norm.shape == ((2, 5) if mlp == 'aoe' else (2, 0))
    assert routing.ent_conf.shape == routing.aux_loss.shape == (2,)
    assert routing.experts_per_token.tolist() == [2, 2]
    assert (routing.ent_conf <= math.log(5) + 1e-6).all() and (routing.aux_loss == 0).all()

    m, x = model.blocks[0].mlp, torch.randn(1, 6, 16)
    scores = m.score(x.flatten(0, 1))[0]
    counts = torch.zeros(5)
    for token in scores.tolist():
        for expert in sorted(range(5), key=lambda i: -token[i])[:2]:
            counts[expert] += 1
    torch.testing.assert_close(m(x)[1].load, counts / 12)


def test_dense_gives_the_same_things_in_the_same_order_with_nothing_in_the_routing():
    logits, loss, routing = GPT(small_config('dense'))(torch.zeros(1, 3, dtype=torch.int64))
    assert logits.shape == (1, 3, 11) and loss is None
    assert all(field.numel() == 0 for field in routing) and routing.aux_loss.sum() == 0


@pytest.mark.parametrize('mlp', SPARSE)
def test_an_expert_without_tokens_gets_zero_gradients(mlp):
    m = layer(mlp)
    m(torch.randn(1, 1, 16, dtype=torch.float64))[0].sum().backward()          # one token: 2 of 5 experts
    idle = [i for i in range(5) if not m.w_p.grad[i].any()]
    assert len(idle) == 3
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())


@pytest.mark.parametrize('aux_weight', (0.0, 0.1))
@pytest.mark.parametrize('norms', ('zero', 'equal'))
def test_a_token_whose_norms_are_all_the_same_has_finite_gradients(norms, aux_weight):
    m = layer('aoe', aux_weight=aux_weight)
    x = torch.randn(1, 2, 16, dtype=torch.float64) * (norms == 'equal')
    if norms == 'equal':
        m.w_down.data = down(m, 0).repeat(1, m.n_expert)
    h, routing = m(x.requires_grad_())
    (h.square().sum() + routing.aux_loss).backward()
    assert torch.isfinite(h).all() and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())


@pytest.mark.parametrize('mlp, changes', (
    ('dense', {}), ('moe', {}), ('moe', {'factorised': True, 'aux_weight': 0.1}), ('moe', {'router': 'large', 'aux_weight': 0.1}),
    ('moe', {'select': 'top_p', 'conf_weight': 0.1}), ('moe', {'select': 'expert_choice'}),
    ('aoe', {}), ('aoe', {'aux_weight': 0.1}),
    ('aoe', {'select': 'top_p', 'conf_weight': 0.1}), ('aoe', {'select': 'expert_choice'})))
def test_the_gradient_of_every_parameter_equals_a_finite_difference(mlp, changes):
    """Along a random direction of each parameter and along its steepest number, with what the trainer adds to the loss."""
    torch.manual_seed(0)
    model = GPT(small_config(mlp, **changes)).double()
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
            assert difference == pytest.approx((p.grad * direction).sum().item(), rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize('mlp', SPARSE)
def test_scores_are_float32_under_autocast(mlp):
    torch.manual_seed(0)
    m = MLPS[mlp](small_config(mlp))
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.1)
    with torch.autocast('cpu', torch.bfloat16):
        h, routing = m(torch.randn(1, 4, 16))
        assert m.score(torch.randn(4, 16))[0].dtype == torch.float32
    assert h.dtype == torch.bfloat16 and all(field.dtype == torch.float32 for field in routing)


def test_rotary_scores_depend_on_the_distance_alone():
    model = GPT(small_config('dense'))
    q, k = torch.randn(2, 1, 1, 1, 8)
    q, k = (rotate(v.expand(1, 1, 8, 8), model.cos, model.sin)[0, 0] for v in (q, k))   # the same at 8 positions
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
    past = [Past() for _ in model.blocks]
    parts = [model(idx[:, a:b], past=past)[0] for a, b in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8))]
    torch.testing.assert_close(torch.cat(parts, 1), model(idx)[0], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match='at most block_size = 8 tokens, got 9'):
        model(idx[:, :1], past=past)


@pytest.mark.parametrize('mlp', MLPS)
def test_generation(mlp):
    torch.manual_seed(0)
    model = GPT(small_config(mlp))
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    greedy = model.generate(idx, 20, temperature=0)
    expected, start = idx, 0
    for _ in range(20):                                                         # past the context of 8
        logits = model(expected[:, start:])[0]                                  # anew each time: nothing is cached
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
        if logits.shape[1] == 8:
            start = expected.shape[1] - 4
    assert greedy.tolist() == expected.tolist()
    assert model.generate(idx, 20, vocab_top_k=1).tolist() == expected.tolist()
    longer = torch.randint(11, (1, 15))
    assert model.generate(longer, 1, temperature=0)[0, -1] == model(longer[:, -8:])[0][0, -1].argmax()

    one, same, other = (model.generate(idx, 30, seed=s).tolist() for s in (1, 1, 2))
    assert one == same != other


def test_the_temperature_and_the_vocabulary_bound_are_respected():
    torch.manual_seed(0)
    model = GPT(small_config('moe'))
    with torch.no_grad():
        model.embedding.weight *= 20                                            # decided predictions
    idx = torch.zeros(2000, 1, dtype=torch.int64)
    p = (model(idx[:1])[0][0, -1] / 1.5).softmax(-1)
    kept = p.topk(3)
    drawn = torch.bincount(model.generate(idx, 1, temperature=1.5, vocab_top_k=3, seed=0)[:, 1], minlength=11)
    assert drawn.sum() == drawn[kept.indices].sum() == 2000
    torch.testing.assert_close(drawn[kept.indices] / 2000, kept.values / kept.values.sum(), atol=0.04, rtol=0)


@pytest.mark.parametrize('changes, says', (
    ({'n_embd': 30, 'n_head': 4}, 'n_embd'), ({'top_k': 6}, 'top_k'), ({'mlp': 'mlp'}, 'mlp'), ({'d_low': 24}, 'd_low'),
    ({'n_layer': 0}, 'n_layer'), ({'dropout': 1.0}, 'dropout'), ({'select': 'best'}, 'select'), ({'aux_weight': -1.0}, 'aux'),
))
def test_a_model_that_cannot_be_is_refused(changes, says):
    with pytest.raises(ValueError, match=f'^{says}.*: expected .*, got '):
        small_config(**{'mlp': 'aoe'} | changes)
