"""
Speed and memory of the three MLPs, in one run, the sides taking turns.

    python tests/bench.py                          # four parts, some minutes
    python tests/bench.py --only=layer,memory
    python tests/bench.py --threads=1 --json=bench.json
    python tests/bench.py --only=fake config/openwebtext.py

Times are medians; a ratio is the median of the ratios of each round, so that
what slows the machine for a while slows both sides of it. Parts: layer (an MLP
alone, forward and backward), step (a training step of the model), memory
(bytes that a layer keeps for backward), cost (of aoe over the width that it
judges by); and fake: the most memory that a training step needs with the sizes
of a config file, found in seconds with tensors that have no numbers. `aoe whole`
is aoe with a gate that is not factorised.
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

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import configurator
from configurator import UserError, build, expect, parse, read_config_file, write_text
from model import GPT, MLPS, GPTConfig, Routing
from train import (TrainConfig, choose_device, keep_freed_memory, make_optimizer, model_config,
                   plan_runs, print_rows)

PARTS = ('layer', 'step', 'memory', 'cost', 'fake')
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
    only: str = 'layer,step,memory,cost'   # the parts to measure, with commas; fake is one more
    shapes: str = 'small,medium,paper'   # the sizes to measure, with commas
    rounds: int = 15                     # measurements of each side; the median counts
    warmup: int = 10                     # rounds of a window; it warms up by windows until steady
    seed: int = 0                        # of weights and inputs
    threads: int | None = None           # of the CPU; None: PyTorch's choice
    device: str = 'auto'                 # auto: cuda, else mps, else cpu
    dtype: Literal['float32', 'bfloat16'] = 'bfloat16'   # of weights and inputs, or of autocast
    aux_weight: float = 0.0              # weight of the load-balancing loss
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
    """A function of x that does both, of the loss that L_aux is part of."""
    def function(x):
        h, routing = layer(x)
        aux_loss = routing.aux_loss if isinstance(routing, Routing) else 0
        (h.sum() + aux_loss).backward()
        layer.zero_grad(set_to_none=True)
        x.grad = None
    return function


class Mixtral(torch.nn.Module):
    """Hugging Face's Mixtral block, in one of its implementations, with the weights of moe."""

    def __init__(self, moe, implementation):
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
        super().__init__()
        c = moe.config
        self.block = MixtralSparseMoeBlock(MixtralConfig(
            hidden_size=c.n_embd, intermediate_size=c.d_ffn, num_local_experts=c.n_expert,
            num_experts_per_tok=c.top_k, experts_implementation=implementation)).to(moe.w_p)
        with torch.no_grad():
            self.block.gate.weight.copy_(moe.router.T)
            self.block.experts.gate_up_proj.copy_(torch.cat([moe.w_g, moe.w_p], 2).mT)
            self.block.experts.down_proj.copy_(moe.w_o.mT)

    def forward(self, x):
        h = self.block(x[None])
        return (h[0] if isinstance(h, tuple) else h).view_as(x), None


def mixtral_layers(moe, tokens):
    """Name -> Mixtral of each implementation. Empty without transformers."""
    settings = ['eager', 'batched_mm', 'grouped_mm']
    if tokens * moe.w_p[0].numel() > 2**28:                        # it copies weights for each pair
        settings.remove('batched_mm')
    try:
        return {f'mixtral {setting}': Mixtral(moe, setting) for setting in settings}
    except ImportError:
        print('  (transformers is not installed: its Mixtral block is not measured)')
        return {}


def compare(part, label, layers, bench, device):
    """Time layers, count what they execute and keep; print it beside dense's and moe's."""
    shape, tokens = LAYERS[label]
    x = make_input(shape, tokens, bench, device, 0)
    sides = {name: forward_and_backward(layer) for name, layer in layers.items()}
    seconds = alternate(sides, bench, lambda turn: make_input(shape, tokens, bench, device, turn))
    executed = {name: multiply_adds(function, x) for name, function in sides.items()}
    results, rows = [], [('', 'ms', 'of dense', 'predicted', 'of moe', 'predicted', 'KiB/token')]
    for name, layer in layers.items():
        row = {'part': part, 'shape': label, 'side': name,
               'ms': 1e3 * statistics.median(seconds[name]),
               'kib_per_token': bytes_kept(layer, x) / tokens / 1024}
        for base in ('dense', 'moe'):
            row[f'of_{base}'] = ratio(seconds[name], seconds[base])
            row[f'predicted_of_{base}'] = executed[base] / executed[name]
        results.append(row)
        rows.append((name, *(f'{row[key]:.2f}' for key in (
            'ms', 'of_dense', 'predicted_of_dense', 'of_moe', 'predicted_of_moe')),
            f'{row["kib_per_token"]:.1f}'))
    print_rows(rows)
    return results


def bench_layer(bench, device, _):
    """An MLP alone, forward and backward."""
    results = []
    for label in bench.shapes.split(','):
        shape, tokens = LAYERS[label]
        layers = {side: make_layer(layer_config(side, shape, bench), bench, device)
                  for side in SIDES}
        c, whole = layers['aoe'].config, layers['aoe whole'].config
        print(f'\nlayer, {label}: D {c.n_embd}, d_ffn {c.d_ffn}, d_low {c.d_low} (whole: d_judge '
              f'{whole.d_judge}), E {c.n_expert}, K {c.top_k}, {tokens:,} tokens')
        layers |= mixtral_layers(layers['moe'], tokens)
        results += compare('layer', label, layers, bench, device)
    return results


def bench_cost(bench, device, _):
    """Table 4 of the paper: what aoe costs over d_low, D/12 to 2 D/3, at the last of the shapes;
    and with a whole gate over d_judge, D/24 to D/3."""
    label = bench.shapes.split(',')[-1]
    shape, _ = LAYERS[label]
    configs = {side: layer_config(side, shape, bench) for side in ('dense', 'moe')}
    for side, key, parts in (('aoe', 'd_low', (12, 6, 3, 1.5)),
                             ('aoe whole', 'd_judge', (24, 12, 6, 3))):
        for part in parts:
            width = max(8, 8 * round(shape['n_embd'] / part / 8))
            configs[f'{side} {width}'] = replace(layer_config(side, shape, bench), **{key: width})
    layers = {name: make_layer(config, bench, device) for name, config in configs.items()}
    print(f'\ncost over d_low (whole: d_judge), {label}, aux_weight {bench.aux_weight:g}')
    return compare('cost', label, layers, bench, device)


def bench_memory(bench, device, _):
    """What a layer keeps for backward: exact, and the same on any machine."""
    results, rows = [], [('KiB per token and layer', *SIDES)]
    for label in bench.shapes.split(','):
        shape, tokens = LAYERS[label]
        for side in SIDES:
            layer = make_layer(layer_config(side, shape, bench), bench, device)
            kept = bytes_kept(layer, make_input(shape, tokens, bench, device, 0))
            results.append({'part': 'memory', 'shape': label, 'side': side,
                            'kib_per_token': kept / tokens / 1024})
        rows.append((label, *(f'{row["kib_per_token"]:.1f}' for row in results[-len(SIDES):])))
    print(f'\nkept for backward by the MLP, {bench.dtype}')
    print_rows(rows)
    return results


# -----------------------------------------------------------------------------
# a training step

def make_step(config, device, compile=False):
    """A new model, and a function of tokens (B, S) that trains it by a step, as train.py does. That
    calls mark(phase) where a phase begins."""
    torch.manual_seed(config.seed)
    with device:
        model = GPT(model_config(config))
    optimizer = make_optimizer(model, config, device)
    forward = torch.compile(model) if compile else model
    dtype = getattr(torch, config.dtype)

    def step(idx, mark=lambda phase: None):
        mark('forward')
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            _, loss, routing = forward(idx, idx)
        (loss + routing.aux_loss.sum()).backward()
        mark('optimizer')
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark('end')
    return model, step


def bench_step(bench, device, _):
    """A training step of the whole model, on the bytes of model.py."""
    with open(os.path.join(ROOT, 'model.py'), 'rb') as file:
        text = torch.tensor(list(file.read()), device=device)
    results = []
    for label in set(bench.shapes.split(',')) & set(MODELS):
        shape = MODELS[label]
        size = shape['batch_size'], shape['block_size']

        def batch(turn, size=size):
            generator = torch.Generator().manual_seed(bench.seed + turn)
            starts = torch.randint(len(text) - size[1], (size[0], 1), generator=generator)
            return text[(starts + torch.arange(size[1])).to(device)]
        configs = plan_runs({'vocab_size': 256, 'dtype': bench.dtype, 'seed': bench.seed, 'plain':
                             bench.plain, 'aux_weight': bench.aux_weight, 'runs': SIDES} | shape, {})
        sides = {c.name: make_step(c, device, bench.compile)[1] for c in configs}
        seconds = alternate(sides, bench, batch)
        print(f'\ntraining step, {label}: {shape["n_layer"]} layers, D {shape["n_embd"]}, d_ffn '
              f'{shape["d_ffn"]}, {size[0]} x {size[1]} tokens')
        rows = [('', 'tokens/s', 'of dense', 'of moe')]
        for name in sides:
            row = {'part': 'step', 'shape': label, 'side': name,
                   'tokens_per_second': size[0] * size[1] / statistics.median(seconds[name]),
                   **{f'of_{base}': ratio(seconds[name], seconds[base]) for base in ('dense', 'moe')}}
            results.append(row)
            rows.append((name, f'{row["tokens_per_second"]:,.0f}', f'{row["of_dense"]:.2f}',
                         f'{row["of_moe"]:.2f}'))
        print_rows(rows)
    return results


def peak_of_step(config):
    """(bytes, phase): the most that a training step holds at once, weights and AdamW's averages
    among it, and in which phase that is. In the second step: the first makes the averages."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    device, peak, where, now = torch.device('cpu'), 0, None, None
    with FakeTensorMode(), MemTracker() as tracker:
        def mark(phase):                                           # what ends here was `now`
            nonlocal peak, where, now
            held = tracker.get_tracker_snapshot('peak')[device]['Total']
            if held > peak:
                peak, where = held, now
            now = phase

        model, step = make_step(config, device)
        idx = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64)
        step(idx)
        tracker.reset_mod_stats()
        model.norm.register_forward_hook(lambda *_: mark('head and loss'))
        model.norm.register_full_backward_pre_hook(lambda *_: mark('backward of layers'))
        step(idx, mark)
    return peak, where


def bench_fake(bench, _, files):
    """The most memory that a training step needs, on tensors without numbers: in some seconds, of
    models that do not fit this machine. (Below 256 positions a CPU's attention is in float32.)"""
    if not hasattr(F, 'grouped_mm'):     # a loop over experts has to know how many rows each has
        raise UserError(f'fake: expected a PyTorch with grouped_mm, got {torch.__version__}')
    values = {'vocab_size': 84}
    for file in files or [os.path.join(ROOT, 'config', 'openwebtext.py')]:
        values |= read_config_file(TrainConfig, file)
    runs = {side: {'factorised': None, **SIDES[side]} for side in ('moe', 'aoe', 'aoe whole', 'dense')}
    values |= {'runs': runs, 'name': None, 'seeds': None, 'dtype': bench.dtype}
    results, rows = [], [('', 'GiB', 'of moe', 'where')]
    for c in plan_runs(values, {}):
        peak, where = peak_of_step(c)
        results.append({'part': 'fake', 'side': c.name, 'peak': peak, 'where': where})
        rows.append((c.name, f'{peak / 2**30:.2f}', f'{peak / results[0]["peak"]:.2f}', where))
    print(f'\npeak of a training step: {c.n_layer} layers, D {c.n_embd}, d_ffn {c.d_ffn}, E '
          f'{c.n_expert}, vocabulary {c.vocab_size:,}, {c.batch_size} x {c.block_size} tokens, '
          f'{c.dtype}, aux_weight {c.aux_weight:g}')
    print_rows(rows)
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
             'fake': bench_fake}
    results = [row for part in bench.only.split(',') for row in parts[part](bench, device, files)]
    if bench.json:
        facts = {'torch': torch.__version__, 'device': name, **asdict(bench)}
        write_text(bench.json, json.dumps(facts | {'results': results}, indent=1))


if __name__ == '__main__':
    configurator.run(main)
