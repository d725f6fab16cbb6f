"""Many visitors of the page at once, on loopback: failures, latency, and the server's memory while they come.

    python benchmarks/space_load.py                       # 20 clients for two minutes, one of them with the window
    python benchmarks/space_load.py --clients 4 --seconds 10 --output .work/load.json

The server is `spar demo` in a process of its own. All clients but one segment a small picture over and over; the last
one runs the sliding-window comparison. Clients and server share the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from gradio_client import Client, handle_file
from PIL import Image
from record import origin

from spar_hf.checkpoints import ASSETS
from spar_hf.demo.app import OWN_METHOD
from spar_hf.files import write_json

WORDS = "cake; car, automobile; tree; apple; star; sea; sky; sand"


def resident_mb(pid: int) -> float:
    """Memory of a process (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def start_server(port: int) -> subprocess.Popen[str]:
    """`spar demo`, once it serves."""
    command = [sys.executable, "-m", "spar_cli.main", "demo", "--model", "tiny", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("SPAR at "):
            return server
    raise RuntimeError(f"the server ended with status {server.wait()} before it served")


def visit(
    url: str, api_name: str, picture: str, until: list[float], seconds: list[float], failures: list[str]
) -> None:
    """One visitor: asks, waits for the answer, asks again."""
    try:
        client = Client(url, verbose=False, httpx_kwargs={"timeout": 120})
        while time.perf_counter() < until:
            started = time.perf_counter()
            client.predict(handle_file(picture), WORDS, "tiny", OWN_METHOD, api_name=api_name)
            seconds.append(time.perf_counter() - started)
    except Exception as error:  # whatever it is, it is what this counts
        failures.append(f"{type(error).__name__}: {error}")


def percentiles(seconds: list[float]) -> dict[str, float]:
    names = {"median_s": 50, "p90_s": 90, "p99_s": 99, "max_s": 100}
    return {name: round(float(np.percentile(seconds, share)), 3) for name, share in names.items()} if seconds else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--size", type=int, nargs=2, default=(192, 128), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--port", type=int, default=7979)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/space-load.json"))
    args = parser.parse_args()

    server, url = start_server(args.port), f"http://127.0.0.1:{args.port}/"
    try:
        with tempfile.TemporaryDirectory() as folder:
            picture = f"{folder}/picture.png"
            Image.open(ASSETS / "pictures" / "demo.png").convert("RGB").resize(tuple(args.size)).save(picture)
            warm = Client(url, verbose=False)
            for name in ("/segment", "/compare"):  # the model is loaded and the words are encoded once
                warm.predict(handle_file(picture), WORDS, "tiny", OWN_METHOD, api_name=name)
            quick: list[float] = []
            slow: list[float] = []
            failures: list[str] = []
            until = time.perf_counter() + args.seconds
            jobs = [("/segment", quick)] * (args.clients - 1) + [("/compare", slow)]
            threads = [
                threading.Thread(target=visit, args=(url, name, picture, until, seconds, failures))
                for name, seconds in jobs
            ]
            for thread in threads:
                thread.start()
            memory_mb = []
            while time.perf_counter() < until:
                memory_mb.append(round(resident_mb(server.pid), 1))
                time.sleep(args.seconds / 12)
            for thread in threads:
                thread.join()
            memory_mb.append(round(resident_mb(server.pid), 1))
    finally:
        server.terminate()
        server.wait()

    result = {
        **origin("gradio"),
        "clients": args.clients,
        "seconds": args.seconds,
        "picture_px": list(args.size),
        "failures": len(failures),
        "failure_messages": sorted(set(failures))[:5],
        "quick": {"requests": len(quick), **percentiles(quick)},
        "slow": {"requests": len(slow), **percentiles(slow)},
        "memory_mb": memory_mb,
        "load_average": round(os.getloadavg()[0], 1),
    }
    write_json(args.output, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
