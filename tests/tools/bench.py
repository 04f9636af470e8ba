"""
Speed and memory of the three MLPs, in one run, the sides taking turns.

    python tests/tools/bench.py                          # four parts: 10 to 20 minutes
    python tests/tools/bench.py --only=step --shapes=small   # 1 minute
    python tests/tools/bench.py --only=memory            # a few seconds
    python tests/tools/bench.py --only=fake config/openwebtext.py   # 25 seconds
    python tests/tools/bench.py --threads=1 --json=bench.json

Times are medians; a ratio is the median of the ratios of each round, so that
what slows the machine for a while slows both sides of it. Parts: layer (an MLP
alone, forward and backward), step (a training step of the model), memory
(bytes that a layer keeps for backward), cost (of aoe over the width that it
judges by); and, if asked for, experts (2 of 16 to 8 of 64) and fake: the most
memory that a training step needs with the sizes of a config file, found with
tensors that have no numbers. `aoe_whole` is aoe with a gate that is not
factorised. memory and fake tell what a GPU needs, so they recompute on a CPU,
too; the other parts do what train.py does on this device.
"""

import contextlib
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import configurator
from configurator import UserError, expect, parse, read_config_file, write_text
from model import GPT, MLPS, GPTConfig
from train import (TrainConfig, choose_device, fast_dtype, keep_freed_memory, make_optimizer,
                   plan_runs, print_rows)

SIDES = {'dense': {'mlp': 'dense'}, 'moe': {'mlp': 'moe'}, 'aoe': {'mlp': 'aoe'},
         'aoe_whole': {'mlp': 'aoe', 'factorised': False, 'd_low': None}}
LAYERS = {          # the MLP alone: its configuration, and the tokens that pass it at once
    'small': ({'n_embd': 128, 'd_ffn': 256}, 1024),
    'medium': ({'n_embd': 384, 'd_ffn': 1024, 'd_low': 128}, 8192),
    'paper': ({'n_embd': 768, 'n_head': 12, 'd_ffn': 3072, 'd_low': 256}, 4096),
}
MODELS = {          # a whole training step; of the paper's shape it is too long
    'small': {'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'd_ffn': 256, 'block_size': 64,
              'batch_size': 16},
    'medium': {'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'd_ffn': 512, 'block_size': 256,
               'batch_size': 8},
}


@dataclass
class BenchConfig:
    """The keys of this script."""
    # keys
    only: str = 'layer,step,memory,cost'   # parts to measure; others are experts and fake
    shapes: str = 'small,medium,paper'   # the sizes to measure, with commas
    rounds: int = 15                     # measurements of each side; the median counts
    warmup: int = 10                     # rounds of a window; it warms up by windows until steady
    seed: int = 0                        # of weights and inputs
    threads: int | None = None           # of the CPU; None: PyTorch's choice
    device: str = 'auto'                 # auto: cuda, else mps, else cpu
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'   # of matmuls; auto: what is fast here
    recompute: bool | None = None        # as in train.py; None: on a GPU, and in memory and fake
    aux_weight: float = 0.01             # weight of the load-balancing loss
    compile: bool = False                # torch.compile, in the training step
    json: str | None = None              # write the figures to this file as well

    def __post_init__(self):
        for key, known in (('only', PARTS), ('shapes', LAYERS)):
            expect(self, key, f'some of {", ".join(known)}',
                   lambda text, known=known: set(text.split(',')) <= set(known))
        expect(self, ('rounds', 'warmup', 'threads'), 'a positive number', lambda n: n > 0)
        expect(self, 'threads', f'at most the {os.cpu_count()} of this machine',
               lambda n: n <= os.cpu_count())
        expect(self, 'seed', '0 or more and below 2^62', lambda n: 0 <= n < 2**62)
        expect(self, 'aux_weight', '0 or more', lambda weight: 0 <= weight < math.inf)
        expect(self, 'json', 'a file to write to', lambda path: not os.path.isdir(path)
               and os.access(os.path.dirname(path) or '.', os.W_OK))
        if 'fake' in self.only.split(','):   # without numbers F.grouped_mm knows no other
            expect(self, 'dtype', 'bfloat16 for fake', lambda dtype: dtype != 'float32')


def choose_dtype(bench, device):
    """What --dtype=auto stands for: bfloat16 if nothing is timed, else what train.py would take for
    the last of the shapes."""
    if bench.dtype != 'auto':
        return bench.dtype
    if set(bench.only.split(',')) <= {'memory', 'fake'}:
        return 'bfloat16'
    shape, tokens = LAYERS[bench.shapes.split(',')[-1]]
    return fast_dtype(TrainConfig(**shape, batch_size=tokens, block_size=1), device)


# -----------------------------------------------------------------------------
# measuring

def alternate(sides, bench, make):
    """Time each side's function of what make(turn) gives, once a round: name -> seconds.

    Before that it warms up: by windows of bench.warmup rounds, 6 at most, until no side gains 3 %
    from one to the next. A bfloat16 matmul on a CPU is slow whenever it meets a new shape, and with
    experts shapes are new for long.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    turns = itertools.count()

    def window(rounds):
        seconds = {name: [] for name in sides}
        for turn in itertools.islice(turns, rounds):
            x = make(turn)
            for name, function in sides.items():
                gc.collect()
                wait()
                start = time.perf_counter()
                function(x)
                wait()
                seconds[name].append(time.perf_counter() - start)
        return seconds

    now = window(bench.warmup)
    for _ in range(5):                   # on a noisy machine it would never end
        before, now = now, window(bench.warmup)
        if all(ratio(now[name], before[name]) < 1.03 for name in sides):
            break
    return window(bench.rounds)


def ratio(faster, slower):
    """How many times the speed of slower faster has: both seconds a round, median of ratios."""
    return statistics.median(s / f for f, s in zip(faster, slower))


def multiply_adds(function, x):
    """Those of all matmuls that function(x) executes, one after the other or grouped."""
    more = {}
    if hasattr(torch.ops.aten, '_grouped_mm'):
        more[torch.ops.aten._grouped_mm] = lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        function(x)
    return counter.get_total_flops() / 2


def bytes_kept(layer, x):
    """Bytes that layer(x) keeps for backward, each once, without parameters and x. It doesn't see
    the Rows that `recomputed` holds: some 20 bytes for each pair of a token and an expert."""
    left_out = {p.untyped_storage()._cdata for p in (*layer.parameters(), x)}    # their addresses
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            kept[storage._cdata] = storage                         # held: no address is used twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h = layer(x)
    del h
    return sum(storage.nbytes() for storage in kept.values())


def show(title, results, **columns):
    """Print results as a table: a row for each side, the columns by key, with their formats."""
    print(f'\n{title}')
    print_rows([('', *(key.replace('_', ' ') for key in columns))] + [
        (row['side'], *(format(row[key], form) for key, form in columns.items()))
        for row in results])


# -----------------------------------------------------------------------------
# an MLP alone

def layer_config(side, shape, bench):
    return GPTConfig(**shape | SIDES[side], aux_weight=bench.aux_weight, recompute=bench.recompute)


def make_layer(config, bench, device):
    torch.manual_seed(bench.seed)
    layer = MLPS[config.mlp](config)
    for name, p in list(layer.named_parameters()):
        w = torch.randn(p.shape) * (config.d_low ** -0.5 if name == 'w_up' else 0.02)
        setattr(layer, name, torch.nn.Parameter(w.to(device, getattr(torch, bench.dtype))))
    return layer


def make_input(shape, tokens, bench, device, turn):
    generator = torch.Generator().manual_seed(bench.seed + turn)   # other tokens each round
    x = torch.randn(tokens, shape['n_embd'], generator=generator)
    return x.to(device, getattr(torch, bench.dtype)).requires_grad_()   # as inside a model


def forward_and_backward(layer):
    """A function of x that does both, with all that has a gradient in a model: x, h and L_aux."""
    def function(x):
        h, routing = layer(x)
        (h.sum() + (routing.aux_loss if routing else 0)).backward()
        layer.zero_grad(set_to_none=True)
        x.grad = None
    return function


def compare(part, label, configs, bench, device):
    """Time layers of configs, and count what they execute and keep, beside dense and moe."""
    shape, tokens = LAYERS[label]
    layers = {name: make_layer(config, bench, device) for name, config in configs.items()}
    sides = {name: forward_and_backward(layer) for name, layer in layers.items()}
    seconds = alternate(sides, bench, lambda turn: make_input(shape, tokens, bench, device, turn))
    x = make_input(shape, tokens, bench, device, 0)
    executed = {name: multiply_adds(function, x) for name, function in sides.items()}
    results = [{
        'part': part, 'shape': label, 'side': name,
        'judge': (c.d_judge or c.d_low) if c.mlp == 'aoe' else '-',
        'ms': 1e3 * statistics.median(seconds[name]),
        'of_dense': ratio(seconds[name], seconds['dense']),
        'predicted_of_dense': executed['dense'] / executed[name],
        'of_moe': ratio(seconds[name], seconds['moe']),
        'predicted_of_moe': executed['moe'] / executed[name],
        'KiB_per_token': bytes_kept(layers[name], x) / tokens / 1024,
    } for name, c in configs.items()]
    c = configs['moe']
    show(f'{part}, {label}: D {c.n_embd}, d_ffn {c.d_ffn}, E {c.n_expert}, K {c.top_k}, {tokens:,} '
         f'tokens, aux_weight {c.aux_weight:g}, recompute={c.recompute}', results, judge='',
         ms='.2f', of_dense='.2f', predicted_of_dense='.2f', of_moe='.2f', predicted_of_moe='.2f',
         KiB_per_token='.1f')
    return results


def bench_layer(bench, device, _):
    """An MLP alone, forward and backward; predicted: by the multiply-adds that it executes."""
    results = []
    for label in bench.shapes.split(','):
        configs = {side: layer_config(side, LAYERS[label][0], bench) for side in SIDES}
        results += compare('layer', label, configs, bench, device)
    return results


def part_of(D, part):
    """The multiple of 8 that is nearest to D / part, at least 8."""
    return max(8, 8 * round(D / part / 8))


def bench_cost(bench, device, _):
    """Table 4 of the paper: what aoe costs over d_low, D/12 to 2 D/3, at the last of the shapes;
    and with a whole gate over d_judge, D/24 to D/3."""
    label = bench.shapes.split(',')[-1]
    shape, _ = LAYERS[label]
    configs = {side: layer_config(side, shape, bench) for side in ('dense', 'moe')}
    for side, key, parts in (('aoe', 'd_low', (12, 6, 3, 1.5)),
                             ('aoe_whole', 'd_judge', (24, 12, 6, 3))):
        for part in parts:
            width = part_of(shape['n_embd'], part)
            configs[f'{side} {width}'] = replace(layer_config(side, shape, bench), **{key: width})
    return compare('cost', label, configs, bench, device)


def bench_experts(bench, device, _):
    """More and smaller experts, an eighth of them chosen, at the last of the shapes: with judges as
    wide as by default, and of D/24 (at least 8)."""
    label, results = bench.shapes.split(',')[-1], []
    shape, _ = LAYERS[label]
    narrow = part_of(shape['n_embd'], 24)
    for E in (16, 32, 64):
        K = E // 8
        sizes = shape | {'n_expert': E, 'top_k': K, 'd_ffn': 2 * shape['d_ffn'] // K}
        configs = {side: layer_config(side, sizes, bench) for side in SIDES}
        configs[f'aoe {narrow}'] = replace(configs['aoe'], d_low=narrow)
        configs[f'aoe_whole {narrow}'] = replace(configs['aoe_whole'], d_judge=narrow)
        results += compare(f'{K} of {E}', label, configs, bench, device)
    return results


def bench_memory(bench, device, _):
    """What a layer keeps for backward: right to 64 bytes, and the same on any machine. In bfloat16
    on tensors without numbers, which take no time; in float32 F.grouped_mm refuses them."""
    fake = bench.dtype == 'bfloat16' and hasattr(F, 'grouped_mm')

    def kib_per_token(side, shape, tokens):
        layer = make_layer(layer_config(side, shape, bench), bench, device)
        return bytes_kept(layer, make_input(shape, tokens, bench, device, 0)) / tokens / 1024
    labels = bench.shapes.split(',')
    with FakeTensorMode() if fake else contextlib.nullcontext():
        results = [{'part': 'memory', 'side': side,
                    **{label: kib_per_token(side, *LAYERS[label]) for label in labels}}
                   for side in SIDES]
    show(f'KiB per token that a layer keeps for backward, {bench.dtype}, '
         f'recompute={bench.recompute} (a GPU: True)', results, **dict.fromkeys(labels, '.1f'))
    return results


# -----------------------------------------------------------------------------
# a training step

def make_step(config, device, compile=False):
    """A new model, and a function that trains it by a step on tokens (B, S), as train.py does, and
    returns the loss; it calls mark(phase) where a phase begins."""
    torch.manual_seed(config.seed)
    with device:
        model = GPT(config)
    optimizer = make_optimizer(model, config, device)
    forward = torch.compile(model) if compile else model
    dtype = getattr(torch, config.dtype)

    def step(idx, mark=lambda phase: None):
        mark('forward')
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, routing = forward(idx, idx)[1:]
        (loss + routing.aux_loss.sum()).backward()
        mark('optimizer')
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark('end')
        return loss.detach()
    return model, step


def bench_step(bench, device, _):
    """A training step of the whole model, on the bytes of model.py."""
    with open(os.path.join(ROOT, 'model.py'), 'rb') as file:
        text = torch.tensor(list(file.read()), device=device)
    keys = {'vocab_size': 256, 'dtype': bench.dtype, 'seed': bench.seed, 'runs': SIDES,
            'aux_weight': bench.aux_weight, 'recompute': bench.recompute}
    results = []
    for label in filter(MODELS.__contains__, bench.shapes.split(',')):
        configs = {c.name: c for c in plan_runs(keys | MODELS[label], {})}
        c = configs['aoe']

        def batch(turn, c=c):
            generator = torch.Generator().manual_seed(bench.seed + turn)
            last = len(text) - c.block_size
            starts = torch.randint(last, (c.batch_size, 1), generator=generator)
            return text[(starts + torch.arange(c.block_size)).to(device)]
        steps = {name: make_step(c, device, bench.compile)[1] for name, c in configs.items()}
        seconds = alternate(steps, bench, batch)
        rows = [{'part': 'step', 'shape': label, 'side': name,
                 'tokens_per_second': c.batch_size * c.block_size / statistics.median(times),
                 'of_dense': ratio(times, seconds['dense']), 'of_moe': ratio(times, seconds['moe'])}
                for name, times in seconds.items()]
        show(f'training step, {label}: {c.n_layer} layers, D {c.n_embd}, d_ffn {c.d_ffn}, '
             f'{c.batch_size} x {c.block_size} tokens, recompute={c.recompute}', rows,
             tokens_per_second=',.0f', of_dense='.2f', of_moe='.2f')
        results += rows
    return results


def peak_of_step(config):
    """(bytes, phase): the most that a training step holds at once, with the weights and AdamW's
    averages, and in which phase; of the second step, since the first makes the averages."""
    from torch.distributed._tools.mem_tracker import MemTracker    # here: it is no public part
    device, peak, where, phase = torch.device('cpu'), 0, None, None

    def mark(begins):
        nonlocal peak, where, phase
        held = tracker.get_tracker_snapshot('peak')[device]['Total']
        if held > peak:                                            # the phase that ends raised it
            peak, where = held, phase
        phase = begins

    with FakeTensorMode(), MemTracker() as tracker:
        model, step = make_step(config, device)
        idx = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64)
        step(idx)
        tracker.reset_mod_stats()
        model.norm.register_forward_hook(lambda *_: mark('head and loss'))
        model.norm.register_full_backward_pre_hook(lambda *_: mark('backward of layers'))
        step(idx, mark)
    return peak, where


def bench_fake(bench, _, files):
    """The most memory that a training step needs, on tensors without numbers: in seconds, and of
    models that do not fit this machine. (A CPU's attention is in float32 below 256 positions.)"""
    values = {'vocab_size': 84}
    for file in files or [os.path.join(ROOT, 'config', 'openwebtext.py')]:
        values |= read_config_file(TrainConfig, file)
    values |= {'runs': SIDES, 'name': None, 'seeds': None, 'factorised': None, 'dtype': 'bfloat16',
               'recompute': bench.recompute}
    peaks = {}
    for c in plan_runs(values, {}):
        try:
            peaks[c.name] = peak_of_step(c)
        except DataDependentOutputException:   # to compute, a loop asks how many rows there are
            raise UserError('fake: expected select = top_k, n_embd, d_ffn, d_low in multiples of 8 '
                            f'and a PyTorch with F.grouped_mm, got {c.select}, {c.n_embd}, '
                            f'{c.d_ffn}, {c.d_low} and {torch.__version__}') from None
    results = [{'part': 'fake', 'side': name, 'GiB': peak / 2**30, 'where': where,
                'of_moe': peak / peaks['moe'][0]} for name, (peak, where) in peaks.items()]
    show(f'peak of a training step: {c.n_layer} layers, D {c.n_embd}, d_ffn {c.d_ffn}, E '
         f'{c.n_expert}, vocabulary {c.vocab_size:,}, {c.batch_size} x {c.block_size} tokens, '
         f'{c.dtype}, aux_weight {c.aux_weight:g}, recompute={c.recompute} (a GPU: True)',
         results, GiB='.2f', of_moe='.2f', where='')
    return results


PARTS = {'layer': bench_layer, 'step': bench_step, 'memory': bench_memory, 'cost': bench_cost,
         'experts': bench_experts, 'fake': bench_fake}


def main(arguments):
    values, files = parse(BenchConfig, arguments, __doc__)
    bench, results = BenchConfig(**values), []
    if files and bench.only != 'fake':
        raise UserError(f'expected --key=value, or --only=fake and config files, got {files[0]!r}; '
                        '--help lists the keys')
    if bench.threads:
        torch.set_num_threads(bench.threads)
    keep_freed_memory()
    device = choose_device(bench.device)
    name = f'{torch.get_num_threads()} threads'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    bench.dtype = choose_dtype(bench, device)
    print(f'torch {torch.__version__}, {device} ({name}), {bench.dtype}, {bench.rounds} rounds')
    for part in bench.only.split(','):
        settled = replace(bench)
        if bench.recompute is None:
            settled.recompute = device.type != 'cpu' or part in ('memory', 'fake')
        for row in PARTS[part](settled, device, files):
            results.append(row | {'recompute': settled.recompute})
    if bench.json:
        facts = {'torch': torch.__version__, 'device': name, **asdict(bench)}
        write_text(bench.json, json.dumps(facts | {'results': results}, indent=1))


if __name__ == '__main__':
    configurator.run(main)
