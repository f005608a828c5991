"""Step 4: a whole train step beside peft with transformers, and where ours spends its time.

Llama-3.1-8B's and Llama-3.2-1B's geometry with random weights in bfloat16, adapters on all linear maps, AdamW, batch x
sequence of 8 x 2048 and 1 x 4096, ranks 16 and 64. `ours` under the memory plans matmuls and blocks, with the kernels
and without (xla), from a bfloat16 base and from one packed in NF4; `peft` eager and compiled (torch.compile), with and
without gradient checkpointing, by PyTorch's own fused attention (sdpa) or, where flash_attn is installed, that too, and
from an NF4 base where bitsandbytes is. peft's adapters are bfloat16 like the base, the faster way; its default, float32
adapters that cast their input, has rows of its own (`adapters`). Each in a process of its own, so that its peak is its
own. Seconds are of steps after the first ones; the peak is each allocator's count.

`trace` rows are the operations that ours spends its time on, from JAX's profiler: seconds of one step by kind and by
kernel, and the floor: the FLOPs of its matrix products over the rate that this card was seen to reach.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.on_device.plans import config_of, filled
from experiments.on_device.record import Prepared, Row, missing

PATIENCE = 300.0
BIG, LONG = (8, 2048), (1, 4096)
WARM, STEPS = 2, 6
# What fits beside peft's step with gradient checkpointing, 43 GiB at 8 x 2048 tokens.
WITHIN = "blocks,lora_low=save,v_proj=save,o_proj=save,up_proj=save,tokens=8192"


def keys(toy: bool) -> Iterator[Row]:
    """In the order of their worth."""

    def row(side, size=BIG, geometry="llama3.1-8b", rank=16, base="bfloat16", **how):
        sizes = {"geometry": geometry, "rows": size[0], "length": size[1], "rank": rank, "base": base}
        return {"side": side, **sizes, **how}

    if toy:
        small = {"size": (2, 64), "geometry": "toy", "rank": 4}
        yield row("trace", **{**small, "base": "nf4"}, save="matmuls", products="kernels")
        yield row("peft", **small, mode="eager", save="checkpointing")
        return
    ours, theirs = {"products": "kernels"}, {"mode": "eager"}
    yield row("ours", save="matmuls", **ours)
    yield row("trace", save="matmuls", **ours)
    yield row("peft", save="checkpointing", **theirs)
    yield row("ours", save=WITHIN, **ours)
    yield row("ours", save="blocks", **ours)
    yield row("trace", save="matmuls,tokens=8192", **ours)
    yield row("ours", save="matmuls,tokens=4096", **ours)
    yield row("ours", save="matmuls", products="xla")
    yield row("ours", LONG, save="matmuls", **ours)
    yield row("peft", LONG, save="kept", **theirs)
    yield row("peft", LONG, save="checkpointing", **theirs)
    yield row("ours", LONG, save="blocks", **ours)
    yield row("trace", LONG, save="matmuls", **ours)
    yield row("ours", save="matmuls", base="nf4", **ours)
    yield row("ours", save="matmuls,tokens=8192", base="nf4", **ours)
    yield row("ours", LONG, save="matmuls", products="xla")
    yield row("peft", LONG, mode="compile", save="kept")
    yield row("peft", mode="compile", save="checkpointing")
    yield row("trace", save="matmuls", products="xla")
    yield row("peft", save="kept", **theirs)
    yield row("trace", save="matmuls", base="nf4", **ours)
    for size in (BIG, LONG):
        yield row("ours", size, rank=64, save="matmuls", **ours)
        yield row("peft", size, rank=64, save="checkpointing", **theirs)
        yield row("peft", size, rank=64, save="kept", **theirs)
        yield row("ours", size, geometry="llama3.2-1b", save="matmuls", **ours)
        yield row("ours", size, geometry="llama3.2-1b", save="blocks", **ours)
        yield row("peft", size, geometry="llama3.2-1b", save="checkpointing", **theirs)
        yield row("peft", size, geometry="llama3.2-1b", save="kept", **theirs)
        yield row("peft", size, geometry="llama3.2-1b", mode="compile", save="kept")
    yield row("ours", save="blocks", products="xla")
    for save, products in (("blocks", "kernels"), ("matmuls", "xla")):
        yield row("ours", save=save, base="nf4", products=products)
    if not missing(["bitsandbytes"]):
        for size in (BIG, LONG):
            yield row("peft", size, base="nf4", save="checkpointing", **theirs)
    if not missing(["flash_attn"]):
        for size in (BIG, LONG):
            yield row("peft", size, save="checkpointing", attention="flash_attention_2", **theirs)
    yield row("peft", LONG, mode="compile", save="checkpointing")
    yield row("peft", save="checkpointing", adapters="float32", **theirs)
    yield row("peft", LONG, save="checkpointing", adapters="float32", **theirs)


def ahead(key: Row) -> int:
    """So many prepare at one time; a compiler's trials leave each process with some memory."""
    return 3 if key["geometry"] == "llama3.1-8b" else 6


def prepare(key: Row, toy: bool, device: str) -> Prepared:
    """Compiles a side's step; measuring makes the weights and times it."""
    return Prepared((_theirs if key["side"] == "peft" else _ours)(key, toy))


def tokens_of(rows: int, length: int, vocabulary: int) -> dict[str, Any]:
    """A batch of whole rows of random tokens, each of which predicts the next."""
    import numpy as np

    tokens = np.random.default_rng(0).integers(3, vocabulary, (rows, length), dtype=np.int32)
    weights = np.ones((rows, length), np.float32)
    weights[:, -1] = 0
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_weights": weights}


def _ours(key: Row, toy: bool) -> Callable[[], Row]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import jaxpeft as jp
    from jaxpeft import tree
    from jaxpeft.backward.flops import count_flops
    from jaxpeft.method import view_of
    from jaxpeft.models import family
    from pallas_kernels import packed, platform

    config = config_of(key["geometry"])
    base = family(config).from_hf(config, jnp.bfloat16)
    batch = tokens_of(key["rows"], key["length"], config["vocab_size"])
    method, optimizer = jp.lora(rank=key["rank"]), optax.adamw(1e-4)
    shapes = tree.flatten(jax.eval_shape(lambda: base.init(jax.random.key(0), {})))
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in shapes.items()}
    kernels = [path for path, leaf in shapes.items() if path.endswith("/kernel") and len(leaf.shape) == 3]
    pack = jax.jit(lambda stack: jax.lax.map(packed.quantize, stack))

    def weights() -> Any:
        found = {}
        for path, leaf in shapes.items():
            found[path] = filled(leaf)
            if key["base"] == "nf4" and path in kernels:
                found[path] = jax.block_until_ready(pack(found[path]))
        return tree.unflatten(found)

    def state_of(params: Any) -> Any:
        _, trainable, frozen = jp.setup(method, base, params, jax.random.key(1))
        return jp.init_state(method, optimizer, trainable, frozen, jax.random.key(2))

    like = {p: jax.eval_shape(pack, s) if key["base"] == "nf4" and p in kernels else s for p, s in shapes.items()}
    adapted = jp.remat(method.forward(base, view_of(base, method, {})), key["save"])
    function = jp.make_train_step(adapted, method, optimizer)
    abstract = jax.eval_shape(lambda params: _abstract_state(method, base, params, optimizer), tree.unflatten(like))
    flops = count_flops(jax.make_jaxpr(lambda *args: function(*args))(abstract, batch))
    with platform.forced(None if key["products"] == "kernels" else "xla"):
        compiled = jax.jit(function, donate_argnums=0).lower(abstract, batch).compile()

    def measure() -> Row:
        state = state_of(weights())
        before = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        seconds: list[float] = []

        def step(state: Any) -> Any:
            begin = time.perf_counter()
            state, metrics = compiled(state, batch)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - begin)
            assert np.isfinite(loss), f"loss {loss}"
            return state

        for _ in range(WARM + (2 if toy else STEPS)):
            state = step(state)
        found = {"seconds": seconds[WARM:], "flops": flops, "peak_before": before}
        found["peak"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if key["side"] == "trace":
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    state = step(state)
                found |= operations(Path(folder))
        return found

    return measure


def _abstract_state(method: Any, base: Any, params: Any, optimizer: Any) -> Any:
    import jax

    import jaxpeft as jp

    _, trainable, frozen = jp.setup(method, base, params, jax.random.key(1))
    return jp.init_state(method, optimizer, trainable, frozen, jax.random.key(2))


# Where the time goes. The first pattern that a kernel's name matches is its kind.
KINDS = {
    "attention": r"fmha|flash|cudnn|attention",
    "our thin products": r"lora_(low|row)_product",
    "our products": r"lora_product|mosaic",
    "products": r"gemm|cutlass|nvjet|cublas|splitK|dot|wgmma|xmma",
    "copies": r"^([mM]emcpy|[mM]emset|copy|dynamic.slice)|loop_(dynamic_slice|slice|transpose|copy)_fusion|concatenate",
    "elementwise": r"fusion|reduce|scatter|gather|sort|convert|broadcast|wrapped|loop",
}


def operations(folder: Path) -> Row:
    """{"kinds": {kind: seconds}, "top": [[kernel, seconds, calls]]} of a trace with one step, on the first device."""
    import jax

    files = sorted(folder.rglob("*.xplane.pb"))
    if not files or not hasattr(jax.profiler, "ProfileData"):
        return {"kinds": {}, "top": []}
    spent: dict[str, list[float]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        if not re.search(r"/device:(GPU|TPU):0$", plane.name):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                entry = spent.setdefault(event.name, [0.0, 0])
                entry[0] += event.duration_ns * 1e-9
                entry[1] += 1
    kinds: dict[str, float] = {}
    for name, (seconds, _) in spent.items():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + seconds
    top = sorted(spent.items(), key=lambda item: -item[1][0])[:40]
    return {
        "kinds": {kind: float(f"{seconds:.4g}") for kind, seconds in sorted(kinds.items(), key=lambda item: -item[1])},
        "top": [[name[:120], float(f"{seconds:.4g}"), int(calls)] for name, (seconds, calls) in top],
    }


# The other side.


def _theirs(key: Row, toy: bool) -> Callable[[], Row]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = LlamaConfig(**config_of(key["geometry"]))
    settings._attn_implementation = key.get("attention", "sdpa")

    def measure() -> Row:
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            model = LlamaForCausalLM(settings)
            torch.set_default_dtype(torch.float32)
        if key["base"] == "nf4":
            model = _quantized(model)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=key["rank"], lora_alpha=key["rank"], target_modules=targets)
        model = get_peft_model(model, config, autocast_adapter_dtype=key.get("adapters") == "float32")
        if key["save"] == "checkpointing":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        run = torch.compile(model) if key["mode"] == "compile" else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
        tokens = tokens_of(key["rows"], key["length"], settings.vocab_size)["tokens"]
        tokens = torch.tensor(tokens, device=device, dtype=torch.long)
        seconds = []
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM + (2 if toy else STEPS)):
            begin = time.perf_counter()
            loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            seconds.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        return {"seconds": seconds[WARM:], "peak": peak}

    return measure


def _quantized(model: Any) -> Any:
    """The model with bitsandbytes' NF4 layers, doubly quantized, in place of its layers' linear maps."""
    import bitsandbytes as bnb
    import torch

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
            parent = model.get_submodule(name.rpartition(".")[0])
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            setattr(parent, name.rpartition(".")[2], new.to(module.weight.device))
    return model
