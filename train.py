"""
Train a GPT whose MLP is aoe, moe or dense, on one GPU or on a CPU, and draw how
the variants compare.

    python train.py config/quick_start.py             # four, in turn
    python train.py config/quick_start.py --mlp=moe --max_iters=500
    python train.py config/quick_start.py --init_from=resume   # go on
    python train.py --n_layer=6 --n_embd=384 --d_low=64   # no file: defaults
    torchrun --nproc_per_node=8 train.py config/openwebtext.py   # eight GPUs

Each run writes <out_dir>/<run>/config.json, log.jsonl (a line per evaluation),
ckpt.pt (to resume from) and best.pt (the lowest validation loss). In <out_dir>
are pictures of all runs found there: loss.png, drawn after each evaluation, and
final_loss, expert_load, norm and expert_class at the end. What the table at the
end stands on is written there, too, to results.jsonl.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import shlex
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import fcntl
except ImportError:                      # Windows
    fcntl = None

import configurator
import model as model_file
from configurator import (UserError, build, check_type, expect, is_folder_name, parse,
                          read_config_file, read_text, replacing, write_text)
from model import GPT, GPTConfig, SparseMLP, distance_of_both_ways, entropy
from prepare_data import load_meta

# torchrun starts WORLD_SIZE processes of this script. They share the batches of an iteration, and
# their gradients are averaged; the one with RANK 0 evaluates, saves, draws and prints.
RANK, WORLD_SIZE = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))

with open(model_file.__file__, 'rb') as file:            # as it was imported, whatever it is later
    MODEL_HASH = hashlib.sha256(file.read()).hexdigest()[:8]


@dataclass
class Recipe(GPTConfig):
    """The keys that shape a result: the model's, then these. (shape_of adds data and machine.)"""
    # training
    batch_size: int = 16                 # sequences of block_size tokens, in the model at once
    gradient_accumulation_steps: int = 1   # batches an iteration (L_aux, expert_choice: one by one)
    learning_rate: float = 2e-3          # the highest, reached after the warm-up
    min_lr: float | None = None          # the lowest; None: a tenth of learning_rate
    warmup_iters: int = 100              # iterations of linear warm-up
    lr_decay_iters: int | None = None    # where the cosine reaches min_lr; None: at max_iters
    weight_decay: float = 0.1            # AdamW's, on matrices alone
    beta1: float = 0.9                   # AdamW's average of gradients
    beta2: float = 0.95                  # AdamW's average of their squares
    grad_clip: float = 1.0               # largest norm of all gradients together; 0: no limit
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
    eval_interval: int = 250             # iterations between evaluations
    log_interval: int = 10               # iterations between updates of the progress bar
    eval_only: bool = False              # evaluate the checkpoint that is there and write nothing
    init_from: Literal['scratch', 'resume', 'auto'] = 'scratch'   # auto: resume, if there is one
    # runs, trained in turn
    out_dir: str = 'out/default'         # each run writes to a folder of its own in here
    name: str | None = None              # of the run, and of its folder; None: its mlp
    runs: dict | None = None             # run name -> the keys in which it differs
    seeds: tuple | None = None           # train every run with each of these seeds
    # machine
    device: str = 'auto'                 # auto: cuda, else mps, else cpu
    threads: int | None = None           # of the CPU; None: PyTorch's choice
    compile: Literal['auto', True, False] = 'auto'   # torch.compile, once 20 s a run; auto: False

    def __post_init__(self):
        super().__post_init__()
        if self.min_lr is None:
            self.min_lr = self.learning_rate / 10
        if self.name is None:
            self.name = self.mlp
        expect(self, 'batch_size gradient_accumulation_steps eval_interval eval_iters log_interval'
               ' max_iters learning_rate lr_decay_iters threads', 'a positive number',
               lambda n: 0 < n < 2**31)
        expect(self, 'min_lr warmup_iters weight_decay grad_clip seed', '0 or more, below 2^63',
               lambda n: 0 <= n < 2**63)
        expect(self, 'gradient_accumulation_steps', f'a multiple of the {WORLD_SIZE} processes, '
               'which share them', lambda n: n % WORLD_SIZE == 0)
        expect(self, 'threads', f'at most the {os.cpu_count()} of this machine',
               lambda n: n <= os.cpu_count())
        expect(self, 'beta1 beta2', 'at least 0 and below 1', lambda beta: 0 <= beta < 1)
        expect(self, 'out_dir', 'a folder to write to', lambda out_dir: out_dir)
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
    """The TrainConfigs that the values of a config file and of the command line ask for: one for
    each entry of `runs`, or of mlp's list, and for each of `seeds`; all with one seed, then with
    the next. The line wins over the file, and --mlp over its runs."""
    values = from_file | from_line
    runs, only, seeds = values.pop('runs', None), values.pop('name', None), values.get('seeds')
    if seeds and 'seed' in values:
        raise UserError('seed: expected seed or seeds, got both')
    if runs is None or 'mlp' in from_line:
        mlps = values.pop('mlp', TrainConfig.mlp).split(',')
        runs = [(mlp, {'mlp': mlp}) for mlp in mlps]
    else:
        runs = list(runs.items())
    if not runs or only is not None and len(runs) > 1:
        raise UserError(f'runs: expected one at least, and one alone with --name, got {len(runs)}')
    if only is not None:
        runs = [(only, runs[0][1])]
    shared = {'runs', 'name', 'seed', 'seeds', 'out_dir'} | from_line.keys() - {'mlp'}

    planned = []
    for seed in seeds or [values.get('seed', TrainConfig.seed)]:
        seed = check_type(TrainConfig, 'seed', seed, 'seeds, ')
        for name, differs in runs:
            where = f'runs, {name}: '
            if not isinstance(differs, dict):
                raise UserError(f'{where}expected a dict of keys, got {differs!r}')
            own = {key: check_type(TrainConfig, key, differs[key], where) for key in differs}
            for key in shared & own.keys():
                raise UserError(f'{where}expected keys of one run, got {key}, which all share')
            planned.append(build(TrainConfig, values | own | {'name': name, 'seed': seed}))
    folders = [run.folder for run in planned]
    if len(set(folders)) < len(folders):
        raise UserError('runs, mlp, seeds: expected each once, got two runs for '
                        + max(folders, key=folders.count))
    return planned


# -----------------------------------------------------------------------------
# data

CLASSES = ('letters', 'capitals', 'spaces', 'line ends', 'other')


def class_of(character):
    """The place in CLASSES of a character; digits and punctuation are others."""
    is_of = (character.isalpha() and not character.isupper(), character.isupper(),
             character.isspace() and character not in '\r\n', character in '\r\n', True)
    return is_of.index(True)


def random_of(seed, iteration, micro_step):
    """Random numbers that depend on these three alone, so that resuming needs no state of them."""
    return np.random.default_rng((seed, iteration, micro_step))


class Data:
    """The tokens of a data set, and batches of them: inputs, targets (batch_size, block_size)."""

    def __init__(self, config, device):
        folder = os.path.join(config.data_dir, config.dataset)
        self.config, self.device, self.meta = config, device, load_meta(folder)
        vocabulary, known = self.meta['vocabulary'] or '', self.meta['vocab_size']
        if config.vocab_size is not None and config.vocab_size < known:
            raise UserError(f'vocab_size: expected at least the {known} of {config.dataset}, '
                            f'got {config.vocab_size}')
        # tells vocabularies apart, in a few characters
        digest = hashlib.sha256(vocabulary.encode()).hexdigest()
        self.tokenizer = f'{self.meta["tokenizer"]} {digest[:8]}'
        self.class_of_token = torch.tensor([class_of(c) for c in vocabulary], device=device)
        self.tokens = {}
        for split in ('train', 'val'):
            path, tokens = os.path.join(folder, f'{split}.bin'), self.meta[f'{split}_tokens']
            size = os.path.getsize(path) if os.path.exists(path) else 'no file'
            if size != 2 * tokens:
                raise UserError(f'{path}: expected {2 * tokens} bytes, got {size}; '
                                f'remove {folder} and run prepare_data.py again')
            if tokens <= config.block_size:
                raise UserError(f'{path}: expected more than block_size = {config.block_size} '
                                f'tokens, got {tokens}; lower it or prepare a longer text')
            self.tokens[split] = np.memmap(path, dtype=np.uint16, mode='r')

    def at(self, split, starts):
        """The batch whose sequences begin at starts."""
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
        return self.at('train', random.integers(0, last, self.config.batch_size))

    def eval_batches(self, split):
        """At most eval_iters batches, spread evenly over the split: the same for all runs."""
        size, S, tokens = self.config.batch_size, self.config.block_size, len(self.tokens[split])
        n = min(self.config.eval_iters, math.ceil(tokens / (size * S)))   # once each is enough
        for starts in np.linspace(0, tokens - S - 1, n * size, dtype=np.int64).reshape(n, size):
            yield self.at(split, starts)

    def classes(self, idx):
        """The place in CLASSES of each token of idx, flat; None where they are no characters."""
        return self.class_of_token[idx.flatten()] if self.meta['vocabulary'] else None


# -----------------------------------------------------------------------------
# evaluation

def measure(routing, classes, config):
    """What is measured from the Routing of a batch, as tensors to be added up over batches.

    classes (T,): of each token; None where the tokens are no characters.
    """
    chosen = routing.chosen.masked_fill(routing.chosen < 0, config.n_expert)   # nobody comes last
    used = F.one_hot(chosen, config.n_expert + 1)[..., :-1].sum(2).float()
    kind = used.new_zeros(used.shape[1], 0)                        # used (L, T, E), of 0 and 1
    if classes is not None:
        kind = F.one_hot(classes, len(CLASSES)).float()            # (T, classes), likewise
    return {
        'tokens': torch.tensor(used.shape[1]),                     # T
        'used': used.sum(1),                                       # T f of Eq. 6: (L, E)
        'ent_conf': entropy(routing.scores).mean(1),               # Eq. 8: (L,)
        'norm': routing.scores.mean(1)[:, :config.n_expert if config.mlp == 'aoe' else 0],
        'aux_loss': routing.aux_loss.sum(),
        'handled': kind.T @ used,                                  # (L, classes, E)
        'of_class': kind.sum(0).unsqueeze(1),                      # (classes, 1)
    }


@torch.no_grad()
def evaluate(model, data, autocast, splits=('train', 'val')):
    """Mean cross-entropy (nats per token) on the splits, and on the last what the experts did."""
    model.eval()
    entry = {}
    for split in splits:
        losses, measured = [], []
        for idx, targets in data.eval_batches(split):
            with autocast:
                _, loss, routing = model(idx, targets)
            losses.append(loss)
            if split == splits[-1] and routing.chosen.numel():
                measured.append(measure(routing, data.classes(idx), model.config))
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


def train(config, stop):
    """Train one run, from scratch or from its checkpoint, until max_iters or until stop is set. Or
    evaluate its checkpoint and write nothing, for eval_only. Raises UserError, also as Diverged."""
    c, device, before = config, choose_device(config.device), None
    if c.threads:
        torch.set_num_threads(c.threads)
    if os.path.exists(c.path('ckpt.pt')) or c.eval_only:
        if c.init_from == 'scratch' and not c.eval_only:           # since main has looked
            tqdm.write(f'{c.folder}: another process trains it, or has; left as it is')
            return
        before = load_checkpoint(c.path('ckpt.pt'), device, 'at', 'optimizer', 'scaler')
    data = Data(c, device)
    settle(c, device, data, before)
    shape = shape_of(c, device, data)
    if before:
        shape = refuse_another_shape(c, shape, before)

    torch.manual_seed(c.seed)
    model = GPT(c).to(device)
    refuse_two_formulas(model.blocks[0].mlp)
    forward = torch.compile(model) if c.compile is True else model
    forward = DistributedDataParallel(forward) if WORLD_SIZE > 1 else forward
    optimizer = make_optimizer(model, c, device)
    dtype = getattr(torch, c.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    # float16 has few exponents: losses are scaled up, gradients back, and a step is skipped and
    # the scale halved where something overflowed. For other dtypes the scaler does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    at, log = {'iter': 0, 'seconds': 0.0}, []
    if before:
        at, log = before['at'], before['at'].pop('log', [])
        load_weights(model, before, c.path('ckpt.pt'))
        optimizer.load_state_dict(before['optimizer'])
        scaler.load_state_dict(before['scaler'])
    about = describe(c, model, device) | {'shape': shape}
    if c.eval_only:
        report({'iter': at['iter'], **evaluate(model, data, autocast)})
        return
    done = log and log[-1]['iter'] == at['iter'] == c.max_iters
    if done and read_text(c.path('log.jsonl')) == as_lines(log):   # nothing is left to do
        report(log[-1])
        return
    lock = make_folder(c)                                          # held until the run has ended

    loss, micro_steps = torch.zeros(()), range(RANK, c.gradient_accumulation_steps, WORLD_SIZE)
    tokens_per_iter = c.gradient_accumulation_steps * c.batch_size * c.block_size
    bar = tqdm(total=c.max_iters * tokens_per_iter, initial=at['iter'] * tokens_per_iter,
               desc=c.name, unit='tok', unit_scale=True, dynamic_ncols=True,
               disable=True if RANK else None)                     # None: without a terminal
    ask_interval = 1 if WORLD_SIZE == 1 else c.log_interval        # a call that all wait for
    clock = time.perf_counter()
    while True:
        # every eval_interval iterations, and at the end: look, save, log and draw
        ended = at['iter'] >= c.max_iters
        stopped = at['iter'] % ask_interval == 0 and any_process(stop.is_set())
        if at['iter'] % c.eval_interval == 0 or ended or stopped:
            refuse_not_finite(c, model, at['iter'], loss, about)
            at['seconds'] += time.perf_counter() - clock           # the clock stands still here
            look = not stopped and not (log and log[-1]['iter'] == at['iter'])
            if RANK == 0:
                if look:
                    log.append({'iter': at['iter'], 'tokens': at['iter'] * tokens_per_iter,
                                'seconds': at['seconds'], **evaluate(model, data, autocast),
                                'lr': learning_rate_at(at['iter'], c)})
                save(c, 'ckpt.pt', model, data, shape, at={**at, 'log': log},
                     optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
                losses = {entry['iter']: entry['val_loss'] for entry in log}
                if losses and losses.get(at['iter']) == min(losses.values()):
                    save(c, 'best.pt', model, data, shape)
                write_text(c.path('log.jsonl'), as_lines(log))
                write_config(c, about, iter=at['iter'])
                if look:
                    report(log[-1])
                    draw(c.out_dir, ['loss.png'])
                    tell_if_busy(log)
            clock = time.perf_counter()
        if ended or stopped:
            break

        # one iteration: the gradients of its batches, then a step of the optimizer
        for group in optimizer.param_groups:
            group['lr'] = learning_rate_at(at['iter'], c)
        for micro_step in micro_steps:
            idx, targets = data.train_batch(at['iter'], micro_step)
            torch.manual_seed(random_of(c.seed, at['iter'], micro_step).integers(2**63))   # dropout
            if WORLD_SIZE > 1:                                     # average with the last one
                forward.require_backward_grad_sync = micro_step == micro_steps[-1]
            with autocast:
                loss, routing = forward(idx, targets)[1:]          # logits are not held
            scaler.scale((loss + routing.aux_loss.sum()) / len(micro_steps)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        at['iter'] += 1

        bar.update(tokens_per_iter)
        if at['iter'] % c.log_interval == 0:
            refuse_not_finite(c, model, at['iter'], loss, about)
            bar.set_postfix_str(f'loss {loss.item():.3f}', refresh=False)
    bar.close()
    lock.close()


def refuse_not_finite(config, model, iteration, loss, about):
    """Raise Diverged if the last loss, or a weight, is not finite, and note it in config.json."""
    if not any_process(not all(x.isfinite().all() for x in (loss, *model.parameters()))):
        return
    if RANK == 0:
        write_config(config, about, diverged=iteration)
    raise Diverged(f'{config.folder}: expected finite numbers, got others by iteration '
                   f'{iteration}, where the loss is {loss.item():.4f}. ckpt.pt is from before. '
                   f'Train anew with --name=, below --learning_rate={config.learning_rate:g}')


def refuse_two_formulas(layer):
    """Raise UserError where SparseMLP.experts was edited, and part 3 of model.py was not."""
    if isinstance(layer, SparseMLP) and not layer.config.plain:
        distance = distance_of_both_ways(layer)
        if not distance < 0.01:                                    # or it is no number
            raise UserError('model.py: expected part 3 to compute what SparseMLP.experts does, got '
                            f'a difference of {distance:.0%}; with --plain=True the latter runs')


def report(entry):
    """One line about an evaluation, above the progress bar."""
    balance = f'  Ent_load {statistics.mean(entry["ent_load"]):.3f}' if entry['ent_load'] else ''
    tqdm.write(f'iteration {entry["iter"]:>6,}   train loss {entry["train_loss"]:.4f}   '
               f'val loss {entry["val_loss"]:.4f} {balance}')


def describe(config, model, device):
    """Print what the model is and how it is trained. Returns that for config.json."""
    c, total, active = config, model.total_parameters(), model.active_parameters()
    flops, tokens = model.flops_per_token(), c.batch_size * c.block_size
    at_most = 'at most ' if c.select == 'top_p' else ''
    tqdm.write(f'\n{c.name}: {total:,} parameters, {at_most}{active:,} active, '
               f'{flops / 1e6:.1f} MFLOPs per token\n'
               f'{c.max_iters:,} iterations of {c.gradient_accumulation_steps * tokens:,} tokens, '
               f'{device}, {c.dtype}, seed {c.seed}\nin {c.folder}')
    if c.lr_decay_iters != c.max_iters:
        tqdm.write(f'the learning rate falls to {c.min_lr:g} at iteration {c.lr_decay_iters:,}: '
                   '--lr_decay_iters')
    return {'name': c.name, 'seed': c.seed, 'dataset': c.dataset, 'max_iters': c.max_iters,
            'lr_decay_iters': c.lr_decay_iters, 'total_parameters': total,
            'active_parameters': active, 'flops_per_token': flops}


# -----------------------------------------------------------------------------
# what shapes a result, and a run's files: ckpt.pt is the latest state, best.pt the weights with the
# lowest validation loss

CODE = ('device', 'torch', 'model.py')   # may change on the way: then it is 'this then that'


def settle(config, device, data, before):
    """Decide what the configuration leaves open; as in `before`, a checkpoint, if there is one."""
    c, was = config, before['shape'] if before else {}
    c.vocab_size = c.vocab_size or data.meta['vocab_size']
    c.lr_decay_iters = c.lr_decay_iters or was.get('lr_decay_iters') or c.max_iters
    if c.dtype == 'auto':
        c.dtype = was.get('dtype') or fast_dtype(c, device)


def shape_of(config, device, data):
    """What shapes the result of a run: its recipe, the data, the kind of device and the code. Runs
    that are equal in it, but for the seed, are seeds of one another."""
    return {**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)},
            'sha256': data.meta['sha256'][:8], 'tokenizer': data.tokenizer, 'device': device.type,
            'torch': str(torch.__version__), 'model.py': MODEL_HASH}


def refuse_another_shape(config, shape, before):
    """Raise UserError where a run goes on with another recipe or other data than in `before`, its
    checkpoint, unless it is only evaluated. Returns its shape: with other code, of both codes."""
    path, shape = config.path('ckpt.pt'), dict(shape)
    was = {field.name: field.default for field in dataclasses.fields(Recipe)} | before['shape']
    for key in CODE:
        if not was.get(key, '').endswith(shape[key]):
            tqdm.write(f'{config.folder}: {key} is {shape[key]} now, and was {was.get(key)}')
            was[key] = f'{was.get(key)} then {shape[key]}'
        shape[key] = was[key]
    differ = [f'{key} = {was.get(key)} and not {shape.get(key)}'
              for key in was | shape if was.get(key) != shape.get(key)]
    if differ and (not config.eval_only or was['tokenizer'] != shape['tokenizer']):
        raise UserError(f'{path}: expected what it was trained with, {", ".join(differ)}; '
                        'leave it so, or train anew with --name=')
    if config.max_iters < before['at']['iter'] and not config.eval_only:
        raise UserError(f'max_iters: expected at least the {before["at"]["iter"]} iterations that '
                        f'{path} has, got {config.max_iters}; --name= trains anew')
    return shape


def save(config, file, model, data, shape, **more):
    content = {'model': model.state_dict(), 'meta': data.meta, 'shape': shape, **more}
    with replacing(config.path(file)) as part:
        torch.save(content, part)


def load_checkpoint(path, device, *more):
    """What `save` has written, with the keys `more` in it. Nothing in the file can run code."""
    if not os.path.exists(path):
        raise UserError(f'expected a checkpoint, got no file {path}; train one with train.py')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        whole = all(isinstance(checkpoint[key], dict) for key in ('model', 'meta', 'shape', *more))
    except Exception:                    # torch.load has many ways to find a file damaged
        whole = False
    if not whole:
        raise UserError(f'{path}: expected a checkpoint of this train.py, got a damaged or foreign '
                        'file; --name= trains anew, beside it')
    return checkpoint


def load_weights(model, checkpoint, path):
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError:
        raise UserError(f'{path}: expected weights of a model of these settings and of this '
                        'model.py, got others') from None


def write_config(config, about, **more):
    write_text(config.path('config.json'), json.dumps(about | more, indent=1))


def as_lines(entries):
    return ''.join(json.dumps(entry) + '\n' for entry in entries)


def read_log(path):
    """The evaluations in a log.jsonl, oldest first; none where there is no file."""
    return [json.loads(line) for line in read_text(path).splitlines()]


def make_folder(config):
    """Make the folder of a run, for this process alone, and clear it of what a killed one left
    half-written. Returns the open file that holds the lock."""
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
        raise UserError(f'{config.folder}: expected to be alone with this run, got another process '
                        'that trains it') from None
    except OSError:                      # a file system without locks
        pass
    for file in os.listdir(config.folder):
        if file.endswith('.part') and RANK == 0:
            os.remove(config.path(file))
    return lock


# -----------------------------------------------------------------------------
# the machine

def choose_device(name):
    """A torch.device that is there; 'auto' takes the fastest. Raises UserError."""
    there = ['cuda'] if torch.cuda.is_available() else []
    version = tuple(int(part) for part in torch.__version__.split('.')[:2])
    if torch.backends.mps.is_available() and version >= (2, 14):   # before, its attention is wrong:
        there.append('mps')                                        # PyTorch issues 174861, 195910
    there.append('cpu')
    kind, _, index = name.replace('auto', there[0]).partition(':')
    known = not index or index.isdigit() and int(index) < torch.cuda.device_count()
    if kind not in there or not known:
        raise UserError(f'device: expected auto or one of {", ".join(there)} on this machine, '
                        f'got {name!r}')
    if kind == 'cuda' and WORLD_SIZE > 1:
        index = os.environ['LOCAL_RANK']
        torch.cuda.set_device(int(index))
    return torch.device(f'{kind}:{index}' if index else kind)


def fast_dtype(config, device):
    """The name of the dtype of matmuls that auto stands for."""
    if device.type == 'cuda':            # T4 and V100 have float16 alone
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return 'bfloat16' if native else 'float16'
    # an expert's matmuls, but none so small that its time is all overhead
    rows = max(256, config.batch_size * config.block_size * config.top_k // config.n_expert)
    D, d = max(96, config.n_embd), max(384, config.d_ffn)
    fast = device.type == 'cpu' and bfloat16_gain(rows, D, d) > 1.2
    return 'bfloat16' if any_process(fast) else 'float32'          # all with the same


@functools.cache
def bfloat16_gain(rows, D, d):
    """How many times as fast as in float32 this CPU multiplies an expert's matrices in bfloat16,
    forward and backward, by turns for 0.3 seconds. Not every processor that has it is fast."""
    seconds = {torch.float32: [], torch.bfloat16: []}
    until = time.perf_counter() + 0.3
    while time.perf_counter() < until or len(seconds[torch.bfloat16]) < 5:
        for dtype, times in seconds.items():
            x, w, dy = (torch.ones(size, dtype=dtype) for size in ((rows, D), (D, d), (rows, d)))
            start = time.perf_counter()
            x @ w, dy @ w.T, x.T @ dy
            times.append(time.perf_counter() - start)
    gain = statistics.median(seconds[torch.float32]) / statistics.median(seconds[torch.bfloat16])
    tqdm.write(f'dtype: this CPU multiplies {gain:.2g} times as fast in bfloat16 as in float32')
    return gain


def tell_if_busy(log):
    """One line, after the first steps, where more threads run than there are cores: all crawl."""
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0  # not on Windows
    if len(log) == 2 and load > os.cpu_count() + 1:
        tqdm.write(f'busy: {load:.1f} threads for {os.cpu_count()} cores; best is a process a '
                   'core, --threads=1')


def keep_freed_memory():
    """Let glibc, where there is one, keep large freed blocks instead of returning them to the
    kernel, which clears them page by page when the next step asks again: a quarter of the time."""
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4           # of glibc's malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)


def any_process(flag):
    """Whether the flag is set in any process of torchrun; all have to ask, and wait for all."""
    if WORLD_SIZE == 1:
        return flag
    flags = [None] * WORLD_SIZE
    dist.all_gather_object(flags, flag)
    return any(flags)


def leave_together(status):
    """End the processes of torchrun, none while another still needs it. At once: threads of gloo
    may still ask for Python when it shuts down, and then abort the process (one time in ten)."""
    any_process(False)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# -----------------------------------------------------------------------------
# comparing the runs of an out_dir

# Okabe and Ito's palette
COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']


def find_runs(out_dir):
    """What the runs in out_dir have logged: name -> [(config.json, log)], one for each seed. Seeds
    stand together where all that shaped them is equal and they are equally far; others have names
    that say what differs. What cannot be read is told of and left out."""
    groups = {}                          # facts as text -> (facts, {seed: (config, log)})
    for folder in sorted(os.listdir(out_dir)):
        if not os.path.exists(os.path.join(out_dir, folder, 'config.json')):
            continue
        try:
            config = json.loads(read_text(os.path.join(out_dir, folder, 'config.json')))
            log = read_log(os.path.join(out_dir, folder, 'log.jsonl'))
            facts = {'name': config['name'], **config['shape'], 'seed': None,
                     'iter': log[-1]['iter'], 'diverged': config.get('diverged')}
            # what pictures and table need; a KeyError leaves the run out
            [config[key] for key in ('total_parameters', 'active_parameters', 'seed')]
            [log[-1][key] for key in ('load', 'ent_load', 'ent_conf', 'norm', 'class_load')]
            [(entry['tokens'], entry['seconds'], entry['val_loss'] + 0.0) for entry in log]
            _, seeds = groups.setdefault(json.dumps(facts, sort_keys=True), (facts, {}))
            seeds[config['seed']] = config, log                    # a seed counts once
        except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
            tqdm.write(f'{folder} is left out: {error!r:.60}')
    runs = {}
    for facts, seeds in groups.values():
        others = [other for other, _ in groups.values() if other['name'] == facts['name']]
        differ = [f'{key} {value}' for key, value in facts.items()
                  if any(other.get(key) != value for other in others)]
        label = facts['name'] + (f' ({", ".join(differ)})' if differ else '')
        while label in runs:             # 0.0 and -0.0
            label += "'"
        runs[label] = list(seeds.values())
    return runs


def draw(out_dir, files=None):
    """Draw pictures of all runs in out_dir, all of DRAWN or these files of it. What hinders is told
    in a line, and stops nobody."""
    plt, runs = pyplot(), None
    for file in files or DRAWN:
        try:
            runs = runs or find_runs(out_dir)
            color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(runs)}
            figure = DRAWN[file](plt, runs, color)
            if figure:
                save_figure(figure, os.path.join(out_dir, file))
                plt.close(figure)
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


def draw_loss(plt, runs, color):
    """Validation loss over iterations, and over seconds: of each run the mean of its seeds, in a
    band of them all."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout='constrained')
    later = []                           # the first evaluation, of no training, may lie outside
    for i, (name, seeds) in enumerate(runs.items()):
        logs = [{entry['iter']: entry for entry in log} for _, log in seeds]
        iterations = sorted(set.intersection(*map(set, logs)))     # where all seeds were evaluated
        points = [[log[iteration]['val_loss'] for log in logs] for iteration in iterations]
        seconds = [statistics.mean(log[n]['seconds'] for log in logs) for n in iterations]
        label = f'{name} {statistics.mean(lowest(seeds)):.4f}'
        label += f', mean of {len(seeds)} seeds' if len(seeds) > 1 else ''
        for axes, x in zip(panels, (iterations, seconds)):
            axes.plot(x, [statistics.mean(p) for p in points], color=color[name], marker='.',
                      linestyle=('-', '--', ':')[i // len(COLORS) % 3], label=label)
            axes.fill_between(x, [min(p) for p in points], [max(p) for p in points],
                              color=color[name], alpha=0.2)
        later += [loss for p in points[1:] or points for loss in p]
    panels[0].set_ylim(min(later) - 0.05, max(later) + 0.05)
    panels[0].set(xlabel='iteration', ylabel='validation loss (nats per token)')
    panels[1].set(xlabel='seconds of training')
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside right upper')
    return figure


def draw_final_loss(plt, runs, color):
    """The lowest validation loss of each run: seeds as points, mean and deviation as a bar."""
    figure, axes = plt.subplots(figsize=(8, 1 + 0.35 * len(runs)), layout='constrained')
    for y, (name, seeds) in enumerate(runs.items()):
        losses = lowest(seeds)
        spread = statistics.stdev(losses) if len(losses) > 1 else 0
        axes.errorbar(statistics.mean(losses), y, xerr=spread, color=color[name], marker='|',
                      capsize=4)
        axes.plot(losses, [y] * len(losses), '.', color=color[name], alpha=0.5)
    axes.set_yticks(range(len(runs)), runs)
    axes.invert_yaxis()
    axes.set(xlabel='lowest val_loss (nats per token)', title='Seeds, mean, standard deviation')
    axes.grid(alpha=0.3)
    return figure


def draw_layers(key, draw_panel, label):
    """A function that draws a row for each run that has logged `key` (its first seed), in it a
    panel for each layer, by draw_panel(axes, log, layer, color)."""
    def draw_figure(plt, runs, color):
        logs = {name: seeds[0][1] for name, seeds in runs.items() if any(seeds[0][1][-1][key])}
        if not logs:
            return None
        n_layer = max(len(log[-1][key]) for log in logs.values())
        figure, panels = plt.subplots(len(logs), n_layer, squeeze=False, sharex=True, sharey=True,
                                      figsize=(1.6 + 2.4 * n_layer, 0.9 + 1.3 * len(logs)),
                                      layout='constrained')
        for row, (name, log) in zip(panels, logs.items()):
            for layer, axes in enumerate(row):
                axes.set_visible(layer < len(log[-1][key]))
                if layer < len(log[-1][key]):
                    axes.set_title(f'{name}, layer {layer + 1}', fontsize=9)
                    draw_panel(axes, log, layer, color[name])
        figure.supxlabel(label, fontsize=9)
        return figure
    return draw_figure


def draw_load(axes, log, layer, color):
    """Figure 3: the load of each expert, against 1/E."""
    shares = log[-1]['load'][layer]
    axes.bar(range(len(shares)), shares, color=color)
    axes.axhline(1 / len(shares), color='black', linestyle='--', linewidth=1)
    axes.set_title(axes.get_title() + f'\nEnt_load {log[-1]["ent_load"][layer]:.2f}, '
                   f'Ent_conf {log[-1]["ent_conf"][layer]:.2f}', fontsize=9)


def draw_norm(axes, log, layer, color):
    """Figure 4: the mean activation norm of every expert over training."""
    axes.plot([entry['iter'] for entry in log], [entry['norm'][layer] for entry in log],
              color=color, alpha=0.7)


def draw_class(axes, log, layer, color):
    """Who takes what: the share of each class of characters that each expert handled."""
    axes.imshow(log[-1]['class_load'][layer], cmap='cividis', vmin=0, vmax=1, aspect='auto')
    axes.set_yticks(range(len(CLASSES)), CLASSES, fontsize=8)


DRAWN = {
    'loss.png': draw_loss,
    'final_loss.png': draw_final_loss,
    'expert_load.png': draw_layers('load', draw_load, 'expert; dashed: 1/E'),
    'norm.png': draw_layers('norm', draw_norm, 'iteration; a line: the mean norm of an expert'),
    'expert_class.png': draw_layers('class_load', draw_class, 'expert; dark: 0, bright: all'),
}


def lowest(seeds):
    """The lowest validation loss of each seed, of [(config, log)]."""
    return [min(entry['val_loss'] for entry in log) for _, log in seeds]


def print_rows(rows):
    """Rows of strings as a table, in the form of Markdown: numbers flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ['-' * width for width in widths], *rows[1:]]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:]))]
        print('| ' + ' | '.join(cells) + ' |')


def mean_and_spread(values, form='.4f'):
    """As text: the mean, and the standard deviation where there are several."""
    spread = f' ± {format(statistics.stdev(values), form)}' if len(values) > 1 else ''
    return format(statistics.mean(values), form) + spread


def print_table(out_dir):
    """The runs of out_dir side by side; where a run has several seeds, mean and standard deviation.
    What it stands on, the last evaluation of each run, goes to results.jsonl."""
    runs, results = find_runs(out_dir), []
    table = [('run', 'parameters', 'active', 'val loss', 'Ent_load', 'tokens/s')]
    for name, seeds in runs.items():
        config = seeds[0][0]
        ent_load = [statistics.mean(log[-1]['ent_load']) for _, log in seeds if log[-1]['ent_load']]
        speeds = [(b['tokens'] - a['tokens']) / (b['seconds'] - a['seconds'])
                  for _, log in seeds for a, b in zip(log, log[1:])]
        diverged = f'diverged at {config["diverged"]:,}' if config.get('diverged') else None
        table.append((name, f'{config["total_parameters"]:,}', f'{config["active_parameters"]:,}',
                      diverged or mean_and_spread(lowest(seeds)),
                      f'{statistics.mean(ent_load):.3f}' if ent_load else '-',
                      f'{statistics.median(speeds):,.0f}' if speeds else '-'))
        for (config, log), loss in zip(seeds, lowest(seeds)):
            last = {key: value for key, value in log[-1].items() if key != 'class_load'}   # long
            results.append({'run': name, 'seed': config['seed'], 'lowest_val_loss': loss, **last,
                            'shape': config['shape']})
    print()
    print_rows(table)
    print(f'\nval loss: the lowest; Ent_load: ln E where all is even; pictures in {out_dir}')
    write_text(os.path.join(out_dir, 'results.jsonl'), as_lines(results))


# -----------------------------------------------------------------------------

def refuse_to_overwrite(runs):
    """Refuse, with a UserError, to write over a run, or to go on where there is none."""
    config, there = runs[0], []
    for run in runs:
        files = [f for f in ('ckpt.pt', 'best.pt', 'log.jsonl') if os.path.exists(run.path(f))]
        there += files and [run]
        if files and config.init_from == 'scratch' and not config.eval_only:
            raise UserError(f'{run.folder}: expected a new folder, got one that holds a run; '
                            '--init_from=resume goes on with it, --name= or --out_dir= keeps it')
        if files and files[0] != 'ckpt.pt':
            raise UserError(f'{run.folder}: expected its ckpt.pt to go on from, got a run without; '
                            '--name= trains anew, beside it')
    if not there and (config.init_from == 'resume' or config.eval_only):
        raise UserError(f'{config.path("ckpt.pt")}: expected a checkpoint to go on from, got no '
                        'such file; train first, without --init_from=resume')


def main(arguments):
    from_line, files = parse(TrainConfig, arguments, __doc__)
    from_file = {}
    for file in files:
        from_file |= read_config_file(TrainConfig, file)
    runs = plan_runs(from_file, from_line)
    config, failed = runs[0], []
    if RANK == 0:
        refuse_to_overwrite(runs)
    keep_freed_memory()
    if WORLD_SIZE > 1:
        dist.init_process_group()
    if RANK > 0:
        sys.stdout = open(os.devnull, 'w')

    stop = threading.Event()

    def on_ctrl_c(*_):
        stop.set()                                                 # end between two iterations;
        signal.signal(signal.SIGINT, signal.default_int_handler)   # a second Ctrl-C ends at once
    signal.signal(signal.SIGINT, on_ctrl_c)

    for run in runs:
        try:
            train(run, stop)
        except Diverged as error:                                  # the others go on
            failed.append(run.name)
            tqdm.write(f'error: {error}', file=sys.stderr)
        if any_process(stop.is_set()):
            stop.set()                                             # in every process
            again = [argument for argument in arguments if not argument.startswith('--init_from=')]
            print('\nstopped and saved; to go on: '
                  f'python train.py {shlex.join(again)} --init_from=resume')
            break
    if RANK == 0 and not config.eval_only and not stop.is_set():
        draw(config.out_dir)
        print_table(config.out_dir)
    status = 130 if stop.is_set() else 1 if failed else 0
    if WORLD_SIZE > 1:
        leave_together(status)
    sys.exit(status)


if __name__ == '__main__':
    configurator.run(main)
