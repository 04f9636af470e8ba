"""
A small GPT whose MLP is one of three, and nothing else changes:

    dense   one SwiGLU MLP
    moe     E experts; a router decides which K of them see a token               (Algorithm 1)
    aoe     E experts, no router; every expert looks at the token, and the K that respond
            most strongly go on: Autonomy-of-Experts, arXiv 2501.13074            (Algorithm 2)

Four parts, to be read in this order:

    1. the three MLPs, as the paper writes them        all of AoE is here
    2. the GPT around them                             RMSNorm, rotary positions, no biases
    3. a matmul for each expert                        sorting tokens by expert; later
    4. the configuration's defaults and refusals

Shapes in the comments:
    B sequences of S positions (nanoGPT's T), together T = B*S tokens
    D = n_embd (nanoGPT's C), E = n_expert, K = top_k
    d = an expert's hidden width: d_ffn, or d_wide where its gate is factorised
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
    """What defines a model. Raises ValueError, in one line, where the numbers do not fit."""
    # model
    block_size: int = 64                 # context length, in tokens
    vocab_size: int | None = None        # None: as many as the data's tokenizer has
    n_layer: int = 4                     # number of blocks
    n_head: int = 4                      # attention heads per block
    n_embd: int = 128                    # width of the residual stream, D
    dropout: float = 0.0                 # probability of dropping an activation in training
    mlp: str = 'aoe'                     # aoe, moe or dense; train.py splits a list with commas
    factorised: bool | None = None       # the gate is Wdown Wup, not Wg; None: True for aoe alone
    n_expert: int = 8                    # experts per layer, E
    top_k: int = 2                       # experts that handle a token, K
    d_ffn: int | None = None             # hidden width of an expert; dense: K times it; None: 4 D
    d_low: int | None = None             # inner width of a factorised gate; None: about D / 3
    d_judge: int | None = None           # aoe, whole gate: neurons that score; None: about D / 6
    aux_weight: float = 0.0              # of L_aux, which makes loads even; paper: 0 and 0.01
    # other variants, of the paper's Tables 2 and 3
    router: Literal['linear', 'large'] = 'linear'   # how a router of moe scores
    select: Literal['top_k', 'top_p', 'expert_choice'] = 'top_k'   # how experts are chosen
    top_p: float = 0.6                   # for top_p: the probability that the chosen reach together
    weigh_among: Literal['chosen', 'all'] = 'chosen'   # softmax over these; Switch Transformer: all
    conf_weight: float = 0.0             # of a penalty on unsure choices; paper: 1e-4 with top_p
    capacity_factor: float = 2.0         # for expert_choice: an expert takes this * T/E tokens
    # memory
    recompute: bool | None = None        # compute again in backward; None: train.py, on a GPU

    def __post_init__(self):
        fill_in(self)                                              # part 4
        refuse_misfits(self)

    @property
    def d_wide(self):
        """Hidden width of an expert with a factorised gate, which gives it the size of moe's."""
        return equation_5(self.n_embd, self.d_ffn, self.d_low)


def equation_5(D, d_ffn, d_low):
    """d_wide, as a multiple of 8: it solves d_low D + d_low d_wide + 2 D d_wide = 3 D d_ffn."""
    return 8 * round((3 * D * d_ffn - d_low * D) / (d_low + 2 * D) / 8)


# -----------------------------------------------------------------------------
# Part 1: the three MLPs. Each takes T tokens x (T, D); gives h (T, D), and what its experts did.

class Routing(NamedTuple):
    """What the experts did with T tokens; for top_p and expert_choice K is E. The GPT stacks its
    layers: (L, T, E) and so on."""
    scores: torch.Tensor     # (T, E)  p: activation norms for aoe, the router's scores for moe
    chosen: torch.Tensor     # (T, K)  I: the experts that handled the token; -1 for nobody
    weights: torch.Tensor    # (T, K)  w: 0 for nobody
    aux_loss: torch.Tensor   # ()      for the trainer to add to the loss


class MLP(nn.Module):
    """The dense SwiGLU MLP, as wide as the K experts of d_ffn that moe activates."""

    def __init__(self, config):
        super().__init__()
        D, d = config.n_embd, config.top_k * config.d_ffn
        self.w_g = nn.Parameter(torch.empty(D, d))                 # GPT.init_weights fills them
        self.w_p = nn.Parameter(torch.empty(D, d))
        self.w_o = nn.Parameter(torch.empty(d, D))

    def forward(self, x):
        return (F.silu(x @ self.w_g) * (x @ self.w_p)) @ self.w_o, None

    def active_parameters(self):
        return parameters_of(self)


class SparseMLP(nn.Module):
    """What moe and aoe share: E small SwiGLU MLPs, of which each token sees K.

    An expert's gate is made in one of two ways, whoever scores: x Wg_i, whole; or x Wdown_i Wup_i,
    factorised, through the d_low numbers C_i = x Wdown_i.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, E = config.n_embd, config.n_expert
        d = config.d_wide if config.factorised else config.d_ffn
        self.w_p = nn.Parameter(torch.empty(E, D, d))
        self.w_o = nn.Parameter(torch.empty(E, d, D))
        if config.factorised:
            # all Wdown_i side by side: one matmul finds what every expert sees in a token
            self.w_down = nn.Parameter(torch.empty(D, E * config.d_low))
            self.w_up = nn.Parameter(torch.empty(E, config.d_low, d))
        else:
            self.w_g = nn.Parameter(torch.empty(E, D, d))

    @torch.no_grad()                                               # indices have no gradient
    def choose(self, p):
        """I (T, K), by the scores p (T, E). For top_p and expert_choice, where tokens have more or
        fewer experts, K is E, and the rest is -1, nobody."""
        T, E = p.shape
        if self.config.select == 'top_k':
            return p.topk(self.config.top_k).indices               # I = argtopK(p)
        q = p.softmax(-1)
        if self.config.select == 'top_p':                          # the fewest that reach top_p
            q, I = q.sort(descending=True)
            before = q.cumsum(-1) - q                              # what the likelier ones reach
            return I.masked_fill(before >= self.config.top_p, -1)
        # expert_choice: each expert takes its best tokens of the batch, wherever they stand in it
        capacity = min(T, max(1, round(self.config.capacity_factor * T / E)))
        taken = torch.zeros_like(q).scatter(0, q.topk(capacity, dim=0).indices, 1.0)
        everyone = torch.arange(E, device=p.device).expand(T, E)
        return everyone.masked_fill(taken == 0, -1)                # e if expert e took t, else -1

    def weigh(self, p, I):
        """w (T, K): softmax(p[I]); 0 for nobody (-1). The cross-entropy reaches the scores by w
        alone."""
        nobody, I = I < 0, I.clamp(min=0)
        if self.config.weigh_among == 'all':
            w = p.softmax(-1).gather(1, I)
        else:                                                      # -inf: NaN for a row of -1
            w = p.gather(1, I).masked_fill(nobody, -1e30).softmax(-1)
        return w.masked_fill(nobody, 0)

    def experts(self, x, I, w, C=None):
        """h = sum over i in I of (SiLU(gate_i) * (w_i x Wp_i)) Wo_i. Returns h (T, D).

        The chosen pairs of a token and an expert are sorted by expert into P rows, and part 3
        multiplies each expert's rows by its matrix. w_i multiplies x and not the result: h is the
        same, since all but the gate is linear; were it on the results, they would have to be kept.

        C (T, E, d_low): all x Wdown_i, if aoe has them already. A whole gate ignores it.
        """
        mostly_nobody = self.config.select != 'top_k'              # of I, most is -1
        # of each row: token, pair = token * E + expert, weight
        rows = sort_by_expert(I, w, self.config.n_expert, leave_out=mostly_nobody)
        u = self.recomputed(self.up, x, rows)                      # w_i x Wp_i: (P, d)
        if self.config.factorised:
            if C is None:                # a router chose: look now, for all E, which is one matmul
                C = self.look_through(self.w_down, x)
            g = C.flatten(0, 1).index_select(0, rows.pair)         # C_i: (P, d_low)
        else:
            g = self.recomputed(self.gate, x, rows)                # x Wg_i: (P, d)
        y = self.recomputed(self.out, g, u, rows)                  # (P, D)
        token = rows.token.unsqueeze(1).expand_as(y)               # (index_add would keep y)
        return y.new_zeros(x.shape).scatter_add(0, token, y)       # each token's rows: (T, D)

    def up(self, x, rows):
        weighted = x.index_select(0, rows.token) * rows.weight.type_as(x).unsqueeze(1)
        return of_each(self.w_p, weighted, rows)

    def gate(self, x, rows):
        return of_each(self.w_g, x.index_select(0, rows.token), rows)

    def out(self, g, u, rows):
        if self.config.factorised:
            g = of_each(self.w_up, g, rows)                        # C_i Wup_i: (P, d)
        return of_each(self.w_o, F.silu(g) * u, rows)

    def look_through(self, w_down, x):
        """x w_down (D, E n) as C (T, E, n): the n numbers that each expert finds in x."""
        return (x @ w_down).unflatten(1, (self.config.n_expert, -1))

    def recomputed(self, f, *inputs):
        """f(*inputs). With config.recompute autograd stores nothing that f computes on the way:
        backward calls f again, and stops when it has all it needs, mostly before f's last matmul.
        (So a counter in f would count twice.)"""
        if self.config.recompute:
            return checkpoint(f, *inputs, use_reentrant=False)
        return f(*inputs)

    def auxiliary_loss(self, p, I):
        """L_aux, which makes loads even (Eq. 2), and the penalty on Ent_conf, with their weights.
        From the scores p (T, E) and the chosen I (T, K)."""
        loss, E = p.new_zeros(()), self.config.n_expert
        if self.config.aux_weight:
            f = count(I, E).type_as(p) / len(p)                    # Eq. 6: (E,), their sum is K
            P = p.softmax(-1).mean(0)                              # Eq. 6: (E,)
            loss = loss + self.config.aux_weight * E * (f * P).sum()           # Eq. 2
        if self.config.conf_weight:
            loss = loss + self.config.conf_weight * entropy(p).mean()          # Eq. 8
        return loss

    def experts_of_a_token(self):
        """How many handle it: for expert_choice on average, for top_p at most."""
        return {'top_k': self.config.top_k, 'top_p': self.config.n_expert, 'expert_choice': min(
            self.config.capacity_factor, self.config.n_expert)}[self.config.select]

    def active_parameters(self):
        """Those that one token meets: what all tokens share, and the used share of the rest."""
        share, shared = self.experts_of_a_token() / self.config.n_expert, self.shared_parameters()
        return round(shared + share * (parameters_of(self) - shared))


class MoE(SparseMLP):
    """Routed mixture of experts, Algorithm 1: a router R(x) scores the experts. R(x) is x router,
    or, for the large router of Table 2, SiLU(x router_in) router."""

    def __init__(self, config):
        super().__init__(config)
        D, E, inner = config.n_embd, config.n_expert, config.n_embd
        if config.router == 'large':                               # as many numbers as w_down has:
            inner = round(E * config.d_low * D / (D + E))          # inner (D + E) = E d_low D
            self.router_in = nn.Parameter(torch.empty(D, inner))
        self.router = nn.Parameter(torch.empty(inner, E))

    def forward(self, x):                                          # (T, D)
        p = self.recomputed(self.route, x)                         # R(x): (T, E)
        I = self.choose(p)                                         # argtopK(p): (T, K)
        w = self.weigh(p, I)                                       # softmax(p[I]): (T, K)
        h = self.experts(x, I, w)                                  # Eq. 1: (T, D)
        return h, Routing(p.detach(), I, w.detach(), self.auxiliary_loss(p, I))

    def route(self, x):
        if self.config.router == 'large':
            x = F.silu(x @ self.router_in)
        with torch.autocast(x.device.type, enabled=False):         # scores are float32 at least
            return at_least_float32(x) @ at_least_float32(self.router)

    def shared_parameters(self):
        mine = ('router', 'router_in', 'w_down')       # factorised: C_i of all E are found, too
        return sum(p.numel() for name, p in self.named_parameters() if name in mine)


class AoE(SparseMLP):
    """Autonomy of experts, Algorithm 2. No router: every expert takes the first step of its gate,
    and the norm of what it finds is its score. The chosen go on from there (with a whole gate they
    begin again)."""

    def forward(self, x):                                          # (T, D)
        C, p = self.recomputed(self.look, x)                       # (T, E, d_low), (T, E)
        I = self.choose(p)                                         # argtopK(p): (T, K)
        w = self.weigh(p, I)                                       # softmax(p[I]): (T, K)
        h = self.experts(x, I, w, C)                               # Algorithm 2, last line: (T, D)
        return h, Routing(p.detach(), I, w.detach(), self.auxiliary_loss(p, I))

    def look(self, x):
        """What every expert finds in x, and how much it is."""
        C = self.look_through(self.first_step(), x)                # Eq. 3
        return C, norm(C)                                          # Eq. 4

    def first_step(self):
        """All Wdown_i side by side, (D, E d_low). A whole gate has none: there the first d_judge
        columns of Wg_i score, and the chosen compute x Wg_i in full."""
        if self.config.factorised:
            return self.w_down
        return self.w_g[:, :, :self.config.d_judge].transpose(0, 1).flatten(1)

    def shared_parameters(self):
        return self.first_step().numel()                           # all experts look at every token


def norm(C):
    """||C||, the L2 norm over the last dimension."""
    return torch.linalg.vector_norm(C, dim=-1, dtype=torch.promote_types(C.dtype, torch.float32))


def count(I, E):
    """How many tokens each expert handles, by I (T, K): (E,)."""
    I = I.masked_fill(I < 0, E).flatten()                          # -1 counts as expert E ...
    return I.new_zeros(E + 1).scatter_add(0, I, torch.ones_like(I))[:E]        # ... and is dropped


def entropy(p):
    """Of the softmax over all E scores: p (T, E) -> (T,). Its mean is Ent_conf, Eq. 8."""
    return -(p.softmax(-1) * p.log_softmax(-1)).sum(-1)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_autocast(x):
    """x in the dtype that autocast multiplies in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def parameters_of(module):
    """How many numbers are trained in it; a matrix that two of its parts share counts once."""
    return sum(p.numel() for p in module.parameters())


MLPS = {'dense': MLP, 'moe': MoE, 'aoe': AoE}


# -----------------------------------------------------------------------------
# Part 2: the GPT

EPS = torch.finfo(torch.float32).eps     # PyTorch 2.6 takes the dtype's: 0.008 for bfloat16


def rotate(x, cos, sin):
    """Rotary positions: turn each pair (x1, x2) by an angle that grows with the position.

    x (B, n_head, S, head_dim); cos, sin (S, head_dim / 2). Returns the shape and dtype of x.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).type_as(x)


def attend(q, k, v, dropout):
    """softmax(q k^T / sqrt(head_dim)) v, causal; all (B, n_head, S, head_dim). On a CPU in float32
    if S < 256: there bfloat16 takes three times as long (torch 2.13 on a Zen 4)."""
    if q.device.type != 'cpu' or q.shape[2] >= 256:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    with torch.autocast('cpu', enabled=False):
        y = F.scaled_dot_product_attention(*map(at_least_float32, (q, k, v)), is_causal=True,
                                           dropout_p=dropout)
    return y.type_as(q)


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
        return self.out(y.transpose(1, 2).reshape(B, S, D))


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.n_embd, EPS)
        self.attention = CausalSelfAttention(config)
        self.norm_2 = nn.RMSNorm(config.n_embd, EPS)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin):                                # (B, S, D)
        x = x + self.dropout(self.attention(self.norm_1(x), cos, sin))
        # cast here once, or every matmul of the MLP would cast and keep a copy of its own
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

            w_g, w_p, w_down, w_up, router_in         1 / sqrt(rows): what has variance 1 keeps it
            w_o, out, which add to the residual       0.02 / sqrt(2 n_layer)
            all others                                0.02

        0.02 for the first line, as in GPT-2, suits a D of some thousands: at D 96 the experts start
        nearly alike, and every variant ends at a higher loss.
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue                                           # the norms' weights stay at 1
            std = 0.02
            if name.endswith(('w_g', 'w_p', 'w_down', 'w_up', 'router_in')):
                std = p.shape[-2] ** -0.5
            elif name.endswith(('w_o', 'attention.out.weight')):
                std = 0.02 / math.sqrt(2 * self.config.n_layer)
            p.normal_(0.0, std)

    def forward(self, idx, targets=None):
        """Predict the next token at every position of idx (B, S), S at most block_size. Returns

            logits   (B, S, vocab_size)
            loss     mean cross-entropy in nats per token, nothing added; None without targets
            routing  Routing, stacked over the layers; its aux_loss is for the trainer to add

        Targets of -100 do not count.
        """
        S = idx.shape[1]
        if S > self.config.block_size:
            raise ValueError(f'expected at most {self.config.block_size} tokens, got {S}')
        x = self.dropout(self.embedding(idx))                      # (B, S, D)
        routings = []
        for block in self.blocks:
            x, routing = block(x, self.cos[:S], self.sin[:S])
            routings.append(routing)
        logits = self.head(self.norm(x))                           # (B, S, vocab_size)
        loss = None if targets is None else cross_entropy(logits, targets)
        if self.config.mlp == 'dense':                             # empty: its sum is 0
            return logits, loss, Routing(*(x.new_empty(0) for _ in Routing._fields))
        fields = zip(*routings)                                    # all scores, all chosen, ...
        return logits, loss, Routing(*(torch.stack(field) for field in fields))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, vocab_top_k=None, vocab_size=None,
                 seed=None):
        """Continue idx (B, S) by max_new_tokens, each drawn from the prediction and fed back.

        temperature: below 1 sharpens the prediction; 0 always takes the likeliest token.
        vocab_top_k: draw from that many likeliest tokens only. (top_k is about experts.)
        vocab_size: draw from the first so many tokens only, those that the tokenizer knows.
        seed: the same seed on the same machine draws the same text. Sets the model to eval mode.
        The context is the last block_size tokens.
        """
        if self.config.select == 'expert_choice':
            raise ValueError('select: expected top_k or top_p, got expert_choice, which needs the '
                             'tokens to come')
        if idx.shape[1] == 0:
            raise ValueError('expected a token at least to continue, got none')
        self.eval()
        generator = torch.Generator(idx.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[0][:, -1, :vocab_size]
            logits = at_least_float32(logits)                      # (B, vocab_size)
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
        return parameters_of(self)

    def active_parameters(self):
        """Parameters that the computation of one token touches; each layer counts its own."""
        layers = [block.mlp for block in self.blocks]
        return parameters_of(self) + sum(
            layer.active_parameters() - parameters_of(layer) for layer in layers)

    def flops_per_token(self):
        """Floating-point operations of a training step per token: 6 for each active weight of a
        matrix (a multiply and an add, once in forward, twice in backward), and 12 S D a layer for
        attention's two products, at full context without the saving of the causal mask."""
        c = self.config
        weights = self.active_parameters() - sum(p.numel() for p in self.parameters()
                                                 if p.dim() == 1)  # the norms'
        if c.mlp == 'aoe' and not c.factorised:          # counted once, computed twice
            layers = [block.mlp.experts_of_a_token() for block in self.blocks]
            weights += round(sum(layers) * c.n_embd * c.d_judge)
        return 6 * weights + 12 * c.n_layer * c.block_size * c.n_embd


def cross_entropy(logits, targets):
    """F.cross_entropy(logits, targets), in less memory: the float32 copy of a batch's logits would
    be the largest tensor of a step. So 2,048 tokens at a time, and backward does each piece again.
    """
    def summed(logits, targets):
        return F.cross_entropy(at_least_float32(logits), targets, reduction='sum')
    pieces = zip(logits.flatten(0, 1).split(2048), targets.flatten().split(2048), strict=True)
    loss = sum(checkpoint(summed, *piece, use_reentrant=False) for piece in pieces)
    return loss / (targets != -100).sum()


# -----------------------------------------------------------------------------
# Part 3: a matmul for each expert

class Rows(NamedTuple):
    """The chosen pairs of a token and an expert, sorted by expert, with padding: P rows."""
    token: torch.Tensor      # (P,)    the token of each row; 0 in padding
    pair: torch.Tensor       # (P,)    token * E + its expert
    weight: torch.Tensor     # (P,)    w of the pair; 0 in padding
    ends: torch.Tensor       # (E,)    int32: where each expert's rows end; the last is P


PAD = 16


def sort_by_expert(I, w, E, leave_out):
    """The Rows of I and w (T, K). With E = 2, K = 1, tokens a, b, c and I = [[1], [0], [1]]:

        row      0 1 2 ... 15   16 17 18 ...
        token    b . .     .     a  c  .         . is padding
        expert   0 0 0     0     1  1  1

    Each expert has a multiple of PAD rows: on a CPU a bfloat16 matmul of a new shape takes longer
    to prepare than to do. And at least PAD: PyTorch (issue 172439) gives garbage as the gradient of
    an expert without rows.

    P does not depend on who was chosen, so no GPU has to be waited for: there is room for any
    choice, and the last expert takes what is left. leave_out: most of I is -1, nobody, and gets no
    row; then the number of rows has to be read from the GPU.
    """
    T, K = I.shape
    load = count(I, E)                                             # (E,)
    pairs = int(load.sum()) if leave_out else T * K
    size = PAD * ((load.clamp(min=1) + PAD - 1) // PAD)            # rows of each expert: (E,)
    P = PAD * (math.ceil(pairs / PAD) + E) if T else 0             # never below size.sum()
    ends = size.cumsum(0).clamp(max=P)

    # sorting gives the places in I (t * K + k) of expert 0, then of 1, ...; nobody's come last
    expert, place = I.masked_fill(I < 0, E).flatten().sort(stable=True)
    expert, place = expert[:pairs], place[:pairs]
    padding_before = F.pad((size - load).cumsum(0), (1, 0))        # above expert 0, 1, ... (and E)
    row_of_place = torch.arange(pairs, device=I.device) + padding_before[expert]
    ends[-1] = P
    token = place.new_zeros(P).scatter(0, row_of_place, place // K)
    expert_of_row = (torch.arange(P, device=I.device).unsqueeze(1) >= ends).sum(1)
    return Rows(token=token, pair=token * E + expert_of_row,
                weight=w.new_zeros(P).scatter(0, row_of_place, w.flatten()[place]),
                ends=ends.int())


def of_each(w, x, rows):
    """Each row of x (P, m) times the matrix of its expert, w (E, m, n): (P, n)."""
    x, w = as_autocast(x), as_autocast(w)                          # which F.grouped_mm lacks
    if has_grouped_mm(x, w):
        return F.grouped_mm(x, w, offs=rows.ends)                  # the loop below, in one call
    ends = rows.ends.tolist()
    return torch.cat([x[start:end] @ w[i] for i, (start, end) in enumerate(zip([0, *ends], ends))])


def has_grouped_mm(x, w):
    """Whether PyTorch has F.grouped_mm for these: for three dtypes, in torch.compile for one, and
    where the rows of a matrix are whole multiples of 16 bytes."""
    known = (torch.bfloat16,)
    if not torch.compiler.is_compiling():
        known = (torch.bfloat16, torch.float16, torch.float32)
    # of the last two strides one is 1, the other the length of a row (transposed: a column)
    whole = all(max(t.stride()[-2:]) * t.element_size() % 16 == 0 for t in (x, w))
    return hasattr(F, 'grouped_mm') and x.dtype in known and whole


# -----------------------------------------------------------------------------
# Part 4: the configuration's defaults that depend on others, and what cannot be

def fill_in(config):
    """Give the keys that are None what fits the others, as far as the model needs them."""
    c, D = config, config.n_embd
    if c.factorised is None:
        c.factorised = c.mlp == 'aoe'
    if c.d_ffn is None:
        c.d_ffn = 4 * D
    if c.d_low is None and (c.factorised or c.mlp == 'moe' and c.router != 'linear'):
        c.d_low = default_d_low(c)
    if c.d_judge is None and c.mlp == 'aoe' and not c.factorised:
        c.d_judge = min(max(8, 8 * round(D / 48)), D, c.d_ffn)


def default_d_low(config):
    """The multiple of 8 that is nearest to a third of D (of d_ffn, if that is less) and gives a
    layer the size of moe's to 1 %; where none does, the one that comes nearest to that size."""
    D, d_ffn = config.n_embd, config.d_ffn
    narrower = min(D, d_ffn)

    def misfit(d_low):
        d_wide = equation_5(D, d_ffn, d_low)
        size, moe = D * d_low + d_low * d_wide + 2 * D * d_wide, 3 * D * d_ffn + D
        return max(0.01, abs(size / moe - 1)), abs(d_low - narrower / 3)   # within 1 % all tie
    return min(range(8, max(8, narrower // 2) + 1, 8), key=misfit)


def refuse(config, key, expected):
    raise ValueError(f'{key}: expected {expected}, got {getattr(config, key)!r}')


def refuse_misfits(config):
    """Raise ValueError for the first key whose value cannot be."""
    c, D = config, config.n_embd
    for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_expert', 'top_k',
                'd_ffn', 'd_low', 'd_judge'):
        value = getattr(c, key)
        if value is not None and not 0 < value < 2**31:
            refuse(c, key, 'a positive number')
    for key, known in (('mlp', ('aoe', 'moe', 'dense')), ('router', ('linear', 'large')),
                       ('select', ('top_k', 'top_p', 'expert_choice')),
                       ('weigh_among', ('chosen', 'all'))):
        if getattr(c, key) not in known:
            refuse(c, key, f'one of {", ".join(known)}')
    if not 0 < c.top_p <= 1:
        refuse(c, 'top_p', 'more than 0 and at most 1')
    if not 0 < c.capacity_factor < 2**31:
        refuse(c, 'capacity_factor', 'a positive number')
    for key in ('aux_weight', 'conf_weight'):
        if not 0 <= getattr(c, key) < math.inf:
            refuse(c, key, '0 or more')
    if not 0 <= c.dropout < 1:
        refuse(c, 'dropout', 'a probability below 1')
    if c.top_k > c.n_expert:
        refuse(c, 'top_k', f'at most n_expert = {c.n_expert}')
    if D % (2 * c.n_head):
        refuse(c, 'n_embd', f'a multiple of 2 * n_head = {2 * c.n_head} (rotary positions turn '
               'pairs of numbers within a head)')
    if c.d_low is not None and c.d_low > D:
        refuse(c, 'd_low', f'at most n_embd = {D}')
    if c.mlp == 'aoe' and not c.factorised:
        if c.d_low is not None:
            refuse(c, 'd_low', 'None: a whole gate has no inner width, but --d_judge')
        if c.d_judge > min(D, c.d_ffn):
            refuse(c, 'd_judge', f'at most n_embd = {D} and d_ffn = {c.d_ffn}')
    if c.mlp != 'dense' and c.factorised and equation_5(D, c.d_ffn, c.d_low) <= 0:
        refuse(c, 'd_low', f'less, since Eq. 5 leaves no d_wide to experts of d_ffn = {c.d_ffn}')
