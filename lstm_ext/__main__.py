"""``python -m lstm_ext``: what was built, what runs here, and why not what doesn't."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from lstm_ext import _C, _build
from lstm_ext._version import __version__
from lstm_ext.cpu.engine import isa_error
from lstm_ext.cuda.products import open_vendor

# What each variant of the CPU kernels needs (csrc/cpu/dispatch.cpp), best first.
AVX2 = ("avx2", "fma", "f16c")
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", *AVX2)
X86_VARIANTS = {
    "avx512_bf16": ("avx512_bf16", "avx512_vnni", *AVX512),
    "avx512_vnni": ("avx512_vnni", *AVX512),
    "avx512": AVX512,
    "avx2": AVX2,
    "portable": (),
}
ARM_VARIANTS = {
    "neon_bf16": ("neon_bf16", "neon_dot"),
    "neon_dot": ("neon_dot",),
    "portable": (),
}
# By architecture; on another one, portable alone.
CPU_VARIANTS = dict.fromkeys(("x86_64", "amd64"), X86_VARIANTS)
CPU_VARIANTS |= dict.fromkeys(("aarch64", "arm64"), ARM_VARIANTS)
UNUSED = {"x86_64": ("AMX", "amx_tile"), "aarch64": ("SVE", "sve")}

NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice
NO_CUDA_TORCH = (
    "{name} is built without CUDA, so it has no CUDA tensors: install a CUDA build of torch"
)


def cpu_report() -> dict[str, Any]:
    """Which kernel variants run on this processor, each with the reason if it does not."""
    features = _C.cpu_features()
    runnable, selected = list(_C.cpu_isas()), _C.cpu_isa()
    architecture = _C.build_info()["architecture"].lower()
    variants = {}
    for name, needed in CPU_VARIANTS.get(architecture, {"portable": ()}).items():
        missing = [feature for feature in needed if not features[feature]]
        if name in runnable:
            reason = ""
        elif missing:
            reason = f"this processor or system lacks {', '.join(missing)}"
        else:
            reason = "not compiled into this build"
        variants[name] = {"runs": name in runnable, "reason": reason}
    return {
        "architecture": platform.machine(),
        "variants": variants,
        "selected": selected,
        "error": isa_error,
        "features": features,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def cuda_report() -> dict[str, Any]:
    """CUDA as this binary, the driver and torch see it.

    ``why_not`` lists what is in the way, ``commands`` what to run in a checkout of the sources
    to build with CUDA, or for a device that the build has no code for.
    """
    build = _C.build_info()
    report: dict[str, Any] = {
        "built": build["cuda"],
        "torch_cuda": torch.version.cuda,
        "devices": [],
        "why_not": [],
        "commands": [],
    }
    if not build["cuda"]:
        report["why_not"].append(f"not in this build: {build['cuda_reason']}")
        if _build.find_toolkit(os.environ) is None:
            report["commands"].append(_build.TOOLKIT_COMMAND)
        report["commands"].append(_build.CUDA_BUILD_COMMAND)
        return report
    report |= _C.cuda_report()
    # What multiplies: cuBLASLt of this version, or torch, and why.
    no_vendor = open_vendor(_C)
    report["vendor"] = {"version": _C.cuda_vendor_version(), "why_not": no_vendor}
    runtime = version_text(report["runtime_version"])
    if report["error"]:
        report["why_not"].append(f"{report['error_text']} (error {report['error']})")
        if report["driver_version"]:
            driver = version_text(report["driver_version"])
            report["why_not"].append(f"the NVIDIA driver supports CUDA {driver}")
        else:
            report["why_not"].append(
                f"no NVIDIA driver was found; one that supports CUDA {runtime} is needed"
            )
    elif not report["devices"]:
        report["why_not"].append("the NVIDIA driver shows no device to this process")
    if torch.version.cuda is None:
        report["why_not"].append(NO_CUDA_TORCH.format(name=f"torch {torch.__version__}"))
    elif report["devices"] and not torch.cuda.is_available():
        report["why_not"].append(f"torch {torch.__version__} cannot use the device")
    for device in report["devices"]:
        if device["error"] == NO_KERNEL_IMAGE:
            archs = f"LSTM_EXT_CUDA_ARCHS={device['major']}{device['minor']}"
            report["commands"].append(f"{archs} {_build.CUDA_BUILD_COMMAND}")
    return report


def collect() -> dict[str, Any]:
    """The whole report, as ``--json`` prints it."""
    return {
        "version": __version__,
        "path": str(Path(__file__).parent),
        "module": _C.__file__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "build": _C.build_info(),
        "cpu": cpu_report(),
        "cuda": cuda_report(),
    }


def version_text(coded: int) -> str:
    """13000 as "13.0": the coding of CUDA's own version queries."""
    return f"{coded // 1000}.{coded % 1000 // 10}"


def device_text(device: dict[str, Any]) -> str:
    """One device on one line, then the code it runs or why it cannot run any."""
    name = f"{device['name']}, compute capability {device['major']}.{device['minor']}"
    size = (
        f"{device['sm_count']} multiprocessors with {device['shared_memory_optin'] / 2**10:.0f} KiB"
        f" of shared memory a block, {device['l2_bytes'] / 2**20:.0f} MiB L2,"
        f" {device['memory_bytes'] / 2**30:.1f} GiB"
    )
    if device["error"]:
        code = f"cannot be used: {device['error_text']} (error {device['error']})"
    elif device["binary_version"] == device["ptx_version"]:
        code = f"runs code for {device['binary_version']}"
    else:
        code = f"runs code for {device['binary_version']}, made from PTX of {device['ptx_version']}"
    return f"{name}; {size}; {code}"


def lines(report: dict[str, Any]) -> list[str]:
    """The report as a person reads it."""
    out: list[str] = []

    def row(label: str, text: str) -> None:
        head = f"  {label:<12}"
        out.append(
            textwrap.fill(
                text,
                width=100,
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_long_words=False,
                break_on_hyphens=False,
            )
        )

    build, cpu, cuda = report["build"], report["cpu"], report["cuda"]
    out.append(f"lstm_ext {report['version']}")
    row("installed", report["path"])
    row("Python", f"{report['python']} on {report['platform']}")
    row("torch", report["torch"] + (f", CUDA {cuda['torch_cuda']}" if cuda["torch_cuda"] else ""))

    out += ["", "Build"]
    if build["version"] != report["version"]:
        row("OUT OF DATE", f"the native module is of version {build['version']}: build it again")
    row("compiler", f"{build['compiler']} for {build['architecture']}")
    row("flags", build["flags"])
    row("OpenMP", "yes" if build["openmp"] else "no: one thread only")
    if build["cuda"]:
        archs = _build.describe_archs(build["cuda_archs"])
        row("CUDA", f"toolkit {build['cuda_version']}, for {archs}")
    else:
        row("CUDA", f"no: {build['cuda_reason']}")

    out += ["", f"CPU ({cpu['architecture']}, {cpu['cores']} cores)"]
    by = " by LSTM_EXT_CPU_ISA" if os.environ.get("LSTM_EXT_CPU_ISA") else ""
    if cpu["error"]:
        by = ""
        row("NOT USABLE", f"importing lstm_ext fails: {cpu['error']}")
    for name, variant in cpu["variants"].items():
        chosen = f" (selected{by})" if name == cpu["selected"] else ""
        row(name, f"yes{chosen}" if variant["runs"] else f"no: {variant['reason']}")
    row("threads", f"{cpu['threads']}, as torch.get_num_threads() says")
    if found := UNUSED.get(build["architecture"]):
        name, feature = found
        row("not used", f"{name} {'yes' if cpu['features'][feature] else 'no'}")

    out += ["", "CUDA"]
    if cuda["built"]:
        driver = cuda["driver_version"]
        row("runtime", f"{version_text(cuda['runtime_version'])}, linked statically")
        row("driver", f"supports CUDA {version_text(driver)}" if driver else "none")
        version, why_not = cuda["vendor"]["version"], cuda["vendor"]["why_not"]
        by = f"torch, because cuBLASLt cannot be used: {why_not}"
        if not why_not:
            by = f"cuBLASLt {version // 10000}.{version // 100 % 100}.{version % 100}"
        row("products", f"by {by}")
    for index, device in enumerate(cuda["devices"]):
        row(f"device {index}", device_text(device))
    for number, reason in enumerate(cuda["why_not"]):
        row("" if number else "not usable", reason)
    if cuda["commands"]:
        row("to get it", "in a checkout of the sources, run:")
        out.extend(" " * 14 + command for command in cuda["commands"])  # whole, to be copied
    return out


def main(arguments: list[str] | None = None) -> int:
    """Prints the report and returns the exit status, 0."""
    parser = argparse.ArgumentParser(prog="python -m lstm_ext", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    report = collect()
    if parser.parse_args(arguments).json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(lines(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
