"""
Train a GPT whose MLP is aoe, moe or dense, on a CPU, on one GPU or on several,
and draw how the variants compare.

    python train.py config/quick_start.py             # four runs, side by side
    python train.py config/quick_start.py --mlp=moe --max_iters=500
    python train.py config/quick_start.py --init_from=resume   # go on
    python train.py --n_layer=6 --n_embd=384 --d_low=64   # no file: defaults
    torchrun --nproc_per_node=8 train.py config/openwebtext.py   # eight GPUs

Each run writes <out_dir>/<run>/config.json, log.jsonl (a line per evaluation),
ckpt.pt (to resume from) and best.pt (the lowest validation loss). In <out_dir>
are pictures of all runs found there: loss.png, drawn after each evaluation, and
expert_load, norm and expert_class at the end. The table of the end is there as
results.jsonl, a line for each run and seed.
"""

import signal

if __name__ == '__main__':               # Ctrl-C while the next lines import: end without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from tqdm import tqdm

try:
    import fcntl
except ImportError:                      # Windows
    fcntl = None

import configurator
import model as model_file
from configurator import (UserError, check_type, expect, is_folder_name, parse, read_config_file,
                          read_text, replacing, write_text)
from model import GPT, GPTConfig, entropy
from prepare_data import load_meta

# torchrun starts WORLD_SIZE processes of this script. They share the batches of an iteration, and
# their gradients are averaged; the one with RANK 0 evaluates, saves, draws and prints.
RANK, WORLD_SIZE = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


@dataclass
class Recipe(GPTConfig):
    """The keys that shape a result, which a resumed run can't change: the model's, then these."""
    # training
    batch_size: int = 16                 # sequences of block_size tokens, in the model at once
    gradient_accumulation_steps: int = 1   # batches in an iteration; each has an L_aux of its own
    learning_rate: float = 2e-3          # the highest, reached after the warm-up
    min_lr: float | None = None          # the lowest; None: a tenth of learning_rate
    warmup_iters: int = 100              # iterations of linear warm-up
    lr_decay_iters: int | None = None    # where the cosine reaches min_lr; None: at max_iters
    weight_decay: float = 0.1            # AdamW's, on matrices alone
    beta1: float = 0.9                   # AdamW's average of gradients
    beta2: float = 0.95                  # AdamW's average of their squares
    grad_clip: float = 1.0               # largest norm of all gradients together; 0: no limit
    eval_interval: int = 250             # iterations between evaluations
    eval_iters: int = 50                 # batches in an evaluation, the same every time
    seed: int = 1337                     # of the first weights, the batches and dropout
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'   # auto: what is fast here


@dataclass
class TrainConfig(Recipe):
    """Every key of a training run: the recipe's, then how long, how often and where."""
    # data
    dataset: str = 'shakespeare'         # the folder of data_dir to train on
    data_dir: str = 'data'               # where prepare_data.py wrote it
    # how long, how often
    max_iters: int = 2000                # iterations, one step of the optimizer each
    log_interval: int = 10               # iterations between updates of the progress bar's loss
    eval_only: bool = False              # evaluate the checkpoint that is there and write nothing
    init_from: Literal['scratch', 'resume', 'auto'] = 'scratch'   # auto: resume, if there is one
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
        except ValueError as error:                                # the model's numbers don't fit
            raise UserError(str(error)) from None
        if self.min_lr is None:
            self.min_lr = self.learning_rate / 10
        if self.name is None:
            self.name = self.mlp
        expect(self, ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters',
                      'log_interval', 'max_iters', 'learning_rate', 'lr_decay_iters', 'threads',
                      'jobs'), 'a positive number', lambda n: 0 < n < 2**31)
        expect(self, ('min_lr', 'warmup_iters', 'weight_decay', 'grad_clip', 'seed'),
               '0 or more, below 2^63', lambda n: 0 <= n < 2**63)
        expect(self, 'gradient_accumulation_steps', f'a multiple of the {WORLD_SIZE} processes, '
               'which share them', lambda n: n % WORLD_SIZE == 0)
        expect(self, 'threads', f'at most the {os.cpu_count()} of this machine',
               lambda n: n <= os.cpu_count())
        expect(self, ('beta1', 'beta2'), 'at least 0 and below 1', lambda beta: 0 <= beta < 1)
        expect(self, 'out_dir', 'a folder to write to', lambda out_dir: out_dir)
        # a name labels plots, where $ and a first _ mean something, and cells of tables
        expect(self, 'name', 'the name of a folder in out_dir, without $ or | and no _ first',
               lambda name: is_folder_name(name) and name.isprintable() and name[0] != '_'
               and not {'$', '|'} & {*name} and not name.endswith(('.jsonl', '.png')))

    @property
    def folder(self):
        """The folder that the run writes to."""
        return os.path.join(self.out_dir, f'{self.name}-{self.seed}' if self.seeds else self.name)

    def path(self, file):
        return os.path.join(self.folder, file)


def plan_runs(from_file, from_line):
    """The TrainConfigs that the keys of a config file and of the command line ask for: one for each
    entry of `runs`, or of mlp's list, and for each of `seeds`; all with one seed, then with the
    next. The line wins over the file, but a key that is both on the line and in an entry of
    `runs` is refused; --mlp replaces the file's runs:

        {'runs': {'a': {'mlp': 'aoe'}, 'm': {'mlp': 'moe'}}, 'seeds': (1, 2)}  ->  a-1 m-1 a-2 m-2
        {'mlp': 'aoe,moe'}  ->  aoe moe
    """
    values = from_file | from_line
    runs, only, seeds = values.pop('runs', None), values.pop('name', None), values.get('seeds')
    if seeds and 'seed' in values:
        raise UserError('seed: expected seed or seeds, got both')
    if {'mlp', 'runs'} <= from_line.keys():
        raise UserError('mlp: expected mlp or runs, got both')
    if runs is None or 'mlp' in from_line:
        runs = {mlp: {'mlp': mlp} for mlp in values.pop('mlp', TrainConfig.mlp).split(',')}
    if not runs or only is not None and len(runs) > 1:
        raise UserError(f'runs: expected one at least, and one alone with --name, got {len(runs)}')
    # no entry of `runs` may have these, nor what the line gives: whose value would win?
    not_of_one_run = {'runs', 'name', 'seed', 'seeds', 'out_dir', 'jobs'}
    not_of_one_run |= from_line.keys() - {'mlp'}

    planned = {}                         # folder -> its run
    for seed in seeds or [values.get('seed', TrainConfig.seed)]:
        seed = check_type(TrainConfig, 'seed', seed, 'seeds, ')
        for name, differs in runs.items():
            where = f'runs, {name}: '
            if not isinstance(differs, dict):
                raise UserError(f'{where}expected a dict of keys, got {differs!r}')
            own = {key: check_type(TrainConfig, key, differs[key], where) for key in differs}
            for key in not_of_one_run & own.keys():
                raise UserError(f'{where}expected keys of one run, got {key}, which all share')
            run = TrainConfig(**values | own | {'name': only or name, 'seed': seed})
            if planned.setdefault(run.folder, run) is not run:
                raise UserError(f'seeds: expected each once, got two runs for {run.folder}')
    return list(planned.values())


# -----------------------------------------------------------------------------
# data

CLASSES = ('letters', 'capitals', 'spaces', 'line ends', 'other')


def class_of(character):
    """The place in CLASSES of a character; digits and punctuation are others."""
    if character.isalpha():
        return CLASSES.index('capitals' if character.isupper() else 'letters')
    if character in '\r\n':
        return CLASSES.index('line ends')
    return CLASSES.index('spaces' if character.isspace() else 'other')


def random_of(seed, iteration, micro_step):
    """Random numbers that depend on these three alone, so that resuming needs no state of them."""
    return np.random.default_rng((seed, iteration, micro_step))


class Data:
    """The tokens of a data set, and batches of them: inputs, targets (batch_size, block_size)."""

    def __init__(self, config, device):
        folder = os.path.join(config.data_dir, config.dataset)
        self.config, self.device, self.meta = config, device, load_meta(folder)
        self.class_of_token = torch.tensor([class_of(c) for c in self.meta['vocabulary'] or ''],
                                           device=device)
        self.tokens = {}
        for split in ('train', 'val'):
            path, expected = os.path.join(folder, f'{split}.bin'), self.meta[f'{split}_tokens']
            size = os.path.getsize(path) if os.path.exists(path) else 'no file'
            if size != 2 * expected:
                raise UserError(f'{path}: expected {2 * expected} bytes, got {size}; '
                                f'remove {folder} and run prepare_data.py again')
            if expected <= config.block_size:
                raise UserError(f'{path}: expected more than block_size = {config.block_size} '
                                f'tokens, got {expected}; lower it or prepare a longer text')
            self.tokens[split] = np.memmap(path, dtype=np.uint16, mode='r')
        expect(config, 'batch_size', f'at most as many sequences as {folder} has tokens',
               lambda n: n <= len(self.tokens['train']))

    def batch(self, split, starts):
        """The batch of the windows that begin at starts."""
        window = np.asarray(starts)[:, None] + np.arange(self.config.block_size + 1)
        window = self.tokens[split][window].astype(np.int64)       # (batch_size, block_size + 1)
        if window.max() >= self.meta['vocab_size']:
            raise UserError(f'{split}.bin of {self.config.dataset}: expected tokens below '
                            f'vocab_size = {self.meta["vocab_size"]}, got {window.max()}; '
                            'remove the folder and run prepare_data.py again')
        window = torch.from_numpy(window).to(self.device)
        return window[:, :-1], window[:, 1:]

    def train_batch(self, iteration, micro_step):
        """A random batch, the same for the same seed."""
        last = len(self.tokens['train']) - self.config.block_size
        random = random_of(self.config.seed, iteration, micro_step)
        return self.batch('train', random.integers(0, last, self.config.batch_size))

    def eval_batches(self, split):
        """At most eval_iters batches of 'train' or 'val', of windows spread evenly over the text:
        the same for all runs. 'test' are windows of the validation text, midway between those of
        'val': no evaluation on the way has seen them. In a short text there is no room for any."""
        size, S = self.config.batch_size, self.config.block_size
        source = 'val' if split == 'test' else split
        tokens = len(self.tokens[source])
        n = min(self.config.eval_iters, math.ceil(tokens / (size * S)))   # once each is enough
        starts = np.linspace(0, tokens - S - 1, n * size, dtype=np.int64)
        if split == 'test':
            # a window of S + 1 tokens has to fit between two; n * size have n * size - 1 gaps
            room = starts[-1] / max(1, n * size - 1) >= 2 * (S + 1)
            n = n - 1 if room else 0
            starts = ((starts[:-1] + starts[1:]) // 2)[:n * size]
        for batch in starts.reshape(n, size):
            yield self.batch(source, batch)

    def classes(self, idx):
        """The place in CLASSES of each token of idx, flat; None where they are no characters."""
        return self.class_of_token[idx.flatten()] if self.meta['vocabulary'] else None


# -----------------------------------------------------------------------------
# evaluation

def measure(routing, classes, config):
    """What is measured from the Routing of a batch, as tensors to be added up over batches.

    classes (T,): of each token; None where the tokens are no characters.
    """
    E = config.n_expert
    chosen = routing.chosen.masked_fill(routing.chosen < 0, E)     # nobody (-1) counts as expert E
    used = F.one_hot(chosen, E + 1)[..., :E].sum(2).float()        # who handles what: (L, T, E)
    kind = used.new_zeros(used.shape[1], 0)                        # of which class: (T, 0)
    if classes is not None:
        kind = F.one_hot(classes, len(CLASSES)).float()            # (T, classes)
    is_norm = config.mlp == 'aoe'                                  # a router's are not logged
    return {
        'tokens': torch.tensor(used.shape[1]),                     # T
        'used': used.sum(1),                                       # T f of Eq. 6: (L, E)
        'ent_conf': entropy(routing.scores).mean(1),               # Eq. 8: (L,)
        'norm': routing.scores.mean(1)[:, :E if is_norm else 0],   # (L, E), or (L, 0)
        'aux_loss': routing.aux_loss.sum(),
        'handled': kind.T @ used,                                  # (L, classes, E)
        'of_class': kind.sum(0).unsqueeze(1),                      # (classes, 1)
    }


@torch.no_grad()
def evaluate(model, data, autocast, splits=('train', 'val')):
    """Mean cross-entropy (nats per token) on the splits, and on 'val' what the experts did."""
    model.eval()
    entry, measured = {}, []
    for split in splits:
        losses = []
        for idx, targets in data.eval_batches(split):
            with autocast:
                _, loss, routing = model(idx, targets)
            losses.append(loss)
            if split == 'val' and model.config.mlp != 'dense':
                measured.append(measure(routing, data.classes(idx), model.config))
        if losses:
            entry[f'{split}_loss'] = torch.stack(losses).mean().item()
    model.train()
    if not measured:                                               # dense
        return entry | {'aux_loss': 0.0, 'load': [], 'ent_load': [], 'ent_conf': [], 'norm': [],
                        'class_load': [], 'experts_per_token': []}
    total = {key: torch.stack([m[key] for m in measured]).sum(0).cpu() for key in measured[0]}
    batches, used = len(measured), total['used']
    load = used / used.sum(1, keepdim=True)
    found = {'load': load, 'ent_load': torch.special.entr(load).sum(1),        # Eq. 7
             'ent_conf': total['ent_conf'] / batches, 'norm': total['norm'] / batches,
             'class_load': (total['handled'] / total['of_class']).nan_to_num(),
             'experts_per_token': used.sum(1) / total['tokens'],
             'aux_loss': total['aux_loss'] / batches}
    return entry | {key: value.tolist() for key, value in found.items()}


# -----------------------------------------------------------------------------
# training

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


class Diverged(UserError):
    """A loss or a weight is not finite. The other runs go on."""


def train(config, stop, make_bar=tqdm):
    """Train one run, from scratch or from its checkpoint, until max_iters or until stop is set. Or
    evaluate its checkpoint and write nothing, for eval_only. Raises UserError, also as Diverged."""
    c, device, checkpoint = config, choose_device(config.device), None
    if c.threads:
        torch.set_num_threads(c.threads)
    if os.path.exists(c.path('ckpt.pt')) or c.eval_only:
        if c.init_from == 'scratch' and not c.eval_only:           # it came after main looked
            tqdm.write(f'{c.folder}: another process has trained it; left as it is')
            return
        checkpoint = load_checkpoint(c.path('ckpt.pt'), device, 'optimizer', 'scaler')
    data = Data(c, device)
    recipe = settle(c, device, data, checkpoint)   # and c's vocab_size, dtype, lr_decay_iters ...

    torch.manual_seed(c.seed)
    model = GPT(c).to(device)
    forward = torch.compile(model) if c.compile else model
    if WORLD_SIZE > 1:
        forward = torch.nn.parallel.DistributedDataParallel(forward)
    optimizer = make_optimizer(model, c, device)
    dtype = getattr(torch, c.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    # float16 has few exponents: losses are scaled up, gradients back, and a step is skipped and
    # the scale halved where something overflowed. For other dtypes the scaler does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    iteration, seconds, log = 0, 0.0, []
    if checkpoint:
        iteration, seconds, log = (checkpoint[key] for key in ('iter', 'seconds', 'log'))
        load_state(model, optimizer, scaler, checkpoint, c.path('ckpt.pt'))
    facts = facts_of(c, model) | {'recipe': recipe}                # for config.json
    describe(c, facts, device)
    if c.eval_only:
        report(c, {'iter': iteration, **evaluate(model, data, autocast)})
        return
    # finished, and log.jsonl is whole: nothing is left to do
    if log and log[-1]['iter'] == iteration == c.max_iters and log == read_log(c.path('log.jsonl')):
        report(c, log[-1])
        return
    lock = make_folder(c)                                          # held until the run has ended
    # another process trains this run, or has trained it since we looked above
    if lock is None or RANK == 0 and not checkpoint and os.path.exists(c.path('ckpt.pt')):
        if WORLD_SIZE > 1:               # whose other processes would wait for this one
            raise UserError(f'{c.folder}: expected to be alone with it, got another that trains it')
        tqdm.write(f'{c.folder}: another process trains it; left to that')
        return

    micro_steps = range(RANK, c.gradient_accumulation_steps, WORLD_SIZE)       # of this process
    tokens_per_iter = c.gradient_accumulation_steps * c.batch_size * c.block_size
    bar = make_bar(total=c.max_iters * tokens_per_iter, initial=iteration * tokens_per_iter,
                   desc=os.path.basename(c.folder), unit='tok', unit_scale=True, dynamic_ncols=True,
                   disable=True if RANK else None)                 # None: without a terminal
    clock = time.perf_counter()
    while True:
        # every eval_interval iterations, and at the end: look, save, log and draw
        ended, stopped = iteration >= c.max_iters, stop.is_set()
        if (iteration % c.eval_interval == 0 or ended or stopped) and RANK == 0:
            refuse_not_finite(c, model, iteration, facts)
            seconds += time.perf_counter() - clock                 # the clock stands still here
            evaluated = bool(log) and log[-1]['iter'] == iteration
            if not evaluated and not stopped:
                splits = ('train', 'val', 'test') if ended else ('train', 'val')
                log.append({'iter': iteration, 'tokens': iteration * tokens_per_iter,
                            'seconds': seconds, **evaluate(model, data, autocast, splits),
                            'lr': learning_rate_at(iteration, c)})
                refuse_not_finite(c, model, iteration, facts, log[-1])
            save(c, 'ckpt.pt', model, data, recipe, iter=iteration, seconds=seconds, log=log,
                 optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            lowest = min((entry['val_loss'] for entry in log), default=None)
            if log and log[-1]['iter'] == iteration and log[-1]['val_loss'] == lowest:
                save(c, 'best.pt', model, data, recipe)
            write_text(c.path('log.jsonl'), as_lines(log))
            write_config(c, facts, iter=iteration)
            if not evaluated and not stopped:
                report(c, log[-1])
                draw(c.out_dir, ['loss.png'])
            clock = time.perf_counter()
        if ended or stopped:
            break

        # one iteration: the gradients of its batches, then a step of the optimizer
        for parameters in optimizer.param_groups:
            parameters['lr'] = learning_rate_at(iteration, c)
        for micro_step in micro_steps:
            idx, targets = data.train_batch(iteration, micro_step)
            # dropout's seed, so that a resumed run drops the same
            torch.manual_seed(random_of(c.seed, iteration, micro_step).integers(2**63))
            if WORLD_SIZE > 1:           # processes average their gradients once an iteration
                forward.require_backward_grad_sync = micro_step == micro_steps[-1]
            with autocast:
                loss, routing = forward(idx, targets)[1:]          # logits go before backward
            scaler.scale((loss + routing.aux_loss.sum()) / len(micro_steps)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        iteration += 1

        if iteration % c.log_interval == 0:
            refuse_not_finite(c, model, iteration, facts)          # one pass over the weights
            bar.set_postfix_str(f'loss {loss.item():.3f}', refresh=False)
        bar.update(tokens_per_iter)
    bar.close()
    lock.close()


def refuse_not_finite(config, model, iteration, facts, entry=None):
    """Raise Diverged if a weight is not finite, or a loss of this evaluation, and note it in
    config.json. (A loss that is not finite makes the weights so in the next step.)"""
    losses = [value for key, value in (entry or {}).items() if key.endswith('_loss')]
    if all(p.isfinite().all() for p in model.parameters()) and all(map(math.isfinite, losses)):
        return
    if RANK == 0:
        write_config(config, facts, diverged=iteration)
    raise Diverged(f'{config.folder}: expected finite losses and weights, got others by iteration '
                   f'{iteration}. ckpt.pt is from before. '
                   f'Train anew with --name=, below --learning_rate={config.learning_rate:g}')


def report(config, entry):
    """One line about an evaluation, above the progress bars."""
    name = os.path.basename(config.folder)
    balance = f'   Ent_load {statistics.mean(entry["ent_load"]):.3f}' if entry['ent_load'] else ''
    tqdm.write(f'{name:<12} iter {entry["iter"]:>6,}   train loss {entry["train_loss"]:.4f}   '
               f'val loss {entry["val_loss"]:.4f}{balance}')


def facts_of(config, model):
    """For config.json: what the run is called and how large the model is."""
    return {'name': config.name, 'seed': config.seed, 'dataset': config.dataset,
            'total_parameters': model.total_parameters(),
            'active_parameters': model.active_parameters(),
            'flops_per_token': model.flops_per_token()}


def describe(config, facts, device):
    """Print what the model is and how it is trained."""
    c, tokens = config, config.gradient_accumulation_steps * config.batch_size * config.block_size
    at_most = 'at most ' if c.select == 'top_p' else ''
    tqdm.write(f'\n{c.name}: {facts["total_parameters"]:,} parameters, {at_most}'
               f'{facts["active_parameters"]:,} active, '
               f'{facts["flops_per_token"] / 1e6:.1f} MFLOPs per token\n'
               f'{c.max_iters:,} iterations of {tokens:,} tokens, {device}, {c.dtype}, seed '
               f'{c.seed}\nin {c.folder}')
    if c.lr_decay_iters != c.max_iters:
        tqdm.write(f'the learning rate falls to {c.min_lr:g} at iteration {c.lr_decay_iters:,}: '
                   '--lr_decay_iters')


# -----------------------------------------------------------------------------
# a run's files: ckpt.pt is the latest state, best.pt the weights with the lowest validation loss;
# both hold the recipe, all that shapes the result

# may differ where a run goes on; the recipe then says 'cpu then cuda'
MAY_CHANGE = ('device', 'processor', 'torch', 'model.py', 'train.py')


def hash_of(path):
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()[:8]


HASHES = {'model.py': hash_of(model_file.__file__), 'train.py': hash_of(__file__)}   # as imported


def settle(config, device, data, checkpoint):
    """Decide what the configuration leaves open: as in the checkpoint, if there is one.

    Returns the recipe: all that shapes the result of a run, its keys, the data, the machine and the
    code. Runs that are equal in it, but for the seed, are seeds of one another. Raises UserError
    where a run would go on with another recipe; only evaluated, it tells what differs.
    """
    c, was, known = config, checkpoint['recipe'] if checkpoint else {}, data.meta['vocab_size']
    c.vocab_size = c.vocab_size or known
    expect(c, 'vocab_size', f'at least the {known} of {c.dataset}', lambda n: n >= known)
    c.lr_decay_iters = c.lr_decay_iters or was.get('lr_decay_iters') or c.max_iters
    if c.dtype == 'auto':
        c.dtype = was.get('dtype') or fast_dtype(c, device)
    if c.recompute is None:                                        # it changes no result
        c.recompute = device.type != 'cpu'
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)
                if field.name != 'recompute'}
    recipe = {key: getattr(c, key) for key in defaults} | {
        'sha256': data.meta['sha256'][:8], 'train_tokens': data.meta['train_tokens'],
        'val_tokens': data.meta['val_tokens'], 'device': device.type,
        'processor': processor_name(device), 'torch': str(torch.__version__), **HASHES}
    if not checkpoint:
        return recipe

    # a run that goes on: with the same recipe. A checkpoint may be older than a key
    was = defaults | was
    for key in MAY_CHANGE:
        was.setdefault(key, 'unknown')
        if was[key].split(' then ')[-1] != recipe[key]:
            tqdm.write(f'{c.folder}: {key} is {recipe[key]} now, and was {was[key]}')
            was[key] = f'{was[key]} then {recipe[key]}'
        recipe[key] = was[key]
    differ = [key for key in was | recipe if was.get(key) != recipe.get(key)]
    if checkpoint['meta']['vocabulary'] != data.meta['vocabulary'] or differ and not c.eval_only:
        told = ', '.join(f'{key} = {was.get(key)} and not {recipe.get(key)}' for key in differ)
        raise UserError(f'{c.path("ckpt.pt")}: expected what it was trained with, {told}; '
                        'leave it so, or train anew with --name=')
    for key in differ:
        tqdm.write(f'{c.folder}: evaluated with {key} = {recipe.get(key)}, trained with '
                   f'{was.get(key)}')
    if not c.eval_only:
        expect(c, 'max_iters', f'at least the {checkpoint["iter"]} iterations that {c.folder} has '
               '(--name= trains anew)', lambda n: n >= checkpoint['iter'])
    return recipe


def save(config, file, model, data, recipe, **more):
    content = {'model': model.state_dict(), 'meta': data.meta, 'recipe': recipe, **more}
    with replacing(config.path(file)) as part:
        torch.save(content, part)


def load_checkpoint(path, device, *required):
    """What `save` has written, with the keys `required` in it. Nothing in the file can run code."""
    if not os.path.exists(path):
        raise UserError(f'expected a checkpoint, got no file {path}; train one with train.py')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        whole = all(isinstance(checkpoint[key], dict)
                    for key in ('model', 'meta', 'recipe', *required))
    except Exception:                    # torch.load has many ways to find a file damaged
        whole = False
    if not whole:
        raise UserError(f'{path}: expected a checkpoint of this train.py, got a damaged or foreign '
                        'file; --name= trains anew, beside it')
    return checkpoint


def load_state(model, optimizer, scaler, checkpoint, path):
    load_weights(model, checkpoint, path)
    state = checkpoint['optimizer']
    was, now = ([(group.keys(), len(group['params'])) for group in groups]
                for groups in (state['param_groups'], optimizer.param_groups))
    if was != now:
        raise UserError(f'{path}: expected the state of the optimizer that train.py has now, got '
                        'that of another; train anew with --name=')
    optimizer.load_state_dict(state)
    scaler.load_state_dict(checkpoint['scaler'])


def load_weights(model, checkpoint, path):
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError:
        raise UserError(f'{path}: expected weights of a model of these settings and of this '
                        'model.py, got others') from None


def load_model(folder, device):
    """The best model of the run in folder, its tokenizer's meta, and the dtype it trained in."""
    path = os.path.join(folder, 'best.pt')
    checkpoint = load_checkpoint(path, device)
    recipe, keys = checkpoint['recipe'], {field.name for field in dataclasses.fields(GPTConfig)}
    try:
        model = GPT(GPTConfig(**{key: recipe[key] for key in keys & recipe.keys()}))
    except ValueError as error:
        raise UserError(f'{path}: expected a model of this model.py, got {error}') from None
    load_weights(model, checkpoint, path)
    return model.eval().to(device), checkpoint['meta'], getattr(torch, recipe['dtype'])


def write_config(config, facts, **more):
    write_text(config.path('config.json'), json.dumps(facts | more, indent=1))


def as_lines(entries):
    return ''.join(json.dumps(entry, allow_nan=False) + '\n' for entry in entries)


def read_log(path):
    """The evaluations in a log.jsonl, oldest first; none where there is no file, or a damaged one:
    ckpt.pt has them, too."""
    try:
        return [json.loads(line) for line in read_text(path).splitlines()]
    except ValueError:
        return []


def make_folder(config):
    """Make the folder of a run, for this process alone, and clear it of what a killed one left
    half-written. Returns the open file that holds the lock; None if another process has it."""
    try:
        os.makedirs(config.folder, exist_ok=True)
        lock = open(config.path('.lock'), 'w')
    except OSError as error:
        raise UserError(f'out_dir: expected a folder to write to, got {config.out_dir!r}: '
                        f'{error.strerror}') from None
    try:
        if fcntl and RANK == 0:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:                      # a file system without locks
        pass
    for file in os.listdir(config.folder):
        if file.endswith('.part') and RANK == 0:
            os.remove(config.path(file))
    return lock


def refuse_to_overwrite(runs):
    """Refuse, with a UserError, to write over a run, or to go on where there is none."""
    config, any_there = runs[0], False
    for run in runs:
        files = [f for f in ('ckpt.pt', 'best.pt', 'log.jsonl') if os.path.exists(run.path(f))]
        if not files:
            continue
        any_there = True
        if config.init_from == 'scratch' and not config.eval_only:
            raise UserError(f'{run.folder}: expected a new folder, got one that holds a run; '
                            '--init_from=resume goes on with it, --name= or --out_dir= keeps it')
        if 'ckpt.pt' not in files:
            raise UserError(f'{run.folder}: expected its ckpt.pt to go on from, got a run without; '
                            '--name= trains anew, beside it')
    if not any_there and (config.init_from == 'resume' or config.eval_only):
        raise UserError(f'{config.path("ckpt.pt")}: expected a checkpoint to go on from, got no '
                        'such file; train first, without --init_from=resume')


# -----------------------------------------------------------------------------
# the machine

def choose_device(name):
    """A torch.device that is there; 'auto' takes the fastest. Raises UserError."""
    if name == 'auto':
        version = tuple(int(part) for part in torch.__version__.split('.')[:2])
        name = 'cpu'
        if torch.backends.mps.is_available() and version >= (2, 14):   # before, its attention is
            name = 'mps'                                           # wrong: issues 174861, 195910
        if torch.cuda.is_available():
            name = 'cuda'
    if name == 'cuda' and WORLD_SIZE > 1:
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(name)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:   # not there, or unknown
        raise UserError(f'device: expected auto or one of this machine, got {name!r}: '
                        f'{str(error).splitlines()[0]:.80}') from None
    if device.type not in ('cpu', 'cuda', 'mps'):
        raise UserError(f'device: expected auto, cuda, mps or cpu, got {name!r}')
    return device


def processor_name(device):
    """What computes: the same settings end some 0.006 apart on two kinds of CPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(ValueError, KeyError):                # Linux says more
        lines = read_text('/proc/cpuinfo').partition('\n\n')[0].splitlines()
        info = dict(map(str.strip, line.split(':', 1)) for line in lines)
        name = f'{info["model name"]} ({info["cpu family"]}/{info["model"]})'
    return f'{name} {torch.backends.cpu.get_cpu_capability()}'


def cores():
    """How many this process may use: under taskset and in a container, too."""
    n = os.cpu_count()
    if hasattr(os, 'sched_getaffinity'):                           # Linux
        n = len(os.sched_getaffinity(0))
    quota, _, period = read_text('/sys/fs/cgroup/cpu.max').partition(' ')
    return max(1, min(n, math.ceil(int(quota) / int(period)) if quota.isdigit() else n))


def free_memory():
    """Bytes that this process and its children may still take; infinite where nobody tells."""
    free = math.inf
    for line in read_text('/proc/meminfo').splitlines():           # Linux
        if line.startswith('MemAvailable:'):
            free = 1024 * int(line.split()[1])
    most = read_text('/sys/fs/cgroup/memory.max').strip()          # of a container
    return min(free, int(most)) if most.isdigit() else free


def fast_dtype(config, device):
    """The name of the dtype of matmuls that auto stands for."""
    if device.type == 'cuda':            # T4 and V100 have float16 alone
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return 'bfloat16' if native else 'float16'
    if device.type != 'cpu' or WORLD_SIZE > 1:                     # a trial is for one process
        return 'float32'
    # an expert's matmuls, but none so small that its time is all overhead
    rows = max(256, config.batch_size * config.block_size * config.top_k // config.n_expert)
    D, d = max(96, config.n_embd), max(384, config.d_ffn)
    return 'bfloat16' if bfloat16_gain(rows, D, d) > 1.2 else 'float32'


@functools.cache
def bfloat16_gain(rows, D, d):
    """How many times as fast as in float32 this CPU multiplies an expert's matrices in bfloat16,
    forward and backward. Not every processor that has it is fast."""
    def seconds(dtype):
        x, w, dy = (torch.ones(size, dtype=dtype) for size in ((rows, D), (D, d), (rows, d)))
        timer = Timer('x @ w, dy @ w.T, x.T @ dy', globals={'x': x, 'w': w, 'dy': dy},
                      num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.15).median
    gain = seconds(torch.float32) / seconds(torch.bfloat16)
    tqdm.write(f'dtype: this CPU multiplies {gain:.2g} times as fast in bfloat16 as in float32')
    return gain


def keep_freed_memory():
    """Let glibc, where there is one, keep large freed blocks instead of returning them to the
    kernel, which clears them page by page when the next step asks again: that would take a quarter
    of a step's time."""
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4           # of glibc's malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)


# -----------------------------------------------------------------------------
# runs side by side: the matmuls of a small model are too small for two threads, so on a CPU a core
# trains a run of its own. The first process alone writes to the terminal; the others send it what
# train() prints, and what its progress bar does.

class Stop:
    """Whether to end, and save: once Ctrl-C or SIGTERM came, or the first process is gone."""

    def __init__(self):
        self.flag = multiprocessing.get_context('spawn').RawValue('b', 0)      # seen by all

    def set(self, signal_number=signal.SIGINT):
        self.flag.value = signal_number

    def is_set(self):
        parent = multiprocessing.parent_process()
        return bool(self.flag.value) or parent is not None and not parent.is_alive()


class Sender:
    """In a process of its own, sys.stdout and the progress bar: both send to the first process."""

    def __init__(self, connection):
        self.connection, self.text = connection, ''

    def send(self, *message):
        with contextlib.suppress(OSError):                         # it is gone: Stop tells the loop
            self.connection.send(message)

    def write(self, text):
        self.text += text
        if self.text.endswith('\n'):                               # whole lines
            self.send('write', self.text)
            self.text = ''

    def flush(self):
        pass

    def bar(self, **facts):
        self.send('bar', facts)
        return self

    def set_postfix_str(self, text, refresh):
        self.send('set_postfix_str', text, refresh)

    def update(self, tokens):
        self.send('update', tokens)

    def close(self):
        self.send('close')


def train_apart(config, stop, connection):
    """train() in a process of its own."""
    tqdm.set_lock(threading.RLock())     # its default is told as leaked, if this is killed
    sys.stdout = sender = Sender(connection)
    keep_freed_memory()
    try:
        train(config, stop, sender.bar)
    except UserError as error:
        sender.send('diverged' if isinstance(error, Diverged) else 'error', str(error))
    except (MemoryError, RuntimeError) as error:
        if not re.search('MemoryError|out of memory|allocate memory', repr(error)):
            raise
        sender.send('error', f'{config.folder}: expected enough memory, got {error!r:.100}; try '
                    'fewer --jobs, or a smaller --batch_size')


class Worker:
    """A run in a process of its own, as the first process sees it."""

    def __init__(self, run, stop, place):
        context = multiprocessing.get_context('spawn')             # the one way on all systems
        self.run, self.place, self.bar = run, place, None
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=train_apart, args=(run, stop, theirs))
        with ignoring_signals():                                   # and so does the process
            self.process.start()
        theirs.close()

    def fileno(self):                                              # for wait()
        return self.connection.fileno()

    def make_bar(self, facts):
        if 'JPY_PARENT_PID' in os.environ:                         # a notebook can't move up to it
            facts['disable'] = True
        self.bar = tqdm(**facts, position=self.place, leave=False)

    def end(self):
        """Returns what is wrong with how the process has ended, if anything is."""
        self.process.join()
        if self.bar is not None:
            self.bar.close()
        if self.process.exitcode:
            return (f'{self.run.folder}: its process ended with exit code {self.process.exitcode}; '
                    '--init_from=resume goes on with it')


def train_side_by_side(runs, jobs, stop):
    """Train runs in processes of their own, `jobs` at once, the longest first. Returns whether one
    has diverged or was killed; the others go on. Raises UserError for any other error in one of
    them, when all have ended."""
    waiting, at_work = sorted(runs, key=length_of, reverse=True), []
    failures, error = [], None
    try:
        while at_work or waiting and not stop.is_set():
            while waiting and len(at_work) < jobs and not stop.is_set():
                free = set(range(jobs)) - {worker.place for worker in at_work}
                at_work.append(Worker(waiting.pop(0), stop, min(free)))
            for worker in wait(at_work):
                failure = None
                try:
                    message, *values = worker.connection.recv()
                except (EOFError, OSError):                        # the process has ended
                    at_work.remove(worker)
                    failure = worker.end()
                else:
                    if message == 'write':
                        tqdm.write(values[0], end='')
                    elif message == 'bar':
                        worker.make_bar(values[0])
                    elif message == 'diverged':
                        failure = values[0]
                    elif message == 'error':
                        error = error or values[0]
                        stop.set()
                    else:                                          # set_postfix_str, update, close
                        getattr(worker.bar, message)(*values)
                if failure:
                    failures.append(failure)
                    tqdm.write(f'error: {failure}', file=sys.stderr)
    finally:
        for worker in at_work:                                     # after a second Ctrl-C
            worker.process.kill()
    if error:
        raise UserError(error)
    return bool(failures)


@contextlib.contextmanager
def ignoring_signals():
    before = {name: signal.signal(name, signal.SIG_IGN) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def length_of(config):
    """How long a run takes, roughly, to compare it with others."""
    c, per_flop = config, {'dense': 1, 'moe': 1.4, 'aoe': 1.6}     # on a CPU, at our sizes
    return (c.max_iters * c.gradient_accumulation_steps * c.batch_size * c.block_size * c.n_layer
            * c.n_embd * c.top_k * c.d_ffn * per_flop[c.mlp])


def memory_of(config):
    """Bytes that a run takes, roughly: PyTorch, four numbers a weight, what backward needs."""
    c = config
    weights = 3 * c.n_layer * c.n_expert * c.n_embd * c.d_ffn
    return 6e8 + 16 * weights + 400 * c.batch_size * c.block_size * c.n_layer * c.n_embd


def share_the_machine(runs):
    """How many of the runs to train at once. Decides their threads, and their dtype if it is auto,
    since bfloat16_gain's timing is right only as long as nothing else runs."""
    c, on_cpu = runs[0], choose_device(runs[0].device).type == 'cpu'
    room = free_memory() / max(map(memory_of, runs))
    jobs = c.jobs or (int(max(1, min(cores(), room))) if on_cpu else 1)
    jobs = 1 if c.eval_only or WORLD_SIZE > 1 else min(jobs, len(runs))
    if jobs > 1:
        for run in runs:
            run.threads = run.threads or max(1, cores() // jobs)
            if run.dtype == 'auto' and not os.path.exists(run.path('ckpt.pt')):
                torch.set_num_threads(run.threads)
                run.dtype = fast_dtype(run, choose_device(run.device))
    return jobs


# -----------------------------------------------------------------------------
# results: what runs have left behind, read, brought together by seeds, in a table and in pictures

def read_result(folder):
    """What the run in folder has come to: its config.json, its last evaluation, its lowest loss,
    and its log."""
    facts = json.loads(read_text(os.path.join(folder, 'config.json')))
    log = read_log(os.path.join(folder, 'log.jsonl'))
    lowest = min(entry['val_loss'] for entry in log)
    return checked({'run': facts['name'], **facts, 'lowest_val_loss': lowest, **log[-1],
                    'log': log})


def checked(result):
    """result, if all is in it that tables need. Raises KeyError, TypeError or ValueError if not."""
    for entry in (result, *result.get('log', ())):
        numbers = [entry[key] for key in ('iter', 'tokens', 'seconds', 'val_loss')]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f'not finite: {numbers}')
        list(map(len, (entry['ent_load'], entry['ent_conf'], entry['norm'])))
    if not (math.isfinite(result['lowest_val_loss']) and isinstance(result['run'], str)
            and isinstance(result['seed'], int) and result['recipe']['mlp']):
        raise ValueError('no result')
    return result


def read_results(path):
    """The results of all runs in an out_dir, without those that can't be read, which it tells; or
    of all lines of a results.jsonl, which have no log. Raises UserError where it is neither."""
    results = {}                         # a run that stands in two folders counts once
    if os.path.isdir(path):
        for folder in sorted(os.listdir(path)):
            folder = os.path.join(path, folder)
            try:
                if read_text(os.path.join(folder, 'log.jsonl')):       # it has been evaluated
                    result = read_result(folder)
                    same = [result[key] for key in ('run', 'seed', 'iter', 'recipe')]
                    results[json.dumps(same, sort_keys=True)] = result
            except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
                tqdm.write(f'{folder} is left out: {error!r:.60}')
    else:
        for number, line in enumerate(read_text(path).splitlines(), 1):
            try:
                results[number] = checked(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f'{path}, line {number}: expected a line of a results.jsonl of '
                                f'train.py, got {error!r:.60}') from None
    if not results:
        raise UserError(f'{path}: expected an out_dir with runs, or a results.jsonl of train.py, '
                        'got neither')
    return list(results.values())


def group(results):
    """Run -> {seed: result}. Results are seeds of one run where name, recipe (but for the seed) and
    iteration are equal; other runs of the same name get what differs as part of it, such as
    'aoe (top_k 1)'. Raises UserError for one seed of one run twice."""
    groups = {}                          # name and facts as text -> (name, facts, {seed: result})
    for result in results:
        facts = result['recipe'] | {'seed': None, 'iter': result['iter']}
        if 'diverged' in result:
            facts['diverged at'] = result['diverged']
        key = result['run'] + json.dumps(facts, sort_keys=True)
        _, _, seeds = groups.setdefault(key, (result['run'], facts, {}))
        if result['seed'] in seeds:
            raise UserError(f'expected each run once, got {result["run"]!r}, seed '
                            f'{result["seed"]}, again')
        seeds[result['seed']] = result
    runs = {}
    for name, facts, seeds in groups.values():
        others = [other for another, other, _ in groups.values() if another == name]
        differ = [f'{key} {value}' for key, value in facts.items()
                  if key == 'diverged at' or any(other.get(key) != value for other in others)]
        label = name + (f' ({", ".join(differ)})' if differ else '')
        while label in runs:             # 0.0 and -0.0; a run that is called 'moe (top_k 1)'
            label += "'"
        runs[label] = seeds
    return runs


def losses_of(seeds, key='lowest_val_loss'):
    return [result[key] for result in seeds.values()]


def mean_and_spread(values, form='.4f'):
    """As text: the mean, and the standard deviation where there are several."""
    spread = f' ± {format(statistics.stdev(values), form)}' if len(values) > 1 else ''
    return format(statistics.mean(values), form) + spread


def print_rows(rows):
    """Rows of strings as a table, in the form of Markdown: numbers flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ['-' * width for width in widths], *rows[1:]]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:]))]
        print('| ' + ' | '.join(cells) + ' |')


def print_table(out_dir):
    """The runs of out_dir side by side; where a run has several seeds, mean and standard deviation.
    The last evaluation of each run goes to results.jsonl."""
    runs, lines = group(read_results(out_dir)), []
    table, notes = [('run', 'parameters', 'active', 'val loss', 'Ent_load', 'tokens/s')], []
    for name, seeds in runs.items():
        first, *_ = results = list(seeds.values())
        ent_load = [statistics.mean(result['ent_load']) for result in results if result['ent_load']]
        speeds = [result['tokens'] / result['seconds'] for result in results if result['tokens']]
        table.append((name, f'{first["total_parameters"]:,}', f'{first["active_parameters"]:,}',
                      'diverged' if 'diverged' in first else mean_and_spread(losses_of(seeds)),
                      f'{statistics.mean(ent_load):.3f}' if ent_load else '-',
                      f'{statistics.median(speeds):,.0f}' if speeds else '-'))
        last, lowest = (statistics.mean(losses_of(seeds, key)) for key in ('val_loss',
                                                                           'lowest_val_loss'))
        if last > 1.02 * lowest:
            notes.append(f'{name} ended at {last:.4f}, above its lowest')
        lines += [{key: value for key, value in result.items()
                   if key not in ('name', 'log', 'class_load')} for result in results]
    print()
    print_rows(table)
    print(f'\nval loss: the lowest; Ent_load: ln E where all is even; pictures in {out_dir}')
    print(''.join(f'{note}\n' for note in notes), end='')
    write_text(os.path.join(out_dir, 'results.jsonl'), as_lines(lines))


# Okabe and Ito's palette; a variant has the same colour in all pictures
COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']
COLOR_OF = {'dense': '#000000', 'moe': '#0072B2', 'aoe': '#D55E00', 'aoe_whole': '#009E73'}


def colors_of(names):
    others = [color for color in COLORS if color not in {COLOR_OF.get(name) for name in names}]
    rest = [name for name in names if name not in COLOR_OF]
    return COLOR_OF | {name: others[i % len(others)] for i, name in enumerate(rest)}


def draw(out_dir, files=None):
    """Draw pictures of all runs in out_dir, all of PICTURES or these files of it. What hinders is
    told in a line, and stops nobody."""
    for file in files or PICTURES:
        try:
            runs = group(read_results(out_dir))
            figure = PICTURES[file](pyplot(), runs, colors_of(runs))
            if figure:
                save_figure(figure, os.path.join(out_dir, file))
        except Exception as error:       # a picture is never worth a run
            tqdm.write(f'{file} is not drawn: {(str(error).splitlines() or [repr(error)])[0]}')


def pyplot():
    """Matplotlib, for files; not above, since it is slow to import and sample.py imports this."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt


def save_figure(figure, path):
    """Write a PNG of at most 2,400 pixels a side."""
    dpi = min(100, 2400 / max(figure.get_size_inches()))
    with replacing(path) as part:
        figure.savefig(part, format='png', dpi=dpi)
    pyplot().close(figure)


def draw_loss(plt, runs, color):
    """Validation loss over iterations, and over seconds: of each run the mean of its seeds, in a
    band of them all, with its name at the end of the line."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout='constrained')
    ends, without_first = [], []         # the first evaluation, of no training, may lie outside
    for i, (name, seeds) in enumerate(runs.items()):
        logs = [{entry['iter']: entry for entry in result['log']} for result in seeds.values()]
        iterations = sorted(set.intersection(*map(set, logs)))     # where all seeds were evaluated
        points = [[log[n]['val_loss'] for log in logs] for n in iterations]
        seconds = [statistics.mean(log[n]['seconds'] for log in logs) for n in iterations]
        means = [statistics.mean(losses) for losses in points]
        label = f'{name} {statistics.mean(losses_of(seeds)):.4f}'
        label += f', {len(seeds)} seeds' if len(seeds) > 1 else ''
        for axes, x in zip(panels, (iterations, seconds)):
            axes.plot(x, means, color=color[name], marker='.',
                      linestyle=('-', '--', ':')[i // len(COLORS) % 3])
            axes.fill_between(x, [min(losses) for losses in points],
                              [max(losses) for losses in points], color=color[name], alpha=0.2)
        ends.append((means[-1], color[name], (iterations[-1], label), (seconds[-1], name)))
        without_first += [loss for losses in points[1:] or points for loss in losses]
    low, high = min(without_first) - 0.05, max(without_first) + 0.05
    panels[0].set(title='same tokens', xlabel='iteration', ylim=(low, high),
                  ylabel='validation loss (nats per token)')
    panels[1].set(title='same seconds', xlabel='seconds of training')
    y = -math.inf
    for end, its_color, *labels in sorted(ends):                   # from below, none on another
        y = max(end, y + 0.04 * (high - low))
        for axes, (x, text), height in zip(panels, labels, (y, end)):
            axes.annotate(text, (x, height), (6, 0), textcoords='offset points', color=its_color,
                          fontsize=9, va='center', annotation_clip=False)
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure


def draw_layers(key, draw_panel, label):
    """A function that draws a row for each run that has logged `key` (its first seed), in it a
    panel for each layer, by draw_panel(axes, log, layer, color)."""
    def draw_figure(plt, runs, color):
        logs = {name: next(iter(seeds.values()))['log'] for name, seeds in runs.items()}
        logs = {name: log for name, log in logs.items() if any(log[-1][key])}
        if not logs:
            return None
        n_layer = max(len(log[-1][key]) for log in logs.values())
        figure, panels = plt.subplots(len(logs), n_layer, squeeze=False, sharex=True, sharey=True,
                                      figsize=(1.6 + 2.4 * n_layer, 0.9 + 1.3 * len(logs)),
                                      layout='constrained')
        for row, (name, log) in zip(panels, logs.items()):
            for layer, axes in enumerate(row):
                if layer >= len(log[-1][key]):
                    axes.set_visible(False)
                    continue
                axes.set_title(f'{name}, layer {layer + 1}', fontsize=9)
                image = draw_panel(axes, log, layer, color[name])
        if image is not None:            # of draw_class; all of its panels go from 0 to 1
            figure.colorbar(image, ax=panels, shrink=0.6)
        figure.supxlabel(label, fontsize=9)
        return figure
    return draw_figure


def draw_load(axes, log, layer, color):
    """Figure 3 of the paper: the load of each expert, against 1/E."""
    shares = log[-1]['load'][layer]
    axes.bar(range(len(shares)), shares, color=color)
    axes.axhline(1 / len(shares), color='black', linestyle='--', linewidth=1)
    axes.set_title(axes.get_title() + f'\nEnt_load {log[-1]["ent_load"][layer]:.2f}, '
                   f'Ent_conf {log[-1]["ent_conf"][layer]:.2f}', fontsize=9)


def draw_norm(axes, log, layer, color):
    """Figure 4 of the paper: the mean activation norm of every expert over training."""
    axes.plot([entry['iter'] for entry in log], [entry['norm'][layer] for entry in log],
              color=color, alpha=0.7)


def draw_class(axes, log, layer, color):
    """Who takes what: the share of each class of characters that each expert handled."""
    axes.set_yticks(range(len(CLASSES)), CLASSES, fontsize=8)
    return axes.imshow(log[-1]['class_load'][layer], cmap='cividis', vmin=0, vmax=1, aspect='auto')


PICTURES = {
    'loss.png': draw_loss,
    'expert_load.png': draw_layers('load', draw_load, 'expert; dashed: 1/E'),
    'norm.png': draw_layers('norm', draw_norm, 'iteration; a line: the mean norm of an expert'),
    'expert_class.png': draw_layers('class_load', draw_class,
                                    'expert; how much of a class of characters it handles'),
}


# -----------------------------------------------------------------------------

def main(arguments):
    from_line, files = parse(TrainConfig, arguments, __doc__)
    from_file = {}
    for file in files:
        from_file |= read_config_file(TrainConfig, file)
    runs, stop, failed = plan_runs(from_file, from_line), Stop(), False
    c = runs[0]
    if RANK == 0:
        refuse_to_overwrite(runs)
    keep_freed_memory()
    if WORLD_SIZE > 1:                   # here Ctrl-C ends at once; ckpt.pt is there to go on from
        dist.init_process_group()
        sys.stdout = open(os.devnull, 'w') if RANK else sys.stdout
    else:
        stop_on_signals(stop)

    jobs = share_the_machine(runs)
    if jobs > 1:
        failed = train_side_by_side(runs, jobs, stop)
    for run in runs if jobs == 1 else ():
        try:
            train(run, stop)
        except Diverged as error:                                  # the others go on
            if WORLD_SIZE > 1:           # not all processes may know, and would wait for this one
                raise
            failed = True
            tqdm.write(f'error: {error}', file=sys.stderr)
        if stop.is_set():
            break
    if stop.is_set():
        again = [argument for argument in arguments if not argument.startswith('--init_from=')]
        print('\nstopped and saved; to go on: '
              f'python train.py {shlex.join(again)} --init_from=resume')
        sys.exit(128 + stop.flag.value)
    if RANK == 0 and not c.eval_only and any(read_log(run.path('log.jsonl')) for run in runs):
        draw(c.out_dir)
        print_table(c.out_dir)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    sys.exit(failed)


def stop_on_signals(stop):
    """Ctrl-C, and the SIGTERM of Slurm and Docker, end between two iterations, saved; a second one
    ends at once."""
    def on_signal(number, _):
        stop.set(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


if __name__ == '__main__':
    configurator.run(main)
