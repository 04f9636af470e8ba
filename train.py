"""
Train a GPT whose MLP is aoe, moe or dense, on a CPU, on one GPU or on several,
and show how the variants compare.

    python train.py config/quick_start.py             # four runs, side by side
    python train.py config/quick_start.py --mlp=moe --out_dir=out/moe
    python train.py config/small.py --mlp=moe,aoe --seeds=1,2,3
    torchrun --nproc_per_node=8 train.py config/openwebtext.py   # eight GPUs

Ctrl-C stops and saves; the same command goes on, and where all is done it
prints the table again. Each run writes <out_dir>/<run>/config.json, log.jsonl
(a line per evaluation), ckpt.pt (to go on from) and best.pt (the lowest
validation loss). At the end sample.py draws all runs of <out_dir> and prints
their table, which has a column `minus moe` where runs have seeds.

Three parts, to be read in this order:

    1. one run         its keys, its data, what is measured, the loop
    2. its files       what shaped it; saving, and going on
    3. several runs    from keys to runs; side by side on a CPU's cores; main
"""

import contextlib
import inspect
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import configurator
import sample
from configurator import (RANK, WORLD_SIZE, UserError, as_lines, expect, expecting, hash_of,
                          is_run_name, last_of, replacing, write_text)
from model import GPT, GPTConfig, size_against_moe
from prepare_data import CLASSES, class_of, load_meta

# torchrun starts WORLD_SIZE processes of this script. They share the batches of an iteration, and
# their gradients are averaged; the one with RANK 0 evaluates, saves, draws and prints.


# -----------------------------------------------------------------------------
# Part 1: one run

@dataclass
class TrainConfig(GPTConfig):
    """Every key of a run: those of the model, then these."""
    # training
    batch_size: int = 16                 # sequences of block_size tokens, in the model at once
    gradient_accumulation_steps: int = 1   # batches in an iteration; their gradients are averaged
    max_iters: int = 2000                # iterations, one step of the optimizer each
    learning_rate: float = 2e-3          # the highest, reached after the warm-up
    min_lr: float | None = None          # the lowest; None: a tenth of learning_rate
    warmup_iters: int = 100              # iterations of linear warm-up
    lr_decay_iters: int | None = None    # where the cosine reaches min_lr; None: at max_iters
    weight_decay: float = 0.1            # AdamW's, for matrices alone
    beta1: float = 0.9                   # how slowly AdamW's average of gradients decays
    beta2: float = 0.95                  # and its average of their squares
    grad_clip: float = 1.0               # largest norm of all gradients together; 0: no limit
    seed: int = 1337                     # of the first weights, the batches and dropout
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'   # auto: what is fast here
    # evaluation
    eval_interval: int = 250             # iterations between evaluations
    eval_iters: int = 50                 # batches in an evaluation, the same every time
    eval_only: bool = False              # evaluate the checkpoint that is there and write nothing
    log_interval: int = 10               # iterations between losses in the bar; weights are checked
    # data
    dataset: str = 'shakespeare'         # the folder of data_dir to train on
    data_dir: str = 'data'               # where prepare_data.py wrote it
    # runs
    out_dir: str = 'out/default'         # each run writes to a folder of its own in here
    name: str | None = None              # of the run, and of its folder; None: its mlp
    runs: dict | None = None             # run name -> the keys in which it differs
    seeds: tuple | None = None           # train every run with each of these seeds
    jobs: int | None = None              # runs trained side by side; None: CPU, a core each; GPU, 1
    # machine
    device: str = 'auto'                 # auto: cuda, else mps, else cpu
    threads: int | None = None           # of the CPU, for each run; None: all, shared by the jobs
    compile: bool = False                # torch.compile: 20 seconds at the start of each run

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as error:      # model.py knows no UserError
            raise UserError(str(error)) from None
        if self.min_lr is None:
            self.min_lr = self.learning_rate / 10
        if self.name is None:
            self.name = self.mlp
        # None passes: it is decided later
        expect(self, ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters',
                      'log_interval', 'max_iters', 'learning_rate', 'lr_decay_iters', 'threads',
                      'jobs'), 'a positive number', lambda n: 0 < n < 2**31)
        expect(self, ('min_lr', 'warmup_iters', 'weight_decay', 'grad_clip', 'seed'),
               '0 or more, below 2^63', lambda n: 0 <= n < 2**63)
        expect(self, 'gradient_accumulation_steps', f'a multiple of the {WORLD_SIZE} processes, '
               'which share them', lambda n: n % WORLD_SIZE == 0)
        expect(self, 'threads', f'at most the {os.cpu_count()} cores of this machine',
               lambda n: n <= os.cpu_count())
        expect(self, 'min_lr', f'at most the learning_rate, {self.learning_rate:g}',
               lambda rate: rate <= self.learning_rate)
        expect(self, ('beta1', 'beta2'), 'at least 0 and below 1', lambda beta: 0 <= beta < 1)
        expect(self, ('out_dir', 'data_dir', 'dataset'), 'the name of a folder',
               lambda name: name and name.isprintable())
        expect(self, 'name', 'letters, digits, spaces and . , = + - % (a folder is called so, '
               'and a row of tables)', is_run_name)

    @property
    def folder(self):
        """The folder that the run writes to."""
        return os.path.join(self.out_dir, f'{self.name}-{self.seed}' if self.seeds else self.name)

    def path(self, file):
        return os.path.join(self.folder, file)

    @property
    def tokens_per_iter(self):
        return self.gradient_accumulation_steps * self.batch_size * self.block_size


# data

def random_of(seed, iteration, micro_step):
    """Random numbers that depend on these three alone, so that resuming needs no state of them."""
    return np.random.default_rng((seed, iteration, micro_step))


class Data:
    """The tokens of a data set, and batches of them: inputs, targets (batch_size, block_size)."""

    def __init__(self, config, device):
        folder = os.path.join(config.data_dir, config.dataset)
        self.config, self.device, self.meta = config, device, load_meta(folder)
        classes = [class_of(character) for character in self.meta['vocabulary'] or '']
        self.class_of_token = torch.tensor(classes, device=device)
        self.tokens = {split: np.memmap(os.path.join(folder, f'{split}.bin'), np.uint16, 'r')
                       for split in ('train', 'val')}

    def batch(self, split, starts):
        """The batch of the windows that begin at starts."""
        window = np.asarray(starts)[:, None] + np.arange(self.config.block_size + 1)
        window = self.tokens[split][window].astype(np.int64)       # (batch_size, block_size + 1)
        window = torch.from_numpy(window).to(self.device)
        return window[:, :-1], window[:, 1:]

    def train_batch(self, iteration, micro_step):
        """A random batch, the same for the same seed."""
        last = len(self.tokens['train']) - self.config.block_size
        random = random_of(self.config.seed, iteration, micro_step)
        return self.batch('train', random.integers(0, last, self.config.batch_size))

    def eval_batches(self, split):
        """At most eval_iters batches of windows spread evenly over the text, the same for all runs.
        split: 'train', 'val', or 'test', windows of the validation text halfway between those of
        'val', for one evaluation at the end. A short text has no room for windows of 'test'."""
        size, S = self.config.batch_size, self.config.block_size
        source = 'val' if split == 'test' else split
        tokens = len(self.tokens[source])
        n = min(self.config.eval_iters, math.ceil(tokens / (size * S)))   # once each is enough
        starts = np.linspace(0, tokens - S - 1, n * size, dtype=np.int64)
        if split == 'test':
            # a window is S + 1 tokens long: between two that begin 2 (S + 1) apart another has room
            room = len(starts) > 1 and np.diff(starts).min() >= 2 * (S + 1)
            n = n - 1 if room else 0     # there is one place fewer than windows, so a batch fewer
            starts = (starts[:-1] + starts[1:])[:n * size] // 2
        for batch in starts.reshape(n, size):
            yield self.batch(source, batch)


# what is measured

def measure(routing, classes, config):
    """What is measured from the Routing of a batch, as tensors to be added up over batches.
    classes (T,): the place in CLASSES of each token; None where the tokens are no characters."""
    E = config.n_expert
    chosen = routing.chosen.masked_fill(routing.chosen < 0, E)     # -1, nobody, becomes E
    used = F.one_hot(chosen, E + 1).sum(2)[..., :E].float()        # summed over K: (L, T, E)
    measured = {
        'tokens': torch.tensor(used.shape[1]),                     # T
        'used': used.sum(1),                                       # T f of Eq. 6: (L, E)
        # Eq. 8: (L,); entr is 0 for a probability of 0, as a score of -inf gives
        'ent_conf': torch.special.entr(routing.scores.softmax(-1)).sum(-1).mean(1),
        'aux_loss': routing.aux_loss.sum()}
    if config.mlp == 'aoe':
        measured['norm'] = routing.scores.mean(1).nan_to_num()     # (L, E); JSON has no -inf
    if classes is not None:
        is_class = F.one_hot(classes, len(CLASSES)).float()        # (T, classes)
        measured['handled'] = is_class.T @ used                    # (L, classes, E)
        measured['of_class'] = is_class.sum(0).unsqueeze(1)        # (classes, 1)
    return measured


@torch.no_grad()
def evaluate(model, data, autocast, splits=('train', 'val')):
    """Mean cross-entropy (nats per token) on the splits, and on 'val' what the experts did: an
    entry of log.jsonl, whose keys are the same for all models."""
    model.eval()
    entry = {'load': [], 'ent_load': [], 'ent_conf': [], 'norm': [], 'class_load': [],
             'experts_per_token': [], 'aux_loss': 0.0}
    measured = []
    for split in splits:
        losses = []
        for idx, targets in data.eval_batches(split):
            with autocast:
                _, loss, routing = model(idx, targets)
            losses.append(loss)
            if split == 'val' and model.config.mlp != 'dense':
                classes = data.class_of_token[idx.flatten()] if data.meta['vocabulary'] else None
                measured.append(measure(routing, classes, model.config))
        if losses:
            entry[f'{split}_loss'] = torch.stack(losses).mean().item()
    model.train()
    if not measured:                                               # the model is dense
        return entry
    total = {key: torch.stack([m[key] for m in measured]).sum(0).cpu() for key in measured[0]}
    load = (total['used'] / total['used'].sum(1, keepdim=True)).nan_to_num()   # (L, E)
    found = {'load': load, 'ent_load': torch.special.entr(load).sum(1),        # Eq. 7
             'experts_per_token': total['used'].sum(1) / total['tokens']}
    for key in {'ent_conf', 'aux_loss', 'norm'} & total.keys():
        found[key] = total[key] / len(measured)                    # the mean over batches
    if 'handled' in total:
        found['class_load'] = (total['handled'] / total['of_class']).nan_to_num()
    return entry | {key: value.tolist() for key, value in found.items()}


# the loop

class RunFailed(UserError):
    """A run has diverged. The other runs go on."""


# the number of the signal that asks to stop, 0: none yet; and the processes that part 3 has started
STOP = SimpleNamespace(number=0, children=[])


def learning_rate_at(iteration, config):
    """Linear warm-up, then half a cosine from learning_rate to min_lr, then min_lr."""
    c = config
    if iteration < c.warmup_iters:
        return c.learning_rate * (iteration + 1) / (c.warmup_iters + 1)
    if iteration >= c.lr_decay_iters:
        return c.min_lr
    progress = (iteration - c.warmup_iters) / (c.lr_decay_iters - c.warmup_iters)
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (c.learning_rate - c.min_lr)


def make_optimizer(model, config, device):
    """AdamW that decays matrices, and nothing with less than two dimensions, such as norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{'params': matrices, 'weight_decay': config.weight_decay},
                              {'params': others, 'weight_decay': 0.0}],
                             lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             fused=device.type in ('cuda', 'cpu'))


@dataclass
class State:
    """A run at work: what it needs, then what training changes."""
    config: TrainConfig
    device: torch.device
    data: Data
    model: GPT
    forward: torch.nn.Module             # the model; compiled, or shared by processes
    optimizer: torch.optim.Optimizer
    autocast: torch.autocast
    # float16 has few exponents: losses are scaled up, gradients back, and a step is skipped and the
    # scale halved where something overflowed. For other dtypes the scaler does nothing.
    scaler: torch.amp.GradScaler
    iteration: int = 0
    seconds: float = 0.0                 # of training, without evaluations
    log: list = field(default_factory=list)        # its evaluations, as in log.jsonl
    recipe: dict = field(default_factory=dict)     # what shapes its result: part 2
    ckpt_time: int | None = None         # when we last wrote ckpt.pt: save refuses another's


def begin(config, device, data):
    """The State of a new run."""
    c, dtype = config, getattr(torch, config.dtype)
    torch.manual_seed(c.seed)
    model = GPT(c).to(device)
    forward = torch.compile(model) if c.compile else model
    if WORLD_SIZE > 1:
        forward = torch.nn.parallel.DistributedDataParallel(forward)
    return State(config=c, device=device, data=data, model=model, forward=forward,
                 optimizer=make_optimizer(model, c, device),
                 autocast=torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
                 scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16))


def train(config, note):
    """Train one run, from scratch or from its ckpt.pt, until max_iters, or until STOP. Calls
    note(tokens since the last call, loss). Raises UserError; as RunFailed where it diverges."""
    c, device = config, configurator.choose_device(config.device)
    configurator.keep_freed_memory()     # saves a quarter of a step's time on a CPU
    torch.set_num_threads(c.threads)
    with expecting(f'out_dir: expected a folder to write to, {c.folder!r}'):
        os.makedirs(c.folder, exist_ok=True)
    state = begin(c, device, Data(c, device))
    state.recipe = recipe_of(c, state.data.meta, device)
    go_on(state)                         # from its checkpoint, if it has one: part 2
    tell(description(state))
    if c.eval_only:
        entry = evaluate(state.model, state.data, state.autocast)
        tell(report(c, {'iter': state.iteration, **entry}))
        return
    clock, noted = time.perf_counter(), state.iteration
    while True:
        ended, stopped = state.iteration >= c.max_iters, STOP.number > 0
        if RANK == 0 and (ended or stopped or state.iteration % c.eval_interval == 0):
            state.seconds += time.perf_counter() - clock           # the clock leaves evaluation out
            evaluate_and_save(state, ended, stopped)
            clock = time.perf_counter()
        if ended or stopped:
            return

        loss = one_iteration(state)
        state.iteration += 1
        if state.iteration % c.log_interval == 0:
            refuse_not_finite(state)
            note((state.iteration - noted) * c.tokens_per_iter, loss.item())
            noted = state.iteration


def one_iteration(state):
    """The gradients of an iteration's batches, then a step of the optimizer. Returns the loss of
    the last batch."""
    c = state.config
    for group in state.optimizer.param_groups:
        group['lr'] = learning_rate_at(state.iteration, c)
    micro_steps = range(RANK, c.gradient_accumulation_steps, WORLD_SIZE)       # of this process
    for micro_step in micro_steps:
        idx, targets = state.data.train_batch(state.iteration, micro_step)
        # dropout's seed, so that a resumed run drops the same
        torch.manual_seed(random_of(c.seed, state.iteration, micro_step).integers(2**63))
        if WORLD_SIZE > 1:               # processes average their gradients once an iteration
            state.forward.require_backward_grad_sync = micro_step == micro_steps[-1]
        with state.autocast:
            # [1:]: logits, the largest tensor, aren't kept: backward doesn't need them
            loss, routing = state.forward(idx, targets)[1:]
        state.scaler.scale((loss + routing.aux_loss.sum()) / len(micro_steps)).backward()
    state.scaler.unscale_(state.optimizer)
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), c.grad_clip or math.inf)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    return loss


def evaluate_and_save(state, ended, stopped):
    """Save the run, and evaluate it before, unless it stops midway or was evaluated here before."""
    c, log = state.config, state.log
    evaluated = log and log[-1]['iter'] == state.iteration
    if evaluated or (stopped and not ended):
        written = read_config_json(c).get('iter') == state.iteration
        if ended or stopped or not written:                        # else it was resumed here
            refuse_not_finite(state)
            save(state)
        return
    splits = ('train', 'val', 'test') if ended else ('train', 'val')
    log.append({'iter': state.iteration, 'tokens': state.iteration * c.tokens_per_iter,
                'seconds': state.seconds, 'lr': learning_rate_at(state.iteration, c),
                **evaluate(state.model, state.data, state.autocast, splits)})
    refuse_not_finite(state, log[-1])
    save(state)
    tell(report(c, log[-1]))
    sample.draw(sample.read_results(c.out_dir), c.out_dir, ['loss.png'])       # of all runs there


def refuse_not_finite(state, entry=None):
    """Raise RunFailed if a weight is not finite, or a loss of this evaluation (in float16, where
    the scaler skips such steps, a loss alone tells), and note it in config.json."""
    losses = [value for key, value in (entry or {}).items() if key.endswith('_loss')]
    weights = state.model.parameters()
    if all(map(math.isfinite, losses)) and all(weight.isfinite().all() for weight in weights):
        return
    c = state.config
    if RANK == 0:
        write_config_json(state, iter=state.iteration, diverged=state.iteration)
    raise RunFailed(f'{c.folder}: expected finite losses and weights, got others by iteration '
                    f'{state.iteration}. ckpt.pt is from before. '
                    f'Train anew with --name=, and less than --learning_rate={c.learning_rate:g}')


def tell(text):
    """Print a line, above the progress bar if there is one; an error to stderr."""
    file = sys.stderr if text.startswith('error: ') else sys.stdout
    if file is sys.stderr and os.isatty(2):
        text = f'\r\033[K{text}'         # the bar may be there, from another process: erase it
    if RANK == 0 and file:               # None was closed, as by >&-
        tqdm.write(text, file=file)


def description(state):
    """What the model is and how it is trained: lines, each with the run's name, since runs side by
    side print theirs at the same time."""
    c, model = state.config, state.model
    at_most = 'at most ' if c.select == 'top_p' else ''
    lines = [f'{model.total_parameters():,} parameters, {at_most}{model.active_parameters():,} '
             f'active, {model.flops_per_token() / 1e6:.1f} MFLOPs per token',
             f'{c.max_iters:,} iterations of {c.tokens_per_iter:,} tokens, {state.device}, '
             f'{c.dtype}, seed {c.seed}']
    if c.factorised and abs(size_against_moe(c.n_embd, c.d_ffn, c.d_low) - 1) > 0.01:
        lines.append(f'an expert is {size_against_moe(c.n_embd, c.d_ffn, c.d_low):.3f} times as '
                     'large as one of moe')
    if c.select == 'expert_choice':
        lines.append('later tokens help to choose, so its loss is lower than in use')
    if c.warmup_iters >= c.max_iters:
        lines.append(f'it ends within its warm-up of {c.warmup_iters:,} iterations')
    if c.lr_decay_iters != c.max_iters:
        lines.append(f'the learning rate falls to {c.min_lr:g} by iteration {c.lr_decay_iters:,}')
    name = os.path.basename(c.folder)
    return '\n'.join(f'{name:<12} {line}' for line in lines)


def report(config, entry):
    """An evaluation, in a line."""
    balance = f'   Ent_load {statistics.mean(entry["ent_load"]):.3f}' if entry['ent_load'] else ''
    return (f'{os.path.basename(config.folder):<12} iter {entry["iter"]:>6,}   '
            f'train loss {entry["train_loss"]:.4f}   val loss {entry["val_loss"]:.4f}{balance}')


# -----------------------------------------------------------------------------
# Part 2: a run's files, and its recipe. That is all that shapes a run's result: runs with equal
# recipes, but for the seed, are seeds of one another.

# These keys are not in it, since a run may go on with others. dataset counts by its sha256, device
# by its type, max_iters by lr_decay_iters, which shapes the schedule.
NOT_IN_RECIPE = {'recompute', 'max_iters', 'log_interval', 'eval_only', 'dataset', 'data_dir',
                 'out_dir', 'name', 'runs', 'seeds', 'jobs', 'device', 'threads', 'compile'}
# these may change where a run goes on: its recipe then has both, as 'cpu, then cuda'
MAY_CHANGE = {'device', 'processor', 'torch', 'model.py', 'train.py'}
ANEW = '--out_dir=, or --name= for a single run, trains anew'
HASHES = {'model.py': hash_of(inspect.getsourcefile(GPT)), 'train.py': hash_of(__file__)}


def recipe_of(config, meta, device):
    return {key: value for key, value in vars(config).items() if key not in NOT_IN_RECIPE} | {
        'sha256': meta['sha256'][:8], 'train_tokens': meta['train_tokens'],
        'val_tokens': meta['val_tokens'], 'device': device.type,   # not the key, as 'cuda:1' is
        'processor': configurator.processor_name(device), 'torch': str(torch.__version__), **HASHES}


def save(state):
    """Write a run's files: ckpt.pt, the latest state; best.pt, what sampling needs of it, if its
    evaluation has the lowest loss; log.jsonl; and last config.json. Raises UserError."""
    c, log = state.config, state.log
    if time_of_ckpt(c) != state.ckpt_time:
        raise UserError(f'{c.folder}: expected to be alone in it, got another process that writes '
                        'there; --name= keeps both')
    lines = as_lines(log)                # first, since it refuses NaN
    for_sampling = {'model': state.model.state_dict(), 'meta': state.data.meta,
                    'recipe': state.recipe}
    with replacing(c.path('ckpt.pt')) as part:
        torch.save({**for_sampling, 'optimizer': state.optimizer.state_dict(), 'log': log,
                    'scaler': state.scaler.state_dict(), 'iter': state.iteration,
                    'seconds': state.seconds}, part)
    state.ckpt_time = time_of_ckpt(c)
    lowest = min((entry['val_loss'] for entry in log), default=None)
    if log and log[-1]['iter'] == state.iteration and log[-1]['val_loss'] == lowest:
        with replacing(c.path('best.pt')) as part:
            torch.save(for_sampling, part)
    write_text(c.path('log.jsonl'), lines)
    write_config_json(state, iter=log[-1]['iter'] if log else None)    # a stop may be further


def write_config_json(state, **how_far):
    """Write what the run is, and how far: iter, and where it has diverged also diverged."""
    c, model = state.config, state.model
    result = {'run': c.name, 'seed': c.seed, 'dataset': c.dataset, 'recipe': state.recipe,
              'total_parameters': model.total_parameters(),
              'active_parameters': model.active_parameters(),
              'flops_per_token': model.flops_per_token(), **how_far}
    write_text(c.path('config.json'), json.dumps(result, indent=1))


def time_of_ckpt(config):
    """When the run's ckpt.pt was written, whoever did; None if there is none."""
    path = config.path('ckpt.pt')
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


def load_checkpoint(config, device, mmap=False):
    """The ckpt.pt of a run, None if there is none. Nothing in the file can run code. mmap: read
    from the disk only what is looked at. Raises UserError."""
    path = config.path('ckpt.pt')
    if not os.path.exists(path):
        return None
    with expecting(f'{path}: expected a whole checkpoint of train.py; {ANEW}'):
        saved = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        if not {'recipe', 'iter', 'seconds', 'log', 'optimizer'} <= saved.keys():
            raise ValueError('other contents')
        return saved


def go_on(state):
    """Give a run the state that is in its checkpoint, if it has one. Raises UserError."""
    c = state.config
    state.ckpt_time = time_of_ckpt(c)
    saved = load_checkpoint(c, state.device)
    if saved is None:
        return
    refuse_another_recipe(c, saved['recipe'], state.recipe)
    with expecting(f'{c.folder}: expected a run with these keys and this model.py; {ANEW}'):
        state.model.load_state_dict(saved['model'])
        state.optimizer.load_state_dict(saved['optimizer'])
        state.scaler.load_state_dict(saved['scaler'])
    state.iteration, state.seconds, state.log = saved['iter'], saved['seconds'], saved['log']
    for key in MAY_CHANGE:               # as 'cpu, then cuda'
        was, now = saved['recipe'].get(key), state.recipe[key]
        state.recipe[key] = was if last_of(was) == now else f'{was}, then {now}'


def changed_keys(old, now):
    """The keys whose values differ between an old recipe and the one of now, sorted. A key that the
    old one lacks counts as its default."""
    defaults = {key.name: key.default for key in fields(TrainConfig)}
    return sorted(key for key in now if last_of((defaults | old).get(key)) != now[key])


def refuse_another_recipe(config, old, now):
    """Raise UserError where a run would go on with another recipe than that of its checkpoint."""
    wrong = [key for key in changed_keys(old, now) if key not in MAY_CHANGE]
    if not wrong or config.eval_only:
        return
    told = ', '.join(f'{key} was {old.get(key)} and is {now[key]}' for key in wrong)
    if wrong == ['lr_decay_iters']:      # more max_iters change the schedule, too: settle
        told += f', as --max_iters; --lr_decay_iters={old["lr_decay_iters"]} goes on with it'
    raise UserError(f'{config.folder} holds another run: {told}; {ANEW}, or remove it')


def tell_changes(config, old, now):
    """Tell which keys of the recipe are others now. A run that is done keeps its result."""
    changed = changed_keys(old, now)
    if changed and outcome_of(config) == 'done' and not config.eval_only:
        tell(f'{config.folder} is done, with another {", ".join(changed)}, and not trained again; '
             f'{ANEW}')
        return
    for key in changed:
        tell(f'{config.folder}: {key} was {old.get(key)} and is {now[key]}')


def read_config_json(config):
    """What a run has written last; {} if nothing is there. Raises UserError."""
    path = config.path('config.json')
    with expecting(f'{path}: expected one of train.py; remove this file, and the run goes on'):
        return dict(json.loads(configurator.read_text(path)) if os.path.exists(path) else {})


def outcome_of(config):
    """What has become of a run: 'done', 'diverged', or None where it has iterations to go, or a
    file is gone (best.pt comes back only if the last evaluation is the lowest). Raises UserError.
    """
    result = read_config_json(config)
    if 'diverged' in result:
        return 'diverged'
    whole = all(os.path.exists(config.path(file)) for file in ('log.jsonl', 'best.pt'))
    return 'done' if whole and result.get('iter') == config.max_iters else None


def settle(config, jobs):
    """Fill in what is None or 'auto' in a run's keys, and tell what has changed since it was
    trained. Returns how many iterations it has. Raises UserError where it can't begin, or go on."""
    c, device = config, configurator.choose_device(config.device)
    meta = load_meta(os.path.join(c.data_dir, c.dataset))
    saved = load_checkpoint(c, 'cpu', mmap=True) or {'recipe': {}, 'iter': 0}
    old = saved['recipe']
    c.threads = c.threads or max(1, configurator.usable_cores() // max(jobs, WORLD_SIZE))
    c.vocab_size = c.vocab_size or meta['vocab_size']
    if c.eval_only:                      # no training, so no schedule: keep the old one
        c.lr_decay_iters = old.get('lr_decay_iters')
    c.lr_decay_iters = c.lr_decay_iters or c.max_iters
    if c.dtype == 'auto':
        c.dtype = old.get('dtype') or configurator.fast_dtype(device)
    refuse_misfits(c, meta, saved['iter'])
    if old:
        now = recipe_of(c, meta, device)
        refuse_another_recipe(c, old, now)
        tell_changes(c, old, now)
    return saved['iter']


def refuse_misfits(config, meta, iteration):
    """Raise UserError where keys do not fit the data, the run's folder, or how far the run is."""
    c, folder = config, os.path.join(config.data_dir, config.dataset)
    with expecting(f'{folder}: expected the tokens that meta.json describes; prepare them again'):
        sizes = [os.path.getsize(os.path.join(folder, file)) for file in ('train.bin', 'val.bin')]
        if sizes != [2 * meta['train_tokens'], 2 * meta['val_tokens']]:
            raise ValueError(f'{sizes} bytes')
    expect(c, 'vocab_size', f'at least the {meta["vocab_size"]} of {c.dataset}',
           lambda n: n >= meta['vocab_size'])
    expect(c, 'block_size', f'less than the {meta["val_tokens"]} tokens of {c.dataset} for '
           'validation', lambda S: S < meta['val_tokens'])
    expect(c, 'batch_size', f'a batch below the {meta["train_tokens"]:,} training tokens of '
           f'{c.dataset}', lambda n: n * c.block_size <= meta['train_tokens'])
    if not c.eval_only:
        expect(c, 'max_iters', f'at least the {iteration} iterations that {c.folder} has ({ANEW})',
               lambda n: n >= iteration)
    files = os.listdir(c.folder) if os.path.isdir(c.folder) else []
    if c.eval_only and 'ckpt.pt' not in files:
        raise UserError(f'eval_only: expected a run in {c.folder}; train it first')
    files = [file for file in files if not (file.endswith('.part') or file.startswith('.'))]
    if files and 'ckpt.pt' not in files:
        raise UserError(f'{c.folder}: expected a new folder, or a run and its ckpt.pt, got '
                        f'{files}; --name= or --out_dir= leaves it alone')


# -----------------------------------------------------------------------------
# Part 3: several runs

def merge(keys, later):
    """Keys, then later ones, which win: over the same keys in entries of `runs`, too. A later mlp
    takes the place of `runs`.

        {'runs': {'a': {'top_k': 1}}}, {'top_k': 2}  ->  {'runs': {'a': {}}, 'top_k': 2}
    """
    merged = keys | later
    if 'runs' in later or keys.get('runs') is None:
        return merged
    if 'mlp' in later:
        del merged['runs']
    else:
        merged['runs'] = {run: {key: value for key, value in typed_keys(run, own).items()
                                if key not in later} for run, own in keys['runs'].items()}
    return merged


def keys_of(files):
    """The keys of config files, in their order. Raises UserError."""
    keys = {}
    for file in files:
        keys = merge(keys, configurator.read_config_file(TrainConfig, file))
    return keys


def plan_runs(from_file, from_line):
    """The TrainConfigs that the keys of config files and, later, of the command line ask for:

        {'mlp': 'aoe,moe'}                                                     ->  aoe moe
        {'runs': {'a': {'mlp': 'aoe'}, 'm': {'mlp': 'moe'}}, 'seeds': (1, 2)}  ->  a-1 m-1 a-2 m-2

    Raises UserError."""
    given = merge(from_file, from_line)
    runs, name = given.pop('runs', None), given.pop('name', None)
    if runs is None:
        names = [mlp.strip() for mlp in given.pop('mlp', TrainConfig.mlp).split(',')]
        runs = {mlp: {'mlp': mlp} for mlp in names}
    runs = {run: typed_keys(run, keys) for run, keys in runs.items()}
    seeds = given.get('seeds') or [given.get('seed', TrainConfig.seed)]
    refuse_contradictions(given, runs, name, seeds)
    return [TrainConfig(**given | keys | {'name': name or run, 'seed': seed})
            for seed in seeds for run, keys in runs.items()]


def typed_keys(run, keys):
    """What an entry of `runs` has, each of its field's type. Raises UserError."""
    if not isinstance(keys, dict):
        raise UserError(f'runs, {run}: expected a dict of keys, got {keys!r}')
    return {key: configurator.typed(TrainConfig, key, value, where=f'runs, {run}: ')
            for key, value in keys.items()}


ALL_SHARE = {'runs', 'name', 'seed', 'seeds', 'out_dir', 'jobs', 'eval_only', 'device'}


def refuse_contradictions(given, runs, name, seeds):
    """Raise UserError where keys contradict each other."""
    if not runs or (name and len(runs) > 1):
        raise UserError(f'runs: expected one at least, and one alone with --name, got {len(runs)}')
    if given.get('seeds') and 'seed' in given:
        raise UserError('expected seed or seeds, got both; --seeds=3 trains with one')
    if len(set(seeds)) < len(seeds) or any(type(seed) is not int for seed in seeds):
        raise UserError(f'seeds: expected whole numbers, each once, got {seeds}')
    for run, keys in runs.items():
        if wrong := sorted(ALL_SHARE & keys.keys()):
            raise UserError(f'runs, {run}: expected keys in which runs may differ, got {wrong}')
        alike = [other for other in runs if runs[other] == keys]
        if len(alike) > 1:
            raise UserError(f'runs: expected that they differ, got {", ".join(alike)} alike')


def train_one_by_one(runs, note):
    """Train runs in this process. Returns the exit status: 1 where one has diverged. Raises
    UserError, also where a run doesn't fit into memory."""
    status = 0
    for run in runs:
        try:
            train(run, note)
        except RunFailed as error:
            if WORLD_SIZE > 1:           # the other processes would wait for this one
                raise
            tell(f'error: {error}')
            status = 1
        except RuntimeError as error:
            if 'memory' not in str(error):
                raise
            raise UserError(f'{run.folder}: expected to fit into memory, got '
                            f'"{str(error).splitlines()[0]:.60}"; try less --batch_size (and more '
                            '--gradient_accumulation_steps), or --recompute=True') from None
        if STOP.number:
            break
    return status


# Side by side: the matmuls of a small model are too small for two threads, so on a CPU a core
# trains a run of its own, in a process of its own. This process starts the others and has their
# stdin and stdout: it prints their lines, and closes the stdin of one that shall stop. Where this
# process is killed, the system closes it.

NOTE = '\0'                              # begins a line for the bar: tokens and loss


def be_a_child(text):
    """Train one of several runs in this process, which is its own. text: its TrainConfig as JSON.
    Exits."""
    def wait_for_the_end_of_stdin():
        os.read(0, 1)                    # returns when the first process closes it, or is gone
        STOP.number = signal.SIGTERM

    def note(tokens, loss):
        with contextlib.suppress(BrokenPipeError):                 # the first process is gone
            os.write(1, f'{NOTE}{tokens} {loss}\n'.encode())
    threading.Thread(target=wait_for_the_end_of_stdin, daemon=True).start()
    status = train_one_by_one([TrainConfig(**json.loads(text))], note)
    sys.exit(status or (128 + STOP.number if STOP.number else 0))


def train_side_by_side(runs, jobs, note):
    """Train runs in processes of their own, `jobs` at once. Returns the highest exit status. Where
    one has failed (1) the others go on; after a UserError (2), as of a full disk, all stop."""
    def train_apart(run):
        if STOP.number:
            return 0
        command = [sys.executable, __file__, '--train_one', json.dumps(vars(run))]
        # in a session of its own: Ctrl-C in a terminal reaches this process alone
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              encoding='utf-8', errors='replace',
                              start_new_session=True) as process:
            STOP.children.append(process)
            if STOP.number:              # it came while this one started
                process.stdin.close()
            for line in process.stdout:
                if line.startswith(NOTE):
                    tokens, loss = line.removeprefix(NOTE).split()
                    note(int(tokens), float(loss))
                else:
                    tell(line.rstrip('\n'))
        # 0: trained; 1: diverged; 2: a UserError; 130, 143: stopped, saved; others: it was killed
        status, stopping = process.returncode, STOP.number > 0
        if status == 2 and not stopping:
            stop(signal.SIGTERM)                                   # the others, too
        if status in (0, 1, 2):
            return status
        if stopping:
            return 0 if status in (128 + signal.SIGINT, 128 + signal.SIGTERM) else 1
        tell(f'error: {run.folder}: its process was killed; the same command goes on with it')
        return 1
    with ThreadPoolExecutor(jobs) as pool:                         # a thread waits for each
        return max(pool.map(train_apart, runs), default=0)


def stop(number, _=None):
    """What Ctrl-C, and the SIGTERM of Slurm and Docker, do: this process and the others that it has
    started stop between two iterations, saved. A second Ctrl-C ends at once."""
    if STOP.number and number == signal.SIGINT:
        for process in STOP.children:
            process.kill()
        raise KeyboardInterrupt
    STOP.number = STOP.number or number
    for process in STOP.children:
        process.stdin.close()
    if number == signal.SIGINT:
        with contextlib.suppress(OSError):   # not print: the signal may have interrupted one
            os.write(2, b'\nstopping after this iteration; Ctrl-C again ends at once\n')


def main(arguments):
    """Exits with 0; 1 where a run has diverged or was killed; 2 after a UserError; 128 + the number
    of the signal that has stopped it."""
    if WORLD_SIZE == 1:                  # under torchrun a signal ends at once; ckpt.pt is there
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
    if arguments[:1] == ['--train_one']:
        be_a_child(arguments[1])
    from_line, files = configurator.parse(TrainConfig, arguments, __doc__)
    runs = plan_runs(keys_of(files), from_line)
    c = runs[0]                          # for the keys that all runs share
    if WORLD_SIZE > 1:
        dist.init_process_group()

    # all runs are settled before the first trains: a mistake in the last shows at once
    on_cpu = configurator.choose_device(c.device).type == 'cpu'
    jobs = min(len(runs), c.jobs or (configurator.usable_cores() if on_cpu else 1))
    jobs = 1 if c.eval_only or WORLD_SIZE > 1 else jobs
    begun_at = [settle(run, jobs) for run in runs]                 # iterations
    outcomes = [None if c.eval_only else outcome_of(run) for run in runs]
    to_train = [run for run, outcome in zip(runs, outcomes) if outcome is None]
    for run, outcome in zip(runs, outcomes):
        if outcome == 'diverged':
            tell(f'error: {run.folder}: has diverged; {ANEW}')
    with tqdm(total=sum(run.max_iters * run.tokens_per_iter for run in runs),
              initial=sum(n * run.tokens_per_iter for run, n in zip(runs, begun_at)),
              unit='tok', unit_scale=True, dynamic_ncols=True, leave=False,
              disable=True if RANK > 0 or c.eval_only or not sys.stderr else None) as bar:
        def note(tokens, loss):
            with bar.get_lock():         # runs side by side have a thread each
                bar.set_postfix_str(f'loss {loss:.3f}', refresh=False)
                bar.update(tokens)
        if jobs > 1:
            status = train_side_by_side(to_train, jobs, note)
        else:
            status = train_one_by_one(to_train, note)
    if status == 2:
        sys.exit(2)
    if STOP.number:
        print(f'\nstopped{" and saved" if status == 0 else ""}; the same command goes on')
        sys.exit(128 + STOP.number)
    if RANK == 0 and not c.eval_only and any(os.path.exists(run.path('log.jsonl')) for run in runs):
        sample.show_results(c.out_dir)
        print(f'to see this again: python sample.py {shlex.quote(c.out_dir)}')
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    sys.exit(1 if 'diverged' in outcomes else status)


if __name__ == '__main__':
    configurator.run(main)
