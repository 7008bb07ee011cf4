"""A GPT trained on texts that come with Python, several documents to a row, which then writes.

    python examples/train_transformer.py                # a small one: under two minutes on a laptop
    python examples/train_transformer.py --size 350m --implementation fa3      # on a Hopper GPU
    python examples/train_transformer.py --checkpoint DIR      # and again with --resume --steps 200

No document sees another. `--plain` lets them, for a comparison with `--implementation cudnn`, which
has no such mask. Needs flax, optax and orbax-checkpoint, which pip install ".[test]" brings.
"""

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from gpt import ATTENTION, SIZES, Config, Text, Transformer

import jax_fa3

PEAK_FLOPS = 989e12  # per second, of H100, H200 and GH200 in dense bf16


def optimizer(config: Config) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, 20, max(config.steps, 40))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95))


@functools.partial(jax.jit, static_argnums=0)
def initialize(config: Config) -> dict[str, Any]:
    model = Transformer(dataclasses.replace(config, implementation=None))
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return {"params": params, "optimizer": optimizer(config).init(params), "step": jnp.int32(0)}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(config: Config, state: Any, tokens: jax.Array, documents: jax.Array) -> Any:
    """The next state, the loss, and the floating-point operations that the model needs for it."""
    inputs, targets, ids = tokens[:, :-1], tokens[:, 1:], documents[:, :-1]
    length, begin = config.length, None
    weights = jnp.ones(targets.shape)
    pairs = jnp.float32(config.rows * length * (length + 1) / 2)  # of rows and keys they see
    if config.packed:  # the mask is made once, not in every layer
        segments: Any = {"query_segment_ids": ids, "key_value_segment_ids": ids}
        begin, _ = jax_fa3.key_intervals(length, length, **segments)
        weights = (ids == documents[:, 1:]).astype(jnp.float32)
        pairs = jnp.sum(jnp.arange(1, length + 1) - begin, dtype=jnp.float32)

    def loss_of(params: Any) -> jax.Array:
        logits = Transformer(config).apply({"params": params}, inputs, begin)
        assert isinstance(logits, jax.Array)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), targets
        )
        return jnp.sum(losses * weights) / jnp.sum(weights)

    loss, grads = jax.value_and_grad(loss_of)(state["params"])
    updates, moments = optimizer(config).update(grads, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    size = sum(x.size for x in jax.tree.leaves(params))
    flops = 6.0 * size * inputs.size + 12 * pairs * config.width * config.layers
    return {"params": params, "optimizer": moments, "step": state["step"] + 1}, loss, flops


def save(checkpointer: ocp.StandardCheckpointer, directory: Path, state: Any) -> None:
    checkpointer.save(directory / str(state["step"]), state)  # refuses one that is there
    checkpointer.wait_until_finished()


def resume(checkpointer: ocp.StandardCheckpointer, directory: Path, state: Any) -> Any:
    """The newest checkpoint there, or SystemExit with its name."""
    steps = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    if not steps:
        raise SystemExit(f"--resume: got {directory}, which has no checkpoint, wanted one that has")
    path = directory / str(max(steps))
    try:
        found = checkpointer.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    except Exception as error:  # orbax has many; whatever it is, this one is of no use
        reason = str(error).splitlines()[0]
        raise SystemExit(f"--resume: {path} is corrupt or of another --size: {reason}") from error
    print(f"resumed    {path}")
    return found


def generate(config: Config, params: Any, text: Text, prompt: str, length: int) -> str:
    """The prompt continued: all of it into the cache at once, then token after token."""
    config = dataclasses.replace(config, implementation=None)  # cuDNN has no query_offset
    model, tokens = Transformer(config, decode=True), jnp.asarray([text.encode(prompt)])
    whole = jnp.zeros((1, tokens.shape[1] + length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), whole)["cache"]
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    @jax.jit
    def step(cache: Any, tokens: jax.Array, key: jax.Array) -> Any:
        variables = {"params": params, "cache": cache}
        logits, variables = model.apply(variables, tokens, mutable=["cache"])
        assert isinstance(logits, jax.Array)
        choice = jax.random.categorical(key, logits[:, -1].astype(jnp.float32) / 0.7)
        return variables["cache"], choice[:, None]

    written = []
    for key in jax.random.split(jax.random.key(1), length):
        cache, tokens = step(cache, tokens, key)
        written.append(int(tokens[0, 0]))
    return text.decode(written)


def peak_flops() -> float | None:
    """Of this device per second in bf16, if it is one that the kernels are for."""
    kind = jax.devices()[0].device_kind
    return PEAK_FLOPS if any(name in kind for name in ("H100", "H200", "GH200")) else None


def progress(config: Config, step: int, loss: float, tokens: float, flops: float) -> None:
    """tokens and flops per second."""
    peak = peak_flops()
    bar = "#" * (20 * step // config.steps)
    mfu = f"MFU {flops / peak:.1%}" if peak else f"{flops / 1e9:,.0f} GFLOP/s"
    print(f"[{bar:20}] step {step:4}  loss {loss:.3f}  {tokens:,.0f} tokens/s  {mfu}", flush=True)


def train(config: Config, state: Any, text: Text, every: int) -> tuple[Any, list[float]]:
    """From state["step"] to config.steps."""
    losses, first = [], int(state["step"])
    seen, start = first, time.perf_counter()
    for step in range(first, config.steps):
        state, loss, flops = train_step(config, state, *text.batch(config, step))
        losses.append(loss)
        if step == first:
            print(f"compiled   loss {loss:.3f}, {time.perf_counter() - start:.1f} s", flush=True)
            seen, start = step + 1, time.perf_counter()
        elif (step + 1) % every == 0 or step + 1 == config.steps:
            value = float(loss)  # waits
            rate = (step + 1 - seen) / (time.perf_counter() - start)
            tokens = config.rows * config.length
            progress(config, step + 1, value, tokens * rate, float(flops) * rate)
            seen, start = step + 1, time.perf_counter()
    return state, [float(x) for x in losses]


def plot(losses: list[float], file: Path) -> None:
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit("--plot: needs matplotlib: pip install matplotlib") from None
    figure = Figure()
    figure.subplots(subplot_kw={"xlabel": "step", "ylabel": "loss"}).plot(losses)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a GPT on texts that come with Python.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--length", type=int, help="tokens of a row")
    parser.add_argument("--rows", type=int, help="of a batch")
    parser.add_argument("--implementation", choices=["fa3", "xla", *ATTENTION])
    parser.add_argument("--plain", action="store_true", help="documents see those before them")
    parser.add_argument(
        "--checkpoint", type=Path, help="directory that gets a checkpoint at the end"
    )
    parser.add_argument("--resume", action="store_true", help="from the newest in --checkpoint")
    parser.add_argument("--plot", type=Path, help="file for the loss curve")
    parser.add_argument("--prompt", default="The default")
    args = parser.parse_args()
    if args.implementation == "cudnn" and not args.plain:
        parser.error("--implementation cudnn has no mask for packed documents: add --plain")
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint DIR")
    directory = args.checkpoint and args.checkpoint.absolute()
    if directory and not args.resume and directory.exists() and any(directory.iterdir()):
        parser.error(f"--checkpoint {directory} is not empty: add --resume, or name another")
    given = {k: x for k, x in vars(args).items() if k in ("steps", "length", "rows") and x}
    config = dataclasses.replace(
        SIZES[args.size], implementation=args.implementation, packed=not args.plain, **given
    )
    text, state = Text(config), initialize(config)
    print(f"text       {len(text.tokens):,} tokens, {text.documents[-1] + 1} documents")
    size = sum(x.size for x in jax.tree.leaves(state["params"]))
    print(f"model      {size / 1e6:.1f}M parameters on {jax.devices()[0].device_kind}")
    with ocp.StandardCheckpointer() as checkpointer:
        if args.resume:
            state = resume(checkpointer, directory, state)
        state, losses = train(config, state, text, every=max(1, config.steps // 15))
        if directory and losses:
            save(checkpointer, directory, state)
    if args.plot:
        plot(losses, args.plot)
    print(args.prompt + generate(config, state["params"], text, args.prompt, length=60))


if __name__ == "__main__":
    main()
