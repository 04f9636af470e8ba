"""
Train a GPT whose MLP is aoe, moe or dense, on one GPU or on a CPU, and draw
how the variants compare.

    python train.py config/shakespeare_cpu.py             # the three in turn
    python train.py config/shakespeare_cpu.py --mlp=moe --max_iters=500
    python train.py config/shakespeare_cpu.py --init_from=resume   # go on
    python train.py --n_layer=6 --n_embd=384 --d_low=64   # no file: defaults
    torchrun --nproc_per_node=8 train.py config/openwebtext.py   # eight GPUs

Each run writes <out_dir>/<run>/config.json, log.jsonl (a line per evaluation),
ckpt.pt (to resume from) and best.pt (the lowest validation loss). As it goes,
and at the end, the pictures in <out_dir> are drawn anew from all runs found
there: loss, final_loss, expert_load, expert_class, load_map and norm. The table
at the end is also written there, to table.md, and what it stands on to results.jsonl.
"""

import contextlib
import ctypes
import dataclasses
import gc
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import fcntl
except ImportError:                      # Windows: one process at a time
    fcntl = None

import configurator
from configurator import UserError, build, check_type, is_folder_name, parse, read_config_file
from model import GPT, GPTConfig, norm_of_node
from prepare_data import load_meta


# torchrun starts WORLD_SIZE processes of this script. They share the batches of an iteration, and their gradients are
# averaged; the process with RANK 0 evaluates, saves, draws and prints.
RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (('RANK', 0), ('WORLD_SIZE', 1)))

# The pilot of Tables 1, 6 and 7: how a trained moe may choose its experts instead. Node and norm, as in g.L2.
CHOICES = {'router': None, 'random': lambda layer, x: torch.rand(len(x), layer.n_expert, device=x.device)} | {
    f'{node}.L{order}': norm_of_node(node, float(order))
    for node in ('g', 'u', 'silu', 'product', 'output') for order in (1, 2, 'inf')}


@dataclass
class TrainConfig(GPTConfig):
    """Every key of a training run: the model's, then these."""
    # data
    dataset: str = 'shakespeare'                  # the folder of data_dir to train on
    data_dir: str = 'data'                        # where prepare_data.py wrote it
    batch_size: int = 16                          # sequences of block_size tokens that pass the model at once
    gradient_accumulation_steps: int = 1          # batches per iteration
    # optimizer
    max_iters: int = 2000                         # iterations, one step of the optimizer each
    learning_rate: float = 2e-3                   # the highest, reached after the warm-up
    min_lr: float | None = None                   # the lowest; None: a tenth of learning_rate
    warmup_iters: int = 100                       # iterations of linear warm-up
    lr_decay_iters: int | None = None             # iteration at which the cosine reaches min_lr; None: max_iters
    weight_decay: float = 0.1                     # AdamW's, on matrices alone
    beta1: float = 0.9                            # AdamW's average of gradients
    beta2: float = 0.95                           # AdamW's average of their squares
    grad_clip: float = 1.0                        # largest norm of all gradients together; 0: no limit
    # evaluation and output
    out_dir: str = 'out/default'                  # each run writes to a folder of its own in here
    name: str | None = None                       # of the run, and of its folder; None: its mlp
    eval_interval: int = 250                      # iterations between evaluations
    eval_iters: int = 50                          # batches in an evaluation, the same every time
    eval_only: bool = False                       # evaluate the checkpoint that is there and write nothing
    choose_by: str = 'router'                     # with eval_only, of moe: random, all, or a node and a norm, as in g.L2
    log_interval: int = 10                        # iterations between updates of the progress bar
    init_from: Literal['scratch', 'resume', 'auto'] = 'scratch'   # resume: go on from the checkpoints in out_dir; auto: if any
    # several runs, trained in turn
    runs: dict | None = None                      # run name -> the keys in which it differs; only in a config file
    seeds: tuple | None = None                    # train every run with each of these seeds
    # machine
    seed: int = 1337                              # of the first weights, the batches and dropout
    device: str = 'auto'                          # auto: cuda, else mps, else cpu
    threads: int | None = None                    # of the CPU; None: PyTorch's choice
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'   # of the matmuls; auto: bfloat16 where it is native
    compile: Literal['auto', True, False] = 'auto'           # torch.compile, once 20 s a run; auto: False

    def __post_init__(self):
        super().__post_init__()
        if self.min_lr is None:
            self.min_lr = self.learning_rate / 10
        if self.lr_decay_iters is None:
            self.lr_decay_iters = self.max_iters
        for key in ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'eval_iters', 'log_interval',
                    'max_iters', 'learning_rate', 'lr_decay_iters', 'threads'):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise ValueError(f'{key}: expected a positive number, got {getattr(self, key)}')
        for key in ('min_lr', 'warmup_iters', 'weight_decay', 'grad_clip', 'seed'):
            if getattr(self, key) < 0:
                raise ValueError(f'{key}: expected 0 or more, got {getattr(self, key)}')
        if self.seed >= 2**63:
            raise ValueError(f'seed: expected a number below 2^63, got {self.seed}')
        if self.threads is not None and self.threads > os.cpu_count():
            raise ValueError(f'threads: expected at most the {os.cpu_count()} of this machine, got {self.threads}')
        if self.choose_by not in CHOICES and self.choose_by != 'all':
            raise ValueError(f'choose_by: expected all or one of {", ".join(CHOICES)}, got {self.choose_by!r}')
        if self.choose_by != 'router' and not self.eval_only:
            raise ValueError('choose_by: expected --eval_only=True with it, got False')
        for key in ('beta1', 'beta2'):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f'{key}: expected at least 0 and below 1, got {getattr(self, key)}')


class Run:
    """One model to train: its name, its configuration and the folder that it writes to."""

    def __init__(self, name, config, folder):
        self.name, self.config, self.folder = name, config, folder

    def path(self, file):
        return os.path.join(self.folder, file)


def plan_runs(from_file, from_line):
    """The Runs that the values of a config file and of the command line ask for.

    One, or one for each entry of `runs`, or of mlp's list, and for each of `seeds`. Later wins: file, run, line.
    """
    values = from_file | from_line
    variants, seeds = values.pop('runs', None), values.pop('seeds', None) or (values.get('seed', TrainConfig.seed),)
    name = values.pop('name', None)
    if name is not None and (variants is not None or ',' in values.get('mlp', '')):
        raise UserError('name: expected one run with it, got several; give one --mlp=, or no name')
    if variants is None:
        variants = {name or mlp: {'mlp': mlp} for mlp in values.pop('mlp', TrainConfig.mlp).split(',')}
        from_line = {}                                   # mlp is split up, not contradicted
    if not variants:
        raise UserError('runs: expected at least one run, got none')
    for name, differs in variants.items():
        if not isinstance(name, str) or not isinstance(differs, dict):
            raise UserError(f'runs: expected a name and a dict of keys for each, got {name!r}: {differs!r}')
        for key, value in differs.items():
            differs[key] = check_type(TrainConfig, key, value, f'runs, {name}: ')
            if key in ('runs', 'seed', 'seeds', 'out_dir'):
                raise UserError(f'runs, {name}: expected keys of one run, got {key}; give it for all runs')
            if key in from_line:
                raise UserError(f'--{key}: expected a key that all runs share, got one that the run {name} sets itself')
    planned = []
    if not values.get('out_dir', TrainConfig.out_dir):
        raise UserError("out_dir: expected a folder to write to, got ''")
    for seed in seeds:                                   # all variants with one seed, then the next: stopped, they compare
        for name, differs in variants.items():
            config = build(TrainConfig, values | differs | {'seed': check_type(TrainConfig, 'seed', seed, 'seeds, ')})
            if not is_folder_name(name):
                raise UserError(f'name: expected the name of a folder in out_dir, got {name!r}')
            folder = name if len(seeds) == 1 else f'{name}-{seed}'
            planned.append(Run(name, config, os.path.join(config.out_dir, folder)))
    if len({run.folder for run in planned}) < len(planned):
        raise UserError(f'seeds: expected each once, got {", ".join(run.folder for run in planned)}')
    return planned


# -----------------------------------------------------------------------------
# machine

def choose_device(name):
    """A torch.device that is there; 'auto' takes the fastest. Raises UserError."""
    available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        return torch.device(next(kind for kind, there in available.items() if there))
    kind, _, index = name.partition(':')
    if not available.get(kind) or index and not (index.isdigit() and int(index) < torch.cuda.device_count()):
        raise UserError(f'device: expected auto or one of {", ".join(k for k, there in available.items() if there)} '
                        f'on this machine, got {name!r}')
    return torch.device(name)


def any_process(flag):
    """Whether the flag is set in any process of torchrun; all have to ask, and wait for each other."""
    if WORLD_SIZE == 1:
        return flag
    flags = [None] * WORLD_SIZE
    dist.all_gather_object(flags, flag)
    return any(flags)


def leave_together(status):
    """End the processes of torchrun, none while another still needs it. At once: threads of gloo may still ask for Python
    when it shuts down, and then abort the process (one time in ten)."""
    any_process(False)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def choose_dtype(name, device):
    """The dtype of the matmuls; 'auto' is bfloat16 where the hardware multiplies it natively, float32 elsewhere."""
    if name != 'auto':
        return getattr(torch, name)
    if device.type == 'cuda':
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory():
    """Let glibc keep large freed blocks instead of returning them to the kernel, which clears them page by page when
    the next step asks again: a quarter of the time of a training step on a CPU. Does nothing where there is no glibc.
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4                      # of glibc's malloc.h
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 * 2**20)):
        call_glibc('mallopt', parameter, value)


def call_glibc(function, *arguments):
    """Call a function of the C library, where there is a glibc that has it."""
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except (AttributeError, OSError, TypeError):
        pass


def reset_peak_memory(device):
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    else:
        call_glibc('malloc_trim', 0)                                           # what an earlier run left
        try:
            with open('/proc/self/clear_refs', 'w') as file:   # Linux: the next peak starts at what is in use now
                file.write('5')
        except OSError:
            pass


def peak_memory(device):
    """Most bytes in use since the reset: by tensors on cuda, by the process on Linux; None where neither tells."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        with open('/proc/self/status') as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith('VmHWM:'))
    except OSError:
        return None


# -----------------------------------------------------------------------------
# data

def random_of(seed, iteration, micro_step):
    """Random numbers that depend on these three and nothing else, so that resuming needs no state of a generator."""
    return np.random.default_rng((seed, iteration, micro_step))


CLASSES = ('letters', 'capitals', 'spaces', 'line ends', 'other')


def class_of(character):
    """The place in CLASSES of a character; digits and punctuation are others."""
    is_of = (character.isalpha() and not character.isupper(), character.isupper(),
             character.isspace() and character not in '\r\n', character in '\r\n', True)
    return is_of.index(True)


class Data:
    """The tokens of a data set, and batches of them: inputs and targets (batch_size, block_size), int64."""

    def __init__(self, config, device):
        folder = os.path.join(config.data_dir, config.dataset)
        self.meta = load_meta(folder)
        self.config, self.device = config, device
        classes = [class_of(character) for character in self.meta['vocabulary'] or '']
        self.class_of_token = torch.tensor(classes, dtype=torch.int64, device=device)   # (vocab_size,); empty for gpt2
        self.tokens = {}
        for split in ('train', 'val'):
            path = os.path.join(folder, f'{split}.bin')
            expected = 2 * self.meta[f'{split}_tokens']
            if not os.path.exists(path) or os.path.getsize(path) != expected:
                got = os.path.getsize(path) if os.path.exists(path) else 'no file'
                raise UserError(f'{path}: expected {expected} bytes, got {got}; '
                                f'remove {folder} and run prepare_data.py again')
            if self.meta[f'{split}_tokens'] <= config.block_size:
                raise UserError(f'{path}: expected more than block_size = {config.block_size} tokens, got '
                                f'{self.meta[f"{split}_tokens"]}; lower --block_size or prepare a longer text')
            self.tokens[split] = np.memmap(path, dtype=np.uint16, mode='r')

    def at(self, split, starts):
        """The batch whose sequences begin at starts."""
        S = self.config.block_size
        window = self.tokens[split][np.asarray(starts)[:, None] + np.arange(S + 1)].astype(np.int64)
        if window.max() >= self.meta['vocab_size']:
            raise UserError(f'{split}.bin of {self.config.dataset}: expected tokens below vocab_size = '
                            f'{self.meta["vocab_size"]}, got {window.max()}; remove the folder and run prepare_data.py again')
        window = torch.from_numpy(window)                                     # (batch_size, S + 1)
        if self.device.type == 'cuda':
            window = window.pin_memory().to(self.device, non_blocking=True)
        else:
            window = window.to(self.device)
        return window[:, :-1], window[:, 1:]

    def train_batch(self, iteration, micro_step):
        """A random batch."""
        last = len(self.tokens['train']) - self.config.block_size
        random = random_of(self.config.seed, iteration, micro_step)
        return self.at('train', random.integers(0, last, self.config.batch_size))

    def eval_batches(self, split):
        """eval_iters batches, spread evenly over the split: the same every time, for every run and seed."""
        c = self.config
        starts = np.linspace(0, len(self.tokens[split]) - c.block_size - 1, c.eval_iters * c.batch_size, dtype=np.int64)
        for batch in starts.reshape(c.eval_iters, c.batch_size):
            yield self.at(split, batch)


def count_classes(classes, choices, n_expert):
    """From classes (B, S) and a Choice per layer: how many tokens of each class each expert handled (L, classes, E), and
    how many there are (classes, 1)."""
    C = len(CLASSES)
    handled = []
    for choice in choices:
        cell = classes.flatten().unsqueeze(1) * n_expert + choice.experts     # (T, K)
        handled.append(torch.bincount(cell[choice.weights > 0], minlength=C * n_expert).view(C, n_expert))
    return torch.stack(handled), torch.bincount(classes.flatten(), minlength=C).unsqueeze(1)


@torch.no_grad()
def evaluate(model, data, autocast, splits=('train', 'val')):
    """Mean cross-entropy (nats per token) on the splits, and on the validation split what the experts did."""
    model.eval()
    losses, routings, class_counts = {}, [], []
    for split in splits:
        batch_losses = []
        for idx, targets in data.eval_batches(split):
            with autocast, model.watching_experts() as choices:
                _, loss, routing = model(idx, targets)
            batch_losses.append(loss)
            if split == 'val':
                routings.append(routing)
                if choices and len(data.class_of_token):
                    class_counts.append(count_classes(data.class_of_token[idx], choices, model.config.n_expert))
        losses[split] = torch.stack(batch_losses).mean().item()
    model.train()
    handled, there = map(sum, zip(*class_counts)) if class_counts else (torch.zeros(0), 1)
    mean = type(routing)(*(torch.stack(field).mean(0) for field in zip(*routings)))
    return {
        **{f'{split}_loss': loss for split, loss in losses.items()},
        'aux_loss': mean.aux_loss.sum().item(),
        'load': mean.load.tolist(),                                           # [layer][expert]
        'ent_load': torch.special.entr(mean.load).sum(-1).tolist() if len(mean.load) else [],   # Eq. 7: [layer]
        'ent_conf': mean.ent_conf.tolist(),                                   # [layer]
        'norm': mean.norm.tolist(),                                           # [layer][expert]
        'experts_per_token': mean.experts_per_token.tolist(),                 # [layer]
        'class_load': (handled / there).nan_to_num().tolist(),                # [layer][class][expert]
    }


# -----------------------------------------------------------------------------
# checkpoints: ckpt.pt is the latest state, to resume from; best.pt the weights with the lowest validation loss

@contextlib.contextmanager
def replacing(path):
    """As a context, gives the name of a file to write, which then takes the place of path: whole, or not at all.

    The name holds the process: another one may write the same. Raises UserError where writing fails.
    """
    part = f'{path}.{os.getpid()}.part'
    try:
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                                  # RuntimeError: torch.save's, of a full disk
        raise UserError(f'{path}: expected to write it, got "{str(error).splitlines()[0]}"; what was there is untouched. '
                        'Is the disk full? Make room and go on with --init_from=resume') from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def write_text(path, text):
    with replacing(path) as part, open(part, 'w', encoding='utf-8') as file:
        file.write(text)


def load_checkpoint(path, device):
    """What Training saved. Nothing in the file can run code. Raises UserError where it is missing or damaged."""
    if not os.path.exists(path):
        raise UserError(f'expected a checkpoint, got no file {path}; train one with `python train.py`')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        whole = all(isinstance(checkpoint[key], dict) for key in ('config', 'meta', 'model'))
    except Exception:                   # torch.load has many ways to find a file damaged
        whole = False
    if not whole:
        raise UserError(f'{path}: expected a checkpoint of train.py, got a damaged or foreign file; '
                        'remove it and train again')
    return checkpoint


def model_config(config):
    """The part of a TrainConfig that says what the model is."""
    return GPTConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(GPTConfig)})


def check_checkpoint(path, checkpoint, config, data):
    """Refuse, with a UserError, to go on from a checkpoint of another model or another vocabulary."""
    for key in ('tokenizer', 'vocabulary', 'vocab_size'):
        if checkpoint['meta'][key] != data.meta[key]:
            raise UserError(f'{path}: expected the {key} of {config.dataset}, {data.meta[key]!r}, got '
                            f'{checkpoint["meta"][key]!r}; choose the --dataset that it was trained on')
    free = {'dropout', 'aux_weight', 'conf_weight', 'select', 'top_p', 'capacity_factor'}   # these may change on the way
    if config.mlp != 'dense':                                                 # whose width is top_k * d_ffn
        free.add('top_k')
    for key, value in dataclasses.asdict(model_config(config)).items():
        trained = checkpoint['config'].get(key)
        if key not in free and trained != value:
            raise UserError(f'{path}: expected a checkpoint with {key} = {value}, got {trained}; '
                            f'give --{key}={trained} or another --out_dir')


def read_log(path):
    """The evaluations in a log.jsonl, oldest first; none where there is no file."""
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding='utf-8') as file:
            return [json.loads(line) for line in file]
    except ValueError as error:
        raise UserError(f'{path}: expected an evaluation a line, as train.py writes them, got "{error}"; '
                        'mend it, or remove the folder and train again') from None


# -----------------------------------------------------------------------------
# training

def learning_rate_at(iteration, config):
    """Linear warm-up, then half a cosine from learning_rate to min_lr, then min_lr."""
    if iteration < config.warmup_iters:
        return config.learning_rate * (iteration + 1) / (config.warmup_iters + 1)
    if iteration >= config.lr_decay_iters:
        return config.min_lr
    progress = (iteration - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def make_optimizer(model, config, device):
    """AdamW that decays matrices, and neither norms' weights nor anything else with less than two dimensions."""
    groups = [{'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': config.weight_decay},
              {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             fused=device.type in ('cuda', 'cpu'))


class Training:
    """A Run in progress: model, optimizer and data, and how far they are."""

    def __init__(self, run):
        self.run, self.config = run, run.config
        self.device = choose_device(self.config.device)
        if self.device.type == 'cuda' and WORLD_SIZE > 1:
            self.device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(self.device)
        if self.config.gradient_accumulation_steps % WORLD_SIZE:
            raise UserError(f'gradient_accumulation_steps: expected a multiple of the {WORLD_SIZE} processes, which share '
                            f'them, got {self.config.gradient_accumulation_steps}')
        self.dtype = choose_dtype(self.config.dtype, self.device)
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        self.data = Data(self.config, self.device)
        vocabulary = self.data.meta['vocab_size']
        if self.config.vocab_size is None:
            self.config.vocab_size = vocabulary
        if self.config.vocab_size < vocabulary:
            raise UserError(f'vocab_size: expected at least the {vocabulary} of {self.config.dataset}, '
                            f'got {self.config.vocab_size}')
        reset_peak_memory(self.device)
        torch.manual_seed(self.config.seed)
        self.model = GPT(model_config(self.config)).to(self.device)
        self.forward = torch.compile(self.model) if self.config.compile is True else self.model
        if WORLD_SIZE > 1:
            self.forward = DistributedDataParallel(self.forward)
        self.optimizer = make_optimizer(self.model, self.config, self.device)
        self.iteration, self.seconds, self.best_loss, self.log = 0, 0.0, math.inf, []
        self.losses, self.last_loss = [], math.nan                            # those of iterations that were not checked yet
        self.tokens_per_iter = self.config.gradient_accumulation_steps * self.config.batch_size * self.config.block_size

    def load(self):
        """Take up everything from ckpt.pt. Evaluations that the log has from after it are forgotten."""
        checkpoint = load_checkpoint(self.run.path('ckpt.pt'), self.device)
        check_checkpoint(self.run.path('ckpt.pt'), checkpoint, self.config, self.data)
        if 'optimizer' not in checkpoint:
            raise UserError(f'{self.run.path("ckpt.pt")}: expected the whole state of a run, got weights alone; '
                            'remove it and train again')
        self.model.load_state_dict(checkpoint['model'])
        self.optimizer.load_state_dict(checkpoint['optimizer'])
        self.iteration, self.seconds = checkpoint['iter'], checkpoint['seconds']
        self.best_loss = checkpoint['best_loss']
        self.log = [entry for entry in read_log(self.run.path('log.jsonl')) if entry['iter'] <= self.iteration]

    def check(self):
        """Raise UserError if a loss since the last call, or a weight now, is not finite. Waits for a GPU."""
        losses, self.losses = torch.stack(self.losses).tolist() if self.losses else [], []
        for back, loss in zip(range(len(losses), 0, -1), losses):
            if not math.isfinite(loss):
                self.stop_at(self.iteration - back, loss)
            self.last_loss = loss
        if not all(p.isfinite().all() for p in self.model.parameters()):
            self.stop_at(self.iteration, 'weights that are not')

    def stop_at(self, iteration, got):
        raise UserError(f'{self.run.folder}: iteration {iteration}: expected a finite loss, got {got}; the last was '
                        f'{self.last_loss:.4f}. ckpt.pt is from before: go on from it with --init_from=resume and less than '
                        f'--learning_rate={self.config.learning_rate:g}; --warmup_iters and --grad_clip can help, too')

    def save(self):
        self.save_weights('ckpt.pt', optimizer=self.optimizer.state_dict(), seconds=self.seconds, best_loss=self.best_loss)

    def save_weights(self, file, **more):
        content = {'model': self.model.state_dict(), 'config': dataclasses.asdict(self.config),
                   'meta': self.data.meta, 'iter': self.iteration} | more
        with replacing(self.run.path(file)) as part:
            torch.save(content, part)

    def step(self):
        """One iteration. Appends the cross-entropy of its last batch, a tensor, to losses."""
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate_at(self.iteration, self.config)
        steps = self.config.gradient_accumulation_steps
        for micro_step in range(RANK, steps, WORLD_SIZE):
            idx, targets = self.data.train_batch(self.iteration, micro_step)
            torch.manual_seed(random_of(self.config.seed, self.iteration, micro_step).integers(2**63))   # of dropout
            wait = WORLD_SIZE > 1 and micro_step + WORLD_SIZE < steps         # average the gradients with the last one
            with self.forward.no_sync() if wait else contextlib.nullcontext():
                with self.autocast:
                    _, loss, routing = self.forward(idx, targets)
                ((loss + routing.aux_loss.sum()) * WORLD_SIZE / steps).backward()
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.iteration += 1
        self.losses.append(loss.detach())

    def evaluate(self):
        """Evaluate, log the result and keep the weights if they are the best so far."""
        last = self.log[-1] if self.log else {'iter': self.iteration, 'seconds': self.seconds}
        done = (self.iteration - last['iter']) * self.tokens_per_iter
        entry = {
            'iter': self.iteration, 'tokens': self.iteration * self.tokens_per_iter, 'seconds': self.seconds,
            **evaluate(self.model, self.data, self.autocast),
            'lr': learning_rate_at(self.iteration, self.config),
            'tokens_per_second': done / (self.seconds - last['seconds']) if done else None,
            'peak_memory': peak_memory(self.device),                          # bytes
        }
        self.log.append(entry)
        if entry['val_loss'] < self.best_loss:                                # cross-entropy alone decides
            self.best_loss = entry['val_loss']
            self.save_weights('best.pt', val_loss=self.best_loss)
        write_text(self.run.path('log.jsonl'), ''.join(json.dumps(line) + '\n' for line in self.log))
        report(entry)

    def describe(self):
        """Print and return what the model is."""
        facts = {'run': self.run.name, 'total_parameters': self.model.total_parameters(),
                 'active_parameters': self.model.active_parameters(), 'flops_per_token': self.model.flops_per_token()}
        print(f'\n{self.run.name}: {facts["total_parameters"]:,} parameters, {facts["active_parameters"]:,} active, '
              f'{facts["flops_per_token"] / 1e6:.1f} MFLOPs per token\n'
              f'{self.config.max_iters:,} iterations of {self.tokens_per_iter:,} tokens, {self.device}, '
              f'{str(self.dtype).removeprefix("torch.")}, seed {self.config.seed}\nin {self.run.folder}')
        return facts


@contextlib.contextmanager
def claim(run):
    """Hold the folder of a run, so that several commands can share their runs. As a context, gives False where another
    one holds it. The system lets go of it, however this process ends."""
    try:
        os.makedirs(run.folder, exist_ok=True)
    except OSError as error:
        raise UserError(f'out_dir: expected a folder to write to, got {run.config.out_dir!r}: {error.strerror}') from None
    if fcntl is None or RANK > 0:
        yield any_process(RANK == 0)
        return
    folder = os.open(run.folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claimed = True
        except BlockingIOError:
            claimed = False
        yield any_process(claimed)
    finally:
        os.close(folder)


def evaluate_only(run):
    """Evaluate one Run's checkpoint and write nothing."""
    training = Training(run)
    training.load()
    training.describe()
    report({'iter': training.iteration} | evaluate(training.model, training.data, training.autocast))


def train(run, stop, draw):
    """Train one Run, from scratch or from its checkpoint, until max_iters or until `stop` is set. draw(out_dir) is called
    after each evaluation."""
    training = Training(run)                                                  # first, since it refuses what cannot be
    with claim(run) as claimed:
        if claimed:
            for file in os.listdir(run.folder):
                if file.endswith('.part') and RANK == 0:                      # half-written by a process that was killed
                    os.remove(run.path(file))
            if run.config.init_from != 'scratch' and os.path.exists(run.path('ckpt.pt')):
                training.load()
            loop(run, training, stop, draw)
        else:
            print(f'\n{run.folder}: another process is training it')


def loop(run, training, stop, draw):
    """The training loop, from where the Training is."""
    config, facts = run.config, training.describe()
    write_text(run.path('config.json'), json.dumps(facts | dataclasses.asdict(config), indent=1))

    bar = tqdm(total=config.max_iters * training.tokens_per_iter, desc=run.name, unit='tok', unit_scale=True,
               initial=training.iteration * training.tokens_per_iter, disable=True if RANK else None, dynamic_ncols=True)
    started = time.perf_counter()
    every = 1 if WORLD_SIZE == 1 else config.log_interval                     # asking other processes takes time
    with bar:
        while True:
            at_end = training.iteration >= config.max_iters
            stopped = training.iteration % every == 0 and any_process(stop.is_set())
            if training.iteration % config.eval_interval == 0 or at_end or stopped:
                training.check()
                training.seconds += time.perf_counter() - started             # the clock stands still for what follows
                if RANK == 0:
                    if not stopped and not (training.log and training.log[-1]['iter'] == training.iteration):
                        training.evaluate()
                        draw(config.out_dir)
                    training.save()
                started = time.perf_counter()
            if stopped:
                stop.set()                                                    # for main, in every process
            if at_end or stopped:
                break
            training.step()
            bar.update(training.tokens_per_iter)
            if training.iteration % config.log_interval == 0:
                training.check()
                bar.set_postfix_str(f'loss {training.last_loss:.3f}', refresh=False)


def pilot(runs):
    """Evaluate the trained moe models among runs with experts chosen otherwise. Prints the validation losses."""
    first = runs[0].config
    runs = [run for run in runs if run.config.mlp == 'moe' and not run.config.factorised]
    if not runs:
        raise UserError('choose_by: expected a moe that is not factorised, got none; give --mlp=moe')
    losses = {choice: {} for choice in (CHOICES if first.choose_by == 'all' else ('router', first.choose_by))}
    for run in runs:
        training = Training(run)
        training.load()
        for choice, found in tqdm(losses.items(), desc=run.folder, unit='choice', disable=None):
            for block in training.model.blocks:
                block.mlp.choose_by = CHOICES[choice]
            loss = evaluate(training.model, training.data, training.autocast, splits=['val'])['val_loss']
            found.setdefault(run.name, []).append(loss)
    print()
    print_rows([('chosen by', *losses['router'])] + [
        (choice, *(mean_and_spread(seeds) for seeds in found.values())) for choice, found in losses.items()])


def report(entry):
    """One line about an evaluation, above the progress bar."""
    balance = f'  Ent_load {statistics.mean(entry["ent_load"]):.3f}' if entry['ent_load'] else ''
    tqdm.write(f'iteration {entry["iter"]:>6,}   train loss {entry["train_loss"]:.4f}   '
               f'val loss {entry["val_loss"]:.4f} {balance}')


# -----------------------------------------------------------------------------
# comparing the runs of an out_dir

COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']   # Okabe and Ito's palette


def find_runs(out_dir):
    """What the runs in out_dir have logged: run name -> [(config.json, log)], one for each seed."""
    found = {}
    for folder in sorted(os.listdir(out_dir)):
        config_path = os.path.join(out_dir, folder, 'config.json')
        log = read_log(os.path.join(out_dir, folder, 'log.jsonl'))
        if log and os.path.exists(config_path):
            with open(config_path, encoding='utf-8') as file:
                config = json.load(file)
            found.setdefault(config['run'], []).append((config, log))
    return found


def draw_plots(out_dir):
    """Draw <out_dir>/loss.png and final_loss.png, and where a run has experts, those of them."""
    import matplotlib                      # here, since it is slow to import and sample.py imports this file
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from PIL import Image                  # matplotlib brings it
    runs = find_runs(out_dir)
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(runs)}
    for draw, file in ((draw_loss, 'loss.png'), (draw_final_loss, 'final_loss.png'), (draw_expert_load, 'expert_load.png'),
                       (draw_expert_class, 'expert_class.png'), (draw_load_map, 'load_map.png'), (draw_norm, 'norm.png')):
        figure = draw(plt, runs, color)
        if figure:
            with replacing(os.path.join(out_dir, file)) as part:
                figure.savefig(part, format='png', dpi=min(100, 2400 / max(figure.get_size_inches())))
                picture = Image.open(part).convert('RGB')
                # 256 colours: a third of the bytes. This method lets thin lines keep theirs.
                picture.quantize(method=Image.Quantize.MAXCOVERAGE).save(part, format='png', optimize=True)
            plt.close(figure)


def sparingly(draw):
    """draw, as a function that skips its turn where it would take more than a tenth of the time: many runs are slow to draw."""
    next_turn = 0.0

    def draw_in_turn(out_dir):
        nonlocal next_turn
        started = time.perf_counter()
        if started >= next_turn:
            draw(out_dir)
            now = time.perf_counter()
            next_turn = now + 10 * (now - started)
    return draw_in_turn


def draw_loss(plt, runs, color):
    """Validation loss over iterations: a line per run, the mean of its seeds, in a band from lowest to highest."""
    figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
    top, bottom = [], []
    for name, seeds in runs.items():
        points = list(zip(*([entry['val_loss'] for entry in log] for _, log in seeds)))   # [evaluation][seed]
        iterations = [entry['iter'] for entry in seeds[0][1]][:len(points)]
        means = [statistics.mean(p) for p in points]
        label = f'{name} {min(means):.4f}' + (f', mean of {len(seeds)} seeds' if len(seeds) > 1 else '')
        style = ('-', '--', ':')[list(runs).index(name) // len(COLORS) % 3]
        axes.plot(iterations, means, style, color=color[name], marker='.', label=label)
        axes.fill_between(iterations, [min(p) for p in points], [max(p) for p in points], color=color[name], alpha=0.2)
        top.append(means[1] if len(means) > 3 else means[0])
        bottom.append(min(min(p) for p in points))
    # The first evaluation, of an untrained model, would squash the others: it may lie outside.
    axes.set_ylim(min(bottom) - 0.05, max(top) + 0.05)
    axes.set(xlabel='iteration', ylabel='val_loss (nats per token)', title='Validation loss')
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_expert_load(plt, runs, color):
    """A panel per layer: the load of each expert in the last evaluation (of the first seed), all runs side by side."""
    load = {name: seeds[0][1][-1]['load'] for name, seeds in runs.items()}
    load = {name: layers for name, layers in load.items() if layers}          # dense has none
    if not load:
        return None
    n_layer = max(len(layers) for layers in load.values())
    columns = min(n_layer, 4)
    rows = math.ceil(n_layer / columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3 * columns, 0.7 + 2.3 * rows), sharey=True, squeeze=False,
                                  layout='constrained')
    for layer, axes in enumerate(panels.flat):
        axes.set_visible(layer < n_layer)
        for i, (name, layers) in enumerate(load.items()):
            if layer < len(layers):
                shares = layers[layer]
                width = 0.8 / len(load)
                axes.bar([expert + (i - (len(load) - 1) / 2) * width for expert in range(len(shares))], shares, width,
                         color=color[name], label=name)
                axes.axhline(1 / len(shares), color='black', linestyle='--', linewidth=1, label='uniform')
        axes.set(title=f'layer {layer + 1}', xlabel='expert')
    for axes in panels[:, 0]:
        axes.set_ylabel('load')
    handles = dict(zip(*reversed(panels[0, 0].get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc='outside upper center', ncols=len(handles))
    return figure


def draw_final_loss(plt, runs, color):
    """The lowest validation loss of each run, its seeds as points, their mean with its standard deviation as a bar."""
    figure, axes = plt.subplots(figsize=(8, 1 + 0.35 * len(runs)), layout='constrained')
    for y, (name, seeds) in enumerate(runs.items()):
        losses = [min(entry['val_loss'] for entry in log) for _, log in seeds]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0
        axes.errorbar(statistics.mean(losses), y, xerr=spread, color=color[name], marker='|', capsize=4)
        axes.plot(losses, [y] * len(losses), '.', color=color[name], alpha=0.5)
    axes.set_yticks(range(len(runs)), runs.keys())
    axes.invert_yaxis()
    axes.set(xlabel='lowest val_loss (nats per token)', title='Validation loss: seeds, mean, standard deviation')
    axes.grid(alpha=0.3)
    return figure


def draw_load_map(plt, runs, color):
    """Figure 3: load by layer and expert, a panel for each run (its first seed, last evaluation), one colour scale."""
    last = {name: seeds[0][1][-1] for name, seeds in runs.items() if seeds[0][1][-1]['load']}
    if not last:
        return None
    columns = min(4, len(last))
    rows = math.ceil(len(last) / columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.2 * columns, 1 + 2.2 * rows), squeeze=False, layout='constrained')
    highest = max(max(map(max, entry['load'])) for entry in last.values())
    for axes in panels.flat[len(last):]:
        axes.set_visible(False)
    for axes, (name, entry) in zip(panels.flat, last.items()):
        image = axes.imshow(entry['load'], cmap='cividis', vmin=0, vmax=highest, aspect='auto')
        entropies = zip(entry['ent_load'], entry['ent_conf'])
        axes.set_yticks(range(len(entry['load'])), [f'{load:.2f} {conf:.2f}' for load, conf in entropies])
        imbalance = sum(max(layer) - min(layer) for layer in entry['load'])
        axes.set_title(f'{name}\nsum of max - min {imbalance:.2f}', fontsize=9)
    figure.supylabel('layers from the top down: Ent_load Ent_conf', fontsize=9)
    figure.supxlabel('expert', fontsize=9)
    figure.colorbar(image, ax=panels, label='load')
    return figure


def draw_expert_class(plt, runs, color):
    """Who takes what: the share of the tokens of a class that each expert handled (first seed, last evaluation), K of them
    each. A row for each run, a panel for each layer."""
    last = {name: seeds[0][1][-1]['class_load'] for name, seeds in runs.items() if seeds[0][1][-1].get('class_load')}
    if not last:
        return None
    n_layer = max(map(len, last.values()))
    figure, panels = plt.subplots(len(last), n_layer, figsize=(1.6 + 2.4 * n_layer, 0.9 + 1.3 * len(last)), squeeze=False,
                                  layout='constrained')
    for row, (name, layers) in zip(panels, last.items()):
        for layer, axes in enumerate(row):
            axes.set_visible(layer < len(layers))
            if layer < len(layers):
                image = axes.imshow(layers[layer], cmap='cividis', vmin=0, vmax=1, aspect='auto')
                axes.set_title(f'{name}, layer {layer + 1}', fontsize=9)
                axes.set_yticks(range(len(CLASSES)), CLASSES if layer == 0 else [], fontsize=8)
    figure.supxlabel('expert', fontsize=9)
    figure.colorbar(image, ax=panels, label='share of the tokens')
    return figure


def draw_norm(plt, runs, color):
    """Figure 4: the mean activation norm of every expert over training, a row for each aoe run, a panel for each layer."""
    norms = {name: seeds[0][1] for name, seeds in runs.items() if any(seeds[0][1][-1]['norm'])}
    if not norms:
        return None
    n_layer = max(len(log[-1]['norm']) for log in norms.values())
    figure, panels = plt.subplots(len(norms), n_layer, figsize=(1.4 + 2.4 * n_layer, 0.8 + 1.2 * len(norms)), squeeze=False,
                                  sharex=True, layout='constrained')
    for row, (name, log) in zip(panels, norms.items()):
        row[0].set_ylabel(name, fontsize=9)
        for layer, axes in enumerate(row):
            axes.set_visible(layer < len(log[-1]['norm']))
            if layer < len(log[-1]['norm']):
                axes.plot([entry['iter'] for entry in log], [entry['norm'][layer] for entry in log], color=color[name], alpha=0.7)
                axes.set_title(f'layer {layer + 1}', fontsize=9)
    figure.supxlabel('iteration', fontsize=9)
    figure.supylabel('mean norm of each expert', fontsize=9)
    return figure


def print_rows(rows, indent=''):
    """Rows of strings as a table: the first column flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        print(indent + '  '.join(cells))


def mean_and_spread(values, form='.4f'):
    """As text: the mean, and the standard deviation where there are several."""
    spread = f' ± {format(statistics.stdev(values), form)}' if len(values) > 1 else ''
    return format(statistics.mean(values), form) + spread


def print_table(out_dir):
    """The runs of out_dir side by side; where a run has several seeds, mean and standard deviation.

    Also writes the table to table.md, and what it stands on, the last evaluation of every run, to results.jsonl.
    """
    runs = find_runs(out_dir)
    table = [('run', 'parameters', 'active', 'val loss', 'Ent_load', 'tokens/s', 'memory')]
    for name, seeds in runs.items():
        config = seeds[0][0]
        logs = [log for _, log in seeds]
        ent_load = [statistics.mean(log[-1]['ent_load']) for log in logs if log[-1]['ent_load']]
        speeds = [e['tokens_per_second'] for log in logs for e in log if e['tokens_per_second']]
        memory = [e['peak_memory'] for log in logs for e in log if e['peak_memory']]
        table.append((name, f'{config["total_parameters"]:,}', f'{config["active_parameters"]:,}',
                      mean_and_spread([min(e['val_loss'] for e in log) for log in logs]),
                      f'{statistics.mean(ent_load):.3f}' if ent_load else '-',
                      f'{statistics.median(speeds):,.0f}' if speeds else '-',
                      f'{max(memory) / 1e6:,.0f} MB' if memory else '-'))
    print()
    print_rows(table)
    lines = ['| ' + ' | '.join(row) + ' |' for row in table]
    results = [{'run': name, 'seed': config['seed'], 'lowest_val_loss': min(entry['val_loss'] for entry in log), **log[-1]}
               for name, seeds in runs.items() for config, log in seeds]
    write_text(os.path.join(out_dir, 'results.jsonl'), ''.join(json.dumps(result) + '\n' for result in results))
    write_text(os.path.join(out_dir, 'table.md'), '\n'.join([lines[0], '|---' * len(table[0]) + '|', *lines[1:]]) + '\n')
    print(f'\nval loss: the lowest; Ent_load: at most ln {config["n_expert"]} = {math.log(config["n_expert"]):.3f}; '
          f'pictures in {out_dir}\nmemory: the peak; on a CPU of the whole process, with what PyTorch prepared for\n'
          'earlier runs of the same command still in it, so compare runs trained alone')


def check_folders(runs):
    """Refuse, with a UserError, to write over a run, or to resume where there is none."""
    config = runs[0].config
    if config.init_from == 'resume' or config.eval_only:
        if not any(os.path.exists(run.path('ckpt.pt')) for run in runs):
            raise UserError(f'{runs[0].path("ckpt.pt")}: expected a checkpoint to go on from, got no such file; '
                            'train first, without --init_from=resume')
        return
    for run in runs if config.init_from == 'scratch' else []:
        if os.path.exists(run.path('ckpt.pt')) or len(read_log(run.path('log.jsonl'))) > 1:
            raise UserError(f'{run.folder}: expected a new folder, got one that holds a run; --init_from=resume goes '
                            'on with it, another --name= or --out_dir= keeps it, or remove it')


def main(arguments):
    from_line, files = parse(TrainConfig, arguments, __doc__)
    from_file = {}
    for file in files:
        from_file |= read_config_file(TrainConfig, file)
    runs = plan_runs(from_file, from_line)
    if RANK == 0:
        check_folders(runs)
    keep_freed_memory()
    if WORLD_SIZE > 1:
        dist.init_process_group()
    if RANK > 0:
        sys.stdout = open(os.devnull, 'w')

    stop = threading.Event()

    def on_ctrl_c(*_):
        stop.set()                                                            # end between two iterations;
        signal.signal(signal.SIGINT, signal.default_int_handler)              # a second Ctrl-C ends at once
    signal.signal(signal.SIGINT, on_ctrl_c)

    if runs[0].config.threads:
        torch.set_num_threads(runs[0].config.threads)
    if runs[0].config.choose_by != 'router':
        return pilot(runs)
    draw = sparingly(draw_plots)
    for run in runs:
        if run.config.eval_only:
            evaluate_only(run)
            continue
        train(run, stop, draw)
        if stop.is_set():
            again = [argument for argument in arguments if not argument.startswith('--init_from=')]
            print(f'\nstopped and saved; to go on: python train.py {shlex.join(again)} --init_from=resume')
            if WORLD_SIZE > 1:
                leave_together(130)
            sys.exit(130)
    if RANK == 0 and not runs[0].config.eval_only:
        draw_plots(runs[0].config.out_dir)
        print_table(runs[0].config.out_dir)
    if WORLD_SIZE > 1:
        leave_together(0)


if __name__ == '__main__':
    configurator.run(main)
