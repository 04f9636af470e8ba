"""
A small GPT whose MLP is one of three, and nothing else changes:

    dense   one SwiGLU MLP
    moe     E experts; a router decides which K of them see a token               (Algorithm 1)
    aoe     E experts, no router; every expert looks at the token, and the K that respond
            most strongly go on: Autonomy-of-Experts, arXiv 2501.13074            (Algorithm 2)

Three parts, to be read in this order:

    1. the three MLPs, as the paper writes them        all of AoE is here
    2. the GPT around them                             RMSNorm, rotary positions, no biases
    3. moe and aoe once more, faster and leaner        the same numbers; skip it at first

Shapes in the comments:
    B sequences, S positions, T = B*S tokens, D = n_embd, E = n_expert, K = top_k
    d = an expert's hidden width: d_ffn, or d_wide where its gate is factorised
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from configurator import expect


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
    mlp: str = 'aoe'                     # aoe, moe or dense; several, with commas: trained in turn
    factorised: bool | None = None       # the gate is Wdown Wup, not Wg; None: the paper's, of aoe
    n_expert: int = 8                    # experts per layer, E
    top_k: int = 2                       # experts that handle a token, K
    d_ffn: int | None = None             # hidden width of a moe expert; None: 4 n_embd
    d_low: int | None = None             # numbers by which aoe judges; None: n_embd / 3, or / 6
    aux_weight: float = 0.0              # weight of the balancing loss, a of Eq. 2; paper: 0.01
    plain: bool = False                  # run part 1 of model.py, not part 3: slow and simple
    # the paper's other variants (Tables 2 and 3)
    router: str = 'linear'               # of moe: linear; large: two layers, as big as aoe's w_down
    select: str = 'top_k'                # how experts are chosen: top_k, top_p or expert_choice
    top_p: float = 0.6                   # for top_p: the probability that the chosen reach together
    weigh_among: str = 'chosen'          # weights: softmax over the chosen, or over all (Switch)
    conf_weight: float = 0.0             # weight of the penalty on Ent_conf; paper: 1e-4 with top_p
    capacity_factor: float = 2.0         # for expert_choice: an expert takes this * T/E tokens

    def __post_init__(self):
        D = self.n_embd
        if self.factorised is None:
            self.factorised = self.mlp == 'aoe'
        if self.d_ffn is None:
            self.d_ffn = 4 * D
        expect(self, 'block_size vocab_size n_layer n_head n_embd n_expert top_k d_ffn d_low',
               'a positive number', lambda n: n > 0)
        expect(self, 'mlp', 'one of aoe, moe, dense', lambda mlp: mlp in ('aoe', 'moe', 'dense'))
        expect(self, 'router', 'linear or large', lambda router: router in ('linear', 'large'))
        expect(self, 'weigh_among', 'chosen or all', lambda among: among in ('chosen', 'all'))
        expect(self, 'select', 'top_k, top_p or expert_choice',
               lambda select: select in ('top_k', 'top_p', 'expert_choice'))
        expect(self, 'top_p', 'more than 0 and at most 1', lambda p: 0 < p <= 1)
        expect(self, 'capacity_factor', 'more than 0', lambda c: c > 0)
        expect(self, 'aux_weight conf_weight', '0 or more', lambda weight: weight >= 0)
        expect(self, 'dropout', 'a probability below 1', lambda p: 0 <= p < 1)
        expect(self, 'top_k', f'at most n_expert = {self.n_expert}', lambda k: k <= self.n_expert)
        expect(self, 'n_embd', f'a multiple of 2 * n_head = {2 * self.n_head} (rotary positions '
               'turn pairs of numbers within a head)', lambda n: n % (2 * self.n_head) == 0)
        if self.d_low is None and self.mlp == 'aoe' and not self.factorised:
            self.d_low = min(max(8, 8 * round(D / 48)), D, self.d_ffn)         # about D/6
        if self.d_low is None:               # the multiple of 8 near D/3 that d_wide can follow
            self.d_low = min(range(8, max(8, D // 2) + 1, 8), key=lambda d_low: (
                abs(self.equation_5(d_low)[1]) > 0.008, abs(d_low - D / 3)))
        expect(self, 'd_low', f'at most n_embd = {D}', lambda d_low: d_low <= D)
        if self.mlp == 'aoe' and not self.factorised:
            expect(self, 'd_low', f'at most d_ffn = {self.d_ffn}', lambda n: n <= self.d_ffn)
        if self.mlp != 'dense' and self.factorised:
            expect(self, 'd_low', f'less, since Eq. 5 leaves no d_wide to experts of d_ffn = '
                   f'{self.d_ffn}', lambda d_low: self.equation_5(d_low)[0] > 0)

    def equation_5(self, d_low):
        """The d_wide that gives aoe the size of moe, as a multiple of 8; how much larger aoe is."""
        D = self.n_embd
        d_wide = 8 * round((3 * D * self.d_ffn - d_low * D) / (d_low + 2 * D) / 8)           # Eq. 5
        aoe, moe = D * d_low + d_low * d_wide + 2 * D * d_wide, 3 * D * self.d_ffn + D
        return d_wide, aoe / moe - 1

    @property
    def d_wide(self):
        """Hidden width of an expert whose gate is factorised."""
        return self.equation_5(self.d_low)[0]

    @property
    def active_experts(self):
        """Experts of a token: on average with expert_choice, at most with top_p."""
        by_rule = {'top_k': self.top_k, 'top_p': self.n_expert,
                   'expert_choice': min(self.capacity_factor, self.n_expert)}
        return by_rule[self.select]


# -----------------------------------------------------------------------------
# Part 1: the three MLPs. Each takes T tokens x (T, D); gives h (T, D), and what its experts did.

class Routing(NamedTuple):
    """What the experts did with T tokens. The GPT stacks its layers: (L, T, E) and so on."""
    scores: torch.Tensor     # (T, E)  p: activation norms for aoe, the router's logits for moe
    experts: torch.Tensor    # (T, K)  I: who handled the token; -1 for nobody
    weights: torch.Tensor    # (T, K)  w: 0 for nobody
    aux_loss: torch.Tensor   # ()      for the trainer to add to the loss


class MLP(nn.Module):
    """The dense SwiGLU MLP, as wide as the K experts of d_ffn that moe activates."""

    def __init__(self, config):
        super().__init__()
        D, d = config.n_embd, config.top_k * config.d_ffn
        self.w_g = nn.Parameter(torch.empty(D, d))
        self.w_p = nn.Parameter(torch.empty(D, d))
        self.w_o = nn.Parameter(torch.empty(d, D))

    def forward(self, x):
        return (F.silu(x @ self.w_g) * (x @ self.w_p)) @ self.w_o, None


class SparseMLP(nn.Module):
    """What moe and aoe share: E small SwiGLU MLPs, of which each token sees K.

    An expert's gate is made in one of two ways, whoever chooses: x Wg_i, or factorised,
    x Wdown_i Wup_i, through d_low numbers.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, E = config.n_embd, config.n_expert
        d = config.d_wide if config.factorised else config.d_ffn
        self.w_p = nn.Parameter(torch.empty(E, D, d))
        self.w_o = nn.Parameter(torch.empty(E, d, D))
        if config.factorised:
            self.w_down = nn.Parameter(torch.empty(D, E * config.d_low))       # side by side
            self.w_up = nn.Parameter(torch.empty(E, config.d_low, d))
        else:
            self.w_g = nn.Parameter(torch.empty(E, D, d))

    def choose(self, p):
        """I (T, K), by the scores p (T, E). For top_p and expert_choice K is E; -1 is nobody."""
        T, E = p.shape
        if self.config.select == 'top_k':
            return p.topk(self.config.top_k).indices               # I = argtopK(p)
        q = p.softmax(-1)
        if self.config.select == 'top_p':                          # the fewest that reach top_p
            q, I = q.sort(descending=True)
            return I.masked_fill(q.cumsum(-1) - q >= self.config.top_p, -1)
        # expert_choice: each expert takes its best tokens of the batch, later ones among them
        capacity = min(T, max(1, round(self.config.capacity_factor * T / E)))
        taken = torch.zeros_like(q).scatter(0, q.topk(capacity, dim=0).indices, 1.0)
        return torch.arange(E, device=p.device).expand(T, E).masked_fill(taken == 0, -1)

    def weigh(self, p, I):
        """w (T, K), by the scores p (T, E); 0 for nobody."""
        if self.config.weigh_among == 'all':
            return p.softmax(-1).gather(1, I.clamp(min=0)).masked_fill(I < 0, 0)
        return softmax_over(p.gather(1, I.clamp(min=0)), I)

    def experts(self, x, I, w, C=None):
        """h = sum over i in I of w_i (SiLU(gate_i) * (x Wp_i)) Wo_i, one expert after the other.

        C (T, E, d_low): every x Wdown_i, where that is known.
        """
        h = torch.zeros_like(x)
        for i in range(self.config.n_expert):
            t, k = (I == i).nonzero(as_tuple=True)                 # the tokens that chose expert i
            if not self.config.factorised:
                gate = x[t] @ self.w_g[i]
            elif C is None:
                gate = x[t] @ self.w_down.chunk(self.config.n_expert, dim=1)[i] @ self.w_up[i]
            else:
                gate = C[t, i] @ self.w_up[i]                      # C_i comes from the cache
            y = (F.silu(gate) * (x[t] @ self.w_p[i])) @ self.w_o[i]            # (tokens, D)
            h = h.index_add(0, t, (w[t, k, None] * y).type_as(h))
        return h                                                   # (T, D)

    def routing(self, p, I, w):
        """The Routing, and in it L_aux (Eq. 2) and the penalty on Ent_conf, which need all of p."""
        loss, E = p.new_zeros(()), self.config.n_expert
        if self.config.aux_weight:
            f, P = count(I, E).type_as(p) / len(p), p.softmax(-1).mean(0)      # Eq. 6
            loss = loss + self.config.aux_weight * E * (f * P).sum()           # Eq. 2
        if self.config.conf_weight:
            loss = loss + self.config.conf_weight * entropy(p).mean()          # Eq. 8
        return Routing(p.detach(), I, w.detach(), loss)


class MoE(SparseMLP):
    """Routed mixture of experts, Algorithm 1: a linear router R(x) scores the experts.

    router='large' is a baseline of Table 2: R(x) = SiLU(x router_in) router.
    """

    def __init__(self, config):
        super().__init__(config)
        D, E, rows = config.n_embd, config.n_expert, config.n_embd
        if config.router == 'large':
            rows = round(E * config.d_low * D / (D + E))           # as many parameters as w_down
            self.router_in = nn.Parameter(torch.empty(D, rows))
        self.router = nn.Parameter(torch.empty(rows, E))

    def forward(self, x):                                          # (T, D)
        p = self.route(x)                                          # R(x): (T, E)
        I = self.choose(p)                                         # argtopK(p): (T, K)
        w = self.weigh(p, I)                                       # softmax(p[I]): (T, K)
        h = self.experts(x, I, w)                                  # Eq. 1: (T, D)
        return h, self.routing(p, I, w)

    def route(self, x):
        if self.config.router == 'large':
            x = F.silu(x @ self.router_in)
        with torch.autocast(x.device.type, enabled=False):         # scores are float32 at least
            return at_least_float32(x) @ at_least_float32(self.router)


class AoE(SparseMLP):
    """Autonomy of experts, Algorithm 2. No router: every expert takes the first step of its gate,
    and the norm of what it finds is its score. The chosen go on from what they found."""

    def forward(self, x):                                          # (T, D)
        C = (x @ self.down()).view(len(x), self.config.n_expert, -1)   # Eq. 3: (T, E, d_low)
        p = norm(C)                                                # Eq. 4: (T, E)
        I = self.choose(p)                                         # argtopK(p): (T, K)
        w = self.weigh(p, I)                                       # softmax(p[I]): (T, K)
        h = self.experts(x, I, w, C)                               # Algorithm 2, last line: (T, D)
        return h, self.routing(p, I, w)

    def down(self):
        """Wdown_i of all experts side by side, (D, E d_low). Where the gate is not factorised, an
        expert judges by the first d_low neurons of it: the first columns of Wg_i."""
        if self.config.factorised:
            return self.w_down
        return self.w_g[:, :, :self.config.d_low].transpose(0, 1).flatten(1)


def norm(C):
    """||C||, the L2 norm over the last dimension."""
    return torch.linalg.vector_norm(C, dim=-1, dtype=torch.promote_types(C.dtype, torch.float32))


def softmax_over(p_I, I):
    """softmax of p[I] (T, K), with 0 for nobody (-1)."""
    return p_I.masked_fill(I < 0, -1e30).softmax(-1).masked_fill(I < 0, 0)


def count(I, E):
    """How many tokens each expert handles: (E,)."""
    counts = I.new_zeros(E + 1).scatter_add(0, I.flatten() + 1, torch.ones_like(I).flatten())
    return counts[1:]                                              # without nobody


def entropy(p):
    """Of the softmax over all E scores: p (T, E) -> (T,). Its mean is Ent_conf, Eq. 8."""
    return -(p.softmax(-1) * p.log_softmax(-1)).sum(-1)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


PLAIN = {'dense': MLP, 'moe': MoE, 'aoe': AoE}
MLPS = dict(PLAIN)                       # what a Block takes; part 3 puts its own in their place


# -----------------------------------------------------------------------------
# Part 2: the GPT

def rotate(x, cos, sin):
    """Rotary positions: turn each pair (x1, x2) by an angle that grows with the position.

    x (B, n_head, S, head_dim); cos, sin (S, head_dim / 2). Returns the shape and dtype of x.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and those before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, past=None):                     # (B, S, D)
        B, S, D = x.shape
        qkv = self.qkv(x).view(B, S, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # each (B, n_head, S, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past:                                                   # of the positions before
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        if past is not None:
            past[:] = k, v
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.device.type == 'cpu' and S < 256:                     # a CPU is 3 times as fast so
            q, k, v, autocast = at_least_float32(q), at_least_float32(k), at_least_float32(v), False
        with torch.autocast(x.device.type, enabled=autocast):
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=S > 1)
        return self.out(y.transpose(1, 2).reshape(B, S, D))


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.n_embd)
        self.attention = CausalSelfAttention(config)
        self.norm_2 = nn.RMSNorm(config.n_embd)
        self.mlp = (PLAIN if config.plain else MLPS)[config.mlp](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, past=None):                     # (B, S, D)
        x = x + self.dropout(self.attention(self.norm_1(x), cos, sin, past))
        h, routing = self.mlp(self.norm_2(x).flatten(0, 1))        # (T, D)
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
        self.norm = nn.RMSNorm(config.n_embd)
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
        nearly alike, and every variant ends higher.
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

    def forward(self, idx, targets=None, past=None):
        """Predict the next token at every position of idx (B, S), S at most block_size. Returns

            logits   (B, S, vocab_size)
            loss     mean cross-entropy in nats per token, nothing added; None without targets
            routing  Routing, stacked over the layers; its aux_loss is for the trainer to add

        past: a list for each block, of keys and values of the positions before idx; grows by idx.
        """
        start = past[0][0].shape[2] if past and past[0] else 0
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f'expected at most {self.config.block_size} tokens, got {end}')
        x = self.dropout(self.embedding(idx))                      # (B, S, D)
        routings = []
        for block, before in zip(self.blocks, past or [None] * len(self.blocks)):
            x, routing = block(x, self.cos[start:end], self.sin[start:end], before)
            routings.append(routing)
        logits = self.head(self.norm(x))                           # (B, S, vocab_size)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(at_least_float32(logits).flatten(0, 1), targets.flatten())
        if self.config.mlp == 'dense':
            return logits, loss, Routing(*(x.new_empty(0) for _ in Routing._fields))
        return logits, loss, Routing(*map(torch.stack, zip(*routings)))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, vocab_top_k=None, vocab_size=None,
                 seed=None):
        """Continue idx (B, S) by max_new_tokens, each drawn from the prediction and fed back.

        temperature: below 1 sharpens the prediction; 0 always takes the likeliest token.
        vocab_top_k: draw from that many likeliest tokens only. (top_k is about experts.)
        vocab_size: draw from the first so many tokens only, those that the tokenizer knows.
        seed: the same seed on the same machine draws the same text. Sets the model to eval mode.
        The context is at most block_size tokens; when it is full, it goes on from its later half.
        """
        if self.config.select == 'expert_choice':
            raise ValueError('select: expected top_k or top_p, got expert_choice, which needs the '
                             'tokens to come')
        self.eval()
        generator = torch.Generator(idx.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        size = self.config.block_size
        past, new = [[] for _ in self.blocks], idx[:, -size:]
        for _ in range(max_new_tokens):
            logits = self(new, past=past)[0][:, -1, :vocab_size]
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
            if past[0][0].shape[2] == size:
                past, new = [[] for _ in self.blocks], idx[:, -max(1, size // 2):]
        return idx

    def total_parameters(self):
        """Number of parameters; the matrix that embedding and head share counts once."""
        return sum(p.numel() for p in self.parameters())

    def active_parameters(self):
        """Parameters that the computation of one token touches: of the experts' matrices, K of E,
        or as many as `select` lets. aoe's judges count whole: all experts evaluate every token."""
        active, c = 0, self.config
        for name, p in self.named_parameters():
            of_chosen = p.dim() == 3 or name.endswith('w_down') and c.mlp == 'moe'
            active += p.numel() * c.active_experts / c.n_expert if of_chosen else p.numel()
        if c.mlp == 'aoe' and not c.factorised:                    # of the others: a part of w_g
            active += c.n_layer * (c.n_expert - c.active_experts) * c.n_embd * c.d_low
        return round(active)

    def flops_per_token(self):
        """Floating-point operations of a training step per token: 6 for each active weight of a
        matrix (a multiply and an add, once in forward, twice in backward), and 12 S D a layer for
        attention's two products, at full context without the saving of the causal mask."""
        c = self.config
        norms = sum(p.numel() for p in self.parameters() if p.dim() == 1)
        return 6 * (self.active_parameters() - norms) + 12 * c.n_layer * c.block_size * c.n_embd


# -----------------------------------------------------------------------------
# Part 3: the same layers, faster and in less memory.
#
# Part 1 asks each expert in turn, and autograd keeps every intermediate for backward. Here the
# chosen (token, expert) pairs are sorted by expert into P rows, so that all experts are one grouped
# matmul, and backward computes again what is cheap. Above all, softmax over the chosen gives the
# others no gradient: nothing of their C is kept, which makes aoe leaner than moe.

class Rows(NamedTuple):
    """The chosen pairs, sorted by expert, with padding in between: P rows."""
    token: torch.Tensor      # (P,)    the token of each row; 0 in padding
    expert: torch.Tensor     # (P,)    its expert
    row: torch.Tensor        # (T, K)  the row of each pair; for nobody (-1) the last, a padding
    ends: torch.Tensor       # (E,)    int32: where each expert's rows end; the last is P


def sort_by_expert(I, E, complete):
    """Rows of I (T, K); complete: there is no -1 in it.

    Each expert's rows are padded to a multiple of up to 16: a CPU prepares each new shape of a
    bfloat16 matmul for longer than it then takes, so few shapes are good. P does not depend on who
    was chosen (the last expert takes what is left): no size has to be read from a GPU.
    """
    T, K = I.shape
    load = count(I, E)                                             # (E,)
    pairs = T * K if complete else int(load.sum())
    multiple = max(1, min(16, pairs // E // 16))
    P = (pairs + E * (multiple - 1)) // multiple * multiple + (not complete)
    padding = -load % multiple                                     # (E,)
    expert, pair = I.masked_fill(I < 0, E).flatten().sort(stable=True)
    expert, pair = expert[:pairs], pair[:pairs]                    # pair = t*K + k
    row = torch.arange(pairs, device=I.device) + (padding.cumsum(0) - padding)[expert]
    ends = (load + padding).cumsum(0)
    ends[-1] = P
    return Rows(
        token=pair.new_zeros(P).scatter(0, row, pair // K),
        expert=(torch.arange(P, device=I.device).unsqueeze(1) >= ends).sum(1),
        row=pair.new_full((T * K,), P - 1).scatter(0, pair, row).view(T, K),
        ends=ends.int())


def has_grouped_mm(x):
    """Whether PyTorch multiplies all experts in one call, in the dtype and on the device of x. On
    GPUs other than Hopper and large Blackwells its call copies `ends` to the CPU each time."""
    kind = x.device.type
    if kind == 'cuda':
        ready = torch.cuda.get_device_capability(x.device) in ((9, 0), (10, 0), (10, 3))
        return ready and x.dtype == torch.bfloat16 and hasattr(F, 'grouped_mm')
    known = x.dtype == torch.bfloat16 or (
        x.dtype == torch.float32 and not torch.compiler.is_compiling())
    return kind == 'cpu' and known and hasattr(F, 'grouped_mm')


def grouped_mm(a, b, ends):
    """A matmul for each expert: a (P, m), b (E, m, n) -> (P, n). Or the gradient of b: a (m, P),
    b (P, n) -> (E, m, n). One call where PyTorch has it, for widths of whole 16 bytes; the loop
    says what it does."""
    whole = all(max(t.stride()[-2:]) * t.element_size() % 16 == 0 for t in (a, b))
    if whole and has_grouped_mm(a):
        product = F.grouped_mm(a, b, offs=ends)
        if b.dim() == 2 and a.device.type == 'cuda':               # PyTorch issue 172439: garbage
            empty = ends.diff(prepend=ends.new_zeros(1)) == 0      # from experts without rows
            product = product.masked_fill(empty[:, None, None], 0)
        return product
    ends = ends.tolist()
    rows = [slice(start, end) for start, end in zip([0, *ends], ends)]
    if b.dim() == 3:
        return torch.cat([a[r] @ b[i] for i, r in enumerate(rows)])
    return torch.stack([a[:, r] @ b[r] for r in rows])


def sum_rows(y, row, w=None):
    """For each token the sum of its rows, weighted: y (P, D), row and w (T, K) -> (T, D)."""
    if y.device.type == 'cpu':               # one pass, where the line below makes three
        w = None if w is None else w.type_as(y)
        return F.embedding_bag(row, y, mode='sum', per_sample_weights=w)
    return (y[row] if w is None else y[row] * w.type_as(y).unsqueeze(-1)).sum(1)


class Experts(torch.autograd.Function):
    """SparseMLP.experts for Rows: forward is its formula. It keeps u, and g where that is x Wg_i.
    Backward computes again X, SiLU(g) * u, and a factorised g, a matmul only d_low deep. It needs
    no y: the gradient of a weight, <dh, y>, is <dh Wo^T, SiLU(g) * u>."""

    @staticmethod
    def forward(ctx, x, C, w, w_gate, w_p, w_o, token, expert, row, ends):
        """C: what goes into the gate (P, d_low), or None for x itself. Returns h (T, D)."""
        X = x.index_select(0, token)                               # (P, D)
        g = grouped_mm(X if C is None else C, w_gate, ends)        # C_i Wup_i, or x Wg_i: (P, d)
        u = grouped_mm(X, w_p, ends)                               # x Wp_i: (P, d)
        y = grouped_mm(F.silu(g).mul_(u), w_o, ends)               # (P, D)
        ctx.save_for_backward(x, C, w, w_gate, w_p, w_o, g if C is None else None, u,
                              token, row, ends)
        return sum_rows(y, row, w)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        x, C, w, w_gate, w_p, w_o, g, u, token, row, ends = ctx.saved_tensors
        X = x.index_select(0, token)                               # (P, D)
        gate_in = X if C is None else C
        g = grouped_mm(C, w_gate, ends) if g is None else g        # (P, d)
        silu_g = F.silu(g)
        dy = dh.index_select(0, token)                             # of y, before w: (P, D)
        da = grouped_mm(dy, w_o.mT, ends)                          # of a = SiLU(g) * u: (P, d)
        a = silu_g * u
        dw = torch.linalg.vecdot(da, a)[row].type_as(w)            # (T, K)
        w_of_row = a.new_zeros(len(a)).index_add(0, row.flatten(), w.type_as(a).flatten())
        dw_o = grouped_mm(a.T, dy.mul_(w_of_row.unsqueeze(1)), ends)
        da *= w_of_row.unsqueeze(1)                                # 0 in padding
        du = silu_g.mul_(da)
        dg = torch.ops.aten.silu_backward(da.mul_(u), g)
        dw_gate, dw_p = grouped_mm(gate_in.T, dg, ends), grouped_mm(X.T, du, ends)
        dX, dC = grouped_mm(du, w_p.mT, ends), grouped_mm(dg, w_gate.mT, ends)
        if C is None:                                              # x went into the gate as well
            dX, dC = dX.add_(dC), None
        return sum_rows(dX, row), dC, dw, dw_gate, dw_p, dw_o, None, None, None, None


class ChosenRows(torch.autograd.Function):
    """C_i = x Wdown_i of each row (P, d_low): C[token, expert], where C (T, E, d_low) is known.
    Autograd's own backward of that would multiply by the zeros of all that were not chosen."""

    @staticmethod
    def forward(ctx, x, w, C, token, expert, row, ends):
        """w: Wdown_i of each expert (E, D, d_low)."""
        ctx.save_for_backward(x, w, token, row, ends)
        if C is None:
            return grouped_mm(x.index_select(0, token), w, ends)
        return C.flatten(0, 1).index_select(0, token * len(w) + expert)

    @staticmethod
    @once_differentiable
    def backward(ctx, dC):
        x, w, token, row, ends = ctx.saved_tensors
        dx = sum_rows(grouped_mm(dC, w.mT, ends), row)             # (T, D)
        return dx, grouped_mm(x.index_select(0, token).T, dC, ends), *5 * [None]


# Call a function and keep nothing of it but its arguments: backward calls it again, if it has to.
forgetting = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def as_autocast(x):
    """x in the dtype that autocast multiplies in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Lean:
    """What LeanMoE and LeanAoE share, in the place of SparseMLP.experts."""

    def sort(self, I, x):
        rows = sort_by_expert(I, self.config.n_expert, complete=self.config.select == 'top_k')
        if not has_grouped_mm(x):        # the loop needs the ends: wait for them once, here
            rows = rows._replace(ends=rows.ends.cpu())
        return rows

    def chosen_rows(self, x, w_down, C, rows):
        """C_i of each row, (P, d_low); w_down (D, E d_low)."""
        w = as_autocast(w_down).view(len(w_down), self.config.n_expert, -1).transpose(0, 1)
        return ChosenRows.apply(x, w, C, *rows)

    def experts_of_rows(self, x, C_I, w, rows):
        """h (T, D). C_I: C_i of each row, where the gate is factorised."""
        w_gate, C_I = (self.w_up, C_I) if self.config.factorised else (self.w_g, None)
        return Experts.apply(x, C_I, w, *map(as_autocast, (w_gate, self.w_p, self.w_o)), *rows)


class LeanMoE(Lean, MoE):
    """MoE, line by line."""

    def forward(self, x):                                          # (T, D)
        x = as_autocast(x)                                         # the one copy of x that is kept
        p = forgetting(self.route, x)                              # (T, E)
        I = self.choose(p.detach())                                # (T, K)
        rows = self.sort(I, x)
        w = self.weigh(p, I)                                       # (T, K)
        C_I = self.chosen_rows(x, self.w_down, None, rows) if self.config.factorised else None
        h = self.experts_of_rows(x, C_I, w, rows)                  # (T, D)
        return h, self.routing(p, I, w)


class LeanAoE(Lean, AoE):
    """AoE, line by line."""

    def forward(self, x):                                          # (T, D)
        x = as_autocast(x)                                         # the one copy of x that is kept
        p, C = forgetting(self.evaluate, x)                        # (T, E), (T, E, d_low)
        I = self.choose(p.detach())                                # (T, K)
        rows = self.sort(I, x)
        chosen = self.config.weigh_among == 'chosen'               # else all of p has a gradient
        C_I = None
        if chosen or self.config.factorised:
            C_I = self.chosen_rows(x, self.down(), C.detach(), rows)           # (P, d_low)
        w = softmax_over(norm(C_I)[rows.row], I) if chosen else self.weigh(p, I)   # (T, K)
        h = self.experts_of_rows(x, C_I, w, rows)                  # (T, D)
        return h, self.routing(p, I, w)

    def evaluate(self, x):
        C = (x @ self.down()).view(len(x), self.config.n_expert, -1)   # Eq. 3
        return norm(C), C                                          # Eq. 4


MLPS.update(moe=LeanMoE, aoe=LeanAoE)
