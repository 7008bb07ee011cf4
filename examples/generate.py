"""Continuous batching: requests arrive, are read in chunks beside those that write, and leave.

    python examples/generate.py                              # trains a small model first: two minutes
    python examples/generate.py --checkpoint DIR             # of train_transformer.py, of the same --size
    python examples/generate.py --alone                      # each request once more, by itself

One compiled step serves all of it. It takes as many tokens as there are rows, of whichever sequences
there are: a chunk of a prompt, or the last token of one that writes. Keys and values of all layers are in
one pool of pages (jax_fa3.kv_cache), which belong to a request while it is there.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from batching import Engine, Request, Sizes
from gpt import SIZES, Text
from train_transformer import initialize, resume, train

PROMPTS = (
    "The default",
    "An object is an instance of a class. Every object has an identity, a type and a value. The",
    "This module",
    "If the argument is not a string, a TypeError is raised. Otherwise the function returns",
    "Return a new",
    "A generator is a function which returns an iterator. It looks like a normal function except that it",
)


def serve(engine: Engine, requests: list[Request], every: int, quiet: bool = False) -> None:
    """All of them, one arriving every so many steps."""
    waiting, left, seen, steps, start = list(requests), 0, 0, 0, 0.0
    while waiting or any(engine.slots):
        arrived = 1 + steps // every - (len(requests) - len(waiting))
        while waiting and arrived > 0 and engine.admit(waiting[0]):
            waiting.pop(0)
            arrived -= 1
        gone, tokens = engine.step()
        left, seen, steps = left + len(gone), seen + tokens, steps + 1
        if steps == 1:  # which compiled
            seen, start = 0, time.perf_counter()
        elif not quiet and (gone or steps % 20 == 0):
            rate = seen / (time.perf_counter() - start)
            bar = "#" * (20 * left // len(requests))
            there = f"{sum(map(bool, engine.slots))} there, {len(waiting)} to come"
            print(f"[{bar:20}] step {steps:4}  {there}  {rate:,.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Continues several texts at a time.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--checkpoint", type=Path, help="directory of train_transformer.py's")
    parser.add_argument("--steps", type=int, help="of the training, without --checkpoint")
    parser.add_argument("--length", type=int, default=40, help="tokens to write")
    parser.add_argument("--every", type=int, default=5, help="steps from one request to the next")
    parser.add_argument("--alone", action="store_true", help="each request by itself too")
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    args = parser.parse_args()
    config = SIZES[args.size]
    config = dataclasses.replace(config, steps=args.steps or config.steps)
    text, state = Text(config), initialize(config)
    if args.checkpoint:
        with ocp.StandardCheckpointer() as checkpointer:
            state = resume(checkpointer, args.checkpoint.absolute(), state)
    else:
        state, _ = train(config, state, text, every=max(1, config.steps // 15))

    def requests(prompts: Any) -> list[Request]:
        return [Request(text.encode(prompt), args.length) for prompt in prompts]

    together = requests(args.prompts)
    serve(Engine(config, state["params"], Sizes()), together, args.every)
    for i, request in enumerate(together):
        print(f"{i}: {text.decode(request.tokens)}")
    if args.alone:
        for prompt, request in zip(args.prompts, together, strict=True):
            (alone,) = requests([prompt])
            serve(Engine(config, state["params"], Sizes()), [alone], 1, quiet=True)
            assert alone.tokens == request.tokens, text.decode(alone.tokens)
        print("alone      the same texts")


if __name__ == "__main__":
    main()
