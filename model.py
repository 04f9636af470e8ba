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
    d = an expert's hidden width: d_ffn, or d_wide where its gate is factorised
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """What defines a model. Raises ValueError where the numbers do not fit.

    d_judge and d_low become None where the model has no use for them: d_judge but for aoe, d_low
    without a factorised gate or the large router.
    """
    # model
    block_size: int = 64                 # context length, in tokens
    vocab_size: int | None = None        # None: as many as the data's tokenizer has
    n_layer: int = 4                     # number of blocks
    n_head: int = 4                      # attention heads per block
    n_embd: int = 128                    # width of the residual stream, D
    dropout: float = 0.0                 # probability of dropping an activation in training
    mlp: str = 'aoe'                     # aoe, moe or dense; on train.py's line also aoe,moe
    factorised: bool | None = None       # is the gate x Wdown Wup, or x Wg? None: only in aoe
    n_expert: int = 8                    # experts per layer, E
    top_k: int = 2                       # experts that handle a token, K
    d_ffn: int | None = None             # hidden width of an expert; dense: K times it; None: 4 D
    d_low: int | None = None             # inner width of a factorised gate; None: about D / 3
    d_judge: int | None = None           # aoe: numbers that score; None: d_low; unfactorised: D / 6
    aux_weight: float = 0.0              # of L_aux, which evens out the loads; paper: 0, and 0.01
    # other variants, most of the paper's Tables 2 and 3
    router: Literal['linear', 'large'] = 'linear'   # of moe; large has as many numbers as w_down
    router_std: float = 0.02             # standard deviation of a router's first weights
    select: Literal['top_k', 'top_p', 'expert_choice'] = 'top_k'   # how experts are chosen
    top_p: float = 0.6                   # for top_p: the probability that the chosen reach together
    weigh_among: Literal['chosen', 'all'] = 'chosen'   # softmax over these; Switch Transformer: all
    conf_weight: float = 0.0             # of Ent_conf in the loss; paper: 1e-4 with top_p
    capacity_factor: float = 2.0         # for expert_choice: an expert takes this * T/E tokens
    # memory
    recompute: bool = False              # compute blocks again in backward instead of storing them

    def __post_init__(self):
        refuse_out_of_range(self)                                  # these three: part 4
        fill_in(self)
        refuse_misfits(self)

    @property
    def d_wide(self):
        """Hidden width of an expert whose gate is factorised (Eq. 5)."""
        return width_of_equal_size(self.n_embd, self.d_ffn, self.d_low)


# -----------------------------------------------------------------------------
# Part 1: the three MLPs. Each takes T tokens x (T, D); gives h (T, D), and what its experts did.

class Routing(NamedTuple):
    """What the experts did with T tokens. The GPT stacks its layers: (L, T, E) and so on."""
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
        return h, Routing(*[x.new_empty(0)] * 4)                   # there are no experts


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
            return choose_by_another_rule(p, self.config)          # part 4
        return p.topk(self.config.top_k).indices                   # argtopK(p)

    def weigh(self, p, I):
        """w (T, K) = softmax(p[I]); 0 for nobody. The choice I has no gradient: through w alone the
        cross-entropy teaches the scores."""
        nobody = I < 0
        I = I.masked_fill(nobody, 0)                               # gather needs an expert
        if self.config.weigh_among == 'all':
            return p.softmax(-1).gather(1, I).masked_fill(nobody, 0)
        # a large number and not -inf: the softmax of a token that nobody handles would be NaN
        chosen_p = p.gather(1, I).masked_fill(nobody, -1e30)
        return chosen_p.softmax(-1).masked_fill(nobody, 0)

    def experts(self, x, I, w, C=None):
        """h (T, D) = sum over i in I of w_i (SiLU(gate_i) * (x Wp_i)) Wo_i.

        The chosen pairs of a token and an expert become N rows, sorted by expert; `of_each`
        multiplies each expert's rows by its matrix (part 3). rows.token says which token a row is,
        rows.pair which place of C, and rows.weight its w_i.

        C (T, E, d_low) are the products x Wdown_i, if aoe has computed them for all experts.
        """
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
        loss, E = p.new_zeros(()), self.config.n_expert
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
        """R(x): x times a matrix; for the large router SiLU(x times a first one) times it."""
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
        I = self.choose(p)                                         # as in AoE, but without C
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
    """Of the softmax over all E scores: p (T, E) -> (T,). Its mean is Ent_conf, Eq. 8."""
    return -(p.softmax(-1) * p.log_softmax(-1)).sum(-1)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -----------------------------------------------------------------------------
# Part 2: the GPT

EPS = torch.finfo(torch.float32).eps     # of the RMSNorms, whatever the dtype


def rotate(x, cos, sin):
    """Rotary positions: a head's numbers i and i + head_dim / 2 are a pair (x1, x2), which is
    turned by an angle that grows with the position.

    x (B, n_head, S, head_dim); cos, sin (S, head_dim / 2). Returns the shape and dtype of x.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).type_as(x)


def attend(q, k, v, dropout):
    """softmax(q k^T / sqrt(head_dim)) v, causal; all (B, n_head, S, head_dim). The result may be
    float32: on a CPU, attention this short is slow in bfloat16."""
    if q.device.type == 'cpu' and q.shape[2] < 256:
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
        # cast here once, for all matmuls of the MLP (part 3)
        tokens = as_autocast(self.norm_2(x)).flatten(0, 1)         # (T, D)
        h, routing = self.mlp(tokens)                              # (T, D)
        return x + self.dropout(h.view_as(x)), routing


class GPT(nn.Module):
    """The language model: tokens in, logits of the next token out."""

    def __init__(self, config):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError('vocab_size: expected the number of different tokens, got None')
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
        """Draw every matrix from a normal distribution, with a standard deviation of

            w_g, w_p, w_down, w_up, router_in     1 / sqrt(rows): an input of variance 1 keeps it
            w_o, attention.out                    0.02 / sqrt(2 n_layer): they add to the residual
            router                                router_std
            all others                            0.02

        The first line differs from GPT-2, which has 0.02 there, too. That suits a D of some
        thousands: at D 96 the experts start nearly alike, and every variant ends at a higher loss.
        """
        for name, weight in self.named_parameters():
            std = 0.02
            if name.endswith(('w_g', 'w_p', 'w_down', 'w_up', 'router_in')):
                std = weight.shape[-2] ** -0.5
            elif name.endswith('mlp.router'):
                std = self.config.router_std
            elif name.endswith(('w_o', 'attention.out.weight')):
                std = 0.02 / math.sqrt(2 * self.config.n_layer)
            if weight.dim() > 1:                                   # the norms' weights stay at 1
                weight.normal_(0.0, std)

    def forward(self, idx, targets=None):
        """Predict the next token at every position of idx (B, S), S at most block_size. Returns

            logits   (B, S, vocab_size)
            loss     mean cross-entropy in nats per token, nothing added; None without targets
            routing  Routing, stacked over the layers (dense: empty); the trainer adds its aux_loss

        Raises ValueError for a longer idx.
        """
        S = idx.shape[1]
        if S > self.config.block_size:
            raise ValueError(f'expected at most {self.config.block_size} tokens, got {S}')
        x = self.dropout(self.embedding(idx))                      # (B, S, D)
        routings = []
        for block in self.blocks:
            inputs = (x, self.cos[:S], self.sin[:S])
            if self.config.recompute:
                # backward calls the block again, and gives it the weights of now: they may be
                # somebody's replacements (torch.func)
                weights = dict(block.named_parameters(remove_duplicate=False))
                x, routing = checkpoint(functional_call, block, weights, inputs,
                                        use_reentrant=False)
            else:
                x, routing = block(*inputs)
            routings.append(routing)
        logits = self.head(self.norm(x))                           # (B, S, vocab_size)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(at_least_float32(logits).flatten(0, 1), targets.flatten())
        return logits, loss, Routing(*(torch.stack(field) for field in zip(*routings)))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, vocab_top_k=None, vocab_size=None,
                 seed=1337):
        """Continue idx (B, S) by max_new_tokens, each drawn from the prediction and fed back.

        temperature: below 1 sharpens the prediction; 0 always takes the likeliest token.
        vocab_top_k: draw from that many likeliest tokens only. (top_k is about experts.)
        vocab_size: draw from the first so many tokens only. (A tokenizer may know fewer than the
            model, whose vocabulary is sometimes rounded up for speed.)
        seed: the same seed on the same machine draws the same text.
        Sets the model to eval mode. The context is the last block_size tokens. (With
        select='expert_choice' who handles a token depends on the other tokens of idx, too.) Raises
        ValueError where there is no token to continue.
        """
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
        """How many of them one token meets: of each expert weight, which is stacked over the E
        experts, the share of those that handle a token; but of what judges in aoe, all."""
        c, active, judging = self.config, self.total_parameters(), 0
        if c.mlp == 'aoe':               # every expert takes its first look at every token
            judging = c.n_expert * c.n_embd * (c.d_low if c.factorised else c.d_judge)
        for block in self.blocks:
            stacked = sum(weight.numel() for weight in block.mlp.parameters() if weight.dim() == 3)
            active -= (1 - experts_of_a_token(c) / c.n_expert) * (stacked - judging)
        return round(active)

    def flops_per_token(self):
        """Floating-point operations of a training step per token: 6 for each active weight of a
        matrix (a multiply and an add, once in forward, twice in backward), and 12 S D a layer for
        attention's two products, at full context without the saving of the causal mask."""
        c = self.config
        norms = sum(weight.numel() for weight in self.parameters() if weight.dim() < 2)
        weights = self.active_parameters() - norms
        if c.mlp == 'aoe' and not c.factorised:          # the chosen compute what judged once more
            weights += round(c.n_layer * experts_of_a_token(c) * c.n_embd * c.d_judge)
        return 6 * weights + 12 * c.n_layer * c.block_size * c.n_embd


# -----------------------------------------------------------------------------
# Part 3: a matmul for all experts, and one for each

def as_autocast(x):
    """x in the dtype that autocast multiplies in. F.grouped_mm below does not cast by itself, and
    where one x meets several matrices it is cast once."""
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

        row      0 1 2 ... 15   16 17 18 ... 31
        expert   0 0 0     0     1  1  1      1
        token    b . .     .     a  c  .      .      . is padding
    """
    expert, weight = I.flatten(), w.flatten()                      # of each pair
    token = torch.arange(len(expert), device=I.device) // I.shape[1]
    if I.shape[1] == E:
        # a place for each expert, as rules other than top_k have, and most are nobody's: drop these
        # (and wait for the GPU, to know how many are left)
        somebody = expert >= 0
        expert, weight, token = expert[somebody], weight[somebody], token[somebody]
    # a `choose` of your own may leave -1 in I: such a row is the last expert's, and weighs nothing
    weight = weight.masked_fill(expert < 0, 0)
    expert = expert.masked_fill(expert < 0, E - 1)
    padding = padding_of(expert, E)
    expert, order = torch.cat([expert, padding]).sort(stable=True)
    token = F.pad(token, (0, len(padding)))[order]                 # padding is of token 0
    weight = F.pad(weight, (0, len(padding)))[order]               # and has weight 0
    return Rows(token, token * E + expert, weight, count(expert, E).cumsum(0).int())


PAD = 16


def padding_of(expert, E):
    """The experts of rows to be added, so that each expert has a multiple of PAD rows. They change
    no result. But each expert has a row then (where it has none, F.grouped_mm returns garbage as
    its gradient: PyTorch issue 172439), and shapes repeat: on a CPU a bfloat16 matmul of a new
    shape takes longer to prepare than to do.

    Each expert gets 1 to PAD more rows, to the next multiple of PAD; the last gets what is left of
    E * PAD rows, so that N depends on no choice and no GPU has to be waited for.
    """
    places = torch.arange(PAD, device=expert.device)               # in an expert's last PAD rows
    lacks = places >= (count(expert, E) % PAD).unsqueeze(1)        # those that are empty: (E, PAD)
    padding = torch.arange(E, device=expert.device).unsqueeze(1).where(lacks, E - 1).flatten()
    return F.pad(padding, (0, -len(expert) % PAD), value=E - 1)


# -----------------------------------------------------------------------------
# Part 4: the configuration: defaults that depend on other keys, other ways to choose, refusals

def fill_in(config):
    """Set the keys that are None to what fits the others; those of no use to the model to None."""
    c = config
    if c.factorised is None or c.mlp == 'dense':
        c.factorised = c.mlp == 'aoe'
    if c.d_ffn is None:
        c.d_ffn = 4 * c.n_embd
    if not (c.factorised or (c.mlp == 'moe' and c.router == 'large')):
        c.d_low = None
    elif c.d_low is None:
        c.d_low = default_d_low(c.n_embd, c.d_ffn)
    if c.mlp != 'aoe':
        c.d_judge = None
    elif c.d_judge is None and c.factorised:
        c.d_judge = c.d_low                                        # the paper's
    elif c.d_judge is None:                                        # about D / 6
        c.d_judge = min(max(8, 8 * round(c.n_embd / 48)), c.n_embd, c.d_ffn)


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
    return min(range(8, max(9, int(2 * third) + 8), 8), key=lambda d_low: (
        abs(size_against_moe(D, d_ffn, d_low) - 1) > 0.01, abs(d_low - third)))


def experts_of_a_token(config):
    """How many experts handle a token: for top_p at most, for expert_choice on average."""
    if config.select == 'top_p':
        return config.n_expert
    if config.select == 'expert_choice':
        return min(config.capacity_factor, config.n_expert)
    return config.top_k


@torch.no_grad()
def choose_by_another_rule(p, config):
    """I by the rules of Table 3, from the scores p (T, E). It is (T, E), a place for each expert
    that might handle the token; -1, nobody, where it does not.

    top_p: the fewest experts whose probabilities reach top_p together. expert_choice: each expert
    takes its best tokens of the batch, wherever they stand in it; so later tokens decide, too, and
    the loss is lower than it could be in use.
    """
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
    """configurator.expect, almost; but model.py imports nothing of ours."""
    if not fits:
        raise ValueError(f'{key}: expected {expected}, got {getattr(config, key)!r}')


def refuse_out_of_range(config):
    """Raise ValueError for the first key whose value cannot be, whatever the others are."""
    c = config
    for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_expert', 'top_k',
                'd_ffn', 'd_low', 'd_judge', 'capacity_factor'):
        value = getattr(c, key)
        need(c, key, value is None or 0 < value < 2**31, 'a positive number')
    for key, known in (('mlp', ('aoe', 'moe', 'dense')), ('router', ('linear', 'large')),
                       ('select', ('top_k', 'top_p', 'expert_choice')),
                       ('weigh_among', ('chosen', 'all'))):
        need(c, key, getattr(c, key) in known, f'one of {", ".join(known)}')
    for key in ('aux_weight', 'conf_weight', 'router_std'):
        need(c, key, 0 <= getattr(c, key) < math.inf, '0 or more')
    need(c, 'top_p', 0.001 <= c.top_p <= 1, '0.001 to 1')
    need(c, 'dropout', 0 <= c.dropout < 1, 'a probability below 1')


def refuse_misfits(config):
    """Raise ValueError for the first key that does not fit the others."""
    c, D = config, config.n_embd
    need(c, 'top_k', c.top_k <= c.n_expert, f'at most n_expert = {c.n_expert}')
    need(c, 'n_embd', D % (2 * c.n_head) == 0, f'a multiple of 2 * n_head = {2 * c.n_head} (rotary '
         'positions turn pairs of numbers within a head)')
    if c.d_low is not None:
        need(c, 'd_low', c.d_low <= D, f'at most n_embd = {D}')
    if c.factorised:
        need(c, 'd_low', c.d_wide > 0, f'less: Eq. 5 leaves no d_wide to experts of {c.d_ffn}')
    if c.mlp == 'aoe' and c.factorised:
        need(c, 'd_judge', c.d_judge <= c.d_low, f'at most d_low = {c.d_low}')
    elif c.mlp == 'aoe':
        most = min(D, c.d_ffn)
        need(c, 'd_judge', c.d_judge <= most, f'at most {most}, the least of n_embd and d_ffn')
