"""One gateway process under load: ``GET /jobs/{id}`` beside a bare FastAPI route that returns the same JSON, in turns,
and many ``POST /generate`` at once.

    python -m benchmarks.gateway_load --reads 20000 --posts 500
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx
from meddiff import phantoms
from meddiff.client import Client
from meddiff.embedded import stack

AT_ONCE = 16
TURNS = 5
BARE = """
import json, sys, uvicorn
from typing import Any
from fastapi import FastAPI

app = FastAPI()
job = json.load(open(sys.argv[1]))

@app.get("/jobs/{job_id}")
async def get_job(job_id: str) -> dict[str, Any]:
    return job

uvicorn.run(app, port=int(sys.argv[2]), access_log=False, log_level="error")
"""


async def reads_a_second(address: str, job_id: str, count: int, statuses: Counter[int]) -> float:
    """``count`` reads, ``AT_ONCE`` in flight on as many connections, by a client that does as little as it can: a
    usual one takes longer for a read than the server does."""
    where = httpx.URL(address)
    request = f"GET /jobs/{job_id} HTTP/1.1\r\nHost: {where.host}\r\n\r\n".encode()
    left = count

    async def some() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection(where.host, where.port)
        while left > 0:
            left -= 1
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            statuses[int(head.split(b" ", 2)[1])] += 1
            await reader.readexactly(int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0]))
        writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return count / (time.perf_counter() - begun)


async def posts_at_once(address: str, count: int) -> tuple[Counter[int], set[str], float]:
    """Statuses of ``count`` concurrent ``POST /generate``, ids of the accepted jobs, and seconds for all."""
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
        begun = time.perf_counter()
        body = {"model": "load", "count": 1}
        answers = await asyncio.gather(*(client.post("/generate", json=body) for _ in range(count)))
    accepted = {answer.json()["id"] for answer in answers if answer.status_code == 202}
    return Counter(answer.status_code for answer in answers), accepted, time.perf_counter() - begun


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--posts", type=int, default=500)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        os.environ["MEDDIFF_MAX_TENANT_JOBS"] = str(arguments.posts + 1)
        running = stack.up(home / "stack", inpainters=1)
        try:
            _measure(running, home, arguments)
        finally:
            stack.down(home / "stack")


def _measure(running: stack.Stack, home: Path, arguments: argparse.Namespace) -> None:
    quick = {
        "finetuning": {"steps": 4, "segment_steps": 4, "variants": 1, "preview_pairs": 0},
        "mask_generation": {"steps": 8, "segment_steps": 8, "sampling_steps": 4},
    }
    phantoms.write(home / "phantoms", pairs=12, backgrounds=2)
    with Client(running.address) as client:
        job = client.wait(client.finetune(client.upload(home / "phantoms").id, name="load", override=quick).id)
        assert job.status == "succeeded", job.problem
        (home / "job.json").write_bytes(job.model_dump_json().encode())
        (home / "bare.py").write_text(BARE)
        port = _free_port()
        bare = subprocess.Popen([sys.executable, str(home / "bare.py"), str(home / "job.json"), str(port)])
        try:
            _until_it_answers(f"http://127.0.0.1:{port}/jobs/x")
            statuses, ratios = Counter[int](), []
            for turn in range(TURNS):
                each = arguments.reads // TURNS
                ours = asyncio.run(reads_a_second(running.address, job.id, each, statuses))
                theirs = asyncio.run(reads_a_second(f"http://127.0.0.1:{port}", job.id, each, Counter()))
                ratios.append(ours / theirs)
                print(f"turn {turn}: {ours:.0f} reads a second, bare route {theirs:.0f}, ratio {ratios[-1]:.2f}")
            print(f"ratio, median of {TURNS}: {statistics.median(ratios):.2f} (wanted: 0.5); {dict(statuses)}")
        finally:
            bare.terminate()
        answers, accepted, seconds = asyncio.run(posts_at_once(running.address, arguments.posts))
        print(f"{arguments.posts} POST /generate at once: {dict(answers)} in {seconds:.1f} s")
        known = {one.id for one in client.jobs(kind="generate")}
        lost, untold = len(accepted - known), len(known - accepted)
        print(f"{len(accepted)} accepted: {lost} of them not listed; {untold} listed that nobody was told of")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until_it_answers(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            httpx.get(url)
            return
        except httpx.TransportError:
            time.sleep(0.05)
    raise RuntimeError("the bare route does not answer")


if __name__ == "__main__":
    main(sys.argv[1:])
