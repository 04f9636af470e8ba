"""
A small GPT whose MLP is one of three, and nothing else changes:

    dense   one SwiGLU MLP
    moe     E experts; a router decides which K of them see a token               (Algorithm 1)
    aoe     E experts, no router; every expert looks at the token, and the K that
            respond most strongly go on: Autonomy-of-Experts, arXiv 2501.13074    (Algorithm 2)

Around it, a pre-norm decoder: RMSNorm, rotary positions, causal attention, no biases, and one matrix for the
embedding and the head. Read from top to bottom: every part is made of the parts above it.

Shapes in the comments:
    B sequences, S positions, T = B*S tokens, D = n_embd
    E = n_expert, K = top_k, d = an expert's hidden width
    P rows: the T*K chosen (token, expert) pairs, and some padding
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """What defines a model. Raises ValueError, in one line, where the numbers do not fit together."""
    # model
    block_size: int = 64                 # context length, in tokens
    vocab_size: int | None = None        # None: as many as the data's tokenizer has
    n_layer: int = 4                     # number of blocks
    n_head: int = 4                      # attention heads per block
    n_embd: int = 128                    # width of the residual stream, D
    dropout: float = 0.0                 # probability of dropping an activation in training
    mlp: str = 'aoe'                     # aoe, moe or dense; several, comma-separated, are trained in turn
    n_expert: int = 8                    # experts per layer, E
    top_k: int = 2                       # experts that handle a token, K
    d_ffn: int | None = None             # hidden width of a moe expert; None: 4 n_embd, as in the paper
    d_low: int | None = None             # width of an aoe expert's self-evaluation; None: about n_embd / 3
    router: str = 'linear'               # of moe: linear; large: two layers with the parameters of aoe's w_down
    factorised: bool = False             # of moe: the gate as aoe makes it, Wg = Wdown Wup
    aux_weight: float = 0.0              # weight of the load-balancing loss L_aux, a in Eq. 2; the paper's is 0.01
    select: str = 'top_k'                # how experts are chosen by their scores: top_k, top_p or expert_choice
    top_p: float = 0.6                   # for top_p: the probability that the chosen experts reach together
    conf_weight: float = 0.0             # weight of the penalty on Ent_conf; the paper's is 1e-4 with top_p
    capacity_factor: float = 2.0         # for expert_choice: each expert takes this times T / E tokens of the batch

    def __post_init__(self):
        def require(condition, message):
            if not condition:
                raise ValueError(message)

        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_expert', 'top_k', 'd_ffn', 'd_low'):
            value = getattr(self, key)
            require(value is None or value > 0, f'{key}: expected a positive number, got {value}')
        require(self.mlp in MLPS, f'mlp: expected one of {", ".join(MLPS)}, got {self.mlp!r}')
        require(self.router in ('linear', 'large'), f'router: expected linear or large, got {self.router!r}')
        require(self.select in ('top_k', 'top_p', 'expert_choice'),
                f'select: expected top_k, top_p or expert_choice, got {self.select!r}')
        require(0 < self.top_p <= 1, f'top_p: expected more than 0 and at most 1, got {self.top_p}')
        require(self.capacity_factor > 0, f'capacity_factor: expected more than 0, got {self.capacity_factor}')
        require(self.conf_weight >= 0, f'conf_weight: expected 0 or more, got {self.conf_weight}')
        require(self.n_embd % (2 * self.n_head) == 0,
                f'n_embd: expected a multiple of 2 * n_head = {2 * self.n_head} (rotary positions turn pairs '
                f'of numbers within a head), got {self.n_embd}')
        require(self.top_k <= self.n_expert, f'top_k: expected at most n_expert = {self.n_expert}, got {self.top_k}')
        require(0 <= self.dropout < 1, f'dropout: expected a probability below 1, got {self.dropout}')
        require(self.aux_weight >= 0, f'aux_weight: expected 0 or more, got {self.aux_weight}')

        if self.d_ffn is None:
            self.d_ffn = 4 * self.n_embd
        if self.d_low is None:           # the multiple of 8 nearest to D/3 for which a d_wide gives aoe moe's size
            choices = range(8, max(8, self.n_embd // 2) + 1, 8)
            self.d_low = min(choices, key=lambda d_low: (self._mismatch(d_low) > 0.008, abs(d_low - self.n_embd / 3)))
        require(self.d_low <= self.n_embd, f'd_low: expected at most n_embd = {self.n_embd}, got {self.d_low}')

    @property
    def d_wide(self):
        """Hidden width of an aoe expert, by Eq. 5: aoe has the total parameters of moe. A multiple of 8."""
        return self._d_wide(self.d_low)

    def _d_wide(self, d_low):
        exact = (3 * self.n_embd * self.d_ffn - d_low * self.n_embd) / (d_low + 2 * self.n_embd)
        return max(8, 8 * round(exact / 8))

    def _mismatch(self, d_low):
        """How far an aoe expert is from the size of a moe expert and its column of the router, as a fraction."""
        d_wide = self._d_wide(d_low)
        aoe = self.n_embd * d_low + d_low * d_wide + 2 * self.n_embd * d_wide
        moe = 3 * self.n_embd * self.d_ffn + self.n_embd
        return abs(aoe / moe - 1)


class Routing(NamedTuple):
    """What the sparse MLPs did with a batch. A layer gives one without the leading L; for dense all are empty."""
    load: torch.Tensor       # (L, E)  share of the (token, expert) pairs that each expert handled; sums to 1
    prob: torch.Tensor       # (L, E)  P_i of Eq. 6: mean over tokens of the softmax of all E scores
    norm: torch.Tensor       # (L, E)  mean over tokens of ||C_i||, Figure 4; (L, 0) for moe, which measures none
    ent_conf: torch.Tensor   # (L,)    Ent_conf of Eq. 8; lower is more confident, at most ln E
    aux_loss: torch.Tensor   # (L,)    L_aux of Eq. 2 and the penalty on Ent_conf, weights included; 0 where those are 0
    experts_per_token: torch.Tensor   # (L,)    mean over tokens; top_k, unless `select` says otherwise


class Choice(NamedTuple):
    """What a sparse MLP chose for T tokens (GPT.watching_experts)."""
    experts: torch.Tensor    # (T, K)  the experts of each token, in no order
    weights: torch.Tensor    # (T, K)  their weights; 0 for one that does not count, where `select` is not top_k
    scores: torch.Tensor     # (T, K)  their scores: activation norms for aoe, the router's logits for moe


def at_least_float32(x):
    """Scores are not trusted to 16 bits, whatever the autocast dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x, cos, sin):
    """Rotary positions: turn each pair of numbers (x1, x2) by an angle that grows with the position.

    x (B, n_head, S, head_dim); cos, sin (S, head_dim / 2). Returns the shape and dtype of x.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).type_as(x)


class Past:
    """Keys and values of the positions that one block has seen, so that generation computes each position once."""

    def __init__(self):
        self.length, self.k, self.v = 0, None, None

    def extend(self, k, v):
        """Append k, v (B, n_head, S, head_dim) and return all so far."""
        self.length += k.shape[2]
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.k, self.v


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and those before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, past=None):                                # (B, S, D)
        B, S, D = x.shape
        qkv = self.qkv(x).view(B, S, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # each (B, n_head, S, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:                                                  # one position, or the first S
            k, v = past.extend(k, v)
        # On a CPU, short sequences attend in float32: there the backward of bfloat16 takes 3 times as long.
        in_float32 = x.device.type == 'cpu' and S < 256
        if in_float32:
            q, k, v = at_least_float32(q), at_least_float32(k), at_least_float32(v)
        dropout = self.dropout if self.training else 0.0
        with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type) and not in_float32):
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=S > 1)
        return self.out(y.transpose(1, 2).reshape(B, S, D))


class MLP(nn.Module):
    """The dense SwiGLU MLP, as wide as the K experts of d_ffn that moe activates."""

    def __init__(self, config):
        super().__init__()
        d = config.top_k * config.d_ffn
        self.w_g = nn.Parameter(torch.empty(config.n_embd, d))
        self.w_p = nn.Parameter(torch.empty(config.n_embd, d))
        self.w_o = nn.Parameter(torch.empty(d, config.n_embd))

    def forward(self, x):                                                     # (B, S, D)
        return (F.silu(x @ self.w_g) * (x @ self.w_p)) @ self.w_o, None       # no routing to tell of


class Groups(NamedTuple):
    """The chosen (token, expert) pairs as P rows sorted by expert, so that each expert has its tokens in one piece."""
    token: torch.Tensor      # (P,)    the token of each row
    expert: torch.Tensor     # (P,)    its expert
    row: torch.Tensor        # (T, K)  the row of each pair; rows of no pair are padding
    ends: torch.Tensor       # (E,)    int32, the row at which each expert's rows end; the last is P
    active: torch.Tensor     # (T, K)  which of the K pairs of a token are real; None for all


def group_by_expert(chosen, load, active=None):
    """Groups of chosen (T, K), the experts of each token, where active; load (E,) counts the pairs of each expert.

    Each expert's rows are padded to a multiple of up to 16, with rows of token 0 that nothing reads: a CPU prepares each
    new shape of a bfloat16 matmul for longer than it then takes, and with few shapes few are new. P does not depend
    on the choice (the last expert takes what is left), so that a GPU is never waited for.
    """
    T, K, E = len(chosen), chosen.shape[1], len(load)
    pairs = T * K
    if active is not None:                                                    # inactive ones are sorted to the end
        pairs, chosen = int(load.sum()), chosen.masked_fill(~active, E)
    multiple = max(1, min(16, pairs // E // 16))
    P = (pairs + E * (multiple - 1)) // multiple * multiple                   # the most that padding can need
    padding = -load % multiple                                                # (E,)
    expert, order = chosen.flatten().sort(stable=True)
    expert, order = expert[:pairs], order[:pairs]
    row_of_sorted = torch.arange(pairs, device=chosen.device) + (padding.cumsum(0) - padding)[expert]
    ends = (load + padding).cumsum(0)
    ends[-1] = P
    return Groups(
        token=order.new_zeros(P).index_copy(0, row_of_sorted, order // K),
        expert=torch.bucketize(torch.arange(P, device=chosen.device), ends, right=True),
        row=order.new_zeros(T * K).index_copy(0, order, row_of_sorted).view(T, K),
        ends=ends.int(), active=active)


def grouped_mm(a, b, ends):
    """A matmul for each expert: a (P, m), b (E, m, n) -> (P, n), or, as the gradient of b, a (m, P), b (P, n) -> (E, m, n).

    Where PyTorch has one call for it (widths of whole 16 bytes; bfloat16 on cuda and cpu, float32 on a cpu unless compiled),
    that is used: it does not wait for a GPU to learn `ends`. The loop says what it does.
    """
    cpu, dtype = a.device.type == 'cpu', a.dtype
    whole = all(n * a.element_size() % 16 == 0 for t in (a, b) for n in t.stride() if n > 1)
    known = (dtype == torch.bfloat16 and (cpu or a.device.type == 'cuda')
             or dtype == torch.float32 and cpu and not torch.compiler.is_compiling())
    if hasattr(F, 'grouped_mm') and whole and known:
        return F.grouped_mm(a, b, offs=ends)
    ends = ends.tolist()
    pieces = [slice(start, end) for start, end in zip([0] + ends, ends)]
    if b.dim() == 3:
        return torch.cat([a[piece] @ b[i] for i, piece in enumerate(pieces)])
    return torch.stack([a[:, piece] @ b[piece] for piece in pieces])


def as_autocast(x):
    """x in the dtype that autocast multiplies in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def sum_rows(y, row, weight=None):
    """The rows of each token, weighted and added up: y (P, D), row (T, K), weight (T, K) or None for 1 -> (T, D)."""
    if y.device.type == 'cpu':               # one pass, where the line below makes three
        return F.embedding_bag(row, y, mode='sum', per_sample_weights=None if weight is None else weight.type_as(y))
    return (y[row] if weight is None else y[row] * weight.type_as(y).unsqueeze(-1)).sum(1)


class Experts(torch.autograd.Function):
    """The chosen experts, the last line of Algorithms 1 and 2: for each expert i, with its rows X of x,

        g = gate_in Wgate_i        x Wg_i for moe, C_i Wup_i for aoe
        u = X Wp_i
        y = (SiLU(g) * u) Wo_i     and h of a token is the sum of w y over its K rows

    Plain autograd gives the same gradients, but keeps every intermediate for backward. Here backward computes again
    what is cheap: SiLU(g) * u from g and u, X from x, and for aoe also g, from d_low numbers a row instead of d_wide.
    """

    @staticmethod
    def forward(ctx, x, C, weight, w_gate, w_p, w_o, *groups):
        """x (T, D); C (P, d_low) for aoe, None for moe, whose gate_in is x; weight (T, K); Groups. Returns h (T, D)."""
        token, _, row, ends, active = groups
        X = x.index_select(0, token)                                          # (P, D)
        g = grouped_mm(X if C is None else C, w_gate, ends)                   # (P, d)
        u = grouped_mm(X, w_p, ends)                                          # (P, d)
        y = grouped_mm(F.silu(g).mul_(u), w_o, ends)                          # (P, D)
        ctx.save_for_backward(x, C, weight, w_gate, w_p, w_o, g if C is None else None, u, y,
                              token, row, ends, active)
        return sum_rows(y, row, weight)

    @staticmethod
    def backward(ctx, dh):
        x, C, weight, w_gate, w_p, w_o, g, u, y, token, row, ends, active = ctx.saved_tensors
        X = x.index_select(0, token)                                          # (P, D)
        gate_in = X if C is None else C
        g = grouped_mm(C, w_gate, ends) if g is None else g                   # (P, d)
        silu_g = F.silu(g)
        dy = dh.index_select(0, token)                                        # (P, D)
        dweight = torch.linalg.vecdot(dy, y)[row].type_as(weight)             # (T, K)
        dy *= y.new_zeros(len(y)).index_add(0, row.flatten(), weight.type_as(y).flatten()).unsqueeze(1)   # 0 in padding
        dw_o = grouped_mm((silu_g * u).T, dy, ends)
        da = grouped_mm(dy, w_o.mT, ends)                                     # of a = SiLU(g) * u: (P, d)
        du = silu_g.mul_(da)
        dg = torch.ops.aten.silu_backward(da.mul_(u), g)
        dw_gate, dw_p = grouped_mm(gate_in.T, dg, ends), grouped_mm(X.T, du, ends)
        dX, dgate_in = grouped_mm(du, w_p.mT, ends), grouped_mm(dg, w_gate.mT, ends)
        if C is None:                                                         # x went into the gate as well
            dX, dgate_in = dX.add_(dgate_in), None
        return (sum_rows(dX, row, active), dgate_in, dweight, dw_gate, dw_p, dw_o, *5 * [None])


class ChosenRows(torch.autograd.Function):
    """C_i = x Wdown_i of the chosen pairs. If all experts evaluated themselves, they are known: only backward has work."""

    @staticmethod
    def forward(ctx, x, w_down, C, *groups):
        """x (T, D), w_down (D, E*d_low), C (T, E, d_low) or None, Groups. Returns (P, d_low)."""
        token, expert, row, ends, active = groups
        ctx.save_for_backward(x, w_down, token, row, ends, active)
        if C is not None:
            return C.flatten(0, 1).index_select(0, token * len(ends) + expert)
        w = w_down.view(len(w_down), len(ends), -1).transpose(0, 1)           # of each expert: (E, D, d_low)
        return grouped_mm(x.index_select(0, token), w, ends)

    @staticmethod
    def backward(ctx, dC):
        x, w_down, token, row, ends, active = ctx.saved_tensors
        w = w_down.view(len(w_down), len(ends), -1).permute(1, 2, 0)          # of each expert, turned: (E, d_low, D)
        dw = grouped_mm(x.index_select(0, token).T, dC, ends)                 # (E, D, d_low)
        dx = sum_rows(grouped_mm(dC, w, ends), row, active)                   # (T, D)
        return dx, dw.transpose(0, 1).reshape(w_down.shape), *6 * [None]


class SparseMLP(nn.Module):
    """What moe and aoe share: choose K of E experts for each token, run them, and add up what they say.

    Two things can differ, each apart from the other. How the gate of an expert is made: of w_g, or factorised,
    of w_down and w_up. And who scores, which a subclass says:
        score(x)                      x (T, D) -> the scores p of all experts (T, E), and their C (T, E, d_low) if known
        score_of_chosen(p, chosen, C_rows, groups)    p[I] (T, K), with a gradient; C_rows (P, d_low) if factorised
    """
    scores_are_norms = False
    watched = None           # where somebody watches, a list that takes the Choice of every forward pass

    def __init__(self, config, factorised):
        super().__init__()
        D, E, d = config.n_embd, config.n_expert, config.d_wide if factorised else config.d_ffn
        self.n_expert, self.top_k, self.factorised = E, config.top_k, factorised
        self.select, self.top_p, self.capacity_factor = config.select, config.top_p, config.capacity_factor
        self.aux_weight, self.conf_weight = config.aux_weight, config.conf_weight
        self.w_p = nn.Parameter(torch.empty(E, D, d))
        self.w_o = nn.Parameter(torch.empty(E, d, D))
        if factorised:
            self.w_down = nn.Parameter(torch.empty(D, E * config.d_low))
            self.w_up = nn.Parameter(torch.empty(E, config.d_low, d))
        else:
            self.w_g = nn.Parameter(torch.empty(E, D, d))

    def forward(self, x):                                                     # (B, S, D)
        shape, x = x.shape, x.flatten(0, 1)                                   # (T, D)
        p, C = self.score(x)                                                  # (T, E)
        chosen, active = self.choose(x, p.detach())                           # I: (T, K)
        pairs = torch.ones_like(chosen) if active is None else active.long()
        load = chosen.new_zeros(self.n_expert).scatter_add(0, chosen.flatten(), pairs.flatten())   # (E,)
        groups = group_by_expert(chosen, load, active)
        x = as_autocast(x)
        C_rows = ChosenRows.apply(x, as_autocast(self.w_down), C, *groups) if self.factorised else None
        weight = self.score_of_chosen(p, chosen, C_rows, groups)              # p[I]: (T, K)
        if active is None:
            weight = weight.softmax(-1)                                       # w = softmax(p[I])
        else:
            weight = weight.masked_fill(~active, -1e30).softmax(-1).masked_fill(~active, 0)
        w_gate = self.w_up if self.factorised else self.w_g                   # C_i Wup_i, or x Wg_i
        h = Experts.apply(x, C_rows, weight, *map(as_autocast, (w_gate, self.w_p, self.w_o)), *groups)   # Eq. 1
        if self.watched is not None:
            self.watched.append(Choice(chosen, weight.detach(), p.detach().gather(1, chosen)))
        return h.view(shape), self.routing(p, load)

    def choose(self, x, p):
        """The experts of each token by their scores p (T, E): chosen (T, K), and which of these count, None for all.

        For top_p and expert_choice K is E.
        """
        if self.select == 'top_k':
            return p.topk(self.top_k).indices, None                           # I = argtopK(p)
        q = p.softmax(-1)
        if self.select == 'top_p':                                            # the fewest that reach top_p together
            q, chosen = q.sort(descending=True)
            return chosen, q.cumsum(-1) - q < self.top_p
        # expert_choice: each expert takes its best tokens of the batch, so that later ones decide over earlier ones
        capacity = min(len(p), max(1, round(self.capacity_factor * len(p) / self.n_expert)))
        taken = torch.zeros_like(p, dtype=torch.bool).scatter(0, q.topk(capacity, dim=0).indices, True)
        return torch.arange(self.n_expert, device=p.device).expand(p.shape), taken

    def scores_need_gradient(self):
        """Whether a loss asks for the gradient of all scores, not of the chosen alone."""
        return bool(self.aux_weight or self.conf_weight)

    def routing(self, scores, load):
        """This layer's Routing, from scores (T, E) and the number of pairs that each expert handled (E,)."""
        if not self.scores_need_gradient():
            scores = scores.detach()                                          # statistics alone need no gradient
        p = scores.softmax(-1)                                                # over all E, not the chosen K
        f, P = load.to(p.dtype) / len(scores), p.mean(0)                      # Eq. 6; f sums to K
        ent_conf = -(p * scores.log_softmax(-1)).sum(-1).mean()               # Eq. 8
        return Routing(
            load=f / f.sum(),
            prob=P.detach(),
            norm=scores.detach().mean(0) if self.scores_are_norms else scores.new_empty(0),
            ent_conf=ent_conf.detach(),
            aux_loss=self.aux_weight * self.n_expert * (f * P).sum() + self.conf_weight * ent_conf,   # Eq. 2
            experts_per_token=f.sum())


class MoE(SparseMLP):
    """Routed mixture of experts, Algorithm 1: E_i(x) = (SiLU(x Wg_i) * (x Wp_i)) Wo_i, p = x router.

    The baselines of Table 2: factorised, Wg_i = Wdown_i Wup_i; a large router, p = SiLU(x router_in) router.
    The pilot of Table 1: choose_by is a function (layer, x) -> (T, E) whose largest K are chosen instead of the router's,
    which only weights them then.
    """
    choose_by = None

    def __init__(self, config):
        super().__init__(config, config.factorised)
        D, E, hidden = config.n_embd, config.n_expert, config.n_embd
        self.router_in = None
        if config.router == 'large':                                          # hidden (D + E) is E d_low D
            hidden = round(E * config.d_low * D / (D + E))
            self.router_in = nn.Parameter(torch.empty(D, hidden))
        self.router = nn.Parameter(torch.empty(hidden, E))

    def score(self, x):
        # checkpoint: computed again in backward, so that no float32 copy of x is kept
        return checkpoint(self.route, x, use_reentrant=False, preserve_rng_state=False), None

    def route(self, x):
        if self.router_in is not None:
            x = F.silu(x @ self.router_in)
        with torch.autocast(x.device.type, enabled=False):
            return at_least_float32(x) @ at_least_float32(self.router)

    def choose(self, x, p):
        return super().choose(x, p if self.choose_by is None else self.choose_by(self, x))

    def score_of_chosen(self, p, chosen, C_rows, groups):
        return p.gather(1, chosen)


def norm_of_node(node, order):
    """choose_by of the pilot: the norm (order 1, 2 or inf) of a node in every expert of a MoE, for each token.

    Nodes: g = x Wg, u = x Wp, silu = SiLU(g), product = SiLU(g) * u, output = product Wo.
    """
    def value(layer, x, i):
        if node == 'u':
            return x @ layer.w_p[i]                                           # (T, d_ffn)
        y = x @ layer.w_g[i]
        if node != 'g':
            y = F.silu(y)
        if node in ('product', 'output'):
            y = y * (x @ layer.w_p[i])
        return y @ layer.w_o[i] if node == 'output' else y                    # (T, D) or (T, d_ffn)

    def norms(layer, x):
        values = (at_least_float32(value(layer, x, i)) for i in range(layer.n_expert))
        return torch.stack([torch.linalg.vector_norm(y, ord=order, dim=-1) for y in values], dim=-1)   # (T, E)
    return norms


class AoE(SparseMLP):
    """Autonomy of experts, Algorithm 2: Wg_i = Wdown_i Wup_i, and p_i = ||x Wdown_i||, the expert's own response.

    The self-evaluation C = x Wdown of all E experts is one matmul; the chosen experts go on from their part of it.
    Softmax over the chosen gives the others no gradient, so nothing of their C is kept or differentiated. L_aux
    does need the gradient of all norms: then backward evaluates all experts once more.
    """
    scores_are_norms = True

    def __init__(self, config):
        super().__init__(config, factorised=True)

    def score(self, x):
        if self.scores_need_gradient() and torch.is_grad_enabled():
            p, C = checkpoint(self.evaluate, x, use_reentrant=False, preserve_rng_state=False)
            return p, C.detach()
        with torch.no_grad():
            return self.evaluate(x)

    def evaluate(self, x):
        C = (x @ self.w_down).view(len(x), self.n_expert, -1)                 # Eq. 3: (T, E, d_low)
        return norm(C), C                                                     # Eq. 4: (T, E)

    def score_of_chosen(self, p, chosen, C_rows, groups):
        return norm(C_rows)[groups.row]


def norm(C):
    """L2 norm over the last dimension, in float32 at least."""
    return torch.linalg.vector_norm(C, dim=-1, dtype=torch.promote_types(C.dtype, torch.float32))


MLPS = {'aoe': AoE, 'moe': MoE, 'dense': MLP}


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.n_embd)
        self.attention = CausalSelfAttention(config)
        self.norm_2 = nn.RMSNorm(config.n_embd)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, past=None):                                # (B, S, D)
        x = x + self.dropout(self.attention(self.norm_1(x), cos, sin, past))
        h, routing = self.mlp(self.norm_2(x))
        return x + self.dropout(h), routing


class GPT(nn.Module):
    """The language model: tokens in, logits of the next token out."""

    def __init__(self, config):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError('vocab_size: expected the number of tokens in the vocabulary, got None')
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight

        head_dim = config.n_embd // config.n_head
        frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(config.block_size)[:, None] * frequency          # (block_size, head_dim / 2)
        self.register_buffer('cos', angle.cos(), persistent=False)
        self.register_buffer('sin', angle.sin(), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw every matrix from a normal distribution, with a standard deviation of

            what experts look with: w_g, w_p, w_down, w_up, router_in   1 / sqrt(rows), so that a number with
                                                                        variance 1 stays one
            w_o, out, which add to the residual stream                  0.02 / sqrt(2 n_layer)
            all others                                                  0.02

        0.02 for the first line, as GPT-2 has it, suits a D of some thousands: at D 96 the experts start nearly linear and
        nearly alike, and every variant ends higher (README, "What the paper asks").
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue                                                      # the norms' weights stay at 1
            std = 0.02
            if name.endswith(('w_g', 'w_p', 'w_down', 'w_up', 'router_in')):
                std = p.shape[-2] ** -0.5
            elif name.endswith(('w_o', 'attention.out.weight')):
                std = 0.02 / math.sqrt(2 * self.config.n_layer)
            p.normal_(0.0, std)

    def forward(self, idx, targets=None, past=None):
        """Predict the next token at every position.

        idx, targets: (B, S) int64, S at most block_size. past: a list of one Past per block, which idx continues by one
        token, or begins. Returns, always in this order,
            logits  (B, S, vocab_size)
            loss    mean cross-entropy in nats per token, nothing added; None without targets
            routing Routing, one row per layer; its aux_loss is for the trainer to add
        """
        start = past[0].length if past else 0
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f'expected at most block_size = {self.config.block_size} tokens, got {end}')
        x = self.dropout(self.embedding(idx))                                 # (B, S, D)
        routings = []
        for i, block in enumerate(self.blocks):
            x, routing = block(x, self.cos[start:end], self.sin[start:end], past[i] if past else None)
            routings.append(routing)
        logits = self.head(self.norm(x))                                      # (B, S, vocab_size)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(at_least_float32(logits).flatten(0, 1), targets.flatten())
        if self.config.mlp == 'dense':
            return logits, loss, Routing(*(x.new_empty(0) for _ in Routing._fields))
        return logits, loss, Routing(*(torch.stack(field) for field in zip(*routings)))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, vocab_top_k=None, seed=None):
        """Continue idx (B, S) by max_new_tokens, each drawn from the model's prediction and fed back to it.

        temperature: below 1 sharpens the prediction; 0 always takes the likeliest token (greedy).
        vocab_top_k: draw from that many likeliest tokens only. (top_k of the config is about experts.)
        seed: the same seed on the same machine draws the same text.
        Returns (B, S + max_new_tokens). Sets the model to eval mode. The context begins as the last block_size tokens
        of idx and grows; whenever it is full, it goes on from its later half. expert_choice needs tokens that are
        not there yet: experts are then chosen by top_k.
        """
        self.eval()
        generator = torch.Generator(idx.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        past, new = [Past() for _ in self.blocks], idx[:, -self.config.block_size:]
        with self.without_looking_ahead():
            for _ in range(max_new_tokens):
                logits, _, _ = self(new, past=past)
                logits = at_least_float32(logits[:, -1])                      # (B, vocab_size)
                if vocab_top_k is not None:
                    kept = logits.topk(min(vocab_top_k, logits.shape[-1])).values
                    logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
                if temperature == 0:
                    new = logits.argmax(-1, keepdim=True)
                else:
                    new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                idx = torch.cat([idx, new], dim=1)
                if past[0].length == self.config.block_size:
                    past, new = [Past() for _ in self.blocks], idx[:, -max(1, self.config.block_size // 2):]
        return idx

    @contextmanager
    def without_looking_ahead(self):
        """As a context: layers with select = 'expert_choice' choose by top_k."""
        ahead = [block.mlp for block in self.blocks if getattr(block.mlp, 'select', None) == 'expert_choice']
        try:
            for mlp in ahead:
                mlp.select = 'top_k'
            yield
        finally:
            for mlp in ahead:
                mlp.select = 'expert_choice'

    @contextmanager
    def watching_experts(self):
        """As a context, gives a list to which each forward pass appends a Choice for every layer; none for dense."""
        choices = []
        try:
            for block in self.blocks:
                block.mlp.watched = choices
            yield choices
        finally:
            for block in self.blocks:
                block.mlp.watched = None

    def total_parameters(self):
        """Number of parameters; the matrix that embedding and head share counts once."""
        return sum(p.numel() for p in self.parameters())

    def active_parameters(self):
        """Parameters that the computation of one token touches.

        Of the experts' matrices, K of E. aoe's w_down counts whole: every expert evaluates every token.
        """
        active = 0
        for name, p in self.named_parameters():
            chosen_alone = p.dim() == 3 or name.endswith('w_down') and self.config.mlp == 'moe'
            active += p.numel() * self.config.top_k // self.config.n_expert if chosen_alone else p.numel()
        return active

    def flops_per_token(self):
        """Floating-point operations of a training step per token: 6 for each active weight of a matrix
        (a multiply and an add, once in forward and twice in backward), and 12 S D a layer for attention's two
        products, counted at full context without the saving of the causal mask."""
        c = self.config
        norms = sum(p.numel() for p in self.parameters() if p.dim() == 1)
        return 6 * (self.active_parameters() - norms) + 12 * c.n_layer * c.block_size * c.n_embd
