"""
Speed and memory of the three MLPs, in one run, the sides taking turns.

    python tests/tools/bench.py                          # four parts, some minutes
    python tests/tools/bench.py --only=layer,memory
    python tests/tools/bench.py --threads=1 --json=bench.json
    python tests/tools/bench.py --only=fake config/openwebtext.py

Times are medians; a ratio is the median of the ratios of each round, so that
what slows the machine for a while slows both sides of it. Parts: layer (an MLP
alone, forward and backward), step (a training step of the model), memory
(bytes that a layer keeps for backward), cost (of aoe over the width that it
judges by); and, if asked for, experts (2 of 16 to 8 of 64) and fake: the most
memory that a training step needs with the sizes of a config file, found in
seconds with tensors that have no numbers. `aoe whole` is aoe with a gate that is
not factorised.
"""

import gc
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import configurator
from configurator import UserError, build, expect, parse, read_config_file, write_text
from model import GPT, MLPS, GPTConfig
from train import (TrainConfig, choose_device, keep_freed_memory, make_optimizer,
                   plan_runs, print_rows)

PARTS = ('layer', 'step', 'memory', 'cost', 'experts', 'fake')
SIDES = {'dense': {'mlp': 'dense'}, 'moe': {'mlp': 'moe'}, 'aoe': {'mlp': 'aoe'},
         'aoe whole': {'mlp': 'aoe', 'factorised': False, 'd_low': None}}
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
    dtype: Literal['float32', 'bfloat16'] = 'bfloat16'   # of weights and inputs, or of autocast
    aux_weight: float = 0.01             # weight of the load-balancing loss
    plain: bool = False                  # measure part 1 of model.py without part 3
    keep_freed_memory: bool = True       # as train.py does; False: the C library's own way
    compile: bool = False                # torch.compile, in the training step
    json: str | None = None              # write the figures to this file as well

    def __post_init__(self):
        for key, known in (('only', PARTS), ('shapes', tuple(LAYERS))):
            expect(self, key, f'some of {", ".join(known)}',
                   lambda text, known=known: set(text.split(',')) <= set(known))
        expect(self, 'rounds warmup threads', 'a positive number', lambda n: n > 0)
        expect(self, 'json', 'a file to write to', lambda path: not os.path.isdir(path)
               and os.access(os.path.dirname(path) or '.', os.W_OK))


# -----------------------------------------------------------------------------
# measuring

def alternate(sides, bench, make):
    """Time each side's function of what make(turn) gives, once a round: name -> seconds.

    Before that it warms up: by windows of bench.warmup rounds, 6 at most, until no side gains 3 %
    from one to the next. A bfloat16 matmul on a CPU is slow whenever it meets a new shape, and with
    experts shapes are new for long.
    """
    turns = itertools.count()

    def window(rounds):
        seconds = {name: [] for name in sides}
        for turn in itertools.islice(turns, rounds):
            x = make(turn)
            for name, function in sides.items():
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                start = time.perf_counter()
                function(x)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
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
    """Bytes that layer(x) keeps for backward, each once, without parameters and x."""
    left_out = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage                     # held: no address is used twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h = layer(x)
    del h
    return sum(storage.nbytes() for storage in kept.values())


def show(title, results, *columns):
    """Print results as a table with a row for each side. A column: its heading, key and format."""
    print(f'\n{title}')
    print_rows([('', *(heading for heading, _, _ in columns))] + [
        (row['side'], *(format(row[key], form) for _, key, form in columns)) for row in results])


# -----------------------------------------------------------------------------
# an MLP alone

def layer_config(side, shape, bench):
    return GPTConfig(**shape | SIDES[side], aux_weight=bench.aux_weight, plain=bench.plain)


def make_layer(config, bench, device):
    torch.manual_seed(bench.seed)
    layer = MLPS[config.mlp](config)
    for name, p in layer.named_parameters():
        torch.nn.init.normal_(p, std=config.d_low ** -0.5 if name == 'w_up' else 0.02)
    return layer.to(device, getattr(torch, bench.dtype))


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


def compare(part, title, label, configs, bench, device):
    """Time layers, and count what they execute and keep, beside dense and moe."""
    shape, tokens = LAYERS[label]
    layers = {name: make_layer(config, bench, device) for name, config in configs.items()}
    sides = {name: forward_and_backward(layer) for name, layer in layers.items()}
    seconds = alternate(sides, bench, lambda turn: make_input(shape, tokens, bench, device, turn))
    x = make_input(shape, tokens, bench, device, 0)
    executed = {name: multiply_adds(function, x) for name, function in sides.items()}
    results = [{
        'part': part, 'shape': label, 'side': name, 'ms': 1e3 * statistics.median(seconds[name]),
        'of_dense': ratio(seconds[name], seconds['dense']),
        'predicted_of_dense': executed['dense'] / executed[name],
        'of_moe': ratio(seconds[name], seconds['moe']),
        'predicted_of_moe': executed['moe'] / executed[name],
        'kib_per_token': bytes_kept(layer, x) / tokens / 1024} for name, layer in layers.items()]
    show(title, results, ('ms', 'ms', '.2f'), ('of dense', 'of_dense', '.2f'),
         ('predicted', 'predicted_of_dense', '.2f'), ('of moe', 'of_moe', '.2f'),
         ('predicted', 'predicted_of_moe', '.2f'), ('KiB/token', 'kib_per_token', '.1f'))
    return results


def sizes_of(label, configs):
    c, whole = configs['aoe'], configs['aoe whole']
    return (f'{label}: D {c.n_embd}, d_ffn {c.d_ffn}, d_low {c.d_low} (whole: d_judge '
            f'{whole.d_judge}), E {c.n_expert}, K {c.top_k}, {LAYERS[label][1]:,} tokens')


def bench_layer(bench, device, _):
    """An MLP alone, forward and backward; predicted: by the multiply-adds that it executes."""
    results = []
    for label in bench.shapes.split(','):
        shape, _ = LAYERS[label]
        configs = {side: layer_config(side, shape, bench) for side in SIDES}
        results += compare('layer', f'layer, {sizes_of(label, configs)}', label, configs, bench,
                           device)
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
                             ('aoe whole', 'd_judge', (24, 12, 6, 3))):
        for part in parts:
            width = part_of(shape['n_embd'], part)
            configs[f'{side} {width}'] = replace(layer_config(side, shape, bench), **{key: width})
    title = f'cost over d_low (whole: d_judge), {label}, aux_weight {bench.aux_weight:g}'
    return compare('cost', title, label, configs, bench, device)


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
        configs[f'aoe whole {narrow}'] = replace(configs['aoe whole'], d_judge=narrow)
        results += compare(f'{K} of {E}', f'experts, {sizes_of(label, configs)}', label, configs,
                           bench, device)
    return results


def bench_memory(bench, device, _):
    """What a layer keeps for backward: exact, and the same on any machine."""
    results, labels = [], bench.shapes.split(',')
    for side in SIDES:
        row = {'part': 'memory', 'side': side}
        for label in labels:
            shape, tokens = LAYERS[label]
            layer = make_layer(layer_config(side, shape, bench), bench, device)
            x = make_input(shape, tokens, bench, device, 0)
            row[label] = bytes_kept(layer, x) / tokens / 1024
        results.append(row)
    show(f'KiB per token that a layer keeps for backward, {bench.dtype}', results,
         *((label, label, '.1f') for label in labels))
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
    keys = {'vocab_size': 256, 'dtype': bench.dtype, 'seed': bench.seed, 'plain': bench.plain,
            'aux_weight': bench.aux_weight, 'runs': SIDES}
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
             f'{c.batch_size} x {c.block_size} tokens', rows,
             ('tokens/s', 'tokens_per_second', ',.0f'), ('of dense', 'of_dense', '.2f'),
             ('of moe', 'of_moe', '.2f'))
        results += rows
    return results


def peak_of_step(config):
    """(bytes, phase): the most that a training step holds at once, with the weights and AdamW's
    averages, and in which phase; of the second step, since the first makes the averages."""
    from torch._subclasses.fake_tensor import FakeTensorMode       # here: they are no public parts
    from torch.distributed._tools.mem_tracker import MemTracker
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
    if not hasattr(F, 'grouped_mm'):     # a loop over experts has to know how many rows each has
        raise UserError(f'fake: expected a PyTorch with grouped_mm, got {torch.__version__}')
    values = {'vocab_size': 84}
    for file in files or [os.path.join(ROOT, 'config', 'openwebtext.py')]:
        values |= read_config_file(TrainConfig, file)
    runs = {side: {'factorised': None, **SIDES[side]} for side in SIDES}
    values |= {'runs': runs, 'name': None, 'seeds': None, 'dtype': bench.dtype}
    results = []
    for c in plan_runs(values, {}):
        peak, where = peak_of_step(c)
        results.append({'part': 'fake', 'side': c.name, 'gib': peak / 2**30, 'where': where})
    for row in results:
        row['of_moe'] = row['gib'] / results[list(SIDES).index('moe')]['gib']
    show(f'peak of a training step: {c.n_layer} layers, D {c.n_embd}, d_ffn {c.d_ffn}, E '
         f'{c.n_expert}, vocabulary {c.vocab_size:,}, {c.batch_size} x {c.block_size} tokens, '
         f'{c.dtype}, aux_weight {c.aux_weight:g}', results,
         ('GiB', 'gib', '.2f'), ('of moe', 'of_moe', '.2f'), ('where', 'where', ''))
    return results


def main(arguments):
    values, files = parse(BenchConfig, arguments, __doc__)
    bench = build(BenchConfig, values)
    if files and bench.only != 'fake':
        raise UserError(f'expected --key=value, or --only=fake and config files, got {files[0]!r}; '
                        '--help lists the keys')
    if bench.threads:
        torch.set_num_threads(bench.threads)
    if bench.keep_freed_memory:
        keep_freed_memory()
    device = choose_device(bench.device)
    name = f'{torch.get_num_threads()} threads'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    print(f'torch {torch.__version__}, {device} ({name}), {bench.dtype}, {bench.rounds} rounds')
    parts = {'layer': bench_layer, 'step': bench_step, 'memory': bench_memory, 'cost': bench_cost,
             'experts': bench_experts, 'fake': bench_fake}
    results = [row for part in bench.only.split(',') for row in parts[part](bench, device, files)]
    if bench.json:
        facts = {'torch': torch.__version__, 'device': name, **asdict(bench)}
        write_text(bench.json, json.dumps(facts | {'results': results}, indent=1))


if __name__ == '__main__':
    configurator.run(main)
