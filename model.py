"""
A small GPT whose MLP is one of three, and nothing else changes:

    dense   one SwiGLU MLP
    moe     E experts; a router decides which K of them see a token               (Algorithm 1)
    aoe     E experts, no router; every expert looks at the token, and the K that respond
            most strongly go on: Autonomy-of-Experts, arXiv 2501.13074            (Algorithm 2)

Four parts, to be read in this order:

    1. the three MLPs, as the paper writes them        all of AoE is here, and is what runs
    2. the GPT around them                             RMSNorm, rotary positions, no biases
    3. all experts at once                             SparseMLP.experts, faster; skip it at first
    4. the configuration's defaults and refusals

Shapes in the comments:
    B sequences, S positions, T = B*S tokens, D = n_embd, E = n_expert, K = top_k
    d = an expert's hidden width: d_ffn, or d_wide where its gate is factorised
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
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
    mlp: str = 'aoe'                     # aoe, moe or dense; for train.py several, with commas
    factorised: bool | None = None       # the gate is Wdown Wup, not Wg; None: the paper's, of aoe
    n_expert: int = 8                    # experts per layer, E
    top_k: int = 2                       # experts that handle a token, K
    d_ffn: int | None = None             # hidden width of a moe expert; None: 4 D
    d_low: int | None = None             # inner width of a factorised gate; None: about D / 3
    d_judge: int | None = None           # neurons by which aoe judges if the gate is whole: D / 6
    aux_weight: float = 0.0              # weight of the balancing loss, a of Eq. 2; paper: 0.01
    plain: bool = False                  # one expert after the other, as part 1 shows it: slow
    # the paper's other variants (Tables 2 and 3)
    router: Literal['linear', 'large'] = 'linear'   # of moe; large: two layers, as big as w_down
    select: Literal['top_k', 'top_p', 'expert_choice'] = 'top_k'   # how experts are chosen
    top_p: float = 0.6                   # for top_p: the probability that the chosen reach together
    weigh_among: Literal['chosen', 'all'] = 'chosen'   # weights: softmax over these (all: Switch)
    conf_weight: float = 0.0             # weight of the penalty on Ent_conf; paper: 1e-4 with top_p
    capacity_factor: float = 2.0         # for expert_choice: an expert takes this * T/E tokens

    def __post_init__(self):
        fill_in(self)                                              # part 4
        refuse_misfits(self)

    @property
    def d_wide(self):
        """Hidden width of an expert with a factorised gate, which gives it the size of moe's."""
        return equation_5(self.n_embd, self.d_ffn, self.d_low)


def equation_5(D, d_ffn, d_low):
    """d_wide, as a multiple of 8."""
    return 8 * round((3 * D * d_ffn - d_low * D) / (d_low + 2 * D) / 8)


# -----------------------------------------------------------------------------
# Part 1: the three MLPs. Each takes T tokens x (T, D); gives h (T, D), and what its experts did.

# recomputed(f, x) is f(x), of which nothing is kept for backward, which calls f again instead, with
# the same random numbers. So a counter in f would count twice.
recomputed = partial(checkpoint, use_reentrant=False)


class Routing(NamedTuple):
    """What the experts did with T tokens. The GPT stacks its layers: (L, T, E) and so on."""
    scores: torch.Tensor     # (T, E)  p: activation norms for aoe, the router's logits for moe
    chosen: torch.Tensor     # (T, K)  I: the experts that handled the token; -1 for nobody
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

    def active_parameters(self):
        return parameters_of(self)


class SparseMLP(nn.Module):
    """What moe and aoe share: E small SwiGLU MLPs, of which each token sees K.

    An expert's gate is made in one of two ways, whoever chooses: x Wg_i, or factorised,
    x Wdown_i Wup_i, through the d_low numbers C_i = x Wdown_i.
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
        somebody = I.clamp(min=0)
        if self.config.weigh_among == 'all':
            w = p.softmax(-1).gather(1, somebody)
        else:
            w = p.gather(1, somebody).masked_fill(I < 0, -1e30).softmax(-1)    # softmax(p[I])
        return w.masked_fill(I < 0, 0)

    def experts(self, x, I, w, C=None):
        """h = sum over i in I of w_i (SiLU(gate_i) * (x Wp_i)) Wo_i, one expert after the other.

        C (T, E, d_low): every x Wdown_i, where the experts have looked; a whole gate needs none.
        """
        if self.config.factorised and C is None:                   # a router chose: look now
            C = self.look_through(self.w_down, x)
        if not self.config.plain:
            return all_at_once(self, x, I, w, C)                   # by default, the same faster
        h = torch.zeros_like(x)
        for i in range(self.config.n_expert):
            t, k = (I == i).nonzero(as_tuple=True)                 # the tokens that chose expert i
            gate = C[t, i] @ self.w_up[i] if self.config.factorised else x[t] @ self.w_g[i]
            y = (F.silu(gate) * (x[t] @ self.w_p[i])) @ self.w_o[i]            # (tokens, D)
            h = h.index_add(0, t, (w[t, k, None] * y).type_as(h))
        return h                                                   # (T, D)

    def look_through(self, w_down, x):
        """x w_down (D, E d_low) as C (T, E, d_low): what every expert finds in x."""
        return (x @ w_down).view(len(x), self.config.n_expert, -1)

    def routing(self, p, I, w):
        """The Routing, and in it L_aux (Eq. 2) and the penalty on Ent_conf, which need all of p."""
        loss, E = p.new_zeros(()), self.config.n_expert
        if self.config.aux_weight:
            f, P = count(I, E).type_as(p) / len(p), p.softmax(-1).mean(0)      # Eq. 6
            loss = loss + self.config.aux_weight * E * (f * P).sum()           # Eq. 2
        if self.config.conf_weight:
            loss = loss + self.config.conf_weight * entropy(p).mean()          # Eq. 8
        return Routing(p.detach(), I, w.detach(), loss)

    def active_parameters(self):
        """Those that the computation of one token touches: what every token meets, and of the rest
        the share of the experts that handle it: on average with expert_choice, at most with top_p.
        """
        handle = {'top_k': self.config.top_k, 'top_p': self.config.n_expert,
                  'expert_choice': min(self.config.capacity_factor, self.config.n_expert)}
        share = handle[self.config.select] / self.config.n_expert
        everyones = self.parameters_of_every_token()
        return round(everyones + share * (parameters_of(self) - everyones))


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
        p = recomputed(self.route, x)                              # R(x): (T, E)
        I = self.choose(p.detach())                                # argtopK(p): (T, K)
        w = self.weigh(p, I)                                       # softmax(p[I]): (T, K)
        h = self.experts(x, I, w)                                  # Eq. 1: (T, D)
        return h, self.routing(p, I, w)

    def route(self, x):
        if self.config.router == 'large':
            x = F.silu(x @ self.router_in)
        with torch.autocast(x.device.type, enabled=False):         # scores are float32 at least
            return at_least_float32(x) @ at_least_float32(self.router)

    def parameters_of_every_token(self):
        router_in = self.router_in.numel() if self.config.router == 'large' else 0
        w_down = self.w_down.numel() if self.config.factorised else 0          # all C_i are found
        return router_in + self.router.numel() + w_down


class AoE(SparseMLP):
    """Autonomy of experts, Algorithm 2. No router: every expert takes the first step of its gate,
    and the norm of what it finds is its score. The chosen go on from what they found; where the
    gate is whole, that is only d_judge of its neurons, and they begin again."""

    def forward(self, x):                                          # (T, D)
        C, p = recomputed(self.look, x)                            # (T, E, d_low), (T, E)
        I = self.choose(p.detach())                                # argtopK(p): (T, K)
        w = self.weigh(p, I)                                       # softmax(p[I]): (T, K)
        h = self.experts(x, I, w, C)                               # Algorithm 2, last line: (T, D)
        return h, self.routing(p, I, w)

    def look(self, x):
        """What every expert finds in x, and how much it is."""
        C = self.look_through(self.down(), x)                      # Eq. 3
        return C, norm(C)                                          # Eq. 4

    def down(self):
        """Wdown_i of all experts side by side, (D, E d_low). Where the gate is whole, an expert
        judges by the first d_judge neurons of it: the first columns of Wg_i."""
        if self.config.factorised:
            return self.w_down
        return self.w_g[:, :, :self.config.d_judge].transpose(0, 1).flatten(1)

    def parameters_of_every_token(self):
        return self.down().numel()                                 # all experts look at every token


def norm(C):
    """||C||, the L2 norm over the last dimension."""
    return torch.linalg.vector_norm(C, dim=-1, dtype=torch.promote_types(C.dtype, torch.float32))


def count(I, E):
    """How many tokens each expert handles: (E,)."""
    I = I.masked_fill(I < 0, E).flatten()                          # nobody comes last: cut off
    return I.new_zeros(E + 1).scatter_add(0, I, torch.ones_like(I))[:E]


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

def rotate(x, cos, sin):
    """Rotary positions: turn each pair (x1, x2) by an angle that grows with the position.

    x (B, n_head, S, head_dim); cos, sin (S, head_dim / 2). Returns the shape and dtype of x.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).type_as(x)


def summed_loss(logits, targets):
    """Cross-entropy of some tokens at a time: in float32, logits of a whole batch are large."""
    return F.cross_entropy(at_least_float32(logits), targets, reduction='sum')


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
        seen = None                                                # all up to one's own: causal
        if S > 1 and k.shape[2] > S:                               # is_causal would begin at 0
            seen = torch.ones(S, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - S)
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.device.type == 'cpu' and S < 256:                     # a CPU is 3 times as fast so
            q, k, v, autocast = at_least_float32(q), at_least_float32(k), at_least_float32(v), False
        with torch.autocast(x.device.type, enabled=autocast):
            y = F.scaled_dot_product_attention(
                q, k, v, seen, self.dropout if self.training else 0.0,
                is_causal=S > 1 and seen is None)
        return self.out(y.transpose(1, 2).reshape(B, S, D))


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.n_embd)
        self.attention = CausalSelfAttention(config)
        self.norm_2 = nn.RMSNorm(config.n_embd)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, past=None):                     # (B, S, D)
        x = x + self.dropout(self.attention(self.norm_1(x), cos, sin, past))
        tokens = as_autocast(self.norm_2(x)).flatten(0, 1)         # one copy for all that keep it
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
            pieces = zip(logits.flatten(0, 1).split(2048), targets.flatten().split(2048))
            loss = sum(recomputed(summed_loss, *piece) for piece in pieces) / targets.numel()
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
        norms = sum(p.numel() for p in self.parameters() if p.dim() == 1)
        return 6 * (self.active_parameters() - norms) + 12 * c.n_layer * c.block_size * c.n_embd


# -----------------------------------------------------------------------------
# Part 3: all experts at once, in less memory.
#
# Part 1 asks each expert in turn, and autograd keeps every intermediate for backward. Here the
# chosen (token, expert) pairs are sorted by expert into P rows, so that all experts are one grouped
# matmul, and backward computes again what is cheap. `--plain=True` does without.

class Rows(NamedTuple):
    """The chosen pairs, sorted by expert, with padding in between: P rows."""
    token: torch.Tensor      # (P,)    the token of each row; 0 in padding
    expert: torch.Tensor     # (P,)    its expert
    row: torch.Tensor        # (T, K)  the row of each pair, of nobody (-1) one of the last expert's
    ends: torch.Tensor       # (E,)    int32: where each expert's rows end; the last is P


def sort_by_expert(I, E, leave_out):
    """Rows of I (T, K). leave_out: pairs with nobody (-1) get no row, for which their number has to
    be read from the device; else the last expert computes them, for nothing.

    Each expert's rows are padded to a multiple of up to 16: a CPU prepares each new shape of a
    bfloat16 matmul for longer than it then takes, so few shapes are good. P does not depend on who
    was chosen (the last expert takes what is left), unless they are left out.
    """
    T, K = I.shape
    load = count(I, E)                                             # (E,)
    pairs = int(load.sum()) if leave_out else T * K
    multiple = max(1, min(16, pairs // E // 16))
    P = math.ceil((pairs + E * (multiple - 1)) / multiple) * multiple
    P = P + 1 if leave_out else P                                  # one more, for nobody
    padding = -load % multiple                                     # (E,)
    expert, pair = I.masked_fill(I < 0, E).flatten().sort(stable=True)         # nobody comes last
    expert, pair = expert[:pairs], pair[:pairs]                    # pair = t*K + k
    padding_before = F.pad(padding.cumsum(0), (1, 0))              # (E + 1,)
    row = torch.arange(pairs, device=I.device) + padding_before[expert]
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
    strides = [max(t.stride()[-2:]) * t.element_size() for t in (a, b)]        # bytes
    whole = strides[0] % 16 == strides[1] % 16 == 0
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


class GroupedExperts(torch.autograd.Function):
    """SparseMLP.experts for Rows: forward is its formula. It keeps u, and g where that is x Wg_i.
    Backward computes again X, SiLU(g) * u, and a factorised g, a matmul only d_low deep. It needs
    no y: the gradient of a weight, <dh, y>, is <dh Wo^T, SiLU(g) * u>."""

    @staticmethod
    def forward(ctx, x, C, weights, w_gate, w_p, w_o, token, row, ends):
        """C: what goes into the gate (P, d_low), or None for x itself. Returns h (T, D)."""
        X = x.index_select(0, token)                               # (P, D)
        g = grouped_mm(X if C is None else C, w_gate, ends)        # C_i Wup_i, or x Wg_i: (P, d)
        u = grouped_mm(X, w_p, ends)                               # x Wp_i: (P, d)
        y = grouped_mm(F.silu(g).mul_(u), w_o, ends)               # (P, D)
        ctx.save_for_backward(x, C, weights, w_gate, w_p, w_o, g if C is None else None, u,
                              token, row, ends)
        return sum_rows(y, row, weights)

    @staticmethod
    def backward(ctx, dh):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():      # create_graph=True
            raise RuntimeError('expected first derivatives alone; plain=True has second ones')
        x, C, weights, w_gate, w_p, w_o, g, u, token, row, ends = ctx.saved_tensors
        X = x.index_select(0, token)                               # (P, D)
        gate_in = X if C is None else C
        g = grouped_mm(C, w_gate, ends) if g is None else g        # (P, d)
        silu_g = F.silu(g)
        dy = dh.index_select(0, token)                             # of y, before weights: (P, D)
        da = grouped_mm(dy, w_o.mT, ends)                          # of a = SiLU(g) * u: (P, d)
        a = silu_g * u
        dweights = torch.linalg.vecdot(da, a)[row].type_as(weights)            # (T, K)
        of_row = a.new_zeros(len(a)).index_add(0, row.flatten(), weights.type_as(a).flatten())
        dw_o = grouped_mm(a.T, dy.mul_(of_row.unsqueeze(1)), ends)
        da *= of_row.unsqueeze(1)                                  # 0 in padding
        du = silu_g.mul_(da)
        dg = torch.ops.aten.silu_backward(da.mul_(u), g)
        dw_gate, dw_p = grouped_mm(gate_in.T, dg, ends), grouped_mm(X.T, du, ends)
        dX, dC = grouped_mm(du, w_p.mT, ends), grouped_mm(dg, w_gate.mT, ends)
        if C is None:                                              # x went into the gate as well
            dX, dC = dX.add_(dC), None
        return sum_rows(dX, row), dC, dweights, dw_gate, dw_p, dw_o, None, None, None


def all_at_once(layer, x, I, w, C):
    """SparseMLP.experts of a layer, in one grouped matmul for each of its three matrices."""
    c, x = layer.config, as_autocast(x)
    rows = sort_by_expert(I, c.n_expert, leave_out=I.shape[1] > c.top_k)
    if not has_grouped_mm(x):            # the loop needs the ends: wait for them once, here
        rows = rows._replace(ends=rows.ends.cpu())
    C_rows = None
    if c.factorised:
        C_rows = as_autocast(C.flatten(0, 1)[rows.token * c.n_expert + rows.expert])
    w_gate = as_autocast(layer.w_up if c.factorised else layer.w_g)
    return GroupedExperts.apply(
        x, C_rows, w.masked_fill(I < 0, 0), w_gate, as_autocast(layer.w_p), as_autocast(layer.w_o),
        rows.token, rows.row, rows.ends)


def distance_of_both_ways(layer):
    """How far all_at_once is from the loop in SparseMLP.experts, in float32: the largest relative
    distance of h and of gradients on 64 random tokens, and of h on 64 that are large and alike, in
    eval mode. A rounding, unless one of the two was edited alone."""
    found, device = [], layer.w_p.device
    for plain in (True, False):
        one = copy.deepcopy(layer)                                 # the layer stays as it is
        one.config.plain = plain
        with torch.random.fork_rng([device] if device.type == 'cuda' else []):
            torch.manual_seed(0)
            x = torch.randn(64, layer.config.n_embd, device=device, requires_grad=True)
            h, _ = one(x)
            loss = (h * torch.randn_like(h)).sum()
            leaves = [x] + [p for p in one.parameters() if p.requires_grad]
            grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
            alike, _ = one.eval()(3 * x + 30 * torch.randn_like(x[0]))
        found.append([h, *grads, alike])
    return torch.stack([(a - b).norm() / (a.norm() + 1e-30) for a, b in zip(*found)]).max().item()


# -----------------------------------------------------------------------------
# Part 4: the configuration's defaults that depend on others, and what cannot be

def fill_in(config):
    """Give the keys that are None what fits the others, as far as the model needs them."""
    c, D = config, config.n_embd
    if c.factorised is None:
        c.factorised = c.mlp == 'aoe'
    if c.d_ffn is None:
        c.d_ffn = 4 * D
    if c.d_low is None and (c.factorised or c.mlp == 'moe' and c.router == 'large'):
        c.d_low = min(range(8, max(8, D // 2) + 1, 8), key=lambda d_low: (      # multiples of 8:
            abs(surplus(c, d_low)) > 0.008, abs(d_low - D / 3)))   # near D/3, if d_wide can follow
    if c.d_judge is None and c.mlp == 'aoe' and not c.factorised:
        c.d_judge = min(max(8, 8 * round(D / 48)), D, c.d_ffn)


def surplus(config, d_low):
    """How much larger than moe's a layer of experts with a factorised gate is, as a share."""
    D, d_wide = config.n_embd, equation_5(config.n_embd, config.d_ffn, d_low)
    return (D * d_low + d_low * d_wide + 2 * D * d_wide) / (3 * D * config.d_ffn + D) - 1


def refuse_misfits(config):
    """Raise ValueError for the first key whose value cannot be."""
    c, D = config, config.n_embd
    expect(c, 'block_size vocab_size n_layer n_head n_embd n_expert top_k d_ffn d_low d_judge',
           'a positive number', lambda n: 0 < n < 2**31)
    expect(c, 'mlp', 'one of aoe, moe, dense', lambda mlp: mlp in MLPS)
    expect(c, 'top_p', 'more than 0 and at most 1', lambda p: 0 < p <= 1)
    expect(c, 'capacity_factor', 'a positive number', lambda factor: 0 < factor < 2**31)
    expect(c, 'aux_weight conf_weight', '0 or more', lambda weight: weight >= 0)
    expect(c, 'dropout', 'a probability below 1', lambda p: 0 <= p < 1)
    expect(c, 'top_k', f'at most n_expert = {c.n_expert}', lambda k: k <= c.n_expert)
    expect(c, 'n_embd', f'a multiple of 2 * n_head = {2 * c.n_head} (rotary positions turn pairs '
           'of numbers within a head)', lambda n: n % (2 * c.n_head) == 0)
    expect(c, 'd_low', f'at most n_embd = {D}', lambda d_low: d_low <= D)
    if c.mlp == 'aoe' and not c.factorised:
        expect(c, 'd_low', 'None: a whole gate has no inner width, but --d_judge', lambda _: False)
        expect(c, 'd_judge', f'at most n_embd = {D} and d_ffn = {c.d_ffn}',
               lambda n: n <= min(D, c.d_ffn))
    if c.mlp != 'dense' and c.factorised:
        expect(c, 'd_low', f'less, since Eq. 5 leaves no d_wide to experts of d_ffn = {c.d_ffn}',
               lambda d_low: equation_5(D, c.d_ffn, d_low) > 0)
