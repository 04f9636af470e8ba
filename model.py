"""
A small GPT whose MLP is one of three, and nothing else changes:

    dense   one SwiGLU MLP
    moe     E experts; a router decides which K of them see a token               (Algorithm 1)
    aoe     E experts, no router; every expert looks at the token, and the K that respond
            most strongly go on: Autonomy-of-Experts, arXiv 2501.13074            (Algorithm 2)

Four parts, to be read in this order:
    1. the three MLPs, as the paper writes them        all of AoE is here
    2. the GPT around them                             RMSNorm, rotary positions, no biases
    3. a matmul for all experts, and one for each      can be taken on trust
    4. the configuration                               defaults, refusals, other ways to choose

Shapes in the comments:
    B sequences of S positions; together T = B * S tokens. (nanoGPT calls S positions T.)
    D = n_embd (nanoGPT's C), E = n_expert, K = top_k
    d = an expert's hidden width: d_ffn, or d_wide where its gate is factorised (Eq. 5)
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """What defines a model. Raises ValueError where the numbers do not fit."""
    # model
    block_size: int = 64                 # context length, in tokens
    vocab_size: int | None = None        # None: as many as the data's tokenizer has
    n_layer: int = 4                     # number of blocks
    n_head: int = 4                      # attention heads per block
    n_embd: int = 128                    # width of the residual stream, D
    dropout: float = 0.0                 # probability of dropping an activation in training
    mlp: str = 'aoe'                     # aoe, moe or dense; train.py takes several: aoe,moe
    factorised: bool | None = None       # True: gate x Wdown Wup; False: x Wg; None: True in aoe
    n_expert: int = 8                    # experts per layer, E
    top_k: int = 2                       # experts that handle a token, K
    d_ffn: int | None = None             # hidden width of an expert; dense: K times it; None: 4 D
    d_low: int | None = None             # inner width of a factorised gate; None: about D / 3
    d_judge: int | None = None           # how many numbers score in aoe; None: d_low, or D / 6
    aux_weight: float = 0.0              # weight of L_aux, which evens out loads; paper: 0 and 0.01
    # other variants, most of the paper's Tables 2 and 3
    router: Literal['linear', 'large'] = 'linear'   # moe's; large has as many numbers as w_down
    router_std: float = 0.02             # standard deviation of a router's first weights
    select: Literal['top_k', 'top_p', 'expert_choice'] = 'top_k'   # how experts are chosen
    top_p: float = 0.6                   # the probability that top_p's experts reach together
    weigh_among: Literal['chosen', 'all'] = 'chosen'   # softmax over these; Switch Transformer: all
    conf_weight: float = 0.0             # weight of Ent_conf in the loss; paper: 1e-4 with top_p
    capacity_factor: float = 2.0         # an expert of expert_choice takes this * T/E tokens
    # memory
    recompute: bool = False              # compute blocks again in backward instead of storing them

    def __post_init__(self):
        refuse_out_of_range(self)                                  # both are in part 4
        fit_together(self)

    @property
    def d_wide(self):
        """Hidden width of an expert whose gate is factorised (Eq. 5)."""
        return width_of_equal_size(self.n_embd, self.d_ffn, self.d_low)


# -----------------------------------------------------------------------------
# Part 1: the three MLPs. Each takes T tokens x (T, D); gives h (T, D), and what its experts did.

class Routing(NamedTuple):
    """What the experts did with T tokens. The GPT stacks its layers: (L, T, E) and so on. With
    top_p and expert_choice I and w have a place for each expert: (T, E) for (T, K)."""
    scores: torch.Tensor     # (T, E)  p: the norms of aoe, or what the router of moe says
    chosen: torch.Tensor     # (T, K)  I: the experts that handle the token; -1 is nobody
    weights: torch.Tensor    # (T, K)  w: how much each counts; 0 for nobody
    aux_loss: torch.Tensor   # ()      aux_weight * L_aux + conf_weight * Ent_conf, to be added


class MLP(nn.Module):
    """The dense SwiGLU MLP, as wide as the K experts of d_ffn that moe activates."""

    def __init__(self, config):
        super().__init__()
        D, d = config.n_embd, config.top_k * config.d_ffn
        self.w_g = nn.Parameter(torch.empty(D, d))                 # GPT.init_weights draws them
        self.w_p = nn.Parameter(torch.empty(D, d))
        self.w_o = nn.Parameter(torch.empty(d, D))

    def forward(self, x):
        h = (F.silu(x @ self.w_g) * (x @ self.w_p)) @ self.w_o
        nothing = x.new_empty(0)                                   # there are no experts
        return h, Routing(nothing, nothing, nothing, nothing)


class SparseMLP(nn.Module):
    """What moe and aoe share: E experts, small SwiGLU MLPs, of which each token sees K.

    An expert is (SiLU(gate) * (x Wp_i)) Wo_i. Its gate is x Wg_i (a whole gate), or x Wdown_i Wup_i
    with only d_low numbers between the two matrices (a factorised gate). In the paper moe has whole
    gates, and aoe factorised ones.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, E = config.n_embd, config.n_expert
        d = config.d_wide if config.factorised else config.d_ffn
        self.w_p = nn.Parameter(torch.empty(E, D, d))
        self.w_o = nn.Parameter(torch.empty(E, d, D))
        if config.factorised:
            self.w_down = nn.Parameter(torch.empty(E, D, config.d_low))
            self.w_up = nn.Parameter(torch.empty(E, config.d_low, d))
        else:
            self.w_g = nn.Parameter(torch.empty(E, D, d))

    def choose(self, p):
        """I (T, K): for each token the experts with the highest scores p (T, E)."""
        if self.config.select != 'top_k':
            return choose_by_another_rule(at_least_float32(p), self.config)    # part 4
        return p.topk(self.config.top_k).indices                   # argtopK(p)

    def weigh(self, p, I):
        """w (T, K) = softmax(p[I]); 0 for nobody. A choice has no gradient: the cross-entropy
        teaches the scores through w alone."""
        p = at_least_float32(p)                                    # norm and route return no less
        nobody = I < 0
        I = I.masked_fill(nobody, 0)                               # gather needs an expert
        if self.config.weigh_among == 'all':
            return p.softmax(-1).gather(1, I).masked_fill(nobody, 0)
        # a large number and not -inf: the softmax of a token that nobody handles would be NaN
        chosen_p = p.gather(1, I).masked_fill(nobody, -1e30)
        return chosen_p.softmax(-1).masked_fill(nobody, 0)

    def experts(self, x, I, w, C=None):
        """h (T, D) = sum over i in I of w_i (SiLU(gate_i) * (x Wp_i)) Wo_i.

        The chosen pairs of a token and an expert become N rows, sorted by expert: rows.token is the
        token, rows.weight its w_i, and rows.pair the pair's place in C (T, E, d_low), the products
        x Wdown_i, where aoe has computed them. `of_each` multiplies the rows of each expert by its
        matrix (part 3)."""
        rows = sort_by_expert(I, w, self.config.n_expert)
        x_rows = x.index_select(0, rows.token)                     # (N, D)
        if self.config.factorised:
            if C is None:                                          # a router has chosen
                C_rows = of_each(self.w_down, x_rows, rows)        # x Wdown_i: (N, d_low)
            else:
                C_rows = C.flatten(0, 1).index_select(0, rows.pair)
            gate = of_each(self.w_up, C_rows, rows)                # C_i Wup_i: (N, d)
        else:
            gate = of_each(self.w_g, x_rows, rows)                 # x Wg_i: (N, d)
        u = of_each(self.w_p, x_rows, rows)                        # x Wp_i: (N, d)
        y = of_each(self.w_o, F.silu(gate) * u, rows)              # (N, D)
        y = y * rows.weight.type_as(y).unsqueeze(1)                # times w_i
        return y.new_zeros(x.shape).index_add(0, rows.token, y)    # sum a token's rows: (T, D)

    def auxiliary_loss(self, p, I):
        """aux_weight * L_aux + conf_weight * Ent_conf, from the scores p (T, E) and the chosen I.
        L_aux is lowest where all experts handle equally many tokens."""
        p, E = at_least_float32(p), self.config.n_expert
        loss = p.new_zeros(())
        if self.config.aux_weight:
            f = count(I, E).type_as(p) / len(p)                    # Eq. 6: (E,), their sum is K
            mean_p = p.softmax(-1).mean(0)                         # Eq. 6, P: (E,)
            loss = loss + self.config.aux_weight * E * (f * mean_p).sum()      # Eq. 2
        if self.config.conf_weight:
            loss = loss + self.config.conf_weight * entropy(p).mean()          # Eq. 8
        return loss


class MoE(SparseMLP):
    """Routed mixture of experts, Algorithm 1: a router R scores the experts."""

    def __init__(self, config):
        super().__init__(config)
        D, E = config.n_embd, config.n_expert
        n = D
        if config.router == 'large':
            # Table 2: D n + n E numbers, as many as the E matrices Wdown_i of aoe have
            n = round(E * config.d_low * D / (D + E))
            self.router_in = nn.Parameter(torch.empty(D, n))
        self.router = nn.Parameter(torch.empty(n, E))

    def forward(self, x):                                          # (T, D)
        p = self.route(x)                                          # R(x): (T, E)
        I = self.choose(p)                                         # argtopK(p): (T, K)
        w = self.weigh(p, I)                                       # softmax(p[I]): (T, K)
        h = self.experts(x, I, w)                                  # Eq. 1: (T, D)
        return h, Routing(p.detach(), I, w.detach(), self.auxiliary_loss(p, I))

    def route(self, x):
        """R(x) = x router; for the large one SiLU(x router_in) router."""
        if self.config.router == 'large':
            x = F.silu(x @ self.router_in)
        with torch.autocast(x.device.type, enabled=False):         # scores are float32 at least
            return at_least_float32(x) @ at_least_float32(self.router)


class AoE(SparseMLP):
    """Autonomy of experts, Algorithm 2. No router: every expert takes the first step of its gate,
    and the norm of what it finds is its score. The chosen go on from there."""

    def forward(self, x):                                          # (T, D)
        C = of_all(self.w_down, x)                                 # Eq. 3, x Wdown_i: (T, E, d_low)
        p = norm(C[:, :, :self.config.d_judge])                    # Eq. 4; paper: of all of C_i
        I = self.choose(p)                                         # argtopK(p): (T, K)
        w = self.weigh(p, I)                                       # softmax(p[I]): (T, K)
        h = self.experts(x, I, w, C)          # sum of w_i (SiLU(C_i Wup_i) * (x Wp_i)) Wo_i: (T, D)
        return h, Routing(p.detach(), I, w.detach(), self.auxiliary_loss(p, I))


class WholeAoE(SparseMLP):
    """Not in the paper: experts that score themselves, and have a whole gate. The norm of the first
    d_judge numbers of x Wg_i is the score; the chosen then compute all of x Wg_i."""

    def forward(self, x):                                          # (T, D)
        p = norm(of_all(self.w_g[:, :, :self.config.d_judge], x))  # (T, E)
        I = self.choose(p)                                         # from here as in AoE, without C
        w = self.weigh(p, I)
        h = self.experts(x, I, w)
        return h, Routing(p.detach(), I, w.detach(), self.auxiliary_loss(p, I))


def mlp_of(config):
    """The MLP that the configuration asks for."""
    if config.mlp == 'aoe':
        return AoE(config) if config.factorised else WholeAoE(config)
    return MoE(config) if config.mlp == 'moe' else MLP(config)


def norm(C):
    """||C||_2 over the last dimension, in float32 at least."""
    return torch.linalg.vector_norm(C, dim=-1, dtype=torch.promote_types(C.dtype, torch.float32))


def count(I, E):
    """How many tokens each expert handles, by I (T, K): (E,)."""
    I = I.masked_fill(I < 0, E).flatten()                          # -1, nobody, becomes E
    return I.new_zeros(E + 1).scatter_add(0, I, torch.ones_like(I))[:E]


def entropy(p):
    """The entropy of the softmax over all E scores p (T, E): (T,). Its mean is Ent_conf, Eq. 8."""
    return -(p.softmax(-1) * p.log_softmax(-1)).sum(-1)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -----------------------------------------------------------------------------
# Part 2: the GPT

EPS = torch.finfo(torch.float32).eps     # RMSNorm would take the dtype's: 0.008 in bfloat16


def rotate(x, cos, sin):
    """Rotary positions: the numbers i and i + head_dim / 2 of a head are a pair, turned by an angle
    that grows with the position. x (B, n_head, S, head_dim); cos and sin (S, head_dim / 2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).type_as(x)


def attend(q, k, v, dropout):
    """softmax(q k^T / sqrt(head_dim)) v, causal; all (B, n_head, S, head_dim)."""
    if q.device.type == 'cpu' and q.shape[2] < 256:                # here bfloat16 is slow
        with torch.autocast('cpu', enabled=False):
            q, k, v = (at_least_float32(part) for part in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and those before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin):                                # (B, S, D)
        B, S, D = x.shape
        qkv = self.qkv(x).view(B, S, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # each (B, n_head, S, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = attend(q, k, v, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, S, D).type_as(qkv))


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.n_embd, EPS)
        self.attention = CausalSelfAttention(config)
        self.norm_2 = nn.RMSNorm(config.n_embd, EPS)
        self.mlp = mlp_of(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin):                                # (B, S, D)
        x = x + self.dropout(self.attention(self.norm_1(x), cos, sin))
        tokens = as_autocast(self.norm_2(x)).flatten(0, 1)         # (T, D), cast for all matmuls
        h, routing = self.mlp(tokens)                              # (T, D)
        return x + self.dropout(h.view_as(x)), routing


class GPT(nn.Module):
    """The language model: tokens in, logits of the next token out."""

    def __init__(self, config):
        super().__init__()
        need(config, 'vocab_size', config.vocab_size, 'the number of different tokens')
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, EPS)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight                   # one matrix for both

        head_dim = config.n_embd // config.n_head
        frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(config.block_size)[:, None] * frequency   # (block_size, head_dim / 2)
        self.register_buffer('cos', angle.cos(), persistent=False)
        self.register_buffer('sin', angle.sin(), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw every matrix, also one that you add, from a normal distribution, with a standard
        deviation of

            w_g, w_p, w_down, w_up, router_in     1 / sqrt(rows): an input of variance 1 keeps it
            w_o, attention.out                    0.02 / sqrt(2 n_layer): they add to the residual
            router                                router_std
            all others                            0.02

        GPT-2 has 0.02 in the first line, too. That is 1 / sqrt(2500), and suits a D of some
        thousands: at D 96 the experts start nearly alike, and every variant ends at a higher loss.
        """
        for name, weight in self.named_parameters():
            std = 0.02
            if name.endswith(('w_g', 'w_p', 'w_down', 'w_up', 'router_in')):
                std = weight.shape[-2] ** -0.5
            elif name.endswith(('w_o', 'attention.out.weight')):
                std = 0.02 / math.sqrt(2 * self.config.n_layer)
            elif name.endswith('mlp.router'):
                std = self.config.router_std
            if weight.dim() > 1:                                   # the norms' weights stay at 1
                weight.normal_(0.0, std)

    def forward(self, idx, targets=None):
        """Predict the next token at every position of idx (B, S), S at most block_size. Returns

            logits   (B, S, vocab_size)
            loss     mean cross-entropy in nats per token, nothing added; None without targets
            routing  Routing, stacked over the layers (dense: empty); the trainer adds its aux_loss
        """
        S = idx.shape[1]
        if S > self.config.block_size:
            raise ValueError(f'expected at most {self.config.block_size} tokens, got {S}')
        x = self.dropout(self.embedding(idx))                      # (B, S, D)
        routings = []
        for block in self.blocks:
            inputs = (x, self.cos[:S], self.sin[:S])
            if self.config.recompute:
                # backward calls the block again, with its own weights: not for torch.func
                x, routing = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, routing = block(*inputs)
            routings.append(routing)
        logits = self.head(self.norm(x))                           # (B, S, vocab_size)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(at_least_float32(logits).flatten(0, 1), targets.flatten())
        fields = zip(*routings)                                    # all scores, all I, all w, ...
        return logits, loss, Routing(*map(torch.stack, fields))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, vocab_top_k=None, vocab_size=None,
                 seed=1337):
        """Continue idx (B, S) by max_new_tokens, each drawn from the prediction and fed back. Sets
        the model to eval mode. The context is the last block_size tokens. A temperature below 1
        sharpens the prediction; 0 always takes the likeliest token. Only the vocab_top_k likeliest
        are drawn, of the first vocab_size. (A tokenizer may know fewer tokens than the model, whose
        vocabulary is sometimes rounded up for speed.)"""
        if idx.shape[1] == 0:
            raise ValueError('expected a token at least to continue, got none')
        self.eval()
        generator = torch.Generator(idx.device).manual_seed(seed)
        for _ in range(max_new_tokens):
            logits, _, _ = self(idx[:, -self.config.block_size:])
            logits = at_least_float32(logits[:, -1, :vocab_size])  # (B, vocab_size)
            if vocab_top_k is not None:
                kept = logits.topk(min(vocab_top_k, logits.shape[-1])).values
                logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                p = (logits / temperature).softmax(-1)
                new = torch.multinomial(p, 1, generator=generator)
            idx = torch.cat([idx, new], dim=1)
        return idx

    def total_parameters(self):
        """How many numbers are trained. (Embedding and head share theirs.)"""
        return sum(weight.numel() for weight in self.parameters())

    def active_parameters(self):
        """How many of them one token meets: all but those of the experts that do not handle it. In
        aoe it meets what scores in these, too."""
        c, scoring = self.config, 0
        if c.mlp == 'aoe':
            scoring = c.n_layer * c.n_expert * c.n_embd * (c.d_low if c.factorised else c.d_judge)
        stacked = sum(weight.numel() for block in self.blocks for weight in block.mlp.parameters()
                      if weight.dim() == 3)                        # a matrix for each expert
        idle = 1 - experts_of_a_token(c) / c.n_expert              # the share that does not
        return round(self.total_parameters() - idle * (stacked - scoring))

    def flops_per_token(self):
        """Floating-point operations of a training step per token: 6 for each active weight of a
        matrix (a multiply and an add, once in forward, twice in backward), and 12 S D a layer for
        attention's two products, at full context without the saving of the causal mask."""
        c = self.config
        norms = sum(weight.numel() for weight in self.parameters() if weight.dim() < 2)
        weights = self.active_parameters() - norms
        if c.mlp == 'aoe' and not c.factorised:          # the chosen compute again what scored
            weights += round(c.n_layer * experts_of_a_token(c) * c.n_embd * c.d_judge)
        return 6 * weights + 12 * c.n_layer * c.block_size * c.n_embd


# -----------------------------------------------------------------------------
# Part 3: a matmul for all experts, and one for each

def as_autocast(x):
    """x in the dtype that autocast multiplies in: F.grouped_mm below does not cast by itself."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def of_all(w, x):
    """Each token of x (T, D) times the matrices of all experts, w (E, D, n): (T, E, n)."""
    return torch.einsum('td,edn->ten', x, w)


def of_each(w, x, rows):
    """Each row of x (N, m) times the matrix of its own expert, w (E, m, n): (N, n)."""
    x, w = as_autocast(x), as_autocast(w)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    if torch.compiler.is_compiling():
        dtypes = (torch.bfloat16,)                       # torch.compile knows no other
    # F.grouped_mm wants rows of whole multiples of 16 bytes
    aligned = w.shape[1] % 8 == 0 and w.shape[2] % 8 == 0
    if x.dtype in dtypes and aligned and hasattr(F, 'grouped_mm'):
        return F.grouped_mm(x, w, offs=rows.ends)        # the next two lines in one call
    parts = x.tensor_split(rows.ends[:-1].tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, w)])


class Rows(NamedTuple):
    """The chosen pairs of a token and an expert, sorted by expert, and padding: N rows."""
    token: torch.Tensor      # (N,)    the token of each row; 0 in padding
    pair: torch.Tensor       # (N,)    token * E + its expert
    weight: torch.Tensor     # (N,)    w of the pair; 0 in padding
    ends: torch.Tensor       # (E,)    int32: where each expert's rows end; the last is N


def sort_by_expert(I, w, E):
    """The Rows of I and w (T, K). With E = 2, K = 1, tokens a, b, c and I = [[1], [0], [1]]:

        row      0 1 2 ... 15   16 17 18 ... 47      N = 48, ends = [16, 48]
        expert   0 0 0     0     1  1  1      1      the last has what is left of the padding
        token    b . .     .     a  c  .      .      . is padding
    """
    expert, weight = I.flatten(), w.flatten()                      # each pair's expert, and its w
    token = torch.arange(len(expert), device=I.device) // I.shape[1]
    if I.shape[1] == E:
        # with rules other than top_k most places are nobody's: drop these, and wait for the GPU
        somebody = expert >= 0
        expert, weight, token = expert[somebody], weight[somebody], token[somebody]
    weight = weight.masked_fill(expert < 0, 0)           # nobody's rows weigh nothing,
    expert = expert.masked_fill(expert < 0, E - 1)       # so any expert may compute them
    padding = padding_of(expert, E)
    expert, order = torch.cat([expert, padding]).sort(stable=True)
    token = F.pad(token, (0, len(padding)))[order]                 # padding is of token 0
    weight = F.pad(weight, (0, len(padding)))[order]               # its weight is 0
    return Rows(token, token * E + expert, weight, count(expert, E).cumsum(0).int())


def padding_of(expert, E, multiple=16):
    """The experts of rows to be added: each gets 1 to 16, so that it has a multiple of 16, and the
    last what is left of a number that depends on no choice, so that no GPU has to be waited for.
    These rows change no result. But every expert has a row then (F.grouped_mm gives garbage as the
    gradient of one without: PyTorch issue 172439), and shapes repeat: on a CPU a bfloat16 matmul of
    a new shape takes longer to prepare than to do."""
    total = E * multiple + -len(expert) % multiple
    rows = multiple - count(expert, E) % multiple                  # how many each gets: (E,)
    rows[-1] += total - rows.sum()
    return torch.arange(E, device=expert.device).repeat_interleave(rows, output_size=total)


# -----------------------------------------------------------------------------
# Part 4: the configuration: defaults that depend on other keys, other ways to choose, refusals

def width_of_equal_size(D, d_ffn, d_low):
    """d_wide of Eq. 5, which gives an expert with a factorised gate as many numbers as one of moe:
    the multiple of 8 that solves d_low D + d_low d_wide + 2 D d_wide = 3 D d_ffn."""
    return 8 * round((3 * D * d_ffn - d_low * D) / (d_low + 2 * D) / 8)


def size_against_moe(D, d_ffn, d_low):
    """How many numbers an expert with a factorised gate has, for each of one with a whole gate."""
    d_wide = width_of_equal_size(D, d_ffn, d_low)
    return (d_low * D + d_low * d_wide + 2 * D * d_wide) / (3 * D * d_ffn)


def default_d_low(D, d_ffn):
    """The multiple of 8 that is nearest to a third of D (of d_ffn, if that is less), among those
    that give an expert the size of one of moe's to 1 %; among all, if none does."""
    third = min(D, d_ffn) / 3
    widths = range(8, max(9, int(2 * third) + 8), 8)
    fitting = [d_low for d_low in widths if abs(size_against_moe(D, d_ffn, d_low) - 1) <= 0.01]
    return min(fitting or widths, key=lambda d_low: abs(d_low - third))


def experts_of_a_token(config):
    """How many experts handle a token: for top_p at most, for expert_choice on average."""
    if config.select == 'top_p':
        return config.n_expert
    if config.select == 'expert_choice':
        return min(config.capacity_factor, config.n_expert)
    return config.top_k


@torch.no_grad()
def choose_by_another_rule(p, config):
    """I by the rules of Table 3, from the scores p (T, E). It is (T, E), a place for each expert;
    -1, nobody, where the expert does not handle the token. top_p takes the fewest experts whose
    probabilities reach top_p together. In expert_choice each expert takes its best tokens of the
    batch; later tokens decide, too, and the loss is lower than where they are not known yet."""
    T, E = p.shape
    q = p.softmax(-1)
    if config.select == 'top_p':
        q, I = q.sort(descending=True)
        before = q.cumsum(-1) - q                                  # what the likelier ones reach
        return I.masked_fill(before >= config.top_p, -1)
    capacity = min(T, max(1, round(config.capacity_factor * T / E)))
    best = q.topk(capacity, dim=0).indices                         # tokens: (capacity, E)
    taken = torch.zeros_like(q, dtype=torch.bool).scatter(0, best, True)       # (T, E)
    return torch.arange(E, device=p.device).where(taken, -1)


def need(config, key, fits, expected):
    """Raise ValueError for a key that does not fit. (model.py imports nothing of ours.)"""
    if not fits:
        raise ValueError(f'{key}: expected {expected}, got {getattr(config, key)!r}')


def refuse_out_of_range(config):
    """Raise ValueError for the first key whose value cannot be, whatever the others are."""
    c = config
    for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_expert', 'top_k',
                'd_ffn', 'd_low', 'd_judge', 'capacity_factor'):
        value = getattr(c, key)
        need(c, key, value is None or 0 < value < 2**31, 'a positive number')
    need(c, 'mlp', c.mlp in ('aoe', 'moe', 'dense'),
         'aoe, moe or dense (aoe_whole is --mlp=aoe --factorised=False)')
    for key, known in (('router', ('linear', 'large')),
                       ('select', ('top_k', 'top_p', 'expert_choice')),
                       ('weigh_among', ('chosen', 'all'))):
        need(c, key, getattr(c, key) in known, f'one of {", ".join(known)}')
    for key in ('aux_weight', 'conf_weight', 'router_std'):
        need(c, key, 0 <= getattr(c, key) < math.inf, '0 or more')
    need(c, 'top_p', 0.001 <= c.top_p <= 1, '0.001 to 1')
    need(c, 'dropout', 0 <= c.dropout < 1, 'a probability below 1')


def fit_together(config):
    """Set the keys that are None to what fits the others, and those of no use to the model to None.
    Raise ValueError for the first key that does not fit."""
    c, D = config, config.n_embd
    need(c, 'top_k', c.top_k <= c.n_expert, f'at most n_expert = {c.n_expert}')
    need(c, 'n_embd', D % (2 * c.n_head) == 0, f'a multiple of 2 * n_head = {2 * c.n_head}')
    if c.factorised is None or c.mlp == 'dense':                   # dense is never factorised
        c.factorised = c.mlp == 'aoe'
    c.d_ffn = c.d_ffn or 4 * D
    if c.factorised or (c.mlp == 'moe' and c.router == 'large'):
        c.d_low = c.d_low or default_d_low(D, c.d_ffn)
        need(c, 'd_low', c.d_low <= D, f'at most n_embd = {D}')
    else:
        c.d_low = None
    if c.factorised:
        need(c, 'd_low', c.d_wide > 0, f'less: Eq. 5 leaves no d_wide to experts of {c.d_ffn}')
    if c.mlp == 'aoe':
        most = c.d_low if c.factorised else min(D, c.d_ffn)
        c.d_judge = c.d_judge or c.d_low or min(max(8, 8 * round(D / 48)), most)
        need(c, 'd_judge', c.d_judge <= most, f'at most {most} (d_low, or n_embd and d_ffn)')
    else:
        c.d_judge = None
