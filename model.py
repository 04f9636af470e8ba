"""
A small GPT whose MLP is one of three. Nothing else in the model changes.

    dense   one SwiGLU MLP
    moe     E experts; a router decides which K of them handle a token            (Algorithm 1)
    aoe     E experts and no router: every expert looks at the token, and the K that respond
            most strongly handle it. Autonomy-of-Experts, arXiv 2501.13074        (Algorithm 2)

The file has four parts, to be read in this order:
    1. the three MLPs, as the paper writes them        all of AoE is here
    2. the GPT around them                             RMSNorm, rotary positions, no biases
    3. how tokens are multiplied by experts' matrices  can be taken on trust
    4. the configuration                               defaults, other ways to choose, errors

The comments give shapes in these letters:
    B sequences of S positions make T = B * S tokens (nanoGPT calls the S positions T)
    D = n_embd (nanoGPT's C), E = n_expert, K = top_k
    d = the hidden width of an expert: d_ffn, or d_wide (Eq. 5)
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
    """All that defines a model. Raises ValueError if the values do not fit together."""
    # model
    block_size: int = 64                 # context length, in tokens
    vocab_size: int | None = None        # None: that of the data's tokenizer
    n_layer: int = 4                     # number of blocks
    n_head: int = 4                      # attention heads per block
    n_embd: int = 128                    # width of the residual stream, D
    dropout: float = 0.0                 # probability of dropping an activation in training
    mlp: str = 'aoe'                     # aoe, moe or dense; train.py takes several: aoe,moe
    factorised: bool | None = None       # gate x Wdown Wup, not x Wg; None: True in aoe alone
    n_expert: int = 8                    # experts per layer, E
    top_k: int = 2                       # experts that handle a token, K
    d_ffn: int | None = None             # hidden width of an expert; dense: K times it; None: 4 D
    d_low: int | None = None             # inner width of a factorised gate; None: about D / 3
    d_judge: int | None = None           # how many numbers score in aoe; None: d_low, or D / 6
    tied: bool = True                    # aoe scores with a part of its gate; False: with w_judge
    aux_weight: float = 0.0              # weight of L_aux, which evens out loads; paper: 0 and 0.01
    # further variants, most of them in the paper's Tables 2 and 3
    router: Literal['linear', 'large'] = 'linear'   # of moe; large has the size of aoe's w_down
    router_std: float = 0.02             # standard deviation of a router's first weights
    select: Literal['top_k', 'top_p', 'expert_choice'] = 'top_k'   # how experts are chosen
    top_p: float = 0.6                   # top_p: the probability that the chosen reach together
    weigh_among: Literal['chosen', 'all'] = 'chosen'   # softmax over these; Switch Transformer: all
    conf_weight: float = 0.0             # weight of Ent_conf, the scores' entropy; paper: 1e-4
    capacity_factor: float = 2.0         # expert_choice: an expert takes this times T / E tokens
    # memory
    recompute: bool = False              # compute each block again in backward: slower, smaller

    def __post_init__(self):
        refuse_out_of_range(self)                                  # both are in part 4
        fit_together(self)

    @property
    def d_wide(self):
        """The hidden width that gives an expert as many numbers as one of moe (Eq. 5)."""
        d_low = self.d_low if self.factorised else None
        own_judge = 0 if self.tied else self.d_judge
        return width_of_equal_size(self.n_embd, self.d_ffn, d_low, own_judge)


# -----------------------------------------------------------------------------
# Part 1: the three MLPs. Each takes T tokens x (T, D) and returns h (T, D) and a Routing.

class Routing(NamedTuple):
    """What the experts did with T tokens. The GPT stacks those of its layers: (L, T, E) and so on.
    With top_p and expert_choice, chosen and weights are (T, E)."""
    scores: torch.Tensor     # (T, E)  p: the norms of aoe, or the logits of moe's router
    chosen: torch.Tensor     # (T, K)  I: the experts that handle the token; -1 means nobody
    weights: torch.Tensor    # (T, K)  w: how much each of them counts; 0 for nobody
    aux_loss: torch.Tensor   # ()      aux_weight * L_aux + conf_weight * Ent_conf


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
    """What moe and aoe share: E small SwiGLU MLPs, the experts, of which K handle each token.

    Expert i computes (SiLU(gate) * (x Wp_i)) Wo_i. Its gate is either whole, x Wg_i, or factorised,
    x Wdown_i Wup_i, with only d_low numbers between the two matrices. In the paper moe has whole
    gates and aoe has factorised ones.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, E = config.n_embd, config.n_expert
        d = config.d_wide
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
        """w (T, K) = softmax(p[I]), and 0 for nobody. Choosing has no gradient, so the
        cross-entropy trains the scores through w."""
        p = at_least_float32(p)                                    # if a score of your own isn't
        nobody = I < 0
        I = I.masked_fill(nobody, 0)                               # gather can't take -1
        if self.config.weigh_among == 'all':
            return p.softmax(-1).gather(1, I).masked_fill(nobody, 0)
        # not -inf, or the softmax of a token that nobody handles would be NaN
        chosen_p = p.gather(1, I).masked_fill(nobody, -1e30)
        return chosen_p.softmax(-1).masked_fill(nobody, 0)

    def experts(self, x, I, w, C=None):
        """h (T, D) = sum over i in I of w_i (SiLU(gate_i) * (x Wp_i)) Wo_i.

        Each chosen pair of a token and an expert becomes a row. The N rows are sorted by expert, so
        that `of_each` can multiply the rows of each expert by its matrix (part 3). C (T, E, d_low)
        holds the products x Wdown_i where aoe has computed them; rows.pair says where in it."""
        rows = sort_by_expert(I, w, self.config.n_expert)
        x_rows = x.index_select(0, rows.token)                     # (N, D)
        if self.config.factorised:
            if C is None:
                C_rows = of_each(self.w_down, x_rows, rows)        # x Wdown_i: (N, d_low)
            else:
                C_rows = C.flatten(0, 1).index_select(0, rows.pair)
            gate = of_each(self.w_up, C_rows, rows)                # C_i Wup_i: (N, d)
        else:
            gate = of_each(self.w_g, x_rows, rows)                 # x Wg_i: (N, d)
        u = of_each(self.w_p, x_rows, rows)                        # x Wp_i: (N, d)
        y = of_each(self.w_o, F.silu(gate) * u, rows)              # (N, D)
        y = y * rows.weight.type_as(y).unsqueeze(1)                # times w_i
        return y.new_zeros(x.shape).index_add(0, rows.token, y)    # the sum for each token: (T, D)

    def auxiliary_loss(self, p, I):
        """aux_weight * L_aux + conf_weight * Ent_conf, from the scores p (T, E) and the chosen I.
        L_aux, the load-balancing loss, is lowest where all experts handle equally many tokens."""
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
            # its D n + n E numbers are as many as in the E matrices Wdown_i of aoe (Table 2)
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
        """R(x) = x router, or SiLU(x router_in) router for the large one."""
        if self.config.router == 'large':
            x = F.silu(x @ self.router_in)
        with torch.autocast(x.device.type, enabled=False):         # scores are float32 at least
            return at_least_float32(x) @ at_least_float32(self.router)


class AoE(SparseMLP):
    """Autonomy of experts, Algorithm 2. There is no router: every expert takes the first step of
    its gate, and the norm of the result is its score. The chosen experts continue from there."""

    def forward(self, x):                                          # (T, D)
        C = of_all(self.w_down, x)                                 # Eq. 3, x Wdown_i: (T, E, d_low)
        p = norm(C[:, :, :self.config.d_judge])                    # Eq. 4; paper: of all of C_i
        I = self.choose(p)                                         # argtopK(p): (T, K)
        w = self.weigh(p, I)                                       # softmax(p[I]): (T, K)
        h = self.experts(x, I, w, C)          # sum of w_i (SiLU(C_i Wup_i) * (x Wp_i)) Wo_i: (T, D)
        return h, Routing(p.detach(), I, w.detach(), self.auxiliary_loss(p, I))


class JudgedAoE(SparseMLP):
    """Not in the paper: experts score themselves by a judge, and what it computes is used only for
    the score. The judge is the first d_judge columns of a whole gate or, with tied=False, a matrix
    of its own."""

    def __init__(self, config):
        super().__init__(config)
        if not config.tied:
            D, E = config.n_embd, config.n_expert
            self.w_judge = nn.Parameter(torch.empty(E, D, config.d_judge))

    def forward(self, x):                                          # (T, D)
        judge = self.w_g[:, :, :self.config.d_judge] if self.config.tied else self.w_judge
        p = norm(of_all(judge, x))                                 # (T, E)
        I = self.choose(p)                                         # from here as in AoE, without C
        w = self.weigh(p, I)
        h = self.experts(x, I, w)
        return h, Routing(p.detach(), I, w.detach(), self.auxiliary_loss(p, I))


def mlp_of(config):
    """The MLP that the configuration asks for."""
    if config.mlp == 'dense':
        return MLP(config)
    if config.mlp == 'moe':
        return MoE(config)
    return AoE(config) if config.factorised and config.tied else JudgedAoE(config)


def norm(C):
    """||C||_2 over the last dimension, in float32 at least."""
    return torch.linalg.vector_norm(C, dim=-1, dtype=torch.promote_types(C.dtype, torch.float32))


def count(I, E):
    """How many tokens each expert handles, by I (T, K): (E,)."""
    I = I.masked_fill(I < 0, E).flatten()                          # count nobody in a last place,
    return I.new_zeros(E + 1).scatter_add(0, I, torch.ones_like(I))[:E]        # then cut that off


def entropy(p):
    """The entropy of the softmax over all E scores p (T, E): (T,). Its mean is Ent_conf, Eq. 8."""
    return -(p.softmax(-1) * p.log_softmax(-1)).sum(-1)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -----------------------------------------------------------------------------
# Part 2: the GPT

EPS = torch.finfo(torch.float32).eps     # by default RMSNorm takes its input's: 0.008 in bfloat16


def rotate(x, cos, sin):
    """Rotary positions: the numbers i and i + head_dim / 2 of a head form a pair, which is rotated
    by an angle that grows with the position. x is (B, n_head, S, head_dim), cos and sin are
    (S, head_dim / 2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).type_as(x)


def attend(q, k, v, dropout):
    """Causal softmax(q k^T / sqrt(head_dim)) v. All are (B, n_head, S, head_dim)."""
    if q.device.type == 'cpu' and q.shape[2] < 256:                # float32 is faster here
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
        tokens = as_autocast(self.norm_2(x)).flatten(0, 1)         # (T, D), cast once for part 3
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
        """Draw every matrix, one that you add included, from a normal distribution with this
        standard deviation:

            w_g, w_p, w_down, w_up, w_judge, router_in   1 / sqrt(rows), which keeps a variance of 1
            w_o, attention.out                           0.02 / sqrt(2 n_layer): they add up
            router                                       router_std
            all others                                   0.02

        GPT-2 has 0.02 in the first line, too. That is 1 / sqrt(2500) and suits a D of some
        thousands. At D 96 experts would start nearly alike, and every variant would end worse.
        """
        for name, weight in self.named_parameters():
            std = 0.02
            if name.endswith(('w_g', 'w_p', 'w_down', 'w_up', 'w_judge', 'router_in')):
                std = weight.shape[-2] ** -0.5
            elif name.endswith(('w_o', 'attention.out.weight')):
                std = 0.02 / math.sqrt(2 * self.config.n_layer)
            elif name.endswith('mlp.router'):
                std = self.config.router_std
            if weight.dim() > 1:                                   # the norms' weights remain 1
                weight.normal_(0.0, std)

    def forward(self, idx, targets=None):
        """Predict the next token at every position of idx (B, S), S at most block_size. Returns

            logits   (B, S, vocab_size)
            loss     the mean cross-entropy in nats per token; None without targets
            routing  a Routing, stacked over the layers and empty for dense; loss doesn't include
                     its aux_loss, which train.py adds
        """
        S = idx.shape[1]
        if S > self.config.block_size:
            raise ValueError(f'expected at most {self.config.block_size} tokens, got {S}')
        x = self.dropout(self.embedding(idx))                      # (B, S, D)
        routings = []
        for block in self.blocks:
            inputs = (x, self.cos[:S], self.sin[:S])
            if self.config.recompute:
                # (gradients would be wrong if this were called through torch.func)
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
        """Continue idx (B, S) by max_new_tokens, each drawn from the prediction and fed back. The
        context is the last block_size tokens. A temperature below 1 sharpens the prediction, and 0
        always takes the likeliest token. With vocab_top_k only that many of the likeliest are
        drawn, and with vocab_size only the first so many: a model's vocabulary is sometimes
        rounded up for speed, beyond what its tokenizer knows. Sets the model to eval mode."""
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
        """How many numbers are trained. Embedding and head share theirs."""
        return sum(weight.numel() for weight in self.parameters())

    def active_parameters(self):
        """How many of them a token meets: all but those of its idle experts. What scores in aoe
        meets every token, so it counts in full."""
        c, scoring = self.config, 0
        if c.mlp == 'aoe':
            width = c.d_low if c.factorised and c.tied else c.d_judge
            scoring = c.n_layer * c.n_expert * c.n_embd * width
        stacked = sum(weight.numel() for block in self.blocks for weight in block.mlp.parameters()
                      if weight.dim() == 3)                        # a matrix for each expert
        idle = 1 - experts_of_a_token(c) / c.n_expert              # the share of idle experts
        return round(self.total_parameters() - idle * (stacked - scoring))

    def flops_per_token(self):
        """Floating-point operations of a training step, forward and backward, per token: 6 for each
        active weight of a matrix (a multiply and an add, once in forward and twice in backward),
        and 12 S D in each layer for the two products of attention, at full context and without
        what a causal mask saves."""
        c = self.config
        norms = sum(weight.numel() for weight in self.parameters() if weight.dim() < 2)
        weights = self.active_parameters() - norms
        if c.mlp == 'aoe' and c.tied and not c.factorised:     # the chosen compute it once more
            weights += round(c.n_layer * experts_of_a_token(c) * c.n_embd * c.d_judge)
        return 6 * weights + 12 * c.n_layer * c.block_size * c.n_embd


# -----------------------------------------------------------------------------
# Part 3: tokens times the matrices of all experts, or each row times that of its own expert

def as_autocast(x):
    """x in the dtype in which autocast multiplies: F.grouped_mm doesn't cast by itself."""
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
        dtypes = (torch.bfloat16,)                       # the only one that torch.compile can do
    # F.grouped_mm needs rows whose bytes are a multiple of 16
    aligned = w.shape[1] % 8 == 0 and w.shape[2] % 8 == 0
    if x.dtype in dtypes and aligned and hasattr(F, 'grouped_mm'):
        return F.grouped_mm(x, w, offs=rows.ends)        # the next two lines, in one call
    parts = x.tensor_split(rows.ends[:-1].tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, w)])


class Rows(NamedTuple):
    """The chosen pairs of a token and an expert, sorted by expert, with padding: N rows."""
    token: torch.Tensor      # (N,)    the token of each row; 0 in padding
    pair: torch.Tensor       # (N,)    token * E + its expert
    weight: torch.Tensor     # (N,)    w of the pair; 0 in padding
    ends: torch.Tensor       # (E,)    int32: where each expert's rows end; the last is N


def sort_by_expert(I, w, E):
    """The Rows of I and w (T, K). With E = 2, K = 1, tokens a, b, c and I = [[1], [0], [1]]:

        row      0 1 2 ... 15   16 17 18 ... 47      N = 48, ends = [16, 48]
        expert   0 0 0     0     1  1  1      1      the last expert gets the rest of the padding
        token    b . .     .     a  c  .      .      a dot is padding
    """
    expert, weight = I.flatten(), w.flatten()                      # of each pair
    token = torch.arange(len(expert), device=I.device) // I.shape[1]
    if I.shape[1] == E:
        # top_p and expert_choice: drop the places of nobody; counting the rest waits for the GPU
        somebody = expert >= 0
        expert, weight, token = expert[somebody], weight[somebody], token[somebody]
    # a rule of your own may leave -1: the last expert computes such a row, with a weight of 0
    weight = weight.masked_fill(expert < 0, 0)
    expert = expert.masked_fill(expert < 0, E - 1)
    padding = padding_of(expert, E)
    expert, order = torch.cat([expert, padding]).sort(stable=True)
    token = F.pad(token, (0, len(padding)))[order]                 # padding has token 0
    weight = F.pad(weight, (0, len(padding)))[order]               # and weight 0
    return Rows(token, token * E + expert, weight, count(expert, E).cumsum(0).int())


def padding_of(expert, E, multiple=16):
    """The expert of each row of padding, which changes no result. Every expert gets 1 to 16 rows,
    up to a multiple of 16, and the last expert gets more, so that N depends only on the number of
    pairs and no GPU has to be waited for. Padding has two reasons: F.grouped_mm returns garbage as
    the gradient of an expert without rows (PyTorch issue 172439), and on a CPU a bfloat16 matmul
    of a new shape takes longer to prepare than to compute, so shapes should repeat."""
    total = E * multiple + -len(expert) % multiple
    rows = multiple - count(expert, E) % multiple                  # how many each gets: (E,)
    rows[-1] += total - rows.sum()
    return torch.arange(E, device=expert.device).repeat_interleave(rows, output_size=total)


# -----------------------------------------------------------------------------
# Part 4: the configuration: defaults that depend on other keys, other ways to choose, errors

def width_of_equal_size(D, d_ffn, d_low=None, own_judge=0):
    """The multiple of 8 that gives an expert as nearly as possible the 3 D d_ffn numbers of one of
    moe: d_wide of Eq. 5. With a whole gate d_low is None. own_judge is the width of w_judge."""
    if d_low is None and not own_judge:
        return d_ffn
    per_column = (D if d_low is None else d_low) + 2 * D           # of the gate, w_p and w_o
    others = ((d_low or 0) + own_judge) * D                        # w_down and w_judge
    return 8 * round((3 * D * d_ffn - others) / per_column / 8)


def default_d_low(D, d_ffn):
    """The multiple of 8 nearest to a third of D (of d_ffn, if that is less) that gives an expert
    the size of one of moe to 1 %, or just the nearest if none does. With d_ffn = 4 D, a D of 64
    gives 24, 96 gives 32, 128 gives 40, and 256 gives 88."""
    def error(d_low):
        d_wide = width_of_equal_size(D, d_ffn, d_low)
        return abs((d_low * D + d_low * d_wide + 2 * D * d_wide) / (3 * D * d_ffn) - 1)
    third = min(D, d_ffn) / 3
    widths = range(8, max(9, int(2 * third) + 8), 8)
    fitting = [d_low for d_low in widths if error(d_low) <= 0.01]
    return min(fitting or widths, key=lambda d_low: abs(d_low - third))


def experts_of_a_token(config):
    """How many experts handle a token: with top_p at most, with expert_choice on average."""
    if config.select == 'top_p':
        return config.n_expert
    if config.select == 'expert_choice':
        return min(config.capacity_factor, config.n_expert)
    return config.top_k


@torch.no_grad()
def choose_by_another_rule(p, config):
    """I (T, E), filled up with -1, by the rules of Table 3, from the scores p (T, E). top_p takes
    the fewest experts whose probabilities add up to top_p, and lists them, likeliest first. With
    expert_choice each expert takes its best tokens of the batch; expert i has place i. It looks at
    later tokens, so its loss is too good: a model that writes text can't."""
    T, E = p.shape
    q = p.softmax(-1)
    if config.select == 'top_p':
        q, I = q.sort(descending=True)
        before = q.cumsum(-1) - q                                  # the sum of the likelier ones
        return I.masked_fill(before >= config.top_p, -1)
    capacity = min(T, max(1, round(config.capacity_factor * T / E)))
    best = q.topk(capacity, dim=0).indices                         # tokens: (capacity, E)
    taken = torch.zeros_like(q, dtype=torch.bool).scatter(0, best, True)       # (T, E)
    return torch.arange(E, device=p.device).where(taken, -1)


def need(config, key, fits, expected):
    """Raise ValueError for a key whose value does not fit. (This file imports none of ours.)"""
    if not fits:
        raise ValueError(f'{key}: expected {expected}, got {getattr(config, key)!r}')


def refuse_out_of_range(config):
    """Raise ValueError for the first key whose value is impossible, whatever the others are."""
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
    """Set each key that is None to a value that fits the others, and each that the model doesn't
    use to None. Raise ValueError for the first key that does not fit."""
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
    c.tied = c.tied or c.mlp != 'aoe'
    if c.mlp == 'aoe':
        c.d_judge = c.d_judge or c.d_low or min(max(8, 8 * round(D / 48)), D, c.d_ffn)
        most = c.d_low if c.tied and c.factorised else min(D, c.d_ffn)
        need(c, 'd_judge', c.d_judge <= most, f'at most {most} (d_low, or n_embd and d_ffn)')
    else:
        c.d_judge = None
    need(c, 'd_low', c.d_wide > 0, f'less: Eq. 5 leaves no width to experts of {c.d_ffn}')
