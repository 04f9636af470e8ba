"""
Train a GPT whose MLP is aoe, moe or dense, on a CPU, on one GPU or on several, and show how the
variants compare.

    python train.py config/quick_start.py             # four runs, side by side
    python train.py config/quick_start.py --mlp=moe --max_iters=500 --out_dir=out/short
    python train.py config/small.py --mlp=moe,aoe --seeds=1,2,3 --out_dir=out/mine
    python train.py config/quick_start.py --init_from=resume   # go on
    torchrun --nproc_per_node=8 train.py config/openwebtext.py   # eight GPUs

Each run writes <out_dir>/<run>/config.json, log.jsonl (a line per evaluation), ckpt.pt (to resume
from) and best.pt (the lowest validation loss). In <out_dir> are pictures of all runs found there:
loss.png, drawn after each evaluation, and expert_load, norm and expert_class at the end. The table
of the end has with --seeds= a column `minus moe`. results.jsonl has a line for each run and seed.
"""

import ast
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import configurator
from configurator import (RANK, WORLD_SIZE, UserError, choose_device, expect, fast_dtype,
                          keep_freed_memory, parse, processor_name, read_config_file, read_text,
                          replacing, typed, usable_cores, write_text)
from model import GPT, GPTConfig, size_against_moe
from prepare_data import fingerprint, load_meta
from sample import (CLASSES, as_lines, class_of, draw, is_run_name, load_checkpoint, load_states,
                    read_results, show_results)

# torchrun starts WORLD_SIZE processes of this script. They share the batches of an iteration, and
# their gradients are averaged; the one with RANK 0 evaluates, saves, draws and prints.


# -----------------------------------------------------------------------------
# the configuration

@dataclass
class TrainConfig(GPTConfig):
    """Every key of a run: those of the model, then these."""
    # training
    batch_size: int = 16                 # sequences of block_size tokens, in the model at once
    gradient_accumulation_steps: int = 1   # batches in an iteration; each has an L_aux of its own
    max_iters: int = 2000                # iterations, one step of the optimizer each
    learning_rate: float = 2e-3          # the highest, reached after the warm-up
    min_lr: float | None = None          # the lowest; None: a tenth of learning_rate
    warmup_iters: int = 100              # iterations of linear warm-up
    lr_decay_iters: int | None = None    # where the cosine reaches min_lr; None: at max_iters
    weight_decay: float = 0.1            # of matrices
    beta1: float = 0.9                   # how slowly AdamW's average of gradients decays
    beta2: float = 0.95                  # and its average of their squares
    grad_clip: float = 1.0               # largest norm of all gradients together; 0: no limit
    seed: int = 1337                     # of the first weights, the batches and dropout
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'   # auto: what is fast here
    # evaluation
    eval_interval: int = 250             # iterations between evaluations
    eval_iters: int = 50                 # batches in an evaluation, the same every time
    eval_only: bool = False              # evaluate the checkpoint that is there and write nothing
    log_interval: int = 10               # iterations between checks that all weights are finite
    # data
    dataset: str = 'shakespeare'         # the folder of data_dir to train on
    data_dir: str = 'data'               # where prepare_data.py wrote it
    # runs
    out_dir: str = 'out/default'         # each run writes to a folder of its own in here
    name: str | None = None              # of the run, and of its folder; None: its mlp
    init_from: Literal['scratch', 'resume', 'auto'] = 'scratch'   # auto: resume, if there is one
    runs: dict | None = None             # run name -> the keys in which it differs
    seeds: tuple | None = None           # train every run with each of these seeds
    jobs: int | None = None              # runs trained side by side; None: CPU, a core each; GPU, 1
    # machine
    device: str = 'auto'                 # auto: cuda, else mps, else cpu
    threads: int | None = None           # of the CPU, for each run; None: all, shared by the jobs
    compile: bool = False                # torch.compile: 20 seconds at the start of each run

    def __post_init__(self):
        super().__post_init__()
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
        expect(self, 'threads', f'at most the {os.cpu_count()} cores of this machine',
               lambda n: n <= os.cpu_count())
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


def plan_runs(from_file, from_line):
    """The TrainConfigs that the keys of a config file and of the command line ask for:

        {'mlp': 'aoe,moe'}                                                     ->  aoe moe
        {'runs': {'a': {'mlp': 'aoe'}, 'm': {'mlp': 'moe'}}, 'seeds': (1, 2)}  ->  a-1 m-1 a-2 m-2

    The line wins over the file, and --mlp replaces the file's runs. A key that is both on the line
    and in an entry of `runs` is refused. Raises UserError."""
    given = from_file | from_line
    runs, the_name = given.pop('runs', None), given.pop('name', None)
    seeds = given.get('seeds')           # each run keeps this key: its folder is called by its seed
    if seeds and 'seed' in given:
        raise UserError('seed: expected seed or seeds, got both')
    if {'mlp', 'runs'} <= from_line.keys():
        raise UserError('mlp: expected mlp or runs, got both')
    if runs is None or 'mlp' in from_line:
        names = given.pop('mlp', TrainConfig.mlp).split(',')
        runs = {name: {'mlp': name} for name in names}
        if len(runs) < len(names):
            raise UserError(f'mlp: expected each once, got {",".join(names)}')
    if not runs or (the_name is not None and len(runs) > 1):
        raise UserError(f'runs: expected one at least, and one alone with --name, got {len(runs)}')
    # what no entry of `runs` may have: what all runs share, and what is on the line
    shared = {'runs', 'name', 'seed', 'seeds', 'out_dir', 'jobs', 'init_from', 'eval_only',
              'device'} | (from_line.keys() - {'mlp'})

    planned = {}                         # folder -> its run
    for seed in seeds or [given.get('seed', TrainConfig.seed)]:
        seed = typed(TrainConfig, 'seed', seed, 'seeds, ')
        for name, differs in runs.items():
            where = f'runs, {name}: '
            if not (isinstance(name, str) and isinstance(differs, dict)):
                raise UserError(f'{where}expected a name and a dict of keys, got {differs!r}')
            own = {key: typed(TrainConfig, key, value, where) for key, value in differs.items()}
            for key in shared & own.keys():
                raise UserError(f'{where}expected keys of one run, got {key}, which all share')
            try:
                called = name if the_name is None else the_name
                run = TrainConfig(**given | own | {'name': called, 'seed': seed})
            except ValueError as error:  # GPTConfig's errors are no UserErrors
                raise UserError(str(error)) from None
            if run.folder in planned:
                raise UserError(f'seeds: expected each once, got two runs for {run.folder}')
            planned[run.folder] = run
    return list(planned.values())


# -----------------------------------------------------------------------------
# data

@functools.cache
def checked_meta(folder):
    """The meta.json of a data set whose files are those that it describes. Raises UserError."""
    meta = load_meta(folder)
    for split in ('train', 'val'):
        path = os.path.join(folder, f'{split}.bin')
        if not os.path.exists(path) or fingerprint(path) != meta.get(f'{split}_sha256'):
            raise UserError(f'{path}: expected the tokens that meta.json describes, got others; '
                            f'remove {folder} and run prepare_data.py again')
    return meta


def random_of(seed, iteration, micro_step):
    """Random numbers that depend on these three alone, so that resuming needs no state of them."""
    return np.random.default_rng((seed, iteration, micro_step))


class Data:
    """The tokens of a data set, and batches of them: inputs, targets (batch_size, block_size)."""

    def __init__(self, config, device):
        folder = os.path.join(config.data_dir, config.dataset)
        self.config, self.device, self.meta = config, device, checked_meta(folder)
        self.class_of_token = torch.tensor([class_of(c) for c in self.meta['vocabulary'] or ''],
                                           device=device)
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
        split: 'train'; 'val'; or 'test', windows of the validation text halfway between those of
        'val'. They are evaluated once, at the end. A short text has no room for any."""
        size, S = self.config.batch_size, self.config.block_size
        source = 'val' if split == 'test' else split
        tokens = len(self.tokens[source])
        n = min(self.config.eval_iters, math.ceil(tokens / (size * S)))   # once each is enough
        starts = np.linspace(0, tokens - S - 1, n * size, dtype=np.int64)
        if split == 'test':
            # each has to fit between two windows of 'val', S + 1 tokens long as they are. There is
            # one such place fewer than windows, hence a batch fewer
            room = starts[-1] / max(1, n * size - 1) >= 2 * (S + 1)
            n = n - 1 if room else 0
            starts = ((starts[:-1] + starts[1:]) // 2)[:n * size]
        for batch in starts.reshape(n, size):
            yield self.batch(source, batch)


# -----------------------------------------------------------------------------
# evaluation

def measure(routing, classes, config):
    """What is measured from the Routing of a batch, as tensors to be added up over batches.
    classes (T,): the place in CLASSES of each token; None where the tokens are no characters."""
    E = config.n_expert
    chosen = routing.chosen.masked_fill(routing.chosen < 0, E)     # -1, nobody, becomes E
    used = F.one_hot(chosen, E + 1).sum(2)[..., :E].float()        # 1 where chosen: (L, T, E)
    measured = {
        'tokens': torch.tensor(used.shape[1]),                     # T
        'used': used.sum(1),                                       # T f of Eq. 6: (L, E)
        # Eq. 8: (L,); entr, unlike `entropy`, allows a score of -inf, as an edited p may have
        'ent_conf': torch.special.entr(routing.scores.softmax(-1)).sum(-1).mean(1),
        'aux_loss': routing.aux_loss.sum()}
    if config.mlp == 'aoe':
        measured['norm'] = routing.scores.mean(1)                  # (L, E)
    if classes is not None:
        is_class = F.one_hot(classes, len(CLASSES)).float()        # (T, classes)
        measured['handled'] = is_class.T @ used                    # (L, classes, E)
        measured['of_class'] = is_class.sum(0).unsqueeze(1)        # (classes, 1)
    return measured


@torch.no_grad()
def evaluate(model, data, autocast, splits=('train', 'val')):
    """Mean cross-entropy (nats per token) on the splits, and on 'val' what the experts did."""
    model.eval()
    # a line of log.jsonl has all of these, so that its readers need not ask
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
    if not measured:                                               # dense
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


class RunFailed(UserError):
    """A run has diverged, or its process was killed. The other runs go on."""


def train(config, stop, note):
    """Train one run, from scratch or from its ckpt.pt, until max_iters, or until stop.value is the
    number of a signal. Calls note(run, tokens done, loss). Raises UserError, also as RunFailed."""
    c, state = config, prepare(config)
    tell(description(state))
    if c.eval_only:
        entry = evaluate(state.model, state.data, state.autocast)
        tell(report(c, {'iter': state.iteration, **entry}))
        return
    clock, shown_loss = time.perf_counter(), math.nan
    while True:
        # every eval_interval iterations, and at the end: evaluate and save
        ended, stopped = state.iteration >= c.max_iters, stop.value > 0
        if RANK == 0 and (ended or stopped or state.iteration % c.eval_interval == 0):
            # evaluation is no training time; a GPU is done if log_interval divides eval_interval
            state.seconds += time.perf_counter() - clock
            look_and_save(state, ended, stopped)
            clock = time.perf_counter()
        if ended or stopped:
            return

        loss = one_iteration(state)
        state.iteration += 1
        if state.iteration % c.log_interval == 0:
            refuse_not_finite(state)
            shown_loss = loss.item()
        note(c, state.iteration * c.tokens_per_iter, shown_loss)


def prepare(config):
    """What a run needs and what training changes: model, optimizer, data; iteration, seconds, log.
    All as in its ckpt.pt, if there is one: resuming is wanted then (check_folders)."""
    c, path = config, config.path('ckpt.pt')
    device, dtype = choose_device(c.device), getattr(torch, c.dtype)
    keep_freed_memory()                  # of the C library: a quarter of a step's time on a CPU
    torch.set_num_threads(c.threads)
    torch.manual_seed(c.seed)
    model = GPT(c).to(device)
    state = SimpleNamespace(
        config=c, device=device, data=Data(c, device), model=model, iteration=0, seconds=0.0,
        log=[], optimizer=make_optimizer(model, c, device),
        autocast=torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        # float16 has few exponents: losses are scaled up, gradients back, and a step is skipped and
        # the scale halved where something overflowed. For other dtypes the scaler does nothing.
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16))
    state.forward = torch.compile(model) if c.compile else model
    if WORLD_SIZE > 1:
        state.forward = torch.nn.parallel.DistributedDataParallel(state.forward)
    recipe = recipe_of(c, state.data.meta, device)
    if os.path.exists(path):
        saved = load_checkpoint(path, device)
        load_states(saved, path, model=model, optimizer=state.optimizer, scaler=state.scaler)
        state.iteration, state.seconds, state.log = saved['iter'], saved['seconds'], saved['log']
        for key in MAY_CHANGE:           # a run that went on with other code is of both
            was, now = saved['recipe'].get(key), recipe[key]
            recipe[key] = was if last_of(was) == now else f'{was}, then {now}'
    state.result = {'run': c.name, 'seed': c.seed, 'dataset': c.dataset, 'recipe': recipe,
                    'total_parameters': model.total_parameters(),
                    'active_parameters': model.active_parameters(),
                    'flops_per_token': model.flops_per_token()}
    return state


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
            # [1:] keeps no name for the logits, the largest tensor: backward doesn't need them
            loss, routing = state.forward(idx, targets)[1:]
        state.scaler.scale((loss + routing.aux_loss.sum()) / len(micro_steps)).backward()
    state.scaler.unscale_(state.optimizer)
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), c.grad_clip or math.inf)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    return loss


def look_and_save(state, ended, stopped):
    """Evaluate the model, save the run, tell and draw its loss. Where the run was stopped, or was
    evaluated at this iteration before it was resumed, only save it."""
    c, log = state.config, state.log
    if stopped or (log and log[-1]['iter'] == state.iteration):
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
    # of all runs: whoever evaluates last has drawn them all
    draw(read_results(c.out_dir, tell), c.out_dir, ['loss.png'], tell)


def refuse_not_finite(state, entry=None):
    """Raise RunFailed if a weight is not finite, or a loss of this evaluation, and note it in
    config.json. A loss that is not finite makes the weights so in the next step; but in float16 the
    scaler skips such steps, and it shows in the next evaluation."""
    losses = [value for key, value in (entry or {}).items() if key.endswith('_loss')]
    weights = state.model.parameters()
    if all(map(math.isfinite, losses)) and all(weight.isfinite().all() for weight in weights):
        return
    c = state.config
    if RANK == 0:
        result = state.result | {'iter': state.iteration, 'diverged': state.iteration}
        write_text(c.path('config.json'), json.dumps(result, indent=1))
    raise RunFailed(f'{c.folder}: expected finite losses and weights, got others by iteration '
                    f'{state.iteration}. ckpt.pt is from before. '
                    f'Train anew with --name=, and less than --learning_rate={c.learning_rate:g}')


def description(state):
    """What the model is and how it is trained, in lines."""
    c, result = state.config, state.result
    size = f'{result["total_parameters"]:,} parameters'
    if c.factorised and abs(size_against_moe(c.n_embd, c.d_ffn, c.d_low) - 1) > 0.01:
        size += f' (an expert has {size_against_moe(c.n_embd, c.d_ffn, c.d_low):.3f} times moe\'s)'
    at_most = 'at most ' if c.select == 'top_p' else ''
    text = (f'\n{c.name}: {size}, {at_most}{result["active_parameters"]:,} active, '
            f'{result["flops_per_token"] / 1e6:.1f} MFLOPs per token\n'
            f'{c.max_iters:,} iterations of {c.tokens_per_iter:,} tokens, {state.device}, '
            f'{c.dtype}, seed {c.seed}\nin {c.folder}')
    if c.lr_decay_iters != c.max_iters:
        text += (f'\nthe learning rate falls to {c.min_lr:g} at iteration {c.lr_decay_iters:,} '
                 '(--lr_decay_iters, as it was at the start)')
    return text


def report(config, entry):
    """An evaluation, in a line."""
    balance = f'   Ent_load {statistics.mean(entry["ent_load"]):.3f}' if entry['ent_load'] else ''
    return (f'{os.path.basename(config.folder):<12} iter {entry["iter"]:>6,}   '
            f'train loss {entry["train_loss"]:.4f}   val loss {entry["val_loss"]:.4f}{balance}')


# -----------------------------------------------------------------------------
# a run's files, and its recipe: all that shapes its result

# keys that are not in a recipe, since a run may go on with others. (For dataset stands its sha256;
# for max_iters lr_decay_iters, and how far a run is.)
NOT_IN_RECIPE = {'recompute', 'max_iters', 'log_interval', 'eval_only', 'init_from', 'dataset',
                 'data_dir', 'out_dir', 'name', 'runs', 'seeds', 'jobs', 'device', 'threads',
                 'compile'}
# what may change where a run goes on, with a line that tells it
MAY_CHANGE = {'device', 'processor', 'torch', 'model.py', 'train.py'}


def hash_of(path):
    """Of the code in a file, without its comments and docstrings. (Python versions may differ in
    how they unparse it.)"""
    tree = ast.parse(read_text(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ''                                  # a docstring
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:8]


HASHES = {'model.py': hash_of(inspect.getsourcefile(GPT)), 'train.py': hash_of(__file__)}


def recipe_of(config, meta, device):
    """All that shapes the result of a run: its keys, the data, the machine and the code. Runs that
    are equal in it, but for the seed, are seeds of one another."""
    return {key: value for key, value in vars(config).items() if key not in NOT_IN_RECIPE} | {
        'sha256': meta['sha256'][:8], 'train_tokens': meta['train_tokens'],
        'val_tokens': meta['val_tokens'], 'device': device.type,
        'processor': processor_name(device), 'torch': str(torch.__version__), **HASHES}


def settle(config, jobs):
    """Decide the keys that the data, the machine or the run's checkpoint decide. Returns how many
    iterations the run has. Raises UserError where it would go on with another recipe."""
    c, device = config, choose_device(config.device)
    meta = checked_meta(os.path.join(c.data_dir, c.dataset))
    expect(c, 'block_size', f'less than the {meta["val_tokens"]} tokens of {c.dataset} for '
           'validation', lambda S: S < meta['val_tokens'])
    expect(c, 'batch_size', f'a batch below the {meta["train_tokens"]:,} training tokens of '
           f'{c.dataset}', lambda n: n * c.block_size <= meta['train_tokens'])
    begun = c.eval_only or os.path.exists(c.path('ckpt.pt'))
    checkpoint = (load_checkpoint(c.path('ckpt.pt'), 'cpu', mmap=True) if begun
                  else {'recipe': {}, 'iter': 0})
    was = checkpoint['recipe']
    expect(c, 'max_iters', f'at least the {checkpoint["iter"]} iterations that {c.folder} has '
           '(--name= trains anew)', lambda n: c.eval_only or n >= checkpoint['iter'])
    c.threads = c.threads or max(1, usable_cores() // max(jobs, WORLD_SIZE))
    c.vocab_size = c.vocab_size or meta['vocab_size']
    expect(c, 'vocab_size', f'at least the {meta["vocab_size"]} of {c.dataset}',
           lambda n: n >= meta['vocab_size'])
    c.lr_decay_iters = c.lr_decay_iters or was.get('lr_decay_iters') or c.max_iters
    if c.dtype == 'auto':
        c.dtype = was.get('dtype') or fast_dtype(device)
    if begun:
        refuse_another_recipe(c, was, recipe_of(c, meta, device))
    return checkpoint['iter']


def last_of(value):
    """Of 'one, then two', as a resumed run has it in its recipe, 'two'."""
    return value.rpartition(', then ')[2] if isinstance(value, str) else value


def refuse_another_recipe(config, was, now):
    """Raise UserError where a run would go on with another recipe; tell what may have changed, or
    for a run that is only evaluated all that has."""
    wrong = []
    was = {key: getattr(TrainConfig, key, None) for key in now} | was   # a new key: its default
    for key in was:
        if last_of(was[key]) == now.get(key):
            continue
        if key in MAY_CHANGE:
            tell(f'{config.folder}: {key} is {now.get(key)} now, and was {was[key]}')
        elif config.eval_only:
            tell(f'{config.folder}: evaluated with {key} = {now.get(key)}, trained with {was[key]}')
        else:
            wrong.append(f'{key} = {was[key]} and not {now.get(key)}')
    if wrong:
        raise UserError(f'{config.path("ckpt.pt")}: expected what it was trained with, '
                        f'{", ".join(wrong)}; leave it so, or train anew with --name=')


def save(state):
    """Write a run's files: ckpt.pt, the latest state; best.pt, what sampling needs of it, if its
    evaluation has the lowest loss; log.jsonl; and last config.json, the result."""
    c, log, recipe = state.config, state.log, state.result['recipe']
    for_sampling = {'model': state.model.state_dict(), 'meta': state.data.meta, 'recipe': recipe}
    with replacing(c.path('ckpt.pt')) as part:
        torch.save({**for_sampling, 'optimizer': state.optimizer.state_dict(), 'log': log,
                    'scaler': state.scaler.state_dict(), 'iter': state.iteration,
                    'seconds': state.seconds}, part)
    lowest = min((entry['val_loss'] for entry in log), default=None)
    if log and log[-1]['iter'] == state.iteration and log[-1]['val_loss'] == lowest:
        with replacing(c.path('best.pt')) as part:
            torch.save(for_sampling, part)
    write_text(c.path('log.jsonl'), as_lines(log))
    result = state.result | {'iter': log[-1]['iter'] if log else None}   # of the last evaluation
    write_text(c.path('config.json'), json.dumps(result, indent=1))


# a process that was killed as it wrote leaves a file such as ckpt.pt.1234.part
HALF_WRITTEN = r'(ckpt\.pt|best\.pt|log\.jsonl|config\.json)\.\d+\.part'


def check_folders(runs):
    """Raise UserError where the folder of a run holds other things; where a run would be written
    over; and where none is there to go on with. (Of several, those that have not begun start.)"""
    c = runs[0]
    # such as config/quick_start, whose results and pictures would be written over
    for file in os.listdir(c.out_dir) if os.path.isdir(c.out_dir) else ():
        if file.endswith('.py') or file == 'README.md':
            raise UserError(f'out_dir: expected a folder for runs alone, got {c.out_dir} with '
                            f'{file} in it')
    begun = [run for run in runs if os.path.exists(run.path('ckpt.pt'))]
    if not begun and (c.init_from == 'resume' or c.eval_only):
        raise UserError(f'{c.path("ckpt.pt")}: expected a checkpoint to go on from, got no such '
                        'file; train first, without --init_from=resume')
    for run in runs:
        if run in begun and c.init_from == 'scratch' and not c.eval_only:
            raise UserError(f'{run.folder}: expected a new folder, got one that holds a run; '
                            '--init_from=resume goes on with it, --name= or --out_dir= keeps it')
        for file in os.listdir(run.folder) if os.path.isdir(run.folder) else ():
            if run not in begun and not re.fullmatch(HALF_WRITTEN, file):
                raise UserError(f'{run.folder}: expected a new folder, or a run and its ckpt.pt, '
                                f'got one with {file}; --name= trains anew, beside it')


def make_folder(run):
    """Make the folder of a run, and clear it of what is half-written."""
    try:
        os.makedirs(run.folder, exist_ok=True)
    except OSError as error:
        raise UserError(f'out_dir: expected a folder to write to, got {run.folder!r}: '
                        f'{error.strerror}') from None
    for file in os.listdir(run.folder):
        if re.fullmatch(HALF_WRITTEN, file):
            os.remove(run.path(file))


def read_config_json(run):
    """The result that a run has written so far; {} if there is none."""
    path = run.path('config.json')
    try:
        return dict(json.loads(read_text(path))) if os.path.exists(path) else {}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f'{path}: expected one of train.py, got a damaged one; remove it, and the '
                        'run goes on from its ckpt.pt') from None


# -----------------------------------------------------------------------------
# the terminal, and runs side by side: the matmuls of a small model are too small for two threads,
# so on a CPU a core trains a run of its own, in a process of its own

SPAWN = multiprocessing.get_context('spawn')                       # the one way on all systems
SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:   # not nohup
    SIGNALS.append(signal.SIGHUP)                                  # a terminal is closed


def tell(text, file=None):
    """Print a line where the progress bar is, which is then drawn again below it."""
    if RANK == 0:
        if os.isatty(2):                 # the bar may be there, from another process: erase it
            print('\r\033[K', end='', file=sys.stderr, flush=True)
        print(text + '\n', end='', file=file)            # at once: other processes print, too


class Progress:
    """A bar of all runs together. What each has done lies in memory that processes share."""

    def __init__(self, done):
        """done: pairs of a run and how many iterations it has."""
        self.of = {run.folder: SPAWN.RawArray('d', (n * run.tokens_per_iter, math.nan))
                   for run, n in done}                             # (tokens, loss)
        # disable=None: no bar where the output is no terminal
        self.bar = tqdm(total=sum(run.max_iters * run.tokens_per_iter for run, _ in done),
                        initial=self.tokens(), unit='tok', unit_scale=True, dynamic_ncols=True,
                        leave=False, disable=True if RANK > 0 or not sys.stderr else None)

    def tokens(self):
        return int(sum(tokens for tokens, _ in self.of.values()))

    def note(self, run, tokens, loss):
        """What a run has done, if it is in this process; show it."""
        self.of[run.folder][:] = tokens, loss
        self.show([run.folder])

    def show(self, folders):
        """Draw the bar, with the losses of the runs in these folders, which are at work."""
        losses = [self.of[folder][1] for folder in folders]
        known = ' '.join(f'{loss:.3f}' for loss in losses if not math.isnan(loss))
        self.bar.set_postfix_str(f'loss {known}', refresh=False)
        self.bar.update(self.tokens() - self.bar.n)


def train_one_by_one(runs, stop, note):
    """Train runs in this process. Returns the highest exit status: 1 where one has failed, and the
    others go on; 2 after another UserError."""
    status = 0
    for run in runs:
        try:
            train(run, stop, note)
        except UserError as error:
            if WORLD_SIZE > 1:           # RANK 0 alone may know, and the others would wait for it
                raise
            tell(f'error: {error}', sys.stderr)
            status = max(status, 1 if isinstance(error, RunFailed) else 2)
        if status == 2 or stop.value:
            break
    return status


def train_apart(config, hashes, stop, shared):
    """Train a run in a process of its own, which has imported model.py and train.py anew."""
    first = multiprocessing.parent_process()

    def note(_, tokens, loss):
        shared[:] = tokens, loss
        if not first.is_alive():         # it was killed; ckpt.pt is there to go on from
            sys.exit(1)
    changed = [file for file in HASHES if HASHES[file] != hashes[file]]
    if changed:
        tell(f'error: {config.folder}: expected the code of the start, got another '
             f'{" and ".join(changed)}; start anew', sys.stderr)
        sys.exit(1)
    configurator.run(lambda _: sys.exit(train_one_by_one([config], stop, note)))


def train_side_by_side(runs, jobs, stop, progress):
    """Train runs in processes of their own, `jobs` at once. Returns the highest exit status. Where
    one has failed (1) the others go on; after another UserError (2), and where nobody reads what is
    printed (141), all save and end."""
    waiting, at_work, status = list(runs), {}, 0
    try:
        while at_work or (waiting and not stop.value):
            while waiting and len(at_work) < jobs and not stop.value:
                run = waiting.pop(0)
                process = SPAWN.Process(target=train_apart, name=run.folder,
                                        args=(run, HASHES, stop, progress.of[run.folder]))
                # a process ignores the signals that are ignored as it starts: only this one reacts
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                process.start()
                stop_on_signals(stop)
                at_work[process.sentinel] = process
            ended = wait(at_work, timeout=0.5)
            progress.show([process.name for process in at_work.values()])
            for process in map(at_work.pop, ended):
                process.join()
                if process.exitcode > 1:                 # 2, or 141: nobody reads the output
                    stop.value = signal.SIGTERM
                elif process.exitcode < 0:               # minus the signal that killed it
                    tell(f'error: {process.name}: its process ended with exit code '
                         f'{process.exitcode}; --init_from=resume goes on with it', sys.stderr)
                status = max(status, process.exitcode if process.exitcode >= 0 else 1)
    finally:
        for process in at_work.values():                 # after a second Ctrl-C
            process.kill()
    return status


def stop_on_signals(stop):
    """Ctrl-C, the SIGTERM of Slurm and Docker, and a closed terminal end between two iterations,
    saved; a second one ends at once."""
    def on_signal(number, _):
        stop.value = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if number not in (signal.SIGINT, signal.SIGTERM):          # SIGHUP: printing would fail now
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
    for number in SIGNALS:
        signal.signal(number, on_signal)


# -----------------------------------------------------------------------------

def main(arguments):
    from_line, files = parse(TrainConfig, arguments, __doc__)
    from_file = {}
    for file in files:
        from_file |= read_config_file(TrainConfig, file)
    runs = plan_runs(from_file, from_line)
    c = runs[0]                          # for the keys that all runs share
    stop = SPAWN.RawValue('i', 0)        # the number of the signal that asks to stop; 0: none yet
    if RANK == 0:
        check_folders(runs)
    if WORLD_SIZE > 1:                   # here Ctrl-C ends at once; ckpt.pt is there to go on from
        dist.init_process_group()
    else:
        stop_on_signals(stop)

    # all runs are settled before the first trains: a mistake in the last shows at once
    jobs = c.jobs or (usable_cores() if choose_device(c.device).type == 'cpu' else 1)
    jobs = 1 if c.eval_only or WORLD_SIZE > 1 else min(jobs, len(runs))
    done = [(run, settle(run, jobs)) for run in runs]
    if RANK == 0 and not c.eval_only:
        for run in runs:
            make_folder(run)
    to_train, status = [], 0
    for run in runs:
        result = read_config_json(run)
        if 'diverged' in result and not c.eval_only:
            status = 1
            tell(f'error: {run.folder}: has diverged; --name= trains anew', sys.stderr)
        elif result.get('iter') != run.max_iters or c.eval_only:   # it has not ended yet
            to_train.append(run)
    progress = Progress(done)
    with progress.bar:                   # closes it, whatever happens
        if jobs > 1:
            status = max(status, train_side_by_side(to_train, jobs, stop, progress))
        else:
            status = max(status, train_one_by_one(to_train, stop, progress.note))
    if status > 1:
        sys.exit(status)
    if stop.value:
        again = [argument for argument in arguments if not argument.startswith('--init_from=')]
        print('\nstopped and saved; to go on: '
              f'python train.py {shlex.join(again)} --init_from=resume')
        sys.exit(128 + stop.value)
    if RANK == 0 and not c.eval_only and any(os.path.exists(run.path('log.jsonl')) for run in runs):
        show_results(c.out_dir)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    sys.exit(status)


if __name__ == '__main__':
    configurator.run(main)
