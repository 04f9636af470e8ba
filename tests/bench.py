"""
Speed and memory of the three MLPs, in one run, the sides taking turns.

    python tests/bench.py                          # everything, some minutes
    python tests/bench.py --only=layer,memory
    python tests/bench.py --threads=1 --json=bench.json

Times are medians; a ratio is the median of the ratios of each round, so that
what slows the machine for a while slows both sides of it. Parts: layer (an MLP
alone, forward and backward), step (a training step of the model), memory
(bytes kept for backward), cost (speed and memory of aoe over d_low). `aoe whole`
is aoe with a gate that is not factorised.
"""

import contextlib
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import configurator
from configurator import UserError, build, expect, parse
from model import GPT, MLPS, PLAIN, GPTConfig
from prepare_data import PrepareConfig, prepare
from train import Training, choose_device, keep_freed_memory, plan_runs, print_rows

PARTS = ('layer', 'step', 'memory', 'cost')
SIDES = {'dense': {'mlp': 'dense'}, 'moe': {'mlp': 'moe'}, 'aoe': {'mlp': 'aoe'},
         'aoe whole': {'mlp': 'aoe', 'factorised': False}}
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
    only: str = 'layer,step,memory,cost'   # the parts to measure, with commas
    shapes: str = 'small,medium,paper'   # the sizes to measure, with commas
    rounds: int = 15                     # measurements of each side; the median counts
    warmup: int = 10                     # rounds of a window; it warms up by windows until steady
    seed: int = 0                        # of weights and inputs
    threads: int | None = None           # of the CPU; None: PyTorch's choice
    device: str = 'auto'                 # auto: cuda, else mps, else cpu
    dtype: Literal['float32', 'bfloat16'] = 'bfloat16'   # of weights and inputs, or of autocast
    aux_weight: float = 0.0              # weight of the load-balancing loss
    plain: bool = False                  # measure part 1 of model.py
    keep_freed_memory: bool = True       # as train.py does; False: the C library's own way
    compile: bool = False                # torch.compile, in the training step
    json: str | None = None              # write the figures to this file as well

    def __post_init__(self):
        for key, known in (('only', PARTS), ('shapes', tuple(LAYERS))):
            expect(self, key, f'some of {", ".join(known)}',
                   lambda text, known=known: set(text.split(',')) <= set(known))
        expect(self, 'rounds warmup threads', 'a positive number', lambda n: n > 0)


def multiply_adds(config):
    """Of one MLP layer per token, forward and backward, as model.py executes them.

    A product costs three times its forward, since its gradient is two products of the same size.
    What aoe spends on judging is less: only the chosen of E have a gradient, unless L_aux asks for
    all (and evaluates all twice). What it spends on the gate, if that is factorised, is more:
    C_i Wup_i is computed again in backward.
    """
    D, E, K, d = config.n_embd, config.n_expert, config.top_k, config.d_ffn
    if config.mlp == 'dense':
        return 3 * K * 3 * D * d
    if config.mlp == 'moe':
        return 3 * (D * E + K * 3 * D * d)
    d_low, d_wide = config.d_low, config.d_wide
    evaluation = (4 * E if config.aux_weight else E) * D * d_low + 2 * K * D * d_low
    if not config.factorised:
        return evaluation + 3 * K * 3 * D * d
    return evaluation + K * (4 * d_low * d_wide + 3 * 2 * D * d_wide)


def alternate(sides, bench, make=lambda turn: None):
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


def layer_config(side, shape, bench):
    shape = dict(shape)
    if side == 'aoe whole':              # its own default: d_low near D/6
        shape.pop('d_low', None)
    return GPTConfig(**SIDES[side], aux_weight=bench.aux_weight, plain=bench.plain, **shape)


def make_layer(config, bench, device):
    torch.manual_seed(bench.seed)
    layer = (PLAIN if config.plain else MLPS)[config.mlp](config)
    for name, p in layer.named_parameters():
        torch.nn.init.normal_(p, std=config.d_low ** -0.5 if name == 'w_up' else 0.02)
    return layer.to(device, getattr(torch, bench.dtype))


def make_input(shape, tokens, bench, device, turn):
    generator = torch.Generator().manual_seed(bench.seed + turn)   # other tokens each round
    x = torch.randn(tokens, shape['n_embd'], generator=generator)
    return x.to(device, getattr(torch, bench.dtype)).requires_grad_()


def transformers_layers(config, tokens, moe, bench, device):
    """Hugging Face's Mixtral block with the weights of moe: setting -> function(x). Empty without
    transformers."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        print('  (transformers is not installed: its Mixtral block is not measured)')
        return {}
    layers = {}
    for setting in ('eager', 'batched_mm', 'grouped_mm'):
        if setting == 'batched_mm' and tokens * moe.w_p[0].numel() > 2**28:
            continue                                               # it copies them for every pair
        theirs = MixtralConfig(
            hidden_size=config.n_embd, intermediate_size=config.d_ffn,
            num_local_experts=config.n_expert, num_experts_per_tok=config.top_k,
            experts_implementation=setting)
        block = MixtralSparseMoeBlock(theirs).to(device, getattr(torch, bench.dtype))
        with torch.no_grad():
            block.gate.weight.copy_(moe.router.T)
            block.experts.gate_up_proj.copy_(torch.cat([moe.w_g, moe.w_p], 2).transpose(1, 2))
            block.experts.down_proj.copy_(moe.w_o.transpose(1, 2))
        layers[f'mixtral {setting}'] = lambda x, block=block: block(x[None])
    return layers


def time_layers(layers, shape, tokens, bench, device):
    """Seconds of each layer, forward and backward: name -> list."""
    def run(layer):
        def function(x):
            h = layer(x)
            h = h[0] if isinstance(h, tuple) else h
            h.view_as(x).backward(cotangent)
            if isinstance(layer, torch.nn.Module):
                layer.zero_grad(set_to_none=True)
            x.grad = None
        return function
    def make(turn):
        return make_input(shape, tokens, bench, device, turn)
    cotangent = torch.randn_like(make(0))
    return alternate({name: run(layer) for name, layer in layers.items()}, bench, make)


def bench_layer(bench, device):
    """An MLP alone, forward and backward."""
    results = []
    for label in bench.shapes.split(','):
        shape, tokens = LAYERS[label]
        configs = {side: layer_config(side, shape, bench) for side in SIDES}
        layers = {side: make_layer(config, bench, device) for side, config in configs.items()}
        layers |= transformers_layers(configs['moe'], tokens, layers['moe'], bench, device)
        seconds = time_layers(layers, shape, tokens, bench, device)

        c = configs['aoe']
        print(f'\nlayer, {label}: D {c.n_embd}, d_ffn {c.d_ffn}, d_low {c.d_low} (whole: '
              f'{configs["aoe whole"].d_low}), E {c.n_expert}, K {c.top_k}, {tokens:,} tokens')
        rows = [('', 'ms', 'of dense', 'predicted', 'of moe', 'predicted')]
        for name in layers:
            row = {'part': 'layer', 'shape': label, 'side': name,
                   'ms': 1e3 * statistics.median(seconds[name])}
            for base in ('dense', 'moe'):
                row[f'of_{base}'] = ratio(seconds[name], seconds[base])
                config = configs.get(name, configs['moe'])
                row[f'predicted_of_{base}'] = multiply_adds(configs[base]) / multiply_adds(config)
            results.append(row)
            rows.append((name, f'{row["ms"]:.2f}', *(f'{row[key]:.2f}' for key in (
                'of_dense', 'predicted_of_dense', 'of_moe', 'predicted_of_moe'))))
        print_rows(rows)
    return results


def bench_step(bench, device):
    """A training step of the whole model, as train.py does it."""
    results = []
    for label in bench.shapes.split(','):
        if label not in MODELS:
            continue
        shape = MODELS[label]
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(None):
                config = PrepareConfig(name='code', data_dir=folder)
                prepare([os.path.join(ROOT, 'model.py')], config)
            values = {'dataset': 'code', 'data_dir': folder, 'device': str(device),
                      'dtype': bench.dtype, 'seed': bench.seed, 'aux_weight': bench.aux_weight,
                      'plain': bench.plain, 'compile': bench.compile, 'runs': SIDES}
            runs = plan_runs(values | shape, {})
            trainings = {run.name: Training(run) for run in runs}
        sides = {name: lambda _, training=training: [training.step() for _ in range(3)]
                 for name, training in trainings.items()}
        seconds = alternate(sides, bench)
        print(f'\ntraining step, {label}: {shape["n_layer"]} layers, D {shape["n_embd"]}, d_ffn '
              f'{shape["d_ffn"]}, {shape["batch_size"]} x {shape["block_size"]} tokens')
        rows = [('', 'tokens/s', 'of dense', 'of moe')]
        for name, training in trainings.items():
            speed = 3 * training.tokens_per_iter / statistics.median(seconds[name])
            row = {'part': 'step', 'shape': label, 'side': name, 'tokens_per_second': speed,
                   'of_dense': ratio(seconds[name], seconds['dense']),
                   'of_moe': ratio(seconds[name], seconds['moe'])}
            results.append(row)
            rows.append((name, f'{speed:,.0f}', f'{row["of_dense"]:.2f}', f'{row["of_moe"]:.2f}'))
        print_rows(rows)
    return results


def bytes_kept(layer, x, *more):
    """Bytes that layer(x, *more) keeps for backward, each once, without parameters and x."""
    left_out = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage                     # held: no address is used twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h = layer(x, *more)
    del h
    return sum(storage.nbytes() for storage in kept.values())


def bench_memory(bench, device):
    """What a layer keeps for backward: exact, and the same on any machine."""
    results = []
    rows = [('KiB per token and layer', *SIDES)]
    for label in bench.shapes.split(','):
        shape, tokens = LAYERS[label]
        cells = []
        for side in SIDES:
            layer = make_layer(layer_config(side, shape, bench), bench, device)
            x = make_input(shape, tokens, bench, device, 0)
            kib = bytes_kept(layer, x) / tokens / 1024
            row = {'part': 'memory', 'shape': label, 'side': side, 'kib_per_token': kib}
            results.append(row)
            cells.append(f'{kib:.1f}')
        rows.append((label, *cells))
    print(f'\nkept for backward by the MLP, {bench.dtype}')
    print_rows(rows)
    return results + bench_model_memory(bench, device)


def bench_model_memory(bench, device):
    """What the whole model keeps for backward per token, at the last of the shapes: for each layer,
    and besides layers."""
    def kib_per_token(side, n_layer):
        config = layer_config(side, shape | {'n_layer': n_layer, 'vocab_size': 50_304,
                                             'block_size': 1024}, bench)
        model = GPT(config).to(device)
        generator = torch.Generator().manual_seed(bench.seed)
        tokens = torch.randint(config.vocab_size, (1, 1024), generator=generator).to(device)
        dtype = getattr(torch, bench.dtype)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            half, whole = (bytes_kept(model, idx, idx) for idx in (tokens[:, :512], tokens))
        return (whole - half) / 512 / 1024   # without copies of weights, the same for both

    label = bench.shapes.split(',')[-1]
    shape, _ = LAYERS[label]
    results = []
    rows = [('KiB per token', 'each layer', 'embedding, head, loss', '12 layers, of moe')]
    for side in ('moe', 'aoe', 'aoe whole', 'dense'):
        one, two = (kib_per_token(side, n_layer) for n_layer in (1, 2))
        row = {'part': 'model memory', 'side': side, 'kib_per_layer': two - one,
               'kib_besides': 2 * one - two}
        results.append(row)
        all_of, moe = (r['kib_besides'] + 12 * r['kib_per_layer'] for r in (row, results[0]))
        row['of_moe'] = all_of / moe
        rows.append((side, f'{row["kib_per_layer"]:.1f}', f'{row["kib_besides"]:.1f}',
                     f'{row["of_moe"]:.2f}'))
    print(f'\nkept for backward by the model, {label}, vocabulary 50,304, {bench.dtype}')
    print_rows(rows)
    return results


def bench_cost(bench, device):
    """Table 4 of the paper: what aoe costs over d_low, D/12 to 2 D/3, at the last of the shapes;
    and with a gate that is not factorised, at D/24 to D/3."""
    label = bench.shapes.split(',')[-1]
    shape, tokens = LAYERS[label]
    configs = {'moe': layer_config('moe', shape, bench)}
    for side, parts in (('aoe', (12, 6, 3, 1.5)), ('aoe whole', (24, 12, 6, 3))):
        for part in parts:
            d_low = max(8, 8 * round(shape['n_embd'] / part / 8))
            config = layer_config(side, shape, bench)
            configs[f'{side} {d_low}'] = replace(config, d_low=d_low)
    layers = {name: make_layer(config, bench, device) for name, config in configs.items()}
    seconds = time_layers(layers, shape, tokens, bench, device)
    results, rows = [], [('', 'tokens/s', 'of moe', 'predicted', 'KiB/token', 'of moe')]
    for name, layer in layers.items():
        kib = bytes_kept(layer, make_input(shape, tokens, bench, device, 0)) / tokens / 1024
        speed = tokens / statistics.median(seconds[name])
        predicted = multiply_adds(configs['moe']) / multiply_adds(configs[name])
        row = {'part': 'cost', 'side': name, 'tokens_per_second': speed, 'kib_per_token': kib,
               'of_moe': ratio(seconds[name], seconds['moe']), 'predicted_of_moe': predicted}
        results.append(row)
        rows.append((name, f'{speed:,.0f}', f'{row["of_moe"]:.2f}', f'{predicted:.2f}',
                     f'{kib:.1f}', f'{kib / results[0]["kib_per_token"]:.2f}'))
    print(f'\ncost of the layer over d_low, {label}, aux_weight {bench.aux_weight:g}')
    print_rows(rows)
    return results


def main(arguments):
    values, rest = parse(BenchConfig, arguments, __doc__)
    if rest:
        raise UserError(f'expected --key=value, got {rest[0]!r}; --help lists the keys')
    bench = build(BenchConfig, values)
    if bench.threads:
        torch.set_num_threads(bench.threads)
    if bench.keep_freed_memory:
        keep_freed_memory()
    device = choose_device(bench.device)
    name = f'{torch.get_num_threads()} threads'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    print(f'torch {torch.__version__}, {device} ({name}), {bench.dtype}, {bench.rounds} rounds')
    parts = {'layer': bench_layer, 'step': bench_step, 'memory': bench_memory, 'cost': bench_cost}
    results = [row for part in bench.only.split(',') for row in parts[part](bench, device)]
    if bench.json:
        with open(bench.json, 'w', encoding='utf-8') as file:
            facts = {'torch': torch.__version__, 'device': name, **asdict(bench)}
            json.dump(facts | {'results': results}, file, indent=1)


if __name__ == '__main__':
    configurator.run(main)
