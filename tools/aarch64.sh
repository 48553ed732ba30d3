#!/usr/bin/env bash
# The suite on an ARM processor that QEMU emulates, from an x86 checkout that `make build` has set up:
#
#   apt-get install g++-aarch64-linux-gnu qemu-user-static mmdebstrap
#   tools/aarch64.sh tests/test_kernels.py        # what follows goes to pytest
#
# The core is cross-compiled into build/aarch64, Debian's Python and PyTorch's wheel for ARM are put
# beside it: PyTorch 2.10.0, the last whose wheel there is for the CPU alone. Slow: a minute to import
# torch, and some tens of times a processor's time for the rest. Tests that start Python again need
# the kernel's binfmt_misc to know qemu-aarch64-static, as docker's images for QEMU arrange; of those
# test_openmp_grants_fewer_threads never ends, in nn.LSTM in float64, which this PyTorch hangs in.
set -euo pipefail
cd "$(dirname "$0")/.."

folder="$PWD/build/aarch64" bin="$PWD/.venv/bin"
root="$folder/root" site="$folder/site"
mkdir -p "$folder"

if [ ! -e "$root/usr/bin/python3.11" ]; then
  mmdebstrap --arch=arm64 --variant=extract --include=python3,libpython3-dev,libgomp1,libstdc++6 \
    bookworm "$root"
fi
if [ ! -e "$site/torch" ]; then
  # By name, for pip reads a package's requirements as those of the machine at hand.
  "$bin/python" -m pip install --quiet --no-deps --target "$site" --only-binary=:all: \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --python-version 3.11 \
    torch==2.10.0 numpy sympy mpmath networkx filelock fsspec jinja2 markupsafe typing-extensions \
    setuptools pytest iniconfig pluggy packaging pygments allpairspy expecttest safetensors
fi
"$bin/cmake" -S csrc -B "$folder/core" -G Ninja --log-level=WARNING \
  -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS="-isystem $root/usr/include" \
  -DPython_EXECUTABLE="$bin/python" -DPython_INCLUDE_DIR="$root/usr/include/python3.11" \
  -DLSTM_EXT_PYBIND11_INCLUDE="$("$bin/python" -c 'import pybind11; print(pybind11.get_include())')" \
  -DLSTM_EXT_VERSION="$("$bin/python" -c 'import lstm_ext; print(lstm_ext.__version__)')"
"$bin/cmake" --build "$folder/core"
# By another name first: a run that has the file loaded keeps its own.
cp "$folder"/core/_C*.so "$folder/_C.so"
mv "$folder/_C.so" lstm_ext/_C.cpython-311-aarch64-linux-gnu.so

printf '%s\n' "$site" "$PWD" >"$root/usr/lib/python3/dist-packages/lstm_ext.pth"

# PyTorch's own products in bfloat16 take SME for more than Debian 12's QEMU knows of it.
export QEMU_CPU="${QEMU_CPU:-max,sme=off}" QEMU_LD_PREFIX="$root" PYTHONDONTWRITEBYTECODE=1
exec qemu-aarch64-static "$root/usr/bin/python3.11" -m pytest -q -p no:cacheprovider "$@"
