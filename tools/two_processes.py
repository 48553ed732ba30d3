"""How much longer two training processes take on the cores that one has.

Run as python tools/two_processes.py, where there are two cores; the ideal is 2. It takes minutes.
With two threads each, the scheduler and OpenMP's own waiting, milliseconds at the end of every
parallel region, make it vary from run to run, for nn.LSTM too: no test. With one thread each, they
do not wait for each other.
"""

import argparse
import subprocess
import sys

SECONDS = """
import sys, time
import torch
import lstm_ext

torch.set_num_threads(int(sys.argv[2]))
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


def seconds(name: str, processes: int, threads: int) -> float:
    """How long processes of so many threads that start at the same time take, the longest."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SECONDS, name, str(threads)],
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="of all measurements (default: 3)")
    for _ in range(parser.parse_args().rounds):
        for name in ("lstm_ext.LSTM", "nn.LSTM"):
            one = seconds(name, 1, 2)
            two, apart = (seconds(name, 2, threads) / one for threads in (2, 1))
            times = f"two: {two:.2f} times that, {apart:.2f} with a thread each"
            print(f"{name:14s} one {one:.2f} s; {times}", flush=True)


if __name__ == "__main__":
    main()
