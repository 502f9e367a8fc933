"""Whether clients of a server get the texts that each would get alone.

  python benchmarks/serving/same_texts.py [--requests 200] [--clients 64] [--seed 0]
      [--model NAME] [--mesh data=2,model=4] [--rules STRATEGY] [--devices 8] [--processes 2]
      [--long] [--shared]

Random requests (lengths, numbers of samples, all settings, seeds, streamed or not, with
log-probabilities or without) are sent by so many clients at once; every eighth client leaves in the
middle. In float32 every text must be that of `LanguageModel.generate`. With --long half of the
prompts are longer than a chunk, with --shared half of them begin as others do, by 300 to 700
tokens. With --devices so many CPU devices of each of --processes stand in for a mesh.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx
from servers import ours

WORDS = (
    "The people of the land were in the field, and it was said that a king who had come from the "
    "sea, with men and ships and gold, would speak to them of war and of peace before winter"
).split()


def request(rng: random.Random, longest: int, beginnings: Sequence[str] = ("",)) -> dict[str, Any]:
    """A body for /v1/completions."""
    length = rng.randint(1, longest) if rng.random() < 0.5 else rng.randint(1, 12)
    body: dict[str, Any] = {
        "prompt": rng.choice(beginnings) + " ".join(rng.choices(WORDS, k=length)),
        "max_tokens": rng.randint(1, 40),
        "seed": rng.randint(0, 2**31),
        "temperature": rng.choice([0, 0.3, 0.8, 1.0, 1.5]),
        "stream": rng.random() < 0.5,
    }
    maybe = {
        "n": rng.randint(2, 3),
        "top_p": rng.uniform(0.5, 0.99),
        "top_k": rng.randint(1, 60),
        "min_p": rng.uniform(0.0, 0.2),
        "repetition_penalty": rng.uniform(0.8, 1.5),
        "presence_penalty": rng.uniform(-1, 2),
        "frequency_penalty": rng.uniform(-0.5, 2),
        "logit_bias": {str(rng.randint(3, 500)): rng.uniform(-5, 5) for _ in range(4)},
        "min_tokens": rng.randint(1, 10),
        "stop": rng.sample([" the", "and", ".", " of a"], 2),
        "ignore_eos": True,
        "logprobs": rng.randint(0, 5),
    }
    for name, value in maybe.items():
        if rng.random() < 0.25:
            body[name] = value
    if "min_tokens" in body:
        body["min_tokens"] = min(body["min_tokens"], body["max_tokens"])
    return body


def expected(lm: Any, body: dict[str, Any]) -> list[str]:
    """What `generate` writes for a body."""
    renamed = {"min_tokens": "min_new_tokens"}
    taken = {"prompt", "max_tokens", "n", "stream", "logprobs"}
    options = {renamed.get(name, name): body[name] for name in body if name not in taken}
    options = {"temperature": 1.0, "top_p": 1.0} | options
    options["logit_bias"] = {int(i): bias for i, bias in options.get("logit_bias", {}).items()}
    return lm.generate(body["prompt"], body["max_tokens"], num_samples=body.get("n", 1), **options)


async def ask(client: httpx.AsyncClient, body: dict[str, Any], leaves: bool) -> list[str] | None:
    """The texts of an answer; None where the client left."""
    if not body["stream"]:
        if leaves:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.post("/v1/completions", json=body), 0.3)
            return None
        answer = await client.post("/v1/completions", json=body)
        answer.raise_for_status()
        choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
        return [choice["text"] for choice in choices]
    texts = [""] * body.get("n", 1)
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["text"]
                if leaves:
                    return None
    return texts


async def all_at_once(url: str, bodies: list[dict[str, Any]], clients: int) -> list[Any]:
    queue = list(enumerate(bodies))[::-1]
    found: list[Any] = [None] * len(bodies)

    async def work(number: int) -> None:
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=url, timeout=1200, limits=limits) as client:
            while queue:
                i, body = queue.pop()
                found[i] = await ask(client, body, leaves=number % 8 == 7)

    await asyncio.gather(*(work(number) for number in range(clients)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="")
    parser.add_argument("--mesh", default="")
    parser.add_argument("--rules", default="")
    parser.add_argument("--devices", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--shared", action="store_true")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    beginnings = ["", *(" ".join(rng.choices(WORDS, k=k)) + " " for k in (260, 560))]
    beginnings = ["", *beginnings] if args.shared else [""]
    longest = 250 if args.long else 60
    bodies = [request(rng, longest, beginnings) for _ in range(args.requests)]
    options = ["--model", args.model] if args.model else []
    env = {}
    if args.mesh:
        options += ["--mesh", args.mesh, "--rules", args.rules]
        env["JAX_NUM_CPU_DEVICES"] = str(args.devices)
    begin = time.monotonic()
    options += ["--dtype", "float32"]
    with ours(*options, env=env, processes=args.processes) as server:
        found = asyncio.run(all_at_once(server.url, bodies, args.clients))
        while (counts := server.metrics())["num_requests_running"]:
            time.sleep(0.05)
    seconds = time.monotonic() - begin
    import neo_jax

    lm = neo_jax.load(args.model or None, dtype="float32")
    same = left = 0
    for body, texts in zip(bodies, found, strict=True):
        if texts is None:
            left += 1
            continue
        wanted = expected(lm, body)
        same += texts == wanted
        if texts != wanted:
            print(json.dumps({"body": body, "found": texts, "expected": wanted}), file=sys.stderr)
    print(
        f"{len(bodies)} requests of {args.clients} clients in {seconds:.0f} s: {left} left, "
        f"{same} of {len(bodies) - left} others equal; "
        f"{counts['generation_tokens_total']:.0f} tokens, rows in use at the end: "
        f"{counts['num_requests_running']:.0f}; tokens of prompts not read again: "
        f"{counts['prefix_cache_hits_total']:.0f}"
    )
    sys.exit(same != len(bodies) - left)


if __name__ == "__main__":
    main()
