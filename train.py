"""
Train a GPT whose MLP is aoe, moe or dense, on one GPU or on a CPU, and draw how
the variants compare.

    python train.py config/shakespeare_cpu.py             # four, in turn
    python train.py config/shakespeare_cpu.py --mlp=moe --max_iters=500
    python train.py config/shakespeare_cpu.py --init_from=resume   # go on
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
import json
import math
import os
import shlex
import signal
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configurator
from configurator import (UserError, build, check_type, expect, is_folder_name, parse,
                          read_config_file, read_text, replacing, write_text)
from model import GPT, GPTConfig, entropy
from prepare_data import load_meta

# torchrun starts WORLD_SIZE processes of this script. They share the batches of an iteration, and
# their gradients are averaged; the one with RANK 0 evaluates, saves, draws and prints.
RANK, WORLD_SIZE = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


@dataclass
class TrainConfig(GPTConfig):
    """Every key of a training run: the model's, then these."""
    # data
    dataset: str = 'shakespeare'         # the folder of data_dir to train on
    data_dir: str = 'data'               # where prepare_data.py wrote it
    batch_size: int = 16                 # sequences of block_size tokens, in the model at once
    gradient_accumulation_steps: int = 1   # batches an iteration (L_aux, expert_choice: one by one)
    # optimizer
    max_iters: int = 2000                # iterations, one step of the optimizer each
    learning_rate: float = 2e-3          # the highest, reached after the warm-up
    min_lr: float | None = None          # the lowest; None: a tenth of learning_rate
    warmup_iters: int = 100              # iterations of linear warm-up
    lr_decay_iters: int | None = None    # where the cosine reaches min_lr; None: at max_iters
    weight_decay: float = 0.1            # AdamW's, on matrices alone
    beta1: float = 0.9                   # AdamW's average of gradients
    beta2: float = 0.95                  # AdamW's average of their squares
    grad_clip: float = 1.0               # largest norm of all gradients together; 0: no limit
    # evaluation and output
    out_dir: str = 'out/default'         # each run writes to a folder of its own in here
    name: str | None = None              # of the run, and of its folder; None: its mlp
    eval_interval: int = 250             # iterations between evaluations
    eval_iters: int = 50                 # batches in an evaluation, the same every time
    eval_only: bool = False              # evaluate the checkpoint that is there and write nothing
    log_interval: int = 10               # iterations between updates of the progress bar
    init_from: Literal['scratch', 'resume', 'auto'] = 'scratch'   # auto: resume what is there
    # several runs, trained in turn
    runs: dict | None = None             # run name -> the keys in which it differs
    seeds: tuple | None = None           # train every run with each of these seeds
    # machine
    seed: int = 1337                     # of the first weights, the batches and dropout
    device: str = 'auto'                 # auto: cuda, else mps, else cpu
    threads: int | None = None           # of the CPU; None: PyTorch's choice
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'   # auto: what is native
    compile: Literal['auto', True, False] = 'auto'   # torch.compile, once 20 s a run; auto: False

    def __post_init__(self):
        super().__post_init__()
        if self.min_lr is None:
            self.min_lr = self.learning_rate / 10
        if self.name is None:
            self.name = self.mlp
        expect(self, 'batch_size gradient_accumulation_steps eval_interval eval_iters log_interval'
               ' max_iters learning_rate lr_decay_iters threads', 'a positive number',
               lambda n: n > 0)
        expect(self, 'min_lr warmup_iters weight_decay grad_clip seed', '0 or more',
               lambda n: n >= 0)
        expect(self, 'seed', 'a number below 2^63', lambda seed: seed < 2**63)
        expect(self, 'threads', f'at most the {os.cpu_count()} of this machine',
               lambda n: n <= os.cpu_count())
        expect(self, 'beta1 beta2', 'at least 0 and below 1', lambda beta: 0 <= beta < 1)
        expect(self, 'out_dir', 'a folder to write to', lambda out_dir: out_dir)
        expect(self, 'name', 'the name of a folder in out_dir', is_folder_name)

    @property
    def folder(self):
        """The folder that the run writes to."""
        return os.path.join(self.out_dir, f'{self.name}-{self.seed}' if self.seeds else self.name)

    def path(self, file):
        return os.path.join(self.folder, file)


# Keys in which a run may differ from the checkpoint that it goes on from: how long it trains, how
# often it looks and saves, and where it runs. All others shape the result.
FREE = {'max_iters', 'lr_decay_iters', 'eval_interval', 'log_interval', 'eval_only', 'init_from',
        'out_dir', 'name', 'runs', 'seeds', 'dataset', 'data_dir', 'device', 'threads', 'compile'}


def plan_runs(from_file, from_line):
    """The TrainConfigs that the values of a config file and of the command line ask for.

    One, or one for each entry of `runs`, or of mlp's list, and for each of `seeds`: all variants
    with one seed, then with the next. Later wins: file, run, line; --mlp takes the place of runs.
    """
    values = from_file | from_line
    variants, name, seeds = values.pop('runs', None), values.pop('name', None), values.get('seeds')
    if variants is None or 'mlp' in from_line:                     # --mlp, and not a file's runs
        mlps = values.pop('mlp', TrainConfig.mlp).split(',')
        variants, from_line = {mlp: {'mlp': mlp} for mlp in mlps}, {}
    if not variants:
        raise UserError('runs: expected at least one run, got none')
    if name is not None and len(variants) > 1:
        raise UserError('name: expected one run with it, got several; give one --mlp=, or no name')
    if name is not None:
        variants = {name: next(iter(variants.values()))}
    planned, shared = {}, {'runs', 'name', 'seed', 'seeds', 'out_dir', *from_line}
    for seed in seeds or [values.get('seed', TrainConfig.seed)]:
        seed = check_type(TrainConfig, 'seed', seed, 'seeds, ')
        for name, differs in variants.items():
            where = f'runs, {name}: '
            if not isinstance(differs, dict):
                raise UserError(f'{where}expected a dict of keys, got {differs!r}')
            own = {key: check_type(TrainConfig, key, differs[key], where) for key in differs}
            if given := shared & own.keys():
                raise UserError(f'{where}expected keys of one run, got {min(given)}, which '
                                'all share')
            config = build(TrainConfig, values | own | {'name': name, 'seed': seed})
            if planned.setdefault(config.folder, config) is not config:
                raise UserError(f'seeds: expected each once, got {seed} twice')
    return list(planned.values())


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
        classes = [class_of(character) for character in self.meta['vocabulary'] or '']
        self.class_of_token = torch.tensor(classes, device=device)
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
        window = torch.from_numpy(window)
        if self.device.type == 'cuda':
            window = window.pin_memory().to(self.device, non_blocking=True)
        else:
            window = window.to(self.device)
        return window[:, :-1], window[:, 1:]

    def train_batch(self, iteration, micro_step):
        """A random batch, the same for the same seed."""
        last = len(self.tokens['train']) - self.config.block_size
        random = random_of(self.config.seed, iteration, micro_step)
        return self.at('train', random.integers(0, last, self.config.batch_size))

    def eval_batches(self, split):
        """At most eval_iters batches, spread evenly over the split: the same for all runs."""
        size, S, tokens = self.config.batch_size, self.config.block_size, len(self.tokens[split])
        n = min(self.config.eval_iters, math.ceil(tokens / (size * S)))   # about once each, at most
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
    used = F.one_hot(routing.experts + 1, config.n_expert + 1)[..., 1:].sum(2).float()
    kind = used.new_zeros(used.shape[1], 0)                        # used (L, T, E), of 0 and 1
    if classes is not None:
        kind = F.one_hot(classes, len(CLASSES)).float()            # (T, classes), likewise
    return {
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
            if split == splits[-1] and routing.experts.numel():
                measured.append(measure(routing, data.classes(idx), model.config))
        entry[f'{split}_loss'] = torch.stack(losses).mean().item()
    model.train()
    keys = ('load', 'ent_load', 'ent_conf', 'norm', 'class_load', 'experts_per_token')
    if not measured:                                               # dense
        return entry | {'aux_loss': 0.0} | {key: [] for key in keys}
    total = {key: torch.stack([m[key] for m in measured]).sum(0).cpu() for key in measured[0]}
    batches, used = len(measured), total['used']
    load = used / used.sum(1, keepdim=True)
    values = (load, torch.special.entr(load).sum(1),               # Eq. 7
              total['ent_conf'] / batches, total['norm'] / batches,
              (total['handled'] / total['of_class']).nan_to_num(),
              used.sum(1) / (batches * idx.numel()))
    return entry | {'aux_loss': total['aux_loss'].item() / batches} | {
        key: value.tolist() for key, value in zip(keys, values)}


# -----------------------------------------------------------------------------
# training

def learning_rate_at(iteration, config):
    """Linear warm-up, then half a cosine from learning_rate to min_lr, then min_lr."""
    end = config.lr_decay_iters or config.max_iters
    if iteration < config.warmup_iters:
        return config.learning_rate * (iteration + 1) / (config.warmup_iters + 1)
    if iteration >= end:
        return config.min_lr
    progress = (iteration - config.warmup_iters) / (end - config.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + cosine * (config.learning_rate - config.min_lr)


def make_optimizer(model, config, device):
    """AdamW that decays matrices, and nothing with less than two dimensions, such as norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{'params': matrices, 'weight_decay': config.weight_decay},
                              {'params': others, 'weight_decay': 0.0}],
                             lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             fused=device.type in ('cuda', 'cpu'))


class Training:
    """A run in progress: model, optimizer and data, and how far they are."""

    def __init__(self, config):
        c = self.config = config
        self.device = choose_device(c.device)
        if c.gradient_accumulation_steps % WORLD_SIZE:
            raise UserError(f'gradient_accumulation_steps: expected a multiple of the {WORLD_SIZE} '
                            f'processes, which share them, got {c.gradient_accumulation_steps}')
        self.dtype = choose_dtype(c.dtype, self.device)
        self.autocast = torch.autocast(self.device.type, self.dtype,
                                       enabled=self.dtype != torch.float32)
        self.data = Data(c, self.device)
        known = self.data.meta['vocab_size']
        if c.vocab_size is None:
            c.vocab_size = known
        if c.vocab_size < known:
            raise UserError(f'vocab_size: expected at least the {known} of {c.dataset}, '
                            f'got {c.vocab_size}')
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
        torch.manual_seed(c.seed)
        self.model = GPT(model_config(c)).to(self.device)
        self.forward = torch.compile(self.model) if c.compile is True else self.model
        if WORLD_SIZE > 1:
            self.forward = DistributedDataParallel(self.forward)
        self.optimizer = make_optimizer(self.model, c, self.device)
        # float16 has few exponents: losses are scaled up, gradients back, and a step is skipped and
        # the scale halved where something overflowed. For other dtypes the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.grad_norms, self.skipped_steps = [], 0
        self.iteration, self.tokens, self.seconds, self.best_loss = 0, 0, 0.0, math.inf
        self.losses, self.last_loss = [], math.nan                 # of iterations not checked yet
        self.log, self.log_on_disk = [], read_text(c.path('log.jsonl'))
        self.tokens_per_iter = c.gradient_accumulation_steps * c.batch_size * c.block_size

    def step(self):
        """One iteration. Appends the cross-entropy of its last batch, a tensor, to losses."""
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate_at(self.iteration, self.config)
        steps = self.config.gradient_accumulation_steps
        for micro_step in range(RANK, steps, WORLD_SIZE):
            idx, targets = self.data.train_batch(self.iteration, micro_step)
            random = random_of(self.config.seed, self.iteration, micro_step)
            torch.manual_seed(random.integers(2**63))              # of dropout
            # torchrun: average the gradients with the last one
            wait = WORLD_SIZE > 1 and micro_step + WORLD_SIZE < steps
            with self.forward.no_sync() if wait else contextlib.nullcontext():
                with self.autocast:
                    _, loss, routing = self.forward(idx, targets)
                total = (loss + routing.aux_loss.sum()) * WORLD_SIZE / steps
                self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(),
                                              self.config.grad_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.iteration += 1
        self.tokens += self.tokens_per_iter
        self.losses.append(loss.detach())
        self.grad_norms.append(norm)

    def evaluate(self):
        """Evaluate, log the result and keep the weights if they are the best so far."""
        last = self.log[-1] if self.log else {'tokens': self.tokens, 'seconds': self.seconds}
        tokens, seconds = self.tokens - last['tokens'], self.seconds - last['seconds']
        cuda = self.device.type == 'cuda'
        entry = {
            'iter': self.iteration, 'tokens': self.tokens, 'seconds': self.seconds,
            **evaluate(self.model, self.data, self.autocast),
            'lr': learning_rate_at(self.iteration, self.config),
            'skipped_steps': self.skipped_steps,
            'tokens_per_second': tokens / seconds if tokens else None,
            'peak_memory': torch.cuda.max_memory_allocated(self.device) if cuda else None,   # bytes
        }
        self.log.append(entry)
        if entry['val_loss'] < self.best_loss:                     # cross-entropy alone decides
            self.best_loss = entry['val_loss']
            self.save_weights('best.pt', val_loss=self.best_loss)
        self.log_on_disk = ''.join(json.dumps(line) + '\n' for line in self.log)
        write_text(self.config.path('log.jsonl'), self.log_on_disk)
        report(entry)

    def check(self):
        """Raise UserError if a loss since the last call, or a weight now, is not finite. Counts the
        steps that the scaler skipped."""
        losses, self.losses = torch.stack(self.losses).tolist() if self.losses else [], []
        norms, self.grad_norms = self.grad_norms, []
        if norms and self.scaler.is_enabled():
            self.skipped_steps += (~torch.stack(norms).isfinite()).sum().item()
        for back, loss in zip(range(len(losses), 0, -1), losses):
            if not math.isfinite(loss):
                self.stop_at(self.iteration - back, loss)
            self.last_loss = loss
        if not all(p.isfinite().all() for p in self.model.parameters()):
            self.stop_at(self.iteration, 'weights that are not')

    def stop_at(self, iteration, got):
        rate = self.config.learning_rate
        raise UserError(f'{self.config.folder}: iteration {iteration}: expected a finite loss, got '
                        f'{got}; the last was {self.last_loss:.4f}. ckpt.pt is from before. Train '
                        f'anew with --name= and less than --learning_rate={rate:g}; --warmup_iters '
                        'and --grad_clip can help, too')

    def is_logged(self):
        return bool(self.log) and self.log[-1]['iter'] == self.iteration

    def record(self, evaluate):
        """Save where training is, and before that evaluate it, if asked and not done yet."""
        self.check_alone()
        if evaluate and not self.is_logged():
            self.evaluate()
            draw(self.config.out_dir, ['loss.png'])
            if len(self.log) == 2:
                tell_if_busy()
        self.save()

    def save(self):
        self.save_weights('ckpt.pt', optimizer=self.optimizer.state_dict(), tokens=self.tokens,
                          seconds=self.seconds, best_loss=self.best_loss,
                          scaler=self.scaler.state_dict(), skipped_steps=self.skipped_steps)

    def save_weights(self, file, **more):
        content = {'model': self.model.state_dict(), 'config': asdict(self.config),
                   'meta': self.data.meta, 'iter': self.iteration} | more
        with replacing(self.config.path(file)) as part:
            torch.save(content, part)

    def load(self):
        """Take up everything from ckpt.pt; forget evaluations that the log has from after it."""
        path = self.config.path('ckpt.pt')
        checkpoint = load_checkpoint(path, self.device, 'optimizer', 'tokens', 'scaler')
        check_checkpoint(path, checkpoint, self.config, self.data)
        self.model.load_state_dict(checkpoint['model'])
        self.optimizer.load_state_dict(checkpoint['optimizer'])
        if self.scaler.is_enabled() and checkpoint['scaler']:
            self.scaler.load_state_dict(checkpoint['scaler'])
        self.iteration, self.tokens = checkpoint['iter'], checkpoint['tokens']
        self.seconds, self.best_loss = checkpoint['seconds'], checkpoint['best_loss']
        self.skipped_steps = checkpoint['skipped_steps']
        if self.config.lr_decay_iters is None:                     # the schedule stays as it was
            trained = checkpoint['config']
            self.config.lr_decay_iters = trained['lr_decay_iters'] or trained['max_iters']
        self.log = [entry for entry in read_log(self.config.path('log.jsonl'))
                    if entry['iter'] <= self.iteration]

    def check_alone(self):
        """Raise UserError if another process has written to the folder since this one did."""
        if read_text(self.config.path('log.jsonl')) != self.log_on_disk:
            raise UserError(f'{self.config.folder}: expected to be alone with this run, got a '
                            'log.jsonl that another process has written; it goes on, this one ends')

    def describe(self):
        """Print and return what the model is."""
        c, facts = self.config, {'total_parameters': self.model.total_parameters(),
                                 'active_parameters': self.model.active_parameters(),
                                 'flops_per_token': self.model.flops_per_token()}
        dtype, at_most = str(self.dtype).removeprefix('torch.'), 'at most ' * (c.select == 'top_p')
        print(f'\n{c.name}: {facts["total_parameters"]:,} parameters, '
              f'{at_most}{facts["active_parameters"]:,} active, '
              f'{facts["flops_per_token"] / 1e6:.1f} MFLOPs per token\n'
              f'{c.max_iters:,} iterations of {self.tokens_per_iter:,} tokens, {self.device}, '
              f'{dtype}, seed {c.seed}\nin {c.folder}')
        off = c.equation_5(c.d_low)[1]
        if c.mlp != 'dense' and c.factorised and abs(off) > 0.01:
            than = 'larger' if off > 0 else 'smaller'
            print(f"its experts are {abs(off):.1%} {than} than moe's: no d_wide of Eq. 5 that is a "
                  '\nmultiple of 8 comes nearer; another --d_low may')
        if c.lr_decay_iters not in (None, c.max_iters):
            print(f'the learning rate falls to {c.min_lr:g} at iteration {c.lr_decay_iters:,}: '
                  '--lr_decay_iters')
        return facts


def train(config, stop):
    """Train one run, from scratch or from its checkpoint, until max_iters or until stop is set."""
    training = Training(config)                                    # it refuses what cannot be
    make_folder(config)
    if os.path.exists(config.path('ckpt.pt')):
        if config.init_from == 'scratch':
            return print(f'\n{config.folder}: another process has trained it by now; left as it is')
        training.load()
    facts = training.describe()
    if training.iteration >= config.max_iters and training.is_logged():
        return report(training.log[-1])                            # nothing is left to do
    if RANK == 0:
        write_text(config.path('config.json'), json.dumps(facts | asdict(config), indent=1))

    bar = tqdm(total=config.max_iters * training.tokens_per_iter, initial=training.tokens,
               desc=config.name, unit='tok', unit_scale=True, disable=True if RANK else None,
               dynamic_ncols=True)
    started = time.perf_counter()
    every = 1 if WORLD_SIZE == 1 else config.log_interval          # asking others takes time
    with bar:
        while True:
            ended = training.iteration >= config.max_iters
            stopped = training.iteration % every == 0 and any_process(stop.is_set())
            if training.iteration % config.eval_interval == 0 or ended or stopped:
                training.check()
                training.seconds += time.perf_counter() - started  # the clock stands still here
                if RANK == 0:
                    training.record(evaluate=not stopped)
                started = time.perf_counter()
            if stopped:
                stop.set()                                         # for main, in every process
            if ended or stopped:
                break
            training.step()
            bar.update(training.tokens_per_iter)
            if training.iteration % config.log_interval == 0:
                training.check()
                skipped = training.skipped_steps
                bar.set_postfix_str(f'loss {training.last_loss:.3f}'
                                    + f', {skipped} skipped' * bool(skipped), refresh=False)


def evaluate_only(config):
    """Evaluate one run's checkpoint and write nothing."""
    training = Training(config)
    training.load()
    training.describe()
    entry = evaluate(training.model, training.data, training.autocast)
    report({'iter': training.iteration} | entry)


def report(entry):
    """One line about an evaluation, above the progress bar."""
    balance = f'  Ent_load {statistics.mean(entry["ent_load"]):.3f}' if entry['ent_load'] else ''
    tqdm.write(f'iteration {entry["iter"]:>6,}   train loss {entry["train_loss"]:.4f}   '
               f'val loss {entry["val_loss"]:.4f} {balance}')


# -----------------------------------------------------------------------------
# files: ckpt.pt is the latest state, best.pt the weights with the lowest validation loss

def read_log(path):
    """The evaluations in a log.jsonl, oldest first; none where there is no file."""
    try:
        return [json.loads(line) for line in read_text(path).splitlines()]
    except ValueError as error:
        raise UserError(f'{path}: expected an evaluation a line, as train.py writes them, got '
                        f'"{error}"; mend it, or remove the folder and train again') from None


def make_folder(config):
    """Make the folder of a run, and clear it of what a killed process left half-written."""
    try:
        os.makedirs(config.folder, exist_ok=True)
    except OSError as error:
        raise UserError(f'out_dir: expected a folder to write to, got {config.out_dir!r}: '
                        f'{error.strerror}') from None
    for file in os.listdir(config.folder):
        if file.endswith('.part') and RANK == 0:
            os.remove(config.path(file))


def load_checkpoint(path, device, *more):
    """What Training saved, with the keys `more` in it. Nothing in the file can run code."""
    if not os.path.exists(path):
        raise UserError(f'expected a checkpoint, got no file {path}; train one with train.py')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        whole = (all(isinstance(checkpoint[key], dict) for key in ('config', 'meta', 'model'))
                 and all(key in checkpoint for key in more))
    except Exception:                    # torch.load has many ways to find a file damaged
        whole = False
    if not whole:
        raise UserError(f'{path}: expected a checkpoint of train.py, got a damaged or foreign '
                        'file; remove it and train again')
    return checkpoint


def model_config(config):
    """The part of a TrainConfig that says what the model is."""
    fields = dataclasses.fields(GPTConfig)
    return GPTConfig(**{field.name: getattr(config, field.name) for field in fields})


def check_checkpoint(path, checkpoint, config, data):
    """Refuse, with a UserError, to go on from what other settings or another text have made.

    An evaluation alone, which writes nothing, may change what the weights bear.
    """
    keys = {field.name for field in dataclasses.fields(config)} - FREE
    if config.eval_only:
        keys &= {field.name for field in dataclasses.fields(GPTConfig)}
        keys -= {'dropout', 'aux_weight', 'conf_weight', 'select', 'top_p', 'capacity_factor',
                 'plain', 'top_k' if config.mlp != 'dense' else ''}   # dense is top_k * d_ffn wide
    for key in ('tokenizer', 'vocabulary', *(['sha256'] if not config.eval_only else [])):
        if checkpoint['meta'].get(key) != data.meta[key]:
            raise UserError(f'{path}: expected the {key} of {config.dataset}, {data.meta[key]!r}, '
                            f'got {checkpoint["meta"].get(key)!r}; choose the --dataset that it '
                            'was trained on, or --name= to train anew')
    trained, asked = checkpoint['config'], asdict(config)
    differ = [f'{key} = {trained.get(key)} and not {asked[key]}'
              for key in asked if key in keys and trained.get(key) != asked[key]]
    if differ:
        raise UserError(f'{path}: expected what it was trained with, {", ".join(differ)}; '
                        'leave it so, or train anew with --name=')


# -----------------------------------------------------------------------------
# the machine

def choose_device(name):
    """A torch.device that is there; 'auto' takes the fastest. Raises UserError."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    mps = mps and torch_version() >= (2, 11)   # before, its attention is wrong (issue 174861)
    there = ['cuda'] * cuda + ['mps'] * mps + ['cpu']
    kind, _, index = name.replace('auto', there[0]).partition(':')
    known = not index or index.isdigit() and int(index) < torch.cuda.device_count()
    if kind not in there or not known:
        raise UserError(f'device: expected auto or one of {", ".join(there)} on this machine, '
                        f'got {name!r}')
    if kind == 'cuda' and WORLD_SIZE > 1:
        index = os.environ['LOCAL_RANK']
        torch.cuda.set_device(int(index))
    return torch.device(f'{kind}:{index}' if index else kind)


def torch_version():
    return tuple(int(part) for part in torch.__version__.split('.')[:2])


def choose_dtype(name, device):
    """The dtype of matmuls. 'auto' is bfloat16 where the hardware multiplies it; else float16 on
    cuda (T4, V100), and float32."""
    if device.type == 'mps' and name in ('bfloat16', 'float16') and torch_version() < (2, 14):
        raise UserError('dtype: expected float32 on mps before torch 2.14, whose causal attention '
                        f'in 16 bits sees later tokens (PyTorch issue 195910), got {name} and '
                        f'torch {torch.__version__}')
    if name != 'auto':
        return getattr(torch, name)
    if device.type == 'cuda':
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    native = device.type == 'cpu' and (torch.cpu._is_avx512_bf16_supported()
                                       or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def tell_if_busy():
    """One line where more threads want to run than there are cores: then all take much longer."""
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0  # not on Windows
    if load > os.cpu_count() + 1:
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
    """What the runs in out_dir have logged: run name -> [(config.json, log)], one for each seed.

    A seed counts once. Runs of one name whose settings differ are told apart by their folders.
    """
    found, settings = {}, {}
    for folder in sorted(os.listdir(out_dir)):
        log = read_log(os.path.join(out_dir, folder, 'log.jsonl'))
        config = read_text(os.path.join(out_dir, folder, 'config.json'))
        if not log or not config:
            continue
        config = json.loads(config)
        shape = {key: value for key, value in config.items() if key not in FREE | {'seed'}}
        name = config['name'] or folder                            # older ones tell no name
        if settings.setdefault(name, shape) != shape:
            name = folder
        seeds = found.setdefault(name, [])
        if config['seed'] not in [other['seed'] for other, _ in seeds]:
            seeds.append((config, log))
    return found


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


def as_text(name):
    """A run's name for matplotlib, to which $ means a formula and a leading _ to leave it out."""
    return '\u200b' * name.startswith('_') + name.replace('$', r'\$')


def draw_loss(plt, runs, color):
    """Validation loss over iterations: of each run the mean of its seeds, in a band of them all."""
    figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
    later = []                           # the first evaluation, of no training, may lie outside
    for i, (name, seeds) in enumerate(runs.items()):
        curves = [{entry['iter']: entry['val_loss'] for entry in log} for _, log in seeds]
        iterations = sorted(set.intersection(*map(set, curves)))   # where all seeds were evaluated
        points = [[curve[iteration] for curve in curves] for iteration in iterations]
        label = f'{as_text(name)} {statistics.mean(lowest(seeds)):.4f}'
        label += f', mean of {len(seeds)} seeds' if len(seeds) > 1 else ''
        axes.plot(iterations, [statistics.mean(p) for p in points], color=color[name], marker='.',
                  linestyle=('-', '--', ':')[i // len(COLORS) % 3], label=label)
        axes.fill_between(iterations, [min(p) for p in points], [max(p) for p in points],
                          color=color[name], alpha=0.2)
        later += [loss for p in points[1:] or points for loss in p]
    axes.set_ylim(min(later) - 0.05, max(later) + 0.05)
    axes.set(xlabel='iteration', ylabel='val_loss (nats per token)', title='Validation loss')
    axes.grid(alpha=0.3)
    axes.legend()
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
    axes.set_yticks(range(len(runs)), map(as_text, runs))
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
                    axes.set_title(f'{as_text(name)}, layer {layer + 1}', fontsize=9)
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

    What it stands on, the last evaluation of each run, goes to results.jsonl.
    """
    runs = find_runs(out_dir)
    table = [('run', 'parameters', 'active', 'val loss', 'Ent_load', 'tokens/s', 'memory')]
    for name, seeds in runs.items():
        config, entries = seeds[0][0], [entry for _, log in seeds for entry in log]
        ent_load = [statistics.mean(log[-1]['ent_load']) for _, log in seeds if log[-1]['ent_load']]
        speeds = [entry['tokens_per_second'] for entry in entries if entry['tokens_per_second']]
        memory = [entry['peak_memory'] for entry in entries if entry['peak_memory']]
        table.append((name, f'{config["total_parameters"]:,}', f'{config["active_parameters"]:,}',
                      mean_and_spread(lowest(seeds)),
                      f'{statistics.mean(ent_load):.3f}' if ent_load else '-',
                      f'{statistics.median(speeds):,.0f}' if speeds else '-',
                      f'{max(memory) / 1e9:,.1f} GB' if memory else '-'))
    if all(row[-1] == '-' for row in table[1:]):                   # a CPU's memory is not measured
        table = [row[:-1] for row in table]
    print()
    print_rows(table)
    print(f'\nval loss: the lowest; Ent_load: at most ln {config["n_expert"]} = '
          f'{math.log(config["n_expert"]):.3f}; pictures in {out_dir}')
    results = [{'run': name, 'seed': config['seed'], 'lowest_val_loss': loss,
                **{key: value for key, value in log[-1].items() if key != 'class_load'}}   # long
               for name, seeds in runs.items() for (config, log), loss in zip(seeds, lowest(seeds))]
    write_text(os.path.join(out_dir, 'results.jsonl'),
               ''.join(json.dumps(result) + '\n' for result in results))


# -----------------------------------------------------------------------------

def check_folders(runs):
    """Refuse, with a UserError, to write over a run, or to go on where there is none."""
    config, there = runs[0], [run for run in runs if os.path.exists(run.path('ckpt.pt'))]
    if (config.init_from == 'resume' or config.eval_only) and not there:
        raise UserError(f'{config.path("ckpt.pt")}: expected a checkpoint to go on from, got no '
                        'such file; train first, without --init_from=resume')
    if config.init_from == 'scratch' and not config.eval_only and there:
        raise UserError(f'{there[0].folder}: expected a new folder, got one that holds a run; '
                        '--init_from=resume goes on with it, --name= or --out_dir= keeps it')


def main(arguments):
    from_line, files = parse(TrainConfig, arguments, __doc__)
    from_file = {}
    for file in files:
        from_file |= read_config_file(TrainConfig, file)
    runs = plan_runs(from_file, from_line)
    config = runs[0]
    if RANK == 0:
        check_folders(runs)
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
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
        if config.eval_only:
            evaluate_only(run)
            continue
        train(run, stop)
        if stop.is_set():
            again = [argument for argument in arguments if not argument.startswith('--init_from=')]
            print('\nstopped and saved; to go on: '
                  f'python train.py {shlex.join(again)} --init_from=resume')
            break
    else:
        if RANK == 0 and not config.eval_only:
            draw(config.out_dir)
            print_table(config.out_dir)
    status = 130 if stop.is_set() else 0
    if WORLD_SIZE > 1:
        leave_together(status)
    sys.exit(status)


if __name__ == '__main__':
    configurator.run(main)
