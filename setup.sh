#!/bin/sh
# Makes .venv with the tested versions. Typed again after an interruption it goes on: pip keeps what is installed.
set -eu
cd "$(dirname "$0")"

stop() {
    echo "setup: $*" >&2
    exit 2
}

python=
for name in ${PYTHON:-python3.12 python3.11 python3.10 python3}; do
    if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
        python=$name
        break
    fi
done
[ -n "$python" ] || stop "no Python 3.10, 3.11 or 3.12 among: ${PYTHON:-python3.12 python3.11 python3.10 python3}." \
    "Install one, or say where it is: make setup PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    stop "$python cannot make virtual environments. On Debian and Ubuntu: sudo apt-get install python3-venv"
# DeepSpeed compiles a small C++ part for communication between processes on a CPU.
command -v "${CXX:-c++}" >/dev/null || stop "no C++ compiler. On Debian and Ubuntu: sudo apt-get install g++"
"$python" -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2>/dev/null ||
    stop "the header Python.h of $python is missing. On Debian and Ubuntu: sudo apt-get install python3-dev"

export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'

# Built now, because a run that is killed while it builds leaves a lock behind on which every later run would wait.
rm -f .venv/torch_extensions/*/lock
echo "Building DeepSpeed's shared-memory communication (about a minute)"
.venv/bin/python - >.venv/build.log 2>&1 <<'END' || stop "DeepSpeed's C++ part did not build; the reason is in .venv/build.log"
from deepspeed.accelerator import get_accelerator

builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
if builder is not None:  # None on a GPU, where NCCL does this work
    builder.load()
END
touch .venv/.ready
