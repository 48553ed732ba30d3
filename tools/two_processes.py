"""How much longer two training processes take on the cores that one has.

Run as python tools/two_processes.py.
Each has two threads; on two cores the ideal is 2. No test: the scheduler and OpenMP's own waiting
make it vary from run to run, for nn.LSTM too.
"""

import subprocess
import sys

SECONDS = """
import sys, time
import torch
import lstm_ext

torch.set_num_threads(2)
cls = {"lstm_ext.LSTM": lstm_ext.LSTM, "nn.LSTM": torch.nn.LSTM}[sys.argv[1]]
module, x = cls(256, 256), torch.randn(50, 32, 256)

def seconds(count):
    start = time.perf_counter()
    for _ in range(count):
        module(x)[0].sum().backward()
    return time.perf_counter() - start

seconds(3)
print("ready", flush=True)
sys.stdin.readline()
print(seconds(40))
"""


def seconds(name: str, processes: int) -> float:
    """How long processes that start at the same time take, the longest of them."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SECONDS, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    for process in started:
        process.stdout.readline()
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in started)


def main() -> None:
    for _ in range(3):
        for name in ("lstm_ext.LSTM", "nn.LSTM"):
            one, two = seconds(name, 1), seconds(name, 2)
            print(f"{name:14s} one {one:.2f} s, two {two:.2f} s: {two / one:.2f} times", flush=True)


if __name__ == "__main__":
    main()
