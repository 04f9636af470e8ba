"""
Speed and memory of the variants. (aoe_whole is aoe with a gate that is not factorised.)

    python tests/tools/bench.py                          # step and memory, some minutes
    python tests/tools/bench.py --only=step --shapes=small   # 1 minute
    python tests/tools/bench.py --only=memory            # a few seconds
    python tests/tools/bench.py --only=fake config/openwebtext.py   # 1 minute

step times a training step as train.py does it. The variants take turns, so that whatever slows the
machine for a while slows all of them, and a ratio is the median of the ratios of all rounds. memory
is what a layer keeps for backward. fake is the most memory that a step holds at once, with the keys
of config files. Both memory and fake compute in bfloat16 with tensors that have a shape but no
numbers, so they work on any machine.
"""

import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import configurator
import train
from configurator import (UserError, choose_device, expect, fast_dtype, keep_freed_memory, parse,
                          read_config_files, read_text)
from model import GPT, mlp_of
from sample import print_rows
from train import TrainConfig, one_iteration, plan_runs

SIDES = {'dense': {'mlp': 'dense'}, 'moe': {'mlp': 'moe'}, 'aoe': {'mlp': 'aoe'},
         'aoe_whole': {'mlp': 'aoe', 'factorised': False}}
SIZES = ('n_layer', 'n_head', 'n_embd', 'd_ffn', 'block_size', 'batch_size')
SHAPES = {'small': dict(zip(SIZES, (4, 4, 128, 256, 64, 16))),
          'medium': dict(zip(SIZES, (6, 6, 384, 512, 256, 8))),
          'paper': dict(zip(SIZES, (12, 12, 768, 3072, 1024, 16)))}


@dataclass
class BenchConfig:
    """The keys of this script."""
    # keys
    only: str = 'step,memory'            # parts to measure; a third is fake
    shapes: str = 'small,medium'         # sizes to measure; a third is paper
    rounds: int = 15                     # measurements of each variant; the median counts
    warmup: int = 30                     # rounds before: bfloat16 is slow while shapes are new
    recompute: bool = False              # in step and fake, as in train.py
    batch_size: int | None = None        # in fake; None: that of the config files
    device: str = 'auto'                 # of step; auto: cuda, else mps, else cpu
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'   # of step; auto: what is fast here
    threads: int | None = None           # CPU threads; None: PyTorch's choice
    compile: bool = False                # torch.compile, in step

    def __post_init__(self):
        for key, known in (('only', PARTS), ('shapes', SHAPES)):
            expect(self, key, f'some of {", ".join(known)}',
                   lambda text, known=known: set(text.split(',')) <= set(known))
        expect(self, ('rounds', 'batch_size', 'threads'), 'a positive number', lambda n: n > 0)


def runs_of(shape, **keys):
    """The TrainConfigs of all variants in a shape, with L_aux."""
    return plan_runs({**SHAPES[shape], **keys, 'runs': SIDES, 'vocab_size': 256,
                      'aux_weight': 0.01}, {})


def show(title, rows, **columns):
    """Print rows {variant: its cells} as a table. columns is {name: the format of its cells}."""
    print(f'\n{title}')
    print_rows([('', *(column.replace('_', ' ') for column in columns))] + [
        (side, *map(format, cells, columns.values())) for side, cells in rows.items()])


# -----------------------------------------------------------------------------
# the time of a training step

def begin_on(tokens, config):
    """A Run, as train.py begins it, on these tokens instead of a data set."""
    c = replace(config, gradient_accumulation_steps=1, device=str(tokens.device),
                threads=torch.get_num_threads())

    def train_batch(iteration, _):
        random = torch.Generator().manual_seed(iteration)          # the same for all variants
        starts = torch.randint(len(tokens) - c.block_size, (c.batch_size, 1), generator=random)
        window = tokens[(starts + torch.arange(c.block_size + 1)).to(tokens.device)]
        return window[:, :-1], window[:, 1:]
    meta = {'vocab_size': c.vocab_size, 'sha256': '', 'train_tokens': len(tokens),
            'val_tokens': len(tokens)}
    data = SimpleNamespace(train_batch=train_batch, meta=meta)
    with patch.object(train, 'Data', lambda *_: data):
        return train.begin(c)


def alternate(runs, bench):
    """Let runs {name: Run} take turns at a training step. Returns {name: seconds of each round}."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = {name: [] for name in runs}
    for _ in range(bench.warmup + bench.rounds):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            one_iteration(run)
            wait()
            seconds[name].append(time.perf_counter() - start)
            run.iteration += 1
    return {name: times[bench.warmup:] for name, times in seconds.items()}


def ratio(faster, slower):
    """How many times as fast one variant is as another: the median of the ratios of all rounds."""
    return statistics.median(s / f for f, s in zip(faster, slower))


def bench_step(bench, _):
    """A training step of the whole model, on the bytes of model.py."""
    device = choose_device(bench.device)
    tokens = torch.tensor([*read_text(os.path.join(ROOT, 'model.py')).encode()], device=device)
    for shape in bench.shapes.split(','):
        runs = runs_of(shape, recompute=bench.recompute, compile=bench.compile,
                       dtype=fast_dtype(device) if bench.dtype == 'auto' else bench.dtype)
        c = runs[1]
        seconds = alternate({run.name: begin_on(tokens, run) for run in runs}, bench)
        show(f'training step, {shape}, {c.batch_size} x {c.block_size} tokens, {device}, '
             f'{torch.get_num_threads()} threads, {c.dtype}, recompute={c.recompute}', {
                 side: (c.tokens_per_iter / statistics.median(times),
                        ratio(times, seconds['dense']), ratio(times, seconds['moe']))
                 for side, times in seconds.items()},
             tokens_per_second=',.0f', of_dense='.2f', of_moe='.2f')


# -----------------------------------------------------------------------------
# memory, with tensors that have no numbers

def bytes_kept(layer, x):
    """The bytes that layer(x) keeps for backward, each counted once, without parameters and x."""
    left_out = {p.untyped_storage()._cdata for p in (*layer.parameters(), x)}    # their addresses
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            kept[storage._cdata] = storage     # while it is held, its address is not used again
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(storage.nbytes() for storage in kept.values())


def bench_memory(bench, _):
    """What a layer keeps for backward."""
    def kib_per_token(config):
        layer = mlp_of(config)
        for p in layer.parameters():
            p.data = p.data.bfloat16()
        x = torch.empty(4096, config.n_embd, dtype=torch.bfloat16, requires_grad=True)
        return bytes_kept(layer, x) / len(x) / 1024
    with FakeTensorMode():
        columns = {shape: map(kib_per_token, runs_of(shape)) for shape in bench.shapes.split(',')}
        rows = dict(zip(SIDES, zip(*columns.values())))
    show('KiB per token that a layer keeps for backward', rows, **dict.fromkeys(columns, '.1f'))


def peak_of_step(config):
    """(bytes, phase): the most that a training step holds at once, weights and AdamW's averages
    included, and the phase of the step in which it does."""
    # imported here, since it is no public part of PyTorch
    from torch.distributed._tools.mem_tracker import MemTracker
    reached = []                         # at the end of each phase: (the peak so far, the phase)

    def leave(phase):
        total = tracker.get_tracker_snapshot('peak')[torch.device('cpu')]['Total']
        reached.append((total, phase))

    # a fake weight that two modules share can't be moved to a device, but it is there already
    with FakeTensorMode(), patch.object(GPT, 'to', lambda model, device: model):
        run = begin_on(torch.zeros(config.block_size + 2, dtype=torch.int64), config)
        one_iteration(run)                                         # creates AdamW's averages
        model, tracker = run.model, MemTracker()
        if config.gradient_accumulation_steps > 1:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)                       # of the batch before
        tracker.track_external(model, run.optimizer)
        model.norm.register_forward_hook(lambda *_: leave('forward of layers'))
        model.norm.register_full_backward_pre_hook(lambda *_: leave('head and loss'))
        run.optimizer.register_step_pre_hook(lambda *_: leave('backward of layers'))
        with tracker:
            one_iteration(run)
        leave('optimizer')
    return max(reached, key=lambda pair: pair[0])                  # the first that reached it


def bench_fake(bench, files):
    """The most memory that a training step needs, even of a model that this machine can't hold."""
    files = files or [os.path.join(ROOT, 'config', 'openwebtext.py')]
    keys = {'vocab_size': 84} | read_config_files(TrainConfig, files) | {
        'runs': SIDES, 'dtype': 'bfloat16', 'recompute': bench.recompute, 'factorised': None}
    keys['batch_size'] = bench.batch_size or keys.get('batch_size', TrainConfig.batch_size)
    runs = plan_runs({key: keys[key] for key in keys.keys() - {'name', 'seed', 'seeds'}}, {})
    try:
        peaks = {run.name: peak_of_step(run) for run in runs}
    except RuntimeError as error:        # a shape depends on numbers that are not there
        raise UserError('fake: expected select = top_k, widths in multiples of 8 and a PyTorch '
                        f'with F.grouped_mm, got {error!r:.100}') from None
    c = runs[1]
    show(f'peak of a training step: {" ".join(files)}, {c.batch_size} x {c.block_size} tokens, '
         f'recompute={c.recompute}', {side: (peak / 2**30, peak / peaks['moe'][0], where)
                                      for side, (peak, where) in peaks.items()},
         GiB='.2f', of_moe='.2f', where='')


PARTS = {'step': bench_step, 'memory': bench_memory, 'fake': bench_fake}


def main(arguments):
    values, files = parse(BenchConfig, arguments, __doc__)
    bench = BenchConfig(**values)
    if files and bench.only != 'fake':
        raise UserError(f'expected --key=value, or --only=fake and config files, got {files[0]!r}')
    if bench.threads:
        torch.set_num_threads(bench.threads)
    keep_freed_memory()
    print(f'torch {torch.__version__}')
    for part in bench.only.split(','):
        PARTS[part](bench, files)


if __name__ == '__main__':
    configurator.run(main)
